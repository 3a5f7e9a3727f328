"""From photographs that come in packages to generated pictures: both stages, in minutes.

Photographs become an image folder, shards, and a trained autoencoder; that is fine-tuned on handwritten digits, and a
diffusion transformer learns to write them in its latents. The demo runs the commands that a user types, stops the
first training part-way, goes on, and leaves everything in runs/demo. It is run from the project's folder, and needs the
packages of `pip install -e '.[demo]'`, but no connection and no GPU.
"""

import argparse
import csv
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
DIGITS, GENERATED = DATA / "digits", 200
TRAIN = ["composer", "train.py", "yamls/rae_demo.yaml"]
STOP_AFTER = 70
"""Steps before the first run is ended: a few past the first epoch's checkpoint."""


def prepare_data() -> None:
    """Image folders and shards below ``data/demo``, made anew."""
    from rae.plan.bench import digits, photographs

    shutil.rmtree(DATA, ignore_errors=True)
    photographs.make_image_folder(DATA / "images", train=1024, held_out=96)
    digits.make_image_folder(DIGITS / "images")
    for data in (DATA, DIGITS):
        for split in ("train", "eval"):
            _run(["python", "convert/imagefolder_to_mds.py", f"{data}/images/{split}", f"{data}/{split}"])


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
    reconstruct()
    half = time.perf_counter()
    generate()
    told = judge()
    ended = time.perf_counter()
    told["minutes"] = {"autoencoder": round((half - began) / 60, 2), "generator": round((ended - half) / 60, 2)}
    (RUN / "figures.json").write_text(json.dumps(told, indent=2) + "\n")
    reconstructed, generated = told["autoencoder"], told["generator"]
    _say(
        f"done in {(ended - began) / 60:.1f} minutes, of which {(half - began) / 60:.1f} for the autoencoder\n"
        f"  held-out photographs: PSNR {reconstructed['psnr']:.2f} dB, SSIM {reconstructed['ssim']:.3f}; "
        f"digits, after fine-tuning: {told['digits']['psnr']:.2f} dB\n"
        f"  a classifier of real digits reads {generated['recognised']:.1%} of {GENERATED} generated ones as the digit "
        f"that was asked for,\n  and {generated['recognised_real']:.1%} of real ones that neither saw\n\n"
        f"  {RUN}/reconstructions.png   held-out originals above their reconstructions\n"
        f"  {RUN}/generated.png         ten of each digit\n"
        f"  {RUN}/nearest.png           generated digits above the nearest that were learned\n"
        f"  {RUN}/curves.png, {RUN}/generator/curves.png   losses and metrics of both\n"
        f"  {RUN}/generated/index.html  all {GENERATED} generated digits\n"
        f"  {RUN}/figures.json; config.yaml, metrics.jsonl and checkpoints/ of each run"
    )


def reconstruct() -> None:
    """Stage 1: an autoencoder of photographs."""
    train_and_stop()
    _run(TRAIN)
    _run(["python", "-m", "rae", "curves", str(RUN)])
    _enlarge(sorted((RUN / "pictures").iterdir())[-1], RUN / "reconstructions.png", 2)


def generate() -> None:
    """Stage 2: the autoencoder fine-tuned on digits, and a generator of digits on its latents."""
    latents, autoencoder, generator = f"{DIGITS}/latents", f"{RUN}/autoencoder", f"{RUN}/generator"
    yaml = "yamls/rae_demo_digits.yaml"
    _run(["composer", "train.py", yaml])
    _run(["python", "convert/latents_to_mds.py", yaml, latents])
    _run(["python", "-m", "rae", "export", f"{RUN}/digits", autoencoder, "--stats", f"{latents}/stat.pt"])
    _run(["composer", "train.py", "yamls/ditdh_demo.yaml"])
    _run(["python", "-m", "rae", "curves", generator])
    _run(["python", "-m", "rae", "sample", generator, f"{RUN}/generated", "--num", str(GENERATED)])
    _enlarge(RUN / "generated/grid.png", RUN / "generated.png", 2)


def judge() -> dict[str, dict[str, float]]:
    """The figures of both stages; a picture of generated digits above the nearest learned ones."""
    from rae.plan.bench.digits import nearest, recognised

    with (RUN / "generated/labels.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    images = [Image.open(RUN / "generated" / row["file"]).convert("RGB") for row in rows]
    found, real = recognised(images, [int(row["label"]) for row in rows])
    shown = images[:: len(images) // 10][:10]
    pairs = Image.new("RGB", (10 * 66, 2 * 66), "white")
    for row, pictures in enumerate((shown, nearest(shown, DIGITS / "images/train"))):
        for column, picture in enumerate(pictures):
            pairs.paste(picture.resize((64, 64), Image.Resampling.BICUBIC), (66 * column, 66 * row))
    pairs.save(RUN / "nearest.png")
    runs = {"autoencoder": RUN, "digits": RUN / "digits", "generator": RUN / "generator"}
    told = {name: json.loads((run / "metrics.json").read_text())["eval"] for name, run in runs.items()}
    told["generator"] |= {"recognised": found, "recognised_real": real}
    return told


def _enlarge(picture: Path, out: Path, times: int) -> None:
    image = Image.open(picture)
    image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST).save(out)
