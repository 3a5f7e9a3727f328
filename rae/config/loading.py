"""YAML and overrides to a checked configuration, before anything heavy is imported or built; and back to YAML."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from rae.config.arguments import explain
from rae.config.errors import UserError, first_line
from rae.config.sections import Config, Section

log = logging.getLogger(__name__)


def override(loaded: DictConfig, overrides: Iterable[str]) -> None:
    """Set ``key.sub=value`` overrides in a mapping, in place.

    Raises:
        UserError: one of another form, whose value is no YAML, or is empty.
    """
    for each in overrides:
        key, equals, text = each.partition("=")
        if not key or not equals:
            raise UserError(f"override {each!r} must have the form key=value or key.sub=value")
        if set("[]") & set(key):
            raise UserError(f"override {each!r}: keys are written with dots, as in data.batch_size=64")
        if not text.strip():
            raise UserError(
                f"override {each!r} is empty; if it comes from a variable, set that; {key}=null leaves it out"
            )
        try:
            # An override sets its key, so that model.encoder={mae: {}} replaces the encoder instead of adding one.
            value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([each]), resolve=False)
            for part in key.split("."):
                value = value[part]
            if _is_text(key) and not isinstance(value, str | None):
                value = text  # of 001 or 1e3 YAML makes a number
            OmegaConf.update(loaded, key, value, merge=False)
        except YAMLError as error:
            hint = "; a colon needs a space after it" if re.search(r":[{\[]", text) else ""
            raise UserError(f"override {each!r} is no YAML{hint}") from error
        except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
            raise UserError(f"override {each!r}: {first_line(error)}") from error


def _is_text(key: str) -> bool:
    """Whether a key of the configuration takes a text."""
    hint: Any = Config
    for part in key.split("."):
        for member in (hint, *get_args(hint)):
            if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
                hint = member.model_fields[part].annotation
                break
            if get_origin(member) is dict:
                hint = get_args(member)[1]
                break
        else:
            return False
    return hint is str or set(get_args(hint)) == {str, NoneType}


def _as_typed(loaded: DictConfig, plain: Any, node: yaml.Node | None, prefix: str = "") -> None:
    """Put the texts of a file back as they are typed, where YAML has made numbers of them: 001, or 1e3.

    Args:
        plain: what has been loaded.
        node: where it comes from.
    """
    for name, held in node.value if isinstance(node, yaml.MappingNode) and isinstance(plain, dict) else ():
        key, value = f"{prefix}{name.value}", plain.get(name.value)
        if isinstance(held, yaml.MappingNode):
            _as_typed(loaded, value, held, f"{key}.")
        elif isinstance(held, yaml.ScalarNode) and not isinstance(value, str | None) and _is_text(key):
            OmegaConf.update(loaded, key, held.value)


def _check_full(tree: Any, key: str = "") -> None:
    """Raise a UserError for an empty text, such as an unset variable leaves."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        _check_full(value, f"{key}.{name}".lstrip("."))
    if isinstance(tree, str) and not tree.strip():
        raise UserError(f"{key} is empty; if it comes from a variable, set that; null leaves it out")


_OF_A_RUN = ("checkpoints", "metrics.jsonl", "uploads")
"""What lies beside the configuration in a run's folder."""


def _at_home(path: Path, plain: Any) -> Any:
    """The configuration that lies in a run's folder, with that folder as its ``run_dir``: it may have been copied."""
    home, said = path.parent, plain.get("run_dir") if isinstance(plain, dict) else None
    if path.name != "config.yaml" or not said or os.path.abspath(said) == os.path.abspath(home):
        return plain
    if not any((home / name).exists() for name in _OF_A_RUN):
        return plain
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", f"run_dir: {home}, where config.yaml lies; that says {said}")
    return _moved(plain, said, str(home))


def _moved(tree: Any, before: str, after: str) -> Any:
    """A tree of values in which every path below one folder is below another."""
    if isinstance(tree, dict):
        return {key: _moved(value, before, after) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_moved(value, before, after) for value in tree]
    if isinstance(tree, str) and f"{tree}/".startswith(f"{before.rstrip('/')}/"):
        return after + tree[len(before.rstrip("/")) :]
    return tree


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve interpolations, and check every key and type.

    Raises:
        UserError: the file is missing or not YAML; an unknown key, wrong type or missing value.
    """
    overrides = list(overrides)
    if not Path(path).is_file():
        raise UserError(f"there is no configuration file {path!r}")
    try:
        loaded = OmegaConf.load(path)
        if isinstance(loaded, ListConfig):
            raise UserError(f"{path}: a configuration is a mapping of keys, not a list")
        node = yaml.compose(Path(path).read_text(), yaml.SafeLoader)
        _as_typed(loaded, OmegaConf.to_container(loaded, resolve=False), node)
        override(loaded, overrides)
        missing = sorted(OmegaConf.missing_keys(loaded))
        if missing:
            raise UserError(f"missing value: {missing[0]} is required; set it in {path} or as {missing[0]}=…")
        plain = OmegaConf.to_container(loaded, resolve=True)
        _check_full(plain)
        if not any(each.startswith("run_dir=") for each in overrides):
            plain = _at_home(Path(path), plain)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        named = (each for each in overrides if f"{error.full_key}.".startswith(f"{each.partition('=')[0]}."))
        where = next((f"override {each!r}" for each in named), path)
        raise UserError(f"{where}: {first_line(error)}") from error
    return validated(Config, plain)


SomeSection = TypeVar("SomeSection", bound=Section)


def validated(section: type[SomeSection], plain: Any, where: str = "") -> SomeSection:
    """A section, or the whole configuration, of plain values whose keys and types are checked.

    Args:
        where: the file, for messages.

    Raises:
        UserError: an unknown key, wrong type or missing value.
    """
    try:
        return section.model_validate(plain)
    except ValidationError as error:
        fault = error.errors()[0]
        known = _known_keys(section, fault["loc"][:-1]) if fault["type"] == "extra_forbidden" else ()
        raise UserError(f"{where}: {explain(error, '', known, plain)}".removeprefix(": ")) from error


def _known_keys(section: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; it can be run again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration to a file; see :func:`to_yaml`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
    except OSError as error:
        raise UserError(f"run_dir: cannot write to {str(path.parent)!r}: {error.strerror}") from error
