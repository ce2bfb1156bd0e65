"""How good an estimate of a hypergradient is: against exact T1–T2, over all hyperparameters as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .baselines import conjugate_gradient, finite_difference, neumann, unrolled
from .hypergradient import hypergradient
from .mixed_mode import mixed_mode
from .problem import Closure, Hypergradient, Parameters

Estimate = Callable[[], Hypergradient]


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


def estimates(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    generator: torch.Generator,
    parameters: Parameters = None,
    made: Parameters = None,
) -> dict[str, Estimate]:
    """Estimators of one problem, each a function without arguments, all at the scale of `inner_lr`; "exact" is T1–T2.

    evograd_k*: the paper's, over K; at K = 10 also over σ, τ and kinds of noise; with common random numbers. guided, mixed:
    with G at θ, after one SGD step (…_sgd), and after the step that was made (…_made), where its parameters `made` are given.
    generator: EvoGrad's directions are drawn from it, so that they take nothing from what the losses draw (dropout, say).
    """
    problem = (train_loss, val_loss, model, hyperparameters)
    common = dict(inner_lr=inner_lr, parameters=parameters)
    evograd = partial(hypergradient, *problem, generator=generator, **common)
    guided = partial(hypergradient, *problem, noise="guided", **common)
    result = {"exact": partial(unrolled, *problem, **common)}
    for k in (2, 10, 50):
        result[f"evograd_k{k}"] = partial(evograd, n_candidates=k)
        result[f"evograd_k{k}_common"] = partial(evograd, n_candidates=k, common_random_numbers=True)
    result["evograd_k10_normal"] = partial(evograd, n_candidates=10, noise="normal")
    for value in (1e-4, 1e-2):
        result[f"evograd_k10_sigma{value:g}"] = partial(evograd, n_candidates=10, sigma=value)
    for value in (0.005, 0.5):
        result[f"evograd_k10_temperature{value:g}"] = partial(evograd, n_candidates=10, temperature=value)
    places = {"": None, "_sgd": "sgd"} | ({"_made": made} if made is not None else {})
    for place, lookahead in places.items():
        result[f"guided{place}"] = partial(guided, lookahead=lookahead)
        result[f"mixed{place}"] = partial(mixed_mode, *problem, lookahead=lookahead, **common)
    result["guided_sgd_own_kinks"] = partial(guided, lookahead="sgd", share_kinks=False)
    result["finite_difference"] = partial(finite_difference, *problem, **common)
    result["neumann"] = partial(neumann, *problem, **common)
    result["conjugate_gradient"] = partial(conjugate_gradient, *problem, damping=0.1, parameters=parameters)
    return result
