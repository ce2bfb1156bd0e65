"""The order in which a run sees its data: drawn from a generator of its own, so that every method sees the same batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of random batches of n samples, epoch after epoch without end; every batch is full."""
    while True:
        yield from torch.randperm(n, generator=generator, device=generator.device).split(batch_size)[: max(1, n // batch_size)]
