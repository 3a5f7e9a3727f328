"""Checking data sets of MDS shards: every shard against its hashes, and that every image decodes."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo

from rae.config.errors import first_line
from rae.data.decoding import decode_and_judge
from rae.data.parts import Job, Options, run_parts
from rae.data.reader import Reader, about, shard_fault
from rae.data.shards import INDEX, Place, read_index, summary_faults
from rae.survival.storage import on_disk


class Verdict(NamedTuple):
    """The number of sound images, each that decodes in part with what is amiss, and every fault."""

    sound: int
    damaged: list[str]
    faults: list[str]


def verify(url: str, workers: int = Options.workers) -> Verdict:
    """Compare every shard with its hashes and decode every image.

    Raises:
        UserError: there is no index.json, or it is no index, or there are no images.
    """
    index = read_index(url)
    with about(url):
        for shard in index["shards"]:
            Reader.from_json("", None, shard).roles  # noqa: B018 - raises where there is no image
    faults = summary_faults(url, index)
    job = Job((url, index["shards"]), Options(url, workers=workers), Place(url), 0, len(index["shards"]), 1, False)
    sound, damaged = 0, []
    for each in run_parts(_check_shard, job):
        sound += each["sound"]
        damaged += each["damaged"]
        faults += each["faults"]
    return Verdict(sound, sorted(damaged), sorted(faults))


def _check_shard(job: Job, part: int) -> dict[str, Any]:
    url, shards = job.source
    with tempfile.TemporaryDirectory() as folder:
        return _judge_shard(url, shards[part], folder)._asdict()


def _judge_shard(url: str, shard: dict[str, Any], folder: str) -> Verdict:
    info = FileInfo(**(shard["zip_data"] or shard["raw_data"]))
    name = f"{url.rstrip('/')}/{info.basename}"
    path = on_disk(name, Path(folder, "stored"))
    if path is None:
        return Verdict(0, [], [f"{name} is listed in {INDEX} but absent"])
    if fault := shard_fault(str(path), info):
        return Verdict(0, [], [fault.replace(str(path), name)])
    if shard["zip_data"]:
        raw = decompress(shard["compression"], path.read_bytes())
        path = Path(folder, "raw")
        path.write_bytes(raw)
    here = {**shard, "raw_data": {**shard["raw_data"], "basename": path.name}}
    reader = Reader.from_json(str(path.parent), None, here)
    return _judge_images(reader, name)


def _judge_images(reader: Reader, name: str) -> Verdict:
    damaged, faults = [], []
    for i in range(reader.samples):
        sample: dict[str, Any] = {}
        try:
            sample = reader[i]
            # Beside latents, images are arrays.
            image = sample.get("image")
            damage = decode_and_judge(image)[1] if isinstance(image, bytes | memoryview) else ""
            if damage:
                damaged.append(f"{name}: number {i} ({sample.get('path', 'no path')}) decodes in part: {damage}")
        except Exception as error:
            faults.append(
                f"{name}: number {i} ({sample.get('path', 'unreadable')}) does not decode: {first_line(error)}"
            )
    return Verdict(reader.samples - len(damaged) - len(faults), damaged, faults)
