"""T1–T2 hypergradients without double backward: forward mode along the validation gradient, then one backward pass to λ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from .host.checks import Closure, Parameters, check_lookahead, check_rate
from .host.draws import Occasions
from .host.gathering import partial
from .host.problem import Problem
from .host.result import Hypergradient, estimator, plain
from .operations.forward_mode import directional, explained
from .operations.recomputation import not_recomputed

# torch.func.jvp scripts its own formulas at its first call, and warns of that.
warnings.filterwarnings(
    "ignore", message=".torch.jit.script. is deprecated", category=FutureWarning, module=r"torch\.jit\._script"
)


@estimator
def mixed_mode(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    parameters: Parameters = None,
    lookahead: Parameters | str = "sgd",
) -> Hypergradient:
    """The exact hypergradient through one SGD step of `inner_lr` (η), the limit of guided EvoGrad as its radius goes to 0:

        dℓ_V/dλ = ∂ℓ_V/∂λ − η ∂/∂λ ⟨∇_θ ℓ_T(θ, λ), G⟩,   G = ∂ℓ_V/∂θ at the lookahead parameters

    The directional derivative in the brackets is one pass of train_loss in forward mode along G; it is then differentiated
    by λ in reverse mode. Where λ enters after the network (sample weights, say) the network itself needs no graph.
    By default G is taken at θ − η ∇ℓ_T(θ, λ), and the result is the T1–T2 hypergradient of `evograd.baselines.unrolled` to
    rounding, random draws included. Relative: MixFlow-MG, Kemaev et al., ICML 2025, arXiv
    2505.00793.

    Where PyTorch's formulas of forward mode are wrong under reverse mode (batch, layer and instance norm; solve, det, eigh and
    other linear algebra; cumulative products and log-sums) or missing (glu, packed sequences, fused RNNs), others are used:
    `evograd.operations.forward_mode.ROWS` lists them. The same past Python (in TorchScript, torch.native_layer_norm) with λ
    before it, dropout in TorchScript, operations without any formula (cdist, grid_sample, fused attention), and what forward
    mode cannot see through (an autograd.Function without a jvp, tensor.data = ...) are refused by name. Gradients by inputs
    that train_loss takes itself (torch.autograd.grad, of any order) are followed; its gradients by the parameters are for
    `unrolled`.

    Args:
        train_loss, val_loss, model, hyperparameters, parameters: as in `evograd.hypergradient`.
        inner_lr: η > 0.
        lookahead: where G is taken, as in `evograd.guided`: "sgd" (the default), named parameters, or None for θ itself.

    Returns:
        Hypergradient; its `candidate_losses` is ℓ_T(θ, λ), of shape (1,).

    Raises:
        ValueError, TypeError, RuntimeError: as in `evograd.hypergradient`; NotImplementedError for what train_loss
            does that cannot be taken in forward mode.
    """
    check_rate(inner_lr)
    check_lookahead(lookahead)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    # train_loss draws first, as in training, though its pass is the last one
    occasions = Occasions(problem.draws, {} if lookahead == "sgd" else {"train": problem.draws.state()})

    def train_gradient() -> list[Tensor | None]:
        with occasions.first("train"):
            return problem.gradient_of(train_loss, [problem.theta])[-1]

    def loss_at(theta: dict[str, Tensor]) -> Tensor:
        with problem.holding(theta):
            return problem.evaluate(train_loss)

    with problem.undisturbed():
        ahead = problem.lookahead(lookahead, inner_lr, train_gradient)
        val, direct, gradient = problem.val_gradient(ahead)
        with occasions.of("train"), not_recomputed(), explained():
            # ⟨∇_θ ℓ_T, G⟩ by one pass in forward mode, then its gradient by λ in reverse mode
            loss, slope = directional(loss_at, problem.theta, problem.layout.named(gradient), model)
            mixed = partial(slope, problem.hyperparameters)
        grads = problem.assemble([direct, [None if g is None else -inner_lr * g for g in mixed]])
        return plain(grads, val, loss.detach().reshape(1))
