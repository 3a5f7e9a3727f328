"""Image files in folders and buckets: listed without filling memory, and read."""

import functools
import os
import struct
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import Any

import xxhash
from PIL import Image

from rae.config.errors import UserError, first_line
from rae.survival.storage import is_remote


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
    """

    remote = False

    def __init__(self, root: str, skip_empty_classes: bool = False):
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
        self.classes = sorted(_text(folder) or "." for folder in found)
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

    def __init__(self, root: str, skip_empty_classes: bool = False):
        url = urllib.parse.urlparse(root)
        if url.scheme != "s3":
            raise UserError(f"{root!r}: images can be read from a local folder or from s3://")
        self.bucket, self.prefix = url.netloc, url.path.strip("/") + "/" if url.path.strip("/") else ""
        super().__init__(root, skip_empty_classes)

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


def list_images(root: str, skip_empty_classes: bool = False) -> ImageFolder:
    """An :class:`ImageFolder`, or an :class:`ImageBucket` for a URL."""
    return (ImageBucket if is_remote(root) else ImageFolder)(root, skip_empty_classes)
