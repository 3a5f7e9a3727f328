"""Whether an autoencoder's latents are what a flow expects: of mean 0 and variance 1, and decoded to the images."""

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from rae.autoencoder.rae import RAE, to_float
from rae.config.errors import UserError

IMAGES, BATCH = 64, 16
FAR, LOW, HIGH = 0.5, 0.5, 2.0
"""Latents are not normalised whose channels' means are beyond the first (root mean square over channels), or whose
variance a channel is outside the others."""


@torch.no_grad()
def check_autoencoder(rae: RAE, images: Dataset, where: str) -> str:
    """Check a few latents' mean and variance per channel, and their decodes.

    Args:
        images: samples {image: uint8 (3, S, S)} or {latent: (C, h, w)}, with a length.
        where: the setting that names the autoencoder.

    Returns:
        what was measured, as one line

    Raises:
        UserError: the statistics are missing, or are of another encoder; the decoder is of another encoder.
    """
    count = len(images)  # type: ignore[arg-type]
    chosen = [images[i * count // min(IMAGES, count)] for i in range(min(IMAGES, count))]
    device, latents, errors, spread = rae.image_mean.device, [], [], []
    for i in range(0, len(chosen), BATCH):
        keys = [key for key in ("image", "latent") if key in chosen[0]]
        batch = {key: default_collate([each[key] for each in chosen[i : i + BATCH]]).to(device) for key in keys}
        latents.append(rae.latent_of(rae.tokens_of(batch)))
        if "image" in batch:
            image, recon = to_float(batch["image"]), rae.decode(latents[-1])
            errors.append((recon - image).square().mean((1, 2, 3)))
            spread.append((image - image.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)))
    mean, variance = _moments(torch.cat(latents))
    measured = f"latents of {len(chosen)} images have mean {mean:.2f} and variance {variance:.2f} a channel"
    if mean > FAR or not LOW < variance < HIGH:
        fault = "its statistics are of another encoder" if rae.latent_mean is not None else "it has no statistics"
        raise UserError(
            f"{where}: {measured}, where 0 and 1 are needed: {fault}; make them with `python -m rae stats`, and name "
            "them as its latent_stats"
        )
    if not errors:
        return f"{measured}; there are no images to compare decodes with"
    error, spread_ = torch.cat(errors), torch.cat(spread)
    psnr = float((-10 * error.log10()).mean())
    if error.mean() > spread_.mean():
        raise UserError(
            f"{where}: its decodes are not the images: PSNR {psnr:.1f} dB, worse than one colour an image; its decoder "
            "is untrained, or of another encoder"
        )
    return f"{measured}; their decodes PSNR {psnr:.1f} dB"


def _moments(latent: Tensor) -> tuple[float, float]:
    """Root mean square over channels of a channel's mean, and the mean of their variances."""
    channels = latent.double().transpose(0, 1).flatten(1)
    return float(channels.mean(1).square().mean().sqrt()), float(channels.var(1).mean())
