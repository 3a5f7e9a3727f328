"""Turn a Hugging Face data set, saved with `save_to_disk` or as Parquet files, into MDS shards for training."""

from rae.survival.interrupts import INTERRUPTED, heed_interrupts

heed_interrupts(INTERRUPTED)  # the rest takes seconds to import

import argparse

import datasets

from rae.data.conversion import add_options, add_val_fraction, convert_splits, options_from, refuse_inside, run_command
from rae.data.tables import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="folder made by datasets' save_to_disk, or of Parquet files, or such a file")
    parser.add_argument("--split", help="which split, if there are several, e.g. train or validation")
    parser.add_argument("--image-column", help="default: the one column of type Image, or of bytes")
    parser.add_argument("--label-column", help="default: the one ClassLabel column, or 'label'")
    add_options(parser)
    add_val_fraction(parser)
    arguments = parser.parse_args()
    options = options_from(arguments)
    refuse_inside(options.out, arguments.dataset)
    datasets.disable_progress_bars()
    columns = arguments.image_column, arguments.label_column
    source = Table(arguments.dataset, arguments.split, *columns, not options.no_labels, options.caption)
    convert_splits(source, options, arguments.val_fraction)


if __name__ == "__main__":
    run_command(main)
