"""Saving: from a copy, beside training; sealed, uploaded, rotated, and once more when the run is told to stop."""

import logging
import secrets
import shutil
import signal
import time
from pathlib import Path

import torch
from composer import Callback, Event, Logger, State
from composer.utils import create_interval_scheduler, dist
from torch.distributed.tensor import DTensor

from rae.config.errors import UserError
from rae.survival.checkpoints import METRICS, DamagedError, age, fetch, list_checkpoints, name_at, rotate
from rae.survival.signals import FAILED, StopRequest
from rae.survival.storage import is_remote, reason
from rae.survival.uploads import Uploader
from rae.survival.writing import Writer

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

    Composer's own saver writes in place, links ``latest`` in two steps, leaves what it uploaded to itself, cannot tell
    a damaged file, and lets training wait. Here training waits for no more than a copy of the state in memory. A thread
    writes that beside its place, seals it (:func:`rae.survival.checkpoints.seal`) and renames it; another uploads it,
    the seal last. So there is no instant at which a kill leaves half a checkpoint that passes for a whole one.

    Args:
        folder: local, or a URL.
        run_dir: where checkpoints wait for their upload.
        interval: a time string.
        keep: delete all but so many of the newest complete ones; −1 keeps all.
        texts: small files that travel with each checkpoint, by name.
        upload_attempts: before an upload counts as failed; pauses between them double from a second on.
    """

    def __init__(
        self,
        folder: str,
        run_dir: str,
        interval: str,
        keep: int = -1,
        texts: dict[str, str] | None = None,
        upload_attempts: int = 10,
    ):
        self.folder, self.keep = folder, keep
        self.remote = is_remote(folder)
        self.local = Path(run_dir, "uploads", f"node{dist.get_node_rank()}") if self.remote else Path(folder)
        # Who moves what all have written to its place: one for each disk.
        self.mover = (dist.get_local_rank() if self.remote else dist.get_global_rank()) == 0
        self.interval, self.due = interval, create_interval_scheduler(interval)
        self.saves = Mean()
        """How long training stood still for this start's saves."""
        self.saved_at: tuple[int, int] | None = None
        self.writer = Writer(self.local, {} if texts is None else texts, self.mover)
        self.uploader = Uploader(folder, upload_attempts) if self.remote else None
        self.stop = StopRequest()
        self.safe = ""
        """The newest checkpoint that is where it belongs, as far as this rank has heard."""
        self.told = False
        """Whether it has been said that a checkpoint could not be written or uploaded."""
        self.was_finished = False
        """Whether training goes on from the end of a shorter run."""

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._start(state)
        elif event == Event.BATCH_CHECKPOINT:
            stopping = self.stop.agreed(bool(self._failure))
            if stopping == FAILED:
                self.settle()
            if stopping or self.due(state, event):
                self.save(state)
            if stopping:
                self._leave(state, stopping)
        elif event == Event.EPOCH_CHECKPOINT and self.due(state, event):
            self.save(state)

    def close(self, state: State, logger: Logger) -> None:
        self.stop.unlisten()

    def finish_saving(self, patience: float) -> None:
        """Return when what this rank writes and uploads is there, or has failed: before an error ends the process.

        Args:
            patience: seconds to wait for other ranks that write, for they may be what is wrong.
        """
        end = time.monotonic() + patience
        while self._busy and (self.writer.group is None or time.monotonic() < end):
            time.sleep(0.1)
        if self._failure and not self.told:
            log.warning("%s", self._failure)

    @property
    def _busy(self) -> bool:
        return self.writer.busy or (self.uploader is not None and self.uploader.busy)

    @property
    def _failure(self) -> str:
        return self.writer.failure or (self.uploader.failure if self.uploader is not None else "")

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

    def save(self, state: State, wait: bool = False) -> None:
        """Save now, unless this very moment is saved already. A collective call.

        Args:
            wait: until it is on the disk.
        """
        if self.saved_at != _time(state):
            begun = time.perf_counter()
            self._save(state)
            self.saves.add(time.perf_counter() - begun)
        if wait:
            self.settle(uploads=False)

    def _save(self, state: State) -> None:
        self.settle(uploads=False)  # there is one copy
        broken = sorted({name for names in dist.all_gather_object(nonfinite_weights(state)) for name in names})
        if broken:
            step = int(state.timestamp.batch)
            raise UserError(f"step {step}: weights are not finite ({broken[0]}), and not saved{self._safe()}")
        self.saved_at = _time(state)
        name = name_at(*self.saved_at)
        if self.mover:  # what an earlier start may have left of the same
            shutil.rmtree(self.writer.staging(name), ignore_errors=True)
        token = dist.all_gather_object(secrets.token_hex(8))[0]  # for which the others wait
        # Every step seeds its own generators; what Composer would save of them is pickled objects.
        content = {"state": state.state_dict(), **({"rng": []} if dist.get_global_rank() == 0 else {})}
        on_gpu = state.device.name == "gpu" and not state.fsdp_enabled  # whose state Composer brings to the CPU
        self.writer.open_group(_writers(state), on_gpu)
        self.writer.write(name, token, content, state.fsdp_sharded_state_dict_enabled, self._written)

    def _written(self, checkpoint: Path, files: list[str]) -> None:
        """What the writing thread does with a checkpoint of which this rank has written ``files``."""
        if self.uploader is None:
            self._rotate()
        else:
            self.uploader.put(checkpoint, files, self._rotate)

    def _rotate(self) -> None:
        if self.keep > 0 and dist.get_global_rank() == 0:
            try:
                rotate(self.folder, self.keep)
            except Exception as error:  # too many checkpoints are no reason to stop
                log.warning("old checkpoints in %s could not be deleted: %s", self.folder, reason(error))

    def settle(self, uploads: bool = True) -> None:
        """Wait until all ranks have written, and uploaded.

        A collective call, in short exchanges: a long one would pass for a hang.

        Raises:
            UserError: a rank has failed for good.
        """
        stage, patience = self.writer if self.uploader is None else self.uploader, time.monotonic() + 60
        while True:
            mine = (self._busy if uploads else self.writer.busy, self._failure, stage.used, stage.done)
            busy, failures, used, done = zip(*dist.all_gather_object(mine), strict=True)
            arrived = [name for uses, name in zip(used, done, strict=True) if uses]
            if arrived and all(arrived):
                self.safe = min(arrived, key=age)
            for failure in filter(None, failures):
                self.told = True
                raise UserError(f"{failure}{self._safe()}")
            if not any(busy):
                return
            if dist.get_global_rank() == 0 and time.monotonic() > patience:
                log.warning("still waiting for a checkpoint to be written to %s", self.folder)
                patience += 60
            time.sleep(0.2)

    def _safe(self) -> str:
        return f"; {self.safe} is the newest safe checkpoint" if self.safe else "; no checkpoint of this start is safe"

    def finish(self, state: State, metrics: Path) -> None:
        """Save the end of the run with its last evaluation, and wait for the uploads. A collective call."""
        self.save(state)
        self.settle()
        if dist.get_global_rank() == 0:
            checkpoint = self.local / name_at(*_time(state))
            checkpoint.mkdir(exist_ok=True)
            shutil.copyfile(metrics, checkpoint / METRICS)
            if self.uploader is not None:
                self.uploader.put(checkpoint, [METRICS], self._rotate)
        self.settle()
        self._rotate()

    def _leave(self, state: State, stopping: int) -> None:
        self.stop.ignore()
        self.settle()
        if dist.get_global_rank() == 0:
            name, step = signal.Signals(stopping).name, int(state.timestamp.batch)
            log.warning("%s: stopped after step %d, which is saved; the same command goes on", name, step)
        raise SystemExit(128 + stopping)


def _writers(state: State) -> list[int]:
    """The ranks that write: one, or, if each writes its shards, those of the first replica."""
    if not state.fsdp_sharded_state_dict_enabled:
        return [0]
    mesh = state.device_mesh
    return mesh.mesh.reshape(-1, mesh.mesh.shape[-1])[0].tolist() if mesh is not None else []


def _time(state: State) -> tuple[int, int]:
    return int(state.timestamp.batch), int(state.timestamp.epoch)
