"""A training step as it is, and what is remembered of it: where θ and the optimizer were, by what gradients, how passes were made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .host.away import Away
from .host.checks import Closure, Parameters, check_positive, check_scalar, kept, warn
from .host.precision import Precision
from .host.problem import Problem
from .host.sharded import local
from .host.steps import Gradients, Kind, Pass, Step
from .host.vectors import Layout
from .operations.kinks import Kinks, OwnKinks


class Recording:
    """Steps of one optimizer in one model.

    kinks: whether passes' kinks are wanted.  elementwise: whether the update is, so that tensors may share a bucket.
    every: which states are kept.  away: keeps them in the host's memory, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Tensor],
        parameters: Parameters,
        in_place: bool | None,
        kinks: bool,
        elementwise: bool,
        every: int,
        device: str | torch.device | None,
    ):
        self.model, self.optimizer = model, optimizer
        self.bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.chosen, self.given = kept(parameters), hyperparameters
        self.alone = not hyperparameters  # the optimizer's own settings are all that is asked for
        if self.alone:
            hyperparameters = [next(self.bare.parameters()).new_zeros(()).requires_grad_()]
        self.settings = dict(hyperparameters=hyperparameters, in_place=in_place)
        self.names: list[str] = []
        problem = self._begin()
        self.sharding, self.lam, self.draws, self.every = problem.sharding, problem.lam, problem.draws, every
        self.kinks, self.elementwise, self.away = kinks and every == 1, elementwise, Away.of(device, self.parameters.values())
        self.steps: list[Step] = []
        self.clear()

    def _begin(self) -> Problem:
        """θ as it is now: layers may have been unfrozen since. What is frozen now stays, and may be trained again."""
        self.names = self._names()
        self.stepped_in, self.counts, self.versions, self.layouts = self._stepped_in(), None, None, {}
        problem = self.problem(_no_loss, _no_loss)
        self.parameters = {name: problem.own[name] for name in self.names}
        hyper = {id(h) for h in self.settings["hyperparameters"]}
        self.own = {name: p for name, p in problem.own.items() if id(p) not in hyper}
        return problem

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.own.values() if p.requires_grad]

    def _names(self) -> list[str]:
        """Of the parameters to go back through: what is trained, and what was until now."""
        optimizer = self.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        of_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for i, h in enumerate(self.given):
            if id(h) in of_optimizer:
                raise ValueError(f"hyperparameters[{i}] is among the optimizer's parameters; λ needs an optimizer of its own")
        own = {n: p for n, p in self.bare.named_parameters() if id(p) in of_optimizer and (p.requires_grad or n in self.names)}
        if len({id(p) for p in self.bare.parameters()} & of_optimizer) < len(of_optimizer):
            raise ValueError(
                "optimizer: it steps in tensors that are no parameters of the model; give it an optimizer of its own for these"
            )
        if self.chosen is None:
            if not own:
                raise ValueError("optimizer: it steps in no parameter of the model that requires grad")
            return list(own)
        names = list(self.chosen)
        if bad := [name for name in names if name not in own]:
            raise ValueError(
                f"parameters: {bad[0]!r} is no name of a parameter that the optimizer steps in; it steps in {list(own)[:8]}"
            )
        return names

    def _stepped_in(self) -> list[int]:
        return [id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def problem(self, train_loss: Closure, val_loss: Closure, others: Sequence[Closure] = ()) -> Problem:
        return Problem(train_loss, val_loss, self.bare, parameters=self.names, others=others, **self.settings)

    def clear(self) -> None:
        self.steps.clear()
        self.last, self.layouts = None, {}

    @contextmanager
    def taken(self, val_loss: Closure) -> Iterator[Problem]:
        """That of the steps, which are forgotten afterwards, whatever happens."""
        if not self.steps:
            raise RuntimeError("no step is remembered: call step(train_loss) before hypergradient(val_loss)")
        try:
            self._check_unchanged()
            self._check_steps()
            passes = [one for step in self.steps for one in step.passes]
            yield self.problem(passes[-1], val_loss, passes)
        finally:
            self.clear()

    # --- one step

    def step(self, train_loss: Closure | Sequence[Closure], clip_norm: float | None, scaler) -> Tensor:
        closures = _checked(train_loss, clip_norm)
        self._check_unchanged()
        if self.stepped_in != self._stepped_in():
            self._check_trained() if self.steps else self._begin()
        self.optimizer.zero_grad()
        precision = Precision(list(self.parameters.values()), self.trained)
        digits = precision.eps
        with precision.watched():
            passes, loss, direct = self._passes(closures, scaler)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        exact = precision.eps == digits and not (scaler is not None and scaler.is_enabled())
        if not exact and self.every > 1:
            raise NotImplementedError(
                f"every={self.every} runs steps again, which under autocast or a GradScaler come out in other digits; use every=1 with "
                "device='cpu'"
            )
        step = self._remembered(passes, loss, self.lam.flat(direct), exact)
        if clip_norm is not None:
            every = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(every, clip_norm)
            step.clipping = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm), clip_norm
        if self._made(scaler):
            self.steps.append(step)
            self.counts = {n: c + (step.kinds[n].group is not None) for n, c in self.counts.items()}
            if self.away is not None:
                self.away.take(step)
        self.versions = self._versions()
        return loss

    def _made(self, scaler) -> bool:
        """The optimizer's step; False if the scaler has skipped it."""
        if scaler is None:
            self.optimizer.step()
            return True
        scaler.step(self.optimizer)
        before = scaler.get_scale()
        scaler.update()
        return scaler.get_scale() >= before

    def _passes(self, closures: list[Closure], scaler) -> tuple[list[Pass], Tensor, list[Tensor | None]]:
        """(passes, their mean loss, its gradient by λ); that by θ is in .grad afterwards, and λ's .grad is left alone."""
        passes, losses, n = [], [], len(closures)
        hyper = self.lam.tensors
        others = [h for h in hyper if not h.is_leaf]
        direct: list[Tensor | None] = [None] * len(others)
        before = [h.grad for h in hyper]
        for h in hyper:
            h.grad = None
        try:
            for closure in closures:
                kinks = Kinks(packed=True) if self.kinks else OwnKinks()
                self.last = one = Pass(closure, self.bare, self.draws, kinks, self.last)
                with kinks.shared():
                    loss = closure(self.model)
                    check_scalar("train_loss", loss)
                    back = loss if n == 1 else loss / n
                    back = back if scaler is None else scaler.scale(back)
                    if others:  # backward() would go on into their own graphs, and free them
                        grads = torch.autograd.grad(back, others, retain_graph=True, allow_unused=True)
                        direct = [g if d is None else d if g is None else d + g for d, g in zip(direct, grads)]
                    leaves = [*self.trained, *(h for h in hyper if h.is_leaf)]
                    torch.autograd.backward(back, inputs=leaves if others else None)
                passes.append(one)
                losses.append(loss.detach().reshape(()))
            found = iter(direct)
            grads = [h.grad if h.is_leaf else next(found) for h in hyper]
        finally:
            for h, gradient in zip(hyper, before):
                h.grad = gradient
        return passes, losses[0] if n == 1 else torch.stack(losses).mean(), grads

    def _remembered(self, passes: list[Pass], loss: Tensor, direct, exact: bool) -> Step:
        """Before the optimizer steps."""
        self.counts = self.counts or self._counts()
        settings = [
            {n: v.clone() if isinstance(v, Tensor) else v for n, v in group.items() if n != "params"}
            for group in self.optimizer.param_groups
        ]
        t = len(self.steps)
        step = Step(t, passes, loss, settings, self._kinds(t), exact)
        if t % self.every:
            return step
        theta = {name: local(p) for name, p in self.parameters.items()}
        key = tuple(step.kinds.values())
        if key not in self.layouts:
            self.layouts[key] = Layout(theta, step.kinds)
        step.layout = layout = self.layouts[key]
        state = self.optimizer.state
        step.theta, step.gradient, step.states = [], [], []
        for bucket in layout.buckets:
            own = [self.parameters[name] for name in bucket.names]
            step.theta.append(bucket.copied({i: theta[name] for i, name in enumerate(bucket.names)}))
            grads = {i: local(p.grad) for i, p in enumerate(own) if p.grad is not None}
            step.gradient.append(bucket.copied({i: _dense(g) for i, g in grads.items()}))
            of = step.kinds[bucket.names[0]]
            parts = {name: {i: _dense(local(state[p][name])) for i, p in enumerate(own)} for name in sorted(of.states)}
            step.states.append({name: bucket.copied(tensors) for name, tensors in parts.items()} | self._scalars(own[0], of))
        step.at_theta = Gradients(loss, direct, step.gradient) if exact and self.every == 1 else None
        return step

    def _scalars(self, p: Tensor, of: Kind) -> dict:
        """What the optimizer's state holds beside tensors of θ's shape."""
        if self.elementwise:
            return {"step": of.count + len(self.steps)}
        wanted = of.group is not None or self.every > 1
        others = {n: v for n, v in self.optimizer.state.get(p, {}).items() if n not in of.states} if wanted else {}
        return {n: v.clone() if isinstance(v, Tensor) else v for n, v in others.items()}

    def _kinds(self, t: int) -> dict[str, Kind]:
        groups = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        if missing := [name for name, p in self.parameters.items() if id(p) not in groups]:
            self.clear()
            raise RuntimeError(
                f"the optimizer steps no longer in {missing[0]!r}, whose steps are remembered; they are forgotten now: make a new "
                "Trajectory for other groups"
            )
        kinds = {}
        for name, p in self.parameters.items():
            own, moves = None if self.elementwise else name, p.grad is not None
            if not moves and self.every == 1:
                kinds[name] = Kind(None, name=own)
                continue
            of = self.optimizer.state.get(p, {})  # which a later step that is run again begins with
            states = frozenset(
                n for n, s in of.items() if isinstance(s, Tensor) and s.shape == p.shape and s.is_floating_point()
            )
            states -= {"step"}
            kinds[name] = Kind(groups[id(p)] if moves else None, self.counts[name] - t, states, own)
        return kinds

    def _counts(self) -> dict[str, int]:
        """How many steps the optimizer has made in each parameter, as it says."""
        state = self.optimizer.state
        found = {name: state[p]["step"] for name, p in self.parameters.items() if p in state and "step" in state[p]}
        tensors = [step.detach().reshape(()) for step in found.values() if isinstance(step, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else ())
        found = {name: next(read) if isinstance(step, Tensor) else step for name, step in found.items()}
        return {name: int(found.get(name, 0)) for name in self.parameters}

    # --- what may not change meanwhile

    def _check_steps(self) -> None:
        """What losses read beside the model: a batch's memory that is filled again, a queue, a teacher. What changes gradients."""
        if not any(kind.group is not None for step in self.steps for kind in step.kinds.values()):
            raise RuntimeError("no step has moved a parameter: train_loss depends on none of the model's, but on another model's")
        hooked = [name for name, p in self.parameters.items() if p._backward_hooks]
        if hooked and not self.settings["in_place"]:
            warn(
                f"parameters: {hooked[0]!r} has a hook (register_hook). What it changes in the gradient of a training step is left out "
                "on the way back; strategy='in_place' takes it in"
            )
        ours = {id(t) for t in (*self.bare.parameters(), *self.lam.tensors)}
        for step in self.steps:
            if written := [name for one in step.passes for name in one.written(ours)]:
                raise RuntimeError(
                    f"train_loss of step {step.t} reads {written[0]!r}, which has been written into since, so that its pass cannot be "
                    "made again: give it a copy (clone(), copy.deepcopy of a module), or write into it after hypergradient()"
                )

    def _check_trained(self) -> None:
        """Layers may be frozen half-way; others have no place in the steps that are remembered."""
        if new := [name for name in self._names() if name not in self.parameters]:
            self.clear()
            raise RuntimeError(
                f"{new[0]!r} is trained now, and was not when the trajectory's steps began, which are forgotten now: call clear(), or "
                "hypergradient(), before parameters are unfrozen or added to the optimizer"
            )

    def _versions(self) -> tuple[list, list]:
        """(of θ and of the optimizer's state, of the model's other parameters and of λ)"""
        stepped = list(self.parameters.values())
        for p in self.parameters.values():
            stepped += [s for s in self.optimizer.state.get(p, {}).values() if isinstance(s, Tensor)]
        others = [*(p for name, p in self.own.items() if name not in self.parameters), *self.lam.tensors]
        of = lambda tensors: [(t, 0 if t.is_inference() else t._version) for t in tensors]
        return of(stepped), of(others)

    def _check_unchanged(self) -> None:
        """Where no step is remembered they may, and the optimizer is asked anew how many it has made."""
        stepped, others = map(_changed, self._versions(), self.versions or ([], []))
        if stepped:
            self.counts = None
        if not self.steps or not (stepped or others):
            return
        changed = stepped | others
        name = next((f"parameters ({name!r})" for name, p in self.own.items() if id(p) in changed), None)
        name = next((f"hyperparameters ([{i}])" for i, h in enumerate(self.lam.tensors) if id(h) in changed), name)
        self.clear()
        raise RuntimeError(
            f"{name or 'states of the optimizer'} have changed since the trajectory's last step, by another step or by hand, which it "
            "cannot go back through; its steps are forgotten now. Call clear() before such a change, or make every step by step()"
        )


def _changed(now: list[tuple], before: list[tuple]) -> set[int]:
    """Ids of tensors; 0 where there are more or fewer."""
    found = {id(a) for (a, v), (b, w) in zip(now, before) if a is not b or v != w}
    return found | {0} if len(now) != len(before) else found


def _checked(train_loss: Closure | Sequence[Closure], clip_norm: float | None) -> list[Closure]:
    closures = list(train_loss) if isinstance(train_loss, (list, tuple)) else [train_loss]
    if not closures or not all(map(callable, closures)):
        raise TypeError(
            f"train_loss must be a function of the model that returns a scalar loss, or several, not {train_loss!r}"
        )
    if clip_norm is not None and clip_norm != math.inf:  # which clips nothing
        check_positive("clip_norm", clip_norm)
    return closures


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _no_loss(model: nn.Module) -> Tensor:
    raise AssertionError
