"""Named plugins, and the one way in which arguments from YAML are checked.

A plugin is a class or function registered under a kind and a name. A configuration refers to it as
``{name: {argument: value}}``; the target's own signature is the schema. Composer's algorithms, callbacks
and loggers, and Composer's schedulers, are found by their class names in snake case without registration.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

# Where the plugins of each kind live: imported when a name of that kind is first looked up, because
# importing Composer or transformers takes seconds that a rejected configuration should not cost.
_HOMES = {
    "encoder": ["rae.autoencoder.encoders"],
    "discriminator": ["rae.autoencoder.discriminator"],
    "pixel_loss": ["rae.autoencoder.losses"],
    "optimizer": ["rae.training.optimizers"],
    "schedule": ["rae.training.optimizers"],
    "metric": ["rae.evaluation.metrics"],
    "algorithm": ["rae.algorithms"],
    "callback": ["rae.callbacks"],
    "logger": ["rae.callbacks"],
}
_COMPOSER = {  # kind -> (module, base class, suffix that names drop)
    "algorithm": ("composer.algorithms", "Algorithm", ""),
    "callback": ("composer.callbacks", "Callback", ""),
    "logger": ("composer.loggers", "LoggerDestination", "Logger"),
    "schedule": ("composer.optim", "ComposerScheduler", "Scheduler"),
}
_HERE = "<here>"
"""Stands for a nested plugin's key path until the plugin around it is named."""

_plugins: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in _HOMES}


class UserError(Exception):
    """A mistake that the user can mend. The message is one line that names the thing and the remedy."""


class RankError(UserError):
    """A condition that one rank alone met, so that it must say so itself."""


def register(kind: str, *names: str, context: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Class or function decorator: make a plugin available under ``names`` (the first is its own name).

    Args:
        kind: one of ``encoder, discriminator, pixel_loss, optimizer, schedule, metric, algorithm, callback, logger``.
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
    module, base = importlib.import_module(module_name), getattr(importlib.import_module("composer"), base_name, None)
    base = base or getattr(module, base_name)
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
    known = plugins(kind)
    if name not in known:
        raise UserError(
            f"{where}: unknown {kind} {name!r}{nearest(name, known)}; there are: {', '.join(sorted(known))}"
            " (your own file goes under imports:)"
        )
    return known[name]


def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, context: typing.Container[str] = ()
) -> dict[str, Any]:
    """Check ``arguments`` against the signature of ``target``; return them converted to the annotated types.

    Args:
        where: the key path in the configuration, for messages.
        context: parameters that the framework supplies and the user must not.

    Raises:
        UserError: an unknown, missing or ill-typed argument; the message shows the signature.
    """
    fields, open_ended = _signature_fields(target, context)
    try:
        checked = _model_of(target, fields, open_ended).model_validate(dict(arguments))
    except ValidationError as error:
        message = explain(error, where, fields)
        nested = isinstance(_cause(error), UserError)  # its message already ends with the inner plugin's signature
        raise UserError(
            message if nested or len(fields) > 20 else f"{message}; it takes {_describe(fields)}"
        ) from error
    return {name: getattr(checked, name) for name in checked.model_fields_set}


def _signature_fields(target: Callable[..., Any], context: typing.Container[str]) -> tuple[dict[str, Any], bool]:
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # annotations of third parties may name things that do not exist at run time
        hints = {}
    fields, open_ended = {}, False
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in context:
            hint = hints.get(name, Any)
            if parameter.default is None:
                hint = hint | None if not isinstance(hint, str) else Any
            fields[name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    return fields, open_ended


def _model_of(target: Callable[..., Any], fields: dict[str, Any], open_ended: bool) -> Any:
    config = ConfigDict(
        extra="allow" if open_ended else "forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        coerce_numbers_to_str=True,
    )
    safe: dict[str, Any] = {}
    for name, (hint, default) in fields.items():
        try:
            TypeAdapter(hint, config=None if _is_model(hint) else ConfigDict(arbitrary_types_allowed=True))
        except (PydanticUserError, TypeError):
            hint = Any
        safe[name] = (hint, default)
    return create_model(target.__name__, __config__=config, **safe)


def _is_model(hint: Any) -> bool:
    return inspect.isclass(hint) and hasattr(hint, "model_fields")


def _describe(fields: dict[str, Any]) -> str:
    def one(name: str, hint: Any, default: Any) -> str:
        text = f"{name}: {type_name(hint)}"
        return text if default is ... else f"{text} = {default!r}"

    return "(" + ", ".join(one(name, *field) for name, field in fields.items()) + ")"


def type_name(hint: Any) -> str:
    """A type annotation in the words that a user writes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return next((m for m in arguments[1:] if isinstance(m, str)), type_name(arguments[0]))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is not None:
        return str(hint).replace("typing.", "")
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def explain(error: ValidationError, where: str, known: typing.Iterable[str] = ()) -> str:
    """The first fault of a validation error, as one line."""
    fault = error.errors()[0]
    location = [str(part) for part in fault["loc"]]
    key = ".".join([where, *location] if where else location)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(location[-1], known)}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"missing value: {key} is required"
    if isinstance(_cause(error), UserError):
        return str(_cause(error)).replace(_HERE, key)
    inner = fault.get("ctx", {}).get("error")
    if isinstance(inner, Exception):
        return f"{key}: {inner}"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{key}: {message}, not {fault['input']!r}"


def _cause(error: ValidationError) -> BaseException | None:
    inner = error.errors()[0].get("ctx", {}).get("error")
    return inner.__cause__ if isinstance(inner, Exception) else None


def check_plugin(kind: str, entry: Any, where: str) -> dict[str, dict[str, Any]]:
    """Check one ``{name: arguments}`` entry (or a bare ``name``) without building anything.

    Raises:
        UserError: the entry has another form, or names no plugin, or its arguments do not fit.
    """
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise UserError(f"{where}: write one {kind} as {{name: {{argument: value}}}}, not {entry!r}")
    ((name, arguments),) = entry.items()
    if not isinstance(arguments or {}, Mapping):
        raise UserError(f"{where}.{name}: arguments are written as {{argument: value}}, not {arguments!r}")
    target = find(kind, name, where)
    check_arguments(target, arguments or {}, f"{where}.{name}", _context(target))
    return {name: dict(arguments or {})}


def _context(target: Callable[..., Any]) -> tuple[str, ...]:
    return getattr(target, "context", ())


def build(kind: str, entry: Any, where: str, **context: Any) -> Any:
    """Build the plugin that ``{name: arguments}`` describes.

    Args:
        where: the key path in the configuration, for messages.
        context: what the framework supplies (an optimizer's parameters, a schedule's steps an epoch).
            A plugin gets those that it was registered to take.

    Raises:
        UserError: see :func:`check_plugin`; also a ``ValueError`` that the constructor raises.
    """
    ((name, arguments),) = check_plugin(kind, entry, where).items()
    target = find(kind, name, where)
    supplied = {key: context[key] for key in _context(target)}
    checked = check_arguments(target, arguments, f"{where}.{name}", supplied)
    try:
        return target(**supplied, **checked)
    except ValueError as error:
        raise UserError(f"{where}.{name}: {error}") from error


def parse_time(value: Any) -> str:
    """Check a Composer time string (``8ep``, ``1000ba``, ``0.5dur``).

    Raises:
        ValueError: not a time string.
    """
    from composer import Time

    try:
        Time.from_timestring(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{value!r} is not a time such as '8ep', '1000ba' or '0.5dur'") from error
    return value


def in_steps(
    time: str, steps_per_epoch: int | None, batch_size: int | None = None, end: int | None = None
) -> int | None:
    """How many steps are finished at a Composer time string; None where its unit does not tell.

    Args:
        end: steps of the whole run, of which ``dur`` is a share.
    """
    from composer import Time

    parsed = Time.from_timestring(time)
    value, unit = parsed.value, parsed.unit.value
    if unit == "sp" and batch_size is not None:
        return math.ceil(value / batch_size)
    length = {"ba": 1, "ep": steps_per_epoch, "dur": end}.get(unit)
    return None if length is None else math.ceil(value * length)


TimeString = Annotated[str, BeforeValidator(parse_time), "time"]
"""Annotation of a plugin argument that is a point or span in training time."""


def PluginEntry(kind: str) -> Any:  # noqa: N802 - an annotation, used like a type
    """Annotation of a plugin argument that is itself a plugin of ``kind``: ``{name: arguments}``."""
    return Annotated[dict[str, Any], BeforeValidator(lambda entry: _nested(kind, entry)), f"{{{kind}: …}}"]


def _nested(kind: str, entry: Any) -> dict[str, dict[str, Any]]:
    try:
        return check_plugin(kind, entry, _HERE)
    except UserError as error:
        raise ValueError(str(error)) from error
