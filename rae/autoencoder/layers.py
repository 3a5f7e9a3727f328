"""Small pieces shared by the networks: frozen modules, latent noise, positions, patches."""

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Frozen(nn.Module):
    """Hold a network that is used but never trained.

    The network is not a submodule. It moves with the model (``.to``), and that is all: it stays in eval mode,
    takes no gradient, and is seen neither by ``parameters()`` (so not by optimizers, EMA, DDP or FSDP) nor by
    ``state_dict()`` (so not by checkpoints, whose loading stays strict for what is trained).

    Args:
        network: any module; it is put into eval mode and its parameters stop requiring gradients.
    """

    network: nn.Module

    def __init__(self, network: nn.Module):
        super().__init__()
        object.__setattr__(self, "network", network.eval().requires_grad_(False))

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """The blocks of which a transformer is a row, if that is what most of a network is; otherwise itself alone."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    for row in network.modules():
        if isinstance(row, (nn.ModuleList, nn.Sequential)) and len(row) > 1 and size(row) > 0.8 * size(network):
            kinds = {type(block) for block in row}
            if len(kinds) == 1 and nn.Sequential not in kinds:
                return list(row)
    return [network]


class Normalize(nn.Module):
    """(image − mean) / std per channel.

    Args:
        mean, std: one number a channel, for images in [0, 1].
    """

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


def resize(image: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size) without antialiasing, as the reference does; no-op if equal."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, size=(size, size), mode=mode, align_corners=False)


def add_latent_noise(latent: Tensor, tau: float, distribution: str = "uniform") -> Tensor:
    """z + σ·N(0, 1) with one σ per sample (arXiv 2510.11690, noise-augmented decoding).

    Args:
        latent: (B, ...).
        tau: the noise level; 0 returns ``latent`` itself.
        distribution: σ ~ τ·U(0, 1) for ``uniform`` (what made the published numbers),
            |N(0, τ²)| for ``half_normal`` (what the paper's text says).

    Raises:
        ValueError: another distribution.
    """
    if tau == 0:
        return latent
    draw = {"uniform": torch.rand, "half_normal": torch.randn}.get(distribution)
    if draw is None:
        raise ValueError(f"unknown noise distribution {distribution!r}; there are: uniform, half_normal")
    shape = (latent.shape[0],) + (1,) * (latent.ndim - 1)
    sigma = tau * draw(shape, device=latent.device, dtype=latent.dtype).abs()
    return latent + sigma * torch.randn_like(latent)


def fixed_latent_noise(latent: Tensor, tau: Tensor, index: Tensor, seed: int = 0) -> Tensor:
    """z + τ·N(0, 1) with numbers that follow from (seed, index) alone, for evaluation.

    A sample has the same noise in every batch, on every rank and kind of device, and for every τ but for its scale.
    The level is τ itself: the strongest noise that training with this τ draws (:func:`add_latent_noise`).

    Args:
        latent: (B, ...).
        tau: (B,), the noise level of each sample.
        index: (B,), its number in the data set.
    """
    noise = fixed_noise(latent.shape[1:], seed, index).to(latent)
    return latent + noise * tau.to(latent).view(-1, *[1] * (latent.ndim - 1))


def generator_of(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that follows from a few numbers alone."""
    # A string goes through SHA-512, so that neighbours have unrelated draws.
    return torch.Generator(device).manual_seed(Random(",".join(map(str, key))).getrandbits(63))


def fixed_noise(shape: Sequence[int], seed: int, index: Tensor) -> Tensor:
    """N(0, 1) that follows from (seed, index) alone: the same in every batch, on every rank and kind of device.

    Args:
        shape: of a sample.
        index: (B,), its number.

    Returns:
        (B, …), on the CPU
    """
    noise = torch.empty(len(index), *shape)
    for row, number in zip(noise, index.tolist(), strict=True):
        row.normal_(generator=generator_of(seed, number))
    return noise


def sincos_positions(dim: int, grid: int, spread: float = 1.0) -> Tensor:
    """MAE's fixed 2-D sin-cos position table (arXiv 2111.06377).

    The first half of ``dim`` encodes the column, the second half the row; sines before cosines.

    Args:
        dim: embedding width, a multiple of 4.
        grid: tokens a side.
        spread: distance between neighbours.

    Returns:
        (1, 1 + grid², dim); the first row, of the token without a place, is zeros

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*[spread * torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    halves = [torch.outer(index.flatten(), omega) for index in (column, row)]
    table = torch.cat([wave for angle in halves for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(1, dim), table]).float()[None]


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p·p·C): each token laid out as (row, column, channel)."""
    b, c, height, width = image.shape
    p = patch_size
    return (
        image.reshape(b, c, height // p, p, width // p, p)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(b, (height // p) * (width // p), p * p * c)
    )


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(B, N, p·p·C) -> (B, C, H, W) for a square grid: the inverse of :func:`patchify`."""
    b, n, width = tokens.shape
    p, grid = patch_size, int(n**0.5)
    return (
        tokens.reshape(b, grid, grid, p, p, width // (p * p))
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(b, width // (p * p), grid * p, grid * p)
    )
