"""What a run, checkpoint, export, weight file or data set holds, read from headers; nothing in it is executed."""

from pathlib import Path
from tempfile import TemporaryDirectory

from rae.config.errors import UserError
from rae.data.shards import INDEX, SUMMARY
from rae.exchange import places, published
from rae.exchange.inspection.report import Report
from rae.exchange.inspection.runs import inspect_checkpoint, inspect_run
from rae.exchange.inspection.shards import inspect_shards
from rae.exchange.inspection.weights import inspect_export, inspect_file, inspect_tensor_file
from rae.exchange.places import first_of, list_names, local_file
from rae.survival.checkpoints import CONFIG, METRICS, is_name, list_checkpoints
from rae.survival.storage import is_remote

_SMALL = (places.CONFIG, CONFIG, METRICS, SUMMARY)


def inspect(path: str, verify: bool = False) -> Report:
    """Look into a folder or file, local or a URL.

    Args:
        verify: compare the bytes of checkpoints with their hashes too, which reads them (and downloads remote ones).

    Raises:
        UserError: there is nothing, or nothing that is known here.
    """
    path = path.rstrip("/") or path[:1]
    with TemporaryDirectory(prefix="rae-") as scratch:
        if path.endswith((".pt", ".pth")):
            return inspect_file(path, Path(scratch))
        if path.endswith(".safetensors"):
            return inspect_tensor_file(path)
        return _folder(path, verify, Path(scratch))


def _folder(path: str, verify: bool, scratch: Path) -> Report:
    names = list_names(path)
    parent, _, name = path.rpartition("/")
    for file in _SMALL:
        if file in names and is_remote(path):
            local_file(f"{path}/{file}", scratch)
    local = scratch if is_remote(path) else Path(path)
    if is_name(name):
        listed = [each for each in list_checkpoints(parent or ".") if each.name == name]
        return (
            inspect_checkpoint(parent or ".", listed[0], verify, scratch) if listed else Report("an empty checkpoint")
        )
    if INDEX in names:
        return inspect_shards(path, names, local)
    if places.CONFIG in names:
        return inspect_export(path, names, local, scratch)
    if published.DECODER in names:
        return inspect_file(f"{path}/{published.DECODER}", scratch)
    if (
        CONFIG in names
        or any(is_name(part) for each in names for part in each.split("/")[:2])
        or "checkpoints" in names
    ):
        return inspect_run(path, names, local, verify, scratch)
    raise UserError(f"{path} holds nothing that is known here: {first_of(names) or 'it is empty'}")
