"""Solvers of dx = v dt from noise (t = 1) to data, which see nothing but ``velocity(x, t)``."""

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated

from torch import Tensor

from rae.config.registry import register
from rae.config.values import Checked, Count

Velocity = Callable[[Tensor, float], Tensor]
"""x (B, ...) at a time -> dx/dt."""


def _before_one(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"must be in [0, 1), not {value}")
    return value


End = Annotated[float, Checked(_before_one), "float in [0, 1)"]


class Sampler:
    """A solver on a fixed grid of times. Subclasses define :meth:`step`.

    Args:
        steps: intervals of the grid.
        end: the grid's last time, before the shift. The public sampler's 50 *points* end at 0.001 before the shift,
            0.0069 after it at 256 px, with a rest of noise: ``{steps: 49, end: 0.001}`` reproduces it. The default
            goes all the way, as the authors' other implementation does.
    """

    calls = 1
    """Calls of the velocity a step."""

    def __init__(self, steps: Count = 50, end: End = 0.0):
        self.steps, self.end = steps, end

    def grid(self, shifted: Callable[[float], float]) -> list[float]:
        """The times, from 1 down: (steps + 1) of them, evenly spaced before the shift."""
        return [shifted(1 - (1 - self.end) * k / self.steps) for k in range(self.steps + 1)]

    def states(self, velocity: Velocity, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
        """Every state after ``x``."""
        for t, following in itertools.pairwise(grid):
            x = self.step(velocity, x, t, following)
            yield x

    def __call__(self, velocity: Velocity, x: Tensor, grid: list[float]) -> Tensor:
        """Noise -> the last state."""
        *_, last = self.states(velocity, x, grid)
        return last

    def step(self, velocity: Velocity, x: Tensor, t: float, following: float) -> Tensor:
        """The state at ``following``, from that at ``t``."""
        raise NotImplementedError


@register("sampler", "euler")
class Euler(Sampler):
    """Euler's method: one call a step. The published sampler.

    Args:
        steps, end: see :class:`Sampler`.
    """

    def step(self, velocity: Velocity, x: Tensor, t: float, following: float) -> Tensor:
        return x + (following - t) * velocity(x, t)


@register("sampler", "heun")
class Heun(Sampler):
    """Heun's method of second order (arXiv 2206.00364, algorithm 1): two calls a step.

    Args:
        steps, end: see :class:`Sampler`.
    """

    calls = 2

    def step(self, velocity: Velocity, x: Tensor, t: float, following: float) -> Tensor:
        first = velocity(x, t)
        second = velocity(x + (following - t) * first, following)
        return x + (following - t) / 2 * (first + second)
