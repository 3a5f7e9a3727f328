"""Options that several commands have, and what is made of them."""

import argparse
import os
import re
from typing import TYPE_CHECKING

from rae.config.errors import UserError

if TYPE_CHECKING:
    import torch


def add_source_arguments(parser: argparse.ArgumentParser, device: bool = True, weights: bool = True) -> None:
    """The options of every command that opens an autoencoder; see :func:`rae.exchange.sources.open_source`.

    Args:
        device: whether it computes.
        weights: whether it uses a run's decoder.
    """
    if weights:
        parser.add_argument(
            "--weights",
            type=_weights,
            default="ema",
            metavar="ema|ema:DECAY|live",
            help="the average of a run's weights, one of its further averages, or its last ones (default: ema)",
        )
    if device:
        parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU, if there is one)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the source's configuration, e.g. model.encoder.dinov2.pretrained=PATH",
    )
    parser.add_argument(
        "--imports",
        action="store_true",
        help="import the modules that an export's encoder or kind of model needs: run their code",
    )


def _weights(text: str) -> str:
    if text not in ("ema", "live") and not re.fullmatch(r"ema:(0|0?\.\d+)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of ema, ema:0.9999 (a further average's decay), live")
    return text


def check_counts(arguments: argparse.Namespace, *options: str) -> None:
    """Raise UserError for an option, by its attribute's name, that is given and less than 1."""

    for option in options:
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, not {value}")


def loading_workers(arguments: argparse.Namespace) -> int:
    """``--workers``, by default as many as there are cores, and no more than 8.

    Raises:
        UserError: it is negative.
    """

    if arguments.workers is not None and arguments.workers < 0:
        raise UserError(f"--workers must be 0 or more, not {arguments.workers}")
    return min(8, os.cpu_count() or 1) if arguments.workers is None else arguments.workers


def pick_device(name: str | None = None) -> "torch.device":
    """The device called ``name``; by default the first GPU, or the CPU where there is none.

    Raises:
        UserError: no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; write cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported; write cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name!r}: this machine has {torch.cuda.device_count() or 'no'} GPU that torch can use"
        )
    return device
