"""What a run, checkpoint, export, weight file or data set holds, read from headers; nothing in it is executed."""

import json
import math
import pickle
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from rae.autoencoder.backbones import check_tensors
from rae.autoencoder.decoder import Decoder
from rae.config.registry import UserError
from rae.config.sections import Config, is_remote, load_config
from rae.data.shards import INDEX, SUMMARY, read_index, summary_faults
from rae.exchange import diffusers_format, exports, published
from rae.exchange.exports import Exported, local_file, read_exported, read_json
from rae.exchange.sources import checkpoints_of_run, list_names
from rae.survival.checkpoints import (
    CONFIG,
    METRICS,
    SHARDED,
    STATE,
    DamagedError,
    Listed,
    age,
    check_metadata,
    check_whole,
    fetch,
    is_name,
    list_checkpoints,
    read_seal,
    refused,
    without_code,
)
from rae.survival.storage import RemoteFolder, reason

_SMALL = (exports.CONFIG, CONFIG, METRICS, SUMMARY)
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


def inspect(path: str, verify: bool = False) -> Report:
    """Look into a folder or file, local or a URL.

    Args:
        verify: compare the bytes of checkpoints with their hashes too, which reads them (and downloads remote ones).

    Raises:
        UserError: there is nothing, or nothing that is known here.
    """
    path = path.rstrip("/") or path[:1]
    with TemporaryDirectory(prefix="rae-") as scratch:
        if path.endswith((".pt", ".pth")):
            return _file(path, Path(scratch))
        if path.endswith(".safetensors"):
            return _tensor_file(path)
        return _folder(path, verify, Path(scratch))


def _folder(path: str, verify: bool, scratch: Path) -> Report:
    names = list_names(path)
    parent, _, name = path.rpartition("/")
    for file in _SMALL:
        if file in names and is_remote(path):
            local_file(f"{path}/{file}", scratch)
    local = scratch if is_remote(path) else Path(path)
    if is_name(name):
        listed = [each for each in list_checkpoints(parent or ".") if each.name == name]
        return _checkpoint(parent or ".", listed[0], verify, scratch) if listed else Report("an empty checkpoint")
    if INDEX in names:
        return _data_set(path, names, local)
    if exports.CONFIG in names:
        return _exported(path, names, local, scratch)
    if published.DECODER in names:
        return _file(f"{path}/{published.DECODER}", scratch)
    if (
        CONFIG in names
        or any(is_name(part) for each in names for part in each.split("/")[:2])
        or "checkpoints" in names
    ):
        return _run(path, names, local, verify, scratch)
    found = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
    raise UserError(f"{path} holds nothing that is known here: {found or 'it is empty'}")


def _run(path: str, names: set[str], local: Path, verify: bool, scratch: Path) -> Report:
    report = Report("a folder of checkpoints")
    config = None
    if CONFIG in names:
        report.kind = "a run"
        config = _config(local / CONFIG, f"{path}/{CONFIG}", report)
    rows: list[Row] = [("checkpoint", "epochs", "steps", "bytes", "state")]
    for folder, checkpoint in checkpoints_of_run(path, config):
        fault, size = _whole(folder, checkpoint, verify, scratch)
        batch, epoch = age(checkpoint.name)
        form = "sharded" if SHARDED in checkpoint.files else "one file"
        state = f"damaged: {fault}" if fault else f"complete, {form}"
        rows.append((checkpoint.name, f"{epoch:,}", f"{batch:,}", f"{size:,}", state if checkpoint.parts else fault))
        if fault and checkpoint.parts:
            report.faults.append(f"{checkpoint.name}: {fault}")
    report.tables["checkpoints"] = rows
    if METRICS in names:
        _add_figures(report, local / METRICS, f"{path}/{METRICS}")
    return report


def _whole(folder: str, checkpoint: Listed, verify: bool, scratch: Path) -> tuple[str, int]:
    """What is wrong with a checkpoint, and the bytes that it should have, by its seals."""
    if not checkpoint.parts:
        return "incomplete: its writing was cut short", 0
    where = f"{folder.rstrip('/')}/{checkpoint.name}"
    try:
        sealed: dict[str, int] = {}
        for part in checkpoint.parts:
            files = read_seal(local_file(f"{where}/{part}", scratch))[1]
            sealed |= {file: int(held["bytes"]) for file, held in files.items()}
        _check_sizes(where, checkpoint, sealed)
        if verify:
            fetch(folder, checkpoint, scratch / "fetched")
    except (DamagedError, UserError) as error:
        return str(error), 0
    return "", sum(sealed.values())


def _check_sizes(where: str, checkpoint: Listed, sealed: dict[str, int]) -> None:
    for file, expected in sealed.items():
        if file not in checkpoint.files:
            raise DamagedError(f"{file} is missing")
        if fault := _wrong_size(f"{where}/{file}", expected):
            raise DamagedError(fault)


def _size(path: str) -> int:
    if not is_remote(path):
        return Path(path).stat().st_size
    folder, _, name = path.rpartition("/")
    return RemoteFolder(folder).size(name)


def _wrong_size(path: str, expected: int) -> str:
    """What is to be said of a file with another number of bytes."""
    size = _size(path)
    return "" if size == expected else f"{path.rpartition('/')[2]} has {size:,} bytes instead of {expected:,}"


def _checkpoint(folder: str, checkpoint: Listed, verify: bool, scratch: Path) -> Report:
    batch, epoch = age(checkpoint.name)
    where = f"{folder.rstrip('/')}/{checkpoint.name}"
    fault, size = _whole(folder, checkpoint, verify, scratch)
    sharded = SHARDED in checkpoint.files
    report = Report("a checkpoint, sharded" if sharded else "a checkpoint", faults=[fault] if fault else [])
    report.tables["checkpoint"] = [("epochs", f"{epoch:,}"), ("steps", f"{batch:,}"), ("bytes", f"{size:,}")]
    for file in {CONFIG, METRICS, SHARDED} & checkpoint.files:
        local_file(f"{where}/{file}", scratch)
    local = scratch if is_remote(folder) else Path(where)
    if CONFIG in checkpoint.files:
        _config(local / CONFIG, f"{where}/{CONFIG}", report)
    if METRICS in checkpoint.files:
        _add_figures(report, local / METRICS, f"{where}/{METRICS}")
    if fault:
        return report
    if sharded:
        try:
            report.tables["contents"] = _sharded_contents(local)
        except DamagedError as error:
            report.faults.append(str(error))
    elif not is_remote(folder):
        try:
            report.tables["contents"] = _contents(_load(local / STATE, where)["state"])
        except UserError as error:
            report.faults.append(str(error))
    return report


def _sharded_contents(folder: Path) -> list[Row]:
    """See :func:`_by_part`, out of the metadata alone."""
    metadata = check_metadata(folder)
    sizes = Counter[str]()
    for index, stored in metadata.storage_data.items():
        sizes[index.fqn] += stored.length
    return _by_part(
        (tuple(name.removeprefix("state.").split(".")), getattr(held, "size", torch.Size([0])).numel(), sizes[name])
        for name, held in metadata.state_dict_metadata.items()
    )


def _contents(state: dict[str, Any]) -> list[Row]:
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
        return "model: decoder" if "decoder" in path[1:3] or "decoder." in path[1] else "model: latent statistics"
    return f"{path[1]}: {path[2]}" if path[0] == "algorithms" and len(path) > 2 else path[0]


def _tensors(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Tensor]:
    if isinstance(tree, Tensor):
        return {path: tree}
    items: Iterable[Any] = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, (list, tuple)) else items
    return {name: t for key, value in items for name, t in _tensors(value, (*path, str(key))).items()}


def _load(file: Path, where: str) -> Any:
    """A ``.pt`` file's content, without code; its tensors stay on the disk."""
    try:
        check_whole(file)
        with without_code():
            return torch.load(file, map_location="cpu", mmap=True)
    except DamagedError as error:
        raise UserError(f"{where}: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} holds {refused(error)}") from error
    except Exception as error:
        raise UserError(f"{where} cannot be read: {reason(error)}") from error


def _file(path: str, scratch: Path) -> Report:
    file = local_file(path, scratch)
    content = _load(file, path)
    size = ("bytes", f"{file.stat().st_size:,}")
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        report = Report("a Composer checkpoint file", {"file": [size], "contents": _contents(content["state"])})
        beside = file.parent / CONFIG
        if beside.is_file() and not is_remote(path):
            _config(beside, str(beside), report)
        return report
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)} if isinstance(content, dict) else {}
    if {"mean", "var"} <= tensors.keys():
        return Report("latent statistics", {"statistics": [size, *_statistics(tensors)]})
    names = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    if published.is_decoder(names):
        return Report("a published decoder", {"decoder": [size, *_published_sizes(names)]})
    if tensors:
        numbers = sum(t.numel() for t in tensors.values())
        counts = [("tensors", f"{len(tensors):,}"), ("numbers", f"{numbers:,}"), ("first", next(iter(tensors)))]
        return Report("weights of another model", {"file": [size, *counts]})
    raise UserError(f"{path} holds no tensors by name, but a {type(content).__name__}")


def _tensor_file(path: str) -> Report:
    folder, _, name = path.rpartition("/")
    report = Report("weights of some model")
    if shapes := _header(folder or ".", name, list_names(folder or "."), report):
        report.tables["weights"] = _by_prefix(shapes)
    return report


def _statistics(tensors: Mapping[str, Tensor]) -> list[Row]:
    mean, std = tensors["mean"].float(), (tensors["var"].float() + 1e-5).sqrt()
    rows: list[Row] = [("shape", " × ".join(map(str, mean.shape)))]
    for name, values in (("mean", mean), ("standard deviation", std)):
        rows.append((name, f"{values.min():.4g} to {values.max():.4g}, on average {values.mean():.4g}"))
    return rows


def _published_sizes(state: Mapping[str, Tensor]) -> list[Row]:
    sizes, image_size = published.sizes_of(state)
    fixed = "trained" if sizes["trainable_positions"] else "fixed sin-cos"
    rows: list[Row] = [
        (key.replace("_", " "), str(value)) for key, value in sizes.items() if key != "trainable_positions"
    ]
    parameters = sum(t.numel() for name, t in state.items() if name != "decoder_pos_embed")
    return [
        ("latent channels", str(state["decoder_embed.weight"].shape[1])),
        *rows,
        ("image size", str(image_size)),
        ("positions", fixed),
        ("parameters", f"{parameters:,}"),
    ]


def _exported(path: str, names: set[str], local: Path, scratch: Path) -> Report:
    content = read_json(local / exports.CONFIG, f"{path}/{exports.CONFIG}")
    if content.get("_class_name") == diffusers_format.CLASS:
        return _diffusers(path, names, content, scratch)
    if published.DECODER in names and "decoder_hidden_size" in content:
        report = _file(f"{path}/{published.DECODER}", scratch)
        heads = content.get(published.SIZE_KEYS["num_heads"])
        report.tables["decoder"] = [
            row if row[0] != "num heads" else (row[0], str(heads)) for row in report.tables["decoder"]
        ]
        if published.STATS in names:
            report.tables |= _file(f"{path}/{published.STATS}", scratch).tables
        return report
    if content.get("format") != "rae":
        kind = content.get("_class_name") or content.get("model_type") or "an unknown program"
        raise UserError(f"{path}/{exports.CONFIG} is that of {kind}, which is not known here")
    return _ours(path, names, read_exported(local, path))


def _ours(path: str, names: set[str], about: Exported) -> Report:
    report = Report("an export, for rae.load")
    moment = ", ".join(f"{key} {value:,}" for key, value in about.trained.items())
    included = exports.includes_encoder(about.model)
    report.tables["export"] = [
        ("name", about.name),
        ("image size", str(about.image_size)),
        ("encoder", _plugin(about.model.encoder) + (", included" if included else ", not included")),
        ("weights", about.weights),
        ("trained", moment or "not known"),
    ]
    if about.imports:
        report.tables["export"].append(("needs", ", ".join(about.imports)))
    if included and not any(name.split("/")[0] == exports.ENCODER for name in names):
        report.faults.append(f"{exports.ENCODER}/ is missing")
    shapes = _header(path, exports.WEIGHTS, names, report)
    if shapes:
        report.tables["weights"] = _by_prefix(shapes)
        _check_decoder(about, shapes, report)
    _add_label_figures(report, about.figures)
    return report


def _check_decoder(about: Exported, shapes: dict[str, torch.Size], report: Report) -> None:
    """Compare the tensors with those of the decoder that the configuration describes, which is not built."""
    width = shapes.get("decoder.embed.weight", torch.Size([0, 0]))[-1]
    try:
        with torch.device("meta"):
            decoder = Decoder(width, about.image_size, **about.model.decoder.model_dump(exclude={"weights"}))
            held = {name: torch.empty(shape) for name, shape in shapes.items() if not name.startswith("latent_")}
        expected = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
        check_tensors(held, expected, exports.WEIGHTS)
    except (UserError, ValueError) as error:
        report.faults.append(str(error))


def _diffusers(path: str, names: set[str], content: dict[str, Any], scratch: Path) -> Report:
    report = Report("a diffusers folder of AutoencoderRAE")
    told = {key: value for key, value in content.items() if not key.startswith(("_", "latents_"))}
    report.tables["configuration"] = [(key, str(value)) for key, value in told.items()]
    report.tables["configuration"].append(("latent statistics", "yes" if content.get("latents_std") else "no"))
    index = f"{diffusers_format.WEIGHTS}.index.json"
    files = [diffusers_format.WEIGHTS]
    if diffusers_format.WEIGHTS not in names and index in names:
        listed = read_json(local_file(f"{path}/{index}", scratch), f"{path}/{index}")
        files = sorted(set(listed.get("weight_map", {}).values()))
    shapes: dict[str, torch.Size] = {}
    for file in files:
        shapes |= _header(path, file, names, report)
    if shapes:
        report.tables["weights"] = _by_prefix(shapes)
    return report


def _by_prefix(shapes: Mapping[str, torch.Size]) -> list[Row]:
    parts: dict[str, list[int]] = defaultdict(list)
    for name, shape in shapes.items():
        statistics = name.lstrip("_").startswith(("latent", "encoder_"))
        parts["statistics" if statistics else name.split(".")[0]].append(math.prod(shape))
    rows: list[Row] = [(part, f"{len(sizes):,}", f"{sum(sizes):,}") for part, sizes in parts.items()]
    return [("part", "tensors", "numbers"), *rows]


def _header(path: str, file: str, names: set[str], report: Report) -> dict[str, torch.Size]:
    """The shapes in a safetensors file, of which only the header is read; faults go into the report."""
    if file not in names:
        report.faults.append(f"{file} is missing")
        return {}
    where = f"{path}/{file}"
    try:
        (length,) = struct.unpack("<Q", _head(where, 8))
        if length > 100_000_000:
            raise ValueError("its header is too long")
        header = json.loads(_head(where, 8 + length)[8:])
        header.pop("__metadata__", None)
        expected = 8 + length + max((held["data_offsets"][1] for held in header.values()), default=0)
        shapes = {name: torch.Size(held["shape"]) for name, held in header.items()}
    except (ValueError, KeyError, TypeError, struct.error) as error:
        report.faults.append(f"{file} is damaged: {' '.join(str(error).split())}")
        return {}
    report.tables.setdefault("files", []).append((file, f"{_size(where):,} bytes"))
    report.faults += filter(None, [_wrong_size(where, expected)])
    return shapes


def _head(path: str, count: int) -> bytes:
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read(count)
    folder, _, name = path.rpartition("/")
    return RemoteFolder(folder).head(name, count)


def _data_set(path: str, names: set[str], local: Path) -> Report:
    index = read_index(path)
    shards = index["shards"]
    stored = [shard["zip_data"] or shard["raw_data"] for shard in shards]
    report = Report("a data set of MDS shards")
    rows: list[Row] = [
        ("samples", f"{sum(shard['samples'] for shard in shards):,}"),
        ("shards", f"{len(shards):,}"),
        ("bytes", f"{sum(each['bytes'] for each in stored):,}"),
    ]
    if shards:
        first = shards[0]
        columns = zip(first["column_names"], first["column_encodings"], strict=True)
        rows.append(("columns", ", ".join(f"{name} ({encoding})" for name, encoding in columns)))
        rows.append(("compression", str(first["compression"] or "none")))
        rows.append(("hashes", ", ".join(first["hashes"]) or "none"))
    report.tables["data"] = rows
    report.faults += summary_faults(path, index)
    absent = [each["basename"] for each in stored if each["basename"] not in names]
    if absent:
        report.faults.append(f"{len(absent)} of {len(shards)} shards are missing, such as {absent[0]}")
    if not is_remote(path):
        there = (each for each in stored if each["basename"] in names)
        report.faults += filter(None, (_wrong_size(f"{path}/{each['basename']}", each["bytes"]) for each in there))
    if SUMMARY in names and not report.faults:
        rows += _summary(read_json(local / SUMMARY, f"{path}/{SUMMARY}"))
    if "stat.pt" in names:
        rows.append(("latent statistics", "stat.pt"))
    return report


def _summary(summary: dict[str, Any]) -> list[Row]:
    classes, options = summary["classes"], summary["options"]
    shown = ", ".join(map(str, classes[:5])) + (", …" if len(classes) > 5 else "")
    set_options = {key: value for key, value in options.items() if value not in (None, False)}
    return [
        ("classes", f"{len(classes):,}: {shown}"),
        ("left out", f"{len(summary['skipped']):,}"),
        ("written with", ", ".join(f"{key} {value}" for key, value in set_options.items())),
        ("content hash", summary["content_hash"][:16]),
    ]


def _config(file: Path, where: str, report: Report) -> Config | None:
    """The configuration, if it can be read, whose highlights go into the report."""
    try:
        config = load_config(str(file))
    except UserError as error:
        report.faults.append(str(error).replace(str(file), where))
        return None
    model, data = config.model, config.data
    sizes = {key: value for key, value in model.decoder.model_dump().items() if value not in (None, False)}
    streams = [stream.path for stream in data.train.streams.values()]
    report.tables["configuration"] = [
        ("run", config.run_name),
        ("encoder", _plugin(model.encoder)),
        ("decoder", ", ".join(f"{key} {value}" for key, value in sizes.items())),
        ("images", f"{data.image_size} px, batch {data.batch_size}, from {data.train.path or ', '.join(streams)}"),
        ("latent noise", f"τ = {model.noise_tau} ({model.noise})"),
        ("algorithms", ", ".join(config.algorithms) or "none"),
        ("optimizer", _plugin(config.optimizer)),
        ("length", str(config.trainer.get("max_duration"))),
        ("parallelism", config.parallelism),
    ]
    return config


def _plugin(entry: Any) -> str:
    if isinstance(entry, str) or not entry:
        return str(entry)
    ((name, arguments),) = entry.items()
    return f"{name} ({', '.join(f'{key} {value}' for key, value in arguments.items())})" if arguments else name


def _add_figures(report: Report, file: Path, where: str) -> None:
    try:
        record = read_json(file, where)
    except UserError as error:
        report.faults.append(str(error))
        return
    batch = record.pop("batch", None)
    _add_label_figures(report, record, f"figures after {batch:,} steps" if isinstance(batch, int) else "figures")


def _add_label_figures(report: Report, figures: Mapping[str, Any], title: str = "figures") -> None:
    rows: list[Row] = [
        (label, "\n".join(f"{name} {exports.figure_text(value)}" for name, value in values.items()))
        for label, values in figures.items()
        if isinstance(values, dict)
    ]
    if rows:
        report.tables[title] = rows
