"""What stands in a parameter's place, and takes note of what a loss writes into it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..operations.forward_mode import bare

_touches = [0]  # how often the .data of any of them was read or assigned to


def _data(self: Tensor) -> Tensor:
    """What is written into tensor.data autograd does not count. Into this it does, and what was there before is kept."""
    _touches[0] += 1
    if "values" not in vars(self):
        with torch.no_grad():
            vars(self)["values"] = Tensor.detach(self).clone()
    return Tensor.detach(self)


def _assign(self: Tensor, value: Tensor) -> None:
    """Other memory in its place: another value, where it is no cast."""
    _touches[0] += 1
    here = Tensor.detach(self)
    if (value.dtype, value.device) == (here.dtype, here.device):
        if place(value) == place(here):  # module.to(…) where it is already
            return
        vars(self)["moved"] = True
    if torch._C._are_functorch_transforms_active():  # PyTorch does not always see it, and ends the process
        raise RuntimeError("mutating directly with `.data` within forward mode or vmap is not allowed")
    vars(self).setdefault("memory", here)
    torch._C.TensorBase.data.__set__(self, value)


class StandIn(Tensor):
    """What stands in a parameter's place, and says that it requires grad, as the parameter does, though it may have no graph.

    A loss that asks for that (weight decay over what is trained, say) then takes it in, and no graph of the network is built.
    What operations make of it are plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    _is_param = True  # isinstance(…, nn.Parameter), which losses ask, and compiled code of a tensor that is of no plain type
    says = True
    data = property(_data, _assign)

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
        """As of the parameter: a leaf of its own."""
        other = Tensor.detach(self).clone()
        return other.requires_grad_() if torch._C.TensorBase.requires_grad.__get__(self) else other

    @staticmethod
    def of(own: Tensor, other: Tensor) -> Tensor:
        """What is to stand in the place of `own`, where that is more than what the other tensor is by itself."""
        return other.as_subclass(StandIn) if type(other) is Tensor and own.requires_grad else other

    @staticmethod
    def fixed(own: Tensor) -> Tensor:
        """In the same memory, and says that it requires none."""
        other = own.detach()
        if type(other) is Tensor and other.layout is torch.strided:
            other = other.as_subclass(StandIn)
            other.says = False
        return other

    @staticmethod
    def leaf(tensor: Tensor) -> Tensor:
        """In the same memory, to be differentiated by."""
        if type(tensor) is Tensor:
            return Tensor._make_subclass(StandIn, tensor, True)
        return tensor.detach().requires_grad_()


def place(tensor: Tensor) -> tuple:
    """Where its elements lie."""
    tensor = bare(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


class Watch:
    """Tensors from now on: which of them are written into."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)
        inner = map(bare, self.tensors) if torch._C._are_functorch_transforms_active() else self.tensors
        self.inner = [None if t.is_inference() else t for t in inner]
        self.counts, self.touches = self._counts(), _touches[0]

    def _counts(self) -> list[int]:
        return [0 if t is None else t._version for t in self.inner]

    def end(self) -> dict[Tensor, bool]:
        """{what was written into: whether it still is}: what was done through .data is taken back."""
        counts = self._counts()
        if counts == self.counts and _touches[0] == self.touches:
            return {}
        written = {}
        for tensor, inner, before, count in zip(self.tensors, self.inner, self.counts, counts):
            notes, changed = vars(tensor), count != before
            if notes.pop("moved", False):
                written[tensor] = False
            if (memory := notes.pop("memory", None)) is not None:
                torch._C.TensorBase.data.__set__(tensor, memory)
            values = notes.pop("values", None)
            if changed and values is not None:
                with torch.no_grad():
                    inner.copy_(bare(values))
                written[tensor] = changed = False
            if changed:
                written[tensor] = True
        return written
