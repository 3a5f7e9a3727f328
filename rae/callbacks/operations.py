"""Floating-point operations as they are run, counted: matrix products, convolutions, attention."""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ON_CPU = {  # their first arguments are shapes of query, key and value, after the output's gradient
    _FORWARD: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


class _Whole(nullcontext[None]):
    parents: ClassVar = {"Global"}


def counter() -> FlopCounterMode:
    """torch's counter, which here knows the CPU's fused attention too, and counts for the whole alone.

    Its hooks that attribute operations to modules do not bear gradients taken at a leaf.
    """
    counting = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    counting.mod_tracker = _Whole()  # type: ignore[assignment]
    return counting
