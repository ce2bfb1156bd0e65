"""T1–T2 hypergradients without double backward: forward mode along the validation gradient, then one backward pass to λ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .problem import Closure, Hypergradient, Parameters, Problem, check_finite, check_positive, partial

# torch.func.jvp scripts its own formulas at its first call, and warns of that.
warnings.filterwarnings(
    "ignore", message=".torch.jit.script. is deprecated", category=FutureWarning, module=r"torch\.jit\._script"
)


def mixed_mode(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    parameters: Parameters = None,
    lookahead: Parameters | str = None,
) -> Hypergradient:
    """The exact hypergradient through one SGD step of `inner_lr` (η), the limit of guided EvoGrad as its radius goes to 0:

        dℓ_V/dλ = ∂ℓ_V/∂λ − η ∂/∂λ ⟨∇_θ ℓ_T(θ, λ), G⟩,   G = ∂ℓ_V/∂θ at the lookahead parameters

    The directional derivative in the brackets is one pass of train_loss in forward mode along G; it is then differentiated
    by λ in reverse mode. Where λ enters after the network (sample weights, say) the network itself needs no graph.
    With lookahead="sgd", G is taken at θ − η ∇ℓ_T(θ, λ), and the result is the T1–T2 hypergradient of
    `evograd.baselines.unrolled` to rounding. Relative: MixFlow-MG, Kemaev et al., ICML 2025, arXiv 2505.00793 (JAX).

    Args:
        train_loss, val_loss, model, hyperparameters, parameters: as in `evograd.hypergradient`.
        inner_lr: η > 0.
        lookahead: where G is taken: named parameters (those after the training step, say), "sgd" for one SGD step of inner_lr
            (one more pass of train_loss, with the same random draws), or None for θ itself.

    Returns:
        Hypergradient; its `candidate_losses` is ℓ_T(θ, λ), of shape (1,).

    Raises:
        ValueError, TypeError, RuntimeError: as in `evograd.hypergradient`; NotImplementedError for an operation in
            train_loss that PyTorch has no forward-mode formula for.
    """
    check_positive("inner_lr", inner_lr)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    with problem.undisturbed():
        draws = problem.random_state() if isinstance(lookahead, str) else None
        val, direct, gradient = problem.val_gradient(problem.lookahead(lookahead, inner_lr))
        # torch.func.jvp, not forward_ad's dual numbers: these overwrite log_softmax's values, which the backward pass needs.
        with problem.replay(draws):
            try:
                with _PlainNorms():
                    loss, slope = torch.func.jvp(lambda theta: problem.loss(train_loss, theta), (problem.theta,), (gradient,))
            except NotImplementedError as error:
                raise NotImplementedError(
                    "mixed_mode takes train_loss in forward mode, and an operation in it has no formula for that: "
                    f"{str(error).splitlines()[0]} "
                    "Use its plain form (eager attention or SDPBackend.MATH instead of fused attention, broadcast differences "
                    "instead of cdist), or noise='guided', which needs no formula."
                ) from error
        mixed = partial(slope, problem.hyperparameters)
        grads = problem.assemble([direct, [None if g is None else -inner_lr * g for g in mixed]])
    losses = loss.detach().reshape(1)
    check_finite(losses, val)
    return Hypergradient(grads, val, losses, torch.ones_like(losses))


class _PlainNorms(TorchFunctionMode):
    """Layer and batch normalisation by elementary operations.

    PyTorch's forward-mode formulas of the fused ones take their mean and deviation for constants when they are differentiated
    in reverse mode, and so give a wrong hypergradient, without an error, where λ enters below one.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        plain = {F.layer_norm: _layer_norm, F.batch_norm: _batch_norm}.get(function, function)
        return plain(*args, **(kwargs or {}))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(normalized_shape), 0))
    return _normalized(input, input.mean(dims, keepdim=True), input.var(dims, correction=0, keepdim=True), weight, bias, eps)


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Running statistics are read but not gathered: those of an estimator's passes are thrown away."""
    dims = (0, *range(2, input.dim()))
    row = lambda t: None if t is None else t.view(-1, *[1] * (input.dim() - 2))
    if training:
        mean, variance = input.mean(dims), input.var(dims, correction=0)
    else:
        mean, variance = running_mean, running_var
    return _normalized(input, row(mean), row(variance), row(weight), row(bias), eps)


def _normalized(input, mean, variance, weight, bias, eps):
    result = (input - mean) * (variance + eps).rsqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias
