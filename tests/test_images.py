"""Evaluation images from shards, folders, single files and buckets: the same crops, with names; faults are named."""

import pytest
import torch

from rae.config.errors import UserError
from rae.data.decoding import eval_transform
from rae.data.images import open_images
from tests.conftest import write_images
from tests.s3 import BUCKET


def everything(images):
    return [images[i] for i in range(len(images))]


def by_name(images):
    return {item["name"]: item["image"] for item in everything(images)}


def test_shards_and_folders_give_the_same_crops(shards):
    from_shards, from_files = (open_images(str(shards / name), 48) for name in ("eval", "images-eval"))
    crops, names = by_name(from_shards), [item["name"] for item in everything(from_files)]
    assert names == sorted(names) and len(names) == 12 and names[0] == "a/000.png"
    assert all(torch.equal(crops[name], image) for name, image in by_name(from_files).items())
    data = (shards / "images-eval/b/003.png").read_bytes()
    assert torch.equal(crops["b/003.png"], eval_transform(48)(data, None))
    assert crops["b/003.png"].dtype == torch.uint8 and crops["b/003.png"].shape == (3, 48, 48)
    assert {item["name"][0]: item["label"] for item in everything(from_files)} == {"a": 0, "b": 1}
    assert [item["index"] for item in everything(open_images(str(shards / "eval"), 48, limit=5))] == list(range(5))
    (one,) = everything(open_images(str(shards / "images-eval/b/003.png"), 48))
    assert torch.equal(one["image"], crops["b/003.png"]) and one["name"] == "003.png"


def test_a_bucket_gives_the_same(shards, s3, monkeypatch):
    for key, value in s3.env().items():
        monkeypatch.setenv(key, value)
    for name in ("images-eval", "eval"):
        for file in (path for path in (shards / name).rglob("*") if path.is_file()):
            s3.client().upload_file(str(file), BUCKET, f"images/{name}/{file.relative_to(shards / name)}")
    local, url = by_name(open_images(str(shards / "eval"), 48)), f"s3://{BUCKET}/images"
    for place in ("images-eval", "eval"):
        remote = by_name(open_images(f"{url}/{place}", 48, limit=3))
        assert len(remote) == 3 and all(torch.equal(local[name], image) for name, image in remote.items())
    (one,) = everything(open_images(f"{url}/images-eval/a/001.png", 48))
    assert torch.equal(one["image"], local["a/001.png"])
    with pytest.raises(UserError, match="there are no images below"):
        open_images(f"{url}/nothing", 48)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("absent", "there is no folder 'absent'"),
        ("absent.png", "there is no image 'absent.png'"),
        ("notes.txt", "'notes.txt' is no image of a known format"),
        ("empty", "there are no images below 'empty'"),
        ("sets", "holds some; give one: sets/val"),
        ("run", "'run' is a run's folder"),
        ("", "there is no folder ''"),
        ("s3x://bucket/a", "no known kind of storage"),
    ],
)
def test_what_holds_no_images_is_said(path, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "run/pictures", 1)
    (tmp_path / "run/config.yaml").write_text("run_name: mine\nrun_dir: run\n")
    (tmp_path / "sets/val").mkdir(parents=True)
    (tmp_path / "sets/val/index.json").write_text("{}")
    with pytest.raises(UserError, match=told):
        open_images(path, 48)


def test_an_image_that_does_not_decode_is_named(tmp_path):
    write_images(tmp_path / "in/sub", 2)
    (tmp_path / "in/sub/001.png").write_bytes(b"no image")
    images = open_images(str(tmp_path / "in"), 48)
    assert images[0]["name"] == "sub/000.png"
    with pytest.raises(UserError, match=r"sub/001.png of .*/in cannot be used: it is no image of a known format"):
        images[1]
