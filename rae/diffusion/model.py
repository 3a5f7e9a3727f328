"""A generator as a run trains it: flow matching on the latents of a frozen autoencoder, for Composer's Trainer."""

import functools
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from composer import ComposerModel
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric

import rae
from rae.autoencoder.layers import blocks_of, generator_of
from rae.autoencoder.model import build_planned, build_rae
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.config.arguments import PluginEntry, build
from rae.config.errors import UserError
from rae.config.loading import validated
from rae.config.registry import register
from rae.config.sections import Model, Repa
from rae.config.values import Index, NotNegative
from rae.diffusion.alignment import Alignment
from rae.diffusion.generator import Generator, Guide
from rae.diffusion.guidance import Predictor
from rae.diffusion.statistics import check_autoencoder
from rae.model import Counted, RunModel

Dropout = Annotated[float, Field(ge=0, lt=1)]


def open_autoencoder(source: str | dict[str, Any], image_size: int) -> RAE:
    """The autoencoder that a generator's settings name, for images of this size.

    Args:
        source: what every command takes as a source of one; or settings as an autoencoder's run has under ``model``.

    Raises:
        UserError: there is none; it is of images of another size.
    """
    if not isinstance(source, str):
        return build_rae(validated(Model, source, "model.diffusion.autoencoder"), image_size)
    with torch.device("cpu"):  # also in a plan, which builds the rest without memory
        try:
            opened = rae.load(source)
        except UserError as error:
            raise UserError(f"model.diffusion.autoencoder: {error}") from error
    if not isinstance(opened, RAE):
        raise UserError(f"model.diffusion.autoencoder: {source} is no autoencoder, but a {type(opened).__name__}")
    made = opened.decoder.patch_size * opened.decoder.grid
    if made != image_size:
        raise UserError(f"data.image_size: {image_size} is not that of model.diffusion.autoencoder, {made}")
    return opened


def open_network(source: str) -> nn.Module:
    """The network of a source of a generator, frozen: what autoguidance takes for a guide."""
    opened = rae.load(source)
    if not isinstance(opened, Generator):
        raise UserError(f"{source} is no generator, but a {type(opened).__name__}")
    return opened.network.eval().requires_grad_(False)


def guided_by(entry: dict[str, Any], where: str = "guidance") -> Guide:
    """What makes a network a guided one, by a plugin's entry."""

    @functools.cache  # a guide's weights are read once
    def guide(network: nn.Module) -> Predictor:
        device = next(network.parameters()).device
        return build(
            "guidance", entry, where, network=network, open_network=lambda source: open_network(source).to(device)
        )

    return guide


@register("model", "diffusion", context=("image_size",))
class DiffusionModel(RunModel, ComposerModel):
    """A diffusion transformer on the latents of a frozen autoencoder, by flow matching (arXiv 2510.11690, section 4).

    A batch is {image: uint8 (B, 3, S, S), or precomputed latent (B, C, h, w); label (B,); index (B,)}. Times, noise
    and dropped labels follow from (seed, step, index): they do not depend on how a batch is shared out. ``forward``
    returns {latent (B, C, h, w): normalised; prediction and target: velocities, as prediction of a base head is, base;
    time (B,)}, all in float32.

    Args:
        image_size: side of the images (supplied).
        autoencoder: a source of one, as every command takes it; or settings as an autoencoder's run has under
            ``model``: ``{encoder: …, decoder: {weights: …}, latent_stats: …}``.
        network: a plugin of kind ``network``.
        num_classes: of labels; 0 trains without them.
        label_dropout: how often a label is left out, for classifier-free guidance.
        class_names: of labels, in order; by default those that the training data give.
        repa: align an inner block with an encoder's tokens, ``{encoder: …, block: 8, weight: 0.5}``; it is for training
            alone, and no part of what is exported.
        base_weight: of the loss of a network's base head, where it has one.
        flow, times: plugins of these kinds; the shift follows from the latents' size.
        sampler, guidance: how evaluation, pictures and an export sample if nothing else is said.
        activation_checkpointing: compute each block's activations again in the backward pass.
        checked: refuse to begin where latents are not of mean 0 and variance 1, or their decodes are not the images.

    Raises:
        UserError: no such autoencoder, or sizes that do not fit.
    """

    part, trains = "generator", "network"
    watched, histograms = ("latent", "prediction"), ("latent", "prediction")
    reconstructs = False
    training_only = ("repa",)

    def __init__(
        self,
        image_size: int,
        autoencoder: str | dict[str, Any],
        network: PluginEntry("network"),  # type: ignore[valid-type]
        num_classes: Index = 1000,
        label_dropout: Dropout = 0.1,
        class_names: list[str] = [],  # noqa: B006
        repa: Repa | None = None,
        base_weight: NotNegative = 1.0,
        flow: PluginEntry("flow") = {"line": {}},  # type: ignore[valid-type] # noqa: B006
        times: PluginEntry("times") = {"logit_normal": {}},  # type: ignore[valid-type] # noqa: B006
        sampler: PluginEntry("sampler") = {"euler": {}},  # type: ignore[valid-type] # noqa: B006
        guidance: PluginEntry("guidance") = {"none": {}},  # type: ignore[valid-type] # noqa: B006
        activation_checkpointing: bool = False,
        checked: bool = True,
    ):
        super().__init__()
        if num_classes and len(class_names) > num_classes:
            raise UserError(f"model.diffusion.num_classes: {num_classes} is too few for {len(class_names)} class names")
        frozen = open_autoencoder(autoencoder, image_size)
        self.image_size, self.latent_shape = image_size, frozen.latent_shape
        self.label_dropout, self.checked, self.base_weight = label_dropout, checked, base_weight
        shape = dict(latent_shape=frozen.latent_shape, num_classes=num_classes, null_label=label_dropout > 0)
        made = build_planned("network", network, "model.diffusion.network", **shape)
        distribution = build("times", times, "model.diffusion.times")
        where = "model.diffusion"
        self.generator = Generator(
            made,
            frozen,
            build("flow", flow, f"{where}.flow", latent_shape=frozen.latent_shape, times=distribution),
            build("sampler", sampler, f"{where}.sampler"),
            guided_by(guidance, f"{where}.guidance"),
            class_names,
        )
        self.repa_weight, self.alignment = repa.weight if repa else 0.0, self._aligned(repa) if repa else None
        self.needs_images = repa is not None
        self.activation_checkpointing = activation_checkpointing
        self.eval_metrics: dict[str, Metric] = {}
        self.seed = self.step = 0

    def _aligned(self, repa: Repa) -> Alignment:
        network, where = self.generator.network, "model.diffusion.repa"
        blocks: Any = getattr(network, "blocks", ())
        deep = getattr(network, "depth", len(blocks))
        if repa.block > deep:
            raise UserError(f"{where}: block {repa.block} is beyond the network's {deep}")
        encoder = build_planned("encoder", repa.encoder, f"{where}.encoder")
        dim = blocks[repa.block - 1].norm1.normalized_shape[0]
        try:
            return Alignment(encoder, blocks[repa.block - 1], dim, self.generator.latent_shape[1])
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error

    @property
    def network(self) -> Generator:  # type: ignore[override]
        return self.generator

    @property
    def rae(self) -> RAE:
        """The frozen autoencoder."""
        return self.generator.autoencoder.network  # type: ignore[return-value]

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        return bool(self.generator.num_classes)

    @property
    def activation_checkpointing(self) -> bool:  # type: ignore[override]
        return any(getattr(block, "checkpointing", False) for block in self.generator.network.modules())

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        for block in self.generator.network.modules():
            if hasattr(block, "checkpointing"):
                block.checkpointing = on  # type: ignore[assignment]

    @property
    def has_base(self) -> bool:
        """Whether the network has a base head, which is trained beside it."""
        return bool(self.base_weight and getattr(self.generator.network, "base_depth", 0))

    def begin_step(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step

    def check_data(self, images: Dataset) -> str:
        said = [check_autoencoder(self.rae, images, "model.diffusion.autoencoder")] if self.checked else []
        named, classes = len(self.generator.classes), self.generator.num_classes
        if 0 < named < classes:
            said.append(f"model.diffusion.num_classes is {classes:,}, and the data have {named:,} classes")
        return "; ".join(said)

    @torch.no_grad()
    def latent_of(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch's latents (B, C, h, w), normalised; in float32 whatever the training precision."""
        with torch.autocast(next(self.generator.network.parameters()).device.type, enabled=False):
            return self.rae.latent_of(self.rae.tokens_of(batch))

    def draws(self, latent: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a step draws for samples, by their numbers: times (B,), noise (B, C, h, w), dropped labels (B,).

        Samples without numbers, as a plan has them, are drawn at random.
        """
        draw = self.generator.flow.draw
        if index is None:
            uniform = torch.rand(len(latent), 2, device=latent.device)
            return draw(uniform[:, 0]), torch.randn_like(latent), uniform[:, 1] < self.label_dropout
        # Numbers are drawn in the order of memory: it must not be that which the encoder happens to leave.
        noise, uniform = latent.new_empty(latent.shape), latent.new_empty(len(latent), 2)
        for row, pair, number in zip(noise, uniform, index.tolist(), strict=True):
            generator = generator_of(self.seed, self.step, number, device=latent.device)
            pair.uniform_(generator=generator)
            row.normal_(generator=generator)
        return draw(uniform[:, 0]), noise, uniform[:, 1] < self.label_dropout

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        latent, flow = self.latent_of(batch), self.generator.flow
        index = batch.get("index")
        time, noise, dropped = self.draws(latent, index)
        label = self.generator.labels_of(batch["label"], checked=index is not None)
        if self.label_dropout and self.generator.num_classes:
            label = torch.where(dropped, self.generator.network.null_label, label)  # type: ignore[arg-type]
        mixed, network = flow.mix(latent, noise, time), self.generator.network
        made = network(mixed, time, label, with_base=True) if self.has_base else (network(mixed, time, label),)
        velocities = (flow.velocity(each, mixed, time) for each in made)
        predicted = dict(zip(("prediction", "base"), velocities, strict=False))
        return {"latent": latent, "time": time, "target": flow.target(latent, noise, time), **predicted}

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{flow: …, total: …}, and base: … of a base head, repa: … of what is aligned."""
        error = self.generator.flow.loss
        losses = {"flow": error(outputs["prediction"], outputs["target"]).mean()}
        weights = {"flow": 1.0, "base": self.base_weight, "repa": self.repa_weight}
        if "base" in outputs:
            losses["base"] = error(outputs["base"], outputs["target"]).mean()
        if self.alignment is not None:
            losses["repa"] = self.alignment.loss(to_float(batch["image"]))
        return {**losses, "total": sum(weights[name] * loss for name, loss in losses.items())}  # type: ignore[dict-item]

    def picture_batch(self, count: int) -> dict[str, Tensor]:
        """As many images of each class as there is room for."""
        index = torch.arange(count)
        return {"label": index * max(1, self.generator.num_classes) // count, "index": index}

    def draw(self, batch: dict[str, Tensor]) -> Tensor:
        return quantize(self.generator.sample(batch["label"], numbers=batch["index"]))

    def networks(self) -> dict[str, nn.Module]:
        frozen = {"encoder": self.rae.encoder.network, "decoder": self.rae.decoder}
        if self.alignment is not None:
            frozen["alignment"] = self.alignment.encoder.network
        return {**frozen, "network": self.generator.network}

    def compiled(self) -> dict[str, Iterable[nn.Module]]:
        return {"encoder": blocks_of(self.rae.encoder.network), "network": blocks_of(self.generator.network)}

    def step_operations(self, counted: Counted, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        encode, latent = counted(lambda: self.rae.latent_of(self.rae.clean_tokens(to_float(batch["image"]))))
        time, label = latent.new_full((len(latent),), 0.5), torch.zeros(len(latent), dtype=torch.long)
        more = {"with_base": True} if self.has_base else {}
        forward, made = counted(lambda: self.generator.network(latent, time, label.to(latent.device), **more))
        prediction = made[0] if self.has_base else made
        return encode + 3 * forward, {"latent": latent, "prediction": prediction}

    def eval_forward(self, batch: dict[str, Tensor], outputs: Any = None) -> Tensor:
        """An image of the class of each of the batch, from noise that its number decides; 8-bit values in [0, 1]."""
        return self.draw(batch)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else dict(self.eval_metrics)

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        with torch.autocast(outputs.device.type, enabled=False):
            metric.update(outputs.float(), to_float(batch["image"]))
