"""What one sees while training, and what guards it: figures, pictures, histograms, warnings, time left."""

import json
import logging
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from rae.__main__ import main
from rae.callbacks.guard import Guard, can_skip_by_itself
from rae.callbacks.histograms import spread_out, summary
from rae.callbacks.jsonl import JSONLines
from rae.callbacks.progress import Mean, time_left
from rae.callbacks.referee import Referee
from rae.config import registry
from rae.config.errors import UserError
from rae.survival.checkpoints import fetch, in_form, list_checkpoints, without_code
from tests.conftest import (
    assert_same_state,
    metrics_of,
    tensors_of,
    tiny_settings,
    train_here,
    train_ranks,
    wandb_file,
)

POISON = '''
import torch
from composer import Algorithm, Event
from composer.utils import dist
from rae.algorithms import LossTerm
from rae.config.registry import register

class Poisoned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")

@register("algorithm", "poison")
class Poison(Algorithm):
    """Spoil step ``step`` (from 1), on one rank or all."""
    def __init__(self, what: str, step: int, rank: int | None = None, steps: int = 1):
        self.what, self.steps, self.rank = what, range(step, step + steps), rank
    def match(self, event, state):
        events = {"latent": Event.BEFORE_FORWARD, "discriminator": Event.BATCH_START}
        here = self.rank is None or self.rank == dist.get_global_rank()
        wanted = event == events.get(self.what, Event.BEFORE_BACKWARD)
        return wanted and here and int(state.timestamp.batch) + 1 in self.steps
    def apply(self, event, state, logger):
        if self.what == "latent":
            rae = getattr(state.model, "module", state.model).rae
            latent = rae.latent_of(rae.tokens_of(state.batch))
            latent[1] = float("nan")
            state.batch = {**state.batch, "latent": latent}
        elif self.what == "loss":
            state.loss["l1"] = state.loss["l1"] * float("nan")
            state.loss["total"] = state.loss["total"] * float("nan")
        elif self.what == "gradient":
            state.loss["total"] = Poisoned.apply(state.loss["total"])
        else:
            discriminator = next(a for a in state.algorithms if hasattr(a, "discriminator")).discriminator
            spoiled = next(discriminator.heads[0].parameters())
            handle = spoiled.register_hook(lambda g: (handle.remove(), g * float("nan"))[1])
'''

READ_LATE = """
from rae.callbacks.guard import Guard, can_skip_by_itself
Guard._can_read_late = lambda self, state, optimizer: can_skip_by_itself(optimizer)
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    for kind in registry._plugins:
        registry.plugins(kind)
    monkeypatch.setattr(registry, "_plugins", {kind: dict(named) for kind, named in registry._plugins.items()})


def short(shards: Path, run_dir: Path) -> dict:
    """Five steps, the discriminator from the second and the GAN from the third on, a checkpoint a step."""
    settings = tiny_settings(shards, run_dir)
    settings["trainer"] |= {"max_duration": "5ba", "eval_interval": -1, "save_interval": "1ba"}
    settings["algorithms"]["adversarial"] |= {"discriminator_start": "1ba", "start": "2ba"}
    return settings


@pytest.fixture
def settings(shards, tmp_path) -> dict:
    return short(shards, tmp_path / "run")


def poisoned(settings: dict, tmp_path: Path, on_nan: str = "stop", **poison) -> dict:
    (tmp_path / "poison.py").write_text(POISON)
    return settings | {
        "imports": [str(tmp_path / "poison.py")],
        "algorithms": {**settings["algorithms"], "poison": poison},
        "callbacks": {**settings.get("callbacks", {}), "guard": {"on_nan": on_nan}},
    }


def trained_state(folder: Path, batch: int) -> dict[str, torch.Tensor]:
    """Weights, moments, averages of one checkpoint, without what counts steps of learning rates."""
    (found,) = [c for c in list_checkpoints(str(folder / "checkpoints")) if c.age[0] == batch]
    path = in_form(fetch(str(folder / "checkpoints"), found, folder / "scratch"), False, folder / "scratch")
    with without_code():
        state = torch.load(path)["state"]
    return tensors_of({key: state[key] for key in ("model", "optimizers", "algorithms")})


KINDS = {
    "loss": "not finite: loss/l1",
    "gradient": "not finite: gradient/decoder",
    "latent": "not finite: loss/l1",
}


def fused(settings: dict) -> dict:
    settings["optimizer"]["adamw"]["fused"] = True
    settings["algorithms"]["adversarial"]["optimizer"] = {"adamw": {"fused": True}}
    return settings


def read_late(monkeypatch) -> None:
    """As on a GPU: fused optimizers read the verdict on the device, the host only after the step."""
    monkeypatch.setattr(Guard, "_can_read_late", lambda self, state, optimizer: can_skip_by_itself(optimizer))


@pytest.fixture(scope="module")
def untouched(shards, tmp_path_factory) -> Path:
    settings = fused(short(shards, tmp_path_factory.mktemp("untouched") / "run"))
    settings["trainer"]["save_interval"] = "1ep"
    train_here(settings)
    return Path(settings["run_dir"])


@pytest.mark.parametrize(("what", "late"), [("latent", False), ("gradient", True)])
def test_a_bad_step_stops_the_run_with_a_checkpoint_of_before(settings, tmp_path, untouched, what, late, monkeypatch):
    settings = fused(settings)
    if late:
        read_late(monkeypatch)
    settings["trainer"]["save_interval"] = "1ep"
    with pytest.raises(UserError, match=f"step 4: {KINDS[what]}") as error:
        train_here(poisoned(settings, tmp_path, what=what, step=4))
    assert "checkpoint ep0-ba3 is of before" in str(error.value)
    assert "rae.decoder" in str(error.value)
    (record,) = [json.loads(line) for line in (tmp_path / "run/guard.jsonl").read_text().splitlines()]
    (rank,) = record["ranks"]
    bad = [sample for sample in rank["samples"] if "not_finite" in sample]
    assert len(rank["samples"]) == 8
    assert rank["gradients"]
    if what == "latent":
        assert [s["not_finite"] for s in bad] == [["latent", "recon"]]
        assert bad[0]["path"].endswith(".png")
        assert bad[0]["path"] in str(error.value)
        assert bad[0]["label"] in (0, 1)
    else:
        assert not bad
    assert [c.name for c in list_checkpoints(str(tmp_path / "run/checkpoints"))] == ["ep0-ba3"]
    train_here(settings)  # without the poison
    assert_same_state(tmp_path / "run/checkpoints", untouched / "checkpoints")


@pytest.mark.parametrize(("what", "late"), [("gradient", False), ("latent", True), ("discriminator", True)])
def test_a_skipped_step_changes_nothing(settings, tmp_path, what, late, monkeypatch):
    if late:
        settings = fused(settings)
        read_late(monkeypatch)
    train_here(poisoned(settings, tmp_path, "skip", what=what, step=3))
    before, after, later = (trained_state(tmp_path / "run", batch) for batch in (2, 3, 4))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if what == "discriminator":
        assert any(name.startswith("/model") for name in changed)
        changed = [n for n in changed if "/Adversarial/" in n and not n.endswith(("weight_u", "weight_v"))]
    assert changed == []
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert not any(torch.equal(later[n], after[n]) for n in after if n.startswith("/model"))
    counts = [r["guard/skipped"] for r in metrics_of(tmp_path / "run") if "guard/skipped" in r]
    assert counts == [0, 0, 1, 1, 1]


def test_two_sharded_ranks_skip_together_what_one_of_them_met(settings, tmp_path):
    settings = fused(settings) | {"parallelism": "fsdp"}
    settings["trainer"] |= {"max_duration": "4ba", "device_train_microbatch_size": 2}
    settings["callbacks"] = {"pictures": {"interval": "4ba", "count": 2}, "histograms": {"interval": "4ba"}}
    settings = poisoned(settings, tmp_path, "skip", what="latent", step=3, rank=1)
    with (tmp_path / "poison.py").open("a") as file:
        file.write(READ_LATE)
    said = train_ranks(settings, tmp_path / "launch")
    (record,) = [json.loads(line) for line in (tmp_path / "run/guard.jsonl").read_text().splitlines()]
    assert record["step"] == 3
    bad = [[s["not_finite"] for s in rank["samples"] if "not_finite" in s] for rank in record["ranks"]]
    assert bad == [[], [["latent", "recon"]] * 2]  # the second sample of both microbatches
    assert "loss/l1" in record["ranks"][1]["figures"]
    assert "loss/l1" not in record["ranks"][0]["figures"]
    assert "step 3: not finite: loss/l1" in said
    before, after, later = (trained_state(tmp_path / "run", batch) for batch in (2, 3, 4))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert (tmp_path / "run/pictures/ba0000004.png").is_file()
    last = [r for r in metrics_of(tmp_path / "run") if "loss/train/total" in r][-1]
    assert last["guard/skipped"] == 1
    assert last["histograms/latent/std"] == pytest.approx(1, abs=0.1)


def test_too_many_bad_steps_in_a_row_stop_the_run(settings, tmp_path):
    settings = poisoned(settings, tmp_path, "skip", what="loss", step=2, steps=3)
    settings["callbacks"]["guard"]["max_skipped"] = 2
    with pytest.raises(UserError, match=r"step 4: .*ep0-ba3 is of before; 2 steps in a row were skipped"):
        train_here(settings)


def test_weights_that_are_not_finite_are_not_saved(settings, tmp_path):
    settings |= {"optimizer": {"adamw": {"lr": 1e37}}, "schedule": None}
    with pytest.raises(UserError, match=r"weights (themselves )?are not finite"):
        train_here(settings)
    assert list_checkpoints(str(tmp_path / "run/checkpoints")) == []


@pytest.fixture(scope="module")
def seen(shards, tmp_path_factory) -> Path:
    """Five steps in microbatches, seen by everything that there is to see with."""
    root = tmp_path_factory.mktemp("seen")
    settings = tiny_settings(shards, root / "run")
    settings["trainer"] |= {"max_duration": "5ba", "eval_interval": "3ba", "device_train_microbatch_size": 4}
    settings["algorithms"]["adversarial"] |= {"discriminator_start": "1ba", "start": "2ba"}
    settings["loggers"] |= {"tensorboard": {"log_dir": f"{root}/run/tensorboard"}, "wandb": {"project": "rae"}}
    settings["callbacks"] = {
        "pictures": {"interval": "3ba", "count": 3, "noise_tau": 0.4},
        "histograms": {"interval": "2ba", "values": 1000},
        "optimizer_monitor": {"batch_log_interval": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        train_here(settings)
    return root / "run"


def in_jsonl(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    series = defaultdict(list)
    for record in metrics_of(run_dir):
        for name in record.keys() - {"batch"}:
            series[name].append((record["batch"], record[name]))
    return series


def in_tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard" / run_dir.name), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(stored: bytes) -> Iterator[bytes]:
    """The records of W&B's file, which is a LevelDB log: blocks of 32 kB, of parts with a checksum, length and type."""
    place, record = 7, b""  # after its own header
    while place + 7 <= len(stored):
        if (left := -place % 32768) < 7 and left:
            place += left  # too little for a part's header
            continue
        _, length, kind = struct.unpack_from("<IHB", stored, place)
        record += stored[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def in_wandb(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from wandb.proto.wandb_internal_pb2 import Record

    series, record = defaultdict(list), Record()
    for data in logged(wandb_file(run_dir).read_bytes()):
        record.ParseFromString(data)
        for item in record.history.item:
            name, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
            part_of_a_picture = len(item.nested_key) > 1
            if isinstance(value, (int, float)) and not name.startswith("_") and not part_of_a_picture:
                series[name].append((record.history.step.num, value))
    return series


def test_all_loggers_get_the_same_figures(seen):
    expected = in_jsonl(seen)
    assert {"gradient/gan", "gan/share", "guard/skipped", "time/remaining", "metrics/eval/psnr"} <= expected.keys()
    assert {"histograms/latent/std", "histograms/logits_fake/median", "loss/train/total"} <= expected.keys()
    for logged in (in_tensorboard(seen), in_wandb(seen)):
        assert logged.keys() == expected.keys()
        for name, series in expected.items():  # what an epoch's end says once more of its last step goes before
            assert dict(logged[name]) == pytest.approx(dict(series), rel=1e-5), name


def test_histograms_go_to_tensorboard_and_wandb(seen):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(seen / "tensorboard" / seen.name), {"histograms": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {f"histograms/{n}" for n in ("latent", "logits_real", "logits_fake")}
    assert [e.step for e in events.Histograms("histograms/logits_fake")] == [2, 4]
    assert b"histogram" in wandb_file(seen).read_bytes()


def test_summaries_and_samples_of_values():
    values = torch.arange(101.0)
    assert summary(values)["median"] == 50
    assert summary(values)["p99"] == 99
    assert summary(values)["std"] == pytest.approx(29.1548, abs=1e-3)
    assert spread_out(values, 1000).tolist() == values.tolist()
    assert spread_out(values, 5).tolist() == [0, 25, 50, 75, 100]


def test_pictures_have_rows_for_what_there_is(seen):
    names = sorted(path.name for path in (seen / "pictures").iterdir())
    assert names == ["ba0000003.png", "ba0000005.png"]
    picture = Image.open(seen / "pictures/ba0000005.png").convert("RGB")
    assert picture.size == (76 + 3 * 66 + 2, 4 * 66 + 2)
    rows = [picture.crop((78, i * 66 + 2, 276, i * 66 + 66)).tobytes() for i in range(4)]
    assert len(set(rows)) == 4
    margins = [picture.crop((0, i * 66 + 2, 76, i * 66 + 66)) for i in range(4)]
    assert all(margin.getextrema()[0][0] < 100 for margin in margins)


def test_gradient_norms_are_the_whole_batchs(seen):
    steps = [r for r in metrics_of(seen) if "loss/train/total" in r]
    for record in steps:
        assert record["gradient/l1"] == pytest.approx((8 * 3 * 64 * 64) ** -0.5, rel=1e-4)  # ±1/n, n times
        assert record["gradient/decoder"] == pytest.approx(record["l2_norm/grad/global"], rel=1e-5)
    assert "gan/share" not in steps[1]
    gan, rest = steps[2]["gradient/gan"], steps[2]["gradient/reconstruction"]
    assert steps[2]["gan/share"] == pytest.approx(gan / (gan + rest))
    assert abs(rest - steps[2]["gradient/perceptual"]) <= steps[2]["gradient/l1"] * 1.001


def test_the_time_left_ends_at_zero_and_all_measured(seen):
    steps = [r for r in metrics_of(seen) if "time/remaining" in r]
    assert [r["time/remaining"] > 0 for r in steps] == [True] * 5  # the last checkpoint and evaluation are to come
    assert steps[0]["time/remaining_measured"] < 0.5
    assert steps[3]["time/remaining_measured"] == 1


def mean_of(*seconds: float) -> Mean:
    mean = Mean()
    for each in seconds:
        mean.add(each)
    return mean


def test_time_left_projects_phases_by_operations_until_they_are_measured():
    parts = {0: 1.0, 10: 1.0, 20: 2.0}
    steps = {0: mean_of(9.0, 1.0, 1.0)}  # the first step warms up
    left = time_left(5, 40, parts, steps, [])
    assert left.seconds == 5 * 1 + 10 * 2 + 20 * 4
    assert left.measured == pytest.approx(5 / 105)
    assert str(left) == "≈ 0:01:45 left"
    left = time_left(5, 40, parts, steps, [(3, Mean())])
    assert str(left) == "≥ 0:01:45 left"
    steps |= {10: mean_of(2.5), 20: mean_of(8.0, 5.0)}
    left = time_left(30, 40, parts, steps, [(2, mean_of(7.0)), (0, Mean())])
    assert (left.seconds, left.measured, str(left)) == (64, 1, "0:01:04 left")


def test_the_referee_speaks_once_each_time(caplog):
    referee = Referee(window=20)
    with caplog.at_level(logging.WARNING):
        for _ in range(19):
            referee.judge(0.5, 0.01, 0.0, 1e-4)
        assert (referee.verdict, caplog.messages) == (0, [])
        for _ in range(50):
            referee.judge(0.5, 0.01, 0.0, 1e-4)
        assert referee.verdict == -1
        assert len(caplog.messages) == 1
        assert "has collapsed: over 20 steps it told real from fake in 50% of places" in caplog.messages[0]
        for _ in range(100):
            referee.judge(0.75, 1.0, -1.0, 1e-4)
        assert referee.verdict == 0
        for _ in range(200):
            referee.judge(1.0, 3.0, -3.0, 1e-4)
        assert referee.verdict == 1
        assert len(caplog.messages) == 2
        assert "has won" in caplog.messages[1]


def test_the_referee_awaits_the_warm_up(caplog):
    referee = Referee(window=20)
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            referee.judge(0.5, 0.0, 0.0, learning_rate=1e-4 * (step + 1) / 100)
        for _ in range(200):
            referee.judge(0.6, 0.1, 0.0, learning_rate=1e-4)
    assert (referee.verdict, caplog.messages) == (0, [])
    assert referee.accuracy == pytest.approx(0.6)


def test_the_referee_tells_a_win_during_the_warm_up(caplog):
    referee = Referee(window=20)
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            referee.judge(1.0, 3.0, -3.0, learning_rate=1e-6 * (step + 1))
        assert (referee.verdict, len(caplog.messages)) == (1, 1)
        for _ in range(40):
            referee.judge(1.0, 3.0, -3.0, learning_rate=2e-5)
    assert (referee.verdict, len(caplog.messages)) == (1, 1)
    assert "has won" in caplog.messages[0]


def test_the_referee_tells_a_collapse_after_the_warm_up(caplog):
    referee = Referee(window=20)
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            referee.judge(0.5, 0.0, 0.0, learning_rate=1e-4 * (step + 1) / 100)
        for _ in range(20):
            assert referee.verdict == 0
            referee.judge(0.5, 0.0, 0.0, learning_rate=1e-4)
    assert referee.verdict == -1
    assert len(caplog.messages) == 1


MISTAKES = {
    "guard: {on_nan: halt}": "callbacks.guard.on_nan",
    "guard: {max_skipped: 0}": "max_skipped: must be 1 or more",
    "pictures: {noise_tau: -1}": "noise_tau: must be 0 or more",
    "histograms: {interval: often}": "'often' is not a time",
    "referee: {won: 2}": "won between 0.5 and 1",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_named(settings, wrong):
    from omegaconf import OmegaConf

    settings["callbacks"] = OmegaConf.to_container(OmegaConf.create(wrong))
    with pytest.raises(UserError, match=MISTAKES[wrong]):
        train_here(settings)


def test_figures_outlive_a_kill_while_a_start_reads_them(tmp_path, monkeypatch):
    lines = "".join(f'{{"batch": {batch}, "loss/train/l1": 0.5}}\n' for batch in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)
    logger, state = JSONLines(str(tmp_path)), SimpleNamespace(timestamp=SimpleNamespace(batch=2))
    write = Path.write_text

    def killed(path, text):
        write(path, text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.fit_start(state, None)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    monkeypatch.undo()
    JSONLines(str(tmp_path)).fit_start(state, None)
    assert [record["batch"] for record in metrics_of(tmp_path)] == [1, 2]


def test_curves_of_nothing_are_one_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"batch": 1, "time/total": 2.0}\n')
    with pytest.raises(SystemExit) as end:
        main(["curves", str(tmp_path)])
    assert end.value.code == 2 and "there are no figures yet" in capsys.readouterr().err
