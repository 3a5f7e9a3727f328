"""SigLIP 2's vision tower (arXiv 2502.14786)."""

from torch import Tensor

from rae.autoencoder.encoders.base import PretrainedEncoder, from_pretrained
from rae.autoencoder.encoders.joining import Join, Layers, Norm
from rae.config.registry import register
from rae.config.values import Count


@register("encoder", "siglip2", "SigLIP2", "SigLIP2wNorm")
class SigLIP2(PretrainedEncoder):
    """All tokens (there is no CLS); the post-LayerNorm keeps no affine.

    Args:
        pretrained: a hub id, or a folder that transformers saved.
        input_size: pixels a side, a multiple of the patch size (16): 256 gives 256 tokens.
        layers, join, token_mean, norm: which layers are the latent, see
            :class:`rae.autoencoder.encoders.joining.Layers`; by default the last.
    """

    families = ("siglip_vision_model",)
    final_norm = "post_layernorm"

    def __init__(
        self,
        pretrained: str = "google/siglip2-base-patch16-256",
        input_size: Count = 256,
        layers: list[int] | None = None,
        join: Join = "mean",
        token_mean: bool = False,
        norm: Norm = "plain",
    ):
        from transformers import SiglipVisionModel

        source = from_pretrained(SiglipVisionModel, pretrained, input_size=input_size)
        super().__init__(*source, input_size, Layers(layers, join, token_mean, norm))

    def run(self, image: Tensor) -> Tensor:
        return self.backbone(pixel_values=image, interpolate_pos_encoding=True).last_hidden_state
