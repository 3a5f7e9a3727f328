"""From a configuration to a Composer Trainer."""

import json
import logging
import math
import os
import pickle
import secrets
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import composer.algorithms
import torch
from composer import Evaluator, Time, Trainer
from composer.devices import Device
from composer.optim import ComposerScheduler
from composer.utils import dist, get_device, reproducibility
from composer.utils.checkpoint import glob_filter
from streaming import StreamingDataset
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LambdaLR

from rae.algorithms.adversarial import Adversarial, adversarial_last
from rae.algorithms.ema import LIVE_SUFFIX
from rae.autoencoder.model import RAEModel, build_rae
from rae.callbacks.begin_step import BeginStep
from rae.callbacks.checkpointer import Checkpointer
from rae.callbacks.data_log import DataLog
from rae.callbacks.guard import Guard
from rae.callbacks.progress import Progress
from rae.callbacks.step_figures import StepFigures
from rae.config.registry import RankError, UserError, build, check_arguments, check_plugin, import_plugins, parse_time
from rae.config.sections import Config, EvalData, check_data, is_remote, rank, save_config, to_yaml, world_size
from rae.data.dataset import (
    DataError,
    ImageDataset,
    ImageStream,
    Ledger,
    eval_loader,
    eval_transform,
    first_line,
    open_stream,
    opening,
    train_loader,
    train_transform,
)
from rae.evaluation.measurement import refer
from rae.evaluation.metrics import Reference, build_metrics, verdict, within
from rae.survival.checkpoints import METRICS, refused, without_code
from rae.survival.processes import RunLock
from rae.survival.storage import RemoteFolder, can_delete
from rae.training.compilation import check_compiler, compile_networks
from rae.training.parallelism import check_sharding, parallelism, saves_sharded
from rae.training.resume import changes, clear, given, loadable, newest, used

log = logging.getLogger(__name__)

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
# Warnings about what is as it should be.
_NOT_FOR_USERS = ("Cannot split tensor of length", "No batches were trained", "TypedStorage is deprecated")
_OTHER_MODEL = "checkpoint {}: it is of another model or other algorithms; give another run_name and run_dir"
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
    check_plugin("encoder", config.model.encoder, "model.encoder")
    check_plugin("pixel_loss", config.model.pixel_loss, "model.pixel_loss")
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
            time = parse_time(_in_epochs(value))
        except ValueError as error:
            raise UserError(f"trainer.{key}: {error}") from error
        if Time.from_timestring(time).value <= 0 and key != "eval_interval":  # where it means never
            raise UserError(f"trainer.{key}: {value!r} must be more than 0")
    if str(arguments.get("save_interval", "")).endswith("iter"):
        raise UserError("trainer.save_interval: iterations are not counted here; write it in ep, ba, sp, sec or dur")
    return arguments


def _in_epochs(value: Any) -> Any:
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


def build_model(config: Config) -> RAEModel:
    """The autoencoder that the configuration describes, for Composer."""
    rae = build_rae(config.model, config.data.image_size)
    pixel = check_plugin("pixel_loss", config.model.pixel_loss, "model.pixel_loss")
    pixel_loss = build("pixel_loss", pixel, "model.pixel_loss")
    return RAEModel(rae, pixel_loss, next(iter(pixel)), build_metrics(config.metrics))


def build_trainer(config: Config) -> Trainer:
    """A Trainer ready to fit, at the run's newest checkpoint if it has one.

    Raises:
        UserError: something that :func:`check` could not see: weights, shapes, too little data, a bucket.
    """
    arguments = dict(config.trainer)
    arguments["precision"] = _precision(arguments.get("precision"), arguments.get("device"))
    device = _initialize(config)
    check_compiler(config.compile, device.name)
    if rank() == 0:
        save_config(config, Path(config.run_dir) / "config.yaml")
    checkpointer = _checkpointer(config, arguments)
    checkpoint = _checkpoint(config, arguments, checkpointer)
    evaluation = _open_eval(config, config.data.eval, "eval")
    ledger = Ledger(config.data.max_bad_samples, list(config.data.train.streams))
    loader = _train_loader(config, ledger)
    reproducibility.seed_all(config.seed)  # every rank starts from the same weights
    model = device.module_to_device(build_model(config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build("optimizer", config.optimizer, "optimizer", params=trained)
    figures = StepFigures(ledger)
    context = dict(steps_per_epoch=len(loader), run_dir=config.run_dir, eval_images=evaluation, figures=figures)
    algorithms = _build_all("algorithm", config.algorithms, context)
    compile_networks(config.compile, model, algorithms)
    for adversarial in (each for each in algorithms if isinstance(each, Adversarial)):
        model.eval_metrics |= within("discriminator", verdict(adversarial.discriminator))
    arguments.setdefault("progress_bar", sys.stderr.isatty())
    loggers = dict(config.loggers)
    if not arguments["progress_bar"]:
        loggers.setdefault("console", {})
    arguments.setdefault("auto_log_hparams", False)
    callbacks = [figures, BeginStep(config.seed), DataLog(ledger), *_build_all("callback", _callbacks(config), context)]
    progress = Progress(config.data.batch_size, str(_in_epochs(arguments.get("eval_interval", "1ep"))))
    passed = dict(
        model=model,
        train_dataloader=loader,
        eval_dataloader=_evaluators(config, evaluation, algorithms, Ledger(config.data.max_bad_samples)),
        optimizers=optimizer,
        schedulers=_schedule(config, optimizer, len(loader)),
        step_schedulers_every_batch=True,
        algorithms=algorithms,
        algorithm_passes=[adversarial_last, *(c.without_updates for c in callbacks if isinstance(c, Guard))],
        callbacks=[*callbacks, progress, *([checkpointer] if checkpointer else [])],
        loggers=_build_all("logger", loggers, context),
        parallelism_config=parallelism(config),
        seed=config.seed,
        run_name=config.run_name,
    )
    ignored = arguments.pop("load_ignore_keys", None)
    expected = None if ignored or arguments.get("load_strict_model_weights") is False else model
    with _loading(config, checkpoint, ignored, expected) as load, _explained(checkpoint):
        trainer = Trainer(**passed, **arguments, **load)
    _refer(config, trainer)
    return trainer


@contextmanager
def _explained(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
    except (RuntimeError, KeyError, CheckpointException) as error:
        if checkpoint is None or (isinstance(error, RuntimeError) and "state_dict" not in str(error)):
            raise
        raise UserError(_OTHER_MODEL.format(checkpoint)) from error


@contextmanager
def _alone(folder: str, where: str) -> Iterator[None]:
    """No process of an earlier start is left, and none of a later one begins, inside this context."""
    try:
        lock = RunLock(folder)
    except OSError as error:
        raise UserError(f"{where}: cannot write to {folder}: {error.strerror}") from error
    with lock.file:
        if rank() == 0:
            lock.acquire()
        dist.barrier()
        lock.share()
        yield


def _folder_alone(config: Config) -> AbstractContextManager[None]:
    """The same for checkpoints that lie outside the run's folder, where another run could save too."""
    folder = config.save_folder
    if folder is None or is_remote(folder) or Path(folder).resolve().is_relative_to(Path(config.run_dir).resolve()):
        return nullcontext()
    return _alone(folder, "trainer.save_folder")


def _checkpoint(config: Config, arguments: dict[str, Any], checkpointer: Checkpointer | None) -> Path | None:
    """The checkpoint to go on from, or to begin with; takes ``autoresume`` and ``load_path`` out of ``arguments``."""
    scratch = _scratch(config)
    load_path, autoresume = arguments.pop("load_path", None), arguments.pop("autoresume", True)
    if checkpointer is not None and autoresume:
        found = newest(checkpointer.places(), scratch, config.checkpoints.damaged)
        if found is not None:
            checkpointer.resumed(found)
            for key in ("load_weights_only", "load_ignore_keys"):  # those are about load_path
                arguments.pop(key, None)
            return found
    if checkpointer is not None and not autoresume and used(checkpointer.folder):
        raise UserError(
            f"trainer.autoresume: {checkpointer.folder} holds checkpoints of an earlier start; "
            "go on from them, or give another trainer.save_folder"
        )
    return given(load_path, scratch, config.checkpoints.damaged) if load_path else None


def _scratch(config: Config) -> Path:
    return Path(config.run_dir, f".loading-node{dist.get_node_rank()}")


@contextmanager
def _loading(
    config: Config, checkpoint: Path | None, ignored: list[str] | None, expected: torch.nn.Module | None
) -> Iterator[dict[str, Any]]:
    """The Trainer's arguments for loading a checkpoint, which cannot run code in this context."""
    if checkpoint is None:
        yield {}
        return

    names = set(expected.state_dict()) if expected is not None else None

    def ignore(state_dict: Any) -> None:
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
            raise UserError(f"{checkpoint} is no checkpoint of a run")
        # Composer would load what fits, and train the rest from the beginning.
        if names is not None and set(state_dict["state"].get("model", ())) != names:
            raise UserError(_OTHER_MODEL.format(checkpoint))
        state_dict.pop("rng", None)
        if ignored:
            glob_filter(ignored)(state_dict)

    changed = changes(checkpoint, config)
    path = loadable(checkpoint, saves_sharded(config), _scratch(config))
    # Composer would evaluate strings from the checkpoint, to add the algorithms that they name.
    excluded = list(composer.algorithms.__all__)
    try:
        with without_code():
            yield dict(load_path=str(path), load_ignore_keys=ignore, load_exclude_algorithms=excluded)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {checkpoint} holds {refused(error)}") from error
    if rank() == 0:
        log.warning("%s begins at checkpoint %s", config.run_name, checkpoint.name)
        for change in changed:
            log.warning("the configuration has changed since: %s", change)
    clear(_scratch(config))


def _initialize(config: Config) -> Device:
    device = get_device(config.trainer.get("device"))
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # torchrun's name for Composer's
    dist.initialize_dist(device, timeout=config.trainer.get("dist_timeout", 300.0))
    return device


def _precision(wanted: str | None, device: str | None) -> str:
    on_gpu = torch.cuda.is_available() if device is None else device == "gpu"
    if wanted is None:
        return "amp_bf16" if on_gpu else "fp32"
    if not on_gpu and wanted != "fp32":
        if rank() == 0:
            log.warning("trainer.precision: %s needs a GPU; on this CPU the run uses fp32", wanted)
        return "fp32"
    return wanted


def _open(streams: dict[str, ImageStream], **arguments: Any) -> ImageDataset:
    if rank() == 0:
        for where, stream in streams.items():
            if stream.remote:
                RemoteFolder(stream.remote).check_readable("index.json", f"{where}.path")
    arguments.setdefault("download_retry", 8)  # pauses double: minutes without the store, not seconds
    paths = ", ".join(f"{where}.path {stream.remote or stream.local!r}" for where, stream in streams.items())
    with opening([stream.local for stream in streams.values()], f"cannot open {paths}"):
        return ImageDataset(streams=list(streams.values()), **arguments)


def _train_loader(config: Config, ledger: Ledger) -> Any:
    data, source, batch_size = config.data, config.data.train, config.data.batch_size // world_size()
    if source.path is not None:
        streams = {"data.train": open_stream(source.path, source.cache or f"{config.run_dir}/cache/train")}
    else:
        streams = {
            f"data.train.streams.{name}": open_stream(
                stream.path,
                stream.cache or f"{config.run_dir}/cache/{name}",
                **stream.model_dump(include={"proportion", "repeat", "choose"}),
            )
            for name, stream in source.streams.items()
        }
    dataset = _open(
        streams,
        transform=train_transform(data.image_size, source.resize, source.flip),
        seed=config.seed,
        verify=data.verify,
        shuffle=source.shuffle,
        batch_size=batch_size,
        num_canonical_nodes=data.num_canonical_nodes,
        **data.streaming,
    )
    if any("image" not in shard.column_names for shard in dataset.shards):
        raise UserError(
            "data.train: it holds latents without images; convert/latents_to_mds.py stores both --with-images"
        )
    loader = train_loader(dataset, batch_size, data.workers, data.prefetch, ledger)
    if len(loader) == 0:
        raise UserError(f"data.train: {dataset.size} images are fewer than one batch of {data.batch_size}")
    return loader


def _open_eval(config: Config, source: EvalData | None, name: str) -> ImageDataset | None:
    if source is None:
        return None
    where = "data.eval" if name == "eval" else f"data.evals.{name}"
    return _open(
        {where: open_stream(source.path, source.cache or f"{config.run_dir}/cache/{name}")},
        transform=eval_transform(config.data.image_size),
        seed=config.seed,
        verify=config.data.verify,
        **config.data.streaming,
    )


def _callbacks(config: Config) -> dict[str, Any]:
    """The configuration's, after those that are on by themselves."""
    return {"guard": {}, **({"referee": {}} if "adversarial" in config.algorithms else {}), **config.callbacks}


def _build_all(kind: str, entries: dict[str, Any], context: dict[str, Any]) -> list[Any]:
    return [build(kind, {name: arguments}, f"{kind}s", **context) for name, arguments in entries.items()]


def _evaluators(
    config: Config, images: ImageDataset | None, algorithms: Iterable[Any], ledger: Ledger
) -> list[Evaluator] | None:
    data, source = config.data, config.data.eval
    if images is None or source is None or not config.metrics:
        return None
    live = any(getattr(algorithm, "evaluate", None) == "both" for algorithm in algorithms)
    batch_size = (data.eval_batch_size or data.batch_size) // world_size()
    shared = (batch_size, data.workers, data.prefetch)
    evaluators = []
    for name, each in {"eval": source, **data.evals}.items():
        opened = images if name == "eval" else _open_eval(config, each, name)
        assert opened is not None
        evaluators += [
            Evaluator(
                label=label,
                dataloader=eval_loader(opened, *shared, each.limit, rank(), world_size(), ledger, noise_tau),
                # Composer takes them for patterns, to be found anywhere in a name.
                metric_names=[rf"\b{metric}\b" for metric in each.metrics or [*config.metrics, "discriminator"]],
            )
            for label, noise_tau in _passes(name, each.noise_taus, live).items()
        ]
    return evaluators


def _passes(name: str, noise_taus: Iterable[float], live: bool) -> dict[str, float]:
    """Labels of the evaluations of one data set, and the noise level of each."""
    passes = {name: 0.0} | ({name + LIVE_SUFFIX: 0.0} if live else {})
    return passes | {f"{name}_tau{noise_tau:g}": noise_tau for noise_tau in noise_taus}


def _refer(config: Config, trainer: Trainer) -> None:
    """The originals' moments are computed once for all evaluations, unless these see a part of the images only."""
    if config.trainer.get("eval_subset_num_batches", -1) != -1:
        return
    known: dict[str, Reference] = {}
    device = next(trainer.state.model.parameters()).device.type
    for evaluator in trainer.state.evaluators:
        images: Any = evaluator.dataloader.dataloader.dataset  # type: ignore[union-attr]
        stream = images.images.streams[0]
        metrics = trainer.state.eval_metrics[evaluator.label].values()
        refer(metrics, images, stream.remote or stream.local, config.data.image_size, device, known)


def _schedule(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    if config.schedule is None:
        return None
    base_lr = optimizer.param_groups[0]["lr"]
    schedule = build("schedule", config.schedule, "schedule", base_lr=base_lr, steps_per_epoch=steps_per_epoch)
    return schedule if isinstance(schedule, ComposerScheduler) else LambdaLR(optimizer, schedule)


def _checkpointer(config: Config, arguments: dict[str, Any]) -> Checkpointer | None:
    """What saves this run, from the trainer's arguments of Composer's names, which it takes out of ``arguments``."""
    arguments.pop("save_folder", None)
    folder = config.save_folder
    interval = str(_in_epochs(arguments.pop("save_interval", "1ep")))
    keep = arguments.pop("save_num_checkpoints_to_keep", -1)
    if folder is None:
        return None
    if not is_remote(folder):
        _check_folder(folder)
    elif rank() == 0:
        RemoteFolder(folder).check_writable("trainer.save_folder")
    dist.barrier()
    return Checkpointer(folder, config.run_dir, interval, keep, to_yaml(config), config.checkpoints.upload_attempts)


def _check_folder(folder: str) -> None:
    """Check that a local folder can be written to, and is the same on all nodes. A collective call."""
    token, fault = Path(folder, f".preflight-{dist.all_gather_object(secrets.token_hex(4))[0]}"), ""
    if rank() == 0:
        try:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            fault = f"cannot write to {folder}: {error.strerror}"
    dist.barrier()
    if dist.get_local_rank() == 0 and not token.exists():
        fault = fault or f"{folder} is not the same folder on all nodes; give a shared one, or a bucket"
    faults = list(filter(None, dist.all_gather_object(fault)))
    if rank() == 0:
        token.unlink(missing_ok=True)
    if faults:
        raise UserError(f"trainer.save_folder: {faults[0]}")


def _save_final_metrics(config: Config, trainer: Trainer) -> Path:
    final = {  # each metric keeps the value of the last evaluation
        label: {name: _number(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in trainer.state.eval_metrics.items()
        if all(metric.update_called for metric in metrics.values())
    }
    path = Path(config.run_dir, METRICS)
    if rank() == 0:
        record = {"batch": int(trainer.state.timestamp.batch), **final}
        path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _number(value: Any) -> float | None:
    """JSON has no NaN or infinity."""
    return float(value) if math.isfinite(value) else None


def train(config: Config) -> Trainer:
    """Check, build, fit, evaluate; write the final metrics to ``<run_dir>/metrics.json``.

    Raises:
        UserError: the user's mistake, or a condition that the user can mend.
    """
    check(config)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    _initialize(config)
    with _alone(config.run_dir, "run_dir"), _folder_alone(config):
        trainer = build_trainer(config)
        checkpointers = [c for c in trainer.state.callbacks if isinstance(c, Checkpointer)]
        try:
            _fit(config, trainer, checkpointers)
        except BaseException:
            for checkpointer in checkpointers:  # while the interpreter still can
                checkpointer.finish_uploads()
            trainer.engine.close()  # trainer.close() would wait for ranks that wait for this one
            raise
        trainer.close()
    return trainer


def _fit(config: Config, trainer: Trainer, checkpointers: list[Checkpointer]) -> None:
    reached_end = trainer.state.max_duration is None or trainer.state.timestamp >= trainer.state.max_duration
    if reached_end and all(checkpointer.was_finished for checkpointer in checkpointers):
        duration = trainer.state.max_duration
        log.warning("%s is finished (%s); a longer trainer.max_duration goes on", config.run_name, duration)
    else:
        try:
            if not reached_end:
                trainer.fit()
            elif trainer.state.evaluators:
                trainer.eval()
        except DataError as error:
            raise RankError(error.line) from error
        except RuntimeError as error:
            if "gloo" not in str(error) or "by peer" not in str(error):  # closed its connection, or reset it
                raise
            raise RankError(f"rank {rank()} stops: another rank has ended, which says why") from error
        metrics = _save_final_metrics(config, trainer)
        for checkpointer in checkpointers:
            checkpointer.finish(trainer.state, metrics)
