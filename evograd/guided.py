"""T1–T2 by a difference: two passes of the training loss, on either side of θ along the validation gradient.

Relatives: DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055), SAMA (Choe et al., NeurIPS 2023), guided evolution
strategies (Maheswaranathan et al., ICML 2019). It is one nudge of Zucchet et al. (Neural Computation 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .evaluation import Stream, in_place
from .host import processes
from .host.checks import Closure, Parameters, check_differences, check_lookahead, check_positive, check_rate, kept, warn
from .host.draws import Occasions
from .host.precision import Precision
from .host.problem import Problem
from .host.result import ANOTHER, Hypergradient, estimator, looked_at
from .host.vectors import Position, Vector, norm, norms
from .operations.kinks import Kinks, OwnKinks
from .radius import RETAKES, Radius, better, is_found, start

STRATEGIES = ("stream", "in_place", "retain")


@estimator
def guided(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    parameters: Parameters = None,
    lookahead: Parameters | str = "sgd",
    radius: float | Radius | None = None,
    share_kinks: bool = True,
    kinks: Kinks | None = None,
    strategy: str | None = None,
    group: dist.ProcessGroup | None = None,
    share: str | None = None,
) -> Hypergradient:
    """The hypergradient through one SGD step of `inner_lr` (η), T1–T2, by a central difference of first-order gradients:

        dℓ_V/dλ = ∂ℓ_V/∂λ − η ∂²ℓ_T/∂λ∂θ G  ≈  ∂ℓ_V/∂λ − η ‖G‖ (∂ℓ_T(θ⁺, λ)/∂λ − ∂ℓ_T(θ⁻, λ)/∂λ) / 2r
        θ^± = θ ± r G/‖G‖,   G = ∂ℓ_V/∂θ at the lookahead parameters

    These are EvoGrad's four moves with two candidates along G in place of random ones, where the softmax is linear. Both draw the
    same random numbers, and both run with the activation pattern of θ: without it a difference counts the jumps of ∂ℓ_T/∂λ where
    a ReLU or the maximum of a pool changes sides between the two, and T1–T2 does not. The difference then tends to T1–T2 as r
    goes to 0, and the radius finds itself (`evograd.radius`): there is nothing to tune.

    Args:
        train_loss, val_loss, model, hyperparameters, parameters: as in `evograd.hypergradient`.
        inner_lr: η > 0.
        lookahead: where G is taken: "sgd" for one SGD step of inner_lr on train_loss from θ, with the random draws of the pair;
            named parameters (those after the training step, say); or None for θ itself, which is cheaper and blind to a step that
            is too long. See "Lookahead" in evograd/README.md. Default: "sgd", T1–T2.
        radius: r > 0; or a `Radius`, which a loop hands to all of its calls. Default: each call begins anew, and takes its pair
            again, twice at most, where the first was far from the best.
        share_kinks: False lets each candidate make its own choices, see `evograd.operations.kinks`.
        kinks: the pattern of θ, recorded around a pass of the same train_loss there (that of the training step, say), where
            lookahead is not "sgd". Default: one more pass of train_loss, without a graph for θ; "sgd" has it for nothing.
        strategy: "stream" or "in_place", as in `evograd.hypergradient`; "retain" keeps graphs, where λ's graph begins outside of
            train_loss and both candidates go back into it.
        group, share: a process group, each of whose processes has closures that are means over its own part of the batch
            (share="batch", the only one there is). G is averaged, as gradients are in training. Default: this process alone, or,
            with a sharded model, the processes that hold its shards.

    Returns:
        Hypergradient; its `candidate_losses` are ℓ_T(θ⁺, λ) and ℓ_T(θ⁻, λ), its `curvature` tells how good the radius was.

    Raises:
        ValueError, TypeError, RuntimeError: as in `evograd.hypergradient`; also a radius that the losses' precision does not
            resolve, and kinks of another pass. A warning tells where no radius resolves the difference.

    What train_loss detaches, or computes under torch.no_grad, is a constant to T1–T2 but differs between candidates where it
    depends on θ: compute it once, at θ, and hand it to all (the input of label noise's weight net, of MetaXL's transformation).
    Straight-through and commitment terms cannot: for these take `evograd.mixed_mode`.
    """
    _check(inner_lr, radius, lookahead, share_kinks, kinks, strategy)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters, in_place(strategy), strategy == "retain")
    check_differences(problem.theta)
    processes.check(problem, group, share)
    processes.check_batch(problem, group, share)

    lookahead = kept(lookahead)
    means = [("mean", 0)] * (2 if lookahead == "sgd" else 1)  # of G, and of the lookahead's gradient
    sharing = processes.team(problem, group, "batch", 2, [*means, *MEASURED, *PAIR])
    with problem.undisturbed(), problem.precision.watched(), sharing as team:
        occasions = team.occasions(lambda: 0)
        at_theta = AtTheta(problem, occasions, kinks or (Kinks() if share_kinks else OwnKinks()))

        def validated() -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
            ahead = problem.lookahead(lookahead, inner_lr, at_theta.gradient, team.mean)
            with occasions.first("validation"):
                val, direct, gradient = problem.val_gradient(ahead)
            return val, direct, team.mean(gradient)

        at_theta.look(needed=lookahead != "sgd")  # while there is no G
        val, direct, gradient = validated()
        again = PAIR if problem.place is None else [*means, *PAIR]
        regained = (lambda: gradient) if problem.place is None else (lambda: validated()[-1])
        for pair in pairs(problem, at_theta, gradient, regained, radius, team, again):
            evaluation = Stream(problem, pair, team.candidates, occasions)
            losses = team.gather(evaluation.losses())
            mixed = evaluation.gradient(-inner_lr * pair.coefficients(losses))  # −η ∂²ℓ_T/∂λ∂θ G
            pair.see(team.gather(problem.lam.parity(*evaluation.partials, at_theta.known)))
            ell, total = team.total(val, problem.lam.flat(direct), mixed)
            result = Hypergradient(problem.grads(total), ell, losses, torch.full_like(losses, 1 / 2))
            result = looked_at(result, problem, evaluation, pair)
        return result


AT_THETA = "train_loss at θ"
MEASURED, PAIR = [("over_shards", 3)], [("gather", 2), ("gather", 3)]  # what is sent of the direction, and of each pair


class AtTheta:
    """A pass of train_loss at θ, which draws what the pair draws: the pattern that both take, and the gradient between theirs.

    known: that gradient, ∂ℓ_T/∂λ; None without a pass.
    """

    def __init__(self, problem: Problem, occasions: Occasions, kinks: Kinks | OwnKinks):
        self.problem, self.occasions, self.kinks = problem, occasions, kinks
        self.known: Vector.Flat | None = None
        self.losses: dict[str, Tensor] = {}

    def gradient(self) -> list[Tensor | None]:
        """∇_θ ℓ_T(θ, λ), of a lookahead by SGD."""
        problem = self.problem
        with self.occasions.of(0, again=True), self.kinks.shared():
            loss, direct, gradient = problem.gradient_of(problem.train_loss, [problem.theta])
        self.known, self.losses = problem.lam.flat(direct), {AT_THETA: loss}
        return gradient

    def look(self, needed: bool) -> None:
        """A pass without a graph for θ, where none is made for the lookahead, and no pattern was handed over.

        Even where there is none, train_loss draws first, as in training.
        """
        problem = self.problem
        with self.occasions.of(0, again=True) if needed else nullcontext():
            if needed and self.kinks.wanted:
                with self.kinks.shared():
                    self.known = problem.lam.flat(problem.partial(problem.train_loss, [problem.theta])[1])


def pairs(
    problem: Problem,
    at_theta: AtTheta,
    direction: list[Tensor | None],
    regained: Callable[[], list[Tensor | None]],
    radius: float | Radius | None,
    team: processes.Alone,
    moves: Sequence[tuple[str, int]],
) -> Iterator[Pair]:
    """A pair along the direction, and others where it has not found its radius.

    regained: gives the direction once more, which a pair in place had to let go.  moves: what is sent for a further pair.
    """
    carried = radius if isinstance(radius, Radius) else Radius()
    fixed = None if radius is carried else radius
    size, scale = measured(problem, direction, team)
    relative, before = carried.value or start(max(problem.precision.eps, problem.lam.eps)), None
    for again in range(RETAKES + 1):
        last = fixed is not None or again == RETAKES
        pair = Pair(problem, at_theta, direction, size, fixed or relative * scale, fixed, last)
        yield pair
        if pair.found or pair.last or math.isnan(pair.apart):
            break
        seen = relative, pair.curvature
        relative, before = better(*seen, pair.apart, pair.eps, before), seen
        carried.retakes += 1
        team.again(moves)
        direction = regained()
    if fixed is None and not math.isnan(pair.apart):
        carried.follow(relative, pair.curvature, pair.apart, pair.eps)


def measured(problem: Problem, direction: Sequence[Tensor], team: processes.Alone) -> tuple[Tensor, Tensor]:
    """(‖v‖, scale of θ as the direction sees it): the mean of ‖θ_i‖ over its tensors, geometric, each by its part of ‖v‖².

    A bias of 1e6, or a large tensor that hardly moves, does not set it.
    """
    layout = problem.layout
    views = [view for bucket, flat in zip(layout.buckets, direction) for view in bucket.views(flat)]
    like = views[0].new_empty((), dtype=torch.promote_types(views[0].dtype, torch.float32))
    of_v, of_theta = (torch.stack([n.to(like) for n in norms(tensors)]) for tensors in (views, layout.tensors))
    part = of_v.square()
    there = part * (of_theta > 0)  # of the norm of a tensor of zeros nothing is learned
    logs = there * of_theta.log().nan_to_num_(neginf=0)
    square, weight, log = team.over_shards(torch.stack([part, there, logs]).sum(1)).unbind()
    mean = log / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return square.sqrt(), mean.exp() * math.exp(problem.shards_in_log)


class Pair:
    """Two candidates θ ± r v/‖v‖, whose difference is a derivative along v: the one place where passes are subtracted.

    direction: v, bucket by bucket. Candidates in place need it for the first of them alone: the model holds the step then, and
    the second takes it from there.  size: ‖v‖.  radius: r.  fixed: r where the user has chosen it.  last: there is no further one.
    """

    once = False  # whether there is only one candidate, which needs the direction no longer

    def __init__(
        self,
        problem: Problem,
        at_theta: AtTheta,
        direction: list[Tensor | None],
        size: Tensor,
        radius: float | Tensor,
        fixed: float | None,
        last: bool,
    ):
        self.problem, self.layout, self.place = problem, problem.layout, problem.place
        self.at_theta, self.direction, self.size, self.fixed, self.last = at_theta, direction, size, fixed, last
        self.held = 0  # the sign of the step that the model holds
        self.radius = radius if isinstance(radius, Tensor) else torch.full_like(size, radius)
        self.step = (self.radius / size).nan_to_num(posinf=0)  # without a direction candidates are θ itself
        self.settings, self.tells_apart = ("guided", fixed), size > 0
        self.before = at_theta.losses | {"val_loss": None}  # candidates depend on them
        self.numbers: list[Tensor] = []
        self.curvature = self.apart = math.nan

    def position(self, k: int) -> Position:
        sign = 1 - 2 * k
        for b, bucket in enumerate(self.layout.buckets):
            if self.held:
                flat = self.place.displacement(bucket).mul_(self.held * sign)
            else:
                flat, direction = bucket.empty(), self.direction[b]
                precise = torch.promote_types(direction.dtype, torch.float32)  # a step in float16 may be zero
                torch.mul(direction.to(precise), (sign * self.step).to(precise), out=flat[: direction.numel()])
                if self.once or self.place is not None:
                    self.direction[b] = direction = None
            yield bucket.moved(flat)
            del flat
        if self.place is not None:
            self.held = sign

    def alike(self, k: int) -> int:
        return 0

    def pattern(self, k: int) -> AbstractContextManager:
        return self.at_theta.kinks.shared()

    def coefficients(self, like: Tensor) -> Tensor:
        """(2,): Σ_k c_k g(θ_k) is the derivative of g along v, by a central difference."""
        half = (self.size / (2 * self.radius)).to(like)
        return torch.stack([half, -half])

    def see(self, squares: Tensor) -> None:
        """The numbers by which a radius is judged, of the gradients' parity, on the device."""
        self.numbers = [*(squares[:2] / squares[1:]).sqrt(), self.size]

    def read(self, values: Sequence[float]) -> None:
        """The same, where the host has them."""
        if values:
            self.curvature, self.apart = values[0], values[1] / self.eps if values[2] > 0 else math.inf
            self.last |= math.isnan(self.apart)  # of zeros nothing is learned

    @property
    def eps(self) -> float:
        """Of the coarsest numbers that the gradients by λ are made of."""
        return max(self.problem.precision.eps, self.problem.lam.eps)

    @property
    def found(self) -> bool:
        return is_found(self.curvature, self.apart, self.eps)

    def check(self, precision: Precision, losses: Mapping[str, float]) -> None:
        """Errors and warnings where the two of a pair are so close that their difference is rounding, or are of another loss."""
        at_theta = losses.get(AT_THETA, math.nan)
        beside = sum(losses[f"train_loss of candidate {k}"] for k in (0, 1)) / 2
        odd = self.apart * self.eps  # ‖g₊ − g₋‖ / ‖g₊‖: the two are alike, and unlike θ's own
        if self.fixed is None and odd < ANOTHER < self.curvature * odd / 2 and abs(beside - at_theta) > ANOTHER * abs(at_theta):
            warn(
                f"train_loss is {at_theta:.4g} at θ and {beside:.4g} on average of a pair beside it: it asks whether what the model "
                "computes requires grad (h.requires_grad), which it does not at a candidate, or has another value at each call "
                "(evograd.check tells)"
            )
        if not precision.low:
            return
        if self.fixed is None and (self.apart < 2 or self.curvature > 0.5):
            raise RuntimeError(
                f"no radius resolves the difference of a pair in {precision.dtype}: the gradients of the two by the hyperparameters "
                f"differ by {self.apart:.2g} eps, at a curvature of {self.curvature:.2g}; compute train_loss in more digits, at least "
                "around this call"
            )
        if self.fixed is not None:
            least = precision.eps / 4 * norm(self.layout.tensors).item() * math.exp(self.problem.shards_in_log)
            if self.fixed < least:
                raise ValueError(
                    f"radius={self.fixed:.2g} is not resolved by {precision.dtype}, in which losses are computed: at least "
                    f"{least:.2g} is needed for parameters of this norm; radius=None chooses one"
                )


class Side(Pair):
    """One candidate θ + r v/‖v‖, beside θ itself, whose gradients are known: at half the price, with an error of O(r)."""

    once = True

    def coefficients(self, like: Tensor) -> Tensor:
        return 2 * super().coefficients(like)


def _check(inner_lr, radius, lookahead, share_kinks, kinks, strategy) -> None:
    check_rate(inner_lr)
    if radius is not None and not isinstance(radius, Radius):
        check_positive("radius", radius)
    check_lookahead(lookahead)
    if kinks is not None and not (isinstance(kinks, Kinks) and kinks.recorded):
        raise ValueError("kinks must be Kinks() that hold a pass of train_loss at θ: with kinks.record(): train_loss(model)")
    if kinks is not None and (lookahead == "sgd" or not share_kinks):
        which = "lookahead='sgd' records the pattern itself" if share_kinks else "share_kinks=False shares none"
        raise ValueError(f"kinks given, but {which}; leave kinks out")
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(
            f"strategy={strategy!r} is not for a pair, whose candidates run one after the other with the pattern of θ; accepted "
            f"are {', '.join(map(repr, STRATEGIES))}"
        )
