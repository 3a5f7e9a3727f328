"""What of a configuration has to fit together: sizes, rates, times; for the decoder and the discriminator alike."""

import inspect
import logging
from typing import Any

from rae.autoencoder.decoder import SIZES
from rae.config.arguments import parts_of
from rae.config.errors import UserError
from rae.config.registry import find
from rae.config.sections import Config, Model
from rae.config.times import SPAN, parse_time, read_time
from rae.survival.processes import rank

log = logging.getLogger(__name__)
_LOWER = ("lpips", "rfid", "frechet", "feature_distance")
"""Metrics that Composer's stoppers would take for better when they rise."""


def check_together(config: Config) -> None:
    """Check what can be compared before data and networks are there; of what is doubtful, say so.

    Raises:
        UserError: sizes that do not divide; a schedule that ends before it has begun.
    """
    if isinstance(config.model, Model):
        _check_sizes(config.model, config.data.image_size)
    _check_rates("optimizer", config.optimizer, "schedule", config.schedule)
    adversarial = config.algorithms.get("adversarial")
    if adversarial is not None:
        where = "algorithms.adversarial"
        optimizer, schedule = adversarial.get("optimizer", "adamw"), adversarial.get("schedule", "warmup_cosine")
        _check_rates(f"{where}.optimizer", optimizer, f"{where}.schedule", schedule)
        kept = config.begin_from is not None and config.begin_from.discriminator == "kept"
        begin, start = (_held("algorithm", "adversarial", adversarial, key) for key in ("discriminator_start", "start"))
        if not kept and _before(start, begin):
            _say(f"{where}.start: {start} is before discriminator_start, {begin}: the decoder learns from a random one")
    _check_starts(config)
    _check_monitors(config)


def _check_sizes(model: Model, image_size: int) -> None:
    decoder = model.decoder
    if image_size % decoder.patch_size:
        fault = f"{image_size} is not a multiple of model.decoder.patch_size, {decoder.patch_size}"
        raise UserError(f"data.image_size: {fault}")
    width, _, heads, _ = SIZES[decoder.size] if decoder.size else (None,) * 4
    width, heads = decoder.embed_dim or width, decoder.num_heads or heads
    if width and heads and width % heads:
        raise UserError(f"model.decoder.embed_dim: {width} is not a multiple of num_heads, {heads}")
    if width and width % 4:
        raise UserError(f"model.decoder.embed_dim: {width} is not a multiple of 4, which sin-cos positions need")


def _held(kind: str, name: str, arguments: dict[str, Any], key: str) -> Any:
    """The value of a plugin's argument, given or by default; None if it has no such argument."""
    parameter = inspect.signature(find(kind, name, kind)).parameters.get(key)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return arguments.get(key, default)


def _check_rates(where: str, optimizer: Any, place: str, schedule: Any) -> None:
    name, arguments = parts_of(optimizer)
    rate = _held("optimizer", name, arguments, "lr")
    if isinstance(rate, int | float) and rate == 0:
        _say(f"{where}.{name}.lr: 0 trains nothing")
    if schedule is None:
        return
    name, arguments = parts_of(schedule)
    final = _held("schedule", name, arguments, "final_lr")
    if isinstance(rate, int | float) and isinstance(final, int | float) and final > rate > 0:
        _say(f"{place}.{name}.final_lr: {final:g} is above the rate that it ends, {where}'s {rate:g}: the rate goes up")
    warmup, end = (_held("schedule", name, arguments, key) for key in ("warmup", "decay_end"))
    if None not in (warmup, end) and _before(warmup, end) is False:
        raise UserError(f"{place}.{name}.decay_end: {end} must come after warmup, {warmup}")


def _before(one: Any, other: Any) -> bool | None:
    """Whether a time is before another; None where their units do not tell."""
    (first, unit), (second, other_unit) = (read_time(parse_time(time, SPAN)) for time in (one, other))
    return first < second if unit == other_unit else None


def _check_starts(config: Config) -> None:
    end = config.trainer["max_duration"]
    for name, arguments in config.algorithms.items():
        for key in ("discriminator_start", "start"):
            time = _held("algorithm", name, arguments, key)
            if time is not None and _before(time, end) is False:
                _say(f"algorithms.{name}.{key}: {time} is not reached in trainer.max_duration, {end}")


def _check_monitors(config: Config) -> None:
    monitor = config.callbacks.get("activation_monitor")
    if monitor is not None and monitor.get("only_log_wandb", True) and "wandb" not in config.loggers:
        raise UserError("callbacks.activation_monitor: it logs to wandb alone; say only_log_wandb: false, or add that")
    labels = [where.rpartition(".")[2] for where in config.data.evaluation]
    for name in ("early_stopper", "threshold_stopper"):
        watched = config.callbacks.get(name, {})
        label, metric = watched.get("dataloader_label", ""), watched.get("monitor", "")
        if name in config.callbacks and not any(label.startswith(each) for each in labels):
            raise UserError(f"callbacks.{name}.dataloader_label: {label!r} is none of {', '.join(labels) or 'none'}")
        if name in config.callbacks and metric.split("/")[0] in _LOWER and "comp" not in watched:
            raise UserError(f"callbacks.{name}.comp: {metric} is better when it is lower: say comp: less")
        if name in config.callbacks and metric.split("/")[0] not in (*config.metrics, "discriminator"):
            raise UserError(f"callbacks.{name}.monitor: {metric!r} is none of metrics: {', '.join(config.metrics)}")


def _say(line: str) -> None:
    if rank() == 0:
        log.warning("%s", line)
