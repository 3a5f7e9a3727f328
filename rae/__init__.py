"""Train Representation Autoencoders on MosaicML Composer.

What plugins and scripts import is named here, and is loaded when it is first asked for.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

from rae.config.errors import NotInstalledError

__version__ = "0.1.0"

APART = ("mosaicml==0.32.1", "mosaicml-cli==0.7.5", "mosaicml-streaming==0.13.0")
"""What is installed without its dependencies; see pyproject.toml."""

_PUBLIC = {
    "load": "rae.exchange.sources",
    "register": "rae.config.registry",
    "TimeString": "rae.config.times",
    "Encoder": "rae.autoencoder.encoders",
    "LossTerm": "rae.algorithms",
    "PerImage": "rae.evaluation.metrics",
    "RunModel": "rae.model",
    "Generator": "rae.diffusion.generator",
    "RAE": "rae.autoencoder.rae",
    "Decoder": "rae.autoencoder.decoder",
    "load_published": "rae.autoencoder.decoder",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rae' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


class _Moved(MetaPathFinder, Loader):
    """Finds modules under the names that the guide had for them before, which users' plugins still import.

    It is asked last, so it also says what to do about a library that is not there.
    """

    places = {  # noqa: RUF012 - a table
        "rae.registry": ["rae.config.registry", "rae.config.times", "rae.config.arguments", "rae.config.errors"],
        "rae.encoders": ["rae.autoencoder.encoders"],
        "rae.decoder": ["rae.autoencoder.decoder"],
        "rae.losses": ["rae.autoencoder.losses"],
        "rae.metrics": ["rae.evaluation.metrics", "rae.evaluation.frechet"],
        "rae.demo": ["rae.commands.demo"],
    }

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname in ("composer", "streaming"):  # and no other finder has found it
            raise NotInstalledError(f"{fullname} is not installed: pip install --no-deps {' '.join(APART)}")
        known = ".".join(fullname.split(".")[:2]) in self.places
        return ModuleSpec(fullname, self, is_package=fullname != "rae.demo") if known else None

    def get_code(self, fullname: str) -> CodeType:
        """What ``python -m rae.demo`` runs."""
        return compile("import sys; from rae.__main__ import main; main(['demo', *sys.argv[1:]])", fullname, "exec")

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        before = ".".join(module.__name__.split(".")[:2])

        def find(name: str) -> Any:
            for place in self.places[before]:
                now = importlib.import_module(place + module.__name__.removeprefix(before))
                if hasattr(now, name):
                    return getattr(now, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(_Moved())
