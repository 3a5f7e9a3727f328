"""Checking data sets of MDS shards: every shard against its hashes, and that every image decodes."""

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
from rae.data.shards import INDEX, Place, read_index, summary_faults
from rae.survival.storage import on_disk


def verify(url: str, workers: int = Options.workers) -> tuple[int, list[str]]:
    """Compare every shard with its hashes and decode every image.

    Returns:
        the number of sound images, and every fault.

    Raises:
        UserError: there is no index.json, or it is no index.
    """
    index = read_index(url)
    faults = summary_faults(url, index)
    job = Job((url, index["shards"]), Options(url, workers=workers), Place(url), 0, len(index["shards"]), 1, False)
    sound = 0
    for record in run_parts(_check_shard, job):
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
    path = on_disk(name, Path(folder, "stored"))
    if path is None:
        return 0, [f"{name} is listed in {INDEX} but absent"]
    if fault := shard_fault(str(path), info):
        return 0, [fault.replace(str(path), name)]
    if shard["zip_data"]:
        raw = decompress(shard["compression"], path.read_bytes())
        path = Path(folder, "raw")
        path.write_bytes(raw)
    here = {**shard, "raw_data": {**shard["raw_data"], "basename": path.name}}
    reader = Reader.of(reader_from_json(str(path.parent), None, here))
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
