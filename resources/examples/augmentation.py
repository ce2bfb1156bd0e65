"""Learn how strongly to augment training images, for test images that are photographed under other conditions.

    python -m resources.examples.augmentation               three minutes on one CPU core

Digits of scikit-learn: 500 training images as they are; validation and test images are turned by up to ±30° and noisy.
The hyperparameters λ are the logarithms of four strengths: of rotation, shift, contrast and noise. Every step draws numbers u
in [−1, 1] or normal ones for each image, and augments with strength · u, which is differentiable in the strength. Beside it: no
augmentation, random search over the strengths by validation loss, and the strengths of the test images themselves.
"learned" looks one SGD step ahead, in every step; "N = 50" learns from what 50 steps of the optimizer did, after each 50.
To make it your own: replace `augment` by what is differentiable in its strengths, `data`, and the model.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import evograd
from evograd.lab.cli import at_least, not_negative, positive, seed, writable
from evograd.lab.records import append_run  # result lines of this repository

METHODS = ("no augmentation", "random search", "learned", "the true conditions")  # and N = …
NAMES = ("rotation", "shift", "contrast", "noise")  # in radians, in parts of half the width, in parts, in parts of white
START, LOW, HIGH = torch.full((4,), 0.1), 0.01, 1.0  # where learning begins; the range of random search
CONDITIONS = torch.tensor([math.radians(30), 0.0, 0.0, 0.2])  # of validation and test images
BATCH, LR, MOMENTUM, META_LR, N_TRIALS = 64, 0.02, 0.9, 0.02, 8


def augment(images, strengths):
    """Images (n, 1, height, width), each changed by the strengths (4,) times random numbers of its own."""
    n = len(images)
    rotation, shift, contrast, noise = strengths
    angle, (dx, dy) = torch.empty(n).uniform_(-1, 1) * rotation, torch.empty(2, n).uniform_(-1, 1) * shift
    rows = torch.stack([angle.cos(), -angle.sin(), dx]), torch.stack([angle.sin(), angle.cos(), dy])
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), images.shape, align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    brightness = 1 + contrast * torch.empty(n, 1, 1, 1).uniform_(-1, 1)
    return moved * brightness + noise * torch.randn_like(images)


def data(seed):
    """{split: (images (n, 1, 8, 8), labels (n,))}, split by the seed; the conditions of validation and test are drawn once."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
    y = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    x[500:] = augment(x[500:], CONDITIONS)
    return {name: (x[a:b], y[a:b]) for name, a, b in (("train", 0, 500), ("val", 500, 800), ("test", 800, None))}


def train(strengths, seed, steps, splits, lr=LR, momentum=MOMENTUM, learn=None, meta_lr=None, title=""):
    """(model, strengths at the end): with the strengths as given, or learned from there: by "guided", or through N steps."""
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    logs = strengths.log().requires_grad_(learn is not None)  # λ
    n = learn if isinstance(learn, int) else 0
    meta_optimizer = torch.optim.Adam([logs], lr=meta_lr or META_LR * max(n, 1) ** 0.5)
    trajectory = evograd.Trajectory(model, optimizer, [logs]) if n else None
    (x_train, y_train), (x_val, y_val) = splits["train"], splits["val"]
    for _ in (bar := tqdm(range(steps), title, mininterval=1)):
        chosen = torch.randint(len(y_train), (BATCH,))
        x, y = x_train[chosen], y_train[chosen]
        train_loss = lambda m: F.cross_entropy(m(augment(x, logs.exp())), y)
        val_loss = lambda m: F.cross_entropy(m(x_val), y_val)
        result = None
        if n:  # a step of the optimizer
            trajectory.step(train_loss)
            result = trajectory.hypergradient(val_loss) if len(trajectory) == n else None
        elif learn:
            result = evograd.guided(train_loss, val_loss, model, [logs], inner_lr=lr)
        if result is not None:
            logs.grad = result.grads[0]
            meta_optimizer.step()
            bar.set_postfix_str(" ".join(f"{n} {s:.2f}" for n, s in zip(NAMES, logs.exp())), refresh=False)
        if not n:
            optimizer.zero_grad()
            train_loss(model).backward(inputs=list(model.parameters()))
            optimizer.step()
    return model, logs.detach().exp()


@torch.no_grad()
def evaluate(model, images, labels):
    """(cross-entropy, accuracy in percent)."""
    outputs = model(images)
    return F.cross_entropy(outputs, labels).item(), 100 * (outputs.argmax(1) == labels).float().mean().item()


def search(seed, steps, splits, lr, momentum):
    """(model, strengths) with the least validation loss of N_TRIALS, drawn evenly on a logarithmic scale."""
    generator, tried = torch.Generator().manual_seed(seed), []
    for i in range(N_TRIALS):
        strengths = LOW * (HIGH / LOW) ** torch.rand(4, generator=generator)
        model, strengths = train(strengths, seed, steps, splits, lr, momentum, title=f"random search, {i + 1} of {N_TRIALS}")
        tried.append((evaluate(model, *splits["val"])[0], i, model, strengths))
    return min(tried, key=lambda t: t[0])[2:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=1, help="of the split, the model, the batches and the search")
    parser.add_argument("--steps", type=at_least(1), default=1500, help="training steps of a model")
    parser.add_argument("--lr", type=positive, default=LR, help="of the model")
    parser.add_argument("--momentum", type=not_negative, default=MOMENTUM)
    parser.add_argument("--horizon", type=at_least(1), nargs="*", default=[50], metavar="N", help="steps to go back through")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="beside these")
    parser.add_argument("--meta-lr", type=positive, help="of λ where it learns through N steps; default: 0.02 √N")
    parser.add_argument("--out", type=writable, help="JSON-lines file that result lines are appended to")
    args = parser.parse_args(argv)
    own = (args.seed, args.steps, data(args.seed), args.lr, args.momentum)
    methods = [(m, "guided" if m == "learned" else None) for m in METHODS if m in args.methods]
    for method, learn in methods + [(f"N = {n}", n) for n in args.horizon]:
        start, meta_lr = time.perf_counter(), args.meta_lr if isinstance(learn, int) else None
        if method == "random search":
            model, strengths = search(*own)
        else:
            first = START if learn else CONDITIONS if method == "the true conditions" else torch.zeros(4)
            model, strengths = train(first, *own, learn=learn, meta_lr=meta_lr, title=method)
        seconds, steps = time.perf_counter() - start, args.steps * (N_TRIALS if method == "random search" else 1)
        (val_loss, _), (test_loss, accuracy) = evaluate(model, *own[2]["val"]), evaluate(model, *own[2]["test"])
        shown = ", ".join(f"{name} {strength:.2f}" for name, strength in zip(NAMES, strengths))
        print(f"{method:19} test accuracy {accuracy:.2f} %, loss {test_loss:.4f}; {shown}; {steps} steps, {seconds:.0f} s")
        if args.out:
            config = {"method": method, "seed": args.seed, "steps": args.steps}
            config |= {} if own[3:] == (LR, MOMENTUM) else {"lr": args.lr, "momentum": args.momentum}
            config |= {"meta_lr": meta_lr} if meta_lr else {}
            metrics = {"test_accuracy": accuracy, "test_loss": test_loss, "val_loss": val_loss, "steps": steps}
            metrics["strengths"] = dict(zip(NAMES, strengths.tolist()))
            append_run(args.out, "examples_augmentation", config, metrics, {"seconds": seconds}, "cpu")


if __name__ == "__main__":
    main()
