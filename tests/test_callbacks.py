"""What one sees while training, and what guards it: figures, pictures, histograms, warnings, time left."""

import json
from pathlib import Path

import pytest
import torch

from rae import registry
from rae.callbacks.guard import Guard, can_skip_by_itself
from rae.checkpoints import fetch, in_form, list_checkpoints, without_code
from rae.registry import UserError
from tests.conftest import assert_same_state, metrics_of, tensors_of, tiny_settings, train_here

POISON = '''
import torch
from composer import Algorithm, Event
from composer.utils import dist
from rae.algorithms import LossTerm
from rae.registry import register

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


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    for kind in registry._plugins:
        registry.plugins(kind)
    monkeypatch.setattr(registry, "_plugins", {kind: dict(named) for kind, named in registry._plugins.items()})


@pytest.fixture
def settings(shards, tmp_path) -> dict:
    """Five steps, the discriminator from the second and the GAN from the third on, a checkpoint a step."""
    settings = tiny_settings(shards, tmp_path / "run")
    settings["trainer"] |= {"max_duration": "5ba", "eval_interval": 0, "save_interval": "1ba"}
    settings["algorithms"]["adversarial"] |= {"discriminator_start": "1ba", "start": "2ba"}
    return settings


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


def read_late(settings: dict, monkeypatch) -> None:
    """As on a GPU: fused optimizers read the verdict on the device, the host only after the step."""
    settings["optimizer"]["adamw"]["fused"] = True
    settings["algorithms"]["adversarial"]["optimizer"] = {"adamw": {"fused": True}}
    monkeypatch.setattr(Guard, "_can_read_late", lambda self, state, optimizer: can_skip_by_itself(optimizer))


@pytest.mark.parametrize(("what", "late"), [("loss", False), ("latent", False), ("gradient", True)])
def test_a_bad_step_stops_the_run_with_a_checkpoint_of_before(settings, tmp_path, what, late, monkeypatch):
    if late:
        read_late(settings, monkeypatch)
    settings["trainer"]["save_interval"] = "1ep"
    train_here(settings | {"run_dir": str(tmp_path / "undisturbed")})
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
    assert_same_state(tmp_path / "run/checkpoints", tmp_path / "undisturbed/checkpoints")


@pytest.mark.parametrize(("what", "late"), [("gradient", False), ("latent", True), ("discriminator", True)])
def test_a_skipped_step_changes_nothing(settings, tmp_path, what, late, monkeypatch):
    if late:
        read_late(settings, monkeypatch)
    train_here(poisoned(settings, tmp_path, "skip", what=what, step=4))
    before, after, later = (trained_state(tmp_path / "run", batch) for batch in (3, 4, 5))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if what == "discriminator":
        assert any(name.startswith("/model") for name in changed)
        changed = [n for n in changed if "/Adversarial/" in n and not n.endswith(("weight_u", "weight_v"))]
    assert changed == []
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert not any(torch.equal(later[n], after[n]) for n in after if n.startswith("/model"))
    counts = [r["guard/skipped"] for r in metrics_of(tmp_path / "run") if "guard/skipped" in r]
    assert counts == [0, 0, 0, 1, 1]
