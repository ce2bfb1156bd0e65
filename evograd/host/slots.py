"""A model as a host: for the length of a block it holds other tensors, and afterwards it is what it was."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..operations.forward_mode import bare
from ..operations.recomputation import recomputed_in
from ..operations.threads import replaced
from .attributes import Attributes, items, some
from .draws import on_the_host
from .stand_ins import Watch

NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
NUMBERS |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}  # by which one can multiply: not bool, float8, uint16


class Slots:
    """Where a model's parameters and buffers stand: under every name of every module, and in modules' own lists and dicts.

    `holding` puts other tensors there. A module that is registered under several names, and a parameter that is shared by several
    modules, have all of their places changed and restored.

    beside: other modules that losses call (a weight net, a teacher), whose buffers and attributes are treated as the model's.
    hyper: ids of tensors that stay themselves everywhere.
    """

    def __init__(self, model: nn.Module, beside: Sequence[nn.Module] = (), hyper: Collection[int] = ()):
        self.parameters: dict[str, Tensor] = {}  # a shared one appears once, under its first name
        self.modules: list[nn.Module] = []  # each once
        self.places: dict[int, list[tuple[object, object]]] = {}
        self.originals: list[tuple[object, object, Tensor]] = []
        self.buffers: dict[int, Tensor] = {}
        self.written: set[int] = set()  # weights that their module writes into as it is called
        plain: list[tuple[nn.Module, str, Tensor]] = []  # tensors that stay, and are put back: they are no dense buffers
        self.block: object = None  # the innermost one that is open
        memo: set[nn.Module] = set()
        named = [(root is model, *entry) for root in (model, *beside) for entry in root.named_modules(memo)]
        for of_model, prefix, module in named:
            self.modules.append(module)
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    if of_model and id(tensor) not in self.places:
                        self.parameters[f"{prefix}.{name}" if prefix else name] = tensor
                    self._add(module._parameters, name, tensor)
            for name, tensor in module._buffers.items():
                if tensor is not None and (tensor.layout is not torch.strided or tensor.is_quantized):
                    plain.append((module, name, tensor))
                    self.originals.append((module._buffers, name, tensor))
                elif tensor is not None:
                    if id(tensor) not in hyper:
                        self.buffers[id(tensor)] = tensor
                    self._add(module._buffers, name, tensor)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                self.written.add(id(module.weight))
        self.attributes = Attributes(self.modules, (model, *beside), plain)
        for container in self.attributes.containers:
            for key, item in items(container):
                if id(item) in self.places:
                    self._add(container, key, item)

    def _add(self, container: object, key: object, tensor: Tensor) -> None:
        self.places.setdefault(id(tensor), []).append((container, key))
        self.originals.append((container, key, tensor))

    def looked_after(self) -> set[int]:
        """Ids of tensors that are the modules' own."""
        return {*self.places, *(id(tensor) for _, _, tensor in self.attributes.plain)}

    def kept(self) -> list[Tensor]:
        """What a module may write into as it is called, and what is put back where a model holds its own tensors."""
        weights = [p for p in self.parameters.values() if id(p) in self.written and not is_traceable_wrapper_subclass(p)]
        return [b for b in self.buffers.values() if not _overlaps(b)] + weights

    @contextmanager
    def holding(
        self, tensors: Iterable[tuple[Tensor, Tensor]], buffers: Sequence[Tensor] | None = None, *, in_place: bool = False
    ):
        """The model with, for each pair (its own tensor, another one), the other one in place of its own.

        Its buffers are copies, or those given: what BatchNorm gathers within the block is thrown away. So are weights that
        their module writes into as it is called (Embedding with max_norm). in_place: both stay the model's own, and their values
        are put back, without the graph of what was written into them. Whatever else is done to modules within the block is
        undone: modes, hooks, submodules and buffers that are added, attributes that are bound anew, entries of lists, dicts and
        sets in attributes, values of small tensors in attributes. RuntimeError where a large one has been written into, or
        parameters have been added.
        """
        outer, kept = self.block, self.kept() if in_place else []
        tensors = [(own, _unwritten(other) if id(own) in self.written else other) for own, other in tensors]
        stand_ins = {id(other): own for own, other in tensors}
        watch = Watch(other for own, other in tensors if id(own) not in self.written)
        if buffers is None:
            buffers = () if in_place else copies(list(self.buffers.values()))
        before, values = self.attributes.now(kept), clones(kept)
        self.block = block = object()

        def segment():
            """A checkpointed segment begins here: it is recomputed with these tensors, and in these modes."""
            modes = [module.training for module in self.modules]
            return lambda: nullcontext() if self.block is block else self._again(tensors, buffers, modes)

        try:
            for own, other in (*tensors, *zip(self.buffers.values(), buffers)):
                for container, key in self.places[id(own)]:
                    container[key] = other
            with recomputed_in(segment), own_cache():
                yield
        finally:
            self.block = outer
            write(kept, values)
            for container, key, tensor in self.originals:
                container[key] = tensor
            written = watch.end()
            before.put_back(self.places.keys() | stand_ins.keys())
        changed = [other for other, still in written.items() if still and storage(other) == storage(stand_ins[id(other)])]
        self.check_written([stand_ins[id(other)] for other in written], bool(changed))
        before.check(self.originals)

    def check_written(self, parameters: Sequence[Tensor], changed: bool) -> None:
        """RuntimeError if a loss has written into parameters, or into what stands in their places."""
        if parameters:
            found = {id(p) for p in parameters}
            names = some(name for name, p in self.parameters.items() if id(p) in found)
            raise RuntimeError(
                f"a loss has written into the model's parameters {names}"
                + (": the model is changed" if changed else ", and so into those of the candidate that it is for")
                + ". Do that outside of the losses, or make them buffers, of which each candidate has a copy"
            )

    @contextmanager
    def _again(self, tensors: list[tuple[Tensor, Tensor]], buffers: Sequence[Tensor], modes: list[bool]):
        """The block of `holding` once more, after it has ended: for a segment that is recomputed there."""
        before = [module.training for module in self.modules]
        for module, mode in zip(self.modules, modes):
            module.training = mode
        try:
            with self.holding(tensors, buffers):
                yield
        finally:
            for module, mode in zip(self.modules, before):
                module.training = mode


def own_cache() -> AbstractContextManager:
    """A block within torch.nn.utils.parametrize.cached() that neither sees what was computed before it, nor leaves anything."""
    return replaced((parametrize, "_cache", {})) if parametrize._cache_enabled else nullcontext()


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each, the same bits."""
    result = [torch.empty_like(t, requires_grad=False) for t in tensors]
    write(result, tensors)
    return result


@torch.no_grad()
def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Values into tensors, the same bits."""
    if targets:
        torch._foreach_copy_(targets, values)


def meeting(tensors: Mapping[Hashable, Tensor]) -> Iterator[tuple[Hashable, Hashable]]:
    """Names of any two that have an element in the same memory, in the mapping's order."""
    found: dict[int, list[Hashable]] = {}
    for name, tensor in tensors.items():
        # Others have no storage of their own: sparse ones, or a subclass that wraps several.
        if tensor.layout is torch.strided and (type(tensor) is nn.Parameter or not is_traceable_wrapper_subclass(tensor)):
            found.setdefault(storage(tensor), []).append(name)
    for names in found.values():
        if len(names) > 1:
            places = sorted((*_span(tensors[name]), i) for i, name in enumerate(names) if tensors[name].numel())
            open_ones: list[tuple[int, int, int]] = []
            for place in places:
                open_ones = [other for other in open_ones if other[1] > place[0]]
                for i, j in (sorted((other[2], place[2])) for other in open_ones):
                    if _meet(tensors[names[i]], tensors[names[j]]):
                        yield names[i], names[j]
                open_ones.append(place)


def storage(tensor: Tensor) -> int:
    """The same number for tensors in the same storage."""
    return bare(tensor).untyped_storage()._cdata


def _span(tensor: Tensor) -> tuple[int, int]:
    """Bytes of the storage, from the first that is the tensor's to behind the last."""
    start, size = tensor.storage_offset(), tensor.element_size()
    return start * size, (start + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))) * size


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two whose spans meet have an element in common: columns of one matrix have none."""
    if a.dtype != b.dtype or a.is_contiguous() or b.is_contiguous():
        return True
    places = []
    with on_the_host():
        for t in (a, b):
            place = torch.tensor(t.storage_offset())
            for n, stride in zip(t.shape, t.stride()):
                place = place[..., None] + stride * torch.arange(n)
            places.append(place.flatten())
        return bool(torch.isin(*places).any())


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory (an expanded tensor): nothing can be written into those."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each, by one operation for each kind of number."""
    groups: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kind = tensor.dtype if type(tensor) in (Tensor, FakeTensor) and tensor.dtype in NUMBERS else i
        groups.setdefault((kind, tensor.device), []).append(i)
    result: list[Tensor] = [None] * len(tensors)
    for (kind, _), members in groups.items():
        chosen = [tensors[i] for i in members]
        made = torch._foreach_mul(chosen, 1) if isinstance(kind, torch.dtype) else [chosen[0].clone()]
        for i, copy in zip(members, made):
            result[i] = copy
    return result


def _unwritten(tensor: Tensor) -> Tensor:
    """A copy, for a module that writes into it."""
    return tensor.clone().as_subclass(type(tensor))
