"""What holds for every model, K, σ, τ and shape of λ, on problems that hypothesis makes up."""

import math
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import evograd
from evograd.noise import SeededNoise

from .problems import Bilevel
from .reference import evograd_reference

N, D, C = 6, 3, 3  # samples, features, classes
often = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LAYERS = {
    "linear": lambda n: nn.Linear(n, n),
    "batchnorm": nn.BatchNorm1d,
    "layernorm": nn.LayerNorm,
    "tanh": lambda n: nn.Tanh(),
    "softplus": lambda n: nn.Softplus(),
    "dropout": lambda n: nn.Dropout(0.3),
}


@st.composite
def problems(draw):
    """A classifier of random layers; tensors λ of random shapes in the samples' weights, the inputs or the validation loss."""
    names = draw(st.lists(st.sampled_from(list(LAYERS)), max_size=4))
    width = draw(st.integers(1, 4))
    shapes = draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=3))
    uses = draw(st.lists(st.sampled_from(["weights", "inputs"]), min_size=len(shapes), max_size=len(shapes)))
    in_validation = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**20)))
    model = nn.Sequential(nn.Linear(D, width), *(LAYERS[name](width) for name in names), nn.Linear(width, C)).double()
    x, x_val = torch.randn(2, N, D, dtype=torch.float64)
    y, y_val = torch.randint(0, C, (2, N))
    hyperparameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    n_features = {"weights": (N,), "inputs": (N, D)}
    maps = [torch.randn(math.prod(shape), *n_features[use], dtype=torch.float64) for shape, use in zip(shapes, uses)]

    def features(use):
        terms = [torch.tensordot(h.flatten(), m, 1) for h, m, u in zip(hyperparameters, maps, uses) if u == use]
        return torch.tanh(sum(terms, torch.zeros(n_features[use], dtype=torch.float64)))

    def train_loss(m):
        return ((1.5 + features("weights")) * F.cross_entropy(m(x + features("inputs")), y, reduction="none")).mean()

    def val_loss(m):
        direct = sum((h - 1).square().mean() for h in hyperparameters) if in_validation else 0
        return F.cross_entropy(m(x_val), y_val) + direct

    return Bilevel(model, hyperparameters, train_loss, val_loss)


estimators = st.fixed_dictionaries(
    {
        "n_candidates": st.integers(2, 7),
        "sigma": st.floats(0.01, 0.3),
        "temperature": st.floats(0.1, 2.0),
        "noise": st.sampled_from(["sign", "normal"]),
        "common_random_numbers": st.booleans(),
    }
)
strategies = st.sampled_from(["stream", "retain"])


def estimate(problem, **settings):
    torch.manual_seed(11)
    return evograd.hypergradient(*problem.args(), **settings)


def assert_equal(grads, expected):
    """To rounding, over all hyperparameters as one vector."""
    a, b = (torch.cat([g.flatten() for g in gradient]) for gradient in (grads, expected))
    assert (a - b).norm() <= 1e-9 * b.norm() + 1e-13


@often
@given(problems(), estimators, strategies)
def test_equals_differentiation_through_the_softmax(problem, settings, strategy):
    torch.manual_seed(11)
    expected = evograd_reference(problem, **settings)
    result = estimate(problem, strategy=strategy, **settings)
    assert [g.shape for g in result.grads] == [h.shape for h in problem.hyperparameters]
    assert_equal(result.grads, expected)


@often
@given(problems(), estimators, strategies, st.randoms(use_true_random=False))
def test_permutation_of_the_candidates_changes_nothing(problem, settings, strategy, random):
    # All candidates draw alike, so that it is their noise alone that changes places.
    settings |= {"common_random_numbers": True}
    order = random.sample(range(settings["n_candidates"]), settings["n_candidates"])

    class Permuted(SeededNoise):
        def __init__(self, *args):
            super().__init__(*args)
            self.seeds = [self.seeds[k] for k in order]

    before = estimate(problem, strategy=strategy, **settings)
    with mock.patch.object(sys.modules["evograd.hypergradient"], "SeededNoise", Permuted):
        after = estimate(problem, strategy=strategy, **settings)
    assert torch.equal(after.candidate_losses, before.candidate_losses[order])
    torch.testing.assert_close(after.weights, before.weights[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(after.val_loss, before.val_loss, rtol=1e-12, atol=0)
    assert_equal(after.grads, before.grads)


@often
@given(problems(), estimators, strategies, st.floats(-20, 20))
def test_a_constant_in_the_training_loss_changes_nothing(problem, settings, strategy, constant):
    before = estimate(problem, strategy=strategy, **settings)
    shifted = Bilevel(problem.model, problem.hyperparameters, lambda m: problem.train_loss(m) + constant, problem.val_loss)
    after = estimate(shifted, strategy=strategy, **settings)
    torch.testing.assert_close(after.candidate_losses, before.candidate_losses + constant)
    torch.testing.assert_close(after.weights, before.weights, rtol=1e-11, atol=0)
    assert_equal(after.grads, before.grads)
