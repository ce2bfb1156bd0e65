"""T1–T2 with the package higher (Grefenstette et al., arXiv 1910.01727), as in the authors' code."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless

from ..operations.threads import replaced
from .gathering import partial
from .problem import Problem
from .stand_ins import StandIn, Watch


def by_higher(
    problem: Problem, inner_lr: float, n_steps: int, train_loss: Callable
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(ℓ_T at the first step, ℓ_V after the last, dℓ_V/dλ). train_loss: of the problem and the copy of the model, ℓ_T."""
    try:
        import higher  # here, so that EvoGrad itself does not need it
    except ImportError as error:
        raise ImportError(
            "engine='higher' makes its steps with the package higher, which is not installed: "
            "pip install 'evograd-hypergradients[baselines]', or pip install higher; engine='functional' needs none"
        ) from error

    model, val_loss, own = problem.model, problem.val_loss, problem.own
    if hooked := [repr(name) for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]:
        raise NotImplementedError(
            f"engine='higher' calls no hooks, and {hooked[0]} has one (torch.nn.utils.weight_norm or prune, say, whose weight "
            "it would not make anew); use engine='functional'"
        )
    within = Path(higher.__file__).parent
    optimizer = torch.optim.SGD([own[name] for name in problem.theta], lr=inner_lr)
    optimizer.param_groups[0]["params"] = _Uncopied(optimizer.param_groups[0]["params"])
    modes = [(module, module.training) for module in model.modules()]
    try:
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (functional, inner_optimizer):
            start = {**own, **problem.fixed, **{name: StandIn.leaf(p.clone()) for name, p in problem.theta.items()}}
            functional.update_params([start[name] for name in own])
            first = None
            for _ in range(n_steps):
                with _standing_in(problem, functional):
                    loss = train_loss(problem, functional)
                _set_modes(functional, modes)
                first = loss.detach() if first is None else first
                if loss.requires_grad:
                    inner_optimizer.step(loss)
                # As in the other estimators, statistics that BatchNorm gathers on the way are thrown away.
                higher.patch.buffer_sync(model, functional)
            with _standing_in(problem, functional):
                val = problem.scalar(val_loss, val_loss(functional))
            return first, val.detach(), partial(val, problem.hyperparameters)
    except (AttributeError, KeyError) as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent == within or "InnerFunctional" in str(error):
            raise NotImplementedError(
                f"engine='higher' cannot call its copy of this model ({type(error).__name__}: {error}): modules that replace their "
                "weights by tensors of their own, or that are called by themselves alone; use engine='functional'"
            ) from error
        raise
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _standing_in(problem: Problem, functional: nn.Module):
    """A block in which a closure has the parameters of a step, and does not write into them."""
    own = list(problem.own.values())
    functional.update_params([StandIn.of(p, step) for p, step in zip(own, functional.fast_params)])
    watch = Watch(functional.fast_params)
    owners = {id(step): p for p, step in zip(own, functional.fast_params)}
    here = {functional, *functional.modules()}

    def called(module, *args, **settings):
        if module in here:
            raise NotImplementedError(
                "engine='higher' with functional_call in a loss: on its copy of the model other parameters than those given "
                "would be taken; use engine='functional'"
            )
        return _functional_call(module, *args, **settings)

    with problem.slots.holding(()), replaced((stateless, "_functional_call", called)):  # holding what is beside the model
        yield
    problem.slots.check_written([owners[id(step)] for step in watch.end()], changed=False)


_functional_call = stateless._functional_call


def _set_modes(functional: nn.Module, modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """A closure's modes are its own: the next one does not see them."""
    for module, (_, mode) in zip(functional.modules(), modes):
        module.training = mode


class _Uncopied(list):
    """`higher` makes a deep copy of the optimizer's parameters, only to throw it away; spare the baseline that memory."""

    def __deepcopy__(self, memo):
        return list(self)
