"""REPA (arXiv 2410.06940): an inner block of the transformer is aligned with an encoder's tokens of the clean image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.layers import Frozen


class Alignment(nn.Module):
    """A linear layer from a block's tokens to a frozen encoder's, and how far they are from these.

    Args:
        encoder: frozen here.
        block: whose output is aligned; that of the last forward pass is kept.
        dim: its width.
        grid: tokens of an image a side; a block's other tokens come after those.

    Raises:
        ValueError: the encoder gives another number of tokens.
    """

    def __init__(self, encoder: Encoder, block: nn.Module, dim: int, grid: int):
        super().__init__()
        if encoder.grid != grid:
            raise ValueError(f"its encoder gives {encoder.grid} tokens a side, the latents have {grid}")
        self.encoder, self.projector = Frozen(encoder), nn.Linear(dim, encoder.embed_dim)
        self.seen: Tensor | None = None
        block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        self.seen = output

    def loss(self, image: Tensor) -> Tensor:
        """Mean square error of projected tokens, for the images (B, 3, S, S) in [0, 1] of the last pass."""
        tokens, self.seen = self.seen, None
        assert tokens is not None
        with torch.no_grad():
            wanted = self.encoder(image)
        return F.mse_loss(self.projector(tokens[:, : wanted.shape[1]]).float(), wanted.float())
