"""What an optimizer's step does to θ, as a function that can be differentiated: (θ', s') = U(θ, s, g), element by element.

s is the optimizer's state, g the gradient. The functions below are the formulas of torch.optim, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, State, Mapping[str, object]], tuple[Tensor, State]]
SECOND_MOMENTS = ("exact", "frozen")


def root(v: Tensor) -> Tensor:
    """√v, whose derivative is 0 at v = 0."""
    there = v > 0
    return torch.where(there, v, 1).sqrt() * there


def frozen_root(v: Tensor) -> Tensor:
    """√v, held constant in the product."""
    return root(v.detach())


def sgd(theta: Tensor, g: Tensor, state: State, of: Mapping) -> tuple[Tensor, State]:
    g = _decayed(theta, g, of)
    if _is_on(of["momentum"]):
        buffer = state.get("momentum_buffer")
        buffer = g if buffer is None else of["momentum"] * buffer + (1 - of["dampening"]) * g
        g = g + of["momentum"] * buffer if of["nesterov"] else buffer
        state = {"momentum_buffer": buffer}
    return theta - of["lr"] * g, state


def adam(theta: Tensor, g: Tensor, state: State, of: Mapping, root: Callable = root, decoupled: bool = False):
    beta1, beta2 = of["betas"]
    t = state["step"] + 1
    if of.get("decoupled_weight_decay", decoupled):
        g, theta = _signed(g, of), theta - of["lr"] * of["weight_decay"] * theta
    else:
        g = _decayed(theta, g, of)
    m = beta1 * state.get("exp_avg", 0) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g.square()
    after = {"exp_avg": m, "exp_avg_sq": v}
    if of["amsgrad"]:
        after["max_exp_avg_sq"] = v = torch.maximum(state["max_exp_avg_sq"], v) if "max_exp_avg_sq" in state else v
    scale = root(v) / (1 - beta2**t) ** 0.5 + of["eps"]
    return theta - of["lr"] / (1 - beta1**t) * m / scale, after


def rmsprop(theta: Tensor, g: Tensor, state: State, of: Mapping, root: Callable = root) -> tuple[Tensor, State]:
    g, alpha = _decayed(theta, g, of), of["alpha"]
    after = {"square_avg": alpha * state.get("square_avg", 0) + (1 - alpha) * g.square()}
    v = after["square_avg"]
    if of["centered"]:
        after["grad_avg"] = mean = alpha * state.get("grad_avg", 0) + (1 - alpha) * g
        v = v - mean.square()
    g = g / (root(v) + of["eps"])
    if _is_on(of["momentum"]):
        after["momentum_buffer"] = g = of["momentum"] * state.get("momentum_buffer", 0) + g
    return theta - of["lr"] * g, after


def adagrad(theta: Tensor, g: Tensor, state: State, of: Mapping, root: Callable = root) -> tuple[Tensor, State]:
    g = _decayed(theta, g, of)
    total = state["sum"] + g.square()
    return theta - of["lr"] / (1 + state["step"] * of["lr_decay"]) * g / (root(total) + of["eps"]), {"sum": total}


UPDATES: dict[type, Update] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: partial(adam, decoupled=True),
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
}


def update_of(optimizer: torch.optim.Optimizer, given: Update | None, second_moment: str) -> Update:
    """The update that an optimizer makes, or the one that the user has given for it."""
    if second_moment not in SECOND_MOMENTS:
        raise ValueError(f"second_moment={second_moment!r} is unknown; accepted are {', '.join(map(repr, SECOND_MOMENTS))}")
    frozen = second_moment == "frozen"
    known = given or UPDATES.get(type(optimizer))
    if known is None:
        names = ", ".join(kind.__name__ for kind in UPDATES)
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, whose update is not known; known are torch.optim's {names}. Give its "
            "update by update=, a function of (θ, g, state, settings) that returns (θ', state')"
        )
    if frozen and (given is not None or known is sgd):
        raise ValueError("second_moment='frozen' is for Adam, AdamW, RMSprop and Adagrad, whose second moment is known")
    return partial(known, root=frozen_root) if frozen else known


class Product(NamedTuple):
    """The cotangents (a, b) of (θ', s') -> those of θ, s, g and of the settings; None where nothing depends.

    after: θ', without a graph.
    """

    theta: Tensor
    state: State
    gradient: Tensor
    settings: dict[str, Tensor]
    after: Tensor


def vector_jacobian_product(
    update: Update, theta: Tensor, g: Tensor, state: State, settings: Mapping[str, object], a: Tensor, b: State
) -> Product:
    """(a, b) times the Jacobian of the update at (θ, s, g): what autograd makes of its dozen lines."""
    leaf = lambda t: t.detach().requires_grad_()
    of = lifted(settings, theta)
    theta, g = leaf(theta), leaf(g)
    moving = {name: leaf(s) for name, s in state.items() if isinstance(s, Tensor) and s.shape == theta.shape}
    numbers = [(name, v) for name, value in of.items() for v in _leaves(value)]
    after, states = update(theta, g, {**state, **moving}, of)
    outputs = [(after, a), *((states[name], c) for name, c in b.items() if name in states)]
    outputs = [(made, c.view_as(made)) for made, c in outputs if made.requires_grad]
    inputs = [theta, g, *moving.values(), *(v for _, v in numbers)]
    made, cotangents = zip(*outputs)
    by_theta, by_g, *others = torch.autograd.grad(made, inputs, cotangents, allow_unused=True)
    by_state = {name: c for name, c in zip(moving, others) if c is not None}
    by_setting: dict[str, list[Tensor]] = {}
    for (name, _), c in zip(numbers, others[len(moving) :]):
        by_setting.setdefault(name, []).append(c)
    by_setting = {
        name: torch.stack([torch.zeros(()) if c is None else c for c in cs]) if len(cs) > 1 else cs[0]
        for name, cs in by_setting.items()
        if any(c is not None for c in cs)
    }
    zero = lambda c, like: torch.zeros_like(like) if c is None else c
    return Product(zero(by_theta, theta), by_state, zero(by_g, g), by_setting, after.detach())


def lifted(settings: Mapping[str, object], like: Tensor) -> dict[str, object]:
    """Settings as numbers that a derivative can be taken by, on the device of `like`. Without momentum there is none by it."""
    dtype = torch.float32 if like.is_mps else torch.float64

    def lift(value: object) -> object:
        if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
            return value.detach().to(like.device, dtype).reshape(()).requires_grad_()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return like.new_full((), value, dtype=dtype).requires_grad_()
        return tuple(map(lift, value)) if isinstance(value, (tuple, list)) else value

    return {name: value if name == "momentum" and not _is_on(value) else lift(value) for name, value in settings.items()}


def _leaves(value: object) -> list[Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def _is_on(value: object) -> bool:
    return isinstance(value, Tensor) or value != 0


def _signed(g: Tensor, of: Mapping) -> Tensor:
    return -g if of["maximize"] else g


def _decayed(theta: Tensor, g: Tensor, of: Mapping) -> Tensor:
    return _signed(g, of) + of["weight_decay"] * theta
