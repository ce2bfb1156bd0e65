"""Vectors end to end in a few flat tensors: θ in buckets of a bounded size, λ in one for each device."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from copy import copy
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .slots import copies

Position = Iterable[Mapping[str, Tensor]]  # values of θ by name, bucket by bucket, each made when it is asked for
ALIGNMENT = 64  # elements: every tensor begins at a multiple of it
BUCKET = 2**21  # elements of a bucket, or an eighth of all, if that is more
PIECE = 2**20  # elements of which noise is there at once, or a sixteenth of all, if that is more


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
        return self.copied(found)

    def padded(self, flat: Tensor) -> Tensor:
        """A flat tensor of this bucket, at its full length, which that of one tensor alone may lack."""
        return flat if len(flat) == self.size else torch.cat([flat, flat.new_zeros(self.size - len(flat))])

    def copied(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """The same, in storage of its own."""
        flat = self.zeros()
        views = self.views(flat)
        if tensors:
            torch._foreach_copy_([views[i] for i in tensors], list(tensors.values()))
        return flat

    def moved(self, flat: Tensor) -> dict[str, Tensor]:
        """{name: θ + step} of the steps in a flat tensor, or in its rows, which becomes the result's storage."""
        views = self.views(flat)
        torch._foreach_add_(views, self.tensors)
        return dict(zip(self.names, views))


class Layout:
    """θ in buckets of a bounded size, in its own order. kinds: by name, of what is not to share a bucket."""

    def __init__(self, theta: Mapping[str, Tensor], kinds: Mapping[str, Hashable] = {}):  # noqa: B006, which is read alone
        self.n_parameters = sum(p.numel() for p in theta.values())
        limit = max(BUCKET, self.n_parameters // 8)
        self.piece = -(-max(PIECE, self.n_parameters // 16) // ALIGNMENT) * ALIGNMENT
        self.buckets: list[Bucket] = []
        last: dict[tuple, Bucket] = {}
        for name, tensor in theta.items():
            kind = (tensor.device, tensor.dtype, kinds.get(name))
            bucket = last.get(kind)
            if bucket is None or (bucket.size and bucket.size + tensor.numel() > limit):
                bucket = last[kind] = Bucket(tensor)
                self.buckets.append(bucket)
            bucket.add(name, tensor)

    def at(self, flats: Sequence[Tensor]) -> Layout:
        """The same places, around a θ that lies in flat tensors."""
        return self.around(self.named(flats))

    def around(self, theta: Mapping[str, Tensor]) -> Layout:
        """The same places, around another θ."""
        moved = copy(self)
        moved.buckets = [copy(bucket) for bucket in self.buckets]
        for bucket in moved.buckets:
            bucket.tensors = [theta[name] for name in bucket.names]
            bucket.like = bucket.tensors[0]
        return moved

    @property
    def tensors(self) -> list[Tensor]:
        """θ itself, in the order of the buckets."""
        return [tensor for bucket in self.buckets for tensor in bucket.tensors]

    @property
    def own(self) -> Position:
        """θ itself, bucket by bucket."""
        return [dict(zip(bucket.names, bucket.tensors)) for bucket in self.buckets]

    def whole(self) -> dict[str, Tensor]:
        """The same, in one."""
        return {name: tensor for part in self.own for name, tensor in part.items()}

    def flats(self, tensors: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        """Tensors by name -> a flat one for each bucket, None where it has none."""
        found = [{i: tensors.get(name) for i, name in enumerate(bucket.names)} for bucket in self.buckets]
        there = [{i: t for i, t in f.items() if t is not None} for f in found]
        return [b.copied(f) if f else None for b, f in zip(self.buckets, there)]

    def root_mean_square(self) -> float:
        """Of θ's elements."""
        tensors = [t for t in self.tensors if t.numel()]
        return norm(tensors).item() / max(1, self.n_parameters) ** 0.5

    def padded(self, flats: list[Tensor]) -> list[Tensor]:
        """All at their full length."""
        return [bucket.padded(flat) for bucket, flat in zip(self.buckets, flats)]

    def named(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """{name: tensor} of the buckets' flat tensors."""
        return {n: t for bucket, flat in zip(self.buckets, flats) for n, t in zip(bucket.names, bucket.views(flat))}

    def moved(self, flats: Iterable[Tensor]) -> Position:
        """θ + step of the steps in the buckets' flat tensors, which become the result's storage."""
        return (bucket.moved(flat) for bucket, flat in zip(self.buckets, flats))


class Vector:
    """λ, and gradients by it, end to end: one vector for each device, and another one there for complex λ."""

    class Flat(NamedTuple):
        """vectors: None where nothing depends.  depends: on which hyperparameters."""

        vectors: list[Tensor] | None
        depends: frozenset[int]

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        groups: dict[tuple[torch.device, bool], list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            groups.setdefault((tensor.device, tensor.is_complex()), []).append(i)
        self.groups = list(groups.values())
        self.eps = max(torch.finfo(tensor.dtype).eps for tensor in self.tensors)

    def flat(self, grads: Sequence[Tensor | None]) -> Flat:
        """One gradient for each hyperparameter, None where there is no dependence."""
        depends = frozenset(i for i, g in enumerate(grads) if g is not None)
        if not depends:
            return self.Flat(None, depends)
        vectors = []
        for members in self.groups:
            parts = [
                grads[i].reshape(-1) if i in depends else self.tensors[i].new_zeros(self.tensors[i].numel()) for i in members
            ]
            vectors.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return self.Flat(vectors, depends)

    def weighted_sum(self, coefficients: Tensor, flats: Sequence[Flat]) -> Flat:
        """Σ_k c_k f_k, in double precision, where the device has it.

        The c_k of candidates sum to zero, and what is left may be a thousandth of the terms.
        """
        depends = frozenset().union(*(flat.depends for flat in flats))
        if not depends:
            return self.Flat(None, depends)
        totals: list[Tensor] = []
        for group, members in enumerate(self.groups):
            total = None
            for c, flat in zip(exactly(coefficients.to(self.tensors[members[0]].device)).unbind(), flats):
                if flat.vectors is not None:
                    term = exactly(flat.vectors[group])
                    total = term * c if total is None else total.addcmul_(term, c)
            totals.append(total)
        return self.Flat(totals, depends)

    def apart(self, a: Flat, b: Flat, meant: bool | Tensor) -> list[Tensor]:
        """‖a_i − b_i‖ / ε‖a_i‖ for each hyperparameter, ε the resolution of its type of number; ∞ where a_i is 0, but for a = 0.

        meant: whether a and b were to differ at all.
        """
        if a.vectors is None or b.vectors is None:
            return []
        result: list[Tensor] = [None] * len(self.tensors)
        wholes = []
        for group, members in enumerate(self.groups):
            eps = [torch.finfo(self.tensors[i].dtype).eps for i in members]
            norms = torch._foreach_norm(a.vectors[group].split([self.tensors[i].numel() for i in members]))
            wholes.append(torch.stack(torch._foreach_mul(norms, eps)))
        none = sum(whole.sum().to(wholes[0].device) for whole in wholes) == 0
        for group, (members, whole) in enumerate(zip(self.groups, wholes)):
            parts = (a.vectors[group] - b.vectors[group]).split([self.tensors[i].numel() for i in members])
            some = (whole > 0) | none.to(whole.device)
            some = some & (meant.to(whole.device) if isinstance(meant, Tensor) else meant)
            values = torch.where(some, (torch.stack(torch._foreach_norm(parts)) / whole).nan_to_num(0), math.inf)
            for i, value in zip(members, values.unbind()):
                result[i] = value
        return result

    def parity(self, plus: Flat, minus: Flat, between: Flat | None) -> Tensor:
        """(‖g₊ + g₋ − 2g₀‖², ‖g₊ − g₋‖², ‖g₊‖²), the first NaN where nothing is known between the two."""
        if plus.vectors is None or minus.vectors is None:
            return torch.zeros(3, device=self.tensors[0].device)
        known = between is not None
        b = [torch.zeros_like(v) for v in plus.vectors] if known and between.vectors is None else between and between.vectors
        return parity(*(v and map(exactly, v) for v in (plus.vectors, minus.vectors, b)))

    def add(self, a: Flat, b: Flat) -> Flat:
        if a.vectors is None or b.vectors is None:
            return b if a.vectors is None else a
        return self.Flat([x + y for x, y in zip(a.vectors, b.vectors)], a.depends | b.depends)

    def split(self, flat: Flat) -> list[Tensor]:
        """One tensor for each hyperparameter, of its shape and dtype, in storage of its own."""
        result: list[Tensor] = [None] * len(self.tensors)
        for members, vector in zip(self.groups, flat.vectors):
            dtypes = {self.tensors[i].dtype for i in members}
            vector = vector.to(dtypes.pop()) if len(dtypes) == 1 else vector
            for i, piece in zip(members, vector.split([self.tensors[i].numel() for i in members])):
                result[i] = piece.view(self.tensors[i].shape).to(self.tensors[i].dtype)
        return copies(result) if len(result) > 1 else result


def parity(plus: Iterable[Tensor], minus: Iterable[Tensor], between: Iterable[Tensor] | None) -> Tensor:
    """(‖g₊ + g₋ − 2g₀‖², ‖g₊ − g₋‖², ‖g₊‖²) of gradients in several vectors, the first NaN where g₀ is not known."""
    total = None
    for p, m, b in zip(plus, minus, repeat(None) if between is None else between):
        norms = torch._foreach_norm([p - m, p] if b is None else [p - m, p, (p + m).sub_(b, alpha=2)])
        odd, whole, even = norms if b is not None else [*norms, torch.full_like(norms[0], math.nan)]
        squares = torch.stack([even, odd, whole]).to(torch.promote_types(odd.dtype, torch.float32)).square()
        total = squares if total is None else total + squares.to(total)
    return total


def exactly(tensor: Tensor) -> Tensor:
    """In double precision, real or complex as it is; unchanged where the device has none."""
    if tensor.is_mps:
        return tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


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


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them as one vector, in float32 at least."""
    found = norms(tensors)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([n.to(found[0].device, dtype) for n in found]).norm()


def norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of each, in numbers that do not overflow."""
    if any(t.dtype == torch.float16 for t in tensors):
        return [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch._foreach_norm(tensors)
