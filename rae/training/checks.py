"""What of a run can be checked before data or a model is loaded."""

import importlib.util
import json
from pathlib import Path

from streaming import StreamingDataset

from rae.config.arguments import check_arguments, check_plugin
from rae.config.composer import NEEDED
from rae.config.errors import UserError
from rae.config.registry import import_plugins
from rae.config.sections import Config, Model
from rae.data.shards import INDEX
from rae.survival.processes import world_size
from rae.survival.storage import can_delete, is_remote, same_place
from rae.training.parallelism import check_sharding
from rae.training.together import check_together
from rae.training.trainer_keys import check_trainer


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
    if data.train.resize is not None and data.train.crop == "center":
        raise UserError("data.train.resize: it is for random crops; leave it out with crop: center")
    if bool(data.train.path) == bool(data.train.streams):
        raise UserError("data.train: give either path or streams")
    if data.eval is None and (config.metrics or data.evals):
        raise UserError("metrics: there is nothing to evaluate them on; set data.eval.path")
    for key, source in data.evaluation.items():
        same = next((name for name, trained in data.training.items() if _same_data(trained.path, source.path)), None)
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


def _same_data(one: str | None, other: str) -> bool:
    return one is not None and (same_place(one, other) or same_place(f"{one}/{INDEX}", f"{other}/{INDEX}"))


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


_OUR_STREAMING = ("streams", "remote", "local", "batch_size", "shuffle", "shuffle_seed", "num_canonical_nodes")


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
    if config.seed + world_size() > 2**32:
        raise UserError(f"seed: {config.seed} must leave room for a seed of each rank below 2^32")
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
    if config.begin_from is not None and config.trainer.get("load_path"):
        raise UserError("begin_from: trainer.load_path says where to start, too; leave one of them out")
    check_plugin("optimizer", config.optimizer, "optimizer")
    if config.schedule is not None:
        check_plugin("schedule", config.schedule, "schedule")
    for kind in ("algorithm", "callback", "logger", "metric"):
        for name, arguments in getattr(config, f"{kind}s").items():
            check_plugin(kind, {name: arguments}, f"{kind}s")
    check_arguments(StreamingDataset, config.data.streaming, "data.streaming", _OUR_STREAMING)
    for logger in config.loggers.keys() & NEEDED.keys():
        if importlib.util.find_spec(NEEDED[logger]) is None:
            package = NEEDED[logger].replace("_", "-")
            raise UserError(f"loggers.{logger}: it needs a package that is not installed: pip install {package}")
    config.trainer = check_trainer(config.trainer)
    check_together(config)
    _check_saving(config)
    check_sharding(config)


def _check_saving(config: Config) -> None:
    arguments = config.trainer
    folder, keep = arguments.get("save_folder"), arguments.get("save_num_checkpoints_to_keep", -1)
    named = (folder or "").replace("{run_name}", "")
    for key, text in (("run_name", config.run_name), ("run_dir", config.run_dir), ("trainer.save_folder", named)):
        if set("{}") & set(text):
            raise UserError(f"{key}: it must have no braces (but for {{run_name}} in trainer.save_folder)")
    if folder is None:
        if arguments.get("autoresume") and "save_folder" in arguments:
            raise UserError("trainer.autoresume: there is nothing to go on from without trainer.save_folder")
    elif is_remote(folder) and keep != -1 and not can_delete(folder):
        raise UserError(
            f"trainer.save_num_checkpoints_to_keep: objects in {folder} cannot be deleted from here; "
            "leave it out, and let the bucket's own lifecycle rules remove old ones"
        )
