"""DiT-DH as RAE's and RAEv2's public code save it: parameter names and shapes are ours, sizes are read off."""

from typing import Any

from torch import Tensor

from rae.autoencoder.backbones import check_tensors
from rae.config.errors import UserError
from rae.diffusion.networks import LatentTransformer

_CONTAINERS = ("ema", "model", "state_dict")


def weights_in(content: Any, where: str, ema: bool = True) -> dict[str, Tensor]:
    """A network's tensors: plain, or under ``ema`` or ``model`` as a training checkpoint has them.

    Args:
        where: what to call the file in messages.
        ema: whether the average goes before the live weights.

    Raises:
        UserError: there is no such network in it.
    """
    for key in _CONTAINERS if ema else _CONTAINERS[::-1]:
        held = content.get(key) if isinstance(content, dict) else None
        if isinstance(held, dict) and looks_like_one(held):
            return _unwrapped(held)
    if isinstance(content, dict) and looks_like_one(content):
        return _unwrapped(content)
    raise UserError(f"{where}: it holds no DiT-DH: there are no tensors called s_embedder.proj.weight, blocks.0.…")


def looks_like_one(content: dict[str, Any]) -> bool:
    """Whether these are a DiT-DH's tensors."""
    names = {name.removeprefix("_orig_mod.").removeprefix("module.") for name in map(str, content)}
    return {"s_embedder.proj.weight", "t_embedder.W"} <= names


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod.").removeprefix("module."): tensor for name, tensor in state.items()}


def settings_of(state: dict[str, Tensor]) -> tuple[tuple[int, int, int], int, dict[str, dict[str, Any]]]:
    """What these tensors are of.

    Args:
        state: a whole state dict, in which the rotary tables tell how wide a head is.

    Returns:
        the latents' (C, h, w), the rows of the label's table, and the network's plugin with its arguments.
    """
    in_context = "ctx_embedder.embedding_table.weight" in state
    table = "ctx_embedder" if in_context else "y_embedder"
    channels, rows = state["s_embedder.proj.weight"].shape[1], len(state[f"{table}.embedding_table.weight"])
    read = _in_context if in_context else _modulated
    grid = round(len(state["dec_rope.freqs_cos" if in_context else "dec_feat_rope.freqs_cos"]) ** 0.5)
    return (channels, grid, grid), rows, {"ditdh_in_context" if in_context else "ditdh": read(state)}


def _sizes(state: dict[str, Tensor], depth: int, ropes: str) -> dict[str, Any]:
    gated = "blocks.0.mlp.w3.weight" in state
    dim, head_dim = (state[f"{name}.proj.weight"].shape[0] for name in ("s_embedder", "x_embedder"))
    widths = [state[ropes.format(part)].shape[1] for part in ("enc", "dec")]
    last = f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"
    return {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": dim // widths[0],
        "head_embed_dim": head_dim,
        "head_depth": _count(state) - depth,
        "head_num_heads": head_dim // widths[1],
        "mlp_ratio": _ratio(state[last].shape[1], dim, gated),
    }


def _modulated(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`rae.diffusion.networks.DiTDH`."""
    dim, head_dim = (state[f"{name}.proj.weight"].shape[0] for name in ("s_embedder", "x_embedder"))
    widths = [state[f"blocks.{i}.attn.proj.weight"].shape[0] for i in range(_count(state))]
    # Of equal widths, the head is of two blocks, as every published one.
    depth = widths.index(head_dim) if dim != head_dim else max(1, len(widths) - 2)
    return {
        **_sizes(state, depth, "{}_feat_rope.freqs_cos"),
        "qk_norm": any(key.endswith("q_norm.weight") for key in state),
        "swiglu": "blocks.0.mlp.w3.weight" in state,
        "rms_norm": "blocks.0.norm1.weight" in state,
        "absolute_positions": "pos_embed" in state,
    }


def _in_context(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`rae.diffusion.in_context.InContextDiTDH`; where the base head is, no tensor tells."""
    depth = sum(f"blocks.{i}.adaln_modulation.1.weight" not in state for i in range(_count(state)))
    return {
        **_sizes(state, depth, "{}_rope.freqs_cos"),
        "base_depth": min(8, depth) if "base_final_layer.linear.weight" in state else 0,
        "time_tokens": len(state["t_embedder.learnable_tokens"]),
        "class_tokens": len(state["ctx_embedder.learnable_tokens"]),
    }


def _count(state: dict[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def _ratio(hidden: int, dim: int, gated: bool) -> float:
    """The published ratio is 4; any other is found up to what rounding leaves open."""
    for ratio in (4.0, *(k / 4 for k in range(1, 65))):
        width = int(dim * ratio)
        if (int(2 / 3 * width) if gated else width) == hidden:
            return ratio
    return hidden * (1.5 if gated else 1) / dim


def load_published(network: LatentTransformer, state: dict[str, Tensor], where: str) -> None:
    """Load a published network strictly: positions and frequencies too, which the public script has trained.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    check_tensors(state, network.state_dict(), where)
    network.load_state_dict(state)
