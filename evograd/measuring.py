"""What a step costs: seconds, peak bytes, FLOPs and launches, of anything that can be called."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], object]
Progress = Callable[[list], Iterable]


@dataclass(frozen=True)
class Cost:
    """seconds: median of one step, None under FakeTensorMode.  peak_bytes, flops, launches: of one step, see the functions."""

    seconds: float | None
    peak_bytes: int
    flops: int
    launches: int

    def as_dict(self) -> dict:
        return asdict(self)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have touched and that are still alive; `peak` is the largest sum so far.

    What counts is each tensor's storage, once, from the operation that makes or first reads it until the last tensor
    that uses it is gone: exact, reproducible, and the same under FakeTensorMode. Workspaces inside an operation are not seen.
    device_type: count those on such devices alone.
    """

    def __init__(self, device_type: str | None = None):
        super().__init__()
        self.device_type = device_type
        self.live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and self.device_type in (None, leaf.device.type):
                for part in _dense(leaf):
                    self._add(part.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known[0]() is storage:
            self.live += size - known[1]  # resized
        else:
            self.live += size
        if known is None or known[1] != size or known[0]() is not storage:
            self._storages[key] = (weakref.ref(storage, lambda ref, key=key: self._remove(key, ref)), size)
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, ref: weakref.ref) -> None:
        known = self._storages.get(key)
        if known is not None and known[0] is ref:
            self.live -= self._storages.pop(key)[1]


def _dense(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with a storage that one consists of: itself, the parts of a sparse one, none of an opaque one."""
    if tensor.layout is torch.strided:
        return [tensor]
    of_rows = ["crow_indices", "col_indices", "values"]
    of_columns = ["ccol_indices", "row_indices", "values"]
    parts = {torch.sparse_coo: ["_indices", "_values"], torch.sparse_csr: of_rows, torch.sparse_bsr: of_rows}
    parts |= dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), of_columns)
    return [getattr(tensor.detach(), part)() for part in parts.get(tensor.layout, [])]


class Launches(TorchDispatchMode):
    """`n` counts operations that compute: those that return tensors, or write into some, and are neither views nor empty tensors.

    On a GPU each is a kernel or a few, and where kernels are small it is their number that takes the time. One over a list of
    tensors (foreach) counts once. Exact, and the same on every machine that takes the same path.
    """

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += _computes(function)
        return function(*args, **(kwargs or {}))


@cache
def _computes(function) -> bool:
    returns = function._schema.returns
    if not returns:
        return True  # writes into its arguments
    tensors = [r for r in returns if "Tensor" in str(r.type)]
    is_view = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return bool(tensors) and not is_view and "empty" not in function._schema.name


def peak_bytes(step: Step, first: Step | None = None) -> int:
    """Largest number of bytes of tensors alive at once during `step`, those that exist before and that it uses counted in.

    By `LiveBytes`; on a CUDA machine that works on the device, what the allocator's peak lies above what it held before, and the
    tensors there that the step uses: other models that are alive do not count. The step runs twice: the first run makes what
    stays (optimizer state) and shows which tensors belong to the step. first: a cheaper step on the same tensors that will do
    for that.
    """
    first = first or step
    if _on_cuda():
        with LiveBytes("cuda") as live:
            first()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + live.live
    with LiveBytes() as live:
        first()
        live.peak = live.live
        step()
    return live.peak


def flops(step: Step) -> int:
    """Floating-point operations of `step` (matrix products and convolutions; a multiply-add counts as two)."""
    with flop_counter() as counter:
        step()
    return counter.get_total_flops()


class _Nowhere(AbstractContextManager):
    """In the place of a counter's tracker of modules, whose hooks fail where a loss takes gradients by its inputs."""

    parents = ("Global",)

    def __exit__(self, *error) -> None:
        pass


def flop_counter():
    """PyTorch's mode that counts FLOPs, of all modules together."""
    from torch.utils.flop_counter import FlopCounterMode  # here, since it loads triton

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Nowhere()
    return counter


def launches(step: Step) -> int:
    """Operations of `step` that compute, see `Launches`."""
    with Launches() as counter:
        step()
    return counter.n


def counts(step: Step) -> tuple[int, int, int]:
    """(peak_bytes, flops, launches) of a step, which runs twice: FLOPs are counted in the first run, the others in the second."""
    counter, launched = flop_counter(), Launches()

    def first():
        with counter:
            step()

    def second():
        with launched:
            step()

    return peak_bytes(second, first), counter.get_total_flops(), launched.n


def seconds(
    steps: Mapping[str, Step],
    repeats: int = 10,
    warmup: int = 2,
    enough: float = float("inf"),
    progress: Progress = iter,
) -> dict[str, float]:
    """Median seconds of each step. The steps take turns, so that a machine that slows down slows all of them: quote ratios.

    enough: a step that has taken so many seconds in all is not repeated, nor warmed up again. progress: goes through the list
    of all turns, as tqdm does.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    warming = dict.fromkeys(steps, 0.0)
    for turn, name in progress([(turn, name) for turn in range(warmup + repeats) for name in steps]):
        if turn < warmup:
            if warming[name] <= enough:
                warming[name] += _timed(steps[name])
        elif sum(times[name]) <= enough:
            times[name].append(_timed(steps[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(step: Step, repeats: int = 10, warmup: int = 2) -> Cost:
    """Seconds, peak bytes, FLOPs and launches of one step of anything. It is really run, `repeats + warmup + 2` times."""
    return compare({"step": step}, repeats, warmup)["step"]


def compare(
    steps: Mapping[str, Step],
    repeats: int = 10,
    warmup: int = 2,
    enough: float = float("inf"),
    progress: Progress = iter,
) -> dict[str, Cost]:
    """The cost of several steps, side by side. repeats, warmup, enough, progress: as in `seconds`."""
    exact = {name: counts(steps[name]) for name in progress(list(steps))}
    fake = detect_fake_mode() is not None
    times = dict.fromkeys(steps) if fake else seconds(steps, repeats, warmup, enough, progress)
    return {name: Cost(times[name], *exact[name]) for name in steps}


def compare_made(
    makers: Mapping[str, Callable[[], Step]], device: torch.device, repeats: int = 10, warmup: int = 2, **settings
) -> dict[str, Cost]:
    """The cost of several steps that are yet to be made, by functions without arguments.

    On CUDA each is made, measured and dropped before the next one is, so that all have the whole memory of the card. Elsewhere
    they take turns. repeats, warmup, settings: those of `compare`.
    """
    if torch.device(device).type != "cuda" or detect_fake_mode() is not None:
        return compare({name: make() for name, make in makers.items()}, repeats, warmup, **settings)
    costs = {}
    for name, make in makers.items():
        costs |= compare({name: make()}, repeats, warmup, **settings)
        gc.collect()  # models in cycles
        torch.cuda.empty_cache()
    return costs


def by_architecture(costs: Mapping[str, Cost]) -> dict[str, dict]:
    """{method: {peak_bytes, flops, launches, and each over_plain}}: what of the costs does not depend on the machine."""
    plain = costs["plain"]
    return {
        method: {
            "peak_bytes": cost.peak_bytes,
            "flops": cost.flops,
            "launches": cost.launches,
            "peak_over_plain": cost.peak_bytes / plain.peak_bytes,
            "flops_over_plain": cost.flops / plain.flops,
            "launches_over_plain": cost.launches / plain.launches,
        }
        for method, cost in costs.items()
    }


def _timed(step: Step) -> float:
    if _on_cuda():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _on_cuda() -> bool:
    """Whether steps work on a CUDA device: something lies there. Fake tensors are counted, wherever they claim to be."""
    initialized = torch.cuda.is_available() and torch.cuda.is_initialized()
    return initialized and torch.cuda.memory_allocated() > 0 and detect_fake_mode() is None
