"""How good an estimate of a hypergradient is, against exact T1–T2 over all hyperparameters as one vector, and what it costs."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import measuring
from .baselines import conjugate_gradient, finite_difference, neumann, unrolled
from .guided import guided
from .host.checks import Closure, Parameters, check_count, check_positive, checked_hyperparameters, kept
from .host.gathering import partial as partial_derivatives
from .host.problem import Problem
from .host.result import Hypergradient
from .host.stand_ins import StandIn
from .hypergradient import hypergradient
from .measuring import Cost
from .mixed_mode import mixed_mode

Estimate = Callable[[], Hypergradient]


def agreement(estimate: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """cosine: of the angle between them.  sign: share of the elements with the same sign.  norm: ‖estimate‖ / ‖exact‖.

    Both are lists of tensors of the same shapes; complex numbers count as two. Where a norm is zero the cosine is zero.
    """
    if [g.shape for g in estimate] != [g.shape for g in exact]:
        raise ValueError(f"shapes differ: {[tuple(g.shape) for g in estimate]} and {[tuple(g.shape) for g in exact]}")
    real = lambda g: torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    a, b = (torch.cat([real(g.detach()).double().reshape(-1) for g in gradient]) for gradient in (estimate, exact))
    norms = a.norm() * b.norm()
    return {
        "cosine": ((a @ b) / norms).item() if norms > 0 else 0.0,
        "sign": (a.sign() == b.sign()).double().mean().item(),
        "norm": (a.norm() / b.norm()).item() if b.norm() > 0 else float("inf"),
    }


def estimates(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    generator: torch.Generator,
    parameters: Parameters = None,
    made: Parameters = None,
) -> dict[str, Estimate]:
    """Estimators of one problem, each a function without arguments, all at the scale of `inner_lr`; "exact" is T1–T2.

    evograd_k*: the paper's, over K; at K = 10 also over σ, τ and kinds of noise; with common random numbers. guided, mixed:
    with G at θ, after one SGD step (…_sgd), and after the step that was made (…_made), where its parameters `made` are given.
    generator: EvoGrad's directions are drawn from it, so that they take nothing from what the losses draw (dropout, say).
    """
    parameters, made = kept(parameters), kept(made)
    problem = (train_loss, val_loss, model, checked_hyperparameters(hyperparameters))
    common = dict(inner_lr=inner_lr, parameters=parameters)
    evograd = partial(hypergradient, *problem, generator=generator, **common)
    along = partial(guided, *problem, **common)
    result = {"exact": partial(unrolled, *problem, **common)}
    for k in (2, 10, 50):
        result[f"evograd_k{k}"] = partial(evograd, n_candidates=k)
        result[f"evograd_k{k}_common"] = partial(evograd, n_candidates=k, common_random_numbers=True)
    result["evograd_k10_normal"] = partial(evograd, n_candidates=10, noise="normal")
    for value in (1e-4, 1e-2):
        result[f"evograd_k10_sigma{value:g}"] = partial(evograd, n_candidates=10, sigma=value)
    for value in (0.005, 0.5):
        result[f"evograd_k10_temperature{value:g}"] = partial(evograd, n_candidates=10, temperature=value)
    places = {"": None, "_sgd": "sgd"} | ({"_made": made} if made is not None else {})
    for place, lookahead in places.items():
        result[f"guided{place}"] = partial(along, lookahead=lookahead)
        result[f"mixed{place}"] = partial(mixed_mode, *problem, lookahead=lookahead, **common)
    result["guided_sgd_own_kinks"] = partial(along, lookahead="sgd", share_kinks=False)
    result["finite_difference"] = partial(finite_difference, *problem, **common)
    result["neumann"] = partial(neumann, *problem, **common)
    result["conjugate_gradient"] = partial(conjugate_gradient, *problem, damping=0.1, parameters=parameters)
    return result


@dataclass(frozen=True)
class Row:
    """What `compare` found of one estimator.

    call: how it was called, in `evograd`, but for the problem.  cosine, sign, norm: as of `agreement`, None without an exact
    hypergradient.  cost: of one hypergradient.  reason: why there is nothing else, if it could not run.
    """

    name: str
    call: str
    cosine: float | None = None
    sign: float | None = None
    norm: float | None = None
    cost: Cost | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """rows: best choice first.  plain: cost of a training step's forward and backward pass.  exact: whose hypergradient is the
    measure, "T1–T2", or "mixed mode" where double backward cannot be had, or None.  draws: of how many, at most, the agreement
    is the mean.

    str() is a table.
    """

    rows: tuple[Row, ...]
    plain: Cost
    exact: str | None
    draws: int

    def __str__(self) -> str:
        ran = [row for row in self.rows if row.cost]
        header = ["estimator", "cosine", "sign", "norm", "time", "memory", "FLOPs", "launches", "evograd."]
        lines = [header]
        for row in ran:
            quality = ["–" if v is None else f"{v:.3f}" for v in (row.cosine, row.sign, row.norm)]
            lines.append([row.name, *quality, *(f"{ratio:.2f}" for ratio in _ratios(row.cost, self.plain)), row.call])
        widths = [max(map(len, column)) for column in zip(*lines)]
        last = len(header) - 1
        align = lambda i, cell: cell.ljust(widths[i] * (i == 0)) if i in (0, last) else cell.rjust(widths[i])
        text = [self._headline(), "", *("  ".join(align(i, cell) for i, cell in enumerate(line)) for line in lines), ""]
        plain = f"{self.plain.seconds * 1e3:.1f} ms, {self.plain.peak_bytes / 1e6:.1f} MB, {self.plain.flops / 1e9:.2f} GFLOP"
        text.append(f"Time, memory (peak), FLOPs and launches: over a training step's forward and backward pass ({plain}).")
        if self.exact:
            text.append(f"Cosine, share of equal signs, and norm over norm: to {self.exact}, mean of {self.draws} draws at most.")
        if self.exact == _MIXED:
            text.append("T1–T2 by double backward could not run; mixed mode after an SGD step is the same hypergradient.")
        text += [f"{row.name} could not run: {row.reason}" for row in self.rows if row.reason]
        return "\n".join(text)

    def _headline(self) -> str:
        best = self.rows[0]
        exact = next((row for row in self.rows if row.name == self.exact), None)
        if exact is None:
            return f"{best.name} is the cheapest; no exact hypergradient could be had to compare with."
        if best is exact:
            return f"{best.name}, exact, is the fastest of those that point its way."
        time, memory, *_ = _ratios(best.cost, exact.cost)
        return f"{best.name}: cosine {best.cosine:.3f} to {self.exact} at {time:.2f} of its time and {memory:.2f} of its memory"


_EXACT, _MIXED = "T1–T2", "mixed mode"
_GOOD = 0.99  # cosine from which on the cheaper estimate is the better choice


def compare(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    parameters: Parameters = None,
    repeats: int | None = None,
    verbose: bool = True,
) -> Comparison:
    """Every estimator on one problem: how well it points the way of exact T1–T2, and what it costs. The model is left as it was.

    Costs are those of one hypergradient beside those of a plain training step's forward and backward pass, all taking turns on
    this machine. Each estimator starts from the same random draws (dropout), another set in each repeat. Best choice first: of
    those with a cosine of 0.99 or more the fastest, the others by their cosine.

    Args:
        train_loss, val_loss, model, hyperparameters, parameters: as in `evograd.hypergradient`.
        inner_lr: > 0, η of the SGD step that T1–T2 looks ahead by; the model's learning rate.
        repeats: ≥ 1, timed runs, of which time is the median and agreement the mean. Each estimator runs twice more, to count.
            Default: 3, or for small models as many as take about ten seconds, at most 30; an estimator that has taken more than
            ten seconds is not repeated.
        verbose: print the table, and on a terminal what is being measured.

    Raises:
        RuntimeError: no estimator could run; with the reason of the first.  ValueError, TypeError: as in `evograd.hypergradient`.
    """
    check_positive("inner_lr", inner_lr)
    if repeats is not None:
        check_count("repeats", repeats)
    parameters = kept(parameters)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    run = _Run(problem, parameters, _calls(inner_lr), _Progress(verbose))
    with torch.random.fork_rng(devices=problem.draws.cuda_devices):
        torch.manual_seed(0)
        plain = run.count()
        repeats, times = run.time(repeats)
    exact = next((name for name in (_EXACT, _MIXED) if name in run.counted), None)
    rows = sorted(run.rows(times, exact), key=_place)
    result = Comparison(tuple(rows), Cost(times["plain"], *plain), exact, repeats)
    if verbose:
        print(result)
    return result


class _Run:
    """Every estimator on one problem: counted once, then timed in turns, and what it found."""

    def __init__(self, problem: Problem, parameters: Parameters, calls: dict, show: _Progress):
        self.problem, self.parameters, self.calls, self.show = problem, parameters, calls, show
        self.found: dict[str, list[list[Tensor]]] = {name: [] for name in calls}
        self.counted: dict[str, tuple[int, int, int]] = {}
        self.reasons: dict[str, str] = {}
        self.start = time.perf_counter()

    def plain(self) -> None:
        """Forward and backward pass of a training step."""
        problem = self.problem
        leaves = {name: StandIn.leaf(p) for name, p in problem.theta.items()}
        with problem.undisturbed(), problem.holding(leaves):
            partial_derivatives(problem.evaluate(problem.train_loss), list(leaves.values()))

    def estimate(self, name: str) -> list[Tensor]:
        function, _, own = self.calls[name]
        of = self.problem
        return function(of.train_loss, of.val_loss, of.model, of.hyperparameters, parameters=self.parameters, **own).grads

    def drawn(self, name: str, repeats: int) -> None:
        """One hypergradient of the next set of random draws, kept."""
        n = len(self.found[name])
        self.show(f"timing, {name}, run {n + 1} of {repeats}")
        torch.manual_seed(n)
        self.found[name].append(self.estimate(name))

    def count(self) -> tuple[int, int, int]:
        """Bytes, FLOPs and launches of the plain step; those of the estimators are kept. RuntimeError if none can run."""
        failure = None
        self.show("counting, a plain training step")
        plain = measuring.counts(self.plain)
        for name in self.calls:
            self.show(f"counting, {name}")
            try:
                self.counted[name] = measuring.counts(partial(self.estimate, name))
            except Exception as error:  # whatever an estimator cannot do with this model is a line of the table
                failure = failure or error
                first_line = next(iter(str(error).strip().splitlines()), "")
                self.reasons[name] = f"{type(error).__name__}: {first_line}"
        if not self.counted:
            name, reason = next(iter(self.reasons.items()))
            raise RuntimeError(f"no estimator could run; {name}: {reason}") from failure
        return plain

    def time(self, repeats: int | None) -> tuple[int, dict[str, float]]:
        """(repeats, seconds of each), by default as many as take some ten seconds."""
        enough = float("inf")
        if repeats is None:  # all estimators have run twice
            enough = 10.0
            repeats = min(max(int(20 / (time.perf_counter() - self.start)), 3), 30)
        steps = {"plain": self.plain} | {name: partial(self.drawn, name, repeats) for name in self.counted}
        times = measuring.seconds(steps, repeats, warmup=0, enough=enough)
        self.show(None)
        return repeats, times

    def rows(self, times: dict[str, float], exact: str | None) -> Iterator[Row]:
        for name, (_, call, _) in self.calls.items():
            if name in self.reasons:
                yield Row(name, call, reason=self.reasons[name])
                continue
            agreements = [agreement(*pair) for pair in zip(self.found[name], self.found[exact])] if exact else []
            quality = {key: statistics.fmean(one[key] for one in agreements) for key in (agreements[0] if exact else ())}
            yield Row(name, call, **quality, cost=Cost(times[name], *self.counted[name]))


def _place(row: Row) -> tuple:
    """Best choice first, see `compare`."""
    if row.cost is None:
        return 2, 0.0
    good = row.cosine is None or row.cosine >= _GOOD
    return (0, row.cost.seconds) if good else (1, -row.cosine)


def _calls(inner_lr: float) -> dict[str, tuple[Callable[..., Hypergradient], str, dict]]:
    """{name: (estimator, how it is called, its settings)}; T1–T2 first."""
    evograd, here = "hypergradient", dict(lookahead=None)
    entries = [
        (_EXACT, unrolled, "baselines.unrolled", {}),
        (_MIXED, mixed_mode, "mixed_mode", {}),
        ("mixed mode, G at θ", mixed_mode, "mixed_mode", here),
        ("guided", guided, "guided", {}),
        ("guided, G at θ", guided, "guided", here),
        ("EvoGrad, K = 2", hypergradient, evograd, {}),
        ("EvoGrad, K = 10", hypergradient, evograd, dict(n_candidates=10)),
        ("finite differences", finite_difference, "baselines.finite_difference", {}),
        ("Neumann series", neumann, "baselines.neumann", {}),
        ("conjugate gradients", conjugate_gradient, "baselines.conjugate_gradient", dict(damping=0.1)),
    ]
    calls = {}
    for name, function, path, own in entries:
        own = own if function is conjugate_gradient else {**own, "inner_lr": inner_lr}
        calls[name] = function, f"{path}({', '.join(f'{key}={value!r}' for key, value in own.items())})", own
    return calls


def _ratios(cost: Cost, over: Cost) -> list[float]:
    """Seconds, peak bytes, FLOPs and launches of one over those of another; NaN where that has none."""
    pairs = [(getattr(cost, key), getattr(over, key)) for key in ("seconds", "peak_bytes", "flops", "launches")]
    return [a / b if b else float("nan") for a, b in pairs]


class _Progress:
    """On a terminal, one line that says how far it is; nothing elsewhere."""

    def __init__(self, wanted: bool):
        self.shown = wanted and sys.stderr.isatty()

    def __call__(self, text: str | None) -> None:
        if self.shown:
            print(f"\r{text or '':<70}", end="" if text else "\r", file=sys.stderr, flush=True)
