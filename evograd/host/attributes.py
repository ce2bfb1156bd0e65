"""What modules hold beside tensors of their own: attributes, containers, hooks, parts. Put back as it was when a block ends."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from operator import is_

import torch
from torch import Tensor, nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
REGISTRIES = (dict, OrderedDict, set)
SMALL = 2**16  # elements of a plain tensor that is copied, so that what is written into it can be undone


class Attributes:
    """Of modules, and of all in them. roots: those that have the others in them.  plain: further tensors to be put back."""

    def __init__(self, modules: Sequence[nn.Module], roots: Sequence[nn.Module], plain: list[tuple[nn.Module, str, Tensor]]):
        self.modules, self.roots = modules, roots
        self.classes = list(map(type, modules))
        # Of every module: names of its parameters, buffers and parts, and its hooks.
        self.filled: list[object] = []
        self.empty: list[object] = []
        self.plain = plain  # and tensors in attributes that are neither parameter nor buffer
        self.containers: list[object] = []  # beside those that every module has
        for module in modules:
            for name, value in vars(module).items():
                if name in OF_EVERY_MODULE:
                    if type(value) in REGISTRIES:
                        (self.filled if value else self.empty).append(value)
                elif isinstance(value, Tensor):
                    if not value.is_inference():
                        self.plain.append((module, name, value))
                elif type(value) in CONTAINERS:
                    self.containers.append(value)
        self.entries = [registry.copy() for registry in self.filled]

    def grown(self) -> bool:
        """Whether a module has got a hook, a part, or a name that it had not, or has lost one."""
        return any(self.empty) or self.filled != self.entries

    def now(self, written: Sequence[Tensor]) -> Before:
        """What they are, to be put back. written: tensors that others may write into, and put back."""
        return Before(self, written)


class Before:
    """What attributes were."""

    def __init__(self, of: Attributes, written: Sequence[Tensor]):
        self.of = of
        self.attributes = [(vars(module), dict(vars(module))) for module in of.modules]
        self.contents = [(container, container.copy()) for container in of.containers]
        self.plain = [(*which, which[-1]._version, _copy(which[-1])) for which in of.plain]
        self.graphs = [(tensor, tensor.grad_fn) for tensor in (*(tensor for _, _, tensor in of.plain), *written)]
        self.added: list[str] = []  # parameters
        self.large: list[tuple[nn.Module, str, Tensor]] = []  # that were written into
        self.in_a_graph: list[Tensor] = []

    def put_back(self, known: Collection[int]) -> None:
        """All of it. known: ids of the parameters that may be there."""
        of = self.of
        if of.grown():
            self.added = [name for root in of.roots for name, p in root.named_parameters() if id(p) not in known]
            for now, before in zip((*of.filled, *of.empty), (*of.entries, *(type(registry)() for registry in of.empty))):
                _refill(now, before)
        if list(map(type, of.modules)) != of.classes:
            for module, own in zip(of.modules, of.classes):
                if type(module) is not own:
                    module.__class__ = own
        for now, before in self.attributes:
            if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
                now.clear()
                now.update(before)
        for container, before in self.contents:
            _refill(container, before)
        for module, name, tensor, version, copy in self.plain:
            if tensor._version != version and copy is not None:
                with torch.no_grad():
                    tensor.copy_(copy)
            elif tensor._version != version:
                self.large.append((module, name, tensor))
        self.in_a_graph = [t for t, before in self.graphs if t.grad_fn is not before and not _cut_off(t, before)]

    def check(self, places: Iterable[tuple[object, object, Tensor]]) -> None:
        """RuntimeError for what could not be put back. places: (container, name, tensor) of a model's own tensors."""
        if self.added:
            raise RuntimeError(
                f"a loss has added parameters to the model, {some(self.added)}, which were not there when its parameters were "
                "taken, so that each candidate would have others; call the model once before, if it is its first call that builds them"
            )
        for tensor in self.in_a_graph:
            name = next(name for _, name, own in (*self.of.plain, *places) if own is tensor)
            raise RuntimeError(
                f"{name!r}, a tensor of shape {tuple(tensor.shape)}, has got a graph from a loss that has written into it, which "
                "cannot be undone where it is a view or had a graph before; write detached values into it (x.detach())"
            )
        for module, name, tensor in self.large:
            raise RuntimeError(
                f"{type(module).__name__}.{name}, a tensor of shape {tuple(tensor.shape)}, was written into by a loss: one "
                "candidate would see what another has left there. Make it a dense buffer (register_buffer), of which every "
                "candidate gets a copy, or bind the attribute to a new tensor"
            )


def items(container: object) -> Iterable[tuple[object, object]]:
    """Of a container's entries, with the keys under which another may stand in their place."""
    if isinstance(container, Mapping):
        return list(container.items())
    return [] if isinstance(container, set) else list(enumerate(container))


def _copy(tensor: Tensor) -> Tensor | None:
    return tensor.detach().clone() if tensor.numel() <= SMALL else None


def _cut_off(tensor: Tensor, before: object) -> bool:
    """Without the graph of what was written into it, if it had none and is no view of another one."""
    if before is not None or tensor._is_view():
        return False
    tensor.detach_()
    return True


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
