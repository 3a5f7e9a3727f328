"""Evaluation metrics of reconstructions, updated with (recon, image), both (B, 3, H, W) in [0, 1]."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from rae.backbones import TimmFeatures, read_state_dict, weight_file
from rae.layers import Frozen
from rae.losses import LPIPS, FeatureDistance
from rae.registry import UserError, register


class PerImage(Metric):
    """The mean over images of a figure that each image has by itself.

    Args:
        figure: (recon, image) -> (B,): a function, or a module with a ``per_image`` method.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, figure: Callable[[Tensor, Tensor], Tensor] | LPIPS | FeatureDistance):
        super().__init__()
        self.network = figure if isinstance(figure, nn.Module) else None  # a submodule, so that it moves along
        self.figure = figure.per_image if isinstance(figure, nn.Module) else figure
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, recon: Tensor, image: Tensor) -> None:
        values = self.figure(recon.float(), image.float())
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count


def _psnr(recon: Tensor, image: Tensor) -> Tensor:
    # torchmetrics has no per-image values of a batch without a mean over them.
    return torch.stack(
        [peak_signal_noise_ratio(r[None], i[None], data_range=1.0) for r, i in zip(recon, image, strict=True)]
    )


def _ssim(recon: Tensor, image: Tensor) -> Tensor:
    return structural_similarity_index_measure(recon, image, data_range=1.0, reduction="none")  # type: ignore[return-value]


@register("metric", "psnr")
def psnr() -> Metric:
    """Peak signal-to-noise ratio in dB, per image, then averaged."""
    return PerImage(_psnr)


@register("metric", "ssim")
def ssim() -> Metric:
    """Structural similarity (Wang et al. 2004), Gaussian window, per image, then averaged."""
    return PerImage(_ssim)


@register("metric", "lpips")
def lpips(network: str = "vgg", weights: str | None = None) -> Metric:
    """LPIPS; see :class:`rae.losses.LPIPS`."""
    return PerImage(LPIPS(network, weights))


@register("metric", "feature_distance")
def feature_distance(model: str, levels: list[int] | None = None, weights: str | None = None) -> Metric:
    """LPIPS's form on a timm network; see :class:`rae.losses.FeatureDistance`."""
    return PerImage(FeatureDistance(model, levels, weights))


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance (arXiv 1706.08500) between images and reconstructions, kept as moments.

    Args:
        features: image (B, 3, H, W) in [0, 1] -> (B, num_features).
        num_features: their number.
    """

    def __init__(self, features: nn.Module, num_features: int):
        frozen = Frozen(features)
        frozen.num_features = num_features  # type: ignore[assignment]
        super().__init__(feature=frozen)

    def update(self, recon: Tensor, image: Tensor) -> None:  # type: ignore[override]
        super().update(image, real=True)
        super().update(recon, real=False)


class _Inception(nn.Module):
    def __init__(self, weights: str | None):
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)

    def forward(self, image: Tensor) -> Tensor:
        return self.network((image * 255).round().to(torch.uint8))


@register("metric", "rfid")
def rfid(weights: str | None = None) -> Metric:
    """Reconstruction FID: torch-fidelity's Inception, 2048 features, against the evaluated images themselves.

    Args:
        weights: torch-fidelity's Inception file; None downloads it.
    """
    from urllib.error import URLError

    path = weight_file(weights) if weights else None
    if path:
        read_state_dict(path)  # torch-fidelity would run code that a file holds; this refuses such a file
    try:
        return FrechetDistance(_Inception(str(path) if path else None), 2048)
    except URLError as error:
        raise UserError(
            f"rfid: cannot download the Inception weights ({error.reason}); fetch torch-fidelity's "
            "pt_inception-2015-12-05-6726825d.pth elsewhere and give its path as weights:"
        ) from error


class _Pooled(nn.Module):
    def __init__(self, features: TimmFeatures):
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[0].mean(dim=(2, 3))


@register("metric", "frechet")
def frechet(model: str, level: int = -1, weights: str | None = None) -> Metric:
    """Fréchet distance on a timm network's pooled features: not an FID, and comparable only with itself.

    Args:
        model, weights: see :class:`rae.backbones.TimmFeatures`.
        level: index into the model's ``feature_info``.
    """
    features = TimmFeatures(model, [level], weights)
    return FrechetDistance(_Pooled(features), features.channels[0])
