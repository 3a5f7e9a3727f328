"""DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588) or without."""

from torch import Tensor

from rae.autoencoder.encoders.base import PretrainedEncoder, from_pretrained
from rae.autoencoder.encoders.joining import Join, Layers, Norm
from rae.config.registry import register
from rae.config.values import Count


@register("encoder", "dinov2", "Dinov2withNorm")
class DINOv2(PretrainedEncoder):
    """Patch tokens of the last layer; the final LayerNorm keeps no affine.

    Args:
        pretrained: a hub id, or a folder that transformers saved.
        input_size: pixels a side, a multiple of the patch size (14): 224 gives 256 tokens.
        layers, join, token_mean, norm: which layers are the latent, see
            :class:`rae.autoencoder.encoders.joining.Layers`; by default the last.
    """

    families = ("dinov2", "dinov2_with_registers")

    def __init__(
        self,
        pretrained: str = "facebook/dinov2-with-registers-base",
        input_size: Count = 224,
        layers: list[int] | None = None,
        join: Join = "mean",
        token_mean: bool = False,
        norm: Norm = "plain",
    ):
        from transformers import AutoModel

        source = from_pretrained(AutoModel, pretrained, families=self.families, input_size=input_size)
        super().__init__(*source, input_size, Layers(layers, join, token_mean, norm))
        self.num_prefix_tokens = 1 + getattr(self.backbone.config, "num_register_tokens", 0)

    def run(self, image: Tensor) -> Tensor:
        return self.backbone(pixel_values=image).last_hidden_state
