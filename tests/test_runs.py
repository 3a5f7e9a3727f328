"""Whole runs through the command: several ranks, stop and resume, what lies in the run's folder."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.conftest import figures, launch, load_newest, metrics_of, resumable, tensors_of, tiny_settings, train_here


def test_what_a_run_leaves_in_its_folder(undisturbed):
    records = figures(undisturbed)
    assert [r["batch"] for r in records if "loss/train/total" in r] == list(range(1, 11))
    first, last = records[0], [r for r in records if "loss/train/total" in r][-1]
    assert "discriminator/loss" not in first
    assert "loss/train/gan" not in first
    wanted = {f"loss/train/{name}" for name in ("total", "l1", "perceptual", "gan")}
    wanted |= {f"discriminator/{name}" for name in ("loss", "logits_real", "logits_fake", "accuracy")}
    assert wanted | {"gan/adaptive_weight", "lr/decoder", "lr/discriminator"} <= last.keys()
    assert json.loads((undisturbed / "metrics.json").read_text())["eval"].keys() == {
        *("psnr", "ssim", "discriminator/logits_real", "discriminator/logits_fake", "discriminator/accuracy"),
    }
    resolved = OmegaConf.load(undisturbed / "config.yaml")
    assert resolved.data.batch_size == 8
    assert resolved.model.noise_tau == 0.8
    pictures = sorted(p.name for p in (undisturbed / "pictures").iterdir())
    assert pictures == ["ba0000004.png", "ba0000008.png", "ba0000010.png"]
    assert Image.open(undisturbed / "pictures/ba0000010.png").size == (76 + 4 * 66 + 2, 4 * 66 + 2)
    assert list((undisturbed / "tensorboard").rglob("events.out.tfevents.*"))


def test_tensorboard_holds_the_figures_and_the_pictures(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {"scalars": set(), "images": set()}
    for file in (undisturbed / "tensorboard").rglob("events.out.tfevents.*"):
        found = EventAccumulator(str(file)).Reload().Tags()
        for kind in tags:
            tags[kind] |= set(found[kind])
    assert {"loss/train/total", "discriminator/accuracy", "metrics/eval/psnr"} <= tags["scalars"]
    assert "pictures/reconstructions" in tags["images"]


def test_a_checkpoint_holds_trained_weights_alone(undisturbed):
    state = load_newest(undisturbed / "checkpoints")
    assert all(name.startswith("rae.decoder.") for name in state["model"])
    names = " ".join(tensors_of(state["algorithms"]))
    assert "heads" in names
    assert "backbone" not in names
    assert "average" in names


def test_running_a_finished_run_again_says_so(shards, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "metrics.json")]
    before = [file.read_text() for file in files]
    done = launch(resumable(shards, tmp_path / "run"), tmp_path)
    assert "is finished (2ep)" in done.stderr
    assert [file.read_text() for file in files] == before


def test_bf16_on_a_cpu_is_one_warning(shards, tmp_path, caplog, recwarn):
    settings = tiny_settings(shards, tmp_path / "run")
    settings["trainer"] |= {"precision": "amp_bf16", "max_duration": "1ba"}
    train_here(settings)
    assert caplog.text.count("needs a GPU; on this CPU the run uses fp32") == 1
    assert not recwarn.list


def test_a_run_that_is_as_it_should_be_warns_of_nothing(undisturbed):
    assert "Warning" not in (undisturbed.parent / "stderr").read_text()


def test_ranks_are_identical_after_every_step(ranks):
    equal = [r["spy/equal"] for r in metrics_of(ranks / "ddp") if "spy/equal" in r]
    assert equal == [1.0] * 10


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_match_one(ranks, parallel):
    one, two = figures(ranks / "one"), figures(ranks / parallel)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # Rounding fakes to 8 bits and signs of logits turn differences of 1e-8 into larger ones, after a while.
            # How fast depends on the processor; that later steps are the same is seen where they begin from one state.
            late = 2e-2 if name.startswith(("gradient/", "gan/")) else 2e-3  # gradients feel them first, and most
            rel, absolute = (1e-4, 1e-5) if a["batch"] <= 4 else (late, 1e-3) if a["batch"] <= 6 else (0.2, 0.05)
            if name.endswith("discriminator/accuracy"):
                absolute = 0.05  # of its 1944 places, whose logits lie around 0
            assert b[name] == pytest.approx(a[name], rel=rel, abs=absolute), (a["batch"], name)
