"""Arguments, checked before anything is computed: errors that say what was given and what is accepted."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .sharded import is_sharded
from .slots import meeting, some

Closure = Callable[[nn.Module], Tensor]
Parameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Iterable[str] | None
PACKAGE = str(Path(__file__).parents[1])


def warn(message: str) -> None:
    """A warning at the line that has called the library."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive, finite number")


def check_rate(inner_lr: float) -> None:
    """A schedule may end at 0."""
    if isinstance(inner_lr, bool) or not isinstance(inner_lr, Real) or not (0 <= inner_lr < math.inf):
        raise ValueError(f"inner_lr={inner_lr!r} must be a positive, finite number, or 0")


def check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def check_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    if value is not None and value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown; accepted are {', '.join(map(repr, accepted))}")


def check_closures(train_loss: Closure, val_loss: Closure, model: nn.Module) -> None:
    for name, closure in (("train_loss", train_loss), ("val_loss", val_loss)):
        if not callable(closure):
            raise TypeError(f"{name} must be a function of the model that returns a scalar loss, not {type(closure).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def check_scalar(which: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{which} must return a scalar, a floating-point tensor of one element; it returned {what}")


def check_built(tensors: Iterable[tuple[object, Tensor]]) -> None:
    """ValueError for what has no values yet. tensors: a model's, each with its name."""
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise ValueError(f"model: {name!r} of a lazy module is not there yet; call the model once before, which makes it")
        if tensor.device.type == "meta":
            raise ValueError(f"model: {name!r} is on the meta device, without values; model.to_empty(device=…), then load them")


def checked_hyperparameters(hyperparameters: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(hyperparameters, (Tensor, nn.Module)):
        hint = "[tensor]" if isinstance(hyperparameters, Tensor) else "list(module.parameters())"
        raise TypeError(f"hyperparameters must be a sequence of tensors, not {type(hyperparameters).__name__}; write {hint}")
    if not isinstance(hyperparameters, Iterable):
        hint = "; those of an optimizer are [p for group in optimizer.param_groups for p in group['params']]"
        what = type(hyperparameters).__name__
        raise TypeError(f"hyperparameters must be a sequence of tensors, not {what}{hint * hasattr(hyperparameters, 'param_groups')}")
    hyperparameters = list(hyperparameters)
    if not hyperparameters:
        raise ValueError("hyperparameters is empty; at least one tensor that requires grad is needed")
    for i, h in enumerate(hyperparameters):
        if not isinstance(h, Tensor) or not h.requires_grad:
            what = "does not require grad" if isinstance(h, Tensor) else f"is {type(h).__name__}"
            raise ValueError(f"hyperparameters[{i}] {what}; each must be a tensor with requires_grad=True")
        if h.device.type == "meta":
            raise ValueError(f"hyperparameters[{i}] is on the meta device, without values; each must be a tensor that has some")
    return hyperparameters


def chosen(model: nn.Module, own: Mapping[str, Tensor], hyper: set[int], parameters: Parameters) -> dict[str, Tensor]:
    """{name: tensor} of the parameters to differentiate through. own: the model's.  hyper: ids of the hyperparameters."""
    if parameters is None:
        found = {name: p for name, p in own.items() if p.requires_grad and id(p) not in hyper}
        if not found:
            raise ValueError("parameters: the model has no parameter that requires grad and is no hyperparameter")
    else:
        found = named(model, own, parameters, "parameters")
        if not found:
            raise ValueError("parameters is empty; give the names of the parameters to perturb, or None for all that require grad")
    for name, p in found.items():
        if id(own[name]) in hyper:
            raise ValueError(f"parameters: {name!r} is a hyperparameter, and those are never perturbed")
        if not p.is_floating_point() or p.layout is not torch.strided:
            raise ValueError(
                f"parameters: {name!r} is {p.dtype}, {p.layout}; dense real numbers can be moved along a direction. Name the "
                "others with parameters=[…], and it is held fixed"
            )
    return found


def named(model: nn.Module, own: Mapping[str, Tensor], parameters: Parameters, argument: str) -> dict[str, Tensor]:
    """A mapping, (name, tensor) pairs or names -> {first name of the parameter: tensor}; ValueError if one does not fit."""
    first_name = {id(p): name for name, p in own.items()}
    every_name = dict(model.named_parameters(remove_duplicate=False))
    items = list(parameters.items()) if isinstance(parameters, Mapping) else list(parameters)
    result = {}
    for item in items:
        if isinstance(item, Tensor):
            raise ValueError(f"{argument}: tensors without names given; give names, or pairs as of model.named_parameters()")
        name, tensor = (item, every_name.get(item)) if isinstance(item, str) else item
        if name not in every_name:
            raise ValueError(f"{argument}: the model has no parameter {name!r}; it has {some(own)}")
        target = every_name[name]
        _check_like(argument, name, tensor, target, given=not isinstance(item, str))
        result[first_name[id(target)]] = tensor
    return result


def _check_like(argument: str, name: str, tensor: object, target: Tensor, given: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{argument}: {name!r} is {type(tensor).__name__}; a tensor is needed")
    if (tensor.shape, tensor.dtype, tensor.device) != (target.shape, target.dtype, target.device):
        raise ValueError(
            f"{argument}: {name!r} is {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, "
            f"but the model's is {tuple(target.shape)}, {target.dtype} on {target.device}"
        )
    if given and is_sharded(tensor) != is_sharded(target):
        which = ("a DTensor", "is none") if is_sharded(tensor) else ("a plain tensor", "is a DTensor")
        raise ValueError(f"{argument}: {name!r} is {which[0]}, but the model's {which[1]}")
    if is_sharded(tensor) and tensor.placements != target.placements:
        raise ValueError(f"{argument}: {name!r} has the placements {tensor.placements}, but the model's {target.placements}")


def check_lookahead(lookahead: Parameters | str) -> None:
    if isinstance(lookahead, nn.Module):
        raise TypeError(
            "lookahead is a module; accepted are None, 'sgd' and named parameters, such as those of model.named_parameters()"
        )
    if isinstance(lookahead, str) and lookahead != "sgd":
        raise ValueError(f"lookahead={lookahead!r} is unknown; accepted are None, 'sgd' and named parameters")


def check_memory(own: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
    """ValueError for two parameters in one memory: to derivatives they are two, to a step of training they are one."""
    for one, other in meeting(own):
        if not theta.keys().isdisjoint((one, other)):
            raise ValueError(
                f"parameters: {one!r} and {other!r} are two parameters in the same memory, which a training step writes into "
                "for both, and a derivative takes for two; make them one parameter (tie them: b.weight = a.weight), or give "
                "each memory of its own"
            )


def refuse_sharded(own: Mapping[str, Tensor]) -> None:
    """For estimators that put other tensors in the model's places."""
    name = next((name for name, p in own.items() if is_sharded(p)), "")
    raise NotImplementedError(
        f"parameters: {name!r} is a DTensor (the model is sharded by fully_shard), and FSDP2 does not see tensors that "
        "are put in its place; sharded models are for evograd.hypergradient with strategy='in_place', its default "
        "for them, for evograd.guided likewise, and for evograd.baselines.finite_difference"
    )


def check_differences(theta: Mapping[str, Tensor]) -> None:
    """Of an estimator that takes differences of losses: a warning if TF32 blurs them; RuntimeError within a CUDA graph."""
    if any(map(capturing, theta.values())):
        raise RuntimeError(
            "a CUDA graph is being captured, and hypergradient cannot be: its seeds come from the host, and every replay would "
            "take the same directions and the same random draws; capture the ordinary step, and call this outside of it"
        )
    if any(p.device.type == "cuda" and p.dtype == torch.float32 for p in theta.values()) and (flags := tf32()):
        warn(
            f"{' and '.join(flags)} is True: losses on CUDA are computed in TF32, whose relative error of 5e-4 is more than "
            "candidates differ by. Set it to False, at least around this call"
        )


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the tensor's kind of device."""
    return not isinstance(tensor, FakeTensor) and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def tf32() -> list[str]:
    """What CUDA computes in TF32 where float32 was asked for: torch's flags that are on, by name."""

    def on(old, new) -> bool:
        try:
            return old.allow_tf32
        except RuntimeError:  # the newer flags are set, and the older one cannot say both of two
            return new.fp32_precision == "tf32"

    flags = {"torch.backends.cudnn": torch.backends.cudnn, "torch.backends.cuda.matmul": torch.backends.cuda.matmul}
    return [f"{name}.allow_tf32" for name, flag in flags.items() if on(flag, getattr(flag, "conv", flag))]


def kept(parameters: Parameters | str) -> Parameters | str:
    """The same for several calls: an iterator (model.named_parameters()) is used up by the first."""
    return list(parameters) if isinstance(parameters, Iterator) else parameters
