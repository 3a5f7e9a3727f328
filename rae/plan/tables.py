"""The plan as tables."""

from functools import partial
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from rae.plan.report import RESERVE

UNKNOWN = "unknown"
size = partial(decimal, precision=2)


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print everything."""
    console = console or Console(emoji=False)
    microbatches = f"{plan['microbatches']} × {plan['microbatch']} images" if plan["microbatches"] > 1 else "at once"
    console.print(
        f"[bold]{escape(plan['run'])}[/]: {plan['gpus']} GPU{'s' if plan['gpus'] > 1 else ''}, batch {plan['batch']} "
        f"({microbatches} a GPU), {plan['precision']}; encoder: {escape(plan['encoder'])}; no weights were loaded"
    )
    for table in (_networks(plan), _phases(plan), _data(plan), _memory(plan), _hours(plan)):
        console.print(table)
    console.print(_checkpoints(plan["checkpoints"]), markup=False)
    for each in plan["measured"]:
        console.print(_measured(each), markup=False)


def _networks(plan: dict[str, Any]) -> Table:
    phases = [phase["name"] for phase in plan["phases"]]
    table = Table("network", "parameters", "", *phases, title="parameters, and GFLOP an image in each phase")
    _right(table, 1, 3)
    names = dict.fromkeys([*plan["parameters"], *(name for counts in plan["gflops"] for name in counts)])
    for name in names:
        number, trained = plan["parameters"].get(name, (None, False))
        size = "" if number is None else f"{number / 1e6:,.1f} M"
        kind = "" if number is None else ("trained" if trained else "frozen")
        table.add_row(name, size, kind, *(_operations(counts.get(name, 0)) for counts in plan["gflops"]))
    table.add_section()
    total = sum(number for number, _ in plan["parameters"].values())
    table.add_row("all", f"{total / 1e6:,.1f} M", "", *(_operations(phase["gflops"]) for phase in plan["phases"]))
    return table


def _operations(gflops: float) -> str:
    return f"{gflops:,.0f}" if gflops >= 10 else f"{gflops:.2g}" if gflops else "–"


def _phases(plan: dict[str, Any]) -> Table:
    table = Table("phase", "from step", "to", "share of steps", "samples", title="the run")
    _right(table, 1, 5)
    for phase in plan["phases"]:
        known = phase["begin"] is not None
        span = (f"{phase['begin']:,}", f"{phase['end']:,}") if known else (UNKNOWN, UNKNOWN)
        samples = f"{(phase['end'] - phase['begin']) * plan['batch']:,}" if known else UNKNOWN
        table.add_row(phase["name"], *span, f"{phase['share']:.1%}", samples)
    images = plan["images"]
    epoch = f"an epoch is {images:,} images, {images // plan['batch']:,} steps" if images else f"images: {UNKNOWN}"
    table.caption = epoch if images else f"{epoch}; say --images N"
    return table


def _data(plan: dict[str, Any]) -> Table:
    table = Table("data", "images", "shards", "bytes", "path", title="data")
    _right(table, 1, 4)
    for each in plan["data"]:
        if each["fault"]:
            table.add_row(escape(each["name"]), UNKNOWN, UNKNOWN, UNKNOWN, escape(f"{each['path']}: {each['fault']}"))
        else:
            table.add_row(
                escape(each["name"]),
                f"{each['images']:,}",
                f"{each['shards']:,}",
                size(each["bytes"]),
                escape(each["path"]),
            )
    return table


def _memory(plan: dict[str, Any]) -> Table:
    layouts = plan["memory"]
    heads = [f"[bold]{name}[/]" if each["configured"] else name for name, each in layouts.items()]
    title = f"GB a GPU, {plan['gpus']} GPU{'s' if plan['gpus'] > 1 else ''}"
    table = Table("", *heads, title=title, caption="bold: as configured; activations: all else at the worst moment")
    _right(table, 1, len(heads) + 1)
    rows = [key for key in next(iter(layouts.values())) if key not in ("total", "peak in", "configured")]
    for row in rows:
        if any(each[row] for each in layouts.values()):
            table.add_row(row, *(f"{each[row] / 1e9:.2f}" for each in layouts.values()))
    table.add_section()
    table.add_row("all", *(f"{each['total'] / 1e9:.2f}" for each in layouts.values()))
    return table


def _hours(plan: dict[str, Any]) -> Table:
    """Hours of each phase; images a second where an epoch's length is not known."""
    known = all(each["hours"] is not None for each in plan["hours"].values())
    phases = [phase["name"] for phase in plan["phases"]]
    columns = ("GPU", "GB", "TFLOP/s", "fits", *phases, *(("all", "× GPUs") if known else ()))
    what = "hours" if known else "images a second"
    title = f"{what} on {plan['gpus']} GPU{'s' if plan['gpus'] > 1 else ''} at {plan['utilisation']:.0%} of the peak"
    caption = f"fits: with {RESERVE / 1e9:.0f} GB to spare for the GPU's context and libraries; without evaluation"
    table = Table(*columns, title=title, caption=caption)
    _right(table, 1, 3)
    _right(table, 4, len(columns))
    table.columns[0].no_wrap = True
    for name, each in plan["hours"].items():
        instead = [f"{layout} would" for layout in each["layouts that fit"][:1]]
        fits = "yes" if each["fits"] else "; ".join(["[red]no[/]", *instead])
        if known:
            total = each["total"]
            cells = [f"{hours:,.1f}" for hours in each["hours"].values()]
            cells += [f"{total:,.1f}", f"{total * plan['gpus']:,.0f}"]
        else:
            cells = [f"{rate:,.0f}" for rate in each["images a second"].values()]
        table.add_row(name, f"{each['memory']:g}", f"{each['tflops']:,.0f}", fits, *cells)
    return table


def _checkpoints(found: dict[str, Any]) -> str:
    if found["folder"] is None:
        return f"checkpoints: none are saved (one would be {size(found['bytes'])})"
    if found["number"] is None:
        return f"checkpoints: {size(found['bytes'])} each; how many: {UNKNOWN}; in {found['folder']}"
    upload = f", {size(found['uploaded'])} uploaded in all" if found["uploaded"] else ""
    kept = f"{found['number']} are saved, {found['kept']} kept ({size(found['bytes'] * found['kept'])}){upload}"
    return f"checkpoints: {size(found['bytes'])} each; {kept}; in {found['folder']}"


def _measured(each: dict[str, Any]) -> str:
    if "note" in each:
        return f"measured: {each['source']}: {each['note']}"
    speeds = ", ".join(f"{name} {rate:,.1f} images/s" for name, rate in each.get("images a second", {}).items())
    hours = f"; at that rate this run takes {each['hours']:,.1f} hours" if each["hours"] is not None else ""
    rate = f"{each['gflops a second']:,.0f} GFLOP/s"
    return f"measured: {each['source']}: {f'{speeds}, ' if speeds else ''}{rate}{hours}"


def _right(table: Table, begin: int, end: int) -> None:
    for column in table.columns[begin:end]:
        column.justify = "right"
