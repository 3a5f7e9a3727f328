"""Streamed image data: MDS shards to uint8 images and batches, augmented by (seed, epoch, sample) alone."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any

import torch
from streaming.base.dataset import _ShardState
from torch import Tensor
from torch.utils.data import Subset, default_collate, get_worker_info

from rae.config.errors import first_line
from rae.data.decoding import Transform
from rae.data.reader import (
    RESTORE,
    AbsentError,
    BadSampleError,
    DataError,
    ImageStream,
    Shards,
    about,
    shard_fault,
    size_fault,
)
from rae.data.shards import content_hash
from rae.survival.storage import is_remote, reason


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


class ImageDataset(Shards):
    """MDS shards of encoded images (columns as :mod:`rae.data.columns` finds them) as uint8 tensors.

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
            if isinstance(error, AbsentError):
                raise DataError(str(error)) from error
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

    def stored(self, sample_id: int) -> dict[str, Any]:
        """A sample's columns as they are stored."""
        return super().get_item(sample_id)

    def _read(self, sample_id: int, retry: int) -> dict[str, Any]:
        sample_id = int(sample_id)
        shard_id, place = self.place(sample_id)
        if shard_id not in self._sound:
            self._verify(shard_id)
        try:
            sample = super().get_item(sample_id, retry)
        except PermissionError as error:
            raise DataError(f"{self.files[shard_id]} cannot be read: {error.strerror}") from error
        known = {
            "label": sample.get("label", -1),
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


def _check_streams(dataset: ImageDataset) -> None:
    for stream, first, count in zip(
        dataset.streams, dataset.shard_offset_per_stream, dataset.shards_per_stream, strict=True
    ):
        folder = os.path.join(stream.local, stream.split)
        for shard in dataset.shards[first : first + count]:
            with about(f"{stream.remote or folder}/index.json"):
                shard.roles  # noqa: B018 - raises where there is no image
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
        raise DataError(f"{list(listed)[-1]} is listed in index.json but absent; {RESTORE}")
    for file in present:
        if fault := size_fault(file, listed[file]):
            raise DataError(f"{fault}; restore it from a copy or convert again")


def content_of(shards: Sequence[Any]) -> str:
    """A hash that changes with what these shards hold."""
    if all(shard.raw_data.hashes for shard in shards):
        return content_hash([{"raw_data": {"hashes": shard.raw_data.hashes}} for shard in shards])
    # Written by another program, without hashes.
    held = [[shard.raw_data.basename, shard.raw_data.bytes, shard.samples] for shard in shards]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def indexed(images: ImageDataset, limit: int | None = None) -> Subset:
    """The data set, or its first images, read by index, in order: what evaluation and pictures need."""
    return Subset(images, range(min(images.size, limit or images.size)))


def open_dataset(path: str, cache: str | Path, **kwargs: Any) -> ImageDataset:
    """An :class:`ImageDataset` on a local folder, or on a remote one through the local folder ``cache``."""
    return ImageDataset(streams=[open_stream(path, cache)], **kwargs)


def open_stream(path: str, cache: str | Path, **weight: Any) -> ImageStream:
    """A data set for a mixture, see ``streams`` of :class:`ImageDataset`.

    Args:
        weight: one of proportion, repeat and choose, or nothing.
    """
    remote = {"remote": path, "local": str(cache)} if is_remote(path) else {"local": path}
    return ImageStream(**remote, **weight)
