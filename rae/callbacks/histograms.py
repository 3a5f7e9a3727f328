"""Distributions while training: of latents, and of the discriminator's logits."""

import torch
from composer import Callback, Event, Logger, State
from composer.loggers import TensorboardLogger, WandBLogger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from rae.algorithms.adversarial import Adversarial
from rae.algorithms.base import unwrapped
from rae.config.registry import register
from rae.config.times import Interval
from rae.config.values import Count

QUANTILES = {"p01": 0.01, "p25": 0.25, "median": 0.5, "p75": 0.75, "p99": 0.99}


def summary(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation and quantiles of (N,) values."""
    quantiles = torch.quantile(values, torch.tensor(list(QUANTILES.values())))
    return {
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    }


def spread_out(tensor: Tensor, count: int) -> Tensor:
    """At most ``count`` values of a tensor, at equal distances: (N,) in fp32."""
    flat = tensor.detach().flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(count, len(flat)), device=flat.device).long()].float()


@register("callback", "histograms")
class Histograms(Callback):
    """Send histograms of clean latents and of real and fake logits to TensorBoard and W&B, and log what sums them up.

    Of another kind of model than an autoencoder, they are of the outputs that it names.

    ``histograms/latent/…``, ``…/logits_real/…`` and ``…/logits_fake/…`` are mean, std and quantiles, of all ranks.
    A step between has no part in it.

    Args:
        interval: how often.
        values: how many values to take of each, over all ranks; they are spread out over the batch evenly.
    """

    def __init__(self, interval: Interval = "500ba", values: Count = 65536):
        self.due = create_interval_scheduler(interval, checkpoint_events=False, include_end_of_training=False)
        self.values = values

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in (Event.BATCH_END, Event.EPOCH_END) and self.due(state, event):
            for name, tensor in self._tensors(state).items():
                mine = spread_out(tensor, max(1, self.values // dist.get_world_size()))
                self._log(name, torch.cat(list(dist.all_gather(mine))).cpu(), state, logger)

    def _tensors(self, state: State) -> dict[str, Tensor]:
        """The last microbatch's."""
        tensors = {name: state.outputs[name] for name in unwrapped(state).histograms}
        for algorithm in state.algorithms:
            if isinstance(algorithm, Adversarial) and algorithm.logits is not None:
                tensors["logits_real"], tensors["logits_fake"] = algorithm.logits
        return tensors

    def _log(self, name: str, values: Tensor, state: State, logger: Logger) -> None:
        values = values[values.isfinite()]
        if not len(values):
            return
        logger.log_metrics({f"histograms/{name}/{key}": value for key, value in summary(values).items()})
        step = int(state.timestamp.batch)
        for destination in logger.destinations:
            if isinstance(destination, TensorboardLogger) and destination.writer is not None:
                destination.writer.add_histogram(f"histograms/{name}", values, step)
            elif isinstance(destination, WandBLogger) and dist.get_global_rank() == 0:
                import wandb

                destination.log_metrics({f"histograms/{name}": wandb.Histogram(values.numpy(), num_bins=64)}, step)
