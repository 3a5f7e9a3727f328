"""Models with what is known of them, and their exports: folders with weights and their own configuration.

``config.json`` says how to build the model, ``model.safetensors`` holds what it trained; of an autoencoder that is its
decoder, and the latent statistics. Its frozen encoder is named, by hub id or path, or lies beside them in ``encoder/``.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from torch import Tensor, nn
from yaml import YAMLError

from rae.autoencoder.backbones import check_tensors, read_state_dict, save_state_dict
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.model import build_rae
from rae.autoencoder.rae import RAE
from rae.config.arguments import build, check_plugin
from rae.config.errors import UserError
from rae.config.loading import override, validated
from rae.config.registry import find, import_plugins, plugins
from rae.config.sections import AnyModel, Config, DecoderSizes, Model, Section
from rae.data.pixels import Background
from rae.diffusion.generator import Generator
from rae.exchange.places import AUTOENCODER, CONFIG, ENCODER, WEIGHTS, local_folder, read_json


class Exported(Section):
    """What an export's ``config.json`` holds."""

    format: Literal["rae"] = "rae"
    version: Literal[1] = 1
    name: str
    image_size: int
    model: AnyModel
    imports: list[str] = Field(default_factory=list)
    """The plugin files or modules that building it needs; see :func:`load`."""
    weights: Literal["ema", "live", "given"] = "given"
    """Which weights of a run they are; ``given`` came from elsewhere."""
    trained: dict[str, Any] = Field(default_factory=dict)
    """How far the run was: epoch and batch."""
    figures: dict[str, Any] = Field(default_factory=dict)
    """Its last evaluation, if it was of these weights."""


@dataclass
class Source:
    """A model to work with, and what is known of it.

    Args:
        network: its plain module, in eval mode, on the device.
        image_size: side of the image that it makes.
        name: short, for tables, captions and file names.
        weights: which these are: ``ema``, ``live``, or ``given`` where there was no choice and no telling.
        model: its settings, as in a configuration's ``model``.
        config: of the run that made it, if that is known.
        imports: the user's plugin files or modules that it needs.
        trained: how far the run was, ``epoch`` and ``batch``.
        figures: the run's last evaluation, if it was of this moment and these weights: by data set and metric.
        discriminator: the discriminator's trained weights, if there are any.
        inside: of a generator's export that holds its autoencoder, what that says of itself.
    """

    network: nn.Module
    image_size: int
    name: str
    weights: str
    model: Model | dict[str, Any]
    config: Config | None = None
    imports: list[str] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Tensor] | None = None
    inside: Exported | None = None

    @property
    def background(self) -> Background:
        """What its run saw where images were transparent."""
        return self.config.data.background if self.config else "black"

    @property
    def rae(self) -> RAE:
        """The autoencoder.

        Raises:
            UserError: it is another kind of model.
        """
        if isinstance(self.network, RAE):
            return self.network
        raise UserError(f"{self.name}: its model is no autoencoder, but a {type(self.network).__name__}")

    @property
    def generator(self) -> Generator:
        """The generator.

        Raises:
            UserError: it is another kind of model.
        """
        if isinstance(self.network, Generator):
            return self.network
        kind = "an autoencoder" if isinstance(self.network, RAE) else f"a {type(self.network).__name__}"
        raise UserError(f"{self.name}: its model is no generator, but {kind}")

    def run_model(self) -> Any:
        """The :class:`rae.model.RunModel` of these settings and weights, in eval mode, of another kind of model."""
        model = build("model", self.model, "model", image_size=self.image_size)
        model.network.load_state_dict(self.network.state_dict())
        return model.eval()

    def about(self) -> Exported:
        """What an export of it says of it."""
        told = {key: getattr(self, key) for key in Exported.model_fields if hasattr(self, key)}
        return Exported(**told)


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    overrides: Iterable[str] = (),
    revision: str | None = None,
    imports: bool = False,
) -> Any:
    """An exported model, in eval mode: an :class:`rae.autoencoder.rae.RAE`, or what another kind of model exports.

    Args:
        folder: a local folder, ``s3://…``, or a repository on the Hugging Face hub.
        overrides: ``model.encoder.dinov2.pretrained=PATH`` and the like, over what the export says.
        revision: of a hub's repository.
        imports: import the modules that the export names for an encoder, or a kind of model, that is not registered
            yet. They are code of this machine that whoever made the export chooses.

    Raises:
        UserError: it is no export, its encoder cannot be had, or a tensor is missing, unexpected or of another shape.
    """
    with TemporaryDirectory(prefix="rae-") as scratch:
        local = local_folder(str(folder), Path(scratch), revision)
        exported = read_exported(local, str(folder), overrides)
        import_needed(exported, str(folder), imports)
        network = build_exported(local, exported, str(folder))
    return network.to(device)


def read_exported(local: Path, name: str, overrides: Iterable[str] = ()) -> Exported:
    """The checked ``config.json`` of an export.

    Args:
        name: what to call it in messages.

    Raises:
        UserError: it is missing, damaged or another program's.
    """
    if not (local / CONFIG).exists() and any((local / each).exists() for each in ("config.yaml", "checkpoints")):
        raise UserError(f"{name} is a run, not an export; make one of it: python -m rae export {name} OUT")
    content = read_json(local / CONFIG, f"{name}/{CONFIG}")
    if content.get("format") != "rae":
        raise UserError(f"{name}/{CONFIG} is not an export's; python -m rae inspect {name} tells what the folder holds")
    loaded = OmegaConf.create(content)
    try:
        override(loaded, overrides)
        plain = OmegaConf.to_container(loaded, resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{name}/{CONFIG}, overridden: {' '.join(str(error).split())}") from error
    return validated(Exported, plain, f"{name}/{CONFIG}")


def import_needed(exported: Exported, name: str, imports: bool) -> None:
    """Import what an export's encoder, or its kind of model, needs, where it is not registered yet.

    Args:
        name: what to call the export in messages.
        imports: whether the user has said so.

    Raises:
        UserError: it needs something, and the user has not; or that cannot be imported.
    """
    kind, entry = (
        ("encoder", exported.model.encoder) if isinstance(exported.model, Model) else ("model", exported.model)
    )
    unknown = set([entry] if isinstance(entry, str) else entry) - plugins(kind).keys()
    if not unknown or not exported.imports:
        return
    if not imports:
        raise UserError(
            f"{name}: its {kind} {unknown.pop()!r} needs {', '.join(map(repr, exported.imports))} of this machine; "
            "if that is what you want to run, say --imports, or rae.load(…, imports=True)"
        )
    import_plugins(exported.imports)


def build_exported(local: Path, exported: Exported, name: str) -> nn.Module:
    """The model of an export on this disk, whose plugins are registered; see :func:`load`."""
    settings = exported.model
    if isinstance(settings, Model):
        settings = settings.model_copy(update={"encoder": _encoder_here(local, settings.encoder)})
    elif includes_autoencoder(settings):
        settings = with_autoencoder(settings, str(local / AUTOENCODER))
    network = build_network(settings, exported.image_size)
    load_weights(network, read_state_dict(local / WEIGHTS), f"{name}/{WEIGHTS}")
    return network.eval()


def build_network(settings: Model | dict[str, Any], image_size: int) -> nn.Module:
    """The plain module that a configuration's ``model`` describes: what is evaluated, and exported.

    Raises:
        UserError: weights that cannot be had, or sizes that do not fit.
    """
    if isinstance(settings, Model):
        return build_rae(settings, image_size)
    ((name, arguments),) = settings.items()
    left_out = getattr(find("model", name, "model"), "training_only", ())
    plain = {key: value for key, value in arguments.items() if key not in left_out}
    return build("model", {name: plain}, "model", image_size=image_size).network


def _encoder_here(local: Path, entry: Any) -> Any:
    """An encoder's settings, in which a path inside the export is where that lies now."""
    ((kind, arguments),) = check_plugin("encoder", entry, "model.encoder").items()
    key = _weights_argument(kind)
    path = arguments.get(key)
    if isinstance(path, str) and path.split("/")[0] == ENCODER and (local / path).exists():
        return {kind: {**arguments, key: str(local / path)}}
    return entry


def includes_encoder(model: Model | dict[str, Any]) -> bool:
    """Whether an export's encoder lies in it; that one's plugin need not be registered."""
    if not isinstance(model, Model):
        return False
    entries = [] if isinstance(model.encoder, str) else model.encoder.values()
    values = [value for arguments in entries if isinstance(arguments, dict) for value in arguments.values()]
    return any(isinstance(value, str) and value.split("/")[0] == ENCODER for value in values)


def includes_autoencoder(model: Model | dict[str, Any]) -> bool:
    """Whether a generator's autoencoder lies in its export."""
    return not isinstance(model, Model) and model.get("diffusion", {}).get("autoencoder") == AUTOENCODER


def with_autoencoder(model: dict[str, Any], autoencoder: str) -> dict[str, Any]:
    """A generator's settings that name another place of its autoencoder."""
    return {"diffusion": {**model["diffusion"], "autoencoder": autoencoder, "checked": False}}


def encoder_path(model: Model | dict[str, Any]) -> str | None:
    """The path of this machine, outside the export, by which its encoder is named, if it is by one."""
    if not isinstance(model, Model) or includes_encoder(model):
        return None
    ((kind, arguments),) = check_plugin("encoder", model.encoder, "model.encoder").items()
    weights = arguments.get(_weights_argument(kind)) or ""
    return weights if weights and Path(weights).expanduser().exists() else None


def _weights_argument(encoder: str) -> str:
    return getattr(find("encoder", encoder, "model.encoder"), "weights_argument", "")


def load_weights(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a model's weights, of an autoencoder with its latent statistics if there are any: with equal shapes, all.

    Args:
        state: the tensors under the names of ``network.state_dict()``.
        where: what to call them in messages.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    if isinstance(network, RAE):
        for name in ("latent_mean", "latent_var"):
            setattr(network, name, torch.empty(network.latent_shape) if name in state else None)
    check_tensors(state, network.state_dict(), where)
    network.load_state_dict(state)


def write(network: nn.Module, about: Exported, folder: Path, with_encoder: bool = False) -> Exported:
    """Write a model's weights and configuration into an existing folder.

    Args:
        about: what is known of it.
        with_encoder: put the frozen encoder's weights into the folder instead of naming it.

    Returns:
        what ``config.json`` says.

    Raises:
        UserError: the encoder is a plugin that cannot save its weights.
    """
    if isinstance(network, RAE) and isinstance(about.model, Model):
        about = about.model_copy(update={"model": _portable(network, about.model, folder if with_encoder else None)})
        if type(network.encoder.network).__module__.startswith("rae."):
            about.imports = []  # they may be gone; what needs them is not exported
    elif isinstance(network, Generator) and isinstance(about.model, dict) and not includes_autoencoder(about.model):
        place = about.model["diffusion"]["autoencoder"]
        if isinstance(place, str) and Path(place).expanduser().exists():
            settings = with_autoencoder(about.model, str(Path(place).expanduser().resolve()))
            about = about.model_copy(update={"model": settings})
    save_state_dict(network.state_dict(), folder / WEIGHTS)
    write_json(folder / CONFIG, about.model_dump())
    return about


def _portable(rae: RAE, model: Model, folder: Path | None) -> Model:
    """An autoencoder's settings without what is now among its weights, and without what only training needs."""
    encoder = _encoder_entry(rae.encoder.network, model.encoder, folder)  # type: ignore[arg-type]
    decoder = model.decoder.model_copy(update={"weights": None, "activation_checkpointing": False})
    return model.model_copy(
        update={"encoder": encoder, "decoder": decoder, "latent_stats": None, "pixel_loss": "l1"},
    )


def _encoder_entry(encoder: Encoder, entry: Any, folder: Path | None) -> dict[str, Any]:
    """An encoder's settings, naming its weights by an absolute path, a hub id, or inside ``folder``."""
    ((kind, arguments),) = check_plugin("encoder", entry, "model.encoder").items()
    key = encoder.weights_argument
    if folder is not None:
        if not key:
            raise UserError(f"the encoder {kind!r} is a plugin that cannot save its weights; export without them")
        (folder / ENCODER).mkdir()
        return {kind: {**arguments, key: str(Path(ENCODER, encoder.save_weights(folder / ENCODER)))}}
    if isinstance(arguments.get(key), str) and Path(arguments[key]).expanduser().exists():
        arguments[key] = str(Path(arguments[key]).expanduser().resolve())
    return {kind: arguments}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def figure_text(value: Any) -> str:
    """A figure for reading; JSON has null where it is not finite."""
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite" if value is None else str(value)


def decoder_sizes(decoder: Decoder) -> DecoderSizes:
    """The explicit sizes of a decoder."""
    first: Any = decoder.blocks[0]
    return DecoderSizes(
        patch_size=decoder.patch_size,
        embed_dim=decoder.embed.out_features,
        depth=len(decoder.blocks),
        num_heads=first.attn.num_heads,
        mlp_dim=first.mlp.fc1.out_features,
        trainable_positions=isinstance(decoder.positions, torch.nn.Parameter),
    )
