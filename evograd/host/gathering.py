"""A gradient by θ that never exists whole: bucket by bucket, as the backward pass comes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .vectors import Layout


class Gathering:
    """Within the block gradients of leaves are handed to take(b, flat) by buckets, and dropped.

    Backward passes that a loss makes itself come before the block, and see nothing of it.
    """

    def __init__(self, layout: Layout, leaves: Mapping[str, Tensor], take: Callable[[int, Tensor], None]):
        self.layout, self.leaves, self.take = layout, leaves, take
        self.waiting: list[dict[int, Tensor]] = [{} for _ in layout.buckets]
        self.handles: list[RemovableHandle] = []

    def _hook(self, b: int, i: int, nothing: Tensor):
        def hook(gradient: Tensor) -> Tensor:
            self.waiting[b][i] = gradient
            if len(self.waiting[b]) == len(self.layout.buckets[b].names):
                self._hand_over(b)
            return nothing.expand_as(gradient)

        return hook

    def _hand_over(self, b: int) -> None:
        flat = self.layout.buckets[b].flat(self.waiting[b])
        self.waiting[b].clear()
        self.take(b, flat)

    def __enter__(self) -> None:
        for b, bucket in enumerate(self.layout.buckets):
            nothing = bucket.like.new_zeros(())
            for i, name in enumerate(bucket.names):
                self.handles.append(self.leaves[name].register_hook(self._hook(b, i, nothing)))

    def __exit__(self, kind, error, traceback) -> None:
        for handle in self.handles:
            handle.remove()
        if error is None:
            for b, found in enumerate(self.waiting):
                if found:  # losses do not depend on all of this bucket
                    self._hand_over(b)


def partial(loss: Tensor, inputs: Sequence[Tensor], keep: bool = False) -> list[Tensor | None]:
    """∂loss/∂input for each input; None where loss does not depend on it. keep: its graph, which other losses share."""
    if not loss.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, retain_graph=keep or None, allow_unused=True))
