"""T1–T2 hypergradients without double backward: forward mode along the validation gradient, then one backward pass to λ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .noise import Layout
from .problem import Closure, Hypergradient, Parameters, Problem, check_finite, check_positive, estimator, partial
from .recomputation import not_recomputed

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
    layout = Layout(problem.theta)
    with problem.undisturbed():
        draws = problem.draws.state() if isinstance(lookahead, str) else None
        val, direct, flats = problem.val_gradient(layout, problem.lookahead(layout, lookahead, inner_lr))
        gradient = layout.named(flats)

        def loss_at(theta: dict[str, Tensor]) -> Tensor:
            with problem.holding(theta):
                return problem.evaluate(train_loss)

        # torch.func.jvp, not forward_ad's dual numbers: these overwrite log_softmax's values, which the backward pass needs.
        with problem.draws.replay(draws), PlainNormalization(), not_recomputed():
            try:
                loss, slope = torch.func.jvp(loss_at, (problem.theta,), (gradient,))
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
        check_finite(losses, val, grads)
    return Hypergradient(grads, val, losses, torch.ones_like(losses))


class PlainNormalization(TorchFunctionMode):
    """Within it, normalisation by a batch's, instance's or layer's own statistics is written out in plain operations.

    PyTorch's forward-mode formulas of batch_norm and layer_norm take the statistics that they save as constants of the
    backward pass, so a derivative in reverse mode of one in forward mode is silently wrong where λ enters before them
    (pytorch issue 196699). Where λ enters after them they stay as they are. Running statistics are not updated: the model
    runs on copies that are thrown away.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain = _PLAIN.get(function)
        if plain:
            in_a_graph = any(_in_a_graph(value) for value in (*args, *kwargs.values()))
            result = plain(_written_out if in_a_graph else _Lean.apply, *args, **kwargs)
            if result is not None:
                return result
        return function(*args, **kwargs)


def _in_a_graph(value) -> bool:
    """Whether reverse mode will go through this tensor. Inside of torch.func.jvp it is wrapped, and says no itself."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return isinstance(value, Tensor) and value.requires_grad


def _batch_norm(formula, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training and running_mean is not None:
        return None  # statistics that are constants: PyTorch's own formula is right
    return formula(x, [0, *range(2, x.ndim)], eps, *(_by_channel(p, x) for p in (weight, bias)))


def _instance_norm(
    formula, x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return None
    return formula(x, list(range(2, x.ndim)), eps, *(_by_channel(p, x) for p in (weight, bias)))


def _layer_norm(formula, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    return formula(x, list(range(-len(normalized_shape), 0)), eps, weight, bias)


_PLAIN = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm, F.layer_norm: _layer_norm}


def _by_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(1, -1, *[1] * (x.ndim - 2))


def _written_out(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias. Of x's size, autograd keeps x − mean and its tangent, and nothing else."""
    centred = x - x.mean(dims, keepdim=True)
    scale = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None and weight.shape[0] == 1:  # one number a channel; a layer's are of x's own size
        scale, weight = scale * weight, None
    y = centred * scale
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


class _Lean(torch.autograd.Function):
    """The same where no graph to λ passes: forward mode alone, with one tensor of x's size beside values and tangents.

    PyTorch's own formula makes up to nine of them, and a network's first normalisation may be its largest tensor.
    """

    @staticmethod
    def forward(x, dims, eps, weight, bias):
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        y = x.sub(mean).mul_((var + eps).rsqrt())
        y = y if weight is None else y.mul_(weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dims, ctx.eps, weight, _ = inputs
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx, x_t, _dims, _eps, weight_t, bias_t):
        """With d = x − mean and s = 1/√(var + eps): (s (x' − mean') − s³ d ⟨d, x'⟩ / n) · weight + s d · weight' + bias'."""
        x, weight = ctx.saved_tensors
        var, mean = torch.var_mean(x, ctx.dims, correction=0, keepdim=True)
        scale, centred = (var + ctx.eps).rsqrt(), x - mean
        y_t = x_t * scale
        y_t.addcmul_(centred, (centred * x_t).mean(ctx.dims, keepdim=True) * scale**3, value=-1)
        y_t.sub_(x_t.mean(ctx.dims, keepdim=True) * scale)
        if weight is not None:
            y_t.mul_(weight)
            if weight_t is not None:
                y_t.addcmul_(centred.mul_(scale), weight_t)
        return y_t if bias_t is None else y_t.add_(bias_t)
