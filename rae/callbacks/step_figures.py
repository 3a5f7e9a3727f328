"""What a step measures of itself on the device: losses, gradient norms, the GAN's share; one transfer for all."""

import math

import torch
from composer import Callback, Logger, State
from composer.core import Precision
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rae.algorithms.base import unwrapped
from rae.autoencoder.losses import GRADIENT_NORMS
from rae.data.loaders import Ledger

_SAMPLES, _BAD_SAMPLES = "samples", "data/bad_samples"


class Readout:
    """A vector on its way to the host. Reading it waits for what was queued before it, not for what came after.

    Args:
        vector: (N,), on any device.
    """

    def __init__(self, vector: Tensor):
        self.host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=vector.is_cuda)
        self.host.copy_(vector, non_blocking=True)
        self.arrived = None
        if vector.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def values(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.numpy().tolist()


class StepFigures(Callback):
    """Log each loss's gradient norm at the reconstruction, the decoder's, the GAN's share, and bad samples. Always on.

    ``gradient/<loss>`` is the norm over the whole batch, weight included, of what a loss adds to the gradient at the
    reconstruction; ``gradient/reconstruction`` is that of all losses but the GAN's together; ``gradient/decoder`` (or
    as the model calls what it trains) is the norm of the weights' gradient as the optimizer gets it. ``gan/share`` is
    ‖λ·w·g_gan‖ / (‖g_rec‖ + ‖λ·w·g_gan‖).

    Everything stays on the device, in one vector: one all-reduce, and one copy that the optimizer's step hides.

    At an epoch's end ``data/samples/<stream>`` is what was drawn in it from each stream, on all ranks; an epoch that
    was resumed is counted from where it was resumed.

    Args:
        ledger: the training loader's, whose limit of bad samples holds for all ranks together.

    Attributes:
        trained: the figure that is the norm of the weights' gradient.
        bad: 0 or 1 (a scalar on the device), the same on all ranks: whether a loss or gradient is not finite.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.sums: dict[str, Tensor] = {}
        self.samples = 0
        self.names: list[str] = []
        self.bad = torch.zeros(())

    def fit_start(self, state: State, logger: Logger) -> None:
        self.ledger.samples.clear()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.sums, self.samples = {}, 0

    def before_backward(self, state: State, logger: Logger) -> None:
        count = len(state.batch["label"])
        self.samples += count
        for name, loss in state.loss.items():
            self._add(f"loss/{name}", count * loss.detach())
        for name, norm in state.outputs.get(GRADIENT_NORMS, {}).items():
            self._add(f"gradient/{name}", (count * norm).square())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        copies = dist.get_world_size() / _shards(gradients)
        self.trained = f"gradient/{unwrapped(state).trains}"
        self.sums[self.trained] = torch.stack(torch._foreach_norm(local)).float().square().sum() / copies
        for name, count in ((_SAMPLES, self.samples), (_BAD_SAMPLES, len(self.ledger.bad))):
            self.sums[name] = torch.full((), float(count), device=local[0].device)
        self.names = sorted(self.sums, key=lambda name: not name.startswith("loss/"))
        self.mine = torch.stack([self.sums[name].float() for name in self.names])
        total = self.mine.clone()
        dist.all_reduce(total)
        # With fp16, gradients that overflow are the scaler's to skip.
        scaled = state.precision == Precision.AMP_FP16
        judged = total[: sum(name.startswith("loss/") for name in self.names)] if scaled else total
        self.bad = (~judged.isfinite()).any().float()
        self.readout = Readout(torch.cat([total, self.bad[None]]))

    def is_bad(self) -> bool:
        """Whether a loss or a gradient of this step, of whichever rank, is not finite."""
        return self.readout.values()[-1] > 0

    def culprits(self) -> list[str]:
        """Which of this rank's figures are not finite."""
        finite = self.mine.isfinite().tolist()
        return [name for name, fine in zip(self.names, finite, strict=True) if not fine]

    def values(self) -> dict[str, float]:
        """The step's figures over all ranks, by name."""
        sums = dict(zip(self.names, self.readout.values(), strict=False))
        figures = {
            name: math.sqrt(value) / sums[_SAMPLES] for name, value in sums.items() if name.startswith("gradient/")
        }
        figures[self.trained], figures[_BAD_SAMPLES] = math.sqrt(sums[self.trained]), int(sums[_BAD_SAMPLES])
        if "gradient/gan" in figures:
            both = figures["gradient/gan"] + figures["gradient/reconstruction"]
            figures["gan/share"] = figures["gradient/gan"] / both if both else 0.0
        return figures

    def batch_end(self, state: State, logger: Logger) -> None:
        figures = self.values()
        logger.log_metrics(figures)
        if figures[_BAD_SAMPLES] > self.ledger.max_bad:  # on all ranks
            self.ledger.check({fault for faults in dist.all_gather_object([*self.ledger.bad]) for fault in faults})

    def epoch_end(self, state: State, logger: Logger) -> None:
        drawn = [self.ledger.samples[number] for number in range(len(self.ledger.streams))]
        counts = state.device.tensor_to_device(torch.tensor(drawn))
        dist.all_reduce(counts)
        named = zip(self.ledger.streams, counts.tolist(), strict=True)
        logger.log_metrics({f"data/samples/{name}": count for name, count in named})
        self.ledger.samples.clear()


def _shards(gradients: list[Tensor]) -> int:
    """Over how many ranks a gradient is spread out."""
    first = gradients[0]
    if not isinstance(first, DTensor):
        return 1
    sizes = [first.device_mesh.size(i) for i, placement in enumerate(first.placements) if placement.is_shard()]
    return math.prod(sizes)
