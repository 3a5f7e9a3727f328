"""What algorithms share: start times, and loss terms."""

from composer import Algorithm, Event, Logger, State, Time
from composer.core import TimeUnit, get_precision_context
from torch import Tensor, nn

from rae.model import to_float


def reached(state: State, time: str) -> bool:
    """Whether training has come to ``time``, e.g. ``8ep``: true for the step that follows 8 whole epochs."""
    when = Time.from_timestring(time)
    if when.unit == TimeUnit.DURATION:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed >= when
    return state.timestamp.get(when.unit) >= when


class LossTerm(Algorithm):
    """A named term, ``weight`` times a function of reconstruction and image, added to the loss from ``start`` on.

    Subclass it and define :meth:`compute` to add a loss of your own. A term's gradient may reach the model through
    the reconstruction only.

    Args:
        name: in the loss dictionary and the loggers (``loss/train/<name>``).
        weight: its factor in the total.
        start: a time string.
        network: a module the term uses, moved to the device when training starts.
    """

    def __init__(self, name: str, weight: float = 1.0, start: str = "0ep", network: nn.Module | None = None):
        self.name, self.weight, self.start, self.network = name, weight, start, network

    def compute(self, recon: Tensor, image: Tensor) -> Tensor:
        """Both (B, 3, H, W), in [0, 1] (``recon`` approximately) -> scalar."""
        raise NotImplementedError

    def match(self, event: Event, state: State) -> bool:
        return event == Event.FIT_START or (event == Event.AFTER_LOSS and reached(state, self.start))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if self.network is not None:
                state.device.module_to_device(self.network)
            return
        with get_precision_context(state.precision):
            value = self.compute(state.outputs["recon"], to_float(state.batch["image"]))
        state.loss[self.name] = value
        state.loss["total"] = state.loss["total"] + self.weight * value
