"""The trained weights of whatever holds some, for a run to begin with: no network is built, no encoder is needed."""

import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rae.autoencoder.backbones import check_tensors, read_file
from rae.autoencoder.decoder import decoder_file, decoder_in, load_decoder, read_decoder
from rae.autoencoder.rae import RAE
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import find, import_plugins
from rae.config.sections import Config, Model
from rae.exchange import diffusers_format, places
from rae.exchange.exports import Exported
from rae.exchange.places import local_file, local_folder
from rae.exchange.restoring import load_file, of_average, reading, state_of
from rae.exchange.sources import Opener
from rae.survival import checkpoints


@dataclass
class Weights:
    """What a run can begin with.

    Args:
        tensors: by the names that they have in the model's network (:class:`rae.model.RunModel`); of an autoencoder the
            decoder's alone, and ``decoder.positions`` even where they are not trained.
        kind: which they are: ``ema``, ``live``, or ``given`` where there was no telling.
        name: what they come from, for messages.
        model: the settings of the model that they are of, if those are known.
        statistics: whether latent statistics lie beside them.
        discriminator: the discriminator's, if there are any.
    """

    tensors: dict[str, Tensor]
    kind: str
    name: str
    model: Model | dict[str, Any] | None = None
    statistics: bool = False
    discriminator: dict[str, Tensor] | None = field(default=None)


def open_weights(source: str, weights: str, scratch: Path) -> Weights:
    """The weights that a source holds.

    Args:
        source: as :func:`rae.exchange.sources.open_source`; also a published decoder's file or folder, and a training
            checkpoint of the public code.
        weights: ``ema`` (the live ones where there is no average) or ``live``.
        scratch: local folder, for what is downloaded or converted.

    Raises:
        UserError: there are none in it; what was found instead.
    """
    return _WeightsOpener(weights, [], scratch).open(source.rstrip("/") or source[:1])


def load_into(network: nn.Module, weights: Weights) -> None:
    """Give a model's network these weights: of an autoencoder its decoder, whose positions fit its own grid.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; positions were trained, and are not to be.
    """
    if isinstance(network, RAE):
        state = {name.removeprefix("decoder."): tensor for name, tensor in weights.tensors.items()}
        load_decoder(network.decoder, state, weights.name)
    else:
        check_tensors(weights.tensors, network.state_dict(), weights.name)
        network.load_state_dict(weights.tensors)


class _WeightsOpener(Opener):
    """Reads tensors and builds nothing."""

    def checkpoint(self, local: Path, source: str) -> Weights:
        with reading(source):
            file = checkpoints.in_form(local, False, self.scratch / "converted")
        state = state_of(load_file(file, source), source)
        return self._of_state(state, load_config(str(local / checkpoints.CONFIG)), source)

    def file(self, source: str) -> Weights:
        local = local_file(source, self.scratch)
        content = _content(local, source)
        state = content.get("state") if isinstance(content, dict) else None
        if isinstance(state, dict) and isinstance(state.get("model"), dict):  # which Composer wrote
            beside = (local.parent / checkpoints.CONFIG, local.parent.parent / checkpoints.CONFIG)
            configuration = next((file for file in beside if file.is_file()), None)
            return self._of_state(state, load_config(str(configuration)) if configuration else None, source)
        return _of_decoder(decoder_in(content, source, self.weights), source)

    def yaml(self, source: str) -> Weights:
        config = load_config(source)
        return self.run(config.run_dir)

    def exported(self, local: Path, source: str, about: Exported) -> Weights:
        tensors = read_file(local / places.WEIGHTS)
        statistics = _without_statistics(tensors)
        return Weights(tensors, about.weights, source, about.model, statistics)

    def diffusers(self, local: Path, source: str) -> Weights:
        return _of_decoder(diffusers_format.read_decoder(local, source), source)

    def published(self, source: str) -> Weights:
        local = local_folder(source, self.scratch)
        return _of_decoder(read_decoder(decoder_file(str(local)), source, self.weights), source)

    def _of_state(self, state: dict[str, Any], config: Config | None, source: str) -> Weights:
        tensors, kind, heads = of_average(state, self.weights)
        part = "rae."
        if config is not None and not isinstance(config.model, Model):
            import_plugins(config.imports)
            part = f"{find('model', next(iter(config.model)), 'model').part}."  # type: ignore[attr-defined]
        tensors = {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
        statistics = _without_statistics(tensors)
        return Weights(tensors, kind, source, config.model if config else None, statistics, heads)


def _without_statistics(tensors: dict[str, Tensor]) -> bool:
    """Take latent statistics out of a network's tensors; whether there were any."""
    taken = [tensors.pop(name, None) for name in ("latent_mean", "latent_var")]
    return any(tensor is not None for tensor in taken)


def _content(file: Path, source: str) -> Any:
    """What a file holds: as a run's checkpoint is read, if it can be, or as weights are."""
    if zipfile.is_zipfile(file):
        with suppress(UserError):
            return load_file(file, source)
    return read_file(file)


def _of_decoder(state: dict[str, Tensor], source: str) -> Weights:
    return Weights({f"decoder.{name}": tensor for name, tensor in state.items()}, "given", source)
