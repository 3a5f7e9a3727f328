"""Weights & Biases, for figures and pictures."""

import os
from typing import Any

from composer import Logger, State
from composer.loggers import WandBLogger
from composer.utils import dist

from rae.adapters.composer import mend_wandb_logger
from rae.config.errors import UserError
from rae.config.registry import register


@register("logger", "wandb", context=("run_dir", "travelling"))
class WandB(WandBLogger):
    """Composer's W&B logger, kept in the run's folder, and not asked for checkpoints when a run resumes.

    A run is one run of W&B's, however often it is started: its id travels with the checkpoints.

    Args:
        run_dir: W&B's local files go there (supplied).
        travelling: what travels with the run's checkpoints (supplied).
        project, group, name, entity, tags: as W&B knows them; the name is by default the run's.
        init_kwargs: further arguments of ``wandb.init``.
    """

    def __init__(
        self,
        run_dir: str,
        travelling: dict[str, Any],
        project: str | None = None,
        group: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        tags: list[str] | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ):
        os.makedirs(run_dir, exist_ok=True)
        self.travelling = travelling
        known = {"id": travelling["wandb"]} if "wandb" in travelling else {}
        init_kwargs = {"dir": run_dir, "resume": "allow", **known, **(init_kwargs or {})}
        super().__init__(project, group, name, entity, tags, init_kwargs=init_kwargs)

    def init(self, state: State, logger: Logger) -> None:
        """Begin W&B's run.

        Raises:
            UserError: W&B wants a login, or refuses this one, or does not answer; on all ranks.
        """
        import wandb

        mend_wandb_logger()
        try:
            super().init(state, logger)
            if wandb.run is not None:
                self.travelling["wandb"] = wandb.run.id
        except wandb.Error as error:
            dist.broadcast_object_list([None, None])  # the run's entity and project, for which the other ranks wait
            said = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"loggers.wandb: W&B does not begin: {said}; run `wandb login`, or set WANDB_API_KEY or "
                "WANDB_MODE=offline"
            ) from error
        except AssertionError as error:  # of those that are told of none
            raise UserError("loggers.wandb: W&B does not begin on the first rank, which says why") from error

    def can_upload_files(self) -> bool:
        return False

    def download_file(self, remote_file_name: str, *args: Any, **kwargs: Any) -> None:
        # Composer asks every logger for a checkpoint; without a W&B entity or a connection that would be an error.
        raise FileNotFoundError(remote_file_name)
