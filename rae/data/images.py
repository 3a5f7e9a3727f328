"""Images for evaluation, from files, folders, buckets or shards alike; this rank's part of them in batches."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, Subset

from rae.config.errors import UserError, first_line
from rae.data.dataset import ImageDataset, open_dataset
from rae.data.decoding import Transform, eval_transform
from rae.data.formats import open_image
from rae.data.kinds import is_image
from rae.data.listing import ImageFolder, list_images
from rae.data.loaders import start_worker
from rae.data.pixels import Background
from rae.data.reader import BadSampleError, DataError
from rae.data.shards import INDEX
from rae.survival.processes import of_first_rank, opening, rank, world_size
from rae.survival.storage import is_remote, on_disk


class _OneImage:
    """A single image file as a source of one."""

    def __init__(self, path: str):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        with tempfile.TemporaryDirectory() as scratch:
            file = on_disk(self.path, Path(scratch, "image"))
            if file is None:
                raise FileNotFoundError("it does not exist")
            return self.path.rpartition("/")[2], file.read_bytes(), -1


class _Files(Dataset):
    """Image files as crops; see :func:`open_images`."""

    def __init__(self, source: ImageFolder | _OneImage, place: str, transform: Transform):
        self.source, self.place, self.transform = source, place, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"number {index}"
        try:
            name, data, label = self.source[index]
            image = self.transform(data, Random())
        except Exception as error:
            raise DataError(f"{name} of {self.place} cannot be used: {first_line(error)}") from error
        return {"image": image, "label": label, "name": name, "index": index}

    def short_side(self) -> int:
        return _short_side_of(self.source[0][1])


class _Shards(Dataset):
    """MDS shards as crops; see :func:`open_images`."""

    def __init__(self, dataset: ImageDataset, image_size: int, cache: Any):
        self.dataset, self.image_size, self.cache = dataset, image_size, cache

    def __len__(self) -> int:
        return self.dataset.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample = self.dataset[index]
        except BadSampleError as error:
            raise DataError(str(error)) from error
        if sample["image"].shape[1:] != (self.image_size, self.image_size):  # stored beside latents, as a crop
            side = sample["image"].shape[-1]
            raise DataError(
                f"{sample['name']} is stored as a crop of {side} pixels, where {self.image_size} are wanted"
            )
        return {key: sample[key] for key in ("image", "label", "name", "index")}

    def short_side(self) -> int:
        return _short_side_of(self.dataset.stored(0)["image"])


def open_images(
    path: str,
    image_size: int,
    cache: str | Path | None = None,
    limit: int | None = None,
    background: Background = "black",
) -> Dataset:
    """Images as ADM's centre crops: {image: uint8 (3, S, S), label (−1: none), name, index}.

    ``name`` is the file's path below ``path``, as it was when the shards were made; ``label`` the number of its class.
    Reading an item raises UserError, with the name in it, where there is no sound image.

    Args:
        path: MDS shards, a folder of image files at any depth, or one image file; local, or ``s3://…`` (shards also
            ``gs://``, ``oci://``, ``azure://``).
        image_size: the crop's side S.
        cache: folder for the shards of a remote data set; by default a temporary one. All ranks open it together.
        limit: the first so many only.
        background: what is seen where an image is transparent.

    Raises:
        UserError: there are no images there, or they cannot be read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    images = _open(path.rstrip("/") or path[:1], image_size, cache, eval_transform(image_size, background))
    return Subset(images, range(min(limit, len(images)))) if limit else images


def _open(path: str, image_size: int, cache: str | Path | None, transform: Transform) -> _Files | _Shards:
    if _holds_shards(path):
        return _open_shards(path, image_size, cache, transform)
    if is_image(path) and not os.path.isdir(path):
        if not is_remote(path) and not os.path.isfile(path):
            raise UserError(f"there is no image {path!r}")
        return _Files(_OneImage(path), path.rpartition("/")[0] or ".", transform)
    if os.path.isfile(path):
        raise UserError(f"{path!r} is no image of a known format")
    if _is_run(path):
        raise UserError(f"{path!r} is a run's folder, whose pictures are its own; give the images that it is to see")
    return _Files(list_images(path, True), path, transform)


def _holds_shards(path: str) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        if on_disk(f"{path}/{INDEX}", Path(scratch, INDEX)):
            return True
    inside = sorted(str(index.parent) for index in Path(path).glob(f"*/{INDEX}"))  # none of a URL
    if inside:  # it would be listed as a folder without images
        raise UserError(f"{path!r} is no data set, but holds some; give one: {', '.join(inside[:4])}")
    return False


def _is_run(path: str) -> bool:
    """Whether a folder is that of a training run, which holds its configuration."""
    try:
        return "\nrun_dir:" in "\n" + Path(path, "config.yaml").read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _open_shards(path: str, image_size: int, cache: str | Path | None, transform: Transform) -> _Shards:
    temporary = tempfile.TemporaryDirectory(prefix="rae-shards-") if cache is None and is_remote(path) else None
    local = of_first_rank(str(cache or (temporary.name if temporary else "")))  # Streaming wants the same on all
    with opening([local if is_remote(path) else path], f"cannot open {path!r}"):
        images = open_dataset(path, local, transform=transform, seed=0)
    if any("image" not in shard.roles.values() for shard in images.shards):
        raise UserError(f"{path!r} holds latents without images")
    return _Shards(images, image_size, temporary)


def short_side(images: Dataset) -> int:
    """Of the first image, as it is stored, in pixels."""
    while isinstance(images, Subset):
        images = images.dataset
    try:
        return images.short_side()  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return int(images[0]["image"].shape[1])  # which names an image that does not decode


def _short_side_of(data: bytes | np.ndarray) -> int:
    return min(data.shape[-2:]) if isinstance(data, np.ndarray) else min(open_image(data).size)


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
    try:
        yield from with_bar(loader, title) if title else loader
    except DataError as error:
        raise DataError(error.line) from None


def with_bar(items: Iterable[Any], title: str, count: int | None = None) -> Iterable[Any]:
    """The same items, with a progress bar where the first rank's standard error is a terminal.

    Args:
        count: of the items, which may have no length.
    """
    if rank() != 0 or not os.isatty(2):
        return items
    return track(items, title, count, console=Console(stderr=True), transient=True)
