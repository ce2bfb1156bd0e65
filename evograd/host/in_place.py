"""Candidates in a model's own tensors, one after the other, and in the end what was there before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .sharded import Sharding, is_sharded, local
from .slots import Slots, StandIn, clones, meeting, some, storage, write
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
        if _place(tensor) == _place(self.live[name]):
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
        counts = self._counts()
        with ExitStack() as stack:
            if not differentiable:
                stack.enter_context(_saying(self.trained))
            stack.enter_context(self.slots.holding((), in_place=True))
            if self.sharding is not None:
                stack.callback(self.sharding.end)
            yield
            written = [name for name, count in self._counts().items() if counts[name] != count]
        if written:
            raise RuntimeError(
                f"a loss has written into the model's parameters {some(written)}, and so into those of the candidate that it is for"
            )

    def _counts(self) -> Mapping[str, int]:
        """Autograd's, by which writing is noticed."""
        kept = self.slots.written
        return {n: t._version for n, t in self.live.items() if not t.is_inference() and id(self.parameters[n]) not in kept}


class _Trained(nn.Parameter):
    """A parameter that has no graph for now, and says that it requires grad, see `StandIn`."""

    requires_grad = StandIn.requires_grad
    requires_grad_ = StandIn.requires_grad_
    says = True


@contextmanager
def _saying(parameters: list[nn.Parameter]):
    try:
        for p in parameters:
            p.__class__ = _Trained
        yield
    finally:
        for p in parameters:
            p.__class__ = nn.Parameter
            vars(p).pop("says", None)


def _place(tensor: Tensor) -> tuple:
    """Where its elements lie."""
    return storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
