"""The checkpoint that a run begins at, handed to Composer's Trainer so that it cannot run code."""

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composer.algorithms
import torch
from composer.utils import dist
from composer.utils.checkpoint import glob_filter
from torch.distributed.checkpoint.api import CheckpointException

from rae.callbacks.checkpointer import Checkpointer
from rae.config.errors import UserError, first_line
from rae.config.sections import Config
from rae.survival.checkpoints import refused, without_code
from rae.survival.processes import rank
from rae.training.parallelism import saves_sharded
from rae.training.resume import changes, clear, given, loadable, newest, used

_OTHER_MODEL = "checkpoint {}: it is of another model or other algorithms; give another run_name and run_dir"

log = logging.getLogger(__name__)


@contextmanager
def explained(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
    except (RuntimeError, KeyError, CheckpointException) as error:
        if checkpoint is None or (isinstance(error, RuntimeError) and "state_dict" not in str(error)):
            raise
        raise UserError(_OTHER_MODEL.format(checkpoint)) from error


def find_checkpoint(config: Config, arguments: dict[str, Any], checkpointer: Checkpointer | None) -> Path | None:
    """The checkpoint to go on from, or to begin with; takes ``autoresume`` and ``load_path`` out of ``arguments``."""
    scratch = _scratch(config)
    load_path, autoresume = arguments.pop("load_path", None), arguments.pop("autoresume", True)
    if checkpointer is not None and autoresume:
        found = newest(checkpointer.places(), scratch, config.checkpoints.damaged)
        if found is not None:
            checkpointer.resumed(found)
            for key in ("load_weights_only", "load_ignore_keys"):  # those are about load_path
                arguments.pop(key, None)
            return found
    if checkpointer is not None and not autoresume and used(checkpointer.folder):
        raise UserError(
            f"trainer.autoresume: {checkpointer.folder} holds checkpoints of an earlier start; "
            "go on from them, or give another trainer.save_folder"
        )
    return given(load_path, scratch, config.checkpoints.damaged) if load_path else None


def _scratch(config: Config) -> Path:
    return Path(config.run_dir, f".loading-node{dist.get_node_rank()}")


@contextmanager
def loading(
    config: Config, checkpoint: Path | None, ignored: list[str] | None, expected: torch.nn.Module | None
) -> Iterator[dict[str, Any]]:
    """The Trainer's arguments for loading a checkpoint, which cannot run code in this context."""
    if checkpoint is None:
        yield {}
        return

    names = set(expected.state_dict()) if expected is not None else None

    def ignore(state_dict: Any) -> None:
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
            raise UserError(f"{checkpoint} is no checkpoint of a run")
        # Composer would load what fits, and train the rest from the beginning.
        if names is not None and set(state_dict["state"].get("model", ())) != names:
            raise UserError(_OTHER_MODEL.format(checkpoint))
        state_dict.pop("rng", None)
        if ignored:
            glob_filter(ignored)(state_dict)

    changed = changes(checkpoint, config)
    path = loadable(checkpoint, saves_sharded(config), _scratch(config))
    # Composer would evaluate strings from the checkpoint, to add the algorithms that they name.
    excluded = list(composer.algorithms.__all__)
    try:
        with without_code():
            yield dict(load_path=str(path), load_ignore_keys=ignore, load_exclude_algorithms=excluded)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {checkpoint} holds {refused(error)}") from error
    if rank() == 0:
        log.warning("%s begins at checkpoint %s", config.run_name, checkpoint.name)
        for change in changed:
            log.warning("the configuration has changed since: %s", change)
    clear(_scratch(config))
