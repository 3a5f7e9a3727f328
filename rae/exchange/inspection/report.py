"""What an inspection tells: tables by title, and faults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae.config.arguments import plugin_text
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.sections import Config, Model
from rae.exchange import exports
from rae.exchange.places import read_json
from rae.survival.storage import RemoteFolder, is_remote

Row = tuple[str, ...]


@dataclass
class Report:
    """What was found.

    Args:
        kind: what it is, in a phrase.
        tables: rows by title.
        faults: what is wrong with it, a line each.
    """

    kind: str
    tables: dict[str, list[Row]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def size_of_file(path: str) -> int:
    if not is_remote(path):
        return Path(path).stat().st_size
    folder, _, name = path.rpartition("/")
    return RemoteFolder(folder).size(name)


def wrong_size(path: str, expected: int) -> str:
    """What is to be said of a file with another number of bytes."""
    size = size_of_file(path)
    return "" if size == expected else f"{path.rpartition('/')[2]} has {size:,} bytes instead of {expected:,}"


def add_config(file: Path, where: str, report: Report) -> Config | None:
    """The configuration, if it can be read, whose highlights go into the report."""
    try:
        config = load_config(str(file))
    except UserError as error:
        report.faults.append(str(error).replace(str(file), where))
        return None
    data, streams = config.data, [stream.path for stream in config.data.train.streams.values()]
    report.tables["configuration"] = [
        ("run", config.run_name),
        *_model(config.model),
        ("images", f"{data.image_size} px, batch {data.batch_size}, from {data.train.path or ', '.join(streams)}"),
        ("algorithms", ", ".join(config.algorithms) or "none"),
        ("optimizer", plugin_text(config.optimizer)),
        ("length", str(config.trainer.get("max_duration"))),
        ("parallelism", config.parallelism),
    ]
    return config


def _model(settings: Model | dict[str, Any]) -> list[Row]:
    if not isinstance(settings, Model):
        return [("model", plugin_text(settings))]
    sizes = {key: value for key, value in settings.decoder.model_dump().items() if value not in (None, False)}
    return [
        ("encoder", plugin_text(settings.encoder)),
        ("decoder", ", ".join(f"{key} {value}" for key, value in sizes.items())),
        ("latent noise", f"τ = {settings.noise_tau} ({settings.noise})"),
    ]


def add_figures(report: Report, file: Path, where: str) -> None:
    try:
        record = read_json(file, where)
    except UserError as error:
        report.faults.append(str(error))
        return
    batch = record.pop("batch", None)
    add_label_figures(report, record, f"figures after {batch:,} steps" if isinstance(batch, int) else "figures")


def add_label_figures(report: Report, figures: Mapping[str, Any], title: str = "figures") -> None:
    rows: list[Row] = [
        (label, "\n".join(f"{name} {exports.figure_text(value)}" for name, value in values.items()))
        for label, values in figures.items()
        if isinstance(values, dict)
    ]
    if rows:
        report.tables[title] = rows
