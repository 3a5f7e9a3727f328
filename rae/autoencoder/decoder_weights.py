"""Decoder weights as people have them: under whichever names, in whichever nesting, prefix and precision.

Three ways of naming them are known: ours, the published one (transformers' ViT-MAE's), and diffusers', which is that
with other names in the attention. What is returned has our names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from rae.autoencoder.layers import sincos_positions
from rae.config.errors import UserError

_PUBLISHED = [  # our names -> the published ones; qkv is fused in ours
    (r"positions", ["decoder_pos_embed"]),
    (r"cls_token", ["trainable_cls_token"]),
    (r"embed\.(\w+)", [r"decoder_embed.\1"]),
    (r"norm\.(\w+)", [r"decoder_norm.\1"]),
    (r"head\.(\w+)", [r"decoder_pred.\1"]),
    (
        r"blocks\.(\d+)\.attn\.qkv\.(\w+)",
        [rf"decoder_layers.\1.attention.attention.{part}.\2" for part in ("query", "key", "value")],
    ),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", [r"decoder_layers.\1.attention.output.dense.\2"]),
    (r"blocks\.(\d+)\.norm1\.(\w+)", [r"decoder_layers.\1.layernorm_before.\2"]),
    (r"blocks\.(\d+)\.norm2\.(\w+)", [r"decoder_layers.\1.layernorm_after.\2"]),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", [r"decoder_layers.\1.intermediate.dense.\2"]),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", [r"decoder_layers.\1.output.dense.\2"]),
]
DIFFUSERS = [  # published names -> diffusers' attention
    ("attention.attention.query.", "attention.to_q."),
    ("attention.attention.key.", "attention.to_k."),
    ("attention.attention.value.", "attention.to_v."),
    ("attention.output.dense.", "attention.to_out.0."),
]
_MARKS = {  # a tensor by which a decoder is known -> others that lie beside it
    "embed.weight": ("blocks.0.attn.qkv.weight", "head.weight", "cls_token"),
    "decoder_embed.weight": ("decoder_pred.weight", "trainable_cls_token"),
}
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
"""Parts of names that DistributedDataParallel, torch.compile and FSDP add."""


def published_names(name: str) -> list[str]:
    """The published names of what has one of ours.

    Raises:
        KeyError: it is none of ours.
    """
    for pattern, published in _PUBLISHED:
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(p) for p in published]
    raise KeyError(name)


@dataclass
class DecoderWeights:
    """A decoder's tensors out of a file.

    Args:
        state: under the names that they have there, without what other programs have put before them.
        inside: where in the file they lie, such as ``ema``; empty for all of it.
        others: names of what lies beside them.
    """

    state: dict[str, Tensor]
    inside: str
    others: list[str]

    @property
    def averaged(self) -> bool:
        """Whether what they lie in is called an average."""
        return any(part.startswith("ema") for part in self.inside.lower().split("."))

    def ours(self, where: str) -> dict[str, Tensor]:
        """Under our names, in fp32; ``positions``, if they are there, as they are.

        Args:
            where: what to call them in messages.

        Raises:
            UserError: one is missing or unexpected, or not finite.
        """
        state = self.state if "embed.weight" in self.state else _from_published(self.state, where)
        found = sorted(name for name, tensor in state.items() if not tensor.isfinite().all())
        if found:
            raise UserError(f"{where}: {found[0]} is not finite")
        return {name: tensor if name == "positions" else tensor.float() for name, tensor in state.items()}


def _from_published(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    state = dict(state)
    ours: dict[str, Tensor] = {}
    depth = len({name.split(".")[1] for name in state if name.startswith("decoder_layers.")})
    names = ["positions", "cls_token", *(f"{part}.{kind}" for part in ("embed", "norm", "head") for kind in _AFFINE)]
    names += [f"blocks.{i}.{part}.{kind}" for i in range(depth) for part in _BLOCK for kind in _AFFINE]
    for name in names:
        parts = published_names(name)
        missing = [part for part in parts if part not in state]
        if not missing:
            ours[name] = torch.cat([state.pop(part) for part in parts])
        elif name != "positions":  # which are computed where they are not there
            raise UserError(f"{where}: {missing[0]} is missing; the file is damaged, or of another decoder")
    if state:
        raise UserError(f"{where}: {min(state)} is unexpected; the file is of another decoder")
    return ours


_AFFINE = ("weight", "bias")
_BLOCK = ("attn.qkv", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")


def find_decoder(content: Any, weights: str = "ema") -> DecoderWeights | None:
    """A decoder's weights in what a file holds: mappings of tensors by name, nested or not.

    ``encoder.*`` and whatever else lies beside them is left out.

    Args:
        content: of the file.
        weights: of several: ``ema`` takes an average before what was trained, ``live`` the other way round.

    Returns:
        None if there is none.
    """
    found = [each for path, mapping in _mappings(content) if (each := _decoder_in(mapping, ".".join(path)))]
    return min(found, key=lambda each: each.averaged != (weights == "ema"), default=None)


def _mappings(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(content, Mapping) and len(path) < 5:
        yield path, content
        for name, held in content.items():
            yield from _mappings(held, (*path, str(name)))


def _decoder_in(mapping: Mapping[str, Any], inside: str) -> DecoderWeights | None:
    tensors = {
        ".".join(part for part in str(name).split(".") if part not in _WRAPPERS): tensor
        for name, tensor in mapping.items()
        if isinstance(tensor, Tensor)
    }
    for mark, beside in _MARKS.items():
        for name in tensors:
            prefix = name.removesuffix(mark)
            if (prefix and not prefix.endswith(".")) or not name.endswith(mark):
                continue
            if not any(prefix + other in tensors for other in beside):
                continue
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            # An autoencoder's other parts lie beside a decoder that has no name of its own before it.
            apart = [key for key in state if key.startswith(("encoder.", "latent_"))]
            state = {key: tensor for key, tensor in state.items() if key not in apart}
            return DecoderWeights(
                {_renamed(key): tensor for key, tensor in state.items()},
                inside,
                sorted(tensors.keys() - {prefix + key for key in state}),
            )
    return None


def _renamed(name: str) -> str:
    for published, diffusers in DIFFUSERS:
        name = name.replace(diffusers, published) if name.startswith("decoder_layers.") else name
    return name


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What tensors under our names tell of a decoder: all its sizes but for the number of heads.

    Returns:
        latent channels, embed_dim, depth, mlp_dim, patch_size.
    """
    return {
        "latent channels": state["embed.weight"].shape[1],
        "embed_dim": state["embed.weight"].shape[0],
        "depth": sum(name.endswith(".attn.qkv.weight") for name in state),
        "mlp_dim": state["blocks.0.mlp.fc1.weight"].shape[0],
        "patch_size": round((state["head.weight"].shape[0] / 3) ** 0.5),
    }


def is_fixed(table: Tensor) -> bool:
    """Whether a position table (1, 1 + grid², D) is the sin-cos one of its own grid, to its precision."""
    grid = round((table.shape[1] - 1) ** 0.5)
    if table.shape[2] % 4 or grid**2 != table.shape[1] - 1:
        return False
    tolerance = 1e-5 if table.dtype in (torch.float32, torch.float64) else 5e-3
    return torch.allclose(table.float(), sincos_positions(table.shape[2], grid), atol=tolerance)


def positions_for(own: Tensor, trainable: bool, table: Tensor | None, where: str) -> tuple[Tensor, str]:
    """The position table that a decoder takes from a file's, and what is to be said of it.

    Args:
        own: (1, 1 + grid², D), the decoder's sin-cos table.
        trainable: whether the decoder trains it.
        table: the file's, perhaps of another grid; None if it has none.

    Raises:
        UserError: the file's was trained, and the decoder's is fixed.
    """
    if table is None or is_fixed(table):
        same = table is None or table.shape == own.shape
        return own, "" if same else f"{where}: its fixed positions are computed for {_grid(own)}, not {_grid(table)}"
    if not trainable:
        raise UserError(f"{where}: its position table was trained; set model.decoder.trainable_positions: true")
    table = table.float()
    if table.shape == own.shape:
        return table, ""
    side = round((own.shape[1] - 1) ** 0.5)
    resampled = resample_abs_pos_embed(table, [side, side], num_prefix_tokens=1)
    return resampled, f"{where}: its trained positions of {_grid(table)} are resampled (bicubic) to {_grid(own)}"


def _grid(table: Tensor) -> str:
    side = round((table.shape[1] - 1) ** 0.5)
    return f"{side} × {side} tokens"
