"""Models opened from whatever holds one: runs, checkpoints, configurations, exports; local or in a bucket."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from rae.autoencoder.backbones import check_tensors
from rae.autoencoder.encoders.base import Encoder
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import import_plugins
from rae.config.sections import Config, Model
from rae.exchange import diffusers_format, exports, places, published
from rae.exchange.exports import Exported, Source
from rae.exchange.restoring import FILES, PUBLISHED, explained, of_config, open_checkpoint, open_file, split_path
from rae.survival import checkpoints
from rae.survival.checkpoints import DamagedError, Listed
from rae.survival.storage import is_remote, reason, saying

log = logging.getLogger(__name__)


def open_source(
    source: str,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    overrides: Iterable[str] = (),
    imports: bool = False,
) -> Source:
    """Open an autoencoder.

    Args:
        source: a run's folder, a folder of checkpoints, a checkpoint, a Composer ``.pt`` file with its config.yaml
            beside it, a run's YAML, or an exported or diffusers folder; local or a URL; or an export on the hub.
        weights: ``ema`` (the live ones where there is no average) or ``live``.
        overrides: ``key.sub=value`` over its configuration.
        imports: of an export; see :func:`rae.exchange.exports.load`. A run's own configuration says what is imported.

    Raises:
        UserError: there is no autoencoder in it; what was found, and what would do.
    """
    source, overrides = source.rstrip("/") or source[:1], list(overrides)
    with TemporaryDirectory(prefix="rae-") as scratch:
        opened = Opener(weights, overrides, Path(scratch), imports).open(source)
    opened.network.eval().to(device)
    return opened


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    overrides: Iterable[str] = (),
    revision: str | None = None,
    imports: bool = False,
    weights: str = "ema",
) -> Any:
    """A model in eval mode: an :class:`rae.autoencoder.rae.RAE`, a :class:`rae.diffusion.generator.Generator`, or what
    another kind of model exports.

    Args:
        source, weights: see :func:`open_source`.
        device, overrides, revision, imports: see :func:`rae.exchange.exports.load`; a revision is of an export.

    Raises:
        UserError: see :func:`open_source`.
    """
    if revision is not None:
        return exports.load(source, device, overrides, revision, imports)
    return open_source(str(source), weights, device, overrides, imports).network


def open_discriminator(source: Source, device: str | torch.device = "cpu") -> nn.Module | None:
    """The discriminator of a source's checkpoint, in eval mode: image in [0, 1] -> logits. None if it has none.

    Raises:
        UserError: its frozen features cannot be had, or the weights are of another discriminator.
    """
    if source.discriminator is None or source.config is None:
        return None
    entry = (source.config.algorithms.get("adversarial") or {}).get("discriminator", {"dino": {}})
    discriminator = build("discriminator", entry, "algorithms.adversarial.discriminator")
    check_tensors(source.discriminator, discriminator.state_dict(), f"{source.name}: discriminator")
    discriminator.load_state_dict(source.discriminator)
    return discriminator.eval().to(device)


def open_encoder(
    source: str, overrides: Iterable[str] = (), imports: bool = False
) -> tuple[Encoder, int, Config | None]:
    """The frozen encoder of a source, its image size, and the run's configuration; a run's YAML is enough.

    Args:
        source, overrides, imports: as :func:`open_source`.

    Raises:
        UserError: as :func:`open_source`.
    """
    if source.endswith((".yaml", ".yml")):
        config = load_config(source, overrides)
        import_plugins(config.imports)
        return build("encoder", config.autoencoder.encoder, "model.encoder"), config.data.image_size, config
    opened = open_source(source, overrides=overrides, imports=imports)
    return opened.rae.encoder.network, opened.image_size, opened.config  # type: ignore[return-value]


class Opener:
    """Finds out what a source is, and opens it. Subclasses open it as something else than a :class:`Source`.

    Args:
        weights: ``ema`` or ``live``.
        overrides: over the source's configuration.
        scratch: local folder, for what is downloaded or converted.
        imports: see :func:`open_source`.
    """

    def __init__(self, weights: str, overrides: list[str], scratch: Path, imports: bool = False):
        self.weights, self.overrides, self.scratch, self.imports = weights, overrides, scratch, imports

    def open(self, source: str) -> Any:
        """What a source holds.

        Raises:
            UserError: nothing that can be opened; what was found, and what would do.
        """
        parent, name = split_path(source)
        if source.endswith(FILES):
            if name == checkpoints.STATE and checkpoints.is_name(split_path(parent)[1]):
                return self.open(parent)
            return self.file(source)
        if source.endswith((".yaml", ".yml")):
            return self.yaml(source)
        if places.may_be_on_hub(source):
            return self.export(source)
        names = places.list_names(source)
        if checkpoints.is_name(name):
            listed = [checkpoint for checkpoint in _listed(parent) if checkpoint.name == name]
            return self.newest([(parent, each) for each in listed], source)
        if any(checkpoints.is_name(each.split("/")[0]) for each in names):
            return self.newest([(source, each) for each in _listed(source)], source)
        if places.CONFIG in names:
            return self.export(source)
        if checkpoints.CONFIG in names and not is_remote(source):
            return self.run(source)
        if any(each.split("/")[0] == "checkpoints" for each in names):
            return self.open(f"{source}/checkpoints")
        if published.DECODER in names:
            return self.published(source)
        raise UserError(f"{source}: {_what_it_is(names)}")

    def run(self, source: str) -> Any:
        """A run's folder."""
        config = load_config(f"{source}/{checkpoints.CONFIG}", self.overrides)
        found = checkpoints_of_run(source, config)
        if not found:
            raise UserError(f"{source}: the run has no checkpoint yet")
        return self.newest(found, source)

    def newest(self, found: list[tuple[str, Listed]], source: str) -> Any:
        """The first of these checkpoints that is whole."""
        fault = "there is no complete checkpoint in it"
        for folder, checkpoint in found:
            try:
                local = checkpoints.fetch(folder, checkpoint, self.scratch)
                if (local / checkpoints.SHARDED).is_file():
                    checkpoints.check_metadata(local)
            except DamagedError as error:
                fault = f"checkpoint {folder}/{checkpoint.name} cannot be used: {error}"
                log.warning("%s", fault) if len(found) > 1 else None
                continue
            except Exception as error:
                raise UserError(f"cannot read checkpoint {checkpoint.name} of {folder}: {reason(error)}") from error
            return self.checkpoint(local, f"{folder}/{checkpoint.name}")
        raise UserError(f"{source}: {fault}" if len(found) != 1 else fault)

    def checkpoint(self, local: Path, source: str) -> Any:
        """A checkpoint that is whole, on this disk."""
        return open_checkpoint(local, source, self.weights, self.overrides, self.scratch)

    def file(self, source: str) -> Any:
        """A file of tensors."""
        if not source.endswith(".pt"):
            raise UserError(f"{source}: {PUBLISHED if source.endswith(FILES) else places.WOULD_DO}")
        return open_file(source, self.weights, self.overrides, self.scratch)

    def yaml(self, source: str) -> Any:
        """A run's configuration."""
        config = load_config(source, self.overrides)
        found = checkpoints_of_run(config.run_dir, config)
        if any(checkpoint.parts for _, checkpoint in found):
            return self.newest(found, source)
        if not isinstance(config.model, Model) or config.model.decoder.weights is None:
            instead = ", and no model.decoder.weights to use instead" if isinstance(config.model, Model) else ""
            raise UserError(f"{source}: its run has no checkpoint in {config.run_dir}{instead}")
        import_plugins(config.imports)
        network = explained(source, lambda: exports.build_network(config.model, config.data.image_size))
        return of_config(network, config, "given")

    def export(self, source: str) -> Any:
        """A folder with a config.json, or a repository of the hub."""
        local = places.local_folder(source, self.scratch)
        content = places.read_json(local / places.CONFIG, f"{source}/{places.CONFIG}")
        if "_class_name" in content:
            return self.diffusers(local, source)
        if "decoder_hidden_size" in content:
            return self.published(source)
        about = exports.read_exported(local, source, self.overrides)
        if self.weights == "live" and about.weights == "ema":
            raise UserError(f"{source} holds averaged weights only; export the run again with --weights live")
        return self.exported(local, source, about)

    def exported(self, local: Path, source: str, about: Exported) -> Any:
        """An export of ours, on this disk."""
        exports.import_needed(about, source, self.imports)
        network = explained(source, lambda: exports.build_exported(local, about, source))
        known = {key: getattr(about, key) for key in ("name", "weights", "model", "imports", "trained", "figures")}
        inside = None
        if exports.includes_autoencoder(about.model):
            inside = exports.read_exported(local / places.AUTOENCODER, f"{source}/{places.AUTOENCODER}")
        return Source(network, about.image_size, config=_run_config(local), inside=inside, **known)

    def diffusers(self, local: Path, source: str) -> Any:
        """A diffusers folder, on this disk."""
        return diffusers_format.read(local, source, self.scratch)

    def published(self, source: str) -> Any:
        """A folder with a published decoder."""
        raise UserError(f"{source}: {PUBLISHED}")


class _Fetcher(Opener):
    """Brings a source to this disk, and opens it not yet."""

    def checkpoint(self, local: Path, source: str) -> str:
        return str(local)

    def exported(self, local: Path, source: str, about: Exported) -> str:
        return str(local)

    def diffusers(self, local: Path, source: str) -> str:
        return str(local)

    def file(self, source: str) -> str:
        return source  # which is read as it comes


def fetch(source: str, scratch: Path) -> str:
    """Where on this disk a source can be opened: downloaded below ``scratch``, if it is in a bucket.

    Raises:
        UserError: see :func:`open_source`.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    return _Fetcher("ema", [], scratch).open(source.rstrip("/"))


def _what_it_is(names: set[str]) -> str:
    if "index.json" in names:
        return f"a data set, not an autoencoder; {places.WOULD_DO}"
    return f"no autoencoder: the folder holds {places.first_of(names) or 'nothing'}; {places.WOULD_DO}"


def _listed(folder: str) -> list[Listed]:
    with saying(f"cannot list the checkpoints in {folder}"):
        return checkpoints.list_checkpoints(folder)


def checkpoints_of_run(folder: str, config: Config | None) -> list[tuple[str, Listed]]:
    """A run's checkpoints, each with the folder that holds it, the newest first.

    Those in the run's folder go first: it may be a copy, whose configuration still names the place of the original's.

    Args:
        folder: the run's, or one of checkpoints.
        config: the run's configuration, which may say where they are.

    Raises:
        UserError: a folder cannot be listed.
    """
    inside = _found([folder, f"{folder}/checkpoints"])
    if any(checkpoint.parts for _, checkpoint in inside):
        return _by_age(inside)
    said = (config and config.save_folder) or folder
    looked = {os.path.abspath(place) for place in (folder, f"{folder}/checkpoints")}
    elsewhere = _found([said]) if is_remote(said) or os.path.abspath(said) not in looked else []
    if elsewhere:
        log.warning("%s holds no checkpoint; those in %s, which its configuration names, are used", folder, said)
    waiting = _found(str(path) for path in Path(folder).glob("uploads/node*"))
    return _by_age([*inside, *elsewhere, *waiting])


def _found(folders: Iterable[str]) -> list[tuple[str, Listed]]:
    return [(folder, each) for folder in folders for each in _listed(folder)]


def _by_age(found: list[tuple[str, Listed]]) -> list[tuple[str, Listed]]:
    return sorted(found, key=lambda pair: pair[1].age, reverse=True)


def _run_config(local: Path) -> Config | None:
    """The configuration of the run that an export came from; None where it is missing or of another version."""
    try:
        return load_config(str(local / places.RUN))
    except UserError:
        return None
