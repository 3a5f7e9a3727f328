"""Writing MDS shards in parts: in processes, in constant memory, and resumable.

The work is cut into parts of consecutive samples. A worker makes the shards of a part, then writes the part's record;
work that was interrupted goes on with the parts that have none. ``index.json`` comes last.
"""

import collections
import concurrent.futures
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from rae.config.errors import UserError
from rae.data.images import with_bar
from rae.data.loaders import start_worker
from rae.data.pixels import Background
from rae.data.shards import RECORDS, Place, content_hash, naming

_HOW = ("out", "workers", "max_skipped", "overwrite", "part")
"""Options that do not decide what the shards hold."""


@dataclass
class Options:
    """How shards are written.

    Args:
        out: local folder, or a URL such as ``s3://bucket/folder``.
        resize: bring the short side to this and re-encode as JPEG; None keeps the original bytes.
        quality: JPEG quality when re-encoding.
        background: what is seen where an image is transparent, when re-encoding.
        workers: processes that read, check, encode and write.
        max_skipped: unreadable images to leave out before giving up.
        shard_size: largest shard, e.g. ``64mb``.
        compression: of shards, e.g. ``zstd``; images hardly compress further.
        hashes: of shards, in alphabetical order.
        keep_order: write in the source's order instead of a fixed shuffled one.
        overwrite: replace an existing data set, or an unfinished one.
        no_labels: store none (−1), whatever the source says.
        caption: what of the source is kept as a column ``caption``, as the source names it.
        part: (K, N) writes only each N-th part, from the K-th on, of 1 to N: the rest is other processes', perhaps on
            other machines; whichever finds all parts written finishes the data set.
    """

    out: str
    resize: int | None = None
    quality: int = 95
    background: Background = "black"
    workers: int = max(1, os.cpu_count() or 1)
    max_skipped: int = 0
    shard_size: str = "64mb"
    compression: str | None = None
    hashes: tuple[str, ...] = ("xxh64",)
    keep_order: bool = False
    overwrite: bool = False
    no_labels: bool = False
    caption: str | None = None
    part: tuple[int, int] | None = None

    def content(self) -> dict[str, Any]:
        """The options that decide what the shards hold."""
        return {k: v for k, v in asdict(self).items() if k not in _HOW}


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

    def own(self) -> range:
        """Those that this process writes."""
        index, count = self.options.part or (1, 1)
        return self.parts()[index - 1 :: count]

    def positions(self, part: int) -> range:
        """Where in the order a part's images are."""
        begin = self.first + part * self.part_size
        return range(begin, min(begin + self.part_size, self.last))

    def indices(self, part: int) -> np.ndarray:
        """Which images a part holds."""
        positions = np.asarray(self.positions(part))
        return positions if self.options.keep_order else shuffled(positions, len(self.source))

    def done(self, part: int) -> dict[str, Any] | None:
        """The record of a part that an earlier run completed, with nothing left out, or None."""
        record = self.place.read(f"{RECORDS}/{part:06}.json") if self.resumed else None
        return record if record and not record["skipped"] else None


_worker: tuple[Callable[[Job, int], dict[str, Any]], Job, Any]


def run_parts(work: Callable[[Job, int], dict[str, Any]], job: Job) -> Iterator[dict[str, Any]]:
    """Run ``work(job, part)`` for every part in processes; yields the records as they come, with a progress bar."""
    fork = multiprocessing.get_context("fork")  # workers share the open files of a source
    stop = fork.Event()
    with concurrent.futures.ProcessPoolExecutor(job.options.workers, fork, _start, (work, job, stop)) as pool:
        futures = [pool.submit(_run, part) for part in job.own()]
        try:
            for future in with_bar(concurrent.futures.as_completed(futures), "shards", len(futures)):
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


class PartWriter:
    """Writes the shards of one part, and then its record.

    Args:
        columns: names and MDS encodings.
    """

    def __init__(self, job: Job, part: int, columns: dict[str, str]):
        self.place, self.part, self.file = job.place, part, f"{job.place.out}/shard.{part:05}.mds"
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
        with naming(self.file):
            self.writer.write(sample)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.executor.shutdown()
        self.folder.cleanup()

    def finish(self, **record: Any) -> dict[str, Any]:
        """Move the shards to their place and write the record, which is returned."""
        if self.writer.new_samples:
            with naming(self.file):
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
        # Through JSON it is the same whether it was just made or read.
        whole = json.loads(json.dumps({"part": self.part, "shards": shards, **record}))
        self.place.write(f"{RECORDS}/{self.part:06}.json", whole)
        return whole


def finish(
    place: Place,
    records: list[dict[str, Any]],
    classes: list[str],
    options: dict[str, Any],
    seconds: float,
    passed_over: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Join the parts' records into ``index.json`` and ``dataset.json``; returns what the latter holds.

    Args:
        passed_over: what a listing did not look at, see :class:`rae.data.kinds.Aside`.

    Raises:
        UserError: there is no sample in them.
    """
    records = sorted(records, key=lambda record: record["part"])
    counts: collections.Counter[str] = collections.Counter()
    for record in records:
        counts.update(record["counts"])
    if not counts:
        left_out = next((skip for record in records for skip in record["skipped"]), None)
        reason = f": {left_out['path']} ({left_out['reason']})" if left_out else ""
        raise UserError(f"none of the images could be read{reason}")
    shards = [shard for record in records for shard in record["shards"]]
    numbered = [counts[str(label)] for label in range(len(classes))]
    summary = {
        "images": sum(counts.values()),
        "bytes": sum(record["bytes"] for record in records),
        "classes": classes,
        "counts": numbered,
        "unlabelled": sum(counts.values()) - sum(numbered),
        "skipped": [skip for record in records for skip in record["skipped"]],
        "damaged": [each for record in records for each in record.get("damaged", [])],
        "captions": sum(record.get("captions", 0) for record in records),
        "passed_over": passed_over or {},
        "options": options,
        "seconds": round(seconds, 2),
        "content_hash": content_hash(shards),
    }
    place.finish(summary, shards)
    return summary
