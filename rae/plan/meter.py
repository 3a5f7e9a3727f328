"""What runs and what lives: floating-point operations by network, and bytes of all tensors, on tensors without data."""

import bisect
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer import Algorithm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rae.autoencoder.layers import Frozen
from rae.callbacks import operations
from rae.model import RunModel

aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """What runs inside it: floating-point operations by network, and bytes of all tensors that live.

    Attributes:
        live: bytes now, as the GPU's allocator would hold them.
        peak: the most since :meth:`watch` or the beginning.
        counter: the operations, see torch's FlopCounterMode.
    """

    BLOCK = 512
    """Bytes; the allocator rounds up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}
        # Its formulas, not its mode, which tries to decompose every operation first: here they come decomposed.
        self.counter = operations.counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes back with this rank's part
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and args[0].constant is None:
            return args[0].dtype.is_floating_point * 0.0  # what has no value is read as zero
        out = func(*args, **kwargs)
        self.counter._count_flops(func._overloadpacket, out, args, kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = -(-storage.nbytes() // self.BLOCK) * self.BLOCK
        self.known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.known.pop(key)

    @contextmanager
    def watch(self, peaks: Counter[str], name: str) -> Iterator[None]:
        """Note the largest number of live bytes inside this context."""
        self.peak = self.live
        yield
        peaks[name] = max(peaks[name], self.peak)

    @contextmanager
    def counting(self, networks: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
        """Fill a dictionary with the operations of each network, and of what is none of them (``other``)."""
        found: dict[str, int] = {}
        self.counter.flop_counts.clear()
        with Attribution(networks) as self.counter.mod_tracker:  # type: ignore[assignment]
            yield found
        found.update({name: sum(counts.values()) for name, counts in self.counter.flop_counts.items()})


class Attribution:
    """Which network an operation belongs to, in forward and in backward passes; for FlopCounterMode.

    A forward pass runs between a module's hooks. A backward pass's operations run in a node of the autograd graph,
    whose number says when it was made.
    """

    def __init__(self, networks: dict[str, nn.Module]):
        self.called = list(_called(networks))
        self.running = ["other"]
        self.begins: list[int] = []
        self.names: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> "Attribution":
        for name, module in self.called:
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))  # type: ignore[misc]
            self.handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str) -> None:
        self.running.append(name)
        self._mark()

    def _leave(self) -> None:
        self.running.pop()
        self._mark()

    def _mark(self) -> None:
        self.begins.append(torch._C._autograd._get_sequence_nr())
        self.names.append(self.running[-1])

    @property
    def parents(self) -> set[str]:
        """The current network's name, as FlopCounterMode's module tracker would give it."""
        node = torch._C._current_autograd_node()
        if node is None or len(self.running) > 1:
            return {self.running[-1]}
        place = bisect.bisect_right(self.begins, node._sequence_nr()) - 1
        return {self.names[place] if place >= 0 else "other"}


def networks_of(model: RunModel, algorithms: list[Algorithm]) -> dict[str, nn.Module]:
    """The networks that a step runs, by name."""
    parts = (model, *(algorithm for algorithm in algorithms if hasattr(algorithm, "networks")))
    return {name: network for part in parts for name, network in part.networks().items()}


def _called(networks: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in networks.items():
        if isinstance(module, nn.ModuleList):
            yield from ((name, child) for child in module)
        else:
            yield name, module


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, also of the frozen networks inside."""
    yield from module.parameters()
    yield from module.buffers()
    for inner in module.modules():
        if isinstance(inner, Frozen):
            yield from tensors_of(inner.network)


def size_of(tensors: Any) -> int:
    """Bytes of all tensors in nested dicts and sequences; of a sharded tensor, this rank's."""
    if isinstance(tensors, Tensor):
        local = getattr(tensors, "_local_tensor", tensors)
        return local.numel() * local.element_size()
    if isinstance(tensors, dict):
        return sum(map(size_of, tensors.values()))
    return sum(map(size_of, tensors)) if isinstance(tensors, (list, tuple)) else 0
