"""The cost figures of the paper (3 to 6): memory and time of every method, measured here, beside the published ones.

    bash resources/cost.sh                             measures what is missing, then does the next
    python -m evograd.lab.cost_figures [FILE.jsonl …]  prints the ratios of EvoGrad to T1-T2, and draws the figures

A case of a figure is one record of <experiment>_paper_cost, made by <experiment>.compare --paper-cost; the cases that there are
stand in resources/paper_tables.json, under "cost_figures". FLOPs in place of a time that was not measured are marked.
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
from .tables import FLOPS, cost_cases, cost_ratios, devices, to_markdown

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
    below = len(cases) > 2 and not over_parameters  # bars of many cases want the whole width
    shape, size = ((2, 1), (9.5, 7.6)) if below else ((1, 2), (9.5, 4.2))
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
    draw = _lines if over_parameters else _bars
    draw(axes[0], cases, "gb", titles)
    draw(axes[1], cases, "time", titles)
    axes[0].set_ylabel("memory (GB)")
    axes[1].set_ylabel("time / T1–T2's")
    axes[1].axhline(1, color="black", lw=0.7, ls=":")
    if "card_gb" in spec:
        axes[0].axhline(spec["card_gb"], color="black", lw=0.9, ls="--")
        axes[0].annotate("the paper's card", (0, spec["card_gb"]), xytext=(0, 2), textcoords="offset points", fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
        axis.set_ylim(bottom=0)
        if over_parameters:
            axis.set_xlabel("parameters (million)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    counted = any(cost["time_is"] == FLOPS for case in cases for cost in case["ours"].values())
    remark = ". Hollow: FLOPs in place of time" if counted else ""
    title = f"{spec['title']}. Here: {devices(case['run'] for case in cases)}{remark}"
    figure.suptitle(title, fontsize=9, color="#444444", parse_math=False)
    figures.save(figure, path)
    return True


def _bars(axis: plt.Axes, cases: list[dict], what: str, titles: Mapping[str, str]) -> None:
    """A group of bars for each case; a place in the group for what one of the cases has."""
    places = [(m, source) for m in METHODS for source in ("paper", "ours") if any(m in case[source] for case in cases)]
    width = 0.86 / len(places)
    for j, (method, source) in enumerate(places):
        faint = {"alpha": 1 if source == "ours" else 0.35}
        axis.bar(0, 0, 0, color=COLOUR[method], label=_label(titles[method], source), **faint)  # for the legend
        for i, case in enumerate(cases):
            cost = case[source].get(method)
            if cost is None or cost[what] is None:
                continue
            x, hollow = i - 0.43 + (j + 0.5) * width, what == "time" and cost["time_is"] == FLOPS
            style = dict(fill=False, ec=COLOUR[method]) if hollow else dict(color=COLOUR[method])
            axis.bar(x, cost[what], width * 0.9, **style, **faint)
            if what == "time" and method == "second_order":
                continue  # it is 1
            text = f"{cost[what]:.2f}" if what == "time" or cost[what] < 1 else f"{cost[what]:.1f}"
            place = dict(ha="center", va="bottom", xytext=(0, 1), textcoords="offset points")
            axis.annotate(text, (x, cost[what]), fontsize=6, **place)
    axis.set_xticks(range(len(cases)), [case["label"].replace(", ", "\n") for case in cases], fontsize=8)


def _lines(axis: plt.Axes, cases: list[dict], what: str, titles: Mapping[str, str]) -> None:
    """A line over the number of parameters for each method; a line of times and one of FLOPs are not joined."""
    for method in METHODS:
        for source in ("ours", "paper"):
            own = source == "ours"
            style = dict(color=COLOUR[method], lw=1.5, ms=5, alpha=1 if own else 0.6, ls="-" if own else "--")
            style["marker"] = "o" if own else "s"
            kinds = ("time", FLOPS) if what == "time" else (None,)
            for kind in kinds:
                points = [(case["parameters"] / 1e6, case[source].get(method)) for case in cases]
                points = [(x, cost[what]) for x, cost in points if cost and kind in (None, cost["time_is"])]
                if points:
                    face = "white" if kind == FLOPS else COLOUR[method]
                    axis.plot(*zip(*points), mfc=face, label=_label(titles[method], source), **style)


def _label(title: str, source: str) -> str:
    return title if source == "ours" else f"{title}, the paper"


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
