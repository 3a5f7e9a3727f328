"""Compute the mean and variance of a data set's latents, exactly: the file that model.latent_stats names.

SOURCE is a run's YAML, of which only the encoder and the image size are used, or anything else that holds an
autoencoder: a run's folder, a checkpoint, an export. Images are cropped as the evaluation crops them. Several ranks
share the work. OUT is a file of the published layout, {mean, var} of (C, h, w); like everything, local or s3://….

examples:
  python -m rae stats yamls/rae_dino.yaml --data data/imagenet/train stats/imagenet.pt
  composer -n 8 -m rae stats runs/mine --data s3://bucket/imagenet/train s3://bucket/stats/imagenet.pt
"""

import argparse
from pathlib import Path

from rae.commands.options import add_source_arguments, check_counts, loading_workers, pick_device
from rae.config.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a run's YAML, a run, a checkpoint or an export")
    parser.add_argument("out", metavar="OUT", help="the file to write, stat.pt or so")
    parser.add_argument("--data", metavar="IMAGES", help="MDS shards or a folder of images (default: data.train's)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images only")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load (default: 8, or one a core)")
    add_source_arguments(parser, weights=False)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from rae.data.images import open_images
    from rae.exchange.latents import latent_statistics
    from rae.exchange.sources import open_encoder
    from rae.survival.processes import join_ranks, rank
    from rae.survival.storage import written

    check_counts(arguments, "limit", "batch_size")
    if not arguments.out.endswith((".pt", ".pth")):
        raise UserError(f"OUT {arguments.out!r} must end in .pt, which tells what it holds")
    _check_replaceable(arguments.out)
    device = pick_device(arguments.device)
    join_ranks()
    encoder, image_size, config = open_encoder(arguments.source, arguments.overrides, arguments.imports)
    data = arguments.data or (config and config.data.train.path)
    if not data:
        raise UserError("--data is required: MDS shards or a folder of images")
    background = config.data.background if config else "black"
    images = open_images(data, image_size, limit=arguments.limit, background=background)
    work = (encoder, images, arguments.batch_size, loading_workers(arguments), device)
    if rank() != 0:
        latent_statistics(*work)
        return
    with written(arguments.out, "OUT") as path:
        statistics, count = latent_statistics(*work)
        with path.open("wb") as file:  # so that a full disk is an OSError
            torch.save(statistics, file)
    shape = " × ".join(map(str, statistics["mean"].shape))
    print(f"{arguments.out}: mean and variance of the {shape} latents of {count:,} images")


def _check_replaceable(out: str) -> None:
    """Raise UserError for a local file that holds something else: checkpoints and decoders end in .pt too."""
    from rae.autoencoder.backbones import read_state_dict

    if not Path(out).is_file():
        return
    try:
        replaceable = read_state_dict(Path(out)).keys() == {"mean", "var"}
    except UserError:
        replaceable = False
    if not replaceable:
        raise UserError(f"OUT {out!r} exists and holds no latent statistics; give another file")
