"""Plugins that watch training: pictures, metrics as a file, the console, what precedes a step. One file each."""

from rae.callbacks import begin_step, console, data_log, guard, histograms, jsonl, pictures, referee, wandb

__all__ = ["begin_step", "console", "data_log", "guard", "histograms", "jsonl", "pictures", "referee", "wandb"]
