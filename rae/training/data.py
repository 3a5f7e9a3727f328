"""A run's data: what its configuration names, opened, as loaders and evaluators."""

from collections.abc import Iterable
from typing import Any

from composer import Evaluator, Trainer

from rae.algorithms.ema import LIVE_SUFFIX
from rae.config.errors import UserError
from rae.config.sections import Config, EvalData
from rae.data.dataset import ImageDataset, open_stream
from rae.data.decoding import eval_transform, train_transform
from rae.data.loaders import Ledger, eval_loader, train_loader
from rae.data.reader import ImageStream
from rae.evaluation.frechet import Reference, refer
from rae.survival.processes import opening, rank, world_size
from rae.survival.storage import RemoteFolder


def _open(streams: dict[str, ImageStream], **arguments: Any) -> ImageDataset:
    if rank() == 0:
        for where, stream in streams.items():
            if stream.remote:
                RemoteFolder(stream.remote).check_readable("index.json", f"{where}.path")
    arguments.setdefault("download_retry", 8)  # pauses double: minutes without the store, not seconds
    paths = ", ".join(f"{where}.path {stream.remote or stream.local!r}" for where, stream in streams.items())
    with opening([stream.local for stream in streams.values()], f"cannot open {paths}"):
        return ImageDataset(streams=list(streams.values()), **arguments)


def build_train_loader(config: Config, ledger: Ledger) -> Any:
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


def open_eval(config: Config, source: EvalData | None, name: str) -> ImageDataset | None:
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


def evaluators(
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
        opened = images if name == "eval" else open_eval(config, each, name)
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
