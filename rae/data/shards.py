"""Where data sets of MDS shards are, local or in a bucket: their index, their marker, and one that is being written."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rae.config.errors import UserError, first_line
from rae.data.reader import Reader, about
from rae.survival.storage import RemoteFolder, is_remote, on_disk, saying

INDEX, SUMMARY, RECORDS = "index.json", "dataset.json", "conversion"


class Place:
    """Where a data set is written: a local folder that gets its name when it is complete, or a URL.

    Args:
        out: local folder or URL.
    """

    def __init__(self, out: str):
        self.out, self.remote = out.rstrip("/"), is_remote(out)
        self.folder = Path(f"{self.out}.partial")
        self.here = self.out if self.remote else str(self.folder)
        """Where its files are while it is being written."""

    def read(self, name: str) -> Any:
        """A JSON file's content, or None."""
        return _read(f"{self.here}/{name}")

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, wholly or not at all."""
        with naming(f"{self.out}/{name}"), tempfile.TemporaryDirectory(dir=self.scratch(), prefix="part-") as folder:
            Path(folder, "file").write_text(json.dumps(content, ensure_ascii=False) + "\n")
            self.move(Path(folder, "file"), name)

    def move(self, file: Path, name: str) -> None:
        """Put a local file here under a name; it is gone from where it was."""
        if not self.remote:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(self.folder / name)
            return
        with saying(f"cannot write {self.out}/{name}"):
            RemoteFolder(self.out).upload(file, name)
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
                f"{self.here} holds an unfinished conversion of other images or with other options, or of files that "
                "have changed since; finish that one, or start anew with --overwrite"
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
def naming(file: str) -> Iterator[None]:
    """Give an operating system's error (a full disk) the name of the file that was being written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, file) from error


def _read(url: str) -> Any:
    """A JSON file's content, or None where there is no such file."""
    with tempfile.TemporaryDirectory() as folder:
        path = on_disk(url, Path(folder, "file"))
        return json.loads(path.read_text()) if path else None


def class_names(urls: Iterable[str]) -> list[str]:
    """What labels are called, in order: what the data sets' own summaries say, if all say the same; otherwise []."""
    summaries = [_read(f"{url.rstrip('/')}/{SUMMARY}") or {} for url in urls]
    told = [summary.get("classes") for summary in summaries if isinstance(summary, dict)]
    names = told[0] if told and all(each == told[0] for each in told) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def read_index(url: str) -> dict[str, Any]:
    """The content of a data set's ``index.json``.

    Raises:
        UserError: there is none, or it is no index, or a column can run code.
    """
    name = f"{url.rstrip('/')}/{INDEX}"
    try:
        index = _read(name)
        if index is None:
            raise UserError(f"there is no {name}, so it is no finished MDS data set")
        with about(name):
            for shard in index["shards"]:
                if shard["format"] != "mds":
                    raise UserError(f"shards of the format {shard['format']!r} are not read; MDS is")
                Reader.from_json("", None, shard)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} is damaged: {type(error).__name__}: {first_line(error)}") from error
    return index


def content_hash(shards: list[dict[str, Any]]) -> str:
    """SHA-256 of the hashes of an index's shards, in order: equal hashes mean equal data sets."""
    hashes = [sorted(shard["raw_data"]["hashes"].items()) for shard in shards]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def summary_faults(url: str, index: dict[str, Any]) -> list[str]:
    """What is wrong with a data set's ``dataset.json``, or does not agree with its index."""
    name = f"{url.rstrip('/')}/{SUMMARY}"
    try:
        summary = _read(name)
        if summary is None:
            return []  # written by another program
        expected = (summary["images"], summary["content_hash"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{name} is damaged: {type(error).__name__}: {first_line(error)}"]
    found = (sum(shard["samples"] for shard in index["shards"]), content_hash(index["shards"]))
    return [] if found == expected else [f"{INDEX} is not that of {SUMMARY}: it lists {found[0]:,} images"]
