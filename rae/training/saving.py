"""Where a run saves: a folder that all nodes share and nobody else writes to, or a bucket."""

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from composer.utils import dist

from rae.callbacks.checkpointer import Checkpointer
from rae.config.errors import UserError
from rae.config.loading import to_yaml
from rae.config.sections import Config
from rae.survival.checkpoints import CONFIG
from rae.survival.processes import RunLock, local_rank, rank
from rae.survival.storage import RemoteFolder, is_remote


@contextmanager
def alone(folder: str, where: str) -> Iterator[None]:
    """No process of an earlier start is left, and none of a later one begins, inside this context."""
    try:
        lock, machines = RunLock(folder), RunLock(folder, on_machine=True)
    except OSError as error:
        raise UserError(f"{where}: cannot write to {folder}: {error.strerror}") from error
    with lock.file, machines.file:
        if local_rank() == 0:
            machines.acquire()
        if rank() == 0:
            lock.acquire()
        dist.barrier()
        lock.share()
        machines.share()
        try:
            yield
        finally:
            machines.release()  # a run that has ended as it should: its idle workers hold nothing up


def folder_alone(config: Config) -> AbstractContextManager[None]:
    """The same for checkpoints that lie outside the run's folder, where another run could save too."""
    folder = config.save_folder
    if folder is None or is_remote(folder) or Path(folder).resolve().is_relative_to(Path(config.run_dir).resolve()):
        return nullcontext()
    return alone(folder, "trainer.save_folder")


def build_checkpointer(config: Config, arguments: dict[str, Any]) -> Checkpointer | None:
    """What saves this run, from the trainer's arguments of Composer's names, which it takes out of ``arguments``."""
    arguments.pop("save_folder", None)
    folder = config.save_folder
    interval = arguments.pop("save_interval", "1ep")
    keep = arguments.pop("save_num_checkpoints_to_keep", -1)
    if folder is None:
        return None
    if not is_remote(folder):
        _check_folder(folder)
    elif rank() == 0:
        RemoteFolder(folder).check_writable("trainer.save_folder")
    dist.barrier()
    return Checkpointer(
        folder, config.run_dir, interval, keep, {CONFIG: to_yaml(config)}, config.checkpoints.upload_attempts
    )


def _check_folder(folder: str) -> None:
    """Check that a local folder can be written to, and is the same on all nodes. A collective call."""
    token, fault = Path(folder, f".preflight-{dist.all_gather_object(secrets.token_hex(4))[0]}"), ""
    if rank() == 0:
        try:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            fault = f"cannot write to {folder}: {error.strerror}"
    dist.barrier()
    if dist.get_local_rank() == 0 and not token.exists():
        fault = fault or f"{folder} is not the same folder on all nodes; give a shared one, or a bucket"
    faults = list(filter(None, dist.all_gather_object(fault)))
    if rank() == 0:
        token.unlink(missing_ok=True)
    if faults:
        raise UserError(f"trainer.save_folder: {faults[0]}")
