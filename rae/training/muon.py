"""Muon: matrices are updated by orthogonal directions, everything else by AdamW, in one optimizer."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rae.config.registry import register
from rae.config.values import Count, Decay, NotNegative, Positive

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Coefficients (a, b, c) of each step X ← aX + b(XXᵀ)X + c(XXᵀ)²X (arXiv 2505.16932); the last is repeated."""
SAFETY = 1.01
"""Keeps rounding from pushing singular values beyond where a step converges."""


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix whose singular values are all 1, about: the polar factor by Polar Express (arXiv 2505.16932).

    Args:
        matrix: (M, N); computed in bf16 on a GPU, in float32 elsewhere.
        steps: five take singular values of a hundredth of the norm and above to 1 ± 0.15.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (SAFETY * x.norm() + 1e-7)
    for step in range(steps):
        last = step >= len(POLAR_EXPRESS) - 1
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        if not last:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982) for matrices, and AdamW for the rest.

    A matrix's update is orthogonal, and scaled to the root mean square that AdamW's usually has, so that both take the
    same learning rate. A sharded matrix is gathered once a step, for that; its momentum stays sharded.

    Args:
        params: matrices and others.
        momentum: of matrices, by Nesterov.
        steps: see :func:`orthogonal`.
        others: AdamW's arguments, but for lr and weight decay, which are both parts'.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        **others: Any,
    ):
        params = list(params)
        matrices = [p for p in params if p.ndim == 2]
        groups = [
            {"params": matrices, "momentum": momentum, "orthogonal_steps": steps},
            {"params": [p for p in params if p.ndim != 2], "momentum": 0.0, "orthogonal_steps": 0},
        ]
        super().__init__([g for g in groups if g["params"]], lr=lr, weight_decay=weight_decay, **others)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every: list[dict[str, Any]] = self.param_groups  # type: ignore[has-type]
        for group in every:
            if group["orthogonal_steps"]:
                for matrix in (p for p in group["params"] if p.grad is not None):
                    self._turn(matrix, group)
        self.param_groups = [group for group in every if not group["orthogonal_steps"]]
        try:
            super().step()
        finally:
            self.param_groups = every
        return loss

    def _turn(self, matrix: Tensor, group: dict[str, Any]) -> None:
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), device="cpu")  # which AdamW's loading asks of every state
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["step"] += 1
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"])
        if isinstance(update, DTensor):
            whole = orthogonal(update.full_tensor(), group["orthogonal_steps"])
            # Every rank has the whole, and takes its part: nothing is sent.
            update = distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
        else:
            update = orthogonal(update, group["orthogonal_steps"])
        if group["weight_decay"]:
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])


@register("optimizer", "muon", context=("params",))
def muon(
    params: Iterable[torch.nn.Parameter],
    lr: NotNegative = 2e-4,
    momentum: Decay = 0.95,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    weight_decay: NotNegative = 0.0,
    eps: Positive = 1e-8,
    steps: Count = 5,
) -> torch.optim.Optimizer:
    """Muon for every matrix, embedding tables among them, and AdamW for the rest, as RAEv2 (arXiv 2605.18324).

    Args:
        lr: of both; a matrix's update is scaled by 0.2·sqrt(max(rows, columns)) (arXiv 2502.16982, section 2.2).
        momentum: of matrices (Nesterov).
        betas, eps: of AdamW.
        steps: of the orthogonalisation by Polar Express (arXiv 2505.16932).
    """
    return Muon(params, lr, momentum, weight_decay, steps, betas=betas, eps=eps)
