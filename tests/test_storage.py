"""Files and folders that take their places when they are whole, and what is said when they cannot."""

import errno
import os
import sys

import pytest

from rae.__main__ import main
from rae.config.errors import UserError
from rae.evaluation.reconstruction import FIGURES, whole_folder
from rae.exchange.places import new_folder
from rae.survival.storage import RemoteFolder, written

HELPERS = {
    "written": lambda out: written(out, "OUT"),
    "new_folder": new_folder,
    "whole_folder": whole_folder,
}


@pytest.mark.parametrize("helper", HELPERS)
def test_only_failed_writes_are_called_so(helper, tmp_path):
    out, other = str(tmp_path / "out"), ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    for error in (other, FileNotFoundError(errno.ENOENT, "No such file or directory", "photos/x.png")):
        with pytest.raises(type(error)) as raised, HELPERS[helper](out):
            raise error
        assert raised.value is error
    with pytest.raises(UserError, match=r"out.*: No space left on device$"), HELPERS[helper](out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"out.*: No such file or directory$"), HELPERS[helper](out) as path:
        (path / "absent/file").write_text("")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory$"), HELPERS[helper](f"{tmp_path}/file/out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("helper", ["new_folder", "whole_folder"])
def test_two_at_a_time_do_not_disturb_each_other(helper, tmp_path):
    begin, out = HELPERS[helper], tmp_path / "out"

    def work():
        with begin(str(out)) as slower:
            (slower / FIGURES).write_text("slower")
            with begin(str(out)) as faster:
                assert [*faster.iterdir()] == []
                (faster / FIGURES).write_text("faster")
            assert (slower / FIGURES).read_text() == "slower"

    with pytest.raises(UserError, match="Directory not empty"):
        work()
    assert (out / FIGURES).read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unforeseen_error_of_the_system_is_one_line(monkeypatch, capsys):
    def refuse(run_dir):
        raise PermissionError(errno.EACCES, "Permission denied", run_dir)

    monkeypatch.setattr("rae.evaluation.curves.plot", refuse)
    with pytest.raises(SystemExit) as end:
        main(["curves", "runs/theirs"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'runs/theirs'\n"


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("oci", "oci"), ("azure", "azure")])
def test_a_client_that_is_not_installed_is_one_line(scheme, extra, monkeypatch):
    monkeypatch.setitem(
        sys.modules, {"gs": "google.cloud.storage", "azure": "azure.storage.blob"}.get(scheme, scheme), None
    )
    with pytest.raises(UserError, match=rf"^{scheme}://b/f: the client for {scheme}:// .*install -e '\.\[{extra}\]'$"):
        RemoteFolder(f"{scheme}://b/f")
