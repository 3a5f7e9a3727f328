"""Eight training steps of the public implementation's stage 2, through Composer's Trainer with the real plugins."""

import json

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

REFERENCE = json.loads((STAGE2 / "trajectory.json").read_text())


@pytest.fixture(scope="module", params=["public", "frozen"])
def trajectory(request, tmp_path_factory):
    run_dir, g = tmp_path_factory.mktemp(request.param), numbers("trajectory")
    settings = {
        "autoencoder": {
            "encoder": TINY["dinov2"],
            "decoder": {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96},
        },
        "network": {
            "ditdh": {
                "embed_dim": 48, "depth": 3, "num_heads": 4, "head_embed_dim": 64, "head_depth": 2, "head_num_heads": 4,
                "trained_tables": request.param == "public",
            }
        },
        "num_classes": 10,
        "label_dropout": 0.25,
    }  # fmt: skip
    torch.manual_seed(0)
    model = build("model", {"diffusion": settings}, "model", image_size=64)
    network = model.generator.network
    load_published(network, load_file(STAGE2 / "ditdh-tiny/model.safetensors"), "")
    model.latent_of = lambda batch: batch["latent"]  # of the golden set, normalised
    drawn = {name: g[name].flatten(0, 1) for name in ("t", "noise", "dropped")}
    model.draws = lambda latent, index: (drawn["t"][index], drawn["noise"][index], drawn["dropped"][index].bool())
    lr = REFERENCE["settings"]["optimizer"]["lr"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build("optimizer", {"adamw": {"lr": lr}}, "", params=trained)
    schedule = {"warmup_linear": {"warmup": "1ep", "decay_end": "3ep", "final_lr": 1e-4, "warmup_from_zero": False}}
    factor = build("schedule", schedule, "", base_lr=lr, steps_per_epoch=2)
    ema = build("algorithm", {"ema": {"decay": 0.9}}, "")
    clipping = {"clipping_type": "norm", "clipping_threshold": REFERENCE["settings"]["clip"]}
    norms, batches = Norms(ema), zip(g["latents"], g["labels"].long(), strict=True)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(
            [{"latent": z, "label": y, "index": torch.arange(4 * i, 4 * i + 4)} for i, (z, y) in enumerate(batches)],
            batch_size=None,
        ),
        max_duration="8ba",
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
    return request.param, network, ema, norms.taken, metrics_of(run_dir), g


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


@pytest.mark.parametrize("step", range(8))
def test_every_figure_of_a_step(trajectory, step):
    kind, _, _, taken, logged, _ = trajectory
    expected, record = REFERENCE[kind]["steps"][step], logged[step]
    assert record["loss/train/flow"] == pytest.approx(expected["loss"], rel=1e-4)
    assert record["lr/network"] == pytest.approx(expected["lr"], rel=1e-9)
    clipped = min(expected["grad_norm"], REFERENCE["settings"]["clip"])  # our figure is of what the optimizer gets
    assert record["gradient/network"] == pytest.approx(clipped, rel=1e-4)
    for name in ("loss_per_sample", "model_norm", "ema_norm"):
        assert taken[step][name] == pytest.approx(expected[name], rel=1e-4), name


@torch.no_grad()
def test_final_weights(trajectory):
    kind, network, ema, _, _, g = trajectory
    average = {**network.state_dict(), **{k.removeprefix("generator.network."): v for k, v in ema.average.items()}}
    for name, weight in network.named_parameters():
        expected = REFERENCE[kind]["norms"][name]
        assert norm([weight]) == pytest.approx(expected["model"], rel=1e-4), name
        assert norm([average[name]]) == pytest.approx(expected["ema"], rel=1e-4), name
    given = (g["test.x"], g["test.t"], g["test.y"].long())
    assert relative_error(network(*given), g[f"{kind}.model_out"]) < 1e-4
    network.load_state_dict(average)
    assert relative_error(network(*given), g[f"{kind}.ema_out"]) < 1e-4
