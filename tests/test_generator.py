"""Stage 2 from end to end: a generator is trained, drawn, goes on, is exported and sampled."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rae
from rae.__main__ import main
from rae.config.errors import UserError
from rae.diffusion.flow import Flow, logit_normal
from rae.evaluation.frechet import frechet_distance
from rae.evaluation.generation import Against, measure
from rae.evaluation.metrics import build_metrics
from rae.evaluation.sampling import balanced_labels, to_uint8
from tests.conftest import (
    AUTOENCODER,
    GOLDEN,
    LITE0,
    ROOT,
    assert_same_state,
    figures,
    generator_settings,
    load_newest,
    made_once,
    run,
    tiny_settings,
    train_here,
    train_ranks,
)
from tests.test_diffusion import numbers, published
from tests.test_docs import write_examples


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    return (
        made_once(tmp_path_factory, "generator", lambda root: train_here(generator_settings(shards, root / "run")))
        / "run"
    )


def test_it_trains_logs_and_is_drawn(trained):
    steps = [r for r in figures(trained) if "loss/train/total" in r]
    assert [r["batch"] for r in steps] == list(range(1, 11))
    assert steps[-1]["loss/train/flow"] < steps[0]["loss/train/flow"]
    assert {"lr/network", "gradient/network"} <= steps[-1].keys()
    assert {"frechet"} == json.loads((trained / "metrics.json").read_text())["eval"].keys()
    pictures = sorted(path.name for path in (trained / "pictures").iterdir())
    assert pictures == ["ba0000004.png", "ba0000008.png", "ba0000010.png"]
    assert Image.open(trained / "pictures/ba0000010.png").size == (76 + 6 * 66 + 2, 2 * 66 + 2)


def test_a_checkpoint_holds_what_is_trained_alone(trained):
    state = load_newest(trained / "checkpoints")
    assert all(name.startswith("generator.network.") for name in state["model"])
    average = dict(state["algorithms"])["EMA"]["average"]
    fixed = {"pos_embed", "t_embedder.W"} | {
        f"{part}_feat_rope.freqs_{f}" for part in ("enc", "dec") for f in ("cos", "sin")
    }
    assert {name.removeprefix("generator.network.") for name in state["model"].keys() - average.keys()} == fixed


def test_it_goes_on_exactly_from_the_middle_of_an_epoch(shards, trained, tmp_path):
    stopped = generator_settings(shards, tmp_path / "run")
    stopped["trainer"]["max_duration"] = "3ba"
    train_here(stopped)
    train_here(generator_settings(shards, tmp_path / "run"))
    assert_same_state(trained / "checkpoints", tmp_path / "run/checkpoints", tensors=60)
    assert figures(tmp_path / "run")[-2:] == figures(trained)[-2:]


def test_several_averages_at_once(shards, trained, tmp_path, capsys):
    settings = generator_settings(shards, tmp_path / "run")
    settings["trainer"]["max_duration"] = "4ba"
    train_here(settings)
    settings["trainer"]["max_duration"] = "10ba"
    settings["algorithms"]["ema"]["also"] = [0.5, 0.0]
    train_here(settings)
    held = dict(load_newest(tmp_path / "run/checkpoints")["algorithms"])["EMA"]
    alone = dict(load_newest(trained / "checkpoints")["algorithms"])["EMA"]
    assert held["averages"].keys() == {"0.5", "0"}
    assert all(torch.equal(held["average"][name], tensor) for name, tensor in alone["average"].items())
    live = load_newest(trained / "checkpoints")["model"]
    assert all(torch.allclose(tensor, live[name]) for name, tensor in held["averages"]["0"].items())
    main(["sample", str(tmp_path / "run"), str(tmp_path / "a"), "--num", "2", "--weights", "ema:0.5"])
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "run"), str(tmp_path / "b"), "--num", "2", "--weights", "ema:0.7"])
    assert "there is no such average; there are ema, ema:0.5, ema:0, live" in capsys.readouterr().err
    height = Image.open(tmp_path / "run/pictures/ba0000010.png").height
    assert height == 4 * 66 + 2  # live, and three averages


def test_watching_changes_nothing(shards, trained, tmp_path):
    settings = generator_settings(shards, tmp_path / "run")
    settings |= {"callbacks": {}, "metrics": {}}
    del settings["data"]["eval"]
    train_here(settings)
    assert_same_state(trained / "checkpoints", tmp_path / "run/checkpoints", tensors=60)


def test_two_ranks_draw_what_one_draws(shards, trained, tmp_path):
    settings = generator_settings(shards, tmp_path / "run")
    settings["trainer"]["device_train_microbatch_size"] = 2
    train_ranks(settings, tmp_path)
    for ours, theirs in zip(figures(tmp_path / "run"), figures(trained), strict=True):
        for name in theirs.keys() & {"loss/train/flow", "gradient/network", "lr/network"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, theirs["batch"])


def test_its_export_samples(trained, tmp_path):
    main(["export", str(trained), str(tmp_path / "export")])
    generator = rae.load(str(tmp_path / "export"))
    images = generator.sample([0, 2, 1], seed=3)
    assert images.shape == (3, 3, 64, 64)
    assert torch.equal(images[1:2], generator.sample([2], seed=3, numbers=[1]))
    assert torch.equal(images, rae.load(str(trained)).sample([0, 2, 1], seed=3))
    with pytest.raises(ValueError, match="labels are from 0 to 2, or −1 for no class; there are 0 to 3"):
        generator.sample([0, 3])


def test_metrics_of_reconstructions_are_refused(shards, tmp_path):
    settings = generator_settings(shards, tmp_path / "run")
    settings["metrics"] = {"psnr": {}}
    with pytest.raises(UserError, match=r"metrics.psnr: it compares images with reconstructions"):
        train_here(settings)


def test_labels_are_the_public_samplers():
    for told in json.loads((GOLDEN / "stage2/labels.json").read_text()):
        given = [label for of_rank in told["labels_by_rank_and_batch"] for batch in of_rank for label in batch]
        labels = balanced_labels(told["num_fid"], told["num_classes"], told["seed"])
        assert labels.tolist() == given[: told["num_fid"]]
    assert balanced_labels(7, 3).bincount().tolist() == [3, 2, 2]


def test_uint8_is_rounded_or_truncated_as_the_public_sampler_does():
    g = numbers("samplers")
    public = to_uint8(g["decoded.image"], truncate=True).permute(0, 2, 3, 1)
    assert torch.equal(public, g["decoded.uint8_public"])
    assert to_uint8(torch.tensor([0.999, 0.4981, -1.0, 2.0])).tolist() == [255, 127, 0, 255]


def samples(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_command_samples(trained, tmp_path, capsys):
    words = ["sample", str(trained), str(tmp_path / "a"), "--num", "11", "--batch-size", "4", "--npz", "--latents"]
    guided = ["--steps", "2", "--guidance", "{cfg: {scale: 1.4, interval: [0.1, 1]}}"]
    main(words + guided)
    whole = samples(tmp_path / "a")
    assert len([name for name in whole if name.endswith(".png")]) == 11 + 1
    assert Image.open(tmp_path / "a/grid.png").width > 64
    with np.load(tmp_path / "a/samples.npz") as array:
        assert array["arr_0"].shape == (11, 64, 64, 3)
        assert np.array_equal(array["arr_0"][7], np.asarray(Image.open(tmp_path / "a/samples/000007.png")))
        assert np.bincount(array["arr_1"]).tolist() == [4, 4, 3]
    # Interrupted: part of a batch is there, and its latents are not.
    for name in ("samples/000005.png", "latents/000004.safetensors", "samples/000010.png", "index.html"):
        (tmp_path / "a" / name).unlink()
    main(words + guided)
    assert samples(tmp_path / "a") == whole
    # On two ranks.
    two = ["composer", "-n", "2", "-m", "rae", *words[:2], str(tmp_path / "b"), *words[3:], *guided]
    run(*two)
    assert samples(tmp_path / "b") == whole
    # The latents are what the encoder would give.
    held = load_file(tmp_path / "a/latents/000008.safetensors")
    generator = rae.load(str(trained))
    autoencoder = generator.autoencoder.network
    decoded = autoencoder.decode((held["latent"] - autoencoder.latent_mean) / (autoencoder.latent_var + 1e-5).sqrt())
    assert torch.equal(
        to_uint8(decoded[0]).permute(1, 2, 0), torch.from_numpy(np.array(Image.open(tmp_path / "a/samples/000008.png")))
    )
    capsys.readouterr()
    for more, told in (
        (["--seed", "1"], "holds images of other labels_hash, seed; give another folder, or --overwrite"),
        (["--classes", "cat"], "--classes: there is no class 'cat'; write equal, random, none, 0 to 2"),
        (["--guidance", "{cfg: {scale: 2, interval: [1, 0]}}"], "--guidance.cfg.interval: must be two times in [0, 1]"),
        (["--guidance", "cgf"], "--guidance: unknown guidance 'cgf' (did you mean 'cfg'?)"),
        (["--num", "0"], "--num must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(words + guided + more)
        assert told in capsys.readouterr().err


def test_classes_are_called_what_the_data_call_them(trained, tmp_path, capsys):
    assert rae.load(str(trained)).classes == ["a", "b"]
    main(["export", str(trained), str(tmp_path / "export")])
    main(["sample", str(tmp_path / "export"), str(tmp_path / "out"), "--num", "3", "--classes", "b"])
    rows = (tmp_path / "out/labels.csv").read_text().split()
    assert rows == ["file,label,class", *(f"samples/00000{number}.png,1,b" for number in range(3))]
    with pytest.raises(SystemExit):
        main(["sample", str(trained), str(tmp_path / "other"), "--classes", "c"])
    assert "there is no class 'c'; write equal, random, none, 0 to 2, a, b" in capsys.readouterr().err


def test_a_generator_goes_on_as_itself(shards, trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "run/checkpoints")
    for change, line in (
        ({"network": {"lightningdit": {"embed_dim": 48, "depth": 2, "num_heads": 4}}}, "of network DiTDH, not Lightn"),
        ({"num_classes": 5}, "model.diffusion: .* is of classes 3, not 5; give another run_name"),
        ({"label_dropout": 0.0}, "is of a label for no class True, not False"),
    ):
        settings = generator_settings(shards, tmp_path / "run")
        settings["trainer"]["max_duration"] = "3ep"
        settings["model"]["diffusion"] |= change
        with pytest.raises(UserError, match=line):
            train_here(settings)


def test_a_guide_of_another_run(trained, tmp_path):
    auto = f"{{autoguidance: {{guide: {trained}, scale: 2.0}}}}"
    main(["sample", str(trained), str(tmp_path / "a"), "--num", "2", "--guidance", auto])
    main(["sample", str(trained), str(tmp_path / "b"), "--num", "2"])
    for name in ("000000.png", "000001.png"):  # guided by itself, a network is itself
        assert (tmp_path / "a/samples" / name).read_bytes() == (tmp_path / "b/samples" / name).read_bytes()


def figures_in(path) -> dict:
    return json.loads(path.read_text())


def test_the_command_measures(shards, trained, tmp_path, capsys):
    out, reference = str(tmp_path / "figures.json"), str(shards / "eval")
    words = ["evaluate", str(trained), "--num", "12", "--batch-size", "8", "--reference", reference, "--json", out]
    main([*words, "--metrics", "frechet", "--keep", str(tmp_path / "kept")])
    found = figures_in(tmp_path / "figures.json")["sources"][0]
    # During training the evaluation's own labels and images were used, of which there are as many.
    assert found["noise_tau"]["0"].keys() == {"frechet"}
    assert found["images"] == 12
    told = capsys.readouterr()
    assert f"against{reference}" in "".join(told.out.split())
    assert "as far from real ones as decoded noise" in told.err  # ten steps are not enough
    assert "a Fréchet distance of 12 images against 12 is higher than one of 50,000" in told.err
    main(["evaluate", str(tmp_path / "kept"), *words[2:], "--metrics", f"frechet: {json.dumps(LITE0)}"])
    again = figures_in(tmp_path / "figures.json")["sources"][0]
    assert again["noise_tau"]["0"]["frechet"] == pytest.approx(found["noise_tau"]["0"]["frechet"], rel=1e-9)
    precision = f"precision: {json.dumps(LITE0)}"
    run("composer", "-n", "2", "-m", "rae", *words, "--metrics", "frechet", precision)
    on_two = figures_in(tmp_path / "figures.json")["sources"][0]["noise_tau"]["0"]
    assert on_two["frechet"] == pytest.approx(found["noise_tau"]["0"]["frechet"], rel=1e-6)
    assert 0 <= on_two["precision"] <= 1
    capsys.readouterr()
    for more, line in (
        (["--metrics", "psnr"], "psnr compares an image with its reconstruction; a generator makes none"),
        (["--metrics", "frechet", "--reference", str(tmp_path / "kept/samples")], "these images are generated"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert line in capsys.readouterr().err


def test_decoders_are_judged_by_generated_latents(shards, trained, tmp_path):
    main(["sample", str(trained), str(tmp_path / "made"), "--num", "8", "--latents"])
    (tmp_path / "auto.yaml").write_text(
        json.dumps({**tiny_settings(shards, tmp_path / "none"), "model": AUTOENCODER, "algorithms": {}})
    )
    out, data = tmp_path / "figures.json", str(shards / "eval")
    words = ["--latents", str(tmp_path / "made/latents"), "--data", data, "--metrics", "psnr", "--json", str(out)]
    main(["evaluate", str(tmp_path / "auto.yaml"), *words])
    found = figures_in(out)["sources"][0]["noise_tau"]["0"]
    assert {"psnr", "generated/frechet", "generated/precision", "generated/recall"} == found.keys()


def test_references_in_adms_layout(tmp_path):
    torch.manual_seed(0)
    metric = build_metrics({"frechet": LITE0}, 64)["frechet"]
    features = torch.rand(50, metric.num_features, dtype=torch.float64)
    pooled = {"mu": torch.zeros(7), "sigma": torch.eye(7)}
    np.savez(tmp_path / "adm.npz", mu_s=features.mean(0), sigma_s=features.T.cov(), **pooled)
    against = Against(str(tmp_path / "adm.npz"), 64)
    against.prepare({"frechet": metric}, "cpu", {})
    fake = torch.rand(20, 3, 64, 64).mul(255).to(torch.uint8)
    found = measure([fake], against, {"frechet": metric}, torch.device("cpu"), {})
    seen = metric.inception(fake / 255).double()
    expected = frechet_distance(seen.mean(0), seen.T.cov(), features.mean(0), features.T.cov())
    assert found["frechet"] == pytest.approx(float(expected), rel=1e-6)
    np.savez(tmp_path / "adm.npz", **pooled)
    against = Against(str(tmp_path / "adm.npz"), 64)
    with pytest.raises(UserError, match=r"frechet: .*adm.npz has moments of 7 features, not of its"):
        against.prepare({"frechet": metric}, "cpu", {})
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="its images have 32 pixels a side, the generated 64"):
        Against(str(tmp_path / "small.npz"), 64)
    Image.new("RGB", (40, 60)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="its first image has 40 pixels a side, the generated have 64"):
        Against(str(tmp_path / "small.png"), 64)


def test_an_export_with_everything_stands_alone(trained, tmp_path, capsys):
    out = tmp_path / "export"
    main(["export", str(trained), str(out), "--with-encoder"])
    alone = shutil.move(out, tmp_path / "elsewhere")
    told = json.loads((alone / "config.json").read_text())["model"]["diffusion"]
    assert told["autoencoder"] == "autoencoder"
    assert (alone / "autoencoder/encoder").is_dir()
    assert torch.equal(rae.load(str(alone)).sample([1, 2]), rae.load(str(trained)).sample([1, 2]))
    assert "diffusion transformer trained by flow matching" in (alone / "README.md").read_text()
    main(["export", str(alone), str(tmp_path / "again")])
    assert torch.equal(rae.load(str(tmp_path / "again")).sample([1]), rae.load(str(trained)).sample([1]))
    capsys.readouterr()
    for source in (alone, trained):
        main(["inspect", str(source)])
        assert "ditdh" in capsys.readouterr().out


def test_a_published_generator_is_imported(trained, tmp_path, capsys):
    main(["export", str(trained), str(tmp_path / "whole"), "--with-encoder"])
    autoencoder = str(tmp_path / "whole/autoencoder")
    state = load_file(GOLDEN / "stage2/ditdh-tiny/model.safetensors")
    torch.save({"ema": state, "model": {}, "step": 5}, tmp_path / "stage2_model.pt")
    main(["import", str(tmp_path / "stage2_model.pt"), str(tmp_path / "out"), "--autoencoder", autoencoder])
    generator = rae.load(str(tmp_path / "out"))
    assert generator.num_classes == 10
    assert all(torch.equal(tensor, state[name]) for name, tensor in generator.network.state_dict().items())
    main(["inspect", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main(["import", str(GOLDEN / "decoder-tiny/model.pt"), str(tmp_path / "no"), "--autoencoder", autoencoder])
    assert "it holds no DiT-DH" in capsys.readouterr().err


def test_what_does_not_fit_is_told_before_anything_is_spent(shards, tmp_path):
    settings = generator_settings(shards, tmp_path / "run")
    settings["model"]["diffusion"]["checked"] = True
    with pytest.raises(UserError, match=r"model.diffusion.autoencoder: its decodes are not the images: PSNR 11"):
        train_here(settings)
    statistics = torch.load(GOLDEN / "stat.pt", weights_only=True)
    torch.save({"mean": statistics["mean"] + 3, "var": statistics["var"]}, tmp_path / "other.pt")
    settings["model"]["diffusion"]["autoencoder"] = {**AUTOENCODER, "latent_stats": str(tmp_path / "other.pt")}
    with pytest.raises(UserError, match=r"latents of 40 images have mean .* its statistics are of another encoder"):
        train_here(settings)
    settings["model"]["diffusion"]["autoencoder"] = "nowhere"
    with pytest.raises(UserError, match=r"model.diffusion.autoencoder: there is no folder 'nowhere'"):
        train_here(settings)


def test_latents_are_enough(shards, trained, tmp_path):
    """Precomputed ones, in fp32, of the same crops: the same steps as with the encoder."""
    settings = generator_settings(shards, tmp_path / "run")
    settings["data"]["train"] = {"path": str(shards / "train"), "crop": "center", "shuffle": False}
    train_here({**settings, "run_dir": str(tmp_path / "images")})
    (tmp_path / "auto.yaml").write_text(
        json.dumps({**settings, "model": AUTOENCODER, "algorithms": {}, "callbacks": {}, "metrics": {}})
    )
    words = ["convert/latents_to_mds.py", str(tmp_path / "auto.yaml"), str(tmp_path / "latents"), "--dtype", "fp32"]
    run(sys.executable, *words)
    settings["data"]["train"] = {"path": str(tmp_path / "latents"), "shuffle": False}
    train_here({**settings, "run_dir": str(tmp_path / "latents-run")})
    for ours, theirs in zip(figures(tmp_path / "latents-run"), figures(tmp_path / "images"), strict=True):
        if "loss/train/flow" in theirs:
            assert ours["loss/train/flow"] == pytest.approx(theirs["loss/train/flow"], rel=1e-5)
    stored = json.loads((tmp_path / "latents/dataset.json").read_text())
    assert (stored["options"]["dtype"], stored["options"]["error"]) == ("fp32", 0.0)
    run(sys.executable, *words[:2], str(tmp_path / "flipped"), "--dtype", "bf16", "--flips")
    flipped = json.loads((tmp_path / "flipped/dataset.json").read_text())
    assert flipped["images"] == 2 * stored["images"] == 80
    assert 1e-4 < flipped["options"]["error"] < 4e-3


def test_the_guides_own_parts(shards, tmp_path):
    """Network, times and guidance of docs/plugins.md train, and sample."""
    settings = generator_settings(shards, tmp_path / "run")
    write_examples(ROOT / "docs/plugins.md", tmp_path)
    settings["imports"] = [str(tmp_path / "my_generator.py")]
    settings["model"]["diffusion"] |= {
        "network": {"convolutions": {"width": 8}},
        "times": {"late": {"power": 0.7}},
        "guidance": {"fading": {"scale": 2.0}},
    }
    settings["trainer"]["max_duration"] = "2ba"
    train_here(settings)
    assert rae.load(str(tmp_path / "run")).sample([0, 1]).shape == (2, 3, 64, 64)


def test_labels_are_a_setting(shards, tmp_path):
    settings = generator_settings(shards, tmp_path / "run")
    settings["model"]["diffusion"] |= {"num_classes": 0}
    settings["trainer"]["max_duration"] = "2ba"
    train_here(settings)
    generator = rae.load(str(tmp_path / "run"))
    assert torch.equal(generator.sample([0, 1]), generator.sample([-1, 5]))
    main(["sample", str(tmp_path / "run"), str(tmp_path / "out"), "--num", "3"])


def test_bf16_follows_fp32():
    """Fifty steps of a network whose streams, modulation and loss stay in float32."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = published("ditdh-tiny").train()
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
        flow, losses[dtype] = Flow((32, 4, 4), logit_normal()), []
        data = torch.randn(16, 32, 4, 4)
        for _ in range(50):
            t, noise = flow.draw(torch.rand(16)), torch.randn_like(data)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                predicted = network(flow.mix(data, noise, t), t, torch.arange(16) % 10)
            assert predicted.dtype == torch.float32
            loss = flow.loss(predicted, flow.target(data, noise, t)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
    exact, rounded = (torch.tensor(losses[dtype]) for dtype in (torch.float32, torch.bfloat16))
    assert exact[-1] < 0.7 * exact[0]
    assert float(((rounded - exact) / exact).abs().max()) < 0.01


def test_two_sharded_ranks_take_the_same_steps(shards, trained, tmp_path):
    settings = generator_settings(shards, tmp_path / "run") | {"parallelism": "fsdp"}
    settings["trainer"] |= {"device_train_microbatch_size": 2, "max_duration": "6ba"}
    train_ranks(settings, tmp_path)
    for ours, theirs in zip(figures(tmp_path / "run"), figures(trained), strict=False):
        for name in theirs.keys() & ours.keys() & {"loss/train/flow", "gradient/network"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, theirs["batch"])


def test_an_inner_block_is_aligned_with_an_encoders_tokens(shards, tmp_path):
    """REPA: its term is in the loss, its layer is trained and goes on exactly, and an export knows nothing of it."""
    settings = generator_settings(shards, tmp_path / "run")
    encoder = {"vit": {"model": str(GOLDEN / "stage2/raev2/dinov3-tiny"), "input_size": 64}}
    settings["model"]["diffusion"]["repa"] = {"encoder": encoder, "block": 1, "weight": 0.5}
    settings |= {"metrics": {}, "callbacks": {}}
    settings["trainer"]["max_duration"] = "3ba"
    train_here(settings)
    settings["trainer"]["max_duration"] = "6ba"
    train_here(settings)
    told = [record for record in figures(tmp_path / "run") if "loss/train/repa" in record]
    assert len(told) == 6
    for record in told:
        total = record["loss/train/flow"] + 0.5 * record["loss/train/repa"]
        assert record["loss/train/total"] == pytest.approx(total, rel=1e-5)
    settings |= {"run_name": "whole", "run_dir": str(tmp_path / "whole")}
    train_here(settings)
    assert_same_state(tmp_path / "run/checkpoints", tmp_path / "whole/checkpoints", tensors=60)
    saved = load_newest(tmp_path / "run/checkpoints")["model"]
    assert [name for name in saved if "alignment" in name] == ["alignment.projector.weight", "alignment.projector.bias"]
    main(["export", str(tmp_path / "run"), str(tmp_path / "export")])
    assert rae.load(str(tmp_path / "export")).sample([1]).shape == (1, 3, 64, 64)
    larger = {"vit": {**encoder["vit"], "input_size": 128}}
    for wrong, line in (
        ({"block": 9}, "block 9 is beyond"),
        ({"encoder": larger}, "8 tokens a side, the latents have 4"),
    ):
        changed = settings | {"run_name": "wrong", "run_dir": str(tmp_path / "wrong")}
        changed["model"] = {"diffusion": {**settings["model"]["diffusion"]}}
        changed["model"]["diffusion"]["repa"] = {**settings["model"]["diffusion"]["repa"], **wrong}
        with pytest.raises(UserError, match=line):
            train_here(changed)
