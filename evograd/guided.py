"""T1–T2 by a difference: two passes of the training loss, on either side of θ along the validation gradient.

Relatives: DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055), SAMA (Choe et al., NeurIPS 2023), guided evolution
strategies (Maheswaranathan et al., ICML 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .evaluation import STRATEGIES, evaluation_by, in_place
from .host import processes
from .host.checks import Closure, Parameters, check_choice, check_differences, check_lookahead, check_positive
from .host.draws import Occasions
from .host.precision import Precision
from .host.problem import Problem
from .host.result import Hypergradient, estimator, looked_at
from .host.vectors import Position
from .operations.kinks import Kinks, OwnKinks

RADIUS = 3e-6  # over the norm of θ: where kinks are shared and in float32, small and large networks are right


@estimator
def guided(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    parameters: Parameters = None,
    lookahead: Parameters | str = None,
    radius: float | None = None,
    share_kinks: bool = True,
    strategy: str | None = None,
    group: dist.ProcessGroup | None = None,
    share: str | None = None,
) -> Hypergradient:
    """The hypergradient through one SGD step of `inner_lr` (η), T1–T2, by a central difference of first-order gradients:

        dℓ_V/dλ = ∂ℓ_V/∂λ − η ∂²ℓ_T/∂λ∂θ G  ≈  ∂ℓ_V/∂λ − η ‖G‖ (∂ℓ_T(θ⁺, λ)/∂λ − ∂ℓ_T(θ⁻, λ)/∂λ) / 2r
        θ^± = θ ± r G/‖G‖,   G = ∂ℓ_V/∂θ at the lookahead parameters

    These are EvoGrad's four moves with two candidates along G in place of random ones, where the softmax is linear. Both draw the
    same random numbers. In a network of P parameters a random direction has a P-th of G in it; this one has all of it.

    Args:
        train_loss, val_loss, model, hyperparameters, parameters: as in `evograd.hypergradient`.
        inner_lr: η > 0.
        lookahead: where G is taken: named parameters (those after the training step, say), "sgd" for one SGD step of inner_lr on
            train_loss from θ (one more pass, with the random draws of the candidates), or None for θ itself. See "Lookahead" in
            evograd/README.md.
        radius: r > 0. Default: 3e-6 ‖θ‖, which float32 resolves; in lower precision half of its eps times ‖θ‖ (bfloat16: 0.004
            ‖θ‖), and 4 eps where θ is less than half of the parameters (adapters).
        share_kinks: let both candidates run with one activation pattern, see `evograd.operations.kinks`. A difference counts the
            jumps of ∂ℓ_T/∂λ where a ReLU or the maximum of a pool changes sides between the two, and T1–T2 does not.
        strategy: "stream", "in_place" or "retain", as in `evograd.hypergradient`.
        group, share: a process group, each of whose processes has closures that are means over its own part of the batch
            (share="batch", the only one there is). G is averaged, as gradients are in training. Default: this process alone, or,
            with a sharded model, the processes that hold its shards.

    Returns:
        Hypergradient; its `candidate_losses` are ℓ_T(θ⁺, λ) and ℓ_T(θ⁻, λ).

    Raises:
        ValueError, TypeError, RuntimeError: as in `evograd.hypergradient`; also a radius that the losses' precision does not resolve.

    What train_loss detaches, and depends on θ, is a constant to T1–T2 but differs between candidates: compute it once, at θ, and
    hand it to all of them (the input of label noise's weight net, that of MetaXL's transformation).
    """
    _check(inner_lr, radius, lookahead, strategy)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters, in_place(strategy))
    check_differences(problem.theta)
    processes.check(problem, group, share)
    processes.check_batch(problem, group, share)
    kinks = Kinks() if share_kinks else OwnKinks()

    sharing = processes.team(problem, group, "batch", 2, ("mean",) * (1 + (lookahead == "sgd")) + ("norms", "gather"))
    with problem.undisturbed(), problem.precision.watched(), sharing as team:
        occasions = team.occasions(lambda: 0)
        ahead = problem.lookahead(lookahead, inner_lr, as_the_pair(occasions, kinks), team.mean)
        val, direct, gradient = problem.val_gradient(ahead)
        gradient = team.mean(gradient)

        pair = Pair(problem, gradient, team.norms, radius, kinks)
        evaluation = evaluation_by(strategy)(problem, pair, team.candidates, occasions)
        losses = team.gather(evaluation.losses())
        mixed = evaluation.gradient(-inner_lr * pair.coefficients(losses))  # −η ∂²ℓ_T/∂λ∂θ G
        val, total = team.total(val, problem.lam.flat(direct), mixed)
        result = Hypergradient(problem.grads(total), val, losses, torch.full_like(losses, 1 / 2))
        return looked_at(result, problem, evaluation, pair)


@contextmanager
def as_the_pair(occasions: Occasions, kinks: Kinks | OwnKinks) -> Iterator[None]:
    """A pass at θ, which draws what the pair draws, and whose pattern the pair takes."""
    with occasions.of(0, again=True), kinks.shared():
        yield


class Pair:
    """Two candidates θ ± r v/‖v‖, whose difference is a derivative along v: the one place where passes are subtracted.

    direction: v, bucket by bucket. Candidates in place need it for the first of them alone: the model holds the step then, and
    the second takes it from there.  norms: of several vectors at once.
    """

    tells_apart: bool | Tensor

    def __init__(
        self,
        problem: Problem,
        direction: list[Tensor | None],
        norms: Callable[..., list[Tensor]],
        radius: float | None,
        kinks: Kinks | OwnKinks,
    ):
        self.layout, self.place, self.kinks = problem.layout, problem.place, kinks
        self.direction, self.held = direction, 0  # held: the sign of the step that the model holds
        self.norm, self.size = norms(direction, self.layout.tensors)  # of v and θ
        self.settings, self.val_first = ("guided", radius), True
        self.tells_apart = self.norm > 0
        self.relative = max(RADIUS, problem.precision.radius) if radius is None else None
        if radius is None:
            self.radius = self.relative * torch.where(self.size > 0, self.size, 1)
        else:
            self.radius = torch.full_like(self.norm, radius)
        self.step = torch.where(self.norm > 0, self.radius / self.norm, 0)  # without a direction candidates are θ itself

    def position(self, k: int) -> Position:
        sign = 1 - 2 * k
        for b, bucket in enumerate(self.layout.buckets):
            if self.held:
                flat = self.place.displacement(bucket).mul_(self.held * sign)
            else:
                flat, direction = bucket.empty(), self.direction[b]
                torch.mul(direction, (sign * self.step).to(direction), out=flat[: direction.numel()])
                if self.place is not None:
                    self.direction[b] = direction = None
            yield bucket.moved(flat)
            del flat
        if self.place is not None:
            self.held = sign

    def alike(self, k: int) -> int:
        return 0

    def pattern(self, k: int) -> AbstractContextManager:
        return self.kinks.shared()

    def coefficients(self, like: Tensor) -> Tensor:
        """(2,): Σ_k c_k g(θ_k) is the derivative of g along v, by a central difference."""
        size = (self.norm / (2 * self.radius)).to(like)
        return torch.stack([size, -size])

    def check_digits(self, precision: Precision) -> None:
        """Errors where the two of a pair are so close that their difference is rounding."""
        if not precision.low:
            return
        if self.relative is not None and self.relative < precision.radius:
            raise RuntimeError(
                f"train_loss is computed in {precision.dtype}, and val_loss in more digits, by which the radius was chosen; "
                f"give radius={precision.radius * self.size.item():.2g}, or let both run in the same"
            )
        given, least = self.radius.item(), precision.eps / 4 * self.size.item()
        if self.relative is None and given < least:
            raise ValueError(
                f"radius={given:.2g} is not resolved by {precision.dtype}, in which losses are computed: at least {least:.2g} "
                "is needed for parameters of this norm; radius=None chooses one"
            )


def _check(inner_lr: float, radius: float | None, lookahead: Parameters | str, strategy: str | None) -> None:
    check_positive("inner_lr", inner_lr)
    if radius is not None:
        check_positive("radius", radius)
    check_lookahead(lookahead)
    if strategy == "vmap":
        raise ValueError(
            "strategy='vmap' evaluates candidates at once, but the two of a guided pair run one after the other, since they "
            "share their kinks; accepted are 'stream', 'in_place' and 'retain'"
        )
    check_choice("strategy", strategy, STRATEGIES)
