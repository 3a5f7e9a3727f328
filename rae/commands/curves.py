"""Draw a run's figures from its metrics.jsonl into curves.png: losses, the GAN, learning rates, metrics.

example: python -m rae curves runs/demo
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="a run's folder, e.g. runs/demo")


def run(arguments: argparse.Namespace) -> None:
    from rae.evaluation.curves import plot

    print(plot(arguments.run_dir))
