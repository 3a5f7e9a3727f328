"""Weights out and in: our exports, published files, and diffusers folders, read by diffusers itself."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

import rae
from rae.__main__ import main
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.encoders.dinov2 import DINOv2
from rae.autoencoder.rae import RAE
from rae.config import registry
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import Model
from rae.exchange.exports import Source
from rae.exchange.handover import export, import_from
from rae.exchange.places import new_folder
from rae.exchange.sources import open_discriminator, open_source
from rae.survival.checkpoints import CONFIG, METRICS, STATE, in_form, seal
from tests.conftest import GOLDEN, ROOT, TINY, golden, load_newest, run

IMAGE = torch.rand(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))
SIZES = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96}


def recon(model: RAE, image: torch.Tensor = IMAGE) -> torch.Tensor:
    with torch.no_grad():
        return model(image)


def randomize(module: nn.Module, seed: int) -> None:
    """Weights of which none is a constant that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def make_encoder(kind: str, folder: Path) -> dict:
    """An encoder such as diffusers can express: heads of 64 channels, published table and MLP sizes; but small."""
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTMAEConfig,
        ViTMAEModel,
    )

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = {
        "dinov2": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, patch_size=14, image_size=518)),
        "mae": lambda: ViTMAEModel(ViTMAEConfig(**small)),
        "siglip2": lambda: SiglipVisionModel(SiglipVisionConfig(**small, image_size=256)),
    }[kind]()
    randomize(model, 1)
    model.save_pretrained(folder)
    processor = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.25, 0.3],
        "image_processor_type": "ViTImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return {kind: {"pretrained": str(folder), "input_size": 224 if kind == "dinov2" else 256}}


def make_source(entry: dict, stats: bool, seed: int = 0, **sizes) -> Source:
    encoder = build("encoder", entry, "model.encoder")
    decoder = Decoder(encoder.embed_dim, 64, **{**SIZES, **sizes})
    randomize(decoder, seed)
    model = RAE(encoder, decoder, noise_tau=0.8).eval()
    if stats:
        generator = torch.Generator().manual_seed(5)
        model.latent_mean = torch.randn(model.latent_shape, generator=generator)
        # Of all sizes: near zero, where the eps decides, too.
        model.latent_var = 10 ** torch.empty(model.latent_shape).uniform_(-7, 1, generator=generator)
    return Source(model, 64, "tiny", "given", Model(encoder=entry, decoder={**SIZES, **sizes}))


COMBINATIONS = [(kind, stats) for kind in ("dinov2", "mae", "siglip2") for stats in (False, True)]


@pytest.fixture(scope="module")
def diffusers_folders(tmp_path_factory) -> dict[tuple[str, bool], tuple[Source, Path]]:
    """Every combination exported, and read by diffusers in one process."""
    root = tmp_path_factory.mktemp("diffusers")
    entries = {kind: make_encoder(kind, root / f"{kind}-encoder") for kind in ("dinov2", "mae", "siglip2")}
    made = {}
    for kind, stats in COMBINATIONS:
        source, folder = make_source(entries[kind], stats), root / f"{kind}-{stats}"
        export(source, str(folder), "diffusers")
        made[kind, stats] = (source, folder)
    save_file({"image": IMAGE}, root / "images.safetensors")
    folders = [str(folder) for _, folder in made.values()]
    script = [str(ROOT / "tests/diffusers_reads.py"), str(root / "images.safetensors")]
    run(sys.executable, *script, *folders, env={"HF_HUB_OFFLINE": "1"})
    return made


@pytest.mark.parametrize(("kind", "stats"), COMBINATIONS)
def test_diffusers_makes_the_same_images(diffusers_folders, kind, stats):
    source, folder = diffusers_folders[kind, stats]
    theirs, ours = load_file(f"{folder}.safetensors"), recon(source.rae)
    with torch.no_grad():
        latent = source.rae.encode(IMAGE)
    assert ours.std() > 0.1
    assert (theirs["recon"] - ours).abs().max() < 1e-4
    assert torch.allclose(theirs["latent"], latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "stats"), COMBINATIONS)
def test_import_what_diffusers_saved(diffusers_folders, kind, stats, tmp_path):
    source, folder = diffusers_folders[kind, stats]
    main(["import", f"{folder}-saved", str(tmp_path / "out")])
    imported = rae.load(tmp_path / "out")
    assert (recon(imported) - recon(source.rae)).abs().max() < 1e-5
    assert (imported.latent_mean is not None) == stats
    ours = source.rae.decoder.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in imported.decoder.state_dict().items())


def test_import_a_folder_that_diffusers_alone_could_make(diffusers_folders, tmp_path):
    """Another number of tokens, whose positions diffusers spreads, and a scaling factor."""
    _, beside = diffusers_folders["dinov2", True]
    folder = beside.parent / "native"
    main(["import", str(folder), str(tmp_path / "out"), "--name", "native"])
    theirs, imported = load_file(f"{folder}.safetensors"), rae.load(tmp_path / "out")
    with torch.no_grad():
        latent = imported.encode(IMAGE)
    assert theirs["recon"].std() > 0.05
    assert (recon(imported) - theirs["recon"]).abs().max() < 1e-4
    assert (latent - theirs["latent"]).abs().max() < 1e-4
    main(["export", str(tmp_path / "out"), str(tmp_path / "again"), "--format", "diffusers"])  # and back
    assert torch.allclose(recon(open_source(str(tmp_path / "again")).rae), recon(imported), atol=1e-5)


def test_refuse_what_diffusers_cannot_express(tmp_path):
    wide = make_encoder("mae", tmp_path / "mae")
    timm = {"timm": {"model": "tf_efficientnet_lite0", "weights": "random", "levels": [2], "input_size": 64}}
    cases = {
        "heads": (
            make_source(TINY["dinov2"], False, patch_size=16),
            "image_size 56, and diffusers builds dinov2 with 518",
        ),
        "timm": (make_source(timm, False, patch_size=8), "its encoder is Timm"),
        "grid": (make_source(wide, False, patch_size=8), "8 tokens a side and its encoder 16"),
        "trained": (make_source(wide, False, trainable_positions=True), "position table was trained"),
    }
    few = {"mae": {**wide["mae"], "input_size": 64}}
    cases["positions"] = (make_source(few, False, patch_size=16), "diffusers' positions are those of 16")
    for name, (source, fault) in cases.items():
        with pytest.raises(UserError, match=fault):
            export(source, str(tmp_path / name), "diffusers")
        assert not list(tmp_path.glob(f"*{name}*out*")) and not (tmp_path / name).exists()


@pytest.fixture(scope="module")
def trained(undisturbed) -> Source:
    return open_source(str(undisturbed))


def test_export_and_load(undisturbed, trained, tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["export", str(undisturbed), out])
    assert "--with-encoder puts it into the export" in capsys.readouterr().out
    loaded = rae.load(out)
    assert not loaded.training
    assert recon(loaded).equal(recon(trained.rae))
    assert recon(RAE.from_pretrained(out)).equal(recon(trained.rae))
    again = open_source(out)
    assert (again.name, again.weights, again.trained) == ("run-ep2-ba10", "ema", {"epoch": 2, "batch": 10})
    assert again.figures == trained.figures and again.config.trainer["max_duration"] == "2ep"
    card = (tmp_path / "out/README.md").read_text()
    metrics = json.loads((undisturbed / METRICS).read_text())["eval"]
    for told in (f"{metrics['psnr']:.4g}", "2 epochs, 10 steps", "32 × 4 × 4", 'rae.load("FOLDER")', "moving average"):
        assert told in card
    with pytest.raises(SystemExit):
        main(["export", str(undisturbed), out])
    assert "--overwrite" in capsys.readouterr().err
    main(["export", str(undisturbed), out, "--weights", "live", "--overwrite"])
    live = load_newest(undisturbed / "checkpoints")["model"]
    loaded = rae.load(out)
    assert all(torch.equal(tensor, live[f"rae.{name}"]) for name, tensor in loaded.state_dict().items())
    assert not recon(loaded).equal(recon(trained.rae))
    assert "None are known" in (tmp_path / "out/README.md").read_text()  # the run evaluated the average


def test_an_export_takes_its_place_wherever_that_is(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/model.pt").touch()
    (tmp_path / "real/config.json").write_text('{"format": "rae"}')
    (tmp_path / "link").symlink_to("real")
    for out, overwrite in ((f"{tmp_path}/link", True), (f"{tmp_path}/real/../new", False)):
        with new_folder(out, overwrite) as folder:
            (folder / "config.json").write_text(out)
        assert Path(out, "config.json").read_text() == out
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "real/model.pt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "new"}
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(UserError, match="is the folder that you are in"), new_folder(".", True):
        pass
    assert (tmp_path / "real/config.json").is_file()


def test_only_what_this_program_wrote_is_replaced(tmp_path, s3, monkeypatch):
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    source = make_source(make_encoder("mae", tmp_path / "mae"), True, patch_size=4)
    for layout in ("rae", "published", "diffusers"):
        export(source, str(tmp_path / layout), layout)
        export(source, str(tmp_path / layout), "rae", overwrite=True)
        assert json.loads((tmp_path / layout / "config.json").read_text())["format"] == "rae"
    (tmp_path / "rae/README.md").write_text("my own words")
    (tmp_path / "diffusers/config.json").unlink()  # as an upload that was cut short leaves it
    for layout in ("rae", "diffusers"):
        export(source, str(tmp_path / layout), layout, overwrite=True)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "mae" / file, theirs)
        s3.client().upload_file(str(theirs / file), "images", f"theirs/{file}")
    (theirs / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    for out in (str(theirs), "s3://images/theirs"):
        with pytest.raises(UserError, match=f"^{out} is no export, but another program's; give another folder$"):
            export(source, out, overwrite=True)
    assert json.loads((theirs / "config.json").read_text())["model_type"] == "vit_mae"
    assert s3.keys("theirs") == ["theirs/config.json", "theirs/model.safetensors"]


PLUGIN = """
from pathlib import Path
import torch
from rae.autoencoder.encoders import Encoder
from rae.config.registry import register

Path(__file__).with_suffix(".ran").touch()

@register("encoder", "patch_means")
class PatchMeans(Encoder):
    def __init__(self):
        super().__init__(3, 64, 8, [0.5] * 3, [0.5] * 3)
    def tokens(self, image):
        return torch.nn.functional.avg_pool2d(image, 8).flatten(2).transpose(1, 2)
"""


def test_what_an_export_names_is_imported_only_when_the_user_says_so(tmp_path, monkeypatch, capsys):
    registry.plugins("encoder")
    monkeypatch.setitem(registry._plugins, "encoder", dict(registry._plugins["encoder"]))
    mine, out, ran = tmp_path / "mine.py", str(tmp_path / "out"), tmp_path / "mine.ran"
    mine.write_text(PLUGIN)
    registry.import_plugins([str(mine)])
    source = make_source({"patch_means": {}}, False, patch_size=8)
    source.imports = [str(mine)]
    export(source, out)
    assert recon(rae.load(out)).equal(recon(source.rae))  # registered already
    ran.unlink()

    def forget():
        registry._plugins["encoder"].pop("patch_means", None)
        monkeypatch.delitem(sys.modules, source.rae.encoder.network.__module__, raising=False)

    forget()
    told = f"out: its encoder 'patch_means' needs '{mine}' of this machine; .* --imports, or rae.load"
    for command in (["export", out, f"{out}-2"], ["stats", out, f"{out}.pt"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        line = capsys.readouterr().err
        assert end.value.code == 2 and re.search(told, line) and line.count("\n") == 1
    with pytest.raises(UserError, match=told):
        rae.load(out)
    monkeypatch.setenv("COLUMNS", "300")
    main(["inspect", out])
    assert str(mine) in capsys.readouterr().out and not ran.exists()
    assert recon(rae.load(out, imports=True)).equal(recon(source.rae)) and ran.exists()
    forget()
    main(["export", out, f"{out}-2", "--imports"])
    assert json.loads(Path(f"{out}-2/config.json").read_text())["imports"] == [str(mine)]


def test_an_export_that_needs_no_plugin_is_loaded_whatever_it_names(tmp_path):
    source = make_source(TINY["mae"], False, patch_size=16)
    export(source, str(tmp_path / "out"))
    told = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit")
    (tmp_path / "out/config.json").write_text(json.dumps({**told, "imports": [str(tmp_path / "evil.py")]}))
    assert recon(rae.load(tmp_path / "out")).equal(recon(source.rae))
    assert recon(rae.load(tmp_path / "out", imports=True)).equal(recon(source.rae))


def test_self_contained_exports(tmp_path):
    for kind, entry in {
        **TINY,
        "timm": {"timm": {"model": "tf_efficientnet_lite0", "weights": "random", "levels": [1, 2], "input_size": 64}},
    }.items():
        entry = json.loads(json.dumps(entry))
        if kind != "timm":
            shutil.copytree(entry[kind]["pretrained"], tmp_path / f"{kind}-encoder")
            entry[kind]["pretrained"] = str(tmp_path / f"{kind}-encoder")
        source = make_source(entry, True, patch_size=64 // build("encoder", entry, "").grid)
        expected = recon(source.rae)
        for name in ("included", "named"):
            export(source, str(tmp_path / kind / name), with_encoder=name == "included")
        shutil.rmtree(tmp_path / f"{kind}-encoder", ignore_errors=True)
        shutil.move(tmp_path / kind / "included", tmp_path / kind / "moved")
        assert recon(rae.load(tmp_path / kind / "moved")).equal(expected)
        again = open_source(str(tmp_path / kind / "moved"))
        export(again, str(tmp_path / kind / "again"))
        assert recon(rae.load(tmp_path / kind / "again")).equal(expected)
        if kind != "timm":
            with pytest.raises(UserError, match=f"cannot load the encoder .*{kind}-encoder"):
                rae.load(tmp_path / kind / "named")
            override = f"model.encoder.{kind}.pretrained={TINY[kind][kind]['pretrained']}"
            assert recon(rae.load(tmp_path / kind / "named", overrides=[override])).equal(expected)


def test_published_files_round_trip(undisturbed, trained, tmp_path):
    encoder = OmegaConf.to_yaml(TINY["dinov2"])
    out = str(tmp_path / "out")
    main(["export", str(undisturbed), out, "--format", "published", "--stats", str(GOLDEN / "stat.pt")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.pt", "config.json", "stat.pt", "README.md", "config.yaml")
    }
    main(["import", out, str(tmp_path / "in"), "--encoder", encoder])
    loaded = rae.load(tmp_path / "in")
    expected, weights = trained.rae.decoder.state_dict(), loaded.decoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    stats = torch.load(GOLDEN / "stat.pt")
    assert loaded.latent_mean.equal(stats["mean"]) and loaded.latent_var.equal(stats["var"])
    assert torch.allclose(recon(loaded), recon(trained.rae), atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "mae", "siglip2"])
def test_import_the_published_golden_decoder(kind, tmp_path):
    reference, config = golden("rae_forward"), str(GOLDEN / "decoder-tiny/config.json")
    arguments = [
        str(GOLDEN / "decoder-tiny/model.pt"),
        str(tmp_path / "out"),
        "--encoder",
        OmegaConf.to_yaml(TINY[kind]),
    ]
    main(["import", *arguments, "--decoder-config", config, "--stats", str(GOLDEN / "stat.pt")])
    made = recon(rae.load(tmp_path / "out"), reference["images"])
    assert torch.allclose(made, reference[f"{kind}_stats.recon"], rtol=1e-4, atol=1e-4)


def test_import_trained_positions(tmp_path):
    state = torch.load(GOLDEN / "decoder-tiny/model.pt")
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.1
    torch.save(state, tmp_path / "model.pt")
    shutil.copy(GOLDEN / "decoder-tiny/config.json", tmp_path)
    main(["import", str(tmp_path), str(tmp_path / "out"), "--encoder", OmegaConf.to_yaml(TINY["mae"])])
    assert rae.load(tmp_path / "out").decoder.positions.equal(state["decoder_pos_embed"])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_sources_of_every_kind(undisturbed, trained, tmp_path):
    expected, checkpoints = recon(trained.rae), undisturbed / "checkpoints"
    sharded = tmp_path / "checkpoints" / "ep2-ba10"
    converted = in_form(checkpoints / "ep2-ba10", True, tmp_path / "converted")
    shutil.copytree(converted, sharded)
    shutil.copy(checkpoints / "ep2-ba10" / CONFIG, sharded)
    seal(sharded, sorted(path.name for path in sharded.iterdir()), 0, 1, "one")
    (tmp_path / "composer").mkdir()
    shutil.copy(checkpoints / "ep2-ba10" / STATE, tmp_path / "composer/ep2-ba10-rank0.pt")
    shutil.copy(checkpoints / "ep2-ba10" / CONFIG, tmp_path / "composer")
    run_yaml = str(undisturbed.parent / "run.yaml")
    for source in (checkpoints, checkpoints / "ep2-ba10", sharded, tmp_path / "checkpoints", tmp_path, run_yaml):
        opened = open_source(str(source))
        assert recon(opened.rae).equal(expected), source
        assert opened.weights == "ema" and opened.image_size == 64
    assert recon(open_source(str(tmp_path / "composer/ep2-ba10-rank0.pt")).rae).equal(expected)
    older = open_source(str(checkpoints / "ep0-ba4"))
    assert older.trained == {"epoch": 0, "batch": 4} and not older.figures
    discriminator = open_discriminator(trained)
    assert discriminator(torch.rand(2, 3, 64, 64)).shape[0] == 2
    assert open_discriminator(make_source(TINY["mae"], False, patch_size=16)) is None


def test_a_damaged_checkpoint_gives_way_to_an_older_one(undisturbed, tmp_path, caplog):
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    with (tmp_path / "checkpoints/ep2-ba10" / STATE).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert open_source(str(tmp_path / "checkpoints")).trained == {"epoch": 1, "batch": 10}
    assert "ep2-ba10 cannot be used: state.pt is damaged" in caplog.text
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        open_source(str(tmp_path / "checkpoints/ep2-ba10"))


def test_buckets(undisturbed, trained, s3, tmp_path, monkeypatch):
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    expected, bucket = recon(trained.rae), "s3://images/handover"
    for path in (undisturbed / "checkpoints/ep2-ba10").iterdir():
        s3.client().upload_file(str(path), "images", f"handover/run/checkpoints/ep2-ba10/{path.name}")
    main(["export", f"{bucket}/run", f"{bucket}/out", "--with-encoder"])
    assert "handover/out/encoder/model.safetensors" in s3.keys("handover/out")
    assert recon(rae.load(f"{bucket}/out")).equal(expected)
    main(["export", str(undisturbed), f"{bucket}/out", "--overwrite"])
    assert s3.keys("handover/out") == [f"handover/out/{name}" for name in sorted((*OURS,))]
    assert recon(open_source(f"{bucket}/out").rae).equal(expected)
    main(["export", f"{bucket}/out", f"{bucket}/published", "--format", "published"])
    published = [f"{bucket}/published/model.pt", "--decoder-config", f"{bucket}/published/config.json"]
    main(["import", *published, str(tmp_path / "in"), "--encoder", OmegaConf.to_yaml(TINY["dinov2"])])
    assert torch.allclose(recon(rae.load(tmp_path / "in")), expected, atol=1e-6)
    with pytest.raises(UserError, match="there is nothing in s3://images/handover/none"):
        open_source(f"{bucket}/none")
    with pytest.raises(UserError, match=r"cannot read s3://images/handover/none/model\.pt: it does not exist"):
        import_from(f"{bucket}/none/model.pt", "mae", scratch=tmp_path)


OURS = ("README.md", "config.json", "config.yaml", "model.safetensors")


def faults(undisturbed: Path, root: Path) -> dict[str, tuple[list[str], str]]:
    """Commands that cannot succeed, and what their one line says."""
    out, run_dir, decoder = str(root / "out"), str(undisturbed), str(GOLDEN / "decoder-tiny")
    main(["export", run_dir, str(root / "export")])
    (root / "notes").mkdir()
    (root / "notes/thesis.txt").write_text("do not delete")
    state = load_file(root / "export/model.safetensors")
    for name, change in {"fewer": {"decoder.norm.bias": None}, "more": {"x": torch.ones(1)}}.items():
        shutil.copytree(root / "export", root / name)
        changed = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, root / name / "model.safetensors")
    for name, text in {
        "broken": "{",
        "typo": json.dumps({**json.loads((root / "export/config.json").read_text()), "nam": "x"}),
        "other": '{"model_type": "bert"}',
    }.items():
        shutil.copytree(root / "export", root / name)
        (root / name / "config.json").write_text(text)
    shutil.copytree(root / "export", root / "cut")
    (root / "cut/model.safetensors").write_bytes((root / "export/model.safetensors").read_bytes()[:1000])
    (root / "code").mkdir()
    torch.save({"state": {"model": {}, "rng": DINOv2}}, root / "code/x.pt")
    (root / "empty").mkdir()
    (root / "empty.pt").touch()
    torch.save({"mean": DINOv2}, root / "code.pt")
    mae, lite0 = OmegaConf.to_yaml(TINY["mae"]), "{timm: {model: tf_efficientnet_lite0, weights: random, levels: [1]}}"
    diffusers = ["--format", "diffusers"]
    return {
        "no source": (["export", str(root / "none"), out], "there is no folder"),
        "an empty folder": (["export", str(root / "empty"), out], "no autoencoder: the folder holds nothing"),
        "a file": (["export", str(root / "notes/thesis.txt"), out], "is a file of no known kind"),
        "a store": (["export", "foo://bucket/run", out], "error: foo://bucket/run: foo:// is no known kind of storage"),
        "another folder": (["export", str(root / "notes"), out], "the folder holds thesis.txt; give a run's folder"),
        "a published decoder": (["export", decoder, out], "make an export of it with `python -m rae import`"),
        "statistics": (["export", str(GOLDEN / "stat.pt"), out], "latent statistics, not an autoencoder"),
        "code": (["export", str(root / "code/x.pt"), out], "could run code; it is refused"),
        "foreign files": (
            ["export", run_dir, str(root / "notes"), "--overwrite"],
            "holds thesis.txt, which is no part",
        ),
        "a file in the way": (["export", run_dir, str(root / "notes/thesis.txt")], "is a file; give a folder"),
        "no place": (["export", run_dir, ""], "OUT is empty"),
        "the root": (["export", run_dir, "/", "--overwrite"], "/ holds "),
        "no such model": (["export", "nobody/nothing", out], "and the hub"),
        "in the way": (["export", run_dir, str(root / "export")], "--overwrite to replace it"),
        "an override": (["export", run_dir, out, "--set", "model.encodr=1"], "unknown key 'model.encodr'"),
        "no override": (["export", run_dir, out, "--set", "mae"], "must have the form key=value"),
        "no encoder": (
            ["export", run_dir, out, "--set", "model.encoder.dinov2.pretrained=/no/encoder"],
            "cannot load the encoder '/no/encoder'",
        ),
        "other sizes": (
            ["export", run_dir, out, "--set", "model.decoder.embed_dim=24"],
            "decoder.blocks.0.attn.proj.bias is (48,), not (24,)",
        ),
        "other statistics": (
            ["export", run_dir, out, "--stats", str(GOLDEN / "decoder-tiny/model.pt")],
            "'mean' must have shape (32, 4, 4), but is missing",
        ),
        "an empty file": (["export", run_dir, out, "--stats", str(root / "empty.pt")], "empty.pt: it is empty"),
        "code in statistics": (["export", run_dir, out, "--stats", str(root / "code.pt")], "which could run code"),
        "no statistics": (["export", run_dir, out, "--stats", "none.pt"], "there is no file 'none.pt'"),
        "an encoder twice": (
            ["export", run_dir, out, *diffusers, "--with-encoder"],
            "goes with --format rae",
        ),
        "too little": (["export", str(root / "fewer"), out], "decoder.norm.bias is missing"),
        "too much": (["export", str(root / "more"), out], "x is unexpected"),
        "averages only": (["export", str(root / "export"), out, "--weights", "live"], "holds averaged weights only"),
        "broken": (["export", str(root / "broken"), out], "broken/config.json is damaged"),
        "cut": (["export", str(root / "cut"), out], "cannot read weights from"),
        "typo": (["export", str(root / "typo"), out], "unknown key 'nam' (did you mean 'name'?)"),
        "another program's": (["export", str(root / "other"), out], "is not an export's"),
        "which encoder": (["import", decoder, out], "give either --encoder '{dinov2: {…}}' or --yaml"),
        "no yaml": (["import", decoder, out, "--encoder", "{mae: "], "is no YAML"),
        "no such encoder": (
            ["import", decoder, out, "--encoder", "maee"],
            "'maee' (did you mean 'mae'?)",
        ),
        "heads": (["import", f"{decoder}/model.pt", out, "--encoder", mae], "its number of heads is not known"),
        "wrong heads": (
            ["import", decoder, out, "--encoder", mae, "--decoder-config", str(root / "heads.json")],
            "embed_dim 48 is not a multiple of num_heads 5",
        ),
        "other latents": (
            [
                "import",
                decoder,
                out,
                "--encoder",
                lite0,
            ],
            "decodes latents of 32 channels, but the encoder gives 24",
        ),
        "nothing published": (["import", str(GOLDEN / "stat.pt"), out, "--encoder", mae], "there is no decoder in it"),
        "an export": (["import", str(root / "export"), out], "is an export already"),
        "neither": (["import", str(root / "notes"), out], "notes: there is neither model.pt nor"),
    }


def test_wrong_inputs_are_one_line(undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "heads.json").write_text('{"decoder_num_attention_heads": 5}')
    for name, (command, told) in faults(undisturbed, tmp_path).items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(command)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.startswith("error: ") and told in line, (name, line)
        assert line.count("\n") == 1 and len(line) < 600, (name, line)
        assert not (tmp_path / "out").exists(), name
    assert (tmp_path / "notes/thesis.txt").read_text() == "do not delete"


@pytest.mark.parametrize("override", ["model.decoder={", "name=${nope}"])
def test_an_override_of_an_export_that_is_no_yaml_is_one_line(override, capsys, tmp_path):
    source = str(ROOT / "tests/before/rae")
    with pytest.raises(SystemExit):
        main(["export", source, str(tmp_path / "out"), "--set", override])
    error = capsys.readouterr().err
    assert error.startswith((f"error: override '{override}'", f"error: {source}/config.json, overridden: "))
    assert len(error.splitlines()) == 1
