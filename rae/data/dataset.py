"""Streamed image data: MDS shards to uint8 batches, with augmentation that depends on (seed, epoch, sample) alone."""

import inspect
import io
import logging
import math
import mmap
import os
import struct
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image, ImageOps, UnidentifiedImageError
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.world import World
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from rae.config.registry import RankError, UserError
from rae.config.sections import is_remote
from rae.survival.processes import follow_parent, heed_parent_alone, one_at_a_time, streaming_turn
from rae.survival.storage import reason

log = logging.getLogger(__name__)

Data = bytes | memoryview
Transform = Callable[[Data, Random], Tensor]
MAX_PIXELS = 2**27
"""Larger images are taken for decompression bombs: 134 million pixels are 400 MB once decoded."""
_SMALL = 2**18
"""A JPEG of fewer bytes is within MAX_PIXELS: each bit of it stands for 64 pixels at the most."""


def decode(data: Data) -> Tensor:
    """Image file bytes -> uint8 (3, H, W), upright.

    JPEG goes through libjpeg-turbo in torchvision; everything else, and JPEGs that torchvision rejects, through
    Pillow. Transparent pixels come out over black, 16-bit samples are scaled to 8.

    Raises:
        ValueError, OSError: not an image, a damaged one, or one of more than MAX_PIXELS.
    """
    if data[:2] == b"\xff\xd8":
        if len(data) > _SMALL:
            _open(data)
        try:
            buffer = torch.frombuffer(bytearray(data) if isinstance(data, bytes) else data, dtype=torch.uint8)
            return decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass
    return torch.from_numpy(np.array(open_rgb(data))).permute(2, 0, 1)


def _open(data: Data) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is ours
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise ValueError("it is no image of a known format") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def open_rgb(data: Data) -> Image.Image:
    """Image file bytes -> a decoded, upright Pillow image in RGB (an animation's first frame)."""
    image = ImageOps.exif_transpose(_open(data))
    if image.mode.startswith("I"):  # Pillow's own conversion of 16-bit grey clips instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def train_transform(size: int, resize_to: int | None = None, flip: bool = False) -> Transform:
    """Short side to ``resize_to`` (bicubic, antialiased), random crop of ``size``, and a random flip if wanted.

    Args:
        resize_to: default int(1.5·size), the reference's; an image already so is not resampled.
    """
    short = resize_to or int(1.5 * size)
    if short < size:
        raise ValueError(f"resize_to {short} is smaller than the crop, {size}")

    def transform(data: Data, rng: Random) -> Tensor:
        image = decode(data)
        if min(image.shape[1:]) != short:
            image = resize_short_side(image, short)
        _, height, width = image.shape
        top, left = rng.randrange(height - size + 1), rng.randrange(width - size + 1)
        image = image[:, top : top + size, left : left + size]
        return image.flip(2) if flip and rng.randrange(2) else image

    return transform


def resize_short_side(image: Tensor, short: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 with the short side ``short``: bicubic, antialiased, as Pillow's within a grey level.

    Raises:
        ValueError: a narrow strip that would become larger than MAX_PIXELS.
    """
    height, width = image.shape[1:]
    if short * short * max(height, width) > MAX_PIXELS * min(height, width):
        raise ValueError(f"{width} × {height} is too narrow to be resized to {short}")
    return tvf.resize(image, [short], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)


def eval_transform(size: int) -> Transform:
    """ADM's centre crop (arXiv 2105.05233): halve with a box filter, then bicubic, then crop."""

    def transform(data: Data, rng: Random) -> Tensor:
        image = Image.fromarray(decode(data).permute(1, 2, 0).numpy())
        return torch.from_numpy(np.array(center_crop(image, size))).permute(2, 0, 1)

    return transform


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop of a Pillow image to ``size`` × ``size``."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class DataError(RankError):
    """Training data that cannot be read."""

    @property
    def line(self) -> str:
        """Its message, also where a worker process has passed it on with its traceback before it."""
        return str(self).strip().splitlines()[-1].rpartition("DataError: ")[-1]


class BadSampleError(RuntimeError):
    """A sample that does not decode. The message names its file, its place and the reason."""


_PLAIN: dict[str, Callable[[memoryview], Any]] = {
    "bytes": lambda value: value,
    "int": lambda value: int.from_bytes(value, "little", signed=True),
    "str": lambda value: str(value, "utf-8"),
}
"""Encodings of MDS columns that are decoded here, in a tenth of the time."""


class Reader(MDSReader):
    """A shard whose samples come as views of one buffer: bytes columns as memoryviews, others decoded."""

    @classmethod
    def of(cls, shard: MDSReader) -> "Reader":
        """The same shard."""
        fields = list(inspect.signature(MDSReader).parameters)
        return cls(**{name: getattr(shard, name) for name in fields})

    @cached_property
    def path(self) -> str:
        """The shard's file, as it is read."""
        return os.path.join(self.dirname, self.split, self.raw_data.basename)

    @cached_property
    def _columns(self) -> list[tuple[str, str, int | None]]:
        return list(zip(self.column_names, self.column_encodings, self.column_sizes, strict=True))

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
        widths, start, sample = iter(self._widths.unpack_from(data)), self._widths.size, {}
        for name, encoding, size in self._columns:
            value = data[start : (start := start + (size or next(widths)))]
            sample[name] = _PLAIN[encoding](value) if encoding in _PLAIN else mds_decode(encoding, bytes(value))
        return sample


class ImageStream(Stream):
    """A data set, or a part of a mixture, of MDS shards. Arguments are those of :class:`streaming.Stream`."""

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:
        return [Reader.of(shard) for shard in super().get_shards(world, allow_unsafe_types)]


@contextmanager
def _leaving(it: Any) -> Iterator[None]:
    # Streaming counts a thread that ends, but not one that fails: if both do, it would wait for them for ever.
    try:
        yield
    except BaseException:
        it.on_exit()
        raise


class _Shards(StreamingDataset):
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


class ImageDataset(_Shards):
    """MDS shards of encoded images (columns ``image``: bytes, ``label``: int) as uint8 tensors.

    Args:
        transform: bytes and a random generator -> uint8 (3, S, S). The generator is seeded by
            (seed, epoch, sample), so an image's augmentation is the same whichever worker or rank draws it.
        seed: of shuffling and augmentation.
        verify: compare shards with their hashes when they are downloaded, and once a process group when they are
            first read.
        kwargs: of :class:`streaming.StreamingDataset`.

    Raises:
        UserError: a shard that is listed but absent, or of another size than listed; a cache limit that would
            delete the only copy of a shard.
    """

    def __init__(self, *, transform: Transform, seed: int, verify: bool = True, **kwargs: Any):
        super().__init__(shuffle_seed=seed, **kwargs)
        self.transform, self.seed = transform, seed
        self.fault: BaseException | None = None
        for stream in self.streams:  # forked workers would share the connection that fetched the index
            if stream._downloader is not None:
                stream._downloader.clean_up()
        self.replace_bad = False
        self.batcher: Batcher | None = None
        _check_streams(self)
        # In memory that loader workers share, so that one of them reads a shard for the sake of its hash, not each.
        self.verified = torch.full((self.num_shards,), not verify).share_memory_()
        self._sound: set[int] = set()
        self._streams = self.stream_per_shard.tolist()
        for stream, first in zip(self.streams, self.shard_offset_per_stream, strict=True):
            hashes = [*self.shards[first].hashes, None]
            stream.validate_hash = (stream.validate_hash or hashes[0]) if verify else None

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        # Streaming would leave a shard that failed in state PREPARING, which others wait for, and a damaged file in
        # the cache, which is used the next time.
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            stream, shard = self.streams[self.stream_per_shard[shard_id]], self.shards[shard_id]
            if stream.remote is not None:
                for info in filter(None, shard.file_pairs[0]):
                    Path(stream.local, stream.split, info.basename).unlink(missing_ok=True)
            self._shard_states[shard_id] = _ShardState.REMOTE
            name, place = shard.file_pairs[0][0].basename, stream.remote or stream.local
            raise DataError(f"shard {name} of {place} cannot be used: {reason(error)}") from error

    def on_exception(self, future: Future) -> None:
        if future.exception() is not None:
            self.fault = self.fault or future.exception()
            self._event.set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            raise self.fault or error from error
        if self.fault is not None:  # Streaming would end the epoch here as if all were read
            raise self.fault

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0 and self.next_epoch > 0:
            # At an epoch's end Composer has set its count back to 0, while Streaming still names the epoch that ended:
            # a run that goes on from there would see it again.
            state["epoch"] += 1
        return state

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """A sample: image uint8 (3, S, S), label, index, name, stream (its number), and fault (None or what was wrong).

        With ``replace_bad``, the next sample that decodes takes the place of one that does not.

        Raises:
            BadSampleError: it does not decode, and is not to be replaced.
            UserError: its shard is damaged.
        """
        try:
            return self._read(sample_id, retry)
        except BadSampleError as error:
            if not self.replace_bad:
                raise
            fault = str(error)
        for step in range(1, self.num_samples):
            try:
                return {**self._read((sample_id + step) % self.num_samples, retry), "fault": fault}
            except BadSampleError:
                continue
        raise DataError(f"no sample of the data set decodes; the first fault: {fault}")

    def _read(self, sample_id: int, retry: int) -> dict[str, Any]:
        sample_id = int(sample_id)
        shard_id, place = self.place(sample_id)
        if shard_id not in self._sound:
            self._verify(shard_id)
        sample = super().get_item(sample_id, retry)
        known = {
            "label": int(sample.get("label", -1)),
            "index": sample_id,
            "name": sample.get("path", f"sample {sample_id}"),
            "stream": self._streams[shard_id],
            "fault": None,
        }
        if "latent" in sample:
            return {**stored_latent(sample), **known}
        # next_epoch counts begun epochs in shared memory, so workers of one epoch agree on it. A string seed goes
        # through SHA-512, so that neighbouring samples have unrelated draws.
        rng = Random(f"{self.seed},{self.next_epoch},{sample_id}")
        try:
            image = self.transform(sample["image"], rng)
        except Exception as error:
            name, file = sample.get("path", "no path column"), self.files[shard_id]
            raise BadSampleError(
                f"sample {sample_id} ({name}; number {place} in {file}): {first_line(error)}"
            ) from error
        image = image.clone() if self.batcher is None else self.batcher.place(image)  # a crop keeps the whole alive
        return {"image": image, **known}

    def _verify(self, shard_id: int) -> None:
        if not self.verified[shard_id]:
            stream, file = self.streams[self._streams[shard_id]], self.files[shard_id]
            fault = shard_fault(file, self.shards[shard_id].raw_data) if os.path.exists(file) else None
            if fault and stream.remote:  # a cached copy from an earlier run: the original may be whole
                self.evict_shard(shard_id)
                self.prepare_shard(shard_id)
            elif fault:
                raise DataError(
                    f"{fault}; restore it from a copy or convert again (convert/verify_mds.py lists all damage; "
                    "data.verify: false reads damaged shards as they are)"
                )
            self.verified[shard_id] = True
        self._sound.add(shard_id)


def stored_latent(sample: dict[str, Any]) -> dict[str, Tensor]:
    """Arrays of a sample with a precomputed latent -> latent (C, h, w) bf16 or fp16, and image uint8 if it is there."""
    latent = torch.from_numpy(sample["latent"].copy())
    latent = latent.view(torch.bfloat16) if latent.dtype == torch.uint16 else latent
    image = {"image": torch.from_numpy(sample["image"].copy())} if "image" in sample else {}
    return {"latent": latent, **image}


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shard_fault(file: str, info: FileInfo) -> str | None:
    """What is wrong with a shard's file: its size or its hash is not that of index.json; None when it is whole."""
    if fault := _size_fault(file, info):
        return fault
    for algorithm, expected in info.hashes.items():
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if get_hash(algorithm, content) != expected:  # type: ignore[arg-type]
                return f"{file} is damaged: its {algorithm} hash is not that of index.json"
    return None


def _size_fault(file: str, info: FileInfo) -> str | None:
    size = os.path.getsize(file)
    if size == info.bytes:
        return None
    return f"{file} is damaged: it has {size:,} bytes where index.json says {info.bytes:,}"


def _check_streams(dataset: ImageDataset) -> None:
    for stream, first, count in zip(
        dataset.streams, dataset.shard_offset_per_stream, dataset.shards_per_stream, strict=True
    ):
        folder = os.path.join(stream.local, stream.split)
        if not {"image", "latent"} & set(dataset.shards[first].column_names):
            raise DataError(f"{folder}/index.json: there is no column 'image', so these shards hold no images")
        if stream.remote:
            continue
        if dataset.cache_limit:
            raise DataError(
                f"cache_limit: {folder} is the data itself, from which nothing may be deleted; leave it out"
            )
        for shard in dataset.shards[first : first + count]:
            _check_present(folder, shard)


def _check_present(folder: str, shard: Any) -> None:
    listed = {os.path.join(folder, info.basename): info for info in (shard.raw_data, shard.zip_data) if info}
    present = list(filter(os.path.exists, listed))
    if not present:
        raise DataError(f"{list(listed)[-1]} is listed in index.json but absent; restore it or convert again")
    for file in present:
        if fault := _size_fault(file, listed[file]):
            raise DataError(f"{fault}; restore it from a copy or convert again")


class IndexedImages(Dataset):
    """An :class:`ImageDataset` read by index, in order: what evaluation and pictures need."""

    def __init__(self, images: ImageDataset, limit: int | None = None):
        self.images = images
        self.length = min(images.size, limit or images.size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.images[index]


def open_dataset(path: str, cache: str | Path, **kwargs: Any) -> ImageDataset:
    """An :class:`ImageDataset` on a local folder, or on a remote one through the local folder ``cache``."""
    return ImageDataset(streams=[open_stream(path, cache)], **kwargs)


@contextmanager
def opening(folders: Iterable[str], fault: str) -> Iterator[None]:
    """Data sets are opened in here; see :func:`rae.survival.processes.streaming_turn`.

    Args:
        fault: what the message begins with when one cannot be opened.

    Raises:
        UserError: Streaming's errors.
    """
    try:
        with streaming_turn(folders):
            yield
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{fault}: {first_line(error)}") from error


def open_stream(path: str, cache: str | Path, **weight: Any) -> ImageStream:
    """A data set for a mixture, see ``streams`` of :class:`ImageDataset`.

    Args:
        weight: one of proportion, repeat and choose, or nothing.
    """
    given = {name: value for name, value in weight.items() if value is not None}
    if is_remote(path):
        return ImageStream(remote=path, local=str(cache), **given)
    return ImageStream(local=path, **given)


class Ledger:
    """What a rank's loader has handed out: samples by stream, and the bad samples that others replaced.

    Args:
        max_bad: bad samples to tolerate.
        streams: their names, for logging.

    Attributes:
        samples: drawn from each stream, by number.
        bad: distinct faults, in the order in which they were met.
    """

    def __init__(self, max_bad: int = 0, streams: Sequence[str] = ()):
        self.max_bad, self.streams = max_bad, streams
        self.samples: Counter[int] = Counter()
        self.bad: dict[str, None] = {}

    def note(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count a batch, and return it without what was for counting alone.

        Raises:
            RankError: more bad samples than ``max_bad``.
        """
        self.samples.update(batch.pop("stream"))
        for fault in filter(None, batch.pop("fault")):
            if fault not in self.bad:
                self.bad[fault] = None
                log.warning("bad sample, replaced by the next one: %s", fault)
        self.check(self.bad, RankError)
        return batch

    def check(self, bad: Collection[str], error: type[UserError] = UserError) -> None:
        """Raise an error when the faults are too many."""
        if len(bad) > self.max_bad:
            count = f"{len(bad)} bad sample{'s' if len(bad) > 1 else ''}"
            shown = "; ".join(sorted(bad)[:3])
            raise error(f"{count} where data.max_bad_samples allows {self.max_bad}: {shown}")


class _TrainLoader(StreamingDataLoader):
    ledger: Ledger

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.ledger.note, super().__iter__())


class _EvalLoader(DataLoader):
    ledger: Ledger
    noise_tau: float

    def __iter__(self) -> Any:
        return map(self._noised, map(self.ledger.note, super().__iter__()))

    def _noised(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "noise_tau": torch.full((len(batch["index"]),), self.noise_tau)} if self.noise_tau else batch


def train_loader(
    dataset: ImageDataset, batch_size: int, workers: int, prefetch: int, ledger: Ledger | None = None
) -> DataLoader:
    """Batches {image: uint8 (B, 3, S, S), label: int64 (B,)} of ``batch_size`` a rank, with a resumable position.

    The images are channels_last in memory, as the decoder writes them.

    Args:
        ledger: counts samples and bad samples; by default one that tolerates no bad sample.
    """
    dataset.replace_bad = True  # the ledger sees the faults, and stops the run when they are too many
    dataset.batcher = Batcher(batch_size)
    loader = _TrainLoader(dataset, drop_last=True, **_loader_options(batch_size, workers, prefetch, dataset.batcher))
    loader.ledger = ledger or Ledger()
    return loader


def eval_loader(
    dataset: ImageDataset,
    batch_size: int,
    workers: int,
    prefetch: int,
    limit: int | None,
    rank: int,
    world_size: int,
    ledger: Ledger | None = None,
    noise_tau: float = 0.0,
) -> DataLoader:
    """The images in order, each once, shared out over ranks (Composer drops the sampler's padding).

    Args:
        noise_tau: with it, batches ask for latents with fixed noise of this level (``noise_tau``: (B,)).
    """
    dataset.replace_bad = True
    images = IndexedImages(dataset, limit)
    sampler = DistributedSampler(images, num_replicas=world_size, rank=rank, shuffle=False)
    loader = _EvalLoader(images, sampler=sampler, **_loader_options(batch_size, workers, prefetch, Batcher(batch_size)))
    loader.ledger, loader.noise_tau = ledger or Ledger(), noise_tau
    return loader


class Batcher:
    """Collates samples whose images it has written into the batch already: one copy an image, not two.

    Images stay in the order (H, W, 3) in which the decoder writes them, which makes a batch channels_last.

    Args:
        size: of a batch.
    """

    def __init__(self, size: int):
        self.size, self.used = size, 0
        self.batch = torch.empty(0)
        self.slots: tuple[Tensor, ...] = ()

    def place(self, image: Tensor) -> Tensor:
        """An image (3, S, S) -> its copy in the next batch."""
        if self.used == len(self.slots):
            self.batch = _batch_memory((self.size, *image.shape[1:], 3)).permute(0, 3, 1, 2)
            self.slots, self.used = self.batch.unbind(), 0
        slot = self.slots[self.used]
        self.used += 1
        return slot.copy_(image)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples -> {image (B, 3, S, S), label, index (B,), stream, fault: lists}, and latent if they have it."""
        batch = {
            "label": torch.tensor([sample["label"] for sample in samples]),
            "index": torch.tensor([sample["index"] for sample in samples]),
            "stream": [sample["stream"] for sample in samples],
            "fault": [sample["fault"] for sample in samples],
        }
        if "latent" in samples[0]:
            batch["latent"] = default_collate([sample["latent"] for sample in samples])
        return {**({"image": self._images(samples)} if "image" in samples[0] else {}), **batch}

    def _images(self, samples: list[dict[str, Any]]) -> Tensor:
        images, batch, slots = [sample["image"] for sample in samples], self.batch, self.slots[: len(samples)]
        self.batch, self.slots, self.used = torch.empty(0), (), 0
        if list(map(id, images)) == list(map(id, slots)):
            return batch[: len(images)]
        return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _batch_memory(shape: tuple[int, ...]) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # a worker hands it over without copying
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _loader_options(batch_size: int, workers: int, prefetch: int, collate: Batcher) -> dict[str, Any]:
    return dict(
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),  # the global generator is the training step's alone
    )


def start_worker(worker: int) -> None:
    """One thread a worker process, which ends with its parent and not before it."""
    torch.set_num_threads(1)
    heed_parent_alone()
    follow_parent()
