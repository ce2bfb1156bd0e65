"""Is it true? Move λ along the hypergradient, train again, and see how the validation loss changes: resources/retraining.md.

    python -m resources.retraining               measure, and append a line for each case to resources/retraining.jsonl
    python -m resources.retraining --table       write the table from these lines

A small CNN on scikit-learn's digits, 500 training images of which 30 % have a wrong label, λ = a logit of each one's weight.
After a warm-up N steps are remembered by `evograd.Trajectory`, and one hypergradient is taken. Then λ is moved by ±h along it,
and the optimizer makes the N steps again, from the same state with the same batches. Two minutes on one CPU core.
"""

import argparse
import copy
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import evograd
from evograd.lab.cli import at_least, seed, writable
from evograd.lab.records import append_run, mean_std, read_runs
from evograd.lab.tables import write_between_markers

ROOT = Path(__file__).parent
BATCH, H = 64, (0.1, 1.0)  # ‖Δλ‖
SGD, ADAMW = "SGD, momentum 0.9", "AdamW"
HORIZONS = (20, 100, 300)
# (optimizer, learning rate, warm-up, second_moment)
CASES = [(SGD, 0.02, 100, "exact"), (ADAMW, 1e-3, 100, "exact"), (ADAMW, 3e-3, 100, "exact")]
CASES += [(ADAMW, 1e-3, 100, "frozen"), (ADAMW, 1e-3, 0, "exact"), (ADAMW, 1e-2, 0, "exact"), (ADAMW, 1e-2, 0, "frozen")]


def new_optimizer(name, parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9) if name == SGD else torch.optim.AdamW(parameters, lr=lr)


class Digits:
    """A training on digits, up to the end of its warm-up."""

    def __init__(self, optimizer, lr, warm_up, n, seed):
        torch.manual_seed(seed)
        digits = load_digits()
        order = torch.randperm(len(digits.target))
        x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
        y = torch.tensor(digits.target)[order]
        wrong = torch.rand(500) < 0.3
        (self.x, self.y), self.val = (x[:500], torch.where(wrong, (y[:500] + 1) % 10, y[:500])), (x[500:1000], y[500:1000])
        convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU()
        self.model = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
        self.optimizer = new_optimizer(optimizer, self.model.parameters(), lr)
        self.logits = torch.zeros(500, requires_grad=True)  # λ
        warm, self.batches = torch.randint(500, (warm_up, BATCH)), torch.randint(500, (n, BATCH))
        self.train(self.model, self.optimizer, warm, self.logits)

    def train_loss(self, batch, logits):
        return lambda m: (
            2 * logits.sigmoid()[batch] * F.cross_entropy(m(self.x[batch]), self.y[batch], reduction="none")
        ).mean()

    def val_loss(self, model):
        return F.cross_entropy(model(self.val[0]), self.val[1])

    def train(self, model, optimizer, batches, logits):
        for batch in batches:
            optimizer.zero_grad()
            self.train_loss(batch, logits)(model).backward(inputs=list(model.parameters()))
            optimizer.step()

    @torch.no_grad()
    def again(self, logits, state):
        """The validation loss after the same steps from that state, with other hyperparameters."""
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(copy.deepcopy(state[1]))
        with torch.enable_grad():
            self.train(self.model, self.optimizer, self.batches, logits)
        return self.val_loss(self.model).item()


def measured(optimizer, lr, warm_up, second_moment, n, seed):
    """Metrics of one hypergradient: for each h the actual change of the validation loss over the predicted one."""
    run = Digits(optimizer, lr, warm_up, n, seed)
    state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    trajectory = evograd.Trajectory(run.model, run.optimizer, [run.logits], second_moment=second_moment)
    for batch in run.batches:
        trajectory.step(run.train_loss(batch, run.logits))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = trajectory.hypergradient(run.val_loss)
    gradient = result.grads[0]
    size = gradient.norm()
    metrics = {"val_loss": result.val_loss.item(), "size": size.item(), "warned": bool(said), "ratios": {}}
    for h in H:
        low, high = (run.again(run.logits.detach() + sign * h * gradient / size, state) for sign in (-1, 1))
        metrics["ratios"][str(h)] = ((high - low) / (2 * h * size)).item()
    return metrics


def table(runs):
    """Actual over predicted change: mean and each seed's."""
    lines = [f"| Optimizer | warm-up | √v | N | {' | '.join(f'h = {h:g}: mean | each seed' for h in H)} | warnings |"]
    lines.append("| :-- | --: | :-- | --: |" + " --: | :-- |" * len(H) + " --: |")
    cells = {}
    for run in runs:
        c = run["config"]
        cells.setdefault((f"{c['optimizer']}, {c['lr']:g}", c["warm_up"], c["second_moment"], c["n"]), []).append(
            run["metrics"]
        )
    for (optimizer, warm_up, second_moment, n), found in cells.items():
        row = [optimizer, str(warm_up), "–" if optimizer.startswith("SGD") else second_moment, str(n)]
        for h in H:
            values = [m["ratios"][str(h)] for m in found]
            row += [f"{mean_std(values)[0]:.2f}", ", ".join(f"{v:.2f}" for v in values)]
        lines.append("| " + " | ".join([*row, f"{sum(m['warned'] for m in found)} of {len(found)}"]) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seed, nargs="+", default=[1, 2, 3], help="of the data, the model and the batches")
    parser.add_argument(
        "--horizons", type=at_least(1), nargs="+", default=HORIZONS, metavar="N", help="steps that are remembered"
    )
    parser.add_argument("--out", type=writable, default=ROOT / "retraining.jsonl")
    parser.add_argument("--table", nargs="?", type=Path, const=ROOT / "retraining.md", help="write the table into this file")
    args = parser.parse_args(argv)
    if args.table:
        write_between_markers(args.table, {"retraining": table(read_runs([args.out])[0])})
        return
    cases = [(*case, n, s) for case in CASES for n in args.horizons for s in args.seeds]
    for optimizer, lr, warm_up, second_moment, n, s in (bar := tqdm(cases)):
        config = dict(optimizer=optimizer, lr=lr, warm_up=warm_up, second_moment=second_moment, n=n, seed=s)
        metrics = measured(**config)
        append_run(args.out, "retraining", config, metrics, {}, "cpu")
        bar.write(json.dumps({**config, **metrics}))


if __name__ == "__main__":
    main()
