"""What named GPUs can do, from their makers' data sheets: dense rates, without sparsity."""

from collections.abc import Iterable
from dataclasses import dataclass

from rae.config.errors import UserError
from rae.config.registry import nearest


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Args:
        memory: GB, as sold (10⁹ bytes: a little less than there is).
        bf16: TFLOP/s of the tensor cores, accumulating in fp32.
        fp32: TFLOP/s without tensor cores.
    """

    memory: float
    bf16: float
    fp32: float

    def rate(self, precision: str) -> float:
        """FLOP/s in the trainer's ``precision``."""
        return (self.fp32 if precision == "fp32" else self.bf16) * 1e12


GPUS = {
    "RTX-3090": GPU(24, 71, 35.6),
    "RTX-4090": GPU(24, 165.2, 82.6),
    "A100-40GB": GPU(40, 312, 19.5),
    "L40S": GPU(48, 362, 91.6),
    "A100-80GB": GPU(80, 312, 19.5),
    "H100": GPU(80, 989, 67),
    "H200": GPU(141, 989, 67),
    "B200": GPU(180, 2250, 75),
}
"""H100, H200 and B200 are the SXM modules."""


def chosen(names: Iterable[str]) -> dict[str, GPU]:
    """The GPUs of these names, in any case; all of them for none.

    Raises:
        UserError: an unknown name.
    """
    known = {name.lower().replace("-", ""): name for name in GPUS}
    found = {}
    for name in names:
        key = known.get(name.lower().replace("-", "").replace(" ", ""))
        if key is None:
            raise UserError(f"--gpu: {name!r} is not known{nearest(name, GPUS)}; known are {', '.join(GPUS)}")
        found[key] = GPUS[key]
    return found or GPUS
