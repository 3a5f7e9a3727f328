"""The conversion commands: what is on disk after them, and what they say when something is wrong."""

import contextlib
import io
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset

from tests.conftest import ROOT, write_images

FOLDER, HF = "convert/imagefolder_to_mds.py", "convert/hf_to_mds.py"


def convert(script, *arguments, check=True):
    """Run a conversion command in this process: the imports of a new one take longer than the conversion."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    done = subprocess.CompletedProcess(script, code, out.getvalue(), err.getvalue())
    if check:
        assert code == 0, done
    return done


def read(out: Path) -> list[dict]:
    return list(StreamingDataset(local=str(out), batch_size=1, shuffle=False))


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "images"
    write_images(root / "cats/big", 3, seed=1)
    write_images(root / "dogs", 4, seed=2)
    Image.open(root / "dogs/000.png").save(root / "dogs/photo.JPG", quality=90)
    Image.open(root / "dogs/001.png").save(root / "dogs/web.webp")
    (root / "dogs/notes.txt").write_text("not an image")
    (root / "größe 大").mkdir()
    Image.open(root / "dogs/000.png").save(root / "größe 大/ü.png")
    return root


def test_folder_to_shards_keeps_original_bytes(images, tmp_path):
    done = convert(FOLDER, images, tmp_path / "out", "--workers=2")
    assert "10 images, 3 classes" in done.stdout
    samples = read(tmp_path / "out")
    assert len(samples) == 10
    summary = json.loads((tmp_path / "out/dataset.json").read_text())
    assert summary["classes"] == ["cats/big", "dogs", "größe 大"]
    assert summary["counts"] == [3, 6, 1]
    for sample in samples:
        assert sample["image"] == (images / sample["path"]).read_bytes()
        assert summary["classes"][sample["label"]] == Path(sample["path"]).parent.as_posix()


def test_order_is_shuffled_but_fixed_and_can_be_kept(images, tmp_path):
    for name, option in (("a", []), ("b", []), ("kept", ["--keep-order"])):
        convert(FOLDER, images, tmp_path / name, *option)
    order = {name: [s["path"] for s in read(tmp_path / name)] for name in ("a", "b", "kept")}
    assert order["a"] == order["b"]
    assert order["kept"] == sorted(order["kept"])
    assert order["a"] != order["kept"]
    assert sorted(order["a"]) == order["kept"]


def test_resize_shrinks_the_short_side_and_encodes(tmp_path):
    root = tmp_path / "images/c"
    root.mkdir(parents=True)
    array = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    Image.fromarray(array).save(root / "wide.png")
    Image.fromarray(array[:30, :40]).save(root / "small.jpg")
    Image.fromarray(array[..., 0]).save(root / "grey.png")
    convert(FOLDER, tmp_path / "images", tmp_path / "out", "--resize=45", "--quality=90")
    sizes = {}
    for sample in read(tmp_path / "out"):
        path = tmp_path / "stored"
        path.write_bytes(sample["image"])
        stored = Image.open(path)
        sizes[sample["path"]] = (stored.size, stored.format, stored.mode)
    assert sizes["c/wide.png"] == ((100, 45), "JPEG", "RGB")
    assert sizes["c/grey.png"] == ((100, 45), "JPEG", "RGB")
    assert sizes["c/small.jpg"] == ((40, 30), "JPEG", "RGB")


def test_unreadable_images_are_named_and_limited(images, tmp_path):
    whole = (images / "dogs/photo.JPG").read_bytes()
    (images / "dogs/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "dogs/empty.png").write_bytes(b"")
    refused = convert(FOLDER, images, tmp_path / "out", "--max-skipped=1", check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: 2 unreadable images, 1 allowed: ")
    assert "dogs/cut.jpg" in refused.stderr
    assert "dogs/empty.png" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))
    done = convert(FOLDER, images, tmp_path / "out", "--max-skipped=2")
    assert "left out 2 unreadable" in done.stdout
    skipped = json.loads((tmp_path / "out/dataset.json").read_text())["skipped"]
    assert {s["path"] for s in skipped} == {"dogs/cut.jpg", "dogs/empty.png"}
    assert len(read(tmp_path / "out")) == 10


def test_an_existing_output_is_not_overwritten_silently(images, tmp_path):
    convert(FOLDER, images / "dogs", tmp_path / "out")
    refused = convert(FOLDER, images, tmp_path / "out", check=False)
    assert refused.returncode == 2
    assert "already exists" in refused.stderr
    assert len(json.loads((tmp_path / "out/dataset.json").read_text())["counts"]) == 1
    convert(FOLDER, images, tmp_path / "out", "--overwrite")
    assert len(json.loads((tmp_path / "out/dataset.json").read_text())["counts"]) == 3


def test_overwriting_spares_what_is_no_data_set(images):
    before = sorted(images.rglob("*"))
    refused = convert(FOLDER, images, images, "--overwrite", check=False)
    assert refused.returncode == 2
    assert "is not an MDS data set" in refused.stderr
    assert sorted(images.rglob("*")) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(tmp_path, stop):
    root = tmp_path / "images/c"
    write_images(root, 1, size=2000)
    for i in range(300):
        (root / f"copy{i}.png").hardlink_to(root / "000.png")
    command = [
        sys.executable,
        FOLDER,
        str(tmp_path / "images"),
        str(tmp_path / "out"),
        "--workers=1",
        "--shard-size=1mb",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    staging = tmp_path / "out.partial"
    while process.poll() is None and not list(staging.glob("*.mds")):
        time.sleep(0.05)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    assert not (tmp_path / "out").exists()
    assert not (staging / "index.json").exists()
    if stop == signal.SIGINT:
        assert stderr.splitlines()[-1] == "interrupted: the data set is not finished"
        assert not staging.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder", "OUT"], "there is no folder '/no/such/folder'"),
        (["EMPTY", "OUT"], "there are no images below"),
        (["IMAGES", "OUT", "--quality=101"], "--quality must be between 1 and 100, not 101"),
        (["IMAGES", "OUT", "--resize=0"], "--resize must be between"),
        (["IMAGES", "OUT", "--workers=0"], "--workers must be between"),
        (["IMAGES", "OUT", "--shard-size=lots"], "--shard-size"),
        (["IMAGES", "OUT", "--compression=nozip"], "--compression"),
    ],
)
def test_wrong_input_is_one_line(images, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "IMAGES": images}
    done = convert(FOLDER, *(places.get(a, a) for a in arguments), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(images, tmp_path) -> Path:
    files = sorted(images.glob("dogs/*.png"))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    data = datasets.Dataset.from_dict({"img": [str(f) for f in files], "label": [0, 1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": data, "validation": data.select([1])}).save_to_disk(tmp_path / "saved")
    data.select([0, 1]).save_to_disk(tmp_path / "single")
    return tmp_path / "saved"


def test_hugging_face_split_to_shards(saved, images, tmp_path):
    convert(HF, saved, tmp_path / "out", "--split", "train", "--keep-order")
    samples = read(tmp_path / "out")
    assert [s["label"] for s in samples] == [0, 1, 0, 1]
    assert samples[2]["image"] == (images / "dogs/002.png").read_bytes()
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == ["x", "y"]
    convert(HF, tmp_path / "single", tmp_path / "single-out")
    assert len(read(tmp_path / "single-out")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SAVED"], "choose a split with --split: train, validation"),
        (["SAVED", "--split=test"], "no split 'test'; there are: train, validation"),
        (["SAVED", "--split=train", "--image-column=pixels"], "there is no column 'pixels'; there are: img, label"),
        (["IMAGES"], "was not made by save_to_disk"),
    ],
)
def test_wrong_hugging_face_input_is_one_line(saved, images, tmp_path, arguments, message):
    source = {"SAVED": saved, "IMAGES": images}[arguments[0]]
    done = convert(HF, source, tmp_path / "out", *arguments[1:], check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
