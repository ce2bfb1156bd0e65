"""Second-order hypergradients to compare with, behind the same closures and the same result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .problem import Closure, Hypergradient, Parameters, Problem, check_finite, check_positive, partial


def unrolled(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    n_steps: int = 1,
    parameters: Parameters = None,
) -> Hypergradient:
    """Differentiate ℓ_V(θ', λ) through `n_steps` SGD steps θ' = θ − η ∇_θ ℓ_T(θ, λ).

    One step is T1–T2 (Luketina et al., ICML 2016).

    The graph of the steps is made with `higher` (Grefenstette et al., arXiv 1910.01727) and differentiated twice: about three
    times the memory of a training step. The closures are called with a copy of the model made by `higher`.

    Args, returns and errors as in `evograd.mixed_mode`; `candidate_losses` is ℓ_T(θ, λ) at the first step, of shape (1,).
    """
    import higher  # here, so that EvoGrad itself does not need it

    check_positive("inner_lr", inner_lr)
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps={n_steps!r} must be an integer of at least 1")
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    own = dict(model.named_parameters())
    with problem.undisturbed():
        optimizer = torch.optim.SGD([own[name] for name in problem.theta], lr=inner_lr)
        optimizer.param_groups[0]["params"] = _Uncopied(optimizer.param_groups[0]["params"])
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (functional, inner_optimizer):
            start = {**own, **problem.fixed, **{name: p.clone().requires_grad_() for name, p in problem.theta.items()}}
            functional.update_params([start[name] for name in own])
            first = None
            for _ in range(n_steps):
                loss = problem.scalar(train_loss, functional)
                first = loss.detach() if first is None else first
                if loss.requires_grad:
                    inner_optimizer.step(loss)
                # As in the other estimators, statistics that BatchNorm gathers on the way are thrown away.
                higher.patch.buffer_sync(model, functional)
            val = problem.scalar(val_loss, functional)
            grads = problem.assemble([partial(val, problem.hyperparameters)])
    losses, val = first.reshape(1), val.detach()
    check_finite(losses, val)
    return Hypergradient(grads, val, losses, torch.ones_like(losses))


class _Uncopied(list):
    """`higher` makes a deep copy of the optimizer's parameters, only to throw it away; spare the baseline that memory."""

    def __deepcopy__(self, memo):
        return list(self)
