"""How good an estimate of a hypergradient is: against another one, over all hyperparameters as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def agreement(estimate: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """cosine: of the angle between them.  sign: share of the elements with the same sign.  norm: ‖estimate‖ / ‖exact‖.

    Both are lists of tensors of the same shapes. Where a norm is zero the cosine is zero.
    """
    if [g.shape for g in estimate] != [g.shape for g in exact]:
        raise ValueError(f"shapes differ: {[tuple(g.shape) for g in estimate]} and {[tuple(g.shape) for g in exact]}")
    a, b = (torch.cat([g.detach().double().reshape(-1) for g in gradient]) for gradient in (estimate, exact))
    norms = a.norm() * b.norm()
    return {
        "cosine": ((a @ b) / norms).item() if norms > 0 else 0.0,
        "sign": (a.sign() == b.sign()).double().mean().item(),
        "norm": (a.norm() / b.norm()).item() if b.norm() > 0 else float("inf"),
    }
