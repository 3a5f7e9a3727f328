"""Handing an autoencoder on: exports in three layouts, with a model card, and imports of others' into ours."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from rae.autoencoder.backbones import read_file
from rae.autoencoder.rae import RAE, read_stats
from rae.config.arguments import check_plugin
from rae.config.errors import UserError
from rae.config.loading import load_config, save_config
from rae.config.registry import import_plugins
from rae.config.sections import Model
from rae.diffusion.generator import Generator
from rae.diffusion.published import load_published, settings_of, weights_in
from rae.exchange import diffusers_format, exports, places, published
from rae.exchange.card import model_card
from rae.exchange.exports import Exported, Source, includes_encoder
from rae.exchange.places import local_file, local_folder, new_folder, read_json
from rae.exchange.sources import open_source

LAYOUTS = ("rae", "published", "diffusers")


def export(
    source: Source,
    out: str,
    layout: str = "rae",
    with_encoder: bool = False,
    stats: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write an autoencoder to a new folder, with its model card and its run's configuration.

    Args:
        out: local, or a URL.
        layout: one of :data:`LAYOUTS`.
        with_encoder: copy the encoder's weights too; layout ``rae``, where a source that brings its own always does.
        stats: a file of latent statistics, to use in place of the source's own.

    Returns:
        what is known of it, as layout ``rae`` says it.

    Raises:
        UserError: it cannot be expressed in that layout, or ``out`` cannot be written.
    """
    network, about = source.network.cpu(), source.about()
    if with_encoder and layout != "rae":
        raise UserError("--with-encoder goes with --format rae; diffusers includes it always, published never")
    if with_encoder and not isinstance(network, RAE | Generator):
        raise UserError(f"--with-encoder is about autoencoders, which {source.name} is not; leave it out")
    if layout != "rae" and not isinstance(network, RAE):
        raise UserError(f"--format {layout} is a layout of autoencoders, which {source.name} is not; use --format rae")
    if stats:
        rae = source.rae
        with TemporaryDirectory(prefix="rae-") as scratch:
            rae.latent_mean, rae.latent_var = read_stats(str(local_file(stats, Path(scratch))), rae.encoder.network)
    with new_folder(out, overwrite) as folder:
        if isinstance(network, Generator) and (with_encoder or exports.includes_autoencoder(source.model)):  # type: ignore[arg-type]
            about = _with_autoencoder(network, about, source.inside, folder)
        if layout == "rae":
            about = exports.write(network, about, folder, with_encoder or includes_encoder(about.model))
        elif layout == "published":
            published.write(source.rae, folder)
        else:
            diffusers_format.write(source.rae, folder)
        if source.config is not None:
            save_config(source.config, folder / places.RUN)
        included = {"diffusers": True, "published": False}.get(layout)
        (folder / places.CARD).write_text(model_card(network, about, layout, source.config, included))
    return about


def _with_autoencoder(generator: Generator, about: Exported, inside: Exported | None, folder: Path) -> Exported:
    """Put a generator's whole autoencoder into its export, as an export of its own.

    Args:
        inside: what that says of itself, if it came in an export of the generator.
    """
    named = about.model["diffusion"]["autoencoder"]  # type: ignore[index]
    autoencoder: Any = generator.autoencoder.network
    if inside is not None:
        told = inside
    elif isinstance(named, str):
        told = open_source(named).about()
    else:
        told = Exported(name=f"{about.name}-autoencoder", image_size=about.image_size, model=Model(**named))
    place = folder / places.AUTOENCODER
    place.mkdir()
    told = exports.write(autoencoder.cpu(), told, place, with_encoder=True)
    (place / places.CARD).write_text(model_card(autoencoder, told, "rae"))
    return about.model_copy(update={"model": exports.with_autoencoder(about.model, places.AUTOENCODER)})  # type: ignore[arg-type]


def import_generator(
    source: str, autoencoder: str, scratch: Path, label_dropout: float = 0.1, live: bool = False
) -> Source:
    """Open a published DiT-DH (``stage2_model.pt``, plain or under ``ema``), on the latents of an autoencoder of ours.

    Args:
        source: the file.
        autoencoder: a source of an autoencoder.
        live: take the live weights of a training checkpoint, instead of its average.

    Raises:
        UserError: it is no such file, or is of other latents.
    """
    content = read_file(local_file(source, scratch))
    state = weights_in(content, source, ema=not live)
    (channels, grid, _), rows, network = settings_of(state)
    settings = {
        "autoencoder": autoencoder,
        "network": network,
        "num_classes": rows - (label_dropout > 0),
        "label_dropout": label_dropout,
        "checked": False,
    }
    if "ditdh_in_context" in network:
        settings |= {"flow": {"line": {"predicts": "data"}}, "sampler": {"euler": {"steps": 100}}}
        settings["guidance"] = {"internal": {"scale": 1.78, "interval": [0.1, 1.0]}}
    opened = open_source(autoencoder)
    if opened.rae.latent_shape != (channels, grid, grid):
        told = " × ".join(map(str, opened.rae.latent_shape))
        raise UserError(f"{source} is of latents {channels} × {grid} × {grid}, the autoencoder's are {told}")
    made = exports.build_network({"diffusion": settings}, opened.image_size)
    load_published(made.network, state, source)  # type: ignore[arg-type]
    weights = "ema" if "ema" in content and not live else "given"
    return Source(made.eval(), opened.image_size, _name_of(source), weights, {"diffusion": settings})


def import_from(
    source: str,
    encoder: Any = None,
    run_yaml: str | None = None,
    decoder_config: str | None = None,
    stats: str | None = None,
    output: Literal["normalized", "image"] | None = None,
    scratch: Path = Path(),
) -> Source:
    """Open another program's autoencoder.

    Args:
        source: a published ``model.pt``, a folder that holds one, or a diffusers ``AutoencoderRAE`` folder.
        encoder: for a published decoder, the encoder's settings, as in a configuration's ``model.encoder``.
        run_yaml: a run's configuration that has them instead.
        decoder_config: the decoder's config.json; by default that of the folder.
        stats: latent statistics; by default the folder's ``stat.pt``.
        output: what a published decoder makes; by default ``image`` with an encoder by RAEv2's name, whose decoders
            do, and ``normalized`` otherwise.
        scratch: local folder, for what is downloaded, and for a diffusers folder's encoder.

    Raises:
        UserError: it is nothing of the kind, or parts are missing or do not fit.
    """
    source = source.rstrip("/")
    if source.endswith(".pt"):
        model, folder = local_file(source, scratch), None
    else:
        folder = local_folder(source, scratch)
        model = folder / published.DECODER
        if not model.exists():
            if encoder or run_yaml or decoder_config:
                raise UserError(
                    f"{source} has no {published.DECODER}: --encoder, --yaml and --decoder-config go with it"
                )
            return _import_diffusers(source, folder, scratch)
    if bool(encoder) == bool(run_yaml):
        raise UserError(
            f"{source}: a published decoder does not say to which encoder it belongs; "
            "give either --encoder '{dinov2: {…}}' or --yaml with a run's configuration"
        )
    if run_yaml:
        config = load_config(run_yaml)
        import_plugins(config.imports)
        encoder = config.autoencoder.encoder
    entry = check_plugin("encoder", encoder, "--encoder")
    rae, settings, image_size = published.read(
        model,
        _beside(decoder_config, folder, places.CONFIG, scratch),
        _beside(stats, folder, published.STATS, scratch),
        encoder,
        output or ("image" if "raev2" in entry else "normalized"),
    )
    return Source(rae, image_size, _name_of(source), "given", settings)


def read_encoder(text: str) -> Any:
    """An encoder's settings written on the command line: ``mae``, or ``{mae: {pretrained: …}}``.

    Raises:
        UserError: it is no such thing.
    """
    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--encoder {text!r} is no YAML; write it as '{{mae: {{input_size: 256}}}}'") from error
    check_plugin("encoder", entry, "--encoder")
    return entry


def _import_diffusers(source: str, folder: Path, scratch: Path) -> Source:
    if not (folder / places.CONFIG).is_file():
        raise UserError(f"{source}: there is neither {published.DECODER} nor a diffusers {places.CONFIG} in it")
    content = read_json(folder / places.CONFIG, f"{source}/{places.CONFIG}")
    if content.get("format") == "rae":
        raise UserError(f"{source} is an export already; copy it, or use python -m rae export")
    return diffusers_format.read(folder, source, scratch)


def _beside(given: str | None, folder: Path | None, name: str, scratch: Path) -> Path | None:
    if given:
        return local_file(given, scratch)
    return folder / name if folder is not None and (folder / name).is_file() else None


def _name_of(source: str) -> str:
    """A file's folder or a folder: what tells published weights apart, which are all called model.pt."""
    parts = [part for part in source.removesuffix(f"/{published.DECODER}").split("/") if part]
    return parts[-1].removesuffix(".pt") if parts else "rae"
