"""A CUDA device that is not there: tensors lie on the CPU and are marked with the device that they would be on.

    with pretended_cuda() as cuda:
        train.main(["--device", "cuda", …])
    cuda.events  # where the host has waited for the device

Numbers are real. A tensor says `cuda:0` where it is asked, operations on tensors of both devices raise as they do on CUDA, and
so do a generator of the other device, NumPy, and indices of the wrong one. Every synchronisation is an event with its place:
values that are read, operations whose result has a size that depends on values, and copies between the devices, but for those
of pinned memory with non_blocking=True. CUDA's own random numbers are another stream than the CPU's.

The mark is an attribute of the storage. Two modes do it: `_Calls` sees what Python calls (.device, .to, factories), and
`_Operations`, beneath autograd and functorch, every operation that computes. Tensors that C++ makes of itself (zeros for an
undefined gradient) do not say where: they have the mark EITHER, and go with any other.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401  its import looks at what is patched below
import torch.nn.functional as F
import torch.utils.checkpoint as checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent
CUDA, CPU, EITHER = "cuda", "cpu", "either"
DEVICES = {CUDA: torch.device("cuda", 0), CPU: torch.device("cpu"), EITHER: torch.device("cpu")}

FACTORIES = {
    getattr(torch, name)
    for name in "zeros ones empty full rand randn randint arange linspace eye randperm tensor as_tensor from_numpy".split()
}
# The size of what they return, or a number that they return to Python, depends on values.
READING = "_local_scalar_dense equal nonzero masked_select unique_dim _unique2 unique_consecutive bincount".split()
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
COPIES = ("copy_", "_foreach_copy_")
ONE_DEVICE = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({})"


@dataclass(frozen=True)
class Event:
    """what: a read or a copy, and how.  function: the innermost one, with its file.  place: its line, and its caller's."""

    what: str
    function: str
    place: str

    def __str__(self) -> str:
        return f"{self.place} ({self.function}): {self.what}"


def storage(tensor: Tensor):
    """Where marks are kept; None of zeros that are not written out."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if tensor._is_zerotensor() else tensor.untyped_storage()


def tensors_in(values) -> list[Tensor]:
    """Of an operation's arguments, or results: tensors and lists of tensors."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def mark(value, where: str):
    """All tensors in `value` lie there."""
    for tensor in tensors_in([value]):
        if (kept := storage(tensor)) is not None:
            kept.where = where
    return value


def where(tensor: Tensor) -> str:
    kept = storage(tensor)
    return EITHER if kept is None else getattr(kept, "where", CPU)


def on_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Device:
    def __init__(self):
        self.events: list[Event] = []
        self.generator = _Generator()  # CUDA's default one
        self.born = EITHER  # where an operation without tensors makes its result

    def note(self, what: str) -> None:
        """An event, with the innermost two lines of the project that are being executed."""
        frame, names, places = sys._getframe(1), [], []
        while frame is not None and (len(places) < 2 or not names):
            code, file = frame.f_code, Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and file != Path(__file__) and ".venv" not in file.parts:
                places.append(f"{file.relative_to(ROOT)}:{frame.f_lineno}")
                if not code.co_name.startswith(("<", "__torch_")):  # lambdas and modes belong to who calls them
                    names.append(f"{file.relative_to(ROOT)} {code.co_name}")
            frame = frame.f_back
        self.events.append(Event(what, names[0] if names else "?", " < ".join(places[:2])))

    def moved(self, tensor: Tensor, to: str, non_blocking: bool = False) -> Tensor:
        """What .to(device) gives."""
        if where(tensor) in (to, EITHER):
            return mark(tensor, to)
        self._copied(tensor, to, non_blocking)
        return mark(tensor.clone(), to)

    def _copied(self, source: Tensor, to: str, non_blocking: bool) -> None:
        if source.numel() and not (to == CUDA and non_blocking and getattr(storage(source), "pinned", False)):
            self.note(f"copy to {to}")


class _Calls(TorchFunctionMode):
    def __init__(self, device: Device):
        super().__init__()
        self.cuda = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, cuda = dict(kwargs or {}), self.cuda
        if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):  # another mode's, of what came before
            return function(*args, **kwargs)
        if function in ANSWERS:
            return ANSWERS[function](cuda, *args, **kwargs)
        if function in (Tensor.numpy, Tensor.__array__) and where(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function is Tensor.tolist and where(args[0]) == CUDA:
            cuda.note("read by tolist")
        if function is Tensor.__deepcopy__:
            return mark(function(*args, **kwargs), where(args[0]))
        if on_cuda(kwargs.get("device")) and function in (torch.tensor, torch.as_tensor):
            data = args[0] if args else kwargs["data"]
            kwargs["device"] = CPU
            return cuda.moved(data if isinstance(data, Tensor) else function(*args, **kwargs), CUDA)
        if function is F.one_hot and len(args) + len(kwargs) > 1:  # given the number of classes, CUDA does not look at them
            events = list(cuda.events)
            result = function(*args, **kwargs)
            cuda.events[:] = events
            return result
        before = cuda.born
        if kwargs.get("device") is not None:
            cuda.born = CUDA if on_cuda(kwargs["device"]) else CPU
            kwargs["device"] = CPU
        else:
            cuda.born = CPU if function in FACTORIES else EITHER
        try:
            return function(*args, **kwargs)
        finally:
            cuda.born = before


def _to(cuda: Device, tensor: Tensor, *args, other: Tensor | None = None, copy: bool = False, **kwargs) -> Tensor:
    if args and isinstance(args[0], Tensor):
        other, *args = args
    if other is not None:
        args = (DEVICES[where(other)], other.dtype, *args)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    changes = {"dtype": dtype, "memory_format": memory_format}
    # Converted on whichever side it is: the number of copies is the same.
    result = Tensor.to(tensor, copy=copy, **{name: value for name, value in changes.items() if value is not None})
    return result if device is None else cuda.moved(result, device.type, non_blocking)


def _pinned(cuda: Device, tensor: Tensor, *args) -> Tensor:
    if where(tensor) == CUDA:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    result = tensor.clone()
    storage(result).pinned = True
    return result


ANSWERS = {
    Tensor.device.__get__: lambda cuda, t: DEVICES[where(t)],
    Tensor.is_cuda.__get__: lambda cuda, t: where(t) == CUDA,
    Tensor.is_cpu.__get__: lambda cuda, t: where(t) != CUDA,
    Tensor.to: _to,
    Tensor.cpu: lambda cuda, t, **_: cuda.moved(t, CPU),
    Tensor.cuda: lambda cuda, t, device=None, non_blocking=False, **_: cuda.moved(t, CUDA, non_blocking),
    Tensor.pin_memory: _pinned,
    Tensor.is_pinned: lambda cuda, t, *_: getattr(storage(t), "pinned", False),
}


class _Operations(TorchDispatchMode):
    def __init__(self, device: Device):
        super().__init__()
        self.cuda = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # the rest is no call of Python's
            return self._run(function, args, kwargs or {})

    def _run(self, function, args, kwargs):
        cuda, name = self.cuda, function._schema.name.partition("::")[2]
        tensors = tensors_in((*args, *kwargs.values()))
        places = [where(t) for t in tensors]
        if name in COPIES:
            return self._copy(function, args, kwargs)
        if CUDA in places and CPU in places:
            self._check_mixed(function, name, args, tensors, places)
        on = next((place for place in (CUDA, CPU) if place in places), EITHER) if tensors else cuda.born
        if on == CUDA and name in READING:
            cuda.note(f"read by {name}")
        if on == CUDA and name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in _index(args)):
            cuda.note("read by a boolean index")
        if torch.Tag.nondeterministic_seeded in function.tags:
            result = self._draw(function, args, kwargs, on)
        else:
            result = function(*args, **kwargs)
        return mark(result, on)

    def _copy(self, function, args, kwargs):
        pairs = [args[:2]] if isinstance(args[0], Tensor) else zip(*args[:2])
        for to, source in pairs:
            if {where(to), where(source)} == {CUDA, CPU}:
                self.cuda._copied(source, where(to), kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            elif where(to) == EITHER:
                mark(to, where(source))
        return function(*args, **kwargs)

    def _check_mixed(self, function, name: str, args, tensors: list[Tensor], places: list[str]) -> None:
        """Numbers may come from the host, and indices into what is on the device, which are copied there."""
        if name in INDEXING and places[0] == CUDA:
            if any(where(t) == CPU for t in _index(args)):
                self.cuda.note("copy to cuda of an index")
            tensors = [t for t in tensors if not any(t is i for i in _index(args))]
        numbers = torch.Tag.pointwise in function.tags or name.startswith(("_foreach", "fill_")) or name in INDEXING
        if any(where(t) == CPU and not (numbers and t.dim() == 0) for t in tensors):
            raise RuntimeError(ONE_DEVICE.format(name))

    def _draw(self, function, args, kwargs, on: str):
        given = kwargs.get("generator", next((a for a in args if isinstance(a, torch._C.Generator)), None))
        if given is not None:
            claimed = _Generator.claimed.get(given._cdata, CPU)
            if on != EITHER and claimed != on:
                raise RuntimeError(f"Expected a '{on}' device type for generator but found '{claimed}'")
        if given is not None or on != CUDA:
            return function(*args, **kwargs)
        state = torch.get_rng_state()
        torch.set_rng_state(self.cuda.generator.get_state())
        try:
            return function(*args, **kwargs)
        finally:
            self.cuda.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(state)


def _index(args) -> list[Tensor]:
    return [t for t in args[1] if t is not None]


class _Generator(torch.Generator):
    claimed: dict[int, str] = {}  # by address: what C++ hands on has another wrapper

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self._device = torch.device(device)
        cls.claimed[self._cdata] = self._device.type
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return self._device


class _Timer:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other) -> float:
        return 1000 * (other.time - self.time)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


def _of_cuda(device: Device) -> dict:
    """What torch.cuda answers."""

    def state(*_):
        with _disable_current_modes():
            return device.generator.get_state()

    def set_state(new, *_):
        with _disable_current_modes():
            device.generator.set_state(new)

    nothing, seed = lambda *_, **__: None, lambda number: device.generator.manual_seed(number)
    constant = lambda value: lambda *_, **__: value
    return dict(
        is_available=constant(True), is_initialized=constant(True), _lazy_init=nothing, device_count=constant(1),
        current_device=constant(0), set_device=nothing, get_device_name=constant("pretended"), is_bf16_supported=constant(True),
        is_current_stream_capturing=constant(False), synchronize=nothing, empty_cache=nothing,
        memory_allocated=constant(1), max_memory_allocated=constant(2), reset_peak_memory_stats=nothing,
        get_rng_state=state, set_rng_state=set_state, get_rng_state_all=lambda: [state()],
        manual_seed=seed, manual_seed_all=seed,
        Event=_Timer,
    )  # fmt: skip


@contextmanager
def pretended_cuda():
    device = Device()
    calls = _Calls(device)
    grouped, run_backward = torch._C._group_tensors_by_device_and_dtype, torch.autograd._engine_run_backward

    def group(lists, *rest):
        """For optimizers: C++ sees the CPU."""
        found = grouped(lists, *rest).items()
        return {(DEVICES[where(group[0][0][0])], dtype): group for (_, dtype), group in found}

    def backward(*args, **kwargs):
        """For hooks, and what is recomputed: PyTorch calls the pass without the mode that has seen torch.autograd.grad."""
        with calls if calls not in _get_current_function_mode_stack() else nullcontext():
            return run_backward(*args, **kwargs)

    patches = [
        mock.patch.multiple(torch.cuda, **_of_cuda(device)),
        # So that DataLoader pins; and optimizers find no stream to ask whether it is captured.
        mock.patch.multiple(torch.accelerator, is_available=lambda: True, current_accelerator=lambda *_, **__: None),
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(torch, "autocast", _Autocast),
        mock.patch.object(torch.autograd, "_engine_run_backward", backward),
        # What is saved for the backward pass is asked by C++ where it lies, which calls no mode.
        mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, {"default": lambda t: (t.shape, t.dtype)}),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group),
    ]
    for patch in patches:
        patch.start()
    try:
        with calls, _Operations(device):
            yield device
    finally:
        for patch in reversed(patches):
            patch.stop()
