"""Networks as people have them: timm's of any family wherever one stands, transformers' folders, and a loaded RAE."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from rae.autoencoder.backbones import TimmFeatures
from rae.autoencoder.decoder import Decoder
from rae.autoencoder.losses import FeatureDistance, unit_distance, unit_features
from rae.autoencoder.rae import RAE
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.evaluation.metrics import build_metrics
from tests.conftest import GOLDEN, SMALL_DINO, TINY, metrics_of, tiny_settings, train_here

VIT, SWIN, LITE = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0"
FAMILIES = {  # name: side of the last level's map, of images of 64
    VIT: 4,
    SWIN: 2,
    "mambaout_femto": 2,
    "levit_128s": 1,
    "mixer_s32_224": 2,
    "resnet18": 2,
    LITE: 2,
}


@pytest.mark.parametrize("model", FAMILIES)
def test_any_family_gives_maps_with_channels_first(model):
    features = TimmFeatures(model, [-1], "random", image_size=64)
    with torch.no_grad():
        (found,) = features(torch.rand(1, 3, 64, 64))
    side = FAMILIES[model]
    assert found.shape == (1, *features.channels, side, side)
    assert features.sizes == [(side, side)]


def test_a_channels_last_network_is_compared_over_its_channels():
    distance = FeatureDistance(SWIN, [1], "random", image_size=64)
    recon, image = torch.rand(2, 2, 3, 64, 64)
    features = distance.features.network
    with torch.no_grad():
        x, y = (features.network(features.normalize(each))[0].permute(0, 3, 1, 2) for each in (recon, image))
        assert x.shape[1] == 192
        assert torch.equal(distance.per_image(recon, image), unit_distance(x, unit_features(y)))
    reference = timm.create_model(SWIN, features_only=True, out_indices=[1], img_size=64).eval()
    reference.load_state_dict(features.network.state_dict())
    with torch.no_grad():
        assert torch.equal(reference(features.normalize(recon))[0].permute(0, 3, 1, 2), x)


def test_only_networks_of_a_fixed_size_have_images_resized():
    image = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        (vit,) = TimmFeatures(VIT, [0], "random")(image)
        (lite,) = TimmFeatures(LITE, [0], "random", image_size=64)(image)
        (asked,) = TimmFeatures(LITE, [0], "random", input_size=64)(image)
    assert [each.shape[-1] for each in (vit, lite, asked)] == [14, 24, 32]


def test_levels_are_taken_in_the_networks_order():
    (ascending, descending) = (TimmFeatures(LITE, levels, "random", 64) for levels in ([0, 4], [-1, 0]))
    assert ascending.channels == descending.channels == [16, 320]
    assert ascending.sizes == [(32, 32), (2, 2)]


def test_fixed_size_networks_train_and_evaluate(shards, tmp_path):
    settings = tiny_settings(shards, tmp_path / "run")
    random = {"weights": "random"}
    settings["algorithms"] = {
        "perceptual": {"network": "timm", "model": VIT, "levels": [3], **random},
        "adversarial": {
            "discriminator": {"timm": {"model": SWIN, "levels": [1], "input_size": 64, **random}},
            "discriminator_start": "0ba",
            "start": "0ba",
        },
    }
    # 64 is no multiple of 14: its images are resized.
    distance = {"model": "vit_small_patch14_dinov2", "levels": [0], "input_size": 56, **random}
    settings["metrics"] = {"frechet": {"model": VIT, **random}, "feature_distance": distance}
    settings["trainer"]["max_duration"] = "1ba"
    train_here(settings)
    found = {key: value for record in metrics_of(tmp_path / "run") for key, value in record.items()}
    assert found["loss/train/perceptual"] > 0
    assert found["metrics/eval/frechet"] > 0
    assert found["metrics/eval/feature_distance"] > 0


VIT14 = {"model": "vit_small_patch14_dinov2", "weights": "random"}
REFUSED = {
    "perceptual": ("algorithm", {"perceptual": {"network": "timm", **VIT14}}, "takes no images of 64 x 64"),
    "feature_distance": ("metric", {"feature_distance": VIT14}, "no multiple of its patches, 14 (choose an input_size"),
    "frechet": ("metric", {"frechet": VIT14 | {"input_size": 60}}, "takes no images of 60 x 60"),
    "encoder": ("encoder", {"timm": {"model": VIT, "weights": "random", "input_size": 72}}, "its own is 224"),
    "window": ("encoder", {"timm": {"model": "maxvit_nano_rw_256", "weights": "random", "input_size": 72}}, "window"),
    "no size": (
        "encoder",
        {"timm": {"model": LITE, "weights": "random", "input_size": 0}},
        "input_size: must be 1 or more, not 0",
    ),
    "grid": ("encoder", {"timm": {"model": LITE, "weights": "random", "grid": 5}}, "grid 5 does not divide"),
    "no level": ("encoder", {"timm": {"model": LITE, "weights": "random", "levels": []}}, "at least one level"),
    "twice": ("metric", {"feature_distance": {"model": LITE, "levels": [0, 0]}}, "each once"),
    "level": ("metric", {"frechet": {"model": VIT, "level": 12, "weights": "random"}}, "out of range"),
    "model": ("metric", {"frechet": {"model": "vit_tiny"}}, "cannot create the timm model 'vit_tiny'"),
    "lpips": ("algorithm", {"perceptual": {"network": "alex", "input_size": 64}}, "go with network: timm"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_timm_network_cannot_do_is_one_line_that_names_the_key(fault):
    kind, entry, message = REFUSED[fault]
    with pytest.raises(UserError) as caught:
        build(kind, entry, f"{kind}s", image_size=64)
    assert str(caught.value).startswith(f"{kind}s.{next(iter(entry))}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


DISCRIMINATORS = {
    "few tokens": (
        {"timm": {"model": LITE, "levels": [1, 4], "input_size": 64, "kernel_size": 11}},
        "level 4 has 4 tokens, too few for",
    ),
    "one token": ({"timm": {"model": LITE, "levels": [-1], "input_size": 32, "kernel_size": 1}}, "a single token"),
    "dino's tokens": ({"dino": SMALL_DINO | {"input_size": 8}}, "each block has a single token"),
    "dino's kernel": ({"dino": SMALL_DINO | {"kernel_size": 165}}, "81 tokens, too few for kernel_size 165"),
    "no blocks": ({"dino": SMALL_DINO | {"blocks": []}}, "at least one between 0 and 1"),
    "block twice": ({"dino": SMALL_DINO | {"blocks": [1, 1]}}, "each once"),
    "block": ({"dino": SMALL_DINO | {"blocks": [2]}}, "between 0 and 1"),
    "size": ({"dino": SMALL_DINO | {"input_size": 0}}, "input_size: must be 1 or more"),
    "patches": ({"dino": SMALL_DINO | {"input_size": 70}}, "70 is not a multiple of patch_size 8"),
    "even kernel": ({"dino": SMALL_DINO | {"kernel_size": 4}}, "odd and positive, not 4"),
    "negative kernel": ({"dino": SMALL_DINO | {"kernel_size": -1}}, "kernel_size: must be 1 or more, not -1"),
    "groups": ({"timm": {"model": LITE, "levels": [0], "norm": "gn"}}, "do not divide a level's 16 channels"),
}


@pytest.mark.parametrize("fault", DISCRIMINATORS)
def test_what_a_discriminator_cannot_be_is_one_line(fault):
    entry, message = DISCRIMINATORS[fault]
    if "timm" in entry:
        entry = {"timm": entry["timm"] | {"weights": "random"}}
    with pytest.raises(UserError) as caught:
        build("discriminator", entry, "d")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_discriminator_of_few_tokens_that_are_enough():
    judge = build("discriminator", {"timm": {"model": LITE, "levels": [3], "weights": "random", "input_size": 32}}, "d")
    assert judge(torch.rand(2, 3, 48, 48)).shape == (2, 4)


@pytest.mark.parametrize(
    ("model", "suffix"), [(VIT, "safetensors"), (VIT, "pth"), (SWIN, "safetensors"), ("resnet18", "safetensors")]
)
def test_a_file_of_another_image_size_is_read_as_timm_reads_it(model, suffix, tmp_path):
    state = {
        name: torch.randn_like(t) * 0.02 if t.ndim > 1 else t
        for name, t in timm.create_model(model).state_dict().items()
    }
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    found = TimmFeatures(model, [-1], str(tmp_path / f"w.{suffix}"), 96).network.state_dict()
    size = {} if model == "resnet18" else {"img_size": 96}
    overlay = {"state_dict": {name: tensor.clone() for name, tensor in state.items()}}
    wanted = timm.create_model(
        model, True, features_only=True, out_indices=[-1], pretrained_cfg_overlay=overlay, **size
    )
    expected = wanted.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.endswith("pos_embed") for name in expected) == (model == VIT)


def test_a_file_of_another_network_is_refused(tmp_path):
    save_file({"head.weight": torch.zeros(3, 3), "patch_embed.proj.bias": torch.zeros(192)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="are not those of 'vit_tiny_patch16_224' for images of 64 x 64"):
        TimmFeatures(VIT, [0], str(tmp_path / "w.safetensors"), 64)


def test_a_channels_last_encoder_is_exported_and_read_again(tmp_path):
    entry = {"model": SWIN, "levels": [1, 3], "weights": "random", "input_size": 64}
    encoder = build("encoder", {"timm": entry}, "").eval()
    (tmp_path / "e").mkdir()
    saved = str(tmp_path / "e" / encoder.save_weights(tmp_path / "e"))
    again = build("encoder", {"timm": entry | {"weights": saved}}, "").eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(image), again(image))
    assert (encoder.grid, encoder.embed_dim) == (8, 192 + 768)


def configured(folder, model_type: str, **settings) -> str:
    """A folder with a configuration alone: a model's family is known before its weights are read."""
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("encoder", "model_type", "line"),
    [
        (
            "siglip2",
            "siglip2_vision_model",
            "is a siglip2_vision_model model, not a siglip_vision_model; NaFlex is not",
        ),
        ("siglip2", "siglip2", "is a siglip2_vision_model model, not a siglip_vision_model; NaFlex is not supported"),
        ("siglip2", "clip", "is a clip_vision_model model, not a siglip_vision_model"),
        ("dinov2", "vit_mae", "not a dinov2 or dinov2_with_registers; model.encoder: {mae: …} takes it"),
        ("mae", "dinov2", "is a dinov2 model, not a vit_mae; model.encoder: {dinov2: …} takes it"),
        ("dinov2", "dinov3_vit", "is a dinov3_vit model"),
        ("mae", "vit", "is a vit model, not a vit_mae"),
        ("dinov2", "bert", "is a bert model"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_of_another_family_is_one_line(encoder, model_type, line, device, tmp_path):
    entry = {encoder: {"pretrained": configured(tmp_path, model_type), "input_size": 224}}
    with pytest.raises(UserError) as caught, torch.device(device):
        build("encoder", entry, "model.encoder")
    assert str(caught.value).startswith(f"model.encoder.{encoder}: ")
    assert line in str(caught.value)


@pytest.mark.parametrize("size", [50, 57])
def test_a_size_that_patches_do_not_fill_is_refused_before_weights_are_read(size, tmp_path):
    entry = {"dinov2": {"pretrained": configured(tmp_path, "dinov2"), "input_size": size}}
    with pytest.raises(UserError, match=f"input_size {size} is not a positive multiple of the encoder's patch size 14"):
        build("encoder", entry, "model.encoder")


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("config.json", "holds no config.json"),
        (
            "preprocessor_config.json",
            "holds no preprocessor_config.json, which says how images are normalised; save the",
        ),
        ("model.safetensors", "holds no weights (model.safetensors)"),
        (None, "is a file damaged"),
    ],
)
def test_an_incomplete_folder_is_one_line(gone, line, tmp_path):
    folder = shutil.copytree(GOLDEN / "encoders/dinov2-tiny", tmp_path / "e")
    if gone:
        (folder / gone).unlink()
    else:
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:900])
    with pytest.raises(UserError) as caught:
        build("encoder", {"dinov2": {"pretrained": str(folder), "input_size": 56}}, "model.encoder")
    assert line in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_processor_without_means_is_one_line(tmp_path):
    folder = shutil.copytree(GOLDEN / "encoders/dinov2-tiny", tmp_path / "e")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(UserError, match="no image_mean or image_std"):
        build("encoder", {"dinov2": {"pretrained": str(folder), "input_size": 56}}, "model.encoder")


@pytest.fixture(scope="module")
def rae() -> RAE:
    torch.manual_seed(0)
    encoder = build("encoder", TINY["dinov2"], "encoder")
    return RAE(encoder, Decoder(32, 64, embed_dim=48, depth=1, num_heads=4, mlp_dim=96)).eval().requires_grad_(False)


def test_images_of_every_type_have_one_latent(rae):
    eight_bit = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    image = eight_bit.float() / 255
    latent = rae.encode(image)
    assert torch.equal(rae.encode(eight_bit), latent)
    assert torch.equal(rae.encode(eight_bit.to(memory_format=torch.channels_last)), latent)
    assert torch.equal(rae.encode(image.double()), latent)
    assert torch.allclose(rae.encode(image.half()), latent, atol=0.05)
    assert torch.equal(rae(eight_bit), rae.decode(latent))
    assert torch.equal(rae.decode(latent.double()), rae.decode(latent))
    assert rae.encode(image * 1.1 - 0.05).isfinite().all()  # what resizing overshoots
    assert torch.equal(torch.compile(rae.encode, fullgraph=True, backend="eager")(image), latent)


IMAGE, LATENT = torch.rand(2, 3, 64, 64), torch.rand(2, 32, 4, 4)
WANTED = "give images (B, 3, H, W) in [0, 1], or of uint8"


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (IMAGE * 2 - 1, "not values from -"),
        (IMAGE * 255, "not values from 0."),
        (IMAGE * torch.nan, "not values from nan to nan"),
        (IMAGE[0], "not (3, 64, 64)"),
        (IMAGE[:, :1], "not (2, 1, 64, 64)"),
        (IMAGE.movedim(1, -1), "not (2, 64, 64, 3)"),
        (IMAGE[:0], "not (0, 3, 64, 64)"),
        ((IMAGE * 255).long(), "not of torch.int64"),
        (IMAGE.numpy(), "not a numpy.ndarray"),
        (IMAGE.to("meta"), "on cpu as the autoencoder is, not on meta"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_what_is_no_image_is_one_line(rae, image, line, method):
    with pytest.raises(UserError) as caught:
        getattr(rae, method)(image)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(WANTED)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("latent", "line"),
    [
        (LATENT.reshape(2, 32, 2, 8), "not (2, 32, 2, 8)"),
        (LATENT[:, :5], "not (2, 5, 4, 4)"),
        (LATENT.flatten(2), "not (2, 32, 16)"),
        (LATENT.long(), "not of torch.int64"),
        (LATENT.to("meta"), "not on meta"),
    ],
)
def test_what_is_no_latent_is_one_line(rae, latent, line):
    with pytest.raises(UserError) as caught:
        rae.decode(latent)
    assert str(caught.value).startswith("give latents (B, 32, 4, 4)")
    assert line in str(caught.value)


def test_a_square_latent_of_another_grid_is_resized_unless_statistics_are_of_one(rae, tmp_path):
    assert rae.decode(torch.rand(2, 32, 8, 8)).shape == (2, 3, 64, 64)
    save_file({"mean": torch.zeros(32, 4, 4), "var": torch.ones(32, 4, 4)}, tmp_path / "stat.safetensors")
    scaled = RAE(rae.encoder.network, rae.decoder, latent_stats=str(tmp_path / "stat.safetensors"))
    with pytest.raises(UserError, match="which the latent statistics are of"):
        scaled.decode(torch.rand(2, 32, 8, 8))


def test_metrics_of_a_fixed_size_work_without_a_known_image_size():
    (metric,) = build_metrics({"feature_distance": {"model": VIT, "levels": [0], "weights": "random"}}).values()
    metric.update(*torch.rand(2, 2, 3, 64, 64))
    assert metric.compute() > 0
