"""Any vision transformer of transformers or timm as an encoder, by what its own configuration says."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder.backbones import create_timm, load_weights, save_state_dict, weight_file, weightless
from rae.autoencoder.encoders.base import Encoder, check_size, from_pretrained
from rae.autoencoder.encoders.joining import Join, Layers, Norm, Taps, made_plain, row_of
from rae.config.errors import first_line
from rae.config.registry import register
from rae.config.values import Count

_NORMS = (
    *("norm", "layernorm", "layer_norm", "post_layernorm", "ln_post", "final_layernorm", "post_trunk_norm", "rms_norm"),
    *("encoder.norm", "encoder.layernorm", "trunk.norm", "fc_norm", "pooler.layernorm"),
)
"""Where models keep the norm after their last block."""


@register("encoder", "vit")
class ViT(Encoder):
    """Patch tokens of chosen layers of a vision transformer, each through its final norm.

    What it is, its configuration says: patch size, tokens before those of patches, final norm, mean and std.

    Args:
        model: a hub id or a folder that transformers saved; or timm's name of a model.
        weights: of a timm model, see :class:`rae.autoencoder.backbones.TimmFeatures`; of another, their folder.
        input_size: pixels a side, a multiple of the patch; by default the model's own.
        layers, join, token_mean, norm: which layers are the latent, see
            :class:`rae.autoencoder.encoders.joining.Layers`; by default the last.
        num_prefix_tokens: before those of patches; by default as many as there are more tokens than patches.
        final_norm: the module's name in the model; by default looked for.
        mean, std: of the images that it was trained with; by default the model's own.

    Raises:
        ValueError: it is no vision transformer; what could not be found, and the argument that settles it.
    """

    weights_argument = "weights"

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        input_size: Count | None = None,
        layers: list[int] | None = None,
        join: Join = "mean",
        token_mean: bool = False,
        norm: Norm = "plain",
        num_prefix_tokens: int | None = None,
        final_norm: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ):
        opened = _open_timm if _is_timms(model) else _open_transformers
        network, own = opened(model, weights, input_size)
        size, patch = own["input_size"], own["patch_size"]
        check_size(size, patch)
        chosen = Layers([-1] if layers is None else layers, join, token_mean, norm)
        taken = {"mean": mean or own["mean"], "std": std or own["std"]}
        if not all(taken.values()):
            raise ValueError(f"{model}: its configuration has no mean and std of images; give mean and std")
        super().__init__(chosen.width(own["width"]), size, size // patch, taken["mean"], taken["std"])
        self.run: Callable[[Tensor], Any] = own["run"]
        self.backbone, self.save = network, own["save"]
        self.taps = Taps(row_of(network), chosen)
        self.final_norm = nn.Identity() if norm == "none" else _norm_of(network, final_norm, model)
        if norm == "plain":
            self.final_norm = made_plain(self.final_norm)
        self.num_prefix_tokens = self._prefix(model) if num_prefix_tokens is None else num_prefix_tokens

    def tokens(self, image: Tensor) -> Tensor:
        self.run(image)
        return self.taps.joined(self._normed, self.num_prefix_tokens)

    def _normed(self, layer: Tensor) -> Tensor:
        return self.final_norm(_flat(layer))

    @torch.no_grad()
    def _prefix(self, model: str) -> int:
        """How many tokens there are beside those of patches, by a look at one image."""
        device = next(self.backbone.parameters()).device
        self.run(torch.zeros(1, 3, self.input_size, self.input_size, device=device))
        seen = self.taps.seen.pop(self.taps.indices[-1])
        self.taps.seen.clear()
        more = _flat(seen).shape[1] - self.grid**2
        if more < 0:
            raise ValueError(
                f"{model}: its blocks put out {more + self.grid**2} tokens, where patches make {self.grid**2}; the "
                "encoder timm takes feature maps"
            )
        return more

    def save_weights(self, folder: Path) -> str:
        return self.save(folder)


def _flat(layer: Tensor) -> Tensor:
    """(B, N, D), also of blocks that put out (B, h, w, D)."""
    return layer.flatten(1, -2)


def _is_timms(model: str) -> bool:
    import timm

    return "/" not in model and not Path(model).exists() and timm.is_model(model)


def _norm_of(network: nn.Module, given: str | None, model: str) -> nn.Module:
    modules = dict(network.named_modules())
    names = [given] if given else list(_NORMS)
    for name in names:
        found = modules.get(name)
        if found is not None and not isinstance(found, nn.Identity):
            return found
    if given:
        raise ValueError(f"final_norm: {model} has no module {given!r}; there are {', '.join(list(modules)[1:9])}, …")
    raise ValueError(f"{model}: its final norm is not found; give final_norm (a module's name), or norm: none")


def _one(value: Any) -> int:
    return int(value if isinstance(value, int) else next(iter(value)))


def _open_transformers(model: str, weights: str | None, input_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModel

    whole, processor = from_pretrained(AutoModel, weights or model)
    tower = next((getattr(whole, name) for name in ("vision_model", "vision_tower") if hasattr(whole, name)), whole)
    config = getattr(tower, "config", whole.config)
    config = getattr(config, "vision_config", config)
    patch = getattr(config, "patch_size", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "embed_dim", None)
    if patch is None or width is None:
        raise ValueError(f"{model}: its configuration has no patch_size and hidden_size: it is no vision transformer")
    size = input_size or _one(getattr(config, "image_size", 224))
    takes = inspect.signature(tower.forward).parameters
    more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def save(folder: Path) -> str:
        whole.save_pretrained(folder)
        told: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        told |= {key: list(processor[key]) for key in ("image_mean", "image_std")}
        (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")
        return "."

    return tower, {
        "input_size": size, "patch_size": _one(patch), "width": width, "save": save,
        "mean": processor.get("image_mean"), "std": processor.get("image_std"),
        "run": lambda image: tower(pixel_values=image, **more),
    }  # fmt: skip


def _open_timm(model: str, weights: str | None, input_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    try:
        network, _ = create_timm(model, weights is None and not weightless(), input_size, num_classes=0)
    except (RuntimeError, AssertionError, OSError, ValueError) as error:
        raise ValueError(f"cannot create the timm model {model!r}: {first_line(error)}") from error
    if weights not in (None, "random") and not weightless():
        load_weights(network, weight_file(weights), model, input_size)
    own = network.pretrained_cfg
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch is None:
        raise ValueError(
            f"{model} has no patch_embed: it is no vision transformer; the encoder timm takes feature maps"
        )

    def save(folder: Path) -> str:
        save_state_dict(network.state_dict(), folder / "model.safetensors")
        return "model.safetensors"

    return network, {
        "input_size": input_size or own["input_size"][-1], "patch_size": _one(patch), "width": network.num_features,
        "mean": own["mean"], "std": own["std"], "run": network.forward_features, "save": save,
    }  # fmt: skip
