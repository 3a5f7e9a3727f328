"""Makes this folder: what a run left before the package was laid out anew. Run in a checkout of commit a424dc3:

    python -m tests.before.make

``data`` holds shards; ``one`` and ``sharded`` a checkpoint in mid-epoch, of one rank and of two FSDP ranks, and the
figures of the steps after it; ``rae``, ``published`` and ``diffusers`` an export of each format, with an image and
its reconstruction.
"""

import shutil
import sys
from pathlib import Path

import torch
from rae.conversion import write_shards
from rae.handover import export
from rae.images import list_images
from rae.parts import Options
from rae.sources import open_source
from safetensors.torch import save_file

from tests.conftest import TINY_DINO, launch, run, tiny_settings, write_images
from tests.test_exports import make_encoder, make_source

HERE = Path("tests/before")
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def settings(name: str) -> dict:
    made = tiny_settings(HERE / "data", Path("runs/before", name))
    made["model"]["encoder"] = {"dinov2": {"pretrained": "tests/golden/encoders/dinov2-tiny", "input_size": 56}}
    made["model"]["decoder"] = {"embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_dim": 48}
    made["algorithms"]["adversarial"] |= {
        "discriminator": {"dino": TINY_DINO | {"weights": "tests/golden/dino_tiny.pth", "blocks": [0]}},
        "discriminator_start": "1ba",
        "start": "2ba",
    }
    made["trainer"] |= {"max_duration": "3ep", "save_interval": "3ba"}
    if name == "sharded":
        made |= {"parallelism": "fsdp", "fsdp": {"state_dict_type": "sharded"}}
    return made


def main() -> None:
    for split, count in (("train", 16), ("eval", 4)):
        source = write_images(Path("runs/before-images", split, "a"), count, size=40).parent
        shutil.rmtree(HERE / "data" / split, ignore_errors=True)
        write_shards(list_images(str(source)), Options(f"{HERE}/data/{split}", workers=1))
    for name, ranks in (("one", None), ("sharded", 2)):
        shutil.rmtree(Path("runs/before", name), ignore_errors=True)
        launch(settings(name), Path("runs/before-launch", name), ranks=ranks)
        shutil.rmtree(HERE / name, ignore_errors=True)
        checkpoint = Path("checkpoints/ep1-ba3")
        shutil.copytree(Path("runs/before", name) / checkpoint, HERE / name / checkpoint)
        shutil.copy(Path("runs/before", name, "metrics.jsonl"), HERE / name)
    for layout in ("rae", "published", "diffusers"):
        shutil.rmtree(HERE / layout, ignore_errors=True)
        if layout == "diffusers":
            source = make_source(make_encoder("dinov2", Path("runs/before-encoder")), False)
            export(source, str(HERE / layout), layout)
        else:
            words = ["--with-encoder"] if layout == "rae" else ["--format", layout]
            run(sys.executable, "-m", "rae", "export", "runs/before/one", str(HERE / layout), *words)
            source = open_source("runs/before/one")
        with torch.no_grad():
            save_file({"image": IMAGE, "recon": source.rae(IMAGE)}, HERE / f"{layout}.safetensors")


if __name__ == "__main__":
    main()
