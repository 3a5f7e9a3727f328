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
    """

    def __init__(self, decay: Decay = 0.9978, evaluate: Literal["ema", "live", "both"] = "ema"):
        self.decay, self.evaluate = decay, evaluate
        self.weights: dict[str, nn.Parameter] = {}
        self.average: dict[str, Tensor] = {}
        self.sharded_units: list[FSDPModule] = []
        self.loaded = False

    def match(self, event: Event, state: State) -> bool:
        events = (Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)
        return event in events

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BEFORE_LOAD:  # the model is on its device, and sharded if it is to be
            self.start(state.model)
        elif event == Event.AFTER_LOAD:
            if not self.loaded:  # weights may have come without an average: from another run, or before ema was on
                self.start(state.model)
        elif event == Event.BATCH_END:
            update_ema(self._local(self.average), self._local(self.weights), self.decay)
        elif self.evaluates_average(state.dataloader_label):
            self._swap()

    def start(self, model: nn.Module) -> None:
        """Make the average a copy of the model's trained weights."""
        self.weights = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        self.sharded_units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def evaluates_average(self, label: str | None) -> bool:
        """Whether the evaluator called ``label`` uses the average."""
        return self.evaluate != "live" and not (label or "").endswith(LIVE_SUFFIX)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the average inside this context, and the live weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for unit in self.sharded_units:
            unit.reshard()  # it may still hold gathered weights from its last forward pass
        for weight, average in zip(self._local(self.weights), self._local(self.average), strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @staticmethod
    @torch.no_grad()
    def _local(tensors: dict[str, Any]) -> list[Tensor]:
        return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors.values()]

    def state_dict(self) -> dict[str, Any]:
        """The average by parameter name, as whole tensors (a collective call when sharded)."""
        return {
            "average": {
                name: t.full_tensor() if isinstance(t, DTensor) else t.detach() for name, t in self.average.items()
            }
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["average"].keys() != self.average.keys():
            raise ValueError("the checkpoint's average is of another model; give another run_name and run_dir")
        for name, own in self.average.items():
            saved = state["average"][name].to(own.device)
            if isinstance(own, DTensor):
                saved = distribute_tensor(saved, own.device_mesh, own.placements)
            own.copy_(saved)
        self.loaded = True
