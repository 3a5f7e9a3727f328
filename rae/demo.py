"""The demo: photographs that come in packages become an image folder, shards, and a trained autoencoder.

``python -m rae.demo`` runs it all through the commands that a user types, stops the training part-way, goes on,
and leaves everything in ``runs/demo``. ``--data-only`` stops before the training.
"""

import argparse
import inspect
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

DATA, RUN = Path("data/demo"), Path("runs/demo")
TRAIN = ["composer", "train.py", "yamls/rae_demo.yaml"]
STOP_AFTER = 70
"""Steps before the first run is ended: a few past the first epoch's checkpoint."""

HELD_OUT = (0.35, 0.6)
"""The part of each photograph's width that no training crop touches."""


def photographs() -> dict[str, Image.Image]:
    """Colour photographs shipped inside scikit-image, scikit-learn and matplotlib, by name."""
    import matplotlib
    import skimage.data
    import sklearn.datasets

    skimage_folder = Path(inspect.getfile(skimage.data)).parent
    found = {
        name: skimage_folder / name
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    }
    sklearn_folder = Path(inspect.getfile(sklearn.datasets)).parent / "images"
    found |= {name: sklearn_folder / name for name in ("china.jpg", "flower.jpg")}
    found["grace_hopper.jpg"] = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    return {Path(name).stem: Image.open(path).convert("RGB") for name, path in found.items()}


def make_image_folder(root: Path, train: int, held_out: int, size: int = 72, seed: int = 0) -> None:
    """Write ``root/train/<photograph>/…`` and ``root/eval/<photograph>/…``: random crops of ``size`` × ``size``.

    Held-out crops come from a strip in each photograph's middle, training crops from beside it, where they may
    overlap: no pixel of a held-out crop is trained on.

    Args:
        train, held_out: crops in all.
    """
    rng = np.random.default_rng(seed)
    photos = sorted(photographs().items())
    for split, count in (("train", train), ("eval", held_out)):
        for i in range(count):
            name, photo = photos[i % len(photos)]
            start, end = (round(photo.width * share) for share in HELD_OUT)
            beside = [(0, start), (end, photo.width)]
            left, right = beside[int(rng.integers(2))] if split == "train" else (start, end)
            widest = min(right - left, photo.height, 224)
            side = int(rng.integers(min(size, widest), widest + 1))
            x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, photo.height - side + 1))
            crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(folder / f"{i:05d}.jpg", quality=95)


def prepare_data() -> None:
    """Image folders and shards below ``data/demo``, made anew."""
    shutil.rmtree(DATA, ignore_errors=True)
    make_image_folder(DATA / "images", train=1024, held_out=96)
    for split in ("train", "eval"):
        _run(["python", "convert/imagefolder_to_mds.py", f"{DATA}/images/{split}", f"{DATA}/{split}"])


def train_and_stop() -> None:
    """Start training, and end it as a preempted machine would once it has a checkpoint."""
    _say(f"$ {' '.join(TRAIN)}      (to be stopped after step {STOP_AFTER})")
    process = subprocess.Popen(_command(TRAIN), stderr=subprocess.PIPE, text=True)
    stopping = threading.Event()

    def relay() -> None:
        for line in process.stderr or ():
            if not stopping.is_set():  # after that it is the launcher's account of its own end
                print(line, end="", file=sys.stderr, flush=True)

    threading.Thread(target=relay, daemon=True).start()
    try:
        while process.poll() is None and _steps_done() < STOP_AFTER:
            time.sleep(0.2)
    finally:
        stopping.set()
        process.terminate()
        process.wait()
    if _steps_done() < STOP_AFTER:
        sys.exit("error: the training ended before it was stopped")
    _say(f"stopped after step {_steps_done()}; the same command goes on from the checkpoint")


def _command(shown: list[str]) -> list[str]:
    """The command as it is typed in an activated environment, with that environment's own programs."""
    return [str(Path(sys.executable).parent / shown[0]), *shown[1:]]


def _steps_done() -> int:
    try:
        return json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])["batch"]
    except (OSError, IndexError, ValueError):
        return 0


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _run(command: list[str]) -> None:
    _say(f"$ {' '.join(command)}")
    if subprocess.run(_command(command)).returncode:
        sys.exit(f"error: {' '.join(command)} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small autoencoder on photographs, in minutes on 2 CPU cores.")
    parser.add_argument("--data-only", action="store_true", help="make data/demo and stop")
    data_only = parser.parse_args().data_only
    if not Path("yamls/rae_demo.yaml").exists():
        sys.exit("error: run the demo from the project's folder")
    began = time.perf_counter()
    prepare_data()
    if data_only:
        return
    shutil.rmtree(RUN, ignore_errors=True)
    train_and_stop()
    _run(TRAIN)
    _run(["python", "-m", "rae", "curves", str(RUN)])
    last = Image.open(sorted((RUN / "pictures").iterdir())[-1])
    last.resize((2 * last.width, 2 * last.height), Image.Resampling.NEAREST).save(RUN / "reconstructions.png")
    metrics = json.loads((RUN / "metrics.json").read_text())["eval"]
    _say(
        f"done in {(time.perf_counter() - began) / 60:.1f} minutes: PSNR {metrics['psnr']:.2f} dB, "
        f"SSIM {metrics['ssim']:.3f} on held-out crops\n"
        f"  {RUN}/reconstructions.png   held-out originals above their reconstructions\n"
        f"  {RUN}/curves.png            losses and metrics\n"
        f"  {RUN}/metrics.json, metrics.jsonl, config.yaml, checkpoints/, pictures/, tensorboard/"
    )


if __name__ == "__main__":
    main()
