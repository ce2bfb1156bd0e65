"""What the figures of all experiments share: colours, names, the command line of a plot.py, and how a figure is written."""

import argparse
import json
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .records import read_runs

# Colours that colour-blind readers can tell apart (Okabe and Ito), the same in every figure.
COLOURS = {
    "evograd": "#0072B2",
    "evograd_guided": "#E69F00",
    "mixed_mode": "#009E73",
    "second_order": "#CC79A7",
    "baseline": "#666666",
    "theory": "#D55E00",
}
TITLES = {
    "evograd": "EvoGrad",
    "evograd_guided": "EvoGrad, guided",
    "mixed_mode": "mixed mode",
    "second_order": "T1–T2 (higher)",
}


def runs_to_plot(
    description: str, experiment: str, argv: Sequence[str] | None, further: Sequence[str] = ()
) -> tuple[list[dict], Path]:
    """(the experiment's runs from the result files that the command line names, folder of the figures).

    further: other kinds of records that are wanted as well, such as <experiment>_scale.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = f"{experiment}/results"
    parser.add_argument("results", nargs="*", default=sorted(glob(f"{results}/*.jsonl")), help="result files")
    parser.add_argument("--out-dir", type=Path, default=Path(results), help="folder of the figures")
    args = parser.parse_args(argv)
    missing = [name for name in args.results if not Path(name).is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if not args.results:
        parser.error(f"no result files in {results}: run the experiment first, or name the files")
    runs, broken = read_runs(args.results)
    for line in broken:
        print(f"left out: {line}")
    return [run for run in runs if run["experiment"] in (experiment, *further)], args.out_dir


def usual_settings(runs: list[dict], names: Sequence[str]) -> list[dict]:
    """For each value of the settings `names`: its runs that differ in nothing but the seed, of the settings that were run most
    often, the last of equals. So that a line in a figure is of one configuration."""
    groups = {}
    for run in runs:
        group = groups.setdefault(tuple(run["config"][name] for name in names), {})
        settings = json.dumps({k: v for k, v in run["config"].items() if k != "seed"}, sort_keys=True)
        group.setdefault(settings, []).append(run)
    return [run for group in groups.values() for run in max(reversed(group.values()), key=len)]


def save(figure: plt.Figure, path: Path, remark: str = "") -> None:
    """Write a figure as PNG, free it, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}{remark}")
