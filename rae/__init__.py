"""Train Representation Autoencoders on MosaicML Composer."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'rae' has no attribute {name!r}")
    from rae.exchange.exports import load  # imports Composer, which takes seconds: not before it is asked for

    return load
