"""In how many digits losses are computed: candidates have to differ by more than these resolve."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.amp.autocast_mode import autocast

from ..operations.threads import Shared, replaced


class _OfThisThread(threading.local):
    watching: tuple[Precision, ...] = ()
    full = False


_here, _enter = _OfThisThread(), autocast.__enter__


class Precision:
    """The coarsest type of number that losses are computed in: that of the model's parameters, or of torch.autocast.

    Not seen is what a compiled graph or a module casts by itself.
    """

    def __init__(self, theta: Collection[Tensor], parameters: Collection[Tensor]):
        self.dtype = torch.float64
        self.part = 2 * sum(p.numel() for p in theta) < sum(p.numel() for p in parameters)  # θ is a small part of the network
        for dtype in {p.dtype for p in parameters}:
            self._add(dtype)

    def _add(self, dtype: torch.dtype) -> None:
        # What is smaller than two bytes is how tensors are kept, and not what is computed with.
        if dtype.is_floating_point and dtype.itemsize > 1 and torch.finfo(dtype).eps > self.eps:
            self.dtype = dtype

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def low(self) -> bool:
        """Lower than float32."""
        return self.eps > torch.finfo(torch.float32).eps

    @property
    def radius(self) -> float:
        """How far guided candidates have to lie from θ at least, over the norm of θ.

        Measured against float64, with λ in front of the network and behind it: below half of eps rounding shows, far above it
        curvature. A small part of the network (adapters) has to move further.
        """
        return self.eps * (4 if self.part and self.low else 0.5)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Autocast that is on where the block begins, or is entered within it by this thread, counts."""
        self._look()
        before, _here.watching = _here.watching, (*_here.watching, self)
        try:
            with _watching:
                yield
        finally:
            _here.watching = before

    def _look(self) -> None:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                self._add(torch.get_autocast_dtype(device))


@contextmanager
def full_precision() -> Iterator[None]:
    """Nothing is cast within the block: autocast is off, and stays so where a loss enters it."""
    before, _here.full = _here.full, True
    try:
        with ExitStack() as stack:
            stack.enter_context(_watching)
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(autocast(device))
            yield
    finally:
        _here.full = before


def _entered(self: autocast) -> autocast:
    enabled, self._enabled = self._enabled, self._enabled and not _here.full
    try:
        result = _enter(self)
    finally:
        self._enabled = enabled
    for precision in _here.watching:
        precision._look()
    return result


_watching = Shared(lambda: replaced((autocast, "__enter__", _entered)))
