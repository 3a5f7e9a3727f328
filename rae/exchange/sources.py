"""Autoencoders opened from whatever holds one: runs, checkpoints, configurations, exports; local or in a bucket."""

import json
import logging
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from rae.algorithms.ema import LIVE_SUFFIX
from rae.autoencoder.backbones import check_tensors
from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.model import build_rae
from rae.autoencoder.rae import RAE
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import import_plugins
from rae.config.sections import Config, Model
from rae.exchange import diffusers_format, exports, places
from rae.exchange.exports import Exported
from rae.survival.checkpoints import (
    CONFIG,
    METRICS,
    SHARDED,
    STATE,
    DamagedError,
    Listed,
    age,
    check_metadata,
    check_whole,
    fetch,
    in_form,
    is_name,
    list_checkpoints,
    refused,
    without_code,
)
from rae.survival.storage import RemoteFolder, is_remote, reason

log = logging.getLogger(__name__)
_PUBLISHED = "a published decoder; make an export of it with `python -m rae import`"


@dataclass
class Source:
    """An autoencoder to work with, and what is known of it.

    Args:
        rae: in eval mode, on the device.
        image_size: side of the image that it makes.
        name: short, for tables, captions and file names.
        weights: which these are: ``ema``, ``live``, or ``given`` where there was no choice and no telling.
        model: its settings, as in a configuration's ``model``.
        config: of the run that made it, if that is known.
        imports: the user's plugin files or modules that it needs.
        trained: how far the run was, ``epoch`` and ``batch``.
        figures: the run's last evaluation, if it was of this moment and these weights: by data set and metric.
        discriminator: the discriminator's trained weights, if there are any.
    """

    rae: RAE
    image_size: int
    name: str
    weights: str
    model: Model
    config: Config | None = None
    imports: list[str] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Tensor] | None = None

    def about(self) -> Exported:
        """What an export of it says of it."""
        told = {key: getattr(self, key) for key in Exported.model_fields if hasattr(self, key)}
        return Exported(**told)


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``; by default the first GPU, or the CPU where there is none.

    Raises:
        UserError: no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; write cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported; write cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name!r}: this machine has {torch.cuda.device_count() or 'no'} GPU that torch can use"
        )
    return device


def open_source(
    source: str,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    overrides: Iterable[str] = (),
    imports: bool = False,
) -> Source:
    """Open an autoencoder.

    Args:
        source: a run's folder, a folder of checkpoints, a checkpoint, a Composer ``.pt`` file with its config.yaml
            beside it, a run's YAML, or an exported or diffusers folder; local or a URL; or an export on the hub.
        weights: ``ema`` (the live ones where there is no average) or ``live``.
        overrides: ``key.sub=value`` over its configuration.
        imports: of an export; see :func:`rae.exchange.exports.load`. A run's own configuration says what is imported.

    Raises:
        UserError: there is no autoencoder in it; what was found, and what would do.
    """
    source, overrides = source.rstrip("/") or source[:1], list(overrides)
    with TemporaryDirectory(prefix="rae-") as scratch:
        opened = _open(source, weights, overrides, Path(scratch), imports)
    opened.rae.eval().to(device)
    return opened


def open_discriminator(source: Source, device: str | torch.device = "cpu") -> nn.Module | None:
    """The discriminator of a source's checkpoint, in eval mode: image in [0, 1] -> logits. None if it has none.

    Raises:
        UserError: its frozen features cannot be had, or the weights are of another discriminator.
    """
    if source.discriminator is None or source.config is None:
        return None
    entry = (source.config.algorithms.get("adversarial") or {}).get("discriminator", {"dino": {}})
    discriminator = build("discriminator", entry, "algorithms.adversarial.discriminator")
    check_tensors(source.discriminator, discriminator.state_dict(), f"{source.name}: discriminator")
    discriminator.load_state_dict(source.discriminator)
    return discriminator.eval().to(device)


def open_encoder(
    source: str, overrides: Iterable[str] = (), imports: bool = False
) -> tuple[Encoder, int, Config | None]:
    """The frozen encoder of a source, its image size, and the run's configuration; a run's YAML is enough.

    Args:
        source, overrides, imports: as :func:`open_source`.

    Raises:
        UserError: as :func:`open_source`.
    """
    if source.endswith((".yaml", ".yml")):
        config = load_config(source, overrides)
        import_plugins(config.imports)
        return build("encoder", config.model.encoder, "model.encoder"), config.data.image_size, config
    opened = open_source(source, overrides=overrides, imports=imports)
    return opened.rae.encoder.network, opened.image_size, opened.config  # type: ignore[return-value]


def _open(source: str, weights: str, overrides: list[str], scratch: Path, imports: bool) -> Source:
    parent, name = _split(source)
    if source.endswith(".pt"):
        if name == STATE and is_name(_split(parent)[1]):
            return _open(parent, weights, overrides, scratch, imports)
        return _open_file(source, weights, overrides, scratch)
    if source.endswith((".yaml", ".yml")):
        return _open_yaml(source, weights, overrides, scratch)
    if places.may_be_on_hub(source):
        return _open_export(source, weights, overrides, scratch, imports)
    names = list_names(source)
    if is_name(name):
        listed = [checkpoint for checkpoint in _listed(parent) if checkpoint.name == name]
        return _open_newest([(parent, each) for each in listed], source, weights, overrides, scratch)
    if any(is_name(each.split("/")[0]) for each in names):
        return _open_newest([(source, each) for each in _listed(source)], source, weights, overrides, scratch)
    if places.CONFIG in names:
        return _open_export(source, weights, overrides, scratch, imports)
    if CONFIG in names and not is_remote(source):
        return _open_run(source, weights, overrides, scratch)
    if any(each.split("/")[0] == "checkpoints" for each in names):
        return _open(f"{source}/checkpoints", weights, overrides, scratch, imports)
    raise UserError(f"{source}: {_what_it_is(names)}")


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent or ".", name


def list_names(folder: str) -> set[str]:
    """The names of what is in a local or remote folder; of a remote one, with what is in its sub-folders.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        names = RemoteFolder(folder).list() if is_remote(folder) else os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        names = []
        if not is_remote(folder):
            missing = isinstance(error, FileNotFoundError)
            what = f"there is no folder {folder!r}" if missing else f"{folder!r} is a file of no known kind"
            raise UserError(f"{what}; give a run's folder, a checkpoint, a YAML or an export") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {folder}: {reason(error)}") from error
    if is_remote(folder) and not names:
        raise UserError(f"there is nothing in {folder}")
    return set(names)


def _what_it_is(names: set[str]) -> str:
    would_do = "give a run's folder, a checkpoint, a YAML or an export"
    if "index.json" in names:
        return f"a data set, not an autoencoder; {would_do}"
    if "model.pt" in names:
        return _PUBLISHED
    found = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "") if names else "nothing"
    return f"no autoencoder: the folder holds {found}; {would_do}"


def _listed(folder: str) -> list[Listed]:
    try:
        return list_checkpoints(folder)
    except Exception as error:
        raise UserError(f"cannot list the checkpoints in {folder}: {reason(error)}") from error


def _open_run(source: str, weights: str, overrides: list[str], scratch: Path) -> Source:
    config = load_config(f"{source}/{CONFIG}", overrides)
    found = checkpoints_of_run(source, config)
    if not found:
        raise UserError(f"{source}: the run has no checkpoint yet")
    return _open_newest(found, source, weights, overrides, scratch)


def checkpoints_of_run(folder: str, config: Config | None) -> list[tuple[str, Listed]]:
    """A run's checkpoints, each with the folder that holds it, the newest first.

    Args:
        folder: the run's, or one of checkpoints.
        config: the run's configuration, which may say where they are.

    Raises:
        UserError: a folder cannot be listed.
    """
    said = config and config.save_folder
    waiting = (str(path) for path in Path(folder).glob("uploads/node*"))
    places = dict.fromkeys([folder, f"{folder}/checkpoints", *([said] if said else []), *waiting])
    found = [(place, each) for place in places for each in _listed(place)]
    return sorted(found, key=lambda pair: pair[1].age, reverse=True)


def _open_yaml(source: str, weights: str, overrides: list[str], scratch: Path) -> Source:
    config = load_config(source, overrides)
    found = checkpoints_of_run(config.run_dir, config)
    if any(checkpoint.parts for _, checkpoint in found):
        return _open_newest(found, source, weights, overrides, scratch)
    if config.model.decoder.weights is None:
        raise UserError(
            f"{source}: its run has no checkpoint in {config.run_dir}, and no model.decoder.weights to use instead"
        )
    import_plugins(config.imports)
    rae = _explained(source, lambda: build_rae(config.model, config.data.image_size))
    return _of_config(rae, config, "given")


def _of_config(rae: RAE, config: Config, weights: str) -> Source:
    return Source(rae, config.data.image_size, config.run_name, weights, config.model, config, config.imports)


def _open_newest(
    found: list[tuple[str, Listed]], source: str, weights: str, overrides: list[str], scratch: Path
) -> Source:
    fault = "there is no complete checkpoint in it"
    for folder, checkpoint in found:
        try:
            local = fetch(folder, checkpoint, scratch)
            if (local / SHARDED).is_file():
                check_metadata(local)
        except DamagedError as error:
            fault = f"checkpoint {folder}/{checkpoint.name} cannot be used: {error}"
            log.warning("%s", fault) if len(found) > 1 else None
            continue
        except Exception as error:
            raise UserError(f"cannot read checkpoint {checkpoint.name} of {folder}: {reason(error)}") from error
        return _open_checkpoint(local, f"{folder}/{checkpoint.name}", weights, overrides, scratch)
    raise UserError(f"{source}: {fault}" if len(found) != 1 else fault)


def _open_checkpoint(local: Path, source: str, weights: str, overrides: list[str], scratch: Path) -> Source:
    config = load_config(str(local / CONFIG), overrides)
    opened = _restore(_read_state(local, source, scratch), config, source, weights)
    batch, epoch = age(local.name)
    opened.name, opened.trained = f"{config.run_name}-{local.name}", {"epoch": epoch, "batch": batch}
    # Another run may have this run_dir on this disk, and come to the same step: only what lies in it is of it.
    beside = [Path(config.run_dir, METRICS)] if local.resolve().is_relative_to(Path(config.run_dir).resolve()) else []
    figures = _figures([local / METRICS, *beside], batch)
    opened.figures = _of_weights(figures, opened.weights, config)
    return opened


def _figures(files: Iterable[Path], batch: int) -> dict[str, Any]:
    """The first of these records that is of this step."""
    for file in files:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.pop("batch", None) == batch:
            return record
    return {}


def _of_weights(figures: dict[str, Any], weights: str, config: Config) -> dict[str, Any]:
    """Those of an evaluation's figures that are of these weights, by data set."""
    entry = config.algorithms.get("ema", {"evaluate": "live"}) or {}
    evaluated = entry.get("evaluate", "ema")
    if evaluated == "both":
        wanted = {label: label.endswith(LIVE_SUFFIX) == (weights == "live") for label in figures}
        return {label.removesuffix(LIVE_SUFFIX): values for label, values in figures.items() if wanted[label]}
    return figures if evaluated == weights else {}


def _open_file(source: str, weights: str, overrides: list[str], scratch: Path) -> Source:
    parent, name = _split(source)
    local = Path(source)
    if is_remote(source):
        local = scratch / name
        for file in (name, CONFIG):
            try:
                RemoteFolder(parent).download(file, scratch / file)
            except Exception as error:
                raise UserError(f"cannot read {parent}/{file}: {reason(error)}") from error
    try:
        check_whole(local)
    except DamagedError as error:
        raise UserError(f"{source}: {error}") from error
    state = _read_state(local, source, scratch)
    configuration = next((f for f in (local.parent / CONFIG, local.parent.parent / CONFIG) if f.is_file()), None)
    if configuration is None:
        raise UserError(f"{source}: there is no {CONFIG} beside it; copy that of its run there")
    opened = _restore(state, load_config(str(configuration), overrides), source, weights)
    opened.name = local.stem
    return opened


def _read_state(checkpoint: Path, source: str, scratch: Path) -> dict[str, Any]:
    """What a checkpoint holds under ``state``; its tensors stay on the disk until they are used."""
    try:
        path = in_form(checkpoint, False, scratch / "converted")
        with without_code():
            content = torch.load(path, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{source} holds {refused(error)}") from error
    except (Exception, CheckpointException) as error:
        raise UserError(f"{source} cannot be read: {reason(error)}") from error
    state = content.get("state") if isinstance(content, dict) else None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        return state
    if isinstance(content, dict) and "mean" in content and "var" in content:
        raise UserError(f"{source}: latent statistics, not an autoencoder; they belong under model.latent_stats")
    if isinstance(content, dict) and any("decoder_embed" in str(name) for name in content):
        raise UserError(f"{source}: {_PUBLISHED}")
    raise UserError(f"{source} is no checkpoint of a run")


def _restore(state: dict[str, Any], config: Config, source: str, weights: str) -> Source:
    algorithms = dict(state.get("algorithms") or [])
    average = algorithms.get("EMA", {}).get("average") if weights == "ema" else None
    trained = {**state["model"], **(average or {})}
    import_plugins(config.imports)
    decoder = config.model.decoder.model_copy(update={"weights": None})  # the state holds both of what is left out
    settings = config.model.model_copy(update={"decoder": decoder, "latent_stats": None})
    rae = _explained(source, lambda: build_rae(settings, config.data.image_size))
    exports.load_weights(
        rae, {name.removeprefix("rae."): t for name, t in trained.items() if name.startswith("rae.")}, source
    )
    heads = algorithms.get("Adversarial", {}).get("discriminator")
    opened = _of_config(rae, config, "ema" if average else "live")
    opened.discriminator = heads and {name: tensor.clone() for name, tensor in heads.items()}
    return opened


def _explained(source: str, build_it: Any) -> RAE:
    try:
        return build_it()
    except UserError as error:
        raise UserError(f"{source}: {error}; --set KEY=VALUE overrides what its configuration says") from error


def _open_export(source: str, weights: str, overrides: list[str], scratch: Path, imports: bool) -> Source:
    local = places.local_folder(source, scratch)
    content = places.read_json(local / places.CONFIG, f"{source}/{places.CONFIG}")
    if "_class_name" in content:
        rae, model, image_size = diffusers_format.read(local, source, scratch)
        return Source(rae, image_size, _split(source)[1], "given", model)
    if "decoder_hidden_size" in content:
        raise UserError(f"{source}: {_PUBLISHED}")
    about = exports.read_exported(local, source, overrides)
    if weights == "live" and about.weights == "ema":
        raise UserError(f"{source} holds averaged weights only; export the run again with --weights live")
    exports.import_encoder(about, source, imports)
    rae = _explained(source, lambda: exports.build_exported(local, about, source))
    known = {key: getattr(about, key) for key in ("name", "weights", "model", "imports", "trained", "figures")}
    return Source(rae, about.image_size, config=_run_config(local), **known)


def _run_config(local: Path) -> Config | None:
    """The configuration of the run that an export came from; None where it is missing or of another version."""
    try:
        return load_config(str(local / places.RUN))
    except UserError:
        return None
