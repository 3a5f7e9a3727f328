"""Numbers of the public implementation: encoders, decoder, statistics, discriminator, losses, schedules."""

import json

import pytest
import torch

from rae.autoencoder import losses
from rae.autoencoder.decoder import Decoder, load_published, published_state_dict
from rae.autoencoder.discriminator import dino
from rae.autoencoder.layers import patchify, resize, sincos_positions, unpatchify
from rae.autoencoder.rae import RAE
from rae.config.arguments import build
from rae.config.errors import UserError
from tests.conftest import GOLDEN, TINY, TINY_DINO, golden, relative_error

DECODER = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96}


def tiny_decoder(**kwargs) -> Decoder:
    decoder = Decoder(32, 64, **DECODER, **kwargs)
    load_published(decoder, str(GOLDEN / "decoder-tiny/model.pt"))
    return decoder


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("name", list(TINY))
def test_latents_and_reconstructions(name, stats):
    tensors, key = golden("rae_forward"), name + ("_stats" if stats else "")
    encoder = build("encoder", TINY[name], "model.encoder")
    rae = RAE(encoder, tiny_decoder(), 0.8, latent_stats=str(GOLDEN / "stat.pt") if stats else None).eval()
    with torch.no_grad():
        latent = rae.encode(tensors["images"])
        assert relative_error(latent, tensors[f"{key}.latent"]) < 1e-5
        assert relative_error(rae.decode(latent), tensors[f"{key}.recon"]) < 1e-5


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Dinov2withNorm", "dinov2"),
        ("MaeEncoder", "mae"),
        ("MAEwNorm", "mae"),
        ("SigLIP2", "siglip2"),
        ("SigLIP2wNorm", "siglip2"),
    ],
)
def test_names_of_existing_configurations(alias, name):
    assert type(build("encoder", {alias: TINY[name][name]}, "")) is type(build("encoder", TINY[name], ""))


@pytest.mark.parametrize(("family", "folder"), [("mae", "dinov2"), ("siglip2", "mae"), ("dinov2", "mae")])
def test_an_encoder_of_another_family_is_refused(family, folder):
    """transformers would fill what is missing with random weights."""
    with pytest.raises(UserError):
        build("encoder", {family: {"pretrained": str(GOLDEN / f"encoders/{folder}-tiny"), "input_size": 64}}, "")


def test_a_timm_vision_transformer_takes_its_input_size_and_levels():
    settings = {"model": "vit_tiny_patch16_224", "levels": [2, 5], "weights": "random", "input_size": 64}
    encoder = build("encoder", {"timm": settings}, "")
    assert (encoder.grid, encoder.embed_dim) == (4, 384)
    assert encoder(torch.rand(2, 3, 80, 80)).shape == (2, 16, 384)


def test_finer_levels_are_folded_and_coarser_ones_enlarged():
    settings = {"model": "tf_efficientnet_lite0", "levels": [1, 2, 3], "weights": "random", "input_size": 64, "grid": 8}
    encoder = build("encoder", {"timm": settings}, "")
    assert encoder.embed_dim == 24 * 4 + 40 + 112
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 64, encoder.embed_dim)


def test_latent_of_another_grid_is_resized():
    tensors = golden("rae_forward")
    latent = tensors["decoder_interp.latent_tokens"].transpose(1, 2).reshape(2, 32, 3, 3)
    with torch.no_grad():
        normalized, _ = tiny_decoder()(latent)
    assert relative_error(normalized, tensors["decoder_interp.recon_normalized"]) < 1e-5


def test_published_names_round_trip(tmp_path):
    published = torch.load(GOLDEN / "decoder-tiny/model.pt", weights_only=True)
    ours = published_state_dict(tiny_decoder())
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in published)
    torch.save(ours, tmp_path / "model.pt")
    other = Decoder(32, 64, **DECODER)
    load_published(other, str(tmp_path / "model.pt"))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), tiny_decoder().parameters(), strict=True))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "positions"])
def test_published_files_load_strictly(tmp_path, change):
    state = published_state_dict(tiny_decoder())
    if change == "missing":
        del state["decoder_norm.weight"]
    elif change == "unexpected":
        state["extra"] = torch.zeros(1)
    elif change == "shape":
        state["decoder_embed.weight"] = torch.zeros(48, 31)
    else:
        state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.1
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="trainable_positions" if change == "positions" else change.split()[0] + "|is"):
        load_published(Decoder(32, 64, **DECODER), str(tmp_path / "model.pt"))


def test_positions_are_the_published_table():
    published = torch.load(GOLDEN / "decoder-tiny/model.pt", weights_only=True)["decoder_pos_embed"]
    assert relative_error(sincos_positions(48, 4), published) < 1e-6


@pytest.mark.parametrize(
    ("size", "shape"), [("ViTB", (768, 12, 12)), ("ViTL", (1024, 24, 16)), ("ViTXL", (1152, 28, 16))]
)
def test_published_decoder_sizes(size, shape):
    with torch.device("meta"):
        decoder = Decoder(768, 256, size=size)
    block = decoder.blocks[0]
    assert (decoder.head.in_features, len(decoder.blocks), block.attn.num_heads) == shape
    assert block.mlp.fc1.out_features == (3072 if size == "ViTB" else 4096)
    assert decoder.positions.shape[1] == 257


def test_activation_checkpointing_gives_the_same_gradients_from_less_memory():
    latent, results = torch.rand(2, 32, 4, 4), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        decoder = Decoder(32, 64, activation_checkpointing=checkpointing, **DECODER)
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            image, _ = decoder(latent)
        image.square().sum().backward()
        results.append((kept, [p.grad for p in decoder.parameters()]))
    (kept, gradients), (kept_less, same) = results
    assert kept_less < kept / 2
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_patches_are_laid_out_row_column_channel():
    image = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    tokens = patchify(image, 4)
    assert torch.equal(tokens[1, 2, (1 * 4 + 3) * 3 + 2], image[1, 2, 4 + 1, 3])
    assert torch.equal(unpatchify(tokens, 4), image)


def tiny_discriminator():
    discriminator = dino(**TINY_DINO)
    discriminator.load_state_dict(torch.load(GOLDEN / "disc_heads_init.pt", weights_only=True))
    return discriminator


def test_discriminator():
    tensors, discriminator = golden("discriminator"), tiny_discriminator()
    image = (tensors["images_pm1"] + 1) / 2
    with torch.no_grad():
        for i, features in enumerate(discriminator.features(resize(image * 2 - 1, 224, "bilinear"))):
            assert relative_error(features, tensors[f"activation.{i}"]) < 1e-5
        assert relative_error(discriminator.eval()(image), tensors["logits_eval"]) < 1e-5
        assert relative_error(discriminator.train()(image), tensors["logits_train_first_call"]) < 1e-5


def test_gan_losses():
    tensors = golden("discriminator")
    real, fake = tensors["loss.logits_real"], tensors["loss.logits_fake"]
    assert relative_error(losses.hinge_d_loss(real, fake), tensors["loss.hinge_d"]) < 1e-5
    assert relative_error(losses.vanilla_d_loss(real, fake), tensors["loss.vanilla_d"]) < 1e-5
    assert relative_error(losses.linear_g_loss(fake), tensors["loss.vanilla_g"]) < 1e-5


SCHEDULES = json.loads((GOLDEN / "lr_schedules.json").read_text())


@pytest.mark.parametrize("name", list(SCHEDULES["lr_used_at_step"]))
def test_learning_rates(name):
    kind, zero, warmup, end = name.split(".")
    settings = {
        "warmup": f"{warmup.split('=')[1]}ep",
        "decay_end": f"{end.split('=')[1]}ep",
        "final_lr": SCHEDULES["final_lr"],
        "warmup_from_zero": zero.endswith("true"),
    }
    base = SCHEDULES["base_lr"]
    context = {"base_lr": base, "steps_per_epoch": SCHEDULES["steps_per_epoch"]}
    factor = build("schedule", {f"warmup_{kind}": settings}, "", **context)
    for step, expected in enumerate(SCHEDULES["lr_used_at_step"][name]):
        assert base * factor(step) == pytest.approx(expected, rel=1e-6)
