"""``make bench``: what the weight average and a checkpoint cost, beside what they would cost without care.

Pairs are measured in turns, and their medians printed, because a machine's speed drifts. Weights are random: sizes
are those of the published networks.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rae.algorithms.ema import update_ema
from rae.checkpoints import STATE, seal
from rae.decoder import SIZES, Decoder

console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the weight average and checkpoints.")
    parser.add_argument("--size", choices=list(SIZES), default="ViTB", help="the decoder measured (default: ViTB)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each pair (default: 9)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    networks = published(arguments.size, device)
    ema_cost(networks, arguments.repeats)
    checkpoint_bytes()
    checkpoint_cost(networks, max(3, arguments.repeats // 3))


def published(size: str, device: str) -> dict[str, nn.Module]:
    """The networks of the published recipe: DINOv2-B encoder, decoder, LPIPS's VGG, DINO ViT-S/8 below the heads."""
    from torchvision.models import vgg16
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    with torch.device(device):
        return {
            "decoder": Decoder(768, 256, size=size),
            "encoder": Dinov2WithRegistersModel(Dinov2WithRegistersConfig()).requires_grad_(False),
            "vgg": vgg16(weights=None).features.requires_grad_(False),
            "backbone": timm.create_model("vit_small_patch8_224", num_classes=0).requires_grad_(False),
        }


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, measured in turns after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(title: str, seconds: dict[str, list[float]], **columns: dict[str, str]) -> None:
    """A table of medians, ranges, and ratios to the first row."""
    table = Table("", "median ms", "range", "of the first", *columns, title=title)
    first = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values) * 1e3:.1f}–{max(values) * 1e3:.1f}"
        cells = (column[name] for column in columns.values())
        table.add_row(name, f"{middle * 1e3:.1f}", spread, f"{middle / first:.2f}", *cells)
    console.print(table)


def ema_cost(networks: dict[str, nn.Module], repeats: int) -> None:
    """One update of the average: ours, Composer's over the same weights, and one over all weights."""
    decoder = networks["decoder"]
    weights = [p.detach() for p in decoder.parameters()]
    average = [p.clone() for p in weights]
    stock = EMAParameters(decoder)
    everything = nn.ModuleList(networks.values())
    copied = copy.deepcopy(everything)
    seconds = in_turns(
        {
            "ours": lambda: update_ema(average, weights, 0.9978),
            "Composer's EMA": lambda: compute_ema(decoder, stock, smoothing=0.9978),
            "an average of everything": lambda: compute_ema(everything, copied, smoothing=0.9978),
        },
        repeats,
    )
    show("EMA, a step", seconds)


def tensors(networks: dict[str, nn.Module], careful: bool) -> dict[str, Any]:
    """What a checkpoint holds: the decoder, its average and Adam's two moments; carelessly, also all that is frozen."""
    decoder = networks["decoder"].state_dict()
    moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in decoder.items()}
    held: dict[str, Any] = {"model": decoder, "average": copy.deepcopy(decoder), "optimizer": moments}
    if not careful:
        frozen = {name: network.state_dict() for name, network in networks.items() if name != "decoder"}
        held |= {"frozen": frozen, "average of frozen": copy.deepcopy(frozen)}
    return held


def size_of(held: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    return sum(size_of(value) for value in (held.values() if isinstance(held, dict) else held))


def checkpoint_bytes() -> None:
    """Bytes of a checkpoint with each decoder, counted without allocating anything.

    The naive one also holds all that is frozen, and an average of it.
    """
    table = Table("decoder", "ours GB", "naive GB", "ratio", title="checkpoint, bytes")
    for size in SIZES:
        networks = published(size, "meta")
        ours, naive = (size_of(tensors(networks, careful)) for careful in (True, False))
        weights = [size_of(networks["decoder"].state_dict()), sum(size_of(n.state_dict()) for n in networks.values())]
        table.add_row(size, f"{ours / 1e9:.2f}", f"{naive / 1e9:.2f}", f"{ours / naive:.2f}")
        table.add_row(
            f"{size}, without optimizer", f"{2 * weights[0] / 1e9:.2f}", f"{2 * weights[1] / 1e9:.2f}",
            f"{weights[0] / weights[1]:.2f}",
        )  # fmt: skip
    console.print(table)


def checkpoint_cost(networks: dict[str, nn.Module], repeats: int) -> None:
    """Writing it: ours with its seal (hash and fsync), the naive one without."""
    careful, naive = tensors(networks, True), tensors(networks, False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def ours() -> None:
            torch.save(careful, folder / STATE)
            seal(folder, [STATE], 0, 1, "bench")

        seconds = in_turns({"ours, sealed": ours, "naive": lambda: torch.save(naive, folder / "naive.pt")}, repeats)
        sizes = {"ours, sealed": folder / STATE, "naive": folder / "naive.pt"}
        show(
            "checkpoint, writing", seconds, MB={key: f"{file.stat().st_size / 1e6:,.0f}" for key, file in sizes.items()}
        )


if __name__ == "__main__":
    main()
