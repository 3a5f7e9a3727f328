"""Flow matching on a line (arXiv 2209.03003, 2210.02747): what is mixed at a time, what is predicted, when."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from rae.config.registry import register
from rae.config.values import Finite, Positive

BASE = 4096
"""The numbers in a latent (C·h·w) at which times are not shifted."""
LAST = 0.999
"""The last time that training draws, before the shift."""

Times = Callable[[Tensor], Tensor]
"""Uniform numbers in [0, 1) -> times in [0, 1]: a distribution by the inverse of its cumulative function."""


@register("times", "logit_normal")
def logit_normal(mean: Finite = 0.0, std: Positive = 1.0) -> Times:
    """sigmoid(N(mean, std²)), cut at 0.999: the published one (arXiv 2403.03206)."""
    below = NormalDist(mean, std).cdf(math.log(LAST / (1 - LAST)))

    def times(uniform: Tensor) -> Tensor:
        normal = torch.special.ndtri((uniform.double() * below).clamp(min=1e-12))
        return torch.sigmoid(mean + std * normal).to(uniform.dtype)

    return times


@register("times", "uniform")
def uniform() -> Times:
    """U(0, 0.999)."""
    return lambda uniform: uniform * LAST


@register("flow", "line", context=("latent_shape", "times"))
class Flow:
    """The line from data (t = 0) to noise (t = 1), along which a network predicts the velocity.

    Args:
        latent_shape: (C, h, w) of latents (supplied).
        times: the distribution of training's times, before the shift (supplied).
        shift: moves times towards noise, see :meth:`shifted`; sqrt(C·h·w / 4096) by default, and never below 1
            (arXiv 2510.11690, section 4).
    """

    def __init__(self, latent_shape: tuple[int, ...], times: Times, shift: Positive | None = None):
        self.times = times
        self.shift = max(1.0, math.sqrt(math.prod(latent_shape) / BASE)) if shift is None else shift

    def shifted(self, t: Any) -> Any:
        """s·t / (1 + (s − 1)·t): times in [0, 1], kept at both ends."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniform numbers (B,) -> training's times (B,)."""
        return self.shifted(self.times(uniform))

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 − t)·data + t·noise, for latents (B, ...) and times (B,)."""
        t = t.view(-1, *[1] * (data.ndim - 1))
        return (1 - t) * data + t * noise

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        """What the network predicts: the velocity dx/dt = noise − data."""
        return noise - data

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean square error of each sample (B,), in float32."""
        return (prediction.float() - target).square().flatten(1).mean(1)
