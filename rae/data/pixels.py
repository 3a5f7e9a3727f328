"""Pixels of opened images, of whatever mode, depth and colours, as 8-bit sRGB the right way up."""

import functools
import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

from rae.data.formats import BITS, PHOTOMETRIC, SAMPLE_FORMAT, SIGNED, orientation

Background = Literal["black", "white", "drop"]
"""What is seen where an image is transparent; ``drop`` shows its colours as if they were opaque."""
_DEEP = {"RGB;16B": "RGB;16L", "LA;16B": "RGBA"}
_DEEP |= {"RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B", "RGBA;16N": "RGBA;16B"}
"""Forms of samples of 16 bits, and what to take them for so that their lower halves come out."""
_FEW_BITS = {"L;2": 85, "L;4": 17}
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""By EXIF's number, what sets an image upright: (H, W, 3) -> (H, W, 3) or (W, H, 3)."""


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, 3) as EXIF says that they are to be seen."""
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


def to_rgb(image: Image.Image, background: Background) -> Image.Image:
    """An opened image, or an animation's first frame, in sRGB of 8 bits.

    Raises:
        ValueError: what its samples mean is not known.
    """
    profile, tags = image.info.get("icc_profile"), getattr(image, "tag_v2", {})
    key, form = image.info.get("transparency"), _form(image)
    if form in _DEEP and (key is not None or form[:4] != "RGB;"):
        return to_srgb(_flat_deep(_deep_samples(image, form, key), background), profile)
    if form in _FEW_BITS and key is not None:
        image.info["transparency"] = key * _FEW_BITS[form]
    if image.mode == "1":
        image = image.convert("L")
        image.info |= {} if key is None else {"transparency": key}
    elif image.mode[0] in "IF":
        clear = None if key is None else np.asarray(image) == key
        image = Image.fromarray(_grey(image, tags))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return _flat(to_srgb(image, profile), background)


def _form(image: Image.Image) -> str:
    """How a PNG's or a TIFF's samples are stored, as Pillow names it."""
    if image.format == "PNG":
        return image.tile[0].args  # type: ignore[attr-defined, no-any-return]
    return image.tile[0].args[0] if image.format == "TIFF" else ""  # type: ignore[attr-defined, no-any-return]


def _deep_samples(image: Image.Image, form: str, key: tuple[int, ...] | None) -> np.ndarray:
    """Colours and opacity of 16 bits, (H, W, 4), of which Pillow gives the upper halves: so the lower ones, too."""
    low = type(image)(io.BytesIO(image.fp.getvalue()))  # type: ignore[attr-defined, call-arg]
    orientation(low)
    low.tile = [  # type: ignore[attr-defined]
        each._replace(args=_DEEP[form] if isinstance(each.args, str) else (_DEEP[form], *each.args[1:]))
        for each in low.tile  # type: ignore[attr-defined]
    ]
    if form == "LA;16B":
        return np.asarray(low).view(">u2")[..., [0, 0, 0, 1]].astype(np.uint16)
    samples = np.asarray(image) * np.uint16(256) + np.asarray(low)
    if key is None:
        return samples
    clear = (samples == np.array(key, np.uint16)).all(-1, keepdims=True)
    return np.concatenate([samples, np.where(clear, 0, 65535).astype(np.uint16)], -1)


def _flat_deep(samples: np.ndarray, background: Background) -> Image.Image:
    colours, opacity = samples[..., :3].astype(np.float32) / 257, samples[..., 3:].astype(np.float32) / 65535
    if background != "drop":
        colours = colours * opacity + (255 if background == "white" else 0) * (1 - opacity)
    return Image.fromarray(colours.round().astype(np.uint8))


def _grey(image: Image.Image, tags: Any) -> np.ndarray:
    """Samples of 12 bits and more, or fractions -> uint8 (H, W), from what is black in them to what is white."""
    samples = np.asarray(image)
    bits, signed = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT) == (SIGNED,)
    least, most = (0.0, 1.0) if image.mode == "F" else (-(2.0 ** (bits - 1)) * signed, 2.0 ** (bits - signed) - 1)
    if bits == 32 and image.mode == "I":
        samples = samples.view(np.uint32)
    if image.mode == "F" and not -1e-3 <= samples.min() <= samples.max() <= 1 + 1e-3:
        raise ValueError(f"its samples go from {samples.min():g} to {samples.max():g}, where 0 is black and 1 is white")
    grey = (samples.astype(np.float32) - least) * (255 / (most - least))
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    return grey.round().clip(0, 255).astype(np.uint8)


def _flat(image: Image.Image, background: Background) -> Image.Image:
    if background == "drop" or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image with the colours of an RGB profile brought to sRGB, transparency and all; others are left alone."""
    if image.mode in ("L", "LA", "La", "CMYK") or not profile or not (transform := changes_colours(profile)):
        return image
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    converted = ImageCms.applyTransform(image.convert("RGB"), transform)
    assert converted is not None
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


@functools.lru_cache(maxsize=64)
def changes_colours(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """What brings a profile's colours to sRGB; None if it is no sound one of RGB, or hardly changes them."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    steps = np.linspace(0, 255, 8).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(8, 64, 3)
    seen = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return transform if np.abs(seen.astype(int) - colours).max() > 1 else None
