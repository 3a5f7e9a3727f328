"""A run's configuration: YAML and overrides, checked before anything heavy is imported or built."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from rae.config.registry import UserError, explain

PositiveInt = Annotated[int, Field(gt=0)]
Plugin = dict[str, Any] | str
"""One plugin: ``{name: {argument: value}}``, or its name alone."""
Plugins = Annotated[dict[str, dict[str, Any] | None], BeforeValidator(lambda value: {} if value is None else value)]
"""Several, in order."""


class Section(BaseModel):
    """A part of the configuration; keys that it does not name are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)


class StreamData(Section):
    """One of several data sets that are mixed; at most one of proportion, repeat and choose."""

    path: str
    cache: str | None = None
    """Local folder for shards of a remote path; by default ``<run_dir>/cache/<name>``."""
    proportion: Annotated[float, Field(gt=0)] | None = None
    """This stream's part of an epoch, relative to the others' proportions; if one stream has it, all have."""
    repeat: Annotated[float, Field(gt=0)] | None = None
    """How often an epoch goes through it; 0.5 takes half of it."""
    choose: PositiveInt | None = None
    """How many of its samples an epoch takes."""


class TrainData(Section):
    """Where training images come from, and how they are augmented: ``path``, or several ``streams``."""

    path: str | None = None
    """MDS shards: a local folder, or ``s3://``, ``gs://``, ``oci://``, ``azure://``."""
    streams: dict[str, StreamData] = {}
    """Several data sets by name, mixed: ``imagenet: {path: …, proportion: 0.8}``."""
    cache: str | None = None
    """Local folder for shards of a remote path; by default ``<run_dir>/cache/train``."""
    shuffle: bool = True
    flip: bool = False
    """Random horizontal flips (the published recipe has none)."""
    resize: PositiveInt | None = None
    """Short side before the random crop; by default int(1.5 · image_size)."""


class EvalData(Section):
    """Where evaluation images come from."""

    path: str
    cache: str | None = None
    limit: PositiveInt | None = None
    """Use the first so many images only."""
    metrics: list[str] | None = None
    """Names out of the configuration's metrics, and ``discriminator`` where there is one; by default all of them."""
    noise_taus: list[Annotated[float, Field(gt=0)]] = []
    """Evaluate reconstructions of latents with noise of these levels too; figures are ``metrics/<name>_tau0.8/…``."""


class Data(Section):
    """Streams and batches."""

    image_size: PositiveInt = 256
    batch_size: PositiveInt = 512
    """Over all ranks and microbatches."""
    eval_batch_size: PositiveInt | None = None
    """Over all ranks; by default as batch_size."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Loader processes a rank."""
    prefetch: PositiveInt = 2
    """Batches that each worker keeps ready."""
    num_canonical_nodes: PositiveInt = 1
    """Fixes the sample order for every number of ranks. Set it to the number of nodes, or a multiple, on a cluster,
    so that each node downloads its own part."""
    train: TrainData
    eval: EvalData | None = None
    evals: dict[str, EvalData] = {}
    """Further evaluation sets by name; their figures are ``metrics/<name>/…``."""
    verify: bool = True
    """Compare shards with their hashes when they are downloaded and when they are first read."""
    max_bad_samples: Annotated[int, Field(ge=0)] = 0
    """Samples that do not decode to tolerate: the next one takes the place of each, and they are counted and logged."""
    streaming: dict[str, Any] = {}
    """Further arguments of streaming.StreamingDataset (cache_limit, predownload, download_timeout, …)."""


class DecoderSizes(Section):
    """See :class:`rae.autoencoder.decoder.Decoder`."""

    size: Literal["ViTB", "ViTL", "ViTXL"] | None = None
    patch_size: PositiveInt = 16
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_dim: PositiveInt | None = None
    trainable_positions: bool = False
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    weights: str | None = None
    """A published decoder file to start from."""


class Model(Section):
    """The autoencoder."""

    encoder: Plugin
    decoder: DecoderSizes
    noise_tau: Annotated[float, Field(ge=0)] = 0.8
    noise: Literal["uniform", "half_normal"] = "uniform"
    latent_stats: str | None = None
    pixel_loss: Plugin = "l1"


class Checkpoints(Section):
    """How checkpoints are treated; where and when they are saved is among the trainer's arguments."""

    damaged: Literal["older", "stop"] = "older"
    """What to do when the newest is incomplete or damaged: go on from an older one, or stop."""
    upload_attempts: PositiveInt = 10
    """Attempts to upload a file before the run stops; the pauses between them double from a second on."""


class Compile(Section):
    """Which networks torch.compile makes faster; numbers and checkpoints stay as they are. ``true`` means all."""

    encoder: bool = False
    decoder: bool = False
    perceptual: bool = False
    """The networks of perceptual loss terms."""
    discriminator: bool = False
    backend: str = "inductor"
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """Inductor's; the second tries more kernels, and takes longer to start."""

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return dict.fromkeys(_COMPILED, value) if isinstance(value, bool) else value

    def networks(self) -> list[str]:
        """The chosen ones."""
        return [name for name in _COMPILED if getattr(self, name)]


_COMPILED = ("encoder", "decoder", "perceptual", "discriminator")


class Config(Section):
    """The whole run."""

    run_name: str
    run_dir: str
    """Local folder for the resolved configuration, metrics, pictures and, by default, checkpoints."""
    seed: Annotated[int, Field(ge=0)] = 0
    imports: list[str] = []
    """Your own plugin files (or modules)."""
    data: Data
    model: Model
    optimizer: Plugin = "adamw"
    schedule: Plugin | None = None
    algorithms: Plugins = {}
    callbacks: Plugins = {}
    loggers: Plugins = {}
    metrics: Plugins = {}
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    fsdp: dict[str, Any] = {}
    """Arguments of Composer's FSDP2Config; ``replicas: N`` shards within each of N groups of ranks (hybrid)."""
    compile: Compile = Compile()
    checkpoints: Checkpoints = Checkpoints()
    trainer: dict[str, Any]
    """Arguments of composer.Trainer, as they are; max_duration is required."""

    @property
    def save_folder(self) -> str | None:
        """Where the run's checkpoints go: local, a URL, or None."""
        folder = self.trainer.get("save_folder", f"{self.run_dir}/checkpoints")
        return folder and folder.replace("{run_name}", self.run_name)


def override(loaded: DictConfig, overrides: Iterable[str]) -> None:
    """Set ``key.sub=value`` overrides in a mapping, in place.

    Raises:
        UserError: one of another form.
    """
    for each in overrides:
        if "=" not in each.lstrip("="):
            raise UserError(f"override {each!r} must have the form key=value or key.sub=value")
    for each in overrides:
        # An override sets its key, so that model.encoder={mae: {}} replaces the encoder instead of adding one.
        key = each.split("=", 1)[0]
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([each]), resolve=False)
        for part in key.split("."):
            value = value[part]
        OmegaConf.update(loaded, key, value, merge=False)


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve interpolations, and check every key and type.

    Raises:
        UserError: the file is missing or not YAML; an unknown key, wrong type or missing value.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no configuration file {path!r}")
    try:
        loaded = OmegaConf.load(path)
        if isinstance(loaded, ListConfig):
            raise UserError(f"{path}: a configuration is a mapping of keys, not a list")
        override(loaded, overrides)
        missing = sorted(OmegaConf.missing_keys(loaded))
        if missing:
            raise UserError(f"missing value: {missing[0]} is required; set it in {path} or as {missing[0]}=…")
        plain = OmegaConf.to_container(loaded, resolve=True)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    return validated(Config, plain)


SomeSection = TypeVar("SomeSection", bound=Section)


def validated(section: type[SomeSection], plain: Any, where: str = "") -> SomeSection:
    """A section, or the whole configuration, of plain values whose keys and types are checked.

    Args:
        where: the file, for messages.

    Raises:
        UserError: an unknown key, wrong type or missing value.
    """
    try:
        return section.model_validate(plain)
    except ValidationError as error:
        fault = error.errors()[0]
        known = _known_keys(section, fault["loc"][:-1]) if fault["type"] == "extra_forbidden" else ()
        raise UserError(f"{where}: {explain(error, '', known)}".removeprefix(": ")) from error


def _known_keys(section: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; it can be run again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration to a file; see :func:`to_yaml`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
    except OSError as error:
        raise UserError(f"run_dir: cannot write to {str(path.parent)!r}: {error.strerror}") from error


def world_size() -> int:
    """Ranks of this launch, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's rank, as the launcher says."""
    return int(os.environ.get("RANK", 0))


def is_remote(path: str) -> bool:
    """Whether a path is a URL (``s3://…``) rather than a local one."""
    return "://" in path


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
    training = {"data.train": data.train.path} if data.train.path else {}
    training |= {f"data.train.streams.{name}": stream.path for name, stream in data.train.streams.items()}
    evaluation = {f"data.evals.{name}": source for name, source in data.evals.items()}
    if data.eval is not None:
        evaluation["data.eval"] = data.eval
    for key, source in evaluation.items():
        same = next((name for name, path in training.items() if path == source.path), None)
        if same:
            raise UserError(f"{key}.path: it is {same}.path too; evaluation needs images of its own")
        known = [*config.metrics, *(["discriminator"] if "adversarial" in config.algorithms else [])]
        for metric in source.metrics or ():
            if metric not in known:
                raise UserError(f"{key}.metrics: {metric!r} is not among metrics: {', '.join(known)}")
    for name in data.evals:
        if not name.isidentifier() or name == "eval" or name.endswith("_live"):
            raise UserError(f"data.evals.{name}: give it another name, of letters and digits")
    for key, path in (training | {key: source.path for key, source in evaluation.items()}).items():
        _check_path(key, path)


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
