"""What every estimator needs of a bilevel problem: checked arguments, losses at other parameters, a model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

Closure = Callable[[nn.Module], Tensor]
Parameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Iterable[str] | None


class NotFinite(RuntimeError):
    """A loss is NaN or infinite."""


@dataclass(frozen=True)
class Hypergradient:
    """What every estimator returns.

    grads: dℓ_V/dλ, one tensor for each hyperparameter, of its shape.
    val_loss: (), ℓ_V where the estimator took it (merged, lookahead or unrolled parameters).
    candidate_losses: (K,), ℓ_T of each candidate; (1,), ℓ_T(θ), for the estimators that have none; (2,) for finite differences.
    weights: (K,), softmax(−ℓ/τ); equal ones for the estimators that have none.
    """

    grads: list[Tensor]
    val_loss: Tensor
    candidate_losses: Tensor
    weights: Tensor


class Problem:
    """A bilevel problem min_λ ℓ_V(θ*(λ), λ) around the parameters θ of a model.

    `theta` maps the names of the parameters to differentiate through to detached tensors; every other parameter of the
    model is held fixed, so that no graph is built for it, and the hyperparameters stay themselves.
    """

    def __init__(
        self,
        train_loss: Closure,
        val_loss: Closure,
        model: nn.Module,
        hyperparameters: Sequence[Tensor],
        parameters: Parameters,
    ):
        for name, closure in (("train_loss", train_loss), ("val_loss", val_loss)):
            if not callable(closure):
                raise TypeError(
                    f"{name} must be a function of the model that returns a scalar loss, not {type(closure).__name__}"
                )
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.train_loss, self.val_loss, self.model = train_loss, val_loss, model
        self.hyperparameters = _checked_hyperparameters(hyperparameters)
        self.theta, self.fixed = self._split(parameters)
        tensors = [*self.theta.values(), *self.fixed.values(), *self.hyperparameters]
        self.cuda_devices = sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)

    def _split(self, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Names of the model's parameters -> (θ, held fixed), both detached, without the hyperparameters."""
        hyper = {id(h) for h in self.hyperparameters}
        own = dict(self.model.named_parameters())  # a tied parameter appears once, under its first name
        if parameters is None:
            chosen = {name: p for name, p in own.items() if p.requires_grad and id(p) not in hyper}
            if not chosen:
                raise ValueError("parameters: the model has no parameter that requires grad and is no hyperparameter")
        else:
            chosen = self.named(parameters, "parameters")
            if not chosen:
                raise ValueError(
                    "parameters is empty; give the names of the parameters to perturb, or None for all that require grad"
                )
            for name in chosen:
                if id(own[name]) in hyper:
                    raise ValueError(f"parameters: {name!r} is a hyperparameter, and those are never perturbed")
        theta = {name: p.detach() for name, p in chosen.items()}
        fixed = {name: p.detach() for name, p in own.items() if name not in theta and id(p) not in hyper}
        return theta, fixed

    def named(self, parameters: Parameters, argument: str) -> dict[str, Tensor]:
        """A mapping, (name, tensor) pairs or names -> {first name of the parameter: tensor}; ValueError if one does not fit."""
        own = dict(self.model.named_parameters())
        first_name = {id(p): name for name, p in own.items()}
        every_name = dict(self.model.named_parameters(remove_duplicate=False))
        items = list(parameters.items()) if isinstance(parameters, Mapping) else list(parameters)
        result = {}
        for item in items:
            if isinstance(item, Tensor):
                raise ValueError(
                    f"{argument}: tensors without names given; give names, or pairs as of model.named_parameters()"
                )
            name, tensor = (item, every_name.get(item)) if isinstance(item, str) else item
            if name not in every_name:
                raise ValueError(f"{argument}: the model has no parameter {name!r}; it has {_some(own)}")
            target = every_name[name]
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{argument}: {name!r} is {type(tensor).__name__}; a tensor is needed")
            if (tensor.shape, tensor.dtype, tensor.device) != (target.shape, target.dtype, target.device):
                raise ValueError(
                    f"{argument}: {name!r} is {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, "
                    f"but the model's is {tuple(target.shape)}, {target.dtype} on {target.device}"
                )
            result[first_name[id(target)]] = tensor
        return result

    def loss(self, closure: Closure, parameters: Mapping[str, Tensor]) -> Tensor:
        """closure(model) with `parameters` in place of the model's own.

        Buffers are copies: what BatchNorm gathers from a candidate is thrown away.
        """
        return at(self.model, {**self.fixed, **parameters}, lambda model: self.scalar(closure, model))

    def scalar(self, closure: Closure, model: nn.Module) -> Tensor:
        """closure(model), checked to be a scalar. Modes that the closure sets are its own: the next one does not see them."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            value = closure(model)
        finally:
            for module, mode in modes:
                module.training = mode
        which = "train_loss" if closure is self.train_loss else "val_loss"
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = (
                f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ValueError(f"{which} must return a scalar, a floating-point tensor of one element; it returned {what}")
        return value.reshape(())

    def val_gradient(self, at: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
        """(ℓ_V, ∂ℓ_V/∂λ, G = ∂ℓ_V/∂θ) at the parameters `at`, G whole."""
        leaves = {name: p.detach().requires_grad_() for name, p in at.items()}
        value = self.loss(self.val_loss, leaves)
        n = len(self.hyperparameters)
        grads = partial(value, [*self.hyperparameters, *leaves.values()])
        gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(leaves.items(), grads[n:])}
        return value.detach(), grads[:n], gradient

    def lookahead(self, lookahead: Parameters | str, inner_lr: float | None) -> dict[str, Tensor]:
        """The parameters at which G is taken: θ itself (None), given ones, or θ − inner_lr ∇ℓ_T(θ, λ) ("sgd")."""
        if lookahead is None:
            return self.theta
        if isinstance(lookahead, str):
            if lookahead != "sgd":
                raise ValueError(f"lookahead={lookahead!r} is unknown; accepted are None, 'sgd' and named parameters")
            if inner_lr is None:
                raise ValueError("lookahead='sgd' needs inner_lr, the learning rate of that step")
            leaves = {name: p.detach().requires_grad_() for name, p in self.theta.items()}
            grads = partial(self.loss(self.train_loss, leaves), list(leaves.values()))
            ahead = {}
            for i, (name, p) in enumerate(self.theta.items()):
                gradient, grads[i] = grads[i], None  # each gradient goes as its step is taken: one copy alive, not two
                ahead[name] = p if gradient is None else torch.add(p, gradient, alpha=-inner_lr)
            return ahead
        given = self.named(lookahead, "lookahead")
        return {name: given.get(name, p).detach() for name, p in self.theta.items()}

    def assemble(self, terms: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """The hypergradient as a sum of terms over the hyperparameters; None stands for no dependence."""
        grads = []
        for i, (h, parts) in enumerate(zip(self.hyperparameters, zip(*terms))):
            parts = [p for p in parts if p is not None]
            if not parts:
                name = next((f" ({n!r})" for n, p in self.model.named_parameters() if p is h), "")
                raise RuntimeError(
                    f"hyperparameters[{i}]{name}, of shape {tuple(h.shape)}: the hypergradient does not depend on it; either "
                    "val_loss must, or train_loss by a term that the parameters are in too, by operations that autograd records"
                )
            # What autograd returns may share its storage with another gradient, or be an expanded view.
            grads.append(sum(parts[1:], parts[0]) if len(parts) > 1 else parts[0].clone())
        return grads

    @contextmanager
    def undisturbed(self):
        """Whatever a closure does to them, flags and gradients are as before afterwards, after an error too."""
        tensors = {id(t): t for t in [*self.model.parameters(), *self.hyperparameters]}.values()
        before = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
        try:
            for tensor, _, _ in before:
                tensor.grad = None
            with torch.enable_grad():
                yield
        finally:
            for tensor, requires_grad, grad in before:
                tensor.requires_grad_(requires_grad)
                tensor.grad = grad

    def random_state(self, seed: int | None = None) -> list[Tensor]:
        """The state of torch's generators, from which train_loss and val_loss draw (dropout); or what `seed` would make it."""
        with _disable_current_modes():
            if seed is not None:
                return [torch.Generator(d).manual_seed(seed).get_state() for d in ("cpu", *self.cuda_devices)]
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.cuda_devices)]

    @contextmanager
    def replay(self, state: list[Tensor] | None):
        """Draw again what was drawn from `state` on, then go on from here; None draws anew."""
        if state is None:
            yield
            return
        here = self.random_state()
        self._set_random_state(state)
        try:
            yield
        finally:
            self._set_random_state(here)

    def _set_random_state(self, state: list[Tensor]) -> None:
        with _disable_current_modes():
            torch.set_rng_state(state[0])
            for device, s in zip(self.cuda_devices, state[1:]):
                torch.cuda.set_rng_state(s, device)


def at(model: nn.Module, parameters: Mapping[str, Tensor], function: Callable):
    """function(model) with `parameters` in place of the model's own, and on copies of its buffers."""
    tensors = {**parameters, **{name: b.clone() for name, b in model.named_buffers()}}
    return functional_call(_Calls(function, model), {f"model.{name}": t for name, t in tensors.items()}, ())


class _Calls(nn.Module):
    """closure(model) as a forward pass, so that functional_call swaps tensors under all that the closure does with it."""

    def __init__(self, closure: Closure, model: nn.Module):
        super().__init__()
        self.closure, self.model = closure, model

    def forward(self) -> Tensor:
        return self.closure(self.model)


def partial(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """∂loss/∂input for each input; None where loss does not depend on it."""
    if not loss.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive, finite number")


def check_finite(train_losses: Tensor, val_loss: Tensor) -> None:
    """NotFinite, a RuntimeError, if a loss is NaN or infinite. The one host synchronisation of a step, at its end."""
    if isinstance(val_loss, FakeTensor) or (val_loss.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    losses = torch.cat([train_losses, val_loss.reshape(1).to(train_losses)]).tolist()
    for k, value in enumerate(losses):
        if not math.isfinite(value):
            which = "val_loss" if k == len(losses) - 1 else f"train_loss of candidate {k}"
            raise NotFinite(
                f"{which} is {value}; a finite loss is needed (candidates: {losses[:-1]}, validation: {losses[-1]})"
            )


def _checked_hyperparameters(hyperparameters: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(hyperparameters, (Tensor, nn.Module)):
        hint = "[tensor]" if isinstance(hyperparameters, Tensor) else "list(module.parameters())"
        raise TypeError(f"hyperparameters must be a sequence of tensors, not {type(hyperparameters).__name__}; write {hint}")
    hyperparameters = list(hyperparameters)
    if not hyperparameters:
        raise ValueError("hyperparameters is empty; at least one tensor that requires grad is needed")
    for i, h in enumerate(hyperparameters):
        if not isinstance(h, Tensor) or not h.requires_grad:
            what = "does not require grad" if isinstance(h, Tensor) else f"is {type(h).__name__}"
            raise ValueError(f"hyperparameters[{i}] {what}; each must be a tensor with requires_grad=True")
    return hyperparameters


def _some(names: Iterable[str], n: int = 8) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")
