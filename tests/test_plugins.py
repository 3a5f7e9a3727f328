"""Plugins: each is gone without its entry, a user's own come from a file, Composer's by name."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rae.config import registry
from rae.config.loading import load_config
from rae.config.sections import Config
from rae.training.run import train
from tests.conftest import metrics_of, tiny_settings, wandb_file

MINE = '''
import torch
from composer import Algorithm, Callback, Event
from rae.algorithms import LossTerm
from rae.autoencoder.encoders import Encoder
from rae.config.registry import register
from rae.config.times import TimeString

@register("encoder", "patch_means")
class PatchMeans(Encoder):
    """Each token is the mean colour of its patch."""
    def __init__(self, input_size: int = 64, patch_size: int = 16):
        super().__init__(3, input_size, input_size // patch_size, [0.5] * 3, [0.5] * 3)
        self.patch_size = patch_size
    def tokens(self, image):
        return torch.nn.functional.avg_pool2d(image, self.patch_size).flatten(2).transpose(1, 2)

@register("algorithm", "edges")
class Edges(LossTerm):
    def __init__(self, weight: float = 1.0, start: TimeString = "0ep"):
        super().__init__("edges", weight, start)
    def compute(self, recon, image):
        return (recon.diff(dim=-1) - image.diff(dim=-1)).abs().mean()

@register("algorithm", "halve_rate")
class HalveRate(Algorithm):
    def match(self, event, state):
        return event == Event.BATCH_START
    def apply(self, event, state, logger):
        for group in state.optimizers[0].param_groups:
            group["lr"] *= 0.5

@register("callback", "counter")
class Counter(Callback):
    def batch_end(self, state, logger):
        logger.log_metrics({"mine/count": float(state.timestamp.batch)})

@register("pixel_loss", "charbonnier")
def charbonnier(epsilon: float = 1e-3):
    return lambda recon, image: ((recon - image).square() + epsilon**2).sqrt().mean()
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    for kind in registry._plugins:
        registry.plugins(kind)
    monkeypatch.setattr(registry, "_plugins", {kind: dict(named) for kind, named in registry._plugins.items()})


@pytest.fixture
def settings(shards, tmp_path) -> dict:
    settings = tiny_settings(shards, tmp_path / "run")
    settings["trainer"] |= {"max_duration": "3ba", "eval_interval": 0}
    settings["algorithms"]["adversarial"] |= {"discriminator_start": "0ba", "start": "1ba"}
    return settings


def run_of(settings) -> list[dict]:
    train(Config.model_validate(settings))
    return [r for r in metrics_of(Path(settings["run_dir"])) if "loss/train/total" in r]


def test_a_users_own_plugins_from_a_file(settings, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    settings["imports"] = [str(tmp_path / "mine.py")]
    settings["model"] |= {"encoder": {"patch_means": {}}, "pixel_loss": {"charbonnier": {"epsilon": 0.01}}}
    settings["algorithms"] |= {"edges": {"weight": 0.5, "start": "1ba"}, "halve_rate": {}}
    settings["callbacks"] = {"counter": {}, "absent": None}
    settings["schedule"] = None
    records = run_of(settings)
    assert "loss/train/edges" not in records[0]
    assert records[1]["loss/train/edges"] > 0
    parts = {n: records[2][f"loss/train/{n}"] for n in ("charbonnier", "perceptual", "edges", "gan", "total")}
    without_gan = parts["charbonnier"] + parts["perceptual"] + 0.5 * parts["edges"]
    gan = 0.75 * records[2]["gan/adaptive_weight"] * parts["gan"]
    assert parts["total"] == pytest.approx(without_gan + gan, rel=1e-5)
    assert [r["mine/count"] for r in records] == [1, 2, 3]


@pytest.mark.parametrize("gone", ["perceptual", "adversarial", "ema", "all"])
def test_without_its_entry_a_plugin_is_gone(settings, gone):
    for name in list(settings["algorithms"]) if gone == "all" else [gone]:
        del settings["algorithms"][name]
    last = run_of(settings)[-1]
    assert ("loss/train/perceptual" in last) == (gone not in ("perceptual", "all"))
    assert ("loss/train/gan" in last) == (gone not in ("adversarial", "all"))
    assert ("discriminator/loss" in last) == (gone not in ("adversarial", "all"))
    if gone == "all":
        assert last["loss/train/total"] == last["loss/train/l1"]


def test_adversarial_options(settings):
    settings["algorithms"]["adversarial"] |= {
        "loss": "vanilla", "generator_loss": "softplus", "adaptive": False, "updates_per_step": 2, "fakes": "reused",
        "augment": {"cutout": 0.5}, "optimizer": {"adam": {"lr": 1e-4}}, "schedule": "constant_lr", "weight": 0.1,
    }  # fmt: skip
    records = run_of(settings)
    assert records[1]["lr/discriminator"] == 1e-4
    parts = {n: records[1][f"loss/train/{n}"] for n in ("l1", "perceptual", "gan", "total")}
    assert parts["total"] == pytest.approx(parts["l1"] + parts["perceptual"] + 0.1 * parts["gan"], rel=1e-5)
    assert parts["gan"] > 0.5  # softplus of logits near 0
    assert "gan/adaptive_weight" not in records[1]


def test_an_adaptive_weight_cap(settings):
    settings["algorithms"]["adversarial"]["max_adaptive_weight"] = 0.5
    assert run_of(settings)[1]["gan/adaptive_weight"] == 0.5


def test_composers_plugins_by_name(settings, tmp_path):
    settings["algorithms"]["gradient_clipping"] = {"clipping_type": "norm", "clipping_threshold": 1e-3}
    settings["callbacks"] = {"lr_monitor": {}, "optimizer_monitor": {"batch_log_interval": 1}}
    settings["schedule"] = {"cosine_annealing_with_warmup": {"t_warmup": "1ba", "t_max": "3ba"}}
    records = run_of(settings)
    assert all(r["l2_norm/grad/global"] <= 1.001e-3 for r in records)
    assert any(name.startswith("lr-") for name in records[0])
    known = registry.plugins("logger")
    assert {"wandb", "tensorboard", "file", "jsonl", "console"} <= known.keys()
    assert {"ema", "gradient_clipping"} <= registry.plugins("algorithm").keys()
    assert registry.plugins("algorithm")["ema"].__module__ == "rae.algorithms.ema"


def test_wandb_gets_figures_and_pictures_offline(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings["loggers"]["wandb"] = {"project": "rae"}
    settings["callbacks"] = {"pictures": {"interval": "2ba", "count": 2}}
    run_of(settings)
    stored = wandb_file(tmp_path / "run").read_bytes()
    assert b"loss/train/perceptual" in stored
    assert list((tmp_path / "run/wandb").rglob("media/images/**/*.png"))


def test_wandb_without_a_login_is_one_line(settings, tmp_path, monkeypatch, request):
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin", None)  # nobody to ask
    wandb.teardown()  # it reads the environment once
    request.addfinalizer(wandb.teardown)
    settings["loggers"] = {"wandb": {"project": "rae"}}
    with pytest.raises(registry.UserError, match=r"^loggers\.wandb: .*No API key.*; run `wandb login`.*=offline$"):
        train(Config.model_validate(settings))


@pytest.mark.parametrize("evaluate", ["ema", "live", "both"])
def test_which_weights_evaluation_uses(settings, evaluate):
    settings["trainer"] |= {"eval_interval": "3ba"}
    settings["algorithms"]["ema"] = {"decay": 0.999, "evaluate": evaluate}
    trainer = train(Config.model_validate(settings))
    figures = {k: v for r in metrics_of(Path(settings["run_dir"])) for k, v in r.items() if k.startswith("metrics/")}
    assert ("metrics/eval_live/psnr" in figures) == (evaluate == "both")
    ema = next(a for a in trainer.state.algorithms if hasattr(a, "average"))
    live = psnr_now(trainer)
    with ema.averaged():
        average = psnr_now(trainer)
    assert live != pytest.approx(average, abs=1e-3)
    assert figures["metrics/eval/psnr"] == pytest.approx(live if evaluate == "live" else average, abs=1e-4)
    if evaluate == "both":
        assert figures["metrics/eval_live/psnr"] == pytest.approx(live, abs=1e-4)


def test_weights_loaded_without_an_average_begin_one(settings, tmp_path):
    without = {name: each for name, each in settings["algorithms"].items() if name != "ema"}
    first = train(Config.model_validate(settings | {"algorithms": without}))
    settings |= {"run_dir": str(tmp_path / "other")}
    settings["trainer"] |= {
        "load_path": str(tmp_path / "run/checkpoints"),
        "load_weights_only": True,
        "max_duration": "1ba",
    }
    second = train(Config.model_validate(settings))
    loaded = dict(first.state.model.named_parameters())
    ema = next(a for a in second.state.algorithms if hasattr(a, "average"))
    for name, average in ema.average.items():  # one step at 1e-3 of learning rate, averaged at 0.9
        assert float((average - loaded[name]).abs().max()) < 1e-3, name


def psnr_now(trainer) -> float:
    from rae.evaluation.metrics import psnr

    metric, model = psnr(), trainer.state.model.eval()
    with torch.no_grad():
        for batch in trainer.state.evaluators[0].dataloader.dataloader:
            model.update_metric(batch, model.eval_forward(batch), metric)
    return float(metric.compute())


def test_registering_a_taken_name_or_kind_is_refused():
    with pytest.raises(ValueError, match="already registered"):
        registry.register("algorithm", "ema")(test_registering_a_taken_name_or_kind_is_refused)
    with pytest.raises(ValueError, match="unknown plugin kind"):
        registry.register("encoders", "x")


def test_a_plugin_file_that_fails_is_named(settings, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    settings["imports"] = [str(tmp_path / "broken.py")]
    path = tmp_path / "run.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    with pytest.raises(registry.UserError, match=r"broken\.py': ZeroDivisionError"):
        train(load_config(str(path), []))
