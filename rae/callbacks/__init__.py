"""Plugins that watch training: pictures, figures, logs, guards, checkpoints.

May import: config, survival, autoencoder, data, algorithms.
"""

from rae.callbacks import begin_step, console, data_log, guard, histograms, jsonl, pictures, referee, wandb

__all__ = ["begin_step", "console", "data_log", "guard", "histograms", "jsonl", "pictures", "referee", "wandb"]
