"""Composer 0.32.1, on libraries that are newer than it."""


def mend_wandb_logger() -> None:
    """``WandBLogger.init`` asks W&B's run for ``get_url()``; wandb 0.31 has ``url`` alone."""
    from wandb.sdk.wandb_run import Run

    if not hasattr(Run, "get_url"):
        Run.get_url = lambda run: run.url  # type: ignore[attr-defined]
