"""What a run will take: everything that ``python -m rae plan`` says."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer import Time

from rae.config import Config, is_remote, load_config
from rae.encoders.architectures import PUBLISHED
from rae.plan.clock import Clock
from rae.plan.data import DataSet, epoch_images, latent_of, survey
from rae.plan.gpus import GPU, chosen
from rae.plan.step import Layout, Simulation
from rae.registry import UserError
from rae.run import check, save_folder

RESERVE = 2e9
"""Bytes beside tensors: the GPU's context, workspaces of cuDNN and NCCL, gaps between blocks. An assumption."""


@dataclass
class Options:
    """What is asked beside the configuration.

    Args:
        gpus: GPUs of the run; None is 8 with ``parallelism: fsdp``, otherwise 1.
        kinds: names of GPUs; empty for all that are known.
        utilisation: share of the GPU's peak that training reaches.
        images: of an epoch, where the data cannot be reached.
        bench: the last benchmark's figures.
    """

    gpus: int | None = None
    kinds: tuple[str, ...] = ()
    utilisation: float = 0.4
    images: int | None = None
    bench: Path = Path("runs/bench/bench.json")


@dataclass
class Phase:
    """Steps with the same losses.

    Args:
        begin, end: in steps.
    """

    name: str
    begin: int
    end: int


def plan(yaml: str, overrides: list[str], options: Options) -> dict[str, Any]:
    """Everything about the run, as plain numbers: what ``--json`` stores.

    Raises:
        UserError: a mistake in the configuration or the options.
    """
    kinds = chosen(list(options.kinds))
    config = load_config(yaml, overrides)
    config.trainer.pop("device", None)  # this machine's GPU is not the run's
    replicas = config.fsdp.pop("replicas", 1)
    check(config, data=False)
    config.trainer["precision"] = config.trainer.get("precision") or "amp_bf16"
    gpus = options.gpus or (8 if config.parallelism == "fsdp" else 1)
    sizes = _batch_sizes(config, gpus)
    if gpus % replicas:
        raise UserError(f"fsdp.replicas: {gpus} GPUs (--gpus) cannot be split into {replicas} equal groups")
    found = survey(config)
    images = options.images or epoch_images(config, found)
    clock = Clock(images, config.data.batch_size, str(config.trainer["max_duration"]))
    if clock.steps_per_epoch < 1:
        raise UserError(f"data.batch_size: an epoch of {images:,} images is less than one batch")
    phases = phases_of(config, clock)
    steps = _steps(config, clock, phases, sizes, gpus, gpus // replicas, found)
    return {
        "run": config.run_name,
        "gpus": gpus,
        **{key: sizes[key] for key in ("batch", "microbatch", "microbatches")},
        "precision": config.trainer["precision"],
        "encoder": _encoder_source(config),
        "data": [vars(each) for each in found],
        "images": images,
        **steps,
        "phases": _phases(phases, clock, steps["gflops"]),
        "steps": clock.steps if clock.known else None,
        "checkpoints": _checkpoints(config, clock, steps.pop("checkpoint")),
        "hours": _hours(config, clock, phases, steps["gflops"], gpus, options.utilisation, kinds, steps["memory"]),
        "utilisation": options.utilisation,
        "measured": [
            *_bench(options.bench, clock, phases, steps["gflops"]),
            *_log(config, clock, phases, steps["gflops"]),
        ],
    }


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
    from inspect import signature

    from rae.registry import find

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


def _steps(
    config: Config,
    clock: Clock,
    phases: list[Phase],
    sizes: dict[str, int],
    gpus: int,
    shards: int,
    found: list[DataSet],
) -> dict[str, Any]:
    """Parameters, operations and memory: what the simulated steps show."""
    last, checkpointing = phases[-1].begin, config.model.decoder.activation_checkpointing
    images, several = sizes["microbatch"], sizes["microbatches"] > 1
    base = Layout(checkpointing=checkpointing)
    with Simulation(config, clock, base) as simulation:
        latent = simulation.latent = latent_of(simulation.model.rae.latent_shape, found)
        gflops = [simulation.operations(phase.begin) for phase in phases[:-1]]
        with simulation.counting() as counts:
            bytes_ = simulation.step(last, images, several)
        gflops.append({name: count / images for name, count in counts.items()})
        held, parameters, saved = simulation.held(), simulation.parameters(), simulation.saved()
    rest = Rest.of(config, bytes_, held, sizes)
    memory, wanted = {}, config.parallelism if gpus > 1 else "ddp"
    bare = config.model_copy(update={"algorithms": {}})
    for parallelism, spread in {"ddp": 1, "fsdp": shards}.items() if gpus > 1 else {"ddp": 1}.items():
        for computed_again in (False, True):
            layout = Layout(spread, computed_again)
            whole, own = layout == base, held
            found_bytes = bytes_
            if not whole:
                with Simulation(bare, clock, layout, latent) as simulation:
                    found_bytes = simulation.step(0, images, several)
                    own = simulation.held()
            row = rest.total(found_bytes, own, whole, gpus > 1 and parallelism == "ddp")
            row["configured"] = (parallelism, computed_again) == (wanted, checkpointing)
            memory[f"{parallelism}{', checkpointing' if computed_again else ''}"] = row
    return {
        "parameters": parameters,
        "gflops": [_giga(counts) for counts in gflops],
        "memory": memory,
        "checkpoint": saved,
    }


def _giga(counts: dict[str, float]) -> dict[str, float]:
    return {name: count / 1e9 for name, count in counts.items()}


@dataclass
class Rest:
    """What algorithms add to the bytes of a step without them, measured once: it is the same in every layout.

    Args:
        losses: while they work on the loss, beside what the model holds. end: at the end of the step.
        kept: for the backward pass.
        waiting: bytes of the microbatches that were not simulated, held until the end of the step; ``pairs`` are their
            images and reconstructions, when the discriminator has its turn.
        held: what the layout without algorithms is to be completed with.
    """

    losses: int
    end: int
    kept: int
    waiting: int
    pairs: int
    held: dict[str, int]

    @classmethod
    def of(cls, config: Config, bytes_: dict[str, int], held: dict[str, int], sizes: dict[str, int]) -> "Rest":
        more = sizes["microbatches"] - 1
        pair = 2 * sizes["microbatch"] * 3 * config.data.image_size**2 * 4  # fp32
        return cls(
            losses=bytes_["losses"] - bytes_["before losses"],
            end=bytes_["end"] - bytes_["before end"],
            kept=bytes_["kept"],
            waiting=bytes_["held"] * more if more else 0,
            pairs=pair * more if "adversarial" in config.algorithms else 0,
            held=held,
        )

    def total(self, bytes_: dict[str, int], own: dict[str, int], whole: bool, buckets: bool) -> dict[str, Any]:
        """Bytes of a GPU, by what they are for; ``total`` is the most that lives at a time.

        Args:
            whole: the step had the algorithms in it.
            buckets: DDP copies the gradients into buckets to send them.
        """
        held = {**own, "weight average": self.held["weight average"] and own["weights"]}
        held |= {key: self.held[key] for key in ("discriminator's heads", "frozen networks")}
        others = 0 if whole else sum(held.values()) - sum(own.values())
        peaks = {
            "forward": bytes_["forward"] + self.waiting,
            "losses": bytes_["before losses"] + self.losses + self.waiting,
            "backward": bytes_["backward"] + (0 if whole else self.kept) + self.waiting,
            "optimizer": bytes_["optimizer"] + self.waiting,
            "end": bytes_["before end"] + self.end + self.waiting + self.pairs,
        }
        held["DDP's buckets"] = own["weights"] if buckets else 0
        where = max(peaks, key=peaks.__getitem__)
        total = peaks[where] + others + held["DDP's buckets"]
        return {**held, "activations": total - sum(held.values()), "total": total, "peak in": where}


def _phases(phases: list[Phase], clock: Clock, gflops: list[dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "name": phase.name,
            "begin": phase.begin if clock.known else None,
            "end": phase.end if clock.known else None,
            "share": (phase.end - phase.begin) / clock.steps,
            "gflops": sum(counts.values()),
        }
        for phase, counts in zip(phases, gflops, strict=True)
    ]


def _encoder_source(config: Config) -> str:
    entry = config.model.encoder
    arguments = next(iter(entry.values()), None) if isinstance(entry, dict) else None
    name = (arguments or {}).get("pretrained") or (arguments or {}).get("model")
    if name in PUBLISHED:
        return f"{name}, sizes as published"
    return str(name or entry) + (", its configuration" if name and "pretrained" in (arguments or {}) else "")


def _checkpoints(config: Config, clock: Clock, size: int) -> dict[str, Any]:
    folder, keep = save_folder(config), config.trainer.get("save_num_checkpoints_to_keep", -1)
    found: dict[str, Any] = {"bytes": size, "folder": folder, "number": None, "kept": None, "uploaded": None}
    if folder is None:
        return {**found, "number": 0, "kept": 0, "uploaded": 0}
    interval = str(config.trainer.get("save_interval", "1ep"))
    interval = f"{interval}ep" if interval.isdigit() else interval
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
    gflops: list[dict[str, float]],
    gpus: int,
    utilisation: float,
    kinds: dict[str, GPU],
    memory: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    configured = next(each for each in memory.values() if each["configured"])
    images = {phase.name: (phase.end - phase.begin) * clock.batch_size for phase in phases}
    hours = {}
    for name, gpu in kinds.items():
        rate = gpus * gpu.rate(config.trainer["precision"]) * utilisation
        seconds = {
            phase.name: images[phase.name] * sum(counts.values()) * 1e9 / rate
            for phase, counts in zip(phases, gflops, strict=True)
        }
        hours[name] = {
            "memory": gpu.memory,
            "tflops": gpu.rate(config.trainer["precision"]) / 1e12,
            "fits": configured["total"] + RESERVE <= gpu.memory * 1e9,
            "layouts that fit": [n for n, each in memory.items() if each["total"] + RESERVE <= gpu.memory * 1e9],
            "images a second": {p.name: rate / sum(c.values()) / 1e9 for p, c in zip(phases, gflops, strict=True)},
            "hours": {name: s / 3600 for name, s in seconds.items()} if clock.known else None,
            "total": sum(seconds.values()) / 3600 if clock.known else None,
        }
    return hours


def _bench(path: Path, clock: Clock, phases: list[Phase], gflops: list[dict[str, float]]) -> list[dict[str, Any]]:
    """What the last benchmark measured, and how long this run would take at that rate."""
    try:
        found = json.loads(path.read_text())
        measured = found["limits"]["phases"]
        rates = {name: float(row["GFLOP/s"]) for name, row in measured.items()}
        where = found["machine"]["processor"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        return [{"source": str(path), "note": "it holds no rates; make bench measures them"}]
    rate = statistics.median(rates.values()) * 1e9
    total = _run_seconds(clock, phases, gflops, lambda _, per_image: per_image / rate)
    return [{"source": f"{path} ({where})", "gflops a second": rate / 1e9, "hours": total}]


def _run_seconds(clock: Clock, phases: list[Phase], gflops: list[dict[str, float]], seconds: Any) -> float | None:
    if not clock.known:
        return None
    images = [(phase.end - phase.begin) * clock.batch_size for phase in phases]
    operations = [sum(counts.values()) * 1e9 for counts in gflops]
    return sum(n * seconds(p, f) for n, p, f in zip(images, phases, operations, strict=True)) / 3600


def _log(config: Config, clock: Clock, phases: list[Phase], gflops: list[dict[str, float]]) -> list[dict[str, Any]]:
    """What this run's own log measured (``speed_monitor``), phase by phase, and the hours that it makes."""
    path = Path(config.run_dir, "metrics.jsonl")
    rates: dict[str, list[float]] = {}
    for batch, rate in _throughputs(path):
        phase = next((p for p in reversed(phases) if batch > p.begin), phases[0])
        rates.setdefault(phase.name, []).append(rate)
    if not rates:
        return []
    middle = {name: statistics.median(values) for name, values in rates.items()}
    operations = {phase.name: sum(counts.values()) * 1e9 for phase, counts in zip(phases, gflops, strict=True)}
    per_second = statistics.median(rate * operations[name] for name, rate in middle.items())

    def seconds(phase: Phase, per_image: float) -> float:
        return 1 / middle[phase.name] if phase.name in middle else per_image / per_second

    return [
        {
            "source": str(path),
            "images a second": middle,
            "gflops a second": per_second / 1e9,
            "hours": _run_seconds(clock, phases, gflops, seconds),
        }
    ]


def _throughputs(path: Path) -> list[tuple[int, float]]:
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            if record.get("throughput/samples_per_sec"):
                found.append((int(record["batch"]), float(record["throughput/samples_per_sec"])))
        except (ValueError, KeyError, TypeError, AttributeError):  # the line that a killed run left unfinished
            continue
    return found
