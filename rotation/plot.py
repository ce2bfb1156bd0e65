"""The learned angle over training, from result lines: python -m rotation.plot [FILE.jsonl …] [--out-dir DIR]

For each data set: the runs of default settings, and, in a figure of their own, those of other settings.
"""

import functools
import textwrap

import matplotlib.pyplot as plt

from evograd.lab import cli, figures
from evograd.lab.figures import COLOURS, TITLES
from evograd.lab.records import plain
from evograd.lab.tables import named, safe_name

from .data import DATASETS
from .train import METHODS, parse_args


def plot_angles(runs, path, title, every, label):
    """One panel for each method, one line for each seed.  every: the runs that the figure could show.  label: of a panel."""
    methods = [method for method in TITLES if any(run["config"]["method"] == method for run in runs)]
    figure, axes = plt.subplots(
        1, len(methods), figsize=(max(2.9 * len(methods), 4), 3.4), sharex=True, sharey=True, layout="constrained"
    )
    for axis, method in zip([axes] if len(methods) == 1 else axes, methods):
        mine = [run for run in runs if run["config"]["method"] == method]
        for run in mine:
            axis.plot(run["metrics"]["angle_steps"], run["metrics"]["angles"], color=COLOURS[method], lw=1.2, alpha=0.8)
        axis.axhline(30, color="black", ls="--", lw=1)
        axis.set_title(textwrap.fill(label(mine[0]["config"]), 40), fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("learned angle (degrees)")
    figure.axes[0].legend(figure.axes[0].lines[-1:], ["true angle"], loc="lower right", frameon=False)
    figures.heading(figure, title, every, runs, ("method",))
    figures.save(figure, path)


@functools.cache
def defaults(method, data):
    """The configuration that a run of the method on the data has when nothing else is said. No device is touched for it."""
    return plain(cli.config_of(parse_args(["--method", method, "--data", data, "--device", "cpu"])))


def changed(config):
    """{setting: value} of what a configuration has otherwise than by default; the device does not count."""
    if config["method"] not in METHODS or config["data"] not in DATASETS:
        return config
    default = defaults(config["method"], config["data"])
    names = [name for name in {**default, **config} if name not in ("seed", "device")]
    return {name: config.get(name) for name in names if config.get(name) != default.get(name)}


def changed_label(config):
    words = named(changed(config))
    return TITLES[config["method"]] + (f", {words}" if words else "")


def main(argv=None):
    runs, folder = figures.runs_to_plot(__doc__, "rotation", argv)
    learned = [run for run in runs if "angles" in run["metrics"] and run["config"]["method"] in TITLES]
    for data in dict.fromkeys(run["config"]["data"] for run in learned):
        mine = [run for run in learned if run["config"]["data"] == data]
        by_default = [run for run in mine if not changed(run["config"])]
        other = [run for run in mine if changed(run["config"])]
        for every, title, name in ((by_default, "default settings", ""), (other, "other settings than the default", "_other")):
            chosen = figures.usual_settings(every, ("method",))
            if chosen:
                label = changed_label if name else lambda config: TITLES[config["method"]]
                path = folder / f"rotation_angle_{safe_name(data)}{name}.png"
                plot_angles(chosen, path, f"{data}, {title}", every, label)


if __name__ == "__main__":
    main()
