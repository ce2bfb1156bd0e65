"""Does λ move? The paper's EvoGrad at its own scale beside T1–T2, the decay of λ and Adam's eps, in trainings by EvoGrad.

    python -m resources.displacement label_noise --data cifar10_jpeg.npz --seed 1            the first 300 steps
    python -m resources.displacement label_noise --data cifar10_jpeg.npz --start FILE.pt     from a checkpoint of train.py
    python -m resources.displacement few_shot --data filelists --data-dir DIR --held-out cub
    python -m resources.displacement cross_lingual --data ner --data-dir DIR --target qu --encoder FOLDER
    python -m resources.displacement figure                                                  resources/displacement.png

Further flags are those of the experiment's train.py; λ has the optimizer of the authors' code. In the first --window steps of
every --every norms are taken of EvoGrad's hypergradient (at its own inner learning rate, 1e-5), of T1–T2's (at the model's, by
mixed mode), of decay times λ, and of a vector of Adam's eps.  `moved`: ‖λ − λ₀‖ / ‖λ₀‖.  `moved_by_decay`: the same had every
gradient been zero.  `moved_by_gradient`: the same without decay.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cross_domain_fewshot.train as few_shot_train
import label_noise_mwn.train as label_noise_train
import metaxl.train as cross_lingual_train
from cross_domain_fewshot.data import TrainingSteps, load_domain, stream
from evograd import hypergradient, mixed_mode
from evograd.lab import checkpoints, cli
from evograd.lab.records import append_run, read_runs, seed_everything
from label_noise_mwn.data import data_fingerprint, load, make_task
from metaxl.models import encoder_name

OUT = "resources/results/displacement.jsonl"
KIND = "displacement"  # of the result lines


def norm(tensors) -> float:
    return torch.cat([t.detach().flatten() for t in tensors]).norm().item()


class Probe:
    """In the place of a trainer's MetaStep: where `measuring` is set it takes the norms of a step's hypergradients.

    whole: (ℓ_T, ℓ_V, model, λ) of T1–T2, where that is another problem than EvoGrad's.
    """

    def __init__(self, meta):
        self.meta, self.measuring, self.whole, self.rows = meta, False, None, []

    def __getattr__(self, name):
        return getattr(self.meta, name)

    def __call__(self, *problem, held=None, lr, parameters=None, **settings):
        chosen = {} if parameters is None else {"parameters": parameters}
        result = self.meta(*problem, held=held, lr=lr, **chosen, **settings)
        if self.measuring:
            train_loss, val_loss, model, hyperparameters = problem[:4]
            row = {"lr": lr, "evograd": norm(result.grads)}
            with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
                whole = self.whole or (train_loss, val_loss, model, hyperparameters)
                row["second_order"] = norm(mixed_mode(*whole, inner_lr=lr, **chosen).grads)
                if callable(held):  # the other weight input: the losses of θ for all candidates
                    with torch.no_grad():
                        known = held(model)
                    own = partial(train_loss, inputs=known)
                    row["evograd_model"] = norm(hypergradient(own, val_loss, model, hyperparameters).grads)
            self.rows.append(row)
        return result


class CrossLingual(cross_lingual_train.Trainer):
    """T1–T2 steps in all parameters, EvoGrad perturbs the classifier alone."""

    def hypergradient(self, step, before=None, held=None):
        self.meta.whole = (*self.losses(step), self.model, self.hyperparameters)
        return super().hypergradient(step, before, held)


Made = tuple[object, Callable[[], Tensor], list[Tensor], dict, int]  # trainer, its step, λ, configuration, steps made before


def label_noise(argv: list[str], start: str | None) -> Made:
    args = label_noise_train.parse_args(argv)
    state = checkpoints.load(start) if start else None
    seed = state["config"]["seed"] if state else args.seed  # noise and split are those of the checkpoint
    sizes = (args.meta_images, args.val_images, args.train_images)
    task = make_task(load(args.data, args.data_dir), args.noise, args.noise_level, *sizes, seed, args.device)
    seed_everything(args.seed)
    trainer = label_noise_train.Trainer(args, task)
    if state:
        trainer.model.load_state_dict(state["trainer"]["model"])
        trainer.optimizer.load_state_dict(state["trainer"]["optimizer"])
    read = {"data": label_noise_train.data_name(args), "fingerprint": data_fingerprint(args.data, args.data_dir)}
    config = {**cli.config_of(args), **read, "start": f"{state['config']['method']}, seed {seed}" if state else None}
    return trainer, trainer.step, list(trainer.weight_net.parameters()), config, state["step"] if state else 0


def few_shot(argv: list[str], start: str | None) -> Made:
    args = few_shot_train.parse_args(argv)
    domains = [load_domain(args.data, args.data_dir, name, "base", args.image_size) for name in args.seen]
    seed_everything(args.seed)
    trainer = few_shot_train.Trainer(args, len(domains[0].classes))
    steps = TrainingSteps(domains, args.seed, args.episodes, args.n_way, args.n_shot + args.n_query, args.auxiliary_batch, True)
    episodes, generator = stream(steps, itertools.count(), 0, pin=False), torch.Generator().manual_seed(args.seed)

    def step():
        return trainer.step(few_shot_train.prepare(args, next(episodes), generator), 1.0)

    return trainer, step, trainer.hyperparameters, few_shot_train.recorded(args), 0


def cross_lingual(argv: list[str], start: str | None) -> Made:
    args = cross_lingual_train.parse_args(argv)
    model, examples, *_ = cross_lingual_train.prepare(args)
    n_steps = args.epochs * (len(examples["source"]) // args.batch_size)
    trainer = CrossLingual(args, model.train(), n_steps)
    data = cross_lingual_train.Steps(args, examples["source"], examples["train"])
    config = {**cli.config_of(args), "encoder": encoder_name(args.encoder)}
    # The authors': eps and decay are the defaults of their flags, and the schedule is the model's. Ours differs in all three.
    trainer.meta_optimizer = torch.optim.Adam(trainer.hyperparameters, lr=args.rtn_lr, eps=1e-8, weight_decay=5e-4)

    def step():
        trainer.meta_optimizer.param_groups[0]["lr"] = args.rtn_lr * trainer.schedule.lr_lambdas[0](trainer.n_steps)
        return trainer.step(next(data))

    return trainer, step, trainer.hyperparameters, config, 0


APPLICATIONS = {"label_noise": label_noise, "few_shot": few_shot, "cross_lingual": cross_lingual}


class Shadow:
    """Copies of λ, with an optimizer of the same settings but for `changes`, and gradients times `scale`."""

    def __init__(self, optimizer: torch.optim.Optimizer, scale: float, **changes):
        self.own, self.optimizer, self.scale, self.changes = optimizer, copy.deepcopy(optimizer), scale, changes

    @property
    def parameters(self) -> list[Tensor]:
        return self.optimizer.param_groups[0]["params"]

    def step(self) -> None:
        group = self.own.param_groups[0]
        self.optimizer.param_groups[0].update(self.changes, lr=group["lr"])
        for p, own in zip(self.parameters, group["params"]):
            p.grad = self.scale * own.grad
        self.optimizer.step()


def follow(made: Made, steps: int, every: int, window: int) -> Iterator[tuple[int, dict]]:
    """(step, its measured row) of a training; steps is the last one at which a window begins."""
    trainer, step, hyperparameters, _, before = made
    probe = trainer.meta = Probe(trainer.meta)
    optimizer = trainer.meta_optimizer
    settings = optimizer.param_groups[0]
    start = [p.detach().clone() for p in hyperparameters]
    moved = lambda tensors: norm([p.detach() - p0 for p, p0 in zip(tensors, start)]) / norm(start)
    shadows = {"decay": Shadow(optimizer, scale=0), "gradient": Shadow(optimizer, scale=1, weight_decay=0)}
    for n in cli.progress(range(steps + window)):
        probe.measuring = n % every < window
        step()
        for shadow in shadows.values():
            shadow.step()
        if probe.measuring:
            row = probe.rows.pop()
            row["decay"] = settings["weight_decay"] * norm(hyperparameters)
            row["eps"] = settings.get("eps", 0) * sum(p.numel() for p in hyperparameters) ** 0.5
            row["moved"] = moved(hyperparameters)
            row |= {f"moved_by_{name}": moved(shadow.parameters) for name, shadow in shadows.items()}
            yield before + n, row


def summarised(rows: list[tuple[int, dict]], window: int) -> dict:
    """{step at which a window begins: means over it; of what has moved, the first value}."""
    windows = [rows[i : i + window] for i in range(0, len(rows), window)]
    mean = lambda name, mine: mine[0][name] if name.startswith("moved") else statistics.fmean(row[name] for row in mine)
    return {str(some[0][0]): {name: mean(name, [row for _, row in some]) for name in some[0][1]} for some in windows}


def figure(runs: list[dict], path: Path) -> None:
    """Norms over steps, one panel for each application; bands from the smallest to the largest of the seeds."""
    from evograd.lab.figures import COLOURS, plt, save

    lines = {
        "second_order": ("T1–T2", COLOURS["second_order"]),
        "evograd": ("EvoGrad", COLOURS["evograd"]),
        "decay": ("decay of λ", COLOURS["theory"]),
        "eps": ("Adam's eps", COLOURS["baseline"]),
    }
    fig, axes = plt.subplots(1, len(APPLICATIONS), figsize=(12, 3.6), layout="constrained")
    for ax, application in zip(axes, APPLICATIONS):
        mine = [run["metrics"]["windows"] for run in runs if run["config"]["application"] == application]
        at = sorted({int(step) for windows in mine for step in windows})
        for name, (title, colour) in lines.items():
            values = [[w[str(step)][name] for w in mine if str(step) in w] for step in at]
            if any(map(any, values)):
                ax.plot(at, [statistics.fmean(v) for v in values], "o-", color=colour, label=title, markersize=3)
                ax.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)
        ax.set(title=application.replace("_", " ").capitalize(), xlabel="training step", yscale="log")
        if at and at[-1] > 1000:
            ax.set_xscale("symlog", linthresh=50)
            ax.set_xlim(left=0)
    axes[0].set_ylabel("norm of the gradient by λ")
    shown = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=(*APPLICATIONS, "figure"))
    parser.add_argument("--steps", type=cli.at_least(0), default=300, help="the step at which the last window begins")
    parser.add_argument("--every", type=cli.at_least(1), default=50, metavar="N", help="a window begins every N steps")
    parser.add_argument("--window", type=cli.at_least(1), default=6, metavar="N", help="steps that are measured in turn")
    parser.add_argument("--start", metavar="FILE", help="checkpoint of label_noise_mwn.train; the weight net is at its start")
    parser.add_argument("--out", type=cli.writable, default=OUT, help="JSON-lines file")
    args, further = parser.parse_known_args(argv)
    if args.what == "figure":
        figure(read_runs([args.out])[0], Path(args.out).parents[1] / "displacement.png")
        return
    if args.start and args.what != "label_noise":
        parser.error(f"--start given, but {args.what} does not read it; label_noise does")
    if args.every < args.window:
        parser.error(f"--every {args.every} is less than --window {args.window}")
    with cli.exit_on_bad_input():
        made = APPLICATIONS[args.what](["--method", "evograd", *further], args.start)
    rows = list(follow(made, args.steps, args.every, args.window))
    trainer, _, hyperparameters, config, before = made
    windows = summarised(rows, args.window)
    config = {**config, "application": args.what, "first_step": before, "window": args.window}
    metrics = {"hyperparameters": sum(p.numel() for p in hyperparameters), "windows": windows}
    append_run(args.out, KIND, config, metrics, {}, trainer.args.device)
    for step, row in windows.items():
        print(step, {name: float(f"{value:.3g}") for name, value in row.items()})


if __name__ == "__main__":
    main()
