"""The autoencoder as a run trains it: an :class:`rae.autoencoder.rae.RAE` for Composer's Trainer."""

from collections.abc import Iterable
from typing import Any

import torch
from composer import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from rae.autoencoder.backbones import weightless
from rae.autoencoder.decoder import Decoder, load_published
from rae.autoencoder.layers import blocks_of, fixed_latent_noise
from rae.autoencoder.losses import note_gradient, value_and_gradient, with_gradient
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.config.arguments import build, check_plugin
from rae.config.errors import UserError
from rae.config.registry import find, register
from rae.config.sections import Model
from rae.model import Counted, RunModel


def build_planned(kind: str, entry: Any, where: str, **context: Any) -> Any:
    """As :func:`rae.config.arguments.build`; for real where a user's plugin cannot be built on the meta device.

    A plan builds everything there. Our own plugins read no weights then (:func:`rae.autoencoder.backbones.weightless`);
    another's constructor may well, which works on a real device alone.
    """
    ((name, _),) = check_plugin(kind, entry, where).items()
    try:
        return build(kind, entry, where, **context)
    except Exception:
        if not weightless() or find(kind, name, where).__module__.startswith("rae."):
            raise
    with torch.device("cpu"):
        return build(kind, entry, where, **context)


def build_rae(settings: Model, image_size: int) -> RAE:
    """The autoencoder that a configuration's ``model`` describes.

    Args:
        image_size: side of the image that the decoder makes.

    Raises:
        UserError: weights that cannot be had, or sizes that do not fit.
    """
    encoder = build_planned("encoder", settings.encoder, "model.encoder")
    sizes = settings.decoder.model_dump(exclude={"weights"})
    try:
        decoder = Decoder(encoder.embed_dim, image_size, **sizes)
    except ValueError as error:
        raise UserError(f"model.decoder: {error}") from error
    if settings.decoder.weights:
        load_published(decoder, settings.decoder.weights)
    return RAE(encoder, decoder, settings.noise_tau, settings.noise, settings.latent_stats, settings.output)


@register("model", "autoencoder", context=("image_size",))
class RAEModel(RunModel, ComposerModel):
    """An :class:`RAE` for Composer's Trainer: reconstruction by a pixel loss; algorithms add the rest.

    A batch is {image: uint8 (B, 3, H, W), label}, and may hold precomputed latents (B, C, h, w), or noise_tau (B,) with
    index (B,) for :func:`rae.autoencoder.layers.fixed_latent_noise`. ``forward`` returns {recon, latent (clean),
    hidden}.

    Args:
        image_size: side of the images (supplied).
        settings: those of :class:`rae.config.sections.Model`.

    Raises:
        UserError: see :func:`build_rae`.
    """

    part, trains = "rae", "decoder"
    watched, histograms = ("latent", "recon"), ("latent",)
    configured = ("rae.latent_mean", "rae.latent_var")

    def __init__(self, image_size: int, **settings: Any):
        super().__init__()
        chosen = Model.model_validate(settings)
        self.rae = build_rae(chosen, image_size)
        pixel = check_plugin("pixel_loss", chosen.pixel_loss, "model.pixel_loss")
        self.pixel_loss, self.pixel_name = build_planned("pixel_loss", pixel, "model.pixel_loss"), next(iter(pixel))
        self.image_size, self.latent_shape = image_size, self.rae.latent_shape
        self.eval_metrics: dict[str, Metric] = {}

    @property
    def network(self) -> RAE:  # type: ignore[override]
        return self.rae

    @property
    def noise_tau(self) -> float:  # type: ignore[override]
        return self.rae.noise_tau

    @property
    def activation_checkpointing(self) -> bool:  # type: ignore[override]
        return any(block.checkpointing for block in self.rae.decoder.blocks)

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        for block in self.rae.decoder.blocks:
            block.checkpointing = on

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = self.rae.tokens_of(batch)
        if "noise_tau" in batch:
            noised = fixed_latent_noise(tokens, batch["noise_tau"], batch["index"])
        else:
            noised = self.rae.noised(tokens)
        recon, hidden = self.rae.decode_with_hidden(self.rae.latent_of(noised))
        return {"recon": recon, "hidden": hidden, "latent": self.rae.latent_of(tokens)}

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{pixel_name: …, total: …}; algorithms add named terms and replace the total."""
        pixel, gradient = value_and_gradient(self.pixel_loss, outputs["recon"], to_float(batch["image"]))
        note_gradient(outputs, self.pixel_name, gradient)
        return {self.pixel_name: pixel, "total": with_gradient(pixel, outputs["recon"], gradient)}

    def draw(self, batch: dict[str, Tensor]) -> Tensor:
        return quantize(self(batch)["recon"])

    def given(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"original": to_float(batch["image"])}

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.rae.encoder.network, "decoder": self.rae.decoder}

    def compiled(self) -> dict[str, Iterable[nn.Module]]:
        # Every block by itself: they share one compilation, and FSDP shards the same units.
        return {"encoder": blocks_of(self.rae.encoder.network), "decoder": self.rae.decoder.blocks}  # type: ignore[dict-item]

    def step_operations(self, counted: Counted, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        image = to_float(batch["image"])
        encode, tokens = counted(lambda: self.rae.clean_tokens(image))
        latent = self.rae.latent_of(tokens)
        decode, recon = counted(lambda: self.rae.decode(latent))
        return encode + 3 * decode, {"recon": recon, "latent": latent}

    def eval_forward(self, batch: dict[str, Tensor], outputs: Any = None) -> Tensor:
        """The reconstruction in eval mode, as 8-bit values in [0, 1]."""
        return quantize(self.forward(batch)["recon"])

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else dict(self.eval_metrics)

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        # Composer updates metrics inside the training precision, in which networks and SSIM's filter lose digits.
        with torch.autocast(outputs.device.type, enabled=False):
            metric.update(outputs.float(), to_float(batch["image"]))
