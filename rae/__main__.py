"""``python -m rae COMMAND``: what is done with an autoencoder or a generator before and after training."""

import argparse
import importlib
import keyword
import os
import sys

from rae.survival.interrupts import run_interruptibly

COMMANDS = {  # name, which is its module's in rae/commands -> what it does
    "demo": "train a small autoencoder on photographs, in minutes on two CPU cores",
    "curves": "draw a run's figures",
    "evaluate": "measure autoencoders or generators: a table of every metric, several side by side",
    "export": "write an autoencoder or a generator as our folder, published weights or a diffusers folder",
    "import": "make our folder of published weights or a diffusers folder",
    "inspect": "what a run, checkpoint, export or data set holds, and whether it is whole",
    "plan": "what a run will take: operations, memory, time, bytes; before anything is spent",
    "reconstruct": "reconstruct images: pictures, figures of each, a page to look through them",
    "sample": "sample images from a generator: pictures, a grid, a page by class",
    "stats": "the mean and variance of a data set's latents",
}


def _module(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def main(words: list[str] | None = None) -> None:
    """Parse the command line, and run the command; only its own module is imported.

    Args:
        words: of the command line, by default this process's.
    """
    from rae.config.errors import RankError, UserError

    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog="python -m rae",
        description="Work with Representation Autoencoders and generators. Training is `composer train.py YAML`.",
        epilog="`python -m rae COMMAND --help` explains a command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        module = importlib.import_module(f"rae.commands.{_module(name)}") if name == chosen else None
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=module.__doc__ if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    try:
        _check_given(arguments)
        arguments.run(arguments)
    except OSError as error:  # that nothing closer to it explains
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _check_given(arguments: argparse.Namespace) -> None:
    """Raise UserError for an empty text: a variable of the shell that is not set."""
    from rae.config.errors import UserError

    for name, value in vars(arguments).items():
        if "" in (value if isinstance(value, list) else [value]):
            raise UserError(f"{name.upper()} is empty; if it comes from a variable, set that")


if __name__ == "__main__":
    run_interruptibly(main)
