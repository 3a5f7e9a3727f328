"""The suite as other processors, and a busy machine, would run it: ``make test-processors``, about an hour.

Rounding depends on which instructions a processor has, and time limits on what else it does. A test that fails here and
not in ``make test`` asks for more digits, or more haste, than what it tests can give.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

ORDINARY: dict[str, dict[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "busy": {},
}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """As many processes that do nothing but compute, until this context ends."""
    # In sessions of their own, as other people's are: in ours, the suite's niceness would leave it next to nothing.
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def suite(kind: str, words: list[str]) -> tuple[int, str, float]:
    """Run it; its exit status, pytest's last line, and minutes."""
    nice = ["nice", "-n", "19"] if kind == "busy" else []
    began, last = time.monotonic(), ""
    with busy(4 if kind == "busy" else 0):
        command = [*nice, sys.executable, "-m", "pytest", *words]
        with subprocess.Popen(command, env=os.environ | ORDINARY[kind], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() if re.search(r"\d+ (passed|failed|error)", line) else last
    return process.returncode, last, (time.monotonic() - began) / 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"which (default: all): {', '.join(ORDINARY)}")
    parser.add_argument("--tests", nargs="*", default=[], help="only these, as pytest names them")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(ORDINARY):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are: {', '.join(ORDINARY)}")
    table, failed = Table("processor", "outcome", "minutes"), False
    for kind in arguments.kinds or ORDINARY:
        print(f"{kind}: {' '.join(f'{k}={v}' for k, v in ORDINARY[kind].items()) or 'beside four busy processes'}")
        status, last, minutes = suite(kind, arguments.tests)
        table.add_row(kind, last or f"ended with {status}", f"{minutes:.1f}")
        failed |= status != 0
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
