"""From a configuration to a Composer Trainer."""

import json
import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer import Evaluator, State, Trainer
from composer.core import TimeUnit
from composer.optim import ComposerScheduler
from composer.utils import dist, get_device, reproducibility
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from streaming import StreamingDataset
from torch.optim.lr_scheduler import LambdaLR

from rae.algorithms.adversarial import adversarial_last
from rae.algorithms.ema import LIVE_SUFFIX
from rae.algorithms.gloo import GlooGradients
from rae.callbacks.begin_step import BeginStep
from rae.config import Config, check_data, rank, save_config, world_size
from rae.data import ImageDataset, eval_loader, eval_transform, open_dataset, train_loader, train_transform
from rae.decoder import Decoder, load_published
from rae.model import RAE, RAEModel
from rae.registry import UserError, build, check_arguments, check_plugin, import_plugins, parse_time

log = logging.getLogger(__name__)

# What build_trainer passes itself: another mechanism of the configuration decides each of these.
_OURS = (
    *("model", "train_dataloader", "eval_dataloader", "optimizers", "schedulers", "algorithms", "algorithm_passes"),
    "step_schedulers_every_batch",
    *("callbacks", "loggers", "parallelism_config", "seed", "run_name"),
)
_OUR_STREAMING = ("streams", "remote", "local", "batch_size", "shuffle", "shuffle_seed", "num_canonical_nodes")
_NOT_FOR_USERS = ("Cannot split tensor of length", "No batches were trained")  # warnings about what is as it should be
_PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")
_TIMES = ("max_duration", "save_interval", "eval_interval")


def check(config: Config) -> None:
    """Check everything that can be checked without loading data or a model: plugins, arguments, times, paths.

    Raises:
        UserError: the first fault.
    """
    import_plugins(config.imports)
    check_data(config)
    check_plugin("encoder", config.model.encoder, "model.encoder")
    check_plugin("pixel_loss", config.model.pixel_loss, "model.pixel_loss")
    check_plugin("optimizer", config.optimizer, "optimizer")
    if config.schedule is not None:
        check_plugin("schedule", config.schedule, "schedule")
    for kind in ("algorithm", "callback", "logger", "metric"):
        for name, arguments in getattr(config, f"{kind}s").items():
            check_plugin(kind, {name: arguments}, f"{kind}s")
    check_arguments(FSDP2Config, config.fsdp, "fsdp")
    check_arguments(StreamingDataset, config.data.streaming, "data.streaming", _OUR_STREAMING)
    _check_trainer(config.trainer)


def _check_trainer(arguments: dict[str, Any]) -> None:
    for key in _OURS:
        if key in arguments:
            raise UserError(f"trainer.{key}: this is set by the configuration's own sections, not under trainer:")
    check_arguments(Trainer, arguments, "trainer", _OURS)
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
        if isinstance(value, str):
            try:
                parse_time(value)
            except ValueError as error:
                raise UserError(f"trainer.{key}: {error}") from error


def build_model(config: Config) -> RAEModel:
    """The autoencoder that the configuration describes, for Composer."""
    encoder = build("encoder", config.model.encoder, "model.encoder")
    sizes = config.model.decoder.model_dump(exclude={"weights"})
    try:
        decoder = Decoder(encoder.embed_dim, config.data.image_size, **sizes)
    except ValueError as error:
        raise UserError(f"model.decoder: {error}") from error
    if config.model.decoder.weights:
        load_published(decoder, config.model.decoder.weights)
    rae = RAE(encoder, decoder, config.model.noise_tau, config.model.noise, config.model.latent_stats)
    pixel = check_plugin("pixel_loss", config.model.pixel_loss, "model.pixel_loss")
    metrics = {name: build("metric", {name: arguments}, "metrics") for name, arguments in config.metrics.items()}
    return RAEModel(rae, build("pixel_loss", pixel, "model.pixel_loss"), next(iter(pixel)), metrics)


def build_trainer(config: Config) -> Trainer:
    """A Trainer ready to fit; the resolved configuration is saved in the run's folder.

    Raises:
        UserError: something that :func:`check` could not see: weights, shapes, too little data.
    """
    arguments = dict(config.trainer)
    arguments["precision"] = _precision(arguments.get("precision"), arguments.get("device"))
    device = get_device(arguments.get("device"))
    dist.initialize_dist(device, timeout=arguments.get("dist_timeout", 300.0))
    if rank() == 0:
        save_config(config, Path(config.run_dir) / "config.yaml")
    evaluation = _open_eval(config)
    loader = _train_loader(config)
    reproducibility.seed_all(config.seed)  # every rank starts from the same weights
    model = device.module_to_device(build_model(config))
    optimizer = build("optimizer", config.optimizer, "optimizer", params=_trained(model))
    context = dict(steps_per_epoch=len(loader), run_dir=config.run_dir, eval_images=evaluation)
    # Composer runs AFTER events from the last algorithm to the first: gradients are mended before they are clipped.
    algorithms = [*_build_all("algorithm", config.algorithms, context), GlooGradients()]
    arguments.setdefault("save_folder", f"{config.run_dir}/checkpoints")
    arguments.setdefault("autoresume", arguments["save_folder"] is not None)
    arguments.setdefault("save_overwrite", True)  # a killed run may leave a file that is newer than its last whole one
    arguments.setdefault("progress_bar", sys.stderr.isatty())
    loggers = dict(config.loggers)
    if not arguments["progress_bar"]:
        loggers.setdefault("console", {})
    arguments.setdefault("auto_log_hparams", False)
    passed = dict(
        model=model,
        train_dataloader=loader,
        eval_dataloader=_evaluators(config, evaluation, algorithms),
        optimizers=optimizer,
        schedulers=_schedule(config, optimizer, len(loader)),
        step_schedulers_every_batch=True,
        algorithms=algorithms,
        algorithm_passes=[adversarial_last],
        callbacks=[BeginStep(config.seed), *_build_all("callback", config.callbacks, context)],
        loggers=_build_all("logger", loggers, context),
        parallelism_config=_parallelism(config),
        seed=config.seed,
        run_name=config.run_name,
    )
    try:
        return Trainer(**passed, **arguments)
    except (ValueError, OSError) as error:
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise UserError(
            f"the checkpoints of {config.run_name!r} are of another model; give another run_name and run_dir"
        ) from error


def _precision(wanted: str | None, device: str | None) -> str:
    on_gpu = torch.cuda.is_available() if device is None else device == "gpu"
    if wanted is None:
        return "amp_bf16" if on_gpu else "fp32"
    if not on_gpu and wanted != "fp32":
        if rank() == 0:
            log.warning("trainer.precision: %s needs a GPU; on this CPU the run uses fp32", wanted)
        return "fp32"
    return wanted


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _open(path: str, cache: str, where: str, **arguments: Any) -> ImageDataset:
    try:
        return open_dataset(path, cache, **arguments)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}.path: cannot open {path!r}: {reason}") from error


def _train_loader(config: Config) -> Any:
    data, source, batch_size = config.data, config.data.train, config.data.batch_size // world_size()
    dataset = _open(
        source.path,
        source.cache or f"{config.run_dir}/cache/train",
        "data.train",
        transform=train_transform(data.image_size, source.resize, source.flip),
        seed=config.seed,
        shuffle=source.shuffle,
        batch_size=batch_size,
        num_canonical_nodes=data.num_canonical_nodes,
        **data.streaming,
    )
    loader = train_loader(dataset, batch_size, data.workers, data.prefetch)
    if len(loader) == 0:
        raise UserError(f"data.train.path: {dataset.size} images are fewer than one batch of {data.batch_size}")
    return loader


def _open_eval(config: Config) -> ImageDataset | None:
    source = config.data.eval
    if source is None:
        return None
    cache = source.cache or f"{config.run_dir}/cache/eval"
    transform = eval_transform(config.data.image_size)
    return _open(source.path, cache, "data.eval", transform=transform, seed=config.seed, **config.data.streaming)


def _build_all(kind: str, entries: dict[str, Any], context: dict[str, Any]) -> list[Any]:
    return [build(kind, {name: arguments}, f"{kind}s", **context) for name, arguments in entries.items()]


def _evaluators(config: Config, images: ImageDataset | None, algorithms: Iterable[Any]) -> list[Evaluator] | None:
    if images is None or not config.metrics:
        return None
    data, source = config.data, config.data.eval
    assert source is not None
    labels = ["eval"]
    if any(getattr(algorithm, "evaluate", None) == "both" for algorithm in algorithms):
        labels.append("eval" + LIVE_SUFFIX)
    batch_size = (data.eval_batch_size or data.batch_size) // world_size()
    return [
        Evaluator(
            label=label,
            dataloader=eval_loader(images, batch_size, data.workers, data.prefetch, source.limit, rank(), world_size()),
            metric_names=list(config.metrics),
        )
        for label in labels
    ]


def _schedule(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    if config.schedule is None:
        return None
    base_lr = optimizer.param_groups[0]["lr"]
    schedule = build("schedule", config.schedule, "schedule", base_lr=base_lr, steps_per_epoch=steps_per_epoch)
    return schedule if isinstance(schedule, ComposerScheduler) else LambdaLR(optimizer, schedule)


def _parallelism(config: Config) -> ParallelismConfig | None:
    if config.parallelism == "ddp" or world_size() == 1:  # one rank has nothing to share
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FSDP2's notice that it is experimental
        return ParallelismConfig(fsdp=FSDP2Config(**{"state_dict_type": "full", **config.fsdp}))


def train(config: Config) -> Trainer:
    """Check, build, fit, evaluate; write the final metrics to ``<run_dir>/metrics.json``."""
    check(config)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    trainer = build_trainer(config)
    if _finished(config, trainer.state):
        duration = trainer.state.max_duration
        log.warning("%s is finished (%s); a longer trainer.max_duration goes on", config.run_name, duration)
    else:
        trainer.fit()
        _save_final_metrics(config, trainer)
    trainer.close()
    return trainer


def _finished(config: Config, state: State) -> bool:
    last = state.max_duration
    if last is None or state.timestamp >= last:
        return True
    # A checkpoint of an epoch's last step precedes the epoch's end, and the evaluation there.
    steps = last.value * int(state.dataloader_len or 0) if last.unit == TimeUnit.EPOCH else None
    done = [steps is not None and int(state.timestamp.batch) >= steps and _evaluated(config, state)]
    dist.broadcast_object_list(done, src=0)  # the metrics are on rank 0's disk
    return done[0]


def _evaluated(config: Config, state: State) -> bool:
    path = Path(config.run_dir, "metrics.json")
    return not state.evaluators or (path.exists() and json.loads(path.read_text())["batch"] >= state.timestamp.batch)


def _save_final_metrics(config: Config, trainer: Trainer) -> None:
    final = {  # each metric keeps the value of the last evaluation
        label: {name: float(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in trainer.state.eval_metrics.items()
        if all(metric.update_called for metric in metrics.values())
    }
    if rank() == 0 and final:
        record = {"batch": int(trainer.state.timestamp.batch), **final}
        Path(config.run_dir, "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
