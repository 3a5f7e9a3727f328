"""A wrong configuration stops before any data or model is loaded, with one line that names the fault."""

import os
import sys

import pytest
from omegaconf import OmegaConf

from rae.config.errors import UserError
from rae.config.loading import load_config
from rae.training.checks import check
from tests.conftest import ROOT, run, tiny_settings


def write(settings: dict, path) -> str:
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return str(path)


@pytest.fixture
def config_file(shards, tmp_path) -> str:
    return write(tiny_settings(shards, tmp_path / "run"), tmp_path / "run.yaml")


FAULTS = {
    "unknown key": (["data.batchsize=4"], "unknown key 'data.batchsize' (did you mean 'batch_size'?)"),
    "unknown section": (["modle.noise_tau=0"], "unknown key 'modle' (did you mean 'model'?)"),
    "wrong type": (["data.batch_size=many"], "data.batch_size: input should be a valid integer"),
    "out of range": (["model.noise_tau=-1"], "model.noise_tau: input should be greater than or equal to 0, not -1"),
    "missing value": (["data.train.path=???"], "missing value: data.train.path is required"),
    "no duration": (["trainer.max_duration=null"], "missing value: trainer.max_duration is required"),
    "malformed override": (["data.batch_size"], "override 'data.batch_size' must have the form key=value"),
    "broken interpolation": (["run_dir=${nowhere}"], "nowhere"),
    "unknown encoder": (["model.encoder={dinov9: {}}"], "unknown encoder 'dinov9'"),
    "two encoders": (["model.encoder.mae.input_size=64"], "write one encoder as {name: {argument: value}}"),
    "unknown algorithm": (["algorithms.emma.decay=0.9"], "unknown algorithm 'emma' (did you mean 'ema'?); there are: "),
    "unknown argument": (["algorithms.ema.dekay=0.9"], "unknown key 'algorithms.ema.dekay' (did you mean 'decay'?)"),
    "its signature": (
        ["algorithms.ema.dekay=0.9"],
        "it takes (decay: float in [0, 1) = 0.9978, evaluate: 'ema' | 'live' | 'both'",
    ),
    "argument's type": (["algorithms.ema.decay=slow"], "algorithms.ema.decay: input should be a valid number"),
    "argument's choice": (
        ["algorithms.adversarial.loss=hing"],
        "algorithms.adversarial.loss: input should be 'hinge' or",
    ),
    "nested plugin": (["algorithms.adversarial.discriminator={dyno: {}}"], "unknown discriminator 'dyno'"),
    "nested argument": (
        ["algorithms.adversarial.discriminator.dino.dept=3"],
        "unknown key 'algorithms.adversarial.discriminator.dino.dept' (did you mean 'depth'?)",
    ),
    "plugin time": (["algorithms.adversarial.start=8epochs"], "'8epochs' is not a time such as '8ep', '1000ba'"),
    "schedule time": (["schedule.warmup_cosine.warmup=1 day"], "'1 day' is not a time such as"),
    "trainer time": (["trainer.max_duration=8epocs"], "trainer.max_duration: '8epocs' is not a time such as"),
    "trainer key": (["trainer.max_duraton=8ep"], "unknown key 'trainer.max_duraton' (did you mean 'max_duration'?)"),
    "trainer key of ours": (["trainer.algorithms=[]"], "trainer.algorithms: this is set by"),
    "auto microbatches": (["trainer.device_train_microbatch_size=auto"], "'auto' is not supported; give a number"),
    "device": (["trainer.device=gpu"], "trainer.device: this machine has no GPU"),
    "precision": (["trainer.precision=fp12"], "trainer.precision: 'fp12' is none of fp32, amp_bf16, amp_fp16"),
    "missing path": (["data.train.path=/no/where"], "data.train.path: there is no folder '/no/where'"),
    "path without index": ([f"data.eval.path={ROOT}"], "holds no index.json"),
    "imports": (["imports=[missing.py]"], "imports: cannot import 'missing.py'"),
    "streaming argument": (["data.streaming.cache_limt=1gb"], "unknown key 'data.streaming.cache_limt' (did you mean"),
    "composer's argument": (
        ["algorithms.gradient_clipping.clipping_type=norm"],
        "missing value: algorithms.gradient_clipping.clipping_threshold is required",
    ),
    "microbatches": (["trainer.device_train_microbatch_size=0"], "device_train_microbatch_size: 0 is not supported"),
    "resize": (["data.train.resize=32"], "data.train.resize: 32 is smaller than data.image_size, 64"),
    "same data": (["data.eval.path=${data.train.path}"], "evaluation needs images of its own"),
    "nothing to evaluate": (["data.eval=null"], "metrics: there is nothing to evaluate them on"),
    "trainer's other key": (["trainer.step_schedulers_every_batch=true"], "this is set by"),
    "metric": (["metrics.pnsr={}"], "unknown metric 'pnsr' (did you mean 'psnr'?)"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_each_fault_is_one_clear_line(config_file, fault, monkeypatch):
    overrides, message = FAULTS[fault]
    monkeypatch.setattr("rae.training.run.build_trainer", None)
    if fault == "device" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError) as caught:
        check(load_config(config_file, overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_that_ranks_cannot_share(config_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"data\.batch_size: 8 cannot be shared equally by 3 ranks"):
        check(load_config(config_file, []))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fsdp.replicas=3"], "fsdp.replicas: 2 ranks cannot be split into 3 equal groups"),
        (["fsdp.replicas=2", "trainer.device=cpu"], "hybrid sharding needs GPUs"),
        (["fsdp.activation_checkpointing=true"], "set model.decoder.activation_checkpointing"),
        (["fsdp.state_dict_type=local"], "neither full nor sharded"),
        (["fsdp.reshard=true"], "fsdp.reshard"),
        (["trainer.precision=amp_fp16"], "amp_fp16 does not go with parallelism: fsdp"),
        (["callbacks.optimizer_monitor={}"], "optimizer_monitor: fails under"),
        (["algorithms.gradient_clipping={clipping_type: adaptive, clipping_threshold: 1}"], "adaptive clipping"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(config_file, monkeypatch, overrides, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        check(load_config(str(config_file), ["parallelism=fsdp", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.save_num_checkpoints_to_keep=0"], "at least 1, or -1"),
        (["trainer.save_folder=azure://a/b", "trainer.save_num_checkpoints_to_keep=2"], "cannot be deleted from here"),
        (["trainer.save_filename=x.pt"], "trainer.save_filename"),
        (["trainer.save_folder=null", "trainer.autoresume=true"], "nothing to go on from"),
        (["checkpoints.damaged=ignore"], "checkpoints.damaged"),
        (["trainer.save_interval=0ba"], "must be more than 0"),
        (["trainer.save_interval=10iter"], "iter is not counted here"),
        (["trainer.max_duration=-1ep"], "must be more than 0"),
        (["trainer.save_folder=runs/{rank}"], "no braces"),
        (["run_dir='runs/{x}'"], "run_dir: it must have no braces"),
    ],
)
def test_faults_in_saving(config_file, overrides, message):
    with pytest.raises(UserError, match=message):
        check(load_config(str(config_file), overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("- a\n- b", "is a mapping of keys, not a list"), ("a: ${b}", "'b' not found")],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "bad.yaml"), [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["python", "composer"])
def test_the_command_prints_the_line_and_fails(config_file, tmp_path, command):
    launcher = [sys.executable] if command == "python" else ["composer", "-n", "1"]
    done = run(*launcher, "train.py", config_file, "data.batchsize=4", check=False)
    assert done.returncode != 0
    assert "error: unknown key 'data.batchsize' (did you mean 'batch_size'?)" in done.stderr
    assert "Traceback" not in done.stderr
    if command == "python":
        assert len(done.stderr.splitlines()) == 1
        assert done.returncode == 2
    assert not (tmp_path / "run").exists()


def test_missing_file_and_help():
    done = run(sys.executable, "train.py", "no.yaml", check=False)
    assert (done.returncode, done.stderr) == (2, "error: there is no configuration file 'no.yaml'\n")
    assert "key=value" in run(sys.executable, "train.py", "--help").stdout


def test_a_valid_configuration_passes_and_reads_back(config_file, tmp_path):
    from rae.config.loading import save_config

    config = load_config(config_file, ["optimizer.adamw.lr=3e-4", "data.train.flip=true"])
    check(config)
    assert config.optimizer == {"adamw": {"lr": 3e-4}}
    save_config(config, tmp_path / "saved/config.yaml")
    assert load_config(str(tmp_path / "saved/config.yaml"), []) == config
