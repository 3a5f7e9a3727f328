"""What goes on when a run goes on: for each part of its configuration, what a resumed run takes it from."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from rae.autoencoder.decoder import SIZES
from rae.config.arguments import parts_of
from rae.config.errors import UserError
from rae.config.registry import find
from rae.config.sections import Config
from rae.survival.checkpoints import CONFIG

Answer = Literal["checkpoint", "YAML", "error"]


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Args:
        what: it, as the guide names it.
        answer: what a resumed run takes it from, or ``error`` where it has to be as it was.
        how: what that means.
        keys: what of a configuration it is: these keys and all below them, but for what another part has.
        told: whether a change is worth a line, as it changes the course of training.
    """

    what: str
    answer: Answer
    how: str
    keys: tuple[str, ...] = ()
    told: bool = True


PARTS = (
    Part("weights, average, discriminator, both optimizers' moments", "checkpoint", "as they were"),
    Part("step, epoch, place in the data", "checkpoint", "as they were"),
    Part(
        "rates, weight decay, betas, eps: `optimizer`, `algorithms.adversarial.optimizer`",
        "YAML",
        "with the moments kept; another kind of optimizer is an error",
        ("optimizer", "algorithms.adversarial.optimizer"),
    ),
    Part(
        "`schedule`, `algorithms.adversarial.schedule`",
        "YAML",
        "at the run's step, as if it had begun under it",
        ("schedule", "algorithms.adversarial.schedule"),
    ),
    Part(
        "`algorithms`: weights of losses, starts, decay of the average, …",
        "YAML",
        "what is added begins anew, the average at the weights of the checkpoint; of what is removed nothing stays",
        ("algorithms",),
    ),
    Part(
        "`algorithms.adversarial.discriminator`",
        "error",
        "if it is another; where its frozen weights lie may change",
        ("algorithms.adversarial.discriminator",),
    ),
    Part(
        "`model`: noise, pixel loss, `latent_stats`; of another kind of model, all",
        "YAML",
        "statistics are those that the YAML names, or none",
        ("model",),
    ),
    Part(
        "`model.encoder`, `model.decoder`, a generator's `network` and `num_classes`, the kind of model",
        "error",
        "if they are others; where weights lie, and what is only computed otherwise, may change",
        ("model.encoder", "model.decoder", "model.diffusion.network", "model.diffusion.num_classes"),
    ),
    Part("`freeze`", "error", "if it is another", ("freeze",)),
    Part("`data.image_size`", "YAML", "the decoder's fixed positions are computed anew", ("data.image_size",)),
    Part(
        "`data.train`, `data.streaming`, `data.num_canonical_nodes`, `seed`",
        "YAML",
        "with other images, or in another order, an epoch that was begun begins again; that is told, by the hash of "
        "the data's content",
        ("data.train", "data.streaming", "data.num_canonical_nodes", "seed"),
    ),
    Part("`data.batch_size`, the number of ranks", "YAML", "at the next image of the epoch", ("data.batch_size",)),
    Part(
        "`trainer.max_duration`",
        "YAML",
        "one that the checkpoint is beyond is an error",
        ("trainer.max_duration",),
        told=False,
    ),
    Part(
        "precision, microbatches: the rest of `trainer`, `parallelism`, `fsdp`, `compile`",
        "YAML",
        "losses differ by rounding",
        ("trainer", "parallelism", "fsdp", "compile"),
        told=False,
    ),
    Part(
        "`begin_from`, `trainer.load_path`",
        "checkpoint",
        "they are for the start: not read any more once the run has a checkpoint of its own",
        ("begin_from", "trainer.load_path", "trainer.load_weights_only", "trainer.load_ignore_keys"),
        told=False,
    ),
    Part(
        "the rest: names and folders, `callbacks`, `loggers`, `metrics`, evaluation, loading",
        "YAML",
        "",
        ("run_name", "run_dir", "imports", "callbacks", "loggers", "metrics", "data", "checkpoints"),
        told=False,
    ),
)
"""The whole table; docs/surviving.md shows it."""
_GENERATORS = ("model.diffusion", "model.diffusion.network")
_QUIET = ("data.train.cache",)
_TOLD = ("trainer.precision", "trainer.device_train_microbatch_size")


def table() -> str:
    """The parts as a Markdown table."""
    rows = (f"| {part.what} | {part.answer} | {part.how} |" for part in PARTS)
    return "\n".join(["| part of the run | from | |", "| --- | --- | --- |", *rows])


def part_of(key: str) -> Part | None:
    """The part that a configuration's key belongs to: the one that names the most of it."""
    named = [(len(name), part) for part in PARTS for name in part.keys if f"{key}.".startswith(f"{name}.")]
    return max(named, key=lambda pair: pair[0], default=(0, None))[1]


def of_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The configuration that travels with a checkpoint; empty if there is none."""
    file = checkpoint / CONFIG
    plain = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    return plain if isinstance(plain, dict) else {}  # type: ignore[return-value]


def changes(before: dict[str, Any], config: Config) -> list[str]:
    """What differs between a checkpoint's configuration and this one, of what decides the course of training."""
    if not before:
        return []
    old, new = _flat(before), _flat(config.model_dump())
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and _is_told(key)]
    return [f"{key} {old.get(key, 'unset')} -> {new.get(key, 'unset')}" for key in keys]


def _is_told(key: str) -> bool:
    part = part_of(key)
    return key in _TOLD or (part is not None and part.told and key not in _QUIET)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
    return {} if tree is None or tree == {} else {prefix: tree}


def check_course(before: dict[str, Any], config: Config, name: str) -> None:
    """Refuse what a run cannot change when it goes on.

    Args:
        before: the configuration of the checkpoint; empty if it is not known.
        name: the checkpoint's, for messages.

    Raises:
        UserError: the first part that has to be as it was, and is not.
    """
    for key, part, was, wanted in differing(before, config.model_dump()):
        kept = "" if key in ("model", "model.decoder", *_GENERATORS) else ", with begin_from for its weights"
        raise UserError(
            f"{key}: checkpoint {name} is of {part} {was}, not {wanted}; give another run_name and run_dir{kept}"
        )


def differing(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """What of two configurations makes them those of different models: key, what of it, and its two values."""
    for key, essence in _ESSENCES.items():
        parent = key.rpartition(".")[0] or key
        if None in (_below(before, parent), _below(now, parent)) or (key in _GENERATORS and not _below(now, key)):
            continue
        was, wanted = (essence(_below(tree, key)) for tree in (before, now))
        for part, value in wanted.items():
            if value is not None and was.get(part) is not None and was[part] != value:
                yield key, part, was[part], value


def _below(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _plugin(kind: str, default: str = "", weights: str = "", alone: bool = False) -> Callable[[Any], dict[str, Any]]:
    """What a plugin is: its name and arguments, of those that say where weights lie a hub's name alone.

    Args:
        default: its name where there is no entry.
        weights: the argument that says where weights lie; by default what an encoder says itself.
        alone: its name is all that matters.
    """

    def essence(entry: Any) -> dict[str, Any]:
        if not (entry or default):
            return {}
        name, arguments = parts_of(entry or default)
        target = find(kind, name, kind)
        named = {kind: getattr(target, "__name__", name)}
        if alone:
            return named
        parameters = inspect.signature(target).parameters.values()
        held = {p.name: p.default for p in parameters if p.default is not p.empty} | arguments
        place = weights or getattr(target, "weights_argument", "")
        if place and not _is_hubs(held.get(place)):
            held.pop(place, None)
        return named | held

    return essence


def _is_hubs(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _sizes(settings: Any) -> dict[str, Any]:
    """A decoder's sizes, whether named or given."""
    if not isinstance(settings, dict):
        return {}
    keys = ("embed_dim", "depth", "num_heads", "mlp_dim")
    named = dict(zip(keys, SIZES.get(settings.get("size") or "", (None,) * 4), strict=True))
    sizes = {key: settings.get(key) or named[key] for key in keys}
    other = {"patch_size": settings.get("patch_size", 16)}
    return {**sizes, **other, "trainable_positions": bool(settings.get("trainable_positions"))}


def _model(settings: Any) -> dict[str, Any]:
    return {"kind": "autoencoder" if "encoder" in settings else next(iter(settings))} if settings else {}


_ESSENCES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model": _model,
    "model.encoder": _plugin("encoder"),
    "model.decoder": _sizes,
    "model.diffusion": lambda settings: {
        "classes": settings.get("num_classes", 1000),
        "a label for no class": settings.get("label_dropout", 0.1) > 0,
    },
    "model.diffusion.network": _plugin("network"),
    "freeze": lambda names: {"parts": sorted(names or [])},
    "optimizer": _plugin("optimizer", "adamw", alone=True),
    "algorithms.adversarial.discriminator": _plugin("discriminator", "dino", "weights"),
    "algorithms.adversarial.optimizer": _plugin("optimizer", "adamw", alone=True),
}
"""Key -> what of it has to be as it was, as far as it is known."""
