"""A run: checked, built, fitted, evaluated, finished."""

import json
import logging
import warnings
from pathlib import Path

from composer import Trainer

from rae.callbacks.checkpointer import Checkpointer
from rae.callbacks.jsonl import number
from rae.config.errors import RankError
from rae.config.sections import Config
from rae.data.reader import DataError
from rae.survival.checkpoints import METRICS
from rae.survival.processes import rank
from rae.survival.signals import undisturbed
from rae.training.build import build_trainer, initialize
from rae.training.checks import check
from rae.training.data import name_classes
from rae.training.saving import alone, folder_alone

log = logging.getLogger(__name__)
# Warnings about what is as it should be.
_NOT_FOR_USERS = ("Cannot split tensor of length", "No batches were trained", "TypedStorage is deprecated")


def _save_final_metrics(config: Config, trainer: Trainer) -> Path:
    final = {  # each metric keeps the value of the last evaluation
        label: {name: number(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in trainer.state.eval_metrics.items()
        if all(metric.update_called for metric in metrics.values())
    }
    path = Path(config.run_dir, METRICS)
    if rank() == 0:
        record = {"batch": int(trainer.state.timestamp.batch), **final}
        path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def train(config: Config) -> Trainer:
    """Check, build, fit, evaluate; write the final metrics to ``<run_dir>/metrics.json``.

    Raises:
        UserError: the user's mistake, or a condition that the user can mend.
    """
    check(config)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    initialize(config)
    name_classes(config)
    with alone(config.run_dir, "run_dir"), folder_alone(config):
        trainer = build_trainer(config)
        checkpointers = [c for c in trainer.state.callbacks if isinstance(c, Checkpointer)]
        try:
            _fit(config, trainer, checkpointers)
        except BaseException:
            for checkpointer in checkpointers:  # while the interpreter still can
                checkpointer.finish_saving(config.trainer.get("dist_timeout", 300.0))
                checkpointer.stop.unlisten()
            with undisturbed():  # by the launcher, which ends the ranks that are left
                trainer.engine.close()  # trainer.close() would wait for ranks that wait for this one
            raise
        trainer.close()
    return trainer


def _fit(config: Config, trainer: Trainer, checkpointers: list[Checkpointer]) -> None:
    reached_end = trainer.state.max_duration is None or trainer.state.timestamp >= trainer.state.max_duration
    if reached_end and all(checkpointer.was_finished for checkpointer in checkpointers):
        duration = trainer.state.max_duration
        log.warning("%s is finished (%s); a longer trainer.max_duration goes on", config.run_name, duration)
    else:
        try:
            if not reached_end:
                trainer.fit()
            elif trainer.state.evaluators:
                trainer.eval()
        except DataError as error:
            raise RankError(error.line) from error
        except OSError as error:
            if Path(config.run_dir).is_dir():
                raise
            raise RankError(f"run_dir: {config.run_dir} is gone: it was deleted while the run was in it") from error
        except RuntimeError as error:
            if "gloo" not in str(error) or "by peer" not in str(error):  # closed its connection, or reset it
                raise
            raise RankError(f"rank {rank()} stops: another rank has ended, which says why") from error
        metrics = _save_final_metrics(config, trainer)
        for checkpointer in checkpointers:
            checkpointer.finish(trainer.state, metrics)
