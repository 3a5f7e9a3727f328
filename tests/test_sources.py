"""Images where people have them: tar files of ImageNet and WebDataset, labels that are kept apart."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from tests.s3 import BUCKET
from tests.test_convert import FOLDER, VERIFY, convert, read

CLASSES = ["n01440764", "n01443537", "n01484850"]


def picture(number: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 72), (20 * number, 90, 255 - 20 * number)).save(buffer, format)
    return buffer.getvalue()


def pack(files: dict[str, bytes], place: Path | None = None) -> bytes:
    """A tar file of these."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if place:
        place.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def summary(out: Path) -> dict:
    return json.loads((out / "dataset.json").read_text())


def stored(out: Path) -> dict[str, tuple[bytes, int]]:
    return {sample["path"]: (sample["image"], sample["label"]) for sample in read(out)}


def test_imagenets_training_images_as_they_are_downloaded(tmp_path):
    images = {f"{name}/{name}_{i}.JPEG": picture(2 * k + i) for k, name in enumerate(CLASSES) for i in range(2)}
    inner = {name: {n.split("/")[1]: data for n, data in images.items() if n.startswith(name)} for name in CLASSES}
    pack({f"{name}.tar": pack(files) for name, files in inner.items()}, tmp_path / "ILSVRC2012_img_train.tar")
    convert(FOLDER, tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "out")
    assert summary(tmp_path / "out")["classes"] == CLASSES
    assert stored(tmp_path / "out") == {name: (data, CLASSES.index(name[:9])) for name, data in images.items()}
    (tmp_path / "train").mkdir()  # the outer one unpacked
    for name, files in inner.items():
        pack(files, tmp_path / f"train/{name}.tar")
    convert(FOLDER, tmp_path / "train", tmp_path / "folder")
    assert stored(tmp_path / "folder") == stored(tmp_path / "out")
    assert convert(VERIFY, tmp_path / "folder").stdout.endswith("6 samples are sound, 0 faults\n")


TRUTH = ["n01484850", "n01440764", "n01484850", "n01443537"]


def label_file(kind: str, folder: Path) -> Path:
    folder.mkdir()
    kit = folder / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(i + 1, name, "a fish", "", 0) for i, name in enumerate(reversed(CLASSES))] + [
        (4, "n01317541", "all", "", 3)
    ]
    scipy.io.savemat(kit / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    ids = {name: i + 1 for i, name in enumerate(reversed(CLASSES))}
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{ids[name]}\n" for name in TRUTH))
    if kind == "kit":
        return folder / "ILSVRC2012_devkit_t12"
    if kind == "archive":
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            tar.add(folder / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
        return folder / "ILSVRC2012_devkit_t12.tar.gz"
    if kind == "meta.bin":
        torch.save((dict.fromkeys(reversed(CLASSES), ("a fish",)), TRUTH), folder / "meta.bin")
        return folder / "meta.bin"
    if kind == "txt":
        (folder / "labels.txt").write_text("\n".join(TRUTH))
        return folder / "labels.txt"
    with (folder / "LOC_val_solution.csv").open("w") as file:
        rows = [(f"ILSVRC2012_val_{i + 1:08}", f"{name} 1 2 3 4 ") for i, name in enumerate(TRUTH)]
        csv.writer(file).writerows([("ImageId", "PredictionString"), *reversed(rows)])
    return folder / "LOC_val_solution.csv"


@pytest.mark.parametrize("kind", ["kit", "archive", "meta.bin", "txt", "csv"])
@pytest.mark.parametrize("place", ["folder", "tar"])
def test_imagenets_validation_images_get_their_classes(kind, place, tmp_path):
    images = {f"ILSVRC2012_val_{i + 1:08}.JPEG": picture(i) for i in (2, 0, 3, 1)}  # in no order, as in the tar file
    source = tmp_path / "ILSVRC2012_img_val.tar"
    if place == "tar":
        pack(images, source)
    else:
        source = tmp_path / "val"
        source.mkdir()
        for name, content in images.items():
            (source / name).write_bytes(content)
    refused = convert(FOLDER, source, tmp_path / "out", check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "--labels ILSVRC2012_devkit_t12.tar.gz" in refused.stderr
    convert(FOLDER, source, tmp_path / "out", "--labels", label_file(kind, tmp_path / "labels"))
    assert summary(tmp_path / "out")["classes"] == CLASSES
    assert summary(tmp_path / "out")["counts"] == [1, 1, 2]
    for name, (data, label) in stored(tmp_path / "out").items():
        assert data == images[name]
        assert CLASSES[label] == TRUTH[int(name[-13:-5]) - 1]


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"no kit"])
def test_labels_that_cannot_be_read_are_one_line(content, tmp_path):
    pack({"ILSVRC2012_val_00000001.JPEG": picture(0)}, tmp_path / "val.tar")
    for name in ("meta.bin", "kit.tar.gz", "list.csv"):
        (tmp_path / name).write_bytes(content)
        refused = convert(FOLDER, tmp_path / "val.tar", tmp_path / "out", "--labels", tmp_path / name, check=False)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert refused.stderr.startswith(f"error: --labels {tmp_path / name}: ")


def samples(begin: int, end: int, label=str) -> dict[str, bytes]:
    files = {}
    for i in range(begin, end):
        files |= {
            f"{i:04}.jpg": picture(i),
            f"{i:04}.cls": label(i % 3).encode(),
            f"{i:04}.txt": f"number {i}".encode(),
        }
    return files


@pytest.mark.parametrize(("label", "names"), [(str, ["0", "1", "2"]), ("cba".__getitem__, ["a", "b", "c"])])
def test_webdataset_shards(label, names, tmp_path):
    pytest.importorskip("webdataset")
    pack(samples(0, 6, label), tmp_path / "part-000.tar")
    pack(samples(6, 10, label), tmp_path / "part-001.tar")
    convert(FOLDER, tmp_path / "part-{000..001}.tar", tmp_path / "out", "--caption=txt", "--keep-order")
    found = read(tmp_path / "out")
    assert [(s["image"], s["caption"]) for s in found] == [(picture(i), f"number {i}") for i in range(10)]
    assert [names[sample["label"]] for sample in found] == [label(i % 3) for i in range(10)]
    assert summary(tmp_path / "out")["classes"] == names
    convert(FOLDER, tmp_path / "part-*.tar", tmp_path / "plain", "--no-labels", "--keep-order")
    assert summary(tmp_path / "plain")["passed_over"][".txt"]["count"] == 10
    assert {sample["label"] for sample in read(tmp_path / "plain")} == {-1}


def test_a_webdataset_with_captions_alone_or_several_images(tmp_path):
    pytest.importorskip("webdataset")
    pack({"a/0.jpg": picture(0), "a/0.json": b'{"text": "x"}', "a/1.jpg": picture(1)}, tmp_path / "texts.tar")
    convert(FOLDER, tmp_path / "texts.tar", tmp_path / "out", "--caption=json", "--keep-order")
    assert [(s["caption"], s["label"]) for s in read(tmp_path / "out")] == [('{"text": "x"}', -1), ("", -1)]
    assert summary(tmp_path / "out")["unlabelled"] == 2
    several = {"0.jpg": picture(0), "0.seg.png": picture(1, "PNG"), "0.cls": b"1"}
    pack(several, tmp_path / "several.tar")
    refused = convert(FOLDER, tmp_path / "several.tar", tmp_path / "several", check=False)
    assert "0 holds several images: jpg, seg.png; choose one with --image-key" in refused.stderr
    convert(FOLDER, tmp_path / "several.tar", tmp_path / "several", "--image-key=jpg")
    assert stored(tmp_path / "several") == {"0.jpg": (picture(0), 1)}


def test_damaged_and_compressed_tar_files_are_one_line(tmp_path):
    whole = pack({f"c/{i}.jpg": picture(i) for i in range(4)}, tmp_path / "whole.tar")
    damaged = bytearray(whole)
    second = whole.index(b"c/1.jpg")
    damaged[second : second + 512] = b"x" * 512
    cut = {"data": whole[: second + 600], "header": whole[: second + 100], "boundary": whole[:second], "none": b""}
    for name, content in {**cut, "damaged": bytes(damaged), "text": b"no tar" * 1000}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        refused = convert(FOLDER, tmp_path / f"{name}.tar", tmp_path / "out", check=False)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, name
        assert f"{name}.tar" in refused.stderr
        assert "damaged" in refused.stderr
    (tmp_path / "small.tar.gz").write_bytes(b"")
    for name, message in (
        ("small.tar.gz", "uncompressed"),
        ("absent.tar", "there is no file"),
        ("x*.tar", "no tar file"),
    ):
        assert message in convert(FOLDER, tmp_path / name, tmp_path / "out", check=False).stderr


def test_bad_images_and_changed_tar_files(tmp_path):
    pack({"c/0.jpg": picture(0), "c/1.jpg": b"damaged", "._x.jpg": b"", "d/2.heic_": b""}, tmp_path / "some.tar")
    refused = convert(FOLDER, tmp_path / "some.tar", tmp_path / "out", check=False)
    assert "1 unreadable image, 0 allowed: c/1.jpg" in refused.stderr
    pack({"c/0.jpg": picture(5), "c/1.jpg": b"damaged"}, tmp_path / "some.tar")
    refused = convert(FOLDER, tmp_path / "some.tar", tmp_path / "out", "--max-skipped=1", check=False)
    assert "have changed since" in refused.stderr
    convert(FOLDER, tmp_path / "some.tar", tmp_path / "out", "--max-skipped=1", "--overwrite")
    assert stored(tmp_path / "out") == {"c/0.jpg": (picture(5), 0)}


def test_tar_files_in_a_bucket(s3, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    for number, (begin, end) in enumerate([(0, 4), (4, 6)]):
        s3.client().put_object(Bucket=BUCKET, Key=f"wds/{number}.tar", Body=pack(samples(begin, end)))
    for place in ("wds/{0..1}.tar", "wds/*.tar", "wds"):
        convert(FOLDER, f"s3://{BUCKET}/{place}", tmp_path / "out", "--caption=txt", "--keep-order", "--overwrite")
        assert [(s["image"], s["label"]) for s in read(tmp_path / "out")] == [(picture(i), i % 3) for i in range(6)]
    refused = convert(FOLDER, f"s3://{BUCKET}/wds/none.tar", tmp_path / "none", check=False)
    assert refused.returncode == 2 and "cannot read s3://" in refused.stderr


@pytest.mark.parametrize("format", ["HEIF", "JXL", "AVIF"])
def test_formats_of_optional_packages(format, tmp_path):
    if format != "AVIF":
        pytest.importorskip({"HEIF": "pillow_heif", "JXL": "pillow_jxl"}[format])
    (tmp_path / "phone").mkdir()
    suffix = {"HEIF": "HEIC"}.get(format, format.lower())
    (tmp_path / f"phone/0.{suffix}").write_bytes(picture(3, format))
    convert(FOLDER, tmp_path / "phone", tmp_path / "out", "--resize=64")
    assert convert(VERIFY, tmp_path / "out").stdout.endswith("1 samples are sound, 0 faults\n")


def test_imagenets_folder_as_torchvision_wants_it_asks_for_one_file(tmp_path):
    for name in ("train", "val"):
        pack({"ILSVRC2012_val_00000001.JPEG": picture(0)}, tmp_path / f"ILSVRC2012_img_{name}.tar")
    refused = convert(FOLDER, tmp_path, tmp_path.with_suffix(".out"), check=False)
    assert "give one of them: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar" in refused.stderr
    convert(FOLDER, tmp_path / "ILSVRC2012_img_val.tar", tmp_path.with_suffix(".out"), "--no-labels")


def test_splits_of_tar_files_have_one_class_list(tmp_path):
    for split, names in (("train", "ab"), ("val", "bc")):
        (tmp_path / f"in/{split}").mkdir(parents=True)
        for name in names:
            pack({f"{name}.png": picture(3, "PNG")}, tmp_path / f"in/{split}/{name}.tar")
    convert(FOLDER, tmp_path / "in", tmp_path / "out", "--splits=train,val")
    assert [summary(tmp_path / f"out/{split}")["counts"] for split in ("train", "val")] == [[1, 1, 0], [0, 1, 1]]
    assert {name: label for name, (_, label) in stored(tmp_path / "out/val").items()} == {"b/b.png": 1, "c/c.png": 2}
