"""The methods that learn hyperparameters. A script has one table of them, and all that depends on the method follows from it:

    METHODS = table(
        baseline("no_rotation"),
        learned("evograd", temperature=0.05),
        learned("mixed_mode", around="step", inner_lr=0.1),
    )

`--method` accepts the table's names, and refuses the flags that a method does not read; `defaults` fills in what was not
given; `MetaStep` is a method with the settings of a run, to be called in the script's step. The method "trajectory" makes the
script's steps itself, see `MetaStep.trajectory_of`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..baselines import conjugate_gradient, finite_difference, neumann, unrolled
from ..comparison import Estimate, estimates
from ..guided import guided
from ..host.result import Hypergradient
from ..host.slots import Slots
from ..hypergradient import hypergradient
from ..mixed_mode import mixed_mode
from ..operations.kinks import Kinks
from ..radius import Radius
from ..trajectory import Trajectory
from .processes import ALONE, Processes
from .quality import QualityLog

RANDOM = ("n_candidates", "sigma", "temperature", "common_random_numbers", "inner_lr")
GUIDED = ("radius", "inner_lr")
DAMPING = 0.1  # of conjugate gradients: a network's Hessian has directions of negative curvature


@dataclass(frozen=True)
class Estimator:
    """One of the library's estimators, and the settings of the command line that it reads.

    keywords: by which keyword it takes a setting that it calls otherwise.  own_scale: without inner_lr it has a scale of its own.
    first_order: it takes ordinary passes alone, so that compiled models and fused attention serve it too.
    shares: what several processes may divide, by the flag --share; the first is the default.
    """

    function: Callable[..., Hypergradient]
    reads: tuple[str, ...]
    keywords: Mapping[str, str] = field(default_factory=dict)
    own_scale: bool = False
    first_order: bool = False
    shares: tuple[str, ...] = ()


def optimizer(kind: type[torch.optim.Optimizer], parameters: Iterable[Tensor], **settings) -> torch.optim.Optimizer:
    """Of a model, with gradients that backward() leaves: fused on CUDA, where others hold temporaries of the model's size."""
    parameters = list(parameters)
    return kind(parameters, **settings, **({"fused": True} if parameters[0].device.type == "cuda" else {}))


UNROLLED = ("inner_lr", "inner_steps"), {"inner_steps": "n_steps"}
ESTIMATORS = {
    "evograd": Estimator(
        hypergradient, (*RANDOM, "share"), own_scale=True, first_order=True, shares=("batch", "candidates")
    ),
    "evograd_guided": Estimator(guided, GUIDED, first_order=True),
    "mixed_mode": Estimator(mixed_mode, ("inner_lr",)),
    "second_order": Estimator(partial(unrolled, engine="higher"), *UNROLLED),  # as in the authors' code
    "second_order_functional": Estimator(unrolled, *UNROLLED),
    "finite_difference": Estimator(finite_difference, ("radius", "inner_lr"), first_order=True),
    "neumann": Estimator(neumann, ("inner_lr", "inner_steps"), {"inner_steps": "n_terms"}),
    "conjugate_gradient": Estimator(
        partial(conjugate_gradient, damping=DAMPING), ("inner_steps",), {"inner_steps": "n_iterations"}
    ),
    "trajectory": Estimator(Trajectory, ("radius", "horizon", "share"), first_order=True, shares=("batch",)),
}


# that costs are compared of
MAIN = ("evograd", "evograd_guided", "mixed_mode", "second_order", "second_order_functional", "trajectory")


@dataclass(frozen=True)
class Method:
    """One line of a script's table.

    estimator: None for a baseline, which learns no hyperparameters.
    reads: settings, by the names that argparse gives them; every other one is refused.
    defaults: of settings that were not given.
    around: what the estimator is told of the model's update that was just made. "before": training losses are taken at the
        parameters before it. "step": and the validation gradient at those after it, so that the result is T1–T2 through the step
        that was really made; it costs one copy of the parameters and no computation. None: it works where the model is.
    holds: the setting that is "model" where the training loss takes what it detaches from θ, for all candidates alike.
    """

    name: str
    estimator: Estimator | None = None
    reads: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    around: str | None = None
    holds: str | None = None

    @property
    def remembers(self) -> bool:
        """Whether it goes back through the run's own steps, and makes none of its own."""
        return self.estimator is not None and self.estimator.function is Trajectory


def baseline(name: str) -> Method:
    """A method that learns no hyperparameters."""
    return Method(name)


def learned(
    name: str, *, reads: Iterable[str] = (), around: str | None = None, holds: str | None = None, **defaults: object
) -> Method:
    """The method of that name in ESTIMATORS. reads: settings of the script that it reads, beside those of its estimator."""
    estimator = ESTIMATORS[name]
    held = () if holds is None else (holds,)
    logged = () if estimator.function is Trajectory else ("log_quality",)  # it compares estimates of one step
    return Method(name, estimator, (*estimator.reads, *logged, *reads, *held), defaults, around, holds)


def table(*methods: Method, reads: Sequence[str] = ()) -> dict[str, Method]:
    """{name: method}. reads: settings of the script that all methods read which learn hyperparameters."""
    return {m.name: m if m.estimator is None else replace(m, reads=(*m.reads, *reads)) for m in methods}


def defaults(args: argparse.Namespace, methods: Mapping[str, Method]) -> None:
    """Settings of args.method that were not given -> the table's."""
    for name, value in methods[args.method].defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def refuse_unread(parser: argparse.ArgumentParser, args: argparse.Namespace, methods: Mapping[str, Method]) -> None:
    """End with an error if a setting was given that args.method does not read, and another one does."""
    for name in sorted({name for method in methods.values() for name in method.reads} - set(methods[args.method].reads)):
        if getattr(args, name) != parser.get_default(name):
            able = ", ".join(method.name for method in methods.values() if name in method.reads)
            parser.error(f"--{name.replace('_', '-')} given, but --method {args.method} does not read it; these do: {able}")


class MetaStep:
    """A method with the settings of a run: the hypergradient of each of its steps.

        before = self.meta.remember(self.model.named_parameters())
        …  # the model's update
        result = self.meta(train_loss, val_loss, self.model, [self.angle], before)

    learns: whether there is a hypergradient at all.  around: what of the model's update it is told, see `Method`.  holds: whether
    the training loss is given what it detaches.

    With --log-quality N every N-th call compares all estimates with exact T1–T2, see `QualityLog`; nothing else changes by that.

    Among several processes those estimators share out their work that args.share is set for, and the others do all of it in each,
    on the whole batch.
    """

    def __init__(self, method: Method, args: argparse.Namespace, processes: Processes = ALONE):
        self.method, self.args, self.processes = method, args, processes
        self.learns = method.estimator is not None
        self.holds = method.holds is not None and getattr(args, method.holds) == "model"
        self.around = method.around or ("before" if self.holds else None)
        self.quality, self.n_calls = QualityLog(args.seed), 0
        self.radius = Radius()  # that guided and trajectory carry over
        self.kinks = None  # of guided: the pattern of the step that was made
        self.estimator = self._estimator() if self.learns and not method.remembers else None
        self.trajectory: Trajectory | None = None

    def trajectory_of(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, hyperparameters: Sequence[Tensor]
    ) -> Trajectory | None:
        """What makes the run's steps, and a hypergradient of each args.horizon of them; None for other methods.

            if self.trajectory is not None:
                loss = self.trajectory.step(train_loss)
                if len(self.trajectory) == self.args.horizon:
                    result = self.trajectory.hypergradient(val_loss)

        model: that of the ordinary step, which several processes share.
        """
        if self.method.remembers:
            self.trajectory = Trajectory(model, optimizer, hyperparameters, radius=self.args.radius or self.radius)
        return self.trajectory

    @property
    def whole(self) -> bool:
        """Whether a run can go on from here by its state: of steps that are remembered there is none."""
        return not self.trajectory

    def forget(self) -> None:
        """The steps since the last meta-update, where the training has ended."""
        if self.trajectory is not None:
            self.trajectory.clear()

    def _estimator(self) -> Callable[..., Hypergradient]:
        estimator = self.method.estimator
        given = {name: getattr(self.args, name) for name in estimator.reads if name != "share"}
        settings = {estimator.keywords.get(name, name): value for name, value in given.items() if value is not None}
        if estimator.function is guided:
            settings.setdefault("radius", self.radius)
        if self.args.share:
            settings |= dict(group=self.processes.group, share=self.args.share)
        function = partial(estimator.function, **settings)
        return partial(_in_each, function, self.processes) if self.processes.size > 1 and not self.args.share else function

    @property
    def compares(self) -> bool:
        """Whether the next call compares all estimates."""
        return bool(self.args.log_quality) and self.n_calls % self.args.log_quality == 0

    def remember(self, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor] | None:
        """Copies of the parameters before the model's update, if the next call wants them."""
        return {name: p.detach().clone() for name, p in parameters} if self.around or self.compares else None

    @contextmanager
    def pattern(self, same_batch: bool) -> Iterator[None]:
        """The pass of a step whose activation pattern guided candidates take, if it is over the batch that the estimator sees."""
        if not (same_batch and self.learns and self.around == "step" and self.method.estimator.function is guided):
            yield
            return
        kinks = Kinks(packed=True)
        with kinks.record():
            yield
        self.kinks = kinks

    def metrics(self) -> dict:
        """What was compared, for the record of the run."""
        return self.quality.metrics() if self.args.log_quality else {}

    def state_dict(self) -> dict:
        return {**self.quality.state_dict(), "n_calls": self.n_calls, "radius": self.radius.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.quality.load_state_dict(state)
        self.n_calls = state["n_calls"]
        if "radius" in state:
            self.radius.load_state_dict(state["radius"])

    def __call__(
        self,
        train_loss: Callable,
        val_loss: Callable,
        model: nn.Module,
        hyperparameters: Sequence[Tensor],
        before: Mapping[str, Tensor] | None = None,
        *,
        held: object = None,
        lr: float | None = None,
        compared: Callable[[], Mapping[str, Estimate]] | None = None,
        **settings,
    ) -> Hypergradient:
        """dℓ_V/dλ by the method of the run.

        before: θ before the model's update, of `remember`; None if none was made.
        held: what train_loss takes as its second argument where the method holds what it detaches.
        lr: the inner learning rate where none was given, for the methods that have no scale of their own.
        compared: what is compared in place of `comparison.estimates` of this problem.
        settings: further ones of the estimator.
        """
        if self.compares:
            compared = compared or partial(
                self.estimates, train_loss, val_loss, model, hyperparameters, before, lr=lr, held=held, **settings
            )
            self.quality.add(self.n_calls, compared(), hyperparameters[0].device)
        if self.around and before is not None:
            settings["parameters"] = before
        if self.around == "step":
            own = dict(model.named_parameters())
            settings["lookahead"] = None if before is None else {name: own[name] for name in before}
        if lr is not None and self.args.inner_lr is None and "inner_lr" in self.method.reads:
            settings |= {} if self.method.estimator.own_scale else {"inner_lr": lr}
        if self.kinks is not None:
            settings["kinks"], self.kinks = self.kinks, None
        self.n_calls += 1
        closure = _holding(train_loss, held) if self.holds else train_loss
        return self.estimator(closure, val_loss, model, hyperparameters, **settings)

    def estimates(
        self,
        train_loss: Callable,
        val_loss: Callable,
        model: nn.Module,
        hyperparameters: Sequence[Tensor],
        before: Mapping[str, Tensor] | None = None,
        *,
        lr: float,
        held: object = None,
        parameters: Sequence[str] | None = None,
    ) -> dict[str, Estimate]:
        """Every estimate at `before` (the model's update made since), or where the model is, beside T1–T2 on the same batches.

        held: as in a call, or a function of the model that gives it. With it guided candidates and finite differences hold what
        train_loss detaches, and those called …_candidate have their own; the paper's estimator likewise holds none, and those
        called …_model do.
        """
        own = dict(model.named_parameters())
        made = None if before is None else {name: own[name] for name in before}
        common = dict(inner_lr=lr, parameters=before or parameters, made=made, generator=self.quality.generator)
        problem = (val_loss, model, hyperparameters)
        free = estimates(train_loss, *problem, **common)
        if held is None:
            return free
        if callable(held):
            devices = {p.device for p in own.values() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=list(devices)), torch.no_grad():  # drawn as exact T1–T2 draws
                held = at(model, before or {}, held)
        known = estimates(_holding(train_loss, held), *problem, **common)
        chosen = {n: known[n] if n.startswith(("guided", "finite")) else estimate for n, estimate in free.items()}
        chosen |= {f"{name}_model": known[name] for name in ("evograd_k2", "evograd_k10")}
        return chosen | {f"{name}_candidate": free[name] for name in ("guided_sgd", "guided_made") if name in free}


def _holding(train_loss: Callable, held: object) -> Callable:
    return lambda model: train_loss(model, held)


def _in_each(estimator: Callable, processes: Processes, *problem, **settings) -> Hypergradient:
    """The mean over the processes: devices differ in the last bit, and λ must not drift apart."""
    result = estimator(*problem, **settings)
    return replace(result, grads=[processes.mean(g) for g in result.grads])


def at(model: nn.Module, parameters: Mapping[str, Tensor], function: Callable):
    """function(model) with `parameters`, by name, in place of the model's own."""
    own = dict(model.named_parameters())
    with Slots(model).holding((own[name], tensor) for name, tensor in parameters.items()):
        return function(model)
