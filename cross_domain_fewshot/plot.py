"""Accuracy by held-out domain, γ and β over training; memory over depth and over K, from the record of scale.py.

Runs on domains of one's own alone have figures of their own, called …_own_….

python -m cross_domain_fewshot.plot [FILE.jsonl …] [--out-dir DIR]
"""

import json

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from evograd.lab import figures
from evograd.lab.figures import COLOURS

from .data import GLYPH_FONTS, PAPER_DOMAINS
from .scale import METHODS

# Of the tables.
DOMAINS = {*GLYPH_FONTS, *PAPER_DOMAINS, "tiny_imagenet", "omniglot"}
DOMAINS |= {f"pacs_{kind}" for kind in ("photo", "art_painting", "cartoon", "sketch")}
LINE = ("method", "held_out", "n_shot")  # what tells points apart
TITLES = {
    "none": "no transformation",
    "fixed": "fixed transformation",
    **figures.TITLES,
}
COLOUR = {**COLOURS, "none": "#BBBBBB", "fixed": COLOURS["baseline"]}


def series(runs):
    """{(data, backbone, head): runs}: what one figure compares. The data are "…_own" where none of the domains is known."""
    groups = {}
    for run in runs:
        config = run["config"]
        own = "" if DOMAINS & {config["held_out"], *config["seen"]} else "_own"
        groups.setdefault((config["data"] + own, config["backbone"], config["head"]), []).append(run)
    return groups


def method_of(config):
    return TITLES[config["method"]]


def domain_of(config):
    return config["held_out"]


def label_of(config):
    return f"{method_of(config)}, {domain_of(config)}, {config['n_shot']}-shot"


def plot_accuracy(runs, path, title, every):
    """One panel for each number of shots, one group of points for each held-out domain, one point for each method.

    The bar is the 95 % interval over test episodes; of several seeds, mean and mean half width.

    every: the runs that the figure could show.
    """
    shots = sorted({run["config"]["n_shot"] for run in runs})
    domains = list(dict.fromkeys(run["config"]["held_out"] for run in runs))
    methods = [method for method in TITLES if any(run["config"]["method"] == method for run in runs)]
    figure, axes = plt.subplots(1, len(shots), figsize=(1.5 + 3.6 * len(shots), 3.4), layout="constrained", squeeze=False)
    for axis, n_shot in zip(axes[0], shots):
        for i, method in enumerate(methods):
            for x, domain in enumerate(domains):
                wanted = {"method": method, "held_out": domain, "n_shot": n_shot}
                mine = [run["metrics"] for run in runs if wanted.items() <= run["config"].items()]
                if mine:
                    mean, half = (sum(m[key] for m in mine) / len(mine) for key in ("accuracy", "interval"))
                    place = x + 0.12 * (i - (len(methods) - 1) / 2)
                    axis.errorbar(place, mean, half, fmt="o", ms=4, lw=1.5, color=COLOUR[method], label=TITLES[method])
        axis.set_xticks(range(len(domains)), [figures.literal(domain).replace("_", "\n") for domain in domains])
        axis.set_xlim(-0.6, len(domains) - 0.4)
        axis.set_title(f"{n_shot}-shot", fontsize=10)
        axis.set_xlabel("held-out domain")
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (%)")
    shown = [pair for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels())]
    shown = {text: handle for handle, text in shown}  # each method once
    handles = {TITLES[method]: shown[TITLES[method]] for method in methods}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    figures.heading(figure, title, every, runs, (*LINE, "seen"), (method_of, domain_of, label_of))
    figures.save(figure, path)


def plot_transformations(runs, path, title, every, remark):
    """Softplus of γ (above) and of β (below), mean over the channels, one line for each layer, one column for each method."""
    runs = {run["config"]["method"]: run for run in runs}
    methods = [method for method in TITLES if method in runs]
    figure, axes = plt.subplots(
        2, len(methods), figsize=(1.2 + 2.6 * len(methods), 4.6), sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    for column, method in enumerate(methods):
        metrics = runs[method]["metrics"]
        for row, name in enumerate(("gamma", "beta")):
            n_layers = len(metrics["layers"])
            for layer in range(n_layers):
                values = [means[layer] for means in metrics[name]]
                shade = plt.get_cmap("viridis")(layer / max(1, n_layers - 1) * 0.9)
                axes[row, column].plot(
                    metrics["epochs"],
                    values,
                    marker="o" if len(values) == 1 else "",
                    lw=1.2,
                    color=shade,
                    label=f"layer {layer + 1}",
                )
            axes[row, column].grid(alpha=0.3)
        axes[0, column].set_title(TITLES[method], fontsize=10)
        figures.over_epochs(axes[1, column])
    axes[0, 0].set_ylabel("softplus(γ)")
    axes[1, 0].set_ylabel("softplus(β)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figures.heading(figure, title, every, list(runs.values()), LINE, (method_of,))
    figures.save(figure, path, remark)


SCALE = {"plain": "plain step", **{method: figures.TITLES[method] for method in METHODS if method in figures.TITLES}}
MARKERS = dict(zip(SCALE, "s^oDv"))  # lines of methods that need the same lie on each other


def plot_depth(metrics, config, path):
    """Peak of one step over the layers of the backbone, one line for each method; dashed, what cards hold."""
    backbones = metrics["backbones"]
    depths = [int(name.removeprefix("resnet")) for name in backbones]
    figure, axis = plt.subplots(figsize=(6.6, 4.4), layout="constrained")
    for size, method in zip((10, 7, 4, 6, 6), SCALE):
        peaks = [costs[method]["peak_bytes"] / 1e9 for costs in backbones.values()]
        colour = COLOURS["baseline" if method == "plain" else method]
        axis.plot(depths, peaks, MARKERS[method] + "-", ms=size, lw=1.5, color=colour, label=SCALE[method])
    axis.set_xscale("log")
    axis.set_xticks(depths, depths)
    axis.set_xlabel(f"layers of the ResNet (images of {config['image_size']} px)")
    finish_memory(figure, axis, metrics)
    figures.save(figure, path)


def plot_candidates(metrics, config, path):
    """Peak of one EvoGrad step over K: one candidate at a time, and all graphs kept."""
    figure, axis = plt.subplots(figsize=(6.6, 4.4), layout="constrained")
    names = {"stream": "one candidate at a time (stream)", "retain": "all graphs kept (retain)"}
    for (strategy, name), colour in zip(names.items(), (COLOURS["evograd"], COLOURS["theory"])):
        peaks = metrics["candidates"][strategy]
        numbers = [int(k) for k in peaks]
        axis.plot(numbers, [peak / 1e9 for peak in peaks.values()], "o-", ms=5, lw=1.5, color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, numbers)
    axis.set_xlabel(f"candidates K (ResNet-{config['backbone_of_candidates'].removeprefix('resnet')})")
    finish_memory(figure, axis, metrics)
    figures.save(figure, path)


def finish_memory(figure, axis, metrics):
    for card in metrics["deepest"]["plain"]:  # what cards hold
        axis.axhline(float(card), color="black", ls="--", lw=0.8)
        axis.text(0.01, float(card) * 1.03, f"{card} GB", transform=axis.get_yaxis_transform(), fontsize=8, va="bottom")
    axis.minorticks_off()
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("peak of live tensors (GB)")
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)


def main(argv=None):
    kinds = ("cross_domain_fewshot_scale",)
    runs, folder = figures.runs_to_plot(__doc__, "cross_domain_fewshot", argv, kinds)
    scale = [run for run in runs if run["experiment"] in kinds]
    runs = [run for run in runs if run["experiment"] not in kinds]
    for run in scale[-1:]:
        plot_depth(run["metrics"], run["config"], folder / "cross_domain_fewshot_scale_depth.png")
        plot_candidates(run["metrics"], run["config"], folder / "cross_domain_fewshot_scale_candidates.png")
    runs = [run for run in runs if run["config"]["method"] in TITLES]
    for (data, backbone, head), group in series(runs).items():
        name, title = f"{data}_{backbone}_{head}", f"{data.replace('_own', ', own domains')}, {backbone}, {head}"
        usual = figures.usual_settings(group, LINE)
        plot_accuracy(usual, folder / f"cross_domain_fewshot_accuracy_{name}.png", title, group)
        learned = [run for run in group if "gamma" in run["metrics"]]
        if learned:
            # γ and β of one held-out domain, number of shots and seed: those of the last run
            chosen = [run for run in usual if "gamma" in run["metrics"]]
            same = {key: chosen[-1]["config"][key] for key in ("held_out", "n_shot", "seed")}
            chosen, every = ([run for run in some if same.items() <= run["config"].items()] for some in (chosen, learned))
            title += f", held out {same['held_out']}, {same['n_shot']}-shot, seed {same['seed']}"
            path = folder / f"cross_domain_fewshot_transformations_{name}.png"
            plot_transformations(chosen, path, title, every, f", {json.dumps(same)}")


if __name__ == "__main__":
    main()
