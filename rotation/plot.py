"""The learned angle over training, from result lines: python -m rotation.plot [FILE.jsonl …] [--out-dir DIR]"""

import argparse
from glob import glob
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evograd.records import read_runs
from evograd.report import COLOURS

from .train import CANDIDATES, parse_args

TITLES = {
    "evograd": "EvoGrad",
    "evograd_guided": "EvoGrad, guided",
    "mixed_mode": "mixed mode",
    "second_order": "T1–T2 (higher)",
}


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
    figure.savefig(path, dpi=130)
    plt.close(figure)


def is_default(config, data):
    """Whether a run on `data` has the settings that its method has when nothing else is said."""
    default = parse_args(["--method", config["method"], "--data", data])
    names = ("data", "epochs", "batch_size", "lr", "angle_lr", *CANDIDATES)
    return all(config[name] == getattr(default, name) for name in names)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", default=sorted(glob("rotation/results/*.jsonl")), help="result files")
    parser.add_argument("--out-dir", default="rotation/results", help="folder of the figures")
    args = parser.parse_args(argv)
    missing = [name for name in args.results if not Path(name).is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if not args.results:
        parser.error("no result files in rotation/results: run the experiment first, or name the files")
    runs, broken = read_runs(args.results)
    for line in broken:
        print(f"left out: {line}")
    for data in ("mnist", "digits"):
        chosen = [
            run
            for run in runs
            if run["experiment"] == "rotation" and "angles" in run["metrics"] and is_default(run["config"], data)
        ]
        if chosen:
            path = Path(args.out_dir) / f"rotation_angle_{data}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            plot_angles(chosen, path)
            print(f"figure: {path}")


if __name__ == "__main__":
    main()
