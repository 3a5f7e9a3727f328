"""RAEv2's DiT-DH (arXiv 2605.18324): conditions as tokens of the sequence, and a weaker output to guide with."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.config.registry import register
from rae.config.values import Count, Positive
from rae.diffusion.layers import (
    LabelEmbedding,
    Modulation,
    PatchEmbed,
    RotaryPositions,
    TimeEmbedding,
    make_norm,
    modulate,
)
from rae.diffusion.networks import HEAD, LatentTransformer, Size, chosen_sizes

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1440, 28, 20)}
"""embed_dim, depth, num_heads of the blocks below the head; XL is the published one."""


class TimeTokens(TimeEmbedding):
    """A time's embedding, and as tokens: itself plus what is learned for each.

    Args:
        dim: width D.
        count: of tokens.
        trained: see :class:`rae.diffusion.layers.TimeEmbedding`.
    """

    def __init__(self, dim: int, count: int, trained: bool = False):
        super().__init__(dim, trained)
        self.learnable_tokens = nn.Parameter(0.02 * torch.randn(count, dim))


class LabelTokens(LabelEmbedding):
    """A class's row as tokens, each plus what is learned for it; see :class:`TimeTokens`."""

    def __init__(self, rows: int, dim: int, count: int):
        super().__init__(rows, dim)
        self.learnable_tokens = nn.Parameter(0.02 * torch.randn(count, dim))


class SplitAttention(nn.Module):
    """Self-attention with rotary positions and normalised queries and keys, whose projections are three matrices.

    Muon makes each matrix's update orthogonal, so that three are not the same as one.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, positions: RotaryPositions) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = (layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (positions(each).to(v.dtype) for each in (self.q_norm(q), self.k_norm(k)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SplitSwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202) of three matrices; see :class:`SplitAttention`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class ContextBlock(nn.Module):
    """A transformer's block that is modulated by a condition a token, or by none; its residual stream is float32.

    Args:
        dim, num_heads, mlp_ratio: see :class:`rae.diffusion.layers.Block`.
        modulated: whether there is a condition.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, modulated: bool):
        super().__init__()
        self.norm1, self.norm2 = make_norm(dim, True), make_norm(dim, True)
        self.attn = SplitAttention(dim, num_heads)
        self.mlp = SplitSwiGLU(dim, int(2 / 3 * int(dim * mlp_ratio)))
        self.adaln_modulation = Modulation(dim, 6) if modulated else None
        self.checkpointing = False

    def forward(self, x: Tensor, positions: RotaryPositions, condition: Tensor | None = None) -> Tensor:
        """Stream (B, N, D), and a condition (B, N, D) where it is modulated -> stream."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, positions, condition, use_reentrant=False)
        return self._forward(x, positions, condition)

    def _forward(self, x: Tensor, positions: RotaryPositions, condition: Tensor | None) -> Tensor:
        if self.adaln_modulation is None or condition is None:
            x = x + self.attn(self.norm1(x), positions)
            return x + self.mlp(self.norm2(x))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaln_modulation(condition)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale), positions)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class Output(nn.Module):
    """Norm, modulation by a condition a token, and a linear layer that is zero at first."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.norm, self.linear = make_norm(dim, True), nn.Linear(dim, channels)
        self.adaln_modulation = Modulation(dim, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Stream and condition (B, N, D) -> (B, N, C)"""
        shift, scale = self.adaln_modulation(condition)
        return self.linear(modulate(self.norm(x), shift, scale))


@register("network", "ditdh_in_context", context=("latent_shape", "num_classes", "null_label"))
class InContextDiTDH(LatentTransformer):
    """DiT-DH with time and class as tokens beside the latent's, and a base head (arXiv 2605.18324).

    Blocks of width ``embed_dim`` read the noisy latent and the tokens of time and class, and make one condition a
    token; a few wide blocks read the latent again, modulated by that. What the first ``base_depth`` blocks know makes
    an output of its own: the weaker prediction of internal guidance, trained beside the other.

    Args:
        latent_shape, num_classes, null_label: see :class:`rae.diffusion.networks.DiTDH` (supplied).
        size: ``S``, ``B``, ``L`` or ``XL`` (1440 wide, published); explicit sizes go before it.
        embed_dim, depth, num_heads, head_embed_dim, head_depth, head_num_heads, mlp_ratio: likewise.
        base_depth: blocks below the base head; 0 for none.
        time_tokens, class_tokens: their numbers.
        trained_tables: train the time's frequencies, as the public script does; here they are fixed.

    Raises:
        ValueError: sizes that are missing, or do not divide; a base head above the last block.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        null_label: bool = True,
        size: Size | None = None,
        embed_dim: Count | None = None,
        depth: Count | None = None,
        num_heads: Count | None = None,
        head_embed_dim: Count = HEAD[0],
        head_depth: Count = HEAD[1],
        head_num_heads: Count = HEAD[2],
        mlp_ratio: Positive = 4.0,
        base_depth: int = 8,
        time_tokens: Count = 4,
        class_tokens: Count = 8,
        trained_tables: bool = False,
    ):
        super().__init__()
        channels, self.grid, _ = latent_shape
        standard = SIZES.get(size or "")
        dim, deep, heads = chosen_sizes(standard, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        head_dim, head_deep, head_heads = chosen_sizes(
            None, head_embed_dim=head_embed_dim, head_depth=head_depth, head_num_heads=head_num_heads
        )
        if not 0 <= base_depth <= deep:
            raise ValueError(f"base_depth: {base_depth} is not from 0 (no base head) to {deep}, the depth")
        self.depth, self.base_depth = deep, base_depth
        self.s_embedder, self.x_embedder = PatchEmbed(channels, dim), PatchEmbed(channels, head_dim)
        self.s_projector = nn.Linear(dim, head_dim) if dim != head_dim else nn.Identity()
        self._name_labels(num_classes, null_label)
        self.t_embedder = TimeTokens(dim, time_tokens, trained_tables)
        self.ctx_embedder = LabelTokens(num_classes + (self.null_label is not None), dim, class_tokens)
        self.enc_rope = RotaryPositions(dim // heads, self.grid, time_tokens + class_tokens)
        self.dec_rope = RotaryPositions(head_dim // head_heads, self.grid)
        each = [(dim, heads, False)] * deep + [(head_dim, head_heads, True)] * head_deep
        self.blocks = nn.ModuleList(ContextBlock(width, n, mlp_ratio, modulated) for width, n, modulated in each)
        self.final_layer = Output(head_dim, channels)
        self.base_final_layer = Output(dim, channels) if base_depth else None

    @overload
    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, t: Tensor, label: Tensor, with_base: bool) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, t: Tensor, label: Tensor, with_base: bool = False):
        """Noisy latent (B, C, h, h), times (B,), labels (B,) -> (B, C, h, h), in float32.

        Args:
            with_base: give the base head's output too.
        """
        time = self.t_embedder(t).float()
        told = [time[:, None] + self.t_embedder.learnable_tokens]
        told.append(self.ctx_embedder(label)[:, None] + self.ctx_embedder.learnable_tokens)
        image = self.s_embedder(x).float()
        count, base = image.shape[1], None
        tokens = torch.cat([image, *told], dim=1)
        for number, block in enumerate(self.blocks[: self.depth], 1):
            tokens = block(tokens, self.enc_rope)
            if with_base and number == self.base_depth:
                inner = F.silu(time[:, None] + tokens[:, :count])
                base = self._latent_of(self.base_final_layer(inner, inner))  # type: ignore[misc]
        condition = self.s_projector(F.silu(time[:, None] + tokens[:, :count]))
        tokens = self.x_embedder(x).float()
        for block in self.blocks[self.depth :]:
            tokens = block(tokens, self.dec_rope, condition)
        full = self._latent_of(self.final_layer(tokens, condition))
        return (full, base) if with_base else full
