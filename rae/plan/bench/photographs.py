"""Photographs that come in packages, as an image folder: what the demo and the benchmarks train on."""

import inspect
from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT = (0.35, 0.6)
"""The part of each photograph's width that no training crop touches."""


def photographs() -> dict[str, Image.Image]:
    """Colour photographs shipped inside scikit-image, scikit-learn and matplotlib, by name."""
    import matplotlib
    import skimage.data
    import sklearn.datasets

    skimage_folder = Path(inspect.getfile(skimage.data)).parent
    found = {
        name: skimage_folder / name
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    }
    sklearn_folder = Path(inspect.getfile(sklearn.datasets)).parent / "images"
    found |= {name: sklearn_folder / name for name in ("china.jpg", "flower.jpg")}
    found["grace_hopper.jpg"] = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    return {Path(name).stem: Image.open(path).convert("RGB") for name, path in found.items()}


def make_image_folder(root: Path, train: int, held_out: int) -> None:
    """Write ``root/train/<photograph>/…`` and ``root/eval/<photograph>/…``: random crops of 72 × 72.

    Held-out crops come from a strip in each photograph's middle, training crops from beside it, where they may
    overlap: no pixel of a held-out crop is trained on.

    Args:
        train, held_out: crops in all.
    """
    rng = np.random.default_rng(0)
    photos = sorted(photographs().items())
    for split, count in (("train", train), ("eval", held_out)):
        for i in range(count):
            name, photo = photos[i % len(photos)]
            start, end = (round(photo.width * share) for share in HELD_OUT)
            beside = [(0, start), (end, photo.width)]
            left, right = beside[int(rng.integers(2))] if split == "train" else (start, end)
            widest = min(right - left, photo.height, 224)
            side = int(rng.integers(min(72, widest), widest + 1))
            x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, photo.height - side + 1))
            crop = photo.crop((x, y, x + side, y + side)).resize((72, 72), Image.Resampling.BICUBIC)
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(folder / f"{i:05d}.jpg", quality=95)
