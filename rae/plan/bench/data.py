"""Speed, size and memory of data loading and conversion, beside what else is used: ``python -m rae.plan.bench.data``.

Everything reads the same photographs, about 500 × 375 as ImageNet's are. Loading is measured in one process, per second
of processor time, so that other work on the machine counts little, and the ways of loading take turns, so that a
machine that slows down slows all of them. Figures are medians over the turns.
"""

import argparse
import concurrent.futures
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from rae.data import conversion
from rae.data.dataset import open_dataset
from rae.data.decoding import train_transform
from rae.data.listing import list_images
from rae.data.loaders import train_loader
from rae.data.parts import Options
from rae.plan.bench.measure import console
from rae.plan.bench.photographs import photographs
from rae.survival.interrupts import run_interruptibly

SIZE, SHORT, BATCH = 256, 384, 32
REFERENCE = "ImageFolder + Pillow"


def make_photographs(root: Path, count: int) -> None:
    """Write ``count`` crops of photographs as ``root/<photograph>/…jpg``, 500 × 375, JPEG quality 90."""
    rng = np.random.default_rng(0)
    photos = sorted(photographs().items())
    for i in range(count):
        name, photo = photos[i % len(photos)]
        widest = min(photo.width, photo.height * 4 // 3)
        width = int(rng.integers(min(500, widest), widest + 1))
        height = width * 3 // 4
        x, y = int(rng.integers(0, photo.width - width + 1)), int(rng.integers(0, photo.height - height + 1))
        crop = photo.crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
        (root / name).mkdir(parents=True, exist_ok=True)
        crop.save(root / name / f"{i:05d}.jpg", quality=90)


def reference_transform() -> Callable[[Image.Image], torch.Tensor]:
    """Pillow's bicubic resize of the short side, a random crop, and a float tensor."""
    resize = transforms.Resize(SHORT, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.RandomCrop(SIZE), transforms.ToTensor()])


def image_folder(folder: Path) -> DataLoader:
    return DataLoader(ImageFolder(str(folder / "images"), reference_transform()), BATCH, shuffle=True)


def ours(name: str) -> Callable[[Path], DataLoader]:
    """Our loader on ``resized`` or ``original`` shards."""

    def build(folder: Path) -> DataLoader:
        dataset = open_dataset(
            str(folder / name), "", transform=train_transform(SIZE, SHORT), seed=0, shuffle=True, batch_size=BATCH
        )
        return train_loader(dataset, BATCH, 0, 2)

    return build


def hugging_face(folder: Path) -> DataLoader:
    import datasets

    transform = reference_transform()
    data = datasets.load_from_disk(str(folder / "hf"))
    data.set_transform(lambda rows: {"image": [transform(image.convert("RGB")) for image in rows["image"]]})
    return DataLoader(data, BATCH, shuffle=True)


def write_hugging_face(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    files = [str(path) for path in (folder / "images").rglob("*.jpg")]
    data = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    data.map(lambda row: row, features=data.features).save_to_disk(folder / "hf")


def webdataset(folder: Path) -> Iterable[Any]:
    import webdataset as wds

    transform = reference_transform()
    data = wds.WebDataset(str(folder / "wds/000000.tar"), shardshuffle=False, empty_check=False).shuffle(100)
    return DataLoader(data.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform), BATCH)


def write_webdataset(folder: Path) -> None:
    import webdataset as wds

    (folder / "wds").mkdir()
    with wds.TarWriter(str(folder / "wds/000000.tar")) as writer:
        for i, path in enumerate((folder / "images").rglob("*.jpg")):
            writer.write({"__key__": f"{i:06d}", "jpg": path.read_bytes(), "cls": 0})


def litdata(folder: Path) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    transform = reference_transform()

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return transform(Image.open(io.BytesIO(super().__getitem__(index))).convert("RGB"))

    return StreamingDataLoader(Images(str(folder / "lit"), shuffle=True), batch_size=BATCH, num_workers=0)


def write_litdata(folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    (folder / "lit").mkdir()
    writer = BinaryWriter(str(folder / "lit"), chunk_bytes="64MB")
    for i, path in enumerate((folder / "images").rglob("*.jpg")):
        writer[i] = path.read_bytes()
    writer.done()
    writer.merge()


def write_shards(name: str, resize: int | None = None, workers: int = 1) -> Callable[[Path], None]:
    """Our conversion."""

    def write(folder: Path) -> None:
        options = Options(str(folder / name), resize=resize, workers=workers, overwrite=True)
        conversion.write_shards(list_images(str(folder / "images")), options)

    return write


# name -> (its folder, how it is written, how it is loaded, the package that it needs)
WAYS: dict[str, tuple[str, Callable[[Path], Any] | None, Callable[[Path], Iterable[Any]], str]] = {
    "rae, resized shards": ("resized", write_shards("resized", SHORT), ours("resized"), "rae"),
    "rae, original shards": ("original", write_shards("original"), ours("original"), "rae"),
    REFERENCE: ("images", None, image_folder, "torchvision"),
    "datasets + Pillow": ("hf", write_hugging_face, hugging_face, "datasets"),
    "webdataset + Pillow": ("wds", write_webdataset, webdataset, "webdataset"),
    "litdata + Pillow": ("lit", write_litdata, litdata, "litdata"),
}


def _stored(folder: Path) -> Iterator[torch.Tensor]:
    images = open_dataset(str(folder), "", transform=train_transform(SIZE, SHORT), seed=0)
    for i in range(images.size):
        shard, place = images.spanner[i]
        yield torch.frombuffer(bytearray(images.shards[shard][place]["image"]), dtype=torch.uint8)


def _decode(stored: list[torch.Tensor]) -> float:
    began = time.process_time()
    for buffer in stored:
        decode_jpeg(buffer, mode=ImageReadMode.RGB)
    return len(stored) / (time.process_time() - began)


def _epoch(loader: Iterable[Any]) -> float:
    began, seen = time.process_time(), 0
    for batch in loader:
        image = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch
        seen += len(image)
    return seen / (time.process_time() - began)


def peak_memory(way: str, folder: Path) -> float:
    """MB that a process of its own takes at most to load an epoch; its imports are the greater part."""
    code = (  # Linux's own high-water mark: what getrusage says includes the process that started this one
        "from pathlib import Path; from rae.plan.bench.data import WAYS, _epoch, torch; torch.set_num_threads(1);"
        f"_epoch(WAYS[{way!r}][2](Path({str(folder)!r})));"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) / 1024


def _encode_all(arguments: tuple[list[str], Options]) -> int:
    torch.set_num_threads(1)
    return sum(bool(conversion.encode(Path(path).read_bytes(), arguments[1])) for path in arguments[0])


def _rates(count: int, work: Callable[[], Any]) -> tuple[float, float]:
    """Images a second, and a second of processor time of this process and those that it starts and ends."""
    began, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return count / (time.perf_counter() - began), count / (sum(os.times()[:4]) - before)


def codec_rates(folder: Path, processes: int) -> tuple[float, float]:
    """See :func:`_rates`: decoding, resizing and encoding alone, in so many processes."""
    paths = [str(path) for path in (folder / "images").rglob("*.jpg")]
    parts = [(paths[i::processes], Options("", resize=SHORT)) for i in range(processes)]

    def work() -> None:
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            list(pool.map(_encode_all, parts))

    return _rates(len(paths), work)


def conversion_rates(folder: Path, workers: int) -> tuple[float, float]:
    """See :func:`_rates`: the whole conversion, from listing the folder to the index."""
    count = len(list((folder / "images").rglob("*.jpg")))
    return _rates(count, lambda: write_shards("rate", SHORT, workers)(folder))


def bench(folder: Path, count: int, turns: int) -> dict[str, Any]:
    """Make the data and measure; returns every figure."""
    make_photographs(folder / "images", count)
    ways = {name: way for name, way in WAYS.items() if importlib.util.find_spec(way[3])}
    rows: dict[str, dict[str, Any]] = {name: {} for name in ways}
    for name, (place, write, _, _) in ways.items():
        began = time.perf_counter()
        if write is not None:
            write(folder)
        rows[name]["converted_s"] = count / (time.perf_counter() - began) if write else None
        rows[name]["mb"] = sum(p.stat().st_size for p in (folder / place).rglob("*") if p.is_file()) / 1e6
    torch.set_num_threads(1)
    loaders = {name: way[2](folder) for name, way in ways.items()}
    bare = {name: list(_stored(folder / ways[name][0])) for name in ways if name.startswith("rae")}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in bare}
    for turn in range(turns + 1):
        for name, loader in loaders.items():
            before = _decode(bare[name]) if name in bare else 0.0
            speed = _epoch(loader)
            if turn:  # the first warms the page cache
                speeds[name].append(speed)
            if turn and name in bare:
                shares[name].append(speed / ((before + _decode(bare[name])) / 2))
    for name in ways:
        rows[name]["images_s"] = statistics.median(speeds[name])
        rows[name]["share"] = statistics.median(shares[name]) if name in bare else None
        rows[name]["peak_mb"] = peak_memory(name, folder)
    workers = sorted({1, min(2, os.cpu_count() or 1)})
    rates = [{w: (*conversion_rates(folder, w), *codec_rates(folder, w)) for w in workers} for _ in range(turns)]
    medians = {w: [statistics.median(rate[w][i] for rate in rates) for i in range(4)] for w in workers}
    return {"loading": rows, "conversion": medians}


def show(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    rows = figures["loading"]
    table = Table(
        "", "images/s", "× reference", "of bare decode", "converted/s", "MB on disk", "peak MB", title="one core"
    )
    for name, row in rows.items():
        speed = (f"{row['images_s']:,.0f}", f"{row['images_s'] / rows[REFERENCE]['images_s']:.2f}")
        share = f"{row['share']:.2f}" if row["share"] else ""
        converted = f"{row['converted_s']:,.0f}" if row["converted_s"] else ""
        table.add_row(name, *speed, share, converted, f"{row['mb']:.1f}", f"{row['peak_mb']:.0f}")
    console.print(table)
    table = Table(
        *("processes", "images/s", "× one", "a CPU second", "codec's images/s", "× one", "a CPU second", "of codec"),
        title=f"conversion with --resize {SHORT}; the codec alone: decode, resize, encode",
    )
    one = figures["conversion"][1]
    for workers, (rate, per_cpu, codec, codec_per_cpu) in figures["conversion"].items():
        whole = (f"{rate:,.0f}", f"{rate / one[0]:.2f}", f"{per_cpu:,.0f}")
        alone = (f"{codec:,.0f}", f"{codec / one[2]:.2f}", f"{codec_per_cpu:,.0f}")
        table.add_row(str(workers), *whole, *alone, f"{per_cpu / codec_per_cpu:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800, help="photographs (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rae-bench-"))
    try:
        figures = bench(folder, arguments.images, arguments.turns)
    finally:
        shutil.rmtree(folder)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_interruptibly(main)
