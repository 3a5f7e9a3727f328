"""Measuring: turns, medians, tables, peak memory, what the machine can do at most."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

console = Console(width=120)
Seconds = dict[str, list[float]]


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes, the device's work included."""
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> Seconds:
    """Seconds of each run, measured in turns after a round that does not count."""
    seconds: Seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            took = timed(run)
            if turn:
                seconds[name].append(took)
    return seconds


def ratios_of(seconds: Seconds, name: str, other: str) -> list[float]:
    """Name's time over other's in the same turn, for every turn."""
    return [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]


Summary = dict[str, float]
"""Median, least and largest."""


def summary(values: list[float]) -> Summary:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(title: str, seconds: Seconds, **columns: dict[str, str]) -> dict[str, Summary]:
    """Print a table of medians, ranges, and ratios to the first row; returns what sums up each row."""
    table = Table("", "median ms", "range", "× the first", *columns, title=title)
    first = next(iter(seconds))
    for name, values in seconds.items():
        spread = f"{min(values) * 1e3:,.1f}–{max(values) * 1e3:,.1f}"
        cells = (column[name] for column in columns.values())
        median, ratio = statistics.median(values), statistics.median(ratios_of(seconds, name, first))
        table.add_row(name, f"{median * 1e3:,.1f}", spread, f"{ratio:.2f}", *cells)
    console.print(table)
    return {name: summary(values) for name, values in seconds.items()}


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which a call's peak exceeds what was held before it: of the GPU, or resident in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # Freed tensors must go back to the system at once, or the next call would reuse them unseen.
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    peak = _status("VmHWM") - before
    libc.malloc_trim(0)
    return peak


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def best_rates(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of the fastest of several matrix products and convolutions, of the sizes that a step is made of."""
    where = dict(device=device(), dtype=dtype)
    scale = 8 if torch.cuda.is_available() else 1
    products = [(512 * scale, 512, 2048), (512 * scale, 2048, 512), (1024 * scale, 1152, 4096), (2048, 2048, 2048)]
    rates = {"matmul": 0.0, "convolution": 0.0}
    for m, k, n in products:
        a, b = torch.randn(m, k, **where), torch.randn(k, n, **where)  # type: ignore[call-overload]
        rates["matmul"] = max(rates["matmul"], 2 * m * k * n / _fastest(partial(torch.mm, a, b)))
    for channels, side in ((64, 256), (128, 128), (256, 64), (512, 32)):
        x = torch.randn(2 * scale, channels, side, side, **where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weight = torch.randn(channels, channels, 3, 3, **where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        flop = 2 * x.numel() * channels * 9
        rates["convolution"] = max(rates["convolution"], flop / _fastest(partial(F.conv2d, x, weight, padding=1)))
    return rates


def _fastest(run: Callable[[], Any]) -> float:
    with torch.no_grad():
        run()
        return min(timed(run) for _ in range(5))
