"""Damaged data is found and named; mixtures and bad samples are counted."""

import io
import json
import os
import shutil
from random import Random

import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from rae.config.errors import UserError
from rae.config.sections import Config
from rae.data.dataset import ImageDataset, open_dataset, open_stream
from rae.data.decoding import MAX_PIXELS, decode, eval_transform, train_transform
from rae.data.loaders import Ledger, eval_loader, train_loader
from rae.data.reader import BadSampleError, DataError
from rae.survival.storage import same_place
from rae.training.checks import check_data
from tests.conftest import files_of_at_most, launch, metrics_of, tiny_settings

OPTIONS = dict(transform=eval_transform(64), seed=0, batch_size=4)


@pytest.fixture
def data(shards, tmp_path):
    """A copy of twelve images in as many shards, to be damaged."""
    return shutil.copytree(shards / "eval", tmp_path / "data")


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 255
    path.write_bytes(content)


def shard_names(folder):
    return [folder / s["raw_data"]["basename"] for s in json.loads((folder / "index.json").read_text())["shards"]]


def test_a_flipped_byte_is_found_when_the_shard_is_first_read(data):
    shard = shard_names(data)[1]
    flip(shard)
    with pytest.raises(DataError, match=f"{shard} is damaged: its xxh64 hash is not that of index.json; restore it"):
        [sample["image"] for sample in open_dataset(str(data), "", **OPTIONS)]
    loader = train_loader(open_dataset(str(data), "", **OPTIONS), 4, 1, 2)
    with pytest.raises(DataError, match="is damaged: its xxh64 hash"):
        list(loader)
    with pytest.raises(BadSampleError, match=r"sample 1 \(a/00\d\.png; number 0 in "):
        open_dataset(str(data), "", verify=False, **OPTIONS)[1]


@pytest.mark.parametrize("damage", ["truncated", "absent"])
def test_a_truncated_or_absent_shard_is_found_before_training(data, damage):
    shard = shard_names(data)[2]
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 10)
    else:
        shard.unlink()
    message = "bytes where index.json says" if damage == "truncated" else "is listed in index.json but absent"
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(str(data), "", **OPTIONS)
    assert str(shard) in str(caught.value)


def test_a_damaged_copy_in_the_cache_is_fetched_again(data, tmp_path):
    def fetched():
        stream = open_stream(str(data), "")
        stream.remote, stream.local = str(data), str(tmp_path / "cache")
        return ImageDataset(streams=[stream], **OPTIONS)

    first = [fetched_sample["image"] for fetched_sample in fetched()]
    flip(tmp_path / "cache" / shard_names(data)[0].name)
    again = fetched()
    assert all(torch.equal(again[i]["image"], image) for i, image in enumerate(first))
    flip(shard_names(data)[0])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"shard shard\.00000\.mds of .* cannot be used: .*Checksum failure"):
        fetched()[0]


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "Expecting"), ('{"version": 2}', "shards"), ('{"shards": [1]}', "not subscriptable")]
)
def test_an_invalid_index_is_named(shards, data, tmp_path, content, reason):
    settings = tiny_settings(shards, tmp_path / "run")
    settings["data"]["eval"] = {"path": str(data)}
    (data / "index.json").write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        check_data(Config.model_validate(settings))
    assert str(caught.value).startswith(f"data.eval.path: {data}/index.json is damaged")


@pytest.mark.parametrize("spelled", ["{}/", "{}/.", "{}/../{name}", "//{}", "LINK", "RELATIVE", "~/{name}", "HARD"])
def test_training_data_are_known_however_they_are_spelled(shards, data, tmp_path, spelled, monkeypatch):
    monkeypatch.setenv("HOME", str(data.parent))
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "hard").mkdir()
    for file in data.iterdir():
        (tmp_path / "hard" / file.name).hardlink_to(file)
    places = {"LINK": tmp_path / "link", "RELATIVE": os.path.relpath(data), "HARD": tmp_path / "hard"}
    settings = tiny_settings(shards, tmp_path / "run")
    settings["data"]["train"] = {"path": str(data)}
    settings["data"]["eval"] = {"path": str(places.get(spelled, spelled.format(data, name=data.name)))}
    with pytest.raises(UserError, match=r"data\.eval\.path: it is data\.train\.path too"):
        check_data(Config.model_validate(settings))


def test_buckets_are_known_however_they_are_spelled():
    for other in ("s3://bucket/a/b/", "S3://bucket/a/b", "s3://Bucket//a//b", "s3://bucket/a/./c/../b"):
        assert same_place("s3://bucket/a/b", other)
    assert not same_place("s3://bucket/a/b", "s3://bucket/a/B")
    assert not same_place("s3://bucket/a/b", "gs://bucket/a/b")


def test_shards_without_images_are_refused(tmp_path):
    with MDSWriter(out=str(tmp_path / "texts"), columns={"text": "str"}) as writer:
        writer.write({"text": "hello"})
    with pytest.raises(UserError, match="there is no column 'image'"):
        open_dataset(str(tmp_path / "texts"), "", **OPTIONS)


def test_a_cache_limit_must_hold_shards_and_spares_the_only_copy(data):
    with pytest.raises(UserError, match="from which nothing may be deleted"):
        open_dataset(str(data), "", cache_limit="1gb", **OPTIONS)
    stream = open_stream(str(data), "")
    stream.remote, stream.local = str(data), str(data.parent / "cache")
    with pytest.raises(ValueError, match="Increase the `cache_limit`"):
        ImageDataset(streams=[stream], cache_limit="12kb", **OPTIONS)


def test_a_full_disk_stops_the_download(data, tmp_path):
    stream = open_stream("/", "")
    stream.remote, stream.local = str(data), str(tmp_path / "cache")
    index = (data / "index.json").stat().st_size
    with files_of_at_most(index), pytest.raises(DataError, match="File too large"):
        ImageDataset(streams=[stream], download_retry=1, **OPTIONS)[0]


def test_bombs_are_refused_in_any_format():
    side = int(MAX_PIXELS**0.5) + 1
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "JPEG", quality=1)
    with pytest.raises(ValueError, match=f"{side} × {side} pixels, more than"):
        decode(buffer.getvalue())


def write_some_bad(folder, bad=(3, 4, 17), count=24):
    with MDSWriter(
        out=str(folder), columns={"image": "bytes", "label": "int", "path": "str"}, hashes=["xxh64"]
    ) as writer:
        for i in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (80, 72), (i, 0, 0)).save(buffer, "PNG")
            writer.write({"image": b"?" if i in bad else buffer.getvalue(), "label": i, "path": f"{i}.png"})
    return str(folder)


def test_bad_samples_are_replaced_by_the_next_up_to_a_limit(tmp_path, caplog):
    path = write_some_bad(tmp_path / "bad")

    def labels(ledger, workers):
        dataset = open_dataset(path, "", transform=train_transform(64, 72), seed=0, batch_size=8)
        return [x for batch in train_loader(dataset, 8, workers, 2, ledger) for x in batch["label"].tolist()]

    for workers in (0, 2):
        ledger = Ledger(3)
        assert sorted(labels(ledger, workers)) == sorted([*set(range(24)) - {3, 4, 17}, 5, 5, 18])
        assert len(ledger.bad) == 3
    assert "sample 17 (17.png; number 17 in " in caplog.text
    with pytest.raises(UserError, match=r"3 bad samples where data.max_bad_samples allows 2: .*3\.png"):
        labels(Ledger(2), 1)
    dataset = open_dataset(path, "", **OPTIONS)
    ledger = Ledger(3)
    assert len([x for b in eval_loader(dataset, 5, 0, 2, None, 0, 1, ledger) for x in b["label"]]) == 24
    assert len(ledger.bad) == 3


def test_a_batch_is_what_its_samples_are(shards):
    def open_it():
        return open_dataset(
            str(shards / "train"), "", transform=train_transform(64, 72, flip=True), seed=3, batch_size=8
        )

    alone = open_it()
    for workers in (0, 1):
        loader = train_loader(open_it(), 8, workers, 2)
        for batch in loader:
            assert batch.keys() == {"image", "label", "index"}
            assert batch["image"].is_contiguous(memory_format=torch.channels_last)
            assert batch["label"].dtype == torch.int64
        # Of the last batch, drawn in order: each image as its own transform makes it, by (seed, epoch, sample).
        expected = [
            alone.transform(alone.shards[alone.spanner[i][0]][alone.spanner[i][1]]["image"], Random(f"3,1,{i}"))
            for i in range(32, 40)
        ]
        assert torch.equal(batch["image"], torch.stack(expected))


def test_streams_are_mixed_in_proportion_and_counted(shards, tmp_path):
    write_some_bad(tmp_path / "other", bad=())
    streams = [
        open_stream(str(shards / "train"), "", proportion=3.0),
        open_stream(str(tmp_path / "other"), "", proportion=1.0),
    ]
    dataset = ImageDataset(
        streams=streams, transform=train_transform(64, 72), seed=0, shuffle=True, batch_size=8, num_canonical_nodes=1
    )
    ledger = Ledger(0, ["a", "b"])
    assert sum(len(batch["label"]) for batch in train_loader(dataset, 8, 0, 2, ledger)) == 64
    assert ledger.samples == {0: 48, 1: 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {}}, "data.train: give either path or streams"),
        ({"evals": {"a-b": {"path": "EVAL"}}}, "data.evals.a-b: give it another name"),
        (
            {"evals": {"other": {"path": "EVAL", "metrics": ["sharpness"]}}},
            "'sharpness' is not among metrics: psnr, ssim",
        ),
        ({"train": {"streams": {"a": {"path": "EVAL"}}}}, "data.eval.path: it is data.train.streams.a.path too"),
        ({"train": {"streams": {"a": {"path": "/nowhere"}}}}, "data.train.streams.a.path: there is no folder"),
    ],
)
def test_wrong_mixtures_are_one_line(shards, tmp_path, change, message):
    settings = tiny_settings(shards, tmp_path / "run")
    text = json.dumps(settings["data"] | change).replace("EVAL", str(shards / "eval"))
    with pytest.raises(UserError, match=message):
        check_data(Config.model_validate(settings | {"data": json.loads(text)}))


@pytest.mark.parametrize(("seed", "who"), [pytest.param(1, "both ranks", marks=pytest.mark.long), (0, "rank 1 alone")])
def test_too_many_bad_samples_end_a_run_of_two_ranks(shards, tmp_path, seed, who):
    """At once, whichever rank met them, with one line: the other rank neither waits for ever nor shows a traceback."""
    settings = tiny_settings(shards, tmp_path / "run") | {"algorithms": {}, "seed": seed}
    path = write_some_bad(tmp_path / "bad")
    settings["data"] |= {"train": {"path": path, "resize": 72}, "max_bad_samples": 2, "batch_size": 4}
    settings["trainer"]["max_duration"] = "2ep"
    done = launch(settings, tmp_path / "launch", ranks=2, check=False)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    (line,) = [line for line in said.splitlines() if line.startswith("error: 3")]
    assert line.startswith("error: 3 bad samples where data.max_bad_samples allows 2: ")
    assert all(f"({name}.png; " in line for name in (3, 4, 17))
    assert ("another rank has ended" in said) == (who == "rank 1 alone")
    assert "Traceback" not in said
    assert max(record["data/bad_samples"] for record in metrics_of(tmp_path / "run")) < 3
    assert len(metrics_of(tmp_path / "run")) < 6  # before the first epoch's end


def test_a_run_logs_streams_bad_samples_and_each_evaluation_set(shards, tmp_path):
    from rae.training.run import train

    write_some_bad(tmp_path / "other")
    settings = tiny_settings(shards, tmp_path / "run") | {"algorithms": {"ema": {"decay": 0.9, "evaluate": "both"}}}
    settings["data"] |= {
        "train": {
            "streams": {
                "photos": {"path": str(shards / "train"), "repeat": 0.8},
                "other": {"path": str(tmp_path / "other"), "repeat": 2},
            },
            "resize": 72,
        },
        "evals": {"few": {"path": str(tmp_path / "other"), "limit": 3, "metrics": ["psnr"]}},
        "max_bad_samples": 3,
    }
    settings["data"]["evals"]["few"]["path"] = str(shutil.copytree(shards / "eval", tmp_path / "few"))
    settings["trainer"]["max_duration"] = "1ep"
    train(Config.model_validate(settings))
    logged = {key: value for line in metrics_of(tmp_path / "run") for key, value in line.items()}
    assert logged["data/samples/photos"] == 32
    assert logged["data/samples/other"] == 48
    assert logged["data/bad_samples"] == 3
    final = json.loads((tmp_path / "run/metrics.json").read_text())
    assert final.keys() == {"batch", "eval", "eval_live", "few", "few_live"}
    assert final["few"].keys() == {"psnr"}
    assert final["few"]["psnr"] != final["eval"]["psnr"]
