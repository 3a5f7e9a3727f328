"""Say what something holds, and whether it is whole: a run, a checkpoint, an export, weights or a data set.

PATH, local or s3://, is a run's folder, a folder of checkpoints, a checkpoint (a folder or a Composer .pt file), an
exported folder of any format, a published model.pt, a stat.pt, or a folder of MDS shards. Headers are read, not models
built, and nothing in it is executed. What is damaged or missing is named, and the exit code is then 1.

examples: python -m rae inspect runs/demo
          python -m rae inspect runs/demo/checkpoints/ep8-ba640 --verify
          python -m rae inspect s3://bucket/imagenet-384/train
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="what to look into")
    parser.add_argument(
        "--verify", action="store_true", help="compare checkpoints with their hashes, which reads every byte"
    )


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rae.exchange.inspection.dispatch import inspect

    report = inspect(arguments.path, arguments.verify)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    console.print(f"{escape(arguments.path)}: {report.kind}")
    for title, rows in report.tables.items():
        width = max(len(row) for row in rows)
        table = Table(*[""] * width, title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for fault in report.faults:
        console.print(f"damaged: {escape(fault)}")
    if report.faults:
        sys.exit(1)
