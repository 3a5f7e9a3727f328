"""``make soak``: kill runs at many moments, start them again, and compare their ends with undisturbed runs.

Prints what was killed, when and what was lost, and then which layouts go on from which; exits 1 if any end differs.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rae.survival.checkpoints import age, list_checkpoints
from tests.conftest import (
    LAYOUTS,
    assert_same_state,
    figures,
    launch,
    layout_settings,
    make_shards,
    resumable,
)
from tests.s3 import Server
from tests.test_survival import keep_until, start

console = Console(width=120)
Moment = Callable[[Path], bool]


def last(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return {"batch": 0}


def step(batch: int) -> tuple[str, Moment]:
    phase = "before D" if batch <= 2 else "D only" if batch <= 4 else "GAN on"
    return f"{phase}, step {batch}", lambda run_dir: last(run_dir)["batch"] >= batch


def saving(batch: int) -> tuple[str, Moment]:
    return f"saving, step {batch}", lambda run_dir: any(
        age(path.name.removeprefix(".saving-"))[0] >= batch
        for folder in ("checkpoints", "uploads/node0")
        for path in (run_dir / folder).glob(".saving-*")
    )


def uploading(batch: int) -> tuple[str, Moment]:
    return f"uploading, step {batch}", lambda run_dir: any(
        age(path.name)[0] >= batch for path in (run_dir / "uploads/node0").glob("ep*")
    )


def evaluating(batch: int) -> tuple[str, Moment]:
    return (
        f"evaluating, step {batch}",
        lambda run_dir: last(run_dir)["batch"] >= batch and "loss/train/total" in last(run_dir),
    )


def starting(seconds: float) -> tuple[str, Moment]:
    until: list[float] = []

    def reached(run_dir: Path) -> bool:
        until[:] = until or [time.monotonic() + seconds]
        return time.monotonic() >= until[0]

    return f"starting, {seconds:.1f} s", reached


def anywhen(rng: random.Random) -> tuple[str, Moment]:
    seconds, before = rng.uniform(0, 2), []
    _, later = starting(seconds)

    def reached(run_dir: Path) -> bool:
        before[:] = before or [last(run_dir)["batch"]]
        return last(run_dir)["batch"] != before[0] and later(run_dir)

    return f"random, {seconds:.2f} s of training", reached


def chains() -> list[tuple[str, list[tuple[str, tuple[str, Moment]]]]]:
    """(layout, kills), each kill (victim, moment); a chain's kills hit one run, one after the other."""
    rng = random.Random(0)
    two_ranks = [
        *[("all", starting(6)), ("launcher", step(1)), ("rank 1", step(3)), ("all", evaluating(5))],
        *[("rank 0", saving(6)), ("launcher", step(9))],
    ]
    one = [
        *[("all", starting(6)), ("all", step(1)), ("all", step(3)), ("worker", step(5)), ("all", evaluating(5))],
        *[("all", saving(6)), ("worker", step(8)), ("all", saving(10))],
    ]
    bucket = [
        *[("all", step(1)), ("all", uploading(2)), ("all", step(5)), ("worker", step(7)), ("all", uploading(8))],
        ("all", evaluating(10)),
    ]
    at_random = [[("all", anywhen(rng)) for _ in range(4)] for _ in range(2)]
    return [
        *[("one", one), ("ddp", two_ranks), ("fsdp", two_ranks), ("bucket", bucket)],
        *[("one", at_random[0]), ("fsdp", at_random[1])],
    ]


def settings_for(layout: str, shards: Path, run_dir: Path) -> tuple[dict, int]:
    settings = resumable(shards, run_dir)
    settings["callbacks"] = {}
    settings["loggers"] = {"jsonl": {}}
    count, settings["parallelism"], settings["fsdp"] = LAYOUTS.get(layout, LAYOUTS["one"])
    if layout == "bucket":
        settings["trainer"]["save_folder"] = f"s3://images/runs/{run_dir.name}"
        for split in ("train", "eval"):
            settings["data"][split]["path"] = f"s3://images/data/{split}"
    return settings, count


def kill(process, victim: str) -> None:
    ranks = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "launcher":
        process.kill()
    elif victim == "worker":
        (child for child in ranks[0].children() if "train.py" in " ".join(child.cmdline())).__next__().kill()
    else:
        ranks[int(victim.split()[1])].kill()
    process.wait(120)


def checkpoints_of(settings: dict) -> str:
    return settings["trainer"].get("save_folder", f"{settings['run_dir']}/checkpoints")


def newest_complete(settings: dict) -> str:
    return next((c.name for c in list_checkpoints(checkpoints_of(settings)) if c.parts), "none")


def same(settings: dict, reference: dict) -> bool:
    try:
        assert_same_state(checkpoints_of(reference), checkpoints_of(settings))
    except AssertionError:
        return False
    a, b = (figures(Path(each["run_dir"])) for each in (reference, settings))
    steps = {record["batch"]: record for record in b if "loss/train/total" in record}
    # In the bucket's chain every start has an empty disk, so that only the last start's lines are left.
    return all(steps.get(r["batch"], r) == r for r in a if "loss/train/total" in r)


def soak(root: Path, shards: Path) -> bool:
    table = Table("layout", "killed", "moment", "at step", "newest complete", "steps lost", "end", title="kills")
    good, references = True, {}
    for number, (layout, kills) in enumerate(chains()):
        if layout not in references:
            settings, count = settings_for(layout, shards, root / f"reference-{layout}")
            launch(settings, root / f"{layout}-launch", ranks=count)
            references[layout] = settings
        settings, count = settings_for(layout, shards, root / f"run{number}")
        run_dir, rows = Path(settings["run_dir"]), []
        for victim, (name, moment) in kills:
            process = start(settings, root / f"launch{number}", ranks=count)
            while process.poll() is None and not moment(run_dir):
                time.sleep(0.002)
            if process.poll() is not None:
                rows.append([victim, name, "ended before", newest_complete(settings), "–"])
                continue
            kill(process, victim)
            saved, seen = newest_complete(settings), last(run_dir)["batch"]
            lost = max(0, seen - (age(saved)[0] if saved != "none" else 0))
            rows.append([victim, name, str(seen), saved, str(lost)])
            if layout == "bucket":
                shutil.rmtree(run_dir)
        done = launch(settings, root / f"launch{number}", ranks=count, check=False)
        equal = done.returncode == 0 and same(settings, references[layout])
        good &= equal
        for row in rows:
            table.add_row(layout, *row, "bit-identical" if equal else f"DIFFERS (exit {done.returncode})")
        console.print(f"{layout}: {len(rows)} kills, {'bit-identical' if equal else 'DIFFERS'}")
        if not equal:
            console.print(done.stderr[-2000:])
    console.print(table)
    return good


def matrix(root: Path, shards: Path) -> bool:
    """Save in each layout, go on in each."""
    layouts = {**LAYOUTS, "fsdp, whole": (2, "fsdp", {"state_dict_type": "full"})}
    table = Table("saved as \\ resumed as", *layouts, title="largest deviation of a loss from the undisturbed run")
    good = True
    for saved, (count, parallelism, fsdp) in layouts.items():
        base = "fsdp" if "fsdp" in saved else saved
        settings = layout_settings(shards, root / f"from-{saved}", base) | {"parallelism": parallelism, "fsdp": fsdp}
        launch(settings, root / "matrix", ranks=count)
        row = []
        for resumed, (ranks, how, options) in layouts.items():
            run_dir = root / f"{saved}-{resumed}"
            shutil.copytree(settings["run_dir"], run_dir)
            keep_until(run_dir, 4)
            again = layout_settings(shards, run_dir, base) | {"parallelism": how, "fsdp": options}
            done = launch(again, root / "matrix", ranks=ranks, check=False)
            if done.returncode:
                row.append("FAILED")
                console.print(done.stderr[-2000:])
            elif same(again, settings):
                row.append("0, bit for bit")
            else:
                row.append(f"{deviation(Path(settings['run_dir']), run_dir):.1e}")
            good &= not done.returncode and (row[-1].startswith("0,") or float(row[-1]) < 2e-3)
        good &= row[list(layouts).index(saved)].startswith("0,")
        table.add_row(saved, *row)
    console.print(table)
    return good


def deviation(a: Path, b: Path) -> float:
    pairs = zip(figures(a), figures(b), strict=True)
    names = ("loss/train/total", "loss/train/l1", "loss/train/perceptual")
    return max(abs(x[n] - y[n]) / abs(x[n]) for x, y in pairs for n in names if n in x)


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="rae-soak-"))
    shards = make_shards(root / "shards")
    server = Server(root / "s3")
    os.environ.update(server.env())
    make_shards(root / "shards", "s3://images/data")
    began = time.monotonic()
    try:
        good = all([soak(root, shards), matrix(root, shards)])
    finally:
        server.stop()
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    shutil.rmtree(root, ignore_errors=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
