"""The two figures of the one-dimensional illustration."""

import matplotlib.pyplot as plt

from evograd.lab import figures
from evograd.lab.figures import COLOURS


def plot_hypergradients(lam, truth, limit, limit_at_optimum, estimates, at_optimum, path):
    """One panel for each K: mean ± standard deviation over draws, at random x (above) and at x*(λ) (below)."""
    rows = [("x ~ N(0, 1)", estimates, limit), ("x = x*(λ)", at_optimum, limit_at_optimum)]
    figure, axes = plt.subplots(2, len(estimates), figsize=(10, 6), sharex=True, sharey="row", layout="constrained")
    for row, (where, values, theory) in zip(axes, rows):
        for axis, (k, draws) in zip(row, values.items()):
            mean, std = draws.mean(0), draws.std(0)
            axis.plot(lam, truth, color="black", label="true hypergradient")
            axis.plot(lam, mean, color=COLOURS["evograd"], label="EvoGrad, mean of 100 draws")
            axis.fill_between(
                lam, mean - std, mean + std, color=COLOURS["evograd"], alpha=0.25, lw=0, label="± standard deviation"
            )
            axis.plot(lam, theory, "--", color=COLOURS["theory"], label="theory, K → ∞")
            axis.set_title(f"K = {k}, {where}", fontsize=10)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(r"$d\ell_V/d\lambda$")
    for axis in axes[1]:
        axis.set_xlabel("hyperparameter λ")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figures.save(figure, path)


def plot_trajectories(trajectories, truth, path):
    """One panel for each K: five steps from each start, under EvoGrad's hypergradient and under the true one."""
    figure, axes = plt.subplots(1, len(trajectories), figsize=(10, 3.8), sharex=True, sharey=True, layout="constrained")
    for axis, (k, points) in zip(axes, trajectories.items()):
        for i in range(points.shape[1]):
            axis.plot(*truth[:, i].T, "o-", color="black", ms=3, lw=1, label="true hypergradient" if i == 0 else None)
            axis.plot(*points[:, i].T, "s--", color=COLOURS["evograd"], ms=3, lw=1.2, label="EvoGrad" if i == 0 else None)
            axis.plot(*points[0, i], "o", color="white", mec="black", ms=7, zorder=3, label="start" if i == 0 else None)
        axis.plot(0.5, 1, "*", color=COLOURS["theory"], ms=14, label="optimum (0.5, 1)")
        axis.set_title(f"K = {k}", fontsize=10)
        axis.set_xlabel("parameter x")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("hyperparameter λ")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figures.save(figure, path)
