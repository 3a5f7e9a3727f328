"""What the weight average and a checkpoint cost, beside what they would cost without care.

Weights are random: sizes are those of the published networks.
"""

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from rich.table import Table
from torch import Tensor, nn

from rae.algorithms.ema import update_ema
from rae.autoencoder.decoder import SIZES, Decoder
from rae.config.loading import load_config
from rae.plan.bench.measure import Seconds, Summary, console, device, in_turns, show
from rae.plan.clock import Clock
from rae.plan.meter import networks_of, tensors_of
from rae.plan.step import Simulation
from rae.survival.checkpoints import STATE, seal
from rae.survival.writing import Writer


def measure(repeats: int, step: Seconds | None = None) -> dict[str, Any]:
    """All of it, printed and returned; ``step`` compares the average with a measured step at the bench's sizes."""
    networks = weights("ViTB")
    found: dict[str, Any] = {"ema": ema_cost(networks, repeats), "checkpoint GB": checkpoint_bytes()}
    found["checkpoint"] = checkpoint_cost(networks, repeats)
    if step is not None:
        found["ema, share of a step"] = ema_share(step)
    return found


def ema_share(step: Seconds) -> float:
    """The average's part of the measured GAN-phase step, with the decoder of that step."""
    decoder = Decoder(384, 256, embed_dim=512, depth=8, num_heads=8, mlp_dim=2048)
    weights = [p.detach().to(device()) for p in decoder.parameters()]
    average = [p.clone() for p in weights]
    seconds = in_turns({"ours": lambda: update_ema(average, weights, 0.9978)}, 5)["ours"]
    share = statistics.median(seconds) / statistics.median(step["Trainer"])
    console.print(f"EMA: {share:.2%} of a GAN-phase step")
    return share


def published(size: str) -> Simulation:
    """The published recipe with this decoder; a context, see :class:`rae.plan.step.Simulation`."""
    config = load_config("yamls/rae_dino_b.yaml", [f"model.decoder.size={size}"])
    return Simulation(config, Clock(None, config.data.batch_size, config.trainer["max_duration"]))


def weights(size: str) -> dict[str, list[Tensor]]:
    """Network of the published recipe -> tensors of its weights' sizes."""
    with published(size) as simulation:
        networks = networks_of(simulation.model, simulation.algorithms)
    return {
        name: [torch.ones(t.shape, device=device()) for t in tensors_of(network)] for name, network in networks.items()
    }


def ema_cost(networks: dict[str, list[Tensor]], repeats: int) -> dict[str, Summary]:
    """One update of the average: ours, Composer's over the same weights, and one over all weights."""
    average = [p.clone() for p in networks["decoder"]]
    decoder = nn.ParameterList(networks["decoder"])
    stock = EMAParameters(decoder)
    everything = nn.ParameterList([t for tensors in networks.values() for t in tensors])
    copied = copy.deepcopy(everything)
    seconds = in_turns(
        {
            "ours": lambda: update_ema(average, networks["decoder"], 0.9978),
            "Composer's EMA": lambda: compute_ema(decoder, stock, smoothing=0.9978),
            "an average of everything": lambda: compute_ema(everything, copied, smoothing=0.9978),
        },
        repeats,
    )
    return show("EMA, a step", seconds)


def checkpoint_bytes() -> dict[str, list[float]]:
    """GB of a checkpoint with each decoder, ours and naive, counted without allocating anything.

    The naive one also holds all that is frozen, and an average of it.
    """
    table = Table("decoder", "ours GB", "naive GB", "ratio", title="checkpoint, bytes")
    found = {}
    for size in SIZES:
        with published(size) as simulation:
            saved, held = simulation.saved() / 1e9, simulation.held()
        weights, frozen = held["weights"] / 1e9, held["frozen networks"] / 1e9
        found[size] = [saved, saved + 2 * frozen]
        for name, ours in ((size, saved), (f"{size}, decoder and its average alone", 2 * weights)):
            naive = ours + 2 * frozen
            table.add_row(name, f"{ours:.2f}", f"{naive:.2f}", f"{ours / naive:.2f}")
    console.print(table)
    return found


def checkpoint_cost(networks: dict[str, list[Tensor]], repeats: int) -> dict[str, Summary]:
    """Saving: what training waits for and what a thread does beside it; all of that at once; and the naive file."""
    copies = {"decoder": 4, "discriminator's heads": 3}  # weights, Adam's two moments, the decoder's average
    careful = [t.clone() for name, n in copies.items() for t in n * networks[name]]
    naive = careful + [t.clone() for name in networks.keys() - copies for t in 2 * networks[name]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = Writer(folder, {}, mover=True)
        writer.open_group([0])

        def written() -> None:
            assert writer.thread is not None
            writer.thread.join()

        def at_once() -> None:
            with (folder / STATE).open("wb") as file:
                torch.save(careful, file)
            seal(folder, [STATE], 0, 1, "bench")

        runs = {
            "ours, training stands still": lambda: writer.write("ep0-ba1", "", {"state": careful}, False, _nothing),
            "ours, then written and sealed beside it": written,
            "the same bytes, written and sealed at once": at_once,
            "naive": lambda: torch.save(naive, folder / "naive.pt"),
        }
        seconds = in_turns(runs, repeats)
        files = dict(zip(runs, [folder / "ep0-ba1" / STATE] * 2 + [folder / STATE, folder / "naive.pt"], strict=True))
        sizes = {key: f"{file.stat().st_size / 1e6:,.0f}" for key, file in files.items()}
        return show("checkpoint", seconds, MB=sizes)


def _nothing(*_: object) -> None:
    pass
