"""Composer 0.32.1, on libraries that are newer than it, and in a process that is interrupted."""

import atexit
import builtins
import logging
import os
import signal
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def mend_wandb_logger() -> None:
    """``WandBLogger.init`` asks W&B's run for ``get_url()``; wandb 0.31 has ``url`` alone."""
    from wandb.sdk.wandb_run import Run

    if not hasattr(Run, "get_url"):
        Run.get_url = lambda run: run.url  # type: ignore[attr-defined]


class _Engine:
    """Finds ``composer.core.engine``, and puts the handlers of signals back once it has been imported."""

    def __init__(self, numbers: Iterable[int]):
        self.numbers = tuple(numbers)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "composer.core.engine":
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            before = {number: signal.getsignal(number) for number in self.numbers}
            execute(module)
            for number, handler in before.items():
                signal.signal(number, handler)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def leave_signals_alone(numbers: Iterable[int]) -> None:
    """Composer takes SIGINT and SIGTERM over when it is imported, and ends the process without a word."""
    sys.meta_path.insert(0, _Engine(numbers))


def silence_launcher(code: int) -> None:
    """Let the ``composer`` launcher say nothing more, and exit with this code: its ranks say what there is to say."""
    builtins.print = lambda *args, **kwargs: None
    logging.getLogger("composer.cli.launcher").disabled = True
    atexit.register(os._exit, code)
