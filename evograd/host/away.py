"""Tensors that wait in the host's memory, copied to it and back beside the computation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .steps import Step


class Away:
    """Keeps the flat tensors of steps on the CPU, pinned, by a stream of its own on CUDA."""

    @classmethod
    def of(cls, device: str | torch.device | None, parameters: Iterable[Tensor]) -> Away | None:
        """None where they stay on the parameters' device."""
        if device is None:
            return None
        if torch.device(device).type != "cpu":
            raise ValueError(f"device={device!r} must be 'cpu', or None for that of the parameters")
        (*others, first) = {p.device for p in parameters}
        return cls(first) if others or first.type != "cpu" else None

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current = None

    def take(self, step: Step) -> None:
        """The step's tensors to the host."""
        self._each(step, self._down)

    def bring(self, step: Step) -> None:
        """And back; `wait` before they are used."""
        self._each(step, self._up)

    def wait(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def _each(self, step: Step, moved) -> None:
        if step.theta is None:
            return
        devices = [bucket.like.device for bucket in step.layout.buckets]
        self.current = None if self.stream is None else torch.cuda.current_stream(self.stream.device)
        with torch.cuda.stream(self.stream):  # None is no stream
            if self.stream is not None:
                self.stream.wait_stream(self.current)
            pairs = lambda flats: [moved(flat, device) for flat, device in zip(flats, devices)]
            step.theta, gradient = pairs(step.theta), pairs(step.gradient)
            if step.at_theta is not None:
                step.at_theta = step.at_theta._replace(by_theta=gradient)
            step.gradient = gradient
            step.states = [
                {name: moved(s, device) if isinstance(s, Tensor) and s.ndim else s for name, s in state.items()}
                for state, device in zip(step.states, devices)
            ]

    def _down(self, tensor: Tensor, device: torch.device) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.stream is not None)
        host.copy_(tensor, non_blocking=True)
        if self.stream is not None:
            tensor.record_stream(self.stream)
        return host

    def _up(self, host: Tensor, device: torch.device) -> Tensor:
        tensor = host.to(device, non_blocking=True)
        if self.stream is not None:
            tensor.record_stream(self.current)
        return tensor
