"""Floating-point operations as they are run, counted: matrix products, convolutions, attention."""

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
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
