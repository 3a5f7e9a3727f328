"""Train an autoencoder, or a generator on one's latents: ``composer train.py yamls/rae_dino.yaml key=value …``"""

import argparse
import gc
import os
import signal
import sys

from rae.survival.interrupts import run_interruptibly


def main() -> None:
    from rae.config.errors import RankError, UserError
    from rae.config.loading import load_config
    from rae.survival.processes import follow_parent

    parser = argparse.ArgumentParser(
        description="Train a Representation Autoencoder, or a generator on one's latents, from a YAML file.",
        epilog="Launch with `composer train.py …` (one process per GPU) or `composer -n 2 train.py …`.",
    )
    parser.add_argument("config", help="YAML file, e.g. yamls/rae_dino.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key, e.g. data.batch_size=64")
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        follow_parent()  # a rank that outlived its killed launcher would train on beside the next start
    try:
        config = load_config(arguments.config, arguments.overrides)
        # Composer takes seconds to import: not before the configuration stands, and without looking for garbage in it.
        gc.disable()
        from rae.training.run import train

        gc.enable()
        train(config)
    except UserError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, for those that are left; this one is leaving
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_interruptibly(main, "interrupted; the same command goes on")
