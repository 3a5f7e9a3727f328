"""``make bench``: print every ratio, and store them with a picture.

Sections: step (the training step through the Trainer, in a bare loop, and as the textbook has it), limits (operations,
distance from the machine's best, where the time goes), memory, costs (weight average, checkpoints), startup, scaling.
"""

import argparse
import json
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rae.plan.bench import costs, scaling, startup, step
from rae.plan.bench.data import SHORT, make_photographs, write_shards
from rae.plan.bench.measure import console, show
from rae.survival.interrupts import run_interruptibly

SECTIONS = ("step", "limits", "memory", "costs", "startup", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rae.plan.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--batch", type=int, default=32 if gpu else 4, help="images a step (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=10 if gpu else 3, help="turns of each pair (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of bench.json and bench.png")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="rae-bench-") as name:
        folder = Path(name)
        prepare(folder)
        found = measure(folder, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench.json").write_text(json.dumps(found, indent=2) + "\n")
    if "step" in found:
        draw(found, arguments.out / "bench.png")
    console.print(f"[bold]{arguments.out}/bench.json[/]")


def prepare(folder: Path) -> None:
    """Shards of photographs, and random weights, for all sections."""
    make_photographs(folder / "images", 64)
    write_shards("shards", SHORT)(folder)
    step.write_weights(folder)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the sections; returns their figures."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": _processor()}
    console.print("  ".join(f"{key} {value}" for key, value in machine.items()))
    found: dict[str, Any] = {"machine": machine, "batch": arguments.batch}
    if {"step", "limits"} & set(arguments.sections):
        beside = step.trainer_beside(folder, arguments.batch, arguments.turns + 1)
        found["step"] = {
            "ratios": step.ratios(beside),
            "seconds": {phase: show(f"a step: {phase}", seconds) for phase, seconds in beside.seconds.items()},
            "deviation": beside.deviation,
        }
        worst = {name: max(deviations.values()) for name, deviations in beside.deviation.items()}
        console.print(f"largest deviation of a loss from the Trainer's: {worst}")
        if "limits" in arguments.sections:
            found["limits"] = step.limits(folder, beside.seconds, arguments.batch)
            show_limits(found["limits"])
    if "memory" in arguments.sections:
        found["memory"] = step.memory(folder, max(1, arguments.batch // 2))
        show_memory(found["memory"])
    if "costs" in arguments.sections:
        found["costs"] = costs.measure(arguments.turns, beside.seconds["+ GAN"] if "step" in found else None)
    if "startup" in arguments.sections:
        found["startup"] = show("start-up", startup.start_up(folder))
    if "scaling" in arguments.sections:
        found["scaling"] = scaling.scaling(folder)
        found["projected efficiency"] = scaling.projections()
        show_scaling(found["scaling"])
        show_projections(found["projected efficiency"])
    found["goals"] = goals(found)
    show_goals(found["goals"])
    return found


def goals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at, what was found, and whether it holds, for the sections that ran."""
    rows: list[tuple[str, float, str, float]] = []
    for phase, each in found.get("step", {}).get("ratios", {}).items():
        aim = 1.6 if phase == "+ GAN" else 1.25
        rows.append((f"textbook / Trainer: {phase}", each["textbook / Trainer"]["median"], "≥", aim))
        rows.append((f"Trainer / bare loop: {phase}", each["Trainer / bare"]["median"], "≤", 1.03))
    if "step" in found:
        deviations = [value for each in found["step"]["deviation"].values() for value in each.values()]
        worst = float(torch.tensor(deviations).max())  # NaN if there is one
        rows.append(("largest deviation of a loss", worst, "≤", 1e-4))
    for row in found.get("memory", []):
        name = f"memory / textbook's: batch {row['batch']}, {row['image_size']} px, depth {row['depth']}"
        rows.append((name, row["ours"] / row["textbook"], "≤", 0.75))
    if "ema, share of a step" in found.get("costs", {}):
        rows.append(("EMA, share of a step", found["costs"]["ema, share of a step"], "≤", 0.01))
    if "startup" in found:
        rows.append(("train.py --help, seconds", found["startup"]["train.py --help"]["median"], "≤", 3.0))
    return {
        name: {"found": value, "goal": f"{sign} {aim:g}", "holds": value >= aim if sign == "≥" else value <= aim}
        for name, value, sign, aim in rows
    }


def show_goals(found: dict[str, dict[str, Any]]) -> None:
    """The table of :func:`goals`."""
    table = Table("", "found", "goal", "holds", title="goals")
    for name, row in found.items():
        table.add_row(name, f"{row['found']:.3g}", row["goal"], "yes" if row["holds"] else "no")
    console.print(table)


def show_projections(found: dict[str, dict[str, dict[int, float]]]) -> None:
    """A table of projected efficiencies; the model is :func:`rae.plan.bench.scaling.projected`'s."""
    table = Table(
        "decoder", "images a GPU", "8 GPUs", "64", "512", title="projected efficiency, not measured (DDP, H100)"
    )
    for images, sizes in found.items():
        for size, efficiency in sizes.items():
            table.add_row(size, images, *(f"{value:.2f}" for value in efficiency.values()))
    console.print(table)


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def show_limits(limits: dict[str, Any]) -> None:
    """Tables of operations, rates and shares."""
    best = ", ".join(f"{name} {rate:,.0f}" for name, rate in limits["best GFLOP/s"].items())
    table = Table("", *next(iter(limits["phases"].values())), title=f"distance from the limit (best GFLOP/s: {best})")
    for phase, row in limits["phases"].items():
        table.add_row(phase, *(f"{v:.2f}" if v < 10 else f"{v:,.0f}" for v in row.values()))
    console.print(table)
    table = Table("where a GAN-phase step's time goes", "share")
    for group, share in limits["shares"].items():
        table.add_row(group, f"{share:.2f}")
    console.print(table)


def show_memory(rows: list[dict[str, Any]]) -> None:
    """A table of peak memory an image."""
    table = Table(
        "batch", "pixels", "depth", "ours", "+ checkpointing", "textbook", "ours / textbook", title="peak MB an image"
    )
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("ours", "checkpointing", "textbook")]
        which = [str(row[key]) for key in ("batch", "image_size", "depth")]
        table.add_row(*which, *sizes, f"{row['ours'] / row['textbook']:.2f}")
    console.print(table)


def show_scaling(results: dict[str, dict[str, Any]]) -> None:
    """A table of layouts, and projections for the published recipe."""
    table = Table("", "ms a step", "efficiency", "MB sent a step and rank", "of which", title="fixed work a rank")
    for layout, result in results.items():
        ranks = scaling.LAYOUTS[layout][0]
        kinds = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in result["bytes"].items() if size > 1e4)
        sent = scaling.ring_bytes(result["bytes"], ranks) / 1e6
        table.add_row(layout, f"{result['seconds'] * 1e3:,.0f}", f"{result['efficiency']:.2f}", f"{sent:.1f}", kinds)
    console.print(table)


def draw(found: dict[str, Any], path: Path) -> None:
    """The ratios as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    phases = found["step"]["seconds"]
    for i, side in enumerate(("textbook", "Trainer", "bare")):
        middle = [phases[p][side]["median"] for p in phases]
        spread = [
            [abs(phases[p][side][end] - m) for p, m in zip(phases, middle, strict=True)] for end in ("min", "max")
        ]
        times.bar([x + 0.27 * (i - 1) for x in range(len(phases))], middle, 0.25, yerr=spread, capsize=3, label=side)
    times.set_xticks(range(len(phases)), list(phases))
    times.set_title("seconds a step")
    times.legend()
    rows = found.get("memory", [])
    for i, side in enumerate(("textbook", "ours", "checkpointing")):
        values = [row[side] / 1e6 for row in rows]
        memory.bar([x + 0.27 * (i - 1) for x in range(len(rows))], values, 0.25, label=side)
    labels = [f"batch {row['batch']}\n{row['image_size']} px\ndepth {row['depth']}" for row in rows]
    memory.set_xticks(range(len(rows)), labels)
    memory.set_title("peak MB an image")
    if rows:
        memory.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_interruptibly(main)
