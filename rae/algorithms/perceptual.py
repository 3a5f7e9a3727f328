"""The perceptual loss: LPIPS, or distances between a timm network's features."""

from typing import Literal

from torch import Tensor

from rae.algorithms.base import LossTerm
from rae.autoencoder.losses import LPIPS, FeatureDistance
from rae.config.registry import register
from rae.config.times import TimeString
from rae.config.values import Count, NotNegative


@register("algorithm", "perceptual", context=("image_size",))
class Perceptual(LossTerm):
    """Add ``weight`` × LPIPS(recon, image) to the loss (arXiv 1801.03924).

    Args:
        network: ``vgg`` (the published recipe), ``alex`` or ``squeeze`` for LPIPS; ``timm`` for the features of
            a timm model, without learned weights.
        weight: 1.0 in the published recipe.
        start: when it sets in.
        weights: where the backbone's weights come from; see :class:`rae.autoencoder.losses.LPIPS` and
            :class:`rae.autoencoder.backbones.TimmFeatures`.
        model, levels, input_size: of a ``timm`` network; without ``input_size`` it sees the images as they are.
        chunk: images that go through the network at a time; fewer need less memory, and the numbers are the same.
        image_size: side of the images (supplied).
    """

    def __init__(
        self,
        network: Literal["vgg", "alex", "squeeze", "timm"] = "vgg",
        weight: NotNegative = 1.0,
        start: TimeString = "0ep",
        weights: str | None = None,
        model: str | None = None,
        levels: list[int] | None = None,
        input_size: Count | None = None,
        chunk: Count | None = 8,
        image_size: int | None = None,
    ):
        if network == "timm" and model is None:
            raise ValueError("network: timm needs model: (a timm model name)")
        if network != "timm" and (model, levels, input_size) != (None, None, None):
            raise ValueError("model:, levels: and input_size: go with network: timm")
        if model:
            super().__init__(
                "perceptual", weight, start, FeatureDistance(model, levels, weights, input_size, image_size), chunk
            )
        else:
            super().__init__("lpips", weight, start, LPIPS(network, weights), chunk)

    def compute(self, recon: Tensor, image: Tensor) -> Tensor:
        return self.network(recon, image)  # type: ignore[misc]
