"""An exponential moving average of the trained weights, kept beside the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from composer import Algorithm, Event, Logger, State
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rae.config.registry import register
from rae.config.values import Decay

LIVE_SUFFIX = "_live"
"""Evaluators whose label ends so are evaluated with the live weights."""


@torch.no_grad()
def update_ema(average: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights, in place, in one fused call."""
    torch._foreach_lerp_(average, weights, 1 - decay)


@register("algorithm", "ema")
class EMA(Algorithm):
    """Average the trained weights after every step; evaluate the average.

    The average starts as a copy of the weights. It never enters the model while training: evaluation swaps the
    two and swaps them back. Under FSDP each rank averages its own shards, without communication.

    Args:
        decay: per step; 0.9978 in the published recipe.
        evaluate: which weights evaluation uses: ``ema``, ``live`` or ``both``.
        also: decays of further averages, which pictures show, checkpoints hold, and ``--weights ema:0.9999`` takes.
    """

    def __init__(
        self,
        decay: Decay = 0.9978,
        evaluate: Literal["ema", "live", "both"] = "ema",
        also: list[Decay] = [],  # noqa: B006
    ):
        if len({decay, *also}) <= len(also):
            raise ValueError(f"also: each decay is averaged with once, and {decay:g} is the first")
        self.decay, self.evaluate = decay, evaluate
        self.weights: dict[str, nn.Parameter] = {}
        self.average: dict[str, Tensor] = {}
        self.averages: dict[str, dict[str, Tensor]] = {f"{each:g}": {} for each in also}
        self.sharded_units: list[FSDPModule] = []
        self.loaded = False
        self.found: set[str] = set()
        """Of the further averages, those that a checkpoint held."""

    def match(self, event: Event, state: State) -> bool:
        events = (Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)
        return event in events

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BEFORE_LOAD:  # the model is on its device, and sharded if it is to be
            self.start(state.model)
        elif event == Event.AFTER_LOAD:
            if not self.loaded:  # weights may have come without an average: from another run, or before ema was on
                self.start(state.model)
            for name in self.averages.keys() - self.found:  # a decay that was not averaged with before
                self.averages[name] = self._copy()
        elif event == Event.BATCH_END:
            weights = self._local(self.weights)
            update_ema(self._local(self.average), weights, self.decay)
            for decay, average in self.averages.items():
                update_ema(self._local(average), weights, float(decay))
        elif self.evaluates_average(state.dataloader_label):
            self._swap(self.average)

    def start(self, model: nn.Module) -> None:
        """Make the average a copy of the model's trained weights."""
        self.weights = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        self.average = self._copy()
        self.averages = {decay: self._copy() for decay in self.averages}
        self.sharded_units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def evaluates_average(self, label: str | None) -> bool:
        """Whether the evaluator called ``label`` uses the average."""
        return self.evaluate != "live" and not (label or "").endswith(LIVE_SUFFIX)

    @contextmanager
    def averaged(self, decay: str | None = None) -> Iterator[None]:
        """The model holds the average, or that of another decay, inside this context, and its own weights after it."""
        average = self.average if decay is None else self.averages[decay]
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    @torch.no_grad()
    def _swap(self, averages: dict[str, Tensor]) -> None:
        for unit in self.sharded_units:
            unit.reshard()  # it may still hold gathered weights from its last forward pass
        for weight, average in zip(self._local(self.weights), self._local(averages), strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @staticmethod
    @torch.no_grad()
    def _local(tensors: dict[str, Any]) -> list[Tensor]:
        return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors.values()]

    def state_dict(self) -> dict[str, Any]:
        """The average by parameter name, as whole tensors (a collective call when sharded)."""
        further = {decay: _whole(average) for decay, average in self.averages.items()}
        return {"average": _whole(self.average), **({"averages": further} if further else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["average"].keys() != self.average.keys():
            raise ValueError("the checkpoint's average is of another model; give another run_name and run_dir")
        _load(self.average, state["average"])
        held = state.get("averages", {})
        self.found = held.keys() & self.averages.keys()
        for decay in self.found:
            _load(self.averages[decay], held[decay])
        self.loaded = True


def _whole(average: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.detach() for name, t in average.items()}


@torch.no_grad()
def _load(average: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name, own in average.items():
        saved = state[name].to(own.device)
        if isinstance(own, DTensor):
            saved = distribute_tensor(saved, own.device_mesh, own.placements)
        own.copy_(saved)
