"""Where exports lie: a folder, a bucket, the hub; read from there, and written wholly or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rae.config.errors import UserError
from rae.survival.storage import RemoteFolder, can_delete, filled, is_remote, on_disk, saying

CONFIG, WEIGHTS, ENCODER, CARD = "config.json", "model.safetensors", "encoder", "README.md"
AUTOENCODER = "autoencoder"
"""A generator's, as an export inside its export."""
RUN = "config.yaml"
"""The configuration of the run that it came from."""
OURS = {CONFIG, WEIGHTS, ENCODER, AUTOENCODER, CARD, RUN, "model.pt", "stat.pt", "diffusion_pytorch_model.safetensors"}
"""What an export of any format may hold."""
OPENING = "A Representation Autoencoder ([arXiv 2510.11690](https://arxiv.org/abs/2510.11690)): a frozen vision encoder"
"""What every export's model card says, and no other program's."""
WOULD_DO = "give a run's folder, a checkpoint, a YAML or an export"


def local_folder(name: str, scratch: Path, revision: str | None = None) -> Path:
    """An export's folder on this disk: itself, or downloaded to ``scratch``, or the hub's cache.

    Raises:
        UserError: there is none.
    """
    if is_remote(name):
        local, remote = scratch / "export", RemoteFolder(name)
        for file in list_names(name):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            with saying(f"cannot read {name}/{file}"):
                remote.download(file, local / file)
        return local
    if os.path.isdir(name):
        return Path(name)
    if not may_be_on_hub(name):
        raise UserError(f"there is no folder {name!r}; give an export's folder, s3://… or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"there is no folder {name!r}, and the hub has none of that name and revision") from error
    except Exception as error:
        raise UserError(f"there is no folder {name!r}, and the hub does not answer, nor has its cache it") from error


def may_be_on_hub(name: str) -> bool:
    """Whether a name has the form of a hub's repository, and is not rather a path that is not there."""
    form = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    return bool(form) and not Path(name).exists() and not Path(name).parent.is_dir()


def local_file(path: str, scratch: Path) -> Path:
    """A file on this disk: itself, or downloaded to ``scratch``.

    Raises:
        UserError: there is none.
    """
    found = on_disk(path, scratch / path.rpartition("/")[2])
    if found is None:
        raise UserError(f"cannot read {path}: it does not exist" if is_remote(path) else f"there is no file {path!r}")
    return found


def list_names(folder: str) -> set[str]:
    """The names of what is in a local or remote folder; of a remote one, with what is in its sub-folders.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if is_remote(folder):
        with saying(f"cannot read {folder}"):
            names = set(RemoteFolder(folder).list())
        if not names:
            raise UserError(f"there is nothing in {folder}")
        return names
    if not os.path.isdir(folder):
        what = f"{folder!r} is a file of no known kind" if os.path.exists(folder) else f"there is no folder {folder!r}"
        raise UserError(f"{what}; {WOULD_DO}")
    with saying(f"cannot read {folder}"):
        return set(os.listdir(folder))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON file's mapping.

    Raises:
        UserError: it is missing, damaged or no mapping.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no {name}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged: it holds a {type(content).__name__}, not a mapping")
    return content


def first_of(names: set[str]) -> str:
    """The first four of these names, for a message."""
    return ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")


@contextmanager
def new_folder(out: str, overwrite: bool = False) -> Iterator[Path]:
    """A local folder to fill, which takes its place ``out`` when the block ends without an error.

    Args:
        out: a local path, or a URL.
        overwrite: replace an earlier export; never a folder that holds anything else.

    Raises:
        UserError: ``out`` exists, or cannot be written to.
    """
    out = out.rstrip("/") or out[:1]
    if not out:
        raise UserError("OUT is empty; give a folder")
    if is_remote(out):
        with TemporaryDirectory(prefix="rae-") as scratch, _uploaded(out, Path(scratch), overwrite) as folder:
            yield folder
        return
    place = Path(out).resolve()
    if place.exists() and not place.is_dir():
        raise UserError(f"{out} is a file; give a folder")
    if place == Path.cwd():
        raise UserError(f"{out} is the folder that you are in, which cannot be replaced; give another")
    _check_replaceable(out, {path.name for path in place.iterdir()} if place.exists() else set(), place, overwrite)
    with filled(place, f"cannot write to {out}", overwrite) as folder:
        yield folder


def _check_replaceable(out: str, names: set[str], local: Path, overwrite: bool) -> None:
    if names and not overwrite:
        raise UserError(f"{out} exists; give another folder, or --overwrite to replace it")
    if foreign := sorted(names - OURS):
        raise UserError(f"{out} holds {foreign[0]}, which is no part of an export; give another folder")
    if names and not _is_export(local):
        raise UserError(f"{out} is no export, but another program's; give another folder")


def _is_export(folder: Path) -> bool:
    """Whether this program wrote a folder: ``config.json`` says so, or, of the formats of others, the model card."""
    card = folder / CARD
    if card.is_file() and OPENING in card.read_text(errors="replace"):
        return True
    try:
        return read_json(folder / CONFIG, CONFIG).get("format") == "rae"
    except UserError:
        return False


@contextmanager
def _uploaded(out: str, scratch: Path, overwrite: bool) -> Iterator[Path]:
    remote, folder = RemoteFolder(out), scratch / "out"
    with saying(f"cannot read {out}"):
        before = set(remote.list())
        for name in before & {CONFIG, CARD}:
            remote.download(name, scratch / name)
    _check_replaceable(out, {name.split("/")[0] for name in before}, scratch, overwrite)
    remote.check_writable("OUT")
    folder.mkdir()
    yield folder
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    with saying(f"cannot write to {out}"):
        for name in sorted(names, key=lambda name: name == CONFIG):  # what is read first comes last
            remote.upload(folder / name, name)
        if stale := before - set(names):
            remote.delete(stale) if can_delete(out) else None
