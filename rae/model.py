"""What a run's model is: the names by which training, callbacks, plans, exports and inspections ask for it.

There are no more of them than the rest of the package asks for. The autoencoder is one kind of model
(:class:`rae.autoencoder.model.RAEModel`); a file of the user's can hold another.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from rae.config.errors import UserError

_MOVED = {"RAE": "rae", "read_stats": "rae", "to_float": "rae", "quantize": "rae", "RAEModel": "model"}


def __getattr__(name: str) -> Any:
    """What the guide had here before is found in :mod:`rae.autoencoder`."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"rae.autoencoder.{_MOVED[name]}"), name)


Counted = Callable[[Callable[[], Any]], tuple[float, Any]]
"""What calls a function and gives back the floating-point operations that it took, and its result."""


class RunModel:
    """Mixed into a ``ComposerModel``, it makes that a kind of model: trained, averaged, drawn, planned and exported.

    ``@register("model", "mine", context=("image_size",))`` makes a kind known; the configuration's
    ``model: {mine: {…}}`` is checked against its constructor. Beside Composer's ``forward`` and ``loss`` it has:

    Attributes:
        network: the plain module that evaluation uses and an export holds. What of it requires gradients is trained
            and averaged.
        image_size: side S of the images that it is given.
        eval_metrics: metrics by name, which the run puts here.

    A batch is {image: uint8 (B, 3, S, S), label: (B,), index: (B,)}; an outputs dictionary holds what ``forward`` made
    of it.
    """

    training_only: ClassVar[tuple[str, ...]] = ()
    """Arguments that its plain module does without: what is evaluated and exported is built without them."""
    part: ClassVar[str] = "network"
    """The attribute that is ``network``; parameter names in checkpoints begin with it."""
    trains: ClassVar[str] = "network"
    """What figures call the network that is trained: ``lr/network``, ``gradient/network``."""
    watched: ClassVar[tuple[str, ...]] = ()
    """Outputs (B, …) in which a step's diagnosis looks for what is not finite, image by image."""
    histograms: ClassVar[tuple[str, ...]] = ()
    """Outputs of which ``callbacks.histograms`` shows the distribution."""
    configured: ClassVar[tuple[str, ...]] = ()
    """Entries of its state that its configuration decides, and no checkpoint: they are saved, and never loaded."""
    latent_shape: tuple[int, ...] | None = None
    """(C, h, w) of precomputed latents, if a batch may hold them."""
    noise_tau: float = 0.0
    """Level of the latent noise while training, of which pictures have a row; 0 for none."""
    activation_checkpointing: bool | None = None
    """Whether activations are computed again in the backward pass; to be set. None where there is no such choice."""
    needs_images: bool = True
    """Whether a step needs a batch's images where there are its precomputed latents."""
    needs_labels: bool = False
    """Whether a step needs the numbers of the images' classes."""
    reconstructs: ClassVar[bool] = True
    """Whether what it evaluates is to be compared image by image with what it was given."""
    network: nn.Module
    image_size: int
    eval_metrics: dict[str, Any]

    def begin_step(self, seed: int, step: int) -> None:
        """Called before each training step, with the run's seed and how many steps are finished."""

    def check_data(self, images: Dataset) -> str:
        """Called when a run begins, with its training images: what is to be said of how the model fits them.

        Raises:
            UserError: it does not.
        """
        return ""

    def picture_batch(self, count: int) -> dict[str, Tensor] | None:
        """The batch that pictures are made of, where that is not of evaluation images."""
        return None

    def draw(self, batch: dict[str, Tensor]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] by the weights as they are, in eval mode: a row of a picture."""
        raise UserError(f"model: {type(self).__name__} has no draw(batch), which pictures need")

    def given(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of a picture that no weights make, by name."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks that a step runs, by name: what a plan counts."""
        return {self.trains: self.network}

    def compiled(self) -> dict[str, Iterable[nn.Module]]:
        """Network -> the modules of it that ``compile`` compiles, each by itself."""
        return {name: [module] for name, module in self.networks().items()}

    def step_operations(self, counted: Counted, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Floating-point operations of a training step without its algorithms, and the outputs of a forward pass."""
        forward, outputs = counted(lambda: self(batch))  # type: ignore[operator]
        return 3 * forward, outputs
