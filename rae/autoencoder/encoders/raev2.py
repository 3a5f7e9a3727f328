"""Encoders by the names that RAEv2 (arXiv 2605.18324) gives them, such as ``dinov3mls-vit-l16[layers=11.17.23]``."""

import re
from typing import Any

from rae.autoencoder.encoders.base import PretrainedEncoder
from rae.autoencoder.encoders.dinov2 import DINOv2
from rae.autoencoder.encoders.dinov3 import DINOv3
from rae.autoencoder.encoders.siglip2 import SigLIP2
from rae.autoencoder.layers import Normalize
from rae.config.registry import register
from rae.config.values import Count

_NAME = re.compile(r"(dinov2|dinov3|siglip2)(mls)?-vit-(\w+?)(?:\[(.*)\])?")
_FAMILIES: dict[str, tuple[type[PretrainedEncoder], str, int]] = {
    "dinov2": (DINOv2, "facebook/dinov2-with-registers-{}", 224),
    "dinov3": (DINOv3, "facebook/dinov3-vit{}-pretrain-lvd1689m", 256),
    "siglip2": (SigLIP2, "google/siglip2-{}-patch16-256", 256),
}
_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant", "so400m": "so400m"}
_DEFAULT = {"s": (2, 5, 8, 11), "b": (2, 5, 8, 11), "l": (5, 11, 17, 23)}
"""Layers that are taken where a name gives none, by the first letter of the size."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@register("encoder", "raev2")
def raev2(name: str, pretrained: str | None = None, input_size: Count | None = None) -> PretrainedEncoder:
    """The encoder of a published name: one layer, or with ``mls`` the mean of several, as RAEv2 takes them.

    dinov3 adds the mean over the deepest layer's tokens, each layer goes through the affine-free final norm;
    ``[norm]`` keeps its affine. siglip2 keeps it always, and sees images normalised as ImageNet's; dinov2 adds nothing.

    Args:
        name: ``dinov3-vit-l16``, ``dinov3mls-vit-l16[layers=11.17.23]``, ``siglip2mls-vit-b[layers=5.11]``, …
        pretrained: a hub id or a folder of it; by default the published weights of this name.
        input_size: pixels a side; by default what was published.

    Raises:
        ValueError: it is no such name.
    """
    found = _NAME.fullmatch(name)
    options = dict(each.partition("=")[::2] for each in found[4].split(",")) if found and found[4] else {}
    if not found or options.keys() - {"layers", "norm"}:
        raise ValueError(
            f"{name!r} is no name such as dinov3mls-vit-l16[layers=11.17.23], dinov2-vit-b or siglip2-vit-b"
        )
    family, several, size = found[1], bool(found[2]), found[3]
    kind, published, default = _FAMILIES[family]
    affine = family == "siglip2" or "norm" in options
    given: dict[str, Any] = {"norm": "affine" if affine else "plain"}
    if several:
        chosen = options["layers"].split(".") if "layers" in options else _DEFAULT.get(size[0], ())
        given |= {"layers": [int(index) for index in chosen], "token_mean": family != "dinov2"}
    place = pretrained or published.format(size if family == "dinov3" else _SIZES.get(size, size))
    encoder = kind(place, input_size or default, **given)  # type: ignore[arg-type]
    if family == "siglip2":
        encoder.normalize = Normalize(*_IMAGENET)
    return encoder


raev2.weights_argument = "pretrained"  # type: ignore[attr-defined]
