"""What more steps do for the worked examples: the tables of resources/horizon.md, and resources/horizon.png.

    bash resources/examples/horizon.sh        the result lines, in resources/horizon.jsonl: one and a half hours on one core
    python -m resources.horizon               the tables and the figure from them

What was run before Trajectory was there, of the same settings, is taken from resources/results/examples.jsonl.
"""

import argparse
import math
from pathlib import Path

from evograd.lab.figures import COLOURS, plt, save
from evograd.lab.records import mean_std, read_runs
from evograd.lab.tables import write_between_markers

ROOT = Path(__file__).parent
LINES = (ROOT / "results" / "examples.jsonl", ROOT / "horizon.jsonl")
HORIZONS = (1, 5, 20, 50)
THROUGH = {f"N = {n}": f"Trajectory, N = {n}" for n in HORIZONS}
AUGMENTATION = {
    "no augmentation": "no augmentation",
    "random search": "random search, best of eight trainings",
    "learned": "guided, one step ahead",
    **THROUGH,
    "the true conditions": "strengths of the test images",
}
MIXTURE = {"uniform": "uniform", "learned": "guided, one SGD step ahead", **THROUGH}
CLASSES = {
    "uniform": "uniform",
    "grid search": "grid search over γ, best of eight trainings",
    "learned": "guided, one step ahead",
    **THROUGH,
}
DRIVING = {  # of the weights of classes, through 20 steps
    "as above: λ's learning rate 0.02 √20 = 0.09": {},
    "λ's learning rate 0.02": dict(meta_lr=0.02),
    "λ's learning rate 0.4": dict(meta_lr=0.4),
    "0.1 times the entropy of the weights is added": dict(entropy=0.1),
    "no weight below 0.1": dict(floor=0.1),
    "no weight below 0.3": dict(floor=0.3),
}
OF_STRENGTHS = {
    "0.02": dict(meta_lr=0.02),
    "0.02 √50 = 0.14": {},
    "0.4": dict(meta_lr=0.4),
}
FURTHER = ("lr", "momentum", "meta_lr", "entropy", "floor")  # settings, where they are others than by default
RATES = {"learning rate 0.1": dict(lr=0.1, momentum=0.0), "learning rate 0.02, momentum 0.9": {}}


def found(runs, experiment, method, **settings):
    """The metrics of that method, seed by seed."""
    wanted = lambda c: {n: v for n, v in c.items() if n in FURTHER} == settings and c["method"] == method
    own = [run for run in runs if run["experiment"] == f"examples_{experiment}" and wanted(run["config"])]
    return [run["metrics"] for run in sorted(own, key=lambda run: run["config"]["seed"])]


def cell(values, digits):
    mean, std, n = mean_std(values)
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "") + (f" ({n})" if n != 3 else "")


def table(names, columns, head="Method"):
    """names: {method: label}.  columns: {head: (function of a method -> values, digits)}."""
    lines = [f"| {head} | " + " | ".join(columns) + " |", "| :-- |" + " --: |" * len(columns)]
    for method, label in names.items():
        cells = [cell(values(method), digits) for values, digits in columns.values()]
        if any(c != "–" for c in cells):
            lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def tables(runs):
    """{name: Markdown}"""
    of = lambda experiment, name, **s: lambda method: [m[name] for m in found(runs, experiment, method, **s)]
    inside = lambda experiment, name, key, **s: lambda method: [m[name][key] for m in found(runs, experiment, method, **s)]
    sampled = lambda m: "sampled as learned" if m == "learned" else f"{m}, sampled"
    augmentation = {}
    for head, settings in RATES.items():
        augmentation[f"{head}: test accuracy (%)"] = of("augmentation", "test_accuracy", **settings), 1
        augmentation[f"{head}: test loss"] = of("augmentation", "test_loss", **settings), 3
        for name in ("rotation", "noise"):
            augmentation[f"{head}: {name}"] = inside("augmentation", "strengths", name, **settings), 2
    mixture = {
        "test loss": (of("data_mixture", "test_loss"), 3),
        "of a new model, sampled so": (lambda m: of("data_mixture", "test_loss")(sampled(m)), 3),
        **{f"weight: {name}": (inside("data_mixture", "weights", name), 3) for name in ("docstrings", "code", "shuffled")},
    }
    classes = {
        "test accuracy (%)": (of("loss_weights", "test_accuracy"), 1),
        "test loss": (of("loss_weights", "test_loss"), 3),
        "weight of rare classes over that of the others": (of("loss_weights", "rare_over_frequent"), 1),
    }
    of_driving = lambda name: lambda setting: of("loss_weights", name, **DRIVING[setting])("N = 20")
    spread = lambda setting: [max(w) / 10 for w in of_driving("weights")(setting)]
    driving = {
        "test accuracy (%)": (of_driving("test_accuracy"), 1),
        "test loss": (of_driving("test_loss"), 3),
        "weight of rare classes over that of the others": (of_driving("rare_over_frequent"), 1),
        "the largest weight's share": (spread, 2),
    }
    of_rates = lambda rate: dict(lr=0.1, momentum=0.0, **OF_STRENGTHS[rate])
    strengths = {
        "test accuracy (%)": (lambda rate: of("augmentation", "test_accuracy", **of_rates(rate))("N = 50"), 1),
        **{
            name: (lambda rate, name=name: inside("augmentation", "strengths", name, **of_rates(rate))("N = 50"), 2)
            for name in ("rotation", "shift", "contrast", "noise")
        },
    }
    trainer = {
        "test loss": (of("trainer", "test_loss"), 3),
        **{f"weight: {name}": (inside("trainer", "weights", name), 3) for name in ("docstrings", "code", "shuffled")},
    }
    schedule = {
        "validation loss": (of("schedule", "val_loss"), 3),
        "test loss": (of("schedule", "test_loss"), 3),
        "trainings": (of("schedule", "trainings"), 0),
        "until as good as the grid's best": (lambda m: of("schedule", "until")(m) if m == "learned" else [], 1),
        "learning rate, first hundred steps": (lambda m: [r[0] for r in of("schedule", "rates")(m)], 4),
        "last hundred": (lambda m: [r[-1] for r in of("schedule", "rates")(m)], 4),
        "geometric mean": (lambda m: [math.prod(r) ** (1 / len(r)) for r in of("schedule", "rates")(m)], 4),
        "weight decay": (of("schedule", "decay"), 5),
    }
    return {
        "augmentation": table(AUGMENTATION, augmentation),
        "mixture": table(MIXTURE, mixture),
        "classes": table(CLASSES, classes),
        "driving": table(dict(zip(DRIVING, DRIVING)), driving, "Driven by"),
        "strengths": table(dict(zip(OF_STRENGTHS, OF_STRENGTHS)), strengths, "λ's learning rate"),
        "trainer": table({"uniform": "uniform", "learned": "Trajectory, N = 20"}, trainer),
        "schedule": table({"grid of nine": "grid of nine", "learned": "by `result.settings`"}, schedule),
    }


def figure(runs, path):
    """Test accuracy of the augmentation example over the horizon, beside what one would do otherwise."""
    plot, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    others = {
        "the true conditions": ("the test images' own strengths", COLOURS["mixed_mode"], "-"),
        "random search": ("random search, best of eight trainings", COLOURS["second_order"], "--"),
        "no augmentation": ("no augmentation", COLOURS["baseline"], ":"),
    }
    for axis, (head, settings) in zip(axes, RATES.items()):
        of = lambda method: [m["test_accuracy"] for m in found(runs, "augmentation", method, **settings)]
        for method, (label, colour, style) in others.items():
            if len(values := of(method)) > 1:  # one seed is no line
                axis.axhline(mean_std(values)[0], color=colour, linestyle=style, linewidth=1.5, label=label)
        points = {n: of(f"N = {n}") for n in HORIZONS if of(f"N = {n}")}
        for n, values in points.items():
            axis.plot([n] * len(values), values, "o", color=COLOURS["evograd_guided"], markersize=4, alpha=0.6)
        means = [mean_std(values)[0] for values in points.values()]
        axis.plot(list(points), means, "-", color=COLOURS["evograd_guided"], linewidth=2.5, label="learned through N steps")
        axis.set(xscale="log", title=f"SGD, {head}", xlabel="N, steps that the hypergradient goes back through")
        axis.set_xticks(HORIZONS, map(str, HORIZONS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    plot.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    save(plot, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=LINES, help="result files")
    parser.add_argument("--page", type=Path, default=ROOT / "horizon.md", help="whose tables are written")
    parser.add_argument("--figure", type=Path, default=ROOT / "horizon.png")
    args = parser.parse_args(argv)
    runs = read_runs(args.results)[0]
    write_between_markers(args.page, tables(runs))
    figure(runs, args.figure)


if __name__ == "__main__":
    main()
