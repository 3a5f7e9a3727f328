"""The ViT decoder: a latent grid to pixels, with MAE's decoder layout (arXiv 2111.06377) and published names."""

import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.autoencoder.backbones import check_tensors, read_state_dict, weight_file, weightless
from rae.autoencoder.layers import sincos_positions, unpatchify
from rae.config.errors import UserError

SIZES = {  # name: width, depth, heads, MLP width
    "ViTB": (768, 12, 12, 3072),
    "ViTL": (1024, 24, 16, 4096),
    "ViTXL": (1152, 28, 16, 4096),
}

_PUBLISHED = [  # our names -> the published ones, which are those of transformers' ViT-MAE; qkv is fused in ours
    (r"positions", ["decoder_pos_embed"]),
    (r"cls_token", ["trainable_cls_token"]),
    (r"embed\.(\w+)", [r"decoder_embed.\1"]),
    (r"norm\.(\w+)", [r"decoder_norm.\1"]),
    (r"head\.(\w+)", [r"decoder_pred.\1"]),
    (
        r"blocks\.(\d+)\.attn\.qkv\.(\w+)",
        [rf"decoder_layers.\1.attention.attention.{part}.\2" for part in ("query", "key", "value")],
    ),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", [r"decoder_layers.\1.attention.output.dense.\2"]),
    (r"blocks\.(\d+)\.norm1\.(\w+)", [r"decoder_layers.\1.layernorm_before.\2"]),
    (r"blocks\.(\d+)\.norm2\.(\w+)", [r"decoder_layers.\1.layernorm_after.\2"]),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", [r"decoder_layers.\1.intermediate.dense.\2"]),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", [r"decoder_layers.\1.output.dense.\2"]),
]


class _Block(Block):
    """timm's block; with ``checkpointing``, its backward pass starts from its input and computes the rest again.

    It does so inside its forward pass: FSDP casts a unit's input before that, and not when it is computed again.
    """

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        block = super().forward
        return checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)


class Decoder(nn.Module):
    """A pre-norm ViT over one trainable token and the latent tokens, with a linear map to pixels.

    Args:
        latent_dim: latent channels C.
        image_size: side of the image it makes.
        patch_size: side of the patch that a token makes; its own grid is ``image_size / patch_size``.
        size: a name in :data:`SIZES`, or None with the four explicit sizes.
        embed_dim, depth, num_heads, mlp_dim: explicit sizes, each overriding the named one.
        trainable_positions: train the sin-cos table (as the public training script does) or keep it fixed.
        activation_checkpointing: keep only each block's input for the backward pass, and compute the rest again.

    Raises:
        ValueError: sizes that are unknown, missing, or do not divide.
    """

    def __init__(
        self,
        latent_dim: int,
        image_size: int,
        patch_size: int = 16,
        size: str | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        trainable_positions: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if size is not None and size not in SIZES:
            raise ValueError(f"unknown decoder size {size!r}; there are: {', '.join(SIZES)}, or give explicit sizes")
        explicit = (embed_dim, depth, num_heads, mlp_dim)
        named = SIZES[size] if size else (None,) * 4
        dim, depth, num_heads, mlp_dim = (e if e is not None else n for e, n in zip(explicit, named, strict=True))
        if dim is None or depth is None or num_heads is None or mlp_dim is None:
            raise ValueError("give a size (ViTB, ViTL, ViTXL) or all of embed_dim, depth, num_heads, mlp_dim")
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of the decoder's patch_size {patch_size}")
        self.grid, self.patch_size = image_size // patch_size, patch_size
        norm = partial(nn.LayerNorm, eps=1e-12)
        self.embed = nn.Linear(latent_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, self.grid)
        if trainable_positions:
            self.positions: Tensor = nn.Parameter(positions)
        else:
            self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(
            _Block(dim, num_heads, mlp_ratio=mlp_dim / dim, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        for block in self.blocks:
            block.checkpointing = activation_checkpointing
        self.norm = norm(dim)
        self.head = nn.Linear(dim, patch_size * patch_size * 3)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            latent: (B, C, h, w); resized (bilinear) when h·w is not the decoder's token count.

        Returns:
            normalised image (B, 3, image_size, image_size), and the input (B, N, D) of the last linear layer.
        """
        if latent.shape[-2] * latent.shape[-1] != self.grid**2:
            latent = F.interpolate(latent, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        x = self.embed(latent.flatten(2).transpose(1, 2))  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        hidden = self.norm(x[:, 1:])
        return unpatchify(self.head(hidden), self.patch_size), hidden


def _published_names(name: str) -> list[str]:
    for pattern, published in _PUBLISHED:
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(p) for p in published]
    raise KeyError(name)


def published_state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under the names of published decoder files (``model.pt``)."""
    published: dict[str, Tensor] = {}
    for name, tensor in {"positions": decoder.positions.detach(), **decoder.state_dict()}.items():
        names = _published_names(name)
        published.update(zip(names, tensor.chunk(len(names)), strict=True))
    return published


def load_published(decoder: Decoder, path: str) -> None:
    """Load a published decoder file, strictly: every tensor of it and of the decoder, with equal shapes.

    Fixed positions are compared, not loaded: a file whose table was trained needs ``trainable_positions``.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape, or positions differ.
    """
    if weightless():
        return
    state = read_state_dict(weight_file(path))
    state = {name.removeprefix("decoder."): tensor for name, tensor in state.items()}
    load_published_state(decoder, state, f"decoder weights {path}")


def load_published_state(decoder: Decoder, state: dict[str, Tensor], where: str) -> None:
    """Load a decoder's weights under published names; see :func:`load_published`.

    Args:
        where: what to call them in messages.
    """
    check_tensors(state, published_state_dict(decoder), where, "do model.decoder's sizes match the file?")
    trained = isinstance(decoder.positions, nn.Parameter)
    if not trained and not torch.allclose(state["decoder_pos_embed"], decoder.positions, atol=1e-5):
        raise UserError(f"{where}: its position table was trained; set model.decoder.trainable_positions: true")
    decoder.load_state_dict(
        {name: torch.cat([state[n] for n in _published_names(name)]) for name in decoder.state_dict()}
    )
