"""Pictures of a reconstruction: the difference from its original, and both side by side."""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 64
"""Grey levels (of 255) at the top of a difference map's scale; larger differences have its colour."""
_SHOWN_AT = 192
"""Panels of a comparison are enlarged by a whole factor to at least this many pixels."""


def split(figure: str) -> tuple[str, float]:
    """``psnr_tau0.8`` -> its metric and its noise level, 0 for none."""
    name, _, tau = figure.partition("_tau")
    return name, float(tau or 0)


@functools.cache
def colours() -> np.ndarray:
    """The difference map's 256 colours, uint8 (256, 3), from black for 0 to light yellow for SCALE and more."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def difference_map(image: Tensor, recon: Tensor) -> Image.Image:
    """The mean over channels of |recon − image|, uint8 (3, H, W) each, in :func:`colours` up to :data:`SCALE`."""
    difference = (recon.float() - image.float()).abs().mean(dim=-3)  # (H, W), in grey levels from 0 to 255
    levels = (difference * (255 / SCALE)).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(colours()[levels.numpy()])


def comparison(image: Tensor, recons: dict[float, Tensor], figures: dict[str, float]) -> Image.Image:
    """Original, reconstructions with their figures, and the difference of the first of them with its scale.

    Args:
        image: uint8 (3, S, S).
        recons: by τ, each uint8 (3, S, S).
        figures: as in a :class:`rae.evaluation.reconstruction.Record`.
    """
    panels: list[tuple[str, list[str], Image.Image]] = [("original", [], to_picture(image))]
    for tau, recon in recons.items():
        lines = [f"{split(name)[0]} {text_of(name, value)}" for name, value in figures.items() if split(name)[1] == tau]
        panels.append((f"noise τ = {tau:g}" if tau else "reconstruction", lines, to_picture(recon)))
    panels.append(
        ("difference", [f"0 to {SCALE} of 255 grey levels"], difference_map(image, next(iter(recons.values()))))
    )
    size = image.shape[-1] * math.ceil(_SHOWN_AT / image.shape[-1])
    row, gap, font = 20, 8, _font(13)
    height = size + row * (1 + max(len(lines) for _, lines, _ in panels)) + gap
    picture = Image.new("RGB", (gap + len(panels) * (size + gap) + 40, height), "white")
    draw = ImageDraw.Draw(picture)
    for i, (caption, lines, panel) in enumerate(panels):
        left = gap + i * (size + gap)
        picture.paste(panel.resize((size, size), Image.Resampling.NEAREST), (left, row))
        draw.text((left, row / 2), caption, "black", font, anchor="lm")
        for n, line in enumerate(lines):
            draw.text((left, row + size + (n + 0.6) * row), line, "black", font, anchor="lm")
    left = gap + len(panels) * (size + gap)
    bar = Image.fromarray(colours()[::-1, None])
    picture.paste(bar.resize((10, size), Image.Resampling.BILINEAR), (left, row))
    for share, label, anchor in ((0.0, f"≥{SCALE}", "lt"), (0.5, f"{SCALE // 2}", "lm"), (1.0, "0", "lb")):
        draw.text((left + 13, row + share * (size - 1)), label, "black", font, anchor=anchor)
    return picture


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def text_of(figure: str, value: float) -> str:
    """A figure's value with as many digits as mean something."""
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if figure.startswith("psnr") else f"{value:.4f}"


def to_picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
