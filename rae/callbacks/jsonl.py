"""Every logged figure, one JSON object a step, in a file."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from rae.config.registry import register


@register("logger", "jsonl", context=("run_dir",))
class JSONLines(LoggerDestination):
    """Append one line a step, ``{"batch": 3, "loss/train/l1": 0.08, …}``; evaluations have lines of their own.

    ``batch`` counts finished steps. A resumed run drops the lines after its checkpoint and goes on.

    Args:
        run_dir: the run's folder (supplied).
        filename: in that folder.
    """

    def __init__(self, run_dir: str, filename: str = "metrics.jsonl"):
        self.path = Path(run_dir) / filename
        self.pending: dict[str, Any] = {}
        self.kept: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() == 0:
            self.pending.update({name: number(value) for name, value in metrics.items()})

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [record for record in read_lines(self.path) if record["batch"] <= int(state.timestamp.batch)]
        part = self.path.with_name(f".{self.path.name}")
        part.write_text("".join(json.dumps(record) + "\n" for record in self.kept))
        part.replace(self.path)  # a kill in between loses nothing

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.pending:
            return
        record = {"batch": int(state.timestamp.batch), **self.pending}
        if record not in self.kept:  # a checkpoint before an evaluation repeats it
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.pending = {}

    eval_end = fit_end = batch_end  # at the fit's end it is what the last epoch's end had to say


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a file holds, line by line, but for a line that a killed run left unfinished; nothing if there is none."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if "batch" in record]


def number(value: Any) -> Any:
    """A figure as JSON can hold it: without NaN and infinity."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else None
