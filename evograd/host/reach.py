"""What losses reach beside the model that they are given: modules, and tensors that are in none."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

OBJECTS = 2000  # that are looked at, at most
ENTRIES = 256  # of a list or a dict that is looked into
OTHERS = ("torch", "evograd", "numpy", "builtins")  # whose functions and objects hold nothing of the user's


class Reach:
    """modules: each one and all in it, but none in which the model is.  tensors: by the name under which a loss finds them.
    read: those that it surely reads, because its functions name them, or a module of which they are parameters.

    Looked through are a function's cells, defaults and the globals that it names, a bound method's object, partial functions,
    lists and dicts, and attributes of objects: what is reached by other ways is not seen.
    """

    def __init__(self, model: nn.Module, *losses: Callable):
        own = set(model.modules())
        self.modules: list[nn.Module] = []
        self.tensors: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        waiting = [("", loss, True) for loss in losses]
        seen = {id(loss) for loss in losses}
        while waiting and len(seen) < OBJECTS:
            name, value, named = waiting.pop()
            if isinstance(value, Tensor):
                self.tensors[name] = value
                self.read.update({name: value} if named else {})
            elif isinstance(value, nn.Module):
                found = outside(value, own)
                self.modules += found
                self.read.update({f"{name}.{n}": p for m in found if named for n, p in m.named_parameters()})
            else:
                named = named and (type(value) in (types.FunctionType, partial) or name == "")
                for part, other in parts(value):
                    if id(other) not in seen and type(other) not in PLAIN:
                        seen.add(id(other))
                        waiting.append((f"{name}.{part}" if name else part, other, named))

    def watch(self, known: Collection[int], hyperparameters: Sequence[Tensor]) -> None:
        """`tensors` are from now on those that nobody else looks after, λ and parameters of the modules among them."""
        parameters = {name: p for module in self.modules for name, p in module.named_parameters()}
        found = {**parameters, **{name: t for name, t in self.tensors.items() if id(t) not in known}}
        ids = {id(h) for h in hyperparameters}
        found = {name: t for name, t in found.items() if id(t) not in ids}
        found |= {f"hyperparameters[{i}]": h for i, h in enumerate(hyperparameters)}
        self.tensors = {name: t for name, t in found.items() if not t.is_inference()}


PLAIN = (int, float, str, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


def outside(module: nn.Module, own: Collection[nn.Module]) -> list[nn.Module]:
    """The module, or those of its parts that have none of `own` in them."""
    if module in own or isinstance(module, torch.jit.ScriptModule):  # nothing can stand in a buffer's place there
        return []
    if own.isdisjoint(module.modules()):
        return [module]
    return [found for part in module.children() for found in outside(part, own)]


def parts(value: object) -> Iterator[tuple[str, object]]:
    """What an object holds, by name."""
    kind = type(value)
    if kind is types.FunctionType:
        if not value.__module__ or value.__module__.partition(".")[0] not in OTHERS:
            yield from of_function(value)
    elif kind is types.MethodType:
        yield "self", value.__self__
        yield from vars(value.__self__).items() if isinstance(value.__self__, nn.Module) else ()
        yield "", value.__func__
    elif kind is partial:
        yield from [("", value.func), *((str(i), a) for i, a in enumerate(value.args)), *value.keywords.items()]
    elif "func" in getattr(value, "__dict__", ()):  # a loss of a step that is remembered
        yield "", value.func
    elif kind in (list, tuple, set):
        yield from ((str(i), entry) for i, entry in enumerate(value)) if len(value) <= ENTRIES else ()
    elif kind is dict:
        yield from ((str(key), entry) for key, entry in value.items()) if len(value) <= ENTRIES else ()
    elif kind.__module__.partition(".")[0] not in OTHERS and hasattr(value, "__dict__"):
        yield from vars(value).items()
        yield "", getattr(kind, "__call__", None)  # noqa: B004, its function


def of_function(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((str(i), default) for i, default in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
    waiting = [code]
    while waiting:
        code = waiting.pop()
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
