"""RAEv2 against the public implementation's numbers: the network with its base head, the flow, guidance, samplers."""

import json

import pytest
import torch
from safetensors.torch import load_file

import rae
from rae.__main__ import main
from rae.autoencoder.model import build_rae
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import Model
from rae.diffusion.flow import Flow, logit_normal
from rae.diffusion.generator import Generator
from rae.diffusion.in_context import InContextDiTDH
from rae.diffusion.published import load_published, settings_of
from rae.diffusion.samplers import Euler
from rae.exchange import diffusers_format
from tests.conftest import GOLDEN, relative_error
from tests.test_diffusion import STAGE2, numbers

TOLD = json.loads((STAGE2 / "raev2/samplers.json").read_text())
WEIGHTS = STAGE2 / "raev2/ditdh-ig-tiny/model.safetensors"
SHAPE = (32, 4, 4)


@pytest.fixture(scope="module")
def network():
    shape, rows, told = settings_of(load_file(WEIGHTS))
    assert (shape, rows) == (SHAPE, 11)
    assert told["ditdh_in_context"].pop("base_depth") == 3  # which no tensor tells: all of them
    network = InContextDiTDH(shape, rows - 1, base_depth=2, **told["ditdh_in_context"])
    load_published(network, load_file(WEIGHTS), "")
    return network.eval()


def flow(**options):
    return Flow(SHAPE, logit_normal(last=1.0), shift=TOLD["shift"], predicts="data", **options)


def guided(network, name: str):
    scale, interval = TOLD["ig"]["scale"], (TOLD["ig"]["t_min"], TOLD["ig"]["t_max"])
    cfg = {"scale": TOLD["cfg"]["scale"], "interval": (TOLD["cfg"]["t_min"], TOLD["cfg"]["t_max"])}
    both = {"cfg_scale": cfg["scale"], "cfg_interval": cfg["interval"]}
    entry = {
        "none": {"none": {}},
        "cfg": {"cfg": cfg},
        "ig": {"internal": {"scale": scale, "interval": interval}},
        "ig_cfg": {"internal": {"scale": scale, "interval": interval, **both}},
        "ig_cfg_uncond": {
            "internal": {"scale": scale, "interval": interval, **both, "null_scale": TOLD["unconditional_scale"]}
        },
    }[name]
    return build("guidance", entry, "", network=network)


@torch.no_grad()
def test_a_forward_pass(network):
    g, seen = numbers("raev2/ditdh_ig_forward"), {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out}))
        for i, block in enumerate(network.blocks)
    ]
    full, base = network(g["x"], g["t"], g["y"], with_base=True)
    assert relative_error(full, g["full"]) < 1e-5
    assert relative_error(base, g["base"]) < 1e-5
    assert torch.equal(network(g["x"], g["t"], g["y"]), full)
    assert len(seen) == 5
    for number, value in seen.items():
        assert relative_error(value, g[f"act.block.{number}"]) < 1e-5, number
    for rope in ("enc", "dec"):
        for part in ("cos", "sin"):
            table = getattr(getattr(network, f"{rope}_rope"), f"freqs_{part}")
            assert relative_error(table, g[f"table.{rope}_freqs_{part}"]) < 1e-5
    _ = [hook.remove() for hook in hooks]


@torch.no_grad()
@pytest.mark.parametrize("name", ["cfg", "ig", "ig_cfg", "ig_cfg_uncond"])
def test_guidance(network, name):
    g = numbers("raev2/ditdh_ig_forward")
    made = guided(network, name)(g["x"], g["guid.t"], g["guid.y"])
    assert relative_error(made, g[f"guid.{name}"]) < 1e-5


@torch.no_grad()
def test_no_forward_pass_is_thrown_away(network):
    sizes = []
    hook = network.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    x, label = torch.randn(2, *SHAPE), torch.tensor([1, 2])
    for name, t, expected in (
        ("ig", 0.5, [2]), ("ig", 0.05, [2]), ("ig_cfg", 0.5, [4]), ("ig_cfg", 0.95, [2]),
    ):  # fmt: skip
        sizes.clear()
        guided(network, name)(x, t, label)
        assert sizes == expected, (name, t)
    hook.remove()
    with pytest.raises(UserError, match="needs a network with a base head"):
        build("guidance", {"internal": {}}, "guidance", network=torch.nn.Identity())


@torch.no_grad()
def test_the_flow(network):
    g = numbers("raev2/transport")
    line = flow()
    assert relative_error(line.mix(g["x1"], g["noise"], g["t"]), g["xt"]) < 1e-5
    target = line.target(g["x1"], g["noise"], g["t"])
    assert relative_error(target, g["v_target"]) < 1e-5
    full, base = network(g["xt"], g["t"], g["y"], with_base=True)
    assert relative_error(full, g["x_pred"]) < 1e-5
    velocities = [line.velocity(each, g["xt"], g["t"]) for each in (full, base)]
    assert relative_error(velocities[0], g["v_from_x"]) < 1e-5
    assert relative_error(sum((each - target).square() for each in velocities), g["loss_map"]) < 1e-5
    losses = [line.loss(each, target).mean() for each in velocities]
    assert relative_error(losses[1], g["loss_base"][0]) < 1e-5
    assert relative_error(sum(losses), g["loss"][0]) < 1e-5
    uniform = torch.special.ndtr(g["draw.normal"].double())
    assert relative_error(line.shifted(line.times(uniform)), g["draw.t"].double()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["none", "cfg", "ig", "ig_cfg", "ig_cfg_uncond"])
def test_samplers(network, name):
    g, solver = numbers("raev2/samplers"), Euler(TOLD["num_steps"])
    grid = solver.grid(flow().shifted)
    assert relative_error(torch.tensor(grid), g["grid"]) < 1e-5
    assert grid[-1] == 0
    predict = guided(network, name)
    made = solver(lambda x, t: flow().velocity(predict(x, t, g["y"]), x, t), g["noise"], grid)
    assert relative_error(made, g[name]) < 1e-5


def test_the_published_size():
    with torch.device("meta"):
        network = InContextDiTDH((1024, 16, 16), 1000, size="XL")
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(875.2, abs=0.06)
    matrices = [p for p in network.parameters() if p.ndim == 2]
    assert len(matrices) == 222  # which Muon takes


def test_predicted_data_and_velocities_are_one_flow():
    """A perfect prediction of either gives the same velocity where the divisor is not held."""
    data, noise, t = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE), torch.tensor([0.06, 0.3, 0.7, 1.0])
    x = flow().mix(data, noise, t)
    assert relative_error(flow().velocity(data, x, t), noise - data) < 1e-5
    assert relative_error(flow().target(data, noise, t), noise - data) < 1e-6
    late = torch.full((4,), 0.01)
    held = flow().target(data, noise, late)
    assert relative_error(held, (noise - data) / 5) < 1e-6
    assert relative_error(flow().velocity(data, flow().mix(data, noise, late), late), held) < 1e-5


def test_a_generator_samples_predicted_data(network):
    class Decoder(torch.nn.Module):
        latent_shape = SHAPE

        def decode(self, latent):
            return latent[:, :3]

    generator = Generator(
        network, Decoder(), flow(), Euler(4), lambda each: build("guidance", {"none": {}}, "", network=each)
    )
    g = numbers("raev2/samplers")
    latent = generator.sample_latents(g["y"], seed=3)
    expected = []
    for number in range(4):
        alone = generator.sample_latents(g["y"][number : number + 1], seed=3, numbers=[number])
        expected.append(alone)
    assert relative_error(latent, torch.cat(expected)) < 1e-5
    assert float(latent.std()) > 0.1


def test_every_weight_learns_and_positions_do_not_turn_conditions():
    torch.manual_seed(0)
    network = InContextDiTDH(
        (4, 4, 4), 3, embed_dim=16, depth=3, num_heads=2, head_embed_dim=24, head_num_heads=2, base_depth=1
    )
    assert not network(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 3])).any()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(4):
        x, t = torch.randn(8, 4, 4, 4), torch.rand(8)
        both = network(x, t, torch.arange(8) % 4, with_base=True)
        loss = sum((each - x).square().mean() for each in both)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = {name for name, p in network.named_parameters() if torch.equal(p, before[name])}
    assert still == {"t_embedder.W"}
    with pytest.raises(ValueError, match="base_depth: 4 is not from 0"):
        InContextDiTDH((4, 4, 4), 3, embed_dim=16, depth=3, num_heads=2, base_depth=4)


IMAGES = numbers("raev2/encoder")
NAMES = json.loads((STAGE2 / "raev2/encoder.json").read_text())["layers"]


@pytest.mark.parametrize("run", NAMES)
@torch.no_grad()
def test_encoders_by_published_names(run):
    name = NAMES[run].split()[0]
    folder = GOLDEN / "encoders/siglip2-tiny" if run.startswith("siglip") else STAGE2 / "raev2/dinov3-tiny"
    encoder = build("encoder", {"raev2": {"name": name, "pretrained": str(folder), "input_size": 64}}, "model.encoder")
    latent = encoder(IMAGES["images"]).transpose(1, 2).unflatten(2, (4, 4))
    assert relative_error(latent, IMAGES[f"{run}.latent"]) < 1e-5


@torch.no_grad()
def test_latents_normalised_and_decoded_without_the_encoders_statistics(tmp_path):
    name = NAMES["k7_like"]
    encoder = {"raev2": {"name": name, "pretrained": str(STAGE2 / "raev2/dinov3-tiny"), "input_size": 64}}
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96}
    sizes = {**sizes, "weights": str(GOLDEN / "decoder-tiny/model.pt")}
    settings = {"encoder": encoder, "decoder": sizes, "latent_stats": str(GOLDEN / "stat.pt"), "output": "image"}
    model = build_rae(Model.model_validate(settings), 64).eval()
    latent = model.encode(IMAGES["images"])
    assert relative_error(latent, IMAGES["k7_like.latent_stats"]) < 1e-5
    assert relative_error(model.decode(latent), IMAGES["k7_like.recon"]) < 1e-5
    big = model.encode(IMAGES["images_big"].clamp(0, 1))
    assert relative_error(big, IMAGES["k7_like.latent_big_stats"]) < 1e-5
    with pytest.raises(UserError, match="diffusers"):
        diffusers_format.write(model, tmp_path)


def test_a_published_decoder_is_imported_as_one_that_makes_the_image(tmp_path, capsys):
    encoder = {"raev2": {"name": NAMES["k7_like"], "pretrained": str(STAGE2 / "raev2/dinov3-tiny"), "input_size": 64}}
    words = ["import", str(GOLDEN / "decoder-tiny/model.pt"), str(tmp_path / "out"), "--encoder", json.dumps(encoder)]
    words += ["--decoder-config", str(GOLDEN / "decoder-tiny/config.json"), "--stats", str(GOLDEN / "stat.pt")]
    main([*words, "--with-encoder"])
    model = rae.load(str(tmp_path / "out"))
    with torch.no_grad():
        assert relative_error(model(IMAGES["images"]), IMAGES["k7_like.recon"]) < 1e-5
    # A generator of its latents: the published layout of stage 2, and its way of sampling.
    torch.save({"ema": load_file(WEIGHTS)}, tmp_path / "stage2.pt")
    main(["import", str(tmp_path / "stage2.pt"), str(tmp_path / "generator"), "--autoencoder", str(tmp_path / "out")])
    generator = rae.load(str(tmp_path / "generator"))
    assert (generator.flow.predicts, generator.sampler.steps) == ("data", 100)
    assert generator.sample([1, 2], sampler=Euler(2)).shape == (2, 3, 64, 64)
    main(["inspect", str(tmp_path / "generator")])
    assert "internal" in capsys.readouterr().out
