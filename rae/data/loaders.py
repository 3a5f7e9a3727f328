"""Batches: what is loaded by which process, collated where it is decoded, and counted."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from streaming import StreamingDataLoader
from torch.utils.data import DataLoader, DistributedSampler

from rae.config.errors import RankError, UserError
from rae.data.dataset import Batcher, ImageDataset, indexed
from rae.survival.processes import follow_parent, heed_parent_alone

log = logging.getLogger(__name__)


class Ledger:
    """What a rank's loader has handed out: samples by stream, and the bad samples that others replaced.

    Args:
        max_bad: bad samples to tolerate.
        streams: their names, for logging.

    Attributes:
        samples: drawn from each stream, by number.
        bad: distinct faults, in the order in which they were met.
    """

    def __init__(self, max_bad: int = 0, streams: Sequence[str] = ()):
        self.max_bad, self.streams = max_bad, streams
        self.samples: Counter[int] = Counter()
        self.bad: dict[str, None] = {}

    def note(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count a batch, and return it without what was for counting alone.

        Raises:
            RankError: more bad samples than ``max_bad``.
        """
        self.samples.update(batch.pop("stream"))
        for fault in filter(None, batch.pop("fault")):
            if fault not in self.bad:
                self.bad[fault] = None
                log.warning("bad sample, replaced by the next one: %s", fault)
        self.check(self.bad, RankError)
        return batch

    def check(self, bad: Collection[str], error: type[UserError] = UserError) -> None:
        """Raise an error when the faults are too many."""
        if len(bad) > self.max_bad:
            count = f"{len(bad)} bad sample{'s' if len(bad) > 1 else ''}"
            shown = "; ".join(sorted(bad)[:3])
            raise error(f"{count} where data.max_bad_samples allows {self.max_bad}: {shown}")


class _TrainLoader(StreamingDataLoader):
    ledger: Ledger

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.ledger.note, super().__iter__())


class _EvalLoader(DataLoader):
    ledger: Ledger
    noise_tau: float

    def __iter__(self) -> Any:
        return map(self._noised, map(self.ledger.note, super().__iter__()))

    def _noised(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "noise_tau": torch.full((len(batch["index"]),), self.noise_tau)} if self.noise_tau else batch


def train_loader(
    dataset: ImageDataset, batch_size: int, workers: int, prefetch: int, ledger: Ledger | None = None
) -> DataLoader:
    """Batches {image: uint8 (B, 3, S, S), label: int64 (B,)} of ``batch_size`` a rank, with a resumable position.

    The images are channels_last in memory, as the decoder writes them.

    Args:
        ledger: counts samples and bad samples; by default one that tolerates no bad sample.
    """
    dataset.replace_bad = True  # the ledger sees the faults, and stops the run when they are too many
    dataset.batcher = Batcher(batch_size)
    loader = _TrainLoader(dataset, drop_last=True, **_loader_options(batch_size, workers, prefetch, dataset.batcher))
    loader.ledger = ledger or Ledger()
    return loader


def eval_loader(
    dataset: ImageDataset,
    batch_size: int,
    workers: int,
    prefetch: int,
    limit: int | None,
    rank: int,
    world_size: int,
    ledger: Ledger | None = None,
    noise_tau: float = 0.0,
) -> DataLoader:
    """The images in order, each once, shared out over ranks (Composer drops the sampler's padding).

    Args:
        noise_tau: with it, batches ask for latents with fixed noise of this level (``noise_tau``: (B,)).
    """
    dataset.replace_bad = True
    images = indexed(dataset, limit)
    sampler = DistributedSampler(images, num_replicas=world_size, rank=rank, shuffle=False)
    loader = _EvalLoader(images, sampler=sampler, **_loader_options(batch_size, workers, prefetch, Batcher(batch_size)))
    loader.ledger, loader.noise_tau = ledger or Ledger(), noise_tau
    return loader


def _loader_options(batch_size: int, workers: int, prefetch: int, collate: Batcher) -> dict[str, Any]:
    return dict(
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),  # the global generator is the training step's alone
    )


def start_worker(worker: int) -> None:
    """One thread a worker process, which ends with its parent and not before it."""
    torch.set_num_threads(1)
    heed_parent_alone()
    follow_parent()
