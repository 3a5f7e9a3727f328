"""Optimizers, and learning-rate schedules with warm-up, for the decoder and the discriminator alike."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from rae.config.errors import UserError
from rae.config.registry import register
from rae.config.times import StepTime, in_steps
from rae.config.values import Decay, NotNegative, Positive

Schedule = Callable[[int], float]
"""Optimizer step (from 0) -> factor on the base learning rate."""


@register("optimizer", "adamw", context=("params",))
def adamw(
    params: Iterable[torch.nn.Parameter],
    lr: NotNegative = 2e-4,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    weight_decay: NotNegative = 0.0,
    eps: Positive = 1e-8,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with the RAE recipe's settings as defaults.

    Args:
        fused: one pass over weights, gradients and moments, without waiting; by default wherever torch has it.
    """
    return _built(torch.optim.AdamW, params, fused, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)


@register("optimizer", "adam", context=("params",))
def adam(
    params: Iterable[torch.nn.Parameter],
    lr: NotNegative = 2e-4,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    eps: Positive = 1e-8,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba, arXiv 1412.6980); ``fused`` as for :func:`adamw`."""
    return _built(torch.optim.Adam, params, fused, lr=lr, betas=betas, eps=eps)


def _built(
    kind: Callable[..., torch.optim.Optimizer],
    params: Iterable[torch.nn.Parameter],
    fused: bool | None,
    **settings: Any,
) -> torch.optim.Optimizer:
    params = list(params)
    fused = all(p.device.type in ("cpu", "cuda") for p in params) if fused is None else fused
    return kind(params, fused=fused, **settings)


def _warmup_then(name: str, decay: Callable[[float], float]) -> Callable[..., Schedule]:
    """Register the schedule that goes down as ``decay`` does, from 1 at 0 to 0 at 1."""

    def schedule(
        base_lr: float,
        steps_per_epoch: int,
        warmup: StepTime = "1ep",
        decay_end: StepTime = "16ep",
        final_lr: NotNegative = 2e-5,
        warmup_from_zero: bool = True,
    ) -> Schedule:
        """Linear warm-up, then down to ``final_lr`` at ``decay_end``, then constant.

        Args:
            base_lr: learning rate at the end of the warm-up.
            steps_per_epoch: what ``ep`` counts.
            warmup, decay_end: times in ``ep`` or ``ba``, both from the first step.
            warmup_from_zero: step ``s`` of the warm-up uses ``(s + 1) / warmup`` of the base; otherwise all of it.
        """
        if base_lr <= 0:
            raise ValueError(f"a schedule needs a learning rate above 0, not {base_lr}")
        final, begin, end = final_lr / base_lr, _steps(warmup, steps_per_epoch), _steps(decay_end, steps_per_epoch)
        if end <= begin:
            raise ValueError(f"decay_end ({end} steps) must come after warmup ({begin} steps)")

        def factor(step: int) -> float:
            if step < begin:
                return (step + 1) / begin if warmup_from_zero else 1.0
            progress = min((step - begin) / (end - begin), 1.0)
            return final + (1 - final) * decay(progress)

        return factor

    return register("schedule", name, context=("base_lr", "steps_per_epoch"))(schedule)


warmup_cosine = _warmup_then("warmup_cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x)))
warmup_linear = _warmup_then("warmup_linear", lambda x: 1 - x)


@register("schedule", "constant_lr", context=())
def constant_lr() -> Schedule:
    """The base learning rate throughout."""
    return lambda step: 1.0


def _steps(time: str, steps_per_epoch: int) -> int:
    steps = in_steps(time, steps_per_epoch)
    if steps is None:
        raise UserError(f"schedule: {time!r} must be in epochs ('8ep') or batches ('1000ba')")
    return steps
