"""Runs that are stopped or killed, and go on with the same command to the same end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest
import torch
from streaming.base.shared.prefix import _pack_locals

from rae.__main__ import main
from rae.config.errors import UserError
from rae.survival.checkpoints import age
from rae.survival.processes import RunLock, remove_dead_segments
from tests.conftest import (
    PATIENCE,
    ROOT,
    assert_same_state,
    figures,
    generator_settings,
    layout_settings,
    load_newest,
    make_shards,
    resumable,
    tensors_of,
    train_here,
    train_ranks,
    write_yaml,
)


def start(settings: dict, path: Path, *overrides: str, ranks: int | None = None, **env: str) -> subprocess.Popen:
    """Start training in a process group of its own; ``ranks`` of the launcher, or one process without it."""
    command = [sys.executable] if ranks is None else ["composer", "-n", str(ranks)]
    return subprocess.Popen(
        [*command, "train.py", write_yaml(settings, path), *overrides],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **env,
        },
        stdout=(path / "stdout").open("w"),
        stderr=(path / "stderr").open("w"),
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, condition, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.01)


def end(process: subprocess.Popen, seconds: float = PATIENCE) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def keep_until(run_dir: Path, batch: int) -> None:
    """What a kill just after the checkpoint of step ``batch`` leaves."""
    for checkpoint in (run_dir / "checkpoints").glob("ep*"):
        if int(checkpoint.name.partition("-ba")[2]) > batch:
            shutil.rmtree(checkpoint)


def assert_same_figures(a: Path, b: Path) -> None:
    """Losses, discriminator figures, learning rates and metrics of every step are equal."""
    left, right = figures(a), figures(b)
    assert left == right


@pytest.mark.parametrize("batch", [2, 6, 10])
def test_resume_is_exact(shards, undisturbed, tmp_path, batch):
    """After a kill in mid-epoch, in the second epoch, and between the last step and the last evaluation."""
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    keep_until(tmp_path / "run", batch)
    if batch == 10:
        shutil.rmtree(tmp_path / "run/checkpoints/ep2-ba10")
    train_here(resumable(shards, tmp_path / "run"))
    assert_same_state(undisturbed / "checkpoints", tmp_path / "run/checkpoints")
    assert_same_figures(undisturbed, tmp_path / "run")
    assert (tmp_path / "run/metrics.json").read_text() == (undisturbed / "metrics.json").read_text()


@pytest.mark.parametrize("stop", ["3ba", "1ep"])
def test_a_longer_duration_goes_on_exactly(shards, undisturbed, tmp_path, stop):
    settings = resumable(shards, tmp_path / "run")
    settings["metrics"] = {}
    settings["trainer"]["max_duration"] = stop
    train_here(settings)
    train_here(resumable(shards, tmp_path / "run"))
    assert_same_state(undisturbed / "checkpoints", tmp_path / "run/checkpoints")


def test_sigterm_saves_and_leaves(shards, undisturbed, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    settings["trainer"]["save_interval"] = "1ep"
    log = tmp_path / "run/metrics.jsonl"
    process = start(settings, tmp_path)
    wait_for(process, lambda: log.exists() and '"batch": 2' in log.read_text())
    os.killpg(process.pid, signal.SIGTERM)  # its loader workers get it too, as from a scheduler
    assert end(process) == 128 + signal.SIGTERM
    error = (tmp_path / "stderr").read_text()
    assert "SIGTERM: stopped after step" in error
    assert "Traceback" not in error
    saved = [checkpoint.name for checkpoint in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    assert f"step {saved[0].partition('-ba')[2]}," in error
    train_here(resumable(shards, tmp_path / "run"))
    assert_same_state(undisturbed / "checkpoints", tmp_path / "run/checkpoints")


def sealed(server, prefix: str) -> list[str]:
    """Names of the complete checkpoints of one writer in the bucket."""
    return [key.split("/")[-2] for key in server.keys(prefix) if key.endswith("part-0-of-1.json")]


@pytest.fixture
def bucket(s3, monkeypatch):
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    return s3


def test_a_new_machine_needs_the_bucket_alone(shards, undisturbed, bucket, tmp_path, caplog):
    """Shards and checkpoints in the bucket; the first machine is killed and its disk is lost; then a finished run."""
    make_shards(tmp_path / "source", "s3://images/data")
    settings = resumable(shards, tmp_path / "machine")
    settings["trainer"]["save_folder"] = "s3://images/runs/machine"
    for split in ("train", "eval"):
        settings["data"][split]["path"] = f"s3://images/data/{split}"
    process = start(settings, tmp_path / "first")
    wait_for(process, lambda: sealed(bucket, "runs/machine/"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "machine")
    train_here(settings)
    assert_same_state(undisturbed / "checkpoints", "s3://images/runs/machine")
    shutil.rmtree(tmp_path / "machine")
    assert "is finished" not in caplog.text
    train_here(settings)
    assert "is finished (2ep)" in caplog.text
    assert not (tmp_path / "machine/metrics.jsonl").exists()


def test_a_generator_needs_the_bucket_alone(shards, undisturbed, bucket, tmp_path, monkeypatch):
    """Two sharded ranks on a mixture, autoencoder and checkpoints in the bucket; a rank and the disk are lost."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(["export", str(undisturbed), "s3://images/autoencoder"])

    def settings_of(name: str) -> dict:
        settings = generator_settings(shards, tmp_path / name) | {"parallelism": "fsdp"}
        settings["model"]["diffusion"]["autoencoder"] = "s3://images/autoencoder"
        parts = {
            key: {"path": str(shards / key), "proportion": share} for key, share in (("train", 0.75), ("eval", 0.25))
        }
        settings["data"] |= {"train": {"streams": parts, "resize": 72}, "eval": None}
        settings["metrics"] = {}
        settings["loggers"]["wandb"] = {"project": "p"}
        settings["trainer"] |= {
            "save_folder": f"s3://images/runs/{name}",
            "save_interval": "2ba",
            "max_duration": "4ep",
        }
        return settings

    bucket_of = "s3://images/runs"
    train_ranks(settings_of("whole"), tmp_path / "first")
    process = start(settings_of("killed"), tmp_path / "second", ranks=2)
    wait_for(process, lambda: sealed(bucket, "runs/killed/"))
    launched = [child.pid for child in psutil.Process(process.pid).children()]
    os.kill(launched[1], signal.SIGKILL)
    assert end(process) != 0
    shutil.rmtree(tmp_path / "killed")
    train_ranks(settings_of("killed"), tmp_path / "second")
    assert_same_state(f"{bucket_of}/whole", f"{bucket_of}/killed", tensors=60)


def test_a_server_that_goes_away(shards, bucket, tmp_path):
    """Training goes on while uploads are tried again; then the run stops and says which checkpoint is safe."""
    settings = resumable(shards, tmp_path / "run")
    settings["data"]["eval"] = None
    settings |= {"metrics": {}, "callbacks": {}, "checkpoints": {"upload_attempts": 2}}
    settings["trainer"] |= {"save_folder": "s3://images/runs/away", "max_duration": "2000ba"}
    process = start(settings, tmp_path)
    wait_for(process, lambda: sealed(bucket, "runs/away/"))
    bucket.stop()
    seen = len(figures(tmp_path / "run"))
    assert end(process) == 2
    assert len(figures(tmp_path / "run")) > seen + 2
    bucket.start()
    safe = sorted(sealed(bucket, "runs/away/"), key=age)
    line = (tmp_path / "stderr").read_text().strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ep")
    assert "could not be uploaded to s3://images/runs/away in 2 attempts: the server does not answer" in line
    assert f"{safe[-1]} is the newest safe checkpoint" in line
    kept = Path(line.partition("it is kept in ")[2].partition(";")[0])
    assert (kept / "state.pt").is_file()
    newest = max((path.name for path in kept.parent.iterdir()), key=age)
    settings["trainer"]["max_duration"] = f"{age(newest)[0] + 1}ba"
    train_here(settings)  # goes on from what could not be uploaded, and uploads it
    assert newest in sealed(bucket, "runs/away/")


@pytest.mark.parametrize(
    ("layout", "victim"),
    [pytest.param(*killed, marks=pytest.mark.long) for killed in (("ddp", "launcher"), ("fsdp", "rank"))]
    + [("fsdp", "nobody")],
)
def test_kills_of_two_ranks(shards, ranks, tmp_path, layout, victim):
    """A launcher whose ranks are left behind, one of the ranks, or a SIGTERM to the launcher, upon which they save."""
    settings = layout_settings(shards, tmp_path / "run", layout)
    process = start(settings, tmp_path, ranks=2)
    wait_for(process, lambda: (tmp_path / "run/checkpoints/ep0-ba4").exists())
    launched = [child.pid for child in psutil.Process(process.pid).children()]
    if victim == "nobody":
        process.terminate()
    else:
        os.kill(process.pid if victim == "launcher" else launched[1], signal.SIGKILL)
    assert end(process) != 0
    if victim == "nobody":
        assert (tmp_path / "stderr").read_text().count("SIGTERM: stopped after step") == 1
    train_ranks(settings, tmp_path)
    assert_same_state(ranks / layout / "checkpoints", tmp_path / "run/checkpoints")
    assert_same_figures(ranks / layout, tmp_path / "run")


def test_a_killed_loader_worker(shards, undisturbed, tmp_path):
    settings = resumable(shards, tmp_path / "run")
    process = start(settings, tmp_path)
    wait_for(process, lambda: (tmp_path / "run/checkpoints/ep0-ba2").exists())
    workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    workers[0].kill()
    assert end(process) != 0
    train_here(settings)
    assert_same_state(undisturbed / "checkpoints", tmp_path / "run/checkpoints")
    assert_same_figures(undisturbed, tmp_path / "run")


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [pytest.param("one", "ddp", marks=pytest.mark.long), ("one", "fsdp"), ("ddp", "one"), ("fsdp", "one")],
)
def test_another_number_of_ranks_goes_on(shards, ranks, tmp_path, saved, resumed):
    """Data order and figures go on as in the run of one rank, but for the rounding of sums in another order."""
    shutil.copytree(ranks / saved, tmp_path / "run")
    keep_until(tmp_path / "run", 4)
    settings = layout_settings(shards, tmp_path / "run", resumed)
    if resumed == "one":
        train_here(settings)
    else:
        train_ranks(settings, tmp_path)
    one, went_on = figures(ranks / "one"), figures(tmp_path / "run")
    assert [record["batch"] for record in went_on] == [record["batch"] for record in one]
    for expected, record in zip(one, went_on, strict=True):
        for name in expected.keys() & {"loss/train/l1", "loss/train/perceptual", "lr/decoder", "metrics/eval/psnr"}:
            assert record[name] == pytest.approx(expected[name], rel=2e-3), (record["batch"], name)


def test_forms_of_a_checkpoint_hold_the_same(ranks, tmp_path):
    """Whole and sharded checkpoints of the same step: after conversion, equal names and equal weights."""
    whole, sharded = (load_newest(ranks / layout / "checkpoints") for layout in ("ddp", "fsdp"))
    for metadata in (ranks / "fsdp/checkpoints").glob("*/.metadata"):
        assert b"pathlib" not in metadata.read_bytes()  # which Python 3.13 names so that earlier ones cannot read it
    for key in ("model", "algorithms", "optimizers"):
        left, right = tensors_of(whole[key]), tensors_of(sharded[key])
        assert left.keys() == right.keys()
    for name, weight in whole["model"].items():
        torch.testing.assert_close(sharded["model"][name], weight, rtol=1e-2, atol=1e-3)


def test_two_runs_at_once_on_the_same_data(shards, undisturbed, tmp_path):
    process = start(resumable(shards, tmp_path / "a/run"), tmp_path / "a")
    wait_for(process, (tmp_path / "a/run/config.yaml").exists)  # its imports are done
    train_here(resumable(shards, tmp_path / "b/run"))
    assert end(process) == 0
    for name in ("a", "b"):
        assert_same_state(undisturbed / "checkpoints", tmp_path / name / "run/checkpoints")


def test_the_same_run_twice_at_once_is_refused(shards, tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    with pytest.raises(UserError, match="in use by another run"):
        RunLock(tmp_path / "run").acquire(seconds=0)


def test_dead_shared_memory_goes_and_live_stays(tmp_path):
    def segment(number: int, folder: str) -> SharedMemory:
        data = _pack_locals([folder], number)
        made = SharedMemory(f"{number:06}_locals", create=True, size=len(data))
        made.buf[: len(data)] = data
        resource_tracker.unregister(made._name, "shared_memory")
        return made

    # Numbers that Streaming, which counts up from 0, does not come to while it looks for free ones.
    owners = ("ours", "ours", "others")
    dead, live, other = (segment(999_990 + i, str(tmp_path / owner)) for i, owner in enumerate(owners))
    dead.close()
    other.close()
    remove_dead_segments([str(tmp_path / "ours")])
    left = {path.name for path in Path("/dev/shm").glob("99999*_locals")}
    live.close()
    for name in left:
        Path("/dev/shm", name).unlink()
    assert left == {"999991_locals", "999992_locals"}
