"""The cost figures of the paper (3 to 6): memory and time of every method, measured here, beside the published ones.

    bash resources/cost.sh                             measures what is missing, then does the next
    python -m evograd.lab.cost_figures [FILE.jsonl …]  prints the ratios of EvoGrad to T1-T2, and draws the figures

A case of a figure is one record of <experiment>_paper_cost, made by <experiment>.compare --paper-cost; resources/paper_tables.json
says which cases there are, under "cost_figures". Where no time was measured FLOPs stand in its place, and are marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path

import matplotlib.pyplot as plt

from . import cli, figures
from .figures import COLOURS
from .records import read_runs
from .tables import FLOPS, cost_cases, cost_ratios, to_markdown

METHODS = ("plain", "evograd", "evograd_guided", "mixed_mode", "second_order")  # from left to right
COLOUR = {**COLOURS, "plain": COLOURS["baseline"]}


def plot_figure(spec: dict, titles: Mapping[str, str], runs: list[dict], path: Path) -> bool:
    """Memory in GB and time over that of T1–T2 of every method in every case, the paper's pale beside; whether there is a case.

    Bars, or lines over the number of parameters where the cases have one.
    """
    cases = [case for case in cost_cases(spec, runs) if case["run"]]
    if not cases:
        return False
    over_parameters = all("parameters" in case for case in cases)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    draw = _lines if over_parameters else _bars
    draw(axes[0], cases, "gb", titles)
    draw(axes[1], cases, "time", titles)
    axes[0].set_ylabel("memory (GB)")
    axes[1].set_ylabel("time / T1–T2's")
    axes[1].axhline(1, color="black", lw=0.7, ls=":")
    for axis in axes:
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
        axis.set_ylim(bottom=0)
        if over_parameters:
            axis.set_xlabel("parameters (million)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    devices = "; ".join(dict.fromkeys(case["run"]["environment"]["device"] for case in cases))
    counted = any(cost["time_is"] == FLOPS for case in cases for cost in case["ours"].values())
    remark = ". Hollow: FLOPs in place of time" if counted else ""
    figure.suptitle(f"{spec['title']}. Here: {devices}{remark}", fontsize=9, color="#444444", parse_math=False)
    figures.save(figure, path)
    return True


def _bars(axis: plt.Axes, cases: list[dict], what: str, titles: Mapping[str, str]) -> None:
    width = 0.8 / (2 * len(METHODS))
    for i, case in enumerate(cases):
        for j, method in enumerate(METHODS):
            for k, source in enumerate(("paper", "ours")):
                value = case[source].get(method, {}).get(what)
                if value is None:
                    continue
                x = i - 0.4 + (2 * j + k + 0.5) * width
                hollow = what == "time" and case[source][method]["time_is"] == FLOPS
                style = dict(fill=False, ec=COLOUR[method]) if hollow else dict(color=COLOUR[method])
                style["alpha"] = 1 if source == "ours" else 0.35
                axis.bar(x, value, width * 0.92, **style)
                axis.annotate(
                    f"{value:.2f}".rstrip("0").rstrip(".") if what == "time" else f"{value:.1f}",
                    (x, value), ha="center", va="bottom", fontsize=5.5, xytext=(0, 1), textcoords="offset points",
                )  # fmt: skip
    for method in METHODS:  # for the legend, whatever the first case has
        axis.bar(0, 0, 0, color=COLOUR[method], label=titles[method])
        if any(method in case["paper"] for case in cases):
            axis.bar(0, 0, 0, color=COLOUR[method], alpha=0.35, label=f"{titles[method]}, the paper")
    axis.set_xticks(range(len(cases)), [case["label"].replace(", ", "\n") for case in cases], fontsize=8)


def _lines(axis: plt.Axes, cases: list[dict], what: str, titles: Mapping[str, str]) -> None:
    for method in METHODS:
        for source in ("ours", "paper"):
            points = [
                (case["parameters"] / 1e6, case[source][method])
                for case in cases
                if case[source].get(method, {}).get(what) is not None
            ]
            if not points:
                continue
            own = source == "ours"
            label = titles[method] if own else f"{titles[method]}, the paper"
            x, y = [x for x, _ in points], [cost[what] for _, cost in points]
            axis.plot(x, y, color=COLOUR[method], lw=1.5, ls="-" if own else "--", alpha=1 if own else 0.6, label=label)
            for at, cost in points:
                face = "white" if what == "time" and cost["time_is"] == FLOPS else COLOUR[method]
                axis.plot(at, cost[what], "o" if own else "s", color=COLOUR[method], mfc=face, ms=5, alpha=1 if own else 0.6)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__)
    default = sorted(glob("*/results/paper_cost.jsonl"))
    parser.add_argument("results", nargs="*", default=default, help="result files; default: */results/paper_cost.jsonl")
    parser.add_argument("--tables", default="resources/paper_tables.json", help="the cases, and the published numbers")
    parser.add_argument("--out-dir", type=Path, help="folder of the figures; default: <experiment>/results")
    args = parser.parse_args(argv)
    missing = [name for name in [*args.results, args.tables] if not Path(name).is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if not args.results:
        parser.error("no result files */results/paper_cost.jsonl: bash resources/cost.sh makes them")
    spec = json.loads(Path(args.tables).read_text(encoding="utf-8"))["cost_figures"]
    runs, broken = read_runs(args.results)
    for line in broken:
        print(f"left out: {line}")
    for figure in spec["figures"]:
        folder = args.out_dir or Path(figure["experiment"]) / "results"
        path = folder / f"{figure['experiment']}_paper_cost_figure_{figure['number']}.png"
        if not plot_figure(figure, {**spec["methods"], **figure.get("methods", {})}, runs, path):
            print(f"figure {figure['number']}: no case of it in {', '.join(args.results)}")
    table = cost_ratios(spec, runs)
    print(f"\n{table.title}\n\n{to_markdown(table)}")


if __name__ == "__main__":
    main()
