"""What every run does before a step: seed its random numbers, log its learning rate."""

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

    Composer saves the generators' states, but does not restore them when Streaming resumes in mid-epoch. A seed
    a step needs nothing restored: latent noise and DiffAug depend on where training is, not on how it got there.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        seed_step(self.seed, int(state.timestamp.batch), dist.get_global_rank())
        logger.log_metrics({f"lr/{unwrapped(state).trains}": state.optimizers[0].param_groups[0]["lr"]})
