"""What a run will take: everything that ``python -m rae plan`` says."""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from traceback import walk_tb
from typing import Any

from composer import Time

from rae.autoencoder.encoders.architectures import PUBLISHED
from rae.callbacks.jsonl import read_lines
from rae.config.errors import UserError, first_line
from rae.config.loading import load_config
from rae.config.registry import find
from rae.config.sections import Config, Model
from rae.data.images import with_bar
from rae.plan.clock import Clock
from rae.plan.data import DataSet, epoch_images, survey
from rae.plan.gpus import GPU, chosen
from rae.plan.step import Simulation, checkpointing_of
from rae.survival.storage import is_remote
from rae.training.checks import check

RESERVE = 2e9
"""Bytes beside tensors: the GPU's context, workspaces of cuDNN and NCCL, gaps between blocks. An assumption."""


@dataclass
class Phase:
    """Steps with the same losses.

    Args:
        begin, end: in steps.
        gflops: of an image, by network.
    """

    name: str
    begin: int
    end: int
    gflops: dict[str, float] = field(default_factory=dict)

    @property
    def operations(self) -> float:
        """Floating-point operations an image."""
        return sum(self.gflops.values()) * 1e9


def plan(
    yaml: str,
    overrides: list[str],
    gpus: int | None = None,
    kinds: Sequence[str] = (),
    utilisation: float = 0.4,
    images: int | None = None,
    bench: Path | None = None,
) -> dict[str, Any]:
    """Everything about the run, as plain numbers: what ``--json`` stores.

    Args:
        gpus: GPUs of the run; None is 8 with ``parallelism: fsdp``, otherwise 1.
        kinds: names of GPUs; empty for all that are known.
        utilisation: share of the GPU's peak that training reaches.
        images: of an epoch, where the data cannot be reached.
        bench: the last benchmark's figures.

    Raises:
        UserError: a mistake in the configuration or the arguments.
    """
    known = chosen(kinds)
    config = load_config(yaml, overrides)
    config.trainer.pop("device", None)  # this machine's GPU is not the run's
    replicas = config.fsdp.pop("replicas", 1)
    check(config, data=False)
    config.trainer["precision"] = config.trainer.get("precision") or "amp_bf16"
    gpus = gpus or (8 if config.parallelism == "fsdp" else 1)
    sizes = _batch_sizes(config, gpus)
    if gpus % replicas:
        raise UserError(f"fsdp.replicas: {gpus} GPUs (--gpus) cannot be split into {replicas} equal groups")
    found = survey(config)
    images = images or epoch_images(config, found)
    clock = Clock(images, config.data.batch_size, str(config.trainer["max_duration"]))
    if clock.steps_per_epoch < 1:
        raise UserError(f"data.batch_size: an epoch of {images:,} images is less than one batch")
    phases = phases_of(config, clock)
    layouts = {"ddp": 1, "fsdp": gpus // replicas} if gpus > 1 else {"ddp": 1}
    with _naming_plugins(config):
        parameters, memory, saved = _simulate(config, clock, phases, sizes, layouts, found)
    return {
        "run": config.run_name,
        "gpus": gpus,
        **{key: sizes[key] for key in ("batch", "microbatch", "microbatches")},
        "precision": config.trainer["precision"],
        "encoder": _encoder_source(config),
        "data": [vars(each) for each in found],
        "images": images,
        "parameters": parameters,
        "gflops": [phase.gflops for phase in phases],
        "memory": memory,
        "phases": _phases(phases, clock),
        "steps": clock.steps if clock.known else None,
        "checkpoints": _checkpoints(config, clock, saved),
        "hours": _hours(config, clock, phases, gpus, utilisation, known, memory),
        "utilisation": utilisation,
        "measured": [*(_bench(bench, clock, phases) if bench else []), *_log(config, clock, phases)],
    }


@contextmanager
def _naming_plugins(config: Config) -> Iterator[None]:
    """Say in a line what a file of the user's cannot do without values."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        steps = [(frame.f_globals.get("__name__", ""), frame, line) for frame, line in walk_tb(error.__traceback__)]
        own = [step for step in steps if step[0] in config.imports or step[0].startswith("rae_plugin_")]
        if not own:
            raise
        _, frame, line = own[-1]
        raise UserError(
            f"{frame.f_code.co_filename}, line {line}: {first_line(error)} (a plan builds the run's parts and takes "
            "steps on tensors without values; docs/plugins.md says what a plugin can do)"
        ) from error


def _batch_sizes(config: Config, gpus: int) -> dict[str, int]:
    batch = config.data.batch_size
    if batch % gpus:
        raise UserError(f"data.batch_size: {batch} cannot be shared equally by {gpus} GPUs (--gpus)")
    microbatch = min(config.trainer.get("device_train_microbatch_size") or batch // gpus, batch // gpus)
    return {"batch": batch, "microbatch": microbatch, "microbatches": -(-batch // gpus // microbatch)}


def phases_of(config: Config, clock: Clock) -> list[Phase]:
    """The run's parts with different losses, in order.

    Raises:
        UserError: a time that is not counted in steps.
    """
    steps = clock.steps
    starts = {}
    for name in config.algorithms:
        for key, default in _starts(name, config.algorithms[name] or {}).items():
            starts[name, key] = clock.step_of(default, f"algorithms.{name}.{key}")
    if not clock.comparable:
        raise UserError("times are given in epochs and in batches, and the data cannot be reached; say --images N")
    moments = sorted({0, *(start for start in starts.values() if 0 < start < steps)})
    return [
        Phase(_phase_name(starts, begin), begin, end) for begin, end in zip(moments, [*moments[1:], steps], strict=True)
    ]


def _starts(name: str, arguments: dict[str, Any]) -> dict[str, str]:
    parameters = signature(find("algorithm", name, "algorithms")).parameters
    keys = [key for key in ("start", "discriminator_start") if key in parameters]
    times = {key: arguments.get(key, parameters[key].default) for key in keys}
    return {key: str(time) for key, time in times.items() if time is not parameters[key].empty}


def _phase_name(starts: dict[tuple[str, str], int], begin: int) -> str:
    discriminator, gan = (starts.get(("adversarial", key)) for key in ("discriminator_start", "start"))
    late = [name for (name, key), start in starts.items() if key == "start" and name != "adversarial" and start > begin]
    if gan is None or discriminator is None:
        name = "training"
    elif begin >= gan:
        name = "GAN" if begin >= discriminator else "GAN, D untrained"
    else:
        name = "D only" if begin >= discriminator else "before D"
    return f"{name}, without {', '.join(late)}" if late else name


def _simulate(
    config: Config,
    clock: Clock,
    phases: list[Phase],
    sizes: dict[str, int],
    layouts: dict[str, int],
    found: list[DataSet],
) -> tuple[dict[str, tuple[int, bool]], dict[str, dict[str, Any]], int]:
    """Take steps in every layout: parameters, memory, and bytes of a checkpoint; phases get their operations.

    Args:
        layouts: ``ddp`` and ``fsdp`` -> GPUs that share a copy of the weights.
    """
    images, several = sizes["microbatch"], sizes["microbatches"] > 1
    latents = any(each.latent for each in found if each.name.startswith("data.train"))
    configured = checkpointing_of(config)
    wanted = (config.parallelism if len(layouts) > 1 else "ddp", bool(configured))
    memory = {}
    checkpointed = (False, True) if configured is not None else (False,)
    ways = [(parallelism, way) for parallelism in layouts for way in checkpointed]
    for parallelism, checkpointing in with_bar(ways, "taking steps without data"):
        with Simulation(config, clock, layouts[parallelism], checkpointing, latents) as simulation:
            held = simulation.held()
            if (parallelism, checkpointing) == ("ddp", wanted[1]):
                parameters, saved = simulation.parameters(), simulation.saved()
                for phase in phases:
                    counts = simulation.operations(phase.begin)
                    phase.gflops = {name: count / 1e9 for name, count in counts.items()}
            bytes_ = simulation.step(phases[-1].begin, images, several)
        row = _memory(config, sizes, held, bytes_, buckets=len(layouts) > 1 and parallelism == "ddp")
        row["configured"] = (parallelism, checkpointing) == wanted
        memory[f"{parallelism}{', checkpointing' if checkpointing else ''}"] = row
    return parameters, memory, saved


def _memory(
    config: Config, sizes: dict[str, int], held: dict[str, int], bytes_: dict[str, int], buckets: bool
) -> dict[str, Any]:
    """Bytes of a GPU, by what they are for; ``total`` is the most that lives at a time.

    Args:
        held, bytes_: what :class:`Simulation` found; the step's other microbatches are held until its end.
        buckets: DDP copies the gradients into buckets to send them.
    """
    more = sizes["microbatches"] - 1
    peaks = {part: bytes_[part] for part in ("forward", "losses", "backward", "optimizer", "end")}
    if "adversarial" in config.algorithms:  # has all images and reconstructions at its turn, in fp32
        peaks["end"] += more * 2 * sizes["microbatch"] * 3 * config.data.image_size**2 * 4
    where = max(peaks, key=peaks.__getitem__)
    held = {**held, "DDP's buckets": held["weights"] if buckets else 0}
    total = peaks[where] + more * bytes_["held"] + held["DDP's buckets"]
    return {**held, "activations": total - sum(held.values()), "total": total, "peak in": where}


def _phases(phases: list[Phase], clock: Clock) -> list[dict[str, Any]]:
    return [
        {
            "name": phase.name,
            "begin": phase.begin if clock.known else None,
            "end": phase.end if clock.known else None,
            "share": (phase.end - phase.begin) / clock.steps,
            "gflops": phase.operations / 1e9,
        }
        for phase in phases
    ]


def _encoder_source(config: Config) -> str:
    if not isinstance(config.model, Model):
        return "none"
    entry = config.model.encoder
    arguments = next(iter(entry.values()), None) if isinstance(entry, dict) else None
    name = (arguments or {}).get("pretrained") or (arguments or {}).get("model")
    if name in PUBLISHED:
        return f"{name}, sizes as published"
    return str(name or entry) + (", its configuration" if name and "pretrained" in (arguments or {}) else "")


def _checkpoints(config: Config, clock: Clock, size: int) -> dict[str, Any]:
    folder, keep = config.save_folder, config.trainer.get("save_num_checkpoints_to_keep", -1)
    found: dict[str, Any] = {"bytes": size, "folder": folder, "number": None, "kept": None, "uploaded": None}
    if folder is None:
        return {**found, "number": 0, "kept": 0, "uploaded": 0}
    interval = config.trainer.get("save_interval", "1ep")
    if not clock.comparable or Time.from_timestring(interval).unit.value in ("sec", "iter"):
        return found
    every = clock.step_of(interval, "trainer.save_interval")
    if not clock.comparable:
        return found
    last = interval.endswith("ep") and clock.steps % every == 0  # otherwise the run's end is one more
    found["number"] = clock.steps // every + (not last)
    found["kept"] = found["number"] if keep == -1 else min(keep, found["number"])
    found["uploaded"] = size * found["number"] if is_remote(folder) else 0
    return found


def _hours(
    config: Config,
    clock: Clock,
    phases: list[Phase],
    gpus: int,
    utilisation: float,
    kinds: dict[str, GPU],
    memory: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    configured = next(each for each in memory.values() if each["configured"])
    found = {}
    for name, gpu in kinds.items():
        peak = gpu.rate(config.trainer["precision"])
        rates = {phase.name: gpus * peak * utilisation / phase.operations for phase in phases}
        hours = _hours_of(clock, phases, rates)
        found[name] = {
            "memory": gpu.memory,
            "tflops": peak / 1e12,
            "fits": configured["total"] + RESERVE <= gpu.memory * 1e9,
            "layouts that fit": [n for n, each in memory.items() if each["total"] + RESERVE <= gpu.memory * 1e9],
            "images a second": rates,
            "hours": hours,
            "total": _total(hours),
        }
    return found


def _hours_of(clock: Clock, phases: list[Phase], rates: dict[str, float]) -> dict[str, float] | None:
    """Hours of each phase at so many images a second; None where the run's length is not known."""
    if not clock.known:
        return None
    return {p.name: (p.end - p.begin) * clock.batch_size / rates[p.name] / 3600 for p in phases}


def _total(hours: dict[str, float] | None) -> float | None:
    return None if hours is None else sum(hours.values())


def _bench(path: Path, clock: Clock, phases: list[Phase]) -> list[dict[str, Any]]:
    """What the last benchmark measured, and how long this run would take at that rate."""
    try:
        found = json.loads(path.read_text())
        measured = found["limits"]["phases"]
        rate = statistics.median(float(row["GFLOP/s"]) for row in measured.values())
        where = found["machine"]["processor"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        return [{"source": str(path), "note": "it holds no rates; make bench measures them"}]
    hours = _hours_of(clock, phases, {phase.name: rate * 1e9 / phase.operations for phase in phases})
    return [{"source": f"{path} ({where})", "gflops a second": rate, "hours": _total(hours)}]


def _log(config: Config, clock: Clock, phases: list[Phase]) -> list[dict[str, Any]]:
    """What this run's own log measured (``speed_monitor``), phase by phase, and the hours that it makes."""
    path = Path(config.run_dir, "metrics.jsonl")
    rates: dict[str, list[float]] = {}
    for record in read_lines(path):
        if record.get("throughput/samples_per_sec"):
            phase = next((p for p in reversed(phases) if record["batch"] > p.begin), phases[0])
            rates.setdefault(phase.name, []).append(record["throughput/samples_per_sec"])
    if not rates:
        return []
    middle = {name: statistics.median(values) for name, values in rates.items()}
    speed = statistics.median(middle[phase.name] * phase.operations for phase in phases if phase.name in middle)
    hours = _hours_of(clock, phases, {phase.name: speed / phase.operations for phase in phases} | middle)
    found = {"source": str(path), "images a second": middle, "gflops a second": speed / 1e9}
    return [{**found, "hours": _total(hours)}]
