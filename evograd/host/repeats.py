"""Whether a loss is the same one each time it is evaluated, as every estimator takes it to be."""

from __future__ import annotations

import math

import torch

from ..operations.forward_mode import leaves
from .problem import Problem
from .slots import clones


class Unfit(RuntimeError):
    """A loss that no estimator can take as it is."""


NOT_AGAIN = (
    "when it is evaluated again at the same parameters, with the same draws of torch: it draws by another generator (NumPy's, "
    "random, a loader's iterator), or keeps something between calls that is no buffer of a module (a counter, a cache, a teacher "
    "that it updates). Each candidate would have another loss: do that outside of it"
)
NOT_WITH_GRAPH = (
    "where a graph is made for the parameters: it asks whether what the model computes requires grad (h.requires_grad), which it "
    "does not at a candidate of EvoGrad or guided; ask torch.is_grad_enabled() or model.training, or take evograd.mixed_mode"
)
NOTHING = (
    "depends on none of the parameters of the model that it is given: it is computed on another model, under torch.no_grad, or by "
    "what has no derivative (an accuracy)"
)


def check_repeats(problem: Problem) -> None:
    """Unfit, a RuntimeError, if a loss has another value when it is evaluated again, at θ with the same draws: first without a
    graph for θ, as at a candidate, then with one, as in training; or if it depends on nothing that it should.

    RuntimeError if it has written into a tensor beside the model, be it where autograd does not count (F.batch_norm).
    """
    eps, beside = problem.precision.eps, problem.reach.tensors
    limits = (16 * eps, NOT_AGAIN), (eps**0.5, NOT_WITH_GRAPH)  # there kernels may differ
    with problem.undisturbed():
        before = clones(list(beside.values()))
        for closure in (problem.train_loss, problem.val_loss):
            state, values = problem.draws.state(), []
            for _ in range(2):
                with problem.draws.replay(state), problem.at([problem.theta]):
                    values.append(problem.evaluate(closure).item())
            ours, block = problem.differentiable([problem.theta])
            with problem.draws.replay(state), block:
                loss = problem.evaluate(closure)
            values.append(loss.item())
            if not math.isfinite(values[0]):
                raise Unfit(f"{problem.which(closure)} is {values[0]}; a finite loss is needed")
            for other, (limit, why) in zip(values[1:], limits):
                if abs(values[0] - other) > limit * max(abs(values[0]), abs(other)):
                    raise Unfit(f"{problem.which(closure)} is {values[0]!r}, and {other!r} {why}")
            wanted = [*ours.values(), *(problem.hyperparameters if closure is problem.val_loss else ())]
            found = {id(leaf) for leaf in leaves(loss.grad_fn)} if loss.grad_fn is not None else set()
            plain = not problem.sharding and all(h.is_leaf for h in problem.hyperparameters)
            if plain and found.isdisjoint(map(id, wanted)):
                raise Unfit(f"{problem.which(closure)} {NOTHING}")
        problem.check_beside([name for (name, t), was in zip(beside.items(), before) if _differs(t, was)])


def _differs(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    dense = tensor.layout is torch.strided and (tensor.is_floating_point() or tensor.is_complex())
    return dense and not torch.allclose(tensor, before, rtol=0, atol=0, equal_nan=True)
