"""Image files opened: the formats that are read, how large an image may be, which way up it is."""

import io
import logging
import struct
import warnings
from typing import Any

from PIL import ExifTags, Image

from rae.config.errors import first_line
from rae.data.essentials import reduce_jpeg, reduce_png, reduce_webp

Data = bytes | memoryview
MAX_PIXELS = 2**27
"""Larger images are taken for decompression bombs: 134 million pixels are 400 MB once decoded."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL"),
    *("PPM", "PSD", "QOI", "SGI", "PCX", "TGA"),
)
"""Pillow's names of what is read, where it has the decoder. The last has no mark of its own to be known by."""
ROWS, BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT, SUBSAMPLING = 257, 258, 262, 284, 339, 530
YCBCR, SIGNED = 6, 2
"""Tags of TIFF, and values of the third and the fifth."""
_NATIVE = {"I;16BS": "I;16NS", "F;32BF": "F;32NF"}
warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file, as what it logs
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def open_image(data: Data) -> Image.Image:
    """An image file as a Pillow image whose header is read and checked, and whose pixels are not decoded yet.

    Raises:
        ValueError: not an image, of a format that is not read, or of more than MAX_PIXELS.
    """
    if not data:
        raise ValueError("the file is empty")
    Image.init()
    start = bytes(data[:16])
    readers = ((name, *Image.OPEN[name]) for name in FORMATS if name in Image.OPEN)
    name, read, known = next(each for each in readers if each[2] is None or each[2](start) is True)
    try:
        image = _read(name, read, data)
    except Exception as error:  # Pillow's readers raise anything
        said = f"it cannot be read as {name}: {first_line(error)}"
        raise ValueError(said if known else "it is no image of a known format") from error
    check_size(*image.size)
    if image.format == "TIFF":
        _check_tiff(image)
    if image.format == "JPEG2000":
        _check_jpeg_2000(image, bytes(data))
    return image


def _read(name: str, read: Any, data: Data) -> Image.Image:
    if name == "PNG":
        data = reduce_png(bytes(data))
    elif name == "WEBP":
        data = reduce_webp(bytes(data))
    try:
        return read(io.BytesIO(data), "")
    except Exception:
        if name != "JPEG":
            raise
        return read(io.BytesIO(reduce_jpeg(bytes(data))), "")


def check_size(width: int, height: int) -> None:
    """
    Raises:
        ValueError: an image of no pixels, or of more than MAX_PIXELS.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{width} × {height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels, more than {MAX_PIXELS:,}")


def _check_tiff(image: Image.Image) -> None:
    """Refuse what Pillow takes for something else without a word, and mend what can be."""
    tags, tile = image.tag_v2, image.tile[0]  # type: ignore[attr-defined]
    bits, planes, form = tags.get(BITS, (1,))[0], tags.get(PLANAR) == 2, tags.get(SAMPLE_FORMAT, (1,))[0]
    raw = image._compression == "raw"  # type: ignore[attr-defined]
    subsampled = tags.get(PHOTOMETRIC) == YCBCR and tags.get(SUBSAMPLING, (2, 2)) != (1, 1)
    if image.mode == "LAB":
        raise ValueError("its colours are CIE Lab, which is not read; convert it to RGB")
    if form == SIGNED and bits != 16:
        raise ValueError(f"it is unknown what is white in signed samples of {bits} bits; convert it to unsigned ones")
    if (planes and image.mode in ("LA", "PA", "La")) or (raw and ((planes and bits > 8) or subsampled)):
        raise ValueError("a TIFF with samples in this order is not read; convert it to PNG")
    if max(each.extents[3] for each in image.tile) < tags[ROWS]:  # type: ignore[attr-defined]
        raise ValueError("its lower part is missing")
    if raw:
        return
    raw_mode, *others = tile.args  # libtiff gives samples in this machine's order, which Pillow forgets of some
    image.tile = [tile._replace(args=(_NATIVE.get(raw_mode, raw_mode), *others))]  # type: ignore[attr-defined]


def _check_jpeg_2000(image: Image.Image, data: bytes) -> None:
    """Against what the samples themselves say, which is not always what their wrapping does."""
    start = data.find(b"\xff\x4f\xff\x51") + 8
    if start < 8:
        raise ValueError("its JPEG 2000 samples are missing")
    right, bottom, left, top = struct.unpack_from(">4I", data, start)
    check_size(right - left, bottom - top)
    (components,) = struct.unpack_from(">H", data, start + 32)
    depth = max((each & 127) + 1 for each in data[start + 34 : start + 34 + 3 * components : 3])
    if depth > 8 and image.mode != "I;16":  # Pillow lets its white wrap around to black
        raise ValueError(f"JPEG 2000 of {depth} bits is read only in grey, from 10 bits on; convert it to PNG")


def orientation(image: Image.Image) -> int:
    """Which way up a freshly opened image is, as EXIF numbers it from 1 to 8; Pillow then leaves it so."""
    image._size = getattr(
        image, "_tile_size", image.size
    )  # of a TIFF, Pillow gives the size that it would have upright
    try:
        # Image's own method: a PNG's would decode the pixels to look behind them.
        value = Image.Image.getexif(image).pop(ExifTags.Base.Orientation, 1)
        return int.from_bytes(value) if isinstance(value, bytes) else int(value)
    except Exception:  # whatever is broken in it has nothing to do with the picture
        return 1
