"""Samples to batches: one copy an image, and none between processes."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info


class Batcher:
    """Collates samples whose images it has written into the batch already: one copy an image, not two.

    Images stay in the order (H, W, 3) in which the decoder writes them, which makes a batch channels_last.

    Args:
        size: of a batch.
    """

    def __init__(self, size: int):
        self.size, self.used = size, 0
        self.batch = torch.empty(0)
        self.slots: tuple[Tensor, ...] = ()

    def place(self, image: Tensor) -> Tensor:
        """An image (3, S, S) -> its copy in the next batch."""
        if self.used == len(self.slots):
            self.batch = _batch_memory((self.size, *image.shape[1:], 3)).permute(0, 3, 1, 2)
            self.slots, self.used = self.batch.unbind(), 0
        slot = self.slots[self.used]
        self.used += 1
        return slot.copy_(image)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples -> {image (B, 3, S, S), label, index (B,), stream, fault: lists}, and latent if they have it."""
        batch = {
            "label": torch.tensor([sample["label"] for sample in samples]),
            "index": torch.tensor([sample["index"] for sample in samples]),
            "stream": [sample["stream"] for sample in samples],
            "fault": [sample["fault"] for sample in samples],
        }
        if "latent" in samples[0]:
            batch["latent"] = default_collate([sample["latent"] for sample in samples])
        return {**({"image": self._images(samples)} if "image" in samples[0] else {}), **batch}

    def _images(self, samples: list[dict[str, Any]]) -> Tensor:
        images, batch, slots = [sample["image"] for sample in samples], self.batch, self.slots[: len(samples)]
        self.batch, self.slots, self.used = torch.empty(0), (), 0
        if list(map(id, images)) == list(map(id, slots)):
            return batch[: len(images)]
        return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _batch_memory(shape: tuple[int, ...]) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # a worker hands it over without copying
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
