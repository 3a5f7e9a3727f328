"""What happens on SIGTERM and SIGINT: all ranks hear of it at the same step, and save."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rae.survival.interrupts import heard
from rae.survival.processes import world_size

FAILED = 1000
"""Stands beside signals for a checkpoint that could not be written, or uploaded, on some rank."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside this context SIGTERM is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Remembers a SIGTERM or SIGINT, on whichever rank, until all ranks know of it at the same step.

    A second signal, some seconds later, ends the process at once.
    """

    def __init__(self) -> None:
        self.signal, self.heard_at = 0, 0.0
        self.pending: tuple[Any, torch.Tensor] | None = None
        self.handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over both signals. A collective call."""
        if world_size() > 1:
            self.group = torch.distributed.new_group(backend="gloo")
        self._handle(self._heard)
        self.signal = self.signal or heard()

    def ignore(self) -> None:
        """Let no signal disturb what is done on account of the first."""
        self._handle(signal.SIG_IGN)

    def unlisten(self) -> None:
        """Give both signals back to whom they were taken from."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _handle(self, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, handler)
                self.handlers.setdefault(number, before)

    def _heard(self, number: int, frame: Any) -> None:
        if not self.signal:
            self.signal, self.heard_at = number, time.monotonic()
        elif time.monotonic() - self.heard_at > 5:  # a launcher repeats at once what its whole group was sent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, failed: bool) -> int:
        """The signal that the ranks have agreed on, FAILED, or 0. To be called once a step on every rank.

        The exchange begun at one step is read at the next, so that no step waits for it.
        """
        mine = FAILED if failed else self.signal
        if world_size() == 1:
            return mine
        agreed = 0
        if self.pending is not None:
            work, number = self.pending
            work.wait()
            agreed = int(number)
        number = torch.tensor(mine)
        work = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (work, number)
        return agreed
