"""How good an estimate of a hypergradient is, against exact T1–T2 over all hyperparameters as one vector, and what it costs."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import measuring
from .baselines import conjugate_gradient, finite_difference, neumann, unrolled
from .guided import guided
from .host.checks import Closure, Parameters, check_count, check_rate, checked_hyperparameters, kept
from .host.gathering import partial as partial_derivatives
from .host.problem import Problem
from .host.repeats import Unfit, check_repeats
from .host.result import Hypergradient
from .host.stand_ins import StandIn
from .hypergradient import hypergradient
from .measuring import Cost
from .mixed_mode import mixed_mode
from .ranking import BY_MATH, EXACT, MEASURES, MIXED, STEP, STEP_BY_PASSES, Comparison, Row, ranked
from .trajectory import one_step

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


def compare(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    optimizer: torch.optim.Optimizer | None = None,
    parameters: Parameters = None,
    repeats: int | None = None,
    verbose: bool = True,
) -> Comparison:
    """Every estimator on one problem: how well it points the way of exact T1–T2, and what it costs. The model is left as it was.

    Costs are those of one hypergradient beside those of a plain training step's forward and backward pass, all taking turns on
    this machine. Each estimator starts from the same random draws (dropout), another set in each repeat. Best choice first: of
    those with a cosine of 0.99 or more, and a norm of half to twice the exact one, the fastest; the others by their cosine.

    Where fused attention keeps T1–T2 from running it is computed plainly for it, and the row says so. If T1–T2 cannot be had
    mixed mode is the measure, or else guided after an SGD step: `exact` says which.

    Args:
        train_loss, val_loss, model, hyperparameters, parameters: as in `evograd.hypergradient`.
        inner_lr: > 0, η of the SGD step that T1–T2 looks ahead by; the model's learning rate.
        optimizer: the one that trains the model. All are then compared with the derivative of the step that it would make now,
            in place of an SGD step; the rows by `Trajectory` make that step, and take it back. `parameters` are names then.
        repeats: ≥ 1, timed runs, of which time is the median and agreement the mean. Each estimator runs twice more, to count.
            Default: 3, or for small models as many as take about ten seconds, at most 30; an estimator that has taken more than
            ten seconds is not repeated.
        verbose: say on stderr what is being measured, and about how long it will take.

    Returns:
        Comparison; print it for the table.

    Raises:
        RuntimeError: no estimator could run, with the reason of the first; or a loss is refused by `check`.
        ValueError, TypeError: as in `evograd.hypergradient`.
    """
    check_rate(inner_lr)
    if repeats is not None:
        check_count("repeats", repeats)
    parameters = kept(parameters)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    run = _Run(problem, parameters, _calls(inner_lr, optimizer), _Progress(verbose))
    with torch.random.fork_rng(devices=problem.draws.cuda_devices):
        torch.manual_seed(0)
        run.check()
        plain = run.count()
        repeats, times = run.time(repeats)
        exact = next((name for name in MEASURES[optimizer is None] if name in run.ran()), None)
        run.take_alike(exact)
    return Comparison(ranked(run.rows(times, exact)), Cost(times["plain"], *plain), exact, repeats)


def check(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    parameters: Parameters = None,
) -> None:
    """Evaluate each loss at θ, twice and with a graph, with the same random draws: RuntimeError where values differ, or depend on no
    parameter, with what to look for.

    Such a loss is another one for each candidate of an estimator, which then is wrong without a word. Args as in
    `evograd.hypergradient`; the model is left as it was.
    """
    check_repeats(Problem(train_loss, val_loss, model, hyperparameters, kept(parameters), None))


class _Run:
    """Every estimator on one problem: counted once, then timed in turns, and what it found.

    by_math: those that cannot go through fused attention, and run where it is computed plainly.
    """

    def __init__(self, problem: Problem, parameters: Parameters, calls: dict, show: _Progress):
        self.problem, self.parameters, self.calls, self.show = problem, parameters, calls, show
        self.found: dict[str, list[list[Tensor]]] = {name: [] for name in calls}
        self.counted: dict[str, tuple[int, int, int]] = {}
        self.by_math: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.first_failure: Exception | None = None
        self.start = time.perf_counter()

    def ran(self) -> list[str]:
        return [name for name in self.counted if name not in self.reasons]

    def check(self) -> None:
        try:
            check_repeats(self.problem)
        except Unfit:
            raise
        except Exception:  # whatever else a loss cannot do is a line of the table
            return

    def plain(self) -> None:
        """Forward and backward pass of a training step."""
        problem = self.problem
        leaves = {name: StandIn.leaf(p) for name, p in problem.theta.items()}
        with problem.undisturbed(), problem.holding(leaves):
            partial_derivatives(problem.evaluate(problem.train_loss), list(leaves.values()))

    def estimate(self, name: str, by_math: bool = False) -> list[Tensor]:
        function, _, own = self.calls[name]
        of = self.problem
        with sdpa_kernel(SDPBackend.MATH) if by_math or name in self.by_math else nullcontext():
            return function(of.train_loss, of.val_loss, of.model, of.hyperparameters, parameters=self.parameters, **own).grads

    def drawn(self, name: str, ends: float) -> None:
        """One hypergradient of the next set of random draws, kept."""
        if name not in self.reasons:
            n = len(self.found[name])
            left = max(ends - time.perf_counter(), 0)
            self.show(f"timing, {name}, run {n + 1}, about {left:.0f} s to go")
            torch.manual_seed(n)
            with self.noted(name):
                self.found[name].append(self.estimate(name))

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Whatever an estimator cannot do with this model is a line of the table."""
        try:
            yield
        except Exception as error:
            self.first_failure = self.first_failure or error
            first_line = next(iter(str(error).strip().splitlines()), "")
            self.reasons[name] = f"{type(error).__name__}: {first_line}"

    def count(self) -> tuple[int, int, int]:
        """Bytes, FLOPs and launches of the plain step; those of the estimators are kept. RuntimeError if none can run."""
        self.show("counting, a plain training step")
        with self.noted("a plain training step"):
            plain = measuring.counts(self.plain)
        for name in self.calls if not self.reasons else ():
            self.show(f"counting, {name}")
            with self.noted(name):
                self.counted[name] = measuring.counts(partial(self.estimate, name))
            if _FUSED.search(self.reasons.get(name, "")):
                fused = self.reasons.pop(name)
                self.by_math.add(name)
                with self.noted(name):
                    self.counted[name] = measuring.counts(partial(self.estimate, name))
                if name in self.reasons:
                    self.reasons[name] = fused
        if not self.counted:
            name, reason = next(iter(self.reasons.items()))
            raise RuntimeError(f"no estimator could run; {name}: {reason}") from self.first_failure
        return plain

    def time(self, repeats: int | None) -> tuple[int, dict[str, float]]:
        """(repeats, seconds of each), by default as many as take some ten seconds."""
        enough, now = float("inf"), time.perf_counter()
        if repeats is None:  # all estimators have run twice
            enough = 10.0
            repeats = min(max(int(20 / (now - self.start)), 3), 30)
        ends = now + repeats * (now - self.start) / 2
        steps = {"plain": self.plain} | {name: partial(self.drawn, name, ends) for name in self.ran()}
        times = measuring.seconds(steps, repeats, warmup=0, enough=enough)
        self.show(None)
        return repeats, times

    def take_alike(self, exact: str | None) -> None:
        """Where the measure went through plain attention, others are compared with it there: its dropout draws otherwise."""
        for name in self.ran() if exact in self.by_math else ():
            if name not in self.by_math:
                for n in range(min(len(self.found[name]), len(self.found[exact]))):
                    self.show(f"agreement, {name}, run {n + 1}")
                    torch.manual_seed(n)
                    with self.noted(name):
                        self.found[name][n] = self.estimate(name, by_math=True)
        self.show(None)

    def rows(self, times: dict[str, float], exact: str | None) -> Iterator[Row]:
        for name, (_, call, _) in self.calls.items():
            if name in self.reasons:
                yield Row(name, call, reason=self.reasons[name])
                continue
            agreements = [agreement(*pair) for pair in zip(self.found[name], self.found[exact])] if exact else []
            quality = {key: statistics.fmean(one[key] for one in agreements) for key in (agreements[0] if exact else ())}
            call += f" {BY_MATH}" * (name in self.by_math)
            yield Row(name, call, **quality, cost=Cost(times[name], *self.counted[name]))


_FUSED = re.compile(r"\b_\w*attention")  # in an error of PyTorch's: the name of a fused kernel


def _calls(inner_lr: float, optimizer: torch.optim.Optimizer | None = None) -> dict[str, tuple[Callable[..., Hypergradient], str, dict]]:
    """{name: (estimator, how it is called, its settings)}; the measure first."""
    evograd, here = "hypergradient", dict(lookahead=None)
    calls = {}
    for name, by in ((STEP, "unrolled"), (STEP_BY_PASSES, "guided")) if optimizer is not None else ():
        calls[name] = one_step, f"Trajectory(by={by!r})", dict(optimizer=optimizer, by=by)
    entries = [
        (EXACT, unrolled, "baselines.unrolled", {}),
        (MIXED, mixed_mode, "mixed_mode", {}),
        ("mixed mode, G at θ", mixed_mode, "mixed_mode", here),
        ("guided", guided, "guided", {}),
        ("guided, G at θ", guided, "guided", here),
        ("EvoGrad, K = 2", hypergradient, evograd, {}),
        ("EvoGrad, K = 10", hypergradient, evograd, dict(n_candidates=10)),
        ("finite differences", finite_difference, "baselines.finite_difference", {}),
        ("Neumann series", neumann, "baselines.neumann", {}),
        ("conjugate gradients", conjugate_gradient, "baselines.conjugate_gradient", dict(damping=0.1)),
    ]
    for name, function, path, own in entries:
        own = own if function is conjugate_gradient else {**own, "inner_lr": inner_lr}
        calls[name] = function, f"{path}({', '.join(f'{key}={value!r}' for key, value in own.items())})", own
    return calls


class _Progress:
    """Says on stderr how far it is: on a terminal in one line, elsewhere in a line every ten seconds."""

    def __init__(self, wanted: bool):
        self.wanted, self.terminal, self.last = wanted, sys.stderr.isatty(), time.perf_counter()

    def __call__(self, text: str | None) -> None:
        if self.wanted and self.terminal:
            print(f"\r{text or '':<70}", end="" if text else "\r", file=sys.stderr, flush=True)
        elif self.wanted and text and time.perf_counter() - self.last >= 10:
            self.last = time.perf_counter()
            print(f"evograd.compare: {text}", file=sys.stderr, flush=True)
