"""Pieces of diffusion transformers: embeddings of time and class, rotary positions, adaLN blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PatchEmbed(nn.Module):
    """A latent's tokens to a width: a 1 × 1 convolution, as one matrix product.

    Args:
        channels: of the latent.
        dim: the width.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 1)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D), row by row."""
        return F.linear(x.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedding(nn.Module):
    """Random Fourier features of a time in [0, 1], through a small MLP.

    Args:
        dim: width D of the embedding.
        trained: whether the frequencies train, as the public script lets them by accident.
    """

    def __init__(self, dim: int, trained: bool = False, frequencies: int = 256):
        super().__init__()
        self.W = nn.Parameter(torch.randn(frequencies), requires_grad=trained)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)"""
        angle = 2 * math.pi * t.float()[:, None] * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


class LabelEmbedding(nn.Module):
    """A row for each class, and for no class the last one, if there is one.

    Args:
        rows: classes, and one more for the null label.
        dim: width D of the embedding.
    """

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, D)"""
        return self.embedding_table(label)


class RotaryPositions(nn.Module):
    """2-D rotary positions (arXiv 2104.09864): half of a head's channels turn by the row, half by the column.

    Adjacent channels are a pair, whose frequency is 10000^(−2i/(d/2)) for the i-th of a half's d/4 pairs.

    Args:
        dim: a head's channels d, a multiple of 4.
        grid: tokens a side.
        others: tokens after those, which do not turn.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, dim: int, grid: int, others: int = 0):
        super().__init__()
        if dim % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 channels, not {dim}")
        frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
        angle = (torch.arange(grid)[:, None] * frequency).repeat_interleave(2, dim=1)  # (grid, d/2)
        row, column = (angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1))
        table = F.pad(torch.cat([row, column], dim=2).flatten(0, 1), (0, 0, 0, others))
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Turn (..., N, d), in float32."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions.

    Args:
        dim: width D.
        num_heads: of equal width.
        norm: makes the norms of queries and keys (QK-norm, arXiv 2302.05442); None for none.
    """

    def __init__(self, dim: int, num_heads: int, norm: "type[nn.Module] | None" = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        width = dim // num_heads
        self.q_norm, self.k_norm = (nn.Identity() if norm is None else norm(width, eps=1e-6) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: RotaryPositions) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        q, k = (positions(each).to(v.dtype) for each in (self.q_norm(q), self.k_norm(k)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202): SiLU of one half times the other."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class MLP(nn.Module):
    """Two layers with a tanh-GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def make_norm(dim: int, rms_norm: bool) -> nn.Module:
    """RMSNorm with a weight, or LayerNorm without one."""
    return nn.RMSNorm(dim, eps=1e-6) if rms_norm else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class Modulation(nn.Sequential):
    """adaLN-zero (arXiv 2212.09748): a condition to ``count`` vectors, all zero at first, in float32.

    A condition of one vector an image is so little work that its matrix product is in float32 too.
    """

    def __init__(self, dim: int, count: int):
        super().__init__(nn.SiLU(), nn.Linear(dim, count * dim))
        self.count = count
        nn.init.zeros_(self[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self[1].bias)  # type: ignore[arg-type]

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, D), or (B, N, D) for one a token -> each (B, 1 or N, D)"""
        if condition.ndim == 2:
            with torch.autocast(condition.device.type, enabled=False):
                return super().forward(condition.float()[:, None]).chunk(self.count, dim=-1)
        return super().forward(condition).float().chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """A transformer's block whose norms and branches a condition modulates.

    The residual stream is float32 in every precision.

    Args:
        dim, num_heads: of attention.
        mlp_ratio: hidden width of the MLP over ``dim``; two thirds of it with ``swiglu``, which has three matrices.
        qk_norm, swiglu, rms_norm: see :class:`rae.diffusion.networks.DiTDH`.

    Attributes:
        checkpointing: compute its activations again in the backward pass.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, swiglu: bool, rms_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = make_norm(dim, rms_norm), make_norm(dim, rms_norm)
        kind = (nn.RMSNorm if rms_norm else nn.LayerNorm) if qk_norm else None
        self.attn = Attention(dim, num_heads, kind)
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if swiglu else MLP(dim, hidden)
        self.adaLN_modulation = Modulation(dim, 6)
        self.checkpointing = False

    def forward(self, x: Tensor, condition: Tensor, positions: RotaryPositions) -> Tensor:
        """Stream (B, N, D), and a condition (B, D) or (B, N, D) -> stream."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, condition, positions, use_reentrant=False)
        return self._forward(x, condition, positions)

    def _forward(self, x: Tensor, condition: Tensor, positions: RotaryPositions) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale), positions)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """Norm, modulation, and a linear layer that is zero at first.

    Args:
        dim: width of the stream.
        channels: of the output.
    """

    def __init__(self, dim: int, channels: int, rms_norm: bool):
        super().__init__()
        self.norm_final = make_norm(dim, rms_norm)
        self.linear = nn.Linear(dim, channels)
        self.adaLN_modulation = Modulation(dim, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Stream (B, N, D), and a condition (B, D) or (B, N, D) -> (B, N, C)"""
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(modulate(self.norm_final(x), shift, scale))
