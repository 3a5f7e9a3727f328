"""A run's data: what its configuration names, opened, as loaders and evaluators."""

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from composer import Evaluator, Trainer

from rae.algorithms.ema import LIVE_SUFFIX
from rae.config.errors import UserError
from rae.config.registry import find
from rae.config.sections import Config, Data, Model, TrainData
from rae.data.columns import unnumbered
from rae.data.dataset import ImageDataset, content_of, indexed, open_stream
from rae.data.decoding import Transform, eval_transform, flipping, train_transform
from rae.data.loaders import Ledger, eval_loader, train_loader
from rae.data.shards import class_names
from rae.evaluation.frechet import Reference, refer
from rae.model import RunModel
from rae.survival.processes import of_first_rank, opening, rank, world_size
from rae.survival.storage import RemoteFolder

log = logging.getLogger(__name__)


def _open(config: Config, sources: Mapping[str, Any], **arguments: Any) -> ImageDataset:
    """What a configuration has under these keys, as one data set."""
    streams = {}
    for where, source in sources.items():
        cache = source.cache or f"{config.run_dir}/cache/{re.sub(r'data.(train.streams.|evals.)?', '', where, count=1)}"
        weight = source.model_dump(include={"proportion", "repeat", "choose"})
        streams[where] = open_stream(source.path, cache, **weight)
    if rank() == 0:
        for where, stream in streams.items():
            if stream.remote:
                RemoteFolder(stream.remote).check_readable("index.json", f"{where}.path")
    # Pauses between attempts double: minutes without the store, not seconds.
    arguments = {"download_retry": 8, **config.data.streaming, **arguments}
    paths = ", ".join(f"{where}.path {stream.remote or stream.local!r}" for where, stream in streams.items())
    home = Path(config.run_dir).resolve()
    caches = [s.local for s in streams.values() if s.remote and Path(s.local).resolve().is_relative_to(home)]
    with opening([stream.local for stream in streams.values()], f"cannot open {paths}", caches):
        return ImageDataset(streams=list(streams.values()), seed=config.seed, verify=config.data.verify, **arguments)


def build_train_loader(config: Config, ledger: Ledger) -> Any:
    data, source, batch_size = config.data, config.data.train, config.data.batch_size // world_size()
    dataset = _open(
        config,
        data.training,
        transform=_train_transform(source, data),
        shuffle=source.shuffle,
        batch_size=batch_size,
        num_canonical_nodes=data.num_canonical_nodes,
    )
    loader = train_loader(dataset, batch_size, data.workers, data.prefetch, ledger)
    if len(loader) == 0:
        raise UserError(f"data.train: {dataset.size} images are fewer than one batch of {data.batch_size}")
    return loader


def _train_transform(source: TrainData, data: Data) -> Transform:
    if source.crop == "random":
        return train_transform(data.image_size, source.resize, source.flip, data.background)
    centre = eval_transform(data.image_size, data.background)
    return flipping(centre) if source.flip else centre


def name_classes(config: Config) -> None:
    """Tell a model that asks for ``class_names`` what the training data call their labels. A collective call.

    The names become settings of the run: they travel with its checkpoints and exports.
    """
    if isinstance(config.model, Model):
        return
    ((name, arguments),) = config.model.items()
    if "class_names" in inspect.signature(find("model", name, "model")).parameters and "class_names" not in arguments:
        sources = [source.path for source in config.data.training.values()]
        if names := of_first_rank(class_names(sources) if rank() == 0 else None):
            arguments["class_names"] = names


def fit_data(model: RunModel, loader: Any, begins: bool) -> None:
    """Check that a model can be trained on these data, and say how they fit.

    Args:
        begins: whether this is the run's begin, at which a few samples are looked at.

    Raises:
        UserError: it cannot.
    """
    dataset = loader.dataset
    if model.needs_images and any("image" not in shard.roles.values() for shard in dataset.shards):
        raise UserError(
            "data.train: it holds latents without images; convert/latents_to_mds.py stores both --with-images"
        )
    if fault := model.needs_labels and next(
        filter(None, (unnumbered(shard.columns) for shard in dataset.shards)), None
    ):
        raise UserError(f"data.train: {fault}; convert again with them, or set model.diffusion.num_classes: 0")
    if begins:
        batcher, dataset.batcher = dataset.batcher, None  # which belongs to the loader
        said = model.check_data(indexed(dataset))
        dataset.batcher = batcher
        if said and rank() == 0:
            log.warning("%s", said)


_ORDERING = (
    *("shuffle_algo", "shuffle_block_size", "partition_algo", "sampling_method", "sampling_granularity"),
    *("epoch_size", "batching_method"),
)


def record_of(config: Config, loader: Any) -> dict[str, Any]:
    """What a run's training data are, and what their order hangs on: it travels with each checkpoint.

    Returns:
        {images: a hash of their content, order: what a place in an epoch goes by}.
    """
    data = config.data
    order = {
        "seed": config.seed,
        "data.num_canonical_nodes": data.num_canonical_nodes,
        "data.train.shuffle": data.train.shuffle,
        **{f"data.streaming.{key}": value for key, value in data.streaming.items() if key in _ORDERING},
    }
    for where, source in data.training.items():
        for key, value in source.model_dump(include={"proportion", "repeat", "choose"}, exclude_none=True).items():
            order[f"{where}.{key}"] = value
    return {"images": content_of(loader.dataset.shards), "order": order}


def open_eval(config: Config, where: str) -> ImageDataset | None:
    """An evaluation set, if the configuration has one under this key."""
    if where not in config.data.evaluation:
        return None
    transform = eval_transform(config.data.image_size, config.data.background)
    return _open(config, {where: config.data.evaluation[where]}, transform=transform)


def evaluators(
    config: Config, images: ImageDataset | None, algorithms: Iterable[Any], ledger: Ledger
) -> list[Evaluator] | None:
    data = config.data
    if images is None or not config.metrics:
        return None
    live = any(getattr(algorithm, "evaluate", None) == "both" for algorithm in algorithms)
    batch_size = (data.eval_batch_size or data.batch_size) // world_size()
    shared = (batch_size, data.workers, data.prefetch)
    evaluators = []
    for where, each in data.evaluation.items():
        opened = images if where == "data.eval" else open_eval(config, where)
        assert opened is not None
        name = where.rpartition(".")[2]
        passes = {name: 0.0, **({name + LIVE_SUFFIX: 0.0} if live else {})}  # label -> noise level
        passes |= {f"{name}_tau{noise_tau:g}": noise_tau for noise_tau in each.noise_taus}
        evaluators += [
            Evaluator(
                label=label,
                dataloader=eval_loader(opened, *shared, each.limit, rank(), world_size(), ledger, noise_tau),
                # Composer takes them for patterns, to be found anywhere in a name.
                metric_names=[rf"\b{metric}\b" for metric in each.metrics or [*config.metrics, "discriminator"]],
            )
            for label, noise_tau in passes.items()
        ]
    return evaluators


def refer_all(config: Config, trainer: Trainer) -> None:
    """The originals' moments are computed once for all evaluations, unless these see a part of the images only."""
    if config.trainer.get("eval_subset_num_batches", -1) != -1:
        return
    known: dict[str, Reference] = {}
    device = next(trainer.state.model.parameters()).device.type
    for evaluator in trainer.state.evaluators:
        images: Any = evaluator.dataloader.dataloader.dataset  # type: ignore[union-attr]
        stream = images.dataset.streams[0]
        metrics = trainer.state.eval_metrics[evaluator.label].values()
        refer(metrics, images, stream.remote or stream.local, config.data.image_size, device, known)
