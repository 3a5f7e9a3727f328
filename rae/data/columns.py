"""Columns of MDS shards, whoever wrote them: which may be read, which hold image and label, and what is in them."""

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from streaming.base.format.mds.encodings import mds_decode

from rae.config.errors import UserError

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NUMBERS = {*_INTEGERS, "int", "str_int", "str_float", "str_decimal", "float16", "float32", "float64"}
_PICTURES = ("jpeg", "png", "pil")
_HARMLESS = {*_NUMBERS, *_PICTURES, "bytes", "str", "json", "ndarray", "jpeg_array", "jpegarray"}
_HARMLESS |= {f"list[{each}]" for each in _PICTURES}
"""Encodings that are read without running what is in them. One that is not known here may be another pickle."""
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "x")
_LABEL_NAMES = ("label", "labels", "cls", "class", "y")
_PLAIN: dict[str, Callable[[memoryview], Any]] = {
    "bytes": lambda value: value,
    "jpeg": lambda value: value,
    "png": lambda value: value,
    "int": lambda value: int.from_bytes(value, "little", signed=True),
    "str": lambda value: str(value, "utf-8"),
}
"""Encodings that are decoded here, in a tenth of the time, and pictures left to the one decoder of all images."""


def kind_of(encoding: str) -> str:
    """``ndarray`` of ``ndarray:uint8:3,64,64``."""
    return encoding.partition(":")[0]


def harmless(names: Sequence[str], encodings: Sequence[str]) -> dict[str, str]:
    """Columns as {name: encoding}.

    Raises:
        UserError: one may run code when it is read, or two have one name, which would hide one of them.
    """
    for name, encoding in zip(names, encodings, strict=True):
        if kind_of(encoding) not in _HARMLESS:
            raise UserError(
                f"column {name!r} is of type {encoding}, which can run code when it is read; write it as another type"
            )
    if len(set(names)) < len(names):
        raise UserError(f"several columns have one name: {', '.join(names)}")
    return dict(zip(names, encodings, strict=True))


def roles(columns: Mapping[str, str]) -> dict[str, str]:
    """What is read of a sample {name: encoding} -> {name: image, label, path or latent}.

    The image is in the column of that name, or another usual one, or the only one that can hold a picture.

    Raises:
        UserError: there is no image, or no telling which column it is; the image is of a type that is not read.
    """
    found = {name: name for name, encoding in columns.items() if (name, kind_of(encoding)) == ("path", "str")}
    found |= {next((name for name in _LABEL_NAMES if name in columns), ""): "label"}
    found.pop("", None)
    if "latent" in columns:
        return found | {name: name for name in ("latent", "image") if name in columns}
    name = _image_column(columns)
    if kind_of(columns[name]) not in (*_PICTURES, "bytes", "ndarray"):
        raise UserError(
            f"column {name!r} is of type {columns[name]}, which is not read as an image; "
            "bytes (of an image file), jpeg, png, pil and ndarray are"
        )
    return found | {name: "image"}


def _image_column(columns: Mapping[str, str]) -> str:
    named = next((name for name in _IMAGE_NAMES if name in columns), None)
    if named:
        return named
    for kinds in (_PICTURES, ("bytes",)):
        able = [name for name, encoding in columns.items() if kind_of(encoding) in kinds]
        if len(able) == 1:
            return able[0]
    have = ", ".join(f"{name!r} ({encoding})" for name, encoding in columns.items())
    raise UserError(f"there is no column 'image', so these shards hold no images that are known; they hold {have}")


def unnumbered(columns: Mapping[str, str]) -> str | None:
    """Why a data set gives no class numbers, or None where it does."""
    name = next((name for name in _LABEL_NAMES if name in columns), None)
    if name is None:
        return "there is no column 'label'"
    told = f"column {name!r} is of type {columns[name]}, which gives no class numbers"
    return None if kind_of(columns[name]) in {*_NUMBERS, "json", "ndarray"} else told


def read(role: str, encoding: str, value: memoryview, latent: bool) -> Any:
    """A column's value: an image as file bytes, beside a latent as array; a label as int, −1 for none.

    Raises:
        ValueError and others: it is damaged, or no image.
    """
    if role == "image" and not latent:
        return _file(encoding, value)
    decoded = _PLAIN[encoding](value) if encoding in _PLAIN else mds_decode(encoding, bytes(value))
    return class_number(decoded) if role == "label" else decoded


def class_number(label: Any) -> int:
    """A label as its writer gave it, as a class number; −1 where it is none: text, several labels, no whole number."""
    if isinstance(label, np.ndarray):
        label = label.item() if label.size == 1 else None
    try:
        number = int(label)
        return number if number == label and -1 <= number < 2**63 else -1
    except (TypeError, ValueError, OverflowError):
        return -1


def _file(encoding: str, value: memoryview) -> bytes | memoryview:
    kind = kind_of(encoding)
    if kind == "pil":
        width, height, _ = struct.unpack_from("<III", value)
        if width * height > 8 * len(value):  # Pillow would make room for it before it looks
            raise ValueError("the pixels are cut off")
        image = mds_decode(encoding, bytes(value))
        if image.mode in ("P", "PA"):
            raise ValueError("it has a palette, which the type pil does not store")
    elif kind == "ndarray":
        image = _picture(mds_decode(encoding, bytes(value)))
    else:
        return _PLAIN[kind](value)
    buffer = io.BytesIO()
    if image.mode in ("1", "L", "LA", "I;16", "RGB", "RGBA"):
        image.save(buffer, "PNG", compress_level=0)
    else:
        image.save(buffer, "TIFF")
    return buffer.getvalue()


def _picture(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape
    if pixels.ndim == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(f"it is an array of {pixels.dtype} {shape}; uint8 (H, W, 3), (3, H, W) and (H, W) are read")
    return Image.fromarray(np.ascontiguousarray(pixels))
