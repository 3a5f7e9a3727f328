"""The layout of the published weights: ``model.pt``, a decoder's ``config.json``, ``stat.pt``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rae.autoencoder import decoder_weights
from rae.autoencoder.decoder import SIZES, Decoder, load_decoder, published_state_dict, read_decoder
from rae.autoencoder.decoder_weights import is_fixed
from rae.autoencoder.encoders.base import Encoder
from rae.autoencoder.rae import RAE
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import DecoderSizes, Model
from rae.exchange.exports import decoder_sizes, write_json
from rae.exchange.places import CONFIG, read_json

DECODER, STATS = "model.pt", "stat.pt"
SIZE_KEYS = {  # ours -> those of a published decoder's config.json
    "embed_dim": "decoder_hidden_size",
    "depth": "decoder_num_hidden_layers",
    "num_heads": "decoder_num_attention_heads",
    "mlp_dim": "decoder_intermediate_size",
}


def write(rae: RAE, folder: Path) -> None:
    """Write the decoder, its configuration and, if there are any, the latent statistics into an existing folder."""
    state = {name: tensor.clone() for name, tensor in published_state_dict(rae.decoder).items()}
    with (folder / DECODER).open("wb") as file:  # so that a full disk is an OSError
        torch.save(state, file)
    if rae.latent_mean is not None:
        with (folder / STATS).open("wb") as file:
            torch.save({"mean": rae.latent_mean, "var": rae.latent_var}, file)
    write_json(folder / CONFIG, published_config(rae.decoder))


def published_config(decoder: Decoder) -> dict[str, Any]:
    """A decoder's configuration in the published form, which is transformers' of a ViT-MAE."""
    sizes = decoder_sizes(decoder)
    return {
        "model_type": "vit_mae",
        "hidden_size": decoder.embed.in_features,
        **{theirs: getattr(sizes, ours) for ours, theirs in SIZE_KEYS.items()},
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "num_channels": 3,
        "image_size": decoder.grid * decoder.patch_size,
        "patch_size": decoder.patch_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def read(
    model: Path,
    config: Path | None,
    stats: Path | None,
    encoder: Any,
    output: Literal["normalized", "image"] = "normalized",
) -> tuple[RAE, Model, int]:
    """An autoencoder of published files.

    Args:
        model: ``model.pt``.
        config: the decoder's ``config.json``, which tells the number of heads; or None, where the tensors' shapes are
            those of a named size.
        stats: ``stat.pt``, or None.
        encoder: the encoder's settings, as in a configuration's ``model.encoder``.
        output: what the decoder makes, as in a configuration's ``model.output``.

    Returns:
        it, its settings, and the side of its images.

    Raises:
        UserError: files that cannot be read or do not fit the encoder or each other.
    """
    where = str(model)
    state = read_decoder(model, where)
    sizes, image_size = sizes_of(state)
    if config:
        sizes["num_heads"] = read_json(config, str(config)).get(SIZE_KEYS["num_heads"]) or sizes["num_heads"]
    if sizes["num_heads"] is None:
        raise UserError(f"{model}: its number of heads is not known; give the decoder's config.json, --decoder-config")
    network: Encoder = build("encoder", encoder, "model.encoder")
    width = state["embed.weight"].shape[1]
    if network.embed_dim != width:
        raise UserError(f"{model} decodes latents of {width} channels, but the encoder gives {network.embed_dim}")
    image_size = image_size or network.grid * sizes["patch_size"]
    try:
        decoder = Decoder(width, image_size, **sizes)
    except ValueError as error:
        raise UserError(f"{model}: {error}") from error
    load_decoder(decoder, state, where)
    settings = Model(encoder=encoder, decoder=DecoderSizes(**sizes), noise_tau=0.0, output=output)
    rae = RAE(network, decoder, latent_stats=str(stats) if stats else None, output=output).eval()
    return rae, settings, image_size


def sizes_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int | None]:
    """A decoder's sizes, but for the number of heads, which only named sizes tell; and its image's side.

    Args:
        state: its tensors under our names. Without its position table, the side is not known.
    """
    told = decoder_weights.sizes_of(state)
    del told["latent channels"]
    heads = {(dim, layers, hidden): heads for dim, layers, heads, hidden in SIZES.values()}
    sizes = {**told, "num_heads": heads.get((told["embed_dim"], told["depth"], told["mlp_dim"]))}
    if "positions" not in state:
        return {**sizes, "trainable_positions": False}, None
    grid = round((state["positions"].shape[1] - 1) ** 0.5)
    return {**sizes, "trainable_positions": not is_fixed(state["positions"])}, grid * told["patch_size"]
