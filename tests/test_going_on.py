"""A run that goes on under other settings, and a run that begins with weights from elsewhere."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from composer import Callback
from pydantic import BaseModel

from rae.algorithms.adversarial import Adversarial
from rae.autoencoder.decoder import Decoder, load_published, published_state_dict
from rae.autoencoder.layers import sincos_positions
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import register
from rae.config.sections import Config
from rae.exchange.sources import checkpoints_of_run, open_source
from rae.exchange.weights import open_weights
from rae.training.course import PARTS, part_of, table
from tests.conftest import (
    GOLDEN,
    ROOT,
    TINY,
    figures,
    load_newest,
    resumable,
    tiny_settings,
    train_here,
    train_ranks,
)

STATISTICS = "rae.latent_mean"


def plain(shards: Path, run_dir: Path, **changed) -> dict:
    """The decoder and the pixel loss alone, without evaluation."""
    settings = tiny_settings(shards, run_dir) | {"algorithms": {}, "metrics": {}}
    settings["data"]["eval"] = None
    settings["trainer"]["max_duration"] = "3ba"
    return settings | changed


def lasting(settings: dict, duration: str) -> dict:
    return settings | {"trainer": settings["trainer"] | {"max_duration": duration}}


# --- what goes on, and what is new


def keys_of(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_has_an_answer_and_the_guide_shows_it():
    unanswered = [key for key in keys_of(Config) if part_of(key) is None]
    assert unanswered == []
    assert part_of("algorithms.adversarial.discriminator.dino.depth").answer == "error"
    assert part_of("algorithms.adversarial.weight").answer == "YAML"
    assert len({part.what for part in PARTS}) == len(PARTS)
    assert table() in (ROOT / "docs/surviving.md").read_text(), table()


GAN = {
    "discriminator_start": "2ba",
    "start": "3ba",
    "schedule": {"warmup_cosine": {"warmup": "2ba", "decay_end": "9ba"}},
}
RATES = {
    "the published schedule": {"warmup_cosine": {"warmup": "2ba", "decay_end": "9ba", "final_lr": 1e-6}},
    "none": None,
    "Composer's": {"cosine_annealing_with_warmup": {"t_warmup": "2ba", "t_max": "9ba"}},
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_rates_are_those_of_a_run_from_the_start(shards, tmp_path, schedule):
    before = plain(shards, tmp_path / "run")
    now = before | {"schedule": RATES[schedule]}
    now["optimizer"] = {"adamw": {"lr": 1e-5, "betas": [0.5, 0.9], "weight_decay": 0.1, "eps": 1e-6}}
    if schedule != "Composer's":
        gan = GAN | {"discriminator": tiny_settings(shards, tmp_path)["algorithms"]["adversarial"]["discriminator"]}
        before["algorithms"] = {"adversarial": gan}
        gan = gan | {"optimizer": {"adamw": {"lr": 1e-6, "weight_decay": 0.2}}}
        gan["schedule"] = {"warmup_cosine": {"warmup": "1ba", "decay_end": "9ba", "final_lr": 1e-7}}
        now["algorithms"] = {"adversarial": gan}
    train_here(lasting(before, "6ba"))  # an epoch and a step
    trainer = train_here(lasting(now, "8ba"))
    train_here(lasting(now, "8ba") | {"run_dir": str(tmp_path / "other"), "run_name": "other"})
    for went_on, began in zip(figures(tmp_path / "run")[6:], figures(tmp_path / "other")[6:], strict=True):
        for name in ("batch", "lr/decoder", *(["lr/discriminator"] if schedule != "Composer's" else [])):
            assert went_on[name] == pytest.approx(began[name], rel=1e-9), name
    optimizer = trainer.state.optimizers[0]
    assert {k: optimizer.param_groups[0][k] for k in ("betas", "weight_decay", "eps")} == {
        "betas": (0.5, 0.9), "weight_decay": 0.1, "eps": 1e-6,
    }  # fmt: skip
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}
    for adversarial in (each for each in trainer.state.algorithms if isinstance(each, Adversarial)):
        assert adversarial.optimizer.param_groups[0]["weight_decay"] == 0.2
        assert {int(state["step"]) for state in adversarial.optimizer.state.values()} == {6}


def test_sharded_ranks_take_rates_statistics_and_another_algorithm(shards, ranks, tmp_path):
    shutil.copytree(ranks / "fsdp", tmp_path / "run")
    settings = load_config(str(tmp_path / "run/config.yaml")).model_dump()
    torch.save({"mean": torch.ones(32, 4, 4), "var": torch.full((32, 4, 4), 4.0)}, tmp_path / "stat.pt")
    settings["model"]["latent_stats"] = str(tmp_path / "stat.pt")
    settings["optimizer"] = {"adamw": {"lr": 1e-5}}
    settings["schedule"] = None
    settings["algorithms"] = {"ema": {"decay": 0.5}} | {
        "gradient_clipping": settings["algorithms"]["gradient_clipping"]
    }
    train_ranks(lasting(settings, "12ba"), tmp_path)
    rates = {record["batch"]: record["lr/decoder"] for record in figures(tmp_path / "run") if "lr/decoder" in record}
    assert (rates[11], rates[12]) == (1e-5, 1e-5)
    state = load_newest(tmp_path / "run/checkpoints")
    assert torch.equal(state["model"][STATISTICS], torch.ones(32, 4, 4))
    assert {name for name, _ in state["algorithms"]} == {"EMA", "GradientClipping"}


def test_statistics_are_those_of_the_configuration(shards, tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"mean": torch.full((32, 4, 4), value), "var": torch.ones(32, 4, 4)}, tmp_path / f"{name}.pt")
    settings = plain(shards, tmp_path / "run")
    for step, stats in enumerate(["a", "b", None, "a"], 1):
        settings["model"]["latent_stats"] = stats and str(tmp_path / f"{stats}.pt")
        train_here(lasting(settings, f"{step}ba"))
        found = load_newest(tmp_path / "run/checkpoints")["model"].get(STATISTICS)
        assert (found is None) if stats is None else found[0, 0, 0] == (1.0 if stats == "a" else 2.0)
    other = plain(shards, tmp_path / "other", begin_from=str(tmp_path / "run"))
    train_here(lasting(other, "1ba"))
    assert STATISTICS not in load_newest(tmp_path / "other/checkpoints")["model"]


def test_algorithms_come_and_go(shards, tmp_path, caplog, recwarn):
    settings = plain(shards, tmp_path / "run", algorithms={"ema": {"decay": 0.5}})
    train_here(lasting(settings, "2ba"))
    without = settings | {"algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}}}
    train_here(lasting(without, "3ba"))
    assert "EMA" not in dict(load_newest(tmp_path / "run/checkpoints")["algorithms"])
    trainer = train_here(lasting(settings, "4ba"))
    average = next(each for each in trainer.state.algorithms if hasattr(each, "average")).average
    before = load_newest(tmp_path / "run/checkpoints")["model"]
    for name, tensor in average.items():  # of a step since it began anew
        assert (tensor - before[name]).abs().max() < 2e-3
    assert "algorithms.ema.decay 0.5 -> unset" in caplog.text
    assert "algorithms.ema.decay unset -> 0.5" in caplog.text
    assert not [each for each in recwarn if "state_dict" in str(each.message)]


def depth(settings):
    settings["model"]["decoder"]["depth"] = 1


def heads(settings):
    settings["model"]["decoder"]["num_heads"] = 2


def encoder_size(settings):
    settings["model"]["encoder"]["dinov2"]["input_size"] = 70


def encoder(settings):
    settings["model"]["encoder"] = TINY["mae"]


def kind_of_optimizer(settings):
    settings["optimizer"] = {"adam": {"lr": 1e-3}}


def discriminator(settings):
    settings["algorithms"]["adversarial"]["discriminator"]["dino"]["kernel_size"] = 5


def frozen(settings):
    settings["freeze"] = ["decoder.embed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (depth, "model.decoder: checkpoint ep2-ba10 is of depth 2, not 1; give another run_name"),
        (heads, "model.decoder: checkpoint ep2-ba10 is of num_heads 4, not 2"),
        (encoder_size, "model.encoder: checkpoint ep2-ba10 is of input_size 56, not 70; .* with begin_from"),
        (encoder, "model.encoder: checkpoint ep2-ba10 is of encoder DINOv2, not MAE"),
        (kind_of_optimizer, "optimizer: checkpoint ep2-ba10 is of optimizer adamw, not adam"),
        (discriminator, "algorithms.adversarial.discriminator: .* is of kernel_size 9, not 5"),
        (frozen, r"freeze: checkpoint ep2-ba10 is of parts \[\], not \['decoder.embed'\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_run_cannot_change_is_refused(shards, undisturbed, tmp_path, change, message):
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "run/checkpoints")
    settings = copy.deepcopy(lasting(resumable(shards, tmp_path / "run"), "3ep"))
    change(settings)
    with pytest.raises(UserError, match=message):
        train_here(settings)


def test_where_weights_lie_and_how_sizes_are_written_may_change(shards, tmp_path):
    settings = plain(shards, tmp_path / "run")
    train_here(lasting(settings, "1ba"))
    shutil.copytree(GOLDEN / "encoders/dinov2-tiny", tmp_path / "elsewhere")
    settings["model"]["encoder"] = {"Dinov2withNorm": {"pretrained": str(tmp_path / "elsewhere"), "input_size": 56}}
    settings["model"]["decoder"] |= {"size": "ViTB", "patch_size": 16}
    train_here(lasting(settings, "2ba"))
    assert [record["batch"] for record in figures(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("end", ["2ba", "8sp"])
def test_a_checkpoint_beyond_the_end_is_said_and_nothing_is_written(shards, undisturbed, tmp_path, end):
    settings = lasting(resumable(shards, tmp_path / "run"), end)
    settings["trainer"]["load_path"] = str(undisturbed)
    with pytest.raises(
        UserError, match=rf"at step 10 .*beyond trainer.max_duration \({end}\): nothing to train; .*begin_"
    ):
        train_here(settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "checkpoints"}
    assert not list((tmp_path / "run").rglob("*.*pt"))


@register("callback", "seen", context=("run_dir",))
class Seen(Callback):
    """Notes the images of each step."""

    def __init__(self, run_dir: str):
        self.path = Path(run_dir, "seen.jsonl")

    def batch_start(self, state, logger):
        with self.path.open("a") as file:
            file.write(json.dumps([int(state.timestamp.epoch), state.batch["index"].tolist()]) + "\n")


def seen(run_dir: Path) -> dict[int, list[int]]:
    """The images that each epoch saw, in order."""
    epochs: dict[int, list[int]] = {}
    for line in (run_dir / "seen.jsonl").read_text().splitlines():
        epoch, indices = json.loads(line)
        epochs.setdefault(epoch, []).extend(indices)
    return epochs


@pytest.fixture
def watched(shards, tmp_path) -> dict:
    """Five steps an epoch, whose images are noted."""
    return plain(shards, tmp_path / "run", callbacks={"seen": {}})


def test_another_batch_size_goes_on_at_the_next_image(watched, tmp_path):
    train_here(lasting(watched, "3ba"))
    watched["data"]["batch_size"] = 4
    train_here(lasting(watched, "2ep"))
    epochs = seen(tmp_path / "run")
    assert [sorted(images) for images in epochs.values()] == [list(range(40))] * 2
    assert [record["batch"] for record in figures(tmp_path / "run")] == list(range(1, 3 + 4 + 10 + 1))


@pytest.mark.parametrize("change", ["images", "seed", "nodes"])
def test_other_data_begin_the_epoch_again_and_are_told(watched, tmp_path, caplog, change):
    train_here(lasting(watched, "3ba"))
    if change == "images":
        (tmp_path / "other").mkdir()
        shutil.copytree(Path(watched["data"]["train"]["path"]).parent / "eval", tmp_path / "other/train")
        watched["data"]["train"]["path"] = str(tmp_path / "other/train")
    elif change == "seed":
        watched["seed"] = 5
    else:
        watched["data"]["num_canonical_nodes"] = 2
    train_here(lasting(watched, "1ep"))
    said = {
        "images": "data.train: the images are no longer those that the checkpoint was trained on: other data, or "
        "another order; epoch 0 begins again",
        "seed": "data.train: seed 0 -> 5: other data",
        "nodes": "data.train: data.num_canonical_nodes 1 -> 2: other data",
    }
    assert said[change] in caplog.text
    begun, whole = seen(tmp_path / "run")[0][:24], seen(tmp_path / "run")[0][24:]
    if change == "images":
        assert len(whole) == 8 and set(whole) <= set(range(12))
    else:
        assert sorted(whole) == list(range(40)) and whole[:24] != begun
    if change == "seed":
        fresh = watched | {"run_dir": str(tmp_path / "fresh"), "run_name": "fresh"}
        train_here(lasting(fresh, "1ep"))
        assert seen(tmp_path / "fresh")[0] == whole
    caplog.clear()
    train_here(lasting(watched, "2ep"))
    assert "data.train" not in caplog.text


# --- beginning with weights


@pytest.fixture(scope="module")
def have(undisturbed, tmp_path_factory) -> Path:
    """Weights as people have them: exports, and files as the public trainer, DDP and others leave them."""
    from rae.exchange.handover import export

    folder = tmp_path_factory.mktemp("have")
    source = open_source(str(undisturbed))
    export(source, str(folder / "ours"))
    export(source, str(folder / "published"), layout="published")
    average = torch.load(folder / "published/model.pt", weights_only=True)
    live = published_state_dict(open_source(str(undisturbed), "live").rae.decoder)
    whole, trained = (
        {**{f"decoder.{name}": tensor for name, tensor in state.items()}, "encoder.cls_token": torch.zeros(1)}
        for state in (average, live)
    )
    public = {"step": 5, "epoch": 1, "model": trained, "ema": whole, "optimizer": {}, "scheduler": None, "disc": {}}
    torch.save(public, folder / "ep-0000015.pt")
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in average.items()}, folder / "ddp.pt")
    torch.save(
        {"state_dict": {"model_ema": {f"module.{n}": t for n, t in whole.items()}, "x": {}}}, folder / "nested.pth"
    )
    torch.save({name: tensor.bfloat16() for name, tensor in average.items()}, folder / "half.bin")
    torch.save({"net": trained}, folder / "live.ckpt")
    return folder


def weights(source: str, which: str = "ema") -> dict[str, torch.Tensor]:
    return open_weights(source, which, Path("/nonexistent")).tensors


@pytest.mark.parametrize(
    "name",
    ["run", "checkpoints", "checkpoints/ep2-ba10", "checkpoints/ep2-ba10/state.pt", "config.yaml", "ours", "published",
     "ours/model.safetensors", "published/model.pt", "ep-0000015.pt", "ddp.pt", "nested.pth", "half.bin"],
)  # fmt: skip
def test_weights_are_found_in_whatever_holds_them(undisturbed, have, name, caplog):
    inside = undisturbed / ("" if name == "run" else name)
    expected = dict(load_newest(undisturbed / "checkpoints")["algorithms"])["EMA"]["average"]
    found = weights(str(inside if inside.exists() else have / name))
    tolerance = 0.01 if name == "half.bin" else 0
    for key, tensor in expected.items():
        assert (found[key.removeprefix("rae.")] - tensor).abs().max() <= tolerance, key
    assert not [key for key in found if key.removeprefix("decoder.") == key]
    assert ("its average is taken, 'ema'" in caplog.text) == (name == "ep-0000015.pt")


def test_live_weights_are_taken_by_choice(undisturbed, have, caplog):
    expected = load_newest(undisturbed / "checkpoints")["model"]
    for source in (undisturbed, have / "ep-0000015.pt", have / "live.ckpt"):
        found = weights(str(source), "live")
        assert torch.equal(found["decoder.norm.weight"], expected["rae.decoder.norm.weight"])
    with pytest.raises(UserError, match="holds averaged weights only"):
        weights(str(have / "ours"), "live")
    weights(str(have / "live.ckpt"))
    assert "live.ckpt: what it holds is no average, 'net', which is taken" in caplog.text


def test_a_diffusers_folder_gives_its_decoder():
    found = weights(str(ROOT / "tests/before/diffusers"))
    expected = open_source(str(ROOT / "tests/before/diffusers")).rae.decoder.state_dict()
    assert expected.keys() <= {name.removeprefix("decoder.") for name in found}
    assert all(torch.equal(found[f"decoder.{name}"], tensor) for name, tensor in expected.items())


def test_what_holds_none_is_named(shards, undisturbed, have, tmp_path):
    torch.save({"mean": torch.zeros(2), "var": torch.ones(2)}, tmp_path / "stat.pt")
    (tmp_path / "text.pt").write_text("decoder: 1")
    (tmp_path / "empty").mkdir()
    holes = torch.load(have / "published/model.pt", weights_only=True)
    holes["decoder_norm.weight"][0] = torch.nan
    torch.save(holes, tmp_path / "nan.pt")
    for source, message in {
        tmp_path / "stat.pt": "there is no decoder in it; python -m rae inspect",
        tmp_path / "text.pt": "it is no file of weights",
        tmp_path / "empty": "no autoencoder: the folder holds nothing",
        tmp_path / "nowhere": "there is no folder",
        tmp_path / "nan.pt": "norm.weight is not finite",
        shards / "train": "a data set, not an autoencoder",
    }.items():
        with pytest.raises(UserError, match=message):
            weights(str(source))
    checkpoint = undisturbed / "checkpoints/ep2-ba10"
    decoder = Decoder(32, 64, embed_dim=48, depth=2, num_heads=4, mlp_dim=96)
    for path, message in {
        str(undisturbed): "it is a run or a checkpoint; begin_from: .* takes it",
        str(checkpoint / "state.pt"): f"it is of a run's checkpoint; begin_from: {checkpoint} takes it",
        "s3://bucket/model.pt": "not on this disk; begin_from: s3://bucket/model.pt takes them",
        str(tmp_path / "empty"): "the folder holds none of model.pt, model.safetensors",
        str(ROOT / "yamls/rae_demo.yaml"): "it is no file of weights",
    }.items():
        with pytest.raises(UserError, match=message):
            load_published(decoder, path)
    for path in (have / "ours", have / "ours/model.safetensors", have / "published", have / "ep-0000015.pt"):
        load_published(decoder, str(path))
    with pytest.raises(UserError, match=r"it has depth 2, not 1; give model\.decoder .* its sizes"):
        load_published(Decoder(32, 64, embed_dim=48, depth=1, num_heads=4, mlp_dim=96), str(have / "ours"))


def test_positions_fit_the_new_grid(have, tmp_path, caplog):
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96}
    larger = Decoder(32, 128, **sizes)
    load_published(larger, str(have / "published/model.pt"))
    assert "its fixed positions are computed for 8 × 8 tokens, not 4 × 4 tokens" in caplog.text
    assert torch.equal(larger.positions, sincos_positions(48, 8))
    state = torch.load(have / "published/model.pt", weights_only=True)
    state["decoder_pos_embed"] = torch.randn(1, 17, 48)
    torch.save(state, tmp_path / "trained.pt")
    with pytest.raises(UserError, match="trainable_positions: true"):
        load_published(larger, str(tmp_path / "trained.pt"))
    trained = Decoder(32, 128, **sizes, trainable_positions=True)
    load_published(trained, str(tmp_path / "trained.pt"))
    assert "positions of 4 × 4 tokens are resampled (bicubic) to 8 × 8 tokens" in caplog.text
    assert torch.equal(trained.positions[:, 0], state["decoder_pos_embed"][:, 0])  # the extra token's
    means = (trained.positions[0, 1:].mean(0), state["decoder_pos_embed"][0, 1:].mean(0))
    assert torch.allclose(*means, atol=0.15)


def test_fine_tuning_at_another_size_with_a_frozen_part_and_the_old_discriminator(
    shards, undisturbed, tmp_path, caplog
):
    settings = tiny_settings(shards, tmp_path / "run") | {
        "metrics": {},
        "freeze": ["decoder.embed", "decoder.blocks.0"],
    }
    settings["data"] |= {"eval": None, "image_size": 80, "train": settings["data"]["train"] | {"resize": 80}}
    settings["algorithms"]["adversarial"] |= {"start": "0ba", "discriminator_start": "1ba"}
    settings["begin_from"] = {"source": str(undisturbed), "discriminator": "kept"}
    trainer = train_here(lasting(settings, "2ba"))
    assert "run begins with the average of" in caplog.text
    source = load_newest(undisturbed / "checkpoints")
    average = dict(source["algorithms"])["EMA"]["average"]
    now = load_newest(tmp_path / "run/checkpoints")
    for name, tensor in now["model"].items():
        assert torch.equal(tensor, average[name]) == name.startswith(("rae.decoder.embed.", "rae.decoder.blocks.0.")), (
            name
        )
    assert len(trainer.state.optimizers[0].param_groups[0]["params"]) == 17
    heads = dict(now["algorithms"])["Adversarial"]["discriminator"]
    before = dict(source["algorithms"])["Adversarial"]["discriminator"]
    moved = max(float((heads[name] - before[name]).abs().max()) for name in heads if name.endswith("weight_orig"))
    assert 0 < moved < 1e-3  # by one step, from where it was
    trainer = train_here(lasting(settings, "3ba"))  # goes on from its own checkpoint
    assert caplog.text.count("begins with the average") == 1
    assert len(figures(tmp_path / "run")) == 3


def test_two_ranks_begin_with_the_same_weights(shards, have, tmp_path):
    settings = plain(shards, tmp_path / "run", begin_from=str(have / "ep-0000015.pt"))
    settings |= {"optimizer": {"adamw": {"lr": 0.0}}, "schedule": None, "parallelism": "fsdp"}
    said = train_ranks(lasting(settings, "1ba"), tmp_path)
    assert said.count("its average is taken, 'ema'") == said.count("run begins with the weights of") == 1
    expected = weights(str(have / "ep-0000015.pt"))
    for name, tensor in load_newest(tmp_path / "run/checkpoints")["model"].items():
        assert torch.equal(tensor, expected[name.removeprefix("rae.")]), name
    assert not list((tmp_path / "run").glob(".loading*"))


def test_wrong_beginnings_are_one_line(shards, undisturbed, have, tmp_path):
    def fails(message: str, **changed):
        with pytest.raises(UserError, match=message):
            train_here(plain(shards, tmp_path / "run") | changed)

    fails("begin_from: there is no folder", begin_from=str(tmp_path / "none"))
    fails("begin_from.discriminator: there is none to keep without algorithms.adversarial",
          begin_from={"source": str(undisturbed), "discriminator": "kept"})  # fmt: skip
    fails(
        "freeze: nothing that is trained is called 'decoder.head2'.*did you mean 'decoder.head'",
        freeze=["decoder.head2"],
    )
    fails("freeze: nothing is left to train", freeze=["decoder"])
    settings = plain(shards, tmp_path / "run")
    settings["model"]["decoder"]["num_heads"] = 2
    fails(
        "model.decoder: .* is of num_heads 4, not 2; make them equal",
        begin_from=str(have / "ours"),
        model=settings["model"],
    )
    for path, message in {
        have / "ours": "holds weights alone; begin_from: .* takes them",
        have / "published": "holds weights alone; begin_from: .* takes them",
        tmp_path / "none": "trainer.load_path: there is no folder and no file",
    }.items():
        fails(message, trainer=settings["trainer"] | {"load_path": str(path)})
    both = settings["trainer"] | {"load_path": str(undisturbed)}
    fails("begin_from: trainer.load_path says where to start, too", begin_from=str(undisturbed), trainer=both)


# --- copies


def test_a_copy_of_a_runs_folder_is_a_run_of_its_own(shards, tmp_path, caplog):
    settings = plain(shards, tmp_path / "x")
    settings["loggers"]["tensorboard"] = {"log_dir": f"{tmp_path}/x/tensorboard"}
    train_here(lasting(settings, "1ba"))
    shutil.copytree(tmp_path / "x", tmp_path / "backup")
    train_here(lasting(settings, "2ba"))
    place = str(tmp_path / "backup")
    config = load_config(f"{place}/config.yaml")
    assert f"run_dir: {place}, where config.yaml lies; that says {tmp_path}/x" in caplog.text
    assert config.run_dir == place
    assert config.loggers["tensorboard"] == {"log_dir": f"{place}/tensorboard"}
    assert open_source(place).trained == {"epoch": 0, "batch": 1}
    assert open_source(f"{place}/config.yaml").trained == {"epoch": 0, "batch": 1}
    train_here(lasting(config.model_dump(), "4ba"))
    assert [len(figures(tmp_path / name)) for name in ("x", "backup")] == [2, 4]
    # Where a folder has none, the place that its configuration names is used, and named.
    shutil.rmtree(f"{place}/checkpoints")
    elsewhere = config.model_copy(update={"trainer": config.trainer | {"save_folder": f"{tmp_path}/x/checkpoints"}})
    assert [each.name for _, each in checkpoints_of_run(place, elsewhere)] == ["ep0-ba2", "ep0-ba1"]
    assert (
        f"{place} holds no checkpoint; those in {tmp_path}/x/checkpoints, which its configuration names" in caplog.text
    )
