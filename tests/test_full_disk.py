"""A disk that fills up, and is whole again after room was made: conversion, the shards' cache, checkpoints, latents.

The disk is a small file system in memory; where mounting is not permitted, these tests are skipped.
"""

import errno
import json
import subprocess
from pathlib import Path

import pytest

from rae.__main__ import main
from rae.config.errors import UserError
from tests.conftest import (
    assert_same_state,
    resumable,
    tiny_settings,
    train_here,
    write_images,
    write_yaml,
)
from tests.test_convert import FOLDER, VERIFY, convert

FULL = f"[Errno {errno.ENOSPC}] No space left on device"


class Disk:
    """A file system of so many bytes at ``path``."""

    def __init__(self, path: Path, size: str):
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")

    def grow(self) -> None:
        self._mount("-o", "remount,size=64m")

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(self.path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    yield lambda size: Disk(path, size)
    subprocess.run(["umount", "--lazy", str(path)], capture_output=True)


def test_conversion(disk, tmp_path):
    images, out = write_images(tmp_path / "images/c", 48, size=200).parent, tmp_path / "disk/out"
    small = disk("1m")
    full = convert(FOLDER, images, out, "--workers=2", check=False)
    assert full.returncode == 2
    assert full.stderr.startswith(f"error: {FULL}: '{out}")
    assert len(full.stderr.splitlines()) == 1
    assert not out.exists()
    partial = out.with_name("out.partial")  # where complete shards are kept, and one that was being written may lie
    records = [json.loads(path.read_text()) for path in partial.glob("conversion/0*.json")]
    complete = [partial / shard["raw_data"]["basename"] for record in records for shard in record["shards"]]
    kept = {path: path.stat().st_mtime_ns for path in complete}
    assert kept
    small.grow()
    convert(FOLDER, images, out, "--workers=2")
    assert all((out / path.name).stat().st_mtime_ns == when for path, when in kept.items())
    assert convert(VERIFY, out).stdout.endswith("48 samples are sound, 0 faults\n")
    assert {path.suffix for path in out.iterdir()} == {".mds", ".json"}


def test_latents(shards, disk, tmp_path):
    settings = write_yaml(tiny_settings(shards, tmp_path / "run"), tmp_path)
    small = disk("256k")
    command = ("convert/latents_to_mds.py", settings, tmp_path / "disk/out", "--with-images")
    full = convert(*command, check=False)
    assert full.returncode == 2
    assert full.stderr.startswith(f"error: {FULL}")
    assert len(full.stderr.splitlines()) == 1
    small.grow()
    convert(*command)
    assert convert(VERIFY, tmp_path / "disk/out").stdout.endswith("40 samples are sound, 0 faults\n")


def test_exports_and_statistics(undisturbed, shards, disk, capsys):
    small = disk("4k")
    out = str(small.path / "out")
    exports = (["export", str(undisturbed), out, "--format", layout] for layout in ("rae", "published"))
    statistics = ["stats", str(undisturbed), f"{out}.pt", "--data", str(shards / "eval"), "--workers", "0"]
    for command in (*exports, statistics):
        with pytest.raises(SystemExit) as end:
            main(command)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
        assert "cannot write" in line and "No space left on device" in line
        assert not list(small.path.iterdir())


def test_the_cache_of_shards(shards, disk, s3, tmp_path, monkeypatch):
    """Where two threads of the loader fail at once, for which Streaming would wait for ever."""
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    small, url = disk("128k"), f"s3://images/{tmp_path.name}"
    for path in (shards / "train").iterdir():
        s3.client().upload_file(str(path), "images", f"{tmp_path.name}/train/{path.name}")
    settings = tiny_settings(shards, tmp_path / "run") | {"algorithms": {}, "metrics": {}}
    settings["data"] |= {"train": {"path": f"{url}/train", "cache": str(small.path / "cache")}, "eval": None}
    settings["data"]["streaming"] = {"download_retry": 1}
    settings["trainer"]["max_duration"] = "1ep"
    with pytest.raises(UserError, match=r"shard shard\.\d+\.mds of s3://.* cannot be used: .*No space left on device"):
        train_here(settings)
    small.grow()
    assert int(train_here(settings).state.timestamp.sample) == 40


def test_checkpoints(shards, undisturbed, disk, tmp_path):
    """The checkpoint before stays, and the run goes on from it to the same end."""
    size = sum(path.stat().st_size for path in (undisturbed / "checkpoints/ep0-ba2").iterdir())
    small = disk(f"{int(1.5 * size) // 1024}k")
    settings = resumable(shards, tmp_path / "run")
    settings["data"]["workers"] = 0  # in this process, workers of the first start would hold the run's lock on
    settings["trainer"]["save_folder"] = str(small.path / "checkpoints")
    with pytest.raises(UserError, match=r"ep0-ba4 could not be written to .* No space left on device; ep0-ba2 is"):
        train_here(settings)
    assert [path.name for path in (small.path / "checkpoints").glob("ep*/part-0-of-1.json")] == ["part-0-of-1.json"]
    small.grow()
    train_here(settings)
    assert_same_state(undisturbed / "checkpoints", small.path / "checkpoints")
