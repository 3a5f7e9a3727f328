"""Where training is at which step: times of a configuration as numbers of steps."""

from dataclasses import dataclass, field

from composer import Time, Timestamp
from composer.core import TimeUnit

from rae.config.errors import UserError
from rae.config.times import in_steps

NOMINAL = 1000
"""Steps an epoch where the data's size is unknown: shares of a run in epochs hold for any number."""


@dataclass
class Clock:
    """Steps and epochs of a run.

    Args:
        images: of an epoch; None when unknown.
        batch_size: over all ranks.
        duration: ``max_duration``, a time string.
    """

    images: int | None
    batch_size: int
    duration: str
    units: set[TimeUnit] = field(default_factory=set)
    """Of the times that were asked for."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; nominal when the number of images is unknown."""
        return NOMINAL if self.images is None else self.images // self.batch_size

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.step_of(self.duration, "trainer.max_duration")

    @property
    def known(self) -> bool:
        """Whether steps are more than nominal: the data's size is known, or no time was given in epochs."""
        return self.images is not None or not self.units & {TimeUnit.EPOCH, TimeUnit.SECOND}

    @property
    def comparable(self) -> bool:
        """Whether the shares of the run's parts are known."""
        return self.known or self.units <= {TimeUnit.EPOCH, TimeUnit.DURATION}

    def step_of(self, time: str, where: str) -> int:
        """The step that follows ``time``.

        Raises:
            UserError: a time that is not counted in steps.
        """
        unit = Time.from_timestring(time).unit
        self.units.add(unit)
        end = self.steps if unit == TimeUnit.DURATION else None
        step = in_steps(time, self.steps_per_epoch, self.batch_size, end)
        if step is None:
            raise UserError(
                f"{where}: {time!r} cannot be planned, as it is not counted in steps; write it in ep, ba or sp"
            )
        return step

    def timestamp(self, step: int) -> Timestamp:
        """Composer's, after so many steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        samples = self.batch_size
        return Timestamp(
            epoch=epoch, batch=step, sample=step * samples, batch_in_epoch=within, sample_in_epoch=within * samples
        )
