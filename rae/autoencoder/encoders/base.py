"""What every encoder is, and how encoders are loaded from Hugging Face folders."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rae.autoencoder.backbones import save_state_dict, weightless
from rae.autoencoder.encoders.architectures import PUBLISHED
from rae.autoencoder.layers import Normalize, resize
from rae.config.errors import UserError, first_line


class Encoder(nn.Module):
    """An image encoder. Subclasses set up a backbone and define :meth:`tokens`.

    Args:
        embed_dim: latent channels C.
        input_size: side in pixels that the backbone sees; images of another size are resized to it (bicubic).
        grid: latent tokens a side.
        mean, std: the backbone's normalisation, three numbers each, for images in [0, 1].
    """

    weights_argument: ClassVar[str] = ""
    """The constructor's argument that names the backbone's weights, for encoders that can save them."""

    def __init__(self, embed_dim: int, input_size: int, grid: int, mean, std):
        super().__init__()
        self.embed_dim, self.input_size, self.grid = embed_dim, input_size, grid
        self.normalize = Normalize(mean, std)

    def tokens(self, image: Tensor) -> Tensor:
        """Normalised image (B, 3, input_size, input_size) -> tokens (B, grid², embed_dim)."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> tokens (B, grid², embed_dim)."""
        return self.tokens(self.normalize(resize(image, self.input_size)))

    def save_weights(self, folder: Path) -> str:
        """Write the backbone's weights into an existing folder.

        Returns:
            what of the folder ``weights_argument`` is to name, relative to it.
        """
        raise NotImplementedError


class PretrainedEncoder(Encoder):
    """An encoder on a transformers model, whose final LayerNorm keeps no affine: latents are normalised, not rescaled.

    Args:
        backbone, processor: see :func:`from_pretrained`.
        input_size: pixels a side.

    Raises:
        ValueError: ``input_size`` is not a multiple of the patch.
    """

    weights_argument = "pretrained"
    final_norm: ClassVar[str] = "layernorm"
    """The module's name in the backbone."""

    def __init__(self, backbone: Any, processor: dict[str, Any], input_size: int):
        width, patch_size = backbone.config.hidden_size, backbone.config.patch_size
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of the encoder's patch size {patch_size}")
        super().__init__(width, input_size, input_size // patch_size, processor["image_mean"], processor["image_std"])
        norm = backbone.get_submodule(self.final_norm)
        plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        backbone.set_submodule(self.final_norm, plain)
        self.backbone = backbone

    def save_weights(self, folder: Path) -> str:
        from transformers.core_model_loading import revert_weight_conversion

        mean, std = (tensor.flatten().tolist() for tensor in (self.normalize.mean, self.normalize.std))
        # Under the names that the hub has, which every version of transformers reads.
        state = revert_weight_conversion(self.backbone, self.backbone.state_dict())
        save_pretrained(folder, self.backbone.config, state, self.final_norm, mean, std)
        return "."


def save_pretrained(
    folder: Path, config: Any, state: dict[str, Tensor], final_norm: str, mean: list[float], std: list[float]
) -> None:
    """Write a folder that :func:`from_pretrained` reads.

    Args:
        config: transformers' configuration of the model.
        state: its weights, but for the affine of ``final_norm``, which becomes the identity.
    """
    width = torch.ones(config.hidden_size)
    whole = {**state, f"{final_norm}.weight": width, f"{final_norm}.bias": torch.zeros_like(width)}
    config.save_pretrained(folder)
    save_state_dict(whole, folder / "model.safetensors")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def from_pretrained(model_class: Any, name: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A transformers model and its image processor's settings, from a hub id or a local folder.

    On the meta device (:func:`rae.autoencoder.backbones.weightless`) the configuration is enough.

    Raises:
        UserError: neither a local folder nor reachable on the hub, or of another architecture.
    """
    if weightless():
        return _from_architecture(model_class, name, **kwargs), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    from safetensors import SafetensorError
    from transformers import BaseImageProcessor
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists the weights that a part of a model leaves unused
    # Loading takes a moment; a download keeps its bar.
    hook = logging.set_tqdm_hook(lambda bar, given, named: bar(*given, **{**named, "disable": True}))
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(name)
        told = dict(output_loading_info=True, ignore_mismatched_sizes=True)  # refused below, in a line
        model, loading = model_class.from_pretrained(name, **told, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot load the encoder {name!r}: {first_line(error)} (give a hub id, with a connection or a filled "
            "cache, or the path of a folder that transformers saved)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)
    lacking = sorted(key for key in (*loading["missing_keys"], *(k for k, *_ in loading["mismatched_keys"])))
    lacking = [key for key in lacking if "pooler" not in key]
    if lacking:
        raise UserError(
            f"cannot load the encoder {name!r}: it lacks weights of a {model_class.__name__}, such as {lacking[0]}; "
            "is it of another family, or incomplete?"
        )
    return model, processor


def _from_architecture(model_class: Any, name: str, **kwargs: Any) -> nn.Module:
    from transformers import AutoConfig

    family, sizes = PUBLISHED.get(name, ("", {}))
    config_class = getattr(model_class, "config_class", None)
    try:
        if name in PUBLISHED:
            config = AutoConfig.for_model(family, **sizes, **kwargs)
        else:
            config = (config_class or AutoConfig).from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the encoder {name!r} is neither a local folder nor a known or reachable model: "
            f"{first_line(error)} (known are {', '.join(PUBLISHED)})"
        ) from error
    return model_class(config) if config_class else model_class.from_config(config)
