"""The representation autoencoder: a frozen encoder and a trained decoder, without a Trainer."""

from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder.backbones import read_state_dict, weight_file, weightless
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.layers import Frozen, add_latent_noise
from rae.config.errors import InputError, UserError

MARGIN = 0.1
"""How far from [0, 1] an image may be: what resizing overshoots."""


class RAE(nn.Module):
    """A frozen encoder and a trained decoder (arXiv 2510.11690). Needs no Trainer.

    Images are (B, 3, H, W), float in [0, 1] or uint8, and are resized to the encoder's square; latents are
    (B, C, h, w). Both may be of any floating-point type, on the autoencoder's device. :meth:`encode`, :meth:`decode`
    and ``forward`` refuse others with an :class:`rae.config.errors.InputError`, a ``ValueError``.

    Args:
        encoder: frozen here.
        decoder: for latents of the encoder's ``embed_dim``.
        noise_tau: latent noise level while training (0.8 in the published recipe), see
            :func:`rae.autoencoder.layers.add_latent_noise`; none in eval mode.
        noise: its distribution.
        latent_stats: a file with tensors ``mean`` and ``var`` (C, h, w), or None.
        output: what the decoder makes: ``normalized``, an image as the encoder normalises it; or ``image``.

    Raises:
        UserError: the statistics file is unreadable or of another shape.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        noise_tau: float = 0.0,
        noise: str = "uniform",
        latent_stats: str | None = None,
        output: str = "normalized",
    ):
        super().__init__()
        self.encoder = Frozen(encoder)
        self.decoder = decoder
        self.grid = encoder.grid
        self.latent_shape = (encoder.embed_dim, encoder.grid, encoder.grid)
        self.noise_tau, self.noise = noise_tau, noise
        mean, std = encoder.normalize.mean.clone(), encoder.normalize.std.clone()
        if output == "image":
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)
        mean, var = read_stats(latent_stats, encoder) if latent_stats else (None, None)
        self.register_buffer("latent_mean", mean)
        self.register_buffer("latent_var", var)

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> "RAE":
        """An exported autoencoder, in eval mode: ``rae.load``."""
        import rae

        return rae.load(folder, **options)  # type: ignore[misc]

    def encode(self, image: Tensor) -> Tensor:
        """Image -> latent; noised in train mode, normalised by the statistics if there are any.

        Args:
            image: (B, 3, H, W), uint8, or float in [0, 1] (:data:`MARGIN` beyond it is let through).
        """
        tokens = self.clean_tokens(self._checked_image(image))
        return self.latent_of(self.noised(tokens))

    def decode(self, latent: Tensor) -> Tensor:
        """Latent -> image, around [0, 1] (not clamped).

        Args:
            latent: (B, C, h, h); of another h than the encoder's, it is resized to the decoder's tokens (bilinear),
                unless there are statistics, which are of one h.
        """
        return self.decode_with_hidden(self._checked_latent(latent))[0]

    def forward(self, image: Tensor) -> Tensor:
        """Image -> reconstruction."""
        return self.decode(self.encode(image))

    def clean_tokens(self, image: Tensor) -> Tensor:
        """Image -> encoder tokens (B, N, C), without noise."""
        return self.encoder(image)

    def tokens_of(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch's tokens (B, N, C), without noise: from its precomputed ``latent`` if it has one."""
        if "latent" not in batch:
            return self.clean_tokens(to_float(batch["image"]))
        return batch["latent"].float().flatten(2).transpose(1, 2)

    def noised(self, tokens: Tensor) -> Tensor:
        """The tokens with latent noise in train mode, as they are otherwise."""
        return add_latent_noise(tokens, self.noise_tau, self.noise) if self.training else tokens

    def latent_of(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) -> latent (B, C, h, w), normalised by the statistics if there are any."""
        latent = tokens.transpose(1, 2).reshape(len(tokens), -1, self.grid, self.grid)
        if self.latent_mean is None:
            return latent
        return (latent - self.latent_mean) / torch.sqrt(self.latent_var + 1e-5)

    def plain(self, latent: Tensor) -> Tensor:
        """A latent without the statistics' normalisation: as the encoder gives it."""
        if self.latent_mean is None:
            return latent
        return latent * torch.sqrt(self.latent_var + 1e-5) + self.latent_mean

    def decode_with_hidden(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent -> image in fp32, and the input (B, N, D) of the decoder's last layer."""
        image, hidden = self.decoder(self.plain(latent))
        return image.float() * self.image_std + self.image_mean, hidden

    def _checked_image(self, image: Tensor) -> Tensor:
        wanted = "give images (B, 3, H, W) in [0, 1], or of uint8"
        self._check_tensor(image, wanted)
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise InputError(f"{wanted}, not {tuple(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise InputError(f"{wanted}, not of {image.dtype}")
        # To look at values waits for the device, and would break a compiler's graph.
        if image.is_floating_point() and not (image.is_meta or torch.compiler.is_compiling()):
            low, high = (float(each) for each in image.detach().aminmax())
            if not (low >= -MARGIN and high <= 1 + MARGIN):  # NaN is neither
                raise InputError(f"{wanted}, not values from {low:.4g} to {high:.4g}")
        return to_float(image).to(self.image_mean.dtype)

    def _checked_latent(self, latent: Tensor) -> Tensor:
        channels, grid, _ = self.latent_shape
        wanted = f"give latents (B, {channels}, {grid}, {grid})"
        self._check_tensor(latent, wanted)
        if not latent.is_floating_point():
            raise InputError(f"{wanted}, not of {latent.dtype}")
        square = latent.ndim == 4 and latent.shape[2] == latent.shape[3]
        if not square or latent.shape[1] != channels or 0 in latent.shape:
            raise InputError(f"{wanted}, not {tuple(latent.shape)}")
        if self.latent_mean is not None and latent.shape[3] != grid:
            raise InputError(f"{wanted}, which the latent statistics are of, not {tuple(latent.shape)}")
        return latent.to(self.image_mean.dtype)

    def _check_tensor(self, tensor: Any, wanted: str) -> None:
        if not isinstance(tensor, Tensor):
            raise InputError(f"{wanted}, as a torch.Tensor, not a {type(tensor).__module__}.{type(tensor).__name__}")
        if tensor.device != self.image_mean.device:
            raise InputError(f"{wanted}, on {self.image_mean.device} as the autoencoder is, not on {tensor.device}")

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """What FSDP shards as a unit: each decoder block, and the decoder, which is called by itself."""
        return module is self.decoder or any(module is block for block in self.decoder.blocks)


def read_stats(path: str, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Latent statistics (mean and var) for an encoder's latents, each (C, h, w).

    Raises:
        UserError: the file is unreadable or of another shape.
    """
    shape = (encoder.embed_dim, encoder.grid, encoder.grid)
    if weightless():
        return torch.empty(shape), torch.empty(shape)
    state = read_state_dict(weight_file(path))
    for name in ("mean", "var"):
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise UserError(f"latent statistics {path}: {name!r} must have shape {shape}, but is {found}")
    mean, var = state["mean"].float(), state["var"].float()
    if not (mean.isfinite().all() and var.isfinite().all() and (var > 0).all()):
        raise UserError(f"latent statistics {path}: they must be finite, and variances above 0; make them again")
    return mean, var


def to_float(image: Tensor) -> Tensor:
    """uint8 or float image -> float32 in [0, 1]."""
    if image.dtype != torch.uint8:
        return image
    # The loader's batches are channels_last, in which convolutions would sum in another order than the reference's.
    return image.to(torch.float32, memory_format=torch.contiguous_format) / 255


def quantize(image: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the 256 values of an 8-bit image."""
    return (image.clamp(0, 1) * 255).round() / 255
