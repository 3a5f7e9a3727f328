"""Check a finished data set: every shard against its hashes, and that every image decodes."""

from rae.survival.interrupts import heed_interrupts

heed_interrupts()  # the rest takes seconds to import

import argparse
import sys

from rae.config.errors import UserError
from rae.data.conversion import run_command
from rae.data.parts import Options
from rae.data.verification import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Exit code 0: all is sound; 1: there is damage.")
    parser.add_argument("data", help="MDS data set: a local folder, or s3://bucket/folder")
    parser.add_argument("--workers", type=int, default=Options.workers, help="processes (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="images that decode in part are damage, too")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, not {arguments.workers}")
    sound, damaged, faults = verify(arguments.data, arguments.workers)
    for line in [*damaged, *faults]:
        print(line)
    in_part = f"{len(damaged):,} damaged, " if damaged else ""
    print(f"{arguments.data}: {sound:,} samples are sound, {in_part}{len(faults):,} fault{'s' * (len(faults) != 1)}")
    sys.exit(bool(faults or (arguments.strict and damaged)))


if __name__ == "__main__":
    run_command(main)
