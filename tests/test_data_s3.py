"""Conversion from and to a bucket, verification there, and streaming from it, on a real S3 server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rae.data.dataset import open_dataset
from rae.data.decoding import train_transform
from rae.data.loaders import train_loader
from rae.data.reader import DataError
from tests.conftest import PATIENCE, ROOT, write_images
from tests.s3 import BUCKET
from tests.test_convert import FOLDER, VERIFY, convert


@pytest.fixture(scope="module")
def client(s3):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env().items():
            patch.setenv(name, value)
        yield s3.client()


@pytest.fixture(scope="module")
def converted(client, tmp_path_factory) -> tuple[Path, str]:
    """A folder of 24 images in a bucket, converted into the bucket; the same images as local files."""
    root = tmp_path_factory.mktemp("source") / "images"
    write_images(root / "cats", 12, seed=1)
    write_images(root / "犬", 12, seed=2)
    for path in root.rglob("*.png"):
        client.upload_file(str(path), BUCKET, f"raw/{path.relative_to(root)}")
    # A worker that comes back to this module makes them again.
    convert(FOLDER, f"s3://{BUCKET}/raw", f"s3://{BUCKET}/shards", "--workers=2", "--overwrite")
    return root, f"s3://{BUCKET}/shards"


def test_a_folder_in_a_bucket_becomes_the_same_shards(converted, client, tmp_path):
    root, url = converted
    convert(FOLDER, root, tmp_path / "local")
    local = json.loads((tmp_path / "local/dataset.json").read_text())
    remote = json.loads(client.get_object(Bucket=BUCKET, Key="shards/dataset.json")["Body"].read())
    assert remote["classes"] == ["cats", "犬"]
    assert remote["content_hash"] == local["content_hash"]
    refused = convert(FOLDER, root, url, check=False)
    assert (
        refused.stderr == f"error: {url} already holds a data set; give another place, or --overwrite to replace it\n"
    )
    missing = convert(FOLDER, f"s3://{BUCKET}/nothing", tmp_path / "none", check=False)
    assert "there are no images below" in missing.stderr
    assert "cannot list s3://no-such-bucket" in convert(FOLDER, "s3://no-such-bucket/x", "out", check=False).stderr


def test_an_interrupted_conversion_into_a_bucket_goes_on(converted, client):
    """What is there of it: a plan, and all parts but one."""
    root, _ = converted
    convert(FOLDER, root, f"s3://{BUCKET}/again")
    for name in ("index.json", "dataset.json", "shard.00005.mds", "conversion/000005.json"):
        client.delete_object(Bucket=BUCKET, Key=f"again/{name}")
    shard = client.get_object(Bucket=BUCKET, Key="again/shard.00004.mds")["Body"].read()
    client.put_object(Bucket=BUCKET, Key="again/shard.00004.mds", Body=b"as it was left")
    convert(FOLDER, root, f"s3://{BUCKET}/again")
    assert client.get_object(Bucket=BUCKET, Key="again/shard.00004.mds")["Body"].read() == b"as it was left"
    client.put_object(Bucket=BUCKET, Key="again/shard.00004.mds", Body=shard)
    assert convert(VERIFY, f"s3://{BUCKET}/again").stdout.endswith("24 samples are sound, 0 faults\n")


def test_changed_objects_are_not_mixed_with_what_was_stored(client, tmp_path):
    images = write_images(tmp_path / "images", 2)
    for name, content in (("0.png", (images / "000.png").read_bytes()), ("1.png", b"damaged"), ("2.heix", b"")):
        client.put_object(Bucket=BUCKET, Key=f"changing/{name}", Body=content)
    assert convert(FOLDER, f"s3://{BUCKET}/changing", tmp_path / "out", check=False).returncode == 2
    client.put_object(Bucket=BUCKET, Key="changing/0.png", Body=(images / "001.png").read_bytes())
    command = [FOLDER, f"s3://{BUCKET}/changing", tmp_path / "out", "--max-skipped=1"]
    assert "have changed since" in convert(*command, check=False).stderr
    assert "1 was not looked at: 1 .heix" in convert(*command, "--overwrite").stdout
    inside = convert(FOLDER, f"s3://{BUCKET}/changing", f"s3://{BUCKET}//changing/out", check=False)
    assert "give another place" in inside.stderr


def test_shards_stream_from_the_bucket(converted, tmp_path):
    dataset = open_dataset(
        converted[1], tmp_path / "cache", transform=train_transform(64, 80), seed=0, shuffle=True, batch_size=8
    )
    assert sum(len(batch["image"]) for batch in train_loader(dataset, 8, 2, 2)) == 24


def test_verify_finds_damage_in_the_bucket(converted, client):
    url = converted[1]
    content = bytearray(client.get_object(Bucket=BUCKET, Key="shards/shard.00002.mds")["Body"].read())
    whole = bytes(content)
    content[len(content) // 2] ^= 1
    client.put_object(Bucket=BUCKET, Key="shards/shard.00002.mds", Body=bytes(content))
    client.copy_object(Bucket=BUCKET, Key="spare", CopySource=f"{BUCKET}/shards/shard.00003.mds")
    client.delete_object(Bucket=BUCKET, Key="shards/shard.00003.mds")
    found = convert(VERIFY, url, check=False)
    client.put_object(Bucket=BUCKET, Key="shards/shard.00002.mds", Body=whole)
    client.copy_object(Bucket=BUCKET, Key="shards/shard.00003.mds", CopySource=f"{BUCKET}/spare")
    assert found.returncode == 1
    assert found.stdout.splitlines()[:2] == [
        f"{url}/shard.00002.mds is damaged: its xxh64 hash is not that of index.json",
        f"{url}/shard.00003.mds is listed in index.json but absent",
    ]
    assert "there is no s3://images/nothing/index.json" in convert(VERIFY, "s3://images/nothing", check=False).stderr


def test_a_shard_that_is_gone_from_the_bucket_is_named_at_once(converted, client, tmp_path, monkeypatch):
    _, url = converted
    key = "shards/shard.00000.mds"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: pytest.fail("it is tried again"))
    client.delete_object(Bucket=BUCKET, Key=key)
    try:
        dataset = open_dataset(url, tmp_path / "cache", transform=train_transform(64, 72, False), seed=0)
        with pytest.raises(DataError, match=rf"^{url}/shard\.00000\.mds is absent; restore it or convert again$"):
            dataset[0]
    finally:
        client.put_object(Bucket=BUCKET, Key=key, Body=content)


@pytest.mark.long
def test_four_machines_convert_into_a_bucket_together(client, s3, tmp_path):
    """Each a part, one of them killed twice and started again; the last to end finishes what one machine makes."""
    root, url = write_images(tmp_path / "images/a", 120), f"s3://{BUCKET}/together"
    (tmp_path / "images/b").mkdir()
    for path in list(root.iterdir())[::2]:
        path.rename(tmp_path / "images/b" / path.name)
    words = [sys.executable, FOLDER, str(tmp_path / "images"), url, "--workers=1", "--shard-size=4kb"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def begin(part: int) -> subprocess.Popen:
        return subprocess.Popen([*words, f"--part={part}/4"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    def written(part: int) -> int:
        names = [Path(key).stem for key in s3.keys("together/conversion/0")]
        return sum(int(name) % 4 == part - 1 for name in names)

    ended = begin(1)
    assert "this part is written; the last of the others to end finishes the data set" in ended.communicate()[0]
    for known in (0, 1):  # of the second part's records
        killed = begin(2)
        end = time.monotonic() + PATIENCE
        while written(2) <= known:
            assert time.monotonic() < end
            time.sleep(0.01)
        killed.kill()
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
    others = [begin(part) for part in (2, 3, 4)]
    told = [other.communicate()[0] for other in others]
    assert [other.returncode for other in others] == [0, 0, 0]
    assert sum("120 images, 2 classes" in each for each in told) >= 1
    convert(FOLDER, tmp_path / "images", tmp_path / "alone", "--shard-size=4kb")
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir() if path.name != "dataset.json"}
    together = {
        key.rpartition("/")[2]: client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        for key in s3.keys("together/")
        if "/conversion/" not in key and not key.endswith("dataset.json")
    }
    assert len(alone) > 60
    assert together == alone
    summaries = [json.loads((tmp_path / "alone/dataset.json").read_text())]
    summaries.append(json.loads(client.get_object(Bucket=BUCKET, Key="together/dataset.json")["Body"].read()))
    assert len({json.dumps({**each, "seconds": 0}) for each in summaries}) == 1
    refused = convert(FOLDER, tmp_path / "images", url, "--part=5/4", check=False)
    assert "'5/4': write it as 3/8, of 1/8 to 8/8" in refused.stderr
