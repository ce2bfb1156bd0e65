"""T1–T2: `unrolled` against closed forms and finite differences, `mixed_mode` against `unrolled`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evograd

from .problems import KINDS, Bilevel, bilevel
from .test_hypergradient import quadratic, relative_difference

ETA = 0.3
FORWARD_MODE_KINDS = [kind for kind in KINDS if kind != "weight_norm"]  # PyTorch has no forward-mode formula for it


def test_unrolled_equals_the_closed_form():
    args, exact = quadratic()
    torch.testing.assert_close(evograd.baselines.unrolled(*args, inner_lr=ETA).grads[0], exact(ETA), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        evograd.mixed_mode(*args, inner_lr=ETA, lookahead="sgd").grads[0], exact(ETA), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "batchnorm", "tied", "lstm", "parametrized"])
def test_unrolled_equals_finite_differences(kind, n_steps):
    problem = bilevel(kind)
    (weights,) = problem.hyperparameters

    def validation():
        """ℓ_V after n_steps of plain SGD."""
        theta = {n: p.detach().clone().requires_grad_() for n, p in problem.model.named_parameters()}
        call = lambda *args: torch.func.functional_call(problem.model, theta, args)
        for _ in range(n_steps):
            grads = torch.autograd.grad(problem.train_loss(call), list(theta.values()))
            theta = {n: (p - ETA * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), grads)}
        return problem.val_loss(call).item()

    estimated, step = torch.empty_like(weights), 1e-4
    for i in range(len(weights)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[i] += sign * step
            values.append(validation())
            with torch.no_grad():
                weights[i] -= sign * step
        estimated[i] = (values[0] - values[1]) / (2 * step)
    result = evograd.baselines.unrolled(*problem.args(), inner_lr=ETA, n_steps=n_steps)
    assert relative_difference(result.grads, [estimated]) < 1e-6


@pytest.mark.parametrize("kind", FORWARD_MODE_KINDS)
def test_mixed_mode_equals_unrolled(kind):
    problem = bilevel(kind)
    results = []
    for method, settings in ((evograd.baselines.unrolled, {}), (evograd.mixed_mode, {"lookahead": "sgd"})):
        torch.manual_seed(4)  # the same dropout
        results.append(method(*problem.args(), inner_lr=ETA, parameters=problem.parameters, **settings))
    assert relative_difference(results[1].grads, results[0].grads) < 1e-10
    torch.testing.assert_close(results[1].val_loss, results[0].val_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(results[1].candidate_losses, results[0].candidate_losses, rtol=1e-12, atol=0)


def test_mixed_mode_with_given_lookahead():
    """The named parameters one SGD step ahead are what lookahead='sgd' makes of them; G there and not at θ."""
    problem = bilevel("mixed_shapes")
    model = problem.model
    grads = torch.autograd.grad(problem.train_loss(model), list(model.parameters()))
    ahead = {n: p.detach() - ETA * g for (n, p), g in zip(model.named_parameters(), grads)}
    given, sgd, none = (
        evograd.mixed_mode(*problem.args(), inner_lr=ETA, lookahead=look).grads for look in (ahead, "sgd", None)
    )
    assert relative_difference(given, sgd) < 1e-12
    assert relative_difference(none, sgd) > 1e-3


@pytest.mark.parametrize("method", ["mixed_mode", "unrolled", "guided"])
def test_statistics_of_the_training_pass_are_not_seen_in_validation(method):
    """A validation loss in eval mode uses the running statistics that the model came with, in every estimator."""
    problem = bilevel("batchnorm")

    def val_loss(model):
        return problem.val_loss(model.eval())

    args = (lambda m: problem.train_loss(m.train()), val_loss, problem.model, problem.hyperparameters)
    estimate = {
        "mixed_mode": lambda: evograd.mixed_mode(*args, inner_lr=1e-9, lookahead="sgd"),
        "unrolled": lambda: evograd.baselines.unrolled(*args, inner_lr=1e-9),
        "guided": lambda: evograd.hypergradient(*args, noise="guided"),
    }[method]
    with torch.no_grad():
        expected = val_loss(problem.model)
    problem.model.train()
    torch.testing.assert_close(estimate().val_loss, expected, rtol=1e-6, atol=0)


def test_an_operation_without_forward_mode_is_named():
    with pytest.raises(NotImplementedError, match="forward mode.*weight_norm.*plain form"):
        evograd.mixed_mode(*bilevel("weight_norm").args(), inner_lr=0.1)


def test_a_loss_that_lambda_enters_only_through_validation():
    model, lam = nn.Linear(3, 1), torch.tensor(2.0, requires_grad=True)
    x = torch.randn(4, 3)
    problem = Bilevel(model, [lam], lambda m: m(x).square().mean(), lambda m: m(x).square().mean() + lam**2)
    for result in (
        evograd.hypergradient(*problem.args()),
        evograd.mixed_mode(*problem.args(), inner_lr=0.1),
        evograd.baselines.unrolled(*problem.args(), inner_lr=0.1),
    ):
        assert result.grads[0].item() == pytest.approx(4.0)


def test_unrolled_perturbs_only_the_named_parameters():
    problem = bilevel("mlp")
    head = evograd.baselines.unrolled(*problem.args(), inner_lr=ETA, parameters=["2.weight", "2.bias"]).grads
    whole = evograd.baselines.unrolled(*problem.args(), inner_lr=ETA).grads
    assert relative_difference(head, whole) > 1e-2


@pytest.mark.parametrize(
    "normalization",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.BatchNorm1d(6, affine=False),
        nn.BatchNorm1d(6).eval(),
        nn.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.GroupNorm(2, 6),
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    ],
    ids=str,
)
def test_mixed_mode_with_hyperparameters_before_a_normalization(normalization, float64):
    """There PyTorch's own formulas, reverse over forward, are wrong without a word."""
    model = nn.Sequential(nn.Linear(4, 6), copy.deepcopy(normalization).double(), nn.Tanh(), nn.Linear(6, 3))
    scale = torch.rand(4, requires_grad=True)
    x, y, x_val, y_val = torch.randn(9, 4), torch.randint(3, (9,)), torch.randn(9, 4), torch.randint(3, (9,))

    def train_loss(model):
        return F.cross_entropy(model(x * scale), y)

    def val_loss(model):
        return F.cross_entropy(model(x_val), y_val)

    args = (train_loss, val_loss, model, [scale])
    exact = evograd.baselines.unrolled(*args, inner_lr=ETA).grads[0]
    mixed = evograd.mixed_mode(*args, inner_lr=ETA, lookahead="sgd").grads[0]
    torch.testing.assert_close(mixed, exact, rtol=1e-10, atol=1e-14)
