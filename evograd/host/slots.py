"""A model as a host: for the length of a block it holds other tensors, and afterwards it is what it was."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..operations.recomputation import recomputed_in
from ..operations.threads import replaced
from .draws import on_the_host

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
EMPTY = {dict: {}, OrderedDict: OrderedDict(), set: set()}
SMALL = 2**16  # elements of a plain tensor that is copied, so that what is written into it can be undone


class StandIn(Tensor):
    """What stands in a parameter's place without a graph, and says that it requires grad, as the parameter does.

    A loss that asks for that (weight decay over what is trained, say) then takes it in, and no graph of the network is built.
    What operations make of it are plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    _is_param = True  # isinstance(…, nn.Parameter), which losses ask, and compiled code of a tensor that is of no plain type
    says = True

    @property
    def requires_grad(self) -> bool:
        return self.says

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        self.says = requires_grad
        return Tensor.requires_grad_(self, requires_grad)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    @staticmethod
    def of(own: Tensor, other: Tensor) -> Tensor:
        """What is to stand in the place of `own`, where that is more than what the other tensor is by itself."""
        plain = type(other) is Tensor and not other.requires_grad
        return other.as_subclass(StandIn) if plain and own.requires_grad else other


class Slots:
    """Where a model's parameters and buffers stand: under every name of every module, and in modules' own lists and dicts.

    `holding` puts other tensors there. A module that is registered under several names, and a parameter that is shared by several
    modules, have all of their places changed and restored.
    """

    def __init__(self, model: nn.Module):
        self.parameters: dict[str, Tensor] = {}  # a shared one appears once, under its first name
        self.modules: list[nn.Module] = []  # each once
        self.places: dict[int, list[tuple[object, object]]] = {}
        self.originals: list[tuple[object, object, Tensor]] = []
        self.buffers: dict[int, Tensor] = {}
        self.written: set[int] = set()  # weights that their module writes into as it is called
        self.block: object = None  # the innermost one that is open
        for prefix, module in model.named_modules():
            self.modules.append(module)
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    if id(tensor) not in self.places:
                        self.parameters[f"{prefix}.{name}" if prefix else name] = tensor
                    self._add(module._parameters, name, tensor)
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    self.buffers[id(tensor)] = tensor
                    self._add(module._buffers, name, tensor)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                self.written.add(id(module.weight))
        # Of every module: names of parameters, buffers and submodules, hooks; and its class.
        self.registries = [d for m in self.modules for k, d in vars(m).items() if k in OF_EVERY_MODULE and type(d) in EMPTY]
        self.registered, self.classes = [d.copy() if d else EMPTY[type(d)] for d in self.registries], list(map(type, self.modules))
        self.plain: list[tuple[nn.Module, str, Tensor]] = []  # tensors in attributes that are neither parameter nor buffer
        self.containers: list[object] = []  # of the modules, beside those that every module has
        for module in self.modules:
            for name in vars(module).keys() - OF_EVERY_MODULE:
                value = vars(module)[name]
                if isinstance(value, Tensor) and not value.is_inference():
                    self.plain.append((module, name, value))
                elif type(value) in CONTAINERS:
                    self.containers.append(value)
                    for key, item in _items(value):
                        if id(item) in self.places:
                            self._add(value, key, item)

    def _add(self, container: object, key: object, tensor: Tensor) -> None:
        self.places.setdefault(id(tensor), []).append((container, key))
        self.originals.append((container, key, tensor))

    def kept(self) -> list[Tensor]:
        """What a module may write into as it is called, and what is put back where a model holds its own tensors."""
        weights = [p for p in self.parameters.values() if id(p) in self.written and type(p) is nn.Parameter]
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
        attributes = [(vars(module), dict(vars(module))) for module in self.modules]
        contents = [(container, container.copy()) for container in self.containers]
        plain = [(*which, which[-1]._version, _copy(which[-1])) for which in self.plain] if self.plain else ()
        tensors, outer, kept = list(tensors), self.block, []
        graphs = [(tensor, tensor.grad_fn) for _, _, tensor in self.plain]
        self.block = block = object()

        def segment():
            """A checkpointed segment begins here: it is recomputed with these tensors, and in these modes."""
            modes = [module.training for module in self.modules]
            return lambda: nullcontext() if self.block is block else self._again(tensors, modes)

        try:
            if in_place:
                kept, values = (own := self.kept()), clones(own)
                graphs += [(tensor, tensor.grad_fn) for tensor in own]
            elif self.buffers:
                own = list(self.buffers.values())
                tensors += zip(own, copies(own) if buffers is None else buffers)
            for i, (own, other) in enumerate(tensors):
                if id(own) in self.written:
                    tensors[i] = (own, other := other.clone().as_subclass(type(other)))
                for container, key in self.places[id(own)]:
                    container[key] = other
            with recomputed_in(segment), own_cache():
                yield
        finally:
            self.block = outer
            if kept:
                write(kept, values)
            for container, key, tensor in self.originals:
                container[key] = tensor
            added = self._taken_back([other for _, other in tensors])
            for now, before in attributes:
                if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
                    now.clear()
                    now.update(before)
            for container, before in contents:
                _refill(container, before)
            written = [which for which in plain if which[2]._version != which[3]] if plain else ()
            for _, _, tensor, _, copy in written:
                if copy is not None:
                    with torch.no_grad():
                        tensor.copy_(copy)
            in_a_graph = [tensor for tensor, before in graphs if tensor.grad_fn is not before and not _cut_off(tensor, before)]
        if added:
            raise RuntimeError(
                f"a loss has added parameters to the model, {some(added)}, which were not there when its parameters were taken, so "
                "that each candidate would have others; call the model once before (a first call builds them)"
            )
        for tensor in in_a_graph:
            places = [*self.plain, *self.originals]
            name = next(name for _, name, own in places if own is tensor)
            raise RuntimeError(
                f"{name!r}, a tensor of shape {tuple(tensor.shape)}, has got a graph from a loss that has written into it, which "
                "cannot be undone where it is a view or had a graph before; write detached values into it (x.detach())"
            )
        for module, name, tensor, _, copy in written:
            if copy is None:
                raise RuntimeError(
                    f"{type(module).__name__}.{name}, a tensor of shape {tuple(tensor.shape)}, was written into by a loss: one "
                    "candidate would see what another has left there. Make it a buffer (register_buffer), of which every candidate "
                    "gets a copy, or bind the attribute to a new tensor"
                )

    def _taken_back(self, others: Sequence[Tensor]) -> list[str]:
        """What a module has added to itself or to others, at its first call, say. others: what stands in the parameters' places.

        Returned are names of parameters among it.
        """
        added: list[str] = []
        if self.registries != self.registered:
            known = self.places.keys() | {id(other) for other in others}
            added = [name for name, p in self.modules[0].named_parameters() if id(p) not in known]
            for now, before in zip(self.registries, self.registered):
                _refill(now, before)
        for module, own in zip(self.modules, self.classes):
            if type(module) is not own:
                module.__class__ = own
        return added

    @contextmanager
    def _again(self, tensors: list[tuple[Tensor, Tensor]], modes: list[bool]):
        """The block of `holding` once more, after it has ended: for a segment that is recomputed there."""
        before = [module.training for module in self.modules]
        for module, mode in zip(self.modules, modes):
            module.training = mode
        try:
            with self.holding(tensors, ()):
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
    return tensor.untyped_storage()._cdata


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
        kind = tensor.dtype if type(tensor) in (Tensor, FakeTensor) and tensor.dtype != torch.bool else i
        groups.setdefault((kind, tensor.device), []).append(i)
    result: list[Tensor] = [None] * len(tensors)
    for (kind, _), members in groups.items():
        chosen = [tensors[i] for i in members]
        made = torch._foreach_mul(chosen, 1) if isinstance(kind, torch.dtype) else [chosen[0].clone()]
        for i, copy in zip(members, made):
            result[i] = copy
    return result


def _cut_off(tensor: Tensor, before: object) -> bool:
    """Without the graph of what was written into it, if it had none and is no view of another one."""
    if before is not None or tensor._is_view():
        return False
    tensor.detach_()
    return True


def _items(container: object) -> Iterable[tuple[object, object]]:
    if isinstance(container, Mapping):
        return list(container.items())
    return [] if isinstance(container, set) else list(enumerate(container))


def _copy(tensor: Tensor) -> Tensor | None:
    return tensor.detach().clone() if tensor.numel() <= SMALL else None


def _refill(container: object, before: object) -> None:
    """Put back what a list, dict, set or deque held, if it holds anything else."""
    if isinstance(container, set):
        if container != before:
            container.clear()
            container.update(before)
    elif isinstance(container, MutableMapping):
        same_keys = len(container) == len(before) and all(map(is_, container, before))
        if not same_keys or not all(map(is_, container.values(), before.values())):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or not all(map(is_, container, before)):
        container.clear()
        container.extend(before)


def some(names: Iterable[str], n: int = 8) -> str:
    """The first of many names, for a message."""
    names = list(names)
    return ", ".join(map(repr, names[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")
