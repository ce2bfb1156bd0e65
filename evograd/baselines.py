"""What EvoGrad is compared with, behind the same closures and the same result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .guided import guided
from .host.checks import Closure, Parameters, check_count, check_positive, check_rate
from .host.gathering import partial
from .host.problem import Problem
from .host.result import Hypergradient, estimator, plain
from .host.stand_ins import StandIn
from .host.with_higher import by_higher
from .operations.forward_mode import nodes, scripted
from .operations.threads import Shared, replaced

ENGINES = ("functional", "higher")


@estimator
def unrolled(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    n_steps: int = 1,
    parameters: Parameters = None,
    engine: str = "functional",
) -> Hypergradient:
    """Differentiate ℓ_V(θ', λ) through `n_steps` SGD steps θ' = θ − η ∇_θ ℓ_T(θ, λ).

    One step is T1–T2 (Luketina et al., ICML 2016). The graph of the steps is kept and differentiated twice: about three times
    the memory of a training step. A function that is marked once_differentiable is refused.

    Args:
        engine: what makes the steps. "functional": the model itself holds the parameters of each step. "higher": the package of
            that name (Grefenstette et al., arXiv 1910.01727), as in the authors' code: the closures are called with a copy of the
            model, whose submodules alone (m.head(m.features(x))) keep the first step's parameters, which calls no hooks, and
            which slices no ModuleList; closures must use the model that they are given.

    The other arguments, returns and errors as in `evograd.mixed_mode`; `candidate_losses` is ℓ_T(θ, λ) at the first step, of
    shape (1,).
    """
    check_rate(inner_lr)
    check_count("n_steps", n_steps)
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; accepted are {', '.join(map(repr, ENGINES))}")
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    with problem.undisturbed(), twice_differentiable():
        by = by_higher if engine == "higher" else _by_holding
        first, val, grads = by(problem, inner_lr, n_steps, training_loss)
        return plain(problem.assemble([grads]), val, first.reshape(1))


def _by_holding(
    problem: Problem, inner_lr: float, n_steps: int, train_loss: Callable
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(ℓ_T at the first step, ℓ_V after the last, dℓ_V/dλ)"""
    theta = {name: StandIn.leaf(p) for name, p in problem.theta.items()}
    first = None
    for _ in range(n_steps):
        with problem.holding(theta):
            loss = train_loss(problem)
            first = loss.detach() if first is None else first
            grads = [None] * len(theta)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
        steps = zip(theta.items(), grads)
        theta = {name: p if g is None else torch.add(p, g.to(p), alpha=-inner_lr) for (name, p), g in steps}
    with problem.holding(theta):
        val = problem.evaluate(problem.val_loss)
        return first, val.detach(), partial(val, problem.hyperparameters)


def finite_difference(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    radius: float = 0.01,
    parameters: Parameters = None,
    lookahead: Parameters | str = "sgd",
) -> Hypergradient:
    """T1–T2 by a central difference, as in DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055):

        dℓ_V/dλ ≈ ∂ℓ_V/∂λ − η (∂ℓ_T(θ⁺, λ)/∂λ − ∂ℓ_T(θ⁻, λ)/∂λ) / 2ε,   θ^± = θ ± ε G,   ε = radius / ‖G‖

    with G = ∂ℓ_V/∂θ at the lookahead parameters. Both passes have the same random draws, and each its own kinks: `evograd.guided`
    as DARTS has it.

    Args:
        radius: > 0, the distance of θ^± from θ.
        lookahead: where G is taken, as in `evograd.mixed_mode`; DARTS' own is "sgd".

    The other arguments, returns and errors as in `evograd.mixed_mode`; `candidate_losses` are ℓ_T(θ⁺, λ) and ℓ_T(θ⁻, λ).
    """
    settings = dict(inner_lr=inner_lr, radius=radius, parameters=parameters, lookahead=lookahead)
    return guided(train_loss, val_loss, model, hyperparameters, share_kinks=False, **settings)


def neumann(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    n_terms: int = 5,
    parameters: Parameters = None,
) -> Hypergradient:
    """The implicit function theorem, with the inverse Hessian as a Neumann series (Lorraine, Vicol, Duvenaud, AISTATS 2020):

        dℓ_V/dλ = ∂ℓ_V/∂λ − ∂²ℓ_T/∂λ∂θ v,   v = η Σ_{i < n_terms} (I − η H)^i G,   H = ∂²ℓ_T/∂θ²,   G = ∂ℓ_V/∂θ

    For many terms v is H⁻¹ G, if η is below 2 over the largest eigenvalue of H and no eigenvalue is negative or zero. It is
    meant for a θ that minimises ℓ_T. One term is the T1–T2 hypergradient with G at θ itself. By double backward.

    Args, returns and errors as in `evograd.baselines.unrolled`, with `n_terms` ≥ 1, the number of terms.
    """
    check_rate(inner_lr)
    check_count("n_terms", n_terms)

    def solve(hessian, gradient):
        term, total = gradient, gradient
        for _ in range(n_terms - 1):
            term = [t - inner_lr * h for t, h in zip(term, hessian(term))]
            total = [s + t for s, t in zip(total, term)]
        return [inner_lr * s for s in total]

    return _implicit(train_loss, val_loss, model, hyperparameters, parameters, solve)


def conjugate_gradient(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    n_iterations: int = 5,
    damping: float = 0.0,
    parameters: Parameters = None,
) -> Hypergradient:
    """The implicit function theorem, with the inverse Hessian by conjugate gradients (Pedregosa, ICML 2016; Rajeswaran et al.,
    NeurIPS 2019):

        dℓ_V/dλ = ∂ℓ_V/∂λ − ∂²ℓ_T/∂λ∂θ v,   (H + δ I) v = G,   H = ∂²ℓ_T/∂θ²,   G = ∂ℓ_V/∂θ

    It stops at a direction along which H + δ I is not positive: a network's Hessian has such ones away from a minimum, and δ
    makes fewer of them. By double backward.

    Args:
        n_iterations: ≥ 1; as many as θ has elements give v exactly.
        damping: δ ≥ 0.

    The other arguments, returns and errors as in `evograd.baselines.unrolled`.
    """
    check_count("n_iterations", n_iterations)
    if damping != 0:
        check_positive("damping", damping)

    def solve(hessian, gradient):
        v = [torch.zeros_like(g) for g in gradient]
        residual, direction, size = gradient, gradient, _dot(gradient, gradient)
        going = torch.ones_like(size)
        for _ in range(n_iterations):
            image = [h + damping * d for h, d in zip(hessian(direction), direction)]
            curvature = _dot(direction, image)
            # As tensors, so that nothing waits for the device; once it has stopped or converged no further step is made.
            going = going * ((curvature > 0) & (size > 0))
            length = going * torch.nan_to_num(size / curvature, posinf=0.0, neginf=0.0)
            v = [a + length * d for a, d in zip(v, direction)]
            residual = [r - length * i for r, i in zip(residual, image)]
            new_size = _dot(residual, residual)
            ratio = torch.nan_to_num(new_size / size, posinf=0.0)
            direction = [r + ratio * d for r, d in zip(residual, direction)]
            size = new_size
        return v

    return _implicit(train_loss, val_loss, model, hyperparameters, parameters, solve)


@estimator
def _implicit(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    parameters: Parameters,
    solve: Callable[[Callable[[list[Tensor]], list[Tensor]], list[Tensor]], list[Tensor]],
) -> Hypergradient:
    """∂ℓ_V/∂λ − ∂²ℓ_T/∂λ∂θ v, with v of solve(v -> H v, G)."""
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    with problem.undisturbed(), twice_differentiable():
        layout = problem.layout
        val, direct, flats = problem.val_gradient([problem.theta])
        gradient = list(layout.named(flats).values())
        leaves = {name: StandIn.leaf(problem.theta[name]) for bucket in layout.buckets for name in bucket.names}
        theta = list(leaves.values())
        with problem.holding(leaves):
            loss = training_loss(problem)
            slopes = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True) if loss.requires_grad else ()
            curved = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]

            def vector_product(inputs, vector, keep):
                """Σ_i ∂(∂ℓ_T/∂θ_i)/∂inputs · v_i; None where an input has no part in it."""
                if not curved:
                    return [None] * len(inputs)
                outputs, vectors = [slopes[i] for i in curved], [vector[i] for i in curved]
                return torch.autograd.grad(outputs, inputs, vectors, retain_graph=keep, allow_unused=True)

            def hessian(vector):
                return [torch.zeros_like(p) if h is None else h for h, p in zip(vector_product(theta, vector, True), theta)]

            mixed = vector_product(problem.hyperparameters, solve(hessian, gradient), False)
        grads = problem.assemble([direct, [None if m is None else -m for m in mixed]])
        return plain(grads, val, loss.detach().reshape(1))


@contextmanager
def twice_differentiable():
    """A block in which PyTorch's second derivatives are right, or an error.

    RuntimeError where a function is marked once_differentiable: by inputs that are named, autograd leaves its part of the second
    derivative out without a word.
    """
    try:
        with _changed:
            yield
    except RuntimeError as error:
        for words, what in NO_DOUBLE_BACKWARD:
            if words in str(error):
                what = what.format(error=error)
                raise RuntimeError(f"double backward through {what}. EvoGrad and guided need first derivatives alone") from error
        raise


COMPILED = "a compiled model, which PyTorch has not; take it uncompiled, as mixed mode does"
NESTED = "a nested tensor, which PyTorch has not; take its parts before the first layer (unbind())"
MISSING = "which PyTorch has not ({error})"
NO_DOUBLE_BACKWARD = (  # words of PyTorch's error, and what it means
    ("donated buffers", COMPILED),
    ("does not currently support double backward", COMPILED),
    ("output of a function that returns multiple views", NESTED),
    ("_nested_from_padded_tensor", NESTED),
    ("derivative for aten::_scaled_dot_product", f"fused attention, {MISSING}; take it within sdpa_kernel(SDPBackend.MATH)"),
    ("derivative for aten::", f"an operation, {MISSING}"),
)


_delayed = torch._C._functions.DelayedError


def _refuse(message: bytes | str, n: int):
    if "once_differentiable" not in str(message):  # Dynamo makes such nodes too
        return _delayed(message, n)
    raise RuntimeError(
        "double backward through an autograd.Function that is marked once_differentiable. EvoGrad and guided need first "
        "derivatives alone, mixed mode the function's jvp"
    )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm, whose own second derivative takes the norms for constants, in operations that have a right one."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_changed = Shared(
    lambda: replaced(
        (torch._C._functions, "DelayedError", _refuse),
        (torch, "_weight_norm", _weight_norm),
        (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", _weight_norm),
    )
)


def training_loss(problem: Problem, model: nn.Module | None = None) -> Tensor:
    """ℓ_T, to be differentiated twice; NotImplementedError for a weight norm that TorchScript computes, and has no right one."""
    closure = problem.train_loss
    loss = problem.scalar(closure, closure(problem.model if model is None else model))
    made = nodes([loss.grad_fn]) if loss.requires_grad and scripted(problem.model) else ()
    if any(node.name().startswith("WeightNormInterface") for node in made):
        raise NotImplementedError(
            "double backward through torch._weight_norm in TorchScript, whose second derivative in PyTorch is wrong; take the "
            "module unscripted, or use evograd.guided, which needs first derivatives alone"
        )
    return loss


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()
