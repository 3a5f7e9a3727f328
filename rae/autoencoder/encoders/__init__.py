"""Frozen encoders: images in [0, 1] to latent tokens. One file a family; importing registers them."""

from rae.autoencoder.encoders import dinov2, dinov3, mae, raev2, siglip2, timm, vit
from rae.autoencoder.encoders.base import Encoder

__all__ = ["Encoder", "dinov2", "dinov3", "mae", "raev2", "siglip2", "timm", "vit"]
