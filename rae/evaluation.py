"""Evaluating an autoencoder: every metric in one pass over the images, at every noise level, on one rank or several."""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics import Metric

from rae.config import rank, world_size
from rae.data import DataError, ImageDataset, start_worker
from rae.layers import fixed_latent_noise
from rae.metrics import Better, FrechetDistance, Metrics, Reference
from rae.model import RAE, quantize, to_float
from rae.registry import UserError
from rae.shards import content_hash


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
        known: see :meth:`rae.metrics.FrechetDistance.refer`.
    """
    content = hash_of(images)
    data = json.dumps([content or place, image_size, device])
    for metric in metrics:
        if isinstance(metric, FrechetDistance):
            metric.refer(data, len(images), known, in_file=content is not None)  # type: ignore[arg-type]


def batches(images: Dataset, batch_size: int, workers: int, title: str = "") -> Iterator[dict[str, Any]]:
    """This rank's part of the images: {image: uint8 (B, 3, S, S), index: (B,), label: (B,), name: B names}.

    Args:
        title: of the progress bar that the first rank shows on a terminal.

    Raises:
        UserError: an image that cannot be used.
    """
    count = len(images)  # type: ignore[arg-type]
    part = Subset(images, range(rank(), count, world_size()))
    loader = DataLoader(part, batch_size, num_workers=workers, worker_init_fn=start_worker)
    shown = title and rank() == 0 and os.isatty(2)
    try:
        yield from track(loader, title, disable=not shown, transient=True)
    except DataError as error:  # a worker process passes it on with its traceback
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[-1]) from None


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
        images: see :func:`rae.images.open_images`.
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


def better(metric: Metric) -> Better:
    """Which values of a metric are better; of torchmetrics' own, what they say themselves."""
    higher = getattr(metric, "higher_is_better", None)
    return getattr(metric, "better", None if higher is None else "higher" if higher else "lower")


def best(values: dict[str, float], which: Better) -> str | None:
    """The key of the best of several values; None where there is none, or nothing to choose from."""
    score = {"higher": lambda value: -value, "lower": lambda value: value, "near zero": abs}.get(which or "")
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    return min(known, key=lambda key: score(known[key])) if score and len(known) > 1 else None


def join_ranks() -> None:
    """Begin to work together with the other processes of this launch, if there are any.

    Raises:
        UserError: the launcher set some of what it takes, and not all.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except ValueError as error:
        raise UserError(f"cannot join the other ranks: {error}") from error
