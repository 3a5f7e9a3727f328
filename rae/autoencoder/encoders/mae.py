"""Masked autoencoder's encoder (arXiv 2111.06377), used without masking."""

import torch
from torch import Tensor

from rae.autoencoder.encoders.base import PretrainedEncoder, from_pretrained
from rae.autoencoder.encoders.joining import Join, Layers, Norm
from rae.config.registry import register
from rae.config.values import Count


@register("encoder", "mae", "MAEwNorm", "MaeEncoder")
class MAE(PretrainedEncoder):
    """All patch tokens in order, CLS dropped; the final LayerNorm keeps no affine.

    Args:
        pretrained: a hub id, or a folder that transformers saved.
        input_size: pixels a side, a multiple of the patch size (16): 256 gives 256 tokens.
        layers, join, token_mean, norm: which layers are the latent, see
            :class:`rae.autoencoder.encoders.joining.Layers`; by default the last.
    """

    families = ("vit_mae",)
    num_prefix_tokens = 1

    def __init__(
        self,
        pretrained: str = "facebook/vit-mae-base",
        input_size: Count = 256,
        layers: list[int] | None = None,
        join: Join = "mean",
        token_mean: bool = False,
        norm: Norm = "plain",
    ):
        from transformers import ViTMAEModel

        source = from_pretrained(ViTMAEModel, pretrained, input_size=input_size, mask_ratio=0.0)
        super().__init__(*source, input_size, Layers(layers, join, token_mean, norm))

    def run(self, image: Tensor) -> Tensor:
        # The model sorts tokens by this noise: a rising one keeps their order.
        order = torch.arange(self.grid**2, device=image.device, dtype=torch.float32).expand(len(image), -1)
        output = self.backbone(pixel_values=image, noise=order, interpolate_pos_encoding=True)
        return output.last_hidden_state
