"""TensorBoard, for figures and pictures."""

from composer import Logger, State
from composer.loggers import TensorboardLogger

from rae.config.registry import register
from rae.config.values import Count


@register("logger", "tensorboard")
class TensorBoard(TensorboardLogger):
    """Composer's TensorBoard logger; a run that goes on takes back the steps after its checkpoint.

    Args:
        log_dir: the run's files lie in a folder of its name in there.
        flush_interval: steps between two writes to the disk.
        rank_zero_only: whether the first rank alone logs.
    """

    def __init__(self, log_dir: str | None = None, flush_interval: Count = 100, rank_zero_only: bool = True):
        super().__init__(log_dir, flush_interval, rank_zero_only)

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.writer is not None and state.timestamp.batch > 0:
            self.writer.close()  # it is opened again for the next figure, after a mark of what is void
            self.writer.purge_step = int(state.timestamp.batch) + 1
