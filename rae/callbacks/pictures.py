"""Pictures of fixed evaluation images and their reconstructions while training."""

from contextlib import nullcontext
from pathlib import Path

import torch
from composer import Callback, Event, Logger, State
from composer.core import get_precision_context
from composer.utils import create_interval_scheduler, dist
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import make_grid, save_image

from rae.algorithms.ema import EMA
from rae.model import quantize, to_float
from rae.registry import TimeString, register


def comparison(image: Tensor, recon: Tensor, padding: int = 2) -> Tensor:
    """Originals above their reconstructions.

    Args:
        image, recon: (B, 3, H, W) in [0, 1].

    Returns:
        (3, 2·(H + padding) + padding, B·(W + padding) + padding)
    """
    return make_grid(torch.cat([image, recon.clamp(0, 1)]), nrow=len(image), padding=padding, pad_value=1.0)


@register("callback", "pictures", context=("run_dir", "eval_images"))
class Pictures(Callback):
    """Save a picture of the first evaluation images above their reconstructions, and send it to the loggers.

    The reconstructions are made with the weights that evaluation uses (the average, when ``ema`` is on).

    Args:
        run_dir: pictures go to its ``pictures`` folder (supplied).
        eval_images: the evaluation data set (supplied).
        interval: how often; a picture is also made at the end.
        count: how many images.
    """

    def __init__(self, run_dir: str, eval_images: Dataset | None, interval: TimeString = "1ep", count: int = 8):
        if eval_images is None:
            raise ValueError("pictures are made of evaluation images: set data.eval.path")
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        self.folder = Path(run_dir) / "pictures"
        self.eval_images, self.count = eval_images, count
        self.image: Tensor | None = None
        self.drawn_at = -1
        self.due = create_interval_scheduler(interval, checkpoint_events=False, include_end_of_training=False)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        due = event in (Event.BATCH_END, Event.EPOCH_END) and self.due(state, event)
        if due or (event == Event.FIT_END and self.drawn_at != int(state.timestamp.batch)):
            self.drawn_at = int(state.timestamp.batch)
            self._draw(state, logger)

    def _draw(self, state: State, logger: Logger) -> None:
        if self.image is None:
            total = len(self.eval_images)  # type: ignore[arg-type]
            picked = [self.eval_images[i]["image"] for i in range(min(self.count, total))]
            self.image = state.device.tensor_to_device(torch.stack(picked))
        emas = [a for a in state.algorithms if isinstance(a, EMA) and a.evaluates_average(None)]
        was_training = state.model.training
        state.model.eval()
        with torch.no_grad(), get_precision_context(state.precision), emas[0].averaged() if emas else nullcontext():
            recon = quantize(state.model({"image": self.image})["recon"])
        state.model.train(was_training)
        if dist.get_global_rank() != 0:
            return
        picture = comparison(to_float(self.image), recon).cpu()
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(picture, self.folder / f"ba{int(state.timestamp.batch):07d}.png")
        logger.log_images(picture, name="pictures/reconstructions", channels_last=False, use_table=False)
