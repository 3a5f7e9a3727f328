"""Each adapter is still needed: when a newer release makes one superfluous, it is to go."""

import inspect

import pytest
from composer.loggers import WandBLogger
from transformers import SiglipVisionConfig, SiglipVisionModel
from wandb.sdk.wandb_run import Run

from tests.forks import run_ranks


def test_composers_wandb_logger_asks_for_what_wandb_no_longer_has():
    assert "get_url()" in inspect.getsource(WandBLogger.init)
    assert "wandb_run" in inspect.getsourcefile(Run)
    assert "get_url" not in inspect.getsource(Run)


def test_diffusers_asks_for_siglip_as_it_was():
    """What tests/diffusers_reads.py mends, and what rae.exchange.diffusers_format names SigLIP's weights for."""
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    model = SiglipVisionModel(SiglipVisionConfig(**sizes))
    with pytest.raises(AttributeError, match="vision_model"):
        model.vision_model  # noqa: B018
    from diffusers.models.autoencoders import autoencoder_rae

    assert "model.vision_model.post_layernorm" in inspect.getsource(autoencoder_rae)


OPEN_WITH_ANOTHER_LAUNCH_ENDING = """
import os, sys, tempfile
import torch.distributed as dist
from rae.data.dataset import ImageDataset
from rae.data.decoding import eval_transform
from rae.data.dataset import open_stream
from rae.survival.processes import join_ranks, opening

dist.init_process_group("gloo")
folder, here = sys.argv[1:]
# A lock that only one rank still sees stands for another launch that ends between the looks of two.
tempfile.tempdir = os.path.join(here, os.environ["RANK"])
os.makedirs(tempfile.tempdir)
if os.environ["RANK"] == "0":
    open(os.path.join(tempfile.tempdir, "000000_barrier_filelock"), "w").close()
dist.barrier()
with opening([folder], "cannot open"):
    data = ImageDataset(streams=[open_stream(folder, None)], transform=eval_transform(64), seed=0)
print(len(data), data._shm_prefix_int)
"""


def test_ranks_number_streamings_memory_alike_when_another_launch_ends(shards, tmp_path):
    (tmp_path / "script.py").write_text(OPEN_WITH_ANOTHER_LAUNCH_ENDING)
    said = run_ranks(tmp_path, str(tmp_path / "script.py"), str(shards / "train"), str(tmp_path))
    numbers = [text.split()[-2:] for text in said]
    assert numbers[0] == numbers[1]
    assert numbers[0][0] == "20" and int(numbers[0][1]) > 0
