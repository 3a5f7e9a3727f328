"""Diffusion transformers on latents: DiT-DH (arXiv 2510.11690) and plain LightningDiT (arXiv 2501.01423)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rae.autoencoder.layers import sincos_positions
from rae.config.registry import register
from rae.config.values import Count, Positive
from rae.diffusion.layers import Block, FinalLayer, LabelEmbedding, PatchEmbed, RotaryPositions, TimeEmbedding

Size = Literal["S", "B", "L", "XL"]
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""DiT's sizes: embed_dim, depth, num_heads."""
HEAD = (2048, 2, 16)
"""DiT-DH's head, of every size: embed_dim, depth, num_heads."""


def chosen_sizes(standard: tuple[int, int, int] | None, **named: int | None) -> tuple[int, int, int]:
    """Explicit sizes, as width, depth and heads, over those of a name.

    Raises:
        ValueError: one is given by neither; a width that does not divide.
    """
    chosen = {key: value or (standard[i] if standard else 0) for i, (key, value) in enumerate(named.items())}
    missing = [key for key, value in chosen.items() if not value]
    if missing:
        raise ValueError(f"give a size ({', '.join(SIZES)}), or {', '.join(missing)}")
    dim, depth, heads = chosen.values()
    if dim % heads or (dim // heads) % 4:
        raise ValueError(f"a width of {dim} does not make {heads} heads of a multiple of 4 channels")
    return dim, depth, heads


class LatentTransformer(nn.Module):
    """What diffusion transformers share: (x, t, label) to the flow's target, of x's shape.

    Attributes:
        num_classes: labels are from 0 to one less; 0 for a network without labels.
        null_label: the label for no class; None if there is none.
        blocks: all of them, in order.
        base_depth: how many are below a base head, whose output ``forward(…, with_base=True)`` gives too; 0 for none.
    """

    grid: int
    num_classes: int
    null_label: int | None
    blocks: nn.ModuleList
    pos_embed: nn.Parameter | None
    base_depth = 0

    def _embed(self, dim: int, num_classes: int, null: bool, positions: bool, trained_tables: bool) -> None:
        """Make what embeds time, label and place at a width."""
        self._name_labels(num_classes, null)
        self.t_embedder = TimeEmbedding(dim, trained_tables)
        self.y_embedder = LabelEmbedding(num_classes + (self.null_label is not None), dim)
        table = sincos_positions(dim, self.grid)[:, 1:].clone()
        self.pos_embed = nn.Parameter(table, requires_grad=trained_tables) if positions else None

    def _name_labels(self, num_classes: int, null: bool) -> None:
        self.num_classes, self.null_label = num_classes, num_classes if null or not num_classes else None

    def _placed(self, tokens: Tensor) -> Tensor:
        """Tokens, in float32, with their absolute positions if there are any."""
        return tokens.float() if self.pos_embed is None else tokens.float() + self.pos_embed

    def _latent_of(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """What FSDP shards as a unit: each block."""
        return any(module is block for block in self.blocks)


@register("network", "ditdh", context=("latent_shape", "num_classes", "null_label"))
class DiTDH(LatentTransformer):
    """A diffusion transformer with a wide, shallow head (DiT^DH, arXiv 2510.11690, section 4).

    Blocks of width ``embed_dim`` read the noisy latent, and make one condition a token; a few wide blocks read it
    again, modulated by that.

    Args:
        latent_shape: (C, h, h) of latents (supplied).
        num_classes: of labels; 0 for none (supplied).
        null_label: whether there is a label for no class (supplied).
        size: ``S``, ``B``, ``L`` or ``XL``; explicit sizes go before it.
        embed_dim, depth, num_heads: of the blocks that make conditions.
        head_embed_dim, head_depth, head_num_heads: of the head; 2048, 2 and 16 by default.
        mlp_ratio: see :class:`rae.diffusion.layers.Block`.
        qk_norm: normalise queries and keys, which keeps attention's logits small in bf16.
        swiglu: gated MLPs, as published; otherwise two layers with a GELU.
        rms_norm: norms with a weight, as published; otherwise LayerNorm without one.
        absolute_positions: add sin-cos positions to the tokens that make conditions, as published.
        trained_tables: train these positions and the time's frequencies. The public script does so by accident; here
            they are fixed, since they are declared so there, and what was published holds them as they were trained.

    Raises:
        ValueError: sizes that are missing, or do not divide.
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
        qk_norm: bool = False,
        swiglu: bool = True,
        rms_norm: bool = True,
        absolute_positions: bool = True,
        trained_tables: bool = False,
    ):
        super().__init__()
        channels, self.grid, _ = latent_shape
        standard = SIZES.get(size or "")
        dim, deep, heads = chosen_sizes(standard, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        head_dim, head_deep, head_heads = chosen_sizes(
            None, head_embed_dim=head_embed_dim, head_depth=head_depth, head_num_heads=head_num_heads
        )
        self.depth = deep
        self.s_embedder, self.x_embedder = PatchEmbed(channels, dim), PatchEmbed(channels, head_dim)
        self.s_projector = nn.Linear(dim, head_dim) if dim != head_dim else nn.Identity()
        self._embed(dim, num_classes, null_label, absolute_positions, trained_tables)
        self.enc_feat_rope = RotaryPositions(dim // heads, self.grid)
        self.dec_feat_rope = RotaryPositions(head_dim // head_heads, self.grid)
        options = (mlp_ratio, qk_norm, swiglu, rms_norm)
        each = [(dim, heads)] * deep + [(head_dim, head_heads)] * head_deep
        self.blocks = nn.ModuleList(Block(width, count, *options) for width, count in each)
        self.final_layer = FinalLayer(head_dim, channels, rms_norm)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Noisy latent (B, C, h, h), times (B,), labels (B,) -> (B, C, h, h), in float32."""
        time = self.t_embedder(t).float()
        condition = F.silu(time + self.y_embedder(label))
        tokens = self._placed(self.s_embedder(x))
        for block in self.blocks[: self.depth]:
            tokens = block(tokens, condition, self.enc_feat_rope)
        condition = self.s_projector(F.silu(time[:, None] + tokens))
        tokens = self.x_embedder(x).float()
        for block in self.blocks[self.depth :]:
            tokens = block(tokens, condition, self.dec_feat_rope)
        return self._latent_of(self.final_layer(tokens, condition))


@register("network", "lightningdit", context=("latent_shape", "num_classes", "null_label"))
class LightningDiT(LatentTransformer):
    """A diffusion transformer of one width (LightningDiT, arXiv 2501.01423), on latents without patches.

    Args:
        latent_shape, num_classes, null_label, size, embed_dim, depth, num_heads, mlp_ratio, qk_norm, swiglu, rms_norm,
            absolute_positions, trained_tables: see :class:`DiTDH`.

    Raises:
        ValueError: sizes that are missing, or do not divide.
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
        mlp_ratio: Positive = 4.0,
        qk_norm: bool = False,
        swiglu: bool = True,
        rms_norm: bool = True,
        absolute_positions: bool = True,
        trained_tables: bool = False,
    ):
        super().__init__()
        channels, self.grid, _ = latent_shape
        standard = SIZES.get(size or "")
        dim, deep, heads = chosen_sizes(standard, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        self.x_embedder = PatchEmbed(channels, dim)
        self._embed(dim, num_classes, null_label, absolute_positions, trained_tables)
        self.feat_rope = RotaryPositions(dim // heads, self.grid)
        options = (mlp_ratio, qk_norm, swiglu, rms_norm)
        self.blocks = nn.ModuleList(Block(dim, heads, *options) for _ in range(deep))
        self.final_layer = FinalLayer(dim, channels, rms_norm)
        branches = [branch for block in self.blocks for branch in (block.attn, block.mlp)]
        for branch in (*branches, self.t_embedder):
            for layer in (module for module in branch.modules() if isinstance(module, nn.Linear)):
                nn.init.zeros_(layer.bias)
                if branch is not self.t_embedder:
                    nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Noisy latent (B, C, h, h), times (B,), labels (B,) -> (B, C, h, h), in float32."""
        condition = self.t_embedder(t).float() + self.y_embedder(label)
        tokens = self._placed(self.x_embedder(x))
        for block in self.blocks:
            tokens = block(tokens, condition, self.feat_rope)
        return self._latent_of(self.final_layer(tokens, condition))
