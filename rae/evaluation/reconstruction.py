"""Images through an autoencoder: reconstructions, difference maps and figures of each, as files.

A folder of them::

    originals/a/b.png         the crop that the encoder saw
    reconstructions/a/b.png   what the decoder made of it; reconstructions_tau0.8/ of its noised latent
    comparisons/a/b.png       both, and their difference, side by side
    figures.json, figures.csv
"""

import csv
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor
from torch.utils.data import Dataset

from rae.autoencoder.layers import fixed_latent_noise
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.config.errors import UserError
from rae.data.images import batches
from rae.data.reader import BadSampleError, DataError
from rae.evaluation.filenames import FileNames
from rae.evaluation.metrics import BETTER, build_metrics, build_or_substitute
from rae.evaluation.pictures import comparison, split, to_picture
from rae.survival.storage import filled, is_remote

ORIGINALS, RECONSTRUCTIONS, COMPARISONS = "originals", "reconstructions", "comparisons"
FIGURES, TABLE, PAGE = "figures.json", "figures.csv", "index.html"
OURS = {FIGURES, TABLE, PAGE, ORIGINALS, RECONSTRUCTIONS, COMPARISONS}
"""What a folder of them holds; names of noised ones go on with ``_tau…``."""
PERCEPTUAL = ("lpips", "feature_distance")

Figure = Callable[[Tensor, Tensor], Tensor]
"""(recon, image), both (B, 3, H, W) in [0, 1] -> (B,)."""


@dataclass(frozen=True)
class Record:
    """An image that was reconstructed.

    Args:
        name: as its source calls it.
        file: its PNG's path below each folder of pictures.
        figures: of the reconstruction, and with ``_tau0.8`` after the name those of noised latents.
    """

    name: str
    file: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """One figure over all images; ``worst`` and ``best`` are indices of images."""

    mean: float
    median: float
    worst: int
    best: int


def higher_is_better(figure: str) -> bool:
    """Whether more of a figure, such as ``psnr`` or ``psnr_tau0.8``, is better."""
    return BETTER[split(figure)[0]] == "higher"


def suffix(tau: float) -> str:
    """``_tau0.8``, or nothing for no noise."""
    return f"_tau{tau:g}" if tau else ""


def folder_of(tau: float) -> str:
    """The folder of reconstructions of latents with noise of σ = ``tau``."""
    return RECONSTRUCTIONS + suffix(tau)


@torch.no_grad()
def recon_of(rae: RAE, image: Tensor, tau: float, index: Tensor) -> Tensor:
    """Reconstructions of a batch, from clean latents or from noised ones.

    Args:
        rae: in eval mode.
        image: uint8 (B, 3, S, S), on its device.
        tau, index: see :func:`rae.autoencoder.layers.fixed_latent_noise`; 0 adds no noise.

    Returns:
        uint8 (B, 3, S, S); resized to S (bicubic, antialiased) when the decoder's images are of another size.

    Raises:
        UserError: the weights give no finite numbers.
    """
    tokens = rae.clean_tokens(to_float(image))
    if tau:
        tokens = fixed_latent_noise(tokens, torch.full((len(tokens),), tau), index)
    recon = rae.decode(rae.latent_of(tokens))
    if not recon.isfinite().all():
        raise UserError("the reconstruction is not finite: these weights are broken; try an older checkpoint")
    if recon.shape[-1] != image.shape[-1]:
        recon = tvf.resize(recon, list(image.shape[-2:]), tvf.InterpolationMode.BICUBIC, antialias=True)
    return (quantize(recon) * 255).round().to(torch.uint8)


class _Tolerant(Dataset):
    """Images, each with ``fault``: empty, or why it is black, as it does not decode."""

    def __init__(self, images: Dataset, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return {**self.images[number], "fault": ""}
        except DataError as error:
            if not isinstance(error.__cause__, BadSampleError | ValueError | OSError):
                raise  # not this image's fault, but the store's
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return {"image": black, "label": -1, "name": "", "index": number, "fault": str(error)}


@dataclass
class Reconstruction:
    """Reconstruct images into a folder, in batches: memory does not grow with their number.

    Args:
        rae: in eval mode, on its device.
        figures: what is computed for each image, by name; modules on the same device.
        out: an empty folder.
        taus: noise levels of further reconstructions, see :func:`recon_of`.
    """

    rae: RAE
    figures: dict[str, Figure]
    out: Path
    taus: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.records: list[Record] = []
        self.left_out: list[str] = []
        self.files = FileNames()

    def run(self, images: Dataset, size: int, batch_size: int, workers: int) -> None:
        """Reconstruct all of them.

        Args:
            images: see :func:`rae.data.images.open_images`; what is wrong with those that do not decode is in
                ``left_out``.
            size: of the images.
            workers: processes that load.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            writing: list[Future] = []
            for batch in batches(_Tolerant(images, size), batch_size, workers, "reconstructing"):
                done = self._reconstruct(batch)
                for future in writing:  # of the batch before, which was written while this one was computed
                    future.result()
                writing = [pool.submit(self._write, *each) for each in done]
            for future in writing:
                future.result()

    def _reconstruct(self, batch: dict[str, Any]) -> list[tuple[Record, Tensor, dict[float, Tensor]]]:
        """(its record, original, reconstructions by τ) of each image."""
        self.left_out += filter(None, batch["fault"])
        sound = [i for i, fault in enumerate(batch["fault"]) if not fault]
        if not sound:
            return []
        image, index = batch["image"][sound], batch["index"][sound]
        here = image.to(self.rae.image_mean.device)
        recons, columns = {}, {}
        for tau in (0.0, *self.taus):
            recon = recon_of(self.rae, here, tau, index)
            recons[tau] = recon.cpu()
            for name, figure in self.figures.items():
                with torch.no_grad():
                    columns[name + suffix(tau)] = figure(to_float(recon), to_float(here)).tolist()
        done = []
        for row, i in enumerate(sound):
            name, figures = batch["name"][i], {figure: column[row] for figure, column in columns.items()}
            record = Record(name, self.files.of(name), figures)
            done.append((record, image[row], {tau: recon[row] for tau, recon in recons.items()}))
        self.records += [record for record, _, _ in done]
        return done

    def _write(self, record: Record, image: Tensor, recons: dict[float, Tensor]) -> None:
        pictures = {ORIGINALS: to_picture(image)}
        pictures |= {folder_of(tau): to_picture(recon) for tau, recon in recons.items()}
        pictures[COMPARISONS] = comparison(image, recons, record.figures)
        for folder, picture in pictures.items():
            path = self.out / folder / record.file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def summarize(records: Sequence[Record]) -> dict[str, Summary]:
    """Mean, median, worst and best of each figure."""
    summaries = {}
    for name in records[0].figures:
        values = [record.figures[name] for record in records]
        order = worst_first(records, name)
        summaries[name] = Summary(statistics.fmean(values), statistics.median(values), order[0], order[-1])
    return summaries


def worst_first(records: Sequence[Record], figure: str) -> list[int]:
    """Indices of the records, ordered by a figure."""
    return sorted(range(len(records)), key=lambda i: records[i].figures[figure], reverse=not higher_is_better(figure))


def write_figures(out: Path, records: Sequence[Record], about: dict[str, Any]) -> None:
    """``figures.csv``, a line an image, and ``figures.json``: the same with ``about`` and a summary before it.

    A PSNR of two equal images is infinite: ``inf`` in the CSV, null in JSON, which has no word for it.
    """
    with open(out / TABLE, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "file", *records[0].figures])
        rows.writerows([record.name, record.file, *record.figures.values()] for record in records)
    summary = {
        name: {
            "mean": _finite(s.mean),
            "median": _finite(s.median),
            "worst": _finite(records[s.worst].figures[name]),
            "worst_image": records[s.worst].name,
        }
        for name, s in summarize(records).items()
    }
    images = [
        {"name": r.name, "file": r.file} | {name: _finite(value) for name, value in r.figures.items()} for r in records
    ]
    text = json.dumps(about | {"summary": summary, "images": images}, ensure_ascii=False, allow_nan=False, indent=1)
    (out / FIGURES).write_text(text + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def whole_folder(out: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when all is written, and is removed when something fails.

    Raises:
        UserError: ``out`` exists and is not to be replaced, or cannot be written.
    """
    if is_remote(out):
        raise UserError(f"--out {out}: pictures go to a local folder; copy it to the bucket when it is whole")
    path = Path(out).resolve()
    if path == Path.cwd():
        raise UserError(f"--out {out} is the folder that you are in, which cannot be replaced; give another")
    if path.is_dir() and any(path.iterdir()):
        if not (path / FIGURES).is_file():
            raise UserError(f"--out {out} exists and holds no reconstructions; give another place")
        if foreign := sorted(each.name for each in path.iterdir() if each.name.partition("_tau")[0] not in OURS):
            raise UserError(f"--out {out} holds {foreign[0]}, which is no part of reconstructions; give another place")
        if not overwrite:
            raise UserError(f"--out {out} already exists; give another place, or --overwrite to replace it")
    elif path.exists() and not path.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    with filled(path, f"--out {out} cannot be written", overwrite) as folder:
        yield folder


def build_figures(
    evaluated: Mapping[str, Any], lpips_weights: str | None, device: torch.device, image_size: int | None = None
) -> tuple[dict[str, Figure], str | None]:
    """PSNR, SSIM, and a perceptual distance: LPIPS where VGG's weights can be had.

    Args:
        evaluated: the metrics of the run's evaluation, whose perceptual ones are taken if there are any.
        lpips_weights: VGG's weight file, if LPIPS is wanted with it.
        image_size: side of the images.

    Returns:
        The figures by name, and, when LPIPS was not to be had, a line about what takes its place.

    Raises:
        UserError: the given file is not VGG's weights.
    """
    said = None
    if lpips_weights:
        perceptual = build_metrics({"lpips": {"weights": lpips_weights}})
    else:
        wanted = {name: evaluated[name] for name in PERCEPTUAL if name in evaluated} or {"lpips": {}}
        perceptual, said = build_or_substitute(wanted, "lpips", image_size)
    built = build_metrics({"psnr": {}, "ssim": {}}) | perceptual
    return {name: metric.to(device).figure for name, metric in built.items()}, said  # type: ignore[misc]
