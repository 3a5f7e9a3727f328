"""The demo: photographs that come in packages become an image folder, shards, and a trained autoencoder."""

import inspect
from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT = 0.25
"""Share of each photograph's width, at its right, that no training crop touches."""


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


def make_image_folder(root: Path, train: int, held_out: int, size: int = 80, seed: int = 0) -> None:
    """Write ``root/train/<photograph>/…`` and ``root/eval/<photograph>/…``: random crops of ``size`` × ``size``.

    Training crops come from the left three quarters of each photograph and may overlap; held-out crops come from
    the right quarter, so that no pixel of them is trained on.

    Args:
        train, held_out: crops in all.
    """
    rng = np.random.default_rng(seed)
    photos = sorted(photographs().items())
    for split, count in (("train", train), ("eval", held_out)):
        for i in range(count):
            name, photo = photos[i % len(photos)]
            border = round(photo.width * (1 - HELD_OUT))
            left, right = (0, border) if split == "train" else (border, photo.width)
            widest = min(right - left, photo.height, 224)
            side = int(rng.integers(min(size, widest), widest + 1))
            x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, photo.height - side + 1))
            crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(folder / f"{i:05d}.jpg", quality=95)
