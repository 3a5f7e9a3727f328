"""How far training is, and how long it still takes: by phase, with evaluations and checkpoints."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from composer import Callback, Event, Logger, State
from composer.core import TimeUnit
from torch import Tensor

from rae.algorithms.base import precision_context, unwrapped
from rae.callbacks import operations
from rae.callbacks.checkpointer import Checkpointer, Mean
from rae.config.times import in_steps


@dataclass(frozen=True)
class Left:
    """An estimate of the time to a run's end.

    Attributes:
        seconds: all that is known of.
        measured: which share of them rests on times that this start has measured.
        complete: whether nothing is left out, for want of any measurement.
    """

    seconds: float
    measured: float
    complete: bool

    def __str__(self) -> str:
        sign = "≥ " if not self.complete else "≈ " if self.measured < 1 else ""
        return f"{sign}{timedelta(seconds=round(self.seconds))} left"


def time_left(
    now: int, end: int, parts: Mapping[int, float], steps: Mapping[int, Mean], pauses: list[tuple[int, Mean]]
) -> Left:
    """The time from step ``now`` to step ``end``.

    A phase that was not measured is projected from the last one that was, by its operations. A pause that was never
    measured is left out.

    Args:
        parts: step at which a phase begins -> the operations that an image takes more from then on.
        steps: phase (the step at which it begins) -> its measured steps; at least one.
        pauses: (how many are to come, how long those before took).
    """
    begins = sorted({0, *parts})
    measured = projected = 0.0
    reference = max(steps)
    for begin, next_begin in zip(begins, [*begins[1:], end], strict=True):
        count = max(0, min(next_begin, end) - max(begin, now))
        if begin in steps:
            measured += count * steps[begin].value
        else:
            factor = _operations(parts, begin) / _operations(parts, reference)
            projected += count * steps[reference].value * factor
    measured += sum(count * mean.value for count, mean in pauses)
    complete = all(mean.count or not count for count, mean in pauses)
    seconds = measured + projected
    return Left(seconds, measured / seconds if seconds else 1.0, complete)


def _operations(parts: Mapping[int, float], begin: int) -> float:
    return sum(more for start, more in parts.items() if start <= begin)


class Progress(Callback):
    """Log ``time/remaining`` (seconds) and ``time/remaining_measured`` (the share that was measured). Always on.

    Steps before the discriminator, with it, and with the GAN take different times; each phase's mean is measured by
    itself, and evaluations and saving checkpoints apart. Until a phase is reached, its steps are projected: the time
    of the last measured phase, times the ratio of floating-point operations, counted once on one image through the
    real networks. The console says ``≥`` while evaluations or checkpoints to come have never been measured, ``≈``
    while a phase is projected, and neither when all is measured.

    Args:
        batch_size: over all ranks.
        eval_interval: a time string.
    """

    def __init__(self, batch_size: int, eval_interval: str):
        self.batch_size, self.eval_interval = batch_size, eval_interval
        self.steps: dict[int, Mean] = {}
        self.evaluations = Mean()
        self.checkpointer: Checkpointer | None = None
        self.parts: dict[int, float] = {}
        self.end: int | None = None
        self.left: Left | None = None
        self.mark = self.spent = self.saved = 0.0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._start(state)
        elif event == Event.BATCH_END:
            self._end_step(state, logger)
        elif event == Event.EVAL_BEFORE_ALL:
            self.spent += self._lap()
        elif event == Event.EVAL_AFTER_ALL:
            self.evaluations.add(self._lap())

    def _lap(self) -> float:
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before

    def _start(self, state: State) -> None:
        assert state.max_duration is not None
        self.end = self._step_of(state.max_duration.to_timestring(), state)
        self.checkpointer = next((c for c in state.callbacks if isinstance(c, Checkpointer)), None)
        if self.end is not None and self._changes(state):
            for when, more in step_operations(state).items():
                start = self._step_of(when, state)
                if start is not None and start < self.end:
                    self.parts[start] = self.parts.get(start, 0.0) + more
        self.mark, self.spent = time.perf_counter(), 0.0

    def _changes(self, state: State) -> bool:
        """Whether steps to come are of another phase."""
        times = [getattr(a, name, None) for a in state.algorithms for name in ("start", "discriminator_start")]
        starts = [self._step_of(when, state) for when in times if isinstance(when, str)]
        return any(start is not None and start > int(state.timestamp.batch) for start in starts)

    def _step_of(self, when: str, state: State) -> int | None:
        epoch = None if state.dataloader_len is None else int(state.dataloader_len)
        return in_steps(when, epoch, self.batch_size, self.end)

    def _end_step(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        seconds = self.spent + self._lap() - self._saving()
        self.spent = 0.0
        phase = max((start for start in self.parts if start < step), default=0)
        self.steps.setdefault(phase, Mean()).add(seconds)
        self.left = self._estimate(step, state)
        if self.left is not None:
            figures = {"time/remaining": self.left.seconds, "time/remaining_measured": self.left.measured}
            logger.log_metrics(figures)

    def _saving(self) -> float:
        """Seconds since the last step that went into checkpoints."""
        before, self.saved = self.saved, self.checkpointer.saves.total if self.checkpointer else 0.0
        return self.saved - before

    def _estimate(self, step: int, state: State) -> Left | None:
        assert state.max_duration is not None
        if state.max_duration.unit == TimeUnit.SECOND:
            elapsed = state.timestamp.total_wct.total_seconds()
            return Left(max(0.0, float(state.max_duration.value) - elapsed), 1.0, True)
        if self.end is None:
            return None
        pauses = []
        if state.evaluators:
            pauses.append((self._times(self.eval_interval, step, state), self.evaluations))
        if self.checkpointer is not None:
            pauses.append((self._times(self.checkpointer.interval, step, state), self.checkpointer.saves))
        return time_left(step, self.end, self.parts, self.steps, pauses)

    def _times(self, interval: str, step: int, state: State) -> int:
        """How often something that is done every ``interval``, and at the end, is still to be done."""
        every = self._step_of(interval, state)
        assert self.end is not None
        return -(-self.end // every) - step // every if every and every > 0 else 0


@torch.no_grad()
def step_operations(state: State) -> dict[str, float]:
    """Time string -> floating-point operations an image that a step takes on from then. A collective call.

    Counted are forward passes on one image, and the discriminator's backward pass. Others count twice the forward
    pass through a trained network, and once through a frozen one.
    """
    model, size = unwrapped(state), unwrapped(state).image_size
    device = next(model.network.parameters()).device
    batch = {"image": torch.zeros(1, 3, size, size, device=device)}
    batch |= {key: torch.zeros(1, dtype=torch.int64, device=device) for key in ("label", "index")}
    counted = partial(_counted, state)
    was_training = state.model.training
    state.model.eval()
    operations, outputs = model.step_operations(counted, batch)
    parts = {"0ba": operations}
    for algorithm in state.algorithms:
        if hasattr(algorithm, "step_operations"):
            for start, more in algorithm.step_operations(counted, model, outputs, batch["image"]):
                parts[start] = parts.get(start, 0) + more
    state.model.train(was_training)
    return parts


def _counted(state: State, function: Callable[[], Any]) -> tuple[float, Any]:
    # What is called for the first time under the counter would never be compiled.
    eagerly = torch.compiler.set_stance("force_eager")
    with eagerly, operations.counter() as counter, precision_context(state):
        result = function()
    return float(counter.get_total_flops()), result.float() if isinstance(result, Tensor) else result
