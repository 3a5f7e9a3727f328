"""The perceptual loss: LPIPS, or distances between a timm network's features."""

from typing import Literal

from torch import Tensor

from rae.algorithms.base import LossTerm
from rae.autoencoder.losses import LPIPS, FeatureDistance
from rae.config.registry import register
from rae.config.times import TimeString


@register("algorithm", "perceptual")
class Perceptual(LossTerm):
    """Add ``weight`` × LPIPS(recon, image) to the loss (arXiv 1801.03924).

    Args:
        network: ``vgg`` (the published recipe), ``alex`` or ``squeeze`` for LPIPS; ``timm`` for the features of
            a timm model, without learned weights.
        weight: 1.0 in the published recipe.
        start: when it sets in.
        weights: where the backbone's weights come from; see :class:`rae.autoencoder.losses.LPIPS` and
            :class:`rae.autoencoder.backbones.TimmFeatures`.
        model, levels: of a ``timm`` network.
        chunk: images that go through the network at a time; fewer need less memory, and the numbers are the same.
    """

    def __init__(
        self,
        network: Literal["vgg", "alex", "squeeze", "timm"] = "vgg",
        weight: float = 1.0,
        start: TimeString = "0ep",
        weights: str | None = None,
        model: str | None = None,
        levels: list[int] | None = None,
        chunk: int | None = 8,
    ):
        if network == "timm" and model is None:
            raise ValueError("network: timm needs model: (a timm model name)")
        if network != "timm" and (model is not None or levels is not None):
            raise ValueError("model: and levels: go with network: timm")
        distance = FeatureDistance(model, levels, weights) if model else LPIPS(network, weights)
        super().__init__("perceptual" if model else "lpips", weight, start, distance, chunk)

    def compute(self, recon: Tensor, image: Tensor) -> Tensor:
        return self.network(recon, image)  # type: ignore[misc]
