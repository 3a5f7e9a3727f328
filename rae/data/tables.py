"""Hugging Face data sets as sources of images: saved with ``save_to_disk``, or Parquet files as the hub stores them."""

import glob
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import xxhash

from rae.config.errors import UserError, first_line
from rae.data.kinds import Aside
from rae.data.labels import Classes

_LABELS = ("label", "labels", "cls", "class")
_REMEDY = "name another --label-column, or give --no-labels"


class Table:
    """A split of a data set; its image and label columns are found by their types, or named.

    Args:
        place: folder made by ``save_to_disk``, or Parquet files: one, a folder of them, a pattern.
        split: which, where there are several.
        labels: False leaves the label column alone.
        caption: a column of text to be kept.

    Raises:
        UserError: no such data set, split or column.
    """

    remote = False

    def __init__(
        self,
        place: str,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        labels: bool = True,
        caption: str | None = None,
    ):
        splits, files, self.aside = *_load(place), Aside()
        data = splits[_split(splits, split, place)]
        self.image_column = image_column or _image_column(data)
        self.label_column = (label_column or _label_column(data)) if labels else None
        for column in filter(None, (self.image_column, self.label_column, caption)):
            if column not in data.features:
                raise UserError(f"there is no column {column!r}; there are: {', '.join(data.features)}")
        self.classes, self.number = _classes(splits, data, self.label_column)
        self.texts = data.select_columns([caption]) if caption else None
        columns = [self.image_column] + ([self.label_column] if self.label_column else [])
        try:
            self.data = data.select_columns(columns).cast_column(self.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            kind = data.features[self.image_column]
            raise UserError(f"column {self.image_column!r} holds no images, but {kind}") from error
        stamps = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]
        known = [stamps, str(data.split), len(data), columns]
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(known))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        row = self.data[index]
        image = row[self.image_column]
        if not image or (image["bytes"] is None and not image["path"]):
            raise ValueError(f"row {index} holds no image")
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        label = self.number(row[self.label_column]) if self.label_column else -1
        return image.get("path") or f"row {index}", data, label

    def caption(self, index: int, which: str) -> str:
        """A row's text; several, or what is structured, as JSON."""
        value = self.texts[index][which] if self.texts is not None else None
        return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _load(place: str) -> tuple[dict[Any, Any], list[str]]:
    """{split: data set}, and the files that hold them."""
    saved = any(Path(place, name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = [] if saved else _parquet(place)
    try:
        if not files:
            loaded = datasets.load_from_disk(place)
        elif os.path.isdir(place):
            loaded = datasets.load_dataset("parquet", data_dir=place)
        else:
            loaded = datasets.load_dataset("parquet", data_files=files)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{place!r} was not made by save_to_disk, nor are there Parquet files: {first_line(error)}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"{place!r} cannot be read: {first_line(error.__cause__ or error)}") from error  # type: ignore
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {loaded.split: loaded}
    held = {each["filename"] for data in splits.values() for each in data.cache_files}
    return splits, files or sorted(held)


def _parquet(place: str) -> list[str]:
    if os.path.isdir(place):
        return sorted(map(str, Path(place).rglob("*.parquet")))
    files = sorted(glob.glob(place))
    if not files:
        raise UserError(f"there is no folder {place!r}")
    return files


def _split(splits: dict[Any, Any], split: str | None, place: str) -> Any:
    if len(splits) == 1:
        ((only, _),) = splits.items()
        if split is not None and only is not None and split != str(only):
            raise UserError(f"{place!r} holds the split {str(only)!r} alone, not {split!r}")
        return only
    if split not in splits:
        have = ", ".join(map(str, splits))
        raise UserError(
            f"choose a split with --split: {have}" if split is None else f"no split {split!r}; there are: {have}"
        )
    return split


def _image_column(data: Any) -> str:
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name, feature in data.features.items() if _may_hold_files(feature)]
    if len(found) != 1:
        have = ", ".join(found or data.features)
        raise UserError(f"{'several' if found else 'no'} image columns; name one with --image-column: {have}")
    return found[0]


def _may_hold_files(feature: Any) -> bool:
    """Whether a column, of another program's Parquet, may hold image files: bytes, or bytes with a path."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _label_column(data: Any) -> str | None:
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise UserError(f"several label columns; name one with --label-column: {', '.join(found)}")
    return found[0] if found else next((name for name in _LABELS if name in data.features), None)


def _classes(splits: dict[Any, Any], data: Any, column: str | None) -> tuple[list[str], Callable[[Any], int]]:
    """Names of classes, and what gives a row's label its number."""
    if column is None:
        return [], lambda value: -1
    feature, what = data.features[column], f"column {column!r}"
    if isinstance(feature, datasets.ClassLabel):
        size = len(feature.names)
        return feature.names, lambda value: value if value is not None and 0 <= value < size else -1
    if not isinstance(feature, datasets.Value):
        raise UserError(f"{what} holds several labels an image, or none ({type(feature).__name__}); {_REMEDY}")
    values = {value for each in splits.values() if column in each.features for value in each.unique(column)}
    classes = Classes(values, what, _REMEDY)
    return classes.names, classes.number
