"""The paper's perturbations: directions ε_k, candidates θ_k = θ + σ ε_k, and the merged θ* = Σ_k w_k θ_k.

Noise is drawn again from its seeds whenever it is needed, and not stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .host.checks import warn
from .host.draws import draw_seeds, drawn_from
from .host.precision import Precision
from .host.vectors import Layout, Position

NoiseFunction = Callable[[Tensor, torch.Generator], Tensor]
RESOLVED = 8  # candidates whose distance from θ, over its norm, is this many eps of low precision are told apart
KEPT = 2**18  # elements of the noise of all candidates, up to which it is kept


def sign(like: Tensor, generator: torch.Generator) -> Tensor:
    """sign(N(0, 1)): ±1 with equal probability for each element of `like`. One random byte gives eight signs."""
    n = like.numel()
    words = torch.empty(-(-n // 64), dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=generator)
    signs = _signs_of_bytes(like).index_select(0, words.view(torch.uint8).int()).view(-1)
    return signs if signs.shape == like.shape else signs[:n].view(like.shape)


_tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _signs_of_bytes(like: Tensor) -> Tensor:
    """(256, 8): the bits of each byte, as ±1."""
    # A fake tensor belongs to its mode, and must not outlive it.
    tables = vars(like.fake_mode).setdefault("_evograd_tables", {}) if isinstance(like, FakeTensor) else _tables
    key = (like.device, like.dtype)
    if key not in tables:
        bits = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1
        tables[key] = bits.to(like.dtype).mul_(2).sub_(1)
    return tables[key]


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) for each element of `like`."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


NOISES: dict[str, NoiseFunction] = {"sign": sign, "normal": normal}


class SeededNoise:
    """ε_k over the buckets of θ: the same whenever it is asked for.

    Seeds are drawn on the host from `generator` (torch's global one if None), one for each candidate and bucket.
    shard: (which, of how many), where θ is one process's shards. One seed is drawn for each candidate then, alike in all
    processes, and each shard's buckets have seeds that come from it.
    """

    def __init__(
        self,
        noise: str | NoiseFunction,
        layout: Layout,
        n_candidates: int,
        generator: torch.Generator | None,
        shard: tuple[int, int] | None = None,
    ):
        self.name, self.layout = noise, layout
        self.function = NOISES[noise] if isinstance(noise, str) else noise
        self.by_element = self.function in NOISES.values()
        n_buckets = len(self.layout.buckets)
        if shard is None:
            self.seeds = draw_seeds((n_candidates, n_buckets), generator)
            self.first = self.seeds[0][0]  # which all processes must have drawn
        else:
            which, n_shards = shard
            drawn = draw_seeds((n_candidates,), generator)
            self.seeds = [drawn_from(drawn_from(seed, n_shards)[which], n_buckets) for seed in drawn]
            self.first = drawn[0]
        self.generators = {b.like.device: torch.Generator(b.like.device) for b in self.layout.buckets}
        # Small noise is kept: to draw it again costs more than it takes.
        self.kept = {} if n_candidates * sum(b.size for b in self.layout.buckets) <= KEPT else None

    def pieces(self, k: int, b: int) -> Iterator[tuple[slice, Tensor]]:
        """(where in the bucket's flat tensor, ε_k there), piece by piece."""
        if self.kept is None:
            return self._draw(k, b)
        if (k, b) not in self.kept:
            self.kept[k, b] = list(self._draw(k, b))
        return iter(self.kept[k, b])

    def _draw(self, k: int, b: int) -> Iterator[tuple[slice, Tensor]]:
        bucket = self.layout.buckets[b]
        generator = self.generators[bucket.like.device].manual_seed(self.seeds[k][b])
        if self.by_element:
            for start in range(0, bucket.size, self.layout.piece):
                part = slice(start, min(start + self.layout.piece, bucket.size))
                yield part, self.function(bucket.like.new_empty(()).expand(part.stop - start), generator)
            return
        flat = bucket.zeros()  # a function of one's own is given the tensors as they are
        for name, tensor, view in zip(bucket.names, bucket.tensors, bucket.views(flat)):
            epsilon = self.function(tensor, generator)
            if (epsilon.shape, epsilon.dtype, epsilon.device) != (tensor.shape, tensor.dtype, tensor.device):
                raise ValueError(
                    f"noise returned {tuple(epsilon.shape)}, {epsilon.dtype} on {epsilon.device} for {name!r}; "
                    f"it must be {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
                )
            view.copy_(epsilon)
        yield slice(0, bucket.size), flat

    def __call__(self, k: int, name: str) -> Tensor:
        """ε_k of one tensor."""
        for b, bucket in enumerate(self.layout.buckets):
            if name in bucket.names:
                return bucket.views(self.scaled(k, b, 1))[bucket.names.index(name)]
        raise KeyError(name)

    def scaled(self, k: int, b: int, scale: float, out: Tensor | None = None) -> Tensor:
        """scale · ε_k in a flat tensor of the bucket."""
        bucket = self.layout.buckets[b]
        if out is None and 0 < bucket.size <= self.layout.piece:  # one piece
            ((_, epsilon),) = self.pieces(k, b)
            return epsilon * scale
        out = bucket.empty() if out is None else out
        for part, epsilon in self.pieces(k, b):
            torch.mul(epsilon, scale, out=out[part])
        return out


class Perturbed:
    """The paper's candidates θ_k = θ + σ ε_k, k = 0..K−1.

    What an evaluation asks of candidates (see `evograd.evaluation`): `position`, `alike`, `pattern`, and `stacked` of those
    that are evaluated at once. The others are asked afterwards, see `evograd.host.result.looked_at`.
    """

    before: dict = {}  # noqa: RUF012, the validation loss depends on candidates
    found = last = True  # there is no other try
    numbers: Sequence[Tensor] = ()
    curvature = math.nan

    def __init__(self, epsilon: SeededNoise, sigma: float, common_random_numbers: bool):
        self.epsilon, self.layout, self.sigma, self.common = epsilon, epsilon.layout, sigma, common_random_numbers
        self.settings = (epsilon.name, sigma)
        # Few parameters may get the same noise twice, and there is nothing to tell apart then.
        self.tells_apart: bool | Tensor = self.layout.n_parameters >= 64

    def position(self, k: int) -> Position:
        return self.layout.moved(self.epsilon.scaled(k, b, self.sigma) for b in range(len(self.layout.buckets)))

    def stacked(self, candidates: Sequence[int]) -> dict[str, Tensor]:
        """{name: (len(candidates), *shape)}"""
        result = {}
        for b, bucket in enumerate(self.layout.buckets):
            flat = bucket.empty(len(candidates))
            for row, k in zip(flat, candidates):
                self.epsilon.scaled(k, b, self.sigma, out=row)
            result.update(bucket.moved(flat))
        return result

    def alike(self, k: int) -> int | None:
        """By which candidate's random numbers this one draws; None: no other draws the same."""
        return 0 if self.common else None

    def pattern(self, k: int) -> AbstractContextManager:
        return nullcontext()

    def merged(self, weights: Tensor) -> Position:
        """θ* = θ + σ Σ_k w_k ε_k."""
        for b, bucket in enumerate(self.layout.buckets):
            flat = bucket.zeros()
            for k, weight in enumerate(weights.to(flat)):
                for part, noise in self.epsilon.pieces(k, b):
                    flat[part].addcmul_(noise, weight, value=self.sigma)
            yield bucket.moved(flat)
            del flat

    def slope(self, k: int, b: int, gradient: Tensor) -> Iterator[Tensor]:
        """⟨G, ε_k⟩ in the terms of one bucket."""
        for part, noise in self.epsilon.pieces(k, b):
            piece = gradient[part]
            precise = torch.promote_types(piece.dtype, torch.float32)  # a sum in float16 may overflow
            yield torch.dot(piece.to(precise), noise[: len(piece)].to(precise))

    def read(self, values: Sequence[float]) -> None:
        pass

    def check(self, precision: Precision, losses: Mapping[str, float]) -> None:
        """A warning where losses in few digits do not tell candidates apart."""
        if precision.low and self.sigma < (enough := RESOLVED * precision.eps * self.layout.root_mean_square()):
            warn(
                f"losses are computed in {precision.dtype}, which does not resolve by how much candidates differ at "
                f"sigma={self.sigma!r}: the estimate is rounding in large part. Evaluate them in float32, or take "
                f"evograd.guided or sigma={1.1 * enough:.1g}"
            )
