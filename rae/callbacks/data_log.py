"""How much was drawn from each stream of data."""

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from rae.data.loaders import Ledger


class DataLog(Callback):
    """Log, at every epoch's end, samples drawn in it from each stream, of all ranks. Always on.

    An epoch that was resumed is counted from where it was resumed.

    Args:
        ledger: the training loader's.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def fit_start(self, state: State, logger: Logger) -> None:
        self.ledger.samples.clear()

    def epoch_end(self, state: State, logger: Logger) -> None:
        ledger = self.ledger
        drawn = [ledger.samples[number] for number in range(len(ledger.streams))]
        counts = state.device.tensor_to_device(torch.tensor(drawn))
        dist.all_reduce(counts)
        named = zip(ledger.streams, counts.tolist(), strict=True)
        logger.log_metrics({f"data/samples/{name}": count for name, count in named})
        ledger.samples.clear()
