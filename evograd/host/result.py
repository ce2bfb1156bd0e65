"""What every estimator returns, and how it is looked at before it does: finite, resolved, in digits enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import capturing, warn

APART = 8  # by fewer eps, and a difference is rounding in good part
ANOTHER = 0.05  # by how much a loss, and its gradient by λ, may both change to θ's neighbours
UNRESOLVED = (
    "hyperparameters[{i}]: the gradients of two candidates by it differ by {apart:.2g} eps of {dtype}, so that the estimate for "
    "it is rounding in large part, if it acts on the parameters at all. Candidates further apart (guided: radius, hypergradient: "
    "sigma), losses and hyperparameters in more digits, or evograd.mixed_mode, which takes no difference, resolve it"
)
FLUSHED = (
    "hyperparameters[{i}] is float16, which has few numbers or none of the size of its gradient (at most {value:.2g}): keep it "
    "in float32, or scale val_loss"
)
EXPLAINED = (  # words of PyTorch's error, and what it means
    (
        "nference tensor",
        "a loss uses tensors that were made in torch.inference_mode, and autograd cannot: clone() them outside of it, or make them "
        "under torch.no_grad",
    ),
    (
        "backward through the graph a second time",
        "a loss goes back through a graph that was made outside of it, and is gone after the first pass, or it calls backward() "
        "itself: compute what depends on λ within the loss; guided and hypergradient have strategy='retain' for graphs from outside",
    ),
)
_resolved = WeakTensorKeyDictionary()  # λ: settings with which it has been seen resolved


class NotFinite(RuntimeError):
    """A loss is NaN or infinite."""


@dataclass(frozen=True)
class Hypergradient:
    """What every estimator returns.

    grads: dℓ_V/dλ, one tensor for each hyperparameter, of its shape.
    val_loss: (), ℓ_V where the estimator took it (merged, lookahead or unrolled parameters).
    candidate_losses: (K,), ℓ_T of each candidate; (1,), ℓ_T(θ), for the estimators that have none; (2,) for guided pairs.
    weights: (K,), softmax(−ℓ/τ); equal ones for the estimators that have none.
    curvature: of a guided pair, ‖g₊ + g₋ − 2g₀‖ / ‖g₊ − g₋‖ of its gradients by λ, see `evograd.radius`; None where it is not known.
    """

    grads: list[Tensor]
    val_loss: Tensor
    candidate_losses: Tensor
    weights: Tensor
    curvature: float | None = None


def estimator(function: Callable[..., Hypergradient]) -> Callable[..., Hypergradient]:
    """Gradients are taken, whatever mode the caller is in: torch.no_grad, torch.inference_mode."""

    @wraps(function)
    def taken(*args, **settings) -> Hypergradient:
        if isinstance(rate := settings.get("inner_lr"), Tensor) and rate.numel() == 1:  # of a schedule
            settings["inner_lr"] = rate.item()
        with torch.inference_mode(False), torch.enable_grad():
            try:
                return function(*args, **settings)
            except RuntimeError as error:
                for words, what in EXPLAINED:
                    if words in str(error):
                        raise RuntimeError(what) from error
                raise

    return taken


def plain(grads: list[Tensor], val: Tensor, losses: Tensor) -> Hypergradient:
    """The result of an estimator that weighs no candidates, once it was looked at."""
    check_finite(losses, val, grads)
    return Hypergradient(grads, val, losses, torch.full_like(losses, 1 / len(losses)))


def looked_at(result: Hypergradient, problem, evaluation, candidates) -> Hypergradient:
    """The result of an estimator that takes differences: an error or a warning where these are not finite, or are rounding.

    One host synchronisation, at the end of the step.
    """
    known = all(candidates.settings in _resolved.get(h, ()) for h in problem.hyperparameters)
    two = [] if known or problem.precision.low or candidates.tells_apart is False else evaluation.first_two()
    apart = problem.lam.apart(*two, candidates.tells_apart) if two else []
    also = [*apart, *candidates.numbers]
    losses, values = check_finite(result.candidate_losses, result.val_loss, result.grads, also, candidates.before)
    candidates.read(values[len(apart) :])
    if candidates.found or candidates.last:
        if (i := _unresolved(problem.hyperparameters, values[: len(apart)], candidates.settings)) is not None:
            warn(UNRESOLVED.format(i=i, apart=values[i], dtype=problem.hyperparameters[i].dtype))
        if not isinstance(result.val_loss, FakeTensor):
            candidates.check(problem.precision, losses)
    curvature = None if math.isnan(candidates.curvature) else candidates.curvature
    return replace(result, curvature=curvature)


def _unresolved(hyperparameters: Sequence[Tensor], apart: Sequence[float], settings: tuple) -> int | None:
    """The first λ on whose gradients two candidates have never differed by APART eps with these settings, by `Vector.apart`.

    One that they did differ on once may come near zero where λ is near its best; that is no fault.
    """
    found = None
    for i, (h, value) in enumerate(zip(hyperparameters, apart)):
        if value >= APART:
            _resolved.setdefault(h, set()).add(settings)
        elif found is None and settings not in _resolved.get(h, ()):
            found = i
    return found


def check_finite(
    train_losses: Tensor, val_loss: Tensor, grads: Sequence[Tensor], also: Sequence[Tensor] = (), before: Mapping[str, Tensor | None] = {}  # noqa: B006
) -> tuple[dict[str, float], list[float]]:
    """(losses by name, also) on the host; NotFinite, a RuntimeError, if a loss or a gradient is NaN or infinite. The one host
    synchronisation of a step, at its end.

    also: other numbers, which come along.  before: losses that came before the candidates, by name; None for val_loss.
    """
    if isinstance(val_loss, FakeTensor) or capturing(val_loss):
        return {}, []
    some = [g for g in grads if g.numel()]
    largest = torch._foreach_norm(some, math.inf) if some else []
    n = len(train_losses)
    others = [loss for loss in before.values() if loss is not None]
    numbers = torch.stack([v.to(train_losses) for v in (val_loss, *largest, *others, *also)])
    values = torch.cat([train_losses, numbers]).tolist()
    end = len(values) - len(also) - len(others)
    first = iter(values[end:])
    losses = {name: values[n] if loss is None else next(first) for name, loss in before.items()}
    losses |= {f"train_loss of candidate {k}": value for k, value in enumerate(values[:n])}
    losses.setdefault("val_loss", values[n])
    for which, value in losses.items():
        if not math.isfinite(value):
            raise NotFinite(f"{which} is {value}; a finite loss is needed (candidates: {values[:n]}, validation: {values[n]})")
    for i, (value, dtype) in enumerate(zip(values[n + 1 : end], [g.dtype for g in grads if g.numel()])):
        if dtype == torch.float16 and value < torch.finfo(dtype).tiny:
            warn(FLUSHED.format(i=i, value=value))
        if not math.isfinite(value):
            raise NotFinite(
                f"the gradient by hyperparameters[{i}] is not finite, although the losses are: an operation has no "
                "finite derivative where it was taken (a root or a norm at zero, say), or a loss is another one each time it is "
                "evaluated, by draws or by data (evograd.check tells)"
            )
    return losses, values[end + len(others) :]
