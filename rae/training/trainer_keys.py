"""The keys under ``trainer:``, with the values that work here; Composer's Trainer takes more, and fails late."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from rae.config.errors import UserError
from rae.config.registry import nearest
from rae.config.times import LASTING, SPAN, parse_time, read_time

# What build_trainer passes itself: another mechanism of the configuration decides each of these.
OURS = (
    *("model", "train_dataloader", "eval_dataloader", "optimizers", "schedulers", "algorithms", "algorithm_passes"),
    "step_schedulers_every_batch",
    *("callbacks", "loggers", "parallelism_config", "seed", "run_name"),
)
_FORMS = (
    *("load_object_store", "load_exclude_algorithms", "save_filename", "save_latest_filename", "save_overwrite"),
    *("save_ignore_keys", "save_weights_only", "save_metrics"),
)
REFUSED = {
    **dict.fromkeys(_FORMS, "not used here, where checkpoints have one form; leave it out"),
    "train_dataloader_label": "figures are named by it; leave it out",
    "scale_schedule_ratio": "schedules say themselves where they end; leave it out",
    "accumulate_train_batch_on_tokens": "there are no tokens in a batch of images; leave it out",
    "precision_config": "it is for fp8, which is not among the precisions here; leave it out",
    "profiler": "it takes an object, which a YAML cannot hold; leave it out",
    "compile_config": "the compile section says which networks are compiled",
}


def _of(kind: Any, told: str, test: Callable[[Any], bool] = lambda value: True) -> Callable[[Any], Any]:
    adapter = TypeAdapter(kind)

    def check(value: Any) -> Any:
        try:
            checked = adapter.validate_python(value, strict=isinstance(value, bool) and kind is not bool)
        except ValidationError as error:
            raise ValueError(f"{value!r} is not {told}") from error
        if not test(checked):
            raise ValueError(f"{value!r} is not {told}")
        return checked

    return check


def _one_of(*names: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"{value!r} is none of {', '.join(names)}")
        return value

    return check


def _span(value: Any) -> str:
    return parse_time(value, SPAN, 1e-9)


def _never(value: Any) -> str:
    if value is None:
        raise ValueError("write 0 to turn evaluation off, or leave it out for 1ep")
    time = parse_time(value, SPAN, -math.inf)
    return "0ep" if read_time(time)[0] <= 0 else time


def _saving(value: Any) -> str:
    if value is None:
        raise ValueError("leave it out for 1ep; trainer.save_folder: null turns saving off")
    return parse_time(value, SPAN, 1e-9)


_KEEP = "supported; it must be at least 1, or -1 to keep all"
_BOOL = _of(bool, "true or false")
_SOME = _of(int, "a number of batches: 1 or more, or -1 for all", lambda value: value >= 1 or value == -1)
_PATH = _of(str, "a path or URL", lambda value: bool(value.strip()))
VALUES: dict[str, Callable[[Any], Any]] = {
    "max_duration": lambda value: parse_time(value, LASTING, 1),
    "eval_interval": _never,
    "save_interval": _saving,
    "train_subset_num_batches": _SOME,
    "eval_subset_num_batches": _SOME,
    "device_train_microbatch_size": _of(int, "supported; give a number of images a rank", lambda v: v >= 1),
    "precision": _one_of("fp32", "amp_bf16", "amp_fp16"),
    "device": _one_of("cpu", "gpu"),
    "ddp_sync_strategy": _one_of("single_auto_sync", "multi_auto_sync", "forced_sync"),
    "dist_timeout": _of(float, "a number of seconds above 0", lambda value: 0 < value < 1e9),
    "deterministic_mode": _BOOL,
    "spin_dataloaders": _BOOL,
    "progress_bar": _BOOL,
    "log_to_console": _BOOL,
    "log_traces": _BOOL,
    "auto_log_hparams": _BOOL,
    "console_stream": _one_of("stdout", "stderr"),
    "console_log_interval": _span,
    "python_log_level": lambda value: _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")(str(value).upper()),
    "load_path": _PATH,
    "load_weights_only": _BOOL,
    "load_strict_model_weights": _BOOL,
    "load_progress_bar": _BOOL,
    "load_ignore_keys": _of(list[str], "a list of patterns"),
    "save_folder": _PATH,
    "save_num_checkpoints_to_keep": _of(int, _KEEP, lambda v: v >= 1 or v == -1),
    "autoresume": _BOOL,
}
"""Key -> what gives its value in the form that the Trainer takes, or raises a ValueError."""
_MAY_BE_NULL = (
    *("precision", "device", "device_train_microbatch_size", "ddp_sync_strategy", "python_log_level"),
    *("load_path", "load_ignore_keys", "save_folder"),
)


def check_trainer(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments under ``trainer:``, checked by key and value, in the form that the Trainer takes.

    Raises:
        UserError: the first fault.
    """
    if arguments.get("max_duration") is None:
        raise UserError("missing value: trainer.max_duration is required, such as 16ep")
    checked: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in OURS:
            raise UserError(f"trainer.{key}: this is set by the configuration's own sections, not under trainer:")
        if key in REFUSED:
            raise UserError(f"trainer.{key}: {REFUSED[key]}")
        if key not in VALUES:
            raise UserError(f"unknown key 'trainer.{key}'{nearest(key, VALUES)}")
        if value is None and key in _MAY_BE_NULL:
            checked[key] = None
            continue
        try:
            checked[key] = VALUES[key](value)
        except ValueError as error:
            raise UserError(f"trainer.{key}: {error}") from error
    if checked.get("device") == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.device: this machine has no GPU that torch can use; leave the key out for the CPU")
    return checked
