"""YAML and overrides to a checked configuration, before anything heavy is imported or built; and back to YAML."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from rae.config.arguments import explain
from rae.config.errors import UserError, first_line
from rae.config.sections import Config, Section


def override(loaded: DictConfig, overrides: Iterable[str]) -> None:
    """Set ``key.sub=value`` overrides in a mapping, in place.

    Raises:
        UserError: one of another form.
    """
    for each in overrides:
        if "=" not in each.lstrip("="):
            raise UserError(f"override {each!r} must have the form key=value or key.sub=value")
        # An override sets its key, so that model.encoder={mae: {}} replaces the encoder instead of adding one.
        key = each.split("=", 1)[0]
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([each]), resolve=False)
        for part in key.split("."):
            value = value[part]
        OmegaConf.update(loaded, key, value, merge=False)


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve interpolations, and check every key and type.

    Raises:
        UserError: the file is missing or not YAML; an unknown key, wrong type or missing value.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no configuration file {path!r}")
    try:
        loaded = OmegaConf.load(path)
        if isinstance(loaded, ListConfig):
            raise UserError(f"{path}: a configuration is a mapping of keys, not a list")
        override(loaded, overrides)
        missing = sorted(OmegaConf.missing_keys(loaded))
        if missing:
            raise UserError(f"missing value: {missing[0]} is required; set it in {path} or as {missing[0]}=…")
        plain = OmegaConf.to_container(loaded, resolve=True)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
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
        raise UserError(f"{where}: {explain(error, '', known)}".removeprefix(": ")) from error


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
