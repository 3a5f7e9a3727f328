"""A training step through the Trainer, in a bare loop, and as the textbook has it; its memory and where its time goes.

Sizes at which the networks dominate: a ViT-S encoder with 256 tokens, a decoder 512 wide, VGG LPIPS, a ViT-S/16
discriminator, 256 pixels. Weights are random, which costs the same.
"""

import multiprocessing
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from composer import Logger, State
from composer.loggers import LoggerDestination
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTImageProcessor

from rae.algorithms.adversarial import Adversarial
from rae.algorithms.perceptual import Perceptual
from rae.callbacks import operations
from rae.callbacks.begin_step import seed_step
from rae.config.arguments import build
from rae.config.registry import register
from rae.config.sections import Config
from rae.plan.bench.measure import Seconds, best_rates, device, peak_memory, ratios_of, summary, timed, wait
from rae.plan.bench.textbook import Bare, Figures, Parts, Textbook
from rae.training.build import build_model, build_trainer
from rae.training.checks import check

PHASES = {"L1 + LPIPS": (False, False), "+ discriminator": (True, False), "+ GAN": (True, True)}
"""Phase -> whether the discriminator trains, and whether the autoencoder sees it."""


def write_weights(folder: Path) -> None:
    """Random weights of the encoder and of LPIPS's backbone, as files that a configuration can name."""
    sizes = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(folder / "encoder")
    ViTImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(
        folder / "encoder"
    )
    vgg = torchvision.models.vgg16(weights=None).features
    torch.save({f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}, folder / "vgg16.pth")


def settings(folder: Path, batch: int, phase_steps: int, image_size: int = 256, depth: int = 8) -> dict[str, Any]:
    """The configuration of the measured run, with ``phase_steps`` steps in each of the three phases."""
    gpu = torch.cuda.is_available()
    return {
        "run_name": "bench",
        "run_dir": str(folder / "run"),
        "data": {
            "image_size": image_size,
            "batch_size": batch,
            "workers": 8 if gpu else 0,
            "train": {"path": str(folder / "shards"), "resize": image_size * 3 // 2},
        },
        "model": {
            "encoder": {"dinov2": {"pretrained": str(folder / "encoder"), "input_size": 224}},
            "decoder": {"embed_dim": 512, "depth": depth, "num_heads": 8, "mlp_dim": 2048},
            "noise_tau": 0.8,
        },
        "algorithms": {
            "perceptual": {"network": "vgg", "weights": str(folder / "vgg16.pth"), "chunk": 8 if gpu else 1},
            "adversarial": {
                "discriminator": {"dino": {"weights": "random", "patch_size": 16}},
                "schedule": {"constant_lr": {}},
                "discriminator_start": f"{phase_steps}ba",
                "start": f"{2 * phase_steps}ba",
            },
            "ema": {"decay": 0.9978},
        },
        "loggers": {"jsonl": {}, "console": {"interval": "1000ba"}, "beside": {"phase_steps": phase_steps}},
        "trainer": {"max_duration": f"{3 * phase_steps}ba", "progress_bar": False, "save_folder": None},
    }


@register("logger", "beside")
class Beside(LoggerDestination):
    """After each of the Trainer's steps, take the same step bare and as the textbook has it, on the same batch.

    Args:
        phase_steps: steps a phase; the first of each warms up and is not counted.
    """

    def __init__(self, phase_steps: int):
        self.phase_steps = phase_steps
        self.seconds: dict[str, Seconds] = {p: {"Trainer": [], "bare": [], "textbook": []} for p in PHASES}
        self.deviation: dict[str, dict[str, float]] = {"bare": {}, "textbook": {}}
        self.logged: dict[str, float] = {}
        self.sides: dict[str, Any] = {}
        self.batch: Tensor | None = None
        self.seed = 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.logged.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        perceptual = next(a for a in state.algorithms if isinstance(a, Perceptual))
        adversarial = next(a for a in state.algorithms if isinstance(a, Adversarial))
        self.seed = state.rank_zero_seed
        sides = {"bare": Bare, "textbook": Textbook}
        self.sides = {name: side(Parts(state.model.rae, perceptual, adversarial)) for name, side in sides.items()}

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._resume()

    def batch_end(self, state: State, logger: Logger) -> None:
        wait()
        took, step = {"Trainer": time.perf_counter() - self.since}, int(state.timestamp.batch) - 1
        phase = list(PHASES)[min(step // self.phase_steps, 2)]
        for name, side in self.sides.items():
            seed_step(self.seed, step, 0)
            found: list[Figures] = []
            took[name] = timed(lambda side=side, found=found: found.append(side(state.batch["image"], *PHASES[phase])))  # type: ignore[misc]
            self._compare(name, found[0])
        self.sides["textbook"].parts.begin_as(self.sides["bare"].parts)
        if step % self.phase_steps:
            for name, seconds in took.items():
                self.seconds[phase][name].append(seconds)
        self._resume()

    def _resume(self) -> None:
        wait()
        self.since = time.perf_counter()

    def _compare(self, name: str, figures: Figures) -> None:
        for figure, value in figures.items():
            logged = self.logged[figure if figure in self.logged else f"loss/train/{figure}"]
            deviation = abs(float(value) - logged) / max(abs(logged), 0.1)  # a loss may be near 0
            # Unlike max, it keeps a NaN.
            self.deviation[name][figure] = float(np.maximum(self.deviation[name].get(figure, 0.0), deviation))


def trainer_beside(folder: Path, batch: int, phase_steps: int, **sizes: int) -> Beside:
    """Run the Trainer with the two other sides at its steps; what they took is in the returned ``seconds``."""
    config = Config.model_validate(settings(folder, batch, phase_steps, **sizes))
    check(config)
    trainer = build_trainer(config)
    trainer.fit()
    trainer.close()
    return next(d for d in trainer.logger.destinations if isinstance(d, Beside))


def parts(folder: Path, image_size: int = 256, depth: int = 8, checkpointing: bool = False) -> Parts:
    """Networks and optimizers without a Trainer."""
    wanted = settings(folder, 1, 1, image_size, depth)
    wanted["model"]["decoder"]["activation_checkpointing"] = checkpointing
    config = Config.model_validate(wanted)
    torch.manual_seed(0)
    rae = build_model(config).to(device()).rae
    perceptual, adversarial = (
        build("algorithm", {name: config.algorithms[name]}, "algorithms", steps_per_epoch=1)
        for name in ("perceptual", "adversarial")
    )
    perceptual.network.to(device())
    adversarial.discriminator.to(device())
    return Parts(rae, perceptual, adversarial)


def images(batch: int, image_size: int = 256) -> Tensor:
    """A uint8 batch."""
    return torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8, device=device())


def memory(folder: Path, batch: int) -> list[dict[str, Any]]:
    """Peak bytes an image of a step with everything on, for several batches, image sizes and depths, of all sides.

    Each is measured in a process of its own: what an earlier one freed would serve a later one unseen.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["rae.plan.bench.step"])
    rows = []
    for variant in (
        dict(batch=batch, image_size=256, depth=8),
        dict(batch=2 * batch, image_size=256, depth=8),
        dict(batch=batch, image_size=128, depth=8),
        dict(batch=batch, image_size=256, depth=16),
    ):
        row: dict[str, Any] = dict(variant)
        for name in ("ours", "checkpointing", "textbook"):
            with processes.Pool(1) as pool:
                row[name] = pool.apply(_peak_of_a_step, (folder, name, *variant.values())) / variant["batch"]
        rows.append(row)
    return rows


def _peak_of_a_step(folder: Path, name: str, batch: int, image_size: int, depth: int) -> int:
    warnings.simplefilter("ignore")
    side = Textbook if name == "textbook" else Bare
    step, data = side(parts(folder, image_size, depth, name == "checkpointing")), images(batch, image_size)
    step(data[:1], True, True)  # optimizer states and lazily made buffers are not the step's
    return peak_memory(lambda: step(data, True, True))


def flops(step: Bare | Textbook, data: Tensor, phase: tuple[bool, bool]) -> int:
    """Floating-point operations of a step, matrix products, convolutions and attention."""
    with operations.counter() as counter:
        step(data, *phase)
    return counter.get_total_flops()


GROUPS = {  # kind of operation -> what its names begin with
    "convolutions": (
        "aten::mkldnn_convolution",
        "aten::cudnn_convolution",
        "aten::convolution_backward",
        "aten::thnn_conv",
    ),
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::matmul", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "norms": ("aten::native_layer_norm", "aten::var", "aten::rsqrt", "aten::linalg_vector_norm"),
    "activations": ("aten::gelu", "aten::clamp_min", "aten::threshold_backward", "aten::leaky_relu"),
    "copies and layout": ("aten::copy_", "aten::cat", "aten::fill_", "aten::index", "aten::_to_copy"),
    "weights' updates": ("Optimizer", "aten::_foreach", "aten::_fused", "aten::addcdiv", "aten::lerp"),
}


def where_time_goes(step: Bare | Textbook, data: Tensor) -> dict[str, float]:
    """Shares of a GAN-phase step by kind of operation, by torch's profiler."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        step(data, True, True)
    shares = dict.fromkeys([*GROUPS, "other element-wise work"], 0.0)
    for event in profiler.key_averages():
        group = next((g for g, names in GROUPS.items() if event.key.startswith(names)), "other element-wise work")
        shares[group] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(shares.values())
    return {group: share / total for group, share in sorted(shares.items(), key=lambda item: -item[1])}


def limits(folder: Path, seconds: dict[str, Seconds], batch: int) -> dict[str, Any]:
    """Operations a step, achieved FLOP/s over the machine's best, and where the rest goes."""
    ours, textbook = Bare(parts(folder)), Textbook(parts(folder))
    data = images(batch)
    best = best_rates(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    rows = {}
    for phase, which in PHASES.items():
        counted = {"ours": flops(ours, data, which), "textbook": flops(textbook, data, which)}
        rate = counted["ours"] / statistics.median(seconds[phase]["bare"])
        rows[phase] = {
            "GFLOP an image": counted["ours"] / batch / 1e9,
            "textbook's GFLOP an image": counted["textbook"] / batch / 1e9,
            "GFLOP/s": rate / 1e9,
            "of the best": rate / max(best.values()),
        }
    return {
        "best GFLOP/s": {k: v / 1e9 for k, v in best.items()},
        "phases": rows,
        "shares": where_time_goes(ours, data),
    }


def ratios(beside: Beside) -> dict[str, dict[str, dict[str, float]]]:
    """Phase -> the textbook's time over the Trainer's, and the Trainer's over the bare loop's, turn by turn."""
    return {
        phase: {
            f"{a} / {b}": summary(ratios_of(seconds, a, b)) for a, b in (("textbook", "Trainer"), ("Trainer", "bare"))
        }
        for phase, seconds in beside.seconds.items()
    }
