"""Stage 2's mathematics: networks, flow, samplers and guidance against the public implementation's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rae.config.arguments import build
from rae.config.errors import UserError
from rae.diffusion.flow import Flow, logit_normal, uniform
from rae.diffusion.guidance import AutoGuidance, ClassifierFree, none
from rae.diffusion.layers import RotaryPositions
from rae.diffusion.networks import DiTDH, LightningDiT
from rae.diffusion.published import load_published, settings_of, weights_in
from rae.diffusion.samplers import Euler, Heun
from tests.conftest import GOLDEN, relative_error

STAGE2 = GOLDEN / "stage2"
CASES = json.loads((STAGE2 / "ditdh_forward.json").read_text())
SAMPLERS = json.loads((STAGE2 / "samplers.json").read_text())
SHIFTS = json.loads((STAGE2 / "time_shift.json").read_text())


def numbers(name: str) -> dict[str, torch.Tensor]:
    return load_file(STAGE2 / f"{name}.safetensors")


def published(name: str, **options) -> DiTDH:
    """A network of the golden set, by the constructor's arguments that the public code names."""
    told = json.loads((STAGE2 / name / "config.json").read_text())
    (dim, head_dim), (depth, head_depth), (heads, head_heads) = told["hidden_size"], told["depth"], told["num_heads"]
    network = DiTDH(
        latent_shape=(told["in_channels"], told["input_size"], told["input_size"]),
        num_classes=told["num_classes"],
        null_label=told["class_dropout_prob"] > 0,
        embed_dim=dim, depth=depth, num_heads=heads,
        head_embed_dim=head_dim, head_depth=head_depth, head_num_heads=head_heads,
        qk_norm=told.get("use_qknorm", False),
        swiglu=told.get("use_swiglu", True),
        rms_norm=told.get("use_rmsnorm", True),
        absolute_positions=told.get("use_pos_embed", True),
        **options,
    )  # fmt: skip
    load_published(network, load_file(STAGE2 / name / "model.safetensors"), name)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return published("ditdh-tiny")


@torch.no_grad()
def test_a_forward_pass(network):
    g, seen = numbers("ditdh_forward"), {}
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"block.{i}": out}))
    network.s_projector.register_forward_hook(lambda _, __, out: seen.update(s_projected=out))
    network.t_embedder.register_forward_hook(lambda _, __, out: seen.update(t_embed=out))
    network.y_embedder.register_forward_hook(lambda _, __, out: seen.update(y_embed=out))
    assert relative_error(network(g["x"], g["t"], g["y"]), g["out"]) < 1e-5
    for name, value in seen.items():
        assert relative_error(value, g[f"act.{name}"]) < 1e-5, name
    assert len(seen) == 8
    dropped = torch.where(g["drop.mask"].bool(), network.null_label, g["drop.y"])
    assert relative_error(network(g["x"], g["t"], dropped), g["drop.out"]) < 1e-5
    assert relative_error(published("ditdh-guide-tiny")(g["x"], g["t"], g["y"]), g["guide.out"]) < 1e-5


def test_tables():
    g, fresh = numbers("ditdh_forward"), DiTDH((32, 4, 4), 10, embed_dim=48, depth=1, num_heads=4)
    assert relative_error(fresh.pos_embed.detach(), g["table.pos_embed"]) < 1e-5
    for part, width in (("enc", 12), ("dec", 16)):
        tables = RotaryPositions(width, 4)
        for name in ("freqs_cos", "freqs_sin"):
            assert relative_error(getattr(tables, name), g[f"table.{part}_{name}"]) < 1e-5


@pytest.mark.parametrize("variant", ["qknorm", "layernorm_gelu", "equal_width_no_pos_no_null"])
@torch.no_grad()
def test_variants(variant):
    g = numbers("ditdh_variants")
    x, t, y, out = (g[f"{variant}.{key}"] for key in ("x", "t", "y", "out"))
    assert relative_error(published(f"ditdh-variants/{variant}")(x, t, y), out) < 1e-5


@pytest.mark.parametrize("width", ["full", "interval"])
@torch.no_grad()
def test_guidance(network, width):
    g, guide = numbers("ditdh_forward"), published("ditdh-guide-tiny")
    interval = CASES["cfg"]["interval"] if width == "interval" else (0, 1)
    cfg = ClassifierFree(network, CASES["cfg"]["scale"], interval)
    assert relative_error(cfg(g["x"], g["cfg.t"], g["cfg.y"]), g[f"cfg.{width}"]) < 1e-5
    auto = AutoGuidance(network, guide, CASES["ag"]["scale"], interval)
    assert relative_error(auto(g["x"], g["ag.t"], g["ag.y"]), g[f"ag.{width}"]) < 1e-5


@torch.no_grad()
def test_transport(network):
    g, told = numbers("transport"), json.loads((STAGE2 / "transport.json").read_text())
    flow = Flow((32, 4, 4), logit_normal(), shift=told["shift"])
    assert relative_error(flow.mix(g["x1"], g["noise"], g["t"]), g["xt"]) < 1e-5
    target = flow.target(g["x1"], g["noise"], g["t"])
    assert relative_error(target, g["target"]) < 1e-5
    predicted = network(g["xt"], g["t"], g["y"])
    assert relative_error(predicted, g["pred"]) < 1e-5
    assert relative_error(flow.loss(predicted, target), g["loss_per_sample"]) < 1e-5
    assert relative_error(flow.loss(predicted, target).mean(), g["loss"][0]) < 1e-5
    for draw, name in told["draws"].items():
        times = uniform() if name == "uniform" else logit_normal(*map(float, name.split("_")[1:]))
        assert relative_error(times(g[f"{draw}.u"]), g[f"{draw}.t_raw"]) < 1e-5, name
        flow = Flow((32, 4, 4), times, shift=told["shift"])
        assert relative_error(flow.draw(g[f"{draw}.u"]), g[f"{draw}.t"]) < 1e-5, name


def test_the_shift_is_of_the_latents_size():
    for name, told in SHIFTS["latents"].items():
        shape, base = name.split("/")
        if base != "4096":
            continue
        flow = Flow(tuple(map(int, shape.split("x"))), uniform())
        assert flow.shift == pytest.approx(told["shift"], rel=1e-12)
        shifted = [flow.shifted(t) for t in SHIFTS["formula_inputs"]["t"]]
        assert shifted == pytest.approx(told["t_shifted"], rel=1e-5)
    assert Flow((4, 8, 8), uniform()).shift == 1


def velocity_of(guided, label):
    return lambda x, t: guided(x, t, label)


@pytest.mark.parametrize("name", [name for name in SAMPLERS["runs"] if name != "ode_converged"])
@torch.no_grad()
def test_samplers(network, name):
    told, g = SAMPLERS["runs"][name], numbers("samplers")
    flow = Flow((32, 4, 4), uniform(), shift=SAMPLERS["shift"])
    sampler = {"euler": Euler, "heun2": Heun}[told["method"]](told["num_steps"] - 1, end=0.001)
    grid = sampler.grid(flow.shifted)
    assert relative_error(grid, g[f"grid_{told['num_steps']}"]) < 1e-5
    guided = {
        None: lambda: none(network),
        "cfg": lambda: ClassifierFree(network, told["scale"], told["interval"]),
        "autoguidance": lambda: AutoGuidance(network, published("ditdh-guide-tiny"), told["scale"], told["interval"]),
    }[told["guidance"]]()
    states = list(sampler.states(velocity_of(guided, g["y"]), g["noise"], grid))
    if told["stored"].startswith("all"):
        assert relative_error(torch.stack([g["noise"], *states]), g[name]) < 1e-5
    else:
        assert relative_error(states[-1], g[name]) < 1e-5


@torch.no_grad()
def test_heun_approaches_the_solution(network):
    g, flow = numbers("samplers"), Flow((32, 4, 4), uniform(), shift=SAMPLERS["shift"])
    velocity = velocity_of(none(network), g["y"])
    errors = []
    for steps in (50, 100):
        sampler = Heun(steps, end=0.001)
        errors.append(relative_error(sampler(velocity, g["noise"], sampler.grid(flow.shifted)), g["ode_converged"]))
    assert errors[1] < 2e-4
    assert 3 < errors[0] / errors[1] < 5  # second order
    finest = Heun(400, end=0.001)
    assert relative_error(finest(velocity, g["noise"], finest.grid(flow.shifted)), g["ode_converged"]) < 2e-5


def test_the_grid_goes_all_the_way_by_default():
    flow = Flow((768, 16, 16), uniform())
    assert (Euler().grid(flow.shifted)[0], Euler().grid(flow.shifted)[-1]) == (1, 0)
    assert len(Euler().grid(flow.shifted)) == 51
    assert Euler(49, end=0.001).grid(flow.shifted)[-1] == pytest.approx(0.00689, abs=1e-5)


@torch.no_grad()
def test_no_forward_pass_is_thrown_away(network):
    flow, y = Flow((32, 4, 4), uniform(), shift=2.8), torch.tensor([1, 2])
    counted = {"network": 0, "guide": 0}

    def counting(name):
        def predict(x, t, label):
            counted[name] += len(x)
            return x

        predict.null_label, predict.num_classes = 10, 10
        return predict

    sampler, x = Euler(20), torch.randn(2, 32, 4, 4)
    grid = sampler.grid(flow.shifted)
    inside = sum(0.3 <= t <= 0.9 for t in grid[:-1])
    assert 0 < inside < 20
    sampler(velocity_of(ClassifierFree(counting("network"), 1.5, (0.3, 0.9)), y), x, grid)
    assert counted == {"network": 2 * (20 + inside), "guide": 0}
    counted["network"] = 0
    sampler(velocity_of(AutoGuidance(counting("network"), counting("guide"), 1.5, (0.3, 0.9)), y), x, grid)
    assert counted == {"network": 2 * 20, "guide": 2 * inside}


@pytest.mark.parametrize(
    ("size", "millions", "plain"),
    [("S", 196.46, 33.6), ("B", 294.30, 131.9), ("L", 621.74, 459.9), ("XL", 838.68, 677.2)],
)
def test_sizes(size, millions, plain):
    with torch.device("meta"):
        network = DiTDH((768, 16, 16), 1000, size=size)
        light = LightningDiT((768, 16, 16), 1000, size=size)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert sum(p.numel() for p in light.parameters()) / 1e6 == pytest.approx(plain, abs=0.06)


def test_published_names_go_round():
    state = load_file(STAGE2 / "ditdh-tiny/model.safetensors")
    for content in (
        state,
        {"ema": state, "model": {}, "step": 3},
        {"model": {f"module.{k}": v for k, v in state.items()}},
    ):
        found = weights_in(content, "file")
        shape, rows, told = settings_of(found)
        network = DiTDH(shape, rows - 1, **told["ditdh"])
        load_published(network, found, "file")
        saved = network.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
        assert not network.pos_embed.requires_grad  # kept as it drifted, and fixed
    del state["blocks.1.norm1.weight"]
    with pytest.raises(UserError, match=r"file: .*blocks.1.norm1.weight"):
        load_published(network, state, "file")
    with pytest.raises(UserError, match="holds no DiT-DH"):
        weights_in({"a": 1}, "file")


def test_a_fresh_network_predicts_nothing_and_every_weight_learns():
    torch.manual_seed(0)
    for made in (
        DiTDH((4, 4, 4), 3, embed_dim=16, depth=2, num_heads=2, head_embed_dim=24, head_num_heads=2),
        LightningDiT((4, 4, 4), 3, embed_dim=16, depth=2, num_heads=2),
    ):
        x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 3])
        assert not made(x, t, y).any()
        for p in made.parameters():
            torch.nn.init.normal_(p, std=0.3)
        made(x, t, y).square().sum().backward()
        still = [name for name, p in made.named_parameters() if p.requires_grad and not p.grad.any()]
        assert still == []


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"give a size \(S, B, L, XL\), or depth, num_heads"):
        DiTDH((4, 4, 4), 3, embed_dim=16)
    with pytest.raises(ValueError, match="a width of 18 does not make 2 heads"):
        DiTDH((4, 4, 4), 3, embed_dim=18, depth=1, num_heads=2)
    for interval in ([0.5, 0.2], [-0.1, 1]):
        with pytest.raises(UserError, match=r"guidance.cfg.interval: must be two times in \[0, 1\]"):
            build("guidance", {"cfg": {"scale": 2.0, "interval": interval}}, "guidance", network=None)


def test_figures_of_sets():
    from rae.evaluation.frechet import frechet_distance
    from rae.evaluation.generation import inception_score, precision_recall

    g, told = numbers("metrics"), json.loads((STAGE2 / "metrics.json").read_text())

    def gaussian(name):
        features = g[f"{name}.features"].double()
        assert relative_error(features.mean(0), g[f"{name}.mu"]) < 1e-5
        assert relative_error(features.T.cov(), g[f"{name}.sigma"]) < 1e-5
        return g[f"{name}.mu"], g[f"{name}.sigma"]

    for name, one, other in (
        ("sample_vs_ref", "sample", "ref"),
        ("ref_vs_sample", "ref", "sample"),
        ("few_vs_ref (rank deficient)", "few", "ref"),
    ):
        assert float(frechet_distance(*gaussian(one), *gaussian(other))) == pytest.approx(told["fid"][name], rel=1e-5)
    assert abs(float(frechet_distance(*gaussian("ref"), *gaussian("ref")))) < 1e-5
    probabilities = g["logits"].double().softmax(1)
    assert relative_error(probabilities, g["probs"]) < 1e-5
    assert inception_score(probabilities, 20) == pytest.approx(told["inception_score"]["split_size=20"], rel=1e-5)
    assert inception_score(probabilities) == pytest.approx(
        told["inception_score"]["split_size=5000 (one split here)"], rel=1e-5
    )
    expected = told["precision_recall_k3"]
    assert precision_recall(g["sample.features"], g["ref.features"]) == pytest.approx(
        (expected["precision"], expected["recall"]), rel=1e-5
    )
