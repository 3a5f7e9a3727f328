"""A correction for sharded training on CPUs."""

import torch
from composer import Algorithm, Event, Logger, State
from composer.utils import dist
from torch.distributed.tensor import DTensor


class GlooGradients(Algorithm):
    """Average the sharded gradients where gloo has summed them.

    gloo's reduce-scatter takes AVG for SUM without a word, so that FSDP2's gradients on CPUs are too large by the
    number of ranks. AdamW hides that; gradient norms and clipping do not. Always on; does nothing elsewhere.
    """

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH and state.fsdp_enabled and torch.distributed.get_backend() == "gloo"

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        with torch.no_grad():
            for parameter in state.model.parameters():
                if isinstance(parameter.grad, DTensor):
                    parameter.grad.to_local().div_(dist.get_world_size())
