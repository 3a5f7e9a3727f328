"""Exported autoencoders: a folder with weights and their own configuration, written and read.

``config.json`` says how to build the autoencoder, ``model.safetensors`` holds its decoder and latent statistics. The
frozen encoder is named, by hub id or path, or lies beside them in ``encoder/``.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from pydantic import Field
from torch import Tensor

from rae.autoencoder.backbones import check_tensors, read_state_dict, save_state_dict
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.model import build_rae
from rae.autoencoder.rae import RAE
from rae.config.arguments import check_plugin
from rae.config.errors import UserError
from rae.config.loading import override, validated
from rae.config.registry import find, import_plugins, plugins
from rae.config.sections import DecoderSizes, Model, Section
from rae.exchange.places import CONFIG, ENCODER, WEIGHTS, local_folder, read_json


class Exported(Section):
    """What an export's ``config.json`` holds."""

    format: Literal["rae"] = "rae"
    version: Literal[1] = 1
    name: str
    image_size: int
    model: Model
    imports: list[str] = Field(default_factory=list)
    """The plugin files or modules that building it needs; see :func:`load`."""
    weights: Literal["ema", "live", "given"] = "given"
    """Which weights of a run they are; ``given`` came from elsewhere."""
    trained: dict[str, Any] = Field(default_factory=dict)
    """How far the run was: epoch and batch."""
    figures: dict[str, Any] = Field(default_factory=dict)
    """Its last evaluation, if it was of these weights."""


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    overrides: Iterable[str] = (),
    revision: str | None = None,
    imports: bool = False,
) -> RAE:
    """An exported autoencoder, in eval mode.

    Args:
        folder: a local folder, ``s3://…``, or a repository on the Hugging Face hub.
        overrides: ``model.encoder.dinov2.pretrained=PATH`` and the like, over what the export says.
        revision: of a hub's repository.
        imports: import the modules that the export names for an encoder that is not registered yet. They are code of
            this machine that whoever made the export chooses.

    Raises:
        UserError: it is no export, its encoder cannot be had, or a tensor is missing, unexpected or of another shape.
    """
    with TemporaryDirectory(prefix="rae-") as scratch:
        local = local_folder(str(folder), Path(scratch), revision)
        exported = read_exported(local, str(folder), overrides)
        import_encoder(exported, str(folder), imports)
        rae = build_exported(local, exported, str(folder))
    return rae.to(device)


def read_exported(local: Path, name: str, overrides: Iterable[str] = ()) -> Exported:
    """The checked ``config.json`` of an export.

    Args:
        name: what to call it in messages.

    Raises:
        UserError: it is missing, damaged or another program's.
    """
    content = read_json(local / CONFIG, f"{name}/{CONFIG}")
    if content.get("format") != "rae":
        raise UserError(f"{name}/{CONFIG} is not an export's; python -m rae inspect {name} tells what the folder holds")
    loaded = OmegaConf.create(content)
    override(loaded, overrides)
    return validated(Exported, OmegaConf.to_container(loaded), f"{name}/{CONFIG}")


def import_encoder(exported: Exported, name: str, imports: bool) -> None:
    """Import what an export's encoder needs, where it is not registered yet.

    Args:
        name: what to call the export in messages.
        imports: whether the user has said so.

    Raises:
        UserError: it needs something, and the user has not; or that cannot be imported.
    """
    entry = exported.model.encoder
    unknown = set([entry] if isinstance(entry, str) else entry) - plugins("encoder").keys()
    if not unknown or not exported.imports:
        return
    if not imports:
        raise UserError(
            f"{name}: its encoder {unknown.pop()!r} needs {', '.join(map(repr, exported.imports))} of this machine; "
            "if that is what you want to run, say --imports, or rae.load(…, imports=True)"
        )
    import_plugins(exported.imports)


def build_exported(local: Path, exported: Exported, name: str) -> RAE:
    """The autoencoder of an export on this disk, whose encoder is registered; see :func:`load`."""
    settings = exported.model.model_copy(update={"encoder": _encoder_here(local, exported.model.encoder)})
    rae = build_rae(settings, exported.image_size)
    load_weights(rae, read_state_dict(local / WEIGHTS), f"{name}/{WEIGHTS}")
    return rae.eval()


def _encoder_here(local: Path, entry: Any) -> Any:
    """An encoder's settings, in which a path inside the export is where that lies now."""
    ((kind, arguments),) = check_plugin("encoder", entry, "model.encoder").items()
    key = _weights_argument(kind)
    path = arguments.get(key)
    if isinstance(path, str) and path.split("/")[0] == ENCODER and (local / path).exists():
        return {kind: {**arguments, key: str(local / path)}}
    return entry


def includes_encoder(model: Model) -> bool:
    """Whether an export's encoder lies in it; that one's plugin need not be registered."""
    entries = [] if isinstance(model.encoder, str) else model.encoder.values()
    values = [value for arguments in entries if isinstance(arguments, dict) for value in arguments.values()]
    return any(isinstance(value, str) and value.split("/")[0] == ENCODER for value in values)


def encoder_path(model: Model) -> str | None:
    """The path of this machine, outside the export, by which its encoder is named, if it is by one."""
    weights = _encoder_weights(model)
    return weights if not includes_encoder(model) and Path(weights).expanduser().exists() and weights else None


def _encoder_weights(model: Model) -> str:
    ((kind, arguments),) = check_plugin("encoder", model.encoder, "model.encoder").items()
    return arguments.get(_weights_argument(kind)) or ""


def _weights_argument(encoder: str) -> str:
    return getattr(find("encoder", encoder, "model.encoder"), "weights_argument", "")


def load_weights(rae: RAE, state: dict[str, Tensor], where: str) -> None:
    """Load a decoder and, if there are any, latent statistics: every tensor, with equal shapes.

    Args:
        state: the tensors under the names of ``rae.state_dict()``.
        where: what to call them in messages.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    for name in ("latent_mean", "latent_var"):
        setattr(rae, name, torch.empty(rae.latent_shape) if name in state else None)
    check_tensors(state, rae.state_dict(), where)
    rae.load_state_dict(state)


def write(rae: RAE, about: Exported, folder: Path, with_encoder: bool = False) -> Exported:
    """Write an autoencoder's weights and configuration into an existing folder.

    Args:
        about: what is known of it.
        with_encoder: put the frozen encoder's weights into the folder instead of naming it.

    Returns:
        what ``config.json`` says.

    Raises:
        UserError: the encoder is a plugin that cannot save its weights.
    """
    encoder = _encoder_entry(rae.encoder.network, about.model.encoder, folder if with_encoder else None)
    decoder = about.model.decoder.model_copy(update={"weights": None, "activation_checkpointing": False})
    model = about.model.model_copy(update={"encoder": encoder, "decoder": decoder, "latent_stats": None})
    model.pixel_loss = "l1"  # it is not part of an autoencoder
    exported = about.model_copy(update={"model": model})
    if type(rae.encoder.network).__module__.startswith("rae."):
        exported.imports = []  # they may be gone; what needs them is not exported
    save_state_dict(rae.state_dict(), folder / WEIGHTS)
    write_json(folder / CONFIG, exported.model_dump())
    return exported


def _encoder_entry(encoder: Encoder, entry: Any, folder: Path | None) -> dict[str, Any]:
    """An encoder's settings, naming its weights by an absolute path, a hub id, or inside ``folder``."""
    ((kind, arguments),) = check_plugin("encoder", entry, "model.encoder").items()
    key = encoder.weights_argument
    if folder is not None:
        if not key:
            raise UserError(f"the encoder {kind!r} is a plugin that cannot save its weights; export without them")
        (folder / ENCODER).mkdir()
        return {kind: {**arguments, key: str(Path(ENCODER, encoder.save_weights(folder / ENCODER)))}}
    if isinstance(arguments.get(key), str) and Path(arguments[key]).expanduser().exists():
        arguments[key] = str(Path(arguments[key]).expanduser().resolve())
    return {kind: arguments}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def figure_text(value: Any) -> str:
    """A figure for reading; JSON has null where it is not finite."""
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite" if value is None else str(value)


def decoder_sizes(decoder: Decoder) -> DecoderSizes:
    """The explicit sizes of a decoder."""
    first: Any = decoder.blocks[0]
    return DecoderSizes(
        patch_size=decoder.patch_size,
        embed_dim=decoder.embed.out_features,
        depth=len(decoder.blocks),
        num_heads=first.attn.num_heads,
        mlp_dim=first.mlp.fc1.out_features,
        trainable_positions=isinstance(decoder.positions, torch.nn.Parameter),
    )
