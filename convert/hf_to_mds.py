"""Turn a Hugging Face data set, saved with `save_to_disk`, into MDS shards for training."""

from rae.survival.interrupts import INTERRUPTED, heed_interrupts

heed_interrupts(INTERRUPTED)  # the rest takes seconds to import

import argparse
from pathlib import Path
from typing import Any

import datasets

from rae.config.errors import UserError
from rae.data.conversion import add_options, add_val_fraction, convert_splits, options_from, run_command


class SavedDataset:
    """A split of a saved data set; its image and label columns are found by their types, or named."""

    def __init__(self, folder: str, split: str | None, image_column: str | None, label_column: str | None):
        self.data = _load(folder, split)
        self.image_column = image_column or _image_column(self.data)
        self.label_column = label_column or _label_column(self.data)
        for column in filter(None, (self.image_column, self.label_column)):
            if column not in self.data.features:
                raise UserError(f"there is no column {column!r}; there are: {', '.join(self.data.features)}")
        self.data = self.data.cast_column(self.image_column, datasets.Image(decode=False))
        self.fingerprint, self.remote = str(self.data._fingerprint), False
        feature = self.data.features.get(self.label_column)
        self.classes = feature.names if isinstance(feature, datasets.ClassLabel) else self._observed_classes()

    def _observed_classes(self) -> list[str]:
        if self.label_column is None:
            return ["."]
        values = self.data.unique(self.label_column)
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise UserError(f"column {self.label_column!r} does not hold class numbers; name another --label-column")
        return [str(label) for label in range(max(values) + 1)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        row = self.data[index]
        image = row[self.image_column]
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        label = row[self.label_column] if self.label_column else 0
        return image.get("path") or f"row {index}", data, label


def _load(folder: str, split: str | None) -> Any:
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder!r}")
    try:
        loaded = datasets.load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder!r} was not made by save_to_disk: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        if split is not None and loaded.split is not None and split != str(loaded.split):
            raise UserError(f"{folder!r} holds the split {str(loaded.split)!r} alone, not {split!r}")
        return loaded
    if split not in loaded:
        have = ", ".join(loaded)
        raise UserError(
            f"choose a split with --split: {have}" if split is None else f"no split {split!r}; there are: {have}"
        )
    return loaded[split]


def _image_column(data: Any) -> str:
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        have = ", ".join(found or data.features)
        raise UserError(f"{'several' if found else 'no'} image columns; name one with --image-column: {have}")
    return found[0]


def _label_column(data: Any) -> str | None:
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise UserError(f"several label columns; name one with --label-column: {', '.join(found)}")
    if found:
        return found[0]
    return next((name for name in ("label", "labels") if name in data.features), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="folder made by datasets' save_to_disk")
    parser.add_argument("--split", help="which split of a DatasetDict, e.g. train or validation")
    parser.add_argument("--image-column", help="default: the one column of type Image")
    parser.add_argument("--label-column", help="default: the one ClassLabel column, or 'label'")
    add_options(parser)
    add_val_fraction(parser)
    arguments = parser.parse_args()
    options = options_from(arguments)
    datasets.disable_progress_bars()
    source = SavedDataset(arguments.dataset, arguments.split, arguments.image_column, arguments.label_column)
    convert_splits(source, options, arguments.val_fraction)


if __name__ == "__main__":
    run_command(main)
