"""Training steps of the public implementations' stage 2, through Composer's Trainer with the real plugins."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from composer import Callback, Event, Trainer
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from rae.callbacks.begin_step import BeginStep
from rae.callbacks.jsonl import JSONLines
from rae.callbacks.step_figures import StepFigures
from rae.config.arguments import build
from rae.data.loaders import Ledger
from rae.diffusion.published import load_published
from tests.conftest import TINY, metrics_of, relative_error
from tests.test_diffusion import STAGE2, numbers

SIZES = {"embed_dim": 48, "depth": 3, "num_heads": 4, "head_embed_dim": 64, "head_depth": 2, "head_num_heads": 4}
RAEV2 = {"ditdh_in_context": {**SIZES, "base_depth": 2, "time_tokens": 2, "class_tokens": 3, "trained_tables": True}}
FALLING = {"warmup_linear": {"warmup": "1ep", "decay_end": "3ep", "final_lr": 1e-4, "warmup_from_zero": False}}


@dataclass
class Recipe:
    """A trajectory of the golden set: where its numbers and its first weights are, and how it was made."""

    numbers: str
    start: str
    network: dict
    keys: str = ""
    steps: int = 8
    flow: dict = field(default_factory=lambda: {"line": {}})
    schedule: dict = field(default_factory=lambda: FALLING)

    @property
    def told(self) -> dict:
        told = json.loads((STAGE2 / f"{self.numbers}.json").read_text())
        return {**told, **told.get(self.keys, {})}


RECIPES = {
    "public": Recipe("trajectory", "ditdh-tiny", {"ditdh": {**SIZES, "trained_tables": True}}, "public"),
    "frozen": Recipe("trajectory", "ditdh-tiny", {"ditdh": SIZES}, "frozen"),
    "raev2": Recipe(
        "raev2/trajectory", "raev2/ditdh-ig-tiny", RAEV2, "", 6,
        {"line": {"predicts": "data", "shift": 8**0.5}}, {"constant_lr": {}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=RECIPES)
def trajectory(request, tmp_path_factory):
    recipe = RECIPES[request.param]
    told, run_dir, g = recipe.told, tmp_path_factory.mktemp(request.param), numbers(recipe.numbers)
    settings = {
        "autoencoder": {
            "encoder": TINY["dinov2"],
            "decoder": {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96},
        },
        "network": recipe.network,
        "flow": recipe.flow,
        "num_classes": 10,
        "label_dropout": 0.25,
    }
    torch.manual_seed(0)
    model = build("model", {"diffusion": settings}, "model", image_size=64)
    network = model.generator.network
    load_published(network, load_file(STAGE2 / recipe.start / "model.safetensors"), "")
    model.latent_of = lambda batch: batch["latent"]  # of the golden set, normalised
    drawn = {name: g[name].flatten(0, 1) for name in ("t", "noise", "dropped")}
    model.draws = lambda latent, index: (drawn["t"][index], drawn["noise"][index], drawn["dropped"][index].bool())
    lr = 1e-3
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build("optimizer", {"adamw": {"lr": lr}}, "", params=trained)
    given = {} if "constant_lr" in recipe.schedule else {"base_lr": lr, "steps_per_epoch": 2}
    factor = build("schedule", recipe.schedule, "", **given)
    ema = build("algorithm", {"ema": {"decay": 0.9}}, "")
    clipping = {"clipping_type": "norm", "clipping_threshold": told["settings"]["clip"]}
    norms, batches = Norms(ema), zip(g["latents"], g["labels"].long(), strict=True)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(
            [{"latent": z, "label": y, "index": torch.arange(4 * i, 4 * i + 4)} for i, (z, y) in enumerate(batches)],
            batch_size=None,
        ),
        max_duration=f"{recipe.steps}ba",
        device_train_microbatch_size=4,
        optimizers=optimizer,
        schedulers=LambdaLR(optimizer, factor),
        step_schedulers_every_batch=True,
        algorithms=[build("algorithm", {"gradient_clipping": clipping}, ""), ema],
        callbacks=[norms, BeginStep(seed=0), StepFigures(Ledger())],
        loggers=[JSONLines(str(run_dir))],
        precision="fp32",
        device="cpu",
        progress_bar=False,
        auto_log_hparams=False,
    )
    trainer.fit()
    return recipe, network, ema, norms.taken, metrics_of(run_dir), g


class Norms(Callback):
    """Of gradients before clipping, and of weights and their average after the step."""

    def __init__(self, ema):
        self.ema, self.taken = ema, []

    def run_event(self, event, state, logger):
        if event == Event.AFTER_LOSS:
            self.seen = state.model.generator.flow.loss(state.outputs["prediction"], state.outputs["target"])
        elif event == Event.BATCH_END:
            live = dict(state.model.named_parameters())
            self.taken.append({
                "loss_per_sample": self.seen.tolist(),
                "model_norm": norm(live.values()),
                "ema_norm": norm({**live, **self.ema.average}.values()),
            })  # fmt: skip


def norm(tensors) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors).sqrt())


def test_every_figure_of_a_step(trajectory):
    recipe, _, _, taken, logged, _ = trajectory
    told = recipe.told
    assert len(told["steps"]) == recipe.steps
    for step, expected in enumerate(told["steps"]):
        record = logged[step]
        assert record["loss/train/total"] == pytest.approx(expected["loss"], rel=1e-4)
        if "loss_base" in expected:
            assert record["loss/train/base"] == pytest.approx(expected["loss_base"], rel=1e-4)
        assert record["lr/network"] == pytest.approx(expected["lr"], rel=1e-9)
        clipped = min(expected["grad_norm"], told["settings"]["clip"])  # our figure is of what the optimizer gets
        assert record["gradient/network"] == pytest.approx(clipped, rel=1e-4)
        for name in expected.keys() & {"loss_per_sample", "model_norm", "ema_norm"}:
            assert taken[step][name] == pytest.approx(expected[name], rel=1e-4), (step, name)


@torch.no_grad()
def test_final_weights(trajectory):
    recipe, network, ema, _, _, g = trajectory
    average = {**network.state_dict(), **{k.removeprefix("generator.network."): v for k, v in ema.average.items()}}
    for name, weight in network.named_parameters():
        expected = recipe.told["norms"][name]
        assert norm([weight]) == pytest.approx(expected["model"], rel=1e-4), name
        assert norm([average[name]]) == pytest.approx(expected["ema"], rel=1e-4), name
    given = (g["test.x"], g["test.t"], g["test.y"].long())
    if recipe.keys:
        assert relative_error(network(*given), g[f"{recipe.keys}.model_out"]) < 1e-4
        network.load_state_dict(average)
        assert relative_error(network(*given), g[f"{recipe.keys}.ema_out"]) < 1e-4
        return
    network.load_state_dict(average)
    full, base = network(*given, with_base=True)
    assert relative_error(full, g["ema_full"]) < 1e-4
    assert relative_error(base, g["ema_base"]) < 1e-4
