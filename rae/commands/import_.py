"""Import an autoencoder or a generator that another program wrote, as an export that rae.load(OUT) reads.

SOURCE is a diffusers folder of AutoencoderRAE, which brings its encoder; or published weights: a model.pt, or a folder
with one, and the decoder's config.json and stat.pt beside it. Which encoder those belong to has to be said. Both can be
in a bucket (s3://…), and a folder on the Hugging Face hub.

examples: python -m rae import model.pt exports/dino --encoder '{dinov2: {input_size: 224}}' --stats stat.pt
          python -m rae import decoders/mae exports/mae --yaml yamls/rae_mae.yaml
          python -m rae import downloads/rae-diffusers exports/dino
          python -m rae import stage2_model.pt exports/ditdh --autoencoder exports/dino

A published generator (stage2_model.pt, plain or under "ema") goes with --autoencoder, which names the autoencoder whose
latents it was trained on, with their statistics.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a diffusers folder, a model.pt, or a folder with one")
    parser.add_argument("out", metavar="OUT", help="the folder to make, local or s3://")
    parser.add_argument("--encoder", metavar="YAML", help="a published decoder's encoder, such as '{mae: {…}}'")
    parser.add_argument("--yaml", metavar="FILE", help="take the encoder from this run's configuration")
    parser.add_argument(
        "--decoder-config", metavar="FILE", help="its config.json, for sizes other than ViTB, ViTL and ViTXL"
    )
    parser.add_argument(
        "--output", choices=("normalized", "image"), help="what the decoder makes (default: image with {raev2: …})"
    )
    parser.add_argument("--stats", metavar="FILE", help="latent statistics (mean, var) to import with it")
    parser.add_argument("--autoencoder", metavar="SOURCE", help="a published generator's autoencoder: run, export, …")
    parser.add_argument("--with-encoder", action="store_true", help="copy the frozen encoder's weights too")
    parser.add_argument("--name", help="what the model card calls it (default: the folder's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from rae.commands.export import tell_encoder
    from rae.exchange.handover import export, import_from, import_generator, read_encoder

    if arguments.autoencoder:
        with TemporaryDirectory(prefix="rae-") as scratch:
            source = import_generator(arguments.source, arguments.autoencoder, Path(scratch))
            source.name = arguments.name or source.name
            export(source, arguments.out, with_encoder=arguments.with_encoder, overwrite=arguments.overwrite)
        parameters = sum(p.numel() for p in source.generator.network.parameters())
        print(f"{arguments.out}: {source.name}, a generator of {parameters:,} parameters for {source.image_size} px")
        return
    encoder = read_encoder(arguments.encoder) if arguments.encoder else None
    given = (encoder, arguments.yaml, arguments.decoder_config, arguments.stats, arguments.output)
    with TemporaryDirectory(prefix="rae-") as scratch:
        source = import_from(arguments.source, *given, Path(scratch))
        source.name = arguments.name or source.name
        about = export(source, arguments.out, with_encoder=arguments.with_encoder, overwrite=arguments.overwrite)
    parameters = sum(p.numel() for p in source.rae.decoder.parameters())
    print(f"{arguments.out}: {source.name}, a decoder of {parameters:,} parameters for {source.image_size} px")
    tell_encoder(about.model, "rae")
