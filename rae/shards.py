"""Writing and checking MDS shards of images: in parallel, in constant memory, and resumable.

A conversion is cut into parts of consecutive images. A worker process makes the shards of a part and then writes the
part's record; a conversion that was interrupted goes on with the parts that have none. ``index.json`` comes last.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from streaming import MDSWriter
from streaming.base.compression import decompress, is_compression
from streaming.base.format import reader_from_json
from streaming.base.format.base.reader import FileInfo
from streaming.base.hashing import is_hash
from streaming.base.util import bytes_to_int
from torchvision.io import encode_jpeg

from rae.config import is_remote
from rae.data import Reader, decode, first_line, resize_short_side, shard_fault, start_worker
from rae.registry import UserError
from rae.storage import RemoteFolder, reason

COLUMNS = {"image": "bytes", "label": "int", "path": "str"}
INDEX, SUMMARY, RECORDS = "index.json", "dataset.json", "conversion"
_READ_AHEAD = 16
"""Images that a worker requests from a bucket at a time."""


class ImageSource(Protocol):
    """A sequence of encoded images: ``source[i]`` is (name, file bytes, label).

    ``fingerprint`` changes with the list of images, ``remote`` says that reading one waits for a network.
    """

    classes: list[str]
    fingerprint: str
    remote: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes, int]: ...


@dataclass
class Options:
    """How shards are written.

    Args:
        out: local folder, or a URL such as ``s3://bucket/folder``.
        resize: bring the short side to this and re-encode as JPEG; None keeps the original bytes.
        quality: JPEG quality when re-encoding.
        workers: processes that read, check, encode and write.
        max_skipped: unreadable images to leave out before giving up.
        shard_size: largest shard, e.g. ``64mb``.
        compression: of shards, e.g. ``zstd``; images hardly compress further.
        hashes: of shards, in alphabetical order.
        keep_order: write in the source's order instead of a fixed shuffled one.
        overwrite: replace an existing data set, or an unfinished one.
    """

    out: str
    resize: int | None = None
    quality: int = 95
    workers: int = max(1, os.cpu_count() or 1)
    max_skipped: int = 0
    shard_size: str = "64mb"
    compression: str | None = None
    hashes: tuple[str, ...] = ("xxh64",)
    keep_order: bool = False
    overwrite: bool = False

    def content(self) -> dict[str, Any]:
        """The options that decide what the shards hold."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "workers", "max_skipped", "overwrite")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command-line form of :class:`Options`."""
    parser.add_argument("out", help="where the shards go: a local folder, or s3://bucket/folder")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="bring the short side to this, stored as JPEG")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality with --resize (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=Options.workers, help="processes (default: %(default)s)")
    parser.add_argument(
        "--max-skipped", type=int, default=0, metavar="N", help="leave out up to N unreadable images (default: 0)"
    )
    parser.add_argument("--shard-size", default="64mb", help="largest shard (default: %(default)s)")
    parser.add_argument("--compression", help="compress shards, e.g. zstd (images hardly shrink)")
    parser.add_argument(
        "--hashes",
        type=lambda text: tuple(sorted(set(text.split(",")))),
        default=Options.hashes,
        help="of shards, comma-separated: xxh64 (default), sha256, …",
    )
    parser.add_argument("--keep-order", action="store_true", help="keep the source's order (default: shuffled, fixed)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing or unfinished data set")


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
        size = bytes_to_int(options.shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size {options.shard_size!r}: write it as 64mb") from error
    if not 1024 <= size < 2**32:
        raise UserError(f"--shard-size {options.shard_size!r} must be between 1kb and 4gb")
    if options.compression is not None and not is_compression(options.compression):
        raise UserError(
            f"--compression {options.compression!r} is unknown; zstd, zstd:7, gz, bz2, br and snappy are known"
        )
    for algorithm in options.hashes:
        if not is_hash(algorithm):
            raise UserError(f"--hashes: {algorithm!r} is unknown; xxh64, xxh3_128, sha1 and sha256 are some")
    if options.max_skipped < 0:
        raise UserError(f"--max-skipped must not be negative, but is {options.max_skipped}")
    return options


def run_command(convert: Callable[[], None]) -> None:
    """Run a conversion command; a user's mistake or a full disk is one line and exit code 2, an interruption 130."""
    torch.set_num_threads(1)  # the worker processes are the threads
    try:
        convert()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where complete shards end", file=sys.stderr)
        sys.exit(130)


class Place:
    """Where a data set is written: a local folder that gets its name when it is complete, or a URL.

    Args:
        out: local folder or URL.
    """

    def __init__(self, out: str):
        self.out, self.remote = out.rstrip("/"), is_remote(out)
        self.folder = Path(f"{self.out}.partial")

    def read(self, name: str) -> Any:
        """A JSON file's content, or None."""
        try:
            with self.open(name) as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A file's content, as a file that is open for reading.

        Raises:
            FileNotFoundError: there is none.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = fetch(f"{self.out}/{name}", f"{folder}/file") if self.remote else self.folder / name
            if path is None:
                raise FileNotFoundError(f"{self.out}/{name}")
            with Path(path).open("rb") as file:
                yield file

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, wholly or not at all."""
        with _naming(f"{self.out}/{name}"), tempfile.TemporaryDirectory(dir=self.scratch(), prefix="part-") as folder:
            Path(folder, "file").write_text(json.dumps(content, ensure_ascii=False) + "\n")
            self.move(Path(folder, "file"), name)

    def move(self, file: Path, name: str) -> None:
        """Put a local file here under a name; it is gone from where it was."""
        if not self.remote:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(self.folder / name)
            return
        try:
            RemoteFolder(self.out).upload(file, name)
        except Exception as error:
            raise UserError(f"cannot write {self.out}/{name}: {reason(error)}") from error
        file.unlink()

    def scratch(self) -> str | None:
        """A folder for files to be moved here: on the same disk when that is local."""
        if self.remote:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder)

    def begin(self, plan: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        """The plan to follow: an unfinished conversion's, if it has the same content, or the given one.

        Raises:
            UserError: a data set is there already, or an unfinished one of other content.
        """
        if self.remote:
            RemoteFolder(self.out).check_writable("out")
        self.refuse_existing(overwrite)
        if overwrite and not self.remote:
            shutil.rmtree(self.folder, ignore_errors=True)
        plan = json.loads(json.dumps(plan))
        begun = None if overwrite else self.read(f"{RECORDS}/plan.json")
        if begun is None:
            self.write(f"{RECORDS}/plan.json", plan)
            return {**plan, "resumed": False}
        if any(begun.get(key) != plan[key] for key in ("source", "options")):
            raise UserError(
                f"{self.out if self.remote else self.folder} holds an unfinished conversion of other images or with "
                "other options; finish that one, or start anew with --overwrite"
            )
        return {**begun, "resumed": True}

    def refuse_existing(self, overwrite: bool) -> None:
        """Raise UserError when there is something here that must not be replaced."""
        hint = "give another place, or --overwrite to replace it"
        out = Path(self.out)
        if self.remote:
            if not overwrite and self.read(INDEX) is not None:
                raise UserError(f"{self.out} already holds a data set; {hint}")
        elif out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        elif out.exists() and not (out / INDEX).is_file():
            raise UserError(f"{self.out} exists and is not an MDS data set; give another place")
        elif out.exists() and not overwrite:
            raise UserError(f"{self.out} already exists; {hint}")

    def finish(self, summary: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        """Write the marker and the index; from then on the data set exists."""
        self.write(SUMMARY, summary)
        self.write(INDEX, {"version": 2, "shards": shards})
        if not self.remote:
            for unfinished in (self.folder / RECORDS, *self.folder.glob("part*-*")):
                shutil.rmtree(unfinished)
            if Path(self.out).exists():
                shutil.rmtree(self.out)
            self.folder.rename(self.out)


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    """Give an operating system's error (a full disk) the name of the file that was being written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, file) from error


def fetch(url: str, local: str) -> str | None:
    """Download a file; returns ``local``, or None when there is no such file.

    Raises:
        UserError: the store cannot be reached, or refuses.
    """
    folder, _, name = url.rpartition("/")
    try:
        RemoteFolder(folder).download(name, Path(local))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"cannot read {url}: {reason(error)}") from error
    return local


def shuffled(positions: np.ndarray, size: int) -> np.ndarray:
    """Where a fixed permutation of ``range(size)`` sends each position; no table of it is kept.

    A Feistel network permutes the next power of four; what falls outside the range is permuted again.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask, result = np.uint64(2**half - 1), positions.astype(np.uint64)
    todo = np.ones(len(result), bool)
    while todo.any():
        left, right = result[todo] >> np.uint64(half), result[todo] & mask
        for key in range(6):
            mixed = (right + np.uint64(key + 1)) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        result[todo] = (left << np.uint64(half)) | right
        todo = result >= size
    return result.astype(np.int64)


def encode(data: bytes, options: Options) -> bytes:
    """What is stored of an image file, which must decode: its bytes, or it resized as JPEG."""
    image = decode(data)
    if options.resize is None or (min(image.shape[1:]) == options.resize and data[:2] == b"\xff\xd8"):
        return data  # encoding again would only lose quality
    if min(image.shape[1:]) != options.resize:
        image = resize_short_side(image, options.resize)
    return encode_jpeg(image, options.quality).numpy().tobytes()


def write_shards(source: ImageSource, options: Options, first: int = 0, last: int | None = None) -> dict[str, Any]:
    """Write ``source`` as MDS shards with columns image (file bytes), label (int) and path (str).

    Args:
        first, last: write the images at these positions of the order only (of the shuffled one, unless it is kept).

    Returns:
        what ``dataset.json`` holds: images, bytes, classes, counts, skipped, options, seconds, content_hash.

    Raises:
        UserError: no images, an existing output, or more unreadable images than ``max_skipped``.
    """
    last = len(source) if last is None else last
    if last <= first:
        raise UserError("there are no images to convert")
    began, place = time.perf_counter(), Place(options.out)
    content: dict[str, Any] = {"source": f"{source.fingerprint} {first}:{last}", "options": options.content()}
    place.refuse_existing(options.overwrite)  # before the images are looked at
    plan = {**content, "part": _part_size(source, options, first, last)}
    plan = place.begin(plan, options.overwrite)
    job = Job(source, options, place, first, last, plan["part"], plan["resumed"])
    records, skipped = [], []
    for record in run_parts(_image_part, job, job.parts(), options.workers):
        records.append(record)
        skipped += record["skipped"]
        if len(skipped) > options.max_skipped:
            raise _too_many(skipped, options.max_skipped)
    return finish(place, records, source.classes, content["options"], time.perf_counter() - began)


def add_val_fraction(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`convert_splits` takes."""
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="put this share of the images into OUT/val, the rest into OUT/train",
    )


def convert_splits(source: ImageSource, options: Options, val_fraction: float | None) -> None:
    """Convert into ``OUT``, or a random share of the images into ``OUT/val`` and the rest into ``OUT/train``; report.

    Raises:
        UserError: a share that leaves a side empty, or the order is to be kept.
    """
    if val_fraction is None:
        report(write_shards(source, options), options.out)
        return
    held_out = round(val_fraction * len(source))
    if not 0 < held_out < len(source):
        raise UserError(f"--val-fraction {val_fraction} of {len(source)} images leaves nothing on one side")
    if options.keep_order:
        raise UserError("--val-fraction takes the images at random, so --keep-order cannot be had with it")
    for name, first, last in (("train", held_out, len(source)), ("val", 0, held_out)):
        into = replace(options, out=f"{options.out.rstrip('/')}/{name}")
        report(write_shards(source, into, first, last), into.out)


def finish(
    place: Place,
    records: list[dict[str, Any]],
    classes: list[str],
    options: dict[str, Any],
    seconds: float,
    **more: Any,
) -> dict[str, Any]:
    """Join the parts' records into ``index.json`` and ``dataset.json``; returns what the latter holds.

    Raises:
        UserError: there is no sample in them.
    """
    records = sorted(records, key=lambda record: record["part"])
    counts: collections.Counter[str] = collections.Counter()
    for record in records:
        counts.update(record["counts"])
    if not counts:
        raise UserError("none of the images could be read")
    shards = [shard for record in records for shard in record["shards"]]
    summary = {
        "images": sum(counts.values()),
        "bytes": sum(record["bytes"] for record in records),
        "classes": classes,
        "counts": [counts[str(label)] for label in range(len(classes))],
        "skipped": [skip for record in records for skip in record["skipped"]],
        "options": options,
        "seconds": round(seconds, 2),
        "content_hash": content_hash(shards),
        **more,
    }
    place.finish(summary, shards)
    return summary


def content_hash(shards: list[dict[str, Any]]) -> str:
    """SHA-256 of the hashes of an index's shards, in order: equal hashes mean equal data sets."""
    hashes = [sorted(shard["raw_data"]["hashes"].items()) for shard in shards]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _part_size(source: ImageSource, options: Options, first: int, last: int) -> int:
    """Images a part: about a shard's, as a sample of them says, but no fewer than 16 parts."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(16, len(source)), dtype=int):
        try:
            sizes.append(len(encode(source[int(index)][1], options)))
        except Exception:  # what cannot be read is reported when its turn comes
            continue
    a_shard = 0.95 * bytes_to_int(options.shard_size) / (np.mean(sizes) + 64) if sizes else 1
    return max(1, min(int(a_shard), -(-(last - first) // 16)))


def _too_many(skipped: list[dict[str, str]], limit: int) -> UserError:
    shown = "; ".join(f"{s['path']} ({s['reason']})" for s in skipped[:5])
    return UserError(
        f"{len(skipped)} unreadable image{'s' if len(skipped) > 1 else ''}, {limit} allowed: {shown}; "
        "mend or remove them, or leave them out with --max-skipped N"
    )


@dataclass
class Job:
    """What every worker of a conversion knows."""

    source: Any
    options: Options
    place: Place
    first: int
    last: int
    part_size: int
    resumed: bool

    def parts(self) -> range:
        """The numbers of the parts."""
        return range(-(-(self.last - self.first) // self.part_size))

    def indices(self, part: int) -> np.ndarray:
        """Which images a part holds."""
        begin = self.first + part * self.part_size
        positions = np.arange(begin, min(begin + self.part_size, self.last))
        return positions if self.options.keep_order else shuffled(positions, len(self.source))

    def done(self, part: int) -> dict[str, Any] | None:
        """The record of a part that an earlier run completed, with nothing left out, or None."""
        record = self.place.read(f"{RECORDS}/{part:06}.json") if self.resumed else None
        return record if record and not record["skipped"] else None


_worker: tuple[Callable[[Job, int], dict[str, Any]], Job, Any]


def run_parts(
    work: Callable[[Job, int], dict[str, Any]], job: Job, parts: Iterable[int], workers: int
) -> Iterator[dict[str, Any]]:
    """Run ``work(job, part)`` for every part in processes; yields the records as they come, with a progress bar."""
    fork = multiprocessing.get_context("fork")  # workers share the open files of a source
    stop = fork.Event()
    with concurrent.futures.ProcessPoolExecutor(workers, fork, _start, (work, job, stop)) as pool:
        futures = [pool.submit(_run, part) for part in parts]
        try:
            arriving: Iterable[Any] = concurrent.futures.as_completed(futures)
            if sys.stderr.isatty():
                console = Console(stderr=True)
                arriving = track(arriving, "shards", len(futures), console=console, transient=True)
            for future in arriving:
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError("a worker process was killed, perhaps for want of memory; use fewer --workers") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start(*arguments: Any) -> None:
    global _worker
    _worker = arguments  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to deal with
    start_worker(0)


def _run(part: int) -> dict[str, Any]:
    work, job, _ = _worker
    return job.done(part) or work(job, part)


def stopping() -> bool:
    """Whether the parent of this worker process wants it to end."""
    return _worker[2].is_set()


def _image_part(job: Job, part: int) -> dict[str, Any]:
    counts: collections.Counter[int] = collections.Counter()
    skipped, size = [], 0
    with PartWriter(job, part, COLUMNS) as writer:
        for name, data, label, fault in _read_encoded(job, part):
            if fault:
                skipped.append({"path": name, "reason": fault})
                if len(skipped) > job.options.max_skipped:
                    break
                continue
            writer.write({"image": data, "label": label, "path": name})
            counts[label] += 1
            size += len(data)
            if stopping():
                raise UserError("interrupted")
        return writer.finish(counts=counts, bytes=size, skipped=skipped)


def _read_encoded(job: Job, part: int) -> Iterator[tuple[str, bytes, int, str]]:
    for index, read in _read_ahead(job.source, job.indices(part)):
        name, label = f"image {index}", 0
        try:
            name, data, label = read()
            yield name, encode(data, job.options), label, ""
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's fault, not the image's
            yield name, b"", label, f"{type(error).__name__}: {first_line(error)}"
        except Exception as error:
            yield name, b"", label, f"{type(error).__name__}: {first_line(error)}"


def _read_ahead(source: Any, indices: np.ndarray) -> Iterator[tuple[int, Callable[[], Any]]]:
    if not source.remote:
        yield from ((int(i), lambda i=i: source[int(i)]) for i in indices)
        return
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for i in indices:
            waiting.append((int(i), pool.submit(source.__getitem__, int(i)).result))
            if len(waiting) >= _READ_AHEAD:
                yield waiting.popleft()
        yield from waiting


class PartWriter:
    """Writes the shards of one part, and then its record.

    Args:
        columns: names and MDS encodings.
    """

    def __init__(self, job: Job, part: int, columns: dict[str, str]):
        self.place, self.part = job.place, part
        self.folder = tempfile.TemporaryDirectory(dir=self.place.scratch(), prefix=f"part{part:06}-")
        self.writer = MDSWriter(
            out=self.folder.name,
            columns=columns,
            compression=job.options.compression,
            hashes=list(job.options.hashes),
            size_limit=job.options.shard_size,
        )

    def write(self, sample: dict[str, Any]) -> None:
        """Add a sample."""
        with self._naming():
            self.writer.write(sample)

    def _naming(self) -> contextlib.AbstractContextManager[None]:
        return _naming(f"{self.place.out}/shard.{self.part:05}.mds")

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.executor.shutdown()
        self.folder.cleanup()

    def finish(self, **record: Any) -> dict[str, Any]:
        """Move the shards to their place and write the record, which is returned."""
        if self.writer.new_samples:
            with self._naming():
                self.writer.flush_shard()
        # Before a sample that is larger than a shard, the writer leaves an empty one.
        shards = [shard for shard in self.writer.shards if shard["samples"]]
        for number, shard in enumerate(shards):
            name = f"shard.{self.part:05}" + (f".{number:03}" if number else "")
            for info in filter(None, (shard["raw_data"], shard["zip_data"])):
                written = Path(self.folder.name, info["basename"])
                info["basename"] = name + info["basename"][len("shard.00000") :]
                if written.exists():  # of a compressed shard, the raw form is not
                    self.place.move(written, info["basename"])
        whole = {"part": self.part, "shards": shards, **record}
        whole = json.loads(json.dumps(whole))  # the same whether it was just made or read
        self.place.write(f"{RECORDS}/{self.part:06}.json", whole)
        return whole


def report(summary: dict[str, Any], out: str) -> None:
    """Print what a conversion did as a table; what was left out, with reasons, as another."""
    console = Console(soft_wrap=True, highlight=False)
    rate = summary["images"] / max(summary["seconds"], 0.01)
    console.print(f"{out}: {summary['images']:,} images, {len(summary['classes'])} classes")
    table = Table("", "", show_header=False)
    table.add_row("images", f"{summary['images']:,}")
    table.add_row("classes", f"{len(summary['classes']):,}")
    table.add_row("bytes", f"{summary['bytes']:,}")
    table.add_row("seconds", f"{summary['seconds']:,}")
    table.add_row("images/s", f"{rate:,.0f}")
    table.add_row("left out", f"{len(summary['skipped']):,}")
    console.print(table)
    if summary["skipped"]:
        console.print(f"left out {len(summary['skipped'])} unreadable:")
        for skip in summary["skipped"][:20]:
            console.print(f"  {skip['path']}: {skip['reason']}", markup=False)
        console.print(f"all of it: {out}/{SUMMARY}")


def read_index(url: str) -> dict[str, Any]:
    """The content of a data set's ``index.json``.

    Raises:
        UserError: there is none, or it is no index.
    """
    name = f"{url.rstrip('/')}/{INDEX}"
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(name, f"{folder}/{INDEX}") if is_remote(url) else name
        if path is None or not os.path.isfile(path):
            raise UserError(f"there is no {name}, so it is no finished MDS data set")
        try:
            index = json.loads(Path(path).read_text())
            [reader_from_json("", None, shard) for shard in index["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name} is damaged: {type(error).__name__}: {first_line(error)}") from error
    return index


def verify(url: str, workers: int = Options.workers) -> tuple[int, list[str]]:
    """Compare every shard with its hashes and decode every image.

    Returns:
        the number of sound images, and every fault.

    Raises:
        UserError: there is no index.json, or it is no index.
    """
    index = read_index(url)
    faults = summary_faults(url, index)
    job = Job((url, index["shards"]), Options(url), Place(url), 0, len(index["shards"]), 1, False)
    sound = 0
    for record in run_parts(_check_shard, job, job.parts(), workers):
        sound += record["sound"]
        faults += record["faults"]
    return sound, sorted(faults)


def summary_faults(url: str, index: dict[str, Any]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        name = f"{url.rstrip('/')}/{SUMMARY}"
        path = fetch(name, f"{folder}/{SUMMARY}") if is_remote(url) else name
        if path is None or not os.path.isfile(path):
            return []  # written by another program
        try:
            summary = json.loads(Path(path).read_text())
            expected = (summary["images"], summary["content_hash"])
        except (ValueError, KeyError, TypeError) as error:
            return [f"{name} is damaged: {type(error).__name__}: {first_line(error)}"]
    found = (sum(shard["samples"] for shard in index["shards"]), content_hash(index["shards"]))
    return [] if found == expected else [f"{INDEX} is not that of {SUMMARY}: it lists {found[0]:,} images"]


def _check_shard(job: Job, part: int) -> dict[str, Any]:
    url, shards = job.source
    with tempfile.TemporaryDirectory() as folder:
        sound, faults = _shard_faults(url, shards[part], folder)
    return {"sound": sound, "faults": faults}


def _shard_faults(url: str, shard: dict[str, Any], folder: str) -> tuple[int, list[str]]:
    info = FileInfo(**(shard["zip_data"] or shard["raw_data"]))
    name = f"{url.rstrip('/')}/{info.basename}"
    path = fetch(name, f"{folder}/stored") if is_remote(url) else name
    if path is None or not os.path.isfile(path):
        return 0, [f"{name} is listed in {INDEX} but absent"]
    fault = shard_fault(path, info)
    if fault:
        return 0, [fault.replace(path, name)]
    if shard["zip_data"]:
        Path(folder, "raw").write_bytes(decompress(shard["compression"], Path(path).read_bytes()))
        path = f"{folder}/raw"
    raw = {**shard["raw_data"], "basename": os.path.basename(path)}
    reader = Reader.of(reader_from_json(os.path.dirname(path), None, {**shard, "raw_data": raw}))
    return _image_faults(reader, name)


def _image_faults(reader: Reader, name: str) -> tuple[int, list[str]]:
    faults = []
    for i in range(reader.samples):
        sample: dict[str, Any] = {}
        try:
            sample = reader[i]
            if isinstance(sample.get("image"), memoryview):  # beside latents, images are arrays
                decode(sample["image"])
        except Exception as error:
            faults.append(
                f"{name}: number {i} ({sample.get('path', 'unreadable')}) does not decode: {first_line(error)}"
            )
    return reader.samples - len(faults), faults
