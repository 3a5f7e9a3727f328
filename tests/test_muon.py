"""The optimizer of RAEv2: what it computes, and that it is the same on ranks and after a resume."""

import shutil

import pytest
import torch

from rae.config.arguments import build
from rae.training.muon import orthogonal
from tests.conftest import (
    assert_same_state,
    figures,
    generator_settings,
    load_newest,
    made_once,
    tensors_of,
    train_here,
    train_ranks,
)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (128, 1)])
def test_a_matrix_becomes_its_polar_factor(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix, steps=12)
    assert (made - u @ v).abs().max() < 0.02
    values, kept = torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonal(matrix))
    assert kept.max() < 1.15
    assert kept[values > 0.05 * values.max()].min() > 0.85
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))
    assert torch.allclose(orthogonal(1e4 * matrix), orthogonal(matrix), atol=1e-4)


def test_steps_are_those_of_the_paper():
    torch.manual_seed(0)
    matrix, vector = (torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (5,)))
    kept, others = matrix.detach().clone(), torch.nn.Parameter(vector.detach().clone())
    optimizer = build(
        "optimizer", {"muon": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}}, "", params=[matrix, vector]
    )
    adamw = build("optimizer", {"adamw": {"lr": 0.01, "weight_decay": 0.1}}, "", params=[others])
    momentum = torch.zeros(8, 24)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(8, 24), torch.randn(5)
        others.grad = vector.grad.clone()
        momentum = 0.9 * momentum + matrix.grad
        direction = orthogonal(matrix.grad + 0.9 * momentum)
        kept = kept * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 24**0.5 * direction
        optimizer.step()
        adamw.step()
    assert torch.allclose(matrix, kept, atol=1e-6)
    assert torch.allclose(vector, others, atol=1e-7)
    assert optimizer.state[matrix].keys() == {"step", "momentum_buffer"}


def settings_of(shards, run_dir, layout: str | None = None) -> dict:
    settings = generator_settings(shards, run_dir)
    settings["optimizer"] = {"muon": {"lr": 1e-3}}
    settings |= {"metrics": {}, "callbacks": {}}
    if layout:
        settings["parallelism"] = layout
    settings["trainer"] |= {"device_train_microbatch_size": 2}
    return settings


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    return made_once(tmp_path_factory, "muon", lambda root: train_here(settings_of(shards, root / "run"))) / "run"


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_ranks_take_the_same_steps_and_go_on_exactly(shards, trained, tmp_path, layout):
    settings = settings_of(shards, tmp_path / "run", layout)
    train_ranks(settings, tmp_path)
    for ours, theirs in zip(figures(tmp_path / "run"), figures(trained), strict=True):
        for name in theirs.keys() & {"loss/train/flow", "gradient/network"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (name, theirs["batch"])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(max((tmp_path / "again/checkpoints").iterdir(), key=lambda path: int(path.name.partition("-ba")[2])))
    train_ranks(settings_of(shards, tmp_path / "again", layout), tmp_path)
    assert_same_state(tmp_path / "run/checkpoints", tmp_path / "again/checkpoints", tensors=60)
    held = tensors_of(load_newest(tmp_path / "run/checkpoints")["optimizers"])
    assert sum("momentum_buffer" in name for name in held) > 10


def test_another_kind_of_optimizer_is_refused(shards, trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "run/checkpoints")
    settings = settings_of(shards, tmp_path / "run")
    settings["optimizer"] = {"adamw": {"lr": 1e-3}}
    settings["trainer"]["max_duration"] = "3ep"
    with pytest.raises(Exception, match="of optimizer muon, not adamw"):
        train_here(settings)
