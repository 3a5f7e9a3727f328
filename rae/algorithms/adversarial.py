"""The GAN: a discriminator, trained beside the autoencoder, and its term in the autoencoder's loss."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from composer import Algorithm, Event, Logger, State
from composer.core import Precision
from composer.optim import ComposerScheduler
from composer.utils import dist
from torch import Tensor, nn

from rae.algorithms.base import (
    can_skip_by_itself,
    in_precision,
    keep_settings,
    loss_scale,
    precision_context,
    reached,
    set_step,
    unwrapped,
)
from rae.autoencoder.discriminator import diff_augment
from rae.autoencoder.losses import (
    D_LOSSES,
    G_LOSSES,
    adaptive_weight,
    gradient_at,
    last_layer_gradient,
    note_gradient,
    value_and_gradient,
    with_gradient,
)
from rae.autoencoder.model import RAEModel, build_planned
from rae.autoencoder.rae import quantize, to_float
from rae.config.arguments import PluginEntry, build, check_arguments
from rae.config.registry import register
from rae.config.times import TimeString
from rae.config.values import Count, NotNegative, Positive
from rae.model import Counted


def _autoencoder(state: State) -> RAEModel:
    return cast(RAEModel, unwrapped(state))


def adversarial_last(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Composer algorithm pass: the GAN's term closes the loss, whatever the order in YAML.

    It needs the whole reconstruction loss, and Composer runs AFTER events in reverse order.
    """
    return sorted(algorithms, key=lambda algorithm: isinstance(algorithm, Adversarial))


@register("algorithm", "adversarial", context=("steps_per_epoch",))
class Adversarial(Algorithm):
    """The published GAN recipe: train a discriminator from ``discriminator_start``, add its term from ``start``.

    One backward pass through each loss network: the gradients of the reconstruction losses and of the GAN loss
    are taken at the reconstruction, give the adaptive weight by a matrix product with the last layer's input, and
    go through the decoder together, once. The discriminator has an optimizer and a schedule of its own, which
    advances when it updates; its gradients are averaged over ranks, so it stays identical on all of them.

    Args:
        steps_per_epoch: what ``ep`` counts in the schedule (supplied).
        discriminator: ``{dino: {…}}`` is the published one.
        optimizer, schedule: the discriminator's.
        loss: its loss, ``hinge`` or ``vanilla`` (softplus).
        generator_loss: ``linear`` (−mean logits) or ``softplus``.
        weight: of the GAN term, times the adaptive weight.
        adaptive: balance the two gradients at the last layer (:func:`rae.autoencoder.losses.adaptive_weight`).
            With microbatches, the balance is struck in each.
        max_adaptive_weight: its cap.
        start: when the autoencoder begins to see the discriminator.
        discriminator_start: when the discriminator begins to train.
        updates_per_step: discriminator updates a step.
        augment: DiffAug (:func:`rae.autoencoder.discriminator.diff_augment`) before the discriminator; a mapping
            overrides its amounts, false turns it off.
        fakes: ``fresh`` decodes the clean latents again with the updated weights, ``reused`` takes the step's
            own reconstructions (of noised latents, from before the update).
        chunk: reconstructions that the autoencoder's term takes through the discriminator at a time; fewer need less
            memory, and the numbers are the same.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        discriminator: PluginEntry("discriminator") = {"dino": {}},  # type: ignore[valid-type] # noqa: B006
        optimizer: PluginEntry("optimizer") = {"adamw": {}},  # type: ignore[valid-type] # noqa: B006
        schedule: PluginEntry("schedule") = {"warmup_cosine": {}},  # type: ignore[valid-type] # noqa: B006
        loss: Literal["hinge", "vanilla"] = "hinge",
        generator_loss: Literal["linear", "softplus"] = "linear",
        weight: NotNegative = 0.75,
        adaptive: bool = True,
        max_adaptive_weight: Positive = 1e4,
        start: TimeString = "8ep",
        discriminator_start: TimeString = "6ep",
        updates_per_step: Count = 1,
        augment: bool | dict[str, float] = True,
        fakes: Literal["fresh", "reused"] = "fresh",
        chunk: Count | None = 8,
    ):
        where = "algorithms.adversarial"
        if isinstance(augment, dict):
            check_arguments(diff_augment, augment, f"{where}.augment", ("image",))
        self.discriminator = build_planned("discriminator", discriminator, f"{where}.discriminator")
        self.parameters = [p for p in self.discriminator.parameters() if p.requires_grad]
        self.optimizer = build("optimizer", optimizer, f"{where}.optimizer", params=self.parameters)
        factor = build(
            "schedule",
            schedule,
            f"{where}.schedule",
            base_lr=self.optimizer.param_groups[0]["lr"],
            steps_per_epoch=steps_per_epoch,
        )
        if isinstance(factor, ComposerScheduler):
            raise ValueError(
                "the discriminator's schedule must be one of ours: warmup_cosine, warmup_linear, constant_lr"
            )
        keep_settings(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.discriminator_loss, self.generator_loss = D_LOSSES[loss], G_LOSSES[generator_loss]
        self.weight, self.adaptive, self.max_adaptive_weight = weight, adaptive, max_adaptive_weight
        self.start, self.discriminator_start = start, discriminator_start
        self.updates_per_step, self.fakes, self.chunk = updates_per_step, fakes, chunk
        self.augmentation = {} if augment is True else augment
        self.seen: list[tuple[Tensor, Tensor]] = []  # (image, latent or reconstruction) of each microbatch
        self.adaptive_weights: list[Tensor] = []
        self.figures: dict[str, float] = {}
        """What the step logged of the discriminator; empty before it begins."""
        self.logits: tuple[Tensor, Tensor] | None = None
        """Of the last microbatch that it was trained on, real and fake: (B, …) each."""
        self.bad_update = 0.0
        """1 when the step's update of the discriminator was left out, as a loss or gradient of it was not finite."""

    def networks(self) -> dict[str, nn.Module]:
        """The discriminator's; see :meth:`rae.model.RunModel.networks`."""
        discriminator = self.discriminator
        return {
            "discriminator's backbone": discriminator.features.network,
            "discriminator's heads": discriminator.heads,
        }

    def compiled(self) -> dict[str, Iterable[nn.Module]]:
        """The discriminator, as ``compile`` calls it."""
        return {"discriminator": [self.discriminator]}

    def step_operations(
        self, counted: Counted, model: RAEModel, outputs: dict[str, Tensor], image: Tensor
    ) -> list[tuple[str, float]]:
        """As :meth:`rae.algorithms.base.LossTerm.step_operations`."""
        recon = outputs["recon"]
        self.discriminator.eval()
        judge, _ = counted(lambda: self.discriminator(recon))
        learn, _ = counted(lambda: self._learn(recon))
        decode = counted(lambda: model.rae.decode(outputs["latent"]))[0] if self.fakes == "fresh" else 0.0
        return [(self.discriminator_start, 2 * learn * self.updates_per_step + decode), (self.start, 2 * judge)]

    @torch.enable_grad()
    def _learn(self, image: Tensor) -> Tensor:
        """A pass through the discriminator and back."""
        logits = self.discriminator(image)
        torch.autograd.grad(logits.sum(), self.parameters, allow_unused=True)
        return logits.detach()

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START, Event.AFTER_LOSS, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._to_device(state)
        elif event == Event.BATCH_START:
            self.seen, self.adaptive_weights, self.bad_update, self.figures = [], [], 0.0, {}
        elif event == Event.AFTER_LOSS:
            if reached(state, self.discriminator_start):
                fake = state.outputs["latent" if self.fakes == "fresh" else "recon"].detach()
                self.seen.append((state.batch["image"], fake))
            if reached(state, self.start):
                self._add_term(state)
        elif self.seen:
            pairs = [(to_float(image), self._fake(state, fake)) for image, fake in self.seen]
            for _ in range(self.updates_per_step):
                self.figures = self._update(state, pairs)
            logger.log_metrics(self.figures)
            self.seen = []

    def _to_device(self, state: State) -> None:
        state.device.module_to_device(self.discriminator)
        device = self.parameters[0].device
        if isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for p in self.parameters:  # a sharded load fills only what is already there
                on_device = self.optimizer.defaults["fused"] or self.optimizer.defaults["capturable"]
                self.optimizer.state[p] = {
                    "step": torch.tensor(0.0, device=p.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        self.scaler = torch.amp.GradScaler(device.type, enabled=state.precision == Precision.AMP_FP16)

    def _augmented(self, image: Tensor) -> Tensor:
        return image if self.augmentation is False else diff_augment(image, **self.augmentation)  # type: ignore[arg-type]

    def _add_term(self, state: State) -> None:
        """Replace the total by one that also holds the GAN term and needs a single backward pass."""
        recon, model, scale = state.outputs["recon"], _autoencoder(state), loss_scale(state)
        grad_rec = gradient_at(state.loss["total"], recon, scale)
        fake = recon.detach().requires_grad_()
        augmented = self._augmented(fake)
        self.discriminator.eval()
        gan, grad_augmented = value_and_gradient(
            in_precision(state, self._verdict), augmented, chunk=self.chunk, scale=scale
        )
        (grad_gan,) = torch.autograd.grad(augmented, fake, grad_augmented)
        weight = self.weight * self._balance(grad_rec, grad_gan, state.outputs["hidden"], model)
        note_gradient(state.outputs, "reconstruction", grad_rec)
        note_gradient(state.outputs, "gan", grad_gan, weight)
        total = state.loss["total"].detach() + weight * gan
        state.loss["gan"] = gan
        state.loss["total"] = with_gradient(total, recon, grad_rec + weight * grad_gan)

    def _verdict(self, image: Tensor) -> Tensor:
        return self.generator_loss(self.discriminator(image).float())

    def _balance(self, grad_rec: Tensor, grad_gan: Tensor, hidden: Tensor, model: RAEModel) -> Tensor:
        if not self.adaptive:
            return torch.ones((), device=grad_rec.device)
        with torch.no_grad():
            gradients = torch.stack(
                [
                    last_layer_gradient(g * model.rae.image_std, hidden, model.rae.decoder.patch_size)
                    for g in (grad_rec, grad_gan)
                ]
            )
            dist.all_reduce(gradients)
            gradients /= dist.get_world_size()
            weight = adaptive_weight(gradients[0], gradients[1], self.max_adaptive_weight)
        self.adaptive_weights.append(weight)
        return weight

    @torch.no_grad()
    def _fake(self, state: State, seen: Tensor) -> Tensor:
        """What the discriminator is shown: 8-bit reconstructions, fresh from the latents or the step's own."""
        with precision_context(state):
            fresh = self.fakes == "fresh"
            return quantize(_autoencoder(state).rae.decode_with_hidden(seen)[0] if fresh else seen)

    def _update(self, state: State, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One discriminator step on (real, fake) of each microbatch."""
        self.discriminator.train()
        self.optimizer.zero_grad(set_to_none=True)
        samples = sum(len(real) for real, _ in pairs)
        figures = torch.zeros(4, device=self.parameters[0].device)
        for real, fake in pairs:
            share = len(real) / samples
            with precision_context(state):
                # Fake before real: each call takes a step of spectral norm's power iteration.
                logits_fake = self.discriminator(self._augmented(fake)).float()
                logits_real = self.discriminator(self._augmented(real)).float()
            self.logits = logits_real.detach(), logits_fake.detach()
            loss = self.discriminator_loss(logits_real, logits_fake)
            self.scaler.scale(loss * share).backward()
            accuracy = (logits_real > logits_fake).float().mean()
            figures += share * torch.stack([loss, logits_real.mean(), logits_fake.mean(), accuracy]).detach()
        self._average_gradients()
        dist.all_reduce(figures)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        bad = self._prevent_bad_step(figures)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return self._named(figures, bad, learning_rate)

    def _prevent_bad_step(self, figures: Tensor) -> Tensor:
        """Let the optimizer change nothing if a loss or gradient is not finite: 0 or 1, the same on all ranks."""
        if self.scaler.is_enabled():  # which does it by itself
            return torch.zeros_like(figures[0])
        norms = torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = (~torch.stack([*norms, *figures]).isfinite()).any().float()
        if can_skip_by_itself(self.optimizer):
            self.optimizer.found_inf = bad
        elif bad:
            self.optimizer.zero_grad(set_to_none=True)
        return bad

    def _average_gradients(self) -> None:
        if dist.get_world_size() == 1:
            return
        gradients = [p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _named(self, figures: Tensor, bad: Tensor, learning_rate: float) -> dict[str, float]:
        values = {
            name: figure / dist.get_world_size()
            for name, figure in zip(("loss", "logits_real", "logits_fake", "accuracy"), figures, strict=True)
        }
        named = {f"discriminator/{name}": value for name, value in values.items()}
        if self.adaptive_weights:
            named["gan/adaptive_weight"] = torch.stack(self.adaptive_weights).mean()
        # One transfer for all of them: each makes the processor wait for the device.
        *floats, bad_now = torch.stack([*named.values(), bad]).tolist()
        self.bad_update = max(self.bad_update, bad_now)
        return {**dict(zip(named, floats, strict=True)), "lr/discriminator": learning_rate}

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_step(self.schedule, state["schedule"]["last_epoch"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
