"""Seconds from a command to its first step, through train.py and in a plain script; seconds to print help."""

import subprocess
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from rae.plan.bench.measure import Seconds
from rae.plan.bench.step import settings

# What a script of one's own would do: the same networks and losses, one step, no Trainer, no data set.
PLAIN = """
import sys
import torch
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.encoders.dinov2 import DINOv2
from rae.autoencoder.losses import LPIPS
encoder = DINOv2(sys.argv[1] + "/encoder").eval().requires_grad_(False)
decoder = Decoder(384, 256, embed_dim=512, depth=8, num_heads=8, mlp_dim=2048)
perceptual = LPIPS("vgg", sys.argv[1] + "/vgg16.pth")
optimizer = torch.optim.AdamW(decoder.parameters())
image = torch.rand(1, 3, 256, 256)
recon, _ = decoder(encoder(image).transpose(1, 2).reshape(1, 384, 16, 16))
((recon - image).abs().mean() + perceptual(recon, image)).backward()
optimizer.step()
print("step 1 ", flush=True)
"""


def start_up(folder: Path) -> Seconds:
    """Seconds until the first step is done, and until help is printed, in two turns."""
    config = folder / "startup.yaml"
    wanted = settings(folder, 1, 1)
    wanted["loggers"] = {"console": {}}
    wanted["algorithms"] = {"perceptual": wanted["algorithms"]["perceptual"]}
    OmegaConf.save(OmegaConf.create(wanted), config)
    commands = {
        "train.py, to the first step": ([sys.executable, "train.py", str(config)], "step 1 "),
        "plain script, to the first step": ([sys.executable, "-c", PLAIN, str(folder)], "step 1 "),
        "train.py --help": ([sys.executable, "train.py", "--help"], "show this help"),
        "python -m rae --help": ([sys.executable, "-m", "rae", "--help"], "show this help"),
    }
    seconds: Seconds = {name: [] for name in commands}
    for _ in range(2):
        for name, (command, line) in commands.items():
            seconds[name].append(_seconds_to(command, line))
    return seconds


def _seconds_to(command: list[str], line: str) -> float:
    began, said = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for each in process.stdout:
            said.append(each)
            if line in each:
                process.kill()
                return time.perf_counter() - began
    raise RuntimeError(f"{command[:3]} ended without {line!r}: {''.join(said[-5:])}")
