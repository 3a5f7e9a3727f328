"""Saving: atomically, sealed, uploaded in the background, rotated, and once more when the run is told to stop."""

import logging
import secrets
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Event, Logger, State
from composer.utils import checkpoint as composer_checkpoint
from composer.utils import create_interval_scheduler, dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from rae.config.errors import RankError, UserError
from rae.survival.checkpoints import (
    CONFIG,
    METRICS,
    SHARDED,
    STATE,
    DamagedError,
    Listed,
    age,
    fetch,
    list_checkpoints,
    name_at,
    remove,
    rotate,
    seal,
    sync,
)
from rae.survival.signals import FAILED, StopRequest
from rae.survival.storage import is_remote, reason
from rae.survival.uploads import Uploader

log = logging.getLogger(__name__)


def nonfinite_weights(state: State) -> list[str]:
    """Names of trained weights, of the model and of algorithms' discriminators, whose norm here is NaN or infinite."""
    modules = [state.model, *(a.discriminator for a in state.algorithms if hasattr(a, "discriminator"))]
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p.detach() for _, p in named]
    norms = torch.stack(torch._foreach_norm(local)).isfinite().tolist()
    return [name for (name, _), finite in zip(named, norms, strict=True) if not finite]


class Mean:
    """Of durations, without the first if there are others: that one loads, compiles and fills caches."""

    def __init__(self) -> None:
        self.count, self.total, self.first = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        self.first = self.first if self.count else seconds
        self.count, self.total = self.count + 1, self.total + seconds

    @property
    def value(self) -> float:
        return (self.total - self.first) / (self.count - 1) if self.count > 1 else self.first


class Checkpointer(Callback):
    """Save the run every ``interval``, and when it is told to stop (SIGTERM, SIGINT). Always on.

    Composer's own saver writes in place, links ``latest`` in two steps, leaves what it uploaded to itself and cannot
    tell a damaged file. Here a checkpoint is written beside its place, sealed (:func:`rae.survival.checkpoints.seal`)
    and then renamed, or uploaded with the seal last; so there is no instant at which a kill leaves half a checkpoint
    that passes for a whole one. Composer's functions write the files themselves.

    Args:
        folder: local, or a URL.
        run_dir: where checkpoints wait for their upload.
        interval: a time string.
        keep: delete all but so many of the newest complete ones; −1 keeps all.
        config: the run's configuration as YAML, which travels with each checkpoint.
        upload_attempts: before an upload counts as failed; pauses between them double from a second on.
    """

    def __init__(
        self, folder: str, run_dir: str, interval: str, keep: int = -1, config: str = "", upload_attempts: int = 10
    ):
        self.folder, self.keep, self.config = folder, keep, config
        self.remote = is_remote(folder)
        self.local = Path(run_dir, "uploads", f"node{dist.get_node_rank()}") if self.remote else Path(folder)
        # Who moves what all have written to its place: one for each disk.
        self.mover = (dist.get_local_rank() if self.remote else dist.get_global_rank()) == 0
        self.interval, self.due = interval, create_interval_scheduler(interval)
        self.saves = Mean()
        """How long this start's saves took."""
        self.saved_at: tuple[int, int] | None = None
        self.uploader = Uploader(folder, upload_attempts) if self.remote else None
        self.stop = StopRequest()
        self.safe = ""
        self.was_finished = False
        """Whether training goes on from the end of a shorter run."""

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._start(state)
        elif event == Event.BATCH_CHECKPOINT:
            stopping = self.stop.agreed(self.uploader is not None and bool(self.uploader.failure))
            if stopping == FAILED:
                self._wait_for_uploads()
            if stopping or self.due(state, event):
                self.save(state)
            if stopping:
                self._leave(state, stopping)
        elif event == Event.EPOCH_CHECKPOINT and self.due(state, event):
            self.save(state)

    def close(self, state: State, logger: Logger) -> None:
        self.stop.unlisten()

    def finish_uploads(self) -> None:
        """Return when this rank's uploads are through, or have failed: what to do before an error ends the process."""
        while self.uploader is not None and self.uploader.busy:
            time.sleep(0.1)

    def places(self) -> list[str]:
        """Where this run's checkpoints may be: in the bucket, and what one node could not upload before it ended."""
        if self.uploader is None or dist.get_world_size() > dist.get_local_world_size():
            return [self.folder]
        return [self.folder, str(self.local)]

    def resumed(self, checkpoint: Path) -> None:
        """Tell it which checkpoint training goes on from."""
        self.safe, self.saved_at = checkpoint.name, age(checkpoint.name)
        self.was_finished = (checkpoint / METRICS).is_file()

    def _start(self, state: State) -> None:
        if self.mover:
            for left in self.local.glob(".saving-*"):
                shutil.rmtree(left, ignore_errors=True)
            if self.uploader is not None:
                self._upload_left(self.uploader)
        dist.barrier()
        self.stop.listen()

    def _upload_left(self, uploader: Uploader) -> None:
        """Send what an earlier start saved and could not send any more."""
        for checkpoint in reversed(list_checkpoints(str(self.local))):
            try:
                fetch(str(self.local), checkpoint, self.local)
            except DamagedError:
                shutil.rmtree(self.local / checkpoint.name, ignore_errors=True)
            else:
                uploader.put(self.local / checkpoint.name, checkpoint.sealed_last, self._rotate)

    def save(self, state: State) -> None:
        """Save now, unless this very moment is saved already. A collective call."""
        if self.saved_at == _time(state):
            return
        begun = time.perf_counter()
        self._save(state)
        self.saves.add(time.perf_counter() - begun)

    def _save(self, state: State) -> None:
        broken = sorted({name for names in dist.all_gather_object(nonfinite_weights(state)) for name in names})
        if broken:
            step = int(state.timestamp.batch)
            raise UserError(f"step {step}: weights are not finite ({broken[0]}), and not saved{self._safe()}")
        self.saved_at = _time(state)
        name = name_at(*self.saved_at)
        staging = self.local / f".saving-{name}"
        # Composer appends the name to a sharded checkpoint's folder itself.
        file = staging / name / STATE if not state.fsdp_sharded_state_dict_enabled else staging / STATE
        try:
            written = composer_checkpoint.save_checkpoint(state, str(file), ignore_keys=_without_rng)
            files = self._seal(staging / name, written is not None)
            dist.barrier()
            if self.mover:
                # There may be one of a run that went on from an older one.
                remove(str(self.local), Listed(name, frozenset(p.name for p in (self.local / name).glob("*"))))
                (staging / name).rename(self.local / name)
                staging.rmdir()
                sync(self.local)
        except (OSError, RuntimeError, CheckpointException) as error:
            fault = _disk_fault(error)
            if fault is None:
                raise
            raise RankError(f"checkpoint {name} could not be written to {self.local}: {fault}{self._safe()}") from error
        dist.barrier()
        if self.uploader is None:
            self.safe = name
            self._rotate()
        elif files:
            self.uploader.put(self.local / name, files, self._rotate)

    def _seal(self, folder: Path, wrote: bool) -> list[str]:
        """The names of the files that this rank wrote, its seal last; none if it wrote nothing."""
        answers = dist.all_gather_object((wrote, secrets.token_hex(8)))
        writers, save = [rank for rank, (one, _) in enumerate(answers) if one], answers[0][1]
        if not wrote:
            return []
        part = writers.index(dist.get_global_rank())
        files = sorted(file.name for file in folder.iterdir() if file.name.startswith((f"__{part}_", STATE)))
        if part == 0:
            (folder / CONFIG).write_text(self.config)
            files += [CONFIG, *(file.name for file in folder.glob(SHARDED))]
        return [*files, seal(folder, files, part, len(writers), save)]

    def _rotate(self) -> None:
        if self.keep > 0 and dist.get_global_rank() == 0:
            try:
                rotate(self.folder, self.keep)
            except Exception as error:  # too many checkpoints are no reason to stop
                log.warning("old checkpoints in %s could not be deleted: %s", self.folder, reason(error))

    def _wait_for_uploads(self) -> None:
        """Wait for all ranks' uploads, in short exchanges, for a long one would pass for a hang. A collective call.

        Raises:
            UserError: one has failed for good, on whichever rank.
        """
        if self.uploader is None:
            return
        while True:
            mine = (self.uploader.busy, self.uploader.failure, self.uploader.used, self.uploader.done)
            busy, failures, used, done = zip(*dist.all_gather_object(mine), strict=True)
            arrived = [name for uses, name in zip(used, done, strict=True) if uses]
            if arrived and all(arrived):
                self.safe = min(arrived, key=age)
            for failure in filter(None, failures):
                raise UserError(f"{failure}{self._safe()}")
            if not any(busy):
                return
            time.sleep(0.2)

    def _safe(self) -> str:
        return f"; {self.safe} is the newest safe checkpoint" if self.safe else "; no checkpoint of this start is safe"

    def finish(self, state: State, metrics: Path) -> None:
        """Save the end of the run with its last evaluation, and wait for the uploads. A collective call."""
        self.save(state)
        self._wait_for_uploads()
        if dist.get_global_rank() == 0:
            checkpoint = self.local / name_at(*_time(state))
            checkpoint.mkdir(exist_ok=True)
            shutil.copyfile(metrics, checkpoint / METRICS)
            if self.uploader is not None:
                self.uploader.put(checkpoint, [METRICS], self._rotate)
        self._wait_for_uploads()
        self._rotate()

    def _leave(self, state: State, stopping: int) -> None:
        self.stop.ignore()
        self._wait_for_uploads()
        if dist.get_global_rank() == 0:
            name, step = signal.Signals(stopping).name, int(state.timestamp.batch)
            log.warning("%s: stopped after step %d, which is saved; the same command goes on", name, step)
        raise SystemExit(128 + stopping)


def _disk_fault(error: BaseException) -> str | None:
    """What the operating system said when a file could not be written, if that is what went wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    return "the disk is full, or fails" if "PytorchStreamWriter" in text or "inline_container" in text else None


def _time(state: State) -> tuple[int, int]:
    return int(state.timestamp.batch), int(state.timestamp.epoch)


def _without_rng(state_dict: dict[str, Any]) -> None:
    # Every step seeds its own generators; what Composer would save of them is pickled objects.
    state_dict["rng"] = []
