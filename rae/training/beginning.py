"""A run that begins with the weights of another, or of a published decoder: fine-tuning."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rae.algorithms.adversarial import Adversarial
from rae.autoencoder.backbones import check_tensors
from rae.config.errors import UserError
from rae.config.registry import nearest
from rae.config.sections import BeginFrom, Config, Model
from rae.exchange.sources import fetch
from rae.exchange.weights import Weights, load_into, open_weights
from rae.model import RunModel
from rae.survival.processes import local_rank, rank, world_size
from rae.survival.storage import is_remote
from rae.training.course import differing
from rae.training.loading import scratch_of
from rae.training.resume import clear, on_each_node

log = logging.getLogger(__name__)


def begin(config: Config, beginning: BeginFrom, model: RunModel, algorithms: list[Any]) -> None:
    """Give the model, and the discriminator if it is to be kept, the weights to begin with. A collective call.

    Raises:
        UserError: there are none; they are of another model.
    """
    weights = _opened(config, beginning)
    load_into(model.network, weights)
    if beginning.discriminator == "kept":
        _keep_discriminator(weights, algorithms)
    if rank() == 0:
        kinds = {"ema": "the average", "live": "the live weights", "given": "the weights"}
        log.warning("%s begins with %s of %s", config.run_name, kinds[weights.kind], weights.name)


def _opened(config: Config, beginning: BeginFrom) -> Weights:
    if world_size() == 1:
        with TemporaryDirectory(prefix="rae-") as scratch:
            return _open(config, beginning, Path(scratch))
    # One of a node's ranks reads, and perhaps downloads, for all of them.
    place = scratch_of(config) / "weights.pt"

    def make() -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        opened = _open(config, beginning, place.parent)
        torch.save({k: getattr(opened, k) for k in ("tensors", "kind", "name", "discriminator")}, place)

    on_each_node(make, "begin_from")
    weights = Weights(**torch.load(place, weights_only=True))
    clear(place.parent)
    return weights


def _open(config: Config, beginning: BeginFrom, scratch: Path) -> Weights:
    try:
        weights = open_weights(beginning.source, beginning.weights, scratch)
    except UserError as error:
        raise UserError(f"begin_from: {error}") from error
    if weights.model is not None:
        _check_kind(config, weights)
    if weights.statistics and not (isinstance(config.model, Model) and config.model.latent_stats):
        log.warning("begin_from: latent statistics of %s are not taken; model.latent_stats names a run's", weights.name)
    return weights


def _check_kind(config: Config, weights: Weights) -> None:
    dumped = weights.model.model_dump() if isinstance(weights.model, Model) else weights.model
    now = config.model_dump()["model"]
    for key, part, was, wanted in differing({"model": dumped}, {"model": now}):
        fault = f"{weights.name} is of {part} {was}, not {wanted}"
        if key == "model.encoder":  # whose latents may still be worth to train on from
            log.warning("%s: %s; its decoder learns other latents from here", key, fault)
        elif part != "trainable_positions":  # of which load_into says what fits
            raise UserError(f"{key}: {fault}; make them equal")


def _keep_discriminator(weights: Weights, algorithms: list[Any]) -> None:
    ours = next((each.discriminator for each in algorithms if isinstance(each, Adversarial)), None)
    if ours is None:
        raise UserError("begin_from.discriminator: there is none to keep without algorithms.adversarial")
    if weights.discriminator is None:
        raise UserError(f"begin_from.discriminator: {weights.name} holds none (an export never does); leave it out")
    hint = "make algorithms.adversarial.discriminator its own"
    check_tensors(weights.discriminator, ours.state_dict(), f"begin_from.discriminator: {weights.name}", hint)
    ours.load_state_dict(weights.discriminator)


@contextmanager
def autoencoder_here(config: Config) -> Iterator[Config]:
    """The configuration to build a model by: one rank of each node has downloaded a generator's autoencoder for all.

    A collective call.
    """
    settings, key = config.model, "model.diffusion.autoencoder"
    named = None if isinstance(settings, Model) else settings.get("diffusion", {}).get("autoencoder")
    if world_size() == 1 or not isinstance(named, str) or not is_remote(named):
        yield config
        return
    scratch = scratch_of(config) / "autoencoder"

    def make() -> str:
        try:
            return fetch(named, scratch)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error

    place = on_each_node(make, key)[rank() - local_rank()]
    changed = {"diffusion": {**settings["diffusion"], "autoencoder": place}}  # type: ignore[index]
    yield config.model_copy(update={"model": changed})
    clear(scratch)


def freeze(model: RunModel, parts: list[str]) -> None:
    """Stop training these parts of what a model trains.

    Args:
        parts: names of modules or parameters of its network, such as ``decoder.embed``.

    Raises:
        UserError: there is no such part; nothing is left to train.
    """
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    prefixes = {".".join(name.split(".")[:end]) for name in trained for end in range(1, name.count(".") + 2)}
    for part in parts:
        if part not in prefixes:
            shown = sorted({".".join(name.split(".")[:2]) for name in trained})
            raise UserError(
                f"freeze: nothing that is trained is called {part!r}{nearest(part, prefixes)}; there are "
                f"{', '.join(shown[:8])}{', …' if len(shown) > 8 else ''}"
            )
        for name, parameter in trained.items():
            if f"{name}.".startswith(f"{part}."):
                parameter.requires_grad_(False)
    if parts and not any(p.requires_grad for p in trained.values()):
        raise UserError("freeze: nothing is left to train")
