"""Photographs that come in packages become an image folder, shards, and a trained autoencoder, in minutes.

It runs the commands that a user types, stops the training part-way, goes on, and leaves everything in runs/demo. It is
run from the project's folder, and needs the packages of `pip install -e '.[demo]'`, but no connection and no GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from PIL import Image

from rae.config.errors import UserError

DATA, RUN = Path("data/demo"), Path("runs/demo")
TRAIN = ["composer", "train.py", "yamls/rae_demo.yaml"]
STOP_AFTER = 70
"""Steps before the first run is ended: a few past the first epoch's checkpoint."""


def prepare_data() -> None:
    """Image folders and shards below ``data/demo``, made anew."""
    from rae.plan.bench.photographs import make_image_folder

    shutil.rmtree(DATA, ignore_errors=True)
    make_image_folder(DATA / "images", train=1024, held_out=96)
    for split in ("train", "eval"):
        _run(["python", "convert/imagefolder_to_mds.py", f"{DATA}/images/{split}", f"{DATA}/{split}"])


def train_and_stop() -> None:
    """Start training, and end it as a preempted machine would once it has a checkpoint."""
    _say(f"$ {' '.join(TRAIN)}      (to be stopped after step {STOP_AFTER})")
    process = subprocess.Popen(_command(TRAIN), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopping = threading.Event()

    def relay() -> None:
        for line in process.stdout or ():
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
        raise UserError("the training ended before it was stopped")
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
        raise UserError(f"{' '.join(command)} failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-only", action="store_true", help="make data/demo and stop")


def run(arguments: argparse.Namespace) -> None:
    if not Path("yamls/rae_demo.yaml").exists():
        raise UserError("run the demo from the project's folder, which holds yamls/rae_demo.yaml")
    began = time.perf_counter()
    prepare_data()
    if arguments.data_only:
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
