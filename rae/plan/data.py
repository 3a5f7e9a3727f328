"""What of the data can be known before a run: images, shards and bytes, from the index alone."""

from dataclasses import dataclass

from rae.config.errors import UserError
from rae.config.sections import Config
from rae.data.shards import INDEX, read_index
from rae.survival.storage import is_remote


@dataclass
class DataSet:
    """One data set, as its index describes it.

    Args:
        name: the configuration's key.
        images, shards, bytes: None when unknown.
        latent: whether its samples hold latents.
        fault: why nothing is known.
    """

    name: str
    path: str
    images: int | None = None
    shards: int | None = None
    bytes: int | None = None
    latent: bool = False
    fault: str = ""


def survey(config: Config) -> list[DataSet]:
    """All data sets of a configuration, those for training first. A store that does not answer is asked once."""
    silent: dict[str, str] = {}
    found = []
    for name, source in {**config.data.training, **config.data.evaluation}.items():
        path = source.path
        store = "/".join(path.split("/")[:3]) if is_remote(path) else path
        each = DataSet(name, path, fault=silent[store]) if store in silent else _look(name, path)
        if each.fault and is_remote(path):
            silent[store] = each.fault
        found.append(each)
    return found


def _look(name: str, path: str) -> DataSet:
    try:
        shards = read_index(path)["shards"]
    except UserError as error:
        return DataSet(name, path, fault=str(error).replace(f"{path.rstrip('/')}/{INDEX}", INDEX))
    return DataSet(
        name,
        path,
        images=sum(shard["samples"] for shard in shards),
        shards=len(shards),
        bytes=sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards),
        latent=bool(shards) and "latent" in shards[0].get("column_names", ()),
    )


def epoch_images(config: Config, found: list[DataSet]) -> int | None:
    """Images of an epoch, with the streams' weights; None when unknown."""
    sizes = {each.name: each.images for each in found if each.name.startswith("data.train")}
    if not config.data.train.streams:
        return sizes.get("data.train")
    total = 0.0
    for name, stream in config.data.train.streams.items():
        size = sizes[f"data.train.streams.{name}"]
        if stream.choose is None and size is None:
            return None
        total += stream.choose or (size or 0) * (stream.repeat or 1)
    return int(total)
