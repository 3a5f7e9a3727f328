"""Any timm backbone as an encoder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.autoencoder.backbones import TimmFeatures, save_state_dict
from rae.autoencoder.encoders.base import Encoder
from rae.config.registry import register


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

    def __init__(
        self,
        model: str,
        levels: list[int] | None = None,
        weights: str | None = None,
        input_size: int = 224,
        grid: int | None = None,
    ):
        features = TimmFeatures(model, levels or [-1], weights, input_size).eval()
        with torch.no_grad():
            maps = features(torch.zeros(1, 3, input_size, input_size))
        if [f.shape[1] for f in maps] != features.channels:
            raise ValueError(f"{model} gives its features in another layout than (B, C, h, w)")
        grid = grid or max(f.shape[-1] for f in maps)
        if any(f.shape[-1] > grid and f.shape[-1] % grid for f in maps):
            raise ValueError(f"grid {grid} does not divide the levels' sizes, {[f.shape[-1] for f in maps]}")
        channels = sum(f.shape[1] * max(1, f.shape[-1] // grid) ** 2 for f in maps)
        super().__init__(channels, input_size, grid, features.mean, features.std)
        self.backbone = features.network

    def save_weights(self, folder: Path) -> str:
        state = self.backbone.state_dict()  # under the names by which TimmFeatures looks for them:
        save_state_dict({name.removeprefix("model."): t for name, t in state.items()}, folder / "model.safetensors")
        return "model.safetensors"

    def tokens(self, image: Tensor) -> Tensor:
        maps = [self._on_grid(_normalize_channels(f)) for f in self.backbone(image)]
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
