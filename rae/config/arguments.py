"""The one way in which arguments from YAML are checked: the target's own signature is the schema."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

from rae.config.composer import hint_of
from rae.config.errors import UserError
from rae.config.registry import find, nearest

_HERE = "<here>"
"""Stands for a nested plugin's key path until the plugin around it is named."""


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
        message = explain(error, where, fields, dict(arguments))
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
            hint = hint_of(target, name, hint)
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
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(type_name, arguments))}]"
    return "None" if hint is type(None) else "…" if hint is ... else getattr(hint, "__name__", str(hint))


def explain(error: ValidationError, where: str, known: typing.Iterable[str] = (), data: Any = _HERE) -> str:
    """The first fault of a validation error, as one line.

    Args:
        where: the key path of what was validated.
        known: keys that it may have.
        data: it, if it is known.
    """
    faults = error.errors()
    fault, location = faults[0], _place(faults[0], data)
    key = ".".join([where, *location] if where else location)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(location[-1], known)}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"missing value: {key} is required"
    if isinstance(_cause(error), UserError):
        return str(_cause(error)).replace(_HERE, key)
    inner = fault.get("ctx", {}).get("error")
    if isinstance(inner, ValidationError):
        return explain(inner, key, (), fault["input"])
    if isinstance(inner, Exception):
        return f"{key}: {inner}"
    # A union's members each have a fault of their own.
    told = [each["msg"].partition(", unable")[0] for each in faults if _place(each, data) == location]
    wanted = [message.removeprefix("Input should be ") for message in told]
    message = f"input should be {' or '.join(dict.fromkeys(wanted))}" if wanted != told else told[0]
    return f"{key}: {message[0].lower()}{message[1:]}, not {fault['input']!r}"


def _place(fault: Any, data: Any) -> list[str]:
    """The keys that lead to a fault, without the names that pydantic gives to the members of a union."""
    keys: list[str] = []
    for part in fault["loc"]:
        held = isinstance(data, Mapping) and part in data
        if held or (isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif data is not _HERE and (part != fault["loc"][-1] or "missing" not in fault["type"]):
            continue
        keys.append(str(part))
    return keys


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


def parts_of(entry: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a plugin's entry, which may be its name alone."""
    if isinstance(entry, str):
        return entry, {}
    ((name, arguments),) = entry.items()
    return name, arguments or {}


def plugin_text(entry: Any) -> str:
    """``{dinov2: {input_size: 224}}`` -> ``dinov2 (input_size 224)``."""
    if not entry:
        return str(entry)
    name, arguments = parts_of(entry)
    return f"{name} ({', '.join(f'{key} {value}' for key, value in arguments.items())})" if arguments else name


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
    supplied = {key: context[key] for key in _context(target) if key in context}
    checked = check_arguments(target, arguments, f"{where}.{name}", supplied)
    try:
        return target(**supplied, **checked)
    except ValueError as error:
        raise UserError(f"{where}.{name}: {error}") from error


def PluginEntry(kind: str) -> Any:  # noqa: N802 - an annotation, used like a type
    """Annotation of a plugin argument that is itself a plugin of ``kind``: ``{name: arguments}``."""
    return Annotated[dict[str, Any], BeforeValidator(lambda entry: _nested(kind, entry)), f"{{{kind}: …}}"]


def _nested(kind: str, entry: Any) -> dict[str, dict[str, Any]]:
    try:
        return check_plugin(kind, entry, _HERE)
    except UserError as error:
        raise ValueError(str(error)) from error
