"""What algorithms share: start times, and loss terms."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State, Time
from composer.core import Precision, TimeUnit, get_precision_context
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from rae.autoencoder.losses import note_gradient, value_and_gradient, with_gradient
from rae.autoencoder.rae import to_float
from rae.config.errors import UserError
from rae.config.times import parse_time
from rae.model import Counted, RunModel


def reached(state: State, time: str) -> bool:
    """Whether training has come to ``time``, e.g. ``8ep``: true for the step that follows 8 whole epochs."""
    when = Time.from_timestring(time)
    if when.unit == TimeUnit.DURATION:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed >= when
    return state.timestamp.get(when.unit) >= when


def unwrapped(state: State) -> RunModel:
    """The model, out of what DDP wraps around it."""
    model = state.model
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]


def loss_scale(state: State) -> float:
    """By what losses are multiplied before a backward pass; 1 but with fp16."""
    return state.scaler.get_scale() if state.precision == Precision.AMP_FP16 else 1.0


def can_skip_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer reads ``found_inf`` on the device (torch's fused ones) and then changes nothing."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def precision_context(state: State) -> AbstractContextManager[None]:
    """Autocast to the training precision; on a CPU too, where Composer has none and :mod:`rae.plan` takes its steps."""
    if state.device.name != "cpu":
        return get_precision_context(state.precision)
    dtype = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}.get(state.precision)
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def in_precision(state: State, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, computed in the training precision; a backward pass through it runs outside that context."""

    def computed(*args: Tensor) -> Tensor:
        with precision_context(state):
            return function(*args)

    return computed


def keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer, whenever it loads a state, take the moments from it and keep its own rates, decay, betas, …"""

    def settings_kept(own: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = zip(state["param_groups"], own.param_groups, strict=False)
        kept = [{**saved, **{k: v for k, v in group.items() if k != "params"}} for saved, group in groups]
        return {**state, "param_groups": kept + state["param_groups"][len(kept) :]}

    optimizer.register_load_state_dict_pre_hook(settings_kept)


def set_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule where it is after ``step`` steps, and the optimizer's rates where it says, from its own base."""
    schedule.last_epoch = step
    schedule._last_lr = [
        base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


class LossTerm(Algorithm):
    """A named term, ``weight`` times a function of reconstruction and image, added to the loss from ``start`` on.

    Subclass it and define :meth:`compute` to add a loss of your own. A term's gradient reaches the model through the
    reconstruction only: it is taken there at once, so that the term's activations are gone before the next term's.

    Args:
        name: in the loss dictionary and the loggers (``loss/train/<name>``).
        weight: its factor in the total.
        start: a time string.
        network: a module the term uses, moved to the device when training starts.
        chunk: how many images go through it at a time; None takes a whole microbatch. Fewer need less memory. It is
            for terms that are means over images of what each image has by itself.
    """

    def __init__(
        self,
        name: str,
        weight: float = 1.0,
        start: str = "0ep",
        network: nn.Module | None = None,
        chunk: int | None = None,
    ):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self.name, self.weight, self.start = name, weight, parse_time(start)
        self.network, self.chunk = network, chunk

    def compute(self, recon: Tensor, image: Tensor) -> Tensor:
        """Both (B, 3, H, W), in [0, 1] (``recon`` approximately) -> scalar."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """The term's network, if it has one; see :meth:`rae.model.RunModel.networks`."""
        return {} if self.network is None else {self.name: self.network}

    def compiled(self) -> dict[str, Iterable[nn.Module]]:
        """It, as ``compile`` calls it."""
        return {"perceptual": self.networks().values()}

    def step_operations(
        self, counted: Counted, model: RunModel, outputs: dict[str, Tensor], image: Tensor
    ) -> list[tuple[str, float]]:
        """(from when on, floating-point operations that a step takes more), on one image.

        Args:
            counted, outputs: see :meth:`rae.model.RunModel.step_operations`.
        """
        if self.network is None or "recon" not in outputs:
            return []
        term, _ = counted(lambda: self.compute(outputs["recon"], image))
        return [(self.start, 1.5 * term)]  # both images forward, one back

    def match(self, event: Event, state: State) -> bool:
        return event == Event.FIT_START or (event == Event.AFTER_LOSS and reached(state, self.start))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if self.network is not None:
                state.device.module_to_device(self.network)
            return
        if "recon" not in state.outputs:
            raise UserError(f"algorithms: {self.name} is of reconstructions; this model's outputs hold no 'recon'")
        recon, image = state.outputs["recon"], to_float(state.batch["image"])
        compute = in_precision(state, self.compute)
        value, gradient = value_and_gradient(compute, recon, image, chunk=self.chunk, scale=loss_scale(state))
        note_gradient(state.outputs, self.name, gradient, self.weight)
        state.loss[self.name] = value
        state.loss["total"] = state.loss["total"] + self.weight * with_gradient(value, recon, gradient)
