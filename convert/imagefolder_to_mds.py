"""Turn a folder of images, in class sub-folders or not, into MDS shards for training."""

import argparse
from pathlib import Path

from PIL import Image

from rae.registry import UserError
from rae.shards import add_options, options_from, report, run_command, write_shards


class ImageFolder:
    """Every image file below ``root``, at any depth; its class is the folder it is in (``.`` for root itself)."""

    def __init__(self, root: str):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"there is no folder {root!r}")
        Image.init()
        known = {suffix for suffix, format in Image.EXTENSION.items() if format in Image.OPEN}
        self.files = sorted(
            path.relative_to(self.root)
            for path in self.root.rglob("*")
            if path.suffix.lower() in known and path.is_file() and not path.name.startswith(".")
        )
        if not self.files:
            raise UserError(f"there are no images below {root!r}")
        self.classes = sorted({file.parent.as_posix() for file in self.files})
        self.labels = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        file = self.files[index]
        return file.as_posix(), (self.root / file).read_bytes(), self.labels[file.parent.as_posix()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="folder of images; each sub-folder (nested ones too) is a class")
    add_options(parser)
    arguments = parser.parse_args()
    options = options_from(arguments)
    print(report(write_shards(ImageFolder(arguments.images), options), options.out))


if __name__ == "__main__":
    run_command(main)
