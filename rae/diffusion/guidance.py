"""Guidance: networks made of networks, so that samplers need not know of it.

A guidance is called as a network is, (x, t, label), but with one time for the whole batch or one a sample.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from rae.config.registry import register
from rae.config.values import Checked, Finite

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (B, C, h, w), t (B,), label (B,) -> what a network predicts."""


def _interval(value: Any) -> Any:
    if not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"must be two times in [0, 1], the lower first, not {value}")
    return value


Interval = Annotated[tuple[float, float], Checked(_interval), "[from, to] in [0, 1]"]


class Guidance:
    """``weaker + scale·(stronger − weaker)`` inside an interval of times, both ends included; outside it ``stronger``.

    Nothing is computed whose result is not used: outside the interval ``weaker`` is not called. Subclasses define
    :meth:`pair`; those whose two predictions come of other calls, :meth:`weaker`.

    Args:
        network: what is guided.
        scale: 1 is no guidance.
        interval: of times as the network gets them: after the shift.
    """

    def __init__(self, network: Predictor, scale: float, interval: tuple[float, float] = (0.0, 1.0)):
        self.network, self.scale, (self.low, self.high) = network, scale, interval

    def __call__(self, x: Tensor, t: float | Tensor, label: Tensor) -> Tensor:
        """As the network; ``t`` is one time, or (B,)."""
        times = t if isinstance(t, Tensor) else x.new_full((len(x),), t)
        if self.scale == 1:
            return self.network(x, times, label)
        if not isinstance(t, Tensor):
            return self.guided(x, times, label) if self.low <= t <= self.high else self.network(x, times, label)
        inside = (self.low <= t) & (t <= self.high)
        if inside.all() or not inside.any():
            return (self.guided if inside.all() else self.network)(x, times, label)
        result = torch.empty_like(x)
        for chosen, predict in ((inside, self.guided), (~inside, self.network)):
            result[chosen] = predict(x[chosen], times[chosen], label[chosen]).to(result)
        return result

    def guided(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The prediction with guidance."""
        stronger, weaker = self.pair(x, t, label)
        return weaker + self.scale * (stronger - weaker)

    def pair(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The two predictions."""
        raise NotImplementedError


@register("guidance", "none", context=("network",))
def none(network: Predictor) -> Guidance:
    """The network as it is."""
    return Guidance(network, 1.0)


@register("guidance", "cfg", context=("network",))
class ClassifierFree(Guidance):
    """Classifier-free guidance (arXiv 2207.12598): away from what the network predicts for no class.

    Both predictions are one call, of twice the batch.

    Args:
        network: with a label for no class (supplied).
        scale: 1 is no guidance.
        interval: of times (arXiv 2404.07724), after the shift; t = 1 is noise.

    Raises:
        ValueError: the network has no label for no class.
    """

    def __init__(self, network: Any, scale: Finite, interval: Interval = (0.0, 1.0)):
        super().__init__(network, scale, interval)
        if getattr(network, "null_label", None) is None or not network.num_classes:
            raise ValueError("classifier-free guidance needs a network that was trained with labels, and dropped some")
        self.null_label = network.null_label

    def pair(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.cat([label, torch.full_like(label, self.null_label)])
        stronger, weaker = self.network(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        return stronger, weaker


class _Internal(Guidance):
    """Internal guidance of a network; see :func:`internal`."""

    def __init__(self, network: Any, scale: float, interval: tuple[float, float], null_scale: float):
        super().__init__(network, scale, interval)
        self.null_scale, self.null_label, self.num_classes = null_scale, network.null_label, network.num_classes

    def guided(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        full, base = self.network(x, t, label, with_base=True)  # type: ignore[call-arg]
        scale: float | Tensor = self.scale
        if self.null_scale != self.scale and self.null_label is not None:
            null = (label == self.null_label).view(-1, *[1] * (x.ndim - 1))
            scale = torch.where(null, self.null_scale, self.scale)
        return base + scale * (full - base)


@register("guidance", "internal", context=("network",))
def internal(
    network: Any,
    scale: Finite = 1.78,
    interval: Interval = (0.0, 1.0),
    cfg_scale: Finite = 1.0,
    cfg_interval: Interval = (0.0, 1.0),
    null_scale: Finite | None = None,
) -> Guidance:
    """Internal guidance (arXiv 2605.18324): away from what the network's own base head predicts, in one forward pass.

    Args:
        network: with a base head (supplied).
        scale: 1 is no guidance; 1.78 on [0.1, 1] published.
        interval: see :class:`ClassifierFree`.
        cfg_scale, cfg_interval: classifier-free guidance between the guided predictions for the class and for none;
            1 leaves it out.
        null_scale: the scale of the prediction for no class, if it is another.

    Raises:
        ValueError: the network has no base head; or no label for no class, where one is needed.
    """
    if not getattr(network, "base_depth", 0):
        raise ValueError("internal guidance needs a network with a base head: ditdh_in_context")
    inner = _Internal(network, scale, interval, scale if null_scale is None else null_scale)
    return inner if cfg_scale == 1 else ClassifierFree(inner, cfg_scale, cfg_interval)


@register("guidance", "autoguidance", context=("network", "open_network"))
class AutoGuidance(Guidance):
    """Autoguidance (arXiv 2406.02507): away from what a weaker network predicts for the same class.

    Args:
        network: what is guided (supplied).
        guide: where the weaker network is: a source of a generator on the same latents; or that network.
        scale: 1 is no guidance; 1.42 published, with DiT-DH-S of 14 epochs as the guide of XL.
        interval: see :class:`ClassifierFree`.
        open_network: source -> its network (supplied).
    """

    def __init__(
        self,
        network: Predictor,
        guide: Any,
        scale: Finite = 1.42,
        interval: Interval = (0.0, 1.0),
        open_network: Callable[[str], nn.Module] | None = None,
    ):
        super().__init__(network, scale, interval)
        self.guide = open_network(guide) if isinstance(guide, str) and open_network else guide

    def pair(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(x, t, label), self.guide(x, t, label)
