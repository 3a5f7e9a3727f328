"""Two installations side by side: ``python -m rae.plan.bench.versions OLD/bin/python NEW/bin/python``.

Each runs its own benches, in turns, in processes of their own; what both measured is compared.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from rae.plan.bench.measure import console


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rae.plan.bench.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", help="interpreter of one installation")
    parser.add_argument("new", help="of the other")
    parser.add_argument("--sections", nargs="+", default=["step", "costs", "startup", "scaling"], metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=2, help="times that both run (default: %(default)s)")
    arguments = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {"old": defaultdict(list), "new": defaultdict(list)}
    for turn in range(arguments.rounds):
        sides = ("old", "new") if turn % 2 == 0 else ("new", "old")
        for side in sides:
            for name, value in medians(bench(getattr(arguments, side), arguments.sections)):
                seconds[side][name].append(value)
    table = Table("median seconds", "old", "new", "new / old")
    for name in seconds["old"].keys() & seconds["new"].keys():
        old, new = median(seconds["old"][name]), median(seconds["new"][name])
        table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{new / old:.2f}")
    console.print(table)


def bench(python: str, sections: list[str]) -> dict[str, Any]:
    """What one installation's ``python -m rae.plan.bench`` finds, run in its own project folder with its own tools."""
    where = [python, "-P", "-c", "import rae; print(rae.__file__)"]
    root = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()).parent.parent
    path = {**os.environ, "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-m", "rae.plan.bench", "--turns", "2", "--out", out, "--sections", *sections]
        subprocess.run(command, check=True, cwd=root, env=path)
        return json.loads(Path(out, "bench.json").read_text())


def medians(found: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(where, value) of each measured time in what a bench found."""
    if isinstance(found, dict) and "median" in found:
        yield path, found["median"]
    elif isinstance(found, dict) and isinstance(found.get("seconds"), float):
        yield path, found["seconds"]
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from medians(value, f"{path}, {key}" if path else key)


if __name__ == "__main__":
    main()
