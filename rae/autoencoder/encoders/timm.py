"""Any timm backbone as an encoder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.autoencoder.backbones import TimmFeatures, save_state_dict
from rae.autoencoder.encoders.base import Encoder
from rae.config.registry import register
from rae.config.values import Count


@register("encoder", "timm")
class Timm(Encoder):
    """Feature maps of chosen levels, each normalised over its channels, on one grid, side by side.

    Args:
        model: timm's model name, e.g. ``tf_efficientnet_lite0`` or ``vit_base_patch14_dinov2.lvd142m``.
        levels: indices into the model's ``feature_info``, or None for the last level.
        weights: see :class:`rae.autoencoder.backbones.TimmFeatures`.
        input_size: pixels a side.
        grid: latent tokens a side; None is the finest chosen level's. Finer maps are folded into channels
            (space to depth), coarser ones enlarged (bilinear).
    """

    weights_argument = "weights"
    families = ("timm_wrapper",)

    def __init__(
        self,
        model: str,
        levels: list[int] | None = None,
        weights: str | None = None,
        input_size: Count = 224,
        grid: Count | None = None,
    ):
        features = TimmFeatures(model, [-1] if levels is None else levels, weights, input_size)
        sizes = [size for size, _ in features.sizes]
        grid = max(sizes) if grid is None else grid
        if grid < 1 or any(size > grid and size % grid for size in sizes):
            raise ValueError(f"grid {grid} does not divide the levels' sizes, {sizes}")
        folded = [max(1, size // grid) ** 2 for size in sizes]
        channels = sum(c * times for c, times in zip(features.channels, folded, strict=True))
        super().__init__(channels, input_size, grid, features.mean, features.std)
        self.backbone = features

    def save_weights(self, folder: Path) -> str:
        state = self.backbone.network.state_dict()  # under the names by which TimmFeatures looks for them:
        save_state_dict({name.removeprefix("model."): t for name, t in state.items()}, folder / "model.safetensors")
        return "model.safetensors"

    def tokens(self, image: Tensor) -> Tensor:
        maps = [self._on_grid(_normalize_channels(f)) for f in self.backbone.maps(image)]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def _on_grid(self, feature: Tensor) -> Tensor:
        size = feature.shape[-1]
        if size == self.grid:
            return feature
        if size > self.grid:
            return F.pixel_unshuffle(feature, size // self.grid)
        return F.interpolate(feature, size=(self.grid, self.grid), mode="bilinear", align_corners=False)


def _normalize_channels(feature: Tensor) -> Tensor:
    return F.layer_norm(feature.movedim(1, -1), feature.shape[1:2]).movedim(-1, 1)
