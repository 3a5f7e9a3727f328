"""DiT-DH as the public code saves it (``stage2_model.pt``): parameter names and shapes are ours, sizes are read off."""

from typing import Any

from torch import Tensor

from rae.autoencoder.backbones import check_tensors
from rae.config.errors import UserError
from rae.diffusion.networks import DiTDH

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


def settings_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`rae.diffusion.networks.DiTDH` that these tensors are of.

    Args:
        state: a whole state dict, in which the rotary tables tell how wide a head is.
    """
    widths = [state[f"blocks.{i}.attn.proj.weight"].shape[0] for i in range(_count(state))]
    dim, channels = state["s_embedder.proj.weight"].shape[:2]
    head_dim = state["x_embedder.proj.weight"].shape[0]
    depth = _depth(state, widths, dim, head_dim)
    tokens, width = state["enc_feat_rope.freqs_cos"].shape
    grid = round(tokens**0.5)
    hidden = {True: 3, False: 2}["blocks.0.mlp.w3.weight" in state]
    name = "w3" if hidden == 3 else "fc2"
    return {
        "latent_shape": (channels, grid, grid),
        "embed_dim": dim,
        "depth": depth,
        "num_heads": dim // width,
        "head_embed_dim": head_dim,
        "head_depth": len(widths) - depth,
        "head_num_heads": head_dim // state["dec_feat_rope.freqs_cos"].shape[1],
        "mlp_ratio": _ratio(state[f"blocks.0.mlp.{name}.weight"].shape[1], dim, hidden == 3),
        "qk_norm": any(key.endswith("q_norm.weight") for key in state),
        "swiglu": hidden == 3,
        "rms_norm": "blocks.0.norm1.weight" in state,
        "absolute_positions": "pos_embed" in state,
    }


def _count(state: dict[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def _depth(state: dict[str, Tensor], widths: list[int], dim: int, head_dim: int) -> int:
    # Of equal widths, the head is of two blocks, as every published one.
    return widths.index(head_dim) if dim != head_dim else max(1, len(widths) - 2)


def _ratio(hidden: int, dim: int, gated: bool) -> float:
    """The published ratio is 4; any other is found up to what rounding leaves open."""
    for ratio in (4.0, *(k / 4 for k in range(1, 65))):
        width = int(dim * ratio)
        if (int(2 / 3 * width) if gated else width) == hidden:
            return ratio
    return hidden * (1.5 if gated else 1) / dim


def load_published(network: DiTDH, state: dict[str, Tensor], where: str) -> None:
    """Load a published network strictly: positions and frequencies too, which the public script has trained.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    check_tensors(state, network.state_dict(), where)
    network.load_state_dict(state)
