"""A generator of images: a diffusion transformer, and the frozen autoencoder whose latents it makes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder.layers import Frozen, fixed_noise
from rae.autoencoder.rae import RAE
from rae.config.errors import InputError
from rae.diffusion.flow import Flow
from rae.diffusion.guidance import Predictor
from rae.diffusion.samplers import Sampler

Guide = Callable[[nn.Module], Predictor]
"""A network -> the network, guided."""


class Generator(nn.Module):
    """A diffusion transformer on the latents of an autoencoder (arXiv 2510.11690). Needs no Trainer.

    Args:
        network: (x, t, label) -> what the flow predicts; trained.
        autoencoder: frozen here, and not among the weights.
        flow: of training and sampling.
        sampler: how images are sampled, if nothing else is said.
        guidance: likewise.
        classes: names of labels, if they are known.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: RAE,
        flow: Flow,
        sampler: Sampler,
        guidance: Guide,
        classes: Sequence[str] = (),
    ):
        super().__init__()
        self.network, self.autoencoder = network, Frozen(autoencoder)
        self.flow, self.sampler, self.guidance, self.classes = flow, sampler, guidance, list(classes)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        return self.autoencoder.network.latent_shape  # type: ignore[return-value]

    @property
    def num_classes(self) -> int:
        """Labels are from 0 to one less; 0 where there are none."""
        return self.network.num_classes  # type: ignore[return-value]

    @torch.no_grad()
    def sample(self, labels: Any, seed: int = 0, numbers: Any = None, **options: Any) -> Tensor:
        """Images of classes.

        Args:
            labels: class numbers (B,), or names where they are known; −1 for no class.
            seed, numbers: an image's noise follows from the seed and its number alone, by default its place.
            options: see :meth:`sample_latents`.

        Returns:
            (B, 3, S, S) in [0, 1]

        Raises:
            InputError: no such class.
        """
        return self.decode(self.sample_latents(labels, seed, numbers, **options))

    @torch.no_grad()
    def sample_latents(
        self,
        labels: Any,
        seed: int = 0,
        numbers: Any = None,
        sampler: Sampler | None = None,
        guidance: Guide | None = None,
    ) -> Tensor:
        """As :meth:`sample`, without decoding.

        Args:
            sampler, guidance: instead of the generator's own.

        Returns:
            (B, C, h, w), normalised as the network learned them
        """
        labels = self.labels_of(labels)
        numbers = torch.arange(len(labels)) if numbers is None else torch.as_tensor(numbers)
        x = fixed_noise(self.latent_shape, seed, numbers).to(labels.device)
        solver, guided = sampler or self.sampler, (guidance or self.guidance)(self.network)

        def velocity(x: Tensor, t: float) -> Tensor:
            return self.flow.velocity(guided(x, t, labels), x, t)  # type: ignore[arg-type]

        return solver(velocity, x, solver.grid(self.flow.shifted))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents -> images in [0, 1], in float32."""
        with torch.autocast(latent.device.type, enabled=False):
            return self.autoencoder.network.decode(latent.float()).clamp(0, 1)  # type: ignore[operator]

    def labels_of(self, labels: Any, checked: bool = True) -> Tensor:
        """Class numbers or names -> labels (B,) as the network takes them.

        Args:
            checked: whether labels on a CPU are checked; elsewhere, to look at them would wait for the device.

        Raises:
            InputError: no such class.
        """
        if not isinstance(labels, Tensor):
            names = {name: number for number, name in enumerate(self.classes)}
            unknown = [each for each in labels if isinstance(each, str) and each not in names]
            if unknown:
                raise InputError(f"there is no class {unknown[0]!r}; there are {', '.join(self.classes) or 'no names'}")
            labels = torch.tensor([names[each] if isinstance(each, str) else int(each) for each in labels])
        elif labels.ndim != 1:
            raise InputError(f"give labels (B,), not {tuple(labels.shape)}")
        null, device = self.network.null_label, next(self.network.parameters()).device
        if not self.num_classes:
            return torch.zeros_like(labels, device=device)
        if checked and labels.device.type == "cpu" and labels.numel():
            self._check_labels(labels, null)
        labels = labels.to(device).long()
        return labels if null is None else torch.where(labels < 0, null, labels)  # type: ignore[arg-type]

    def _check_labels(self, labels: Tensor, null: Any) -> None:
        if int(labels.max()) >= self.num_classes or int(labels.min()) < (0 if null is None else -1):
            raise InputError(
                f"labels are from 0 to {self.num_classes - 1}{'' if null is None else ', or −1 for no class'}; "
                f"there are {int(labels.min())} to {int(labels.max())}"
            )

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """What FSDP shards as a unit: the network, and what it says itself."""
        inner = getattr(self.network, "fsdp_wrap_fn", None)
        return module is self.network or bool(inner and inner(module))
