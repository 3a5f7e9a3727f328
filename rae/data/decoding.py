"""Image file bytes to pixels, and what is made of them: crops for training, for evaluation."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from random import Random

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor

from rae.config.errors import first_line
from rae.data.essentials import is_complete, reduce_jpeg
from rae.data.formats import MAX_PIXELS, Data, open_image, orientation
from rae.data.pixels import Background, changes_colours, to_rgb, to_srgb, upright

Transform = Callable[[Data, Random], Tensor]


def decode(data: Data, background: Background = "black") -> Tensor:
    """Image file bytes -> uint8 (3, H, W) in sRGB, the right way up; docs/data.md says what becomes of what.

    Raises:
        ValueError: not an image, a damaged one, one of more than MAX_PIXELS, or one whose samples are not understood.
    """
    return decode_and_judge(data, background)[0]


def decode_and_judge(data: Data, background: Background = "black") -> tuple[Tensor, str]:
    """As :func:`decode`, and what is amiss with an image that decodes all the same: a JPEG with pixels made up."""
    try:
        image = open_image(data)
        turn, fault = orientation(image), ""
        if image.format in ("JPEG", "MPO"):
            pixels, fault = _decode_jpeg(data, image)
        else:
            with _quiet() if image.format == "TIFF" else nullcontext():
                pixels = np.array(to_rgb(image, background))
        return torch.from_numpy(upright(pixels, turn)).permute(2, 0, 1), fault
    except Exception as error:  # Pillow's decoders raise anything
        said = first_line(error)
        raise ValueError("its samples are damaged" if said.startswith("decoder error") else said) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """libtiff complains to the process's standard error, and names no file."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _decode_jpeg(data: Data, image: Image.Image) -> tuple[np.ndarray, str]:
    pixels, fault = _samples(data, "CMYK" if image.mode == "CMYK" else "RGB")
    if not fault and "progressive" in image.info and not is_complete(bytes(data)):
        fault = "scans with its finer detail are missing"
    if image.mode == "CMYK":  # stored as what is left of the light
        pixels = np.array(Image.fromarray(255 - pixels, "CMYK").convert("RGB"))
    elif image.mode == "RGB" and (profile := image.info.get("icc_profile")) and changes_colours(profile):
        pixels = np.array(to_srgb(Image.fromarray(pixels), profile))
    return pixels, fault


def _samples(data: Data, colours: str) -> tuple[np.ndarray, str]:
    """A JPEG's pixels (H, W, 3 or 4), and what libjpeg warns of: it fills in grey for what is missing or garbled."""
    try:
        return decode_jpeg(data, colours), ""
    except ValueError as error:
        cut_off = first_line(error).startswith("Premature end")
    data = reduce_jpeg(bytes(data))
    try:
        return decode_jpeg(data, colours), ""  # only its end was missing, or something beside the picture was amiss
    except ValueError as error:
        fault = first_line(error)
        if cut_off:
            raise ValueError(f"the file is cut off: {fault}") from error
    return decode_jpeg(data, colours, strict=False), fault


def train_transform(
    size: int, resize_to: int | None = None, flip: bool = False, background: Background = "black"
) -> Transform:
    """Short side to ``resize_to`` (bicubic, antialiased), random crop of ``size``, and a random flip if wanted.

    Args:
        resize_to: default int(1.5·size), the reference's; an image already so is not resampled.
    """
    short = resize_to or int(1.5 * size)
    if short < size:
        raise ValueError(f"resize_to {short} is smaller than the crop, {size}")

    def transform(data: Data, rng: Random) -> Tensor:
        image = decode(data, background)
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
    refuse_strip(image, short)
    return tvf.resize(image, [short], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)


def refuse_strip(image: Tensor, short: int, longest: int = MAX_PIXELS) -> None:
    """
    Raises:
        ValueError: with the short side ``short`` it would have more than MAX_PIXELS, or than ``longest`` a side.
    """
    height, width = image.shape[1:]
    if short * max(height, width) > min(longest, MAX_PIXELS // short) * min(height, width):
        raise ValueError(f"{width} × {height} is too narrow to be resized to {short}")


def eval_transform(size: int, background: Background = "black") -> Transform:
    """ADM's centre crop (arXiv 2105.05233): halve with a box filter, then bicubic, then crop."""

    def transform(data: Data, rng: Random) -> Tensor:
        image = decode(data, background)
        refuse_strip(image, size)
        cropped = center_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), size)
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)

    return transform


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop of a Pillow image to ``size`` × ``size``."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
