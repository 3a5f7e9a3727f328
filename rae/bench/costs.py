"""What the weight average and a checkpoint cost, beside what they would cost without care.

Weights are random: sizes are those of the published networks.
"""

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from rich.table import Table
from torch import Tensor, nn

from rae.algorithms.ema import update_ema
from rae.bench.measure import Seconds, console, device, in_turns, show, summary
from rae.checkpoints import STATE, seal
from rae.decoder import SIZES, Decoder


def measure(size: str, repeats: int, step: Seconds | None = None) -> dict[str, Any]:
    """All of it, printed and returned; ``step`` compares the average with a measured step at the bench's sizes."""
    networks = published(size, device().type)
    ema = ema_cost(networks, repeats)
    found = {
        "ema": {name: summary(values) for name, values in ema.items()},
        "checkpoint GB": checkpoint_bytes(),
        "checkpoint": {name: summary(values) for name, values in checkpoint_cost(networks, repeats).items()},
    }
    if step is not None:
        found["ema, share of a step"] = ema_share(step)
    return found


def ema_share(step: Seconds) -> float:
    """The average's part of the measured GAN-phase step, with the decoder of that step."""
    weights = [
        p.detach().to(device())
        for p in Decoder(384, 256, embed_dim=512, depth=8, num_heads=8, mlp_dim=2048).parameters()
    ]
    average = [p.clone() for p in weights]
    seconds = in_turns({"ours": lambda: update_ema(average, weights, 0.9978)}, 5)["ours"]
    share = statistics.median(seconds) / statistics.median(step["Trainer"])
    console.print(f"EMA: {share:.2%} of a GAN-phase step")
    return share


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


def ema_cost(networks: dict[str, nn.Module], repeats: int) -> Seconds:
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
    return seconds


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


def checkpoint_bytes() -> dict[str, list[float]]:
    """GB of a checkpoint with each decoder, ours and naive, counted without allocating anything.

    The naive one also holds all that is frozen, and an average of it.
    """
    table = Table("decoder", "ours GB", "naive GB", "ratio", title="checkpoint, bytes")
    found = {}
    for size in SIZES:
        networks = published(size, "meta")
        ours, naive = (size_of(tensors(networks, careful)) for careful in (True, False))
        weights = [size_of(networks["decoder"].state_dict()), sum(size_of(n.state_dict()) for n in networks.values())]
        found[size] = [ours / 1e9, naive / 1e9]
        table.add_row(size, f"{ours / 1e9:.2f}", f"{naive / 1e9:.2f}", f"{ours / naive:.2f}")
        table.add_row(
            f"{size}, without optimizer", f"{2 * weights[0] / 1e9:.2f}", f"{2 * weights[1] / 1e9:.2f}",
            f"{weights[0] / weights[1]:.2f}",
        )  # fmt: skip
    console.print(table)
    return found


def checkpoint_cost(networks: dict[str, nn.Module], repeats: int) -> Seconds:
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
    return seconds
