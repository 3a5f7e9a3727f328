"""Turn images in folders or tar files (ImageNet's, WebDataset), local or in S3, into MDS shards for training."""

from rae.survival.interrupts import INTERRUPTED, heed_interrupts

heed_interrupts(INTERRUPTED)  # the rest takes seconds to import

import argparse
import functools
from dataclasses import replace

from rae.data import conversion
from rae.data.sources import of_one_class_list, open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "images", help="folder of images, tar files ('shards/{000..012}.tar'), or s3://…; a sub-folder is a class"
    )
    conversion.add_options(parser)
    parser.add_argument("--skip-empty-classes", action="store_true", help="leave out folders without images")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="what says the classes of images without folders: ImageNet's devkit, torchvision's meta.bin, a .csv",
    )
    parser.add_argument("--image-key", metavar="SUFFIX", help="of a WebDataset's images, where samples have several")
    parser.add_argument("--label-key", metavar="SUFFIX", help="of a WebDataset's labels (default: cls)")
    split = parser.add_mutually_exclusive_group()
    conversion.add_val_fraction(split)
    split.add_argument(
        "--splits",
        metavar="A,B",
        help="sub-folders of IMAGES that are splits: IMAGES/A becomes OUT/A, with one class list",
    )
    arguments = parser.parse_args()
    options, images = conversion.options_from(arguments), arguments.images.rstrip("/") or "/"
    conversion.refuse_inside(options.out, images)
    names = ("skip_empty_classes", "caption", "labels", "image_key", "label_key", "no_labels")
    listed = functools.partial(open_source, **{name: getattr(arguments, name) for name in names})
    if not arguments.splits:
        conversion.convert_splits(listed(images), options, arguments.val_fraction)
        return
    splits = arguments.splits.split(",")
    sources = of_one_class_list([listed(f"{images}/{name}") for name in splits])
    for name, source in zip(splits, sources, strict=True):
        into = replace(options, out=f"{options.out.rstrip('/')}/{name}")
        conversion.report(conversion.write_shards(source, into), into.out)


if __name__ == "__main__":
    conversion.run_command(main)
