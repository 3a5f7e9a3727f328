"""Checkpoints on their way to the disk, beside training."""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from rae.config.errors import first_line
from rae.survival.checkpoints import SHARDED, STATE, Listed, remove, seal, sync
from rae.survival.processes import rank, world_size


class _Files(FileSystemWriter):
    """Leaves the folder's path out of ``.metadata``: as Python 3.13 names its class, earlier ones cannot read it."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class Writer:
    """Writes one checkpoint at a time, from a copy of the state, in a thread that cannot keep the process from ending.

    Ranks that write shards agree in a process group of their own, so that training's exchanges stay apart.

    Args:
        folder: local, where checkpoints go.
        texts: small files that travel with each checkpoint, by name: the run's configuration, what its data are.
        mover: whether this rank moves what the ranks of this disk have written to its place.
    """

    def __init__(self, folder: Path, texts: dict[str, str], mover: bool):
        self.folder, self.texts, self.mover = folder, texts, mover
        self.ranks: list[int] = []
        self.group: Any = None
        self.thread: threading.Thread | None = None
        self.stager: DefaultStager | None = None
        self.done = ""
        """The newest checkpoint that is where it belongs."""
        self.failure = ""
        """What went wrong, once a checkpoint could not be written. None is begun after that."""

    def staging(self, name: str) -> Path:
        """Where a checkpoint is written, beside its place."""
        return self.folder / f".saving-{name}"

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def used(self) -> bool:
        """Whether this rank writes any."""
        return rank() in self.ranks

    def open_group(self, ranks: Sequence[int], on_gpu: bool = False) -> None:
        """Say which ranks write, in the order of their parts. A collective call.

        Args:
            on_gpu: what they write is on their GPUs.
        """
        if self.ranks:
            return
        # It keeps its buffers as long as the same tensors are saved: new ones take three times as long to fill.
        options = dict(use_pinned_memory=on_gpu, use_non_blocking_copy=on_gpu)
        self.stager = DefaultStager(StagingOptions(**options, use_shared_memory=False, use_async_staging=False))
        self.ranks = list(ranks) or list(range(world_size()))
        if len(self.ranks) > 1:
            # A disk may be slow for longer than a step's exchange may take; a rank that ends is noticed at once.
            self.group = distributed.new_group(self.ranks, timeout=timedelta(days=1), backend="gloo")

    def write(
        self, name: str, token: str, content: dict[str, Any], sharded: bool, then: Callable[[Path, list[str]], None]
    ) -> None:
        """Copy ``content`` now, and write it later. Not to be called while the writer is busy.

        Args:
            name: the checkpoint's.
            token: what all its parts have in common, and no other save's.
            content: of this rank.
            sharded: as Torch's distributed files, or as one file.
            then: is called in the thread, with the checkpoint's folder and the files that this rank wrote.
        """
        if not self.used or self.failure or self.stager is None:
            return
        copy, device = self.stager.stage(content), torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # or this thread would take its share of the first
            self._run(name, token, copy, sharded, then)

        self.thread = threading.Thread(target=run, name="write", daemon=True)
        self.thread.start()

    def _run(self, name: str, token: str, content: Any, sharded: bool, then: Callable[[Path, list[str]], None]) -> None:
        staging = self.staging(name)
        try:
            # By itself: who fails here must not leave the others alone in an exchange of Torch's.
            self._agreed(lambda: (staging / name).mkdir(parents=True, exist_ok=True))
            files = self._agreed(lambda: self._files(staging / name, token, content, sharded))
            self._agreed(lambda: self._move(staging, name))
            self.done = name
            then(self.folder / name, files)
        except Exception as error:
            self.failure = f"checkpoint {name} could not be written to {self.folder}: {_fault(error)}"

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives, once it has been done on all ranks that write.

        Raises:
            Exception: it has failed, on whichever.
        """
        made, fault = None, ""
        try:
            made = work()
        except (Exception, CheckpointException) as error:
            fault = _fault(error)
        if self.group is not None:
            faults: list[Any] = [None] * len(self.ranks)
            distributed.all_gather_object(faults, fault, group=self.group)
            fault = fault or next(filter(None, faults), "")
        if fault:
            raise OSError(fault)
        return made

    def _files(self, folder: Path, token: str, content: Any, sharded: bool) -> list[str]:
        """Write this rank's files; their names, the seal's last."""
        if sharded:
            distributed_checkpoint.save(
                content,
                storage_writer=_Files(folder),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                process_group=self.group,
                no_dist=self.group is None,  # or it would take training's
            )
        else:
            with (folder / STATE).open("wb") as file:  # by its path, Torch would write with the GIL held
                torch.save(content, file)
        part = self.ranks.index(rank())
        written = sorted(file.name for file in folder.iterdir() if file.name.startswith((f"__{part}_", STATE)))
        if part == 0:
            for name, text in self.texts.items():
                (folder / name).write_text(text)
            written += [*self.texts, *(file.name for file in folder.glob(SHARDED))]
        return [*written, seal(folder, written, part, len(self.ranks), token)]

    def _move(self, staging: Path, name: str) -> None:
        if self.mover:
            # There may be one of a run that went on from an older one.
            remove(str(self.folder), Listed(name, frozenset(p.name for p in (self.folder / name).glob("*"))))
            (staging / name).rename(self.folder / name)
            staging.rmdir()
            sync(self.folder)


def _fault(error: BaseException) -> str:
    """What the operating system said when a file could not be written, if that is what went wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        if isinstance(cause, CheckpointException):  # of several ranks
            return _fault(next(iter(cause.failures.values()))[0])
        cause = cause.__cause__ or cause.__context__
    text = first_line(error)  # type: ignore[arg-type]
    full = "PytorchStreamWriter" in text or "inline_container" in text
    return "the disk is full, or fails" if full else f"{type(error).__name__}: {text}"
