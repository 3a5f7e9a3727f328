"""Reconstruct images, and see how well: pictures, figures for each image, and a page to look through them.

SOURCE is a run's folder, a checkpoint, a run's YAML or an exported folder; IMAGES are image files, folders of them at
any depth, or MDS shards. Both may be in a bucket (s3://…). Images are cropped as the evaluation crops them.

examples:
  python -m rae reconstruct runs/demo photo.jpg --out look
  python -m rae reconstruct runs/demo data/demo/eval --limit 200 --tau 0.4 0.8 --out look
  python -m rae reconstruct s3://bucket/export photos/ more/*.png --out look --overwrite

The folder then holds
  index.html          a page of its own to open in a browser: sort by any figure, turn pictures over, compare
  reconstructions/    as PNG, under the images' names; reconstructions_tau0.8/ from latents with noise of σ = 0.8
  comparisons/        original, reconstruction and difference side by side; originals/ has the crops
  figures.csv, .json  PSNR, SSIM and LPIPS of each image

LPIPS needs VGG's weights, which are downloaded once, or read from --lpips-weights. Where they cannot be had, the
distance between an EfficientNet's features takes its place, under its own name, feature_distance.
"""

import argparse
import math
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rae.commands.options import add_source_arguments, check_counts, loading_workers, pick_device
from rae.config.errors import UserError

if TYPE_CHECKING:
    from rae.evaluation.reconstruction import Record
    from rae.exchange.exports import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="run, checkpoint, YAML or export")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, folders, MDS shards")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything goes")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call has left in FOLDER")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images of each of IMAGES only")
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the crops (default: the model's); reconstructions are resized to it",
    )
    parser.add_argument(
        "--tau", type=float, nargs="+", default=[], metavar="T", help="also reconstruct latents with noise of σ = T"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load (default: 8, or one a core)")
    parser.add_argument("--lpips-weights", metavar="FILE", help="torchvision's VGG-16 weights, for LPIPS")
    parser.add_argument("--gallery", type=int, default=500, metavar="N", help="images on the page (default: 500)")
    add_source_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from torch.utils.data import ConcatDataset

    from rae.data.images import open_images
    from rae.evaluation.gallery import write_gallery
    from rae.evaluation.reconstruction import PAGE, Reconstruction, build_figures, whole_folder, write_figures
    from rae.exchange.sources import open_source

    _check(arguments)
    device = pick_device(arguments.device)
    with whole_folder(arguments.out, arguments.overwrite) as folder:
        source = open_source(arguments.source, arguments.weights, device, arguments.overrides, arguments.imports)
        rae, size = source.rae, arguments.size or source.image_size
        seen = {"limit": arguments.limit, "background": source.background}
        images = ConcatDataset([open_images(path, size, **seen) for path in arguments.images])
        evaluated = source.config.metrics if source.config else {}
        figures, replaced = build_figures(evaluated, arguments.lpips_weights, device, size)
        if replaced:
            _tell(replaced)
        work = Reconstruction(rae, figures, folder, tuple(dict.fromkeys(arguments.tau)))
        work.run(images, size, arguments.batch_size, loading_workers(arguments))
        _tell_left_out(work.left_out, len(images))
        about = _about(source, arguments, len(work.records), size)
        write_figures(folder, work.records, {"about": about, "left_out": work.left_out})
        page, title = folder / PAGE, f"Reconstructions by {source.name}"
        shown = write_gallery(page, work.records, title, about, work.taus, arguments.gallery)
    _report(arguments.out, work.records, shown)


def _check(arguments: argparse.Namespace) -> None:

    check_counts(arguments, "limit", "batch_size", "gallery")
    loading_workers(arguments)
    if arguments.size is not None and not 16 <= arguments.size <= 8192:
        raise UserError(f"--size must be from 16 to 8192 pixels, not {arguments.size}")
    for tau in arguments.tau:
        if not 0 < tau < math.inf:
            raise UserError(f"--tau {tau:g}: a noise level is above 0 (the latent without noise is always decoded)")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _tell_left_out(faults: list[str], total: int) -> None:

    if len(faults) == total:
        raise UserError(f"none of the images could be read: {faults[0]}")
    for fault in faults[:20]:
        _tell(f"left out: {fault}")
    if len(faults) > 20:
        _tell(f"left out: {len(faults) - 20} more, which figures.json lists")


def _about(source: "Source", arguments: argparse.Namespace, count: int, size: int) -> dict[str, str]:
    """What the page and figures.json say of the model and of the settings."""
    from rae.config.arguments import plugin_text

    rae, config, trained = source.rae, source.config, source.trained
    settings = config and config.autoencoder
    parameters = sum(p.numel() for p in rae.decoder.parameters())
    about = {
        "source": arguments.source,
        "weights": {"ema": "average (EMA)", "live": "live", "given": "as given"}[source.weights],
        "trained": f"{trained['epoch']} epochs, {trained['batch']:,} steps" if trained else "not known",
        "images": f"{count:,} from {', '.join(arguments.images)}",
        "crops": f"{size} × {size}, centre (ADM)",
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "device": str(rae.image_mean.device),
        "encoder": plugin_text(settings.encoder) if settings else type(rae.encoder.network).__name__,
        "latent": " × ".join(map(str, rae.latent_shape)),
        "decoder": f"{(settings and settings.decoder.size) or 'ViT'}, {parameters / 1e6:,.1f} M parameters",
        "noise in training": f"τ = {rae.noise_tau:g}, {rae.noise}" if rae.noise_tau else "none",
    }
    if config and settings:
        about["losses and algorithms"] = ", ".join([plugin_text(settings.pixel_loss), *config.algorithms])
        about["batch size"] = f"{config.data.batch_size:,}"
    return about


def _report(out: str, records: "list[Record]", shown: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rae.evaluation.pictures import text_of
    from rae.evaluation.reconstruction import PAGE, summarize

    table = Table()
    for heading in ("", "mean", "median", "worst", "worst image"):
        table.add_column(heading, justify="left" if heading in ("", "worst image") else "right")
    for name, total in summarize(records).items():
        worst = records[total.worst]
        values = (total.mean, total.median, worst.figures[name])
        table.add_row(name, *(text_of(name, value) for value in values), escape(worst.name))
    Console(emoji=False).print(table)
    page = Path(out, PAGE)
    print(f"{len(records):,} images in {out}; {shown:,} of them on {page} ({page.stat().st_size / 1e6:,.1f} MB)")
    if shown < len(records):
        print(f"the page is kept to {shown:,} images, the worst and an even spread; --gallery N shows more")
