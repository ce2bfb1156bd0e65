"""Candidates in a model's own tensors, one after the other, and in the end what was there before."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .sharded import Sharding, is_sharded, local
from .slots import Slots, clones, meeting, storage, write
from .stand_ins import StandIn, Watch, place
from .vectors import Bucket, Position


class InPlace:
    """The model's own parameters `theta`, or this process's shards of them, written into and put back.

    Autograd's counts of what has been written stay as they are for who holds a graph from before: all values are put back. A
    graph that outlives its candidate is told from them, and its backward pass raises.
    """

    def __init__(self, slots: Slots, theta: Sequence[str], hyperparameters: Sequence[Tensor], sharding: Sharding | None):
        self.slots, self.sharding = slots, sharding
        self.hyperparameters = {id(h) for h in hyperparameters}
        self.parameters = {name: slots.parameters[name] for name in theta}
        self.trained = [p for p in self.parameters.values() if p.requires_grad and type(p) is nn.Parameter]
        self.live = {name: local(p) if is_sharded(p) else p for name, p in self.parameters.items()}
        self.fixed = [
            p
            for name, p in slots.parameters.items()
            if name not in self.parameters and id(p) not in self.hyperparameters and type(p) is nn.Parameter
        ]
        self.owners = {id(t): self.parameters[name] for name, t in self.live.items()} | {id(p): p for p in self.fixed}
        self.storages = {storage(t) for t in self.live.values()}
        self._check_memory(hyperparameters)
        self.saved: dict[str, Tensor] = {}
        self.counts = ExitStack()

    def _check_memory(self, hyperparameters: Sequence[Tensor]) -> None:
        """ValueError for λ in the memory of θ: a candidate would be written into both."""
        for name, i in meeting({**self.live, **dict(enumerate(hyperparameters))}):
            if name in self.live and i not in self.live:
                raise ValueError(
                    f"hyperparameters[{i}] is in the memory of the parameter {name!r}, and a candidate in place would be written "
                    "into both; give it memory of its own, h.detach().clone().requires_grad_(), or use strategy='stream'"
                )

    def save(self) -> None:
        """Keep what the model holds: one copy of its parameters."""
        for tensor in (*self.live.values(), *self.slots.kept()):
            if not tensor.is_inference():
                self.counts.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
        self.saved = dict(zip(self.live, clones(list(self.live.values()))))

    def restore(self) -> None:
        """Put it back."""
        self.hold([self.saved])
        self.counts.close()

    def apart(self, name: str, tensor: Tensor) -> Tensor:
        """The same values in a tensor that is not written into: what was saved of them, or another copy."""
        if place(tensor) == place(self.live[name]):
            return self.saved[name]
        return tensor.clone() if storage(tensor) in self.storages else tensor

    def hold(self, position: Position) -> None:
        """Write a position into the model."""
        for part in position:
            write([self.live[name] for name in part], list(part.values()))
        torch.clear_autocast_cache()  # of what they were, in lower precision

    def displacement(self, bucket: Bucket) -> Tensor:
        """What the model holds, minus the bucket's θ, as a flat tensor."""
        flat = bucket.zeros()
        views = bucket.views(flat)
        write(views, [self.live[name] for name in bucket.names])
        torch._foreach_sub_(views, bucket.tensors)
        return flat

    @contextmanager
    def at(self, position: Position, differentiable: bool):
        """The model at a position, with or without a graph for its parameters.

        FSDP2 gathers parameters anew afterwards. DistributedDataParallel sends no gradients that torch.autograd.grad takes.
        """
        self.hold(position)
        for name, p in self.slots.parameters.items():
            if p.is_leaf and id(p) not in self.hyperparameters:
                p.requires_grad_(differentiable and name in self.live)
        with ExitStack() as stack:
            stack.enter_context(_noticing(self.fixed, _Own))
            stack.enter_context(_noticing(self.trained, _Own if differentiable else _Trained))
            watched = (*self.live.values(), *self.fixed)
            watch = Watch(t for t in watched if id(self.owners[id(t)]) not in self.slots.written)
            stack.enter_context(self.slots.holding((), in_place=True))
            if self.sharding is not None:
                stack.callback(self.sharding.end)
            try:
                yield
            finally:
                written = watch.end()
        changed = any(still and any(t is p for p in self.fixed) for t, still in written.items())
        self.slots.check_written([self.owners[id(t)] for t in written], changed)


class _Own(nn.Parameter):
    """A parameter of the model's own, which takes note of what is written into its .data, see `StandIn`."""

    data = StandIn.data


class _Trained(_Own):
    """One that has no graph for now, and says that it requires grad, see `StandIn`."""

    requires_grad = StandIn.requires_grad
    requires_grad_ = StandIn.requires_grad_
    says = True


@contextmanager
def _noticing(parameters: list[nn.Parameter], kind: type[_Own]):
    try:
        for p in parameters:
            p.__class__ = kind
        yield
    finally:
        for p in parameters:
            p.__class__ = nn.Parameter
            vars(p).pop("says", None)
