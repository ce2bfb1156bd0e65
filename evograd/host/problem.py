"""What every estimator needs of a bilevel problem: checked arguments, losses at other parameters, a model left as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from numbers import Integral, Real
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..operations.forward_mode import bare, nodes
from .in_place import InPlace
from ..noise import Layout, Position, on_the_host
from .precision import Precision
from .sharded import Sharding, is_sharded, local
from .slots import Slots, StandIn, copies, meeting, some

Closure = Callable[[nn.Module], Tensor]
APART = 8  # by fewer eps, and a difference is rounding in good part
_resolved = WeakTensorKeyDictionary()  # λ: settings with which `Problem.unresolved` has seen it resolved
_looked: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()  # code of losses that `Problem._check_place` has seen
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


def estimator(function: Callable[..., Hypergradient]) -> Callable[..., Hypergradient]:
    """Gradients are taken, whatever mode the caller is in: torch.no_grad, torch.inference_mode."""

    @wraps(function)
    def taken(*args, **settings) -> Hypergradient:
        with torch.inference_mode(False), torch.enable_grad():
            try:
                return function(*args, **settings)
            except RuntimeError as error:
                if "nference tensor" not in str(error):
                    raise
                raise RuntimeError(
                    "a loss uses tensors that were made in torch.inference_mode, and autograd cannot: clone() them outside of it, "
                    "or make them under torch.no_grad"
                ) from error

    return taken


class Problem:
    """A bilevel problem min_λ ℓ_V(θ*(λ), λ) around the parameters θ of a model.

    `theta` maps the names of the parameters to differentiate through to detached tensors; every other parameter of the
    model is held fixed, so that no graph is built for it, and the hyperparameters stay themselves.

    in_place: other parameters are written into the model's own, see `InPlace`, and `theta` has copies of these within
    `undisturbed`. None: where the model is sharded, and `theta` has this process's shards. False: such a model is refused.
    """

    def __init__(
        self,
        train_loss: Closure,
        val_loss: Closure,
        model: nn.Module,
        hyperparameters: Sequence[Tensor],
        parameters: Parameters,
        in_place: bool | None = False,
    ):
        for name, closure in (("train_loss", train_loss), ("val_loss", val_loss)):
            if not callable(closure):
                raise TypeError(
                    f"{name} must be a function of the model that returns a scalar loss, not {type(closure).__name__}"
                )
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.train_loss, self.val_loss, self.model = train_loss, val_loss, model
        self.hyperparameters = checked_hyperparameters(hyperparameters)
        self.sharding = Sharding.of(model)
        self.slots = Slots(model)
        self.own = self.slots.parameters
        if self.sharding and in_place is False:
            name = next((name for name, p in self.own.items() if is_sharded(p)), "")
            raise NotImplementedError(
                f"parameters: {name!r} is a DTensor (the model is sharded by fully_shard), and FSDP2 does not see tensors that "
                "are put in its place; sharded models are for evograd.hypergradient with strategy='in_place', its default for "
                "them, or evograd.baselines.finite_difference"
            )
        self.theta, self.fixed = self._split(parameters)
        self._check_memory()
        self.place: InPlace | None = None
        if in_place or self.sharding:
            if self.sharding:
                self.sharding.check(self.theta, self.own, self.hyperparameters)
            self.place = InPlace(self.slots, list(self.theta), self.hyperparameters, self.sharding)
        self.lam = Vector(self.hyperparameters)
        self.precision = Precision([self.own[name] for name in self.theta], list(self.own.values()))
        tensors = [*self.theta.values(), *self.fixed.values(), *self.hyperparameters]
        devices = {t.device for t in tensors} | ({self.sharding.device} if self.sharding else set())
        self.draws = Draws({device for device in devices if device.type == "cuda"})

    def check_differences(self) -> None:
        """Of an estimator that takes differences of losses: a warning if TF32 blurs them; RuntimeError within a CUDA graph."""
        if any(map(capturing, self.theta.values())):
            raise RuntimeError(
                "a CUDA graph is being captured, and hypergradient cannot be: its seeds come from the host, and every replay would "
                "take the same directions and the same random draws; capture the ordinary step, and call this outside of it"
            )
        if any(p.device.type == "cuda" and p.dtype == torch.float32 for p in self.theta.values()) and (flags := tf32()):
            warnings.warn(
                f"{' and '.join(flags)} is True: losses on CUDA are computed in TF32, whose relative error of 5e-4 is more than "
                "candidates differ by. Set it to False, at least around this call",
                stacklevel=4,  # past `estimator` and the function that it wraps
            )

    def _split(self, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Names of the model's parameters -> (θ, held fixed), both detached, without the hyperparameters."""
        hyper = {id(h) for h in self.hyperparameters}
        own = self.own
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
        for name, p in chosen.items():
            if not p.is_floating_point() or p.layout is not torch.strided:
                raise ValueError(
                    f"parameters: {name!r} is {p.dtype}, {p.layout}; dense real numbers can be moved along a direction. Name the "
                    "others with parameters=[…], and it is held fixed"
                )
        theta = {name: local(p) for name, p in chosen.items()}
        fixed = {name: p.detach() for name, p in own.items() if name not in theta and id(p) not in hyper}
        return theta, fixed

    def _check_memory(self) -> None:
        """ValueError for two parameters in one memory: to derivatives they are two, to a step of training they are one."""
        hyper = {id(h) for h in self.hyperparameters}
        own = {name: local(p) if self.sharding else p for name, p in self.own.items() if id(p) not in hyper}
        for one, other in meeting(own):
            if not self.theta.keys().isdisjoint((one, other)):
                raise ValueError(
                    f"parameters: {one!r} and {other!r} are two parameters in the same memory, which a training step writes into "
                    "for both, and a derivative takes for two; make them one parameter (tie them: b.weight = a.weight), or give "
                    "each memory of its own"
                )

    def named(self, parameters: Parameters, argument: str) -> dict[str, Tensor]:
        """A mapping, (name, tensor) pairs or names -> {first name of the parameter: tensor}; ValueError if one does not fit."""
        first_name = {id(p): name for name, p in self.own.items()}
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
                raise ValueError(f"{argument}: the model has no parameter {name!r}; it has {some(self.own)}")
            target = every_name[name]
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{argument}: {name!r} is {type(tensor).__name__}; a tensor is needed")
            if (tensor.shape, tensor.dtype, tensor.device) != (target.shape, target.dtype, target.device):
                raise ValueError(
                    f"{argument}: {name!r} is {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, "
                    f"but the model's is {tuple(target.shape)}, {target.dtype} on {target.device}"
                )
            if not isinstance(item, str) and is_sharded(tensor) != is_sharded(target):
                which = ("a DTensor", "is none") if is_sharded(tensor) else ("a plain tensor", "is a DTensor")
                raise ValueError(f"{argument}: {name!r} is {which[0]}, but the model's {which[1]}")
            if is_sharded(tensor) and tensor.placements != target.placements:
                raise ValueError(
                    f"{argument}: {name!r} has the placements {tensor.placements}, but the model's {target.placements}"
                )
            result[first_name[id(target)]] = tensor
        return result

    def _apart(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that stays as it is when the model's own are written into."""
        return tensor if self.place is None else self.place.apart(name, tensor)

    # --- losses at other parameters

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor] | None = None):
        """The model with `parameters` in place of its own; see `Slots.holding`.

        What a loss needs for its backward pass may be computed there (gradient checkpointing), so that belongs inside too.
        """
        own = self.own
        pairs = [(own[name], StandIn.of(own[name], tensor)) for name, tensor in parameters.items()]
        with self.slots.holding([*((own[name], tensor) for name, tensor in self.fixed.items()), *pairs], buffers):
            yield

    def evaluate(self, closure: Closure) -> Tensor:
        """closure(model), checked to be a scalar, as ()."""
        return self.scalar(closure, closure(self.model))

    def scalar(self, closure: Closure, value: object) -> Tensor:
        """The value of a loss, as ()."""
        which = "train_loss" if closure is self.train_loss else "val_loss"
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = (
                f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ValueError(f"{which} must return a scalar, a floating-point tensor of one element; it returned {what}")
        self._check_place(which, closure, value)
        return value if value.ndim == 0 else value.reshape(())

    def _check_place(self, which: str, closure: Closure, value: Tensor) -> None:
        """RuntimeError if a loss goes back to the model's own θ, where others stand in their place.

        Looked for once for each model and piece of code: a loss that has passed is made of the same operations the next time.
        """
        end = bare(value).grad_fn
        code = getattr(getattr(closure, "func", closure), "__code__", type(closure))
        looked = _looked.setdefault(self.model, set())
        if self.place is not None or end is None or code in looked:
            return
        names = {id(self.own[name]): name for name in self.theta}
        for node in nodes([end]):
            if (name := names.get(id(getattr(node, "variable", None)))) is not None:
                raise RuntimeError(
                    f"{which} uses the model's own parameter {name!r}, and not what stands in its place at a candidate or a "
                    "lookahead: parameters that were listed before (an optimizer's groups, say), or that a module keeps in a "
                    "tuple, a nested container or a view. Take them from the model that the loss is given, detach() what is "
                    "meant to be constant, or use hypergradient with strategy='in_place', where they are the same"
                )
        looked.add(code)

    def at(self, position: Position) -> AbstractContextManager:
        """The model at a position, which has no graph of its own."""
        return self.holding(_whole(position)) if self.place is None else self.place.at(position, differentiable=False)

    def gradient(
        self, closure: Closure, layout: Layout, at: Position, take: Callable[[int, Tensor], None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(ℓ, ∂ℓ/∂λ) of a loss at a position; and take(b, flat) gets its gradient by θ there, bucket by bucket.

        A bucket's gradient is handed over as soon as the backward pass has it, so that the whole need never exist at once. On a
        sharded model that is when the pass has ended, a process's shards being whole anyway.
        """
        if self.place is None:
            held = _whole(at)
            leaves = {name: held[name].detach().requires_grad_() for bucket in layout.buckets for name in bucket.names}
            block = self.holding(leaves)
        else:
            leaves, block = self.place.parameters, self.place.at(at, differentiable=True)
        n = len(self.hyperparameters)
        with block:
            value = self.evaluate(closure)
            if self.sharding:
                grads = self.sharding.backward(value, self.hyperparameters)
            else:
                with _Gathering(layout, leaves, take) if len(layout.buckets) > 1 else nullcontext():
                    grads = partial(value, [*self.hyperparameters, *leaves.values()])
        if self.sharding:
            for b, bucket in enumerate(layout.buckets):
                own = [self.own[name] for name in bucket.names]
                found = {i: local(p.grad) for i, p in enumerate(own) if p.grad is not None}
                for p in own:
                    p.grad = None
                if found:
                    take(b, bucket.flat(found))
        elif len(layout.buckets) == 1 and any(g is not None for g in grads[n:]):
            take(0, layout.buckets[0].flat(dict(enumerate(grads[n:]))))
        return value.detach(), grads[:n]

    def val_gradient(self, layout: Layout, at: Position) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """(ℓ_V, ∂ℓ_V/∂λ, G = ∂ℓ_V/∂θ) at a position, G whole: one flat tensor for each bucket."""
        flats: dict[int, Tensor] = {}
        value, direct = self.gradient(self.val_loss, layout, at, flats.__setitem__)
        self.check_validation(bool(flats), direct)
        return value, direct, [flats[b] if b in flats else bucket.zeros() for b, bucket in enumerate(layout.buckets)]

    def check_validation(self, on_theta: bool, direct: Sequence[Tensor | None]) -> None:
        """RuntimeError if val_loss depends on neither θ nor λ."""
        if not on_theta and not self.sharding and all(g is None for g in direct):
            raise RuntimeError(
                "val_loss depends on neither the parameters of the model that it is given nor the hyperparameters: it is computed "
                "under torch.no_grad or torch.inference_mode, or on another model"
            )

    def lookahead(self, layout: Layout, lookahead: Parameters | str, inner_lr: float | None) -> Position:
        """Where G is taken: θ itself (None), given parameters, or θ − inner_lr ∇ℓ_T(θ, λ) ("sgd")."""
        if lookahead is None:
            return [self.theta]
        if isinstance(lookahead, str):
            if lookahead != "sgd":
                raise ValueError(f"lookahead={lookahead!r} is unknown; accepted are None, 'sgd' and named parameters")
            if inner_lr is None:
                raise ValueError("lookahead='sgd' needs inner_lr, the learning rate of that step")
            gradient: dict[int, Tensor] = {}
            self.gradient(self.train_loss, layout, [self.theta], gradient.__setitem__)
            buckets = enumerate(layout.buckets)
            return layout.moved(
                torch.mul(gradient.pop(b), -inner_lr) if b in gradient else bucket.zeros() for b, bucket in buckets
            )
        given = {name: self._apart(name, local(tensor)) for name, tensor in self.named(lookahead, "lookahead").items()}
        return [{name: given.get(name, p) for name, p in self.theta.items()}]

    def grads(self, total: Vector.Flat) -> list[Tensor]:
        """The hypergradient, one tensor for each hyperparameter; RuntimeError where nothing depends on one."""
        self.check_dependence(total)
        return self.lam.split(total)

    def check_dependence(self, total: Vector.Flat) -> None:
        """RuntimeError if there is a hyperparameter on which nothing depends."""
        for i, h in enumerate(self.hyperparameters):
            if i not in total.depends:
                name = next((f" ({n!r})" for n, p in self.model.named_parameters() if p is h), "")
                raise RuntimeError(
                    f"hyperparameters[{i}]{name}, of shape {tuple(h.shape)}: the hypergradient does not depend on it; either "
                    "val_loss must, or train_loss by a term that the parameters are in too, by operations that autograd records"
                )

    def unresolved(self, apart: Sequence[float], settings: tuple) -> int | None:
        """The first λ on whose gradients two candidates have never differed by APART eps with these settings, by `Vector.apart`.

        One that they did differ on once may come near zero where λ is near its best; that is no fault.
        """
        found = None
        for i, (h, value) in enumerate(zip(self.hyperparameters, apart)):
            if value >= APART:
                _resolved.setdefault(h, set()).add(settings)
            elif found is None and settings not in _resolved.get(h, ()):
                found = i
        return found

    def assemble(self, terms: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """The hypergradient as a sum of terms over the hyperparameters; None stands for no dependence."""
        total = self.lam.flat(terms[0])
        for term in terms[1:]:
            total = self.lam.add(total, self.lam.flat(term))
        return self.grads(total)

    @contextmanager
    def undisturbed(self):
        """Whatever a closure does to them, flags and gradients are as before afterwards, after an error too.

        RuntimeError if a closure has written into the model's parameters, which cannot be undone.
        """
        tensors = {id(t): t for t in [*self.own.values(), *self.hyperparameters]}.values()
        before = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
        versions = {name: p._version for name, p in self.own.items() if not p.is_inference()}
        try:
            for tensor, _, gradient in before:
                if gradient is not None:
                    tensor.grad = None
            if self.place is not None:
                self.place.save()
                self.theta = {name: self._apart(name, p) for name, p in self.theta.items()}
            yield
        finally:
            if self.place is not None:
                self.place.restore()
            for tensor, requires_grad, gradient in before:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not gradient:
                    tensor.grad = gradient
            if self.sharding:
                self.sharding.copy_flags()
        written = [name for name, version in versions.items() if self.own[name]._version != version]
        if written:
            raise RuntimeError(f"a loss has written into the model's parameters {some(written)}: the model is changed")


def _whole(position: Position) -> dict[str, Tensor]:
    return {name: tensor for part in position for name, tensor in part.items()}


class _Gathering:
    """Within the block gradients of leaves are handed to take(b, flat) by buckets, and dropped.

    Backward passes that a loss makes itself come before the block, and see nothing of it.
    """

    def __init__(self, layout: Layout, leaves: Mapping[str, Tensor], take: Callable[[int, Tensor], None]):
        self.layout, self.leaves, self.take = layout, leaves, take
        self.waiting: list[dict[int, Tensor]] = [{} for _ in layout.buckets]
        self.handles: list[RemovableHandle] = []

    def _hook(self, b: int, i: int, nothing: Tensor):
        def hook(gradient: Tensor) -> Tensor:
            self.waiting[b][i] = gradient
            if len(self.waiting[b]) == len(self.layout.buckets[b].names):
                self._hand_over(b)
            return nothing.expand_as(gradient)

        return hook

    def _hand_over(self, b: int) -> None:
        flat = self.layout.buckets[b].flat(self.waiting[b])
        self.waiting[b].clear()
        self.take(b, flat)

    def __enter__(self) -> None:
        for b, bucket in enumerate(self.layout.buckets):
            nothing = bucket.like.new_zeros(())
            for i, name in enumerate(bucket.names):
                self.handles.append(self.leaves[name].register_hook(self._hook(b, i, nothing)))

    def __exit__(self, kind, error, traceback) -> None:
        for handle in self.handles:
            handle.remove()
        if error is None:
            for b, found in enumerate(self.waiting):
                if found:  # losses do not depend on all of this bucket
                    self._hand_over(b)


class Vector:
    """λ, and gradients by it, end to end: one vector for each device, and another one there for complex λ."""

    class Flat(NamedTuple):
        """vectors: None where nothing depends.  depends: on which hyperparameters."""

        vectors: list[Tensor] | None
        depends: frozenset[int]

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        groups: dict[tuple[torch.device, bool], list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            groups.setdefault((tensor.device, tensor.is_complex()), []).append(i)
        self.groups = list(groups.values())

    def flat(self, grads: Sequence[Tensor | None]) -> Flat:
        """One gradient for each hyperparameter, None where there is no dependence."""
        depends = frozenset(i for i, g in enumerate(grads) if g is not None)
        if not depends:
            return self.Flat(None, depends)
        vectors = []
        for members in self.groups:
            parts = [
                grads[i].reshape(-1) if i in depends else self.tensors[i].new_zeros(self.tensors[i].numel()) for i in members
            ]
            vectors.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return self.Flat(vectors, depends)

    def weighted_sum(self, coefficients: Tensor, flats: Sequence[Flat]) -> Flat:
        """Σ_k c_k f_k, in double precision, where the device has it.

        The c_k of candidates sum to zero, and what is left may be a thousandth of the terms.
        """
        depends = frozenset().union(*(flat.depends for flat in flats))
        if not depends:
            return self.Flat(None, depends)
        totals: list[Tensor] = []
        for group, members in enumerate(self.groups):
            total = None
            for c, flat in zip(exactly(coefficients.to(self.tensors[members[0]].device)).unbind(), flats):
                if flat.vectors is not None:
                    term = exactly(flat.vectors[group])
                    total = term * c if total is None else total.addcmul_(term, c)
            totals.append(total)
        return self.Flat(totals, depends)

    def apart(self, a: Flat, b: Flat, meant: Tensor | None) -> list[Tensor]:
        """‖a_i − b_i‖ / ε‖a_i‖ for each hyperparameter, ε the resolution of its type of number; ∞ where there is no dependence.

        meant: whether a and b were to differ at all, ().
        """
        if a.vectors is None or b.vectors is None:
            return []
        result: list[Tensor] = [None] * len(self.tensors)
        for group, members in enumerate(self.groups):
            sizes = [self.tensors[i].numel() for i in members]
            whole = torch._foreach_norm(a.vectors[group].split(sizes))
            apart = torch._foreach_norm((a.vectors[group] - b.vectors[group]).split(sizes))
            for i, of, difference in zip(members, whole, apart):
                some = of > 0 if meant is None else (of > 0) & meant.to(of.device)
                result[i] = torch.where(some, difference / (torch.finfo(self.tensors[i].dtype).eps * of), math.inf)
        return result

    def add(self, a: Flat, b: Flat) -> Flat:
        if a.vectors is None or b.vectors is None:
            return b if a.vectors is None else a
        return self.Flat([x + y for x, y in zip(a.vectors, b.vectors)], a.depends | b.depends)

    def split(self, flat: Flat) -> list[Tensor]:
        """One tensor for each hyperparameter, of its shape and dtype, in storage of its own."""
        result: list[Tensor] = [None] * len(self.tensors)
        for members, vector in zip(self.groups, flat.vectors):
            dtypes = {self.tensors[i].dtype for i in members}
            vector = vector.to(dtypes.pop()) if len(dtypes) == 1 else vector
            for i, piece in zip(members, vector.split([self.tensors[i].numel() for i in members])):
                result[i] = piece.view(self.tensors[i].shape).to(self.tensors[i].dtype)
        return copies(result) if len(result) > 1 else result


class Draws:
    """What losses draw from torch's generators (dropout, say): drawn again, or anew."""

    def __init__(self, cuda_devices: Iterable[torch.device]):
        self.cuda_devices = sorted(cuda_devices, key=str)

    def state(self, seed: int | None = None) -> list[Tensor]:
        """The state of torch's generators, or what `seed` would make it."""
        with on_the_host():
            if seed is not None:
                return [torch.Generator(d).manual_seed(seed).get_state() for d in ("cpu", *self.cuda_devices)]
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.cuda_devices)]

    def replay(self, state: list[Tensor] | None) -> AbstractContextManager:
        """A block that draws again what was drawn from `state` on, then goes on from here; None draws anew."""
        return nullcontext() if state is None else self._replayed(state)

    @contextmanager
    def _replayed(self, state: list[Tensor]):
        here = self.state()
        self._set(state)
        try:
            yield
        finally:
            self._set(here)

    def _set(self, state: list[Tensor]) -> None:
        with on_the_host():
            torch.set_rng_state(state[0])
            for device, s in zip(self.cuda_devices, state[1:]):
                torch.cuda.set_rng_state(s, device)


def at(model: nn.Module, parameters: Mapping[str, Tensor], function: Callable):
    """function(model) with `parameters`, by name, in place of the model's own."""
    own = dict(model.named_parameters())
    with Slots(model).holding((own[name], tensor) for name, tensor in parameters.items()):
        return function(model)


def partial(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """∂loss/∂input for each input; None where loss does not depend on it."""
    if not loss.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def exactly(tensor: Tensor) -> Tensor:
    """In double precision, real or complex as it is; unchanged where the device has none."""
    if tensor.is_mps:
        return tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive, finite number")


def check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


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


def check_finite(
    train_losses: Tensor, val_loss: Tensor, grads: Sequence[Tensor], also: Sequence[Tensor] = ()
) -> list[float]:
    """NotFinite, a RuntimeError, if a loss or a gradient is NaN or infinite. The one host synchronisation of a step, at its end.

    also: other numbers, which come along.
    """
    if isinstance(val_loss, FakeTensor) or capturing(val_loss):
        return []
    largest = torch._foreach_norm([g for g in grads if g.numel()], math.inf)
    n = len(train_losses)
    numbers = torch.stack([v.to(train_losses) for v in (val_loss, *largest, *also)])
    values = torch.cat([train_losses, numbers]).tolist()
    end = len(values) - len(also)
    values, rest = values[:end], values[end:]
    for k, value in enumerate(values):
        if not math.isfinite(value):
            which = "val_loss" if k == n else f"train_loss of candidate {k}"
            if k > n:
                raise NotFinite(
                    f"the gradient by hyperparameters[{k - n - 1}] is not finite, although the losses are: an operation has no "
                    "finite derivative where it was taken (a root or a norm at zero, say)"
                )
            raise NotFinite(
                f"{which} is {value}; a finite loss is needed (candidates: {values[:n]}, validation: {values[n]})"
            )
    return rest


def kept(parameters: Parameters | str) -> Parameters | str:
    """The same for several calls: an iterator (model.named_parameters()) is used up by the first."""
    return list(parameters) if isinstance(parameters, Iterator) else parameters


def checked_hyperparameters(hyperparameters: Sequence[Tensor]) -> list[Tensor]:
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
