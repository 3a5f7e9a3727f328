"""Checking data sets of MDS shards: every shard against its hashes, and that every image decodes."""

import os
import tempfile
from pathlib import Path
from typing import Any

from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.format.base.reader import FileInfo

from rae.config.errors import first_line
from rae.data.decoding import decode
from rae.data.parts import Job, Options, run_parts
from rae.data.reader import Reader, shard_fault
from rae.data.shards import INDEX, Place, fetch, read_index, summary_faults


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


def _check_shard(job: Job, part: int) -> dict[str, Any]:
    url, shards = job.source
    with tempfile.TemporaryDirectory() as folder:
        sound, faults = _shard_faults(url, shards[part], folder)
    return {"sound": sound, "faults": faults}


def _shard_faults(url: str, shard: dict[str, Any], folder: str) -> tuple[int, list[str]]:
    info = FileInfo(**(shard["zip_data"] or shard["raw_data"]))
    name = f"{url.rstrip('/')}/{info.basename}"
    path = fetch(name, f"{folder}/stored")
    if path is None:
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
