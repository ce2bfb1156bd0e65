"""EvoGrad in one dimension: its hypergradient beside the truth, and where gradient descent with it leads.

    python -m illustration_1d.train                    both figures and the record of the run, a few seconds

    training loss    ℓ_T(x, λ) = (x − 1)² + λ x²       so that x*(λ) = 1 / (1 + λ)
    validation loss  ℓ_V(x) = (x − 0.5)²               so that dℓ_V(x*(λ))/dλ = (λ − 1) / (λ + 1)³

The first figure is vectorised: one array holds all values of λ, all draws and all K candidates, and the two functions of the
library that hold softmax and chain rule are applied along its first dimension. The second is made as anybody would: by the
library's step, in a loop, with all candidates in one batched pass.
"""

from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from evograd import hypergradient
from evograd.hypergradient import candidate_weights, loss_coefficients
from evograd.lab import cli
from evograd.lab.records import append_run, seed_everything

from .figures import plot_hypergradients, plot_trajectories

SIGMA, TEMPERATURE = 1.0, 0.5
CANDIDATES = (2, 10, 100)
N_DRAWS, LAMBDAS = 100, torch.linspace(0.1, 2, 100)
STARTS = torch.tensor([(-1.8, 0.2), (-0.9, 1.2), (0.9, 0.8), (1.3, 0.2), (1.5, 1.7)])  # (x, λ)
N_STEPS, LR = 5, 0.1


def train_gradient(x, lam):
    return 2 * (x - 1) + 2 * lam * x


def optimum(lam):
    return 1 / (1 + lam)


def true_hypergradient(lam):
    return (lam - 1) / (lam + 1) ** 3


def evograd_hypergradient(x, lam, n_candidates):
    """EvoGrad's estimate at every (x, λ), tensors of one shape."""
    epsilon = torch.randn(n_candidates, *x.shape)
    candidates = x + SIGMA * epsilon  # 1. perturb
    losses = (candidates - 1) ** 2 + lam * candidates**2  # 2. evaluate
    weights = candidate_weights(losses, TEMPERATURE)  # 3. softmax
    merged = (weights * candidates).sum(0)  # 4. combine
    slopes = 2 * (merged - 0.5) * SIGMA * epsilon  # s_k = dℓ_V/dx* (x_k − x)
    return (loss_coefficients(weights, slopes, TEMPERATURE) * candidates**2).sum(0)  # Σ_k c_k ∂ℓ_k/∂λ


class Point(nn.Module):
    """A model of one parameter."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())


def library_hypergradient(x, lam, n_candidates):
    """The same at each (x, λ), by the library."""
    grads = []
    for x_i, lam_i in zip(x, lam):
        lam_i = lam_i.clone().requires_grad_()
        train_loss = lambda model: (model.x - 1) ** 2 + lam_i * model.x**2
        val_loss = lambda model: (model.x - 0.5) ** 2
        settings = dict(n_candidates=n_candidates, sigma=SIGMA, temperature=TEMPERATURE, noise="normal", strategy="vmap")
        grads += hypergradient(train_loss, val_loss, Point(x_i), [lam_i], **settings).grads
    return torch.stack(grads)


def theory(x, lam):
    """The limit K → ∞: the candidates' weighted mean is that of the Gaussian N(x, σ²) times exp(−ℓ_T/τ)."""
    precision = 1 / SIGMA**2 + 2 * (1 + lam) / TEMPERATURE
    merged = (x / SIGMA**2 + 2 / TEMPERATURE) / precision
    return 2 * (merged - 0.5) * -merged * (2 / TEMPERATURE) / precision


def mean_theory(lam):
    """`theory` averaged over x ~ N(0, 1), in closed form."""
    a, b = 1 / SIGMA**2, 2 / TEMPERATURE
    precision = a + b * (1 + lam)
    mean, mean_square = b / precision, (a**2 + b**2) / precision**2
    return -2 * b / precision * (mean_square - mean / 2)


def trajectory(hypergradient):
    """(N_STEPS + 1, starts, 2): SGD on x and on λ at once, λ by `hypergradient(x, λ)` at its own values."""
    x, lam = STARTS.unbind(1)
    points = [torch.stack([x, lam], 1)]
    for _ in range(N_STEPS):
        x, lam = x - LR * train_gradient(x, lam), lam - LR * hypergradient(x, lam)
        points.append(torch.stack([x, lam], 1))
    return torch.stack(points)


def main(argv=None):
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--seed", type=cli.seed, default=1, help="of the draws")
    parser.add_argument(
        "--out", type=cli.writable, default="illustration_1d/results/runs.jsonl", help="JSON-lines file for the record"
    )
    parser.add_argument("--figures", default="illustration_1d/results", metavar="DIR", help="folder of the two figures")
    args = parser.parse_args(argv)
    seed_everything(args.seed)
    start = perf_counter()

    # Figure 1. x ~ N(0, 1) anew for each draw, or where the training loss has its minimum.
    lam = LAMBDAS.expand(N_DRAWS, -1)
    estimates = {k: evograd_hypergradient(torch.randn(lam.shape), lam, k) for k in CANDIDATES}
    at_optimum = {k: evograd_hypergradient(optimum(lam), lam, k) for k in CANDIDATES}
    # Figure 2.
    trajectories = {k: trajectory(lambda x, lam, k=k: library_hypergradient(x, lam, k)) for k in CANDIDATES}
    true_trajectory = trajectory(lambda x, lam: true_hypergradient(lam))
    seconds = perf_counter() - start

    folder = Path(args.figures)
    truth, limit = true_hypergradient(LAMBDAS), mean_theory(LAMBDAS)
    plot_hypergradients(
        LAMBDAS,
        truth,
        limit,
        theory(optimum(LAMBDAS), LAMBDAS),
        estimates,
        at_optimum,
        folder / "illustration_1d_hypergradients.png",
    )
    plot_trajectories(trajectories, true_trajectory, folder / "illustration_1d_trajectories.png")

    metrics = {}
    for k in CANDIDATES:
        metrics[f"error_k{k}"] = (estimates[k].mean(0) - truth).abs().mean()
        metrics[f"std_k{k}"] = estimates[k].std(0).mean()
        metrics[f"sign_agreement_k{k}"] = 100 * (estimates[k].sign() == truth.sign()).float().mean()
        metrics[f"distance_k{k}"] = (trajectories[k][-1] - true_trajectory[-1]).norm(dim=1).mean()
    metrics["error_theory"] = (limit - truth).abs().mean()
    record = append_run(args.out, "illustration_1d", {"seed": args.seed}, metrics, {"seconds": seconds}, "cpu")
    print({name: round(value, 4) for name, value in record["metrics"].items()})


if __name__ == "__main__":
    main()
