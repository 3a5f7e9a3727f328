"""Each shipped configuration loads, builds and trains two batches, with tiny networks put in by overrides."""

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models.vgg import cfgs, make_layers

from rae.autoencoder.model import build_rae
from rae.config.loading import load_config
from rae.config.sections import Model
from rae.exchange.exports import Exported, write
from rae.training.run import train
from tests.conftest import AUTOENCODER, GOLDEN, ROOT, metrics_of

YAMLS = sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml"))
ENCODERS = {"rae_mae": ("mae", 64), "rae_siglip2": ("siglip2", 64)}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, str]:
    """Random weights for VGG's and Inception's real architectures, in the files that users would give."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            return None

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vgg = make_layers(cfgs["D"])
    torch.save({f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}, root / "vgg.pth")
    torch.save({}, root / "empty.pth")
    inception = Unloaded("inception-v3-compat", ["2048"], str(root / "empty.pth"))
    torch.save(inception.state_dict(), root / "inception.pth")
    return {"vgg": str(root / "vgg.pth"), "inception": str(root / "inception.pth")}


def overrides(name: str, shards, run_dir, backbones, autoencoder=None) -> list[str]:
    if name.startswith("ditdh"):
        kind = "ditdh_in_context" if "dinov3" in name else "ditdh"
        network = f"model.diffusion.network.{kind}"
        return [
            *([f"{network}.base_depth=1"] if kind == "ditdh_in_context" else []),
            f"run_dir={run_dir}", f"data.train.path={shards}/train", f"data.eval.path={shards}/eval",
            "data.eval.limit=4", "data.image_size=64", "data.batch_size=4", "data.workers=0",
            f"model.diffusion.autoencoder={autoencoder}", "model.diffusion.checked=false",
            f"{network}.embed_dim=16", f"{network}.depth=1", f"{network}.num_heads=2", f"{network}.head_embed_dim=24",
            f"{network}.head_depth=1", f"{network}.head_num_heads=2", "model.diffusion.sampler.euler.steps=2",
            "trainer.max_duration=2ba", "trainer.eval_interval=2ba", "trainer.save_interval=2ba",
            f"trainer.save_folder={run_dir}/checkpoints", "trainer.device_train_microbatch_size=2",
        ]  # fmt: skip
    demo = name.startswith("rae_demo")
    size = 32 if demo else 64
    common = [
        f"run_dir={run_dir}", f"data.train.path={shards}/train", f"data.eval.path={shards}/eval",
        "data.eval.limit=4", f"data.image_size={size}", "data.train.resize=72", "data.batch_size=4", "data.workers=0",
        "model.decoder.embed_dim=48", "model.decoder.depth=1", "model.decoder.num_heads=4", "model.decoder.mlp_dim=96",
        "trainer.max_duration=2ba", "trainer.eval_interval=2ba", "trainer.save_interval=2ba",
    ]  # fmt: skip
    if name == "rae_demo_digits":
        return [*common, "begin_from=null"]
    common += ["algorithms.adversarial.discriminator_start=0ba", "algorithms.adversarial.start=1ba"]
    if demo:
        encoder = "model.encoder.timm"
        return [*common, f"{encoder}.input_size=32", f"{encoder}.grid=4"]
    kind, input_size = ENCODERS.get(name, ("dinov2", 56))
    if name.startswith("rae_dinov3"):
        kind, input_size, place = "dinov3", 64, f"{GOLDEN}/stage2/raev2/dinov3-tiny"
        common = [*(word for word in common if "resize" not in word), "model.encoder.dinov3.layers=[1,-1]"]
    else:
        place = f"{GOLDEN}/encoders/{kind}-tiny"
    dino = "algorithms.adversarial.discriminator.dino"
    return [
        *common,
        f"model.encoder.{kind}.pretrained={place}",
        f"model.encoder.{kind}.input_size={input_size}",
        f"algorithms.perceptual.weights={backbones['vgg']}", f"metrics.lpips.weights={backbones['vgg']}",
        f"metrics.rfid.weights={backbones['inception']}",
        f"{dino}.weights={GOLDEN}/dino_small.pth", f"{dino}.embed_dim=32", f"{dino}.depth=2", f"{dino}.num_heads=4",
        f"{dino}.blocks=[0,1]", f"{dino}.input_size=72",
        f"trainer.save_folder={run_dir}/checkpoints", "trainer.device_train_microbatch_size=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An untrained one, by its configuration."""
    root = tmp_path_factory.mktemp("autoencoder")
    settings = Model.model_validate(AUTOENCODER)
    write(build_rae(settings, 64), Exported(name="tiny", image_size=64, model=settings), root)
    return str(root)


@pytest.mark.parametrize("name", YAMLS)
def test_trains_two_batches(name, shards, tmp_path, backbones, autoencoder, monkeypatch):
    monkeypatch.setenv("RAE_BUCKET", "s3://bucket")
    monkeypatch.setenv("RAE_AUTOENCODER", autoencoder)
    config = load_config(f"yamls/{name}.yaml", overrides(name, shards, tmp_path / "run", backbones, autoencoder))
    if name != "rae_dino":  # once: moments of 2048 features take long on a CPU
        _ = [config.metrics.pop(metric, None) for metric in ("rfid", "gfid")]
    trainer = train(config)
    assert int(trainer.state.timestamp.batch) == 2
    if name.startswith("ditdh"):
        first, second = [r for r in metrics_of(tmp_path / "run") if "loss/train/total" in r]
        assert {"loss/train/flow", "lr/network", "gradient/network"} <= first.keys()
        assert list((tmp_path / "run/pictures").glob("*.png"))
        return
    first, second = [r for r in metrics_of(tmp_path / "run") if "loss/train/total" in r]
    assert {"loss/train/l1", "lr/decoder"} <= first.keys()
    adversarial = "adversarial" in config.algorithms
    if adversarial:
        assert {"discriminator/loss", "lr/discriminator"} <= first.keys()
        assert "loss/train/gan" not in first
        assert {"loss/train/gan", "gan/adaptive_weight"} <= second.keys()
    evaluated = {n.split("/")[2] for r in metrics_of(tmp_path / "run") for n in r if n.startswith("metrics/eval/")}
    assert evaluated == {*config.metrics, *(["discriminator"] if adversarial else [])}
    assert list((tmp_path / "run/checkpoints").glob("*/state.pt"))
    assert list((tmp_path / "run/pictures").glob("*.png"))


def test_the_published_recipe(monkeypatch):
    monkeypatch.setenv("RAE_BUCKET", "s3://bucket")
    config = load_config("yamls/rae_dino.yaml", [])
    assert (config.data.batch_size, config.data.image_size, config.model.noise_tau) == (512, 256, 0.8)
    assert config.optimizer == {"adamw": {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}}
    assert config.schedule == {"warmup_cosine": {"warmup": "1ep", "decay_end": "16ep", "final_lr": 2e-5}}
    gan = config.algorithms["adversarial"]
    assert (gan["discriminator_start"], gan["start"], gan["weight"]) == ("6ep", "8ep", 0.75)
    assert config.algorithms["ema"]["decay"] == 0.9978
    assert config.trainer["precision"] == "amp_bf16"
    assert config.trainer["save_folder"].startswith("s3://bucket/")
    assert config.parallelism == "fsdp"


def test_a_missing_bucket_is_named(monkeypatch):
    from rae.config.errors import UserError

    monkeypatch.delenv("RAE_BUCKET", raising=False)
    with pytest.raises(UserError, match="RAE_BUCKET"):
        load_config("yamls/rae_dino.yaml", [])
