"""The learned angle over training, from result lines: python -m rotation.plot [FILE.jsonl …] [--out-dir DIR]"""

import matplotlib.pyplot as plt

from evograd.lab import figures
from evograd.lab.figures import COLOURS, TITLES
from evograd.lab.methods import GUIDED, RANDOM

from .train import parse_args


def plot_angles(runs, path):
    """One panel for each method, one line for each seed."""
    methods = [method for method in TITLES if any(run["config"]["method"] == method for run in runs)]
    figure, axes = plt.subplots(
        1, len(methods), figsize=(2.9 * len(methods), 3.2), sharex=True, sharey=True, layout="constrained"
    )
    for axis, method in zip([axes] if len(methods) == 1 else axes, methods):
        for run in (run for run in runs if run["config"]["method"] == method):
            axis.plot(run["metrics"]["angle_steps"], run["metrics"]["angles"], color=COLOURS[method], lw=1.2, alpha=0.8)
        axis.axhline(30, color="black", ls="--", lw=1)
        axis.set_title(TITLES[method], fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("learned angle (degrees)")
    figure.axes[0].legend(figure.axes[0].lines[-1:], ["true angle"], loc="lower right", frameon=False)
    figures.save(figure, path)


def is_default(config, data):
    """Whether a run on `data` has the settings that its method has when nothing else is said."""
    default = parse_args(["--method", config["method"], "--data", data])
    names = ("data", "epochs", "batch_size", "lr", "angle_lr", *RANDOM, *GUIDED)
    return all(config.get(name) == getattr(default, name) for name in names)


def main(argv=None):
    runs, folder = figures.runs_to_plot(__doc__, "rotation", argv)
    for data in ("mnist", "digits"):
        chosen = [run for run in runs if "angles" in run["metrics"] and is_default(run["config"], data)]
        if chosen:
            plot_angles(chosen, folder / f"rotation_angle_{data}.png")


if __name__ == "__main__":
    main()
