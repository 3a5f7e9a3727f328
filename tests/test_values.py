"""Every value means one thing, or is refused in a line before data and networks are there."""

import inspect
import re
import warnings

import pytest
from composer import Trainer

from rae.config.composer import NEEDED, REFUSED, VALUES
from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.config.registry import plugins
from rae.config.times import POINT, parse_time
from rae.training import trainer_keys
from rae.training.checks import check
from tests.conftest import figures, tiny_settings, train_here, write_yaml


@pytest.fixture
def config(shards, tmp_path):
    """What a YAML with overrides says, checked."""
    path = write_yaml(tiny_settings(shards, tmp_path / "run"), tmp_path)

    def checked(*overrides: str):
        loaded = load_config(path, overrides)
        check(loaded)
        return loaded

    return checked


@pytest.mark.parametrize(
    ("value", "time"),
    [(2, "2ep"), ("2", "2ep"), ("2ep", "2ep"), (" 3 ", "3ep"), ("1e3ba", "1000ba"), ("512SP", "512sp"),
     ("0.50dur", "0.5dur"), (0, "0ep"), (2.0, "2ep")],
)  # fmt: skip
def test_a_time_has_one_form(value, time):
    assert parse_time(value) == time


NO_TIMES = ["20tok", "2iter", "90sec", "1.5ep", "2dur", "-1ep", "8 epochs", "", None, True, [1], "ep"]


@pytest.mark.parametrize("value", NO_TIMES)
def test_what_is_no_time_here(value):
    with pytest.raises(ValueError, match=r"write it in ep, ba, sp, dur|between 0 and 1|more than 0"):
        parse_time(value, POINT)


TIMES = {  # where a time stands -> a unit that is counted there
    "trainer.max_duration={}": "ep", "trainer.eval_interval={}": "ba", "trainer.save_interval={}": "sec",
    "trainer.console_log_interval={}": "ba", "algorithms.adversarial.start={}": "sp",
    "algorithms.adversarial.discriminator_start={}": "ep", "algorithms.perceptual.start={}": "dur",
    "algorithms.adversarial.schedule={{warmup_linear: {{warmup: {}}}}}": "ba",
    "schedule={{warmup_cosine: {{decay_end: {}}}}}": "ep", "schedule={{cosine_annealing: {{t_max: {}}}}}": "dur",
    "schedule={{multi_step: {{milestones: [{}]}}}}": "ba", "schedule={{step: {{step_size: {}}}}}": "ep",
    "callbacks={{pictures: {{interval: {}}}}}": "sec", "callbacks={{histograms: {{interval: {}}}}}": "ba",
    "loggers={{console: {{interval: {}}}}}": "sp",
    "callbacks={{activation_monitor: {{interval: {}, only_log_wandb: false}}}}": "ba",
    "callbacks={{early_stopper: {{monitor: psnr, dataloader_label: eval, patience: {}}}}}": "ep",
}  # fmt: skip


@pytest.mark.parametrize("place", TIMES)
def test_times_are_the_same_wherever_they_stand(config, place, monkeypatch):
    value = "0.5" if TIMES[place] == "dur" else "9"
    config(place.format(f"{value}{TIMES[place]}"))
    monkeypatch.setenv("EPOCHS", "9")
    config(place.format('"9"'))
    config(place.format('"${oc.env:EPOCHS}"'))
    key = place.partition("=")[0].replace("{", "")
    for value in ("9tok", "9iter", "nine"):
        with pytest.raises(UserError, match=rf"^{key}.*'{value}'.*; write it in "):
            config(place.format(value))


def test_a_number_of_epochs_is_one_in_the_run_and_in_its_configuration(config, monkeypatch):
    monkeypatch.setenv("EPOCHS", "2")
    trainer = config(
        "trainer.max_duration=${oc.env:EPOCHS}", "trainer.eval_interval=-1", "trainer.save_interval=1"
    ).trainer
    assert (trainer["max_duration"], trainer["eval_interval"], trainer["save_interval"]) == ("2ep", "0ep", "1ep")


FAULTS = {
    "trainer.precision=16": "trainer.precision: 16 is none of fp32, amp_bf16, amp_fp16",
    "trainer.device=cuda": "trainer.device: 'cuda' is none of cpu, gpu",
    "trainer.device=mps": "'mps' is none of cpu, gpu",
    "trainer.device=tpu": "'tpu' is none of cpu, gpu",
    "seed=4294967296": "seed: input should be less than or equal to 4294967295",
    "data[batch_size]=4": "override 'data[batch_size]=4': keys are written with dots",
    "trainer.eval_interval=null": "trainer.eval_interval: write 0 to turn evaluation off",
    "trainer.save_interval=null": "trainer.save_interval: leave it out for 1ep; trainer.save_folder: null",
    "model.encoder=null": "model.encoder: input should be a valid dictionary or a valid string, not None",
    "loggers={jsonl:{},wandb:{}}": "override 'loggers={jsonl:{},wandb:{}}' is no YAML; a colon needs a space after it",
    "optimizer.adamw.lr=${": "override 'optimizer.adamw.lr=${': ",
    "optimizer.adamw.lr=${nope}": "override 'optimizer.adamw.lr=${nope}': Interpolation key 'nope' not found",
    "trainer.save_folder=": "override 'trainer.save_folder=' is empty; if it comes from a variable, set that",
    "begin_from=": "override 'begin_from=' is empty",
    "model.decoder.weights=${oc.env:EMPTY}": "model.decoder.weights is empty; if it comes from a variable, set that",
    'data.train.path=""': "data.train.path is empty",
    "trainer.max_duration=0": "trainer.max_duration: 0 must be more than 0",
    "trainer.dist_timeout=0": "trainer.dist_timeout: 0 is not a number of seconds above 0",
    "trainer.train_subset_num_batches=0": "0 is not a number of batches: 1 or more, or -1 for all",
    "trainer.progress_bar=2": "trainer.progress_bar: 2 is not true or false",
    "trainer.python_log_level=loud": "'LOUD' is none of DEBUG",
    "trainer.compile_config={}": "trainer.compile_config: the compile section",
    "trainer.profiler={}": "trainer.profiler: it takes an object",
    "trainer.load_ignore_keys=abc": "'abc' is not a list of patterns",
    "trainer.deepspeed_config={}": "unknown key 'trainer.deepspeed_config'",
    "callbacks={pictures: {interval: 0}}": "callbacks.pictures.interval: 0 must be more than 0",
    "callbacks={optimizer_monitor: {batch_log_interval: 0}}": "batch_log_interval: must be 1 or more, not 0",
    "callbacks={speed_monitor: {time_unit: years}}": "input should be 'seconds', 'minutes', 'hours' or 'days'",
    "callbacks={early_stopper: {monitor: psnr, dataloader_label: val}}": "dataloader_label: 'val' is none of eval",
    "callbacks={threshold_stopper: {monitor: fid, dataloader_label: eval, threshold: 1}}": "monitor: 'fid' is none of",
    "callbacks={early_stopper: {monitor: lpips, dataloader_label: eval}}": "comp: lpips is better when it is lower",
    "callbacks={activation_monitor: {}}": "callbacks.activation_monitor: it logs to wandb alone",
    "callbacks={pictures: {count: 0}}": "callbacks.pictures.count: must be 1 or more, not 0",
    "metrics={lpips: {network: vgg19}}": "metrics.lpips.network: input should be 'vgg', 'alex' or 'squeeze'",
    "schedule={exponential: {gamma: -1}}": "schedule.exponential.gamma: must be above 0",
    "optimizer={adamw: {lr: -1}}": "optimizer.adamw.lr: must be 0 or more, not -1",
    "optimizer={adamw: {lr: .nan}}": "optimizer.adamw.lr: must be 0 or more, not nan",
    "optimizer={adamw: {betas: [1.0, 0.9]}}": "adamw.betas.0: must be in [0, 1), not 1.0; it takes (lr: float >=",
    "algorithms.adversarial.optimizer={adamw: {eps: 0}}": "eps: must be above 0",
    "algorithms.adversarial.weight=.inf": "algorithms.adversarial.weight: must be 0 or more, not inf",
    "algorithms.ema.decay=1.0": "algorithms.ema.decay: must be in [0, 1)",
    "algorithms.perceptual.chunk=0": "algorithms.perceptual.chunk: must be 1 or more",
    "algorithms.ema=0": "algorithms.ema: input should be a valid dictionary, not 0",
    "data.image_size=60": "data.image_size: 60 is not a multiple of model.decoder.patch_size, 16",
    "model.decoder.num_heads=5": "model.decoder.embed_dim: 48 is not a multiple of num_heads, 5",
    "model.encoder.dinov2.input_size=-56": "model.encoder.dinov2.input_size: must be 1 or more, not -56",
    "schedule={warmup_cosine: {warmup: 3ep, decay_end: 3}}": "decay_end: 3 must come after warmup, 3ep",
    "algorithms.adversarial.schedule={warmup_linear: {warmup: 9ba, decay_end: 2ba}}": "2ba must come after warmup, 9ba",
}
CLIPPING = {
    "{clipping_type: global, clipping_threshold: 1.0}": "clipping_type: input should be 'norm', 'value' or 'adaptive'",
    "{clipping_type: norm, clipping_threshold: 0}": "0.0 must be above 0; leave the entry out to turn it off",
    "{clipping_type: norm, clipping_threshold: -1}": "-1.0 must be above 0; leave the entry out to turn it off",
    "{clipping_type: norm, clipping_threshold: null}": "clipping_threshold: input should be a valid number, not None",
}
FAULTS |= {f"algorithms={{gradient_clipping: {arguments}}}": told for arguments, told in CLIPPING.items()}


@pytest.mark.parametrize("override", FAULTS)
def test_a_wrong_value_is_one_line_that_names_it(config, override, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError) as fault:
        config(override)
    assert FAULTS[override] in str(fault.value)
    assert "\n" not in str(fault.value) and "function" not in str(fault.value)


def test_texts_stay_as_they_are_typed_and_null_stays_null(config, tmp_path):
    for text in ("001", "1e3", "on", "0x10", "1_000"):
        assert config(f"run_name={text}").run_name == text
        path = tmp_path / "run.yaml"
        path.write_text(re.sub("run_name: .*", f"run_name: {text}", path.read_text()))
        assert config().run_name == text
    assert config("trainer.save_folder=null").save_folder is None
    assert config("algorithms.ema=null", "algorithms.adversarial=null").algorithms.keys() == {"perceptual"}


DOUBTS = {
    "schedule.warmup_cosine.final_lr=0.1": "schedule.warmup_cosine.final_lr: 0.1 is above the rate that it ends",
    "algorithms.adversarial.optimizer={adamw: {lr: 1e-6}}": "adversarial.schedule.warmup_cosine.final_lr: 2e-05",
    "algorithms.adversarial.start=1ba": "algorithms.adversarial.start: 1ba is before discriminator_start, 2ba",
    "algorithms.perceptual.start=2ep": "algorithms.perceptual.start: 2ep is not reached in trainer.max_duration, 2ep",
    "optimizer.adamw.lr=0": "optimizer.adamw.lr: 0 trains nothing",
}


@pytest.mark.parametrize("override", DOUBTS)
def test_what_is_doubtful_is_said(config, override, caplog):
    config()
    assert caplog.text == ""
    config(*(["schedule=null"] if "lr=0" in override else []), override)
    assert DOUBTS[override] in caplog.text


# --- Composer's


def test_the_table_of_composers_plugins_is_whole():
    assert set(inspect.signature(Trainer).parameters) == {
        *trainer_keys.OURS,
        *trainer_keys.REFUSED,
        *trainer_keys.VALUES,
    }
    classes = {target.__name__ for kind in REFUSED for target in plugins(kind).values()}
    assert VALUES.keys() <= classes
    for kind, refused in REFUSED.items():
        assert refused.keys() <= plugins(kind).keys()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REFUSED.items() for name in names])
def test_what_does_not_work_is_refused_by_name(config, kind, name):
    with pytest.raises(UserError, match=rf"^{kind}s\.{name}: Composer's {name} does not work here: "):
        config(f"{kind}s={{{name}: {{}}}}")


@pytest.mark.parametrize("name", NEEDED)
def test_a_logger_whose_package_is_absent_says_so(config, name):
    with pytest.raises(UserError, match=rf"^loggers\.{name}: it needs a package that is not installed: pip install "):
        config(f"loggers={{{name}: {{}}}}")


ARGUMENTS = {
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
    "early_stopper": {"monitor": "psnr", "dataloader_label": "eval", "patience": "9ep"},
    "threshold_stopper": {"monitor": "psnr", "dataloader_label": "eval", "threshold": 100.0},
    "activation_monitor": {"interval": "2ba", "only_log_wandb": False},
    "memory_snapshot": {"interval": "2ba"},
    "optimizer_monitor": {"batch_log_interval": 1},
    "constant_with_warmup": {"t_warmup": "2ba"},
    "cosine_annealing_warm_restarts": {"t_0": "2ba"},
    "cosine_annealing_with_warmup": {"t_warmup": "2ba"},
    "exponential": {"gamma": 0.9},
    "linear_with_warmup": {"t_warmup": "2ba"},
    "multi_step": {"milestones": ["2ba"]},
    "multi_step_with_warmup": {"t_warmup": "1ba", "milestones": ["2ba"]},
    "polynomial": {"power": 2.0},
    "polynomial_with_warmup": {"t_warmup": "2ba"},
    "step": {"step_size": "2ba"},
}


def working(kind: str) -> dict[str, dict]:
    names = plugins(kind).keys() - REFUSED[kind].keys() - NEEDED.keys()
    return {
        name: ARGUMENTS.get(name, {}) for name in sorted(names) if plugins(kind)[name].__module__.startswith("composer")
    }


def test_what_works_trains_saves_and_resumes(shards, tmp_path):
    """All algorithms, callbacks and loggers of Composer's that are not refused, in one run, which is resumed."""
    settings = tiny_settings(shards, tmp_path / "run") | {"schedule": None, "metrics": {"psnr": {}}}
    settings["algorithms"] = working("algorithm")
    settings["callbacks"], loggers = working("callback"), working("logger")
    loggers["file"] = {
        "filename": str(tmp_path / "log-rank{rank}.txt"),
        "capture_stdout": False,
        "capture_stderr": False,
    }
    loggers["tensorboard"] = {"log_dir": str(tmp_path / "tensorboard")}
    settings["loggers"] = {"jsonl": {}, **loggers}
    settings["trainer"]["log_traces"] = False
    assert settings["algorithms"].keys() == {"channels_last", "gradient_clipping"}
    assert len(settings["callbacks"]) > 8 and settings["loggers"].keys() >= {"file", "inmemory", "tensorboard"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that need a GPU
        for end in ("2ba", "4ba"):
            train_here(settings | {"trainer": settings["trainer"] | {"max_duration": end}})
    steps = [record["batch"] for record in figures(tmp_path / "run") if "loss/train/l1" in record]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("name", working("schedule"))
def test_schedules_that_are_resumed_go_on_as_if_they_had_not_been(shards, tmp_path, name):
    settings = tiny_settings(shards, tmp_path / "run") | {"algorithms": {}, "metrics": {}}
    settings["data"]["eval"] = None
    settings["schedule"] = {name: ARGUMENTS.get(name, {})}
    settings["trainer"] |= {"max_duration": "4ba", "save_interval": "2ba"}
    train_here(settings)
    settings |= {"run_dir": str(tmp_path / "resumed")}
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        if checkpoint.name == "ep0-ba2":
            (tmp_path / "resumed/checkpoints").mkdir(parents=True)
            checkpoint.rename(tmp_path / "resumed/checkpoints/ep0-ba2")
    train_here(settings)
    whole, resumed = figures(tmp_path / "run"), figures(tmp_path / "resumed")
    assert [record["lr/decoder"] for record in whole[2:]] == [record["lr/decoder"] for record in resumed]
    assert [record["loss/train/l1"] for record in whole[2:]] == [record["loss/train/l1"] for record in resumed]
