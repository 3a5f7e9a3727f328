"""Checkpoints in folders and buckets: complete or not, whole or not, trusted or not, kept or not."""

import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from torch.distributed.checkpoint import metadata

from rae.algorithms.adversarial import Adversarial
from rae.config.errors import UserError
from rae.survival.checkpoints import CONFIG, STATE, DamagedError, check_metadata, fetch, list_checkpoints, rotate, seal
from rae.survival.storage import RemoteFolder, reason
from rae.survival.writing import Writer, _fault
from rae.training.resume import given, newest
from tests.conftest import assert_same_state, load_newest, resumable, run, tiny_settings, train_here, write_yaml

OLD, NEW = "ep0-ba4", "ep1-ba6"


def save(folder: Path, name: str, parts: int = 1) -> None:
    """A sealed checkpoint, as the run writes it."""
    place = folder / name
    place.mkdir(parents=True)
    for part in range(parts):
        torch.save({"state": torch.arange(1000.0), "name": name}, place / f"state{part}.pt")
        seal(place, [f"state{part}.pt"], part, parts, name)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, monkeypatch) -> str:
    """A folder of checkpoints, the newest written by two ranks; both places hold the same."""
    save(tmp_path / "made", OLD)
    save(tmp_path / "made", NEW, parts=2)
    if request.param == "local":
        return str(tmp_path / "made")
    server = request.getfixturevalue("s3")
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    url = f"s3://images/{tmp_path.name}"
    for file in (tmp_path / "made").rglob("*.*"):
        RemoteFolder(url).upload(file, str(file.relative_to(tmp_path / "made")))
    return url


def change(folder: str, name: str, how, scratch: Path) -> None:
    """Change a file of a checkpoint; ``how`` maps its bytes to others, or to None for none."""
    if "://" not in folder:
        path = Path(folder, name)
        after = how(path.read_bytes())
        path.unlink() if after is None else path.write_bytes(after)
        return
    remote = RemoteFolder(folder)
    remote.download(name, scratch / "changed")
    after = how((scratch / "changed").read_bytes())
    if after is None:
        remote.delete([name])
    else:
        (scratch / "changed").write_bytes(after)
        remote.upload(scratch / "changed", name)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {
    "flipped byte": ("state1.pt", flip, "state1.pt is damaged"),
    "truncated": ("state0.pt", lambda data: data[:-100], "state0.pt has"),
    "missing file": ("state0.pt", lambda data: None, "state0.pt is missing"),
    "missing part": ("part-1-of-2.json", lambda data: None, "incomplete"),
    "damaged seal": ("part-0-of-2.json", lambda data: b"{", "part-0-of-2.json cannot be read"),
}


def test_the_newest_whole_one_is_found(folder, tmp_path):
    found = newest([folder], tmp_path / "scratch", "stop")
    assert found.name == NEW
    assert torch.load(found / "state1.pt")["name"] == NEW


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_an_older_one_used(folder, tmp_path, caplog, damage):
    file, how, message = DAMAGE[damage]
    change(folder, f"{NEW}/{file}", how, tmp_path)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        newest([folder], tmp_path / "scratch", "stop")
    assert newest([folder], tmp_path / "scratch", "older").name == OLD
    assert f"{folder}/{NEW} is not used" in caplog.text
    assert message in caplog.text


def test_nothing_but_damage_stops_the_run(folder, tmp_path):
    change(folder, f"{OLD}/state0.pt", flip, tmp_path)
    change(folder, f"{NEW}/state1.pt", flip, tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        newest([folder], tmp_path / "scratch", "older")


def test_a_first_save_that_was_cut_short_means_the_beginning(folder, tmp_path):
    change(folder, f"{OLD}/part-0-of-1.json", lambda data: None, tmp_path)
    change(folder, f"{NEW}/part-1-of-2.json", lambda data: None, tmp_path)
    assert newest([folder], tmp_path / "scratch", "older") is None


def test_old_ones_are_deleted_but_never_the_only_complete_one(folder, tmp_path):
    change(folder, f"{NEW}/part-1-of-2.json", lambda data: None, tmp_path)
    rotate(folder, keep=1)
    assert [c.name for c in list_checkpoints(folder)] == [NEW, OLD]
    save(tmp_path / "more", "ep1-ba8")
    for file in (tmp_path / "more").rglob("*.*"):
        name = str(file.relative_to(tmp_path / "more"))
        if "://" in folder:
            RemoteFolder(folder).upload(file, name)
        else:
            Path(folder, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, Path(folder, name))
    rotate(folder, keep=2)
    assert [c.name for c in list_checkpoints(folder)] == ["ep1-ba8", OLD]
    rotate(folder, keep=1)
    assert [c.name for c in list_checkpoints(folder)] == ["ep1-ba8"]


def test_a_run_keeps_as_many_as_it_is_told_to(shards, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    settings["data"]["workers"] = 0
    settings["algorithms"].pop("adversarial")
    settings["trainer"] |= {"save_num_checkpoints_to_keep": 2, "save_interval": "1ba", "max_duration": "5ba"}
    train_here(settings)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["ep0-ba4", "ep1-ba5"]


def test_what_was_not_used_neither_counts_nor_stays_complete(folder, tmp_path):
    """Else retention would delete the checkpoint that training went on from, and keep the damaged one."""
    change(folder, f"{NEW}/state1.pt", flip, tmp_path)
    assert newest([folder], tmp_path / "scratch", "older").name == OLD
    rotate(folder, keep=1)
    assert [c.name for c in list_checkpoints(folder) if c.parts] == [OLD]


def test_parts_of_two_saves_are_no_checkpoint(tmp_path, caplog):
    save(tmp_path, OLD)
    save(tmp_path, NEW, parts=2)
    torch.save({"later": 1}, tmp_path / NEW / "state0.pt")
    seal(tmp_path / NEW, ["state0.pt"], 0, 2, "another save")
    assert newest([str(tmp_path)], tmp_path / "scratch", "older").name == OLD
    assert "its parts are of different saves" in caplog.text


def test_what_waits_for_its_upload_is_used_and_what_was_uploaded_is_not_missed(tmp_path):
    waiting = tmp_path / "uploads"
    save(tmp_path / "made", OLD)
    save(waiting, NEW)
    places = [str(tmp_path / "made"), str(waiting)]
    assert newest(places, tmp_path / "scratch", "stop") == waiting / NEW
    (waiting / NEW / "part-0-of-1.json").unlink()  # as a kill after the upload leaves it
    assert newest(places, tmp_path / "scratch", "stop") == tmp_path / "made" / OLD


def test_a_run_without_evaluation_that_was_killed_at_its_end_is_finished(shards, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    settings["data"] |= {"workers": 0, "eval": None}
    settings |= {"metrics": {}, "callbacks": {}}
    settings["trainer"]["max_duration"] = "2ba"
    train_here(settings)
    (tmp_path / "run/checkpoints/ep0-ba2/metrics.json").unlink()
    train_here(settings)
    assert (tmp_path / "run/checkpoints/ep0-ba2/metrics.json").is_file()


def test_a_checkpoint_of_another_model_is_refused(shards, undisturbed, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    settings["data"]["workers"] = 0
    settings["algorithms"] = {}
    settings["model"]["decoder"]["depth"] = 1
    settings["trainer"]["load_path"] = str(undisturbed / "checkpoints")
    with pytest.raises(UserError, match=r"^model\.decoder: checkpoint ep2-ba10 is of depth 2, not 1; give another run"):
        train_here(settings)
    torch.save({"state": {}}, tmp_path / "empty.pt")
    settings["trainer"]["load_path"] = str(tmp_path / "empty.pt")
    with pytest.raises(UserError, match="of another model"):
        train_here(settings)
    torch.save([1], tmp_path / "list.pt")
    settings["trainer"]["load_path"] = str(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no checkpoint of a run"):
        train_here(settings)


def test_folders_that_cannot_be_used_are_found_at_the_start(shards, undisturbed, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    (tmp_path / "file").touch()
    settings["trainer"]["save_folder"] = str(tmp_path / "file/checkpoints")
    with pytest.raises(UserError, match="cannot write to"):
        train_here(settings)
    settings["trainer"] |= {"save_folder": str(undisturbed / "checkpoints"), "autoresume": False}
    with pytest.raises(UserError, match="holds checkpoints of an earlier start"):
        train_here(settings)


@pytest.mark.parametrize("place", ["run", "{run_name}"])
def test_the_folder_of_checkpoints_may_be_the_runs_own_and_name_it(shards, tmp_path, place):
    settings = resumable(shards, tmp_path / "run")
    settings["data"] |= {"workers": 0, "eval": None}
    settings |= {"metrics": {}, "callbacks": {}}
    settings["trainer"] |= {"max_duration": "2ba", "save_folder": str(tmp_path / place)}
    train_here(settings)
    assert (tmp_path / "run/ep0-ba2/state.pt").is_file()
    assert not (tmp_path / "{run_name}").exists()


def test_a_disk_that_is_full_is_one_line(shards, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    settings["data"] |= {"workers": 0, "eval": None}
    settings |= {"metrics": {}, "callbacks": {}, "loggers": {}}
    command = f"ulimit -f 900; exec {sys.executable} train.py {write_yaml(settings, tmp_path)}"
    done = run("bash", "-c", command, check=False)
    assert done.returncode == 2
    assert "error: checkpoint ep0-ba2 could not be written to" in done.stderr
    assert "Traceback" not in done.stderr


class Payload:
    def __reduce__(self):
        return os.system, ("echo ran > ran",)


@pytest.mark.parametrize("kind", ["state.pt", ".metadata", "file.pt"])
def test_code_in_a_checkpoint_is_refused(shards, undisturbed, tmp_path, monkeypatch, kind):
    """In a checkpoint's state, in the index of a sharded one, and in a file that is given to start from."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "evil/ep0-ba2"
    place.mkdir(parents=True)
    if kind == ".metadata":
        (place / kind).write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"state": {"model": Payload()}}, place / kind)
    seal(place, [kind], 0, 1, "a")
    settings = resumable(shards, tmp_path / "run")
    settings["trainer"]["load_path"] = str(place / kind if kind == "file.pt" else place)
    with pytest.raises(UserError, match="could run code"):
        train_here(settings)
    assert not (tmp_path / "ran").exists()


class _Getattr:
    """Pickled as Python up to 3.11.3 pickles a member of an Enum."""

    def __init__(self, owner, name):
        self.parts = owner, name

    def __reduce__(self):
        return getattr, self.parts


def test_metadata_may_name_members_of_enums_and_nothing_else_by_getattr(tmp_path):
    encoding = metadata._MEM_FORMAT_ENCODING
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Getattr(encoding, "TORCH_CONTIGUOUS_FORMAT")))
    assert check_metadata(tmp_path) is encoding.TORCH_CONTIGUOUS_FORMAT
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Getattr(metadata.Metadata, "__init__")))
    with pytest.raises(DamagedError, match="could run code"):
        check_metadata(tmp_path)


def test_a_truncated_file_to_start_from_is_named(undisturbed, tmp_path):
    data = (undisturbed / "checkpoints/ep0-ba4/state.pt").read_bytes()
    for name, content in (("short.pt", data[:-5000]), ("flipped.pt", flip(data)), ("text.pt", b"no checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            given(str(tmp_path / name), tmp_path / "scratch", "older")
    with pytest.raises(UserError, match="there is no folder and no file"):
        given(str(tmp_path / "nothing"), tmp_path / "scratch", "older")


def test_another_runs_weights_begin_a_run(shards, undisturbed, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    settings["trainer"] |= {
        "load_path": str(undisturbed / "checkpoints"), "load_weights_only": True, "max_duration": "1ba",
        "save_interval": "1ba",
    }  # fmt: skip
    settings["optimizer"] = {"adamw": {"lr": 0.0}}
    settings.pop("schedule")
    train_here(settings)
    begun, source = load_newest(tmp_path / "run/checkpoints"), load_newest(undisturbed / "checkpoints")
    assert begun["timestamp"]["Timestamp"]["batch"] == 1
    for name, average in dict(source["algorithms"])["EMA"]["average"].items():
        assert torch.equal(begun["model"][name], average), name


def test_a_checkpoint_of_optimizers_that_were_not_fused_goes_on_fused(shards, tmp_path):
    settings = tiny_settings(shards, tmp_path / "run")
    unfused = {"adamw": {"lr": 1e-3, "fused": False}}
    before = {**settings, "optimizer": unfused, "trainer": {**settings["trainer"], "max_duration": "1ep"}}
    before["algorithms"] = {**settings["algorithms"]}
    before["algorithms"]["adversarial"] = {**settings["algorithms"]["adversarial"], "optimizer": unfused}
    train_here(before)
    trainer = train_here(settings)
    adversarial = next(a for a in trainer.state.algorithms if isinstance(a, Adversarial))
    for optimizer in (trainer.state.optimizers[0], adversarial.optimizer):
        assert optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr"] < 1e-3
        assert max(int(state["step"]) for state in optimizer.state.values()) in (8, 10)  # of both starts together


def test_a_changed_configuration_is_told(shards, undisturbed, tmp_path, caplog):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/ep2-ba10")
    settings = resumable(shards, tmp_path / "run")
    settings["optimizer"]["adamw"]["lr"] = 5e-4
    train_here(settings)
    assert "optimizer.adamw.lr 0.001 -> 0.0005" in caplog.text
    assert caplog.text.count("has changed") == 1


def test_a_checkpoint_names_its_configuration_and_sizes(undisturbed):
    place = undisturbed / "checkpoints/ep0-ba2"
    assert {file.name for file in place.iterdir()} == {"state.pt", "config.yaml", "run.json", "part-0-of-1.json"}
    assert (place / "config.yaml").read_text() == (undisturbed / "config.yaml").read_text()
    assert (undisturbed / "checkpoints/ep2-ba10/metrics.json").is_file()
    assert_same_state(undisturbed / "checkpoints", undisturbed / "checkpoints")


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ClientError({"Error": {"Code": "NoSuchBucket", "Message": "x"}}, "PutObject"), "no such bucket"),
        (ClientError({"Error": {"Code": "AccessDenied", "Message": "x"}}, "PutObject"), "no permission"),
        (ClientError({"Error": {"Code": "InvalidAccessKeyId", "Message": "x"}}, "PutObject"), "wrong credentials"),
        (NoCredentialsError(), "no credentials"),
        (EndpointConnectionError(endpoint_url="http://x"), "does not answer"),
    ],
)
def test_errors_of_stores_say_what_to_do(error, meaning):
    assert meaning in reason(error)


@pytest.mark.parametrize(
    ("environment", "meaning"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "wrong credentials"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "wrong credentials"),
        ({"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"}, "no permission"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer"),
        ({"S3_ENDPOINT_URL": "127.0.0.1:9"}, "must be a URL"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_found_at_the_start(s3, shards, tmp_path, monkeypatch, environment, meaning):
    for name, value in s3.env(**environment).items():
        monkeypatch.setenv(name, value)
    settings = resumable(shards, tmp_path / "run")
    settings["trainer"]["save_folder"] = "s3://images/runs/a"
    with pytest.raises(UserError, match=meaning):
        train_here(settings)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("where", ["train", "eval"])
def test_data_that_is_not_there_is_found_at_the_start(s3, shards, tmp_path, monkeypatch, where):
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    settings = resumable(shards, tmp_path / "run")
    settings["data"][where]["path"] = "s3://nothing/here"
    with pytest.raises(UserError, match=rf"data\.{where}\.path: cannot read s3://nothing/here/index\.json"):
        train_here(settings)


def test_a_checkpoint_is_of_the_moment_of_its_copy(tmp_path):
    """Weights that change while it is written do not change in it; the next save takes the same memory."""
    weights = torch.zeros(1 << 22)
    writer, seen = Writer(tmp_path, {CONFIG: "seed: 0"}, mover=True), []
    writer.open_group([0])
    for step in (1, 2):
        weights.fill_(step)
        writer.write(f"ep0-ba{step}", "token", {"w": weights, "s": "text"}, False, lambda *told: seen.append(told))
        weights.fill_(-1)
        writer.thread.join()
        assert not writer.failure and writer.done == f"ep0-ba{step}"
        fetch(str(tmp_path), list_checkpoints(str(tmp_path))[0], tmp_path)  # checks every byte
        saved = torch.load(tmp_path / f"ep0-ba{step}" / STATE, weights_only=True)
        assert saved["s"] == "text" and saved["w"].eq(step).all()
    assert seen == [(tmp_path / f"ep0-ba{step}", [STATE, CONFIG, "part-0-of-1.json"]) for step in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ep0-ba1", "ep0-ba2"]


def test_what_cannot_be_written_is_told_and_leaves_no_whole_checkpoint(tmp_path):
    writer = Writer(tmp_path, {CONFIG: ""}, mover=True)
    writer.open_group([0])
    (tmp_path / ".saving-ep0-ba1").write_text("in the way")
    writer.write("ep0-ba1", "token", {"w": torch.zeros(3)}, False, lambda *_: pytest.fail("it was not written"))
    writer.thread.join()
    assert re.match(r"checkpoint ep0-ba1 could not be written to .*: .*Not a directory", writer.failure)
    assert not writer.done and not list_checkpoints(str(tmp_path))


def test_what_one_of_several_ranks_could_not_write_is_a_line():
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        failed = CheckpointException("write", {1: _wrap_exception(error)})
    assert _fault(failed) == "[Errno 28] No space left on device"
