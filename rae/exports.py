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
from pydantic import Field, ValidationError
from torch import Tensor

from rae.backbones import read_state_dict
from rae.config import Model, Section, is_remote, override
from rae.model import RAE, build_rae
from rae.registry import UserError, explain, import_plugins
from rae.storage import RemoteFolder, reason

CONFIG, WEIGHTS, ENCODER = "config.json", "model.safetensors", "encoder"
ENCODER_FILE = {"dinov2": "pretrained", "mae": "pretrained", "siglip2": "pretrained", "timm": "weights"}
"""The argument of each encoder that names its weights."""


class Exported(Section):
    """What an export's ``config.json`` holds."""

    format: Literal["rae"] = "rae"
    version: Literal[1] = 1
    name: str
    image_size: int
    model: Model
    imports: list[str] = Field(default_factory=list)
    """The plugin files or modules that building it needs."""
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
) -> RAE:
    """An exported autoencoder, in eval mode.

    Args:
        folder: a local folder, ``s3://…``, or a repository on the Hugging Face hub.
        overrides: ``model.encoder.dinov2.pretrained=PATH`` and the like, over what the export says.
        revision: of a hub's repository.

    Raises:
        UserError: it is no export, its encoder cannot be had, or a tensor is missing, unexpected or of another shape.
    """
    with TemporaryDirectory(prefix="rae-") as scratch:
        local = local_folder(str(folder), Path(scratch), revision)
        rae = build_exported(local, read_exported(local, str(folder), overrides), str(folder))
    return rae.to(device)


def local_folder(name: str, scratch: Path, revision: str | None = None) -> Path:
    """An export's folder on this disk: itself, or downloaded to ``scratch``, or the hub's cache.

    Raises:
        UserError: there is none.
    """
    if is_remote(name):
        return download(name, scratch / "export")
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1 or Path(name).parent.is_dir() or name.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {name!r}; give an export's folder, s3://… or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:
        raise UserError(f"there is no folder {name!r}, and the hub gives none of that name: {reason(error)}") from error


def download(url: str, local: Path) -> Path:
    """Copy a remote folder to this disk.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    remote = RemoteFolder(url)
    try:
        names = remote.list()
        for name in names:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            remote.download(name, local / name)
    except Exception as error:
        raise UserError(f"cannot read {url}: {reason(error)}") from error
    if not names:
        raise UserError(f"there is nothing in {url}")
    return local


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
    try:
        return Exported.model_validate(OmegaConf.to_container(loaded))
    except ValidationError as error:
        raise UserError(f"{name}/{CONFIG}: {explain(error, '')}") from error


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON file's mapping.

    Raises:
        UserError: it is missing, damaged or no mapping.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no {name}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged: it holds a {type(content).__name__}, not a mapping")
    return content


def build_exported(local: Path, exported: Exported, name: str) -> RAE:
    """The autoencoder of an export on this disk; see :func:`load`."""
    import_plugins(exported.imports)
    settings = exported.model.model_copy(update={"encoder": _encoder_here(local, exported.model.encoder)})
    rae = build_rae(settings, exported.image_size)
    load_weights(rae, read_state_dict(local / WEIGHTS), f"{name}/{WEIGHTS}")
    return rae.eval()


def _encoder_here(local: Path, encoder: Any) -> Any:
    """An encoder's settings, in which a path inside the export is where that lies now."""
    if isinstance(encoder, dict) and len(encoder) == 1:
        ((kind, arguments),) = encoder.items()
        key = ENCODER_FILE.get(kind, "")
        path = (arguments or {}).get(key)
        if isinstance(path, str) and path.split("/")[0] == ENCODER and (local / path).exists():
            return {kind: {**arguments, key: str(local / path)}}
    return encoder


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


def check_tensors(state: dict[str, Any], expected: dict[str, Tensor], where: str) -> None:
    """Compare names and shapes of tensors with those that a model has.

    Raises:
        UserError: the first that is missing, unexpected or of another shape, and how many more there are.
    """
    faults = [f"{name} is missing" for name in expected.keys() - state.keys()]
    faults += [f"{name} is unexpected" for name in state.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{where}: {min(faults)}{more}; it is of another model, or damaged")
