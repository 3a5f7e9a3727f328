"""Image files in folders and buckets: listed without filling memory, and read."""

import errno
import functools
import os
import stat
import struct
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import Any

import xxhash

from rae.config.errors import UserError, first_line
from rae.data.kinds import Aside, apart, why_not
from rae.survival.storage import is_remote

IMAGE, ASIDE, EMPTY = "image", "aside", "empty"


class Names:
    """A growing list of file names that is kept on disk: a hundred million take no memory."""

    def __init__(self) -> None:
        self.names, self.ends = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - open as long as self
        self.hash, self.end, self.count = xxhash.xxh3_128(), 0, 0
        self.ends.write(struct.pack("<Q", 0))

    def append(self, name: bytes, stamp: str = "") -> None:
        """Add a name; ``stamp`` changes with the file's content."""
        self.names.write(name)
        self.end += len(name)
        self.ends.write(struct.pack("<Q", self.end))
        self.hash.update(name + b"\0" + stamp.encode() + b"\0")
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
        caption: suffix of text files that belong to the images.
    """

    remote = False

    def __init__(self, root: str, skip_empty_classes: bool = False, caption: str | None = None):
        self.root, self.names, self.aside = root, Names(), Aside()
        found, empty = set(), []
        for kind, name, said in self.list():
            if kind == IMAGE:
                self.names.append(name, said)
                found.add(os.path.dirname(name))
            elif kind == ASIDE and said != f".{caption}":
                self.aside.note(said, _text(name))
            elif kind == EMPTY:
                empty.append(_text(name))
        self.names.close()
        if not len(self.names):
            raise self.aside.no_images(root)
        if empty and not skip_empty_classes:
            raise UserError(
                f"{len(empty)} folder{'s' if len(empty) > 1 else ''} below {root!r} without images: "
                f"{', '.join(empty[:5])}; remove them, or leave them out with --skip-empty-classes"
                f"{'; ' * bool(self.aside.kinds)}{self.aside.line()}"
            )
        self.classes = sorted(_text(folder) or "." for folder in found)
        self.labels = {name: label for label, name in enumerate(self.classes)}
        self.fingerprint = self.names.hash.hexdigest()

    def list(self) -> Iterator[tuple[str, bytes, str]]:
        """(IMAGE, name, stamp) in order, (ASIDE, name, why it is passed over), and (EMPTY, folder, "")."""
        if not os.path.isdir(self.root):
            raise UserError(f"there is no folder {self.root!r}")
        yield from _walk(os.fsencode(self.root), b"", ())

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """An image's name, below ``root``."""
        return _text(self.names[index])

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        name = self.names[index]
        return _text(name), self.read(name), self.labels[_text(os.path.dirname(name)) or "."]

    def caption(self, index: int, which: str) -> str:
        """The text file beside an image: ``photo.txt`` of ``photo.jpg``; '' where there is none."""
        try:
            return self.read(os.path.splitext(self.names[index])[0] + b"." + which.encode()).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def read(self, name: bytes) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is none.
        """
        with open(os.path.join(os.fsencode(self.root), name), "rb") as file:
            return file.read()


class ImageBucket(ImageFolder):
    """The same in a bucket: every image below ``s3://bucket/folder``."""

    remote = True

    def __init__(self, root: str, skip_empty_classes: bool = False, caption: str | None = None):
        url = urllib.parse.urlparse(root)
        if url.scheme != "s3":
            raise UserError(f"{root!r}: images can be read from a local folder or from s3://")
        self.bucket, self.prefix = url.netloc, url.path.strip("/") + "/" if url.path.strip("/") else ""
        super().__init__(root, skip_empty_classes, caption)

    def list(self) -> Iterator[tuple[str, bytes, str]]:
        try:
            pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Contents", ()):
                    name = item["Key"][len(self.prefix) :]
                    if name.endswith("/") or not name:
                        continue  # what some programs make for a folder
                    reason = why_not(name)
                    stamp = f"{item['Size']} {item['ETag']}"
                    yield (ASIDE, os.fsencode(name), reason) if reason else (IMAGE, os.fsencode(name), stamp)
        except Exception as error:
            raise UserError(f"cannot list {self.root}: {first_line(error)}") from error

    def read(self, name: bytes) -> bytes:
        client, key = s3_client(os.getpid()), self.prefix + os.fsdecode(name)
        try:
            return client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{self.bucket}/{key}") from error


@functools.lru_cache(maxsize=1)
def s3_client(process: int) -> Any:
    """An S3 client of this process alone: a forked one must not share its parent's connections."""
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=32, retries={"mode": "standard", "max_attempts": 5})
    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)


def _text(name: bytes) -> str:
    """A file's name as text; bytes that are no UTF-8 are written out."""
    return name.decode("utf-8", "backslashreplace")


def _walk(root: bytes, folder: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, bytes, str]]:
    path = os.path.join(root, folder)
    itself = os.stat(path)
    if (itself.st_dev, itself.st_ino) in above:
        yield ASIDE, folder, "links to a folder above them"
        return
    above, holds = (*above, (itself.st_dev, itself.st_ino)), False
    with os.scandir(path) as listing:
        entries = sorted(((entry.name, _status(entry)) for entry in listing), key=_place_in_order)
    for base, status in entries:
        name, is_folder = os.path.join(folder, base), status is not None and stat.S_ISDIR(status.st_mode)
        reason = (apart if is_folder else why_not)(os.fsdecode(base))
        if status is None:
            yield ASIDE, name, "links that lead nowhere"
        elif reason:
            yield ASIDE, name, reason
        elif is_folder:
            holds = True
            yield from _walk(root, name, above)
        elif stat.S_ISREG(status.st_mode):
            holds = True
            yield IMAGE, name, f"{status.st_size} {status.st_mtime_ns}"
        else:
            yield ASIDE, name, "no files, such as pipes"
    if not holds:
        yield EMPTY, folder, ""


def _status(entry: os.DirEntry[bytes]) -> os.stat_result | None:
    """What an entry is, or leads to; None for a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError:
        if not entry.is_symlink():
            raise
        return None


def _place_in_order(entry: tuple[bytes, os.stat_result | None]) -> bytes:
    name, status = entry
    return name + b"/" * (status is not None and stat.S_ISDIR(status.st_mode))


def list_images(root: str, skip_empty_classes: bool = False, caption: str | None = None) -> ImageFolder:
    """An :class:`ImageFolder`, or an :class:`ImageBucket` for a URL."""
    return (ImageBucket if is_remote(root) else ImageFolder)(root, skip_empty_classes, caption)
