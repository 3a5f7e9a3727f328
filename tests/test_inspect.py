"""What `python -m rae inspect` says of everything that this project writes, and of its damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rae.__main__ import main
from rae.config.errors import UserError
from rae.exchange.inspection.dispatch import inspect
from rae.survival.checkpoints import CONFIG, RECORD, SHARDED, STATE, in_form, seal
from tests.conftest import GOLDEN
from tests.test_exports import make_encoder, make_source


def cells(report, title: str) -> dict[str, tuple]:
    return {row[0]: row[1:] for row in report.tables[title]}


def test_a_run_and_what_is_wrong_in_it(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    state = checkpoints / "ep1-ba8" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    (checkpoints / "ep0-ba4/part-0-of-1.json").unlink()
    (checkpoints / "ep0-ba2" / STATE).unlink()
    with (checkpoints / "ep1-ba6" / STATE).open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    # Beside the configuration, not where that says the run was.
    report = inspect(str(checkpoints))
    rows = cells(report, "checkpoints")
    sealed = [checkpoints / "ep2-ba10" / name for name in (STATE, CONFIG, RECORD)]
    size = sum(path.stat().st_size for path in sealed)
    assert rows["ep2-ba10"] == ("2", "10", f"{size:,}", "complete, one file")
    assert rows["ep1-ba8"][-1].startswith("damaged: state.pt has 1,000 bytes instead of ")
    assert rows["ep0-ba4"][-1] == "incomplete: its writing was cut short"
    assert rows["ep0-ba2"][-1] == "damaged: state.pt is missing"
    assert rows["ep1-ba6"][-1] == "complete, one file"  # its size is right: the hash tells
    assert [fault.partition(":")[0] for fault in report.faults] == ["ep1-ba8", "ep0-ba2"]
    assert "damaged: state.pt is damaged" in cells(inspect(str(checkpoints), verify=True), "checkpoints")["ep1-ba6"][-1]
    whole = inspect(str(undisturbed))
    assert whole.kind == "a run" and not whole.faults
    assert cells(whole, "configuration")["algorithms"] == ("perceptual, adversarial, ema",)
    psnr = json.loads((undisturbed / "metrics.json").read_text())["eval"]["psnr"]
    assert f"psnr {psnr:.4g}" in cells(whole, "figures after 10 steps")["eval"][0].splitlines()


def test_figures_without_a_number(undisturbed, tmp_path):
    shutil.copy(undisturbed / CONFIG, tmp_path)
    (tmp_path / "metrics.json").write_text('{"batch": 10, "eval": {"psnr": null, "ssim": 0.5}}')
    assert cells(inspect(str(tmp_path)), "figures after 10 steps")["eval"] == ("psnr not finite\nssim 0.5",)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_checkpoints(undisturbed, tmp_path):
    checkpoint = undisturbed / "checkpoints/ep2-ba10"
    report = inspect(str(checkpoint))
    contents = cells(report, "contents")
    trained = contents["model: decoder"]
    assert contents["EMA: average"] == trained
    assert int(contents["optimizers"][1].replace(",", "")) > 2 * int(trained[1].replace(",", ""))
    assert "Adversarial: discriminator" in contents
    sharded = tmp_path / "ep2-ba10"
    shutil.copytree(in_form(checkpoint, True, tmp_path / "converted"), sharded)
    shutil.copy(checkpoint / CONFIG, sharded)
    seal(sharded, sorted(path.name for path in sharded.iterdir()), 0, 1, "one")
    report = inspect(str(sharded))
    assert report.kind == "a checkpoint, sharded" and not report.faults
    assert cells(report, "contents")["model: decoder"][:2] == trained[:2]
    shutil.copy(checkpoint / STATE, tmp_path / "some.pt")
    assert cells(inspect(str(tmp_path / "some.pt")), "contents") == contents
    with (sharded / SHARDED).open("r+b") as file:
        file.truncate(10)
    assert ".metadata has 10 bytes" in inspect(str(sharded)).faults[0]


def test_exports(tmp_path):
    from rae.exchange.handover import export

    source = make_source(make_encoder("mae", tmp_path / "mae"), stats=True)
    for layout in ("rae", "published", "diffusers"):
        export(source, str(tmp_path / layout), layout)
    decoder = sum(p.numel() for p in source.rae.decoder.parameters())
    ours = inspect(str(tmp_path / "rae"))
    assert not ours.faults and cells(ours, "weights")["decoder"][1] == f"{decoder:,}"
    assert cells(ours, "weights")["statistics"][1] == f"{2 * 64 * 16 * 16:,}"
    published = inspect(str(tmp_path / "published"))
    assert cells(published, "decoder")["parameters"] == (f"{decoder:,}",)
    assert cells(published, "decoder")["num heads"] == ("4",)
    assert cells(published, "statistics")["shape"] == ("64 × 16 × 16",)
    theirs = inspect(str(tmp_path / "diffusers"))
    assert not theirs.faults and cells(theirs, "weights")["decoder"][1] == f"{decoder:,}"
    assert cells(theirs, "configuration")["latent statistics"] == ("yes",)
    weights = tmp_path / "rae/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "bytes instead of" in inspect(str(tmp_path / "rae")).faults[0]
    weights.write_bytes(b"\x10")
    assert "model.safetensors is damaged" in inspect(str(tmp_path / "rae")).faults[0]
    weights.unlink()
    assert inspect(str(tmp_path / "rae")).faults == ["model.safetensors is missing"]


def test_an_export_of_another_decoder(tmp_path):
    from rae.exchange.handover import export

    source = make_source(make_encoder("mae", tmp_path / "mae"), stats=False)
    export(source, str(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["model"]["decoder"]["depth"] = 3
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert "decoder.blocks.2.attn.proj.bias is missing (and 11 more)" in inspect(str(tmp_path / "out")).faults[0]


def test_data_sets(shards, tmp_path):
    whole = inspect(str(shards / "train"))
    assert not whole.faults
    rows = cells(whole, "data")
    assert (rows["samples"], rows["classes"]) == (("40",), ("2: a, b",))
    assert "image (bytes)" in rows["columns"][0]
    shutil.copytree(shards / "train", tmp_path / "data")
    files = sorted((tmp_path / "data").glob("*.mds"))
    files[0].unlink()
    files[1].write_bytes(b"")
    faults = inspect(str(tmp_path / "data")).faults
    assert faults[0].startswith("1 of ") and faults[0].endswith(f"missing, such as {files[0].name}")
    assert faults[1].startswith(f"{files[1].name} has 0 bytes instead of ")


def test_a_bucket(undisturbed, shards, s3, tmp_path, monkeypatch):
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    bucket = "s3://images/looked-at"
    for folder in (undisturbed / "checkpoints/ep2-ba10", shards / "eval"):
        for path in folder.iterdir():
            s3.client().upload_file(str(path), "images", f"looked-at/{folder.name}/{path.name}")
    main(["export", str(undisturbed), f"{bucket}/export"])
    assert cells(inspect(bucket), "checkpoints")["ep2-ba10"][-1] == "complete, one file"
    assert cells(inspect(f"{bucket}/ep2-ba10"), "configuration")["length"] == ("2ep",)
    assert cells(inspect(f"{bucket}/eval"), "data")["samples"] == ("12",)
    export = inspect(f"{bucket}/export")
    assert not export.faults and cells(export, "weights")["decoder"][0] == "31"


def test_the_command(undisturbed, tmp_path, capsys):
    main(["inspect", str(GOLDEN / "stat.pt")])
    assert "32 × 4 × 4" in capsys.readouterr().out
    checkpoint = tmp_path / "ep2-ba10"
    shutil.copytree(undisturbed / "checkpoints/ep2-ba10", checkpoint)
    (checkpoint / STATE).write_bytes(b"1")
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(checkpoint)])
    assert end.value.code == 1 and "damaged: state.pt has 1 bytes" in capsys.readouterr().out


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {"model": {}, "code": Code()}}, "x.pt")
    with pytest.raises(UserError, match="which could run code"):
        inspect("x.pt")
    assert not Path("executed").exists()


def test_what_is_not_known(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "list.pt").parent.mkdir(exist_ok=True)
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    for path, told in {
        "none": "there is no folder",
        "none.pt": "there is no file",
        "": "holds nothing that is known here: bert, cut.pt, list.pt, notes.txt",
        "cut.pt": "truncated, damaged or no checkpoint",
        "list.pt": "no tensors by name, but a list",
        "bert": "that of bert, which is not known here",
    }.items():
        with pytest.raises(UserError, match=told):
            inspect(str(tmp_path / path))
