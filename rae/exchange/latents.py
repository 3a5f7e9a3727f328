"""Precomputed latents: a data set through the frozen encoder once, as MDS shards, with their statistics."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from streaming.base.format.mds.encodings import get_mds_encoded_size
from streaming.base.util import bytes_to_int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.layers import Frozen
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import Config, Model
from rae.data.dataset import Batcher, ImageDataset, content_of, indexed, open_dataset
from rae.data.decoding import eval_transform
from rae.data.images import batches, with_bar
from rae.data.labels import MOST
from rae.data.loaders import start_worker
from rae.data.parts import Job, Options, PartWriter, finish
from rae.data.shards import RECORDS, Place, class_names
from rae.diffusion.model import open_autoencoder
from rae.exchange.places import local_file
from rae.survival.processes import barrier, of_first_rank, opening, rank, world_size
from rae.survival.storage import is_remote

STATS = "stat.pt"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED = {"bf16": "uint16", "fp16": "float16", "fp32": "float32"}


class Moments:
    """Count, mean and summed squared deviations of samples (C, h, w), in double precision.

    Parts are merged by the formula of Chan, Golub and LeVeque (1979), which does not cancel: the result does not
    depend on how the samples were divided, nor on their order.
    """

    def __init__(self, count: int = 0, mean: Tensor | float = 0.0, m2: Tensor | float = 0.0):
        self.count, self.mean, self.m2 = count, mean, m2

    def add(self, batch: Tensor) -> None:
        """Take in a batch (B, C, h, w)."""
        batch = batch.double()
        mean = batch.mean(0)
        self.merge(Moments(len(batch), mean, (batch - mean).square().sum(0)))

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen."""
        if other.count == 0:
            return
        count = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        self.count = count

    def on_cpu(self) -> "Moments":
        """The same, in this machine's memory."""
        return Moments(self.count, torch.as_tensor(self.mean).cpu(), torch.as_tensor(self.m2).cpu())

    def statistics(self) -> dict[str, Tensor]:
        """{mean, var}: float32 (C, h, w), the variance over all samples (divided by their count)."""
        return {"mean": torch.as_tensor(self.mean).float(), "var": (torch.as_tensor(self.m2) / self.count).float()}


def write_latents(
    config: Config,
    options: Options,
    split: str = "train",
    dtype: str = "bf16",
    with_images: bool = False,
    batch_size: int = 64,
    flips: bool = False,
) -> dict[str, Any]:
    """Encode the centre crops of a run's data, in order, and write columns latent (C, h, w) and label.

    bf16 latents are stored as uint16, which NumPy knows. Every rank encodes a part of the data; what a part's record
    says is done is not done again. ``stat.pt`` beside the shards holds mean and var (C, h, w), as the published one.

    Args:
        config: its encoder, or that of a generator's autoencoder; ``data.image_size``, and the paths of ``data.train``
            or ``data.eval``.
        options: out, shard_size, compression, hashes and overwrite are used.
        split: ``train`` or ``eval``.
        with_images: store the crops too, as uint8 (3, S, S), so that a decoder can be trained without its encoder.
        flips: store each image's mirror image after it, as a sample of its own: a latent cannot be flipped.

    Returns:
        what ``dataset.json`` holds; among its options ``error``, the root mean square of what ``dtype`` changes, over
        that of the latents.

    Raises:
        UserError: no such data, or an output that exists.
    """
    began, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    images = _open(config, split)
    encoder, named = _encoder(config)
    encoder = encoder.to(device)
    columns = _columns(encoder.network, dtype, config.data.image_size if with_images else None)
    content = {**options.content(), **named, "image_size": config.data.image_size}
    content |= {"split": split, "dtype": dtype, "with_images": with_images, **({"flips": True} if flips else {})}
    job = _begin(images, options, content, columns, 1 + flips)
    mine = [part for part in job.parts() if part % world_size() == rank() and job.done(part) is None]
    loader = _loader(images, job, mine, batch_size, config.data.workers)
    for part in with_bar(mine, "encoding"):
        _write_part(job, part, columns, encoder, loader, DTYPES[dtype], device, flips)
    barrier()
    summary = (
        _finish(job, getattr(config.data, split).path, content, time.perf_counter() - began) if rank() == 0 else {}
    )
    barrier()
    return summary


def _encoder(config: Config) -> tuple[Frozen, dict[str, Any]]:
    """The encoder, and what the data set's record says of it."""
    if isinstance(config.model, Model) or "diffusion" not in config.model:
        entry = config.autoencoder.encoder
        return Frozen(build("encoder", entry, "model.encoder")), {"encoder": entry}
    named = config.model["diffusion"]["autoencoder"]
    encoder = open_autoencoder(named, config.data.image_size).encoder
    return encoder, {"autoencoder": named}


def _open(config: Config, split: str) -> ImageDataset:
    source = getattr(config.data, split)
    if source is None or source.path is None:
        raise UserError(f"data.{split}.path: there is none, so there is nothing to encode")
    cache = source.cache or f"{config.run_dir}/cache/{split}"
    transform = eval_transform(config.data.image_size, config.data.background)
    with opening([cache if is_remote(source.path) else source.path], f"data.{split}.path: cannot open {source.path!r}"):
        return open_dataset(source.path, cache, transform=transform, seed=0)


def _columns(encoder: Encoder, dtype: str, image_size: int | None) -> dict[str, str]:
    columns = {"latent": f"ndarray:{_STORED[dtype]}:{encoder.embed_dim},{encoder.grid},{encoder.grid}", "label": "int"}
    if image_size is not None:
        columns["image"] = f"ndarray:uint8:3,{image_size},{image_size}"
    return columns


def _begin(
    images: ImageDataset, options: Options, content: dict[str, Any], columns: dict[str, str], samples: int
) -> Job:
    place = Place(options.out)
    fitting = bytes_to_int(options.shard_size) // (samples * _sample_bytes(columns))
    part = max(1, min(fitting, -(-images.size // 16)))
    plan: Any = None
    if rank() == 0:
        try:
            source = f"{images.streams[0].remote or images.streams[0].local} {content_of(images.shards)}"
            plan = place.begin({"source": source, "options": content, "part": part}, options.overwrite)
        except UserError as error:
            plan = error
    plan = of_first_rank(plan)
    if isinstance(plan, UserError):
        raise plan
    return Job(images, options, place, 0, images.size, plan["part"], plan["resumed"])


def _sample_bytes(columns: dict[str, str]) -> int:
    return sum(get_mds_encoded_size(encoding) or 0 for encoding in columns.values())


def _loader(images: ImageDataset, job: Job, parts: list[int], batch_size: int, workers: int) -> Iterator[Any]:
    batches = [
        list(positions[i : i + batch_size])
        for positions in map(job.positions, parts)
        for i in range(0, len(positions), batch_size)
    ]
    loader = DataLoader(
        indexed(images),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=Batcher(batch_size),
        worker_init_fn=start_worker,
    )
    return iter(loader)


def _write_part(
    job: Job,
    part: int,
    columns: dict[str, str],
    encoder: Frozen,
    batches: Iterator[Any],
    dtype: torch.dtype,
    device: str,
    flips: bool,
) -> None:
    moments, counts, left = Moments(), dict[int, int](), len(job.positions(part))
    lost = torch.zeros(2, dtype=torch.float64)
    with PartWriter(job, part, columns) as writer:
        while left:
            batch = next(batches)
            left -= len(batch["label"])
            images = [batch["image"], batch["image"].flip(3)] if flips else [batch["image"]]
            latents = [_encode(encoder, image.to(device)) for image in images]
            rounded = [latent.to(dtype).cpu() for latent in latents]
            for latent, stored in zip(latents, rounded, strict=True):
                moments.add(latent)
                exact = latent.cpu().double()
                lost += torch.stack([(stored.double() - exact).square().sum(), exact.square().sum()])
            rows = [each.view(torch.uint16) if dtype == torch.bfloat16 else each for each in rounded]
            for number, label in enumerate(batch["label"].tolist()):
                for row, image in zip(rows, images, strict=True):
                    sample = {"latent": row[number].numpy(), "label": label}
                    crop = {"image": image[number].contiguous().numpy()} if "image" in columns else {}
                    writer.write(sample | crop)
                    counts[label] = counts.get(label, 0) + 1
        file = Path(writer.folder.name, STATS)
        torch.save(vars(moments), file)
        job.place.move(file, f"{RECORDS}/{part:06}.pt")
        size = sum(counts.values()) * _sample_bytes(columns)
        writer.finish(counts=counts, bytes=size, skipped=[], lost=lost.tolist())


@torch.no_grad()
def _encode(encoder: Frozen, image: Tensor) -> Tensor:
    tokens = encoder(image.float() / 255)
    grid = encoder.network.grid
    return tokens.transpose(1, 2).reshape(len(tokens), -1, grid, grid)


@torch.no_grad()
def latent_statistics(
    encoder: Encoder, images: Dataset, batch_size: int = 64, workers: int = 0, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], int]:
    """Mean and variance of the latents of images, exactly: over all ranks, whatever the batches and their order.

    The latents are the encoder's own: clean, and before any statistics are applied.

    Args:
        images: see :func:`rae.data.images.open_images`.

    Returns:
        {mean, var}: float32 (C, h, w), the published layout; and how many images they are of.
    """
    frozen, moments = Frozen(encoder).to(device), Moments()
    for batch in batches(images, batch_size, workers, "encoding"):
        moments.add(_encode(frozen, batch["image"].to(device)))
    if dist.is_initialized():
        parts = [Moments()] * world_size()
        dist.all_gather_object(parts, moments.on_cpu())
        moments = Moments()
        for part in parts:
            moments.merge(part)
    return moments.on_cpu().statistics(), moments.count


def _finish(job: Job, source: str, content: dict[str, Any], seconds: float) -> dict[str, Any]:
    moments = Moments()
    records = [job.place.read(f"{RECORDS}/{part:06}.json") for part in job.parts()]
    changed, whole = (sum(record.get("lost", (0, 0))[i] for record in records) for i in range(2))
    content = {**content, "error": (changed / whole) ** 0.5 if whole else 0.0}
    with tempfile.TemporaryDirectory(dir=job.place.scratch(), prefix="part-") as folder:
        for part in job.parts():
            file = local_file(f"{job.place.here}/{RECORDS}/{part:06}.pt", Path(folder))
            moments.merge(Moments(**torch.load(file)))
        torch.save(moments.statistics(), Path(folder, STATS))
        job.place.move(Path(folder, STATS), STATS)
    return finish(job.place, records, _names(source, records), content, seconds)


def _names(source: str, records: list[dict[str, Any]]) -> list[str]:
    """What labels are called: what the images' data set says, or their numbers where a list can hold them."""
    count = 1 + max(int(label) for record in records for label in record["counts"])
    known = class_names([source])
    return known if len(known) >= count else [str(label) for label in range(count if count <= MOST else 0)]
