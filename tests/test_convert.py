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

from rae.data.conversion import report
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


LABELS = {
    "bool": ([True, False, True, None], ["False", "True"], [1, 0, 1, -1]),
    "numbers": ([2, 0, -1, None], ["0", "1", "2"], [2, 0, -1, -1]),
    "large": ([10**15, 7, -1, 7], ["7", "1000000000000000"], [1, 0, -1, 0]),
    "negative": ([-3, -1, 5, 5], ["-3", "-1", "5"], [0, 1, 2, 2]),
    "text": (["dog", "cat", None, ""], ["cat", "dog"], [1, 0, -1, -1]),
    "float": ([0.5, float("nan"), -2.0, 0.5], ["-2", "0.5"], [1, -1, 0, 1]),
    "whole floats": ([1.0, None, 0.0, 1.0], ["0", "1"], [1, -1, 0, 1]),
    "classes": ([1, 0, -1, None], ["x", "y"], [1, 0, -1, -1]),
    "none": ([None, None, None, None], [], [-1, -1, -1, -1]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_add_up(kind, images, tmp_path):
    values, classes, stored = LABELS[kind]
    files = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(images.glob("dogs/*.png"))]
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": files, "label": values})
    features["label"] = datasets.ClassLabel(names=["x", "y"]) if kind == "classes" else data.features["label"]
    data.cast(features).save_to_disk(tmp_path / "saved")
    convert(HF, tmp_path / "saved", tmp_path / "out", "--keep-order")
    summary = json.loads((tmp_path / "out/dataset.json").read_text())
    assert summary["classes"] == classes
    assert [sample["label"] for sample in read(tmp_path / "out")] == stored
    assert sum(summary["counts"]) + summary["unlabelled"] == summary["images"] == 4
    assert summary["counts"] == [stored.count(label) for label in range(len(classes))]
    convert(HF, tmp_path / "saved", tmp_path / "without", "--no-labels")
    assert {sample["label"] for sample in read(tmp_path / "without")} == {-1}
    assert json.loads((tmp_path / "without/dataset.json").read_text())["unlabelled"] == 4


def test_several_labels_an_image_are_refused_or_left_out(images, tmp_path):
    files = sorted(map(str, images.glob("dogs/*.png")))
    data = datasets.Dataset.from_dict({"image": files, "label": [[0, 1], [], [1], [2]]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    refused = convert(HF, tmp_path / "saved", tmp_path / "out", check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "column 'label' holds several labels an image" in refused.stderr and "--no-labels" in refused.stderr
    convert(HF, tmp_path / "saved", tmp_path / "out", "--no-labels")


def test_a_folder_of_parquet_as_the_hub_stores_it(images, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(images.glob("dogs/*.png"))]
    (tmp_path / "hub/data").mkdir(parents=True)
    rows = {"image": files, "label": ["b", "a", "b", "c"], "text": ["one", "two", None, "four"]}
    data = datasets.Dataset.from_dict(rows)
    for name, part in (("train", range(3)), ("test", [3])):
        data.select(part).to_parquet(tmp_path / f"hub/data/{name}-00000-of-00001.parquet")
    assert "choose a split with --split: " in convert(HF, tmp_path / "hub", tmp_path / "out", check=False).stderr
    convert(HF, tmp_path / "hub", tmp_path / "out", "--split=train", "--keep-order", "--caption=text")
    samples = read(tmp_path / "out")
    assert [(sample["label"], sample["caption"]) for sample in samples] == [(1, "one"), (0, "two"), (1, "")]
    assert [sample["image"] for sample in samples] == [row["bytes"] for row in files[:3]]
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == ["a", "b", "c"]  # of both splits
    one = tmp_path / "hub/data/test-00000-of-00001.parquet"
    convert(HF, one, tmp_path / "one")
    one.write_bytes(one.read_bytes()[:-100])
    refused = convert(HF, one, tmp_path / "cut", check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


def test_what_is_not_looked_at_is_counted_and_named(images, tmp_path):
    for name in ("@eaDir", "__MACOSX", ".thumbnails"):
        (images / "dogs" / name).mkdir()
        (images / "dogs" / name / "small.jpg").write_bytes(b"")
    (images / "dogs/IMG_1.HEIF_").write_bytes(b"")
    (images / "dogs/raw.NEF").write_bytes(b"")
    (images / "dogs/scan").write_bytes(b"")
    (images / "dogs/gone.png").symlink_to("/nowhere/annex/1.png")
    (images / "dogs/round.png").symlink_to("round.png")
    (images / "birds").symlink_to("/nowhere/birds")
    (images / "dogs/up").symlink_to(images)
    done = convert(FOLDER, images, tmp_path / "out")
    assert "10 images, 3 classes" in done.stdout
    assert "were not looked at: 3 links that lead nowhere, " in done.stdout
    passed = json.loads((tmp_path / "out/dataset.json").read_text())["passed_over"]
    assert passed.pop("links that lead nowhere") == {
        "count": 3, "names": ["birds", "dogs/gone.png", "dogs/round.png"],
    }  # fmt: skip
    names = {
        "@eaDir",
        "__MACOSX",
        "hidden",
        ".HEIF_",
        ".NEF",
        "without a suffix",
        ".txt",
        "links to a folder above them",
    }
    assert {name: each["count"] for name, each in passed.items()} == dict.fromkeys(names, 1)
    assert "raw.NEF" in done.stdout


def test_a_folder_of_unread_formats_alone_says_so(tmp_path, monkeypatch):
    (tmp_path / "phone").mkdir()
    for i in range(3):
        (tmp_path / f"phone/{i}.DNG").write_bytes(b"")
    refused = convert(FOLDER, tmp_path / "phone", tmp_path / "out", check=False)
    assert refused.stderr.endswith(
        "there are no images below '%s'; 3 were not looked at: 3 .DNG\n" % (tmp_path / "phone")
    )


def test_changed_files_are_not_mixed_with_what_was_stored(images, tmp_path):
    (images / "dogs/damaged.png").write_bytes(b"damaged")
    assert convert(FOLDER, images, tmp_path / "out", check=False).returncode == 2
    Image.new("RGB", (80, 80), "red").save(images / "cats/big/000.png")
    refused = convert(FOLDER, images, tmp_path / "out", "--max-skipped=1", check=False)
    assert "of files that have changed since" in refused.stderr
    convert(FOLDER, images, tmp_path / "out", "--max-skipped=1", "--overwrite")
    stored = {sample["path"]: sample["image"] for sample in read(tmp_path / "out")}
    assert stored["cats/big/000.png"] == (images / "cats/big/000.png").read_bytes()


def test_a_changed_data_set_is_not_mixed_with_what_was_stored(images, tmp_path):
    def save(first: str) -> None:
        rows = [{"bytes": (images / first).read_bytes(), "path": None}, {"bytes": b"damaged", "path": None}]
        data = datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}).cast_column("image", datasets.Image())
        data.save_to_disk(tmp_path / "saved")

    save("dogs/000.png")
    assert convert(HF, tmp_path / "saved", tmp_path / "out", check=False).returncode == 2
    save("dogs/001.png")
    assert "have changed" in convert(HF, tmp_path / "saved", tmp_path / "out", "--max-skipped=1", check=False).stderr


@pytest.mark.parametrize("out", ["shards", "cats/../deep/shards"])
def test_an_output_among_the_images_is_refused_at_once(images, out):
    before = sorted(images.rglob("*"))
    refused = convert(FOLDER, images, images / out, check=False)
    assert refused.returncode == 2 and "give another place" in refused.stderr
    assert sorted(images.rglob("*")) == before


def test_images_inside_a_data_set_are_not_replaced_with_it(images, tmp_path):
    convert(FOLDER, images, tmp_path / "out")
    images.rename(tmp_path / "out/images")
    refused = convert(FOLDER, tmp_path / "out/images", tmp_path / "out", "--overwrite", check=False)
    assert refused.returncode == 2 and "would be replaced" in refused.stderr
    assert (tmp_path / "out/images/dogs/000.png").exists()


def test_names_with_brackets_are_printed_whole(images, tmp_path):
    odd = tmp_path / "a [bold]b[/] :smile: [/c]"
    (images / "dogs/[").mkdir()
    (images / "dogs/[/x] y.png").write_bytes(b"damaged")
    (images / "dogs/[/x] y.raw").write_bytes(b"")
    done = convert(FOLDER, images, odd, "--max-skipped=1", "--skip-empty-classes")
    assert f"{odd}: 10 images" in done.stdout
    assert "dogs/[/x] y.png" in done.stdout and "dogs/[/x] y.raw" in done.stdout


def test_texts_beside_images_are_kept_when_asked(images, tmp_path):
    (images / "dogs/000.txt").write_text("a dog")
    convert(FOLDER, images, tmp_path / "out", "--caption=txt")
    captions = {sample["path"]: sample["caption"] for sample in read(tmp_path / "out")}
    assert captions.pop("dogs/000.png") == "a dog"
    assert set(captions.values()) == {""}
    assert "no image has such a text" in convert(FOLDER, images, tmp_path / "no", "--caption=text", check=False).stderr


@pytest.mark.parametrize(("seconds", "shown"), [(6, "│ 0.17 "), (0.01, "│ 100 ")])
def test_rates_are_never_rounded_to_nothing(seconds, shown, capsys):
    summary = {
        "images": 1,
        "classes": [],
        "unlabelled": 1,
        "skipped": [],
        "damaged": [],
        "passed_over": {},
        "bytes": 1,
        "options": {},
    }
    report(summary | {"seconds": seconds}, "out")
    assert shown in capsys.readouterr().out


def test_a_part_that_was_given_up_is_not_finished_by_another(tmp_path):
    write_images(tmp_path / "images/a", 40)
    (tmp_path / "images/a/000.png").write_bytes(b"damaged")
    command = [FOLDER, tmp_path / "images", tmp_path / "out"]
    told = [convert(*command, f"--part={part}/2", check=False) for part in (1, 2, 1, 2)]
    assert not (tmp_path / "out").exists()
    assert told[2].returncode == 2
    assert "1 unreadable image, 0 allowed: a/000.png" in told[2].stderr
    whole = convert(*command, "--part=1/2", "--max-skipped=1")
    if "39 images" not in whole.stdout:
        whole = convert(*command, "--part=2/2", "--max-skipped=1")
    assert "39 images" in whole.stdout
    assert (tmp_path / "out/index.json").is_file()
