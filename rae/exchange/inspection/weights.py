"""What exports and files of weights hold, read from their headers."""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.autoencoder.backbones import check_tensors
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.decoder_weights import DecoderWeights, find_decoder
from rae.config.arguments import plugin_text
from rae.config.errors import UserError
from rae.config.sections import Model
from rae.exchange import diffusers_format, exports, places, published
from rae.exchange.exports import Exported, read_exported
from rae.exchange.inspection.report import Report, Row, add_config, add_label_figures, size_of_file, wrong_size
from rae.exchange.inspection.runs import contents
from rae.exchange.places import list_names, local_file, read_json
from rae.exchange.restoring import load_file
from rae.survival.checkpoints import CONFIG
from rae.survival.storage import RemoteFolder, is_remote


def inspect_file(path: str, scratch: Path) -> Report:
    file = local_file(path, scratch)
    content = load_file(file, path)
    size = ("bytes", f"{file.stat().st_size:,}")
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        report = Report("a Composer checkpoint file", {"file": [size], "contents": contents(content["state"])})
        beside = file.parent / CONFIG
        if beside.is_file() and not is_remote(path):
            add_config(beside, str(beside), report)
        return report
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)} if isinstance(content, dict) else {}
    if {"mean", "var"} <= tensors.keys():
        return Report("latent statistics", {"statistics": [size, *_statistics(tensors)]})
    decoders = {which: find_decoder(content, which) for which in ("ema", "live")}
    if decoder := decoders["ema"]:
        return Report(_decoder_kind(decoder, decoders["live"]), {"decoder": [size, *_decoder_rows(decoder, path)]})
    if tensors:
        numbers = sum(t.numel() for t in tensors.values())
        counts = [("tensors", f"{len(tensors):,}"), ("numbers", f"{numbers:,}"), ("first", next(iter(tensors)))]
        return Report("weights of another model", {"file": [size, *counts]})
    raise UserError(f"{path} holds no tensors by name, but a {type(content).__name__}")


def inspect_tensor_file(path: str) -> Report:
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


def _decoder_kind(decoder: DecoderWeights, live: DecoderWeights | None) -> str:
    if live is not None and decoder.inside != live.inside:
        return f"a training checkpoint of the public code: its average, {decoder.inside!r}, is what begin_from takes"
    inside = f", in {decoder.inside!r}" if decoder.inside else ""
    beside = f" beside {len(decoder.others):,} other tensors" if decoder.others else ""
    return f"a published decoder{inside}{beside}" if "decoder_embed.weight" in decoder.state else f"a decoder{beside}"


def _decoder_rows(decoder: DecoderWeights, path: str) -> list[Row]:
    state = decoder.ours(path)
    sizes, image_size = published.sizes_of(state)
    positions = "trained" if sizes.pop("trainable_positions") else "fixed sin-cos"
    parameters = sum(t.numel() for name, t in state.items() if name != "positions")
    return [
        ("latent channels", str(state["embed.weight"].shape[1])),
        *((key.replace("_", " "), str(value or "not known")) for key, value in sizes.items()),
        ("image size", str(image_size or "not known")),
        ("positions", positions),
        ("parameters", f"{parameters:,}"),
    ]


def inspect_export(path: str, names: set[str], local: Path, scratch: Path) -> Report:
    content = read_json(local / places.CONFIG, f"{path}/{places.CONFIG}")
    if content.get("_class_name") == diffusers_format.CLASS:
        return _diffusers(path, names, content, scratch)
    if published.DECODER in names and "decoder_hidden_size" in content:
        report = inspect_file(f"{path}/{published.DECODER}", scratch)
        heads = content.get(published.SIZE_KEYS["num_heads"])
        report.tables["decoder"] = [
            row if row[0] != "num heads" else (row[0], str(heads)) for row in report.tables["decoder"]
        ]
        if published.STATS in names:
            report.tables |= inspect_file(f"{path}/{published.STATS}", scratch).tables
        return report
    if content.get("format") != "rae":
        kind = content.get("_class_name") or content.get("model_type") or "an unknown program"
        raise UserError(f"{path}/{places.CONFIG} is that of {kind}, which is not known here")
    return _ours(path, names, read_exported(local, path))


def _ours(path: str, names: set[str], about: Exported) -> Report:
    report = Report("an export, for rae.load")
    moment = ", ".join(f"{key} {value:,}" for key, value in about.trained.items())
    included = exports.includes_encoder(about.model)
    report.tables["export"] = [
        ("name", about.name),
        ("image size", str(about.image_size)),
        _kind(about.model, included),
        ("weights", about.weights),
        ("trained", moment or "not known"),
    ]
    if about.imports:
        report.tables["export"].append(("needs", ", ".join(about.imports)))
    if included and not any(name.split("/")[0] == places.ENCODER for name in names):
        report.faults.append(f"{places.ENCODER}/ is missing")
    shapes = _header(path, places.WEIGHTS, names, report)
    if shapes:
        report.tables["weights"] = _by_prefix(shapes)
        if isinstance(about.model, Model):
            _check_decoder(about.model, about.image_size, shapes, report)
    add_label_figures(report, about.figures)
    return report


def _kind(settings: Model | dict[str, Any], included: bool) -> Row:
    if isinstance(settings, Model):
        return "encoder", plugin_text(settings.encoder) + (", included" if included else ", not included")
    return "model", plugin_text(settings)


def _check_decoder(settings: Model, image_size: int, shapes: dict[str, torch.Size], report: Report) -> None:
    """Compare the tensors with those of the decoder that the configuration describes, which is not built."""
    width = shapes.get("decoder.embed.weight", torch.Size([0, 0]))[-1]
    try:
        with torch.device("meta"):
            decoder = Decoder(width, image_size, **settings.decoder.model_dump(exclude={"weights"}))
            held = {name: torch.empty(shape) for name, shape in shapes.items() if not name.startswith("latent_")}
        expected = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
        check_tensors(held, expected, places.WEIGHTS)
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
    report.tables.setdefault("files", []).append((file, f"{size_of_file(where):,} bytes"))
    report.faults += filter(None, [wrong_size(where, expected)])
    return shapes


def _head(path: str, count: int) -> bytes:
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read(count)
    folder, _, name = path.rpartition("/")
    return RemoteFolder(folder).head(name, count)
