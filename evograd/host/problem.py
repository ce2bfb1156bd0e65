"""What every estimator needs of a bilevel problem: losses at other parameters, and a model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..operations.forward_mode import bare, leaves
from ..operations.threads import one_at_a_time
from . import checks
from .checks import Closure, Parameters
from .draws import Draws
from .gathering import Gathering, partial
from .in_place import InPlace
from .precision import Precision
from .reach import Reach
from .sharded import Sharding, local
from .slots import Slots, some
from .stand_ins import StandIn, place
from .vectors import Layout, Position, Vector

NO_GRAPH = ("does not require grad and does not have a grad_fn", "differentiated Tensors does not require grad")


class Problem:
    """A bilevel problem min_λ ℓ_V(θ*(λ), λ) around the parameters θ of a model.

    `theta` maps the names of the parameters to differentiate through to detached tensors; every other parameter of the
    model is held fixed, so that no graph is built for it, and the hyperparameters stay themselves.

    `layout` is θ in buckets, within `undisturbed`.

    in_place: other parameters are written into the model's own, see `InPlace`, and `theta` has copies of these within
    `undisturbed`. None: where the model is sharded, and `theta` has this process's shards. False: such a model is refused.
    keeps: graphs, of which losses may have a part in common.  others: losses that will take the place of train_loss.
    """

    def __init__(
        self,
        train_loss: Closure,
        val_loss: Closure,
        model: nn.Module,
        hyperparameters: Sequence[Tensor],
        parameters: Parameters,
        in_place: bool | None = False,
        keeps: bool = False,
        others: Sequence[Closure] = (),
    ):
        checks.check_closures(train_loss, val_loss, model)
        self.train_loss, self.val_loss, self.model, self.keeps = train_loss, val_loss, model, keeps
        self.hyperparameters = checks.checked_hyperparameters(hyperparameters)
        self.sharding = Sharding.of(model)
        hyper = {id(h) for h in self.hyperparameters}
        self.reach = Reach(model, train_loss, val_loss, *others)
        self.slots = Slots(model, self.reach.modules, hyper)
        self.reach.watch(self.slots.looked_after(), self.hyperparameters)
        checks.check_built((name, tensor) for _, name, tensor in self.slots.originals)
        self.own = self.slots.parameters
        if self.sharding and in_place is False:
            checks.refuse_sharded(self.own)
        found = checks.chosen(model, self.own, hyper, parameters)
        self.theta = {name: local(p) for name, p in found.items()}
        others = {name: p for name, p in self.own.items() if id(p) not in hyper}
        self.fixed = {name: StandIn.fixed(p) for name, p in others.items() if name not in self.theta}
        checks.check_memory({name: local(p) if self.sharding else p for name, p in others.items()}, self.theta)
        self.place: InPlace | None = None
        if in_place or self.sharding:
            if self.sharding:
                self.sharding.check(self.theta, self.own, self.hyperparameters)
            self.place = InPlace(self.slots, list(self.theta), self.hyperparameters, self.sharding)
        self.lam = Vector(self.hyperparameters)
        self.precision = Precision([self.own[name] for name in self.theta], list(self.own.values()))
        tensors = [*self.theta.values(), *self.fixed.values(), *self.hyperparameters]
        devices = {t.device for t in tensors} | ({self.sharding.device} if self.sharding else set())
        self.draws = Draws({device for device in devices if device.type == "cuda"})

    @property
    def shard(self) -> tuple[int, int] | None:
        """(which, of how many) of a sharded model's θ."""
        return self.sharding.shard if self.sharding else None

    @property
    def shards_in_log(self) -> float:
        """log of how much longer θ is than this process's shards, where all are of one length."""
        return 0.5 * math.log(self.shard[1]) if self.shard else 0.0

    def _apart(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that stays as it is when the model's own are written into."""
        return tensor if self.place is None else self.place.apart(name, tensor)

    # --- losses at other parameters

    def holding(self, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor] | None = None) -> AbstractContextManager:
        """The model with `parameters` in place of its own; see `Slots.holding`.

        What a loss needs for its backward pass may be computed there (gradient checkpointing), so that belongs inside too.
        """
        own = self.own
        pairs = [(own[name], StandIn.of(own[name], tensor)) for name, tensor in parameters.items()]
        return self.slots.holding([*((own[name], tensor) for name, tensor in self.fixed.items()), *pairs], buffers)

    def evaluate(self, closure: Closure) -> Tensor:
        """closure(model), checked to be a scalar, as ()."""
        try:
            return self.scalar(closure, closure(self.model))
        except RuntimeError as error:
            if any(words in str(error) for words in NO_GRAPH):
                raise RuntimeError(
                    f"{self.which(closure)} takes a gradient in which there is no graph here ({error}): gradients by the model's "
                    "parameters inside of a loss are for evograd.baselines.unrolled; by other tensors, call requires_grad_() on them "
                    "before they are used"
                ) from error
            raise

    def which(self, closure: Closure) -> str:
        return "train_loss" if closure is self.train_loss else "val_loss"

    def scalar(self, closure: Closure, value: object) -> Tensor:
        """The value of a loss, as ()."""
        which = self.which(closure)
        checks.check_scalar(which, value)
        self._check_place(which, value)
        return value if value.ndim == 0 else value.reshape(())

    def _check_place(self, which: str, value: Tensor) -> None:
        """RuntimeError if a loss goes back to the model's own θ, where others stand in their place."""
        end = bare(value).grad_fn
        if self.place is not None or end is None:
            return
        found = {id(leaf) for leaf in leaves(end)}
        if (name := next((name for name in self.theta if id(self.own[name]) in found), None)) is not None:
            raise RuntimeError(
                f"{which} uses the model's own parameter {name!r}, and not what stands in its place at a candidate or a "
                "lookahead: parameters that were listed before (an optimizer's groups, say), or that a module keeps in a "
                "tuple, a nested container or a view. Take them from the model that the loss is given, detach() what is "
                "meant to be constant, or use hypergradient with strategy='in_place', where they are the same"
            )

    def at(self, position: Position) -> AbstractContextManager:
        """The model at a position, which has no graph of its own."""
        return self.holding(_whole(position)) if self.place is None else self.place.at(position, differentiable=False)

    def differentiable(self, at: Position) -> tuple[dict[str, Tensor], AbstractContextManager]:
        """(θ by name, the model at a position, which has a graph from there on)"""
        if self.place is not None:
            return self.place.parameters, self.place.at(at, differentiable=True)
        held = _whole(at)
        ours = {name: StandIn.leaf(held[name]) for bucket in self.layout.buckets for name in bucket.names}
        return ours, self.holding(ours)

    def partial(self, closure: Closure, at: Position) -> tuple[Tensor, list[Tensor | None]]:
        """(ℓ, ∂ℓ/∂λ) of a loss at a position, without a graph for θ."""
        with self.at(at):
            loss = self.evaluate(closure)
            return loss.detach(), partial(loss, self.hyperparameters, self.keeps)

    def gradient(
        self, closure: Closure, at: Position, take: Callable[[int, Tensor], None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(ℓ, ∂ℓ/∂λ) of a loss at a position; and take(b, flat) gets its gradient by θ there, bucket by bucket.

        A bucket's gradient is handed over as soon as the backward pass has it, so that the whole need never exist at once. On a
        sharded model that is when the pass has ended, a process's shards being whole anyway.
        """
        ours, block = self.differentiable(at)
        n = len(self.hyperparameters)
        with block:
            value = self.evaluate(closure)
            if self.sharding:
                grads = self.sharding.backward(value, self.hyperparameters)
            else:
                with Gathering(self.layout, ours, take) if len(self.layout.buckets) > 1 else nullcontext():
                    grads = partial(value, [*self.hyperparameters, *ours.values()], self.keeps)
        if self.sharding:
            for b, bucket in enumerate(self.layout.buckets):
                own = [self.own[name] for name in bucket.names]
                found = {i: local(p.grad) for i, p in enumerate(own) if p.grad is not None}
                for p in own:
                    p.grad = None
                if found:
                    take(b, bucket.flat(found))
        elif len(self.layout.buckets) == 1 and any(g is not None for g in grads[n:]):
            take(0, self.layout.buckets[0].flat(dict(enumerate(grads[n:]))))
        return value.detach(), grads[:n]

    def gradient_of(self, closure: Closure, at: Position) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """(ℓ, ∂ℓ/∂λ, ∂ℓ/∂θ) of a loss at a position, the latter a flat tensor for each bucket, or None."""
        flats: dict[int, Tensor] = {}
        value, direct = self.gradient(closure, at, flats.__setitem__)
        return value, direct, [flats.get(b) for b in range(len(self.layout.buckets))]

    def whole(self, gradient: Sequence[Tensor | None]) -> list[Tensor]:
        """Zeros where there is no dependence."""
        return [bucket.zeros() if flat is None else flat for flat, bucket in zip(gradient, self.layout.buckets)]

    def val_gradient(self, at: Position) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """(ℓ_V, ∂ℓ_V/∂λ, G = ∂ℓ_V/∂θ) at a position."""
        value, direct, gradient = self.gradient_of(self.val_loss, at)
        self.check_validation(gradient, direct)
        return value, direct, self.whole(gradient)

    def check_validation(self, gradient: Sequence[Tensor | None], direct: Sequence[Tensor | None]) -> None:
        """RuntimeError if val_loss depends on neither θ nor λ."""
        if not self.sharding and all(g is None for g in (*gradient, *direct)):
            raise RuntimeError(
                "val_loss depends on neither the parameters of the model that it is given nor the hyperparameters: it is computed "
                "under torch.no_grad or torch.inference_mode, or on another model"
            )

    def lookahead(
        self,
        lookahead: Parameters | str,
        inner_lr: float,
        train_gradient: Callable[[], list[Tensor | None]],
        mean: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> Position:
        """Where G is taken: θ itself (None), given parameters, or θ − inner_lr ∇ℓ_T(θ, λ) ("sgd").

        train_gradient: gives ∇ℓ_T(θ, λ), bucket by bucket.  mean: of it, over processes.
        """
        if lookahead is None:
            return [self.theta]
        if isinstance(lookahead, str):  # "sgd"
            steps = emptied(mean(self.whole(train_gradient())))
            return self.layout.moved(torch.mul(flat, -inner_lr) for flat in steps)
        given = checks.named(self.model, self.own, lookahead, "lookahead").items()
        given = {name: self._apart(name, local(tensor)) for name, tensor in given if name in self.theta}
        return [{name: given.get(name, p) for name, p in self.theta.items()}]

    def grads(self, total: Vector.Flat) -> list[Tensor]:
        """The hypergradient, one tensor for each hyperparameter; RuntimeError where nothing depends on one."""
        self.check_dependence(total)
        return self.lam.split(total)

    def check_dependence(self, total: Vector.Flat) -> None:
        """RuntimeError if there is a hyperparameter on which nothing depends."""
        for i, h in enumerate(self.hyperparameters):
            if i not in total.depends:
                name = next((f" ({n!r})" for n, p in self.model.named_parameters() if p is h), "")
                raise RuntimeError(
                    f"hyperparameters[{i}]{name}, of shape {tuple(h.shape)}: the hypergradient does not depend on it; either "
                    "val_loss must, or train_loss by a term that the parameters are in too, by operations that autograd records"
                )

    def assemble(self, terms: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """The hypergradient as a sum of terms over the hyperparameters; None stands for no dependence."""
        total = self.lam.flat(terms[0])
        for term in terms[1:]:
            total = self.lam.add(total, self.lam.flat(term))
        return self.grads(total)

    @contextmanager
    def undisturbed(self):
        """Whatever a closure does to them, flags and gradients are as before afterwards, after an error too. Other threads wait.

        RuntimeError if a closure has written into the model's parameters, which cannot be undone.
        """
        with one_at_a_time, self._undisturbed():
            yield

    @contextmanager
    def _undisturbed(self):
        tensors = {id(t): t for t in [*self.own.values(), *self.hyperparameters]}.values()
        before = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
        versions = {name: p._version for name, p in self.own.items() if not p.is_inference()}
        beside = {name: t._version for name, t in self.reach.tensors.items()}
        memory = [(h, h.detach()) for h in self.hyperparameters]
        try:
            for tensor, _, gradient in before:
                if gradient is not None:
                    tensor.grad = None
            if self.place is not None:
                self.place.save()
                self.theta = {name: self._apart(name, p) for name, p in self.theta.items()}
            self.layout = Layout(self.theta)
            yield
        finally:
            if self.place is not None:
                self.place.restore()
            for tensor, requires_grad, gradient in before:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not gradient:
                    tensor.grad = gradient
            for h, here in memory:
                if h.dtype != here.dtype or place(h) != place(here):  # model.double() in a loss
                    h.data = here
            if self.sharding:
                self.sharding.copy_flags()
        written = [self.own[name] for name, version in versions.items() if self.own[name]._version != version]
        self.slots.check_written(written, changed=True)
        self.check_beside([name for name, version in beside.items() if self.reach.tensors[name]._version != version])

    def check_beside(self, written: Sequence[str]) -> None:
        """RuntimeError if a loss has written into tensors that nobody looks after, by name."""
        if written:
            raise RuntimeError(
                f"a loss has written into {some(written)}, which it reaches beside the model, so that each evaluation sees "
                "what another has left there; do that outside of the losses, or make it a buffer of a module, of which each has "
                "a copy"
            )


def emptied(tensors: list[Tensor]) -> Iterator[Tensor]:
    """One after the other, and none is kept."""
    while tensors:
        yield tensors.pop(0)


def _whole(position: Position) -> dict[str, Tensor]:
    return {name: tensor for part in position for name, tensor in part.items()}
