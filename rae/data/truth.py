"""Labels that are kept apart from the images: ImageNet's for validation, or any list of names."""

import csv
import hashlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rae.config.errors import UserError, first_line
from rae.data.labels import Classes

_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")


def is_imagenet_validation(name: str) -> bool:
    """Whether a file is called as an image of ImageNet's validation set."""
    return _NUMBER.search(name) is not None


class Relabelled:
    """A source with other labels.

    Args:
        source: see :class:`rae.data.conversion.ImageSource`.
        classes: their names.
        label: an image's (name, label in the source) -> its label, −1 for none.
        mark: changes with what ``label`` says.
    """

    def __init__(self, source: Any, classes: list[str], label: Callable[[str, int], int], mark: str = ""):
        self.source, self.classes, self.label = source, classes, label
        self.remote, self.aside, self.caption = source.remote, source.aside, source.caption
        self.fingerprint = f"{source.fingerprint} {mark}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        name, data, label = self.source[index]
        return name, data, self.label(name, label)


def labelled(source: Any, place: str) -> Relabelled:
    """A source whose labels are elsewhere.

    Args:
        place: ImageNet's development kit (archive or folder), torchvision's meta.bin (or its folder), a text file with
            a class a line in the order of ImageNet's validation images, or a .csv of names and classes.

    Raises:
        UserError: no such file, or it says nothing of the images.
    """
    try:
        classes, label, read = _labels(place)
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, tarfile.TarError) as error:
        raise UserError(f"--labels {place}: it cannot be read: {first_line(error)}") from error
    if label(source.name(0)) < 0:
        raise UserError(f"--labels {place}: it does not say the class of {source.name(0)}")
    return Relabelled(source, classes, lambda name, _: label(name), hashlib.sha256(read).hexdigest())


def _labels(place: str) -> tuple[list[str], Callable[[str], int], bytes]:
    """Classes, the number of the class of a file's name (−1: none), and the bytes that said so."""
    if not os.path.exists(place):
        raise UserError(f"--labels {place}: there is no such file")
    inside = Path(place)
    if inside.is_dir():
        known = ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz")
        inside = next((inside / name for name in known if (inside / name).is_file()), inside)
    if inside.suffix == ".csv":
        return _listed(inside.read_text(), inside.read_bytes())
    if inside.suffix == ".bin":
        from torchvision.datasets.imagenet import load_meta_file

        names, truth = load_meta_file(str(inside.parent), inside.name)
        return _numbered(sorted(names), truth, inside.read_bytes())
    if inside.suffix == ".txt":
        truth = inside.read_text().split()
        return _numbered(sorted(set(truth)), truth, inside.read_bytes())
    return _devkit(inside)


def _listed(text: str, read: bytes) -> tuple[list[str], Callable[[str], int], bytes]:
    """Rows of a name and a class; of what Kaggle has after the class, boxes, the class alone is taken."""
    rows = [row for row in csv.reader(io.StringIO(text)) if len(row) >= 2]
    if rows and rows[0] == ["ImageId", "PredictionString"]:
        rows = [[name, value.split()[0]] for name, value in rows[1:] if value.strip()]
    elif rows and not Path(rows[0][0]).suffix and Path(rows[-1][0]).suffix:
        rows = rows[1:]  # a heading
    stems = {Path(name).stem if "." in name else name: value for name, value in rows}
    classes = Classes(stems.values(), "the list", "it is to hold a name and a class a row")
    return classes.names, lambda name: classes.number(stems.get(Path(name).stem)), read


def _numbered(classes: list[str], truth: list[str], read: bytes) -> tuple[list[str], Callable[[str], int], bytes]:
    numbers = {name: number for number, name in enumerate(classes)}

    def label(name: str) -> int:
        found = _NUMBER.search(name)
        return numbers[truth[int(found[1]) - 1]] if found and 0 < int(found[1]) <= len(truth) else -1

    return classes, label, read


def _devkit(place: Path) -> tuple[list[str], Callable[[str], int], bytes]:
    import scipy.io

    found: dict[str, bytes] = {}
    if place.is_dir():
        found = {path.name: path.read_bytes() for path in place.rglob("*") if path.name in (_TRUTH, _META)}
    else:
        with tarfile.open(place) as archive:
            for member in archive:
                if os.path.basename(member.name) in (_TRUTH, _META) and member.isreg():
                    found[os.path.basename(member.name)] = archive.extractfile(member).read()  # type: ignore[union-attr]
    if len(found) < 2:
        raise UserError(f"--labels {place}: there is no {_TRUTH} with {_META} in it, nor a meta.bin")
    synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"])
    names = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets if each["num_children"] == 0}
    truth = [names[int(line)] for line in found[_TRUTH].split()]
    return _numbered(sorted(names.values()), truth, found[_TRUTH] + found[_META])
