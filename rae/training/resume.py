"""Where a run goes on: the newest checkpoint that is whole, in the form that this launch loads."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from composer.utils import dist
from torch.distributed.checkpoint.api import CheckpointException

from rae.config.errors import UserError
from rae.survival.checkpoints import (
    SHARDED,
    DamagedError,
    Listed,
    check_metadata,
    check_whole,
    fetch,
    in_form,
    list_checkpoints,
    unseal,
)
from rae.survival.storage import RemoteFolder, is_remote, reason

log = logging.getLogger(__name__)


def newest(folders: Sequence[str], scratch: Path, damaged: Literal["older", "stop"]) -> Path | None:
    """The newest complete and undamaged checkpoint, on this node's disk. A collective call.

    Args:
        folders: where to look: the run's checkpoints, local or remote, and what waits on this disk for its upload.
        scratch: local folder for what is downloaded.
        damaged: whether a checkpoint that is not whole means going on from an older one, or an error.

    Returns:
        its folder, or None if nothing was ever saved completely.

    Raises:
        UserError: a folder cannot be listed or read; damage and ``damaged: stop``; nothing but damage.
    """
    found = [(folder, checkpoint) for folder in folders for checkpoint in _listed(folder)]
    # Of what waits for its upload, the incomplete is what an upload that succeeded has not yet removed.
    found = [(folder, checkpoint) for folder, checkpoint in found if folder == folders[0] or checkpoint.parts]
    skipped: list[tuple[str, Listed]] = []
    for folder, checkpoint in sorted(found, key=lambda pair: (pair[1].age, pair[0] != folders[0]), reverse=True):
        path, fault = _fetched(folder, checkpoint, scratch)
        if not fault:
            if dist.get_global_rank() == 0:  # or they would pass for newer or complete beside what this start will save
                for skipped_folder, each in skipped:
                    unseal(skipped_folder, each)
            dist.barrier()
            return path
        skipped.append((folder, checkpoint))
        message = f"checkpoint {folder.rstrip('/')}/{checkpoint.name} is not used: {fault}"
        if damaged == "stop":
            raise UserError(f"{message}; remove it, or set checkpoints.damaged=older")
        if dist.get_global_rank() == 0:
            log.warning("%s", message)
    if any(checkpoint.parts for _, checkpoint in found):
        raise UserError(f"no checkpoint in {folders[0]} is whole; remove them to start from the beginning")
    return None


def used(folder: str) -> bool:
    """Whether there are checkpoints in a folder. A collective call."""
    return bool(_listed(folder))


def _listed(folder: str) -> list[Listed]:
    found: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            found[0] = list_checkpoints(folder)
        except Exception as error:
            found[0] = f"cannot list the checkpoints in {folder}: {reason(error)}"
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return found[0]


def on_each_node(work: Callable[[], Any], failure: str) -> list[Any]:
    """What ``work`` gave to one rank of each node, by rank; if it failed, all ranks raise. A collective call."""
    made, fault = None, ""
    if dist.get_local_rank() == 0:
        try:
            made = work()
        except (Exception, CheckpointException) as error:
            said = isinstance(error, DamagedError | UserError)
            fault = str(error) if said else reason(error)
            fault = fault if isinstance(error, UserError) else f"{failure}: {fault}"
    answers = dist.all_gather_object((made, fault))
    for _, each in answers:
        if each:
            raise UserError(each)
    return [made for made, _ in answers]


def _fetched(folder: str, checkpoint: Listed, scratch: Path) -> tuple[Path, str]:
    """The checkpoint on this node's disk, and what is damaged in it on whichever node."""

    def damage() -> str:
        try:
            path = fetch(folder, checkpoint, scratch)
            if (path / SHARDED).is_file():
                check_metadata(path)
        except DamagedError as error:
            return str(error)
        return ""

    faults = on_each_node(damage, f"cannot read checkpoint {checkpoint.name} of {folder}")
    local = scratch if is_remote(folder) else Path(folder)
    return local / checkpoint.name, next(filter(None, faults), "")


def given(path: str, scratch: Path, damaged: Literal["older", "stop"]) -> Path:
    """The checkpoint that ``trainer.load_path`` names: a folder of checkpoints, one of them, or a ``.pt`` file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if path.endswith(".pt"):
        return _file(path, scratch)
    parent, _, name = path.rstrip("/").rpartition("/")
    ours = [checkpoint for checkpoint in _listed(parent or ".") if checkpoint.name == name]
    if ours:
        local, fault = _fetched(parent or ".", ours[0], scratch)
        if fault:
            raise UserError(f"trainer.load_path: checkpoint {path} is not used: {fault}")
        return local
    for folder in (path, f"{path.rstrip('/')}/checkpoints"):  # of a run, whose folder may be given
        found = newest([folder], scratch, damaged)
        if found is not None:
            return found
    raise UserError(f"trainer.load_path: {_no_checkpoint(path)}")


def _no_checkpoint(path: str) -> str:
    """What a path without a checkpoint is instead."""
    if not is_remote(path) and not Path(path).exists():
        return f"there is no folder and no file {path}"
    if not is_remote(path) and any(Path(path, name).is_file() for name in ("config.json", "model.pt")):
        return f"{path} holds weights alone; begin_from: {path} takes them"
    return f"there is no complete checkpoint in {path}"


def _file(path: str, scratch: Path) -> Path:
    folder, _, name = path.rpartition("/")
    local = scratch / name if is_remote(path) else Path(path)

    def get() -> None:
        if is_remote(path):
            scratch.mkdir(parents=True, exist_ok=True)
            RemoteFolder(folder).download(name, local)
        check_whole(local)

    on_each_node(get, f"trainer.load_path: {path}")
    return local


def loadable(checkpoint: Path, sharded: bool, scratch: Path) -> Path:
    """The checkpoint in the form that Composer is to load; see :func:`rae.survival.checkpoints.in_form`.

    A collective call.

    Raises:
        UserError: it cannot be converted.
    """
    failure = f"checkpoint {checkpoint} cannot be converted for this launch"
    paths = on_each_node(lambda: in_form(checkpoint, sharded, scratch / "converted"), failure)
    return paths[dist.get_global_rank() - dist.get_local_rank()]


def clear(scratch: Path) -> None:
    """Remove what was downloaded or converted for loading. A collective call."""
    dist.barrier()
    if dist.get_local_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
