"""Plugins that change training: losses beyond the pixel loss, the GAN, the weight average.

May import: config, autoencoder.
"""

from rae.algorithms import adversarial, ema, feature_loss, perceptual
from rae.algorithms.base import LossTerm, reached

__all__ = ["LossTerm", "adversarial", "ema", "feature_loss", "perceptual", "reached"]
