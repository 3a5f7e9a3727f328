"""Models out of checkpoints: their weights or averages, read without trust, with the run's figures."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from rae.algorithms.ema import LIVE_SUFFIX
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import find, import_plugins
from rae.config.sections import Config, Model
from rae.exchange import exports
from rae.exchange.exports import Source
from rae.exchange.places import local_file
from rae.survival.checkpoints import CONFIG, METRICS, DamagedError, age, check_whole, in_form, refused, without_code
from rae.survival.storage import is_remote, reason

PUBLISHED = "a published decoder; make an export of it with `python -m rae import`"
"""What is said of one where a model is to be opened."""


FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Endings of files of tensors."""


def split_path(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent or ".", name


def of_config(network: nn.Module, config: Config, weights: str) -> Source:
    return Source(network, config.data.image_size, config.run_name, weights, config.model, config, config.imports)


def open_checkpoint(local: Path, source: str, weights: str, overrides: list[str], scratch: Path) -> Source:
    config = load_config(str(local / CONFIG), overrides)
    with reading(source):
        content = _load(in_form(local, False, scratch / "converted"))
    opened = _restore(state_of(content, source), config, source, weights)
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


def open_file(source: str, weights: str, overrides: list[str], scratch: Path) -> Source:
    parent, name = split_path(source)
    local = Path(source)
    if is_remote(source):
        local, _ = (local_file(f"{parent}/{file}", scratch) for file in (name, CONFIG))
    state = state_of(load_file(local, source), source)
    configuration = next((f for f in (local.parent / CONFIG, local.parent.parent / CONFIG) if f.is_file()), None)
    if configuration is None:
        raise UserError(f"{source}: there is no {CONFIG} beside it; copy that of its run there")
    opened = _restore(state, load_config(str(configuration), overrides), source, weights)
    opened.name = local.stem
    return opened


@contextmanager
def reading(where: str) -> Iterator[None]:
    """What is wrong with a checkpoint that is read in here is said of ``where``, as a UserError."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{where}: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} holds {refused(error)}") from error
    except (Exception, CheckpointException) as error:
        raise UserError(f"{where} cannot be read: {reason(error)}") from error


def load_file(file: Path, where: str) -> Any:
    """A ``.pt`` file's content, without code, once its checksums agree; its tensors stay on the disk."""
    with reading(where):
        check_whole(file)
        return _load(file)


def _load(file: Path) -> Any:
    with without_code():
        return torch.load(file, map_location="cpu", mmap=True)


def state_of(content: Any, source: str) -> dict[str, Any]:
    """What a checkpoint holds under ``state``."""
    state = content.get("state") if isinstance(content, dict) else None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        return state
    if isinstance(content, dict) and "mean" in content and "var" in content:
        raise UserError(f"{source}: latent statistics, not an autoencoder; they belong under model.latent_stats")
    if isinstance(content, dict) and any("decoder_embed" in str(name) for name in content):
        raise UserError(f"{source}: {PUBLISHED}")
    raise UserError(f"{source} is no checkpoint of a run")


def of_average(state: dict[str, Any], weights: str) -> tuple[dict[str, Tensor], str, dict[str, Tensor] | None]:
    """A checkpoint's weights: the trained ones, or their average where there is one and it is wanted.

    Returns:
        them by name, ``ema`` or ``live`` as they are, and the discriminator's, if there are any.
    """
    algorithms = dict(state.get("algorithms") or [])
    held = algorithms.get("EMA", {})
    average = held.get("average") if weights == "ema" else None
    _, _, decay = weights.partition(":")
    if decay:
        average = held.get("averages", {}).get(decay)
        if average is None:
            there = ", ".join(f"ema:{each}" for each in held.get("averages", {}))
            raise UserError(
                f"--weights {weights}: there is no such average; there are ema{there and ', ' + there}, live"
            )
    heads = algorithms.get("Adversarial", {}).get("discriminator")
    heads = heads and {name: tensor.clone() for name, tensor in heads.items()}
    return {**state["model"], **(average or {})}, "ema" if average else "live", heads


def _restore(state: dict[str, Any], config: Config, source: str, weights: str) -> Source:
    trained, kind, heads = of_average(state, weights)
    import_plugins(config.imports)
    settings, part = config.model, "rae."
    if isinstance(settings, Model):  # the state holds both of what is left out
        decoder = settings.decoder.model_copy(update={"weights": None})
        settings = settings.model_copy(update={"decoder": decoder, "latent_stats": None})
    else:
        part = f"{find('model', next(iter(settings)), 'model').part}."  # type: ignore[attr-defined]
    network = explained(source, lambda: exports.build_network(settings, config.data.image_size))
    exports.load_weights(
        network, {name.removeprefix(part): t for name, t in trained.items() if name.startswith(part)}, source
    )
    opened = of_config(network, config, kind)
    opened.discriminator = heads
    return opened


def explained(source: str, build_it: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build_it()
    except UserError as error:
        raise UserError(f"{source}: {error}; --set KEY=VALUE overrides what its configuration says") from error
