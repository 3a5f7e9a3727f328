"""Buckets, as far as checkpoints need them: list, upload, download, delete, and errors that say what to do.

The stores themselves are Composer's (``s3://``, ``gs://``, ``oci://``, ``azure://``).
"""

import contextlib
import errno
import functools
import importlib
import os
import posixpath
import re
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rae.config.errors import UserError

_CLIENTS = {  # scheme: our extra of that name, and what Composer and Streaming import for it
    "gs": ("gcs", "google.cloud.storage"),
    "oci": ("oci", "oci"),
    "azure": ("azure", "azure.storage.blob"),
}
# S3: an unreachable server is to be found in seconds; uploads are tried again above this.
_S3_CLIENT = {"connect_timeout": 5, "read_timeout": 30, "retries": {"mode": "standard", "max_attempts": 3}}
_S3_SETTINGS = [f"AWS_{name}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE")]
_S3_SETTINGS += ["AWS_DEFAULT_REGION", "S3_ENDPOINT_URL"]
_DELETABLE = ("s3", "gs")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = "it does not exist"
_REASONS = {  # what S3's servers and boto3 say -> what that means to the user
    "NoSuchBucket": "there is no such bucket; create it, or mend the name",
    "InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|ExpiredToken|AuthFailure": (
        "wrong credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ),
    "AccessDenied|Forbidden|403": "these credentials have no permission for it",
    "Unable to locate credentials|PartialCredentials": (
        "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    ),
    "Could not connect|Connect timeout|Connection refused|EndpointConnectionError|Name or service not known": (
        "the server does not answer; check S3_ENDPOINT_URL and the network"
    ),
    "Invalid endpoint": "S3_ENDPOINT_URL must be a URL such as http://host:port",
    "404|Not Found|NoSuchKey|not found": GONE,
}


def reason(error: BaseException) -> str:
    """One line that says what a store's error means."""
    text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    for pattern, meaning in _REASONS.items():
        if re.search(rf"\b({pattern})", text):
            return meaning
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def saying(fault: str) -> Iterator[None]:
    """A store's errors in here are the user's to mend, in a line: ``fault``, and what the error means."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{fault}: {reason(error)}") from error


def can_delete(url: str) -> bool:
    """Whether objects of this kind of store can be deleted here."""
    return urlparse(url).scheme in _DELETABLE


class RemoteFolder:
    """A folder of a bucket; names are relative to it.

    Args:
        url: ``s3://bucket/folder`` and the like.

    Raises:
        UserError: an unknown kind of URL, or a client that cannot be made.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        parts = urlparse(self.url)
        self.prefix = f"{parts.path.strip('/')}/" if parts.path.strip("/") else ""
        if parts.scheme not in ("s3", "gs", "oci", "azure"):
            raise UserError(f"{url}: {parts.scheme}:// is no known kind of storage; s3, gs, oci and azure are")
        _check_client(parts.scheme, url)
        settings = map(os.environ.get, _S3_SETTINGS)
        with saying(self.url):
            self.store = _store(parts.scheme, parts.netloc, threading.get_native_id(), *settings)

    def list(self) -> list[str]:
        """Names of all objects below the folder."""
        return [key.removeprefix(self.prefix) for key in self.store.list_objects(self.prefix)]

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file to ``name``, replacing what is there."""
        self.store.upload_object(f"{self.prefix}{name}", str(path))

    def download(self, name: str, path: Path) -> None:
        """Copy ``name`` to a local file, replacing what is there.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self.store.download_object(f"{self.prefix}{name}", str(path), overwrite=True)

    def size(self, name: str) -> int:
        """The bytes of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self.store.get_object_size(f"{self.prefix}{name}")

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of an object, without the rest where the store can."""
        if urlparse(self.url).scheme == "s3":
            key, span = f"{self.prefix}{name}", f"bytes=0-{count - 1}"
            return self.store.client.get_object(Bucket=self.store.bucket, Key=key, Range=span)["Body"].read()
        with tempfile.TemporaryDirectory() as folder:
            self.download(name, Path(folder, "whole"))
            with Path(folder, "whole").open("rb") as file:
                return file.read(count)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; see :func:`can_delete`."""
        for name in names:
            key = f"{self.prefix}{name}"
            if urlparse(self.url).scheme == "s3":
                self.store.client.delete_object(Bucket=self.store.bucket, Key=key)
            else:
                self.store.bucket.blob(key).delete()

    def check_writable(self, where: str) -> None:
        """Write a small object and read it again, so that a fault shows before training and not at its first save.

        Args:
            where: the configuration's key, for the message.

        Raises:
            UserError: what is wrong, in a line.
        """
        name = f".preflight-{secrets.token_hex(4)}" if can_delete(self.url) else ".preflight"
        with tempfile.TemporaryDirectory() as folder:
            written, read = Path(folder, "written"), Path(folder, "read")
            written.write_bytes(os.urandom(16))
            with saying(f"{where}: cannot write to {self.url}"):
                self.upload(written, name)
            with saying(f"{where}: can write to {self.url} but not read"):
                self.download(name, read)
            if read.read_bytes() != written.read_bytes():
                raise UserError(f"{where}: {self.url} gives back other bytes than were written")
        if can_delete(self.url):
            with contextlib.suppress(Exception):  # some may write and not delete
                self.delete([name])

    def check_readable(self, name: str, where: str) -> None:
        """Read one object.

        Raises:
            UserError: what is wrong, in a line.
        """
        with tempfile.TemporaryDirectory() as folder, saying(f"{where}: cannot read {self.url}/{name}"):
            self.download(name, Path(folder, "read"))


def on_disk(path: str, local: Path) -> Path | None:
    """Where a file, local or a URL, is on this disk: itself, or downloaded to ``local``; None if there is no such file.

    Raises:
        UserError: the store cannot be reached, or refuses.
    """
    if not is_remote(path):
        return Path(path) if os.path.isfile(path) else None
    folder, _, name = path.rpartition("/")
    with saying(f"cannot read {path}"), contextlib.suppress(FileNotFoundError):
        RemoteFolder(folder).download(name, local)
        return local
    return None


@contextlib.contextmanager
def written(out: str, where: str) -> Iterator[Path]:
    """A path to write to; what is there at the context's end becomes the file ``out``, wholly or not at all.

    Args:
        out: local or a URL; that it can be written is checked at once.
        where: what the user calls it, for messages.

    Raises:
        UserError: it cannot be written.
    """
    folder, _, name = out.rpartition("/")
    if not name or os.path.isdir(out):
        raise UserError(f"{where}: {out!r} is a folder; give a file's name")
    fault = f"{where}: cannot write {out}"
    if is_remote(out):
        remote = RemoteFolder(folder)
        remote.check_writable(where)
        with tempfile.TemporaryDirectory(prefix="rae-") as scratch:
            yield Path(scratch, name)
            with saying(fault):
                remote.upload(Path(scratch, name), name)
        return
    with _scratch_beside(Path(out), fault) as beside:
        yield beside / name
        os.replace(beside / name, out)


@contextlib.contextmanager
def filled(place: Path, fault: str, replace: bool) -> Iterator[Path]:
    """A folder to fill, which becomes ``place`` at the context's end, wholly or not at all.

    Args:
        place: a local folder.
        fault: what a message about a failed write begins with.
        replace: what is in ``place`` by then; otherwise that is an error.

    Raises:
        UserError: it cannot be written.
    """
    with _scratch_beside(place, fault) as scratch:
        folder = scratch / "out"
        folder.mkdir()
        yield folder
        if replace and place.exists():
            place.rename(scratch / "before")
        folder.rename(place)


@contextlib.contextmanager
def _scratch_beside(place: Path, fault: str) -> Iterator[Path]:
    """A folder on the disk of ``place``; errors of writing into it, and of no other kind, are the user's to mend."""
    place = place.absolute()
    try:
        with contextlib.suppress(FileExistsError):  # be it a folder or not
            place.parent.mkdir(parents=True)
        made = tempfile.TemporaryDirectory(prefix=".rae-", dir=place.parent)
    except OSError as error:
        raise UserError(f"{fault}: {error.strerror}") from error
    with made as scratch:
        try:
            yield Path(scratch)
        except OSError as error:
            inside = any(str(name).startswith(scratch) for name in (error.filename, error.filename2))
            full = error.filename is None and error.errno in _FULL  # a write to an open file fails without its name
            if not inside and not full:
                raise
            raise UserError(f"{fault}: {error.strerror}") from error


@functools.lru_cache(8)
def _store(scheme: str, bucket: str, thread: int, *settings: str | None) -> Any:
    """A client, which takes tenths of a second to make. Other threads, forked processes and settings have their own."""
    from composer.utils import S3ObjectStore, maybe_create_object_store_from_uri  # heavy: only when there is a bucket

    if scheme == "s3":
        return S3ObjectStore(bucket, client_config=dict(_S3_CLIENT))
    return maybe_create_object_store_from_uri(f"{scheme}://{bucket}")


def _check_client(scheme: str, url: str) -> None:
    extra, module = _CLIENTS.get(scheme, ("", "boto3"))
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{url}: the client for {scheme}:// is not installed: pip install -e '.[{extra}]'") from error


def is_remote(path: str) -> bool:
    """Whether a path is a URL (``s3://…``) rather than a local one."""
    return "://" in path


def canonical(path: str) -> str:
    """The one spelling of a place: local without links, ``~`` and dots; a URL without doubled slashes and dots."""
    if not is_remote(path):
        return os.path.realpath(os.path.expanduser(path))
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme.lower()}://{bucket.lower()}{posixpath.normpath('/' + key.lstrip('/'))}".rstrip("/")


def same_place(one: str, other: str) -> bool:
    """Whether two paths lead to the same file or folder, however they are spelled."""
    if canonical(one) == canonical(other):
        return True
    with contextlib.suppress(OSError):  # a mount can show a folder twice, and a disk can ignore case
        return os.path.samefile(os.path.expanduser(one), os.path.expanduser(other))
    return False
