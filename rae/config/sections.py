"""Every key of a run's configuration, with its type and default."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rae.config.errors import UserError

PositiveInt = Annotated[int, Field(gt=0)]
Plugin = dict[str, Any] | str
"""One plugin: ``{name: {argument: value}}``, or its name alone."""


def _that_are_on(value: Any) -> Any:
    """Null stands for none of them, and for an entry that is off."""
    return {k: v for k, v in (value or {}).items() if v is not None} if isinstance(value, dict | None) else value


Plugins = Annotated[dict[str, dict[str, Any]], BeforeValidator(_that_are_on)]
"""Several, in order; ``name: {}`` takes all defaults, and ``name: null`` is off."""


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
    crop: Literal["random", "center"] = "random"
    """``center`` crops as evaluation does (ADM): what generators are trained on."""
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
    background: Literal["black", "white", "drop"] = "black"
    """What is seen where an image is transparent; ``drop`` shows its colours as if they were opaque."""
    max_bad_samples: Annotated[int, Field(ge=0)] = 0
    """Samples that do not decode to tolerate: the next one takes the place of each, and they are counted and logged."""
    streaming: dict[str, Any] = {}
    """Further arguments of streaming.StreamingDataset (cache_limit, predownload, download_timeout, …)."""

    @property
    def training(self) -> dict[str, Any]:
        """What is trained on (:class:`TrainData` or :class:`StreamData`), by key."""
        whole = {"data.train": self.train} if self.train.path else {}
        return {**whole, **{f"data.train.streams.{name}": stream for name, stream in self.train.streams.items()}}

    @property
    def evaluation(self) -> dict[str, EvalData]:
        """What is evaluated on, by key."""
        first = {"data.eval": self.eval} if self.eval is not None else {}
        return first | {f"data.evals.{name}": each for name, each in self.evals.items()}


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
    output: Literal["normalized", "image"] = "normalized"
    """What the decoder makes: an image as the encoder normalises it, which is undone after it (RAE); or the image in
    [0, 1] itself (RAEv2)."""
    pixel_loss: Plugin = "l1"


def _settings(value: Any) -> Any:
    """An autoencoder's, checked; of another kind of model ``{name: arguments}``, to be checked with its plugin."""
    value = {value: None} if isinstance(value, str) else value
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, arguments),) = value.items()
        if name not in Model.model_fields:
            if not isinstance(arguments or {}, Mapping):
                raise ValueError(f"arguments of {name!r} are written as {{argument: value}}, not {arguments!r}")
            if name != "autoencoder":
                return {name: arguments or {}}
            value = arguments or {}
    return Model.model_validate(value)


AnyModel = Annotated[Model | dict[str, dict[str, Any]], BeforeValidator(_settings)]
"""An autoencoder's settings, or ``{name: {argument: value}}`` of a model plugin of another kind."""


class Repa(Section):
    """See :class:`rae.diffusion.alignment.Alignment`."""

    encoder: Plugin
    block: PositiveInt = 8
    """Counted from 1."""
    weight: Annotated[float, Field(gt=0)] = 0.5


class BeginFrom(Section):
    """Whose weights a run begins with: everything else, its step and its moments too, is new."""

    source: str
    """A run, a checkpoint, an export of any format, a published decoder, a training checkpoint of the public code;
    local, in a bucket or on the hub."""
    weights: Literal["ema", "live"] = "ema"
    """Of a run, its average where there is one, or those that were trained."""
    discriminator: Literal["new", "kept"] = "new"
    """Whether the source's discriminator is trained on."""


def _beginning(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


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

    def chooses(self, network: str) -> bool:
        """Whether a network is chosen; one of another kind of model, which has no key here, if all that have are."""
        return network in self.networks() or (network not in _COMPILED and len(self.networks()) == len(_COMPILED))


_COMPILED = ("encoder", "decoder", "perceptual", "discriminator")


class Config(Section):
    """The whole run."""

    run_name: str
    run_dir: str
    """Local folder for the resolved configuration, metrics, pictures and, by default, checkpoints."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    imports: list[str] = []
    """Your own plugin files (or modules)."""
    data: Data
    model: AnyModel
    begin_from: Annotated[BeginFrom | None, BeforeValidator(_beginning)] = None
    """What to train on from, fine-tuning it: a source, or {source: …, weights: live, discriminator: kept}."""
    freeze: list[str] = []
    """Parts of what the model trains that are not to be trained: names such as decoder.embed, decoder.blocks.0."""
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
    def autoencoder(self) -> Model:
        """The settings of the autoencoder that the run trains.

        Raises:
            UserError: it trains another kind of model.
        """
        if isinstance(self.model, Model):
            return self.model
        raise UserError(f"{self.run_name}: its model is no autoencoder, but {next(iter(self.model))!r}")

    @property
    def save_folder(self) -> str | None:
        """Where the run's checkpoints go: local, a URL, or None."""
        folder = self.trainer.get("save_folder", f"{self.run_dir}/checkpoints")
        return folder and folder.replace("{run_name}", self.run_name)
