"""The parts of a run, and Composer's Trainer of them."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.devices import Device
from composer.optim import ComposerScheduler
from composer.utils import dist, get_device, reproducibility
from torch.optim.lr_scheduler import LambdaLR

from rae.algorithms.adversarial import Adversarial, adversarial_last
from rae.algorithms.base import keep_settings
from rae.callbacks.begin_step import BeginStep
from rae.callbacks.checkpointer import Checkpointer
from rae.callbacks.guard import Guard
from rae.callbacks.progress import Progress
from rae.callbacks.step_figures import StepFigures
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.loading import save_config
from rae.config.sections import Config, Model
from rae.data.loaders import Ledger
from rae.evaluation.metrics import PerImage, build_metrics, verdict, within
from rae.model import RunModel
from rae.survival.checkpoints import RECORD
from rae.survival.processes import rank
from rae.training.beginning import autoencoder_here, begin, freeze
from rae.training.compilation import check_compiler, compile_networks
from rae.training.data import build_train_loader, evaluators, fit_data, open_eval, record_of, refer_all
from rae.training.loading import Start, explained, find_start, go_on, loading
from rae.training.parallelism import average_gradients, parallelism
from rae.training.saving import build_checkpointer

log = logging.getLogger(__name__)


def build_model(config: Config) -> Any:
    """The model that the configuration describes, for Composer: a :class:`rae.model.RunModel`."""
    settings = config.model
    entry = {"autoencoder": dict(settings)} if isinstance(settings, Model) else settings
    model = build("model", entry, "model", image_size=config.data.image_size)
    if not isinstance(model, RunModel):
        raise UserError(f"model.{next(iter(entry))}: it makes a {type(model).__name__}, which is no rae.RunModel")
    freeze(model, config.freeze)
    model.eval_metrics = build_metrics(config.metrics, config.data.image_size)
    for name, metric in model.eval_metrics.items():
        if isinstance(metric, PerImage) and not model.reconstructs:
            raise UserError(f"metrics.{name}: it compares images with reconstructions, and a generator makes none")
    return model


def build_trainer(config: Config) -> Trainer:
    """A Trainer ready to fit, at the run's newest checkpoint if it has one.

    Raises:
        UserError: something that :func:`rae.training.checks.check` could not see: weights, shapes, too little data, a
            bucket.
    """
    arguments = dict(config.trainer)
    arguments["precision"] = _precision(arguments.get("precision"), arguments.get("device"))
    device = initialize(config)
    check_compiler(config.compile, device.name)
    checkpointer = build_checkpointer(config, arguments)
    start = find_start(config, arguments, checkpointer)
    evaluation = open_eval(config, "data.eval")
    ledger = Ledger(config.data.max_bad_samples, list(config.data.train.streams))
    loader = build_train_loader(config, ledger)
    record = record_of(config, loader)
    model = _model_for(config, device, loader, start)
    optimizer = _optimizer(config, model)
    steps = min(len(loader), max(arguments.get("train_subset_num_batches", -1), 0) or len(loader))  # an epoch's
    schedule = _schedule(config, optimizer, steps)
    figures = StepFigures(ledger)
    sizes = dict(steps_per_epoch=steps, image_size=config.data.image_size)
    watched = dict(eval_images=evaluation, figures=figures, travelling=start.travelling)
    context = dict(**sizes, **watched, run_dir=config.run_dir)
    algorithms = _algorithms(config, model, start, context)
    arguments.setdefault("progress_bar", sys.stderr.isatty())
    loggers = dict(config.loggers)
    if not arguments["progress_bar"]:
        loggers.setdefault("console", {})
    arguments.setdefault("auto_log_hparams", False)
    callbacks = [figures, BeginStep(config.seed), *_build_all("callback", _callbacks(config), context)]
    progress = Progress(config.data.batch_size, arguments.get("eval_interval", "1ep"))
    passed = dict(
        model=model,
        train_dataloader=loader,
        eval_dataloader=evaluators(config, evaluation, algorithms, Ledger(config.data.max_bad_samples)),
        optimizers=optimizer,
        schedulers=schedule,
        step_schedulers_every_batch=True,
        algorithms=algorithms,
        algorithm_passes=[adversarial_last, *(c.without_updates for c in callbacks if isinstance(c, Guard))],
        callbacks=[*callbacks, progress, *([checkpointer] if checkpointer else [])],
        loggers=_build_all("logger", loggers, context),
        parallelism_config=parallelism(config),
        seed=config.seed,
        run_name=config.run_name,
    )
    strict = arguments.pop("load_strict_model_weights", True)
    ignored = arguments.pop("load_ignore_keys", None if strict else [])
    with loading(config, start, ignored, model) as load, explained(start.checkpoint):
        trainer = Trainer(**passed, **arguments, **load)
    go_on(config, trainer, start, schedule, record)
    _note(checkpointer, {**record, "loggers": start.travelling})
    if rank() == 0:
        save_config(config, Path(config.run_dir) / "config.yaml")
    average_gradients(model)
    refer_all(config, trainer)
    return trainer


def _model_for(config: Config, device: Device, loader: Any, start: Start) -> Any:
    """The model on its device, which can be trained on these data."""
    reproducibility.seed_all(config.seed)  # every rank starts from the same weights
    with autoencoder_here(config) as changed:
        model = device.module_to_device(build_model(changed))
    fit_data(model, loader, begins=start.checkpoint is None)
    return model


def _note(checkpointer: Checkpointer | None, record: dict[str, Any]) -> None:
    """Let a record of the run travel with its checkpoints."""
    if checkpointer is not None:
        checkpointer.writer.texts[RECORD] = json.dumps(record, indent=2) + "\n"


def _algorithms(config: Config, model: Any, start: Start, context: dict[str, Any]) -> list[Any]:
    """The configuration's, with the weights to begin with in model and discriminator, and compiled networks."""
    algorithms = _build_all("algorithm", config.algorithms, context)
    if start.beginning is not None:
        begin(config, start.beginning, model, algorithms)
    compile_networks(config.compile, model, algorithms)
    for adversarial in (each for each in algorithms if isinstance(each, Adversarial)):
        model.eval_metrics |= within("discriminator", verdict(adversarial.discriminator))
    return algorithms


def initialize(config: Config) -> Device:
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


def _callbacks(config: Config) -> dict[str, Any]:
    """The configuration's, after those that are on by themselves."""
    return {"guard": {}, **({"referee": {}} if "adversarial" in config.algorithms else {}), **config.callbacks}


def _build_all(kind: str, entries: dict[str, Any], context: dict[str, Any]) -> list[Any]:
    return [build(kind, {name: arguments}, f"{kind}s", **context) for name, arguments in entries.items()]


def _optimizer(config: Config, model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build("optimizer", config.optimizer, "optimizer", params=trained)
    keep_settings(optimizer)
    return optimizer


def _schedule(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    if config.schedule is None:
        return None
    base_lr = optimizer.param_groups[0]["lr"]
    schedule = build("schedule", config.schedule, "schedule", base_lr=base_lr, steps_per_epoch=steps_per_epoch)
    return schedule if isinstance(schedule, ComposerScheduler) else LambdaLR(optimizer, schedule)
