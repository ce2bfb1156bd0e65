"""Dev F1 over training, and the gates of the RTN, from result lines: python -m metaxl.plot [FILE.jsonl …] [--out-dir DIR]"""

from collections import defaultdict

import matplotlib.pyplot as plt

from evograd.lab import figures
from evograd.lab.figures import COLOURS
from evograd.lab.records import mean_std
from evograd.lab.tables import safe_name

TITLES = {
    "target_only": "target only",
    "joint_training": "joint training",
    **figures.TITLES,
}
LINE = ("data", "source", "target", "method")  # what tells lines and panels apart
LINES = {**COLOURS, "joint_training": COLOURS["baseline"], "target_only": COLOURS["theory"]}


def languages_of(config):
    return f"{config['source']} → {config['target']}"


def head(figure, languages):
    """The figure's title, of what its lines leave out and of settings in which they differ."""
    every = [run for runs in languages.values() for run in runs]
    shown = [run for runs in languages.values() for group in seeds_of_methods(runs).values() for run in group]
    method_of = lambda config: TITLES[config["method"]]
    label_of = lambda config: f"{method_of(config)}, {languages_of(config)}"
    figures.heading(figure, every[0]["config"]["data"], every, shown, LINE, (method_of, languages_of, label_of))


def seeds_of_methods(runs):
    """{method: its runs of one configuration}."""
    runs = figures.usual_settings(runs, ("method",))
    groups = {method: [run for run in runs if run["config"]["method"] == method] for method in TITLES}
    return {method: group for method, group in groups.items() if group}


def plot_dev_f1(languages, path):
    """One panel for each target language, one line for each method: mean and standard deviation over seeds."""
    figure, axes = plt.subplots(1, len(languages), figsize=(1 + 3.4 * len(languages), 3.6), layout="constrained", squeeze=False)
    for axis, (language, runs) in zip(axes[0], languages.items()):
        for method, group in seeds_of_methods(runs).items():
            epochs = enumerate(zip(*(run["metrics"]["dev_f1_epochs"] for run in group)), start=1)
            x, epochs = zip(*((epoch, values) for epoch, values in epochs if None not in values))  # with --eval-every not all
            means, stds, _ = zip(*(mean_std(values) for values in epochs))
            axis.plot(x, means, color=LINES[method], marker="o", ms=3, lw=1.4, label=f"{TITLES[method]} (n = {len(group)})")
            if stds[0] is not None:
                low, high = ([m + sign * s for m, s in zip(means, stds)] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=LINES[method], alpha=0.12, lw=0)
        axis.set_title(figures.literal(language), fontsize=10)
        figures.over_epochs(axis)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("dev F1 (%)")
    head(figure, languages)
    figures.save(figure, path)


def plot_gates(languages, path):
    """One panel for each pair of languages: the gate's mean by layer, a bar for each method and language."""
    figure, axes = plt.subplots(
        1, len(languages), figsize=(1 + 3.4 * len(languages), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (language, runs) in zip(axes[0], languages.items()):
        bars = {}  # (method, source or target) -> {layer: values of the runs}
        for method, group in seeds_of_methods(runs).items():
            for run in group:
                for side in ("source", "target"):
                    for layer, gate in run["metrics"]["gates"][run["config"][side]].items():
                        bars.setdefault((method, side), defaultdict(list))[layer].append(gate)
        layers = sorted({layer for values in bars.values() for layer in values}, key=int)
        width = 0.8 / len(bars)
        for i, ((method, side), values) in enumerate(bars.items()):
            x = [layers.index(layer) + (i - (len(bars) - 1) / 2) * width for layer in values]
            means, stds, _ = zip(*(mean_std(gates) for gates in values.values()))
            name = runs[0]["config"][side]
            axis.bar(
                x, means, width, yerr=[s or 0 for s in stds], color=LINES[method], alpha=1 if side == "source" else 0.45,
                error_kw={"lw": 0.8}, label=f"{TITLES[method]}, {figures.literal(name)}",
            )  # fmt: skip
        axis.axhline(0.5, color="black", ls="--", lw=0.8)
        axis.set_xticks(range(len(layers)), layers)
        axis.set_xlabel("RTN after layer")
        axis.set_title(figures.literal(language), fontsize=10)
        axis.set_ylim(0, 1.4)  # room for the legend
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.legend(fontsize=6, ncols=2, loc="upper center")
    axes[0][0].set_ylabel("mean of the gate, sigmoid(g)")
    head(figure, languages)
    figures.save(figure, path)


def main(argv=None):
    runs, folder = figures.runs_to_plot(__doc__, "metaxl", argv)
    by_data = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["config"]["method"] in TITLES:
            by_data[run["config"]["data"]][languages_of(run["config"])].append(run)
    for data, languages in by_data.items():
        learned = {name: [run for run in runs if "gates" in run["metrics"]] for name, runs in languages.items()}
        learned = {name: runs for name, runs in learned.items() if runs}
        for figure, plot, chosen in (("dev_f1", plot_dev_f1, languages), ("gates", plot_gates, learned)):
            if chosen:
                plot(chosen, folder / f"metaxl_{figure}_{safe_name(data)}.png")


if __name__ == "__main__":
    main()
