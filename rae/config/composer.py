"""What of Composer's plugins works here, and with which values; all else is refused by name.

What is in neither table was tried: it trains, saves and resumes with one optimizer and batches that are mappings.
"""

from typing import Any, Literal

from rae.config.times import Interval, TimeString
from rae.config.values import Count, Finite, Index, NotNegative, Positive, Threshold

_PAIRS = "it needs batches of (input, target); here they are mappings of images"
_SURGERY = "it replaces layers, also the frozen encoder's, and the decoder has none of those it is for"
_TEXT = "it is for language models"
REFUSED: dict[str, dict[str, str]] = {
    "algorithm": {
        **dict.fromkeys(("col_out", "cut_mix", "cut_out", "label_smoothing", "mix_up", "selective_backprop"), _PAIRS),
        "progressive_resizing": f"{_PAIRS}; train a second run at a larger data.image_size, with begin_from",
        **dict.fromkeys(("aug_mix", "rand_augment"), "it needs a torchvision data set; data.train.flip augments"),
        **dict.fromkeys(("blur_pool", "factorize", "ghost_batch_norm", "squeeze_excite"), _SURGERY),
        **dict.fromkeys(("stochastic_depth", "weight_standardization", "gyro_dropout"), _SURGERY),
        **dict.fromkeys(("low_precision_group_norm", "low_precision_layer_norm"), _SURGERY),
        **dict.fromkeys(("alibi", "gated_linear_units", "seq_length_warmup"), _TEXT),
        "layer_freezing": "a run with it cannot be resumed; freeze: names parts that are not trained",
        "no_op_model": "it takes the model away",
        "sam": "it takes each step twice, and the GAN's losses are of one",
        "swa": "it puts its average in the weights' place; algorithms.ema averages beside them",
    },
    "callback": {
        "checkpoint_saver": "trainer.save_folder and trainer.save_interval save the run",
        "load_checkpoint": "begin_from takes weights from elsewhere, and trainer.load_path a run's state",
        "export_for_inference_callback": "python -m rae export does that",
        "free_outputs": "the losses need the outputs",
        "generate": _TEXT,
        "image_visualizer": f"{_PAIRS}; callbacks.pictures shows images",
        "ml_perf_callback": "it is for MLPerf's classifiers",
        "na_n_monitor": "callbacks.guard stops before a NaN reaches the weights",
    },
    "logger": {
        "progressbar": "trainer.progress_bar: true shows one",
        "remoteuploaderdownloader": "trainer.save_folder may be a bucket",
        "mosaicml": "it writes to MosaicML's platform alone",
    },
    "schedule": {},
}
"""Kind -> name -> why, and what there is instead."""
NEEDED = {"cometml": "comet_ml", "mlflow": "mlflow", "neptune": "neptune", "slack": "slack_sdk"}
"""Logger -> the package that it writes with, which is not among ours."""

_Unit = Literal["seconds", "minutes", "hours", "days"]
_OF_SCHEDULES: dict[str, Any] = {
    **dict.fromkeys(("alpha", "alpha_i", "alpha_f"), NotNegative),
    **dict.fromkeys(("power", "gamma", "t_mult"), Positive),
}
VALUES: dict[str, dict[str, Any]] = {
    "GradientClipping": {"clipping_type": Literal["norm", "value", "adaptive"], "clipping_threshold": Threshold},
    "EarlyStopper": {"min_delta": NotNegative},
    "ThresholdStopper": {"threshold": Finite},
    "MemoryMonitor": {"dist_aggregate_batch_interval": Count | None},
    "MemorySnapshot": {"skip_batches": Index, "max_entries": Count},
    "OOMObserver": {"max_entries": Count},
    "OptimizerMonitor": {"batch_log_interval": Count},
    "RuntimeEstimator": {"skip_batches": Index, "time_unit": _Unit},
    "SpeedMonitor": {"window_size": Count, "time_unit": _Unit, "gpu_flops_available": Positive | None},
    "FileLogger": {"buffer_size": Count, "flush_interval": Count},
    "SlackLogger": {"max_logs_per_message": Count},
    "MLFlowLogger": {"flush_interval": Count, "logging_buffer_seconds": Index},
}
"""Class -> argument -> type, where its own annotation does not tell which values work."""


def hint_of(target: Any, name: str, hint: Any) -> Any:
    """The type of an argument of Composer's; of all others, ``hint``.

    Args:
        hint: its annotation.
    """
    module = getattr(target, "__module__", "") or ""
    if not module.startswith("composer."):
        return hint
    if name in VALUES.get(target.__name__, {}):
        return VALUES[target.__name__][name]
    schedule = module.startswith("composer.optim")
    if schedule and name in _OF_SCHEDULES:
        return _OF_SCHEDULES[name]
    if "composer.core.time.Time" not in str(hint):
        return hint
    if "list" in str(hint).lower():
        return list[TimeString]
    return TimeString if schedule else Interval
