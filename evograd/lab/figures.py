"""What the figures of all experiments share: colours, names, the command line of a plot.py, and how a figure is written.

    python -m evograd.lab.figures [FILE.jsonl …]    resources/quality.png, every estimate's quality over FLOPs and over time;
                                                    resources/cover.png, the README's first figure, over time and memory,
                                                    from evograd.compare's outputs in resources/comparisons.md
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from . import cli
from .records import FINGERPRINTS, by_configuration, read_runs, settings_key
from .tables import OF_LEARNING, OF_METHOD, differences, named

# Colours that colour-blind readers can tell apart (Okabe and Ito), the same in every figure.
COLOURS = {
    "evograd": "#0072B2",
    "evograd_guided": "#E69F00",
    "mixed_mode": "#009E73",
    "second_order": "#CC79A7",
    "second_order_functional": "#CC79A7",
    "finite_difference": "#56B4E9",
    "neumann": "#B8A800",
    "conjugate_gradient": "#000000",
    "trajectory": "#882255",
    "baseline": "#666666",
    "theory": "#D55E00",
}
TITLES = {
    "evograd": "EvoGrad",
    "evograd_guided": "EvoGrad, guided",
    "mixed_mode": "mixed mode",
    "second_order": "T1–T2 (higher)",
    "second_order_functional": "T1–T2 (functional)",
    "finite_difference": "finite differences",
    "neumann": "Neumann series",
    "conjugate_gradient": "conjugate gradients",
    "trajectory": "trajectory",
}


def over_epochs(axis) -> None:
    """An axis of whole epochs, be it of one alone."""
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    left, right = axis.get_xlim()
    if right - left < 1:
        middle = round((left + right) / 2)
        axis.set_xlim(middle - 0.5, middle + 0.5)


def runs_to_plot(
    description: str, experiment: str, argv: Sequence[str] | None, further: Sequence[str] = ()
) -> tuple[list[dict], Path]:
    """(the experiment's runs from the result files that the command line names, folder of the figures).

    further: other kinds of records that are wanted as well, such as <experiment>_scale.
    """
    parser = cli.Parser(description=description)
    results = f"{experiment}/results"
    # Runs that were made to compare estimates have settings of their own: resources/quality.png shows them.
    default = sorted(set(glob(f"{results}/*.jsonl")) - {f"{results}/quality.jsonl"})
    parser.add_argument("results", nargs="*", default=default, help="result files")
    parser.add_argument("--out-dir", type=Path, default=Path(results), help="folder of the figures")
    args = parser.parse_args(argv)
    cli.check_files(parser, args.results)
    if not args.results:
        parser.error(f"no result files in {results}: run the experiment first, or name the files")
    runs, broken = read_runs(args.results)
    for line in broken:
        print(f"left out: {line}")
    runs = [run for run in runs if run["experiment"] in (experiment, *further)]
    if not runs:
        print(f"no run of {experiment} in {', '.join(map(str, args.results))}: no figure")
    return runs, args.out_dir


def usual_settings(runs: list[dict], names: Sequence[str]) -> list[dict]:
    """For each value of the settings `names`: its runs that differ in nothing but the seed, of the settings that were run most
    often; of equals those that more runs of the other methods have, then the last. So that a line in a figure is of one
    configuration."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run["config"][name] for name in names), []).append(run)
    # Without what is the method's own. `names` but the method stay: runs of other data have no say.
    common = lambda run: settings_key(run["config"], without=("seed", "method", *FINGERPRINTS, *OF_METHOD, *OF_LEARNING))
    support = Counter(map(common, runs))
    size = lambda group: (len(group), support[common(group[0])])
    return [run for group in groups.values() for run in max(reversed(by_configuration(group)), key=size)]


def heading(
    figure: plt.Figure,
    title: str,
    runs: list[dict],
    shown: list[dict],
    line: Sequence[str],
    labels: Sequence[Callable[[dict], str]] = (),
) -> None:
    """Above a figure: its title, in what its lines differ that their names do not say, and which of `runs` are not `shown`.

    line: the settings that tell lines and panels apart.
    labels: what a line of that configuration is called, the last one telling it from all others; those before it are taken
    where what is said goes for all lines that they name. Without any no difference is named.
    """
    sentences = [title]
    words = [named(own) for own in differences([run["config"] for run in shown], line)[0]]
    for settings in dict.fromkeys(word for word in words if word and labels):
        names = {}
        for run in (run for run, word in zip(shown, words) if word == settings):
            for label in labels:
                alike = {word for other, word in zip(shown, words) if label(other["config"]) == label(run["config"])}
                if label is labels[-1] or alike == {settings}:
                    names[label(run["config"])] = None
                    break
        some = list(names)[:3] + [f"{len(names) - 3} more"] * (len(names) > 3)
        sentences.append(f"{'; '.join(some)}: {settings}")
    of_line = lambda run: settings_key({name: run["config"].get(name) for name in line})
    there, known = {of_line(run): run["config"] for run in shown}, {id(run) for run in shown}
    left, other = [run for run in runs if id(run) not in known], {}
    for run in left:  # what they have otherwise than those shown in their place
        config, instead = run["config"], there.get(of_line(run), run["config"])
        other |= {name: None for name in {**config, **instead} if name != "seed" and config.get(name) != instead.get(name)}
    if left:
        what = f"with other {', '.join(other)}" if other else "of other settings"
        sentences.append(f"Not shown: {len(left)} run{'s' * (len(left) > 1)} {what}")
    text = textwrap.fill(". ".join(sentences), max(40, int(17 * figure.get_figwidth())))
    figure.suptitle(text, fontsize=8, color="#444444", parse_math=False)


def literal(text: str) -> str:
    """A name as it stands, where matplotlib would read $…$ as a formula."""
    return text.replace("$", r"\$")


def save(figure: plt.Figure, path: Path, remark: str = "", dpi: int = 130) -> None:
    """Write a figure as PNG, free it, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(f"figure: {path}{remark}")


# {name of an estimate in evograd/comparison.py: (label, method whose colour it has, marker)}
ESTIMATES = {
    "evograd_k2": ("EvoGrad, K = 2", "evograd", "o"),
    "evograd_k10": ("EvoGrad, K = 10", "evograd", "s"),
    "evograd_k50": ("EvoGrad, K = 50", "evograd", "D"),
    "evograd_k50_common": ("EvoGrad, K = 50, common random numbers", "theory", "D"),
    "guided": ("guided, gradient at θ", "evograd_guided", "^"),
    "guided_sgd": ("guided, after an SGD step", "evograd_guided", "v"),
    "guided_sgd_own_kinks": ("guided, after an SGD step, kinks not shared", "evograd_guided", "<"),
    "guided_made": ("guided, after the step made", "evograd_guided", "P"),
    "mixed_sgd": ("mixed mode, after an SGD step", "mixed_mode", "v"),
    "mixed_made": ("mixed mode, after the step made", "mixed_mode", "P"),
    "finite_difference": ("finite differences (DARTS)", "baseline", "X"),
    "neumann": ("Neumann series, 5 terms", "baseline", "<"),
    "conjugate_gradient": ("conjugate gradients, 5 iterations", "baseline", ">"),
}


def plot_quality(runs: list[dict], path: Path) -> None:
    """Mean cosine to exact T1–T2 over what one hypergradient costs, T1–T2 being 1: a column of panels for each experiment,
    over FLOPs and over time."""
    figure, axes = plt.subplots(
        2, len(runs), figsize=(3.1 * len(runs), 7.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, (cost, title) in enumerate({"quality_flops": "FLOPs / T1–T2", "quality_seconds": "time / T1–T2"}.items()):
        for axis, run in zip(axes[row], runs):
            metrics = run["metrics"]
            for name, (label, method, marker) in ESTIMATES.items():
                if name not in metrics[cost]:
                    continue
                x, colour = metrics[cost][name] / metrics[cost]["exact"], COLOURS[method]
                axis.plot(x, metrics["cosine"][name], marker, color=colour, ms=7, alpha=0.85, mec="white", label=label, ls="")
            axis.plot(1, 1, "*", color=COLOURS["second_order"], ms=13, mec="white", label="exact T1–T2 (higher)", ls="")
            axis.axhline(0, color="black", lw=0.7)
            axis.set_xscale("log")
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(title)
            axis.grid(alpha=0.3)
        axes[row, 0].set_ylabel("cosine to exact T1–T2")
    for axis, run in zip(axes[0], runs):
        axis.set_title(literal(f"{run['experiment']}, {run['config']['data']}"), fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)


# The README's first figure: {name of an estimator in evograd.compare's output: (label, method whose colour it has, marker, its
# size, whether it is hollow)}, from the lowest to the topmost, since many lie on each other.
COVER = {
    "T1–T2": ("T1–T2, by double backward", "second_order", "*", 17, False),
    "Neumann series": ("Neumann series", "baseline", "X", 7, False),
    "EvoGrad, K = 2": ("EvoGrad, K = 2", "evograd", "o", 8, False),
    "EvoGrad, K = 10": ("EvoGrad, K = 10", "evograd", "s", 8, False),
    "mixed mode": ("mixed mode", "mixed_mode", "D", 10.5, True),
    "guided": ("guided", "evograd_guided", "^", 8, False),
}
PROBLEMS = {"resnet32": "ResNet-32, weights of samples", "lora": "BERT with LoRA, weights of samples"}


def compared(text: str, problem: str) -> dict[str, dict[str, float]]:
    """{estimator: {cosine, time, memory}} of evograd.compare's output between <!-- compare:PROBLEM --> and its end."""
    lines = text.split(f"<!-- compare:{problem} -->")[1].split("<!-- /compare -->")[0].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("estimator "))
    cells = [re.split(r" {2,}", line) for line in lines[start:]]
    header, *rows = cells[: cells.index([""])]
    return {name: {h: float(v) for h, v in zip(header[1:-1], values)} for name, *values in rows}


def plot_cover(text: str, path: Path) -> None:
    """Cosine to T1–T2 over time and over memory, in two panels beside each other for each problem. Shown at 800 pixels."""
    figure = plt.figure(figsize=(8, 3.5), layout="constrained")
    for part, (problem, title) in zip(figure.subfigures(1, len(PROBLEMS)), PROBLEMS.items()):
        found, axes = compared(text, problem), part.subplots(1, 2, sharey=True)
        for axis, what in zip(axes, ("time", "memory")):
            axis.axhline(0, color="black", lw=0.7)
            for name, (label, method, marker, size, hollow) in COVER.items():
                colour = COLOURS[method]
                look = dict(mfc="none", mec=colour, mew=1.8) if hollow else dict(mfc=colour, mec="white")
                axis.plot(found[name][what], found[name]["cosine"], marker, ms=size, label=label, ls="", clip_on=False, **look)
            top = max(found[name][what] for name in COVER)
            axis.set_xscale("log", base=2)
            axis.set_xlim(0.8, 20 if top > 4 else 4)
            axis.set_ylim(-0.05, 1.13)
            axis.xaxis.set_major_locator(LogLocator(base=2, numticks=99))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel(f"{what} / plain step's", fontsize=10)
            axis.tick_params(labelsize=10)
            axis.grid(alpha=0.3)
        part.suptitle(title, fontsize=11)
        axes[0].set_ylabel("cosine to T1–T2", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    save(figure, path, dpi=200)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("results", nargs="*", default=sorted(glob("*/results/quality.jsonl")), help="result files")
    comparisons = Path("resources/comparisons.md")
    parser.add_argument("--comparisons", type=Path, default=comparisons, help="what cover.png is drawn from")
    parser.add_argument("--out", type=Path, default=Path("resources/quality.png"), help="the figure; cover.png beside it")
    args = parser.parse_args(argv)
    cli.check_files(parser, args.results)
    runs = [run for run in read_runs(args.results)[0] if run["metrics"].get("quality_seconds")] if args.results else []
    if not runs:
        parser.error(f"no run with --log-quality in {', '.join(args.results) or '*/results/quality.jsonl'}; make some first")
    plot_quality(runs, args.out)
    plot_cover(args.comparisons.read_text(encoding="utf-8"), args.out.with_name("cover.png"))


if __name__ == "__main__":
    main()
