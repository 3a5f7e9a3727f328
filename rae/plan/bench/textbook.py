"""The training step in plain PyTorch, twice: as the public reference computes it, and as this project does."""

import copy
from contextlib import AbstractContextManager

import lpips
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from rae.algorithms.adversarial import Adversarial
from rae.algorithms.ema import update_ema
from rae.algorithms.perceptual import Perceptual
from rae.autoencoder.discriminator import SpectralConv
from rae.autoencoder.losses import adaptive_weight, gradient_at, last_layer_gradient, value_and_gradient, with_gradient
from rae.autoencoder.rae import RAE, quantize, to_float
from rae.training.optimizers import adamw

Figures = dict[str, Tensor]
DECAY, GAN_WEIGHT = 0.9978, 0.75
ADAMW = dict(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)


class Parts:
    """What a step needs, none of it shared with another step's.

    Args:
        rae, perceptual, adversarial: what a Trainer was given; of their networks these are copies, with new optimizers.
    """

    def __init__(self, rae: RAE, perceptual: Perceptual, adversarial: Adversarial):
        self.rae = copy.deepcopy(rae)
        self.perceptual: nn.Module = copy.deepcopy(perceptual.network)  # type: ignore[assignment]
        self.discriminator = copy.deepcopy(adversarial.discriminator)
        self.optimizer = adamw(self.rae.decoder.parameters())
        self.d_optimizer = adamw(self.discriminator.heads.parameters())
        self.augment = adversarial._augmented
        self.chunk, self.gan_chunk = perceptual.chunk, adversarial.chunk

    def begin_as(self, other: "Parts") -> None:
        """Take over the other's weights and optimizer states, so that one step's losses can be compared."""
        self.rae.decoder.load_state_dict(other.rae.decoder.state_dict())
        self.discriminator.load_state_dict(other.discriminator.state_dict())
        for own, others in ((self.optimizer, other.optimizer), (self.d_optimizer, other.d_optimizer)):
            fused = own.param_groups[0]["fused"]
            own.load_state_dict(copy.deepcopy(others.state_dict()))  # it would share the moments
            own.param_groups[0]["fused"] = fused
            for state in own.state.values() if not fused else ():
                state["step"] = state["step"].cpu()  # where a fused one keeps it, reading it would wait for the device

    def autocast(self) -> AbstractContextManager[None]:
        """The training precision: bf16 on a GPU, fp32 on a CPU."""
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())

    def update_discriminator(self, real: Tensor, fake: Tensor, figures: Figures) -> None:
        """One hinge step of the discriminator."""
        self.discriminator.train()
        self.d_optimizer.zero_grad()
        with self.autocast():
            logits_fake = self.discriminator(self.augment(fake)).float()
            logits_real = self.discriminator(self.augment(real)).float()
        loss = 0.5 * (torch.relu(1 - logits_real).mean() + torch.relu(1 + logits_fake).mean())
        loss.backward()
        self.d_optimizer.step()
        figures["discriminator/loss"] = loss.detach()


class Textbook:
    """The step as the reference computes it.

    The adaptive weight by ``autograd.grad`` at the last layer, twice, and then a whole backward pass; the images
    encoded again for the discriminator's fakes; attention written out; LPIPS as its package has it, in the default
    layout; torch's own spectral norm and its default AdamW; an average over all weights, the frozen encoder's among
    them, tensor by tensor.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        parts.perceptual = published_lpips(parts.perceptual)
        for network in (parts.rae.decoder, parts.rae.encoder.network, parts.discriminator.features.network):
            write_out_attention(network)  # type: ignore[arg-type]
        for head in parts.discriminator.heads:  # type: ignore[union-attr]
            use_torchs_spectral_norm(head)
        parts.optimizer = torch.optim.AdamW(parts.rae.decoder.parameters(), **ADAMW)  # type: ignore[arg-type]
        parts.d_optimizer = torch.optim.AdamW(parts.discriminator.heads.parameters(), **ADAMW)  # type: ignore
        weights = [*parts.rae.decoder.parameters(), *parts.rae.encoder.network.parameters()]
        self.averaged = [(p.detach().clone(), p) for p in weights]

    def __call__(self, batch: Tensor, discriminate: bool, gan: bool) -> Figures:
        """One step on a uint8 batch (B, 3, H, W); returns its losses."""
        parts, image = self.parts, to_float(batch)
        parts.rae.train()
        parts.optimizer.zero_grad()
        with parts.autocast():
            recon = self._recon(image)
            l1 = (recon - image).abs().mean()
            perceptual = parts.perceptual(recon * 2 - 1, image * 2 - 1).mean()
        rec = l1 + perceptual
        figures = {"l1": l1, "lpips": perceptual, "total": rec}
        if gan:
            parts.discriminator.eval()
            with parts.autocast():
                figures["gan"] = -parts.discriminator(parts.augment(recon)).float().mean()
            weight = parts.rae.decoder.head.weight
            (grad_rec,) = torch.autograd.grad(rec, weight, retain_graph=True)
            (grad_gan,) = torch.autograd.grad(figures["gan"], weight, retain_graph=True)
            figures["total"] = rec + GAN_WEIGHT * adaptive_weight(grad_rec, grad_gan) * figures["gan"]
        figures["total"].backward()
        parts.optimizer.step()
        with torch.no_grad():
            for average, weight in self.averaged:
                average.mul_(DECAY).add_(weight, alpha=1 - DECAY)
        if discriminate:
            parts.rae.eval()
            with torch.no_grad(), parts.autocast():
                fake = quantize(self._recon(image))
            parts.update_discriminator(image, fake, figures)
        return {name: figure.detach() for name, figure in figures.items()}

    def _recon(self, image: Tensor) -> Tensor:
        rae = self.parts.rae  # whose forward would look at the images' values, and so wait for the device
        return rae.decode_with_hidden(rae.latent_of(rae.noised(rae.clean_tokens(image))))[0]


class Bare:
    """The step as this project computes it, without Composer: what the Trainer's own cost is measured against."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.average = [p.detach().clone() for p in parts.rae.decoder.parameters()]

    def __call__(self, batch: Tensor, discriminate: bool, gan: bool) -> Figures:
        """One step on a uint8 batch (B, 3, H, W); returns its losses."""
        parts, image = self.parts, to_float(batch)
        parts.rae.train()
        parts.optimizer.zero_grad()
        with parts.autocast():
            tokens = parts.rae.clean_tokens(image)
            recon, hidden = parts.rae.decode_with_hidden(parts.rae.latent_of(parts.rae.noised(tokens)))
            l1 = (recon - image).abs().mean()
        perceptual, gradient = value_and_gradient(self._perceptual, recon, image, chunk=parts.chunk)
        total = l1 + with_gradient(perceptual, recon, gradient)
        figures = {"l1": l1, "lpips": perceptual, "total": total}
        if gan:
            figures |= self._add_gan(total, recon, hidden)
        figures["total"].backward()
        parts.optimizer.step()
        update_ema(self.average, [p.detach() for p in parts.rae.decoder.parameters()], DECAY)
        if discriminate:
            with torch.no_grad(), parts.autocast():
                fake = quantize(parts.rae.decode(parts.rae.latent_of(tokens)))
            parts.update_discriminator(image, fake, figures)
        return {name: figure.detach() for name, figure in figures.items()}

    def _add_gan(self, total: Tensor, recon: Tensor, hidden: Tensor) -> Figures:
        parts = self.parts
        grad_rec = gradient_at(total, recon)
        fake = recon.detach().requires_grad_()
        augmented = parts.augment(fake)
        parts.discriminator.eval()
        gan, grad_augmented = value_and_gradient(self._verdict, augmented, chunk=parts.gan_chunk)
        (grad_gan,) = torch.autograd.grad(augmented, fake, grad_augmented)
        std, patch = parts.rae.image_std, parts.rae.decoder.patch_size
        at_last = [last_layer_gradient(g * std, hidden, patch) for g in (grad_rec, grad_gan)]
        weight = GAN_WEIGHT * adaptive_weight(*at_last)
        value = total.detach() + weight * gan
        return {"gan": gan, "total": with_gradient(value, recon, grad_rec + weight * grad_gan)}

    def _perceptual(self, recon: Tensor, image: Tensor) -> Tensor:
        with self.parts.autocast():
            return self.parts.perceptual(recon, image)

    def _verdict(self, image: Tensor) -> Tensor:
        with self.parts.autocast():
            return -self.parts.discriminator(image).float().mean()


def published_lpips(ours: nn.Module) -> nn.Module:
    """The lpips package's module with our LPIPS's weights, in the default memory layout."""
    backbone = ours.features.network.state_dict()  # type: ignore[union-attr]
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    model.net.load_state_dict({name: tensor.contiguous() for name, tensor in backbone.items()})
    return model.to(next(iter(backbone.values())).device)


def write_out_attention(network: nn.Module) -> None:
    """Attention as softmax(QKᵀ)V in three operations, for timm's and transformers' networks."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"


def use_torchs_spectral_norm(module: nn.Module) -> None:
    """Replace a head's convolutions by torch's, whose weights are divided, with the same parameters."""
    for name, child in module.named_children():
        if isinstance(child, SpectralConv):
            out, channels, kernel = child.weight_orig.shape
            conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
            theirs = spectral_norm(conv, eps=child.eps).to(child.weight_orig.device)
            theirs.load_state_dict(child.state_dict())
            setattr(module, name, theirs)
        else:
            use_torchs_spectral_norm(child)
