"""Tokens of several layers of a transformer, each normalised, joined to one latent (RAEv2, arXiv 2605.18324)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Join = Literal["mean", "sum", "concat"]
Norm = Literal["plain", "affine", "none"]


@dataclass(frozen=True)
class Layers:
    """Which layers' outputs are taken, and how they become one.

    Args:
        chosen: indices of blocks from 0, negative ones from the end; None for the last one.
        join: ``mean``, ``sum`` or ``concat`` (along channels, in the order of depth).
        token_mean: add the mean over the deepest layer's tokens to every token.
        norm: what each layer goes through: the model's final norm ``plain``, without scale and shift, so that latents
            are normalised and not rescaled; ``affine``, with them; or ``none``.
    """

    chosen: Sequence[int] | None = None
    join: Join = "mean"
    token_mean: bool = False
    norm: Norm = "plain"

    def of(self, depth: int) -> list[int]:
        """The indices, from 0, in the order of depth.

        Raises:
            ValueError: there is no such layer; one is named twice, or none is.
        """
        chosen = [-1] if self.chosen is None else list(self.chosen)
        if not chosen or any(not -depth <= index < depth for index in chosen):
            raise ValueError(f"layers: {chosen} must be indices from 0 to {depth - 1}, or from -1 to {-depth}")
        found = sorted({index % depth for index in chosen})
        if len(found) < len(chosen):
            raise ValueError(f"layers: {chosen} names a layer twice")
        return found

    def width(self, dim: int) -> int:
        """Channels of the latent, of layers of ``dim`` each."""
        return dim * len(self.chosen) if self.join == "concat" and self.chosen is not None else dim


LAST = Layers()
"""The last layer alone."""


class Taps:
    """Keeps what chosen blocks put out while a transformer runs.

    Args:
        blocks: all of them, in order.
        layers: which, and how they are joined.

    Raises:
        ValueError: see :meth:`Layers.of`.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Layers):
        self.layers, self.indices = layers, layers.of(len(blocks))
        self.seen: dict[int, Tensor] = {}
        for index in self.indices:
            blocks[index].register_forward_hook(self._keeper(index))

    def _keeper(self, index: int) -> Callable[..., None]:
        def keep(block: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.seen[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    def joined(self, norm: Callable[[Tensor], Tensor], prefix: int) -> Tensor:
        """What was kept of the last run, as one.

        Args:
            norm: what each layer goes through.
            prefix: tokens before those of patches, which are dropped.

        Returns:
            (B, N, C)
        """
        kept = [norm(self.seen.pop(index))[:, prefix:] for index in self.indices]
        added = kept[-1].mean(1, keepdim=True) if self.layers.token_mean else 0
        if self.layers.join == "concat":
            return torch.cat([each + added for each in kept], dim=2)
        total = torch.stack(kept).sum(0)
        return (total / len(kept) if self.layers.join == "mean" else total) + added


def row_of(network: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a transformer, in order: of rows of modules of one class, that which holds the most parameters.

    Raises:
        ValueError: there is no such row.
    """
    rows: list[nn.Module] = [
        row
        for row in network.modules()
        if isinstance(row, (nn.ModuleList, nn.Sequential)) and len(row) > 1 and len({type(each) for each in row}) == 1
    ]
    if not rows:
        raise ValueError(f"a {type(network).__name__} has no row of blocks, so it has no layers to choose from")
    largest = max(rows, key=lambda row: sum(p.numel() for p in row.parameters()))
    return list(largest.children())


def made_plain(norm: nn.Module) -> nn.Module:
    """A norm without scale and shift."""
    if isinstance(norm, nn.LayerNorm):
        return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    for name, parameter in norm.named_parameters():  # of whatever class it is
        nn.init.constant_(parameter, 0.0 if "bias" in name else 1.0)
    return norm
