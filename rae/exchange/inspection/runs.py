"""What a run and its checkpoints hold."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.config.errors import UserError
from rae.exchange.inspection.report import Report, Row, add_config, add_figures, wrong_size
from rae.exchange.places import local_file
from rae.exchange.restoring import load_file
from rae.exchange.sources import checkpoints_of_run
from rae.survival import checkpoints
from rae.survival.checkpoints import DamagedError, Listed
from rae.survival.storage import is_remote


def inspect_run(path: str, names: set[str], local: Path, verify: bool, scratch: Path) -> Report:
    report = Report("a folder of checkpoints")
    config = None
    if checkpoints.CONFIG in names:
        report.kind = "a run"
        config = add_config(local / checkpoints.CONFIG, f"{path}/{checkpoints.CONFIG}", report)
    rows: list[Row] = [("checkpoint", "epochs", "steps", "bytes", "state")]
    for folder, checkpoint in checkpoints_of_run(path, config):
        fault, size = _whole(folder, checkpoint, verify, scratch)
        batch, epoch = checkpoints.age(checkpoint.name)
        form = "sharded" if checkpoints.SHARDED in checkpoint.files else "one file"
        state = f"damaged: {fault}" if fault else f"complete, {form}"
        rows.append((checkpoint.name, f"{epoch:,}", f"{batch:,}", f"{size:,}", state if checkpoint.parts else fault))
        if fault and checkpoint.parts:
            report.faults.append(f"{checkpoint.name}: {fault}")
    report.tables["checkpoints"] = rows
    if checkpoints.METRICS in names:
        add_figures(report, local / checkpoints.METRICS, f"{path}/{checkpoints.METRICS}")
    return report


def _whole(folder: str, checkpoint: Listed, verify: bool, scratch: Path) -> tuple[str, int]:
    """What is wrong with a checkpoint, and the bytes that it should have, by its seals."""
    if not checkpoint.parts:
        return "incomplete: its writing was cut short", 0
    where = f"{folder.rstrip('/')}/{checkpoint.name}"
    try:
        sealed: dict[str, int] = {}
        for part in checkpoint.parts:
            files = checkpoints.read_seal(local_file(f"{where}/{part}", scratch))[1]
            sealed |= {file: int(held["bytes"]) for file, held in files.items()}
        _check_sizes(where, checkpoint, sealed)
        if verify:
            checkpoints.fetch(folder, checkpoint, scratch / "fetched")
    except (DamagedError, UserError) as error:
        return str(error), 0
    return "", sum(sealed.values())


def _check_sizes(where: str, checkpoint: Listed, sealed: dict[str, int]) -> None:
    for file, expected in sealed.items():
        if file not in checkpoint.files:
            raise DamagedError(f"{file} is missing")
        if fault := wrong_size(f"{where}/{file}", expected):
            raise DamagedError(fault)


def inspect_checkpoint(folder: str, checkpoint: Listed, verify: bool, scratch: Path) -> Report:
    batch, epoch = checkpoints.age(checkpoint.name)
    where = f"{folder.rstrip('/')}/{checkpoint.name}"
    fault, size = _whole(folder, checkpoint, verify, scratch)
    sharded = checkpoints.SHARDED in checkpoint.files
    report = Report("a checkpoint, sharded" if sharded else "a checkpoint", faults=[fault] if fault else [])
    report.tables["checkpoint"] = [("epochs", f"{epoch:,}"), ("steps", f"{batch:,}"), ("bytes", f"{size:,}")]
    for file in {checkpoints.CONFIG, checkpoints.METRICS, checkpoints.SHARDED} & checkpoint.files:
        local_file(f"{where}/{file}", scratch)
    local = scratch if is_remote(folder) else Path(where)
    if checkpoints.CONFIG in checkpoint.files:
        add_config(local / checkpoints.CONFIG, f"{where}/{checkpoints.CONFIG}", report)
    if checkpoints.METRICS in checkpoint.files:
        add_figures(report, local / checkpoints.METRICS, f"{where}/{checkpoints.METRICS}")
    if fault:
        return report
    try:
        if sharded:
            report.tables["contents"] = _sharded_contents(local)
        elif not is_remote(folder):
            report.tables["contents"] = contents(load_file(local / checkpoints.STATE, where)["state"])
    except (DamagedError, UserError) as error:
        report.faults.append(str(error))
    return report


def _sharded_contents(folder: Path) -> list[Row]:
    """See :func:`_by_part`, out of the metadata alone."""
    metadata = checkpoints.check_metadata(folder)
    sizes = Counter[str]()
    for index, stored in metadata.storage_data.items():
        sizes[index.fqn] += stored.length
    return _by_part(
        (tuple(name.removeprefix("state.").split(".")), getattr(held, "size", torch.Size([0])).numel(), sizes[name])
        for name, held in metadata.state_dict_metadata.items()
    )


def contents(state: dict[str, Any]) -> list[Row]:
    tensors = _tensors({**state, "algorithms": dict(state.get("algorithms") or [])})
    return _by_part((path, tensor.numel(), tensor.nbytes) for path, tensor in tensors.items())


def _by_part(entries: Iterable[tuple[tuple[str, ...], int, int]]) -> list[Row]:
    """Entries, numbers and bytes of each part, the largest first, out of (path, numbers, bytes) of each entry."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for path, numbers, size in entries:
        totals[_part(path)].update(entries=1, numbers=numbers, bytes=size)
    columns = ("entries", "numbers", "bytes")
    largest_first = sorted(totals.items(), key=lambda item: -item[1]["bytes"])
    return [("part", *columns), *((part, *(f"{total[c]:,}" for c in columns)) for part, total in largest_first)]


def _part(path: tuple[str, ...]) -> str:
    if path[0] == "model":
        name = ".".join(path[1:])
        return f"model: {'latent statistics' if re.search(r'latent_(mean|var)$', name) else _network(name)}"
    return f"{path[1]}: {path[2]}" if path[0] == "algorithms" and len(path) > 2 else path[0]


def _network(name: str) -> str:
    """``rae.decoder.blocks.0.…`` -> ``decoder``, and of another kind of model ``network.0.weight`` -> ``network``."""
    return next(part for part in name.split(".") if part != "rae")


def _tensors(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Tensor]:
    if isinstance(tree, Tensor):
        return {path: tree}
    items: Iterable[Any] = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, (list, tuple)) else items
    return {name: t for key, value in items for name, t in _tensors(value, (*path, str(key))).items()}
