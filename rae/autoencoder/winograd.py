"""3 × 3 convolutions with fewer multiplications, for CPUs.

cuDNN chooses such an algorithm by itself; oneDNN, which torch uses on a CPU, has none.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

FEWEST_CHANNELS = 256
"""With fewer, transforming the tiles takes as long as the multiplications that it saves."""

SMALLEST = 8
"""Side of a map from which on it pays."""

TILE = 4
_CACHED = 2**16
"""Numbers of a tile's place that are worked on at a time: with more, they fall out of the processor's cache."""


def _both_axes(*rows: tuple[float, ...]) -> Tensor:
    matrix = torch.tensor(rows)
    return torch.kron(matrix, matrix)


# F(4, 3) of Winograd's minimal filtering at the points 0, ±1, ±2, ∞ (arXiv 1509.09308, section 4.2): of six
# inputs d and three weights g, A[(G g) ⊙ (B d)] are four outputs.
_A = _both_axes((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1.0))
_B = _both_axes(
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1.0),
)
_G = _both_axes(
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class WinogradConv(nn.Conv2d):
    """A frozen 3 × 3 convolution, padded by 1, that takes 2¼ instead of 9 multiplications an output on a CPU in fp32.

    Outputs and the input's gradient differ from the direct ones by about 1e-5 of the largest. The transformed
    weights need four times the weights' memory. It has no second derivatives.

    Args:
        conv: what it takes the place of; weights are shared.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    @staticmethod
    def pays(module: nn.Module) -> bool:
        """Whether a module is a convolution that it can take the place of, with gain."""
        return (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
            and module.bias is not None
            and module.in_channels >= FEWEST_CHANNELS
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W), in channels_last."""
        fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        trained = self.weight.requires_grad or self.bias.requires_grad  # type: ignore[union-attr]
        if x.device.type != "cpu" or not fp32 or trained or torch.compiler.is_compiling():
            return super().forward(x)
        if x.ndim < 4 or not len(x) or min(x.shape[2:]) < SMALLEST:
            return super().forward(x)
        return _Convolve.apply(x, _transformed(self.weight), self.bias)  # type: ignore[return-value]


def _transformed(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (36, C, K), made when first needed."""
    state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    if weight not in _cache or _cache[weight][0] != state:
        with torch.inference_mode(False), torch.no_grad():  # a later call may need gradients
            taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
            _cache[weight] = state, (_G @ taps).view(36, weight.shape[1], weight.shape[0])
    return _cache[weight][1]


_cache = WeakTensorKeyDictionary()
"""Transformed weights by weight: outside the module, which is copied, pickled and moved without them."""


def use_winograd(network: nn.Module) -> None:
    """Replace every convolution of a frozen network for which :class:`WinogradConv` pays."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if WinogradConv.pays(child):
                setattr(parent, name, WinogradConv(child))  # type: ignore[arg-type]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weights)
        ctx.size = height, width = x.shape[2:]
        rows, columns = math.ceil(height / TILE), math.ceil(width / TILE)
        below, right = rows * TILE - height, columns * TILE - width
        size = len(x), len(bias), height + below, width + right
        y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        places = y.permute(0, 2, 3, 1).view(len(x), rows, TILE, columns, TILE, len(bias))
        for part, out in _parts(x.permute(0, 2, 3, 1), places):
            padded = F.pad(part, (0, 0, 1, 1 + right, 1, 1 + below))
            count, _, _, channels = padded.shape
            image, row, column, channel = padded.stride()
            shape = TILE + 2, TILE + 2, count, rows, columns, channels
            tiles = padded.as_strided(shape, (row, column, image, TILE * row, TILE * column, channel))
            products = torch.bmm((_B @ tiles.reshape(36, -1)).view(36, -1, channels), weights)
            outputs = (_A @ products.view(36, -1)).view(TILE, TILE, count, rows, columns, -1)
            torch.add(outputs.permute(2, 3, 0, 4, 1, 5), bias, out=out)
        # Not a view: a ReLU may work in place on it.
        return y if not (below or right) else y[:, :, :height, :width].clone(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The same steps transposed, last to first; neighbouring tiles' inputs overlap by two and are added."""
        (weights,), (height, width) = ctx.saved_tensors, ctx.size
        rows, columns = math.ceil(height / TILE), math.ceil(width / TILE)
        grad = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, columns * TILE - width, 0, rows * TILE - height))
        x = grad.new_zeros(len(grad), rows + 1, TILE, columns + 1, TILE, weights.shape[1])
        for part, out in _parts(grad, x):
            count, channels = len(part), part.shape[-1]
            outputs = part.reshape(count, rows, TILE, columns, TILE, channels).permute(2, 4, 0, 1, 3, 5)
            products = (_A.T @ outputs.reshape(TILE * TILE, -1)).view(36, -1, channels)
            tiles = _B.T @ torch.bmm(products, weights.mT).view(36, -1)
            tiles = tiles.view(TILE + 2, TILE + 2, count, rows, columns, -1).permute(2, 3, 0, 4, 1, 5)
            out[:, :-1, :, :-1] += tiles[:, :, :TILE, :, :TILE]
            out[:, 1:, :2, :-1] += tiles[:, :, TILE:, :, :TILE]
            out[:, :-1, :, 1:, :2] += tiles[:, :, :TILE, :, TILE:]
            out[:, 1:, :2, 1:, :2] += tiles[:, :, TILE:, :, TILE:]
        x = x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return x[:, :, 1 : height + 1, 1 : width + 1], None, None


def _parts(images: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As many images at a time as the cache has room for, with their places in ``out``."""
    count = max(1, _CACHED * TILE**2 // images[0].numel())
    return zip(images.split(count), out.split(count), strict=True)
