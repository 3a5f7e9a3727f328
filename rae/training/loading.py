"""What a run starts at: a checkpoint, which Composer's Trainer loads so that it cannot run code, or other weights."""

import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composer.algorithms
from composer import Time, Trainer
from composer.optim import ComposerScheduler
from composer.utils import dist
from composer.utils.checkpoint import glob_filter
from torch.distributed.checkpoint.api import CheckpointException

from rae.algorithms.base import set_step
from rae.autoencoder.backbones import check_tensors
from rae.callbacks.checkpointer import Checkpointer
from rae.config.errors import UserError, first_line
from rae.config.sections import BeginFrom, Config
from rae.survival.checkpoints import RECORD, age, check_metadata, is_name, refused, without_code
from rae.survival.processes import rank
from rae.training.course import changes, check_course, of_checkpoint
from rae.training.parallelism import saves_sharded
from rae.training.resume import clear, given, loadable, newest, used

_OTHER_MODEL = "it is of another model or other algorithms"
_REMEDY = "give another run_name and run_dir (begin_from takes weights alone)"

log = logging.getLogger(__name__)


@dataclass
class Start:
    """Where a run starts.

    Args:
        checkpoint: to go on from, of the run itself or of another.
        beginning: whose weights to begin with, if there is no checkpoint.
        before: the configuration that travelled with the checkpoint.
        record: what its data were; see :func:`rae.training.data.record_of`.
        travelling: what loggers keep with the checkpoints of a run, such as W&B's id; of this run alone.
    """

    checkpoint: Path | None = None
    beginning: BeginFrom | None = None
    before: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    travelling: dict[str, Any] = field(default_factory=dict)


@contextmanager
def explained(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
    except (RuntimeError, KeyError, CheckpointException) as error:
        if checkpoint is None or (isinstance(error, RuntimeError) and "state_dict" not in str(error)):
            raise
        raise UserError(f"checkpoint {checkpoint}: {_OTHER_MODEL}; {_REMEDY}") from error


def find_start(config: Config, arguments: dict[str, Any], checkpointer: Checkpointer | None) -> Start:
    """Where the run starts; takes out of ``arguments`` what says so.

    Raises:
        UserError: there is nothing where it should start; nothing is left to train; it cannot go on as another.
    """
    scratch = scratch_of(config)
    load_path, autoresume = arguments.pop("load_path", None), arguments.pop("autoresume", True)
    weights_only = arguments.pop("load_weights_only", False)
    found = None
    if checkpointer is not None and autoresume:
        found = newest(checkpointer.places(), scratch, config.checkpoints.damaged)
        if found is not None:
            checkpointer.resumed(found)
            arguments.pop("load_ignore_keys", None)  # which is about load_path
    if checkpointer is not None and not autoresume and used(checkpointer.folder):
        raise UserError(
            f"trainer.autoresume: {checkpointer.folder} holds checkpoints of an earlier start; "
            "go on from them, or give another trainer.save_folder"
        )
    if found is None and (weights_only or not load_path):
        return Start(beginning=BeginFrom(source=load_path) if load_path else config.begin_from)
    start = Start(found or given(load_path, scratch, config.checkpoints.damaged))
    assert start.checkpoint is not None
    start.before, record = of_checkpoint(start.checkpoint), start.checkpoint / RECORD
    if record.is_file():
        start.record = json.loads(record.read_text())
        start.travelling = start.record.pop("loggers", {}) if found else {}
    check_course(start.before, config, start.checkpoint.name)
    if is_name(start.checkpoint.name):
        batch, epoch = age(start.checkpoint.name)
        size = start.before.get("data", {}).get("batch_size", 0)
        _check_left(config, batch, epoch, batch * size)
    return start


def _check_left(config: Config, batch: int, epoch: int, sample: int) -> None:
    """Refuse a checkpoint that training under this ``max_duration`` would have come to, and gone on before it.

    Raises:
        UserError: its last step would not have been made.
    """
    end = Time.from_timestring(config.trainer["max_duration"])
    before = {"ba": batch - 1, "ep": epoch - 1, "sp": sample - config.data.batch_size}.get(end.unit.value, -1)
    if before >= end.value:
        raise UserError(
            f"the checkpoint is at step {batch} (epoch {epoch}), beyond trainer.max_duration "
            f"({config.trainer['max_duration']}): nothing to train; a longer one goes on, and begin_from takes its "
            "weights alone"
        )


def scratch_of(config: Config) -> Path:
    return Path(config.run_dir, f".loading-node{dist.get_node_rank()}")


@contextmanager
def loading(config: Config, start: Start, ignored: list[str] | None, expected: Any) -> Iterator[dict[str, Any]]:
    """The Trainer's arguments for loading a checkpoint, which cannot run code in this context.

    What :mod:`rae.training.course` takes from the configuration is not loaded: schedules, what the model says is
    configured; optimizers keep their own settings (:func:`rae.algorithms.base.keep_settings`).

    Args:
        ignored: further patterns of what is not loaded; what is there then need not fit.
        expected: the :class:`rae.model.RunModel`.
    """
    checkpoint = start.checkpoint
    if checkpoint is None:
        yield {}
        return
    own = expected.state_dict()
    path = loadable(checkpoint, saves_sharded(config), scratch_of(config))
    held = check_metadata(path).state_dict_metadata if path.is_dir() else None

    def check_names(tensors: dict[str, Any]) -> None:
        if ignored is None:  # Composer would load what fits, and train the rest from the beginning
            found, wanted = ({n: t for n, t in each.items() if n not in expected.configured} for each in (tensors, own))
            check_tensors(found, wanted, f"checkpoint {checkpoint}: {_OTHER_MODEL}", _REMEDY)

    def ignore(state_dict: Any) -> None:
        state = state_dict.get("state") if isinstance(state_dict, dict) else None
        if not isinstance(state, dict):
            raise UserError(f"{checkpoint} is no checkpoint of a run")
        if held is None:
            check_names(state.get("model", {}))
        else:  # what is asked for has to be there
            there = {tuple(name.split(".")[1:3]) for name in held}
            state["callbacks"] = {n: s for n, s in state.get("callbacks", {}).items() if ("callbacks", n) in there}
        for name in expected.configured:
            state.get("model", {}).pop(name, None)
        state.pop("schedulers", None)
        state_dict.pop("rng", None)
        if ignored:
            glob_filter(ignored)(state_dict)

    if held is not None:
        prefix = "state.model."
        sizes = {n.removeprefix(prefix): SimpleNamespace(shape=m.size) for n, m in held.items() if n.startswith(prefix)}
        check_names(sizes)
    # Composer would evaluate strings from the checkpoint, to add the algorithms that they name.
    excluded = list(composer.algorithms.__all__)
    told = dict(load_ignore_keys=ignore, load_exclude_algorithms=excluded, load_strict_model_weights=False)
    try:
        with without_code(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is not in the state_dict")  # an algorithm that is new
            yield dict(load_path=str(path), **told)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {checkpoint} holds {refused(error)}") from error
    if rank() == 0:
        log.warning("%s begins at checkpoint %s", config.run_name, checkpoint.name)
        for change in changes(start.before, config):
            log.warning("the configuration has changed since: %s", change)
    clear(scratch_of(config))


def go_on(config: Config, trainer: Trainer, start: Start, schedule: Any, record: dict[str, Any]) -> None:
    """Put what the configuration decides to where the checkpoint is: rates, and the place in other data.

    Args:
        schedule: as the configuration describes it, before Composer compiled it.
        record: of the run's data; see :func:`rae.training.data.record_of`.

    Raises:
        UserError: nothing is left to train.
    """
    if start.checkpoint is None:
        return
    state = trainer.state
    now = state.timestamp
    _check_left(config, int(now.batch), int(now.epoch) + (int(now.batch_in_epoch) > 0), int(now.sample))
    if isinstance(schedule, ComposerScheduler) and now.batch > 0:  # which goes by the time before the last step ended
        ended = int(now.batch_in_epoch) == 0
        state.timestamp = now.copy(batch=int(now.batch) - 1, epoch=int(now.epoch) - ended)
    for each in state.schedulers:
        set_step(each, int(now.batch))
    state.timestamp = now
    _check_data(config, trainer, start.record, record)


def _check_data(config: Config, trainer: Trainer, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what has become of the data since, and begin the epoch again if its order is another."""
    if not before or before == now:
        return
    state, reasons = trainer.state, []
    if before["images"] != now["images"]:
        reasons.append("the images are no longer those that the checkpoint was trained on")
    old, new = before["order"], now["order"]
    reasons += [f"{key} {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
    begun = int(state.timestamp.batch_in_epoch) > 0
    if rank() == 0:
        told = f"; epoch {int(state.timestamp.epoch)} begins again" if begun else ""
        log.warning("data.train: %s: other data, or another order%s", "; ".join(reasons), told)
    state.timestamp = state.timestamp.copy(batch_in_epoch=0, sample_in_epoch=0, token_in_epoch=0)
    place = {
        "epoch": int(state.timestamp.epoch),
        "sample_in_epoch": 0,
        "num_canonical_nodes": config.data.num_canonical_nodes,
        "shuffle_seed": config.seed,
        "initial_physical_nodes": None,
    }
    trainer.state.train_dataloader.dataset.load_state_dict(place)  # type: ignore[union-attr]
