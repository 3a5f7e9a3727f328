"""A training step on tensors without data: its operations, and the bytes that it holds at most.

The real model and the real algorithms take the step, through Composer's own events, on fake tensors (torch's
FakeTensorMode: shapes, types and lifetimes, no values), so what is counted is what a run computes and keeps. Sharding
is FSDP2's own, with a process group that sends nothing. Autocast is the CPU's, the only one that works without a GPU;
it treats this step's matrix products, convolutions and attention as the GPU's does.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from composer import Algorithm, Engine, Event, Logger, State
from composer.core.precision import Precision
from composer.devices import DeviceCPU
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rae.algorithms.adversarial import adversarial_last
from rae.algorithms.base import precision_context
from rae.autoencoder.model import build_planned
from rae.config.arguments import build
from rae.config.sections import Config, Model
from rae.plan.clock import Clock
from rae.plan.meter import Meter, networks_of, size_of, tensors_of
from rae.training.build import build_model


def unallocated(holder: Any, fake: FakeTensorMode, seen: set[int] | None = None) -> None:
    """Move what a module or an algorithm holds to fake tensors, its parameters staying the same objects.

    It may have been built on the meta device, or with weights; what it holds may be in plain attributes.
    """
    seen = set() if seen is None else seen
    for part in holder.modules() if isinstance(holder, nn.Module) else [holder]:
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            _unallocated_tensors(part, fake)
        for name, value in vars(part).items():
            if isinstance(value, nn.Module):
                unallocated(value, fake, seen)
            elif isinstance(value, Tensor) and not isinstance(value, (FakeTensor, nn.Parameter)):
                object.__setattr__(part, name, _empty_like(value))


def _unallocated_tensors(module: nn.Module, fake: FakeTensorMode) -> None:
    for name, tensor in module.named_buffers(recurse=False):
        module._buffers[name] = tensor if isinstance(tensor, FakeTensor) else _empty_like(tensor)
    for parameter in module.parameters(recurse=False):
        if not isinstance(parameter, FakeTensor):
            empty = nn.Parameter(_empty_like(parameter), parameter.requires_grad)
            fake.fake_tensor_converter.tensor_memo.clear()  # what is referred to weakly cannot be swapped
            torch.utils.swap_tensors(parameter, empty)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _Here(DeviceCPU):
    """A device on which everything is already: moving a module would take fake parameters for real ones."""

    def module_to_device(self, module: nn.Module) -> nn.Module:
        return module


class Simulation:
    """A run's model, algorithms and optimizer, ready to take steps.

    Use it as a context: everything that is made or run inside it is without data.

    Args:
        config: the run's.
        clock: where training is at which step.
        shards: GPUs that share a copy of what is trained; 1 without FSDP.
        checkpointing: of the model's activations.
        latents: the data hold them, so that the encoder does not run.
    """

    def __init__(
        self, config: Config, clock: Clock, shards: int = 1, checkpointing: bool = False, latents: bool = False
    ):
        self.config, self.clock, self.shards, self.latents = config, clock, shards, latents
        self.checkpointing = checkpointing
        self.meter = Meter()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # such as a plugin's constants

    def __enter__(self) -> "Simulation":
        self.model, self.algorithms = modules(self.config, self.clock, self.checkpointing)
        self._group = _silent_group(self.shards)
        self.mesh = self._group.__enter__()
        self.fake.__enter__()
        self.meter.__enter__()
        self._begin()
        return self

    def __exit__(self, *error: Any) -> None:
        self.engine.close()
        self.meter.__exit__(*error)
        self.fake.__exit__(*error)
        self._group.__exit__(*error)

    def _begin(self) -> None:
        for part in (self.model, *self.algorithms, *networks_of(self.model, self.algorithms).values()):
            unallocated(part, self.fake)
        if self.shards > 1:
            _shard(self.model, self.config, self.mesh)
        self.optimizer = build(
            "optimizer",
            self.config.optimizer,
            "optimizer",
            params=[p for p in self.model.parameters() if p.requires_grad],
        )
        _as_on_a_gpu(self.optimizer)
        self.state = State(
            model=self.model,
            rank_zero_seed=0,
            run_name="plan",
            device=_Here(),
            max_duration=self.clock.duration,
            precision=Precision(self.config.trainer["precision"]),
            optimizers=self.optimizer,
            algorithms=self.algorithms,
        )
        self.state.set_dataloader(range(self.clock.steps_per_epoch), "train")
        self.engine = Engine(self.state, Logger(self.state), algorithm_passes=[adversarial_last])
        self.update = self._update()
        for event in (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START, Event.EPOCH_START):
            self.engine.run_event(event)

    def _update(self) -> int:
        """Take an optimizer step, so that its states exist; returns the bytes that it needs for a moment."""
        peaks = Counter[str]()
        _make_gradients(self.optimizer)
        with self.meter.watch(peaks, "update"):
            self.optimizer.step()
        needed = peaks["update"] - self.meter.live
        self.optimizer.zero_grad(set_to_none=True)
        return needed

    def batch(self, images: int) -> dict[str, Tensor]:
        """A batch as the loader gives it."""
        size = self.config.data.image_size
        image = torch.empty(images, 3, size, size, dtype=torch.uint8).to(memory_format=torch.channels_last)
        batch = {"image": image, "label": torch.empty(images, dtype=torch.int64)}
        if self.latents:
            batch["latent"] = torch.empty(images, *self.model.latent_shape, dtype=torch.bfloat16)
        return batch

    def step(self, at: int, images: int, accumulated: bool = False) -> Counter[str]:
        """The step after ``at`` finished ones, on one microbatch; returns bytes.

        Keys are the most that lives in a part of the step: ``forward``, ``losses`` (what algorithms do with the loss),
        ``backward``, ``optimizer`` and ``end`` (weight average, discriminator); and ``held``, what a microbatch keeps
        until the end of the step.

        Args:
            accumulated: another microbatch came before, so that there are gradients already.
        """
        state, bytes_ = self.state, Counter[str]()
        state.timestamp = self.clock.timestamp(at)
        self.optimizer.zero_grad(set_to_none=True)
        if accumulated:
            _make_gradients(self.optimizer)
        batch, before = self.batch(images), self.meter.live
        self.engine.run_event(Event.BATCH_START)
        self._microbatch(batch, bytes_)
        bytes_["held"] = self.meter.live - before
        state.batch = batch
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        bytes_["optimizer"] = self.meter.live + self.update
        state.timestamp = self.clock.timestamp(at + 1)
        with self.meter.watch(bytes_, "end"):
            self.engine.run_event(Event.BATCH_END)
        return bytes_

    def _microbatch(self, batch: dict[str, Tensor], bytes_: Counter[str]) -> None:
        state, meter = self.state, self.meter
        state.batch = {name: tensor.clone() for name, tensor in batch.items()}
        with meter.watch(bytes_, "forward"):
            with precision_context(state):
                state.outputs = self.model(state.batch)
            with precision_context(state):
                state.loss = self.model.loss(state.outputs, state.batch)
        with meter.watch(bytes_, "losses"):
            self.engine.run_event(Event.AFTER_LOSS)
        with meter.watch(bytes_, "backward"):
            state.loss["total"].backward()  # type: ignore[index]

    def operations(self, at: int) -> dict[str, int]:
        """Network -> floating-point operations an image, of a step after ``at`` finished ones."""
        with self.meter.counting(networks_of(self.model, self.algorithms)) as counts:
            self.step(at, 1)
        return counts

    def held(self) -> dict[str, int]:
        """Bytes that this rank keeps from step to step, by what they are for."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        held = {
            "weights": size_of(trained),
            "gradients": size_of(trained),
            "optimizer": size_of(list(self.optimizer.state.values())),
            "weight average": size_of(
                [(getattr(a, "average", {}), getattr(a, "averages", {})) for a in self.algorithms]
            ),
            "discriminator's heads": 0,
        }
        for algorithm in self.algorithms:
            if isinstance(getattr(algorithm, "discriminator", None), nn.Module):
                heads = list(algorithm.discriminator.parameters())  # type: ignore[attr-defined]
                held["discriminator's heads"] += 2 * size_of(heads) + size_of(list(algorithm.optimizer.state.values()))  # type: ignore[attr-defined]
                trained += heads
        every = {id(t): t for n in networks_of(self.model, self.algorithms).values() for t in tensors_of(n)}
        ours = {id(t) for t in trained}
        return {**held, "frozen networks": size_of([t for key, t in every.items() if key not in ours])}

    def parameters(self) -> dict[str, tuple[int, bool]]:
        """Network -> number of its parameters, whether they are trained."""
        counts = {}
        for name, network in networks_of(self.model, self.algorithms).items():
            found = [t for t in tensors_of(network) if isinstance(t, nn.Parameter)]
            counts[name] = (sum(t.numel() for t in found), any(t.requires_grad for t in found))
        return counts

    def saved(self) -> int:
        """Bytes of tensors in a checkpoint, over all ranks, when nothing is sharded."""
        states = [self.model.state_dict(), self.optimizer.state_dict(), *(a.state_dict() for a in self.algorithms)]
        return size_of(states)


def modules(config: Config, clock: Clock, checkpointing: bool) -> tuple[Any, list[Algorithm]]:
    """Model and algorithms on the meta device."""
    model = _model(config)
    sizes = dict(steps_per_epoch=clock.steps_per_epoch, image_size=config.data.image_size)
    context = dict(**sizes, run_dir=config.run_dir, eval_images=None)
    if model.activation_checkpointing is not None:
        model.activation_checkpointing = checkpointing
    with _on_meta():
        named = config.algorithms.items()
        return model, [build_planned("algorithm", {n: a}, "algorithms", **context) for n, a in named]


def _model(config: Config) -> Any:
    config = config.model_copy(update={"metrics": {}})
    with _on_meta():
        try:
            return build_model(config)
        except Exception:
            if isinstance(config.model, Model):  # whose parts are built by themselves
                raise
        with torch.device("cpu"):  # see build_planned
            return build_model(config)


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a meta parameter in the current model")  # a plugin's load_state_dict
        yield


def checkpointing_of(config: Config) -> bool | None:
    """Whether the model's activations are computed again in the backward pass; None where there is no choice."""
    if isinstance(config.model, Model):
        return config.model.decoder.activation_checkpointing
    return _model(config).activation_checkpointing


def _as_on_a_gpu(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:  # the multi-tensor form is the default there, and needs memory of its own
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def _make_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)


def _shard(model: Any, config: Config, mesh: Any) -> None:
    from composer.distributed.fsdp2 import prepare_fully_shard
    from composer.distributed.fsdp2_utils import generate_composer_model_policy

    wanted = {k: v for k, v in config.fsdp.items() if k in ("reshard_after_forward", "mixed_precision")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FSDP2's notice that it is experimental
        fsdp = FSDP2Config(device_mesh=mesh, **wanted)
    precision = Precision(config.trainer["precision"])
    prepare_fully_shard(model.network, fsdp, precision, generate_composer_model_policy(model))


@contextmanager
def _silent_group(ranks: int) -> Iterator[Any]:
    """This process as rank 0 of so many, of which no other exists; gives their device mesh."""
    import torch.distributed._tools.fake_collectives  # noqa: F401 - makes collectives known to fake tensors

    if ranks == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    launched = os.environ.pop("WORLD_SIZE", None)  # Composer would compare it with this group's
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        if launched is not None:
            os.environ["WORLD_SIZE"] = launched
        dist.destroy_process_group()
