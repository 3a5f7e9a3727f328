"""Handwritten digits that come with scikit-learn, enlarged: what the demo's generator learns, and is judged with.

They are in three parts at random: those that the generator learns, those that a classifier learns, and those that
neither sees.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
LEARNED, JUDGING = 1200, 397
"""Digits that the generator learns, and that the classifier learns; 200 are left."""
VARIANTS = 4
"""Slightly turned and shifted versions of each digit that is learned."""


def digits() -> dict[str, tuple[list[Image.Image], np.ndarray]]:
    """Grey images of 32 × 32 (of 8 × 8, bicubic) and their labels: ``learned``, ``judging`` and ``unseen``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    ends = (0, LEARNED, LEARNED + JUDGING, len(order))
    parts = {}
    for name, start, end in zip(("learned", "judging", "unseen"), ends, ends[1:], strict=False):
        chosen = order[start:end]
        enlarged = [Image.fromarray(pixels[i]).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for i in chosen]
        parts[name] = (enlarged, labels[chosen])
    return parts


def varied(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An image, turned by up to 10 degrees, enlarged or reduced by up to a tenth, and shifted by up to 2 pixels."""
    angle, scale = np.deg2rad(rng.uniform(-10, 10)), np.exp(rng.uniform(-0.1, 0.1))
    (x, y), cos, sin = rng.uniform(-2, 2, 2), np.cos(angle) / scale, np.sin(angle) / scale
    middle = (image.width - 1) / 2
    matrix = (
        *(cos, sin, middle - cos * (middle + x) - sin * (middle + y)),
        *(-sin, cos, middle + sin * (middle + x) - cos * (middle + y)),
    )
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def make_image_folder(root: Path) -> None:
    """Write ``root/train/<digit>/…``, variants of those that are learned, and ``root/eval/<digit>/…``, all others."""
    rng, parts = np.random.default_rng(0), digits()
    pairs = {name: list(zip(*part, strict=True)) for name, part in parts.items()}
    made = {
        "train": [(varied(image, rng), label) for image, label in pairs["learned"] for _ in range(VARIANTS)],
        "eval": [*pairs["judging"], *pairs["unseen"]],
    }
    for split, chosen in made.items():
        for number, (image, label) in enumerate(chosen):
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:05d}.png")


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    small = [image.convert("L").resize((8, 8), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(each, dtype=np.float32).ravel() for each in small]) / 255


def recognised(images: Sequence[Image.Image], asked: Sequence[int]) -> tuple[float, float]:
    """How often a classifier names the digit that was asked for, and how often that of real digits that nobody saw.

    It is a support vector machine on 8 × 8 pixels, which learned real digits that the generator did not.
    """
    from sklearn.svm import SVC

    rng, parts = np.random.default_rng(0), digits()
    real, labels = parts["judging"]
    learned = [varied(image, rng) for image in real for _ in range(8)]
    classifier = SVC(C=10).fit(_pixels(learned), np.repeat(labels, 8))
    unseen, truth = parts["unseen"]
    return classifier.score(_pixels(images), asked), classifier.score(_pixels(unseen), truth)


def nearest(images: Sequence[Image.Image], folder: Path) -> list[Image.Image]:
    """Of each image, the nearest of an image folder, by the distance of their pixels."""
    from sklearn.neighbors import NearestNeighbors

    known = [Image.open(file).convert("L") for file in sorted(folder.rglob("*.png"))]
    rows = [np.stack([np.asarray(each.convert("L")).ravel() / 255 for each in group]) for group in (known, images)]
    found = NearestNeighbors(n_neighbors=1).fit(rows[0]).kneighbors(rows[1], return_distance=False)
    return [known[index] for index in found[:, 0]]
