"""Pictures of fixed evaluation images and their reconstructions while training."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from composer import Callback, Event, Logger, State
from composer.core import get_precision_context
from composer.utils import create_interval_scheduler, dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

from rae.algorithms.base import unwrapped
from rae.algorithms.ema import EMA
from rae.config.errors import UserError
from rae.config.registry import register
from rae.config.times import Interval
from rae.config.values import Count, NotNegative

_PADDING, _MARGIN, _FONT_SIZE = 2, 76, 12


def labelled_rows(rows: dict[str, Tensor]) -> Tensor:
    """Rows of images, each with its name in a margin at the left.

    Args:
        rows: name -> (B, 3, H, W) in [0, 1], all of one shape.

    Returns:
        (3, R·(H + 2) + 2, 76 + B·(W + 2) + 2) for R rows
    """
    images = list(rows.values())
    grid = make_grid(torch.cat(images).clamp(0, 1), nrow=len(images[0]), padding=_PADDING, pad_value=1.0).cpu()
    margin = Image.new("RGB", (_MARGIN, grid.shape[1]), "white")
    draw, height = ImageDraw.Draw(margin), images[0].shape[2] + _PADDING
    for i, name in enumerate(rows):
        draw.text((4, (i + 0.5) * height), name, "black", ImageFont.load_default(_FONT_SIZE), anchor="lm")
    return torch.cat([pil_to_tensor(margin).float() / 255, grid], dim=2)


@register("callback", "pictures", context=("run_dir", "eval_images"))
class Pictures(Callback):
    """Save a picture of the first evaluation images and their reconstructions, and send it to the loggers.

    A generator's are of as many of its classes as there is room for, from noise that is the same in every picture.

    Rows: what the model gives without its weights (an autoencoder ``original``); ``live``, by the weights as they are;
    ``ema``, by their average, when ``ema`` is on; and ``noised``, from latents with noise that is the same in every
    picture, by the weights that evaluation uses.

    Args:
        run_dir: pictures go to its ``pictures`` folder (supplied).
        eval_images: the evaluation data set (supplied).
        interval: how often; a picture is also made at the end.
        count: how many images.
        noise_tau: of the noised row, see :func:`rae.autoencoder.layers.fixed_latent_noise`; the model's by default, 0
            for no row.
    """

    def __init__(
        self,
        run_dir: str,
        eval_images: Dataset | None,
        interval: Interval = "1ep",
        count: Count = 8,
        noise_tau: NotNegative | None = None,
    ):
        self.folder = Path(run_dir) / "pictures"
        self.eval_images, self.count, self.noise_tau = eval_images, count, noise_tau
        self.batch: dict[str, Tensor] = {}
        self.drawn_at = -1
        self.due = create_interval_scheduler(interval, checkpoint_events=False, include_end_of_training=False)

    def init(self, state: State, logger: Logger) -> None:
        if self.eval_images is None and unwrapped(state).picture_batch(1) is None:
            raise UserError("callbacks.pictures: pictures are made of evaluation images: set data.eval.path")

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self.init(state, logger)
        due = event in (Event.BATCH_END, Event.EPOCH_END) and self.due(state, event)
        if (due or event == Event.FIT_END) and self.drawn_at != int(state.timestamp.batch):
            self.drawn_at = int(state.timestamp.batch)
            self._draw(state, logger)

    def _draw(self, state: State, logger: Logger) -> None:
        """A collective call: under FSDP every rank makes every reconstruction."""
        if not self.batch:
            made = unwrapped(state).picture_batch(self.count)
            self.batch = state.device.batch_to_device(made if made is not None else self._first_images())
        was_training = state.model.training
        state.model.eval()
        with torch.no_grad(), get_precision_context(state.precision):
            rows = {**unwrapped(state).given(self.batch), **dict(self._drawn(state))}
        state.model.train(was_training)
        if dist.get_global_rank() != 0:
            return
        picture = labelled_rows(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(picture, self.folder / f"ba{int(state.timestamp.batch):07d}.png")
        logger.log_images(picture, name="pictures/reconstructions", channels_last=False, use_table=False)

    def _first_images(self) -> dict[str, Tensor]:
        total = len(self.eval_images)  # type: ignore[arg-type]
        picked = [self.eval_images[i] for i in range(min(self.count, total))]  # type: ignore[index]
        batch = {key: torch.stack([torch.as_tensor(each[key]) for each in picked]) for key in ("image", "label")}
        return {**batch, "index": torch.arange(len(picked))}

    def _drawn(self, state: State) -> Iterator[tuple[str, Tensor]]:
        model, batch = unwrapped(state), self.batch
        ema = next((a for a in state.algorithms if isinstance(a, EMA)), None)
        yield "live", model.draw(batch)
        if ema is not None:
            with ema.averaged():
                yield "ema", model.draw(batch)
            for decay in ema.averages:
                with ema.averaged(decay):
                    yield f"ema {decay}", model.draw(batch)
        tau = model.noise_tau if self.noise_tau is None else self.noise_tau
        if tau:
            levels = torch.full((len(batch["index"]),), float(tau))
            with ema.averaged() if ema is not None and ema.evaluates_average(None) else nullcontext():
                yield f"noised {tau:g}", model.draw({**batch, "noise_tau": levels})
