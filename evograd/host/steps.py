"""Steps of training that are remembered: where they were made, by what gradients, and how to make their passes again elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..operations.kinks import Kinks, OwnKinks
from .draws import Draws
from .problem import Problem
from .processes import Alone
from .reach import Reach
from .slots import clones, write
from .vectors import Layout, Position, Vector, exactly


class Kind(NamedTuple):
    """group: of the optimizer, None where it leaves the parameter as it is.  count: its steps before the trajectory."""

    group: int | None
    count: int = 0
    states: frozenset[str] = frozenset()
    name: str | None = None  # of a tensor that has a bucket of its own


class Gradients(NamedTuple):
    """ℓ, ∂ℓ/∂λ and ∂ℓ/∂θ, the latter a flat tensor for each bucket; None where it was not taken."""

    loss: Tensor
    by_lambda: Vector.Flat
    by_theta: list[Tensor] | None


class Pass:
    """One pass of a training loss, as it was made: on these batches, in these modes, with these buffers and random draws.

    Called like the loss itself, in a block that holds other parameters and undoes what is done to modules.
    """

    def __init__(self, closure: Callable, model: nn.Module, draws: Draws, kinks: Kinks | OwnKinks, like: Pass | None):
        self.func, self.kinks, self.draws = as_now(closure), kinks, draws
        reach = Reach(model, closure)
        self.beside = list(dict.fromkeys(reach.modules))  # whose state is as much part of it as the model's
        self.read = [(name, t, t._version) for name, t in reach.read.items() if not t.is_inference()]
        self.drawn = draws.state()
        self.modes = [module.training for module in self._modules(model)]
        self.own = [(b, 0 if b.is_inference() else b._version) for b in self._buffers(model)]
        same = like is not None and len(like.own) == len(self.own)
        same = same and all(b is c and v == w for (b, v), (c, w) in zip(self.own, like.own))
        self.buffers = like.buffers if same else clones([b for b, _ in self.own])

    def __call__(self, model: nn.Module) -> Tensor:
        for module, mode in zip(self._modules(model), self.modes):
            module.training = mode
        write(self._buffers(model), self.buffers)
        return self.func(model)

    def written(self, but: Collection[int]) -> list[str]:
        """What it reads beside the model, and was written into since.  but: ids of what others look after."""
        return [name for name, t, version in self.read if t._version != version and id(t) not in but]

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        return [part for module in (model, *self.beside) for part in module.modules()]

    def _buffers(self, model: nn.Module) -> list[Tensor]:
        return [b for module in self._modules(model) for b in module._buffers.values() if b is not None]

    @contextmanager
    def again(self) -> Iterator[None]:
        """A block that draws what it drew, and takes its kinks."""
        with self.draws.replay(self.drawn), self.kinks.shared():
            yield


@dataclass
class Step:
    """One step of the optimizer: its passes, whose mean is the loss, and what went into the update.

    t: how many steps of the trajectory came before.  kinds: by name of a parameter, what its bucket has in common, see `Kind`.
    settings: of the optimizer's groups.  clipping: (norm, max_norm) of all gradients, if they were clipped.
    theta, gradient, states: θ_t, ∇ℓ_t and the optimizer's state before the step, a flat tensor for each bucket of the layout;
    None where steps are run again.
    exact: whether its passes were made in all the digits that θ has; else gradients of candidates are not beside its own.
    at_theta: loss and gradients at θ_t, if exact.
    """

    t: int
    passes: list[Pass]
    loss: Tensor
    settings: list[dict]
    kinds: dict[str, Kind]
    exact: bool = True
    clipping: tuple[Tensor, float] | None = None
    layout: Layout | None = None
    theta: list[Tensor] | None = None
    gradient: list[Tensor] | None = None
    states: list[dict] | None = None
    at_theta: Gradients | None = None

    # of a pair of candidates, see `evograd.guided.Pair`
    @property
    def losses(self) -> dict[str, Tensor]:
        return {}

    @property
    def known(self) -> Vector.Flat | None:
        return self.at_theta and self.at_theta.by_lambda

    def gradients(
        self, problem: Problem, position: Position, team: Alone, take: Callable[[int, Tensor], None] | None
    ) -> tuple[Tensor, Vector.Flat]:
        """(ℓ, ∂ℓ/∂λ), means over the passes, made again at a position; take(b, flat) gets ∂ℓ/∂θ, once for each bucket.

        team: whose mean ∂ℓ/∂θ is.  take: None where it is not wanted.
        """
        buckets, share = problem.layout.buckets, 1 / len(self.passes)
        at_once = len(self.passes) == 1 and not team.averages  # a bucket as soon as the backward pass has it
        taken: set[int] = set()
        waiting: list[Tensor | None] = [None] * len(buckets)
        losses, partials = [], []

        def hand_over(b: int, flat: Tensor) -> None:
            taken.add(b)
            take(b, buckets[b].padded(flat))

        def gather(b: int, flat: Tensor) -> None:
            flat = buckets[b].padded(flat)
            waiting[b] = flat * share if waiting[b] is None else waiting[b].add_(flat, alpha=share)

        position = list(position)
        for one in self.passes:
            problem.train_loss = one
            with one.again():
                if take is None:
                    loss, direct = problem.partial(one, position)
                else:
                    loss, direct = problem.gradient(one, position, hand_over if at_once else gather)
            losses.append(loss)
            partials.append(problem.lam.flat(direct))
        if take is not None:
            rest = enumerate([None] * len(buckets) if at_once else team.mean(problem.whole(waiting)))
            for b, flat in rest:
                if b not in taken:
                    take(b, buckets[b].zeros() if flat is None else flat)
        if len(self.passes) == 1:
            return losses[0], partials[0]
        weights = exactly(torch.ones(len(losses), device=losses[0].device)) * share
        return torch.stack(losses).mean(), problem.lam.weighted_sum(weights, partials)


def as_now(function: Callable, made: dict | None = None) -> Callable:
    """A function whose names stand for what they do now: a loop binds x and y anew, and its steps' passes are made again later.

    What it reads from its own file, by cells and globals, is taken over, in functions of that file that it calls too. What an
    object's attributes hold is not.
    """
    made = {} if made is None else made
    if isinstance(function, partial):
        return partial(as_now(function.func, made), *function.args, **function.keywords)
    if type(function) is not FunctionType or vars(function):  # wrapped ones know more than their code
        return function
    if id(function) in made:
        return made[id(function)]
    file = function.__globals__
    names = {name: file[name] for name in _names(function.__code__) if name in file}
    cells = tuple(CellType() for _ in function.__closure__ or ())
    now = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells or None)
    now.__kwdefaults__, now.__qualname__ = function.__kwdefaults__, function.__qualname__
    made[id(function)] = now

    def taken(value: object) -> object:
        return as_now(value, made) if type(value) is FunctionType and value.__globals__ is file else value

    names.update({name: taken(value) for name, value in names.items()}, __builtins__=file.get("__builtins__", __builtins__))
    names.setdefault("__name__", file.get("__name__"))
    for cell, before in zip(cells, function.__closure__ or ()):
        with suppress(ValueError):  # it is empty
            cell.cell_contents = taken(before.cell_contents)
    return now


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
