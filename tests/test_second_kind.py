"""A second kind of model, the guide's, goes through everything that an autoencoder goes through."""

import json
import shutil

import pytest
import torch
from PIL import Image

import rae
from rae.__main__ import main
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.training.checks import check
from tests.conftest import (
    ROOT,
    assert_same_state,
    figures,
    launch,
    load_newest,
    made_once,
    metrics_of,
    run,
    tiny_settings,
    train_here,
)
from tests.test_docs import write_examples


@pytest.fixture(scope="session")
def settings_of(shards, tmp_path_factory):
    """(the run's folder) -> a configuration that trains it; the plugin's file is the same in all."""
    plugin = made_once(tmp_path_factory, "denoiser", lambda root: write_examples(ROOT / "docs/plugins.md", root))
    clipping = {"clipping_type": "norm", "clipping_threshold": 1.0}

    def made(run_dir) -> dict:
        settings = tiny_settings(shards, run_dir)
        settings |= {
            "imports": [str(plugin / "my_model.py")],
            "model": {"denoiser": {"width": 6}},
            "algorithms": {"ema": {"decay": 0.9}, "gradient_clipping": clipping},
            "callbacks": {"pictures": {"interval": "4ba", "count": 4}, "histograms": {"interval": "5ba"}},
            "compile": dict.fromkeys(("encoder", "decoder", "perceptual", "discriminator"), True)
            | {"backend": "eager"},
        }
        settings["trainer"] |= {"save_interval": "3ba", "device_train_microbatch_size": 4}
        return settings

    return made


@pytest.fixture(scope="session")
def trained(settings_of, tmp_path_factory):
    return made_once(tmp_path_factory, "second-kind", lambda root: train_here(settings_of(root / "run")))


def test_it_trains_and_logs(trained):
    steps = [r for r in figures(trained / "run") if "loss/train/total" in r]
    assert [r["batch"] for r in steps] == list(range(1, 11))
    assert steps[-1]["loss/train/mse"] < steps[0]["loss/train/mse"]
    assert {"lr/network", "gradient/network", "loss/train/mse", "loss/train/total"} <= steps[-1].keys()
    logged = {name for record in metrics_of(trained / "run") for name in record}
    assert {"metrics/eval/psnr", "histograms/clean/mean", "time/remaining"} <= logged


def test_it_is_drawn(trained):
    pictures = sorted(path.name for path in (trained / "run/pictures").iterdir())
    assert pictures == ["ba0000004.png", "ba0000008.png", "ba0000010.png"]
    rows = ("noised", "live", "ema")
    assert Image.open(trained / "run/pictures/ba0000010.png").size == (76 + 4 * 66 + 2, len(rows) * 66 + 2)


def test_it_goes_on_exactly_from_the_middle_of_an_epoch(settings_of, trained, tmp_path):
    stopped = settings_of(tmp_path / "run")
    stopped["trainer"]["max_duration"] = "3ba"
    train_here(stopped)
    train_here(settings_of(tmp_path / "run"))
    assert_same_state(trained / "run/checkpoints", tmp_path / "run/checkpoints", tensors=8)
    assert figures(tmp_path / "run")[-2:] == figures(trained / "run")[-2:]


def test_a_checkpoint_holds_it_and_its_average(trained):
    state = load_newest(trained / "run/checkpoints")
    assert state["model"].keys() == dict(state["algorithms"])["EMA"]["average"].keys()
    assert all(name.startswith("network.") for name in state["model"])


def test_its_export_holds_the_average_and_loads(trained, tmp_path, capsys):
    out = tmp_path / "export"
    main(["export", str(trained / "run"), str(out)])
    average = dict(load_newest(trained / "run/checkpoints")["algorithms"])["EMA"]["average"]
    loaded = rae.load(out)  # registered in this process already
    assert all(torch.equal(tensor, average[f"network.{name}"]) for name, tensor in loaded.state_dict().items())
    card = (out / "README.md").read_text()
    assert "denoiser (width 6)" in card
    assert "Representation Autoencoder" not in card
    capsys.readouterr()
    main(["inspect", str(out)])
    main(["inspect", str(trained / "run")])
    main(["inspect", str(next((trained / "run/checkpoints").iterdir()))])
    told = capsys.readouterr().out
    assert told.count("denoiser (width 6)") == 3
    assert "model: network" in told


def test_the_command_finds_what_training_found(trained, tmp_path):
    main(["evaluate", str(trained / "run"), "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())["sources"][0]["noise_tau"]["0"]
    expected = json.loads((trained / "run/metrics.json").read_text())["eval"]
    assert found.keys() == expected.keys()
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=0.02)  # its noise is another each time


def test_its_plugin_is_imported_on_the_users_word_alone(trained, tmp_path):
    main(["export", str(trained / "run"), str(tmp_path / "out")])
    script = "import sys, rae; print(type(rae.load(sys.argv[1], imports=len(sys.argv) > 2)).__name__)"
    refused = run("python", "-c", script, str(tmp_path / "out"), check=False)
    assert "its model 'denoiser' needs" in refused.stderr
    assert run("python", "-c", script, str(tmp_path / "out"), "yes").stdout.strip() == "Sequential"


def test_what_is_for_autoencoders_says_so(shards, settings_of, trained, tmp_path, capsys):
    for words in (
        ["export", str(trained / "run"), str(tmp_path / "out"), "--format", "diffusers"],
        ["export", str(trained / "run"), str(tmp_path / "out"), "--with-encoder"],
        ["reconstruct", str(trained / "run"), str(shards / "eval"), "--out", str(tmp_path / "look")],
        ["evaluate", str(trained / "run"), "--tau", "0.4"],
        ["stats", str(trained / "run"), str(tmp_path / "stat.pt"), "--data", str(shards / "eval")],
    ):
        with pytest.raises(SystemExit):
            main(words)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        assert "autoencoder" in error
    settings = settings_of(tmp_path / "run")
    settings["algorithms"] = tiny_settings(shards, tmp_path)["algorithms"]
    with pytest.raises(UserError, match="adversarial: it trains autoencoders"):
        train_here(settings)
    del settings["algorithms"]["adversarial"]
    with pytest.raises(UserError, match="perceptual is of reconstructions; this model's outputs hold no 'recon'"):
        train_here(settings)
    settings["data"]["eval"]["noise_taus"] = [0.4]
    with pytest.raises(UserError, match=r"data.eval.noise_taus: noise is for the latents of autoencoders"):
        train_here(settings)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"denoizer": {}}, r"unknown model 'denoizer' \(did you mean 'denoiser'\?\)"),
        ({"denoiser": {"widht": 6}}, r"unknown key 'model.denoiser.widht' \(did you mean 'width'\?\)"),
        ({"denoiser": {"width": "wide"}}, "model.denoiser.width"),
        ({"denoiser": 3}, r"model: arguments of 'denoiser' are written as {argument: value}, not 3"),
        ({"encodr": "dinov2"}, r"arguments of 'encodr' are written as {argument: value}, not 'dinov2'"),
        ("autoencoder", "missing value: model.encoder is required"),
    ],
)
def test_its_arguments_are_checked(settings_of, tmp_path, model, line):
    (tmp_path / "run.yaml").write_text(json.dumps({**settings_of(tmp_path / "run"), "model": model}))
    with pytest.raises(UserError, match=line):
        check(load_config(str(tmp_path / "run.yaml")))


def test_it_is_planned(settings_of, trained, tmp_path):
    settings = settings_of(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    # A process of its own: this one has ranks already, if only one.
    words = ("plan", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "plan.json"), "--gpus", "2")
    run("python", "-m", "rae", *words)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["memory"].keys() == {"ddp", "fsdp"}
    assert plan["parameters"] == {"network": [3 * 6 * 9 + 6 + 6 * 3 * 9 + 3, True]}
    multiplications = 2 * 64 * 64 * (3 * 6 * 9)  # of both convolutions, and back: twice the weights, once the image
    assert plan["gflops"][0]["network"] == pytest.approx(2 * multiplications * (1 + 1 + 0.5) / 1e9)


def test_a_bad_step_is_told_by_its_own_outputs(settings_of, tmp_path):
    settings = settings_of(tmp_path / "run")
    settings["model"] = {"denoiser": {"level": float("inf")}}
    with pytest.raises(UserError, match="not finite: loss/mse"):
        train_here(settings)
    told = json.loads((tmp_path / "run/guard.jsonl").read_text().splitlines()[0])
    assert told["ranks"][0]["samples"][0]["not_finite"] == ["clean"]


PLAIN = """
from composer import ComposerModel
from rae import register

@register("model", "plain")
class Plain(ComposerModel):
    def forward(self, batch):
        return {}

    def loss(self, outputs, batch):
        return {}
"""


def test_what_is_no_run_model_says_so(settings_of, tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN)
    settings = settings_of(tmp_path / "run") | {"imports": [str(tmp_path / "plain.py")], "model": {"plain": {}}}
    with pytest.raises(UserError, match=r"model.plain: it makes a Plain, which is no rae.RunModel"):
        train_here(settings)


@pytest.mark.long
def test_two_sharded_ranks_go_on_exactly(settings_of, tmp_path):
    settings = settings_of(tmp_path / "whole") | {
        "parallelism": "fsdp",
        "fsdp": {"state_dict_type": "sharded"},
    }
    launch(settings, tmp_path / "whole-launch", ranks=2)
    launch({**settings, "run_dir": str(tmp_path / "cut")}, tmp_path / "cut", "trainer.max_duration=3ba", ranks=2)
    launch({**settings, "run_dir": str(tmp_path / "cut")}, tmp_path / "cut", ranks=2)
    assert_same_state(tmp_path / "whole/checkpoints", tmp_path / "cut/checkpoints", tensors=8)
    shutil.rmtree(tmp_path / "cut")
