"""Images to MDS shards: what is stored of an image, the commands' options, and their report."""

import argparse
import collections
import concurrent.futures
import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
import xxhash
from rich.console import Console
from rich.table import Table
from streaming.base.compression import is_compression
from streaming.base.hashing import is_hash
from streaming.base.util import bytes_to_int
from torchvision.io import encode_jpeg

from rae.config.errors import UserError, first_line
from rae.data.decoding import decode_and_judge, refuse_strip, resize_short_side
from rae.data.kinds import Aside, said_of
from rae.data.parts import Job, Options, PartWriter, finish, run_parts, stopping
from rae.data.pixels import Background
from rae.data.shards import INDEX, RECORDS, SUMMARY, Place
from rae.survival.interrupts import INTERRUPTED, run_interruptibly
from rae.survival.storage import canonical

COLUMNS = {"image": "bytes", "label": "int", "path": "str"}
_LONGEST = 65500
"""Pixels a side of a JPEG, at the most."""
_READ_AHEAD = 16
"""Images that a worker requests from a bucket at a time."""


class ImageSource(Protocol):
    """A sequence of encoded images: ``source[i]`` is (name, file bytes, label), with label −1 for none.

    ``fingerprint`` changes with the list of images and with their files, ``remote`` says that reading one waits for a
    network, ``aside`` is what was passed over.
    """

    classes: list[str]
    fingerprint: str
    remote: bool
    aside: Aside

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes, int]: ...

    def caption(self, index: int, which: str) -> str:
        """An image's text, of the kind that ``--caption`` names; '' where it has none."""
        ...


def encode(data: bytes, options: Options) -> tuple[bytes, str]:
    """What is stored of an image file, its bytes or it resized as JPEG; and what is amiss with it if it decodes still.

    Raises:
        ValueError: it does not decode, or is too narrow to be resized.
    """
    image, damage = decode_and_judge(data, options.background)
    if options.resize is None or (min(image.shape[1:]) == options.resize and data[:2] == b"\xff\xd8"):
        return data, damage  # encoding again would only lose quality
    if min(image.shape[1:]) != options.resize:
        refuse_strip(image, options.resize, _LONGEST)
        image = resize_short_side(image, options.resize)
    return encode_jpeg(image, options.quality).numpy().tobytes(), damage


def write_shards(
    source: ImageSource, options: Options, first: int = 0, last: int | None = None
) -> dict[str, Any] | None:
    """Write ``source`` as MDS shards with columns image (file bytes), label (int), path (str) and caption if asked.

    Args:
        first, last: write the images at these positions of the order only (of the shuffled one, unless it is kept).

    Returns:
        what ``dataset.json`` holds: images, bytes, classes, counts, unlabelled, skipped, passed_over, options, seconds,
        content_hash. None while other processes have parts of it to write.

    Raises:
        UserError: no images, an existing output, or more unreadable images than ``max_skipped``.
    """
    last = len(source) if last is None else last
    if last <= first:
        raise UserError("there are no images to convert")
    began, place = time.perf_counter(), Place(options.out)
    classes = [] if options.no_labels else source.classes
    named = xxhash.xxh3_128_hexdigest("\0".join(classes))
    content: dict[str, Any] = {"source": f"{source.fingerprint} {named} {first}:{last}", "options": options.content()}
    place.refuse_existing(options.overwrite)  # before the images are looked at
    plan = {**content, "part": _part_size(source, options, first, last)}
    plan = place.begin(plan, options.overwrite)
    job = Job(source, options, place, first, last, plan["part"], plan["resumed"] or options.part is not None)
    records, skipped = [], []
    for record in run_parts(_image_part, job):
        records.append(record)
        skipped += record["skipped"]
        if len(skipped) > options.max_skipped:
            raise _too_many(skipped, options.max_skipped)
    seconds = time.perf_counter() - began
    if options.part is not None:
        records = [place.read(f"{RECORDS}/{part:06}.json") for part in job.parts()]
        if None in records:
            return None
        skipped = [each for record in records for each in record["skipped"]]
        if len(skipped) > options.max_skipped:  # a part that was given up for them is not whole
            raise _too_many(skipped, options.max_skipped)
    if options.caption and not any(record["captions"] for record in records):
        raise UserError(f"--caption {options.caption}: no image has such a text")
    try:
        return finish(place, records, classes, options.content(), seconds, source.aside.kinds)
    except FileNotFoundError:
        if options.part is None or not Path(options.out, INDEX).is_file():
            raise
        return None  # another part has ended at the same moment, and finished it


def _part_size(source: ImageSource, options: Options, first: int, last: int) -> int:
    """Images a part: about a shard's, as a sample of them says, but no fewer than 16 parts."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(16, len(source)), dtype=int):
        try:
            sizes.append(len(encode(source[int(index)][1], options)[0]))
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


def _image_part(job: Job, part: int) -> dict[str, Any]:
    counts: collections.Counter[int] = collections.Counter()
    skipped, damaged, size, texts = [], [], 0, 0
    columns = COLUMNS | ({"caption": "str"} if job.options.caption else {})
    with PartWriter(job, part, columns) as writer:
        for sample, fault, damage in _read_encoded(job, part):
            if fault:
                skipped.append({"path": sample["path"], "reason": fault})
                if len(skipped) > job.options.max_skipped:
                    break
                continue
            writer.write(sample)
            damaged += [{"path": sample["path"], "reason": damage}] if damage else []
            counts[sample["label"]] += 1
            size += len(sample["image"])
            texts += bool(sample.get("caption"))
            if stopping():
                raise UserError("interrupted")
        return writer.finish(counts=counts, bytes=size, captions=texts, skipped=skipped, damaged=damaged)


def _read_encoded(job: Job, part: int) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Samples, each with what is wrong with it or '', and what is amiss with it though it decodes."""
    for index, read in _read_ahead(_read(job), job.source.remote, job.indices(part)):
        sample = {"path": f"image {index}"}
        try:
            sample = read()
            stored, damage = encode(sample["image"], job.options)
            yield sample | {"image": stored}, "", damage
        except Exception as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EACCES):
                raise  # the disk's fault, not the image's
            yield sample, f"{type(error).__name__}: {first_line(error)}", ""


def _read(job: Job) -> Callable[[int], dict[str, Any]]:
    source, options = job.source, job.options

    def read(index: int) -> dict[str, Any]:
        name, data, label = source[index]
        sample = {"image": data, "label": -1 if options.no_labels else label, "path": name}
        return sample | ({"caption": source.caption(index, options.caption)} if options.caption else {})

    return read


def _read_ahead(read: Callable[[int], Any], remote: bool, indices: np.ndarray) -> Iterator[tuple[int, Callable]]:
    if not remote:
        yield from ((int(i), functools.partial(read, int(i))) for i in indices)
        return
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for i in indices:
            waiting.append((int(i), pool.submit(read, int(i)).result))
            if len(waiting) >= _READ_AHEAD:
                yield waiting.popleft()
        yield from waiting


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command-line form of :class:`Options`."""
    parser.add_argument("out", help="where the shards go: a local folder, or s3://bucket/folder")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="bring the short side to this, stored as JPEG")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality with --resize (default: %(default)s)")
    parser.add_argument(
        "--background",
        choices=get_args(Background),
        default=Options.background,
        help="with --resize, what is seen where an image is transparent (default: %(default)s; drop: its colours)",
    )
    parser.add_argument("--workers", type=int, default=Options.workers, help="processes (default: %(default)s)")
    parser.add_argument(
        "--max-skipped", type=int, default=0, metavar="N", help="leave out up to N unreadable images (default: 0)"
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="write the K-th of N parts, the others being other processes', on this machine or others; the last to end "
        "finishes the data set",
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
    parser.add_argument("--no-labels", action="store_true", help="store no labels, whatever the source says")
    parser.add_argument(
        "--caption",
        metavar="WHICH",
        help="keep texts as a column: of files beside the images (txt, json), or a column's name",
    )


def options_from(arguments: argparse.Namespace) -> Options:
    """Checked :class:`Options` from parsed arguments.

    Raises:
        UserError: a value out of range.
    """
    options = Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
    for name, low, high in (("resize", 1, _LONGEST), ("quality", 1, 100), ("workers", 1, 1024)):
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
    if options.part and options.overwrite:
        raise UserError("--part leaves what other parts have written; delete OUT yourself, in the place of --overwrite")
    if options.max_skipped < 0:
        raise UserError(f"--max-skipped must not be negative, but is {options.max_skipped}")
    return options


def refuse_inside(out: str, source: str) -> None:
    """Raise UserError where shards would be written among the images that are read, or replace them."""
    if canonical(out).startswith(canonical(source).rstrip("/") + "/"):
        raise UserError(f"{out} is inside {source}, whose images are read; give another place")
    if canonical(source).startswith(canonical(out) + "/") and os.path.isfile(f"{out}/{INDEX}"):
        raise UserError(f"{source} is inside {out}, a data set that would be replaced; give another place")


def add_val_fraction(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`convert_splits` takes."""
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="put this share of the images into OUT/val, the rest into OUT/train",
    )


def _part(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not (index.isdigit() and count.isdigit()) or not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as 3/8, of 1/8 to 8/8")
    return int(index), int(count)


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


def report(summary: dict[str, Any] | None, out: str) -> None:
    """Print what a conversion did as a table; what was left out, with reasons, as another."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if summary is None:
        console.print(f"{out}: this part is written; the last of the others to end finishes the data set")
        return
    skipped, damaged, rate = summary["skipped"], summary["damaged"], summary["images"] / max(summary["seconds"], 0.01)
    console.print(f"{out}: {summary['images']:,} images, {len(summary['classes'])} classes")
    table = Table("", "", show_header=False)
    told = {name: f"{summary[name]:,}" for name in ("images", "bytes", "seconds")}
    told |= {"classes": f"{len(summary['classes']):,}", "without a class": f"{summary['unlabelled']:,}"}
    told |= {"captions": f"{summary['captions']:,}"} if summary["options"].get("caption") else {}
    told |= {"images/s": f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}", "left out": f"{len(skipped):,}"}
    told |= {"damaged": f"{len(damaged):,}"} if damaged else {}
    for name, value in told.items():
        table.add_row(name, value)
    console.print(table)
    if summary["classes"] == ["."]:
        console.print("no image is in a sub-folder, so all are of one class")
    for listed, what in ((skipped, "left out {} unreadable:"), (damaged, "kept {} damaged, which decode in part:")):
        if listed:
            console.print(what.format(len(listed)))
            for each in listed[:20]:
                console.print(f"  {each['path']}: {each['reason']}")
    if passed := summary["passed_over"]:
        console.print(said_of(passed))
        for kind, each in passed.items():
            more = ", …" * (each["count"] > 10)
            console.print(f"  {kind}: {', '.join(each['names'][:10])}{more}")
    if skipped or damaged or passed:
        console.print(f"all of it: {out}/{SUMMARY}")


def run_command(convert: Callable[[], None]) -> None:
    """Run a conversion command; a user's mistake or a full disk is one line and exit code 2, an interruption 130."""
    torch.set_num_threads(1)  # the worker processes are the threads
    try:
        run_interruptibly(convert, INTERRUPTED)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
