"""The one-dimensional illustration: against theory, and against the library's own step."""

import json

import pytest
import torch
from torch import nn

import evograd
from illustration_1d import train as illustration


@pytest.mark.parametrize(("x", "lam"), [(0.7, 0.2), (-1.3, 1.1), (0.0, 2.0)])
def test_many_candidates_tend_to_theory(x, lam):
    """K = 10⁵ to 1 %: the merged parameter's limit is (x/σ² + 2/τ) / (1/σ² + 2(1 + λ)/τ), in closed form."""
    sigma, temperature = illustration.SIGMA, illustration.TEMPERATURE
    hyper = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    merged = (x / sigma**2 + 2 / temperature) / (1 / sigma**2 + 2 * (1 + hyper) / temperature)
    (expected,) = torch.autograd.grad((merged - 0.5) ** 2, hyper)
    at = torch.full((20,), x), torch.full((20,), lam)
    seen = illustration.evograd_hypergradient(*at, n_candidates=100_000).mean()
    assert seen.item() == pytest.approx(expected.item(), rel=0.01)
    assert illustration.theory(x, lam) == pytest.approx(expected.item(), rel=1e-9)


def test_mean_theory_is_theory_averaged_over_x():
    x, lam = torch.randn(400_000, dtype=torch.float64), 0.6
    assert illustration.theory(x, lam).mean().item() == pytest.approx(illustration.mean_theory(lam), rel=0.02)


def test_true_hypergradient():
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((illustration.optimum(lam) - 0.5) ** 2, lam)
    assert illustration.true_hypergradient(0.3) == pytest.approx(expected.item())


def test_vectorised_form_is_the_librarys_step(float64):
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor(0.3))
    lam = torch.tensor(0.4, requires_grad=True)
    torch.manual_seed(5)
    rows = iter(torch.randn(7, 1))  # what the vectorised form draws from the same seed
    drawn = {}

    def same_noise(like, generator):
        seed = generator.initial_seed()
        if seed not in drawn:
            drawn[seed] = next(rows)
        return drawn[seed].expand_as(like.view(-1)).view(like.shape)

    result = evograd.hypergradient(
        lambda m: (m.x - 1) ** 2 + lam * m.x**2,
        lambda m: (m.x - 0.5) ** 2,
        model,
        [lam],
        n_candidates=7,
        sigma=illustration.SIGMA,
        temperature=illustration.TEMPERATURE,
        noise=same_noise,
    )
    torch.manual_seed(5)
    expected = illustration.evograd_hypergradient(torch.tensor([0.3]), torch.tensor([0.4]), n_candidates=7)
    torch.testing.assert_close(result.grads[0], expected[0])


def test_true_trajectories_take_the_hypergradient_at_their_own_lambda():
    points = illustration.trajectory(lambda x, lam: illustration.true_hypergradient(lam))
    assert points.shape == (6, 5, 2)
    x, lam = points[2, 1]
    torch.testing.assert_close(points[3, 1, 1], lam - 0.1 * (lam - 1) / (lam + 1) ** 3)
    torch.testing.assert_close(points[3, 1, 0], x - 0.1 * (2 * (x - 1) + 2 * lam * x))


def test_script_writes_figures_and_a_record(tmp_path, capsys):
    illustration.main(["--out", str(tmp_path / "runs.jsonl"), "--figures", str(tmp_path)])
    (record,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert record["metrics"]["sign_agreement_k100"] > record["metrics"]["sign_agreement_k2"]
    for name in ("hypergradients", "trajectories"):
        assert (tmp_path / f"illustration_1d_{name}.png").read_bytes().startswith(b"\x89PNG")
