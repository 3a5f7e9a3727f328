"""Image file bytes to pixels, and what is made of them: crops for training, for evaluation."""

import io
import warnings
from collections.abc import Callable
from random import Random

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

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
        return image[:, top : top + size, left : left + size]

    return flipping(transform) if flip else transform


def flipping(transform: Transform) -> Transform:
    """The transform, and after it a horizontal flip of every other image at random."""

    def flipped(data: Data, rng: Random) -> Tensor:
        image = transform(data, rng)
        return image.flip(2) if rng.randrange(2) else image

    return flipped


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
