"""Precomputed latents: exact statistics, the encoder's own values, several ranks, resuming, and training from them."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from streaming import MDSWriter

from rae.autoencoder.rae import to_float
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import Config
from rae.data.dataset import open_dataset
from rae.data.decoding import eval_transform
from rae.data.loaders import eval_loader
from rae.exchange.latents import Moments
from tests.conftest import TINY, tiny_settings, write_images
from tests.forks import run_ranks
from tests.test_convert import convert

LATENTS = "convert/latents_to_mds.py"


@pytest.fixture(scope="module")
def settings(shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    settings = tiny_settings(shards, root / "run")
    (root / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return root / "run.yaml"


@pytest.fixture(scope="module")
def whole(settings):
    """The latents of 40 images, in parts of three, by one process."""
    convert(LATENTS, settings, settings.parent / "out", "--with-images")
    return settings.parent / "out"


def test_a_large_label_takes_no_memory(settings, tmp_path):
    picture = write_images(tmp_path / "images", 1) / "000.png"
    with MDSWriter(out=str(tmp_path / "data"), columns={"image": "bytes", "label": "int"}) as writer:
        for label in (10**15, -1):
            writer.write({"image": picture.read_bytes(), "label": label})
    convert(LATENTS, settings, tmp_path / "out", f"data.train.path={tmp_path / 'data'}")
    summary = json.loads((tmp_path / "out/dataset.json").read_text())
    assert (summary["classes"], summary["counts"], summary["unlabelled"]) == ([], [], 2)


def read(folder):
    data = open_dataset(str(folder), "", transform=eval_transform(64), seed=0)
    return [data[i] for i in range(data.size)]


def encoded(shards):
    encoder = build("encoder", TINY["dinov2"], "encoder").eval()
    data = open_dataset(str(shards / "train"), "", transform=eval_transform(64), seed=0)
    samples = [data[i] for i in range(data.size)]
    with torch.no_grad():
        tokens = encoder(to_float(torch.stack([sample["image"] for sample in samples])))
    return samples, tokens.transpose(1, 2).reshape(40, -1, encoder.grid, encoder.grid)


def test_stored_latents_are_the_encoders_with_labels_and_images(shards, whole):
    samples, latent = encoded(shards)
    for stored, sample, expected in zip(read(whole), samples, latent, strict=True):
        assert stored["latent"].dtype == torch.bfloat16
        assert torch.allclose(stored["latent"].float(), expected, rtol=2**-8, atol=1e-6)
        assert stored["label"] == sample["label"]
        assert torch.equal(stored["image"], sample["image"])
    stats = torch.load(whole / "stat.pt")
    assert torch.allclose(stats["mean"], latent.mean(0), atol=1e-6)
    assert torch.allclose(stats["var"], latent.var(0, unbiased=False), atol=1e-6)
    summary = json.loads((whole / "dataset.json").read_text())
    assert (summary["images"], summary["counts"]) == (40, [20, 20])


def test_moments_do_not_depend_on_division_or_order():
    latent = torch.from_numpy(np.random.default_rng(0).normal(1000.0, 0.01, (97, 3, 2, 2)))
    results = []
    for size, order in ((1, slice(None)), (13, slice(None, None, -1)), (97, slice(None))):
        parts = [Moments(), Moments(), Moments()]
        for i, batch in enumerate(torch.from_numpy(latent.numpy()[order].copy()).split(size)):
            parts[i % 3].add(batch)
        merged = Moments()
        for part in parts:
            merged.merge(part)
        results.append(merged)
    for moments in results:
        assert moments.count == 97
        assert torch.allclose(moments.m2 / 97, latent.var(0, unbiased=False), rtol=1e-8)
        assert torch.allclose(moments.mean, latent.mean(0), rtol=1e-14)


def test_two_ranks_and_other_batches_give_the_same(settings, whole):
    out = settings.parent / "ranks"
    run_ranks(settings.parent / "launch", LATENTS, str(settings), str(out), "--with-images", "--batch-size=2")
    one, two = (torch.load(folder / "stat.pt") for folder in (whole, out))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in ("mean", "var"))
    for a, b in zip(read(whole), read(out), strict=True):
        assert torch.allclose(a["latent"].float(), b["latent"].float(), rtol=2**-7, atol=1e-6)
        assert a["label"] == b["label"]


def test_an_interrupted_encoding_goes_on(settings, whole, monkeypatch):
    import rae.exchange.latents

    out, real, seen = settings.parent / "resumed", rae.exchange.latents._write_part, []

    def stop_at_the_fourth(job, part, *arguments):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(part)
        real(job, part, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rae.exchange.latents, "_write_part", stop_at_the_fourth)
        assert convert(LATENTS, settings, out, "--with-images", check=False).returncode == 130
    assert not out.exists()
    refused = convert(LATENTS, settings, out, "--dtype=fp16", check=False)
    assert "unfinished conversion" in refused.stderr
    written = {path.name: path.stat().st_mtime_ns for path in out.with_name("resumed.partial").glob("*.mds")}
    assert len(written) == 3
    convert(LATENTS, settings, out, "--with-images")
    assert all((out / name).stat().st_mtime_ns == when for name, when in written.items())
    assert (
        json.loads((out / "dataset.json").read_text())["content_hash"]
        == (json.loads((whole / "dataset.json").read_text())["content_hash"])
    )
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".mds") == ["dataset.json", "index.json", "stat.pt"]


def test_a_decoder_trains_from_latents(settings, shards, whole):
    from rae.training.build import build_model
    from rae.training.run import train

    config = Config.model_validate(OmegaConf.to_container(OmegaConf.load(settings)))
    model = build_model(config).eval()
    (batch,) = eval_loader(open_dataset(str(whole), "", transform=eval_transform(64), seed=0), 40, 0, 2, None, 0, 1)
    fast, slow = model(batch), model({"image": batch["image"]})
    assert torch.allclose(fast["latent"], slow["latent"], rtol=2**-8, atol=1e-6)
    assert torch.allclose(fast["recon"], slow["recon"], atol=0.02)
    plain = {"algorithms": {}, "run_dir": str(settings.parent / "fast"), "run_name": "fast"}
    data = config.data.model_dump() | {"train": {"path": str(whole)}}
    trainer = train(Config.model_validate(config.model_dump() | plain | {"data": data}))
    assert int(trainer.state.timestamp.batch) == 10
    convert(LATENTS, settings, settings.parent / "bare", "--dtype=fp16")
    assert read(settings.parent / "bare")[0]["latent"].dtype == torch.float16
    data["train"]["path"] = str(settings.parent / "bare")
    with pytest.raises(UserError, match="latents without images"):
        train(Config.model_validate(config.model_dump() | plain | {"data": data}))
