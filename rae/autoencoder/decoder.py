"""The ViT decoder: a latent grid to pixels, with MAE's decoder layout (arXiv 2111.06377) and published names."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.autoencoder.backbones import check_tensors, read_file, weight_file, weightless
from rae.autoencoder.decoder_weights import find_decoder, positions_for, published_names, sizes_of
from rae.autoencoder.layers import sincos_positions, unpatchify
from rae.config.errors import UserError

log = logging.getLogger(__name__)

SIZES = {  # name: width, depth, heads, MLP width
    "ViTB": (768, 12, 12, 3072),
    "ViTL": (1024, 24, 16, 4096),
    "ViTXL": (1152, 28, 16, 4096),
}


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


def published_state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under the names of published decoder files (``model.pt``)."""
    published: dict[str, Tensor] = {}
    for name, tensor in {"positions": decoder.positions.detach(), **decoder.state_dict()}.items():
        names = published_names(name)
        published.update(zip(names, tensor.chunk(len(names)), strict=True))
    return published


def load_published(decoder: Decoder, path: str) -> None:
    """Load a decoder from a file of weights or a folder that holds one, whole and with equal sizes.

    It may be a published ``model.pt``, a training checkpoint of the public code (whose average is taken), an export of
    ours or of diffusers; under the prefixes of DistributedDataParallel or torch.compile, in half precision. Positions
    that are fixed are computed: those of a file with another number of tokens too. A trained table needs
    ``trainable_positions``, and is resampled.

    Raises:
        UserError: it holds no decoder; a tensor is missing, unexpected, not finite or of another size.
    """
    if weightless():
        return
    where = f"decoder weights {path}"
    load_decoder(decoder, read_decoder(decoder_file(path), where), where)


def read_decoder(file: Path, where: str, weights: str = "ema") -> dict[str, Tensor]:
    """The decoder's tensors in a file, under our names; what of several is taken is said.

    Args:
        where: what to call them in messages.
        weights: see :func:`rae.autoencoder.decoder_weights.find_decoder`.

    Raises:
        UserError: it holds none, or not a whole one.
    """
    return decoder_in(read_file(file), where, weights)


def decoder_in(content: Any, where: str, weights: str = "ema") -> dict[str, Tensor]:
    """As :func:`read_decoder`, of what has been read of a file."""
    found = find_decoder(content, weights)
    if found is None:
        raise UserError(f"{where}: there is no decoder in it; python -m rae inspect tells what it holds")
    if found.inside and found.averaged != (weights == "ema"):
        kind = "an average" if found.averaged else "no average"
        _say(f"{where}: what it holds is {kind}, {found.inside!r}, which is taken")
    elif found.averaged:
        _say(f"{where}: its average is taken, {found.inside!r}")
    return found.ours(where)


def decoder_file(path: str) -> Path:
    """The file with a decoder's weights that a path names: itself, or the one in a folder that was exported.

    Raises:
        UserError: there is none; what is there instead, and what takes it.
    """
    folder = Path(path).expanduser()
    if "://" in path:
        raise UserError(f"decoder weights {path}: they are not on this disk; begin_from: {path} takes them")
    if folder.is_dir():
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is not None:
            return file
        if any((folder / name).exists() for name in ("config.yaml", "checkpoints")):
            raise UserError(f"decoder weights {path}: it is a run or a checkpoint; begin_from: {path} takes it")
        raise UserError(f"decoder weights {path}: the folder holds none of {', '.join(_FILES)}")
    if any(folder.parent.glob("part-*-of-*.json")):
        raise UserError(f"decoder weights {path}: it is of a run's checkpoint; begin_from: {folder.parent} takes it")
    return weight_file(path)


_FILES = ("model.pt", "model.safetensors", "diffusion_pytorch_model.safetensors")
"""Of the published layout, ours, and diffusers'."""


def load_decoder(decoder: Decoder, state: dict[str, Tensor], where: str) -> None:
    """Load a decoder's weights; see :func:`load_published`.

    Args:
        state: under our names; ``positions`` may be among them, whether the decoder trains them or not.
        where: what to call them in messages.

    Raises:
        UserError: a tensor is missing, unexpected or of another size; positions were trained, and are not to be.
    """
    own = decoder.state_dict()
    if {"embed.weight", "head.weight", "blocks.0.mlp.fc1.weight"} <= state.keys():
        theirs, ours = sizes_of(state), sizes_of(own)
        differing = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if theirs[key] != ours[key]]
        if differing:
            raise UserError(f"{where}: it has {', '.join(differing)}; give model.decoder (and the encoder) its sizes")
    trainable = isinstance(decoder.positions, nn.Parameter)
    fixed = sincos_positions(decoder.embed.out_features, decoder.grid)
    positions, said = positions_for(fixed, trainable, state.get("positions"), where)
    state = {name: tensor for name, tensor in state.items() if name != "positions"}
    check_tensors(state | ({"positions": positions} if trainable else {}), own, where)
    if said:
        _say(said)
    decoder.load_state_dict(state | ({"positions": positions} if trainable else {}))


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", line)
