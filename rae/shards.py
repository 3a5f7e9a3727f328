"""Writing images as MDS shards, whatever they come from: checked, re-encoded if wanted, and never half finished."""

import argparse
import collections
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from streaming import MDSWriter
from streaming.base.compression import is_compression
from streaming.base.util import bytes_to_int
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rae.config import is_remote
from rae.data import open_rgb, start_worker
from rae.registry import UserError
from rae.storage import RemoteFolder

COLUMNS = {"image": "bytes", "label": "int", "path": "str"}
SUMMARY = "dataset.json"


class ImageSource(Protocol):
    """A sequence of encoded images: ``source[i]`` is (name, file bytes, label)."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes, int]: ...


@dataclass
class Options:
    """How shards are written.

    Args:
        out: local folder, or a URL such as ``s3://bucket/folder``.
        resize: shrink to this short side and re-encode as JPEG; None keeps the original bytes.
        quality: JPEG quality when re-encoding.
        workers: processes that read, check and encode.
        max_skipped: unreadable images to leave out before giving up.
        shard_size: largest shard, e.g. ``64mb``.
        compression: of shards, e.g. ``zstd``; images hardly compress further.
        keep_order: write in the source's order instead of a fixed shuffled one.
        overwrite: replace an existing data set.
    """

    out: str
    resize: int | None = None
    quality: int = 95
    workers: int = max(1, os.cpu_count() or 1)
    max_skipped: int = 0
    shard_size: str = "64mb"
    compression: str | None = None
    keep_order: bool = False
    overwrite: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command-line form of :class:`Options`."""
    parser.add_argument("out", help="where the shards go: a local folder, or s3://bucket/folder")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="shrink to this short side and re-encode as JPEG")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality with --resize (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=Options.workers, help="processes (default: %(default)s)")
    parser.add_argument(
        "--max-skipped", type=int, default=0, metavar="N", help="leave out up to N unreadable images (default: 0)"
    )
    parser.add_argument("--shard-size", default="64mb", help="largest shard (default: %(default)s)")
    parser.add_argument("--compression", help="compress shards, e.g. zstd (images hardly shrink)")
    parser.add_argument("--keep-order", action="store_true", help="keep the source's order (default: shuffled, fixed)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")


def options_from(arguments: argparse.Namespace) -> Options:
    """Checked :class:`Options` from parsed arguments.

    Raises:
        UserError: a value out of range.
    """
    options = Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
    for name, low, high in (("resize", 1, 65500), ("quality", 1, 100), ("workers", 1, 1024)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must be between {low} and {high}, not {value}")
    try:
        bytes_to_int(options.shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size {options.shard_size!r}: write it as 64mb") from error
    if options.compression is not None and not is_compression(options.compression):
        raise UserError(
            f"--compression {options.compression!r} is unknown; zstd, zstd:7, gz, bz2, br and snappy are known"
        )
    if options.max_skipped < 0:
        raise UserError(f"--max-skipped must not be negative, but is {options.max_skipped}")
    return options


def run_command(convert: Any) -> None:
    """Run a conversion command; a user's mistake is one line and exit code 2, an interruption 130."""
    try:
        convert()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the data set is not finished", file=sys.stderr)
        sys.exit(130)


def write_shards(source: ImageSource, options: Options) -> dict[str, Any]:
    """Write ``source`` as MDS shards with columns image (file bytes), label (int) and path (str).

    The data set appears at ``options.out`` when it is complete: locally by a rename, remotely because
    ``index.json`` goes last. ``dataset.json`` beside the shards holds the classes, counts and options.

    Returns:
        what ``dataset.json`` holds.

    Raises:
        UserError: no images, an existing output, or more unreadable images than ``max_skipped``.
    """
    if len(source) == 0:
        raise UserError("there are no images to convert")
    remote = is_remote(options.out)
    _refuse_existing(options, remote)
    began = time.perf_counter()
    if remote:
        staging = Path(tempfile.mkdtemp(prefix="rae-shards-"))
        target: Any = (str(staging / "shards"), options.out)
    else:
        staging = Path(f"{options.out.rstrip('/')}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        target = str(staging)
    try:
        summary = _write(source, options, target)
        summary["seconds"] = round(time.perf_counter() - began, 2)
        if remote:
            (staging / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            RemoteFolder(options.out).upload(staging / SUMMARY, SUMMARY)
        else:
            (staging / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            if options.overwrite:
                shutil.rmtree(options.out, ignore_errors=True)
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            staging.rename(options.out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return summary


def _refuse_existing(options: Options, remote: bool) -> None:
    hint = "give another place, or --overwrite to replace it"
    if not remote:
        out = Path(options.out)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        elif out.exists() and not (out / "index.json").is_file():
            raise UserError(f"{options.out} exists and is not an MDS data set; give another place")
        elif out.exists() and not options.overwrite:
            raise UserError(f"{options.out} already exists; {hint}")
        return
    folder = RemoteFolder(options.out)
    folder.check_writable("out")
    if options.overwrite:
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder.download("index.json", Path(scratch, "index.json"))
        except FileNotFoundError:
            return
    raise UserError(f"{options.out} already holds a data set; {hint}")


def _write(source: ImageSource, options: Options, target: Any) -> dict[str, Any]:
    counts: collections.Counter[int] = collections.Counter()
    skipped: list[dict[str, str]] = []
    size = 0
    with MDSWriter(
        out=target,
        columns=COLUMNS,
        compression=options.compression,
        hashes=["xxh64"],
        size_limit=options.shard_size,
        exist_ok=True,
    ) as writer:
        for name, data, label, fault in tqdm(
            _encoded(source, options), total=len(source), unit="image", disable=not sys.stderr.isatty()
        ):
            if fault:
                skipped.append({"path": name, "reason": fault})
                if len(skipped) > options.max_skipped:
                    raise _too_many(skipped, options.max_skipped)
                continue
            writer.write({"image": data, "label": label, "path": name})
            counts[label] += 1
            size += len(data)
        if not counts:
            raise UserError("none of the images could be read")
    return {
        "images": sum(counts.values()),
        "bytes": size,
        "classes": source.classes,
        "counts": [counts[label] for label in range(len(source.classes))],
        "skipped": skipped,
        "options": asdict(options),
    }


def _too_many(skipped: list[dict[str, str]], limit: int) -> UserError:
    shown = "; ".join(f"{s['path']} ({s['reason']})" for s in skipped[:5])
    return UserError(
        f"{len(skipped)} unreadable image{'s' if len(skipped) > 1 else ''}, {limit} allowed: {shown}; "
        "mend or remove them, or leave them out with --max-skipped N"
    )


def _encoded(source: ImageSource, options: Options) -> Iterator[tuple[str, bytes, int, str]]:
    order = np.arange(len(source))
    if not options.keep_order:
        order = np.random.default_rng(0).permutation(order)
    # A loader is an ordered, bounded pool of processes: memory stays the same however many images there are.
    loader = DataLoader(
        _Encode(source, options),
        batch_size=16,
        sampler=order,  # type: ignore[arg-type]
        num_workers=options.workers,
        collate_fn=list,
        worker_init_fn=start_worker,
        prefetch_factor=4,
    )
    for batch in loader:
        yield from batch


class _Encode(Dataset):
    """(name, bytes to store, label, fault); a fault is the reason why an image cannot be read, or empty."""

    def __init__(self, source: ImageSource, options: Options):
        self.source, self.options = source, options

    def __getitem__(self, index: int) -> tuple[str, bytes, int, str]:
        name, data, label = f"image {int(index)}", b"", 0
        try:
            name, data, label = self.source[int(index)]
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = open_rgb(data)
        except Exception as error:
            return name, b"", label, f"{type(error).__name__}: {str(error).strip() or 'unreadable'}"
        if self.options.resize:
            data = _shrink(image, data, self.options.resize, self.options.quality)
        return name, data, label, ""


def _shrink(image: Image.Image, data: bytes, short_side: int, quality: int) -> bytes:
    if min(image.size) > short_side:
        scale = short_side / min(image.size)
        size = tuple(max(short_side, round(side * scale)) for side in image.size)
        image = image.resize(size, resample=Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    elif data[:2] == b"\xff\xd8":
        return data  # encoding again would only lose quality
    encoded = io.BytesIO()
    image.save(encoded, format="JPEG", quality=quality)
    return encoded.getvalue()


def report(summary: dict[str, Any], out: str) -> str:
    """What a conversion did, in a few lines."""
    rate = summary["images"] / max(summary["seconds"], 0.01)
    lines = [
        f"{out}: {summary['images']:,} images, {len(summary['classes'])} classes, {summary['bytes'] / 1e6:,.1f} MB, "
        f"{summary['seconds']} s ({rate:,.0f} images/s)"
    ]
    if summary["skipped"]:
        lines.append(f"left out {len(summary['skipped'])} unreadable:")
        lines += [f"  {s['path']}: {s['reason']}" for s in summary["skipped"]]
    return "\n".join(lines)
