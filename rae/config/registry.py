"""Named plugins.

A plugin is a class or function registered under a kind and a name. A configuration refers to it as
``{name: {argument: value}}``; the target's own signature is the schema. Composer's algorithms, callbacks
and loggers, and Composer's schedulers, are found by their class names in snake case without registration.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rae.config.composer import REFUSED
from rae.config.errors import UserError

# Where the plugins of each kind live: imported when a name of that kind is first looked up, because
# importing Composer or transformers takes seconds that a rejected configuration should not cost.
_HOMES = {
    "model": ["rae.autoencoder.model", "rae.diffusion.model"],
    "encoder": ["rae.autoencoder.encoders"],
    "discriminator": ["rae.autoencoder.discriminator"],
    "pixel_loss": ["rae.autoencoder.losses"],
    "network": ["rae.diffusion.networks", "rae.diffusion.in_context"],
    "flow": ["rae.diffusion.flow"],
    "times": ["rae.diffusion.flow"],
    "sampler": ["rae.diffusion.samplers"],
    "guidance": ["rae.diffusion.guidance"],
    "optimizer": ["rae.training.optimizers", "rae.training.muon"],
    "schedule": ["rae.training.optimizers"],
    "metric": ["rae.evaluation.metrics", "rae.evaluation.frechet", "rae.evaluation.generation"],
    "algorithm": ["rae.algorithms"],
    "callback": ["rae.callbacks"],
    "logger": ["rae.callbacks"],
}
_COMPOSER = {  # kind -> (module, base class, suffix that names drop)
    "algorithm": ("composer.algorithms", "composer.Algorithm", ""),
    "callback": ("composer.callbacks", "composer.Callback", ""),
    "logger": ("composer.loggers", "composer.loggers.LoggerDestination", "Logger"),
    "schedule": ("composer.optim", "composer.optim.ComposerScheduler", "Scheduler"),
}

_plugins: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in _HOMES}


def register(kind: str, *names: str, context: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Class or function decorator: make a plugin available under ``names`` (the first is its own name).

    Args:
        kind: one of ``model, encoder, discriminator, pixel_loss, network, flow, times, sampler, guidance, optimizer,
            schedule, metric, algorithm, callback, logger``.
        names: the name used in YAML, then any aliases.
        context: parameters that the framework supplies and YAML must not (an optimizer's ``params``).

    Raises:
        ValueError: an unknown kind, or a name that another plugin of that kind already has.
    """
    if kind not in _plugins:
        raise ValueError(f"unknown plugin kind {kind!r}; kinds are {', '.join(_plugins)}")

    def decorate(target: Any) -> Any:
        for name in names:
            taken = _plugins[kind].get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (target.__module__, target.__qualname__):
                raise ValueError(f"{kind} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}")
            _plugins[kind][name] = target
        target.context = context
        return target

    return decorate


def import_plugins(paths: list[str]) -> None:
    """Import a user's own modules: a ``.py`` file's path, or a dotted module name.

    Raises:
        UserError: the file or module is missing, or fails to import.
    """
    for path in paths:
        try:
            if path.endswith(".py"):
                _import_file(Path(path))
            else:
                importlib.import_module(path)
        except Exception as error:
            raise UserError(f"imports: cannot import {path!r}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    name = f"rae_plugin_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def snake_case(name: str) -> str:
    """``LRMonitor`` -> ``lr_monitor``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _from_composer(kind: str) -> dict[str, Callable[..., Any]]:
    if kind not in _COMPOSER:
        return {}
    module_name, base_name, suffix = _COMPOSER[kind]
    module, base = importlib.import_module(module_name), pkgutil.resolve_name(base_name)
    found: dict[str, Callable[..., Any]] = {}
    for class_name in module.__all__:
        target = getattr(module, class_name)
        if inspect.isclass(target) and issubclass(target, base) and target is not base:
            short = class_name.removesuffix(suffix)
            # Product names (WandB, TensorBoard, MLFlow) are written as one word.
            found[short.lower() if kind == "logger" else snake_case(short)] = target
    return found


def plugins(kind: str) -> dict[str, Callable[..., Any]]:
    """Every plugin of a kind by name, ours before Composer's where both have one (``ema``)."""
    for module in _HOMES[kind]:
        importlib.import_module(module)
    return {**_from_composer(kind), **_plugins[kind]}


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def find(kind: str, name: str, where: str) -> Callable[..., Any]:
    """The plugin called ``name``.

    Raises:
        UserError: no such plugin; the message lists those that exist.
    """
    known, refused = plugins(kind), REFUSED.get(kind, {})
    if name in refused and name not in _plugins[kind]:
        raise UserError(f"{where}.{name}: Composer's {name} does not work here: {refused[name]}")
    if name not in known:
        known = {other: target for other, target in known.items() if other not in refused}
        raise UserError(
            f"{where}: unknown {kind} {name!r}{nearest(name, known)}; there are: {', '.join(sorted(known))}"
            " (your own file goes under imports:)"
        )
    return known[name]
