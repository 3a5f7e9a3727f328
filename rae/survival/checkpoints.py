"""Checkpoints on disk and in buckets: which are complete, whether they are whole, and reading them without trust.

A checkpoint is a folder ``ep3-ba1200`` in the run's checkpoint folder. Each writing rank seals its files with
``part-RANK-of-RANKS.json``, their sizes and hashes, which comes last: with all its parts a checkpoint is complete.
The data is ``state.pt``, or Torch's distributed files (``.metadata``, ``__0_0.distcp``, …); ``config.yaml`` is the
run's configuration.
"""

import contextlib
import datetime
import enum
import json
import os
import pickle
import re
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]

from rae.survival.storage import RemoteFolder, can_delete, is_remote, reason

STATE = "state.pt"
SHARDED = ".metadata"
"""Its presence tells a sharded checkpoint."""
CONFIG = "config.yaml"
RECORD = "run.json"
"""What its training data were, and in which order they came."""
METRICS = "metrics.json"
"""The last evaluation, in the checkpoint that ends a run."""
_NAME = re.compile(r"ep(\d+)-ba(\d+)")
_PART = re.compile(r"part-(\d+)-of-(\d+)\.json")


class DamagedError(Exception):
    """A checkpoint whose bytes are not what was saved. The message says which file, and how."""


@dataclass(frozen=True)
class Listed:
    """A checkpoint as its folder's listing shows it.

    Args:
        name: such as ``ep3-ba1200``.
        files: what it holds.
    """

    name: str
    files: frozenset[str]

    @property
    def age(self) -> tuple[int, int]:
        """See :func:`age`."""
        return age(self.name)

    @property
    def parts(self) -> list[str]:
        """The files that seal it, one for each writing rank; none if it is incomplete."""
        ranks = defaultdict(set)
        for file in self.files:
            if match := _PART.fullmatch(file):
                ranks[int(match[2])].add(int(match[1]))
        whole = sorted(count for count, present in ranks.items() if present == set(range(count)))
        return [part_name(rank, whole[0]) for rank in range(whole[0])] if whole else []

    @property
    def sealed_last(self) -> list[str]:
        """All files in the order in which to copy them; to delete them, the reverse."""
        return sorted(self.files, key=lambda file: _PART.fullmatch(file) is not None)


def name_at(batch: int, epoch: int) -> str:
    """The name of the checkpoint after ``batch`` steps and ``epoch`` whole epochs."""
    return f"ep{epoch}-ba{batch}"


def is_name(name: str) -> bool:
    """Whether a folder's name is a checkpoint's."""
    return _NAME.fullmatch(name) is not None


def age(name: str) -> tuple[int, int]:
    """The (batch, epoch) of a checkpoint's name; larger is newer."""
    epoch, batch = map(int, _NAME.fullmatch(name).groups())  # type: ignore[union-attr]
    return batch, epoch


def part_name(rank: int, ranks: int) -> str:
    """The file by which one of ``ranks`` writers seals what it wrote."""
    return f"part-{rank}-of-{ranks}.json"


def list_checkpoints(folder: str) -> list[Listed]:
    """What is in a local or remote folder of checkpoints, the newest first, incomplete ones too.

    Raises:
        Exception: the store's own, if it cannot be listed.
    """
    if is_remote(folder):
        names: Iterable[str] = RemoteFolder(folder).list()
    else:
        names = [str(file.relative_to(folder)) for file in Path(folder).glob("*/*")]
    files = defaultdict(set)
    for name in names:
        checkpoint, _, file = name.partition("/")
        if is_name(checkpoint):
            files[checkpoint].add(file)
    found = [Listed(name, frozenset(held)) for name, held in files.items()]
    return sorted(found, key=lambda checkpoint: checkpoint.age, reverse=True)


def seal(folder: Path, files: Iterable[str], rank: int, ranks: int, save: str) -> str:
    """Write down size and hash of the files that one rank wrote, once they are on the disk; the last step of a save.

    Args:
        save: what all parts of one save have in common, and no others.

    Returns:
        the name of the file written.
    """
    held = {file: {"bytes": (folder / file).stat().st_size, "xxh3": _hash(folder / file)} for file in sorted(files)}
    for file in held:
        sync(folder / file)
    record = {"save": save, "files": held}
    name, partial = part_name(rank, ranks), folder / f".{part_name(rank, ranks)}"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    sync(partial)
    partial.rename(folder / name)
    sync(folder)
    return name


def fetch(folder: str, checkpoint: Listed, destination: Path) -> Path:
    """Bring a complete checkpoint to the local disk, and check every byte of it.

    Args:
        folder: local or remote, that holds it.
        destination: local folder for remote ones.

    Returns:
        where it lies.

    Raises:
        DamagedError: a file is missing, or is not what was saved.
    """
    if not checkpoint.parts:
        raise DamagedError("it is incomplete: its writing was cut short")
    if not is_remote(folder):
        local = Path(folder, checkpoint.name)
        verify(local, checkpoint.parts)
        return local
    local, remote = destination / checkpoint.name, RemoteFolder(f"{folder.rstrip('/')}/{checkpoint.name}")
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir(parents=True)
    for part in [*checkpoint.parts, *(checkpoint.files & {METRICS})]:
        remote.download(part, local / part)
    for part in checkpoint.parts:
        for file in read_seal(local / part)[1]:
            with contextlib.suppress(FileNotFoundError):  # found missing below
                remote.download(file, local / file)
    verify(local, checkpoint.parts)
    return local


def verify(local: Path, parts: Iterable[str]) -> None:
    """Check every byte of a checkpoint on this disk.

    Raises:
        DamagedError: a file is missing, or is not what was saved; parts of two saves.
    """
    read = [read_seal(local / part) for part in parts]
    if len({save for save, _ in read}) > 1:
        raise DamagedError("its parts are of different saves")
    for _, files in read:
        for file, expected in files.items():
            path = local / file
            if not path.is_file():
                raise DamagedError(f"{file} is missing")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise DamagedError(f"{file} has {size:,} bytes instead of {expected['bytes']:,}")
            if _hash(path) != expected["xxh3"]:
                raise DamagedError(f"{file} is damaged: its hash is not the one it was saved with")


def read_seal(path: Path) -> tuple[str, dict[str, dict[str, int | str]]]:
    """What a file written by :func:`seal` says: its save, and bytes and hash of each file.

    Raises:
        DamagedError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
        files = {file: {"bytes": held["bytes"], "xxh3": held["xxh3"]} for file, held in record["files"].items()}
        return record["save"], files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path.name} cannot be read") from error


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: str, checkpoint: Listed) -> None:
    """Delete a checkpoint, its seal first, so that a half deleted one does not pass for complete."""
    _delete(folder, checkpoint, checkpoint.sealed_last[::-1])
    if not is_remote(folder):
        shutil.rmtree(Path(folder, checkpoint.name), ignore_errors=True)


def unseal(folder: str, checkpoint: Listed) -> None:
    """Take a checkpoint that is not whole for what it is: incomplete, whatever its seals say."""
    if not is_remote(folder) or can_delete(folder):
        _delete(folder, checkpoint, [file for file in checkpoint.files if _PART.fullmatch(file) or file == METRICS])


def _delete(folder: str, checkpoint: Listed, files: Iterable[str]) -> None:
    if is_remote(folder):
        RemoteFolder(f"{folder.rstrip('/')}/{checkpoint.name}").delete(files)
        return
    for file in files:
        Path(folder, checkpoint.name, file).unlink(missing_ok=True)


def rotate(folder: str, keep: int) -> None:
    """Delete what is older than the newest complete checkpoint, except the newest ``keep`` complete ones."""
    listed = list_checkpoints(folder)
    kept: list[Listed] = []
    for checkpoint in listed:
        if checkpoint.parts and (not kept or checkpoint.age[0] < kept[-1].age[0]):
            kept.append(checkpoint)
    for checkpoint in listed:
        if kept and checkpoint.age < kept[0].age and checkpoint not in kept[:keep]:
            remove(folder, checkpoint)


def check_whole(path: Path) -> None:
    """Check a ``.pt`` file, which has no seal, by the checksums that ``torch.save`` leaves in it.

    Raises:
        DamagedError: it is no such file, or a part of it does not match its checksum.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise DamagedError(f"{path.name} is damaged: {damaged} in it does not match its checksum")
    except FileNotFoundError as error:
        raise DamagedError("there is no such file") from error
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise DamagedError(f"{path.name} is truncated, damaged or no checkpoint: {reason(error)}") from error


# Clock times and versions; numpy's generator state in checkpoints that Composer itself wrote.
_PLAIN = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("uint8", "uint32", "int64", "float64")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


@contextlib.contextmanager
def without_code() -> Iterator[None]:
    """Inside this context ``torch.load`` refuses pickles that hold more than tensors and plain values.

    Composer and Torch's distributed loader ask for unrestricted pickles, through which a checkpoint can run any code.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(_PLAIN):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def refused(error: pickle.UnpicklingError) -> str:
    """What :func:`without_code` has refused, as the end of a sentence about the file."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"{f'a Python object ({found[1]})' if found else 'Python objects'}, which could run code; it is refused"


_METADATA_NAMES = {
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    "collections": {"OrderedDict"},
    **{module: {"Path", "PosixPath"} for module in ("pathlib", "pathlib._local")},  # as Python 3.13 names it
}


def _member(owner: object, name: str) -> object:
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise DamagedError(f"{SHARDED} asks for {name} of {owner!r}: that could run code, and is refused")


class _MetadataReader(pickle.Unpickler):
    """Refuses what ``.metadata`` of a distributed checkpoint has no need of."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):  # by which Python up to 3.11.3 pickles a member of an Enum
            return _member
        if name not in _METADATA_NAMES.get(module, ()):
            raise DamagedError(f"{SHARDED} refers to {module}.{name}: that could run code, and is refused")
        return super().find_class(module, name)


def check_metadata(folder: Path) -> Any:
    """Check that a sharded checkpoint's ``.metadata``, a pickle that Torch reads unrestricted, holds no code.

    Returns:
        it, Torch's ``Metadata``.

    Raises:
        DamagedError: it does, or cannot be read.
    """
    try:
        with (folder / SHARDED).open("rb") as file:
            return _MetadataReader(file).load()
    except DamagedError:
        raise
    except Exception as error:
        raise DamagedError(f"{SHARDED} cannot be read: {reason(error)}") from error


def in_form(checkpoint: Path, sharded: bool, scratch: Path) -> Path:
    """A checkpoint in the form that the run's parallelism loads: converted into ``scratch`` if it has the other.

    Args:
        checkpoint: a checkpoint's folder, or a ``.pt`` file.
        sharded: whether the run reads sharded files.

    Returns:
        a ``.pt`` file, or a folder of distributed files.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

    is_sharded = (checkpoint / SHARDED).is_file()
    file = checkpoint / STATE if checkpoint.is_dir() else checkpoint
    if sharded == is_sharded:
        return checkpoint if is_sharded else file
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with without_code():
        if is_sharded:
            dcp_to_torch_save(str(checkpoint), str(scratch / STATE))
            return scratch / STATE
        torch_save_to_dcp(str(file), str(scratch / "sharded"))
        return scratch / "sharded"
