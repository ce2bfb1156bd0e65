"""Learn a schedule of the learning rate, and the weight decay, from what whole trainings say of them; beside a grid of nine.

    python -m resources.examples.schedule                   five minutes on one CPU core

Digits of scikit-learn: 500 training images of which 30 % have a wrong label; validation and test images are right. A training
has 600 steps of SGD with momentum. λ are the logarithms of six learning rates, one for each hundred steps, and of the weight
decay. After each training, `result.settings` has the derivative of the validation loss by the settings of every step, and Adam
moves λ. Beside it: nine trainings on a grid of constant learning rates and weight decays. Both give the training with the least
validation loss. λ begins at the grid's lowest learning rate.
To make it your own: replace `data`, the model and the optimizer; any number in its groups has a derivative.
"""

import argparse
import itertools
import math
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import evograd
from evograd.lab.cli import at_least, seed, writable
from evograd.lab.records import append_run  # result lines of this repository

METHODS = ("grid of nine", "learned")
RATES, DECAYS = (0.003, 0.03, 0.3), (1e-4, 1e-3, 1e-2)  # of the grid
START = (0.003, 1e-3)
BATCH, PARTS, META_LR = 64, 6, 0.5


def data(seed):
    """{split: (images (n, 64), labels (n,))}, split by the seed."""
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    wrong = torch.rand(500, generator=generator) < 0.3
    y[:500] = torch.where(wrong, (y[:500] + torch.randint(1, 10, (500,), generator=generator)) % 10, y[:500])
    return {name: (x[a:b], y[a:b]) for name, a, b in (("train", 0, 500), ("val", 500, 1000), ("test", 1000, None))}


def train(rates, decay, seed, steps, splits, learn=False):
    """(losses on validation and test images, dℓ_V by the logarithms of the rates (PARTS,) and of the decay ())"""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0], momentum=0.9)
    trajectory = evograd.Trajectory(model, optimizer, [])  # the optimizer's settings alone
    x, y = splits["train"]
    part = [t * PARTS // steps for t in range(steps)]
    for t in range(steps):
        optimizer.param_groups[0].update(lr=rates[part[t]], weight_decay=decay)
        chosen = torch.randint(len(y), (BATCH,))
        train_loss = lambda m: F.cross_entropy(m(x[chosen]), y[chosen])
        if learn:
            trajectory.step(train_loss)
        else:
            optimizer.zero_grad()
            train_loss(model).backward()
            optimizer.step()
    losses = {name: (lambda m, own=splits[name]: F.cross_entropy(m(own[0]), own[1])) for name in ("val", "test")}
    found = [losses[name](model).item() for name in losses]
    if not learn:
        return found, None
    (of,) = trajectory.hypergradient(losses["val"]).settings  # of the optimizer's only group
    by_rates = torch.zeros(PARTS).index_add(0, torch.tensor(part), of["lr"].float())
    return found, (by_rates * torch.tensor(rates), of["weight_decay"].sum().float() * decay)


def searched(seed, steps, splits):
    """[(losses, rates, decay)] of the grid."""
    for rate, decay in tqdm(list(itertools.product(RATES, DECAYS)), "grid"):
        yield train([rate] * PARTS, decay, seed, steps, splits)[0], [rate] * PARTS, decay


def learned(trainings, seed, steps, splits):
    """[(losses, rates, decay)] of one training after the other."""
    rates = torch.full((PARTS,), math.log(START[0]), requires_grad=True)  # λ
    decay = torch.tensor(math.log(START[1]), requires_grad=True)
    meta_optimizer = torch.optim.Adam([rates, decay], lr=META_LR, betas=(0.5, 0.9))
    for _ in tqdm(range(trainings), "learned"):
        own = rates.detach().exp().tolist(), decay.detach().exp().item()
        losses, (rates.grad, decay.grad) = train(*own, seed, steps, splits, learn=True)
        yield losses, *own
        meta_optimizer.step()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=1, help="of the split, the model and the batches")
    parser.add_argument("--steps", type=at_least(PARTS), default=600, help="training steps of a model")
    parser.add_argument("--trainings", type=at_least(1), default=9, help="from which is learned")
    parser.add_argument("--out", type=writable, help="JSON-lines file that result lines are appended to")
    args = parser.parse_args(argv)
    own, best = (args.seed, args.steps, data(args.seed)), math.inf
    for method in METHODS:
        start = time.perf_counter()
        tried = list(searched(*own) if method == METHODS[0] else learned(args.trainings, *own))
        seconds = time.perf_counter() - start
        (val_loss, test_loss), rates, decay = min(tried, key=lambda t: t[0][0])
        until = next((i + 1 for i, t in enumerate(tried) if t[0][0] <= best), None)  # as good as the grid's best
        best = val_loss
        shown = f"learning rates {' '.join(f'{rate:.4f}' for rate in rates)}, weight decay {decay:.1e}"
        then = f"; as good as the grid after {until}" * (method != METHODS[0])
        print(f"{method:13} validation loss {val_loss:.4f}, test loss {test_loss:.4f}; {shown}; "
              f"{len(tried)} trainings, {seconds:.0f} s{then}")  # fmt: skip
        if args.out:
            config = {"method": method, "seed": args.seed, "steps": args.steps}
            metrics = {"val_loss": val_loss, "test_loss": test_loss, "rates": rates, "decay": decay, "trainings": len(tried)}
            metrics |= {"val_losses": [t[0][0] for t in tried], "until": until}
            append_run(args.out, "examples_schedule", config, metrics, {"seconds": seconds}, "cpu")


if __name__ == "__main__":
    main()
