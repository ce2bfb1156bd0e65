"""The order in which a run sees its data, drawn from a generator of its own, so that every method sees the same batches; how it
comes to the device; and a fingerprint of the data, for the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def fingerprint(*parts: str | bytes) -> str:
    """A few characters that are the same for the same parts, in their order, and others for others."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)} ".encode())  # so that it counts where a part ends
        digest.update(data)
    return digest.hexdigest()[:12]


def fingerprint_of_file(path: Path) -> str:
    """Of a file that may be large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def fingerprint_of_images(names: Iterable[str], labels: Iterable[int], n_read: int = 32) -> str:
    """Of many image files: their names (without the place of their folders), labels, sizes, and what n_read of them hold."""
    files = [Path(name) for name in names]
    listed = "\n".join(f"{'/'.join(file.parts[-2:])} {label} {file.stat().st_size}" for file, label in zip(files, labels))
    return fingerprint(listed, *(file.read_bytes() for file in files[:: max(1, len(files) // n_read)]))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The host's tensor on that device. To CUDA from pinned memory: the host does not wait until it is there."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class batches:
    """An iterator over indices of random batches of n samples, epoch after epoch without end; every batch is full.

    The generator may be shared; its state is its owner's to save.
    """

    def __init__(self, n: int, batch_size: int, generator: torch.Generator):
        self.n, self.batch_size, self.generator = n, batch_size, generator
        self.per_epoch = max(1, n // batch_size)
        self.order, self.done = None, self.per_epoch  # the permutation of this epoch, and how many of its batches are done

    def __iter__(self) -> batches:
        return self

    def __next__(self) -> Tensor:
        if self.done == self.per_epoch:
            self.order, self.done = torch.randperm(self.n, generator=self.generator, device=self.generator.device), 0
        start = self.done * self.batch_size
        self.done += 1
        return self.order[start : start + self.batch_size]

    def state_dict(self) -> dict:
        return {"order": self.order, "done": self.done}

    def load_state_dict(self, state: dict) -> None:
        order = state["order"]
        self.order, self.done = None if order is None else order.to(self.generator.device), state["done"]
