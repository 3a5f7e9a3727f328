"""Plugins that watch training: pictures, metrics as a file, the step's random seed. One file each."""

from rae.callbacks import jsonl, pictures, reseed

__all__ = ["jsonl", "pictures", "reseed"]
