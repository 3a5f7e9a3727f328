"""MDS shards read sample by sample, without Streaming's costs; shards that are damaged."""

import inspect
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.world import World

from rae.config.errors import RankError, UserError, first_line
from rae.data import kinds  # noqa: F401 - registers what decodes them
from rae.data.columns import harmless, read, roles
from rae.survival.processes import one_at_a_time
from rae.survival.storage import GONE, reason


class DataError(RankError):
    """Training data that cannot be read."""

    @property
    def line(self) -> str:
        """Its message, also where a worker process has passed it on with its traceback before it."""
        return str(self).strip().splitlines()[-1].rpartition("DataError: ")[-1]


class AbsentError(OSError):
    """A shard that is nowhere. The message names it."""


class _GoneError(BaseException):
    """What Streaming does not take for a reason to try again."""


RESTORE = "restore it or convert again"


class BadSampleError(RuntimeError):
    """A sample that does not decode. The message names its file, its place and the reason."""


@contextmanager
def about(name: str) -> Iterator[None]:
    """Put a name before what users are told of in here."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


class Reader(MDSReader):
    """A shard of any writer whose samples hold what is read here: image (file bytes), label, path, latent.

    Bytes come as views of one buffer. Whatever reads shards or their index makes these, so that none reads a column
    that can run code.

    Raises:
        UserError: there is such a column, or a file outside the data set's folder.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.columns = harmless(self.column_names, self.column_encodings)
        for info in filter(None, (self.raw_data, self.zip_data)):
            if os.path.isabs(info.basename) or ".." in Path(info.basename).parts:
                raise UserError(f"the shard {info.basename!r} is not in the data set's folder")

    @classmethod
    def of(cls, shard: Any) -> "Reader":
        """The same shard."""
        if not isinstance(shard, MDSReader):
            raise UserError(f"shards of this format are not read ({type(shard).__name__}); MDS is")
        fields = list(inspect.signature(MDSReader).parameters)
        return cls(**{name: getattr(shard, name) for name in fields})

    @cached_property
    def path(self) -> str:
        """The shard's file, as it is read."""
        return os.path.join(self.dirname, self.split, self.raw_data.basename)

    @cached_property
    def roles(self) -> dict[str, str]:
        """See :func:`rae.data.columns.roles`."""
        return roles(self.columns)

    @cached_property
    def _columns(self) -> list[tuple[str, str, int | None]]:
        names = (self.roles.get(name, "") for name in self.column_names)
        return list(zip(names, self.column_encodings, self.column_sizes, strict=True))

    @cached_property
    def _widths(self) -> struct.Struct:
        return struct.Struct(f"<{self.column_sizes.count(None)}I")

    def get_item(self, idx: int) -> dict[str, Any]:
        file = os.open(self.path, os.O_RDONLY)
        try:
            begin, end = struct.unpack("<II", os.pread(file, 8, 4 + 4 * idx))
            data = memoryview(bytearray(max(0, end - begin)))
            if not data or os.preadv(file, [data], begin) != len(data):
                raise BadSampleError(f"number {idx} in {self.path} is cut off")
        except struct.error as error:
            raise BadSampleError(f"{self.path} ends before number {idx}") from error
        finally:
            os.close(file)
        sample, role = {}, ""
        try:
            widths, start = iter(self._widths.unpack_from(data)), self._widths.size
            for role, encoding, size in self._columns:
                value = data[start : (start := start + (size or next(widths)))]
                if role:
                    sample[role] = read(role, encoding, value, "latent" in self.columns)
        except Exception as error:
            raise BadSampleError(f"number {idx} in {self.path}: {role} cannot be read: {first_line(error)}") from error
        return sample


class ImageStream(Stream):
    """A data set, or a part of a mixture, of MDS shards. Arguments are those of :class:`streaming.Stream`."""

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:
        with about(f"{self.remote or self.local}/index.json"):
            return [Reader.of(shard) for shard in super().get_shards(world, True)]  # what is unsafe, Reader says

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Streaming would try again for minutes, also where there is nothing to download, or nowhere to do it from."""
        if self.remote is None:
            raise AbsentError(f"{os.path.join(self.local, self.split, from_basename)} is absent; {RESTORE}")
        download = self._downloader.download

        def once_if_gone(*args: Any) -> Any:
            try:
                return download(*args)
            except Exception as error:
                if reason(error) == GONE:
                    raise _GoneError from error
                raise

        self._downloader.download = once_if_gone  # type: ignore[method-assign]
        try:
            return super()._download_file(from_basename, to_basename)
        except _GoneError as error:
            raise AbsentError(f"{self.remote}/{from_basename} is absent; {RESTORE}") from error
        finally:
            self._downloader.download = download  # type: ignore[method-assign]


@contextmanager
def _leaving(it: Any) -> Iterator[None]:
    # Streaming counts a thread that ends, but not one that fails: if both do, it would wait for them for ever.
    try:
        yield
    except BaseException:
        it.on_exit()
        raise


class Shards(StreamingDataset):
    """Streaming without its costs a sample: a file lock, threads that wait for what is there, copies of the image.

    Together they take as long as half the decoding of an image.
    """

    def __init__(self, **kwargs: Any):
        # Streaming numbers its shared memory by what it finds: of two that open at once, one would fail.
        with one_at_a_time("streaming") if os.environ.get("LOCAL_RANK", "0") == "0" else nullcontext():
            super().__init__(**kwargs)
        self.files = [shard.path for shard in self.shards]
        self._bounds = self.spanner.shard_bounds.tolist()
        self._present: set[int] = set()

    def place(self, sample_id: int) -> tuple[int, int]:
        """The number of the shard that holds a sample, and the sample's number in it."""
        shard_id = bisect_right(self._bounds, sample_id) - 1
        return shard_id, sample_id - self._bounds[shard_id]

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        shard_id, place = self.place(sample_id)
        if shard_id in self._present:
            try:
                return self.shards[shard_id].get_item(place)
            except FileNotFoundError:
                self._present.discard(shard_id)
        sample = super().get_item(sample_id, retry)
        if not self.cache_limit:  # which goes by the times of access that are noted there
            self._present.add(shard_id)
        return sample

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        if shard_id in self._present and os.path.exists(self.files[shard_id]):
            return
        super().prepare_shard(shard_id, blocking)
        if not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._present.add(shard_id)

    def _prepare_thread(self, it: Any) -> None:
        if self._complete():
            it.prepare_index = it.total
        with _leaving(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: Any) -> None:
        if self._complete():
            it.ready_index = it.total
        with _leaving(it):
            super()._ready_thread(it)

    def _complete(self) -> bool:
        """Whether every shard is there, as it is read, to stay."""
        if self.cache_limit or any(shard.compression for shard in self.shards):
            return False
        return bool((self._shard_states.numpy() == _ShardState.LOCAL).all())


def shard_fault(file: str, info: FileInfo) -> str | None:
    """What is wrong with a shard's file: its size or its hash is not that of index.json; None when it is whole."""
    if fault := size_fault(file, info):
        return fault
    for algorithm, expected in info.hashes.items():
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if get_hash(algorithm, content) != expected:  # type: ignore[arg-type]
                return f"{file} is damaged: its {algorithm} hash is not that of index.json"
    return None


def size_fault(file: str, info: FileInfo) -> str | None:
    size = os.path.getsize(file)
    if size == info.bytes:
        return None
    return f"{file} is damaged: it has {size:,} bytes where index.json says {info.bytes:,}"
