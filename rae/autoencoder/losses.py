"""Losses between images in [0, 1], GAN losses on logits, and the adaptive weight between them."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rae.autoencoder.backbones import TimmFeatures, read_state_dict, weight_file, weightless
from rae.autoencoder.layers import Frozen, patchify
from rae.autoencoder.winograd import use_winograd
from rae.config.errors import UserError
from rae.config.registry import register


@register("pixel_loss", "l1")
def l1() -> nn.Module:
    """Mean absolute error."""
    return nn.L1Loss()


@register("pixel_loss", "mse")
def mse() -> nn.Module:
    """Mean squared error."""
    return nn.MSELoss()


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½(mean relu(1 − real) + mean relu(1 + fake)) (Geometric GAN, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½(mean softplus(−real) + mean softplus(fake)) (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def linear_g_loss(logits_fake: Tensor) -> Tensor:
    """−mean(fake): the generator's side of the hinge loss, and what the public recipe calls ``vanilla``."""
    return -logits_fake.mean()


def softplus_g_loss(logits_fake: Tensor) -> Tensor:
    """mean softplus(−fake): the non-saturating loss (arXiv 1406.2661)."""
    return F.softplus(-logits_fake).mean()


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
G_LOSSES = {"linear": linear_g_loss, "softplus": softplus_g_loss}


class _Backpropagate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None


def with_gradient(value: Tensor, tensor: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of the given value whose gradient at ``tensor`` is the given one."""
    return _Backpropagate.apply(tensor, gradient, value)  # type: ignore[return-value]


GRADIENT_NORMS = "gradient_norms"
"""Where a forward pass's outputs hold, by name, the norms of its losses' gradients at the reconstruction."""


def note_gradient(outputs: dict[str, Any], name: str, gradient: Tensor, weight: Tensor | float = 1.0) -> None:
    """Keep ‖weight · ∂loss/∂recon‖ among the outputs, as a scalar on the device: nothing waits for it."""
    outputs.setdefault(GRADIENT_NORMS, {})[name] = gradient.norm() * weight


def gradient_at(loss: Tensor, tensor: Tensor, scale: float = 1.0) -> Tensor:
    """∂loss/∂tensor in fp32; ``scale`` keeps an fp16 backward pass from underflowing and is divided out again."""
    (gradient,) = torch.autograd.grad(loss * scale, tensor)
    return gradient.float() / scale


def value_and_gradient(
    loss: Callable[..., Tensor], tensor: Tensor, *others: Tensor, chunk: int | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A loss and its gradient at ``tensor``, both detached, with at most ``chunk`` images' activations in memory.

    A loss network needs no graph once its gradient at the reconstruction is known, so parts of a batch can go
    through it one after the other.

    Args:
        loss: (tensor, *others) -> the mean over their first dimension of what each image has by itself.
        tensor, others: (B, …), split alike.
        chunk: images at a time; None takes all.
        scale: see :func:`gradient_at`.
    """
    count = math.ceil(len(tensor) / chunk) if chunk else 1
    value, gradients = torch.zeros((), device=tensor.device), []
    for parts in zip(*(t.detach().tensor_split(count) for t in (tensor, *others)), strict=True):
        part = parts[0].requires_grad_()
        mean = loss(part, *parts[1:]) * (len(part) / len(tensor))
        gradients.append(gradient_at(mean, part, scale))
        value += mean.detach()
    return value, gradients[0] if count == 1 else torch.cat(gradients)


def last_layer_gradient(grad_image: Tensor, hidden: Tensor, patch_size: int) -> Tensor:
    """The gradient of the decoder's last weight, from the gradient at the (normalised) image, in fp32.

    A linear layer's weight gradient is the outer product of output gradient and input, summed over tokens:
    no second backward through the decoder, and nothing differentiated with respect to a sharded parameter.

    Args:
        grad_image: (B, 3, H, W), ∂loss/∂(normalised image).
        hidden: (B, N, D), the last layer's input.

    Returns:
        (p·p·3, D)
    """
    grad_tokens = patchify(grad_image, patch_size).flatten(0, 1).float()
    return grad_tokens.T @ hidden.detach().flatten(0, 1).float()


def adaptive_weight(grad_rec: Tensor, grad_gan: Tensor, maximum: float = 1e4) -> Tensor:
    """‖∂L_rec/∂W‖ / (‖∂L_gan/∂W‖ + 1e-6), clamped to [0, maximum] (VQGAN, arXiv 2012.09841, eq. 7)."""
    return (grad_rec.norm() / (grad_gan.norm() + 1e-6)).clamp(0, maximum)


class _UnitDistance(torch.autograd.Function):
    """Written out because autograd would keep and pass over the largest feature maps about twenty times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        norm = _norm(x)
        difference = (x / norm).sub_(target)
        ctx.save_for_backward(difference, target, norm, weight)
        ctx.dtype = x.dtype
        distance = difference.square().mean((2, 3))  # a norm over places would add them up one by one
        return distance.sum(dim=1) if weight is None else distance @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        difference, target, norm, weight = ctx.saved_tensors
        scale = grad_output.view(-1, 1, 1, 1) * (2 / norm[0].numel())
        gradient = difference * (scale if weight is None else scale * weight.view(-1, 1, 1))
        unit = difference + target
        radial = torch.linalg.vecdot(gradient, unit, dim=1).unsqueeze(1)
        gradient.addcmul_(unit, radial, value=-1).div_(norm)
        return gradient.to(ctx.dtype), None, None


def _norm(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).add_(1e-10)


def unit_features(x: Tensor) -> Tensor:
    """Features (B, C, h, w) scaled to unit length over channels, in fp32."""
    return x / _norm(x)


def unit_distance(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ_c w_c (x_c/‖x‖ − t_c)² at each place, averaged over places: a level of LPIPS (arXiv 1801.03924, eq. 1).

    In fp32; only ``x`` gets a gradient, which is 0 where ``x`` is.

    Args:
        x: features (B, C, h, w).
        target: :func:`unit_features` of the other image's.
        weight: (C,), or None for ones.

    Returns:
        (B,)
    """
    return _UnitDistance.apply(x, target, weight)  # type: ignore[return-value]


class LPIPS(nn.Module):
    """LPIPS (arXiv 1801.03924), version 0.1, on images in [0, 1]; the mean over the batch.

    Args:
        network: ``vgg``, ``alex`` or ``squeeze``.
        weights: the torchvision backbone: None downloads it, a path is read (torchvision's own state dict).

    Raises:
        UserError: the weights cannot be had, or are not the network's.
    """

    def __init__(self, network: str = "vgg", weights: str | None = None):
        super().__init__()
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it builds torchvision's network by a deprecated argument
            model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        if not weightless():
            _load_backbone(model.net, network, weights)
            use_winograd(model.net)
        self.scaling, self.features = model.scaling_layer, Frozen(model.net.to(memory_format=torch.channels_last))
        for level, lin in enumerate(model.lins):
            self.register_buffer(f"weight{level}", lin.model[-1].weight.detach().flatten(), persistent=False)

    def per_image(self, recon: Tensor, image: Tensor) -> Tensor:
        """(B, 3, H, W) each -> (B,)"""
        with torch.no_grad():
            targets = [unit_features(y) for y in self._features_of(image)]
        levels = zip(self._features_of(recon), targets, strict=True)
        return sum(unit_distance(x, y, self.get_buffer(f"weight{i}")) for i, (x, y) in enumerate(levels))  # type: ignore[return-value]

    def _features_of(self, image: Tensor) -> list[Tensor]:
        return self.features(self.scaling(image * 2 - 1).contiguous(memory_format=torch.channels_last))

    def forward(self, recon: Tensor, image: Tensor) -> Tensor:
        return self.per_image(recon, image).mean()


def _load_backbone(net: nn.Module, network: str, weights: str | None) -> None:
    state = _torchvision_weights(network) if weights is None else read_state_dict(weight_file(weights))
    backbone = {}
    for name, tensor in net.state_dict().items():  # slice2.5.weight is torchvision's features.5.weight
        source = "features." + name.split(".", 1)[1]
        if source not in state or state[source].shape != tensor.shape:
            raise UserError(f"lpips: the tensors in {weights} are not those of torchvision's {network}")
        backbone[name] = state[source]
    net.load_state_dict(backbone)


def _torchvision_weights(network: str) -> dict[str, Tensor]:
    from urllib.error import URLError

    from torchvision import models

    weights = {
        "vgg": models.VGG16_Weights.IMAGENET1K_V1,
        "alex": models.AlexNet_Weights.IMAGENET1K_V1,
        "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }[network]
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except URLError as error:
        raise UserError(
            f"lpips: cannot download {weights.url} ({error.reason}); fetch it elsewhere and give its path as weights:"
        ) from error


class FeatureDistance(nn.Module):
    """LPIPS's form without learned weights, on a timm network's features; the mean over the batch.

    At each level, features are scaled to unit length over channels, and the squared difference is summed
    over channels and averaged over places; levels are added.

    Args:
        model, levels, weights, input_size, image_size: see :class:`rae.autoencoder.backbones.TimmFeatures`.
    """

    def __init__(
        self,
        model: str,
        levels: list[int] | None = None,
        weights: str | None = None,
        input_size: int | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        self.features = Frozen(TimmFeatures(model, levels, weights, input_size, image_size))

    def per_image(self, recon: Tensor, image: Tensor) -> Tensor:
        """(B, 3, H, W) each -> (B,)"""
        with torch.no_grad():
            targets = [unit_features(y) for y in self.features(image)]
        levels = [unit_distance(x, y) for x, y in zip(self.features(recon), targets, strict=True)]
        return torch.stack(levels).sum(dim=0)

    def forward(self, recon: Tensor, image: Tensor) -> Tensor:
        return self.per_image(recon, image).mean()
