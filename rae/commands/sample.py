"""Sample images from a generator: PNG files, a grid, a page by class; latents and one array if asked for.

SOURCE is a run's folder, a checkpoint or an exported folder of a generator, local or in a bucket. An image's noise
follows from --seed and its number alone: the same images come out on however many ranks, and a command that was
interrupted goes on where it was when it is given again. (Another --batch-size, or another kind of device, may round
differently.)

examples:
  python -m rae sample runs/ditdh out --num 64 --classes 207 360 --guidance '{cfg: {scale: 1.4, interval: [0.1, 1]}}'
  python -m rae sample runs/ditdh out --num 50000 --npz
  python -m rae sample export/ out --guidance '{autoguidance: {guide: runs/small, scale: 1.42}}' --steps 100
  composer -n 8 -m rae sample s3://bucket/export out --num 50000 --batch-size 128

The public code's figures were made with --sampler '{euler: {steps: 49, end: 0.001}}', which leaves a little noise, and
--truncate, which is half a grey level darker.
"""

import argparse
from typing import Any

from rae.commands.options import add_source_arguments, check_counts, pick_device
from rae.config.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="run, checkpoint or export of a generator")
    parser.add_argument("out", metavar="OUT", help="folder for everything; an interrupted one goes on")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=["equal"],
        metavar="CLASS",
        help="equal (as many of each), random, none, or numbers or names, in turn (default: equal)",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--npz", action="store_true", help="write samples.npz too, in the layout of ADM's evaluation")
    parser.add_argument("--latents", action="store_true", help="keep the latents too, as the encoder would give them")
    parser.add_argument("--gallery", type=int, default=500, metavar="N", help="images on the page (default: 500)")
    parser.add_argument("--overwrite", action="store_true", help="begin again where OUT holds other images")
    add_source_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how a generator samples."""
    parser.add_argument("--seed", type=int, default=0, help="of noise and order of classes (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the generator's own)")
    parser.add_argument("--sampler", metavar="PLUGIN", help="such as heun, or '{euler: {steps: 49, end: 0.001}}'")
    parser.add_argument(
        "--guidance", metavar="PLUGIN", help="such as '{cfg: {scale: 1.4, interval: [0.1, 1]}}', or none"
    )
    parser.add_argument("--truncate", action="store_true", help="round pixels down, as the public sampler does")


def run(arguments: argparse.Namespace) -> None:
    import shutil
    from pathlib import Path

    from rae.evaluation.sampling import SETTINGS, Sampling, choose_labels
    from rae.exchange.sources import open_source
    from rae.survival.processes import barrier, join_ranks, rank
    from rae.survival.storage import is_remote

    check_counts(arguments, "num", "batch_size", "steps", "gallery")
    if arguments.seed < 0:
        raise UserError(f"--seed must be 0 or more, not {arguments.seed}")
    if is_remote(arguments.out):
        raise UserError(f"OUT must be a local folder, not {arguments.out}")
    device = pick_device(arguments.device)
    join_ranks()
    source = open_source(arguments.source, arguments.weights, device, arguments.overrides, arguments.imports)
    generator, folder = source.generator, Path(arguments.out)
    if arguments.overwrite and rank() == 0 and (folder / SETTINGS).is_file():
        shutil.rmtree(folder)
    barrier()
    sampler, guidance, told = how(arguments, generator)
    about = {"source": arguments.source, "weights": source.weights, "classes": " ".join(arguments.classes), **told}
    labels = choose_labels(arguments.classes, arguments.num, generator, arguments.seed)
    work = Sampling(
        generator, labels, folder, arguments.seed, sampler, guidance, arguments.batch_size, arguments.latents,
        arguments.truncate, about,
    )  # fmt: skip
    work.run()
    if rank() == 0:
        if arguments.npz:
            print(f"all images in ADM's layout: {work.array()}")
        print(f"{len(labels):,} images in {folder}; by class: {work.show(arguments.gallery)}")


def how(arguments: argparse.Namespace, generator: Any) -> tuple[Any, Any, dict[str, str]]:
    """The sampler and the guidance that the options say, or None for the generator's own; and in words.

    Raises:
        UserError: there is no such plugin, or it does not go with the generator.
    """
    from rae.config.arguments import build, check_plugin, plugin_text
    from rae.diffusion.model import guided_by

    sampler = guidance = None
    told = {}
    if arguments.sampler or arguments.steps:
        entry = check_plugin("sampler", _parsed(arguments.sampler or "euler", "--sampler"), "--sampler")
        if arguments.steps:
            ((name, given),) = entry.items()
            entry = {name: {**given, "steps": arguments.steps}}
        sampler, told["sampler"] = build("sampler", entry, "--sampler"), plugin_text(entry)
    if arguments.guidance:
        entry = check_plugin("guidance", _parsed(arguments.guidance, "--guidance"), "--guidance")
        guidance, told["guidance"] = guided_by(entry, "--guidance"), plugin_text(entry)
        guidance(generator.network)  # what does not go with it is said before anything is made
    return sampler, guidance, told


def _parsed(text: str, option: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{option}: {text!r} is neither a name nor '{{name: {{argument: value}}}}'") from error
