"""Sharded training: what of Composer's FSDP2 fits this model, and what is refused."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rae.config.arguments import check_arguments
from rae.config.errors import UserError
from rae.config.sections import Config
from rae.survival.processes import world_size

_REFUSED = {  # key -> what to do instead
    "device_mesh": "give replicas: N for hybrid sharding",
    "activation_checkpointing": "set model.decoder.activation_checkpointing, which works with one rank and DDP too",
    "activation_cpu_offload": "set model.decoder.activation_checkpointing to save memory",
    "load_monolith_rank0_only": "leave it out: every rank builds the same weights",
}


@dataclass
class HybridFSDP2Config(FSDP2Config):
    """FSDP2 within groups of ranks, and copies of the same shards across the groups.

    Args:
        replicas: number of groups; 1 shards over all ranks.
    """

    replicas: int = 1

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        """What Composer builds its device mesh from."""
        return self.replicas if self.replicas > 1 else None


def check_sharding(config: Config) -> None:
    """Check the ``fsdp`` section, and refuse what does not go with FSDP2.

    Raises:
        UserError: the first fault.
    """
    for key, remedy in _REFUSED.items():
        if key in config.fsdp:
            raise UserError(f"fsdp.{key}: not supported here; {remedy}")
    check_arguments(HybridFSDP2Config, config.fsdp, "fsdp")
    if config.fsdp.get("state_dict_type", "full") not in ("full", "sharded"):
        raise UserError(f"fsdp.state_dict_type: {config.fsdp['state_dict_type']!r} is neither full nor sharded")
    if not is_sharded(config):
        return
    replicas = config.fsdp.get("replicas", 1)
    if replicas < 1 or world_size() % replicas:
        raise UserError(f"fsdp.replicas: {world_size()} ranks cannot be split into {replicas} equal groups")
    if replicas > 1 and (config.trainer.get("device") == "cpu" or not torch.cuda.is_available()):
        raise UserError("fsdp.replicas: torch's hybrid sharding needs GPUs; leave it out on CPUs")
    if config.trainer.get("precision") == "amp_fp16":
        raise UserError("trainer.precision: amp_fp16 does not go with parallelism: fsdp; use amp_bf16")
    if "optimizer_monitor" in config.callbacks:
        raise UserError("callbacks.optimizer_monitor: fails under parallelism: fsdp; leave it out, or use ddp")
    clipping = (config.algorithms.get("gradient_clipping") or {}).get("clipping_type", "norm")
    if clipping == "adaptive":
        raise UserError("algorithms.gradient_clipping: adaptive clipping needs whole gradients; use norm with fsdp")


def is_sharded(config: Config) -> bool:
    """Whether this launch shards the decoder; one rank has nothing to share."""
    return config.parallelism == "fsdp" and world_size() > 1


def saves_sharded(config: Config) -> bool:
    """Whether this launch reads and writes sharded checkpoints."""
    return is_sharded(config) and config.fsdp.get("state_dict_type") == "sharded"


def parallelism(config: Config) -> ParallelismConfig | None:
    """What Composer's Trainer takes; None for DDP."""
    if not is_sharded(config):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FSDP2's notice that it is experimental
        arguments: dict[str, Any] = {"state_dict_type": "full", **config.fsdp}
        return ParallelismConfig(fsdp=HybridFSDP2Config(**arguments))


def average_gradients(model: nn.Module) -> None:
    """See to it that sharded gradients are averages over the ranks, on whatever backend."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo's reduce-scatter takes FSDP2's AVG for SUM without a word
                module.set_force_sum_reduction_for_comms(True)
