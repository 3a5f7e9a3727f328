"""The benchmark compares like with like: the textbook's step gives the numbers that training gives."""

import math
import shutil
import warnings

import pytest
import torch

from rae.plan.bench.__main__ import goals
from rae.plan.bench.step import Beside, trainer_beside, write_weights


@pytest.fixture(scope="module")
def beside(shards, tmp_path_factory) -> Beside:
    """A step in each phase, through the Trainer, bare, and as the textbook has it, on small images."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(shards / "train", folder / "shards")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_weights(folder)
        return trainer_beside(folder, batch=1, phase_steps=1, image_size=64, depth=1)


def test_all_sides_give_the_same_losses(beside):
    names = {"l1", "lpips", "total", "gan", "discriminator/loss"}
    assert beside.deviation.keys() == {"bare", "textbook"}
    assert beside.deviation["bare"] == dict.fromkeys(names, 0.0)
    assert beside.deviation["textbook"].keys() == names
    assert max(beside.deviation["textbook"].values()) < 1e-4


def test_a_figure_that_is_missing_or_not_a_number_is_no_agreement():
    beside = Beside(1)
    beside.logged = {"loss/train/l1": 0.2}
    beside._compare("textbook", {"l1": torch.tensor(0.2)})
    beside._compare("textbook", {"l1": torch.tensor(math.nan)})
    beside._compare("textbook", {"l1": torch.tensor(0.2)})
    assert math.isnan(beside.deviation["textbook"]["l1"])
    found = goals({"step": {"ratios": {}, "deviation": {"bare": {"l1": 0.0}, **beside.deviation}}})
    assert not found["largest deviation of a loss"]["holds"]
    with pytest.raises(KeyError):
        beside._compare("textbook", {"misspelt": torch.tensor(0.2)})
