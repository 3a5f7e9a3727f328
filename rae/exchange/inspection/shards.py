"""What a data set of MDS shards holds."""

from pathlib import Path
from typing import Any

from rae.data.shards import SUMMARY, read_index, summary_faults
from rae.exchange.inspection.report import Report, Row, wrong_size
from rae.exchange.places import read_json
from rae.survival.storage import is_remote


def inspect_shards(path: str, names: set[str], local: Path) -> Report:
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
