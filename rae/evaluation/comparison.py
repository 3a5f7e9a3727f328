"""Autoencoders measured on the same images, side by side."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric

from rae.autoencoder.layers import fixed_latent_noise
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.config.arguments import check_plugin
from rae.config.errors import UserError
from rae.data.images import batches
from rae.evaluation.frechet import Reference, refer
from rae.evaluation.metrics import OFFLINE, Better, Metrics, build_metrics, build_or_substitute, verdict, within
from rae.exchange.exports import Source
from rae.exchange.sources import open_discriminator
from rae.model import RunModel


@dataclass
class Evaluated:
    """What was measured of one source.

    Args:
        label: for a table's head.
        source: as the user names it.
        about: of the weights: which, trained how far, for what images.
        figures: by noise level and metric.
        better: which values of each metric are.
        said: what the user is to know.
    """

    label: str
    source: str
    about: dict[str, Any]
    figures: dict[float, dict[str, float]]
    better: dict[str, Better]
    said: list[str]

    def record(self) -> dict[str, Any]:
        """For JSON, where numbers that are not finite are null."""
        levels = {
            f"{tau:g}": {name: value if math.isfinite(value) else None for name, value in figures.items()}
            for tau, figures in self.figures.items()
        }
        return {"name": self.label, "source": self.source, **self.about, "noise_tau": levels}


@torch.no_grad()
def evaluate(
    model: RAE | RunModel,
    images: Dataset,
    metrics: Metrics,
    taus: Iterable[float] = (0.0,),
    batch_size: int = 32,
    workers: int = 0,
    title: str = "",
) -> dict[float, dict[str, float]]:
    """Reconstruct images, from latents with fixed noise of each level, and compute every metric over all ranks.

    Another kind of model than an autoencoder is evaluated as its run does it, without further noise.

    Args:
        model: in eval mode; the metrics go to its device.
        images: see :func:`rae.data.images.open_images`.
        metrics: by name; they are copied for each level.
        taus: noise levels; 0 is the clean latent.
        title: see :func:`batches`.

    Returns:
        figures by name, for each level.
    """
    device = next(model.parameters()).device  # type: ignore[union-attr]
    each = {tau: {name: metric.to(device) for name, metric in copy.deepcopy(metrics).items()} for tau in taus}
    for batch in batches(images, batch_size, workers, title):
        if isinstance(model, RunModel):
            here = {key: batch[key].to(device) for key in ("image", "label", "index")}
            outputs = model.eval_forward(here)  # type: ignore[union-attr]
            for metric in each[0.0].values():
                model.update_metric(here, outputs, metric)  # type: ignore[union-attr]
            continue
        image = to_float(batch["image"].to(device))
        tokens = model.clean_tokens(image)
        for tau, measured in each.items():
            recon = quantize(model.decode(model.latent_of(_noised(tokens, tau, batch["index"]))))
            for metric in measured.values():
                metric.update(recon, image)
    return {tau: {name: float(metric.compute()) for name, metric in measured.items()} for tau, measured in each.items()}


def _noised(tokens: Tensor, tau: float, index: Tensor) -> Tensor:
    return fixed_latent_noise(tokens, torch.full((len(tokens),), tau), index) if tau else tokens


def evaluate_source(
    source: Source,
    name: str,
    images: Dataset,
    place: str,
    metrics: Metrics,
    taus: Iterable[float],
    batch_size: int,
    workers: int,
    device: torch.device,
    known: dict[str, Reference],
) -> Evaluated:
    """Measure a source on a device, and its discriminator's verdict where it has one; see :func:`evaluate`.

    Args:
        name: as the user names it.
        place: of the images.
        known: references to use and to add to; see :func:`refer`.
    """
    said, verdicts = [], Metrics()
    try:
        discriminator = open_discriminator(source, device)
        verdicts = within("discriminator", verdict(discriminator)) if discriminator is not None else {}
    except UserError as error:
        said.append(f"{source.name}: without its discriminator's verdict: {error}")
    refer(metrics.values(), images, place, source.image_size, device.type, known)
    model = source.network if isinstance(source.network, RAE) else source.run_model()
    model.to(device)
    measured = metrics | verdicts
    figures = evaluate(model, images, measured, taus, batch_size, workers, source.name)
    model.to("cpu")
    about = {"weights": source.weights, "trained": source.trained, "image_size": source.image_size}
    ways = {each: better(metric) for each, metric in measured.items()}
    return Evaluated(source.name, name, about, figures, ways, said)


def data_of(sources: list[Source]) -> tuple[str, int | None]:
    """The evaluation images of the sources' runs, and how many of them are used.

    Raises:
        UserError: they have none, or not the same.
    """
    found = {(c.data.eval.path, c.data.eval.limit) for c in (each.config for each in sources) if c and c.data.eval}
    if not found:
        raise UserError("--data is required: the sources do not say on what they were evaluated")
    if len(found) > 1:
        paths = ", ".join(sorted(str(path) for path, _ in found))
        raise UserError(f"the sources were evaluated on different images ({paths}); choose with --data and --limit")
    return found.pop()


def choose_metrics(
    wanted: list[str] | None, known: dict[str, Any] | None, image_size: int | None = None
) -> tuple[Metrics, list[str]]:
    """The metrics to compute, and what is to be said of them.

    Args:
        wanted: names, or plugins as ``name: {argument: value}``; None takes those that are known, or, where none are,
            PSNR, SSIM, colour bias, LPIPS and rFID.
        known: a run's metrics, whose arguments stand for bare names.
        image_size: side of the images.

    Raises:
        UserError: one that there is not, or whose weights cannot be had.
    """
    if wanted is None and not known:
        metrics = build_metrics({"psnr": {}, "ssim": {}, "color_bias": {}})
        found = [build_or_substitute({name: {}}, name) for name in OFFLINE]
        for built, _ in found:
            metrics |= built
        return metrics, [said for _, said in found if said]
    entries = dict(known or {}) if wanted is None else {}
    for each in wanted or ():
        entries |= _parsed(each, known or {})
    try:
        return build_metrics(entries, image_size), []
    except UserError as error:
        raise UserError(f"{str(error).rstrip(':')}; --metrics chooses others") from error


def _parsed(text: str, known: dict[str, Any]) -> dict[str, Any]:
    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--metrics: {text!r} is not a name, nor 'name: {{argument: value}}'") from error
    return check_plugin("metric", {entry: known.get(entry)} if isinstance(entry, str) else entry, "--metrics")


def rows(results: list[Evaluated]) -> Iterator[tuple[str, list[str], int | None]]:
    """A table's rows: name, values of each source as text, and which of them is the best."""
    levels = dict.fromkeys(tau for each in results for tau in each.figures)
    for tau in levels:
        for name in dict.fromkeys(name for each in results for name in each.figures.get(tau, ())):
            values = {i: each.figures[tau][name] for i, each in enumerate(results) if name in each.figures[tau]}
            which = next(each.better[name] for each in results if name in each.better)
            texts = [f"{values[i]:.4f}" if i in values else "–" for i in range(len(results))]
            yield f"{name}, τ {tau:g}" if tau else name, texts, best(values, which)


def better(metric: Metric) -> Better:
    """Which values of a metric are better; of torchmetrics' own, what they say themselves."""
    higher = getattr(metric, "higher_is_better", None)
    return getattr(metric, "better", None if higher is None else "higher" if higher else "lower")


def best(values: dict[int, float], which: Better) -> int | None:
    """The key of the best of several values; None where there is none, or nothing to choose from."""
    score = {"higher": lambda value: -value, "lower": lambda value: value, "near zero": abs}.get(which or "")
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    return min(known, key=lambda key: score(known[key])) if score and len(known) > 1 else None
