"""``python -m rae COMMAND``: what is done with an autoencoder before and after training."""

import argparse
import importlib
import sys

from rae.registry import UserError

COMMANDS = {  # name, which is its module's in rae/commands -> what it does
    "curves": "draw a run's figures",
}


def main() -> None:
    """Parse the command line, and run the command; only its own module is imported."""
    parser = argparse.ArgumentParser(
        prog="python -m rae",
        description="Work with Representation Autoencoders. Training is `composer train.py YAML`.",
        epilog="`python -m rae COMMAND --help` explains a command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        module = importlib.import_module(f"rae.commands.{name}") if name == chosen else None
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=module.__doc__ if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
