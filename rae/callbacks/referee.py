"""A word of warning when the discriminator has won, or has collapsed."""

import logging
import math

from composer import Callback, Logger, State
from composer.utils import dist

from rae.algorithms.adversarial import Adversarial
from rae.config.registry import register
from rae.config.values import Count

log = logging.getLogger(__name__)
VERDICTS = {
    -1: (
        "has collapsed: over {window} steps it told real from fake in {accuracy:.0%} of places, with logits {gap:.2g} "
        "apart. Look at discriminator/loss and histograms/logits_*; a higher learning rate of adversarial.optimizer, "
        "an earlier discriminator_start, more updates_per_step or augment: false would make it stronger"
    ),
    1: (
        "has won: over {window} steps it told real from fake in {accuracy:.0%} of places, with logits {gap:.2g} "
        "apart. Look at gan/adaptive_weight, gan/share and the pictures; a lower learning rate of "
        "adversarial.optimizer or augment: true would make it weaker, and an earlier start lets the decoder answer"
    ),
}


@register("callback", "referee")
class Referee(Callback):
    """Warn, once each time it happens, that the discriminator has collapsed or won. On by itself with ``adversarial``.

    ``referee/verdict`` is −1 (collapsed: it guesses), 1 (won: it is never wrong) or 0; ``referee/accuracy`` and
    ``referee/gap`` are running means, over about ``window`` steps, of its accuracy and of real minus fake logits.
    They begin when it does, again when its learning rate has warmed up, and again when a run is resumed.

    Args:
        window: steps; there is no verdict before so many, and none of −1 before so many after the warm-up.
        collapsed: accuracy within this of 0.5, or below, and logits less than this apart.
        won: accuracy above it.
    """

    def __init__(self, window: Count = 300, collapsed: float = 0.05, won: float = 0.98):
        if not 0 < collapsed < 0.5 or not 0.5 < won < 1:
            raise ValueError("collapsed must be between 0 and 0.5, and won between 0.5 and 1")
        self.window, self.collapsed, self.won = window, collapsed, won
        self.steps, self.accuracy, self.gap, self.verdict = 0, 0.0, 0.0, 0
        self.learning_rate, self.warming_up = math.inf, False

    def batch_end(self, state: State, logger: Logger) -> None:
        adversarial = next((a for a in state.algorithms if isinstance(a, Adversarial)), None)
        if adversarial is None or not adversarial.figures or adversarial.bad_update:
            return
        names = ("discriminator/accuracy", "discriminator/logits_real", "discriminator/logits_fake", "lr/discriminator")
        self.judge(*(adversarial.figures[name] for name in names))
        logger.log_metrics(
            {"referee/accuracy": self.accuracy, "referee/gap": self.gap, "referee/verdict": float(self.verdict)}
        )

    def judge(self, accuracy: float, logits_real: float, logits_fake: float, learning_rate: float = 0.0) -> None:
        """Take a step's figures into account, and say so when the verdict becomes another."""
        was_warming_up, self.warming_up = self.warming_up, learning_rate > self.learning_rate
        self.learning_rate = learning_rate
        if was_warming_up and not self.warming_up and not self.verdict:  # a win that was told is not told again
            self.steps = 0
        self.steps += 1
        share = 1 / min(self.steps, self.window)
        self.accuracy += share * (accuracy - self.accuracy)
        self.gap += share * (logits_real - logits_fake - self.gap)
        before, self.verdict = self.verdict, self._verdict()
        if self.verdict not in (0, before) and dist.get_global_rank() == 0:
            text = VERDICTS[self.verdict].format(window=self.window, accuracy=self.accuracy, gap=self.gap)
            log.warning("the discriminator %s", text)

    def _verdict(self) -> int:
        if self.steps < self.window:
            return 0
        # What has been said holds until the figures have moved well away: not a line at each crossing.
        slack = 1.5 if self.verdict else 1.0
        if self.accuracy - 0.5 < self.collapsed * slack and self.gap < self.collapsed * slack:
            # Who has hardly been taught has not collapsed.
            return 0 if self.warming_up else -1
        return 1 if 1 - self.accuracy < (1 - self.won) * slack else 0
