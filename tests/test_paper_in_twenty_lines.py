"""The functions that evograd/README.md opens with: short, and the same hypergradients as the library's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import evograd

README = Path(__file__).resolve().parents[1] / "evograd/README.md"
MARKERS = {"evograd_reference": ("# The paper in twenty lines.\n", 20), "guided_reference": ("# Guided in ten lines.\n", 10)}


def source(name):
    """From its marker to the first blank line."""
    marker, _ = MARKERS[name]
    _, *after = README.read_text(encoding="utf-8").split(marker)
    (after,) = after
    return after.split("\n\n")[0]


def function(name):
    names = {"torch": torch, "functional_call": functional_call}
    exec(source(name), names)
    return names[name]


@pytest.fixture
def problem():
    """λ weighs the samples, and is in the validation loss too."""
    draws = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=draws, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, x_val, weights, scale = make(12, 5), make(12, 5), make(12).requires_grad_(), make(3).requires_grad_()
    y, y_val = torch.randint(3, (2, 12), generator=draws)
    train_loss = lambda m: (weights.sigmoid() * F.cross_entropy(m(x) * scale.exp(), y, reduction="none")).mean()
    val_loss = lambda m: F.cross_entropy(m(x_val), y_val) + 0.1 * (scale**2).sum()
    return train_loss, val_loss, model, [weights, scale]


@pytest.mark.parametrize("name", MARKERS)
def test_it_is_short(name):
    lines = source(name).splitlines()
    assert len(lines) <= MARKERS[name][1]
    assert lines[0].startswith(f"def {name}(") and all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("n_candidates", [2, 5])
@pytest.mark.parametrize(("sigma", "tau"), [(1e-3, 0.05), (0.1, 0.5)])
def test_evograd_is_the_librarys(problem, n_candidates, sigma, tau):
    """With the library's noise, drawn again for each parameter in the order of the candidates."""
    model, drawn = problem[2], {}

    def noise(tensor, generator):
        values = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        seen = drawn.setdefault(tensor.shape, [])
        if not any(torch.equal(values, other) for other in seen):
            seen.append(values)
        return values

    torch.manual_seed(1)
    settings = dict(n_candidates=n_candidates, sigma=sigma, temperature=tau, noise=noise)
    found = evograd.hypergradient(*problem, **settings).grads
    assert all(len(seen) == n_candidates for seen in drawn.values())
    eps = [{name: drawn[p.shape][k] for name, p in model.named_parameters()} for k in range(n_candidates)]
    expected = function("evograd_reference")(*problem, eps, sigma, tau)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())


def test_guided_is_the_librarys(problem):
    """On a network without kinks, with the same radius."""
    found = evograd.guided(*problem, inner_lr=0.1, lookahead=None, radius=1e-3).grads
    expected = function("guided_reference")(*problem, 0.1, 1e-3)
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-6
