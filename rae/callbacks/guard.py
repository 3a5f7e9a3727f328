"""What happens when a loss or a gradient is not finite: no update, a diagnosis, and a checkpoint of before."""

import copy
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from composer import Algorithm, Callback, Event, Logger, State
from composer.core import Precision
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rae.algorithms.adversarial import Adversarial
from rae.algorithms.base import can_skip_by_itself, unwrapped
from rae.callbacks.checkpointer import Checkpointer, nonfinite_weights
from rae.callbacks.step_figures import StepFigures
from rae.config.errors import UserError
from rae.config.registry import register
from rae.config.values import Count

log = logging.getLogger(__name__)


@register("callback", "guard", context=("run_dir", "figures"))
class Guard(Callback):
    """Apply no update from a loss or gradient that is NaN or infinite; say what it was; stop, or go on. On by itself.

    All ranks decide alike. A bad step changes neither the weights, nor the optimizer's state, nor the average, nor the
    discriminator; it counts as a step for the data, the clock and the learning rates. An update of the discriminator
    that is bad by itself is left out alone.

    ``stop`` saves a checkpoint of before the bad step, unless there is one, and ends the run: the same command comes
    to the same step again. (When the discriminator's own update is what was bad, the checkpoint is of after the
    step, without that update.) ``skip`` goes on with the next batch. Each bad step is a line in
    ``<run_dir>/guard.jsonl``, with every rank's share in it.

    On a CPU, and with optimizers that are not fused, the verdict is read before the optimizer's step. On a GPU a fused
    optimizer reads it there, and the host afterwards, while that step runs: nothing waits. With fp16, gradients that
    overflow are the scaler's to skip, until its scale has fallen below 1.

    Args:
        run_dir: where guard.jsonl goes (supplied).
        figures: of the step (supplied).
        on_nan: ``stop``, ``skip`` or ``ignore``.
        max_skipped: so many steps in a row may be skipped; one more stops the run.
    """

    def __init__(
        self,
        run_dir: str,
        figures: StepFigures,
        on_nan: Literal["stop", "skip", "ignore"] = "stop",
        max_skipped: Count = 10,
    ):
        self.path, self.figures = Path(run_dir) / "guard.jsonl", figures
        self.on_nan, self.max_skipped = on_nan, max_skipped
        self.seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.schedules: list[tuple[Any, dict[str, Any]]] = []
        self.reads_late = False
        self.skipped = self.in_a_row = 0

    def without_updates(self, algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
        """Composer algorithm pass: a step that is skipped ends without the algorithms, such as EMA and the GAN."""
        skipped = event == Event.BATCH_END and self.on_nan != "ignore" and self.figures.is_bad()
        return [] if skipped else algorithms

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if self.on_nan != "ignore":
            super().run_event(event, state, logger)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.seen = []

    def after_loss(self, state: State, logger: Logger) -> None:
        known = {key: state.batch[key] for key in ("label", "index") if key in state.batch}
        watched = [name for name in unwrapped(state).watched if name in state.outputs]
        self.seen.append((known, {name: _row_sums(state.outputs[name]) for name in watched}))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        (optimizer,) = state.optimizers
        self.reads_late = self._can_read_late(state, optimizer)
        if self.reads_late:
            optimizer.found_inf = self.figures.bad  # type: ignore[attr-defined]
            # lr is among a param group's entries; a schedule's state is a handful of numbers.
            self.schedules = [(s, copy.deepcopy(s.state_dict())) for s in state.schedulers]
            self.rates = [group["lr"] for group in optimizer.param_groups]
        elif self.figures.is_bad() or self._is_exhausted(state):
            self._handle(state)
            optimizer.zero_grad(set_to_none=True)  # without gradients, its step changes nothing

    def _can_read_late(self, state: State, optimizer: torch.optim.Optimizer) -> bool:
        on_gpu, scaled = self.figures.bad.is_cuda, state.precision == Precision.AMP_FP16
        return on_gpu and not scaled and can_skip_by_itself(optimizer)

    def _is_exhausted(self, state: State) -> bool:
        if state.precision != Precision.AMP_FP16 or state.scaler is None or state.scaler.get_scale() >= 1:
            return False
        return not all(map(math.isfinite, self.figures.values().values()))

    def batch_end(self, state: State, logger: Logger) -> None:
        bad = self.figures.is_bad()
        if bad and self.reads_late:
            if self._must_stop():
                self._rewind(state)
            self._handle(state)
        bad_discriminator = any(isinstance(a, Adversarial) and a.bad_update for a in state.algorithms)
        if not bad and bad_discriminator:
            self._handle(state, "the discriminator's update")
        if not bad and not bad_discriminator:
            self.in_a_row = 0
        logger.log_metrics({"guard/skipped": self.skipped})

    def _must_stop(self) -> bool:
        return self.on_nan == "stop" or self.in_a_row >= self.max_skipped

    def _rewind(self, state: State) -> None:
        """Make this the state of before the step, of which the optimizer changed nothing."""
        state.timestamp = state.previous_timestamp
        for schedule, before in self.schedules:
            schedule.load_state_dict(before)
        for group, rate in zip(state.optimizers[0].param_groups, self.rates, strict=True):
            group["lr"] = rate

    def _handle(self, state: State, what: str = "") -> None:
        """Write the diagnosis down, and skip the step or end the run. A collective call."""
        stop = self._must_stop()
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        after = bool(what) or (self.reads_late and not stop)  # the timestamp has moved on already
        step = int(state.timestamp.batch) + (0 if after else 1)
        ranks = dist.all_gather_object(self._diagnosis(state, what))
        weights = sorted({name for rank in ranks for name in rank["weights"]})
        line = _line(step, ranks, self.figures.trained)
        if dist.get_global_rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "ranks": ranks}) + "\n")
        if weights:
            raise UserError(f"{line}; the weights themselves are not finite ({weights[0]}){_newest(state)}")
        if stop:
            raise UserError(f"{line}{self._saved(state)}{self._remedy()}; all of it is in {self.path}")
        if dist.get_global_rank() == 0:
            log.warning("%s; skipped (%d in a row); all of it is in %s", line, self.in_a_row, self.path)

    def _saved(self, state: State) -> str:
        checkpointer = _checkpointer(state)
        if checkpointer is None:
            return "; the run saves no checkpoints (trainer.save_folder)"
        try:
            checkpointer.save(state, wait=True)
        except UserError as error:
            return f"; {error}"
        return f"; checkpoint ep{int(state.timestamp.epoch)}-ba{int(state.timestamp.batch)} is of before"

    def _remedy(self) -> str:
        if self.on_nan == "skip":
            return f"; {self.in_a_row - 1} steps in a row were skipped, as callbacks.guard.max_skipped allows"
        return "; callbacks.guard.on_nan=skip goes on without such steps"

    def _diagnosis(self, state: State, what: str) -> dict[str, Any]:
        """What this rank knows of the bad step."""
        named = state.model.named_parameters()
        gradients = [name for name, p in named if p.grad is not None and not _is_finite(p.grad)]
        return {
            "rank": dist.get_global_rank(),
            "figures": [what] if what else self.figures.culprits(),
            "gradients": gradients,
            "weights": nonfinite_weights(state),
            "samples": self._samples(state),
        }

    def _samples(self, state: State) -> list[dict[str, Any]]:
        """This rank's samples: label and number in the data set; of bad ones also the path, and what was not finite."""
        samples = []
        for known, sums in self.seen:
            for i in range(len(next(iter(known.values()), ()))):
                sample = {key: int(value[i]) for key, value in known.items()}
                bad = [name for name, rows in sums.items() if not rows[i].isfinite()]
                samples.append({**sample, **({"not_finite": bad, **_path(state, sample)} if bad else {})})
        return samples


def _row_sums(tensor: Tensor) -> Tensor:
    """(B, …) -> (B,), not finite where anything in the row is not."""
    return tensor.detach().flatten(1).sum(1, dtype=torch.float32)


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())


def _path(state: State, sample: dict[str, Any]) -> dict[str, str]:
    """The sample's path, if its shard has that column and can be read."""
    try:
        return {"path": str(state.train_dataloader.dataset[sample["index"]]["name"])}  # type: ignore[union-attr]
    except Exception:  # what went wrong in training is what is to be told
        return {}


def _line(step: int, ranks: list[dict[str, Any]], trained: str) -> str:
    figures = list(dict.fromkeys(name for rank in ranks for name in rank["figures"]))
    text = f"step {step}: not finite: {', '.join(_causes(figures, trained))}"
    gradients = list(dict.fromkeys(name for rank in ranks for name in rank["gradients"]))
    if gradients:
        text += f" ({len(gradients)} tensors, such as {gradients[0]})"
    bad = [(rank["rank"], sample) for rank in ranks for sample in rank["samples"] if "not_finite" in sample]
    if not bad:
        return f"{text}; every sample's latent and reconstruction is finite"
    shown = ", ".join(
        f"{s.get('path', s.get('index', '?'))} (label {s.get('label')}, rank {rank}, {' and '.join(s['not_finite'])})"
        for rank, s in bad[:3]
    )
    return f"{text}; {len(bad)} samples: {shown}{', …' if len(bad) > 3 else ''}"


def _causes(figures: list[str], trained: str) -> list[str]:
    """Losses, or else gradients at the reconstruction, or else what there is: each is the next one's cause."""
    single = [name for name in figures if name not in ("loss/total", "gradient/reconstruction", trained)]
    return [name for name in single if name.startswith("loss/")] or single or figures


def _checkpointer(state: State) -> Checkpointer | None:
    return next((c for c in state.callbacks if isinstance(c, Checkpointer)), None)


def _newest(state: State) -> str:
    """What training could go on from. A collective call."""
    checkpointer = _checkpointer(state)
    if checkpointer is None:
        return ""
    try:
        checkpointer.settle(uploads=False)
    except UserError as error:
        return f"; {error}"
    return f"; {checkpointer.safe} is the newest checkpoint" if checkpointer.safe else ""
