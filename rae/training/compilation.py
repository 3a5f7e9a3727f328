"""torch.compile, network by network, in place: parameter names, checkpoints and the average do not notice."""

from collections.abc import Iterable

import torch

from rae.config.errors import UserError
from rae.config.sections import Compile
from rae.model import RunModel


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


def compile_networks(chosen: Compile, model: RunModel, algorithms: Iterable[object]) -> None:
    """Have the chosen networks compiled when they are first called; those that a run lacks are passed over."""
    options = {"mode": chosen.mode} if chosen.backend == "inductor" else {}
    for each in (model, *algorithms):
        for network, modules in each.compiled().items() if hasattr(each, "compiled") else ():
            if chosen.chooses(network):
                for module in modules:
                    module.compile(backend=chosen.backend, **options)
