"""Frozen encoders: images in [0, 1] to latent tokens. One file a family; importing registers them."""

from rae.autoencoder.encoders import dinov2, mae, siglip2, timm
from rae.autoencoder.encoders.base import Encoder

__all__ = ["Encoder", "dinov2", "mae", "siglip2", "timm"]
