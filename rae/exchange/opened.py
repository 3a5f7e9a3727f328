"""A model that was opened, and what is known of it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rae.autoencoder.rae import RAE
from rae.config.errors import UserError
from rae.config.sections import Config, Model
from rae.exchange.exports import Exported


@dataclass
class Source:
    """A model to work with, and what is known of it.

    Args:
        network: its plain module, in eval mode, on the device.
        image_size: side of the image that it makes.
        name: short, for tables, captions and file names.
        weights: which these are: ``ema``, ``live``, or ``given`` where there was no choice and no telling.
        model: its settings, as in a configuration's ``model``.
        config: of the run that made it, if that is known.
        imports: the user's plugin files or modules that it needs.
        trained: how far the run was, ``epoch`` and ``batch``.
        figures: the run's last evaluation, if it was of this moment and these weights: by data set and metric.
        discriminator: the discriminator's trained weights, if there are any.
    """

    network: nn.Module
    image_size: int
    name: str
    weights: str
    model: Model | dict[str, Any]
    config: Config | None = None
    imports: list[str] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Tensor] | None = None

    @property
    def rae(self) -> RAE:
        """The autoencoder.

        Raises:
            UserError: it is another kind of model.
        """
        if isinstance(self.network, RAE):
            return self.network
        raise UserError(f"{self.name}: its model is no autoencoder, but a {type(self.network).__name__}")

    def about(self) -> Exported:
        """What an export of it says of it."""
        told = {key: getattr(self, key) for key in Exported.model_fields if hasattr(self, key)}
        return Exported(**told)
