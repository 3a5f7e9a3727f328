"""Measure autoencoders on a data set, or generators: a table of every metric, and JSON; several side by side.

SOURCE is a run's folder, a checkpoint, a run's YAML or an exported folder; the images are MDS shards or a folder of
them. Both may be in a bucket (s3://…). Data and metrics are those of the first source's run, if it is known and
nothing else is said. Images are cropped as ADM does, reconstructions rounded to 8 bits; PSNR and SSIM are means over
images. Several ranks share the work.

examples:
  python -m rae evaluate runs/mine
  python -m rae evaluate runs/a runs/b export/ --compare --data data/imagenet/val --json figures.json
  python -m rae evaluate runs/mine --tau 0 0.4 0.8 --limit 5000
  python -m rae evaluate export/ --data photos/ --metrics psnr ssim 'rfid: {weights: inception.pth}'
  composer -n 8 -m rae evaluate s3://bucket/runs/mine/checkpoints --data s3://bucket/imagenet/val

A generator samples --num images, as many of each class, and they are compared with --reference: ADM's .npz, shards or
a folder (by default its run's data.eval). A SOURCE can also be images that were generated before: a folder of
`rae sample`, or an .npz.
  python -m rae evaluate runs/ditdh --num 50000 --reference VIRTUAL_imagenet256_labeled.npz --keep samples
  python -m rae evaluate exports/a exports/b --compare --data data/val --latents samples/latents
--latents decodes one set of generated latents with each autoencoder: a decoder is judged by what it is for.

--tau T adds noise of σ = T to the latents: a decoder for a diffusion model must bear it, which figures of clean latents
do not show. A run's discriminator, where there is one, gives its verdict: its mean logits for images and
reconstructions, and how often it tells which is which (accuracy, 0.5 if it cannot).

rFID needs Inception's weights and LPIPS VGG's: downloaded once, or a file. By default, where they cannot be had,
distances on EfficientNet features take their places under their own names, frechet and feature_distance; these
compare with themselves only. The originals' moments for rFID are computed once for a data set and kept in ~/.cache/rae
(RAE_CACHE names another folder).
"""

import argparse
from typing import TYPE_CHECKING, Any

from rae.commands.options import add_source_arguments, check_counts, loading_workers, pick_device
from rae.commands.sample import add_sampling_arguments
from rae.config.errors import UserError

if TYPE_CHECKING:
    from rae.evaluation.comparison import Evaluated
    from rae.evaluation.frechet import Reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="runs, checkpoints, YAMLs or exports")
    parser.add_argument("--data", metavar="IMAGES", help="MDS shards or a folder of images (default: data.eval's)")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help="names, or 'name: {argument: value}' (default: the run's)"
    )
    parser.add_argument("--compare", action="store_true", help="mark the best of each figure with a star")
    parser.add_argument(
        "--tau", type=float, nargs="+", default=[0.0], metavar="T", help="noise in latents, σ = T (default: 0)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images only")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load (default: 8, or one a core)")
    parser.add_argument("--num", type=int, default=1000, metavar="N", help="images a generator samples (default: 1000)")
    parser.add_argument("--reference", metavar="IMAGES", help="real images: shards, a folder, ADM's npz")
    parser.add_argument("--keep", metavar="FOLDER", help="keep a generator's samples there; an interrupted one goes on")
    parser.add_argument("--latents", metavar="FOLDER", help="generated latents, for each autoencoder to decode")
    add_sampling_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; local or s3://…")
    add_source_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    import json
    from contextlib import nullcontext

    from rae.survival.processes import join_ranks, rank
    from rae.survival.storage import written

    _check(arguments)
    device = pick_device(arguments.device)
    join_ranks()
    first = rank() == 0
    with written(arguments.json, "--json") if arguments.json and first else nullcontext() as path:
        results, about = _evaluate(arguments, device)
        if path:
            record = {**about, "sources": [each.record() for each in results]}
            path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if first:
        _print(results, about, arguments.compare)


def _check(arguments: argparse.Namespace) -> None:
    import math

    check_counts(arguments, "limit", "batch_size", "num", "steps")
    for tau in arguments.tau:
        if not 0 <= tau < math.inf:
            raise UserError(f"--tau {tau:g}: a noise level is 0 or more")
    if arguments.compare and len(arguments.sources) < 2:
        raise UserError("--compare takes two sources at least")


def _evaluate(arguments: argparse.Namespace, device: Any) -> "tuple[list[Evaluated], dict[str, Any]]":
    import sys

    from rae.data.images import open_images
    from rae.diffusion.generator import Generator
    from rae.evaluation.comparison import choose_metrics, data_of, evaluate_source
    from rae.evaluation.generation import open_samples
    from rae.exchange.sources import open_source
    from rae.survival.processes import rank

    options = (arguments.weights, "cpu", arguments.overrides, arguments.imports)
    made = [open_samples(name, arguments.limit) for name in arguments.sources]
    opened = [open_source(name, *options) for name, each in zip(arguments.sources, made, strict=True) if not each]
    if any(made) or any(isinstance(source.network, Generator) for source in opened):
        from rae.commands.judging import judge

        return judge(arguments, made, opened, device)
    if any(arguments.tau):
        _ = [source.rae for source in opened]  # refuses another kind of model: noise is for an autoencoder's latents
    configs = [source.config for source in opened]
    of_the_run = next((c.metrics for c in configs if c and c.metrics), None)
    metrics, said = choose_metrics(arguments.metrics, of_the_run, opened[0].image_size)
    data, limit = (arguments.data, None) if arguments.data else data_of(opened)
    limit = arguments.limit or limit
    taus, results = tuple(dict.fromkeys(arguments.tau)), []
    known: dict[str, Reference] = {}
    for name, source in zip(arguments.sources, opened, strict=True):
        images = open_images(data, source.image_size, limit=limit, background=source.background)
        work = (metrics, taus, arguments.batch_size, loading_workers(arguments))
        result = evaluate_source(source, name, images, data, *work, device, known)
        results.append(result)
        said += result.said
    if arguments.latents:
        from rae.commands.judging import judge_decoders

        said += judge_decoders(arguments, opened, results, device)
    if rank() == 0:
        for line in dict.fromkeys(said):
            print(line, file=sys.stderr)
    return results, {"data": data, "images": len(images)}  # type: ignore[arg-type]


def _print(results: "list[Evaluated]", about: dict[str, Any], compare: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rae.evaluation.comparison import rows

    table = Table(title=f"{escape(about['data'])}: {about['images']:,} images", title_justify="left")
    table.add_column("")
    for each in results:
        table.add_column(escape(each.label), justify="right", overflow="fold")
    for name, values, best in rows(results):
        texts = [text + (" *" if compare and i == best else "  " * compare) for i, text in enumerate(values)]
        table.add_row(name, *texts)
    Console(emoji=False).print(table)
    if compare:
        print("* the best of its row")
