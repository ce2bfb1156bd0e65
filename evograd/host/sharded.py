"""Models that torch.distributed.fsdp.fully_shard (FSDP2) has sharded: what lies on this process, passes that leave no trace.

A sharded module gathers its parameters from its own shards as it is called, so that a candidate has to stand in these. Names
of FSDP2's insides, which differ between versions of PyTorch, are in this file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, in the same storage; a plain tensor as it is."""
    if type(tensor) in PLAIN or not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.detach().to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in PLAIN:
        return False
    kind = _found("DTensor", "torch.distributed.tensor", "torch.distributed._tensor")
    return kind is not None and isinstance(tensor, kind)


def _found(name: str, *modules: str) -> type | None:
    """A class of an optional part of PyTorch; None if nobody has imported that part, and so nothing can be of that class."""
    found = (getattr(sys.modules.get(module), name, None) for module in modules)
    return next((kind for kind in found if kind is not None), None)


class Sharding:
    """The shards of a model, and the processes that hold them: a mesh of one dimension (FSDP) or two (HSDP: replicas, shards).

    rank, size: this process among all of them.  shard: (which, of how many).  replicas: of each shard.
    process_groups: sums over all of them in turn are sums over all processes.  device: that of messages.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Sharding | None:
        """None for a model that is not sharded."""
        kind = _found("FSDPModule", "torch.distributed.fsdp", "torch.distributed._composable.fsdp")
        flat = _found("FullyShardedDataParallel", "torch.distributed.fsdp")
        every = list(model.modules())
        modules = [m for m in every if isinstance(m, kind)] if kind is not None else []
        if flat is not None and any(isinstance(m, flat) for m in every):
            raise NotImplementedError(
                "model is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters cannot be perturbed by name; "
                "shard it with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if modules:
            return cls(model, modules)
        if any(is_sharded(p) for m in every for p in m._parameters.values() if p is not None):
            name = next(name for name, p in model.named_parameters() if is_sharded(p))
            raise NotImplementedError(
                f"parameters: {name!r} is a DTensor that fully_shard has not made (tensor parallelism, say); sharded "
                "models are those of torch.distributed.fsdp.fully_shard over a mesh of one dimension, or of two (HSDP)"
            )
        return None

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]):
        self.modules = modules
        self.states = list({id(s): s for s in (m._get_fsdp_state() for m in modules)}.values())
        for state in self.states:  # before flags are changed: FSDP2 looks at them once
            if state._is_root is None:
                state._lazy_init()
        self.groups = [group for state in self.states for group in _groups(state)]
        self.settle()
        names = {id(p): name for name, p in model.named_parameters()}
        meshes = []
        for p in self._parameters():
            if p.device_mesh not in meshes:
                meshes.append(p.device_mesh)
            if [type(placement).__name__ for placement in p.placements] not in (["Shard"], ["Replicate", "Shard"]):
                raise NotImplementedError(
                    f"parameters: {names.get(id(p))!r} has the placements {p.placements}; accepted are those of fully_shard "
                    "over a mesh of one dimension, (Shard,), or of two, (Replicate, Shard)"
                )
        if len(meshes) != 1:
            raise NotImplementedError(f"model is sharded over {len(meshes)} meshes; one mesh for all parameters is needed")
        (mesh,) = meshes
        shape, place = tuple(mesh.shape), mesh.get_coordinate()
        self.rank, self.size = 0, mesh.size()
        for n, i in zip(shape, place):
            self.rank = self.rank * n + i
        self.shard = (place[-1], shape[-1])
        self.replicas = self.size // shape[-1]
        self.ranks = sorted(mesh.mesh.flatten().tolist())
        self.process_groups = [mesh.get_group(i) for i in range(len(shape))]
        index = torch.cuda.current_device() if mesh.device_type == "cuda" else None
        self.device = torch.device(mesh.device_type, index)

    def _parameters(self) -> list[nn.Parameter]:
        return [p.sharded_param for group in self.groups for p in group.fsdp_params]

    def check(self, theta: Iterable[str], own: Mapping[str, Tensor], hyperparameters: Sequence[Tensor]) -> None:
        """Errors for what would give wrong numbers."""
        for i, h in enumerate(hyperparameters):
            if is_sharded(h):
                raise NotImplementedError(
                    f"hyperparameters[{i}] is a DTensor; hyperparameters of a sharded model must be plain tensors, alike in "
                    "all processes: keep it out of the shards by fully_shard(…, ignored_params={…})"
                )
        for name in theta:
            if not is_sharded(own[name]):
                raise NotImplementedError(
                    f"parameters: {name!r} is a plain tensor in a sharded model, and FSDP2 does not average its gradient; "
                    "shard it too, or name the others with parameters=[…], and it is held fixed"
                )
        for group in self.groups:
            for policy in (group.mp_policy.param_dtype, group.mp_policy.output_dtype):
                for p in group.fsdp_params:
                    dtype = p.sharded_param.dtype
                    if policy is not None and dtype.is_floating_point and torch.finfo(policy).eps > torch.finfo(dtype).eps:
                        raise ValueError(
                            f"model is sharded with a MixedPrecisionPolicy of {policy}, which does not resolve by how much "
                            f"candidates differ; shard it with {dtype} (param_dtype=None, output_dtype=None; reduce_dtype is "
                            "free), and run the training step alone under torch.autocast"
                        )
                    if hasattr(local(p.sharded_param), "fsdp_pre_all_gather"):
                        raise ValueError(
                            "model gathers its shards in another form (fsdp_pre_all_gather: float8, say), which does not "
                            "resolve by how much candidates differ; shard it without"
                        )
            if not (group.reduce_grads and group.all_reduce_grads) or _accumulates(group):
                raise RuntimeError(
                    "model is in the midst of gradient accumulation (set_requires_gradient_sync(False)); call before its first "
                    "or after its last backward pass, with set_requires_gradient_sync(True)"
                )

    def settle(self) -> None:
        """Every module holds its shards, and waits for a new pass: after one without a backward pass, or one that failed."""
        for module in self.modules:
            state = module._get_fsdp_state()
            if not state._is_root:
                continue
            if hasattr(module, "reset_iter_state"):
                module.reset_iter_state()
            else:
                _reset(self.states)
        for module in self.modules:
            module.reshard()

    def end(self) -> None:
        """After a pass: nothing of it is left, of one that failed neither."""
        self.settle()
        for group in self.groups:
            for p in group.fsdp_params:
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p._unsharded_param.grad = None

    def copy_flags(self) -> None:
        """Whole parameters require grad as their shards do; FSDP2 itself looks when it gathers them again."""
        for group in self.groups:
            for p in group.fsdp_params:
                if hasattr(p, "_unsharded_param"):
                    p._unsharded_param.requires_grad_(p.sharded_param.requires_grad)

    @contextmanager
    def _alone(self, tensors: Sequence[Tensor]):
        """No optimizer steps in these tensors' hooks, and gradients are plain means over the processes."""
        with ExitStack() as stack:
            for tensor in tensors:
                if hooks := tensor._post_accumulate_grad_hooks:
                    stack.callback(hooks.update, dict(hooks))
                    hooks.clear()
            for group in self.groups:
                for factor in ("gradient_divide_factor", "reduce_scatter_reduce_op"):  # the latter before torch 2.8
                    if getattr(group, factor, None) is not None:
                        stack.callback(setattr, group, factor, getattr(group, factor))
                        setattr(group, factor, None)
            yield

    def backward(self, loss: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """∂loss/∂λ on this process's part of the batch; parameters that require grad have theirs, means over all, in .grad."""
        if not loss.requires_grad:
            return [None] * len(hyperparameters)
        parameters = [p for p in self._parameters() if p.requires_grad]
        # The whole parameters are the leaves of the graph; the shards are too, where a loss uses them itself (a weight decay).
        whole = [p._unsharded_param for g in self.groups for p in g.fsdp_params if hasattr(p, "_unsharded_param")]
        leaves = [h for h in hyperparameters if h.is_leaf]
        inputs = [*leaves, *parameters, *(p for p in whole if p.requires_grad)]
        with self._alone([*parameters, *leaves]):
            # backward() would go on into the graph of a hyperparameter that is no leaf, and free it
            others = [h for h in hyperparameters if not h.is_leaf]
            found = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True) if others else ()
            torch.autograd.backward(loss, inputs=inputs)
        found = iter(found)
        grads = [h.grad if h.is_leaf else next(found) for h in hyperparameters]
        for h in leaves:
            h.grad = None
        return grads


def _groups(state) -> list:
    """The parameter groups of an FSDP2 state; one at most before torch 2.11."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _accumulates(group) -> bool:
    """Whether gradients wait to be reduced."""
    if getattr(group, "_partial_reduce_output", None) is not None:
        return True
    for p in group.fsdp_params:
        whole = getattr(p, "_unsharded_param", None)
        if p.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
            return True
    return False


def _reset(states: Sequence) -> None:
    """`reset_iter_state` of newer versions."""
    for state in states:
        idle = type(state._training_state).IDLE
        context = state._state_ctx
        context.iter_forward_root, context.post_backward_final_callback_queued = None, False
        state._training_state = idle
        for group in _groups(state):
            group.wait_for_unshard()  # of what has been fetched ahead
            group._training_state = idle
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()
            group.comm_ctx.all_gather_state = None
