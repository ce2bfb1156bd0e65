"""The directions ε_k in which candidates are perturbed. They are drawn again from their seeds when needed, never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

NoiseFunction = Callable[[Tensor, torch.Generator], Tensor]


def sign(like: Tensor, generator: torch.Generator) -> Tensor:
    """sign(N(0, 1)): ±1 with equal probability for each element of `like`. One random byte gives eight signs."""
    n = like.numel()
    words = torch.empty(-(-n // 64), dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=generator)
    # A fake tensor belongs to its mode, and must not be cached beyond it.
    table = (_signs_of_bytes if detect_fake_mode() is None else _signs_of_bytes.__wrapped__)(like.device, like.dtype)
    return table.index_select(0, words.view(torch.uint8).int()).view(-1)[:n].view(like.shape)


@lru_cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256, 8): the bits of each byte, as ±1."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(dtype).mul_(2).sub_(1)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) for each element of `like`."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def draw_seeds(shape: tuple[int, ...], generator: torch.Generator | None) -> list:
    """Seeds from a generator on the host, torch's global one if None: real numbers under FakeTensorMode too."""
    with _disable_current_modes():
        return torch.randint(2**62, shape, generator=generator, device="cpu").tolist()


NOISES: dict[str, NoiseFunction] = {"sign": sign, "normal": normal}


class SeededNoise:
    """ε_k, tensor by tensor: `noise(k, name)` is the same whenever it is asked for.

    Seeds are drawn on the host from `generator` (torch's global one if None), one for each candidate and tensor, so that
    the noise of a tensor can be had in whatever order the backward pass asks for it.
    """

    def __init__(
        self, function: NoiseFunction, theta: Mapping[str, Tensor], n_candidates: int, generator: torch.Generator | None
    ):
        self.function, self.theta = function, theta
        self.seeds = [dict(zip(theta, row)) for row in draw_seeds((n_candidates, len(theta)), generator)]
        self.generators = {device: torch.Generator(device) for device in {p.device for p in theta.values()}}

    def __call__(self, k: int, name: str) -> Tensor:
        like = self.theta[name]
        generator = self.generators[like.device].manual_seed(self.seeds[k][name])
        epsilon = self.function(like, generator)
        if (epsilon.shape, epsilon.dtype, epsilon.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"noise returned {tuple(epsilon.shape)}, {epsilon.dtype} on {epsilon.device} for {name!r}; "
                f"it must be {tuple(like.shape)}, {like.dtype} on {like.device}"
            )
        return epsilon


class GuidedNoise:
    """ε_k = a_k √P G/‖G‖ with a = (+1, −1, +1, −1, …), and 0 for the last of an odd number: central differences along G.

    slopes: (K,), ⟨G, ε_k⟩ = a_k √P ‖G‖.  mean_square: the mean of a_k², which the scale law needs.
    """

    def __init__(self, gradient: Mapping[str, Tensor], n_candidates: int):
        self.gradient = gradient
        self.amplitudes = [(1.0, -1.0)[k % 2] for k in range(n_candidates)]
        if n_candidates % 2:
            self.amplitudes[-1] = 0.0
        self.mean_square = sum(a * a for a in self.amplitudes) / n_candidates
        dtype = torch.promote_types(next(iter(gradient.values())).dtype, torch.float32)
        norms = [torch.linalg.vector_norm(g, dtype=dtype) for g in gradient.values()]
        norm = torch.stack([n.to(norms[0].device) for n in norms]).norm()
        self.n_parameters = sum(g.numel() for g in gradient.values())
        radius = math.sqrt(self.n_parameters)
        self.unit = torch.where(norm > 0, radius / norm, 0)  # no gradient, no direction: the candidates are θ itself
        self.slopes = torch.stack([a * radius * norm for a in self.amplitudes])

    def __call__(self, k: int, name: str) -> Tensor:
        gradient = self.gradient[name]
        return gradient * (self.amplitudes[k] * self.unit).to(gradient)
