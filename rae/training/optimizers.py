"""Optimizers, and learning-rate schedules with warm-up, for the decoder and the discriminator alike."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from rae.config.errors import UserError
from rae.config.registry import register
from rae.config.times import TimeString, in_steps

Schedule = Callable[[int], float]
"""Optimizer step (from 0) -> factor on the base learning rate."""


@register("optimizer", "adamw", context=("params",))
def adamw(
    params: Iterable[torch.nn.Parameter],
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with the RAE recipe's settings as defaults.

    Args:
        fused: one pass over weights, gradients and moments, without waiting; by default wherever torch has it.
    """
    params = list(params)
    fused = _has_fused(params) if fused is None else fused
    return _as_built(torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=fused))


@register("optimizer", "adam", context=("params",))
def adam(
    params: Iterable[torch.nn.Parameter],
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba, arXiv 1412.6980); ``fused`` as for :func:`adamw`."""
    params = list(params)
    fused = _has_fused(params) if fused is None else fused
    return _as_built(torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, fused=fused))


def _as_built(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Keep it fused, or not, when it loads the state of one that was otherwise, as earlier checkpoints hold."""

    def adapted(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(adapted)
    return optimizer


def _has_fused(params: list[torch.nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in params)


@register("schedule", "warmup_cosine", context=("base_lr", "steps_per_epoch"))
def warmup_cosine(
    base_lr: float,
    steps_per_epoch: int,
    warmup: TimeString = "1ep",
    decay_end: TimeString = "16ep",
    final_lr: float = 2e-5,
    warmup_from_zero: bool = True,
) -> Schedule:
    """Linear warm-up, then half a cosine down to ``final_lr`` at ``decay_end``, then constant.

    Args:
        base_lr: learning rate at the end of the warm-up.
        steps_per_epoch: what ``ep`` counts.
        warmup, decay_end: times in ``ep`` or ``ba``, both from the first step.
        warmup_from_zero: step ``s`` of the warm-up uses ``(s + 1) / warmup`` of the base; otherwise all of it.
    """
    return _warmup_then(
        lambda x: 0.5 * (1 + math.cos(math.pi * x)),
        _final_factor(final_lr, base_lr),
        _steps(warmup, steps_per_epoch),
        _steps(decay_end, steps_per_epoch),
        warmup_from_zero,
    )


@register("schedule", "warmup_linear", context=("base_lr", "steps_per_epoch"))
def warmup_linear(
    base_lr: float,
    steps_per_epoch: int,
    warmup: TimeString = "1ep",
    decay_end: TimeString = "16ep",
    final_lr: float = 2e-5,
    warmup_from_zero: bool = True,
) -> Schedule:
    """As :func:`warmup_cosine`, with a straight line down to ``final_lr``."""
    return _warmup_then(
        lambda x: 1 - x,
        _final_factor(final_lr, base_lr),
        _steps(warmup, steps_per_epoch),
        _steps(decay_end, steps_per_epoch),
        warmup_from_zero,
    )


@register("schedule", "constant_lr", context=())
def constant_lr() -> Schedule:
    """The base learning rate throughout."""
    return lambda step: 1.0


def _final_factor(final_lr: float, base_lr: float) -> float:
    if base_lr <= 0:
        raise ValueError(f"a schedule needs a learning rate above 0, not {base_lr}")
    return final_lr / base_lr


def _warmup_then(
    decay: Callable[[float], float], final: float, warmup: int, decay_end: int, warmup_from_zero: bool
) -> Schedule:
    if decay_end <= warmup:
        raise ValueError(f"decay_end ({decay_end} steps) must come after warmup ({warmup} steps)")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup if warmup_from_zero else 1.0
        progress = min((step - warmup) / (decay_end - warmup), 1.0)
        return final + (1 - final) * decay(progress)

    return factor


def _steps(time: str, steps_per_epoch: int) -> int:
    steps = in_steps(time, steps_per_epoch)
    if steps is None:
        raise UserError(f"schedule: {time!r} must be in epochs ('8ep') or batches ('1000ba')")
    return steps
