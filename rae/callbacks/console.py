"""One line every so often, for a log file where a progress bar would be noise."""

import sys
import time
from typing import Any

from composer import Event, Logger, State
from composer.loggers import LoggerDestination
from composer.utils import create_interval_scheduler, dist

from rae.callbacks.progress import Progress
from rae.config.registry import register
from rae.config.times import Interval


@register("logger", "console")
class Console(LoggerDestination):
    """Print losses, discriminator figures and speed as one line, and each evaluation as another.

    On by itself when the output is not a terminal; a terminal gets Composer's progress bar.

    Args:
        interval: between lines.
    """

    def __init__(self, interval: Interval = "50ba"):
        self.due = create_interval_scheduler(interval, checkpoint_events=False, include_end_of_training=True)
        self.latest: dict[str, Any] = {}
        self.since, self.since_batch = 0.0, 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.latest.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        self.since, self.since_batch = time.perf_counter(), int(state.timestamp.batch)

    def batch_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0 and (state.timestamp.batch == 1 or self.due(state, Event.BATCH_END)):
            self._print_step(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        prefix = f"metrics/{state.dataloader_label}/"
        figures = {k.removeprefix(prefix): v for k, v in self.latest.items() if k.startswith(prefix)}
        if dist.get_global_rank() == 0:
            _print(f"{state.dataloader_label} at step {state.timestamp.batch.value}", figures)
        self.since, self.since_batch = time.perf_counter(), int(state.timestamp.batch)

    def _print_step(self, state: State) -> None:
        now, batch = time.perf_counter(), int(state.timestamp.batch)
        speed = (batch - self.since_batch) / max(now - self.since, 1e-9)
        self.since, self.since_batch = now, batch
        names = {"loss/train/": "", "discriminator/": "d.", "gan/": ""}
        figures = {
            name.replace(prefix, short): value
            for name, value in self.latest.items()
            for prefix, short in names.items()
            if name.startswith(prefix)
        }
        epoch = int(state.timestamp.epoch) + int(state.timestamp.batch_in_epoch) / int(state.dataloader_len or 1)
        left = next((f", {c.left}" for c in state.callbacks if isinstance(c, Progress) and c.left is not None), "")
        left = left if batch > 1 else ""  # the first step is of no other's length
        _print(f"step {batch} (epoch {epoch:.2f} of {state.max_duration}, {speed:.2f} steps/s{left})", figures)


def _print(head: str, figures: dict[str, Any]) -> None:
    text = "  ".join(f"{name} {float(value):.4g}" for name, value in figures.items())
    print(f"{head}: {text}", file=sys.stderr, flush=True)
