"""Runs that are stopped or killed, and go on with the same command to the same end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, assert_same_state, figures, resumable, train_here, write_yaml


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


def wait_for(process: subprocess.Popen, condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.01)


def end(process: subprocess.Popen, seconds: float = 120) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def keep_until(run_dir: Path, batch: int) -> None:
    """What a kill just after the checkpoint of step ``batch`` leaves."""
    for checkpoint in (run_dir / "checkpoints").iterdir():
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
    process.send_signal(signal.SIGTERM)
    assert end(process) == 128 + signal.SIGTERM
    error = (tmp_path / "stderr").read_text()
    assert "SIGTERM: stopped after step" in error
    assert "Traceback" not in error
    saved = [checkpoint.name for checkpoint in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    assert f"step {saved[0].partition('-ba')[2]}," in error
    train_here(resumable(shards, tmp_path / "run"))
    assert_same_state(undisturbed / "checkpoints", tmp_path / "run/checkpoints")
