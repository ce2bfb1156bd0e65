"""Which side of each kink an activation lies on: recorded in one pass of a network, and taken again in another."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .recomputation import recomputed_in


class KinkMismatch(RuntimeError):
    """The replayed pass does not run the operations of the recorded one."""


class Kinks:
    """The choices of one pass (ReLU masks, places of maxima, sides of every clamp, abs and comparison), for use in another.

    Between two passes at θ + r·u and θ − r·u some activations cross a kink, and a difference of their derivatives counts each
    jump as if it were curvature. With the choices of the first pass in the second both are smooth functions of θ, and the
    difference over 2r tends to what double backward gives as r goes to 0.

        kinks = Kinks()
        with kinks.record():
            (plus,) = torch.autograd.grad(loss(theta + r * u), lam)
        with kinks.replay():
            (minus,) = torch.autograd.grad(loss(theta - r * u), lam)

    Backward passes belong inside the block: checkpointed segments (torch.utils.checkpoint, of both kinds) are recomputed there,
    each with the choices of its own place. One object serves one pair; it may be replayed several times. The recorded pass
    has the values, gradients and graph that it has without; the tape adds at most a byte an element of an operation's input
    (two for an ∞-norm, two or four for sort, topk and cummax over more than 256 places, one a difference for cdist); packed, an
    eighth of that where a choice is one of two, for a few operations more: where the tape outlives the pass. A
    replayed operation has the derivative of the recorded branch, with ties shared as PyTorch shares them, and a graph that
    keeps no more than PyTorch's (hardswish: two bytes an element). Replayed activation functions turn infinities into NaN.

    Seen are PyTorch's kinked functions, methods, modules and in-place forms on floating-point tensors: activations, clamp, abs,
    sign, rounding, comparisons and where, maxima, medians and sorting, max-pooling, 1- and ∞-norms and margin losses.
    Not seen, and as they are without: what runs inside torch.compile'd regions, custom kernels and C++ code
    (torch.nn.RNN(nonlinearity="relu"), grid_sample, quantile, multilabel_margin_loss), out= forms, rrelu in training,
    fractional max-pooling, remainders and floor division, casts to integers, round(decimals=…), norms of other orders;
    sides that random numbers or integers decide; and anything inside torch.func transforms begun within the block.
    """

    def __init__(self, packed: bool = False):
        self._choices: list[tuple] = []  # (operation, shapes of its tensors, choice)
        self._recorded, self._packed = False, packed

    @property
    def recorded(self) -> bool:
        """Whether a pass is held."""
        return self._recorded

    @property
    def wanted(self) -> bool:
        """Whether a pass is still to be recorded."""
        return not self._recorded

    def shared(self) -> AbstractContextManager:
        """A block whose pass is recorded if it is the first one, and takes the recorded choices otherwise."""
        return self.replay() if self._recorded else self.record()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Choices are taken as usual, and kept."""
        if self._recorded:
            raise RuntimeError("These Kinks hold a pass already: make a new Kinks() for each pair.")
        recorded = _Pass(self._choices, recording=True, packed=self._packed)
        with recomputed_in(recorded.segment), recorded:
            yield
        self._recorded = True

    @contextmanager
    def replay(self) -> Iterator[None]:
        """The choices of the recorded pass are taken again.

        Raises:
            KinkMismatch: the operations are not those of the recorded pass.
        """
        if not self._recorded:
            raise RuntimeError("There is nothing to replay: no pass has been recorded to its end.")
        replayed = _Pass(self._choices, recording=False)
        with recomputed_in(replayed.segment), replayed:
            yield
        if replayed.place < len(self._choices):
            raise replayed.mismatch("has ended")


class OwnKinks:
    """In the place of `Kinks`: every pass makes its own choices."""

    wanted = False

    def shared(self) -> AbstractContextManager:
        return nullcontext()


class _Pass(TorchFunctionMode):
    """One pass over the tape. place: of the next choice.  recomputing: a checkpointed segment runs once more."""

    def __init__(self, choices: list[tuple], recording: bool, packed: bool = False):
        super().__init__()
        self.choices, self.recording, self.packed = choices, recording, packed
        self.places: dict[torch.device, Tensor] = {}  # of bits in a byte
        self.place, self.recomputing = 0, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # Dynamo traces modes into its graphs: it shall find nothing here
            return function(*args, **kwargs)
        operation = _OPERATIONS.get(function)
        tensors = operation and [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors or not any(t.is_floating_point() for t in tensors) or kwargs.get("out") is not None:
            return function(*args, **kwargs)
        name, handler, inplace = operation
        options = {_KEYWORDS.get(key, key): value for key, value in kwargs.items() if key not in ("out", "inplace")}
        inplace = inplace or kwargs.get("inplace", False)
        native = partial(function, *args, **kwargs)
        if isinstance(handler, _WrittenOut):
            result = self._written_out(handler, native, *args, **options)
        else:
            handler = _IN_PLACE.get(name, handler) if inplace else handler
            result = self._take(name, handler(native, *args, **options), [tuple(t.shape) for t in tensors])
        if result is None:
            return native()
        return tensors[0].copy_(result) if inplace and result is not tensors[0] else result

    def _take(self, name: str, steps: Generator, shapes: list[tuple]):
        """The operation's result in this pass; None where it has no kink."""
        try:
            choose = next(steps)
        except StopIteration:
            return None
        if self.recording and not self.recomputing:
            choice, result = choose()
            self.choices.append((name, shapes, self._packed(choice) if self.packed else choice))
            self.place += 1
            return result
        if self.place == len(self.choices) or self.choices[self.place][:2] != (name, shapes):
            raise self.mismatch(f"has come to {_described(name, shapes)}")
        choice = self.choices[self.place][2]
        self.place += 1
        if self.recording:
            return choose()[1]  # a segment is recomputed from the same values, and must keep the same tensors for backward
        try:
            steps.send(choice.unpacked() if isinstance(choice, _Bits) else choice)
        except StopIteration as stop:
            return stop.value

    def _packed(self, choice: object) -> object:
        """The choice in bits, if it is a mask of some size without gaps."""
        if not isinstance(choice, Tensor) or choice.dtype != torch.bool or choice.numel() < 64:
            return choice
        if choice.layout is not torch.strided:
            return choice
        if not (choice.is_contiguous() or (choice.ndim == 4 and choice.is_contiguous(memory_format=torch.channels_last))):
            return choice
        if choice.device not in self.places:
            self.places[choice.device] = torch.arange(7, -1, -1, dtype=torch.uint8, device=choice.device)
        return _Bits(choice, self.places[choice.device])

    def _written_out(self, handler: _WrittenOut, native: Callable, *args, **options):
        """The formula runs with this mode on, which sees the operations in it."""
        if not self.recording or handler.always:
            with self:
                return handler.formula(*args, **options)
        with torch.no_grad(), self:
            kinked = handler.formula(*args, **options) is not None
        return native() if kinked else None

    def mismatch(self, event: str) -> KinkMismatch:
        """The error at this place of the tape, where `event` is what the replayed pass does."""
        ended = self.place == len(self.choices)
        expected = "had ended" if ended else f"had {_described(*self.choices[self.place][:2])}"
        return KinkMismatch(
            f"The replayed pass {event} where the recorded pass {expected} (choice {self.place} of {len(self.choices)}). "
            "Kinks can be shared only between passes that run the same operations: let no control flow, number of rows or "
            "random draw depend on the parameters, or call with share_kinks=False."
        )

    def segment(self) -> Callable[[], AbstractContextManager]:
        """A checkpointed segment begins here: the context in which it is recomputed."""
        return partial(self.back_at, self.place)

    @contextmanager
    def back_at(self, place: int) -> Iterator[None]:
        """A segment that began at `place` is recomputed; PyTorch turns modes off within backward()."""
        before = self.place, self.recomputing
        self.place, self.recomputing = place, True
        try:
            with nullcontext() if self in _get_current_function_mode_stack() else self:
                yield
        finally:
            self.place, self.recomputing = before


class _Bits:
    """A mask, eight places a byte, in the order of its memory.

    On a GPU by shifts, in two launches. On a CPU by words, in half the time: eight bytes of 0 and 1 are a word, and one product
    moves each of them to its bit: place k is shifted by 63 − 9k, and no two of the 64 products meet.
    """

    MOVES, ONES = -0x7FBFDFEFF7FBFDFF, 0x0101010101010101  # 0x8040201008040201 as int64
    by_words = staticmethod(lambda tensor: not tensor.is_cuda)

    def __init__(self, mask: Tensor, places: Tensor):
        self.shape, self.strides, self.places = mask.shape, mask.stride(), places
        flat = mask.as_strided((mask.numel(),), (1,)).view(torch.uint8)
        flat = F.pad(flat, (0, -len(flat) % 8)) if len(flat) % 8 or flat.storage_offset() % 8 else flat
        if self.by_words(flat):
            self.bytes = (flat.view(torch.int64) * self.MOVES).bitwise_right_shift_(56).to(torch.uint8)
        else:
            self.bytes = flat.view(-1, 8).bitwise_left_shift(places).sum(1, dtype=torch.uint8)

    def unpacked(self) -> Tensor:
        if self.by_words(self.bytes):
            bits = self.bytes.to(torch.int64).mul_(self.MOVES).bitwise_right_shift_(7).bitwise_and_(self.ONES)
        else:
            bits = self.bytes[:, None].bitwise_right_shift(self.places).bitwise_and_(1)
        return bits.view(torch.bool).as_strided(self.shape, self.strides)


def _described(name: str, shapes: list[tuple]) -> str:
    return f"{name} of shape {' and '.join(map(str, shapes))}"


# One generator an operation. It yields a function that gives (choice, result of the operation itself), is sent the recorded
# choice, and returns the result on that branch. One that returns before it yields leaves the operation alone.


def _relu(native, input, product=torch.mul):
    on = yield lambda: (input > 0, native())
    return product(input, _numbers(on))


def _masked(input: Tensor, mask: Tensor) -> Tensor:
    """On CPUs a select takes seven times as long as a product, and a product with a bool twice. Not for infinite inputs."""
    return input * _numbers(mask)


def _numbers(mask: Tensor) -> Tensor:
    """0 and 1, in the mask's own memory where that can be looked at (not a nested tensor's)."""
    return mask.view(torch.uint8) if mask.layout is torch.strided else mask.to(torch.uint8)


def _threshold(native, input, threshold, value):
    off = yield lambda: (input <= threshold, native())
    return input.masked_fill(off, value)


def _hardshrink(native, input, lambd=0.5):
    off = yield lambda: ((input >= -lambd) & (input <= lambd), native())
    return input.masked_fill(off, 0)


def _softshrink(native, input, lambd=0.5):
    side = yield lambda: (_sides(input < -lambd, input > lambd), native())
    shifted = torch.add(input, side == 1, alpha=lambd).add(side == 2, alpha=-lambd)
    return shifted.masked_fill(side == 0, 0)


def _leaky_relu(native, input, negative_slope=0.01):
    on = yield lambda: (input > 0, native())
    return _masked(input, on) + _masked(input * negative_slope, ~on)


def _rrelu(native, input, lower=1 / 8, upper=1 / 3, training=False):
    return None if training else (yield from _leaky_relu(native, input, (lower + upper) / 2))


def _prelu(native, input, weight):
    on = yield lambda: (input > 0, native())
    weight = weight.reshape(()) if weight.numel() == 1 else weight.view(-1, *[1] * (input.ndim - 2))
    positive = _masked(input, on)
    return positive + (input - positive) * weight


def _elu(native, input, alpha=1.0):
    if alpha == 1:
        return None  # its slope is continuous
    on = yield lambda: (input > 0, native())
    positive = _masked(input, on)
    return positive + alpha * torch.expm1(input - positive)


def _selu(native, input):
    return 1.0507009873554805 * (yield from _elu(native, input, 1.6732632423543772))


@torch.enable_grad()
def _share_of_a_tie(function: Callable) -> float:
    """How much of the gradient goes to an input that equals the bound: versions of PyTorch differ."""
    x = torch.zeros(1, requires_grad=True)
    return torch.autograd.grad(function(x), x)[0].item()


_TIE_WITH_NUMBER = _share_of_a_tie(lambda x: x.clamp_min(0))  # 0, or 1
_TIE_WITH_TENSOR = _share_of_a_tie(lambda x: x.clamp(min=torch.zeros(1)))  # a half, or 1
_TIE_OF_FMAX = _share_of_a_tie(lambda x: x.fmax(torch.zeros(1)))  # a half, or 1


def _sides(below: Tensor, above: Tensor) -> Tensor:
    """0 where neither holds, 1 for below, 2 for above."""
    return torch.add(below.to(torch.uint8), above.to(torch.uint8), alpha=2)


def _hardtanh(native, input, min_val=-1.0, max_val=1.0):
    side = yield lambda: (_sides(input <= min_val, input >= max_val), native())
    inside = _masked(input, side == 0)
    return inside.add(side == 1, alpha=min_val).add(side == 2, alpha=max_val)


def _hardswish(native, input):
    side = yield lambda: (_sides(input <= -3, input >= 3), native())
    inside = _masked(input, side == 0)
    return inside.square() / 6 + inside / 2 + _masked(input, side == 2)


def _bounded(input: Tensor, side: Tensor, low, high) -> Tensor:
    """side: 0 inside, 1 and 2 at the lower and the upper bound, 3 and 4 shared between the input and that bound."""
    for code, bound in ((1, low), (2, high)):
        if isinstance(bound, Tensor):
            shared = torch.where(side == code + 2, (input + bound) / 2, input)
            input = torch.where(side == code, bound, shared)
        elif bound is not None:
            input = input.masked_fill(side == code, bound)
    return input


def _clamp(native, input, min=None, max=None):
    def choose():
        side = torch.zeros_like(input, dtype=torch.uint8)
        for code, bound, beyond, reached in ((1, min, torch.lt, torch.le), (2, max, torch.gt, torch.ge)):
            if isinstance(bound, Tensor):
                side = torch.where(beyond(input, bound), code, side)
                if _TIE_WITH_TENSOR != 1:  # at both bounds: 3 + 4, which is inside
                    side = torch.where(input == bound, side + (code + 2), side)
            elif bound is not None:
                side = torch.where((beyond if _TIE_WITH_NUMBER else reached)(input, bound), code, side)
        crossed = min is not None and max is not None and min > max  # then the result is max
        if isinstance(crossed, Tensor):
            side = torch.where(crossed, 2, side)
        elif crossed:
            side.fill_(2)
        return side, native()

    return _bounded(input, (yield choose), min, max)


def _clamp_max(native, input, max):
    return (yield from _clamp(native, input, max=max))


def _abs(native, input):
    sign = yield lambda: (input.detach().sign().to(torch.int8), native())
    return input * sign


def _maximum(greater, native, input, other):
    side = yield lambda: (_sides(greater(input, other), greater(other, input)), native())
    return _larger(side, input, other)


def _fmax(greater, native, input, other):
    """As maximum, but for NaN; older versions give the first of two that tie the whole gradient."""

    def choose():
        first = greater(input, other) | other.isnan()
        first = first if _TIE_OF_FMAX != 1 else first | (input == other)
        return _sides(first, greater(other, input) | input.isnan()), native()

    return _larger((yield choose), input, other)


def _larger(side: Tensor, input: Tensor, other: Tensor) -> Tensor:
    tie = (input + other) / 2  # half the gradient each
    return torch.where(side == 1, input, torch.where(side == 2, other, tie))


def _where(native, condition, input=None, other=None):
    if other is None:
        return None
    kept = yield lambda: (condition.to(torch.bool, copy=True), native())
    return torch.where(kept, input, other)


def _where_method(native, input, condition, other):
    return (yield from _where(native, condition, input, other))


def _constant(encode, native, input, *args, **options):
    """Piecewise constant: the kept values in the operation's own output, with the zero gradient that it has."""
    kept = yield lambda: (encode(result := native()), result)
    result = native()
    result.detach().copy_(kept)
    return result


def _sign(native, input):
    kept = yield lambda: ((result := native()).detach().to(torch.int8), result)
    result = input.sign()  # sgn's graph keeps the values, which may then not be written over
    result.detach().copy_(kept)
    return result


def _argmax(native, input, dim=None, *args, **options):
    return (yield from _constant(lambda result: _small(result, _places(input, dim)), native, input))


def _argsort(native, input, dim=-1, *args, **options):
    return (yield from _argmax(native, input, dim))


def _round(native, input, decimals=0):
    """Kept is the value's last byte: to what lies nearest to the value now, which is the value itself up to a shift of 127."""
    if decimals:
        return None
    kept = yield lambda: ((result := native()).detach().remainder(256).to(torch.uint8), result)
    result = native()
    value = result.detach()
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    value.add_(((kept + 128.0 - wide).remainder(256) - 128).nan_to_num(0.0))
    return result


def _places(input: Tensor, dim: int | None) -> int:
    return input.numel() if dim is None or input.ndim == 0 else input.shape[dim]


def _small(index: Tensor, places: int) -> Tensor:
    """A copy in the smallest integer type that holds 0 … places − 1."""
    types = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return index.to(next(t for t in types if places - 1 <= torch.iinfo(t).max), copy=True)


def _picked(pair, native, input, dim=-1, *args, **options):
    """(values, indices) along a dimension, by their indices."""
    kept = yield lambda: (_small((result := native())[1], _places(input, dim)), result)
    index = kept.long()
    if index.ndim == input.ndim:
        return pair((input.gather(dim, index), index))
    return pair((input.gather(dim, index.unsqueeze(dim)).squeeze(dim), index))


def _picked_of_k(pair, native, input, k, dim=-1, *args, **options):
    return (yield from _picked(pair, native, input, dim))


def _msort(native, input):
    kept = yield lambda: (_small((result := input.sort(0))[1], _places(input, 0)), result[0])
    return input.gather(0, kept.long())


def _reduced_to_one(pair, native, input, dim=None, keepdim=False):
    """median() of all elements, or along a dimension."""
    return (yield from (_amax(native, input) if dim is None else _picked(pair, native, input, dim)))


def _max(pair, greater, native, input, dim=None, keepdim=False, other=None):
    other = dim if isinstance(dim, Tensor) else other
    if other is not None:
        return (yield from _maximum(greater, native, input, other))
    return (yield from _reduced_to_one(pair, native, input, dim))


def _dims(input: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    dims = [dim] if isinstance(dim, int) else dim or range(input.ndim)
    return [d % input.ndim for d in dims] if input.ndim else []


def _differs(input: Tensor, value: Tensor, dims: list[int]) -> Tensor:
    return input != value.reshape([1 if d in dims else n for d, n in enumerate(input.shape)])


def _mean_without(input: Tensor, off: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return input.masked_fill(off, 0).sum(dims, keepdim) / off.logical_not().sum(dims, keepdim)


def _amax(native, input, dim=None, keepdim=False):
    """Ties share the gradient evenly."""
    dims = _dims(input, dim)
    off = yield lambda: (_differs(input, result := native(), dims), result)
    return _mean_without(input, off, dims, keepdim)


def _aminmax(native, input, dim=None, keepdim=False):
    dims = _dims(input, dim)
    bits = yield lambda: (_sides(*[_differs(input, value, dims) for value in native()]), native())
    return torch.return_types.aminmax([_mean_without(input, bits & bit != 0, dims, keepdim) for bit in (1, 2)])


def _tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


def _flat(coordinates: Sequence, size: Sequence[int]):
    """Positions in the flattened plane of all combinations of one coordinate a dimension."""
    flat = coordinates[0]
    for coordinate, n in zip(coordinates[1:], size[1:]):
        flat = flat[..., None] * n + coordinate
    return flat


def _plane(x: Tensor, dims: int, axis: int) -> Tensor:
    return x.flatten(-dims) if axis == -1 else x.flatten(-dims).transpose(-1, -2)


def _max_pool(pool, dims, both, native, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, **options):
    stride = stride or kernel_size
    kernel, step, pad, spread = (_tuple(value, dims) for value in (kernel_size, stride, padding, dilation))

    def choose():
        values, indices = pool(input, kernel_size, stride, padding, dilation, ceil_mode)
        out = values.shape[-dims:]
        starts = [torch.arange(-p, n * s - p, s, device=input.device) for p, n, s in zip(pad, out, step)]
        offsets = [range(0, k * d, d) for k, d in zip(kernel, spread)]
        return _windows(input, indices, starts, offsets), (values, indices) if both else values

    return _pooled(input, (yield choose), dims, both)


def _adaptive_max_pool(pool, dims, both, native, input, output_size, **options):
    def choose():
        values, indices = pool(input, output_size)
        sizes = list(zip(input.shape[-dims:], values.shape[-dims:]))
        starts = [torch.arange(o, device=input.device) * n // o for n, o in sizes]
        offsets = [range(max(-(-(i + 1) * n // o) - i * n // o for i in range(o))) for n, o in sizes]
        return _windows(input, indices, starts, offsets), (values, indices) if both else values

    return _pooled(input, (yield choose), dims, both)


def _windows(input: Tensor, indices: Tensor, starts: list[Tensor], offsets: list[range]) -> tuple:
    """Where in its window each maximum lies: as a distance in the flattened plane if a byte holds it, else as a number."""
    dims = len(starts)
    size, out = input.shape[-dims:], indices.shape[-dims:]
    axis = -2 if input.ndim == dims + 2 and input.stride(1) == 1 < input.shape[1] else -1  # -2: channels last
    base = _flat(starts, size).flatten()
    base = base if axis == -1 else base[:, None]
    place, table, reach = _plane(indices, dims, axis) - base, None, 0
    for offset, n in zip(offsets, size):
        reach = reach * n + offset[-1]
    if reach > 255 and math.prod(map(len, offsets)) <= 256 and all(offset[-1] < n for offset, n in zip(offsets, size)):
        table = _flat([torch.tensor(offset, device=input.device) for offset in offsets], size).flatten()  # ascending
        place, reach = torch.bucketize(place, table), len(table) - 1
    return _small(place, reach + 1), base, table, axis, out


def _pooled(input: Tensor, choice: tuple, dims: int, both: bool):
    place, base, table, axis, out = choice
    index = base + (place if table is None else table[place.long()])
    values = _plane(input, dims, axis).gather(axis, index)
    result = [(x if axis == -1 else x.transpose(-1, -2)).unflatten(-1, out) for x in (values, index)]
    return tuple(result) if both else result[0]


# Composites, whose operations cannot be seen from outside, written out on operations that are.


class _WrittenOut:
    """A formula in seen operations; None from it: no kink. The recorded pass takes PyTorch's own value unless `always`."""

    def __init__(self, formula: Callable, always: bool = False):
        self.formula, self.always = formula, always


def _hardsigmoid(input):  # `always`, for PyTorch's own backward takes 1/6 in single precision
    return F.hardtanh(input + 3, 0.0, 6.0) / 6


def _norm(input, p="fro", dim=None, keepdim=False, dtype=None):
    if p not in (1, math.inf):
        return None
    size = input.abs() if dtype is None else input.to(dtype).abs()
    dims = _dims(input, dim)
    return size.sum(dims, keepdim) if p == 1 else size.amax(dims, keepdim)


def _vector_norm(input, ord=2, dim=None, keepdim=False, dtype=None):
    return _norm(input, ord, dim, keepdim, dtype)


def _linalg_norm(input, ord=None, dim=None, keepdim=False, dtype=None):
    of_vectors = input.ndim == 1 if dim is None else len(_dims(input, dim)) == 1
    return _norm(input, ord, dim, keepdim, dtype) if of_vectors else None


def _dist(input, other, p=2):
    return _norm(input - other, p)


def _pairwise_distance(x1, x2, p=2.0, eps=1e-6, keepdim=False):
    return _norm(x1 - x2 + eps, p, -1, keepdim)


def _cdist(x1, x2, p=2.0, compute_mode=None):
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1) if p in (1, math.inf) else None


def _reduced(loss: Tensor, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> Tensor:
    if size_average is not None or reduce is not None:  # the old names
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _l1_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    error = (input - target).abs()
    if weight is None:
        return _reduced(error, reduction, size_average, reduce)
    total = _reduced(error * weight, "none" if reduction == "none" else "sum")
    return total / weight.sum() if reduction == "mean" else total


def _hinge_embedding_loss(input, target, margin=1.0, **reduction):
    loss = (margin - input).clamp_min(0).masked_fill(target == 1, 0) + input.masked_fill(target == -1, 0)
    return _reduced(loss, **reduction)


def _margin_ranking_loss(input1, input2, target, margin=0.0, **reduction):
    return _reduced((margin - target * (input1 - input2)).clamp_min(0), **reduction)


def _multi_margin_loss(input, target, p=1, margin=1.0, weight=None, **reduction):
    if p != 1:
        return None  # its slope is continuous
    target = target.unsqueeze(-1)
    loss = F.relu(margin - input.gather(-1, target) + input).scatter(-1, target, 0)
    loss = loss if weight is None else loss * weight[target]
    return _reduced(loss.sum(-1) / input.shape[-1], **reduction)


def _cosine_embedding_loss(input1, input2, target, margin=0.0, **reduction):
    square1, square2 = ((x * x).sum(-1) + 1e-12 for x in (input1, input2))
    cosine = (input1 * input2).sum(-1) / (square1 * square2).sqrt()
    loss = (1 - cosine).masked_fill(target != 1, 0) + (cosine - margin).clamp_min(0).masked_fill(target != -1, 0)
    return _reduced(loss, **reduction)


def _triplet_margin_loss(anchor, positive, negative, margin=1.0, p=2, eps=1e-6, swap=False, **reduction):
    distance = lambda x, y: F.pairwise_distance(x, y, p, eps)
    return _reduced(_triplets(anchor, positive, negative, distance, margin, swap), **reduction)


def _triplet_margin_with_distance_loss(
    anchor, positive, negative, distance_function=None, margin=1.0, swap=False, reduction="mean"
):
    distance = distance_function or F.pairwise_distance
    return _reduced(_triplets(anchor, positive, negative, distance, margin, swap), reduction)


def _triplets(anchor, positive, negative, distance, margin, swap):
    near, far = distance(anchor, positive), distance(anchor, negative)
    far = torch.minimum(far, distance(positive, negative)) if swap else far
    return torch.clamp_min(margin + near - far, 0)


def _pairs(names: str, handler: Callable) -> dict:
    return {name: partial(handler, getattr(torch.return_types, name)) for name in names.split()}


def _pools() -> dict:
    named = {}
    for dims in (1, 2, 3):
        for stem, handler in (("max_pool", _max_pool), ("adaptive_max_pool", _adaptive_max_pool)):
            pool = getattr(F, f"{stem}{dims}d_with_indices")
            named[f"{stem}{dims}d"] = partial(handler, pool, dims, False)
            named[f"{stem}{dims}d_with_indices"] = partial(handler, pool, dims, True)
    return named


_NAMED = {
    "relu": _relu,
    "threshold": _threshold,
    "hardshrink": _hardshrink,
    "leaky_relu": _leaky_relu,
    "rrelu": _rrelu,
    "prelu": _prelu,
    "elu": _elu,
    "selu": _selu,
    "hardtanh": _hardtanh,
    "relu6": lambda native, input: _hardtanh(native, input, 0.0, 6.0),
    "hardswish": _hardswish,
    "hardsigmoid": _WrittenOut(_hardsigmoid, always=True),
    "softshrink": _softshrink,
    **dict.fromkeys(("clamp", "clip", "clamp_min"), _clamp),
    "clamp_max": _clamp_max,
    **dict.fromkeys(("abs", "absolute"), _abs),
    "maximum": partial(_maximum, torch.gt),
    "minimum": partial(_maximum, torch.lt),
    "fmax": partial(_fmax, torch.gt),
    "fmin": partial(_fmax, torch.lt),
    "max": partial(_max, torch.return_types.max, torch.gt),
    "min": partial(_max, torch.return_types.min, torch.lt),
    **dict.fromkeys(("amax", "amin"), _amax),
    "aminmax": _aminmax,
    **_pairs("median nanmedian", _reduced_to_one),
    **_pairs("mode sort cummax cummin", _picked),
    **_pairs("kthvalue topk", _picked_of_k),
    "msort": _msort,
    **dict.fromkeys(("argmax", "argmin"), _argmax),
    "argsort": _argsort,
    **dict.fromkeys(
        "gt ge lt le eq ne greater greater_equal less less_equal not_equal __eq__".split(),
        partial(_constant, partial(Tensor.to, dtype=torch.bool, copy=True)),
    ),
    **dict.fromkeys(("sign", "sgn"), _sign),
    **dict.fromkeys("round floor ceil trunc fix".split(), _round),
    "where": _where,
    **_pools(),
    "norm": _WrittenOut(_norm),
    "dist": _WrittenOut(_dist),
    "cdist": _WrittenOut(_cdist),
    "pairwise_distance": _WrittenOut(_pairwise_distance),
    "triplet_margin_with_distance_loss": _WrittenOut(_triplet_margin_with_distance_loss, always=True),
}
_LOSSES = (
    _l1_loss,
    _hinge_embedding_loss,
    _margin_ranking_loss,
    _multi_margin_loss,
    _cosine_embedding_loss,
    _triplet_margin_loss,
)
_IN_PLACE = {"relu": partial(_relu, product=Tensor.mul_)}  # others: the result is copied into the input
_KEYWORDS = {"axis": "dim", "keepdims": "keepdim"}
_OPERATIONS = {  # {function: (name, handler, in place)}
    function: (name, handler, bool(suffix))
    for name, handler in _NAMED.items()
    for suffix in ("", "_")
    for owner in (torch, F, Tensor)
    if (function := getattr(owner, name + suffix, None)) is not None
}
_OPERATIONS.update({getattr(F, loss.__name__[1:]): (loss.__name__[1:], _WrittenOut(loss), False) for loss in _LOSSES})
_OPERATIONS[torch.linalg.vector_norm] = ("vector_norm", _WrittenOut(_vector_norm), False)
_OPERATIONS[torch.linalg.norm] = ("norm", _WrittenOut(_linalg_norm), False)
_OPERATIONS[torch.adaptive_max_pool1d] = ("adaptive_max_pool1d_with_indices", _NAMED["adaptive_max_pool1d_with_indices"], False)
_OPERATIONS[Tensor.where] = ("where", _where_method, False)
