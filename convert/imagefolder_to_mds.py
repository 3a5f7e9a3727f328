"""Turn a folder of images, in class sub-folders or not, local or in an S3 bucket, into MDS shards for training."""

from rae.survival.interrupts import INTERRUPTED, heed_interrupts

heed_interrupts(INTERRUPTED)  # the rest takes seconds to import

import argparse
from dataclasses import replace

from rae.data import conversion
from rae.data.listing import list_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="folder of images, or s3://…; each sub-folder (nested ones too) is a class")
    conversion.add_options(parser)
    parser.add_argument("--skip-empty-classes", action="store_true", help="leave out folders without images")
    split = parser.add_mutually_exclusive_group()
    conversion.add_val_fraction(split)
    split.add_argument(
        "--splits",
        metavar="A,B",
        help="sub-folders of IMAGES that are splits: IMAGES/A becomes OUT/A, with one class list",
    )
    arguments = parser.parse_args()
    options, images = conversion.options_from(arguments), arguments.images.rstrip("/")
    if not arguments.splits:
        conversion.convert_splits(list_images(images, arguments.skip_empty_classes), options, arguments.val_fraction)
        return
    names = arguments.splits.split(",")
    sources = [list_images(f"{images}/{name}", arguments.skip_empty_classes) for name in names]
    classes = sorted({name for source in sources for name in source.classes})
    for name, source in zip(names, sources, strict=True):
        source.classes, source.labels = classes, {name: label for label, name in enumerate(classes)}
        into = replace(options, out=f"{options.out.rstrip('/')}/{name}")
        conversion.report(conversion.write_shards(source, into), into.out)


if __name__ == "__main__":
    conversion.run_command(main)
