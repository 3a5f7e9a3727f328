"""Shards of other writers: their columns are read, or refused in a line; what is in them never runs."""

import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from streaming import JSONWriter, MDSWriter

from rae.config.errors import UserError
from rae.config.sections import Config
from rae.data.columns import class_number
from rae.data.dataset import open_dataset
from rae.data.decoding import eval_transform
from rae.data.images import open_images
from rae.data.loaders import Ledger
from rae.data.shards import read_index
from rae.exchange.inspection.dispatch import inspect
from rae.training.data import build_train_loader, fit_data
from tests.conftest import tiny_settings
from tests.test_convert import VERIFY, convert
from tests.test_latents import LATENTS

_COARSE = np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3), dtype=np.uint8)
PIXELS = np.stack([np.asarray(Image.fromarray(each).resize((100, 80), Image.Resampling.BICUBIC)) for each in _COARSE])


def encoded(format: str, number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, format)
    return buffer.getvalue()


def write(out: Path, columns: dict[str, str], *samples: dict) -> Path:
    with MDSWriter(out=str(out), columns=columns, hashes=["xxh64"]) as writer:
        for sample in samples:
            writer.write(sample)
    return out


def images_of(data: Path) -> list[dict]:
    dataset = open_dataset(str(data), "", transform=eval_transform(64), seed=0)
    return [dataset[i] for i in range(dataset.size)]


class Harmful:
    """What calls something when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("reader", ["verify", "inspect", "evaluate", "latents", "train"])
@pytest.mark.parametrize("encoding", ["pkl", "pkl:x", "unheard-of"])
def test_no_reader_runs_what_is_in_a_column(shards, tmp_path, reader, encoding):
    data, ran = tmp_path / "data", tmp_path / "it-was-run"
    sample = {"image": encoded("PNG"), "label": 0, "meta": pickle.dumps(Harmful(ran))}
    write(data, {"image": "bytes", "label": "int", "meta": "bytes"}, *[sample] * 8)
    index = (data / "index.json").read_text().replace('["bytes", "int", "bytes"]', f'["bytes", "int", "{encoding}"]')
    assert encoding in index
    (data / "index.json").write_text(index)
    settings = tiny_settings(shards, tmp_path / "run")
    settings["data"] |= {"train": {"path": str(data)}, "streaming": {"allow_unsafe_types": True}}
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    if reader in ("verify", "latents"):
        arguments = {"verify": [VERIFY, data], "latents": [LATENTS, tmp_path / "run.yaml", tmp_path / "out"]}[reader]
        done = convert(*arguments, check=False)
        assert done.returncode == 2
        said = done.stderr
    else:
        calls = {
            "inspect": lambda: inspect(str(data)),
            "evaluate": lambda: open_images(str(data), 64),
            "train": lambda: build_train_loader(Config.model_validate(settings), Ledger()),
        }
        with pytest.raises(UserError) as caught:
            calls[reader]()
        said = str(caught.value)
    assert f"{data}/index.json: column 'meta' is of type {encoding}, which can run code" in said
    assert len(said.splitlines()) == 1
    assert not ran.exists()


def test_a_column_cannot_hide_behind_another_of_its_name(tmp_path):
    ran = tmp_path / "it-was-run"
    sample = {"image": encoded("PNG"), "label": pickle.dumps(Harmful(ran)), "other": 0}
    data = write(tmp_path / "data", {"image": "bytes", "label": "bytes", "other": "int"}, sample)
    index = json.loads((data / "index.json").read_text())
    index["shards"][0] |= {"column_names": ["image", "label", "label"], "column_encodings": ["bytes", "pkl", "int"]}
    (data / "index.json").write_text(json.dumps(index))
    for read_all in (images_of, lambda place: read_index(str(place))):
        with pytest.raises(UserError, match="'label' is of type pkl"):
            read_all(data)
    index["shards"][0]["column_encodings"] = ["bytes", "str", "int"]
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="several columns have one name"):
        images_of(data)
    assert not ran.exists()


def test_shards_outside_their_folder_or_of_another_format_are_refused(tmp_path):
    data = write(tmp_path / "data", {"image": "bytes"}, {"image": encoded("PNG")})
    index = (data / "index.json").read_text().replace('"shard.00000.mds"', '"../shard.00000.mds"')
    (data / "index.json").write_text(index)
    with JSONWriter(out=str(tmp_path / "lines"), columns={"image": "str"}) as writer:
        writer.write({"image": "text"})
    for folder, message in (("data", "is not in the data set's folder"), ("lines", "MDS is")):
        with pytest.raises(UserError, match=message):
            read_index(str(tmp_path / folder))
        with pytest.raises(UserError, match=message):
            images_of(tmp_path / folder)


@pytest.mark.parametrize(
    "columns",
    [
        {"image": "jpeg", "label": "int"},
        {"x": "png", "y": "uint8"},
        {"photo": "pil", "meta": "json"},
        {"image": "ndarray", "label": "int64"},
        {"image": "ndarray:uint8:80,100,3", "cls": "str_int"},
        {"jpg": "bytes", "caption": "str", "thumbnail": "bytes"},
    ],
)
def test_images_of_other_writers_are_read(columns, tmp_path):
    image, *other = columns
    encoding = columns[image]
    samples = []
    for i, pixels in enumerate(PIXELS):
        stored = {"bytes": encoded("PNG", i), "ndarray": pixels}.get(
            encoding.partition(":")[0], Image.fromarray(pixels)
        )
        rest = {"meta": {"a": [1]}, "caption": "a cat", "thumbnail": b"none"}
        samples.append({image: stored, **{name: rest.get(name, i) for name in other}})
    data = write(tmp_path / "data", columns, *samples)
    found = images_of(data)
    for i, sample in enumerate(found):
        expected = eval_transform(64)(encoded("PNG", i), None)
        assert (sample["image"].float() - expected.float()).abs().mean() < (4 if encoding == "jpeg" else 1e-6)
    numbered = {"label", "y", "cls"} & set(columns)
    assert [sample["label"] for sample in found] == (list(range(8)) if numbered else [-1] * 8)
    assert convert(VERIFY, data).stdout.endswith("8 samples are sound, 0 faults\n")


def test_a_stored_jpeg_that_is_cut_is_found(tmp_path):
    whole = encoded("JPEG")
    data = write(tmp_path / "data", {"image": "bytes"}, {"image": whole}, {"image": whole[: len(whole) // 3]})
    index = (data / "index.json").read_text().replace('["bytes"]', '["jpeg"]')
    (data / "index.json").write_text(index)
    assert "number 1" in convert(VERIFY, data, check=False).stdout


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "jpeg_array"}, "column 'image' is of type jpeg_array, which is not read as an image"),
        ({"image": "list[png]"}, "column 'image' is of type list[png]"),
        ({"image": "str"}, "column 'image' is of type str"),
        ({"one": "bytes", "two": "bytes"}, "they hold 'one' (bytes), 'two' (bytes)"),
        ({"text": "str"}, "they hold 'text' (str)"),
    ],
)
def test_other_columns_are_refused_by_name_and_type(columns, message, tmp_path):
    picture = Image.fromarray(PIXELS[0])
    values = {"jpeg_array": [encoded("JPEG")], "list[png]": [picture], "str": "text", "bytes": b"text"}
    data = write(tmp_path / "data", columns, {name: values[encoding] for name, encoding in columns.items()})
    refused = convert(VERIFY, data, check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert message in refused.stderr
    with pytest.raises(UserError) as caught:
        images_of(data)
    assert message in str(caught.value)


def test_pixels_that_are_no_picture_are_bad_samples(tmp_path):
    small, palette = np.zeros((4, 4, 3), np.float32), Image.fromarray(PIXELS[0]).convert("P")
    arrays = write(tmp_path / "arrays", {"image": "ndarray"}, {"image": small})
    assert "it is an array of float32 (4, 4, 3)" in convert(VERIFY, arrays, check=False).stdout
    pil = write(tmp_path / "pil", {"image": "pil"}, {"image": palette})
    assert "it has a palette" in convert(VERIFY, pil, check=False).stdout
    bomb = np.array([2**31, 2**31, 3], np.uint32).tobytes() + b"RGB"
    write(tmp_path / "bomb", {"image": "bytes"}, {"image": bomb})
    index = tmp_path / "bomb/index.json"
    index.write_text(index.read_text().replace('["bytes"]', '["pil"]'))
    assert "cut off" in convert(VERIFY, tmp_path / "bomb", check=False).stdout


def test_labels_of_any_kind_become_class_numbers_or_none():
    numbers = [(True, 1), (np.uint8(3), 3), (2.0, 2), (np.array([7]), 7), (2**62, 2**62), (-1, -1)]
    none = [("cat", -1), (None, -1), (0.5, -1), (float("nan"), -1), ([1, 2], -1), (np.array([0, 1]), -1), (2**64, -1)]
    assert [class_number(label) for label, _ in numbers + none] == [number for _, number in numbers + none]
    assert torch.tensor([class_number(np.uint64(2**64 - 1))]).item() == -1


@pytest.mark.parametrize("label", ["str", "ndarray", None])
def test_training_goes_without_labels(label, shards, tmp_path):
    columns = {"image": "bytes"} | ({"label": label} if label else {})
    sample = {"image": encoded("PNG"), "label": {"str": "cat", "ndarray": np.array([0, 1])}.get(label)}
    data = write(tmp_path / "data", columns, *[{name: sample[name] for name in columns}] * 8)
    settings = tiny_settings(shards, tmp_path / "run")
    settings["data"]["train"] = {"path": str(data)}
    batch = next(iter(build_train_loader(Config.model_validate(settings), Ledger())))
    assert batch["image"].shape == (8, 3, 64, 64)
    assert batch["label"].tolist() == [-1] * 8
    assert json.loads((data / "index.json").read_text())["shards"]


@pytest.mark.parametrize(
    ("columns", "fault"), [({"image": "bytes", "label": "str"}, "type str"), ({"image": "bytes"}, "no column")]
)
def test_a_generator_of_classes_needs_their_numbers(columns, fault, shards, tmp_path):
    values = {"image": encoded("PNG"), "label": "cat"}
    data = write(tmp_path / "data", columns, *[{name: values[name] for name in columns}] * 8)
    settings = tiny_settings(shards, tmp_path / "run")
    settings["data"]["train"] = {"path": str(data)}
    loader = build_train_loader(Config.model_validate(settings), Ledger())
    with pytest.raises(UserError, match=rf"data\.train: .*{fault}.*num_classes: 0"):
        fit_data(SimpleNamespace(needs_images=True, needs_labels=True), loader, begins=False)
