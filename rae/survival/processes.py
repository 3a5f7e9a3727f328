"""Processes that die: those left behind end themselves, and what they held is free for the next start."""

import fcntl
import hashlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rae.adapters.streaming import agreeing
from rae.config.errors import RankError, UserError, first_line

_SEGMENTS = Path("/dev/shm")


def follow_parent() -> None:
    """End this process within a second after its parent was killed: it would train on, or wait on a full pipe."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def heed_parent_alone() -> None:
    """Let SIGTERM end this worker process only if its parent sends it, and SIGINT never.

    Both often go to a whole process group, whose leader still wants to finish a step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent it
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for threads begun later, too

    def heed() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            continue
        os._exit(0)

    threading.Thread(target=heed, daemon=True).start()


class RunLock:
    """Held by every process of a run, until the last has ended; a new start of the run waits for it.

    Ranks and loader workers inherit or share one lock on the run's folder, so that a process that outlived a kill
    cannot write beside its successor.

    Args:
        folder: the run's folder, or another that only one run may use.
        on_machine: the lock is this machine's, and outlives the folder: it may have been wiped while processes die.
    """

    def __init__(self, folder: str | Path, on_machine: bool = False):
        self.folder, path = Path(folder), Path(folder, ".lock")
        self.folder.mkdir(parents=True, exist_ok=True)
        if on_machine:
            name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
            path = Path(tempfile.gettempdir(), f"rae-run-{os.getuid()}-{name}.lock")
        self.file = path.open("a+")

    def acquire(self, seconds: float = 60.0) -> None:
        """Wait until no other process of the run is left.

        Raises:
            UserError: some still are, after ``seconds``.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"run_dir: {self.folder} is in use by another run that has not ended; "
                        "wait for it or end it, or give this run a run_name and run_dir of its own"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return

    def share(self) -> None:
        """Let the run's other processes hold it too."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_SH)
        except OSError:
            return

    def release(self) -> None:
        """Let it go, also for processes that have inherited it."""
        with suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_UN)


_turns: set[str] = set()


@contextmanager
def one_at_a_time(name: str, seconds: float = 60.0) -> Iterator[None]:
    """Processes of this machine that name the same thing go through one after the other, if it takes no longer.

    Whoever is in already may enter again.
    """
    if name in _turns:
        yield
        return
    path = Path(tempfile.gettempdir(), f"rae-{name}-{os.getuid()}.lock")
    with path.open("w") as file:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        _turns.add(name)
        try:
            yield
        finally:
            _turns.discard(name)


@contextmanager
def opening(folders: Iterable[str], fault: str, caches: Iterable[str] = ()) -> Iterator[None]:
    """Data sets are opened in here, by all ranks together, and by one launch of this machine at a time.

    Streaming numbers its shared memory by what it finds: two launches that open at once would take the same number.

    Args:
        folders: see :func:`remove_dead_segments`.
        fault: what the message begins with when one cannot be opened.
        caches: those of them that this run alone uses; see :func:`remove_dead_segments`.

    Raises:
        UserError: Streaming's errors.
    """
    first = local_rank() == 0
    try:
        with one_at_a_time("streaming") if first else nullcontext():
            if first:
                remove_dead_segments(folders, caches)
            barrier()
            with agreeing(of_local_leader):
                yield
            barrier()
    except (ValueError, OSError, RuntimeError) as error:
        # A wrong path or cache is every rank's mistake; what else goes wrong may be one's alone.
        kind = RankError if isinstance(error, RuntimeError) else UserError
        raise kind(f"{fault}: {first_line(error)}") from error


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def of_local_leader(value: Any) -> Any:
    """The value of this machine's first rank, on all its ranks. A collective call."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told[dist.get_rank() - local_rank()]


def of_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank. A collective call."""
    import torch.distributed as dist

    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return told[0]


def remove_dead_segments(folders: Iterable[str], own: Iterable[str] = ()) -> None:
    """Remove Streaming's shared memory of dead processes that read these folders.

    Streaming's own ``clean_stale_shared_memory`` removes other runs' too. Here a segment goes only when it names one
    of our folders and no process has it mapped any more.

    Args:
        folders: local folders of data sets, as given to Streaming.
        own: those of them in a run's folder, whose locks say that none of the run's other processes lives.
    """
    ours = _segments_of(own)
    for number in {*_segments_of(folders), *ours}:
        # Whoever opens a data set of his own keeps all that he finds mapped.
        if number in ours or not _is_mapped(f"{_SEGMENTS}/{number}_"):
            locks = Path(tempfile.gettempdir()).glob(f"{number}_*_filelock")
            for left in (*_SEGMENTS.glob(f"{number}_*"), *locks):
                left.unlink(missing_ok=True)


def _segments_of(folders: Iterable[str]) -> list[str]:
    """The numbers of Streaming's shared memory that names one of these folders."""
    from streaming.base.shared.prefix import _unpack_locals

    wanted, found = {os.path.abspath(folder) for folder in folders}, []
    for segment in _SEGMENTS.glob("[0-9]*_locals"):  # none where shared memory is not in the file system
        try:
            named = {os.path.abspath(folder) for folder in _unpack_locals(segment.read_bytes())[0]}
        except (OSError, ValueError, IndexError):
            continue
        if named & wanted:
            found.append(segment.name.split("_")[0])
    return found


def _is_mapped(prefix: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if prefix in maps.read_text():
                return True
        except OSError:  # it has ended, or is another user's, whose segments we could not remove anyway
            continue
    return False


def join_ranks() -> None:
    """Begin to work together with the other processes of this launch, if there are any.

    Raises:
        UserError: the launcher set some of what it takes, and not all.
    """
    import torch
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except ValueError as error:
        raise UserError(f"cannot join the other ranks: {error}") from error


def world_size() -> int:
    """Ranks of this launch, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's rank on its machine, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    """This process's rank, as the launcher says."""
    return int(os.environ.get("RANK", 0))
