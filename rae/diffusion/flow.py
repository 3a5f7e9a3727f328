"""Flow matching on a line (arXiv 2209.03003, 2210.02747): what is mixed at a time, what is predicted, when."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from rae.config.registry import register
from rae.config.values import Finite, Positive, Share

BASE = 4096
"""The numbers in a latent (C·h·w) at which times are not shifted."""
LAST = 0.999
"""The last time that training draws, before the shift."""

Times = Callable[[Tensor], Tensor]
"""Uniform numbers in [0, 1) -> times in [0, 1]: a distribution by the inverse of its cumulative function."""


@register("times", "logit_normal")
def logit_normal(mean: Finite = 0.0, std: Positive = 1.0, last: Share = LAST) -> Times:
    """sigmoid(N(mean, std²)): the published one (arXiv 2403.03206).

    Args:
        last: where it is cut; 1 for nowhere, as RAEv2 has it.
    """
    below = NormalDist(mean, std).cdf(math.log(last / (1 - last))) if last < 1 else 1.0

    def times(uniform: Tensor) -> Tensor:
        normal = torch.special.ndtri((uniform.double() * below).clamp(1e-12, 1 - 1e-12))
        return torch.sigmoid(mean + std * normal).to(uniform.dtype)

    return times


@register("times", "uniform")
def uniform() -> Times:
    """U(0, 0.999)."""
    return lambda uniform: uniform * LAST


@register("flow", "line", context=("latent_shape", "times"))
class Flow:
    """The line from data (t = 0) to noise (t = 1), along which a network predicts the velocity, or the data.

    Of predicted data the velocity is (x_t − data)/t, for a loss that weighs times as that of predicted velocities does
    (arXiv 2511.13720); below ``clamp`` the divisor stays there.

    Args:
        latent_shape: (C, h, w) of latents (supplied).
        times: the distribution of training's times, before the shift (supplied).
        shift: moves times towards noise, see :meth:`shifted`; sqrt(C·h·w / 4096) by default, and never below 1
            (arXiv 2510.11690, section 4).
        predicts: ``velocity``, as RAE published, or ``data``, as RAEv2 (arXiv 2605.18324).
        clamp: of the divisor, where data are predicted.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        times: Times,
        shift: Positive | None = None,
        predicts: Literal["velocity", "data"] = "velocity",
        clamp: Positive = 0.05,
    ):
        self.times, self.predicts, self.clamp = times, predicts, clamp
        self.shift = max(1.0, math.sqrt(math.prod(latent_shape) / BASE)) if shift is None else shift

    def shifted(self, t: Any) -> Any:
        """s·t / (1 + (s − 1)·t): times in [0, 1], kept at both ends."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniform numbers (B,) -> training's times (B,)."""
        return self.shifted(self.times(uniform))

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 − t)·data + t·noise, for latents (B, ...) and times (B,)."""
        t = _over(t, data)
        return (1 - t) * data + t * noise

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity dx/dt = noise − data, as :meth:`velocity` makes it of a perfect prediction."""
        if self.predicts == "velocity":
            return noise - data
        t = _over(t, data)
        return (noise - data) * (t / t.clamp(min=self.clamp))

    def velocity(self, prediction: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        """What a network predicted at x_t, as a velocity (B, ...), in float32; ``t`` is one time, or (B,)."""
        if self.predicts == "velocity":
            return prediction.float()
        divisor = max(t, self.clamp) if not isinstance(t, Tensor) else _over(t, x).clamp(min=self.clamp)
        return (x - prediction.float()) / divisor

    def loss(self, velocity: Tensor, target: Tensor) -> Tensor:
        """Mean square error of each sample (B,), in float32."""
        return (velocity.float() - target).square().flatten(1).mean(1)


def _over(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,), each over a sample of x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))
