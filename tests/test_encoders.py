"""Encoders of many families, tiny and random: shapes, places, layers, exports."""

import json

import pytest
import torch
import transformers as T
from torch import Tensor

from rae.autoencoder.layers import Frozen
from rae.config.arguments import build
from rae.config.errors import UserError
from tests.conftest import GOLDEN, relative_error
from tests.test_diffusion import STAGE2

WIDTHS = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
SQUARE = dict(image_size=64, patch_size=16)


FAMILIES = {
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**WIDTHS, **SQUARE)),
    "dinov2_with_registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**WIDTHS, **SQUARE)),
    "dinov3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**WIDTHS, **SQUARE, num_register_tokens=2)),
    "siglip": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**WIDTHS, **SQUARE)),
    "clip": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**WIDTHS, **SQUARE)),
    "vit": lambda: T.ViTModel(T.ViTConfig(**WIDTHS, **SQUARE)),
    "ijepa": lambda: T.IJepaModel(T.IJepaConfig(**WIDTHS, **SQUARE)),
    "aimv2": lambda: T.Aimv2VisionModel(T.Aimv2VisionConfig(**WIDTHS, **SQUARE)),
    "beit": lambda: T.BeitModel(T.BeitConfig(**WIDTHS, **SQUARE)),
    "deit": lambda: T.DeiTModel(T.DeiTConfig(**WIDTHS, **SQUARE)),
    "timm:eva02_tiny_patch14_224": None,
    "timm:vit_tiny_patch16_224": None,
    "timm:vit_small_patch16_dinov3": None,
    "timm:vit_pe_core_tiny_patch16_384": None,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request, tmp_path_factory):
    """The encoder of a random model, as a configuration names it; and that configuration."""
    torch.manual_seed(0)
    name = request.param
    if name.startswith("timm:"):
        entry = {"model": name.removeprefix("timm:"), "weights": "random"}
        return build("encoder", {"vit": entry}, "model.encoder"), entry
    folder = tmp_path_factory.mktemp("encoder")
    model = FAMILIES[name]()
    for parameter in model.parameters():  # some begin with zeros, by which nothing would be seen
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    T.ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder)
    entry = {"model": str(folder)}
    return build("encoder", {"vit": entry}, "model.encoder"), entry


def moved(encoder, row: int, column: int) -> Tensor:
    """Per token, how much a bright square over the patch of this place changes it."""
    patch = encoder.input_size // encoder.grid
    image = torch.rand(1, 3, encoder.input_size, encoder.input_size, generator=torch.Generator().manual_seed(0))
    other = image.clone()
    other[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 1
    with torch.no_grad():
        return (encoder(other) - encoder(image)).square().sum(2)[0]


def test_tokens_are_where_they_belong(encoder):
    made, _ = encoder
    tokens = made(torch.rand(2, 3, 50, 70))
    assert tokens.shape == (2, made.grid**2, made.embed_dim)
    for row, column in ((0, 0), (1, made.grid - 1), (made.grid - 1, 2)):
        changed = moved(made, row, column)
        assert int(changed.argmax()) == row * made.grid + column


def test_it_is_frozen_runs_in_bf16_and_loads_again(encoder, tmp_path):
    made, entry = encoder
    frozen = Frozen(made)
    assert not any(p.requires_grad for p in frozen.network.parameters())
    image = torch.rand(1, 3, made.input_size, made.input_size)
    with torch.no_grad():
        whole = frozen(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = frozen(image).float()
    assert relative_error(rounded, whole) < 0.2
    saved = made.save_weights(tmp_path)
    again = build("encoder", {"vit": {**entry, "weights": str(tmp_path / saved)}}, "model.encoder")
    with torch.no_grad():
        assert torch.equal(again.eval()(image), whole)


@torch.no_grad()
def test_layers_are_joined_as_they_say():
    place = {"pretrained": str(STAGE2 / "raev2/dinov3-tiny"), "input_size": 64}
    image = torch.rand(2, 3, 64, 64)

    def of(**options):
        return build("encoder", {"dinov3": {**place, **options}}, "model.encoder")(image)

    first, last = of(layers=[1]), of(layers=[-1])
    assert relative_error(last, of()) < 1e-6
    assert relative_error(of(layers=[5, 1]), (first + last) / 2) < 1e-6
    assert relative_error(of(layers=[5, 1], join="sum"), first + last) < 1e-6
    assert relative_error(of(layers=[1, 5], join="concat"), torch.cat([first, last], 2)) < 1e-6
    added = of(layers=[1, 5], token_mean=True) - of(layers=[1, 5])
    assert relative_error(added, last.mean(1, keepdim=True).expand_as(added)) < 1e-4
    plain, affine, raw = (of(layers=[1], norm=norm) for norm in ("plain", "affine", "none"))
    assert plain.std(2).sub(1).abs().max() < 0.1
    norm = build("encoder", {"dinov3": {**place, "norm": "affine"}}, "").backbone.norm
    assert relative_error(affine, norm(raw)) < 1e-5
    generic = build("encoder", {"vit": {"model": place["pretrained"], "layers": [1, 5], "token_mean": True}}, "")
    assert relative_error(generic(image), of(layers=[1, 5], token_mean=True)) < 1e-5
    for options, line in (
        ({"layers": [6]}, r"layers: \[6\] must be indices from 0 to 5, or from -1 to -6"),
        ({"layers": [5, -1]}, "names a layer twice"),
    ):
        with pytest.raises(UserError, match=line):
            of(**options)


def test_every_published_family_takes_layers():
    for kind in ("dinov2", "mae", "siglip2"):
        folder = GOLDEN / f"encoders/{kind}-tiny"
        told = json.loads((folder / "config.json").read_text())
        size = told.get("vision_config", told)["patch_size"] * 4
        entry = {kind: {"pretrained": str(folder), "input_size": size, "layers": [0, -1], "join": "concat"}}
        encoder = build("encoder", entry, "model.encoder")
        assert encoder(torch.rand(1, 3, size, size)).shape == (1, 16, encoder.embed_dim)


def test_what_is_not_found_is_said_with_what_settles_it(tmp_path):
    T.Data2VecVisionModel(T.Data2VecVisionConfig(**WIDTHS, **SQUARE)).save_pretrained(tmp_path)  # without a final norm
    T.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its final norm is not found; give final_norm .*, or norm: none"):
        build("encoder", {"vit": {"model": str(tmp_path)}}, "model.encoder")
    encoder = build("encoder", {"vit": {"model": str(tmp_path), "norm": "none"}}, "model.encoder")
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 16, 32)
    with pytest.raises(UserError, match="no vision transformer"):
        build("encoder", {"vit": {"model": "resnet18", "weights": "random"}}, "model.encoder")
    with pytest.raises(UserError, match="has no module 'nowhere'"):
        build("encoder", {"vit": {"model": "vit_tiny_patch16_224", "weights": "random", "final_norm": "nowhere"}}, "")
