"""DINOv3's vision transformers (arXiv 2508.10104)."""

from torch import Tensor

from rae.autoencoder.encoders.base import PretrainedEncoder, from_pretrained
from rae.autoencoder.encoders.joining import Join, Layers, Norm
from rae.config.registry import register
from rae.config.values import Count


@register("encoder", "dinov3")
class DINOv3(PretrainedEncoder):
    """Patch tokens of the last layer, or of several; CLS and registers are dropped.

    Args:
        pretrained: a hub id, or a folder that transformers saved.
        input_size: pixels a side, a multiple of the patch size (16): 256 gives 256 tokens.
        layers, join, token_mean, norm: which layers are the latent, see
            :class:`rae.autoencoder.encoders.joining.Layers`; by default the last.
    """

    families = ("dinov3_vit",)
    final_norm = "norm"

    def __init__(
        self,
        pretrained: str = "facebook/dinov3-vitl16-pretrain-lvd1689m",
        input_size: Count = 256,
        layers: list[int] | None = None,
        join: Join = "mean",
        token_mean: bool = False,
        norm: Norm = "plain",
    ):
        from transformers import DINOv3ViTModel

        source = from_pretrained(DINOv3ViTModel, pretrained, input_size=input_size)
        super().__init__(*source, input_size, Layers(layers, join, token_mean, norm))
        self.num_prefix_tokens = 1 + self.backbone.config.num_register_tokens

    def run(self, image: Tensor) -> Tensor:
        return self.backbone(pixel_values=image).last_hidden_state
