"""Run a configuration's frozen encoder over its data once, and store the latents as MDS shards with their statistics.

Several ranks share the work: composer -n 8 convert/latents_to_mds.py yamls/rae_dino.yaml OUT
"""

from rae.survival.interrupts import INTERRUPTED, heed_interrupts

heed_interrupts(INTERRUPTED)  # the rest takes seconds to import

import argparse

from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import import_plugins
from rae.data.conversion import report, run_command
from rae.data.parts import Options
from rae.exchange.latents import DTYPES, write_latents
from rae.survival.processes import join_ranks, rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of a run, of either stage: its encoder, image_size and data are used")
    parser.add_argument("out", help="where the shards go: a local folder, or s3://bucket/folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the YAML")
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of latents (default: %(default)s)")
    parser.add_argument("--with-images", action="store_true", help="store the crops too, to train a decoder from them")
    parser.add_argument("--flips", action="store_true", help="store mirror images' latents too, each as a sample")
    parser.add_argument("--batch-size", type=int, default=64, help="images a forward pass (default: %(default)s)")
    parser.add_argument("--shard-size", default="64mb", help="largest shard (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing or unfinished data set")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    config = load_config(arguments.config, arguments.overrides)
    import_plugins(config.imports)
    options = Options(arguments.out, shard_size=arguments.shard_size, overwrite=arguments.overwrite)
    join_ranks()
    summary = write_latents(
        config, options, arguments.split, arguments.dtype, arguments.with_images, arguments.batch_size, arguments.flips
    )
    if rank() == 0:
        print(f"{arguments.dtype} changes the latents by {summary['options']['error']:.2g} of their root mean square")
        report(summary, arguments.out)


if __name__ == "__main__":
    run_command(main)
