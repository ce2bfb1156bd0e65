"""Figures from result lines: python -m label_noise_mwn.plot [FILE.jsonl …] [--out-dir DIR]

For each data set, of each method the settings that were run most often: test accuracy over epochs by method, one panel for each
noise; the learned weight over the loss at several epochs; the weights of clean and of noisy samples at the end of training.
"""

import statistics

import matplotlib.pyplot as plt

from evograd.lab import figures
from evograd.lab.figures import COLOURS
from evograd.lab.tables import safe_name

TITLES = {
    "cross_entropy": "cross-entropy",
    **figures.TITLES,
}
COLOUR = {**COLOURS, "cross_entropy": COLOURS["baseline"]}
LINE = ("data", "method", "noise", "noise_level")  # what tells lines and panels apart


def panels(n, width=3.0, height=3.0):
    figure, axes = plt.subplots(
        1, n, figsize=(max(width * n, 4.5), height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def noise_of(config):
    level = "" if config["noise_level"] is None else f" {100 * config['noise_level']:.0f} %"
    return f"{config['noise']}{level}"


def method_of(config):
    return TITLES[config["method"]]


def label_of(config):
    return f"{method_of(config)}, {noise_of(config)}"


def add_legend(figure, axes, ncols):
    """Of every line once, wherever it is drawn."""
    shown = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def plot_accuracy(runs, path, every):
    """One panel for each noise, one line for each method: mean over seeds, with mean ± standard deviation as a band.

    every: the runs that the figure could show.
    """
    noises = list(dict.fromkeys(noise_of(run["config"]) for run in runs))
    figure, axes = panels(len(noises))
    for axis, noise in zip(axes, noises):
        for method, title in TITLES.items():
            mine = [r["metrics"] for r in runs if r["config"]["method"] == method and noise_of(r["config"]) == noise]
            if not mine:
                continue
            values = enumerate(zip(*(metrics["test_accuracy"] for metrics in mine)), start=1)
            epochs, values = zip(*((epoch, v) for epoch, v in values if None not in v))  # with --eval-every not all have one
            mean = [statistics.fmean(v) for v in values]
            axis.plot(epochs, mean, color=COLOUR[method], marker="o" if len(epochs) == 1 else "", lw=1.5, label=title)
            if len(mine) > 1:
                spread = [statistics.stdev(v) for v in values]
                axis.fill_between(
                    epochs,
                    [m - s for m, s in zip(mean, spread)],
                    [m + s for m, s in zip(mean, spread)],
                    color=COLOUR[method],
                    alpha=0.15,
                    lw=0,
                )
        axis.set_title(f"{noise} noise", fontsize=10)
        figures.over_epochs(axis)
    axes[0].set_ylabel("test accuracy (%)")
    add_legend(figure, axes, ncols=5 if len(axes) > 2 else len(axes) + 1)
    figures.heading(figure, runs[0]["config"]["data"], every, runs, LINE, (method_of, label_of))
    figures.save(figure, path)


def head(figure, runs, every):
    """The title of a figure of one run of each method."""
    config = runs[0]["config"]
    seeds = dict.fromkeys(str(run["config"]["seed"]) for run in runs)
    title = f"{config['data']}, {noise_of(config)} noise, seed {', '.join(seeds)}"
    figures.heading(figure, title, every, runs, LINE, (method_of,))


def plot_weights(runs, path, every):
    """One panel for each method (its first seed at the highest noise): weight over loss, one curve for each recorded epoch."""
    figure, axes = panels(len(runs))
    for axis, run in zip(axes, runs):
        metrics = run["metrics"]
        curves = metrics["weight_curves"]
        for i, (epoch, curve) in enumerate(curves.items()):
            shade = plt.get_cmap("viridis_r")(0.1 + 0.9 * i / max(1, len(curves) - 1))
            axis.plot(metrics["weight_losses"], curve, color=shade, lw=1.5, label=f"epoch {epoch}" if int(epoch) else "start")
        axis.set_title(TITLES[run["config"]["method"]], fontsize=10)
        axis.set_xlabel("loss of the sample")
        axis.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("learned weight")
    add_legend(figure, axes, ncols=6 if len(axes) > 1 else 3)
    head(figure, runs, every)
    figures.save(figure, path)


def plot_histograms(runs, path, every):
    """One panel for each method (its first seed at the highest noise): shares of clean and of noisy samples by weight."""
    figure, axes = panels(len(runs))
    for axis, run in zip(axes, runs):
        for part, colour in (("clean", "#0072B2"), ("noisy", "#D55E00")):
            counts = run["metrics"][f"weights_{part}"]
            edges = [i / len(counts) for i in range(len(counts) + 1)]
            shares = [100 * count / max(1, sum(counts)) for count in counts]
            axis.stairs(shares, edges, color=colour, fill=True, alpha=0.45, label=f"{part} labels")
            axis.stairs(shares, edges, color=colour, lw=1)
        auc = run["metrics"]["weight_auc"]
        axis.set_title(TITLES[run["config"]["method"]] + ("" if auc is None else f"\nAUC {auc:.2f}"), fontsize=10)
        axis.set_xlabel("learned weight")
    axes[0].set_ylabel("samples (%)")
    add_legend(figure, axes, ncols=2)
    head(figure, runs, every)
    figures.save(figure, path)


def main(argv=None):
    every, folder = figures.runs_to_plot(__doc__, "label_noise_mwn", argv)
    every = [run for run in every if run["config"]["method"] in TITLES]
    runs = figures.usual_settings(every, LINE)
    runs.sort(key=lambda run: (run["config"]["noise"], run["config"]["noise_level"] or 0, run["config"]["seed"]))
    for data in dict.fromkeys(run["config"]["data"] for run in runs):
        mine, could = ([run for run in some if run["config"]["data"] == data] for some in (runs, every))
        name = safe_name(data)
        plot_accuracy(mine, folder / f"label_noise_mwn_accuracy_{name}.png", could)
        last = noise_of(mine[-1]["config"])
        with_weights = [run for run in mine if "weight_curves" in run["metrics"] and noise_of(run["config"]) == last]
        first = {run["config"]["method"]: run for run in reversed(with_weights)}  # of each method, the first seed
        chosen = [first[method] for method in TITLES if method in first]
        if chosen:
            seeds = {run["config"]["seed"] for run in chosen}
            could = [run for run in could if "weight_curves" in run["metrics"] and noise_of(run["config"]) == last]
            could = [run for run in could if run["config"]["seed"] in seeds]
            plot_weights(chosen, folder / f"label_noise_mwn_weights_{name}.png", could)
            chosen = [run for run in chosen if run["metrics"]["weights_clean"]]  # where the true labels are known
        if chosen:
            plot_histograms(chosen, folder / f"label_noise_mwn_histograms_{name}.png", could)


if __name__ == "__main__":
    main()
