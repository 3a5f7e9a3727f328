"""Folders of diffusers' ``AutoencoderRAE`` (diffusers 0.42), written and read without diffusers.

Its class builds its encoder from few numbers and fixes the rest; of the encoders here it can express the published
families in the published forms, and with them decoders of 16 × 16 tokens. It normalises a latent by ``std + 1e-5``
where the reference has ``sqrt(var + 1e-5)``, so what is stored as its ``std`` makes the two equal.
"""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rae.autoencoder.backbones import check_tensors, read_state_dict, save_state_dict
from rae.autoencoder.decoder import Decoder, load_decoder, published_state_dict
from rae.autoencoder.decoder_weights import DIFFUSERS, find_decoder
from rae.autoencoder.encoders.base import PretrainedEncoder, save_pretrained
from rae.autoencoder.encoders.joining import LAST
from rae.autoencoder.layers import sincos_positions
from rae.autoencoder.rae import RAE
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.loading import validated
from rae.config.registry import find
from rae.config.sections import DecoderSizes, Model, PositiveInt, Section
from rae.exchange.exports import Source, decoder_sizes, write_json
from rae.exchange.places import CONFIG, ENCODER, read_json
from rae.exchange.published import SIZE_KEYS

CLASS, WEIGHTS = "AutoencoderRAE", "diffusion_pytorch_model.safetensors"
_VERSION = "0.42.1"
_EPS = 1e-5
_HEAD_DIM, _GRID = 64, 16
_FIXED: dict[str, dict[str, Any]] = {  # what diffusers does not let a folder choose, by transformers' names
    "dinov2": {
        "model_type": "dinov2_with_registers",
        "image_size": 518,
        "num_register_tokens": 4,
        "mlp_ratio": 4,
        "use_swiglu_ffn": False,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    },
    "mae": {
        "model_type": "vit_mae",
        "image_size": 224,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
    },
    "siglip2": {
        "model_type": "siglip_vision_model",
        "image_size": 256,
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
# Tensors have the names of the transformers that saved them. Up to 5.3 those were these; for SigLIP, diffusers 0.42
# knows no others.
_ATTENTION = [
    *((f"attention.attention.{part}.", f"attention.{part[0]}_proj.") for part in ("query", "key", "value")),
    ("attention.output.dense.", "attention.o_proj."),
]
_OLDER = {
    "dinov2": _ATTENTION,
    "mae": [
        *_ATTENTION,
        ("encoder.layer.", "layers."),
        ("intermediate.dense.", "mlp.fc1."),
        ("output.dense.", "mlp.fc2."),
    ],
    "siglip2": [("vision_model.", "")],
}


class Settings(Section):
    """What a folder's ``config.json`` says, with the class's defaults; see diffusers' own docstring."""

    encoder_type: Literal["dinov2", "siglip2", "mae"] = "dinov2"
    encoder_hidden_size: PositiveInt = 768
    encoder_patch_size: PositiveInt = 14
    encoder_num_hidden_layers: PositiveInt = 12
    decoder_hidden_size: PositiveInt = 512
    decoder_num_hidden_layers: PositiveInt = 8
    decoder_num_attention_heads: PositiveInt = 16
    decoder_intermediate_size: PositiveInt = 2048
    patch_size: PositiveInt = 16
    encoder_input_size: PositiveInt = 224
    image_size: PositiveInt | None = None
    num_channels: Literal[3] = 3
    encoder_norm_mean: list[float] | None = None
    encoder_norm_std: list[float] | None = None
    latents_mean: Any = None
    latents_std: Any = None
    noise_tau: float = 0.0
    reshape_to_2d: Literal[True] = True
    use_encoder_loss: bool = False
    scaling_factor: float = 1.0


def write(rae: RAE, folder: Path) -> None:
    """Write a folder that ``AutoencoderRAE.from_pretrained`` reads, its encoder included, into an existing one.

    Raises:
        UserError: diffusers' class cannot express this autoencoder; what is in the way.
    """
    encoder, decoder = rae.encoder.network, rae.decoder
    kind: Any = _check_expressible(rae)
    mean, std = _latent_scale(rae)
    inside = "vision_model." if kind == "siglip2" else ""
    has_stats = rae.latent_mean is not None
    settings = Settings(
        encoder_type=kind,
        encoder_hidden_size=encoder.embed_dim,
        encoder_patch_size=encoder.backbone.config.patch_size,
        encoder_num_hidden_layers=encoder.backbone.config.num_hidden_layers,
        **{theirs: getattr(decoder_sizes(decoder), ours) for ours, theirs in SIZE_KEYS.items()},
        patch_size=decoder.patch_size,
        encoder_input_size=encoder.input_size,
        image_size=decoder.grid * decoder.patch_size,
        encoder_norm_mean=encoder.normalize.mean.flatten().tolist(),
        encoder_norm_std=encoder.normalize.std.flatten().tolist(),
        latents_mean=mean.tolist() if has_stats else None,  # whose shapes the class takes from here
        latents_std=std.tolist() if has_stats else None,
        noise_tau=rae.noise_tau,
    )
    state = {
        **{f"encoder.{inside}{name}": tensor for name, tensor in encoder.backbone.state_dict().items()},
        **_decoder_state(decoder),
        "encoder_mean": encoder.normalize.mean[None],
        "encoder_std": encoder.normalize.std[None],
        "_latents_mean": mean,
        "_latents_std": std,
    }
    save_state_dict(state, folder / WEIGHTS)
    write_json(folder / CONFIG, {"_class_name": CLASS, "_diffusers_version": _VERSION, **settings.model_dump()})


def _decoder_state(decoder: Decoder) -> dict[str, Tensor]:
    published = published_state_dict(decoder)
    del published["decoder_pos_embed"]
    return {f"decoder.{_renamed(name, DIFFUSERS)}": tensor for name, tensor in published.items()}


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def _latent_scale(rae: RAE) -> tuple[Tensor, Tensor]:
    """What to store as mean and std, so that adding 1e-5 to the std gives our divisor."""
    if rae.latent_mean is None:
        return torch.zeros(1), torch.ones(1) - _EPS
    return rae.latent_mean, (torch.sqrt(rae.latent_var.double() + _EPS) - _EPS).float()


def _check_expressible(rae: RAE) -> str:
    """The encoder's family, if diffusers' class can express the autoencoder."""
    encoder, decoder = rae.encoder.network, rae.decoder
    kind = next((name for name in _FIXED if type(encoder) is find("encoder", name, "")), None)
    if kind is None:
        raise _refusal(f"its encoder is {type(encoder).__name__}, and diffusers knows {', '.join(_FIXED)}")
    if encoder.layers != LAST:
        raise _refusal("its latents are of other layers than the last, or of another norm")
    if not torch.equal(rae.image_std, encoder.normalize.std):
        raise _refusal("its decoder makes the image itself, and diffusers undoes the encoder's normalisation after it")
    config = encoder.backbone.config
    for key, value in _FIXED[kind].items():
        if getattr(config, key) != value:
            raise _refusal(f"its encoder has {key} {getattr(config, key)}, and diffusers builds {kind} with {value}")
    if config.num_attention_heads * _HEAD_DIM != config.hidden_size:
        raise _refusal(
            f"its encoder has {config.num_attention_heads} heads in {config.hidden_size} channels, and diffusers gives "
            f"each head {_HEAD_DIM}"
        )
    if decoder.grid != rae.grid:
        raise _refusal(
            f"its decoder has {decoder.grid} tokens a side and its encoder {rae.grid}, and diffusers needs as many"
        )
    if not torch.allclose(decoder.positions.cpu(), _positions(decoder), atol=1e-5):
        trained = isinstance(decoder.positions, torch.nn.Parameter)
        raise _refusal(
            "its decoder's position table was trained, and diffusers has a fixed one"
            if trained
            else f"its decoder has {decoder.grid} tokens a side, and diffusers' positions are those of {_GRID}"
        )
    return kind


def _positions(decoder: Decoder) -> Tensor:
    """The position table that diffusers gives a decoder: that of 16 tokens a side, spread over those that it has."""
    return sincos_positions(decoder.embed.out_features, decoder.grid, spread=_GRID / decoder.grid)


def _refusal(why: str) -> UserError:
    return UserError(f"diffusers' {CLASS} cannot express this autoencoder: {why}; export it as rae or published")


def read(folder: Path, name: str, scratch: Path) -> Source:
    """The autoencoder of a diffusers folder.

    Args:
        name: what to call the folder in messages.
        scratch: local folder, in which its encoder is written as transformers saves one.

    Returns:
        it, with settings that name its encoder as an export does that includes it.

    Raises:
        UserError: files that are missing, damaged or do not fit each other.
    """
    settings = _read_settings(folder, name)
    state = _read_weights(folder, name)
    image_size = _image_size(settings, name)
    parts = {
        part: {key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")}
        for part in ("encoder", "decoder")
    }
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(("encoder.", "decoder."))}
    three = torch.empty(1, 3, 1, 1)
    scale = {key: tensor for key, tensor in rest.items() if key.startswith("_latents_")}
    check_tensors(rest, {"encoder_mean": three, "encoder_std": three, **scale}, name)
    encoder = _encoder(settings, parts["encoder"], rest, name, scratch)
    sizes = DecoderSizes(
        patch_size=settings.patch_size,
        **{ours: getattr(settings, theirs) for ours, theirs in SIZE_KEYS.items()},
        trainable_positions=image_size != _GRID * settings.patch_size,  # whose table is then loaded
    )
    decoder = _decoder(settings, sizes, image_size, parts["decoder"], name)
    rae = RAE(encoder, decoder, settings.noise_tau).eval()
    _set_scale(rae, rest, settings.scaling_factor, name)
    entry = {str(settings.encoder_type): {"pretrained": ENCODER, "input_size": settings.encoder_input_size}}
    model = Model(encoder=entry, decoder=sizes, noise_tau=settings.noise_tau)
    return Source(rae, image_size, name.rpartition("/")[2], "given", model)


def _read_settings(folder: Path, name: str) -> Settings:
    content = read_json(folder / CONFIG, f"{name}/{CONFIG}")
    if content.get("_class_name") != CLASS:
        raise UserError(f"{name} is a diffusers folder of {content.get('_class_name')}, not of {CLASS}")
    told = {key: value for key, value in content.items() if not key.startswith("_")}
    return validated(Settings, told, f"{name}/{CONFIG}")


def _image_size(settings: Settings, name: str) -> int:
    made = settings.encoder_input_size // settings.encoder_patch_size * settings.patch_size
    if settings.image_size not in (None, made):
        raise UserError(f"{name}/{CONFIG}: image_size {settings.image_size} is not the {made} that its patches make")
    if settings.encoder_hidden_size % _HEAD_DIM:
        raise UserError(f"{name}/{CONFIG}: encoder_hidden_size must be a multiple of {_HEAD_DIM}")
    return made


def _read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / f"{WEIGHTS}.index.json").exists():
        index = read_json(folder / f"{WEIGHTS}.index.json", f"{name}/{WEIGHTS}.index.json")
        files = sorted(set(index.get("weight_map", {}).values()))
    state: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"there is no {name}/{file}")
        state |= read_state_dict(folder / file)
    return {key: tensor.float() for key, tensor in state.items() if key != "decoder.decoder_pos_embed"}


def _encoder(
    settings: Settings, state: dict[str, Tensor], scale: dict[str, Tensor], name: str, scratch: Path
) -> PretrainedEncoder:
    from transformers import AutoConfig, AutoModel

    kind = settings.encoder_type
    norm = cast(type[PretrainedEncoder], find("encoder", kind, "")).final_norm
    fixed = dict(_FIXED[kind])
    config = AutoConfig.for_model(
        fixed.pop("model_type"),
        **fixed,
        hidden_size=settings.encoder_hidden_size,
        patch_size=settings.encoder_patch_size,
        num_hidden_layers=settings.encoder_num_hidden_layers,
        num_attention_heads=settings.encoder_hidden_size // _HEAD_DIM,
    )
    with torch.device("meta"):
        expected = AutoModel.from_config(config).state_dict()
    expected = {key: tensor for key, tensor in expected.items() if not key.startswith(f"{norm}.")}
    state = {_renamed(key, _OLDER[kind]): tensor for key, tensor in state.items()}
    check_tensors(state, expected, f"{name}: encoder")
    (scratch / ENCODER).mkdir(parents=True, exist_ok=True)
    mean, std = (scale[key].flatten().tolist() for key in ("encoder_mean", "encoder_std"))
    save_pretrained(scratch / ENCODER, config, state, norm, mean, std)
    entry = {kind: {"pretrained": str(scratch / ENCODER), "input_size": settings.encoder_input_size}}
    return build("encoder", entry, f"{name}: encoder")


def _decoder(settings: Settings, sizes: DecoderSizes, image_size: int, state: dict[str, Tensor], name: str) -> Decoder:
    try:
        decoder = Decoder(settings.encoder_hidden_size, image_size, **sizes.model_dump(exclude={"weights"}))
    except ValueError as error:
        raise UserError(f"{name}/{CONFIG}: {error}") from error
    load_decoder(decoder, _decoder_weights(settings, image_size, state, name), f"{name}: decoder")
    return decoder


def _decoder_weights(settings: Settings, image_size: int, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A decoder's weights under our names, with the position table that diffusers gives it."""
    found = find_decoder(state)
    if found is None:
        raise UserError(f"{name}: there is no decoder among its weights")
    grid = image_size // settings.patch_size
    table = sincos_positions(settings.decoder_hidden_size, grid, spread=_GRID / grid)
    return {**found.ours(f"{name}: decoder"), "positions": table}


def read_decoder(folder: Path, name: str) -> dict[str, Tensor]:
    """The decoder's weights of a diffusers folder, under our names; its encoder is not built.

    Raises:
        UserError: as :func:`read`.
    """
    settings = _read_settings(folder, name)
    return _decoder_weights(settings, _image_size(settings, name), _read_weights(folder, name), name)


def _set_scale(rae: RAE, state: dict[str, Tensor], factor: float, name: str) -> None:
    """Give the autoencoder the statistics by which it normalises as the folder says."""
    mean = state.get("_latents_mean", torch.zeros(1)).double()
    divisor = (state.get("_latents_std", torch.ones(1)).double() + _EPS) / factor
    if not mean.any() and (divisor - 1).abs().max() < 2 * _EPS:
        return
    try:
        mean, divisor = (torch.broadcast_to(tensor, rae.latent_shape) for tensor in (mean, divisor))
    except RuntimeError as error:
        raise UserError(f"{name}: latent statistics of shape {tuple(mean.shape)}, not {rae.latent_shape}") from error
    rae.latent_mean, rae.latent_var = mean.float().contiguous(), (divisor.square() - _EPS).float()
