"""Products of a training loss's second derivatives with a vector, (∂²ℓ/∂λ∂θ u, ∂²ℓ/∂θ² u) at θ: by passes, or exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .baselines import training_loss, twice_differentiable
from .guided import MEASURED, Side, measured, pairs
from .host import processes
from .host.gathering import partial
from .host.problem import Problem
from .host.steps import Gradients, Step
from .host.vectors import Vector, exactly, parity
from .operations.forward_mode import directional, explained
from .operations.recomputation import not_recomputed
from .radius import Radius

Moves = Sequence[tuple[str, int]]


class Products(NamedTuple):
    """by_theta: a flat tensor for each bucket; None where it was not wanted."""

    by_lambda: Vector.Flat
    by_theta: list[Tensor] | None


class ByPasses:
    """By first-order passes alone: one or two at θ + r u/‖u‖ and θ − r u/‖u‖, with the draws and the kinks of θ's own.

    sides: 2, a central difference; or 1, with the gradients at θ that the training step has left. That side is + and − in turns,
    so that errors of O(r) from step to step take each other away, and a pair now and then shows how good the radius is.
    radius: r, or a `Radius`.
    """

    def __init__(self, problem: Problem, sides: int, radius: float | Radius):
        self.problem = problem
        self.fixed, self.radius = (None, radius) if isinstance(radius, Radius) else (radius, Radius())
        self.sides = 2 if problem.precision.low else sides
        self.curvature, self.eps = None, max(problem.precision.eps, problem.lam.eps)
        self.changes: list[Tensor] = []  # of ℓ and of ∂ℓ/∂λ from θ to its neighbours, over their sizes, step by step
        self.by_both: list[bool] = []  # whether they are means over both sides

    def __call__(self, step: Step, u: list[Tensor], whole: bool, team: processes.Alone) -> Products:
        """whole: whether ∂²ℓ/∂θ² u is wanted.  The list u may be emptied on the way."""
        due = self.fixed is None and self.radius.due()
        both = due or self.sides == 2 or not step.exact
        again = [("mean", 0)] * whole if due and not step.exact else []
        of_pair = [("mean", 0), ("mean", 0), ("over_shards", 3)] if whole else [("gather", 3)]
        team.again([*again, *MEASURED, *(of_pair if both else [("mean", 0)] * whole)])
        if again:
            step.at_theta = self._at_theta(step, whole, team)
        return self._by_pairs(step, u, whole, team, of_pair) if both else self._by_side(step, u, whole, team)

    def _by_side(self, step: Step, u: list[Tensor], whole: bool, team: processes.Alone) -> Products:
        size, scale = measured(self.problem, u, team)
        r = self.fixed or self.radius.value * scale
        side, k = Side(self.problem, step, u, size, r, self.fixed, True), step.t % 2
        c, known = side.coefficients(step.loss), step.at_theta
        by_theta: list[Tensor] = [None] * len(u)

        def take(b: int, flat: Tensor) -> None:
            by_theta[b] = known.by_theta[b].sub_(flat).mul_(-c[k])  # in the memory of ∇ℓ_t, which has served

        loss, by_lambda = step.gradients(self.problem, side.position(k), team, take if whole else None)
        self._note(step, [loss], [by_lambda])
        by_lambda = self.problem.lam.weighted_sum(torch.stack([c[k], -c[k]]), [by_lambda, known.by_lambda])
        return Products(by_lambda, by_theta if whole else None)

    def _by_pairs(self, step: Step, u: list[Tensor], whole: bool, team: processes.Alone, moves: Moves) -> Products:
        retakes = self.radius.retakes
        for pair in pairs(self.problem, step, list(u), lambda: list(u), self.fixed or self.radius, team, moves):
            c, known = pair.coefficients(step.loss), step.at_theta
            by_theta: list[Tensor] = [None] * len(u)
            squares = []

            def subtract(b: int, flat: Tensor, by_theta=by_theta, c=c, known=known, squares=squares) -> None:
                squares.append(parity([by_theta[b]], [flat], known and [known.by_theta[b]]))
                by_theta[b] = torch.sub(by_theta[b], flat).mul_(c[0])

            passes = (by_theta.__setitem__, subtract) if whole else (None, None)
            found = [step.gradients(self.problem, pair.position(k), team, passes[k]) for k in (0, 1)]
            losses, partials = zip(*found)
            lam = self.problem.lam  # e of the gradients by θ, which are many; of those by λ where there are no others
            pair.see(team.over_shards(sum(squares)) if whole else team.gather(lam.parity(*partials, step.known)))
            pair.read(torch.stack(pair.numbers).tolist())
        self._note(step, losses, partials)
        self.radius.judged(pair.curvature, self.radius.retakes > retakes, self.eps)
        if not math.isnan(pair.curvature):
            self.curvature = pair.curvature
        return Products(lam.weighted_sum(c, partials), by_theta if whole else None)

    def distrust(self) -> None:
        """The radius was wrong by far: pairs come next."""
        self.radius.run = 0

    def _note(self, step: Step, losses: Sequence[Tensor], partials: Sequence[Vector.Flat]) -> None:
        """How far the loss and its gradient by λ beside θ, means over both sides, are from those of the training step."""
        change = torch.zeros(2, device=step.loss.device)
        if step.known is not None and all(flat.vectors is not None for flat in (*partials, step.known)):
            even, _, at = self.problem.lam.parity(partials[0], partials[-1], step.known).sqrt()
            loss = (sum(losses) / len(losses) - step.loss).abs() / step.loss.abs()
            change = torch.stack([loss.to(even), even / (2 * at)])
        self.changes.append(change)
        self.by_both.append(len(losses) == 2)

    def _at_theta(self, step: Step, whole: bool, team: processes.Alone) -> Gradients:
        """In all digits, where the training step had few."""
        by_theta: list[Tensor] = [None] * len(step.theta)
        take = by_theta.__setitem__ if whole else None
        return Gradients(*step.gradients(self.problem, self.problem.layout.own, team, take), by_theta)


class Exactly:
    """By differentiating twice: the references, which are dearer, and which do not take every model."""

    curvature, changes, by_both, eps = None, (), (), 0.0

    def __init__(self, problem: Problem, *_):
        self.problem = problem

    def __call__(self, step: Step, u: list[Tensor], whole: bool, team: processes.Alone) -> Products:
        team.again([("mean", 0)] * whole)
        problem, made = self.problem, []
        theta = {name: t.detach().requires_grad_() for part in problem.layout.own for name, t in part.items()}
        for one in step.passes:
            problem.train_loss = one
            inputs = [*problem.hyperparameters, *(theta.values() if whole else ())]
            with one.again():
                loss, grads = self.differentiated(theta, problem.layout.named(u), inputs)
            n = len(problem.hyperparameters)
            made.append((problem.lam.flat(grads[:n]), problem.layout.flats(dict(zip(theta, grads[n:])))))
        by_lambda, by_theta = zip(*made)
        share = exactly(torch.ones(len(made), device=loss.device)) / len(made)
        by_theta = [mean_of(flats) for flats in zip(*by_theta)] if whole else None
        return Products(problem.lam.weighted_sum(share, by_lambda), team.mean(problem.whole(by_theta)) if whole else None)


class ByForwardMode(Exactly):
    """⟨∇_θ ℓ, u⟩ by one pass in forward mode, then its gradient in reverse mode."""

    def differentiated(self, theta: dict[str, Tensor], u: dict[str, Tensor], inputs: list[Tensor]):
        def loss_at(theta: dict[str, Tensor]) -> Tensor:
            with self.problem.holding(theta):
                return self.problem.evaluate(self.problem.train_loss)

        with not_recomputed(), explained():
            loss, slope = directional(loss_at, theta, u, self.problem.model)
            return loss, partial(slope, inputs)


class ByDoubleBackward(Exactly):
    """∇_θ ℓ with a graph, whose product with u is differentiated again."""

    def differentiated(self, theta: dict[str, Tensor], u: dict[str, Tensor], inputs: list[Tensor]):
        with twice_differentiable(), self.problem.holding(theta):
            loss = training_loss(self.problem)
            slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
            product = sum((s * u[name]).sum() for name, s in zip(theta, slopes) if s is not None)
            return loss, partial(product, inputs)


def mean_of(flats: Sequence[Tensor | None]) -> Tensor | None:
    found = [flat for flat in flats if flat is not None]
    return sum(found[1:], found[0]) / len(flats) if found else None


WAYS = {"guided": ByPasses, "mixed_mode": ByForwardMode, "unrolled": ByDoubleBackward}
