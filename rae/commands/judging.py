"""What ``rae evaluate`` does with generators, with images that were generated, and with generated latents."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rae.commands.options import loading_workers
from rae.config.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from rae.evaluation.comparison import Evaluated
    from rae.evaluation.frechet import Reference
    from rae.exchange.exports import Source


def judge(
    arguments: argparse.Namespace, made: "list[tuple[Dataset, int] | None]", opened: "list[Source]", device: Any
) -> "tuple[list[Evaluated], dict[str, Any]]":
    """Measure generators, and images that were generated before, against one reference.

    Args:
        made: of each source, its images if it is some.
        opened: of each other source, what it is.

    Raises:
        UserError: an autoencoder among them; images of different sizes; no reference where one is needed.
    """
    import sys

    from rae.evaluation.comparison import Evaluated, better
    from rae.evaluation.generation import NOISE, Against, choose_figures, images_of, looks_like_noise, measure
    from rae.survival.processes import rank

    sizes = {each[1] for each in made if each} | {source.image_size for source in opened}
    if len(sizes) > 1:
        told = ", ".join(map(str, sorted(sizes)))
        raise UserError(f"the sources' images have {told} pixels a side; compare equal ones")
    _ = [source.generator for source in opened]  # refuses another kind
    size, configs = sizes.pop(), [source.config for source in opened]
    of_the_run = next((config.metrics for config in configs if config and config.metrics), {})
    metrics, said = choose_figures(arguments.metrics, of_the_run, size)
    place = arguments.reference or next((c.data.eval.path for c in configs if c and c.data.eval), None)
    against = Against(place, size, arguments.limit) if place else None
    results: list[Evaluated] = []
    known: dict[str, Reference] = {}
    workers, left = loading_workers(arguments), iter(opened)
    for name, given in zip(arguments.sources, made, strict=True):
        source: Source | None = None if given else next(left)
        about: dict[str, Any] = {"image_size": size}
        with _sampled(arguments, source, device) if source else nullcontext(given[0]) as images:  # type: ignore[index]
            fakes = images_of(images, arguments.batch_size, workers, name)
            figures = measure(fakes, against, metrics, device, known, arguments.batch_size, workers)
            about |= {"images": len(images)}
        label, notes = Path(name).name, []
        if source:
            label, about = source.name, {**about, "weights": source.weights, "trained": source.trained}
            frechet = next((m for m in metrics.values() if hasattr(m, "means")), None)
            if frechet is not None and looks_like_noise(source.generator, frechet):  # type: ignore[arg-type]
                notes = [f"{source.name}: {NOISE}"]
        if against and any(hasattr(metric, "means") for metric in metrics.values()):
            said += against.few(about["images"])
        ways = {key: better(metric) for key, metric in metrics.items()}
        results.append(Evaluated(label, name, about, {0.0: figures}, ways, notes))
        said += notes
    if rank() == 0:
        for line in dict.fromkeys(said):
            print(line, file=sys.stderr)
    return results, {
        "data": f"generated, against {place}" if place else "generated",
        "images": results[0].about["images"],
    }


@contextmanager
def _sampled(arguments: argparse.Namespace, source: "Source", device: Any) -> "Iterator[Dataset]":
    """A generator's images as a data set: sampled into ``--keep``, or a folder that is deleted afterwards."""
    from rae.commands.sample import how
    from rae.data.images import open_images
    from rae.evaluation.sampling import SAMPLES, Sampling, choose_labels
    from rae.survival.processes import barrier, of_first_rank, rank

    generator, several = source.generator.to(device), len(arguments.sources) > 1
    kept = arguments.keep and str(Path(arguments.keep, *([source.name] if several else [])))
    with TemporaryDirectory(prefix="rae-samples-") if not kept and rank() == 0 else nullcontext(kept) as own:
        folder = Path(of_first_rank(own))
        sampler, guidance, told = how(arguments, generator)
        labels = choose_labels(["equal"], arguments.num, generator, arguments.seed)
        about = {"source": source.name if several else arguments.sources[0], **told}
        Sampling(
            generator, labels, folder, arguments.seed, sampler, guidance, arguments.batch_size, False,
            arguments.truncate, about,
        ).run()  # fmt: skip
        yield open_images(f"{folder}/{SAMPLES}", source.image_size)
        barrier()  # all have read them


def judge_decoders(
    arguments: argparse.Namespace, opened: "list[Source]", results: "list[Evaluated]", device: Any
) -> list[str]:
    """Decode one set of generated latents with each autoencoder, and put the figures of that beside its own.

    Returns:
        what is to be said.
    """
    from rae.evaluation.comparison import better
    from rae.evaluation.frechet import Reference
    from rae.evaluation.generation import Against, choose_figures, decoded, measure

    known: dict[str, Reference] = {}
    said: list[str] = []
    chosen = {size: choose_figures(None, {}, size) for size in {source.image_size for source in opened}}
    for source, result in zip(opened, results, strict=True):
        metrics, notes = chosen[source.image_size]
        place = arguments.reference or arguments.data
        if place is None:
            raise UserError("--latents: --reference is required: what the decoded latents are compared with")
        rae = source.rae.to(device)
        fakes = decoded(Path(arguments.latents), rae, f"decoding with {source.name}")
        figures = measure(fakes, Against(place, source.image_size), metrics, device, known, arguments.batch_size)
        result.figures[0.0] |= {f"generated/{name}": value for name, value in figures.items()}
        result.better.update({f"generated/{name}": better(metric) for name, metric in metrics.items()})
        said += notes
    return said
