"""The autoencoder as a run trains it: an :class:`rae.autoencoder.rae.RAE` for Composer's Trainer."""

from typing import Any

import torch
from composer import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from rae.autoencoder.decoder import Decoder, load_published
from rae.autoencoder.layers import fixed_latent_noise
from rae.autoencoder.losses import note_gradient, value_and_gradient, with_gradient
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import Model


def build_rae(settings: Model, image_size: int) -> RAE:
    """The autoencoder that a configuration's ``model`` describes.

    Args:
        image_size: side of the image that the decoder makes.

    Raises:
        UserError: weights that cannot be had, or sizes that do not fit.
    """
    encoder = build("encoder", settings.encoder, "model.encoder")
    sizes = settings.decoder.model_dump(exclude={"weights"})
    try:
        decoder = Decoder(encoder.embed_dim, image_size, **sizes)
    except ValueError as error:
        raise UserError(f"model.decoder: {error}") from error
    if settings.decoder.weights:
        load_published(decoder, settings.decoder.weights)
    return RAE(encoder, decoder, settings.noise_tau, settings.noise, settings.latent_stats)


class RAEModel(ComposerModel):
    """An :class:`RAE` for Composer's Trainer: reconstruction by a pixel loss; algorithms add the rest.

    A batch is {image: uint8 (B, 3, H, W), label}, and may hold precomputed latents (B, C, h, w), or noise_tau (B,) with
    index (B,) for :func:`rae.autoencoder.layers.fixed_latent_noise`. ``forward`` returns {recon, latent (clean),
    hidden}.

    Args:
        rae: the autoencoder.
        pixel_loss: (recon, image) -> scalar.
        pixel_name: its name in the loss dictionary and the loggers.
        metrics: evaluation metrics by name, each updated with (recon, image).
    """

    def __init__(self, rae: RAE, pixel_loss: nn.Module, pixel_name: str, metrics: dict[str, Metric] | None = None):
        super().__init__()
        self.rae = rae
        self.pixel_loss, self.pixel_name = pixel_loss, pixel_name
        self.eval_metrics = metrics or {}

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

    def eval_forward(self, batch: dict[str, Tensor], outputs: Any = None) -> Tensor:
        """The reconstruction in eval mode, as 8-bit values in [0, 1]."""
        return quantize(self.forward(batch)["recon"])

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else dict(self.eval_metrics)

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        # Composer updates metrics inside the training precision, in which networks and SSIM's filter lose digits.
        with torch.autocast(outputs.device.type, enabled=False):
            metric.update(outputs.float(), to_float(batch["image"]))
