"""Discriminators on frozen features (StyleGAN-T, arXiv 2301.09515; Projected GANs, arXiv 2111.01007), and DiffAug."""

from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import GELUTanh
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from rae.autoencoder.backbones import TimmFeatures, read_state_dict, weight_file, weightless
from rae.autoencoder.layers import Frozen, resize
from rae.config.registry import register
from rae.config.values import Count


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / 2**0.5


class SpectralConv(nn.Module):
    """A circular convolution over tokens, of a weight divided by its spectral norm (arXiv 1802.05957).

    The output is divided instead, which is the same and many times smaller; parameters and buffers are named as
    torch.nn.utils.spectral_norm names them. In train mode each call takes a step of the power iteration.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, channels: int, out: int, kernel_size: int, eps: float = 1e-12):
        super().__init__()
        conv = nn.Conv1d(channels, out, kernel_size)
        self.bias, self.weight_orig = conv.bias, conv.weight
        self.register_buffer("weight_u", F.normalize(torch.randn(out), dim=0, eps=eps))
        self.register_buffer("weight_v", F.normalize(torch.randn(channels * kernel_size), dim=0, eps=eps))
        self.margin, self.eps = kernel_size // 2, eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.weight_orig.flatten(1)
            u, v = self._singular_vectors(matrix)
            norm = torch.dot(u, torch.mv(matrix, v))
        if self.margin:
            x = F.pad(x, (self.margin, self.margin), mode="circular")
        return F.conv1d(x, self.weight_orig) / norm + self.bias.unsqueeze(1)

    @torch.no_grad()
    def _singular_vectors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.weight_u, self.weight_v
        v = F.normalize(torch.mv(matrix.T, self.weight_u), dim=0, eps=self.eps)
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=self.eps)
        # Not in place: torch.compile may have kept the old ones for the backward pass.
        self.weight_u, self.weight_v = u, v
        return u, v


def _head(channels: int, kernel_size: int, norm: str) -> nn.Sequential:
    """(B, C, N) -> logits (B, 1, N)."""

    def block(kernel: int) -> nn.Sequential:
        return nn.Sequential(SpectralConv(channels, channels, kernel), _norm(norm, channels), nn.LeakyReLU(0.2))

    return nn.Sequential(block(1), _Residual(block(kernel_size)), SpectralConv(channels, 1, 1))


class _TokenNorm(nn.Module):
    """Normalise each sample and channel over its tokens, with an affine: an instance norm.

    It is written out because the convolution's bias before it has a gradient of zero but for rounding, and Adam
    makes whole steps of that: only this order of operations takes the steps that the reference takes.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()  # in any training precision
        mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
        return (x - mean) * torch.rsqrt(var + 1e-6) * self.weight.view(1, -1, 1) + self.bias.view(1, -1, 1)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "bn":  # the reference's name for it
        return _TokenNorm(channels)
    if kind == "gn":
        if channels % 32:
            raise ValueError(f"norm: gn has 32 groups, which do not divide a level's {channels} channels; take bn")
        return nn.GroupNorm(32, channels)
    raise ValueError(f"unknown norm {kind!r}; there are: bn, gn")


def _check_tokens(kernel_size: int, norm: str, tokens: dict[str, int]) -> None:
    """Refuse levels, by name, that have too few tokens for what their heads do."""
    for name, count in tokens.items():
        remedy = "a larger input_size, or a finer level"
        if norm == "bn" and count == 1:
            raise ValueError(f"{name} has a single token, of which norm: bn leaves nothing: choose {remedy}")
        if kernel_size // 2 > count:  # a circular padding repeats each token once at most
            few = f"{name} has {count} token{'s' * (count > 1)}, too few for kernel_size {kernel_size}"
            raise ValueError(f"{few}: choose {2 * count + 1} at most, {remedy}")


class Discriminator(nn.Module):
    """Trainable heads over frozen feature maps. Input in [0, 1], like everything else here.

    Args:
        features: a frozen network, image (B, 3, S, S) in [−1, 1] -> list of (B, C_i, N_i).
        channels: C_i of each map.
        input_size: the S that images are resized to (bilinear).
        kernel_size: of the residual convolution over tokens.
        norm: ``bn`` (over each sample's tokens) or ``gn`` (GroupNorm(32)).
    """

    def __init__(self, features: nn.Module, channels: list[int], input_size: int, kernel_size: int, norm: str):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
        self.features = Frozen(features)
        self.input_size = input_size
        self.heads = nn.ModuleList(_head(c, kernel_size, norm) for c in channels)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> logits (B, ΣN_i), high for what it takes for real."""
        maps = self.features(resize(image * 2 - 1, self.input_size, mode="bilinear"))
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)


class _DINOFeatures(nn.Module):
    """Patch tokens after chosen blocks, the last block's repeated in front: list of (B, D, N)."""

    def __init__(self, backbone: VisionTransformer, blocks: list[int]):
        super().__init__()
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, -1, 1, 1)  # ImageNet's
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.backbone, self.blocks = backbone, blocks

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.backbone.forward_intermediates(
            image * self.scale + self.shift, indices=self.blocks, norm=False, output_fmt="NLC", intermediates_only=True
        )
        maps = [x.transpose(1, 2) for x in maps]
        return [maps[-1], *maps]


@register("discriminator", "dino")
def dino(
    weights: str | None = None,
    embed_dim: Count = 384,
    depth: Count = 12,
    num_heads: Count = 6,
    patch_size: Count = 8,
    blocks: list[int] = [2, 5, 8, 11],  # noqa: B006 - a default that YAML users read in the signature
    kernel_size: Count = 9,
    norm: str = "bn",
    input_size: Count = 224,
) -> Discriminator:
    """The published discriminator: DINO (arXiv 2104.14294) ViT-S/8 features.

    Two quirks of the public one are kept: GELU is its tanh approximation, and keys have no bias.

    Args:
        weights: a DINO backbone file in original names, ``random``, or None to download timm's
            ``vit_small_patch8_224.dino`` (only at the default sizes).
        embed_dim, depth, num_heads, patch_size: the backbone's sizes.
        blocks: features are taken after these blocks, counted from 0.
        kernel_size, norm: see :class:`Discriminator`.
        input_size: images are resized to it, a multiple of the patch size.
    """
    if min(embed_dim, depth, num_heads, patch_size, input_size) < 1:
        raise ValueError("embed_dim, depth, num_heads, patch_size and input_size must be positive")
    if not blocks or not all(0 <= block < depth for block in blocks) or len({*blocks}) < len(blocks):
        raise ValueError(f"blocks {blocks} must name at least one between 0 and {depth - 1}, and each once")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    if input_size % patch_size:
        raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
    _check_tokens(kernel_size, norm, {"each block": (input_size // patch_size) ** 2})
    if weights is None and (embed_dim, depth, num_heads, patch_size, input_size) != (384, 12, 6, 8, 224):
        raise ValueError("weights are published for the default sizes only; give a file, or random")
    backbone = VisionTransformer(
        img_size=input_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        act_layer=GELUTanh,
        num_classes=0,
    )
    if weights != "random" and not weightless():
        _load_dino(backbone, weights)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.bias[embed_dim : 2 * embed_dim] = 0
    return Discriminator(
        _DINOFeatures(backbone, blocks), [embed_dim] * (len(blocks) + 1), input_size, kernel_size, norm
    )


def _load_dino(backbone: VisionTransformer, weights: str | None) -> None:
    if weights is None:
        published = timm.create_model("vit_small_patch8_224.dino", pretrained=True, num_classes=0)
        backbone.load_state_dict(published.state_dict())
        return
    state = read_state_dict(weight_file(weights))
    own = backbone.state_dict()
    if {k: v.shape for k, v in state.items() if k in own} != {k: v.shape for k, v in own.items()}:
        raise ValueError(f"the tensors in {weights} are not those of a DINO ViT of these sizes")
    backbone.load_state_dict({key: state[key] for key in own})


class _FlatMaps(nn.Module):
    """Feature maps as rows of tokens: list of (B, C_i, h·w)."""

    def __init__(self, features: TimmFeatures):
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> list[Tensor]:
        return [feature.flatten(2) for feature in self.features((image + 1) / 2)]


@register("discriminator", "timm")
def timm_discriminator(
    model: str,
    levels: list[int] | None = None,
    weights: str | None = None,
    kernel_size: Count = 9,
    norm: str = "bn",
    input_size: Count = 224,
) -> Discriminator:
    """Heads over any timm backbone's feature levels, e.g. an EfficientNet-Lite as in Projected GANs.

    Args:
        model, levels, weights: see :class:`rae.autoencoder.backbones.TimmFeatures`.
        kernel_size, norm: see :class:`Discriminator`.
        input_size: images are resized to it.
    """
    features = TimmFeatures(model, levels, weights, input_size)
    names = range(len(features.sizes)) if levels is None else sorted(levels)
    _check_tokens(kernel_size, norm, {f"level {n}": h * w for n, (h, w) in zip(names, features.sizes, strict=True)})
    return Discriminator(_FlatMaps(features), features.channels, input_size, kernel_size, norm)


def diff_augment(
    image: Tensor,
    translation: float = 1 / 8,
    brightness: float = 0.5,
    saturation: float = 1.0,
    contrast: float = 0.5,
    cutout: float = 0.0,
) -> Tensor:
    """Differentiable augmentation (arXiv 2006.10738); every sample draws its own amounts.

    Args:
        image: (B, 3, H, W) in [0, 1]; the arithmetic is that of images in [−1, 1], in the order of the arguments.
        translation: largest shift, as a share of the side; uncovered pixels become 0 in [−1, 1] terms (grey).
        brightness: largest offset, in [−1, 1] units.
        saturation: factor in 1 ± this. contrast: factor in 1 ± this.
        cutout: side of the square that is set to 0 in [−1, 1] terms, as a share of the side.

    Returns:
        (B, 3, H, W); values may leave [0, 1].
    """
    x = image * 2 - 1
    b, _, height, width = x.shape
    uniform = partial(torch.rand, (b, 1, 1, 1), device=x.device, dtype=x.dtype)
    if translation:
        x = _translate(x, int(height * translation + 0.5), int(width * translation + 0.5))
    x = x + (uniform() * 2 - 1) * brightness
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (1 + (uniform() * 2 - 1) * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + (uniform() * 2 - 1) * contrast)
    if cutout:
        x = x * _cutout_mask(x, int(height * cutout + 0.5), int(width * cutout + 0.5))
    return (x + 1) / 2


def _offsets(b: int, low: int, high: int, device: torch.device) -> Tensor:
    return torch.randint(low, high, (b, 1, 1), device=device)


def _translate(x: Tensor, max_y: int, max_x: int) -> Tensor:
    b, _, height, width = x.shape
    rows = torch.arange(height, device=x.device).view(1, -1, 1) + _offsets(b, -max_y, max_y + 1, x.device) + 1
    columns = torch.arange(width, device=x.device).view(1, 1, -1) + _offsets(b, -max_x, max_x + 1, x.device) + 1
    padded = F.pad(x, (1, 1, 1, 1))  # a border of zeros that every uncovered pixel reads from
    index = torch.arange(b, device=x.device).view(-1, 1, 1)
    return padded[index, :, rows.clamp(0, height + 1), columns.clamp(0, width + 1)].movedim(-1, 1)


def _cutout_mask(x: Tensor, size_y: int, size_x: int) -> Tensor:
    b, _, height, width = x.shape
    rows = torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    top = _offsets(b, 0, height + 1 - size_y % 2, x.device) - size_y // 2
    left = _offsets(b, 0, width + 1 - size_x % 2, x.device) - size_x // 2
    inside = (rows >= top) & (rows < top + size_y) & (columns >= left) & (columns < left + size_x)
    return (~inside).to(x.dtype).unsqueeze(1)
