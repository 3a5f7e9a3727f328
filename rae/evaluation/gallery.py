"""Reconstructions as a web page: one file that needs no server, no connection and no other file."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from torch import Tensor

from rae.evaluation.pictures import SCALE, colours, difference_map, split, text_of
from rae.evaluation.reconstruction import ORIGINALS, Record, folder_of, higher_is_better, summarize, worst_first

SIDE = 256
"""Pictures on the page are at most so many pixels a side."""
QUALITY = 90
"""Of their WebP encoding."""
_BARS = 32
_LABELS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "feature_distance": "Feature distance"}


@dataclass(frozen=True)
class View:
    """One of the pictures that a card shows."""

    key: str
    label: str
    folder: str
    noised: bool = False


def write_gallery(
    path: Path,
    records: Sequence[Record],
    title: str,
    about: Mapping[str, str],
    taus: Sequence[float] = (),
    most: int = 500,
) -> int:
    """Write the page; pictures are read from the folder that it is written to, one image at a time.

    Args:
        path: the HTML file, in the folder of :mod:`rae.evaluation.reconstruction`'s pictures.
        title: its heading.
        about: facts of the model and the settings; its weights, trained and date go into the line below the title.
        taus: noise levels of which there are reconstructions.
        most: images shown; of more, :func:`choose` takes these.

    Returns:
        How many images it shows. The totals are those of all records in any case.
    """
    chosen, folder = choose(records, most), path.parent
    views = _views(taus)
    metrics = _metrics(records, chosen, views)
    size = Image.open(folder / ORIGINALS / records[0].file).width
    lead = [f"{about['weights']} weights", about["trained"], f"{size} × {size} pixels", about["date"]]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("gallery.html")
    page = template.stream(
        title=title,
        lead=lead,
        facts=about.items(),
        note=_note(len(chosen), len(records), size),
        metrics=metrics,
        views=views,
        scale=SCALE,
        ramp=", ".join(f"rgb({r} {g} {b})" for r, g, b in colours()[::15]),
        side=min(size, SIDE),
        folders_shown=any("/" in records[i].name for i in chosen),
        pixelated=size < SIDE // 2,
        higher=[metric["key"] for metric in metrics if metric["higher"]],
        labels={view.key: view.label for view in views},
        folders={view.key: view.folder for view in views},
        attributes={metric["key"]: f"m{i}" for i, metric in enumerate(metrics)},
        cards=_cards(folder, [records[i] for i in chosen], views),
    )
    with open(path, "wb") as file:
        page.dump(file, encoding="utf-8")
    return len(chosen)


def choose(records: Sequence[Record], most: int) -> list[int]:
    """Indices of at most so many records, in order: half the worst by each figure in turn, half spread evenly.

    The spread is over the ranking by the first figure, so that the page shows what is usual, too.
    """
    if len(records) <= most:
        return list(range(len(records)))
    rankings = [worst_first(records, name) for name in records[0].figures]
    turns = (index for row in zip(*rankings, strict=True) for index in row)
    chosen: dict[int, None] = {}
    for index in turns:
        if len(chosen) >= max(1, most // 2):
            break
        chosen[index] = None
    rest = [index for index in rankings[0] if index not in chosen]
    places = np.linspace(0, len(rest) - 1, most - len(chosen)).round().astype(int)
    return sorted([*chosen, *(rest[place] for place in places)])


def _views(taus: Sequence[float]) -> list[View]:
    noised = [View(f"noised{i}", f"τ = {tau:g}", folder_of(tau), True) for i, tau in enumerate(taus)]
    return [
        View("original", "Original", ORIGINALS),
        View("recon", "Reconstruction", folder_of(0.0)),
        View("difference", "Difference", "comparisons"),
        *noised,
    ]


def _metrics(records: Sequence[Record], chosen: Sequence[int], views: Sequence[View]) -> list[dict[str, Any]]:
    """What the page says of each figure: texts, and the heights of a histogram's bars from 0 to 1."""
    cards = {record: card for card, record in enumerate(chosen)}
    view_of = {view.folder: view.key for view in views}
    metrics: list[dict[str, Any]] = []
    for figure, total in summarize(records).items():
        name, tau = split(figure)
        values = np.array([record.figures[figure] for record in records])
        values = values[np.isfinite(values)]
        counts, edges = np.histogram(values, bins=_BARS) if len(values) else (np.zeros(_BARS), np.zeros(2))
        metric = {
            "place": len(metrics),
            "key": figure,
            "name": name,
            "noise": f"τ = {tau:g}" if tau else "",
            "view": view_of[folder_of(tau)],
            "label": _LABELS.get(name, name.replace("_", " ")),
            "unit": "dB" if name == "psnr" else "",
            "higher": higher_is_better(name),
            "mean": text_of(name, total.mean),
            "median": text_of(name, total.median),
            "worst": text_of(name, records[total.worst].figures[figure]),
            "worst_name": records[total.worst].name,
            "worst_card": cards.get(total.worst),
            "low": text_of(name, edges[0]),
            "high": text_of(name, edges[-1]),
            "bars": [count / max(1, counts.max()) for count in counts.tolist()],
        }
        metrics.append(metric)
    return metrics


def _note(shown: int, total: int, size: int) -> str:
    shrunk = f"at most {SIDE} pixels a side, " if size > SIDE else ""
    parts = [
        f"Pictures on this page are WebP of quality {QUALITY}, {shrunk}for looking at. The figures are of the 8-bit "
        f"images of {size}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{size}, which lie beside it as PNG."
    ]
    if shown < total:
        parts.append(
            f"It shows {shown:,} of {total:,} images: half of them the worst by each figure, half spread evenly over "
            "the ranking. The totals are of all images, and figures.csv lists them all."
        )
    return " ".join(parts)


def _cards(folder: Path, records: Sequence[Record], views: Sequence[View]) -> Iterator[dict[str, Any]]:
    for record in records:
        stored = (view for view in views if view.key != "difference")
        pictures = {view.key: _read(folder / view.folder / record.file) for view in stored}
        pictures["difference"] = difference_map(_tensor(pictures["original"]), _tensor(pictures["recon"]))
        yield {
            "name": record.name,
            "base": record.name.rpartition("/")[2],
            "folder": record.name.rpartition("/")[0],
            "file": record.file,
            "figures": [text_of(name, value) for name, value in record.figures.items()],
            "raw": [str(value).replace("inf", "Infinity") for value in record.figures.values()],
            "pictures": {key: _embedded(picture) for key, picture in pictures.items()},
        }


def _read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _embedded(picture: Image.Image) -> str:
    """A picture as a data URI."""
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
