"""The plan's figures against real runs: operations, live bytes, resident memory, checkpoints, published costs."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rae.__main__ import main
from rae.autoencoder.decoder import SIZES, Decoder
from rae.callbacks import operations
from rae.callbacks.progress import step_operations
from rae.config import registry
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.sections import Config
from rae.plan import plan, show
from rae.plan.clock import Clock
from rae.plan.gpus import GPUS
from rae.plan.meter import Meter
from rae.plan.report import phases_of
from rae.survival.checkpoints import list_checkpoints
from rae.training.build import build_trainer
from rae.training.checks import check
from tests.conftest import ROOT, TINY, resumable, run, tiny_settings, write_yaml
from tests.s3 import BUCKET

IMAGENET = 1_281_167


def everything_on(shards, run_dir, **decoder) -> dict:
    """Two steps with every loss from the first one on, of sizes at which activations count."""
    settings = tiny_settings(shards, run_dir)
    settings["model"]["decoder"] |= {"embed_dim": 96, "depth": 4, "mlp_dim": 384, "patch_size": 8, **decoder}
    settings["algorithms"]["adversarial"] |= {"discriminator_start": "0ba", "start": "0ba", "chunk": 4}
    settings["algorithms"]["perceptual"]["chunk"] = 4
    settings["trainer"] |= {"max_duration": "2ba", "save_folder": None, "precision": "fp32", "device": "cpu"}
    del settings["data"]["eval"], settings["metrics"], settings["loggers"]
    return settings


def trainer_of(settings: dict):
    config = Config.model_validate(settings)
    check(config)
    return build_trainer(config)


def planned(settings: dict, path, **options) -> dict:
    return plan(write_yaml(settings, path), [], **options)


@pytest.mark.parametrize(("microbatch", "checkpointing"), [(8, False), (4, True)])
def test_memory_is_what_a_real_run_holds(shards, tmp_path, microbatch, checkpointing):
    settings = everything_on(shards, tmp_path, activation_checkpointing=checkpointing)
    settings["trainer"]["device_train_microbatch_size"] = microbatch
    expected = planned(settings, tmp_path)["memory"]["ddp, checkpointing" if checkpointing else "ddp"]
    with Meter() as meter:
        trainer = trainer_of(settings)
        meter.peak = meter.live
        trainer.fit()
    trainer.close()
    assert expected["configured"]
    assert meter.peak == pytest.approx(expected["total"], rel=0.1)
    assert expected["activations"] > 0.3 * expected["total"]


def test_operations_are_what_a_real_run_computes(shards, tmp_path):
    settings = everything_on(shards, tmp_path)
    found = planned(settings, tmp_path)
    trainer = trainer_of(settings)
    with operations.counter() as counter:
        trainer.fit()
    trainer.close()
    (phase,) = found["phases"]
    assert phase["name"] == "GAN"
    assert counter.get_total_flops() / 16 / 1e9 == pytest.approx(phase["gflops"], rel=1e-3)
    assert sum(found["gflops"][0].values()) == pytest.approx(phase["gflops"])
    assert found["gflops"][0].get("other", 0) < 0.02 * phase["gflops"]  # every network's work has its name
    # What the time left is projected by is counted more simply.
    assert sum(step_operations(trainer.state).values()) / 1e9 == pytest.approx(phase["gflops"], rel=0.2)


def test_attention_is_counted_on_a_cpu():
    query = torch.rand(2, 3, 16, 8, requires_grad=True)
    with operations.counter() as counter:
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        forward = counter.get_total_flops()
        attended.sum().backward()
    assert forward == 2 * 2 * 2 * 3 * 16 * 16 * 8
    assert counter.get_total_flops() == 3.5 * forward  # backward, the scores are computed again


RESIDENT = """
import sys
from rae.plan.bench.measure import peak_memory
from rae.config.loading import load_config
from rae.training.build import build_trainer
from rae.training.checks import check
config = load_config(sys.argv[1])
check(config)
trainer = build_trainer(config)
# What is made once is not the step's, and what the first step frees must go back to the system.
for _ in range(2):
    grown = peak_memory(lambda: trainer.fit(duration="1ba"))
trainer.close()
print("grown", grown)
"""


@pytest.mark.long
def test_resident_memory(shards, tmp_path):
    """In a process of its own, whose heap no other test has left holes in."""
    settings = everything_on(shards, tmp_path, embed_dim=192, depth=12, mlp_dim=768)
    settings["data"]["batch_size"] = 32  # large beside what libraries keep for themselves
    expected = planned(settings, tmp_path)["memory"]["ddp"]
    done = run(sys.executable, "-c", RESIDENT, write_yaml(settings, tmp_path))
    grown = int(done.stdout.split("grown ")[-1])
    kept = ("weights", "optimizer", "weight average", "discriminator's heads", "frozen networks")
    assert grown == pytest.approx(expected["total"] - sum(expected[key] for key in kept), rel=0.1)


def test_phases_and_parts(shards, tmp_path):
    settings = tiny_settings(shards, tmp_path)
    settings["algorithms"]["perceptual"]["start"] = "1ba"
    found = planned(settings, tmp_path)
    phases = found["phases"]
    assert [(p["name"], p["begin"], p["end"]) for p in phases] == [
        ("before D, without perceptual", 0, 1),
        ("before D", 1, 2),
        ("D only", 2, 4),
        ("GAN", 4, 10),
    ]
    assert "perceptual" not in found["gflops"][0]
    first, second, third, last = found["gflops"]
    assert second["decoder"] == first["decoder"]
    assert third["decoder"] == pytest.approx(second["decoder"] * 4 / 3, rel=0.01)  # one more forward pass
    assert last["discriminator's backbone"] > 2 * third["discriminator's backbone"] - 1e-9
    assert [trained for _, trained in found["parameters"].values()] == [False, True, False, False, True]
    assert found["images"] == 40
    assert found["data"][0]["bytes"] > 0
    show(found)


@pytest.mark.parametrize("encoder", sorted(TINY))
def test_every_encoder(encoder, shards, tmp_path):
    settings = tiny_settings(shards, tmp_path, encoder)
    settings["algorithms"] = {}
    found = planned(settings, tmp_path)
    assert [phase["name"] for phase in found["phases"]] == ["training"]
    assert found["gflops"][0]["decoder"] > found["gflops"][0]["encoder"] > 0


USERS = """
import torch
from composer import ComposerModel
from torch import nn
from rae import Encoder, LossTerm, PerImage, RunModel, register
from rae.autoencoder.layers import Frozen

def pretrained():
    from transformers import AutoModel
    return AutoModel.from_pretrained("{folder}").requires_grad_(False)

@register("encoder", "theirs")
class Theirs(Encoder):
    def __init__(self, input_size: int = 56):
        super().__init__(32, input_size, 4, mean=[0.5] * 3, std=[0.5] * 3)
        self.backbone, self.scale = pretrained(), torch.tensor(2.0)
    def tokens(self, image):
        return self.backbone(pixel_values=image).last_hidden_state[:, -16:] * self.scale

@register("encoder", "read")
class Read(Encoder):
    def __init__(self, path: str):
        super().__init__(8, 64, 4, mean=[0.5] * 3, std=[0.5] * 3)
        self.conv = nn.Conv2d(3, 8, 16, 16)
        self.conv.load_state_dict(torch.load(path))
        self.norm = self.conv.weight.norm().item()
    def tokens(self, image):
        return (self.conv(image) / self.norm).flatten(2).transpose(1, 2)

@register("encoder", "values")
class Values(Read):
    def __init__(self, path: str):
        super().__init__(path)
    def tokens(self, image):
        return super().tokens(torch.from_numpy(image.numpy()))

@register("algorithm", "sobel")
class Sobel(LossTerm):
    def __init__(self):
        super().__init__("sobel")
        self.kernel = torch.tensor([1.0, 0.0, -1.0]).expand(3, 1, 1, 3)
    def compute(self, recon, image):
        return nn.functional.conv2d(recon - image, self.kernel.to(recon.device), groups=3).abs().mean()

@register("algorithm", "features")
class Features(LossTerm):
    def __init__(self):
        super().__init__("features", network=pretrained())
    def compute(self, recon, image):
        recon, image = (nn.functional.interpolate(each, 56) for each in (recon, image))
        return (self.network(recon).last_hidden_state - self.network(image).last_hidden_state).abs().mean()

@register("discriminator", "judge")
class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.heads = Frozen(pretrained()), nn.ModuleList([nn.Linear(32, 1)])
    def forward(self, image):
        return self.heads[0](self.features(nn.functional.interpolate(image, 56)).last_hidden_state).flatten(1)

@register("model", "kind", context=("image_size",))
class Kind(RunModel, ComposerModel):
    def __init__(self, image_size: int):
        super().__init__()
        self.teacher, self.network, self.image_size = pretrained(), nn.Conv2d(3, 3, 3, padding=1), image_size
    def forward(self, batch):
        return {"out": self.network(nn.functional.interpolate(batch["image"] / 255, 56))}
    def loss(self, outputs, batch):
        total = self.teacher(outputs["out"]).last_hidden_state.square().mean()
        return {"total": total}
"""


@pytest.fixture
def users(tmp_path, shards, monkeypatch):
    """Settings whose plugins, in a file of the user's, read weights in their own way; forgotten after the test."""
    for kind in registry._plugins:
        registry.plugins(kind)
    monkeypatch.setattr(registry, "_plugins", {kind: dict(named) for kind, named in registry._plugins.items()})
    folder = TINY["dinov2"]["dinov2"]["pretrained"]
    (tmp_path / "users.py").write_text(USERS.replace("{folder}", folder))
    torch.save(torch.nn.Conv2d(3, 8, 16, 16).state_dict(), tmp_path / "conv.pt")
    settings = tiny_settings(shards, tmp_path / "run") | {"imports": [str(tmp_path / "users.py")], "algorithms": {}}
    del settings["data"]["eval"], settings["metrics"]
    return settings


def test_plugins_that_read_weights_are_planned(users, tmp_path, recwarn):
    users["model"]["encoder"] = {"theirs": {}}
    judge = {"discriminator": {"judge": {}}, "start": "0ba", "discriminator_start": "0ba"}
    users["algorithms"] = {"sobel": {}, "features": {}, "adversarial": judge}
    found = planned(users, tmp_path)
    assert found["gflops"][0]["encoder"] > 0
    assert found["gflops"][0]["features"] > 0
    assert found["parameters"]["encoder"][0] == found["parameters"]["discriminator's backbone"][0] > 10_000
    assert [str(each.message) for each in recwarn if "meta" in str(each.message)] == []


def test_an_encoder_that_reads_a_file_is_planned(users, tmp_path):
    users["model"]["encoder"] = {"read": {"path": str(tmp_path / "conv.pt")}}
    assert planned(users, tmp_path)["gflops"][0]["encoder"] > 0


def test_another_kind_of_model_that_reads_weights_is_planned(users, tmp_path):
    users["model"] = {"kind": {}}
    assert planned(users, tmp_path)["gflops"][0]["network"] > 0


@pytest.mark.parametrize(
    ("encoder", "line"),
    [("values", r"users.py, line \d+: .*numpy.* without values"), ("read", r"users.py, line \d+: .*No such file")],
)
def test_what_a_plugin_cannot_do_in_a_plan_is_one_line(encoder, line, users, tmp_path):
    path = tmp_path / ("conv.pt" if encoder == "values" else "none.pt")
    users["model"]["encoder"] = {encoder: {"path": str(path)}}
    with pytest.raises(UserError, match=line):
        planned(users, tmp_path)


def test_checkpoint_bytes(undisturbed, shards, tmp_path):
    found = planned(resumable(shards, undisturbed), tmp_path)["checkpoints"]
    saved = list_checkpoints(str(undisturbed / "checkpoints"))
    files = undisturbed / "checkpoints" / saved[0].name / "state.pt"
    assert found["bytes"] == pytest.approx(files.stat().st_size, rel=0.1)
    assert found["number"] == found["kept"] == len(saved)


def test_published_costs():
    """22, 78 and 107 are multiply-adds of the linear layers: without attention's products, and half the operations."""
    for size, published in zip(SIZES, (22, 78, 107), strict=True):
        with torch.device("meta"):
            decoder, latent = Decoder(768, 256, size=size), torch.empty(1, 768, 16, 16)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(latent)
        linear = counter.get_flop_counts()["Global"][torch.ops.aten.addmm]
        assert linear / 2e9 == pytest.approx(published, rel=0.01)


def test_published_steps(monkeypatch):
    monkeypatch.setenv("RAE_BUCKET", "s3://bucket")
    config = load_config(f"{ROOT}/yamls/rae_dino.yaml", [])
    clock = Clock(IMAGENET, 512, config.trainer["max_duration"])
    assert clock.steps_per_epoch == 2502
    assert [(p.name, p.begin) for p in phases_of(config, clock)] == [("before D", 0), ("D only", 15012), ("GAN", 20016)]
    assert clock.steps == 40032
    unknown = Clock(None, 512, config.trainer["max_duration"])
    assert [p.name for p in phases_of(config, unknown)] == ["before D", "D only", "GAN"]
    assert not unknown.known
    assert unknown.comparable


SMALL = [
    "model.decoder.embed_dim=64", "model.decoder.depth=1", "model.decoder.num_heads=4", "model.decoder.mlp_dim=64",
    "trainer.device_train_microbatch_size=1",
]  # fmt: skip
SMALL_D = [f"algorithms.adversarial.discriminator.dino.{key}" for key in ("depth=1", "blocks=[0]", "weights=random")]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml")))
def test_shipped_configurations_offline(name, monkeypatch):
    monkeypatch.setenv("RAE_BUCKET", "s3://bucket")
    monkeypatch.setenv("RAE_DATA", "no/data")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.chdir(ROOT)
    away = ["data.train.path=no/data", "data.eval.path=no/data/eval"]  # where the demo was run
    overrides = SMALL + (away if name.startswith("rae_demo") else SMALL_D)
    if name == "rae_demo_digits":
        overrides.append("begin_from=null")
    if name == "ditdh_demo":
        autoencoder = load_config("yamls/rae_demo_digits.yaml", []).model.model_dump(include={"encoder", "decoder"})
        overrides = [*away, f"model.diffusion.autoencoder={json.dumps(autoencoder)}"]
    elif name.startswith("ditdh"):
        # Named by its parts: nothing is downloaded. A run or an export is there to be opened.
        kind = "ditdh_in_context" if "dinov3" in name else "ditdh"
        network, size = f"model.diffusion.network.{kind}", 448 if name.endswith("512") else 224
        decoder = "{size: ViTB, depth: 1}"
        monkeypatch.setenv("RAE_AUTOENCODER", "")
        overrides = [
            f"{network}.depth=1", f"{network}.head_depth=1",
            *([f"{network}.base_depth=1"] if kind == "ditdh_in_context" else []),
            f"model.diffusion.autoencoder={{encoder: {{dinov2: {{input_size: {size}}}}}, decoder: {decoder}}}",
        ]  # fmt: skip
    found = plan(f"yamls/{name}.yaml", overrides, gpus=1, kinds=("H100",))
    assert found["images"] is None
    assert all(each["fault"] for each in found["data"])
    assert found["steps"] is None
    assert found["hours"]["H100"]["total"] is None
    assert min(found["hours"]["H100"]["images a second"].values()) > 0
    show(found)


def test_sharded(shards, tmp_path):
    """In a process of its own: it needs a process group. In bf16, FSDP casts what activation checkpointing keeps."""
    settings = tiny_settings(shards, tmp_path)
    settings |= {"parallelism": "fsdp"}
    settings["trainer"]["precision"] = "amp_bf16"
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "rae", "plan", write_yaml(settings, tmp_path)]
    done = run(*command, "--gpus", "2", "--gpu", "h100", "--json", str(out))
    assert "H100" in done.stdout
    memory = json.loads(out.read_text())["memory"]
    assert list(memory) == ["ddp", "ddp, checkpointing", "fsdp", "fsdp, checkpointing"]
    assert [each["configured"] for each in memory.values()] == [False, False, True, False]
    for key in ("weights", "gradients", "optimizer", "weight average"):
        assert memory["fsdp"][key] == pytest.approx(memory["ddp"][key] / 2, rel=0.05)  # padding of odd sizes
    assert memory["fsdp"]["frozen networks"] == memory["ddp"]["frozen networks"]
    assert memory["ddp"]["DDP's buckets"] == memory["ddp"]["weights"]


def test_bucket(s3, shards, tmp_path, monkeypatch):
    for key, value in s3.env().items():
        monkeypatch.setenv(key, value)
    for split in ("train", "eval"):
        s3.client().upload_file(str(shards / split / "index.json"), BUCKET, f"planned/{split}/index.json")
    settings = tiny_settings(shards, tmp_path)
    settings["algorithms"] = {}
    settings["data"]["train"]["path"] = f"s3://{BUCKET}/planned/train"
    settings["data"]["eval"]["path"] = f"s3://{BUCKET}/absent"
    settings["trainer"]["save_folder"] = f"s3://{BUCKET}/checkpoints"
    found = planned(settings, tmp_path)
    assert found["images"] == 40
    assert [bool(each["fault"]) for each in found["data"]] == [False, True]
    assert found["checkpoints"]["uploaded"] == 2 * found["checkpoints"]["bytes"]


def test_hours_and_measurements(shards, tmp_path):
    settings = tiny_settings(shards, tmp_path)
    settings["algorithms"] = {}
    bench = {"machine": {"processor": "a processor"}, "limits": {"phases": {"+ GAN": {"GFLOP/s": 50.0}}}}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    lines = [{"batch": i, "throughput/samples_per_sec": 20.0} for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 6, "thr')
    found = planned(settings, tmp_path, gpus=1, kinds=("RTX-4090",), utilisation=0.5, bench=tmp_path / "bench.json")
    (phase,) = found["phases"]
    operations = phase["gflops"] * 1e9 * 10 * 8
    hours = found["hours"]["RTX-4090"]
    assert hours["total"] * 3600 == pytest.approx(operations / (165.2e12 * 0.5))
    bench, log = found["measured"]
    assert bench["hours"] * 3600 == pytest.approx(operations / 50e9)
    assert log["hours"] * 3600 == pytest.approx(80 / 20)
    show(found)


def test_what_fits(shards, tmp_path):
    settings = tiny_settings(shards, tmp_path)
    settings["model"]["decoder"] = {"size": "ViTXL"}
    settings["algorithms"] = {}
    settings["data"]["batch_size"] = 8192
    settings["trainer"]["precision"] = "amp_bf16"
    found = planned(settings, tmp_path, images=100_000)
    needed = found["memory"]["ddp"]["total"] + 2e9
    assert {name: each["fits"] for name, each in found["hours"].items()} == {
        name: gpu.memory * 1e9 >= needed for name, gpu in GPUS.items()
    }
    assert not found["hours"]["RTX-4090"]["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H1000"], "--gpu: 'H1000' is not known (did you mean 'H100'?)"),
        (["--gpus", "3"], "data.batch_size: 8 cannot be shared equally by 3 GPUs"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--utilisation", "1.5"], "--utilisation must be above 0 and at most 1"),
        (["--images", "-1"], "--images must be at least 1"),
        (["--images", "3"], "an epoch of 3 images is less than one batch"),
        (["model.decoder.sise=ViTB"], "unknown key 'model.decoder.sise' (did you mean 'size'?)"),
        (["trainer.max_duration=30sec"], "'30sec': sec is not counted here"),
        (["model.decoder.embed_dim=49"], "model.decoder.embed_dim: 49 is not a multiple of"),
    ],
)
def test_mistakes_are_one_line(words, message, shards, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", write_yaml(tiny_settings(shards, tmp_path), tmp_path), *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_times_that_cannot_be_compared(shards, tmp_path):
    settings = tiny_settings(shards, tmp_path)
    settings["data"]["train"]["path"] = settings["data"]["eval"]["path"] = str(tmp_path / "absent")
    settings["algorithms"]["adversarial"] |= {"discriminator_start": "2ba", "start": "1ep"}
    with pytest.raises(UserError, match="say --images N"):
        planned(settings, tmp_path)
