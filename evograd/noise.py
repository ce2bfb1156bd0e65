"""Parameters end to end in a few flat tensors, and the directions ε_k in which candidates are perturbed there.

Noise is drawn again from its seeds whenever it is needed, and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

NoiseFunction = Callable[[Tensor, torch.Generator], Tensor]
Position = Iterable[Mapping[str, Tensor]]  # values of θ by name, bucket by bucket, each made when it is asked for
ALIGNMENT = 64  # elements: every tensor begins at a multiple of it
BUCKET = 2**21  # elements of a bucket, or an eighth of all, if that is more
PIECE = 2**20  # elements of which noise is there at once, or a sixteenth of all, if that is more
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


def on_the_host():
    """A block in which tensors are real, and no mode sees them."""
    return _disable_current_modes() if _get_current_dispatch_mode_stack() else nullcontext()


def draw_seeds(shape: tuple[int, ...], generator: torch.Generator | None) -> list:
    """Seeds from a generator on the host, torch's global one if None: real numbers under FakeTensorMode too."""
    with on_the_host():
        return torch.randint(2**62, shape, generator=generator, device="cpu").tolist()


def drawn_from(seed: int, n: int) -> list[int]:
    """n further seeds, which depend on this one alone."""
    return draw_seeds((n,), torch.Generator().manual_seed(seed))


NOISES: dict[str, NoiseFunction] = {"sign": sign, "normal": normal}


class Bucket:
    """Parameters of one device and dtype, end to end in a flat tensor, each in its own memory format."""

    def __init__(self, like: Tensor):
        self.like, self.size = like, 0
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.places: list[tuple[torch.Size, tuple[int, ...], int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        strides = tensor.stride() if _is_dense(tensor) else _contiguous(tensor.shape)
        self.names.append(name)
        self.tensors.append(tensor)
        self.places.append((tensor.shape, strides, self.size))
        self.size += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT

    def empty(self, n: int | None = None) -> Tensor:
        """A flat tensor of n rows, or of one without a dimension for rows."""
        shape = (self.size,) if n is None else (n, self.size)
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.like.dtype, device=self.like.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in a flat one, (size,), or in each of its rows, (n, size) -> (n, *shape).

        They share its storage and nothing else: what is written into one leaves autograd's counts of the others alone.
        """
        if flat.ndim == 1:
            return [flat.as_strided(shape, strides, offset).data for shape, strides, offset in self.places]
        n, row = flat.shape
        return [flat.as_strided((n, *shape), (row, *strides), offset).data for shape, strides, offset in self.places]


    def flat(self, tensors: Mapping[int, Tensor | None]) -> Tensor:
        """Tensors by their numbers, end to end; zeros where there is none, and between them."""
        found = {i: t.to_dense() if t.is_sparse else t for i, t in tensors.items() if t is not None}
        if len(self.names) == 1 and found and found[0].stride() == self.places[0][1]:
            return found[0].as_strided((found[0].numel(),), (1,))  # large ones are not copied
        flat = self.zeros()
        views = self.views(flat)
        torch._foreach_copy_([views[i] for i in found], list(found.values()))
        return flat

    def moved(self, flat: Tensor) -> dict[str, Tensor]:
        """{name: θ + step} of the steps in a flat tensor, or in its rows, which becomes the result's storage."""
        views = self.views(flat)
        torch._foreach_add_(views, self.tensors)
        return dict(zip(self.names, views))


class Layout:
    """θ in buckets of a bounded size, in its own order."""

    def __init__(self, theta: Mapping[str, Tensor]):
        self.n_parameters = sum(p.numel() for p in theta.values())
        limit = max(BUCKET, self.n_parameters // 8)
        self.piece = -(-max(PIECE, self.n_parameters // 16) // ALIGNMENT) * ALIGNMENT
        self.buckets: list[Bucket] = []
        last: dict[tuple[torch.device, torch.dtype], Bucket] = {}
        for name, tensor in theta.items():
            kind = (tensor.device, tensor.dtype)
            bucket = last.get(kind)
            if bucket is None or (bucket.size and bucket.size + tensor.numel() > limit):
                bucket = last[kind] = Bucket(tensor)
                self.buckets.append(bucket)
            bucket.add(name, tensor)

    def named(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """{name: tensor} of the buckets' flat tensors."""
        return {n: t for bucket, flat in zip(self.buckets, flats) for n, t in zip(bucket.names, bucket.views(flat))}

    def moved(self, flats: Iterable[Tensor]) -> Position:
        """θ + step of the steps in the buckets' flat tensors, which become the result's storage."""
        return (bucket.moved(flat) for bucket, flat in zip(self.buckets, flats))


class SeededNoise:
    """ε_k over the buckets of θ: the same whenever it is asked for.

    Seeds are drawn on the host from `generator` (torch's global one if None), one for each candidate and bucket.
    shard: (which, of how many), where θ is one process's shards. One seed is drawn for each candidate then, alike in all
    processes, and each shard's buckets have seeds that come from it.
    """

    def __init__(
        self,
        function: NoiseFunction,
        theta: Mapping[str, Tensor],
        n_candidates: int,
        generator: torch.Generator | None,
        shard: tuple[int, int] | None = None,
    ):
        self.function, self.layout = function, Layout(theta)
        self.by_element = function in NOISES.values()
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


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their storage without gaps and overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, n = [], 1
    for size in reversed(shape):
        strides.append(n)
        n *= size
    return tuple(reversed(strides))
