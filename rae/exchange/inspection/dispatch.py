"""What a run, checkpoint, export, weight file or data set holds, read from headers; nothing in it is executed."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rae.config.errors import UserError
from rae.data.shards import INDEX, SUMMARY, read_index, summary_faults
from rae.exchange import places, published
from rae.exchange.inspection.report import Report, Row, wrong_size
from rae.exchange.inspection.runs import inspect_checkpoint, inspect_run
from rae.exchange.inspection.weights import inspect_export, inspect_file, inspect_tensor_file
from rae.exchange.places import first_of, list_names, local_file, read_json
from rae.survival.checkpoints import CONFIG, METRICS, is_name, list_checkpoints
from rae.survival.storage import is_remote

_SMALL = {places.CONFIG, CONFIG, METRICS, SUMMARY}


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
            return inspect_file(path, Path(scratch))
        if path.endswith(".safetensors"):
            return inspect_tensor_file(path)
        return _folder(path, verify, Path(scratch))


def _folder(path: str, verify: bool, scratch: Path) -> Report:
    names = list_names(path)
    parent, _, name = path.rpartition("/")
    for file in names & _SMALL:
        local_file(f"{path}/{file}", scratch)
    local = scratch if is_remote(path) else Path(path)
    if is_name(name):
        listed = [each for each in list_checkpoints(parent or ".") if each.name == name]
        return (
            inspect_checkpoint(parent or ".", listed[0], verify, scratch) if listed else Report("an empty checkpoint")
        )
    if INDEX in names:
        return _shards(path, names, local)
    if places.CONFIG in names:
        return inspect_export(path, names, local, scratch)
    if published.DECODER in names:
        return inspect_file(f"{path}/{published.DECODER}", scratch)
    if (
        CONFIG in names
        or any(is_name(part) for each in names for part in each.split("/")[:2])
        or "checkpoints" in names
    ):
        return inspect_run(path, names, local, verify, scratch)
    raise UserError(f"{path} holds nothing that is known here: {first_of(names) or 'it is empty'}")


def _shards(path: str, names: set[str], local: Path) -> Report:
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
        report.faults += filter(None, (wrong_size(f"{path}/{each['basename']}", each["bytes"]) for each in there))
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
