"""How a process ends: interrupted at any moment, or when what it needs has gone; and how its loggers go on."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from composer import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from rae.adapters.composer import _Engine
from rae.config.errors import UserError
from rae.config.registry import register
from rae.survival import processes
from rae.training.saving import alone
from tests.conftest import ROOT, metrics_of, run, tiny_settings, train_here, wandb_file, write_yaml

AT = """
import os, runpy, signal, sys
from importlib.abc import MetaPathFinder

class At(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            for process in {whom}:
                os.kill(process, signal.{signal})

sys.meta_path.insert(0, At())
sys.argv = {words!r}
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else runpy.run_module(
    sys.argv[0], run_name="__main__", alter_sys=True)
"""


def at(moment: str, words: list[str], path: Path, whom: str = "[os.getpid()]", number: str = "SIGINT") -> str:
    """A script that runs a program, and signals at the import of a module."""
    parts = dict(moment=moment, words=words, whom=whom, root=str(ROOT), signal=number)
    (path / "at.py").write_text(AT.format(**parts))
    return str(path / "at.py")


@pytest.mark.parametrize("moment", ["omegaconf", "composer.trainer", "timm"])
def test_ctrl_c_while_a_run_starts_is_one_line(shards, tmp_path, moment):
    words = ["train.py", write_yaml(tiny_settings(shards, tmp_path / "run"), tmp_path)]
    done = run(sys.executable, at(moment, words, tmp_path), check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted; the same command goes on")
    assert done.stdout == ""


def test_ctrl_c_and_sigterm_end_other_commands_in_a_line(shards, tmp_path):
    yaml = write_yaml(tiny_settings(shards, tmp_path / "run"), tmp_path)
    for words, moment, number, code, line in (
        (["rae", "plan", yaml], "pydantic", "SIGINT", 130, "interrupted"),
        (["rae", "plan", yaml], "composer", "SIGTERM", 143, "interrupted"),
        (
            ["convert/imagefolder_to_mds.py", str(tmp_path), str(tmp_path / "out")],
            "PIL",
            "SIGINT",
            130,
            "interrupted: the",
        ),
    ):
        done = run(sys.executable, at(moment, words, tmp_path, number=number), check=False)
        assert done.returncode == code, (words, done.stderr)
        assert done.stderr.strip().startswith(line) and done.stderr.count("\n") == 1, (words, done.stderr)


def test_ctrl_c_under_the_composer_launcher_is_one_line(shards, tmp_path):
    """The launcher, and the rank that it waits for, hear of it together."""
    words = ["train.py", write_yaml(tiny_settings(shards, tmp_path / "run"), tmp_path)]
    script = at("composer.trainer", words, tmp_path, "(os.getppid(), os.getpid())")
    done = run("composer", "-n", "1", script, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted; the same command goes on"), done.stdout
    assert done.stdout == ""


def test_composer_still_takes_signals_over(tmp_path):
    """What :func:`rae.adapters.composer.leave_signals_alone` is for."""
    from composer.core import engine

    assert "signal.signal(signal.SIGINT" in Path(engine.__file__).read_text()
    mine = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    again = _Engine(mine).find_spec(engine.__name__, sys.modules["composer.core"].__path__)
    again.loader.exec_module(importlib.util.module_from_spec(again))
    assert {number: signal.getsignal(number) for number in mine} == mine


# --- what vanishes


@register("callback", "meanwhile")
class Meanwhile(Callback):
    """What happens beside a run after its second step."""

    def __init__(self, remove: list[str]):
        self.remove = remove

    def batch_end(self, state, logger):
        for path in self.remove if state.timestamp.batch == 2 else ():
            if os.path.isfile(path):
                os.remove(path)
            while os.path.isdir(path):  # TensorBoard's thread may write into it meanwhile
                shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def copied(shards, tmp_path) -> dict:
    """A run on data of its own."""
    for split in ("train", "eval"):
        shutil.copytree(shards / split, tmp_path / "data" / split)
    settings = tiny_settings(tmp_path / "data", tmp_path / "run") | {"algorithms": {}}
    settings["trainer"] |= {"max_duration": "9ba", "save_interval": "3ba"}
    return settings


@pytest.mark.parametrize(("gone", "workers"), [("train/shard.00009.mds", 0), ("train", 2), ("eval/shard.00001.mds", 2)])
def test_a_shard_that_vanishes_is_named_at_once(copied, tmp_path, monkeypatch, gone, workers):
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: pytest.fail("it is waited for"))
    copied["data"]["workers"] = workers
    copied["callbacks"] = {"meanwhile": {"remove": [str(tmp_path / "data" / gone)]}}
    with pytest.raises(UserError, match=r"data/.*\.mds is absent; restore it or convert again$"):
        train_here(copied)


@pytest.mark.parametrize("also", ["", "tensorboard"])
def test_a_runs_folder_that_is_deleted_is_one_line(copied, tmp_path, also):
    copied["callbacks"] = {"meanwhile": {"remove": [str(tmp_path / "run")]}}
    if also:
        copied["loggers"] = {"tensorboard": {"log_dir": f"{tmp_path}/run/tensorboard", "flush_interval": 1}}
    with pytest.raises(UserError, match=r"run_dir: .*/run is gone: it was deleted while the run was in it"):
        train_here(copied)


HOLDER = """
import sys
from rae.survival.processes import RunLock
locks = [RunLock(sys.argv[1], on_machine) for on_machine in (False, True)]
for lock in locks:
    lock.acquire()
    lock.share()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_start_waits_for_dying_processes_of_a_folder_that_was_wiped(tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    words = [sys.executable, "-c", HOLDER, folder]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert other.stdout.readline() == "locked\n"
    shutil.rmtree(folder)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        other.kill()
        other.wait()

    monkeypatch.setattr(processes.time, "sleep", sleep)
    with alone(folder, "run_dir"):
        assert waited == [0.1]
    other.stdin.close()
    other.stdout.close()


OPENER = """
import sys
from rae.data.dataset import ImageDataset
from rae.data.decoding import eval_transform
from rae.data.reader import ImageStream
folder, cache = sys.argv[1:]
data = ImageDataset(streams=[ImageStream(remote=folder, local=cache)], transform=eval_transform(64), seed=0)
print("open", flush=True)
sys.stdin.read()
"""


def test_what_a_run_has_left_is_removed_though_another_has_seen_it(shards, tmp_path):
    """Streaming keeps mapped whatever shared memory it finds while it looks for a free number."""
    cache = str(tmp_path / "cache")
    words = [sys.executable, "-c", OPENER, str(shards / "train"), cache]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert other.stdout.readline() == "open\n"
    (number,) = processes._segments_of([cache])
    processes.remove_dead_segments([cache])
    assert processes._segments_of([cache]) == [number]
    processes.remove_dead_segments([cache], own=[cache])  # whose lock says that no process of the run lives
    assert processes._segments_of([cache]) == []
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()


# --- loggers


def test_loggers_go_on_as_one_run_with_the_same_steps(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = tiny_settings(shards, tmp_path / "run") | {"algorithms": {}, "metrics": {"psnr": {}}}
    settings["loggers"] = {"jsonl": {}, "wandb": {"project": "p"}, "tensorboard": {"log_dir": str(tmp_path / "tb")}}
    settings["trainer"] |= {"save_interval": "2ba", "max_duration": "4ba"}
    numbers = "tensorboard.summary.writer.event_file_writer._global_uid"  # by which files of one second are ordered
    monkeypatch.setattr(numbers, AtomicCounter(0))
    train_here(settings)
    wandb_file(tmp_path / "run")
    monkeypatch.setattr(numbers, AtomicCounter(0))
    shutil.rmtree(tmp_path / "run/checkpoints/ep0-ba4")  # as after a kill between two saves
    settings["trainer"]["max_duration"] = "6ba"
    train_here(settings)
    wandb_file(tmp_path / "run")
    parts = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))  # two folders of one second get a suffix
    assert len(parts) == 2 and len({part.name for part in parts}) == 1
    events = EventAccumulator(str(tmp_path / "tb/run")).Reload()
    records = metrics_of(tmp_path / "run")
    for name in ("loss/train/l1", "lr/decoder", "gradient/decoder", "metrics/eval/psnr"):
        told = [(record["batch"], record[name]) for record in records if name in record]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in told], name
        assert [value for _, value in found] == pytest.approx([value for _, value in told])
    # Another run, with this one's weights or state, is another.
    settings |= {"run_name": "other", "run_dir": str(tmp_path / "other")}
    settings["trainer"] |= {"load_path": str(tmp_path / "run"), "max_duration": "7ba"}
    train_here(settings)
    wandb_file(tmp_path / "other")
    (other,) = (tmp_path / "other/wandb").glob("offline-run-*/run-*.wandb")
    assert other.name != parts[0].name
