"""What every run does before a step: seed its random numbers, log its learning rate."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.utils import dist

from rae.algorithms.base import unwrapped


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


class BeginStep(Callback):
    """Seed torch's generators from (seed, step, rank), and log the step's learning rate. Always on.

    Every logger gets the number of the step that a figure is of, from 1: what ``metrics.jsonl`` calls ``batch``.

    Composer saves the generators' states, but does not restore them when Streaming resumes in mid-epoch. A seed
    a step needs nothing restored: latent noise and DiffAug depend on where training is, not on how it got there.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.begun = -1
        """The steps that were finished when the last one began."""

    def init(self, state: State, logger: Logger) -> None:
        # Composer numbers what is logged within a step by the steps before it, and what is logged at its end by itself.
        for name in ("log_metrics", "log_images"):
            setattr(logger, name, self._numbered(state, getattr(logger, name)))

    def _numbered(self, state: State, log: Callable[..., None]) -> Callable[..., None]:
        def numbered(*args: Any, step: int | None = None, **kwargs: Any) -> None:
            finished = int(state.timestamp.batch)
            log(*args, step=finished + (finished == self.begun) if step is None else step, **kwargs)

        return numbered

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.begun = int(state.timestamp.batch)  # Composer logs the epoch before its first step begins

    def batch_start(self, state: State, logger: Logger) -> None:
        self.begun = int(state.timestamp.batch)
        seed_step(self.seed, self.begun, dist.get_global_rank())
        unwrapped(state).begin_step(self.seed, self.begun)
        logger.log_metrics({f"lr/{unwrapped(state).trains}": state.optimizers[0].param_groups[0]["lr"]})
