"""One and two ranks on fixed work a rank, what they tell each other, and what that means for many GPUs.

As a plugin of the measured runs, it registers the callback that counts.
"""

import json
import math
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composer import Callback, Logger, State
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from rae.autoencoder.decoder import SIZES
from rae.config.registry import register
from rae.plan.bench.costs import published
from rae.plan.bench.step import settings
from rae.plan.gpus import GPUS

LAYOUTS = {"one rank": (1, "ddp"), "two DDP ranks": (2, "ddp"), "two FSDP ranks": (2, "fsdp")}
STEPS = 6


@register("callback", "count_communication", context=("run_dir",))
class CountCommunication(Callback):
    """Write each step's seconds, and the bytes that this rank gave to every kind of collective, to a file.

    Args:
        run_dir: the file's folder (supplied).
    """

    def __init__(self, run_dir: str):
        self.path = Path(run_dir) / "communication.json"
        self.bytes: Counter[str] = Counter()
        self.steps: list[dict[str, int]] = []
        self.seconds: list[float] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        for name, whole in (("all_reduce", 0), ("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1)):
            setattr(dist, name, self._counted(name, getattr(dist, name), whole))
        if isinstance(state.model, DistributedDataParallel):
            state.model.register_comm_hook(None, self._bucket)

    def _counted(self, name: str, collective: Callable[..., Any], whole: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            named = kwargs.get(("output_tensor", "input")[whole]) if name != "all_reduce" else kwargs.get("tensor")
            tensor = named if named is not None else args[whole]
            self.bytes[name] += tensor.nbytes
            return collective(*args, **kwargs)

        return counted

    def _bucket(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.bytes["DDP's all_reduce"] += bucket.buffer().nbytes
        self.bytes["all_reduce"] -= bucket.buffer().nbytes  # the hook's own is counted there, too
        return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

    def batch_start(self, state: State, logger: Logger) -> None:
        self.bytes.clear()
        self.began = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.steps.append(dict(self.bytes))

    def fit_end(self, state: State, logger: Logger) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            self.path.write_text(json.dumps({"seconds": self.seconds, "steps": self.steps}))


def scaling(folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds a step (GAN phase, one thread and two images a rank) and bytes a step, of each layout."""
    results = {}
    for layout, (ranks, parallelism) in LAYOUTS.items():
        wanted = settings(folder, 2 * ranks, 0, image_size=128, depth=4)
        run = folder / layout.replace(" ", "-")
        wanted |= {"run_dir": str(run), "parallelism": parallelism, "imports": ["rae.plan.bench.scaling"]}
        wanted |= {"callbacks": {"count_communication": {}}, "loggers": {}}
        wanted["trainer"]["max_duration"] = f"{STEPS}ba"
        path = folder / f"{run.name}.yaml"
        OmegaConf.save(OmegaConf.create(wanted), path)
        threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
        command = ["composer", "-n", str(ranks), "train.py", str(path)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **threads})
        measured = json.loads((run / "communication.json").read_text())
        results[layout] = {
            "seconds": statistics.median(measured["seconds"][1:]),
            "bytes": measured["steps"][-1],
        }
    for result in results.values():
        result["efficiency"] = results["one rank"]["seconds"] / result["seconds"]
    return results


NVLINK, NETWORK = 450e9, 50e9
"""Bytes/s a GPU and direction: NVLink 4 within eight GPUs; 400 Gb/s InfiniBand a GPU between them."""
OVERLAP = 0.5
"""The share of a step behind which gradients can travel: the decoder's backward pass and what follows it."""
UTILISATION = 0.35
"""The share of an H100's bf16 peak that a step is assumed to reach; a faster step hides less."""


def projections() -> dict[str, dict[str, dict[int, float]]]:
    """Efficiency of the published recipe's GAN phase by images a GPU and decoder, with DDP on 8, 64 and 512 GPUs."""
    found: dict[str, dict[str, dict[int, float]]] = {"64": {}, "16": {}}
    for size in SIZES:
        with published(size) as simulation:
            operations = sum(simulation.operations(simulation.clock.steps - 1).values())
            trained = {name: count for name, (count, is_trained) in simulation.parameters().items() if is_trained}
            last_layer = simulation.model.rae.decoder.head.weight.numel()
        exposed = trained["discriminator's heads"] + 2 * last_layer
        for images, sizes in found.items():
            sizes[size] = projected(trained["decoder"], exposed, int(images) * operations)
    return found


def projected(decoder: int, others: int, operations: float) -> dict[int, float]:
    """Efficiency of DDP on 8, 64 and 512 GPUs with fixed work a GPU: compute over compute and exposed communication.

    A ring all-reduce of fp32 gradients sends 2 (N − 1)/N of them from each GPU, at the slowest link's speed; of the
    decoder's, what takes longer than ``OVERLAP`` of the step's compute is exposed. The discriminator's, and the two
    gradients that the adaptive weight is struck from, are exposed whole. The loader is assumed to keep up.

    Args:
        decoder: its gradients' number.
        others: numbers whose communication nothing hides: the discriminator's gradients, and the balance's.
        operations: of a GPU and step.
    """
    compute = operations / (GPUS["H100"].rate("amp_bf16") * UTILISATION)
    efficiency = {}
    for gpus in (8, 64, 512):
        seconds_a_value = 2 * (gpus - 1) / gpus * 4 / (NVLINK if gpus <= 8 else NETWORK)
        beyond = max(0.0, decoder * seconds_a_value - OVERLAP * compute)
        efficiency[gpus] = compute / (compute + beyond + others * seconds_a_value)
    return efficiency


def ring_bytes(collectives: dict[str, int], ranks: int) -> int:
    """What one rank sends in a step: rings send 2 (N − 1)/N of an all-reduce, (N − 1)/N of a gather or scatter."""
    share = (ranks - 1) / ranks
    return math.ceil(sum(b * share * (2 if "all_reduce" in name else 1) for name, b in collectives.items()))
