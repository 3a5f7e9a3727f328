"""Fréchet distances (arXiv 1706.08500), with the originals' moments kept from one evaluation to the next."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from rae.autoencoder.backbones import TimmFeatures, read_state_dict, save_state_dict, weight_file
from rae.config.errors import UserError
from rae.config.registry import register
from rae.data.dataset import ImageDataset
from rae.data.shards import content_hash
from rae.evaluation.metrics import Shared
from rae.survival.processes import of_first_rank, rank
from rae.survival.storage import written

log = logging.getLogger(__name__)


class Reference:
    """The moments of the originals' features, computed once for all evaluations on the same images.

    A collective call: the first rank reads the file for all.

    Args:
        count: how many images the moments are of; those of fewer are not kept.
        path: file to read them from and to keep them in; None keeps them in memory.
    """

    def __init__(self, count: int, path: Path | None = None):
        self.count, self.path = count, path
        self.moments: dict[str, Tensor] | None = of_first_rank(_read_moments(path) if path and rank() == 0 else None)
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
        self.moments = {name: tensor.cpu() for name, tensor in moments.items()}
        if self.path is None or rank() != 0:
            return
        try:
            with written(str(self.path), "reference moments") as file:
                save_state_dict(self.moments, file)
        except UserError as error:
            log.warning("%s (RAE_CACHE names another folder)", error)


def _read_moments(path: Path) -> dict[str, Tensor] | None:
    try:
        moments = read_state_dict(path)
    except UserError:
        return None
    return moments if moments.keys() == {"sum", "outer", "count"} else None


def hash_of_weights(network: nn.Module, name: str = "") -> str:
    """A hash of a network's name and weights."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def note_update(metric: Any) -> None:
    """Do what torchmetrics does around ``update``, for a metric that is updated by another method."""
    metric._update_count += 1
    metric._computed = None


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
        frozen = Shared(features)
        frozen.num_features = num_features  # type: ignore[assignment]
        super().__init__(feature=frozen)
        self.name, self.num_features = name, num_features
        self.reference: Reference | None = None

    def update(self, recon: Tensor, image: Tensor) -> None:  # type: ignore[override]
        if self.reference is None or self.reference.wants(self):
            self.see(image, real=True)
        self.see(recon, real=False)

    def see(self, image: Tensor, real: bool) -> None:
        """Images (B, 3, H, W) in [0, 1], real or generated."""
        super().update(image, real=real)
        note_update(self)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean features (D,) of generated images and of real ones."""
        known = self.reference.moments if self.reference is not None else None
        real, fake = known or self._moments("real"), self._moments("fake")
        return fake["sum"] / fake["count"], real["sum"].to(fake["sum"].device) / int(real["count"])

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
        return hash_of_weights(self.inception.network, self.name)

    def refer(self, data: str, count: int, known: dict[str, Reference], in_file: bool = True) -> None:
        """Use the originals' moments that are known, or be the first to compute them. A collective call.

        Args:
            data: stands for the images, as they are evaluated, and the kind of device.
            count: how many they are.
            known: references of this process by hash, which is added to.
            in_file: keep them in a file below ``$RAE_CACHE`` or ``~/.cache/rae``: ``data`` changes when the images do.
        """
        key = hashlib.sha256(json.dumps([1, data, count, self.fingerprint()]).encode()).hexdigest()[:32]
        if key not in known:
            folder = Path(os.environ.get("RAE_CACHE") or "~/.cache/rae").expanduser() / "references"
            known[key] = Reference(count, folder / f"{key}.safetensors" if in_file else None)
        self.reference = known[key]


def refer(
    metrics: Iterable[Metric], images: Dataset, place: str, image_size: int, device: str, known: dict[str, Reference]
) -> None:
    """Let Fréchet distances use the moments of these originals, if they are known. A collective call.

    Args:
        images: all that are evaluated.
        place: where they are; stands for them in this process where there is no hash of them.
        device: the kind of device, ``cpu`` or ``cuda``.
        known: see :meth:`FrechetDistance.refer`.
    """
    content = _hash_of(images)
    data = json.dumps([content or place, image_size, device])
    for metric in metrics:
        if isinstance(metric, FrechetDistance):
            metric.refer(data, len(images), known, in_file=content is not None)  # type: ignore[arg-type]


def _hash_of(images: Any) -> str | None:
    """A hash of a data set's content: of shards, where their index has hashes of them; otherwise None."""
    while hasattr(images, "dataset"):
        images = images.dataset
    if not isinstance(images, ImageDataset):
        return None
    hashes = [shard.raw_data.hashes for shard in images.shards]
    return content_hash([{"raw_data": {"hashes": each}} for each in hashes]) if all(hashes) else None


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
    """Inception's features and logits, of images that it has just seen computed once for all who ask."""

    def __init__(self, weights: str | None):
        super().__init__()
        # Not torchmetrics' form of it, which from 1.9 on resizes with antialiasing: other figures than the published.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.image: Tensor | None = None
        self.seen: dict[str, Tensor] = {}

    def _keep(self, layer: nn.Module, inputs: Any, maps: Tensor) -> None:
        self.maps = maps[:, :7]

    def of(self, image: Tensor) -> dict[str, Tensor]:
        """{pooled (B, 2048), logits (B, 1008), spatial (B, 17·17·7)}; the last in the order of TensorFlow's memory."""
        if self.image is not image:
            pooled, logits = self.network((image * 255).round().to(torch.uint8))
            spatial = self.maps.permute(0, 2, 3, 1).flatten(1)
            self.image, self.seen = image, {"pooled": pooled, "logits": logits, "spatial": spatial}
        return self.seen


class InceptionOutput(nn.Module):
    """One output of Inception: see :func:`inception`.

    Args:
        network: shared with others.
        name: ``pooled``, ``logits`` or ``spatial``.
    """

    def __init__(self, network: _Inception, name: str):
        super().__init__()
        self.network, self.name = network, name

    def forward(self, image: Tensor) -> Tensor:
        return self.network.of(image)[self.name]


def inception(weights: str | None, where: str, output: str = "pooled") -> InceptionOutput:
    """An output of torch-fidelity's Inception, which is one for all who ask for the same weights.

    Args:
        output: ``pooled`` (2048 features), ``logits`` (1008), or ``spatial`` (2023).
        weights: torch-fidelity's file; None downloads it.
        where: what asks, for messages.

    Raises:
        UserError: weights that cannot be had, or are of another network.
    """
    from urllib.error import URLError

    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = weight_file(weights) if weights else None
    if path:
        read_state_dict(path)  # torch-fidelity would run code that a file holds; this refuses such a file
    try:
        return InceptionOutput(_inception(str(path) if path else None), output)
    except RuntimeError as error:
        raise UserError(f"{where}: the tensors in {weights} are not those of torch-fidelity's Inception") from error
    except URLError as error:
        raise UserError(
            f"{where}: cannot download the Inception weights ({error.reason}); fetch {URL_INCEPTION_V3} elsewhere and "
            "give its path as `weights`"
        ) from error


_inception = functools.lru_cache(maxsize=1)(_Inception)


@register("metric", "rfid", "gfid")
def rfid(weights: str | None = None) -> Metric:
    """FID: torch-fidelity's Inception, 2048 features; of reconstructions against the evaluated images themselves
    (rFID), of generated images against a reference (gFID).

    Args:
        weights: torch-fidelity's Inception file; None downloads it.
    """
    return FrechetDistance(inception(weights, "rfid"), 2048, "inception-v3-compat 2048")


@register("metric", "sfid")
def sfid(weights: str | None = None) -> Metric:
    """sFID (arXiv 2103.03841): as FID, of features that keep their places: 7 channels of Inception's Mixed_6d.

    Args:
        weights: see :func:`rfid`.
    """
    return FrechetDistance(inception(weights, "sfid", "spatial"), 2023, "inception-v3-compat spatial")


class Pooled(nn.Module):
    """The mean over places of a level's features (B, C)."""

    def __init__(self, features: TimmFeatures):
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[0].mean(dim=(2, 3))


SPACES = {
    "inception": None,
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "dinov3": "vit_large_patch16_dinov3.lvd1689m",
    "clip": "vit_large_patch14_clip_224.openai",
    "siglip2": "vit_large_patch16_siglip_256.v2_webli",
    "mae": "vit_large_patch16_224.mae",
    "convnext": "convnext_base.fb_in22k_ft_in1k",
}
"""Feature spaces by name: timm's model, whose pooled features of the last level they are; None is FID's Inception."""


def _in_space(name: str, given: dict[str, Any], image_size: int | None) -> Metric:
    if name == "inception" and "model" not in given:
        return rfid(**given)
    model = given.get("model", SPACES.get(name))
    if model is None:
        raise UserError(f"frechet: spaces: there is no {name!r}; there are {', '.join(SPACES)}, or give it a model")
    return frechet(**{**given, "model": model, "image_size": image_size})  # type: ignore[return-value]


@register("metric", "frechet", context=("image_size",))
def frechet(
    model: str | None = None,
    level: int = -1,
    weights: str | None = None,
    input_size: int | None = None,
    image_size: int | None = None,
    spaces: list[str] | dict[str, dict[str, Any] | None] | None = None,
) -> Metric | dict[str, Metric]:
    """Fréchet distance on a timm network's pooled features: not an FID, and comparable only with itself.

    With ``spaces`` it is one for each of several networks, in one pass over the images: ``frechet/dinov2``, …

    Args:
        spaces: names of :data:`SPACES`; or names of your own, each with the arguments of one of these, ``{}`` for one
            of :data:`SPACES` as it is, and ``weights`` for its file.
        model, weights, input_size, image_size: see :class:`rae.autoencoder.backbones.TimmFeatures`.
        level: index into the model's ``feature_info``.
    """
    if (model is None) == (spaces is None):
        raise UserError("frechet: give either model, or spaces")
    if spaces is not None:
        named = spaces if isinstance(spaces, dict) else dict.fromkeys(spaces, None)
        return {name: _in_space(name, given or {}, image_size) for name, given in named.items()}
    assert model is not None
    features = TimmFeatures(model, [level], weights, input_size, image_size)
    size = f" {features.input_size}" if features.input_size else ""
    return FrechetDistance(Pooled(features), features.channels[0], f"{model} {level}{size}")
