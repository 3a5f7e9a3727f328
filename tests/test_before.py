"""What was made before the package was laid out anew is read, and goes on; see before/make.py."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rae.config import registry
from rae.config.registry import import_plugins
from rae.exchange.handover import import_from
from rae.exchange.sources import open_source
from tests.conftest import ROOT, figures, run, train_here

BEFORE = ROOT / "tests/before"


@pytest.fixture(autouse=True)
def _paths_are_relative(monkeypatch):
    monkeypatch.chdir(ROOT)


def go_on(name: str, folder: Path, **changed) -> list[dict]:
    """Continue a run from before in a folder of its own; returns its figures after the checkpoint's three steps."""
    shutil.copytree(BEFORE / name, folder / name)
    settings = OmegaConf.to_container(OmegaConf.load(BEFORE / name / "checkpoints/ep1-ba3/config.yaml"))
    train_here(settings | {"run_dir": str(folder / name)} | changed)
    return [record for record in figures(folder / name) if record["batch"] > 3]


def test_a_run_goes_on(tmp_path):
    expected = [record for record in figures(BEFORE / "one") if record["batch"] > 3]
    found = go_on("one", tmp_path)
    assert [record["batch"] for record in found] == [record["batch"] for record in expected]
    for now, then in zip(found, expected, strict=True):
        assert now.keys() == then.keys()
        for name in then:  # on another processor, the GAN magnifies rounding
            assert now[name] == pytest.approx(then[name], rel=2e-2, abs=1e-3), (now["batch"], name)


def test_a_sharded_run_goes_on_on_one_rank(tmp_path):
    found = go_on("sharded", tmp_path, parallelism="ddp", fsdp={})
    assert {record["batch"] for record in found} == {4, 5, 6}
    assert all(math.isfinite(value) for record in found for value in record.values())


def opened(layout: str, tmp_path: Path):
    if layout != "published":
        return open_source(str(BEFORE / layout))
    encoder = {"dinov2": {"pretrained": "tests/golden/encoders/dinov2-tiny", "input_size": 56}}
    return import_from(str(BEFORE / layout), encoder=encoder, scratch=tmp_path)


@pytest.mark.parametrize("layout", ["rae", "published", "diffusers"])
def test_an_export_of_each_format_is_read(layout, tmp_path):
    expected = load_file(BEFORE / f"{layout}.safetensors")
    with torch.no_grad():
        recon = opened(layout, tmp_path).rae(expected["image"])
    assert (recon - expected["recon"]).abs().max() < 1e-4


PLUGIN = """
from rae.algorithms import LossTerm
from rae.encoders import Encoder
from rae.metrics import PerImage
from rae.decoder import Decoder, load_published
from rae.model import RAE
from rae.registry import TimeString, register

@register("metric", "from_before")
def from_before(start: TimeString = "1ep"):
    return PerImage(lambda recon, image: (recon - image).flatten(1).amax(1))
"""


def test_the_demos_module_is_found():
    done = run(sys.executable, "-m", "rae.demo", "--help")
    assert "--data-only" in done.stdout


def test_a_plugins_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._plugins, "metric", dict(registry.plugins("metric")))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    import_plugins([str(tmp_path / "plugin.py")])
    assert "from_before" in registry.plugins("metric")
