"""Say what a run will take, before anything is spent: parameters, operations, memory, steps, bytes and hours.

YAML is a run's configuration, key=value overrides its keys, as with train.py. Nothing is downloaded or allocated: the
run's own model and algorithms take a step on tensors without data, with and without FSDP and activation checkpointing,
and what the step computes and holds is counted. The sizes of published encoders are known; those of others come from
their configuration, in a local folder or on the hub.

Memory is what a GPU holds at the worst moment of the last phase. Hours are of training alone (without start-up,
evaluation, or waiting for data) on GPUs that reach --utilisation of their peak; 0.3 to 0.5 is usual for networks like
these. What `make bench` or the run's own log (callbacks: {speed_monitor: {}}) measured is shown beside them.

examples:
  python -m rae plan yamls/rae_dino_b.yaml
  python -m rae plan yamls/rae_dino.yaml --gpus 8 --gpu H100 --gpu A100-80GB --utilisation 0.35
  python -m rae plan yamls/rae_dino.yaml trainer.device_train_microbatch_size=64 --images 1281167 --json plan.json
"""

import argparse
import json
from pathlib import Path

from rae.commands.options import check_counts
from rae.config.errors import UserError
from rae.survival.storage import written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("yaml", metavar="YAML", help="a run's configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to override")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs (default: 8 with parallelism: fsdp, otherwise 1)")
    parser.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="NAME",
        help="kind of GPU, as H100; again for more (default: all)",
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, metavar="SHARE", help="of the GPU's peak (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, metavar="N", help="of an epoch, when the data cannot be reached here")
    bench = Path("runs/bench/bench.json")
    parser.add_argument("--bench", type=Path, default=bench, metavar="FILE", help="a benchmark (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="store all figures there; local or s3://…")


def run(arguments: argparse.Namespace) -> None:
    check_counts(arguments, "gpus", "images")
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation must be above 0 and at most 1, not {arguments.utilisation}")
    from rae.plan import plan, show

    asked = {"gpus": arguments.gpus, "kinds": arguments.gpu, "images": arguments.images, "bench": arguments.bench}
    found = plan(arguments.yaml, arguments.overrides, utilisation=arguments.utilisation, **asked)
    show(found)
    if arguments.json:
        with written(arguments.json, "--json") as path:
            path.write_text(json.dumps(found, indent=2) + "\n")
