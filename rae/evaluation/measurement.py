"""Evaluating an autoencoder: every metric in one pass over the images, at every noise level, on one rank or several."""

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric

from rae.autoencoder.layers import fixed_latent_noise
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.data.dataset import ImageDataset
from rae.data.images import batches
from rae.data.shards import content_hash
from rae.evaluation.frechet import FrechetDistance, Reference
from rae.evaluation.metrics import Metrics


def hash_of(images: Any) -> str | None:
    """A hash of a data set's content: of shards, where their index has hashes of them; otherwise None."""
    while hasattr(images, "images"):
        images = images.images
    if not isinstance(images, ImageDataset):
        return None
    hashes = [shard.raw_data.hashes for shard in images.shards]
    return content_hash([{"raw_data": {"hashes": each}} for each in hashes]) if all(hashes) else None


def refer(
    metrics: Iterable[Metric], images: Dataset, place: str, image_size: int, device: str, known: dict[str, Reference]
) -> None:
    """Let Fréchet distances use the moments of these originals, if they are known. A collective call.

    Args:
        images: all that are evaluated.
        place: where they are; stands for them in this process where there is no hash of them.
        device: the kind of device, ``cpu`` or ``cuda``.
        known: see :meth:`rae.evaluation.frechet.FrechetDistance.refer`.
    """
    content = hash_of(images)
    data = json.dumps([content or place, image_size, device])
    for metric in metrics:
        if isinstance(metric, FrechetDistance):
            metric.refer(data, len(images), known, in_file=content is not None)  # type: ignore[arg-type]


@torch.no_grad()
def evaluate(
    rae: RAE,
    images: Dataset,
    metrics: Metrics,
    taus: Iterable[float] = (0.0,),
    batch_size: int = 32,
    workers: int = 0,
    title: str = "",
) -> dict[float, dict[str, float]]:
    """Reconstruct images, from latents with fixed noise of each level, and compute every metric over all ranks.

    Args:
        rae: in eval mode; the metrics go to its device.
        images: see :func:`rae.data.images.open_images`.
        metrics: by name; they are copied for each level.
        taus: noise levels; 0 is the clean latent.
        title: see :func:`batches`.

    Returns:
        figures by name, for each level.
    """
    device = next(rae.parameters()).device
    each = {tau: {name: metric.to(device) for name, metric in copy.deepcopy(metrics).items()} for tau in taus}
    for batch in batches(images, batch_size, workers, title):
        image = to_float(batch["image"].to(device))
        tokens = rae.clean_tokens(image)
        for tau, measured in each.items():
            recon = quantize(rae.decode(rae.latent_of(_noised(tokens, tau, batch["index"]))))
            for metric in measured.values():
                metric.update(recon, image)
    return {tau: {name: float(metric.compute()) for name, metric in measured.items()} for tau, measured in each.items()}


def _noised(tokens: Tensor, tau: float, index: Tensor) -> Tensor:
    return fixed_latent_noise(tokens, torch.full((len(tokens),), tau), index) if tau else tokens
