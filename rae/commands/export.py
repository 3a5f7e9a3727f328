"""Export an autoencoder: a run's decoder, with what is needed to use it elsewhere.

SOURCE is a run's folder, a checkpoint (a folder or a Composer .pt file), a run's YAML, or an exported folder;
OUT a new folder; both local or s3://.

  rae        config.json and model.safetensors, which rae.load(OUT) reads; the encoder is named, not copied,
             unless --with-encoder
  published  model.pt, config.json and stat.pt, which the published RAE code reads
  diffusers  a folder for diffusers.AutoencoderRAE.from_pretrained(OUT), encoder included

Each has a model card, README.md, with the configuration and figures of the run.

examples: python -m rae export runs/demo exports/demo
          python -m rae export s3://bucket/runs/rae_dino_b/checkpoints/ep16-ba40032 exports/dino --format diffusers
          python -m rae export runs/demo s3://bucket/exports/demo --weights live --stats data/demo/latents/stat.pt
"""

import argparse
from typing import Any

from rae.commands.options import add_source_arguments
from rae.config.sections import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="what to export")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--format", choices=("rae", "published", "diffusers"), default="rae", help="(default: %(default)s)"
    )
    parser.add_argument("--with-encoder", action="store_true", help="copy the frozen encoder's weights too")
    parser.add_argument("--stats", metavar="FILE", help="latent statistics (mean, var) to export with it")
    parser.add_argument("--name", help="what the model card calls it (default: the run and step)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_source_arguments(parser, device=False)


def run(arguments: argparse.Namespace) -> None:
    from rae.exchange.handover import export
    from rae.exchange.sources import open_source

    source = open_source(arguments.source, arguments.weights, overrides=arguments.overrides, imports=arguments.imports)
    source.name = arguments.name or source.name
    about = export(
        source, arguments.out, arguments.format, arguments.with_encoder, arguments.stats, arguments.overwrite
    )
    print(f"{arguments.out}: {source.name} ({source.weights} weights), as {arguments.format}")
    tell_encoder(about.model, arguments.format)


def tell_encoder(model: Model | dict[str, Any], layout: str) -> None:
    """Say so, if the export names an encoder that only this machine has."""
    from rae.exchange.exports import encoder_path

    path = encoder_path(model)
    if layout == "rae" and path:
        print(f"its encoder is {path}, a path of this machine; --with-encoder puts it into the export")
