"""torch.compile, network by network, in place: parameter names, checkpoints and the average do not notice."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from rae.algorithms.adversarial import Adversarial
from rae.algorithms.base import LossTerm
from rae.autoencoder.model import RAEModel
from rae.config.errors import UserError
from rae.config.sections import Compile


def check_compiler(chosen: Compile, device: str) -> None:
    """Check that what is to be compiled can be.

    Args:
        device: ``cpu`` or another, as Composer calls it.

    Raises:
        UserError: torch has no such backend; inductor finds no C++ compiler.
    """
    if not chosen.networks():
        return
    backends = torch._dynamo.list_backends(exclude_tags=())
    if chosen.backend not in backends:
        raise UserError(f"compile.backend: there is no {chosen.backend!r}; there are: {', '.join(backends)}")
    if chosen.backend != "inductor" or device != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError("compile: inductor finds no C++ compiler; install g++, or leave the section out") from error


def compile_networks(chosen: Compile, model: RAEModel, algorithms: Iterable[object]) -> None:
    """Have the chosen networks compiled when they are first called; those that a run lacks are passed over.

    Every decoder block is compiled by itself: they share one compilation, and FSDP shards the same units.
    """
    options = {"mode": chosen.mode} if chosen.backend == "inductor" else {}
    for network, modules in _modules(model, algorithms):
        if network in chosen.networks():
            for module in modules:
                module.compile(backend=chosen.backend, **options)


def _modules(model: RAEModel, algorithms: Iterable[object]) -> Iterator[tuple[str, Iterable[nn.Module]]]:
    yield "encoder", [model.rae.encoder.network]
    yield "decoder", model.rae.decoder.blocks  # type: ignore[misc]
    for algorithm in algorithms:
        if isinstance(algorithm, LossTerm) and algorithm.network is not None:
            yield "perceptual", [algorithm.network]
        if isinstance(algorithm, Adversarial):
            yield "discriminator", [algorithm.discriminator]
