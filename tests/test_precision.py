"""Losses in lower precision than float32: what guided candidates make of it, against float64, and what is told."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evograd
from evograd.baselines import finite_difference
from evograd.host.precision import Precision, autocast

from .problems import Bilevel
from .reference import second_order_reference

D, WIDTH, C, BATCH, LR = 16, 64, 4, 64, 0.1
LOW = (torch.bfloat16, torch.float16)


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, C)]
    return nn.Sequential(*layers).bfloat16().float()  # numbers that every type here has


def problem(model, cast=None, of_val=True):
    """λ in front of the network and behind it; `cast`: the type that autocast is entered with."""
    dtype = model[0].weight.dtype
    draws = torch.Generator().manual_seed(1)
    x, x_val = torch.randn(2, BATCH, D, generator=draws)
    y, y_val = torch.randint(0, C, (2, BATCH), generator=draws)
    weights, shift = torch.zeros(BATCH, requires_grad=True), torch.zeros(D, requires_grad=True)

    def logits(m, x, cast):
        with nullcontext() if cast is None else torch.autocast("cpu", cast):
            out = m(x.to(dtype))
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def train_loss(m):
        return (weights.sigmoid() * F.cross_entropy(logits(m, x + shift, cast), y, reduction="none")).mean()

    return Bilevel(
        model, [weights, shift], train_loss, lambda m: F.cross_entropy(logits(m, x_val, cast if of_val else None), y_val)
    )


def low(dtype, by):
    return problem(network().to(dtype)) if by == "parameters" else problem(network(), cast=dtype)


def cosine(found, expected):
    return min(F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0).item() for a, b in zip(found, expected))


@pytest.fixture(scope="module")
def exact():
    return second_order_reference(problem(network().double()), LR)


@pytest.mark.parametrize("strategy", ["stream", "in_place"])
@pytest.mark.parametrize("by", ["parameters", "autocast"])
@pytest.mark.parametrize("dtype", LOW)
def test_guided_takes_a_radius_that_is_resolved(dtype, by, strategy, exact):
    settings = dict(inner_lr=LR, lookahead="sgd", strategy=strategy)
    found = evograd.guided(*low(dtype, by).args(), **settings).grads
    assert cosine(found, exact) > 0.99
    for a, b in zip(found, exact):
        assert 0.9 < a.double().norm() / b.norm() < 1.1
    # which is the reason for it
    with pytest.raises(ValueError, match=rf"radius=.* is not resolved by {dtype}.*at least .* is needed"):
        evograd.guided(*low(dtype, by).args(), **settings, radius=1e-4)
    with pytest.raises(ValueError, match="is not resolved by"):
        finite_difference(*low(dtype, by).args(), inner_lr=LR, radius=1e-4)


def test_autocast_around_the_call(exact):
    """Weights that autocast keeps in lower precision are those of a candidate no longer than it is there."""
    args = problem(network()).args()
    plain = args[0](args[2]).item()
    with torch.autocast("cpu", torch.bfloat16):
        before = args[0](args[2]).item()
        settings = dict(inner_lr=5.0, lookahead="sgd", radius=0.1)
        found = [evograd.guided(*args, **settings, strategy=strategy).grads for strategy in ("stream", "in_place")]
        assert args[0](args[2]).item() == before != plain
        with pytest.raises(ValueError, match=r"is not resolved by torch.bfloat16"):
            evograd.guided(*args, inner_lr=LR, radius=1e-4)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=0)


def test_a_radius_is_of_the_precision_that_train_loss_is_seen_to_have(exact):
    """val_loss comes first, in float32: the pass at θ shows the rest, before there is a pair."""
    args = problem(network(), torch.bfloat16, of_val=False).args()
    for lookahead in (None, "sgd"):
        found = evograd.guided(*args, inner_lr=LR, lookahead=lookahead)
        assert found.curvature < 1
    assert cosine(found.grads, exact) > 0.99


@pytest.mark.parametrize("by", ["parameters", "autocast"])
def test_random_candidates_are_warned_of(by):
    with pytest.warns(UserWarning, match=r"computed in torch.bfloat16.*sigma=0.001: the estimate is rounding.*or sigma=0.01$"):
        evograd.hypergradient(*low(torch.bfloat16, by).args())
    seeded = lambda: torch.Generator().manual_seed(0)
    expected = evograd.hypergradient(*problem(network().double()).args(), sigma=0.01, generator=seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evograd.hypergradient(*problem(network()).args())
        args = low(torch.bfloat16, by).args()
        found = evograd.hypergradient(*args, sigma=0.01, generator=seeded())
    assert cosine(found.grads, [g.double() for g in expected.grads]) > 0.95


def test_a_small_part_of_the_network_moves_further():
    """Adapters in float32 on a base in bfloat16, the second factor at zero, where they begin."""
    torch.manual_seed(2)
    base = network()

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(2, WIDTH) / 8), nn.Parameter(torch.zeros(WIDTH, 2))

        def __getitem__(self, i):
            return self.base[i]

        def forward(self, x):
            x = self.base[:2](x)
            low_rank = (x.to(self.a.dtype) @ self.a.T @ self.b.T).to(x.dtype)
            return self.base[3:](self.base[2](x) + low_rank)

    model = Adapted(base)
    expected = second_order_reference(problem(copy.deepcopy(model).double()), LR)
    model.base.bfloat16()
    of = problem(model)
    found = evograd.guided(*of.args(), inner_lr=LR, lookahead="sgd").grads
    assert cosine(found, expected) > 0.95
    adapters = Precision([model.a, model.b], list(model.parameters()))
    assert adapters.radius == 4 * torch.finfo(torch.bfloat16).eps


def test_autocast_is_looked_at_within_the_block_alone():
    enter, p = autocast.__enter__, [torch.zeros(2)]
    outer, inner = Precision(p, p), Precision(p, p)
    with outer.watched():
        with inner.watched(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            pass
        assert outer.dtype == inner.dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            pass
    assert (outer.dtype, inner.dtype) == (torch.float16, torch.float32) and autocast.__enter__ is enter
    with torch.autocast("cpu", torch.bfloat16):
        with inner.watched():
            pass
    assert inner.dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", ["stream", "in_place"])
@pytest.mark.parametrize("scale", [2.0**13, 2.0**16, 2.0**17])
@pytest.mark.parametrize("estimator", ["guided", "finite_difference", "evograd"])
def test_losses_in_float16_may_be_scaled(estimator, scale, strategy):
    """By the factor of a GradScaler: steps to candidates, norms and slopes stay within float16, or are not taken in it."""

    def estimate(scale):
        of = low(torch.float16, "parameters")
        args = (lambda m: scale * of.train_loss(m), lambda m: scale * of.val_loss(m), of.model, of.hyperparameters)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of digits
            if estimator == "evograd":
                settings = dict(temperature=0.05 * scale, sigma=0.02, n_candidates=8, strategy=strategy)
                return evograd.hypergradient(*args, **settings).grads
            if estimator == "finite_difference":
                return finite_difference(*args, inner_lr=LR / scale, radius=0.05).grads
            return evograd.guided(*args, inner_lr=LR / scale, strategy=strategy).grads

    for found, expected in zip(estimate(scale), estimate(1.0)):
        assert F.cosine_similarity(found, expected, dim=0) > 0.9999  # a power of two
        assert found.norm() == pytest.approx(scale * expected.norm().item(), rel=1e-3)


def test_a_hyperparameter_whose_gradients_float16_does_not_hold_is_named():
    of = problem(network())
    weights = torch.zeros(BATCH, requires_grad=True, dtype=torch.float16)
    plain = of.train_loss
    for method in (evograd.mixed_mode, evograd.baselines.unrolled):
        args = (lambda m: plain(m) * weights.float().sigmoid().mean(), of.val_loss, of.model, [weights])
        with pytest.warns(UserWarning, match=r"hyperparameters\[0\] is float16, which has few numbers .* keep it in float32"):
            method(*args, inner_lr=1e-4)
