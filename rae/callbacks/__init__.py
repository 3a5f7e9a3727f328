"""Plugins that watch training: pictures, metrics as a file, what precedes a step. One file each."""

from rae.callbacks import begin_step, jsonl, pictures

__all__ = ["begin_step", "jsonl", "pictures"]
