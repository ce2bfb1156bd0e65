"""Learn how much each class counts in the training loss of an imbalanced problem, beside a grid search for it.

    python -m resources.examples.loss_weights               a minute on one CPU core

Digits of scikit-learn: the classes 0 to 4 with 60 training images each, 5 to 9 with 6; validation and test images are balanced.
The hyperparameters λ are ten logits: the training loss is the mean of w_y · cross-entropy, with w = 10 softmax(λ).
"learned" looks one SGD step ahead, in every step; "N = 20" learns from what 20 steps did, after each 20.
Beside it: another training with the weights as they were learned last, fixed; and grid search, which trains a model for each γ
of w_c ∝ (images of class c)^−γ and takes the one with the least validation loss.
To make it your own: replace `data` and the model; for weights of auxiliary losses let `train_loss` be softmax(λ) @ losses.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import evograd
from evograd.lab.cli import at_least, not_negative, positive, seed, writable
from evograd.lab.records import append_run  # result lines of this repository

METHODS = ("uniform", "grid search", "learned", "learned, then fixed")  # and N = …
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # γ
N_TRAIN, N_VAL = [60] * 5 + [6] * 5, 30  # images of each class
BATCH, LR, META_LR, WEIGHT_DECAY = 64, 0.1, 0.02, 1e-4


def data(seed):
    """{split: (images (n, 64), labels (n,))}, split by the seed."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = {"train": [], "val": [], "test": []}
    for c, n in enumerate(N_TRAIN):
        own = order[y[order] == c]
        for part, chosen in zip(parts.values(), (own[:n], own[n : n + N_VAL], own[-80:])):
            part.append(chosen)
    return {name: (x[torch.cat(part)], y[torch.cat(part)]) for name, part in parts.items()}


def train(weights, seed, steps, splits, learn=None, meta_lr=None, entropy=0.0, floor=0.0, title=""):
    """(model, weights at the end): with the weights of the classes as given, or learned: by "guided", or through N steps.

    meta_lr: of λ, by default META_LR √N.  entropy: as much of that of the weights is added to what λ maximises.
    floor: below which no weight falls, the mean being 1.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    logits = weights.log().requires_grad_(learn is not None)  # λ
    n = learn if isinstance(learn, int) else 0
    meta_optimizer = torch.optim.Adam([logits], lr=meta_lr or META_LR * max(n, 1) ** 0.5)
    weights_of = lambda logits: 10 * (1 - floor) * logits.softmax(0) + floor
    trajectory = evograd.Trajectory(model, optimizer, [logits]) if n else None
    (x_train, y_train), (x_val, y_val) = splits["train"], splits["val"]
    for _ in tqdm(range(steps), title, mininterval=1):
        chosen = torch.randint(len(y_train), (BATCH,), generator=generator)
        x, y = x_train[chosen], y_train[chosen]
        train_loss = lambda m: (weights_of(logits)[y] * F.cross_entropy(m(x), y, reduction="none")).mean()
        val_loss = lambda m: F.cross_entropy(m(x_val), y_val) + entropy * (logits.softmax(0) * logits.log_softmax(0)).sum()
        result = None
        if n:  # a step of the optimizer
            trajectory.step(train_loss)
            result = trajectory.hypergradient(val_loss) if len(trajectory) == n else None
        elif learn:
            result = evograd.guided(train_loss, val_loss, model, [logits], inner_lr=LR)
        if result is not None:
            logits.grad = result.grads[0]
            meta_optimizer.step()
        if not n:
            optimizer.zero_grad()
            train_loss(model).backward(inputs=list(model.parameters()))
            optimizer.step()
    return model, weights_of(logits.detach())


@torch.no_grad()
def evaluate(model, images, labels):
    """(cross-entropy, accuracy in percent)."""
    outputs = model(images)
    return F.cross_entropy(outputs, labels).item(), 100 * (outputs.argmax(1) == labels).float().mean().item()


def search(seed, steps, splits):
    """(model, weights) of the γ with the least validation loss."""
    counts, tried = torch.tensor(N_TRAIN), []
    for gamma in GRID:
        weights = counts.float() ** -gamma
        model, weights = train(weights, seed, steps, splits, title=f"grid search, γ = {gamma}")
        tried.append((evaluate(model, *splits["val"])[0], gamma, model, weights))
    _, gamma, model, weights = min(tried, key=lambda t: t[0])
    return model, weights


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=1, help="of the split, the model and the batches")
    parser.add_argument("--steps", type=at_least(1), default=3000, help="training steps of a model")
    parser.add_argument("--horizon", type=at_least(1), nargs="*", default=[20], metavar="N", help="steps to go back through")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="beside these")
    parser.add_argument("--meta-lr", type=positive, help="of λ where it learns through N steps; default: 0.02 √N")
    parser.add_argument("--entropy", type=not_negative, default=0.0, help="of the weights, in what λ maximises through N steps")
    parser.add_argument("--floor", type=not_negative, default=0.0, help="of weights that are learned through N steps")
    parser.add_argument("--out", type=writable, help="JSON-lines file that result lines are appended to")
    args = parser.parse_args(argv)
    splits, ones = data(args.seed), torch.ones(10)
    own = (args.seed, args.steps, splits)
    learned = None
    methods = [(m, "guided" if m == "learned" else None) for m in METHODS if m in args.methods]
    if "learned, then fixed" in args.methods and "learned" not in args.methods:
        parser.error("--methods has 'learned, then fixed' without 'learned', whose weights it takes")
    driving = {name: value for name in ("meta_lr", "entropy", "floor") if (value := getattr(args, name))}
    for method, learn in methods + [(f"N = {n}", n) for n in args.horizon]:
        start = time.perf_counter()
        if method == "grid search":
            model, weights = search(*own)
        elif method == "learned, then fixed":
            model, weights = train(learned, *own, title=method)
        else:
            of_steps = driving if isinstance(learn, int) else {}
            model, weights = train(ones, *own, learn=learn, **of_steps, title=method)
        seconds = time.perf_counter() - start
        steps = args.steps * {"grid search": len(GRID), "learned, then fixed": 2}.get(method, 1)
        if method == "learned":
            learned, learning_seconds = weights, seconds
        if method == "learned, then fixed":
            seconds += learning_seconds
        (val_loss, _), (test_loss, accuracy) = evaluate(model, *splits["val"]), evaluate(model, *splits["test"])
        rare, frequent = weights[5:].mean().item(), weights[:5].mean().item()
        print(f"{method:20} test accuracy {accuracy:.2f} %, loss {test_loss:.4f}; validation loss {val_loss:.4f}; "
              f"rare classes weigh {rare / frequent:.2f} times the others; {steps} steps, {seconds:.0f} s")  # fmt: skip
        if args.out:
            config = {"method": method, "seed": args.seed, "steps": args.steps}
            config |= driving if isinstance(learn, int) else {}
            metrics = {"test_accuracy": accuracy, "test_loss": test_loss, "val_loss": val_loss, "weights": weights}
            metrics |= {"rare_over_frequent": rare / frequent, "steps": steps}
            append_run(args.out, "examples_loss_weights", config, metrics, {"seconds": seconds}, "cpu")


if __name__ == "__main__":
    main()
