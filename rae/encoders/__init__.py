"""Frozen encoders: images in [0, 1] to latent tokens. One file a family; importing registers them."""

from rae.encoders import dinov2, mae, siglip2, timm
from rae.encoders.base import Encoder

__all__ = ["Encoder", "dinov2", "mae", "siglip2", "timm"]
