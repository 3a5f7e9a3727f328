"""Images from wherever they are: files in folders and buckets, listed and read, and data sets for evaluation."""

import functools
import os
import struct
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import xxhash
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, Subset

from rae.config.registry import UserError
from rae.config.sections import is_remote, rank, world_size
from rae.data.dataset import (
    BadSampleError,
    DataError,
    ImageDataset,
    IndexedImages,
    eval_transform,
    first_line,
    open_dataset,
    opening,
    start_worker,
)
from rae.data.shards import INDEX
from rae.survival.processes import of_first_rank
from rae.survival.storage import RemoteFolder, reason


class Names:
    """A growing list of file names that is kept on disk: a hundred million take no memory."""

    def __init__(self) -> None:
        self.names, self.ends = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - open as long as self
        self.hash, self.end, self.count = xxhash.xxh3_128(), 0, 0
        self.ends.write(struct.pack("<Q", 0))

    def append(self, name: bytes) -> None:
        self.names.write(name)
        self.end += len(name)
        self.ends.write(struct.pack("<Q", self.end))
        self.hash.update(name + b"\0")
        self.count += 1

    def close(self) -> None:
        """Make what was appended readable, also by processes forked from here."""
        self.names.flush()
        self.ends.flush()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes:
        begin, end = struct.unpack("<QQ", os.pread(self.ends.fileno(), 16, 8 * index))
        return os.pread(self.names.fileno(), end - begin, begin)


class ImageFolder:
    """Every image file below ``root``, at any depth; its class is the folder it is in (``.`` for root itself).

    Args:
        skip_empty_classes: leave out folders without images instead of refusing them.
        classes: number the classes so; by default as the folders sort.
    """

    remote = False

    def __init__(self, root: str, skip_empty_classes: bool = False, classes: list[str] | None = None):
        self.root, self.names, found, empty = root, Names(), set(), []
        for name, holds_images in self.list():
            if holds_images is None:
                self.names.append(name)
                found.add(os.path.dirname(name))
            elif not holds_images:
                empty.append(_text(name))
        self.names.close()
        if not len(self.names):
            raise UserError(f"there are no images below {root!r}")
        if empty and not skip_empty_classes:
            raise UserError(
                f"{len(empty)} folder{'s' if len(empty) > 1 else ''} below {root!r} without images: "
                f"{', '.join(empty[:5])}; remove them, or leave them out with --skip-empty-classes"
            )
        self.classes = classes or sorted(_text(folder) or "." for folder in found)
        self.labels = {name: label for label, name in enumerate(self.classes)}
        self.fingerprint = self.names.hash.hexdigest()

    def list(self) -> Iterator[tuple[bytes, bool | None]]:
        """(name, None) for each image, in order; (folder, whether it holds anything) for each folder."""
        if not os.path.isdir(self.root):
            raise UserError(f"there is no folder {self.root!r}")
        yield from _walk(os.fsencode(self.root), b"", ())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        name = self.names[index]
        return _text(name), self.read(name), self.labels[_text(os.path.dirname(name)) or "."]

    def read(self, name: bytes) -> bytes:
        """A file's content."""
        with open(os.path.join(os.fsencode(self.root), name), "rb") as file:
            return file.read()


class ImageBucket(ImageFolder):
    """The same in a bucket: every image below ``s3://bucket/folder``."""

    remote = True

    def __init__(self, root: str, *arguments: Any):
        url = urllib.parse.urlparse(root)
        if url.scheme != "s3":
            raise UserError(f"{root!r}: images can be read from a local folder or from s3://")
        self.bucket, self.prefix = url.netloc, url.path.strip("/") + "/" if url.path.strip("/") else ""
        super().__init__(root, *arguments)

    def list(self) -> Iterator[tuple[bytes, bool | None]]:
        try:
            pages = _client(os.getpid()).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Contents", ()):
                    name = item["Key"][len(self.prefix) :]
                    if is_image(name):
                        yield os.fsencode(name), None
        except Exception as error:
            raise UserError(f"cannot list {self.root}: {first_line(error)}") from error

    def read(self, name: bytes) -> bytes:
        reply = _client(os.getpid()).get_object(Bucket=self.bucket, Key=self.prefix + os.fsdecode(name))
        return reply["Body"].read()


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """An S3 client of this process alone: a forked one must not share its parent's connections."""
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=32, retries={"mode": "standard", "max_attempts": 5})
    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)


def _text(name: bytes) -> str:
    """A file's name as text; bytes that are no UTF-8 are written out."""
    return name.decode("utf-8", "backslashreplace")


@functools.cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(suffix for suffix, format in Image.EXTENSION.items() if format in Image.OPEN)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image (and not hidden)."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in _suffixes()


def _walk(root: bytes, folder: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[bytes, bool | None]]:
    path = os.path.join(root, folder)
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in above:
        return  # a link back to where we came from
    above, holds = (*above, (status.st_dev, status.st_ino)), False
    with os.scandir(path) as listing:
        entries = sorted((e for e in listing if not e.name.startswith(b".")), key=lambda e: e.name + b"/" * e.is_dir())
    for entry in entries:
        name = os.path.join(folder, entry.name)
        if entry.is_dir():
            holds = True
            yield from _walk(root, name, above)
        elif is_image(os.fsdecode(entry.name)) and entry.is_file():
            holds = True
            yield name, None
    yield folder, holds


def list_images(root: str, *arguments: Any) -> ImageFolder:
    """An :class:`ImageFolder`, or an :class:`ImageBucket` for a URL."""
    return ImageBucket(root, *arguments) if is_remote(root) else ImageFolder(root, *arguments)


class _OneImage:
    """A single image file as a source of one."""

    def __init__(self, path: str):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        folder, _, name = self.path.rpartition("/")
        if not is_remote(self.path):
            return name, Path(self.path).read_bytes(), -1
        with tempfile.TemporaryDirectory() as scratch:
            RemoteFolder(folder).download(name, Path(scratch, "image"))
            return name, Path(scratch, "image").read_bytes(), -1


class _Files(Dataset):
    """Image files as crops; see :func:`open_images`."""

    def __init__(self, source: ImageFolder | _OneImage, place: str, image_size: int, limit: int | None):
        self.source, self.place, self.transform = source, place, eval_transform(image_size)
        self.length = min(len(source), limit or len(source))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"number {index}"
        try:
            name, data, label = self.source[index]
            image = self.transform(data, Random())
        except Exception as error:
            raise DataError(f"{name} of {self.place} cannot be used: {first_line(error)}") from error
        return {"image": image, "label": label, "name": name, "index": index}


class _Shards(Dataset):
    """MDS shards as crops; see :func:`open_images`."""

    def __init__(self, images: ImageDataset, image_size: int, limit: int | None, cache: Any):
        self.images, self.image_size, self.cache = IndexedImages(images, limit), image_size, cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample = self.images[index]
        except BadSampleError as error:
            raise DataError(str(error)) from error
        if sample["image"].shape[1:] != (self.image_size, self.image_size):  # stored beside latents, as a crop
            side = sample["image"].shape[-1]
            raise DataError(
                f"{sample['name']} is stored as a crop of {side} pixels, where {self.image_size} are wanted"
            )
        return {key: sample[key] for key in ("image", "label", "name", "index")}


def open_images(path: str, image_size: int, cache: str | Path | None = None, limit: int | None = None) -> Dataset:
    """Images as ADM's centre crops: {image: uint8 (3, S, S), label (−1: none), name, index}.

    ``name`` is the file's path below ``path``, as it was when the shards were made; ``label`` the number of its class.
    Reading an item raises UserError, with the name in it, where there is no sound image.

    Args:
        path: MDS shards, a folder of image files at any depth, or one image file; local, or ``s3://…`` (shards also
            ``gs://``, ``oci://``, ``azure://``).
        image_size: the crop's side S.
        cache: folder for the shards of a remote data set; by default a temporary one. All ranks open it together.
        limit: the first so many only.

    Raises:
        UserError: there are no images there, or they cannot be read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    path = path.rstrip("/") or path[:1]
    if _holds_shards(path):
        return _open_shards(path, image_size, cache, limit)
    if is_image(path) and not os.path.isdir(path):
        if not is_remote(path) and not os.path.isfile(path):
            raise UserError(f"there is no image {path!r}")
        return _Files(_OneImage(path), path.rpartition("/")[0] or ".", image_size, limit)
    if os.path.isfile(path):
        raise UserError(f"{path!r} is no image of a known format")
    if _is_run(path):
        raise UserError(f"{path!r} is a run's folder, whose pictures are its own; give the images that it is to see")
    return _Files(list_images(path, True), path, image_size, limit)


def _holds_shards(path: str) -> bool:
    if not is_remote(path):
        _refuse_parent(path)
        return os.path.isfile(f"{path}/{INDEX}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            RemoteFolder(path).download(INDEX, Path(scratch, INDEX))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from error
    return True


def _refuse_parent(path: str) -> None:
    """Raise UserError for a folder of data sets, which would be listed as one of no images."""
    inside = sorted(str(index.parent) for index in Path(path).glob(f"*/{INDEX}"))
    if inside and not os.path.isfile(f"{path}/{INDEX}"):
        raise UserError(f"{path!r} is no data set, but holds some; give one: {', '.join(inside[:4])}")


def _is_run(path: str) -> bool:
    """Whether a folder is that of a training run, which holds its configuration."""
    try:
        return "\nrun_dir:" in "\n" + Path(path, "config.yaml").read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _open_shards(path: str, image_size: int, cache: str | Path | None, limit: int | None) -> Dataset:
    temporary = tempfile.TemporaryDirectory(prefix="rae-shards-") if cache is None and is_remote(path) else None
    local = of_first_rank(str(cache or (temporary.name if temporary else "")))  # Streaming wants the same on all
    with opening([local if is_remote(path) else path], f"cannot open {path!r}"):
        images = open_dataset(path, local, transform=eval_transform(image_size), seed=0)
    if any("image" not in shard.column_names for shard in images.shards):
        raise UserError(f"{path!r} holds latents without images")
    return _Shards(images, image_size, limit, temporary)


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
