"""The conversion commands: what is on disk after them, and what they say when something is wrong."""

import contextlib
import io
import json
import os
import runpy
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter, StreamingDataset

from rae.survival.processes import one_at_a_time
from tests.conftest import PATIENCE, ROOT, files_of_at_most, write_images

FOLDER, HF, VERIFY = "convert/imagefolder_to_mds.py", "convert/hf_to_mds.py", "convert/verify_mds.py"


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
    with one_at_a_time("streaming"):
        data = StreamingDataset(local=str(out), batch_size=1, shuffle=False)
    return list(data)


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


def test_resize_brings_the_short_side_to_a_size_and_encodes(tmp_path):
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
    assert sizes["c/small.jpg"] == ((60, 45), "JPEG", "RGB")


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
def test_an_interrupted_conversion_goes_on_where_complete_shards_end(tmp_path, stop):
    root = tmp_path / "images/c"
    write_images(root, 1, size=600)
    for i in range(159):
        (root / f"copy{i}.png").hardlink_to(root / "000.png")
    command = [FOLDER, str(tmp_path / "images"), str(tmp_path / "out"), "--workers=1"]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    staging = tmp_path / "out.partial"
    while process.poll() is None and len(list(staging.glob("conversion/0*.json"))) < 3:
        time.sleep(0.02)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    assert not (tmp_path / "out").exists()
    assert not (staging / "index.json").exists()
    if stop == signal.SIGINT:
        assert stderr.splitlines()[-1] == "interrupted: the same command goes on where complete shards end"
    refused = convert(*command, "--resize=20", check=False)
    assert "unfinished conversion of other images or with other options" in refused.stderr
    done = sorted(path.stem for path in staging.glob("conversion/0*.json"))
    written = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.mds") if path.name[7:11] in done[0][1:5]}
    convert(*command)
    assert len(read(tmp_path / "out")) == 160
    assert not staging.exists()
    others = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".mds"}
    assert others == {"dataset.json", "index.json"}
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in written.items())
    convert(FOLDER, tmp_path / "images", tmp_path / "fresh", "--workers=2")
    hashes = [json.loads((tmp_path / out / "dataset.json").read_text())["content_hash"] for out in ("out", "fresh")]
    assert hashes[0] == hashes[1]


def test_val_fraction_and_given_splits(images, tmp_path):
    convert(FOLDER, images, tmp_path / "random", "--val-fraction=0.3")
    train, val = ({s["path"] for s in read(tmp_path / f"random/{name}")} for name in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    assert not train & val
    (tmp_path / "given").mkdir()
    (images / "cats").rename(tmp_path / "given/train")
    (images / "dogs").rename(tmp_path / "given/val")
    convert(FOLDER, tmp_path / "given", tmp_path / "split", "--splits=train,val")
    summaries = [json.loads((tmp_path / f"split/{name}/dataset.json").read_text()) for name in ("train", "val")]
    assert [s["classes"] for s in summaries] == [[".", "big"]] * 2
    assert [s["counts"] for s in summaries] == [[0, 3], [6, 0]]


def test_hashes_compression_and_shard_size_are_configurable(images, tmp_path):
    convert(FOLDER, images, tmp_path / "out", "--hashes=xxh64,sha1", "--compression=zstd", "--shard-size=8kb")
    index = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert len(index) > 2
    assert {tuple(sorted(shard["zip_data"]["hashes"])) for shard in index} == {("sha1", "xxh64")}
    assert all(shard["zip_data"]["basename"].endswith(".mds.zstd") for shard in index)
    assert convert(VERIFY, tmp_path / "out").stdout.endswith("10 samples are sound, 0 faults\n")
    assert len(read(tmp_path / "out")) == 10


def test_a_class_folder_without_images_is_named(images, tmp_path):
    (images / "birds").mkdir()
    refused = convert(FOLDER, images, tmp_path / "out", check=False)
    assert "1 folder below" in refused.stderr
    assert "birds" in refused.stderr
    convert(FOLDER, images, tmp_path / "out", "--skip-empty-classes")
    assert "birds" not in json.loads((tmp_path / "out/dataset.json").read_text())["classes"]


def test_names_in_any_script_even_bytes_that_are_no_text(tmp_path):
    folder = os.fsencode(write_images(tmp_path / "images/日本 русский", 1))
    odd = os.path.join(folder, b"caf\xe9.png")
    with open(odd, "wb") as copy:
        copy.write(Path(os.fsdecode(folder), "000.png").read_bytes())
    convert(FOLDER, tmp_path / "images", tmp_path / "out")
    assert {s["path"] for s in read(tmp_path / "out")} == {"日本 русский/000.png", "日本 русский/caf\\xe9.png"}


def bomb() -> bytes:
    """A small PNG file that says it holds 30,000 × 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**5))), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_bombs_and_strips_are_left_out_with_a_reason(images, tmp_path):
    (images / "dogs/bomb.png").write_bytes(bomb())
    Image.new("RGB", (60000, 1)).save(images / "dogs/strip.png")
    convert(FOLDER, images, tmp_path / "out", "--resize=384", "--max-skipped=2")
    reasons = {s["path"]: s["reason"] for s in json.loads((tmp_path / "out/dataset.json").read_text())["skipped"]}
    assert "30000 × 30000 pixels" in reasons["dogs/bomb.png"]
    assert "too narrow" in reasons["dogs/strip.png"]


def test_damage_that_decodes_is_counted_and_named(images, tmp_path):
    out = tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(images / "dogs/whole.jpg")
    whole = (images / "dogs/whole.jpg").read_bytes()
    (images / "dogs/half.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")  # the lower half is grey
    (images / "dogs/endless.jpg").write_bytes(whole[:-2])  # every pixel is there
    done = convert(FOLDER, images, out)
    assert "kept 1 damaged" in done.stdout and "dogs/half.jpg: Corrupt JPEG data" in done.stdout
    (damaged,) = json.loads((out / "dataset.json").read_text())["damaged"]
    assert damaged["path"] == "dogs/half.jpg"
    found = convert(VERIFY, out)
    assert "(dogs/half.jpg) decodes in part: Corrupt JPEG data: premature end of data segment" in found.stdout
    assert found.stdout.endswith("12 samples are sound, 1 damaged, 0 faults\n")
    assert convert(VERIFY, out, "--strict", check=False).returncode == 1
    assert done.stderr == found.stderr == ""


def test_where_nothing_can_be_read_the_first_reason_is_given(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bomb.png").write_bytes(bomb())
    done = convert(FOLDER, tmp_path / "in", tmp_path / "out", "--max-skipped=1", check=False)
    assert "none of the images could be read: bomb.png (ValueError: 30000 × 30000 pixels" in done.stderr


def test_what_is_stored_resized_has_the_background_that_is_asked_for(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "in/clear.png")
    seen = {}
    for background in ("black", "white", "drop"):
        convert(FOLDER, tmp_path / "in", tmp_path / background, "--resize=32", f"--background={background}")
        stored = Image.open(io.BytesIO(read(tmp_path / background)[0]["image"]))
        seen[background] = [value > 127 for value in stored.getpixel((9, 9))]
    assert seen == {"black": [False] * 3, "white": [True] * 3, "drop": [True, False, False]}


def test_a_strip_that_no_jpeg_can_hold_is_refused_with_its_own_size(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (20000, 100)).save(tmp_path / "in/strip.png")
    done = convert(FOLDER, tmp_path / "in", tmp_path / "out", "--resize=384", check=False)
    assert "20000 × 100 is too narrow to be resized to 384" in done.stderr


def test_a_full_disk_is_one_line_and_no_loss(images, tmp_path):
    with files_of_at_most(8192):
        done = convert(FOLDER, images, tmp_path / "out", "--workers=1", "--shard-size=16kb", check=False)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: [Errno 27] File too large")
    assert ".mds" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    convert(FOLDER, images, tmp_path / "out", "--shard-size=16kb")
    assert len(read(tmp_path / "out")) == 10


def test_verify_says_exactly_what_is_wrong(images, tmp_path):
    out = tmp_path / "out"
    convert(FOLDER, images, out, "--keep-order")
    shards = sorted(out.glob("*.mds"))
    assert len(shards) == 10  # one image each: there are at least 16 parts where there are that many images
    flipped = bytearray(shards[1].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    shards[1].write_bytes(flipped)
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    shards[3].unlink()
    found = convert(VERIFY, out, check=False)
    assert found.returncode == 1
    first, second, third, last = found.stdout.splitlines()
    assert first == f"{shards[1]} is damaged: its xxh64 hash is not that of index.json"
    assert second.startswith(f"{shards[2]} is damaged: it has ")
    assert third == f"{shards[3]} is listed in index.json but absent"
    assert last == f"{out}: 7 samples are sound, 3 faults"


def test_verify_decodes_every_image_and_compares_the_marker(images, tmp_path):
    out = tmp_path / "out"
    with MDSWriter(out=str(out), columns={"image": "bytes", "path": "str"}, hashes=["xxh64"]) as writer:
        writer.write({"image": (images / "dogs/000.png").read_bytes(), "path": "whole.png"})
        writer.write({"image": b"no image", "path": "broken.png"})
    (out / "dataset.json").write_text(json.dumps({"images": 3, "content_hash": "0"}))
    found = convert(VERIFY, out, check=False)
    assert found.returncode == 1
    assert "shard.00000.mds: number 1 (broken.png) does not decode" in found.stdout
    assert "index.json is not that of dataset.json: it lists 2 images" in found.stdout
    for content in ("{", '{"version": 2}', '{"version": 2, "shards": [{"format": "mds"}]}'):
        (out / "index.json").write_text(content)
        refused = convert(VERIFY, out, check=False)
        assert refused.returncode == 2
        assert f"{out}/index.json is damaged" in refused.stderr
    (out / "index.json").unlink()
    assert "no finished MDS data set" in convert(VERIFY, out, check=False).stderr


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
    convert(HF, saved, tmp_path / "parts", "--split=train", "--val-fraction=0.25")
    assert [len(read(tmp_path / "parts" / name)) for name in ("train", "val")] == [3, 1]
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
