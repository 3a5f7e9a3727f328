"""What of a run can be checked before data or a model is loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from composer import Time, Trainer
from streaming import StreamingDataset

from rae.config.arguments import check_arguments, check_plugin
from rae.config.errors import UserError
from rae.config.registry import import_plugins
from rae.config.sections import Config, Model
from rae.config.times import parse_time
from rae.survival.processes import world_size
from rae.survival.storage import can_delete, is_remote
from rae.training.parallelism import check_sharding


def check_data(config: Config) -> None:
    """Check batch sizes against ranks, and that local data sets are there.

    Raises:
        UserError: a batch that ranks cannot share equally; a path that is missing or holds no index.json.
    """
    ranks, data = world_size(), config.data
    for key in ("batch_size", "eval_batch_size"):
        size = getattr(data, key)
        if size is not None and size % ranks:
            raise UserError(f"data.{key}: {size} cannot be shared equally by {ranks} ranks")
    if data.train.resize is not None and data.train.resize < data.image_size:
        raise UserError(f"data.train.resize: {data.train.resize} is smaller than data.image_size, {data.image_size}")
    if bool(data.train.path) == bool(data.train.streams):
        raise UserError("data.train: give either path or streams")
    if data.eval is None and (config.metrics or data.evals):
        raise UserError("metrics: there is nothing to evaluate them on; set data.eval.path")
    for key, source in data.evaluation.items():
        same = next((name for name, trained in data.training.items() if trained.path == source.path), None)
        if same:
            raise UserError(f"{key}.path: it is {same}.path too; evaluation needs images of its own")
        known = [*config.metrics, *(["discriminator"] if "adversarial" in config.algorithms else [])]
        for metric in source.metrics or ():
            if metric not in known:
                raise UserError(f"{key}.metrics: {metric!r} is not among metrics: {', '.join(known)}")
    for name in data.evals:
        if not name.isidentifier() or name == "eval" or name.endswith("_live"):
            raise UserError(f"data.evals.{name}: give it another name, of letters and digits")
    for key, source in {**data.training, **data.evaluation}.items():
        _check_path(key, source.path)


def _check_path(key: str, path: str) -> None:
    if is_remote(path):
        return
    if not Path(path).is_dir():
        raise UserError(f"{key}.path: there is no folder {path!r}; make it with convert/imagefolder_to_mds.py")
    index = Path(path) / "index.json"
    if not index.is_file():
        raise UserError(f"{key}.path: {path!r} holds no index.json, so it is no finished MDS data set")
    try:
        shards = json.loads(index.read_text())["shards"]
        [shard["raw_data"]["basename"] for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}.path: {index} is damaged ({error}); restore it from a copy or convert again") from error


# What build_trainer passes itself: another mechanism of the configuration decides each of these.
_OURS = (
    *("model", "train_dataloader", "eval_dataloader", "optimizers", "schedulers", "algorithms", "algorithm_passes"),
    "step_schedulers_every_batch",
    *("callbacks", "loggers", "parallelism_config", "seed", "run_name"),
)
_NOT_USED = (  # how checkpoints are named and what they hold is not a choice here
    *("load_object_store", "load_exclude_algorithms", "save_filename", "save_latest_filename", "save_overwrite"),
    *("save_ignore_keys", "save_weights_only", "save_metrics"),
)
_OUR_STREAMING = ("streams", "remote", "local", "batch_size", "shuffle", "shuffle_seed", "num_canonical_nodes")
_PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")
_TIMES = ("max_duration", "save_interval", "eval_interval")


def check(config: Config, data: bool = True) -> None:
    """Check everything that can be checked without loading data or a model: plugins, arguments, times, paths.

    Args:
        data: also that the data are there, and fit this launch.

    Raises:
        UserError: the first fault.
    """
    import_plugins(config.imports)
    if data:
        check_data(config)
    if isinstance(config.model, Model):
        check_plugin("encoder", config.model.encoder, "model.encoder")
        check_plugin("pixel_loss", config.model.pixel_loss, "model.pixel_loss")
    else:
        check_plugin("model", config.model, "model")
        if "adversarial" in config.algorithms:
            raise UserError("algorithms.adversarial: it trains autoencoders; leave it out with another kind of model")
        for where, source in config.data.evaluation.items():
            if source.noise_taus:
                raise UserError(f"{where}.noise_taus: noise is for the latents of autoencoders; leave it out")
    check_plugin("optimizer", config.optimizer, "optimizer")
    if config.schedule is not None:
        check_plugin("schedule", config.schedule, "schedule")
    for kind in ("algorithm", "callback", "logger", "metric"):
        for name, arguments in getattr(config, f"{kind}s").items():
            check_plugin(kind, {name: arguments}, f"{kind}s")
    check_arguments(StreamingDataset, config.data.streaming, "data.streaming", _OUR_STREAMING)
    config.trainer = _check_trainer(config.trainer)
    _check_saving(config)
    check_sharding(config)


def _check_trainer(arguments: dict[str, Any]) -> dict[str, Any]:
    for key in _OURS:
        if key in arguments:
            raise UserError(f"trainer.{key}: this is set by the configuration's own sections, not under trainer:")
    for key in _NOT_USED:
        if key in arguments:
            raise UserError(f"trainer.{key}: not used here, where checkpoints have one form; leave it out")
    arguments = {**arguments, **check_arguments(Trainer, arguments, "trainer", (*_OURS, *_NOT_USED))}
    if arguments.get("max_duration") is None:
        raise UserError("missing value: trainer.max_duration is required, such as 16ep")
    microbatch = arguments.get("device_train_microbatch_size", 1)
    if not isinstance(microbatch, int) or microbatch < 1:
        raise UserError(
            f"trainer.device_train_microbatch_size: {microbatch!r} is not supported; give a number of images a rank"
        )
    if arguments.get("device") == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.device: this machine has no GPU that torch can use; leave the key out for the CPU")
    if arguments.get("precision") not in (None, *_PRECISIONS):
        raise UserError(f"trainer.precision: {arguments['precision']!r} is none of {', '.join(_PRECISIONS)}")
    for key in _TIMES:
        value = arguments.get(key)
        if value is None:
            continue
        try:
            time = parse_time(in_epochs(value))
        except ValueError as error:
            raise UserError(f"trainer.{key}: {error}") from error
        if Time.from_timestring(time).value <= 0 and key != "eval_interval":  # where it means never
            raise UserError(f"trainer.{key}: {value!r} must be more than 0")
    if str(arguments.get("save_interval", "")).endswith("iter"):
        raise UserError("trainer.save_interval: iterations are not counted here; write it in ep, ba, sp, sec or dur")
    return arguments


def in_epochs(value: Any) -> Any:
    """A time string; of a number alone, which Composer takes for epochs."""
    return f"{value}ep" if isinstance(value, int) or (isinstance(value, str) and value.isdigit()) else value


def _check_saving(config: Config) -> None:
    arguments = config.trainer
    folder, keep = arguments.get("save_folder"), arguments.get("save_num_checkpoints_to_keep", -1)
    named = (folder or "").replace("{run_name}", "")
    for key, text in (("run_name", config.run_name), ("run_dir", config.run_dir), ("trainer.save_folder", named)):
        if set("{}") & set(text):
            raise UserError(f"{key}: it must have no braces (but for {{run_name}} in trainer.save_folder)")
    if keep != -1 and keep < 1:
        raise UserError(f"trainer.save_num_checkpoints_to_keep: {keep} must be at least 1, or -1 to keep all")
    if folder is None:
        if arguments.get("autoresume") and "save_folder" in arguments:
            raise UserError("trainer.autoresume: there is nothing to go on from without trainer.save_folder")
    elif is_remote(folder) and keep != -1 and not can_delete(folder):
        raise UserError(
            f"trainer.save_num_checkpoints_to_keep: objects in {folder} cannot be deleted from here; "
            "leave it out, and let the bucket's own lifecycle rules remove old ones"
        )
