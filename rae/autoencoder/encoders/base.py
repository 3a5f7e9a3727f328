"""What every encoder is, and how encoders are loaded from Hugging Face folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rae.autoencoder.backbones import save_state_dict, weightless
from rae.autoencoder.encoders.architectures import PUBLISHED
from rae.autoencoder.encoders.joining import LAST, Layers, Taps, made_plain, row_of
from rae.autoencoder.layers import Normalize, resize
from rae.config.errors import UserError, first_line
from rae.config.registry import plugins


class Encoder(nn.Module):
    """An image encoder. Subclasses set up a backbone and define :meth:`tokens`.

    Args:
        embed_dim: latent channels C.
        input_size: side in pixels that the backbone sees; images of another size are resized to it (bicubic).
        grid: latent tokens a side.
        mean, std: the backbone's normalisation, three numbers each, for images in [0, 1].

    Raises:
        ValueError: a size that is not positive.
    """

    weights_argument: ClassVar[str] = ""
    """The constructor's argument that names the backbone's weights, for encoders that can save them."""

    def __init__(self, embed_dim: int, input_size: int, grid: int, mean, std):
        super().__init__()
        if min(embed_dim, input_size, grid) < 1:
            raise ValueError(f"input_size {input_size} must be positive, and large enough for a token")
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
    """An encoder on a transformers model. Subclasses define :meth:`run`.

    Args:
        backbone, processor: see :func:`from_pretrained`.
        input_size: pixels a side.
        layers: which of its layers are the latent.

    Attributes:
        num_prefix_tokens: tokens before those of patches.

    Raises:
        ValueError: ``input_size`` is not a multiple of the patch; there are no such layers.
    """

    weights_argument = "pretrained"
    families: ClassVar[tuple[str, ...]] = ()
    """Of transformers' model types, those that it is for."""
    final_norm: ClassVar[str] = "layernorm"
    """The module's name in the backbone."""

    num_prefix_tokens = 0

    def __init__(self, backbone: Any, processor: dict[str, Any], input_size: int, layers: Layers = LAST):
        width, patch_size = layers.width(backbone.config.hidden_size), backbone.config.patch_size
        check_size(input_size, patch_size)
        super().__init__(width, input_size, input_size // patch_size, processor["image_mean"], processor["image_std"])
        if layers.norm == "plain":
            backbone.set_submodule(self.final_norm, made_plain(backbone.get_submodule(self.final_norm)))
        self.backbone, self.layers = backbone, layers
        self.taps = None if layers == LAST else Taps(row_of(backbone), layers)

    def run(self, image: Tensor) -> Tensor:
        """Normalised image -> all tokens (B, prefix and patches, D) of the last layer, through the final norm."""
        raise NotImplementedError

    def tokens(self, image: Tensor) -> Tensor:
        last = self.run(image)
        if self.taps is None:
            return last[:, self.num_prefix_tokens :]
        norm = nn.Identity() if self.layers.norm == "none" else self.backbone.get_submodule(self.final_norm)
        return self.taps.joined(norm, self.num_prefix_tokens)

    def save_weights(self, folder: Path) -> str:
        from transformers.core_model_loading import revert_weight_conversion

        mean, std = (tensor.flatten().tolist() for tensor in (self.normalize.mean, self.normalize.std))
        # Under the names that the hub has, which every version of transformers reads.
        state = revert_weight_conversion(self.backbone, self.backbone.state_dict())
        norm = self.final_norm if self.layers.norm == "plain" else ""
        save_pretrained(folder, self.backbone.config, state, norm, mean, std)
        return "."


def save_pretrained(
    folder: Path, config: Any, state: dict[str, Tensor], final_norm: str, mean: list[float], std: list[float]
) -> None:
    """Write a folder that :func:`from_pretrained` reads.

    Args:
        config: transformers' configuration of the model.
        state: its weights.
        final_norm: whose affine they lack, which becomes the identity; empty where they lack none.
    """
    width = torch.ones(config.hidden_size)
    affine = {f"{final_norm}.weight": width, f"{final_norm}.bias": torch.zeros_like(width)} if final_norm else {}
    whole = {**state, **affine}
    config.save_pretrained(folder)
    save_state_dict(whole, folder / "model.safetensors")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def from_pretrained(
    model_class: Any, name: str, *, families: Sequence[str] = (), input_size: int | None = None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """A transformers model and its image processor's settings, from a hub id or a local folder.

    On the meta device (:func:`rae.autoencoder.backbones.weightless`) the configuration is enough.

    Args:
        model_class: transformers' class, or ``AutoModel``.
        families: transformers' model types that it may be of; empty for those of ``model_class``.
        input_size: pixels a side, refused before weights are read unless it is a multiple of the model's patch.
        kwargs: for the model's configuration.

    Raises:
        ValueError: it is of another family, or does not take ``input_size``.
        UserError: neither a local folder nor reachable on the hub, or incomplete.
    """
    config = _config_of(model_class, name, kwargs)
    _check_family(model_class, name, config.model_type, families)
    if input_size is not None:
        check_size(input_size, config.patch_size)
    if weightless():
        auto = getattr(model_class, "config_class", None) is None
        model = model_class.from_config(config) if auto else model_class(config)
        return model, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
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
    except Exception as error:
        raise UserError(_explained(name, error)) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)
    if not (processor.get("image_mean") and processor.get("image_std")):
        raise UserError(
            f"cannot load the encoder {name!r}: its preprocessor_config.json has no image_mean or image_std"
        )
    lacking = sorted(key for key in (*loading["missing_keys"], *(k for k, *_ in loading["mismatched_keys"])))
    lacking = [key for key in lacking if "pooler" not in key]
    if lacking:
        raise UserError(
            f"cannot load the encoder {name!r}: it lacks weights that its configuration names, such as {lacking[0]}; "
            "is it of another family, or incomplete?"
        )
    return model, processor


def check_size(input_size: int, patch_size: int) -> None:
    """Refuse a size that patches do not fill.

    Raises:
        ValueError: ``input_size`` is no multiple of ``patch_size``, or not positive.
    """
    if input_size < 1 or input_size % patch_size:
        raise ValueError(f"input_size {input_size} is not a positive multiple of the encoder's patch size {patch_size}")


def _config_of(model_class: Any, name: str, kwargs: dict[str, Any]) -> Any:
    """The configuration of a model, or of that part of it that ``model_class`` is (an image and text model's tower)."""
    from transformers import AutoConfig

    try:
        if weightless() and name in PUBLISHED:
            family, sizes = PUBLISHED[name]
            return AutoConfig.for_model(family, **sizes, **kwargs)
        config = AutoConfig.from_pretrained(name, **kwargs)
    except Exception as error:
        raise UserError(_explained(name, error)) from error
    part = getattr(getattr(model_class, "config_class", None), "base_config_key", "")
    return getattr(config, part, config) if part else config


def _check_family(model_class: Any, name: str, found: str, families: Sequence[str]) -> None:
    config_class = getattr(model_class, "config_class", None)
    families = families or ([config_class.model_type] if config_class else [])
    if not families or found in families:
        return
    if found == "siglip2_vision_model":
        hint = "NaFlex is not supported"
    else:
        takes = [key for key, encoder in plugins("encoder").items() if found in getattr(encoder, "families", ())]
        hint = f"model.encoder: {{{takes[0]}: …}} takes it" if takes else ""
    raise ValueError(f"{name!r} is a {found} model, not a {' or '.join(families)}{'; ' * bool(hint)}{hint}")


def _explained(name: str, error: Exception) -> str:
    """Why a model cannot be loaded: what its folder lacks, or what transformers says."""
    fault, folder = f"cannot load the encoder {name!r}: ", Path(name).expanduser()
    if folder.is_file():
        return f"{fault}it is a file; give the folder that transformers saved"
    if not folder.is_dir():
        known = f"; known without their configuration are {', '.join(PUBLISHED)}" if weightless() else ""
        return (
            f"{fault}{first_line(error)} (give a hub id, with a connection or a filled cache, or the path of a folder "
            f"that transformers saved{known})"
        )
    if not (folder / "config.json").exists():
        return f"{fault}the folder holds no config.json; give one that transformers' save_pretrained wrote"
    if not any((folder / each).exists() for each in ("preprocessor_config.json", "processor_config.json")):
        return (
            f"{fault}the folder holds no preprocessor_config.json, which says how images are normalised; save the "
            "image processor there too (processor.save_pretrained), or copy the file from where the model is from"
        )
    if not [*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*.bin*")]:
        return f"{fault}the folder holds no weights (model.safetensors); save the model there (model.save_pretrained)"
    return f"{fault}{first_line(error)} (is a file damaged, or missing? copy the folder again)"
