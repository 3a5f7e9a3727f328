"""Images sampled from a generator into a folder, which goes on where it was interrupted.

A folder of them::

    samples/000000.png     the image of number 0, and so on
    latents/000000.safetensors   those of the batch that begins with number 0, if asked for: what the encoder would give
    samples.npz            all of them, in ADM's layout (arr_0: uint8 (N, S, S, 3), arr_1: labels), if asked for
    labels.csv             each image's class: file, label (−1: none), class
    grid.png, index.html   a few of every class
    sampling.json          of what, and how, they are
"""

import base64
import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.utils import make_grid

from rae.config.errors import UserError
from rae.data.images import with_bar
from rae.diffusion.generator import Generator, Guide
from rae.diffusion.samplers import Sampler
from rae.evaluation.frechet import hash_of_weights
from rae.evaluation.pictures import to_picture
from rae.survival.processes import barrier, of_first_rank, rank, world_size

SAMPLES, LATENTS, ARRAY, LABELS = "samples", "latents", "samples.npz", "labels.csv"
GRID, PAGE, SETTINGS = "grid.png", "index.html", "sampling.json"


def balanced_labels(count: int, num_classes: int, seed: int = 0) -> Tensor:
    """Equally many of each class, in an order that the seed decides: the public sampler's.

    Args:
        count: of labels; what does not divide goes to the first classes.
    """
    labels = torch.arange(count).remainder(num_classes).sort().values
    return labels[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def choose_labels(wanted: Sequence[str], count: int, generator: Generator, seed: int = 0) -> Tensor:
    """The labels of so many images.

    Args:
        wanted: ``equal``, ``random``, ``none``, or class numbers and names, which are repeated in turn.

    Raises:
        UserError: no such class.
    """
    classes = generator.num_classes
    if not classes or list(wanted) == ["none"]:
        return torch.full((count,), -1)
    if list(wanted) == ["equal"]:
        return balanced_labels(count, classes, seed)
    if list(wanted) == ["random"]:
        return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    names = {name: number for number, name in enumerate(generator.classes)}
    chosen = []
    for each in wanted:
        number = names.get(each, int(each) if each.lstrip("-").isdigit() else None)
        if number is None or not 0 <= number < classes:
            told = f", {', '.join(generator.classes[:10])}" if generator.classes else ""
            raise UserError(
                f"--classes: there is no class {each!r}; write equal, random, none, 0 to {classes - 1}{told}"
            )
        chosen.append(number)
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)]


def to_uint8(image: Tensor, truncate: bool = False) -> Tensor:
    """Images in [0, 1] -> uint8, to the nearest level.

    Args:
        truncate: to the level below, as the public sampler does: half a level darker on average.
    """
    scaled = image.clamp(0, 1) * 255
    return (scaled if truncate else scaled.round()).to(torch.uint8)


class Sampling:
    """Images of given labels from a generator, as files. Every rank makes its part of the batches.

    An image's noise follows from the seed and its number alone. A batch is made whole or again, so that a folder
    ends with the same bytes whether it was interrupted or not, and on however many ranks.

    Args:
        generator: on its device, in eval mode.
        labels: (N,).
        folder: local; what an earlier call of the same settings has left there is kept.
        seed: of the noise.
        sampler, guidance: instead of the generator's own.
        batch_size: images at a time.
        latents: keep the latents too.
        truncate: see :func:`to_uint8`.
        about: what the settings are, for :data:`SETTINGS`.

    Raises:
        UserError: the folder holds images of other settings.
    """

    def __init__(
        self,
        generator: Generator,
        labels: Tensor,
        folder: Path,
        seed: int = 0,
        sampler: Sampler | None = None,
        guidance: Guide | None = None,
        batch_size: int = 32,
        latents: bool = False,
        truncate: bool = False,
        about: dict[str, Any] | None = None,
    ):
        self.generator, self.labels, self.folder, self.seed = generator, labels, folder, seed
        self.options = {"sampler": sampler, "guidance": guidance}
        self.batch_size, self.latents, self.truncate = batch_size, latents, truncate
        self.about = {
            **(about or {}),
            "weights_hash": hash_of_weights(generator.network)[:32],
            "labels_hash": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:32],
            "seed": seed,
            "batch_size": batch_size,
            "truncate": truncate,
        }
        self._begin()

    def _begin(self) -> None:
        fault = ""
        if rank() == 0:
            try:
                fault = self._prepare()
            except OSError as error:
                fault = f"cannot write to {self.folder}: {error.strerror}"
        fault = of_first_rank(fault)
        if fault:
            raise UserError(fault)

    def _prepare(self) -> str:
        file = self.folder / SETTINGS
        for name in (SAMPLES, *([LATENTS] if self.latents else [])):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if file.is_file():
            before = json.loads(file.read_text())
            told = [key for key, value in self.about.items() if before.get(key) != json.loads(json.dumps(value))]
            if told:
                return f"{self.folder}: it holds images of other {', '.join(told)}; give another folder, or --overwrite"
            return ""
        if any((self.folder / SAMPLES).iterdir()):
            return f"{self.folder}: it holds files of another program; give another folder"
        rows = io.StringIO(newline="")
        table = csv.writer(rows)
        table.writerow(["file", "label", "class"])
        for number, label in enumerate(self.labels.tolist()):
            table.writerow([self.file(number).relative_to(self.folder), label, self._name(label)])
        _write(self.folder / LABELS, rows.getvalue().encode())
        _write(file, (json.dumps(self.about, indent=2) + "\n").encode())
        return ""

    def run(self) -> None:
        """Make the images that are not there yet. A collective call."""
        starts = range(0, len(self.labels), self.batch_size)
        left = [start for start in starts if not self._is_done(start)]
        barrier()  # nobody writes while another still looks
        for start in with_bar(left[rank() :: world_size()], "sampling"):
            self._batch(start)
        barrier()

    def file(self, number: int) -> Path:
        """The image of this number."""
        return self.folder / SAMPLES / f"{number:06}.png"

    def _numbers(self, start: int) -> range:
        return range(start, min(start + self.batch_size, len(self.labels)))

    def _is_done(self, start: int) -> bool:
        kept = not self.latents or self._latents(start).is_file()
        return kept and all(self.file(number).is_file() for number in self._numbers(start))

    def _latents(self, start: int) -> Path:
        return self.folder / LATENTS / f"{start:06}.safetensors"

    @torch.no_grad()
    def _batch(self, start: int) -> None:
        numbers = self._numbers(start)
        labels = self.labels[start : numbers.stop]
        latent = self.generator.sample_latents(labels, self.seed, list(numbers), **self.options)
        images = to_uint8(self.generator.decode(latent), self.truncate).cpu()
        for number, image in zip(numbers, images, strict=True):
            data = io.BytesIO()
            to_picture(image).save(data, "PNG")
            _write(self.file(number), data.getvalue())
        if self.latents:
            plain = self.generator.autoencoder.network.plain(latent).float().cpu().contiguous()  # type: ignore[operator]
            part = self._latents(start).with_suffix(".part")
            save_file({"latent": plain, "label": labels}, part)
            os.replace(part, self._latents(start))

    def array(self) -> Path:
        """Write all images as one file, in ADM's layout; by one rank."""
        part, count, header = self.folder / f"{ARRAY}.part", len(self.labels), np.lib.format.write_array_header_1_0
        shape = (count, *np.asarray(Image.open(self.file(0))).shape)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:  # image by image: together they may be 10 GB
            with archive.open("arr_0.npy", "w", force_zip64=True) as stored:
                header(stored, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for number in range(count):
                    stored.write(np.asarray(Image.open(self.file(number))).tobytes())
            with archive.open("arr_1.npy", "w") as stored:
                np.lib.format.write_array(stored, self.labels.numpy())
        os.replace(part, self.folder / ARRAY)
        return self.folder / ARRAY

    def show(self, most: int = 500, columns: int = 10) -> Path:
        """Write the grid and the page: a row of images for each class, as many as there is room for; by one rank."""
        by_class: dict[int, list[int]] = {}
        for number, label in enumerate(self.labels.tolist()):
            by_class.setdefault(label, []).append(number)
        each = max(1, min(columns, most // max(1, len(by_class))))
        shown = {label: by_class[label][:each] for label in sorted(by_class)[:most]}
        if len(by_class) == 1:  # rows of one class
            shown = {min(by_class): min(by_class.values())[: min(most, 10 * columns)]}
        self._grid([number for numbers in list(shown.values())[:40] for number in numbers], each)
        rows = [
            (self._name(label), [(number, _embedded(self.file(number))) for number in numbers])
            for label, numbers in shown.items()
        ]
        facts = {key: value for key, value in self.about.items() if not key.endswith("_hash")}
        page = Environment(autoescape=True).from_string(_PAGE).render(rows=rows, facts=facts, count=len(self.labels))
        _write(self.folder / PAGE, page.encode())
        return self.folder / PAGE

    def _name(self, label: int) -> str:
        names = self.generator.classes
        return "no class" if label < 0 else names[label] if label < len(names) else f"class {label}"

    def _grid(self, numbers: list[int], columns: int) -> None:
        images = [torch.from_numpy(np.array(Image.open(self.file(number)))).permute(2, 0, 1) for number in numbers]
        to_picture(make_grid(torch.stack(images), nrow=columns, pad_value=255)).save(self.folder / GRID)


def _write(file: Path, data: bytes) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(data)
    os.replace(part, file)


def _embedded(file: Path) -> str:
    data = io.BytesIO()
    Image.open(file).save(data, "WEBP", quality=90)
    return base64.b64encode(data.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Samples</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
section { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: 1.2em }
h2 { font-size: 1em; margin: .2em 0; width: 100% }
img { width: 104px; image-rendering: auto; border-radius: 3px }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1em } dt { color: #666 } dd { margin: 0 }
</style>
<h1>{{ '{:,}'.format(count) }} generated images</h1>
<dl>{% for key, value in facts.items() %}<dt>{{ key }}<dd>{{ value }}{% endfor %}</dl>
{% for name, images in rows %}<section><h2>{{ name }}</h2>
{% for number, data in images %}<img src="data:image/webp;base64,{{ data }}" alt="{{ name }}, number {{ number }}"
 title="number {{ number }}" loading="lazy">{% endfor %}
</section>{% endfor %}
"""
