"""Plugins that watch training: pictures, figures, logs, guards, checkpoints.

May import: adapters, config, survival, autoencoder, data, algorithms.
"""

from rae.callbacks import console, guard, histograms, jsonl, pictures, referee, tensorboard, wandb

__all__ = ["console", "guard", "histograms", "jsonl", "pictures", "referee", "tensorboard", "wandb"]
