"""Tar files as sources of images, read where they are: WebDataset, ImageNet as it is downloaded, folders of images."""

import fnmatch
import functools
import glob
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from rae.config.errors import UserError, first_line
from rae.data.kinds import Aside, apart, is_image, why_not
from rae.data.labels import Classes
from rae.data.listing import Names, s3_client
from rae.survival.storage import RemoteFolder, is_remote, saying

_PEEK = 1000
"""Members that are looked at to tell what a tar file is."""


class Tars:
    """Images in tar files, whose places are looked up once.

    Files of one name and several suffixes are a sample of WebDataset, with its class in ``cls``. Otherwise the class is
    an image's folder, and a tar file in a tar file is a folder.

    Args:
        place: a tar file, a pattern (``{000..012}``, ``*``), several joined by ``::``; local or ``s3://``.
        caption: suffix of texts that belong to the images, such as txt or json.
        image_key, label_key: suffixes of a WebDataset's images and labels.
        are_folders: the tar files are folders of classes, as ImageNet's are.

    Raises:
        UserError: no such file, a damaged one, or no images.
    """

    def __init__(
        self,
        place: str,
        caption: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        are_folders: bool = False,
    ):
        self.tars, self.names, self.aside = expand(place), Names(), Aside()
        self.remote = any(map(is_remote, self.tars))
        self.are_folders, self.image_key, self.label_key, self.caption_key = (
            are_folders,
            image_key,
            label_key or "cls",
            caption,
        )
        labels = set()
        for number, tar in enumerate(self.tars):
            with saying(f"cannot read {tar}"):
                stamp = _stamp(tar)
                for name, image, label, text in self._samples(tar):
                    labels.add(label)
                    self.names.append(json.dumps([number, name, image, label, text]).encode(), stamp)
        self.names.close()
        if not len(self.names):
            raise self.aside.no_images(place)
        self.classes, self.number = self._classes(labels, place)
        self.fingerprint = self.names.hash.hexdigest()

    @functools.cached_property
    def _grouped(self) -> bool:
        """Whether they are WebDataset's: an image with a file of its name that is none."""
        with _open(self.tars[0]) as file:
            first = list(itertools.islice(_files(file, self.tars[0], Aside()), _PEEK))
        kinds: dict[str, set[bool]] = {}
        for name, _ in first:
            kinds.setdefault(_split(name)[0], set()).add(is_image(name))
        return any(len(found) == 2 for found in kinds.values())

    def _classes(self, labels: set[Any], place: str) -> tuple[list[str], Callable[[str | None], int]]:
        if labels == {"."} and not self._grouped:
            return [], lambda label: -1
        whole = self._grouped and all(re.fullmatch(r"-?\d+", label) for label in labels if label is not None)
        kind: Any = int if whole else str
        found = (kind(label) for label in labels if label is not None)
        classes = Classes(found, f"{self.label_key} in {place}", "give --no-labels")
        return classes.names, lambda label: -1 if label is None else classes.number(kind(label))

    def _samples(self, tar: str) -> Iterator[tuple[str, Any, str | None, Any]]:
        """(name, place of the image, label, place of the text) for each image; places are (offset, size)."""
        with _open(tar) as file:
            if self._grouped:
                yield from self._groups(file, tar)
                return
            above = f"{posixpath.basename(tar).removesuffix('.tar')}/" if self.are_folders else ""
            for name, place in _files(file, tar, self.aside):
                if reason := why_not(name):
                    self.aside.note(reason, name)
                else:
                    yield above + name, place, posixpath.dirname(above + name) or ".", None

    def _groups(self, file: BinaryIO, tar: str) -> Iterator[tuple[str, Any, str | None, Any]]:
        group_by_keys = _webdataset("tariterators").group_by_keys
        shown = _named(_files(file, tar, self.aside), self.aside)
        files = ({"fname": name, "data": place, "__url__": tar} for name, place in shown)
        try:
            for sample in group_by_keys(files):
                key = sample.pop("__key__")
                parts = {suffix: place for suffix, place in sample.items() if not suffix.startswith("__")}
                images = [suffix for suffix in parts if is_image(f"image.{suffix}")]
                images = [each for each in images if self.image_key in (None, each)]
                if len(images) > 1:
                    raise UserError(
                        f"{tar}: {key} holds several images: {', '.join(images)}; choose one with --image-key"
                    )
                for suffix in set(parts) - {*images, self.label_key, self.caption_key}:
                    self.aside.note(f".{suffix}", f"{key}.{suffix}")
                label = _text_at(file, parts[self.label_key]) or None if self.label_key in parts else None
                for suffix in images:
                    yield f"{key}.{suffix}", parts[suffix], label, parts.get(self.caption_key)
        except ValueError as error:
            raise UserError(f"{tar}: {first_line(error)}") from error

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """An image's name."""
        return json.loads(self.names[index])[1]

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        number, name, place, label, _ = json.loads(self.names[index])
        return name, _read(self.tars[number], *place), self.number(label)

    def caption(self, index: int, which: str) -> str:
        """The text that belongs to an image; '' where there is none."""
        number, _, _, _, place = json.loads(self.names[index])
        return _read(self.tars[number], *place).decode(errors="replace") if place else ""


def expand(place: str) -> list[str]:
    """The tar files that a pattern stands for.

    Raises:
        UserError: there are none, or compressed ones.
    """
    urls = _webdataset("shardlists").expand_urls(place) if "{" in place or "::" in place else [place]
    found = [
        each for url in urls for each in (_matching(url) if glob.has_magic(url) and not os.path.exists(url) else [url])
    ]
    if not found:
        raise UserError(f"no tar file is called {place!r}")
    for url in found:
        if is_remote(url) and not url.startswith("s3://"):
            raise UserError(f"{url!r}: tar files can be read from a local folder or from s3://")
        if not url.endswith(".tar"):
            raise UserError(f"{url!r} is no tar file that can be read in place; uncompressed ones, called .tar, can")
        if not is_remote(url) and not os.path.isfile(url):
            raise UserError(f"there is no file {url!r}")
    return found


def _matching(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    folder = pattern[: re.search(r"[*?[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    with saying(f"cannot list {folder}"):
        return sorted(
            url for name in RemoteFolder(folder).list() if fnmatch.fnmatch(url := f"{folder}/{name}", pattern)
        )


def _webdataset(module: str) -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise UserError("webdataset is not installed: pip install '.[webdataset]'") from error
    return getattr(webdataset, module)


def _split(name: str) -> tuple[str, str]:
    """(all before a file's first dot, the rest): WebDataset's key and suffix."""
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix


def _named(files: Iterator[tuple[str, Any]], aside: Aside) -> Iterator[tuple[str, Any]]:
    for name, place in files:
        reason = apart(name) or (None if _split(name)[1] else "without a suffix")
        if reason:
            aside.note(reason, name)
        else:
            yield name, place


def _files(file: BinaryIO, tar: str, aside: Aside, above: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (offset, size)) of the files in a tar file that begins here; those of a tar file in it, as in a folder."""
    for member in _members(file, tar):
        name = posixpath.join(above, posixpath.normpath(member.name).lstrip("/"))
        if not member.isreg() or member.issparse():
            if not member.isdir():
                aside.note("links or the like in tar files", name)
        elif name.endswith(".tar") and not apart(name):
            file.seek(member.offset_data)
            yield from _files(file, f"{tar}/{member.name}", aside, name.removesuffix(".tar"))
        else:
            yield name, (member.offset_data, member.size)


def _members(file: BinaryIO, tar: str) -> Iterator[tarfile.TarInfo]:
    try:
        opened = tarfile.TarFile(fileobj=file)
        while (member := opened.next()) is not None:
            opened.members.clear()  # type: ignore[attr-defined]  # millions would fill the memory
            yield member
    except tarfile.TarError as error:
        raise UserError(f"{tar} is damaged, or no tar file: {first_line(error)}") from error
    file.seek(opened.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # where tarfile would see the end of a sound one
        raise UserError(f"{tar} is cut off or damaged at byte {opened.offset:,}; fetch it again")


class _Object(io.RawIOBase):
    """An object in a bucket as a file: what is read of it alone is fetched."""

    def __init__(self, url: str):
        self.url, self.at = url, 0
        self.size = s3_client(os.getpid()).head_object(**_key(url))["ContentLength"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = _read(self.url, self.at, min(len(buffer), max(0, self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _key(url: str) -> dict[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _open(tar: str) -> Any:
    if not is_remote(tar):
        return open(tar, "rb")
    return io.BufferedReader(_Object(tar), 2**18)


def _stamp(tar: str) -> str:
    if is_remote(tar):
        head = s3_client(os.getpid()).head_object(**_key(tar))
        return f"{tar} {head['ContentLength']} {head['ETag']}"
    status = os.stat(tar)
    return f"{tar} {status.st_size} {status.st_mtime_ns}"


@functools.lru_cache(64)
def _local(tar: str) -> BinaryIO:
    return open(tar, "rb")


def _read(tar: str, offset: int, size: int) -> bytes:
    if size == 0:
        return b""
    if is_remote(tar):
        span = f"bytes={offset}-{offset + size - 1}"
        return s3_client(os.getpid()).get_object(**_key(tar), Range=span)["Body"].read()
    return os.pread(_local(tar).fileno(), size, offset)


def _text_at(file: BinaryIO, place: tuple[int, int]) -> str:
    file.seek(place[0])
    return file.read(min(place[1], 1000)).decode(errors="replace").strip()
