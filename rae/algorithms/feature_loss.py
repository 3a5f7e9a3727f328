"""A loss of features of a frozen network that is there already: the encoder's, or the discriminator's."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from composer import Event, Logger, State
from torch import Tensor, nn

from rae.algorithms.adversarial import Adversarial
from rae.algorithms.base import LossTerm
from rae.autoencoder.layers import resize
from rae.config.errors import UserError
from rae.config.registry import register
from rae.config.times import TimeString
from rae.config.values import Count, NotNegative
from rae.model import Counted, RunModel


@register("algorithm", "feature_loss")
class FeatureLoss(LossTerm):
    """Add ``weight`` × (1 − cosine similarity) of an image's tokens and its reconstruction's, a mean over tokens.

    What RAEv2 (arXiv 2605.18324) calls a DINO loss, beside LPIPS; its exact form is not published, and this is the
    usual one (arXiv 2304.07193 compares tokens so).

    Args:
        of: whose frozen network, of which there is no second copy: the ``encoder``'s, or the ``discriminator``'s.
        weight, start: see :class:`rae.algorithms.base.LossTerm`.
        chunk: images that go through the network at a time.
    """

    def __init__(
        self,
        of: Literal["encoder", "discriminator"] = "encoder",
        weight: NotNegative = 1.0,
        start: TimeString = "0ep",
        chunk: Count | None = 8,
    ):
        super().__init__("feature_loss", weight, start, chunk=chunk)
        self.of = of
        self.tokens: Callable[[Tensor], list[Tensor]] | None = None

    def compute(self, recon: Tensor, image: Tensor) -> Tensor:
        assert self.tokens is not None
        with torch.no_grad():
            wanted = self.tokens(image)
        found = zip(self.tokens(recon), wanted, strict=True)
        return torch.stack([1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in found]).mean()

    def compiled(self) -> dict[str, Iterable[nn.Module]]:
        return {}

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self.bind(cast(RunModel, state.model), state.algorithms)
            return
        super().apply(event, state, logger)

    def bind(self, model: RunModel, algorithms: Iterable[Any] = ()) -> None:
        """Take the network of a run.

        Raises:
            UserError: it has none.
        """
        if self.of == "encoder":
            if not model.reconstructs:
                raise UserError("algorithms: feature_loss is of reconstructions, and a generator makes none")
            encoder = model.rae.encoder  # type: ignore[attr-defined]
            self.tokens = lambda image: [encoder(image)]
            return
        found = next((each.discriminator for each in algorithms if isinstance(each, Adversarial)), None)
        if found is None:
            raise UserError("algorithms.feature_loss: of: discriminator needs algorithms.adversarial, which has one")
        self.tokens = lambda image: [
            maps.flatten(2).transpose(1, 2)
            for maps in found.features(resize(image * 2 - 1, found.input_size, mode="bilinear"))
        ]

    def step_operations(
        self, counted: Counted, model: RunModel, outputs: dict[str, Tensor], image: Tensor
    ) -> list[tuple[str, float]]:
        if "recon" not in outputs or self.of != "encoder":  # the discriminator's are a part of the GAN's
            return []
        self.bind(model)
        term, _ = counted(lambda: self.compute(outputs["recon"], image))
        return [(self.start, 1.5 * term)]
