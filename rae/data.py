"""Streamed image data: MDS shards to uint8 batches, with augmentation that depends on (seed, epoch, sample) alone."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image, ImageOps
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.io import ImageReadMode, decode_jpeg

from rae.config import is_remote
from rae.processes import follow_parent, heed_parent_alone
from rae.registry import UserError
from rae.storage import reason

Transform = Callable[[bytes, np.random.Generator], Tensor]


def decode(data: bytes) -> Tensor:
    """Image file bytes -> uint8 (3, H, W), upright.

    JPEG goes through libjpeg-turbo in torchvision; everything else, and JPEGs that torchvision rejects, through
    Pillow. Transparent pixels come out over black, 16-bit samples are scaled to 8.

    Raises:
        PIL.UnidentifiedImageError, OSError: not an image, or a damaged one.
    """
    if data[:2] == b"\xff\xd8":
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass
    return torch.from_numpy(np.array(open_rgb(data))).permute(2, 0, 1)


def open_rgb(data: bytes) -> Image.Image:
    """Image file bytes -> a decoded, upright Pillow image in RGB (an animation's first frame)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
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

    def transform(data: bytes, rng: np.random.Generator) -> Tensor:
        image = decode(data)
        if min(image.shape[1:]) != short:
            image = tvf.resize(image, [short], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
        top, left = (int(rng.integers(0, side - size + 1)) for side in image.shape[1:])
        image = image[:, top : top + size, left : left + size]
        return image.flip(2) if flip and rng.integers(2) else image

    return transform


def eval_transform(size: int) -> Transform:
    """ADM's centre crop (arXiv 2105.05233): halve with a box filter, then bicubic, then crop."""

    def transform(data: bytes, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.array(center_crop(open_rgb(data), size))).permute(2, 0, 1)

    return transform


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop of a Pillow image to ``size`` × ``size``."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class DataError(UserError):
    """Training data that cannot be read. Worker processes pass it on with its traceback as the message."""


class ImageDataset(StreamingDataset):
    """MDS shards of encoded images (columns ``image``: bytes, ``label``: int) as uint8 tensors.

    Args:
        transform: bytes and a random generator -> uint8 (3, S, S). The generator is seeded by
            (seed, epoch, sample), so an image's augmentation is the same whichever worker or rank draws it.
        seed: of shuffling and augmentation.
        kwargs: of :class:`streaming.StreamingDataset`.
    """

    def __init__(self, *, transform: Transform, seed: int, **kwargs: Any):
        super().__init__(shuffle_seed=seed, **kwargs)
        self.transform, self.seed = transform, seed
        self.fault: BaseException | None = None
        for stream in self.streams:  # forked workers would share the connection that fetched the index
            if stream._downloader is not None:
                stream._downloader.clean_up()

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
        sample = super().get_item(sample_id, retry)
        # next_epoch counts begun epochs in shared memory, so workers of one epoch agree on it.
        rng = np.random.default_rng([self.seed, self.next_epoch, sample_id])
        try:
            image = self.transform(sample["image"], rng)
        except Exception as error:
            name = sample.get("path", "without a path column")
            raise RuntimeError(f"cannot decode sample {sample_id} ({name}): {error}") from error
        return {"image": image, "label": int(sample.get("label", -1))}


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
    if is_remote(path):
        return ImageDataset(remote=path, local=str(cache), **kwargs)
    return ImageDataset(local=path, **kwargs)


def train_loader(dataset: ImageDataset, batch_size: int, workers: int, prefetch: int) -> DataLoader:
    """Batches {image: uint8 (B, 3, S, S), label: int64 (B,)} of ``batch_size`` a rank, with a resumable position."""
    return StreamingDataLoader(dataset, drop_last=True, **_loader_options(batch_size, workers, prefetch))


def eval_loader(
    dataset: ImageDataset, batch_size: int, workers: int, prefetch: int, limit: int | None, rank: int, world_size: int
) -> DataLoader:
    """The images in order, each once, shared out over ranks (Composer drops the sampler's padding)."""
    images = IndexedImages(dataset, limit)
    sampler = DistributedSampler(images, num_replicas=world_size, rank=rank, shuffle=False)
    return DataLoader(images, sampler=sampler, **_loader_options(batch_size, workers, prefetch))


def _loader_options(batch_size: int, workers: int, prefetch: int) -> dict[str, Any]:
    return dict(
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),  # the global generator is the training step's alone
    )


def start_worker(worker: int) -> None:
    """One thread a worker process, which ends with its parent and not before it."""
    torch.set_num_threads(1)
    heed_parent_alone()
    follow_parent()
