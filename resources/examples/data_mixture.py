"""Learn how much each text source counts in training a small GPT-2, so that the loss on a target domain falls.

    python -m resources.examples.data_mixture                                       four minutes on one CPU core
    torchrun --nproc-per-node 2 -m resources.examples.data_mixture --fsdp           the model sharded by FSDP2

Three sources that every Python installation has, characters as tokens: the standard library's code, its docstrings, and its
code with the characters shuffled. Target: docstrings of other modules. The hyperparameters λ are three logits: the training
loss is Σ_i softmax(λ)_i · (loss on source i). They learn from validation docstrings; printed is the loss on test docstrings.
"learned" looks one SGD step ahead, "N = 20" goes back through 20 steps of AdamW, after each 20.
Then another model is trained on the mixture itself: windows sampled by the learned weights, all of which count alike.
To make it your own: replace `sources`, the model, and `losses`.
"""

import argparse
import ast
import os
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import evograd
from evograd.lab.cli import at_least, seed, writable
from evograd.lab.records import append_run  # result lines of this repository

NAMES = ("docstrings", "code", "shuffled")
METHODS = ("uniform", "learned", "sampled as learned")  # and N = …
LENGTH, BATCH, VAL_BATCH = 64, 24, 16  # characters in a window, windows in a step
LR, META_LR, META_EVERY = 3e-3, 0.1, 4  # one step ahead λ is learned in every fourth step
WARM_UP = 50  # steps before those that λ learns from: Adam's first steps are no good ones to go back through


def sources():
    """({source: text} to train on, validation text, test text): of ten modules seven are for training, one and two are not."""
    texts, val, test = dict.fromkeys(NAMES, ""), "", ""
    for i, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        tree, prose = ast.parse(path.read_text(encoding="utf-8")), ""
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
                prose += ast.get_docstring(node) + "\n\n"
                node.body = node.body[1:] or [ast.Pass()]
        if i % 10 < 7:
            texts["docstrings"] += prose
            texts["code"] += ast.unparse(tree) + "\n\n" if len(texts["code"]) < 1_000_000 else ""
        val, test = val + prose * (i % 10 == 7), test + prose * (i % 10 > 7)
    texts["shuffled"] = "".join(random.Random(0).sample(texts["code"], len(texts["code"])))
    encode = lambda text: torch.tensor(list(text.encode("ascii", "ignore")))
    return {name: encode(text) for name, text in texts.items()}, encode(val), encode(test)


def windows(text, n, generator):
    """(n, LENGTH) characters from random places of a text."""
    starts = torch.randint(len(text) - LENGTH, (n, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


def sample(texts, shares, generator):
    """(windows (BATCH, LENGTH), the source (BATCH,) that each is of), as many of each source as its share says."""
    places = (torch.arange(BATCH) + torch.rand((), generator=generator)) / BATCH
    source = torch.searchsorted(shares.cumsum(0), places).clamp(max=len(shares) - 1)
    return torch.cat([windows(texts[NAMES[i]], 1, generator) for i in source.tolist()]), source


def losses(model, batch):
    """(n,): of each window (n, LENGTH), the mean over its characters."""
    logits = model(input_ids=batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(batch), -1).mean(1)


def new_model(sharded):
    size = dict(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**size, **off))
    for module in (*model.transformer.h, model) if sharded else ():
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


@torch.no_grad()
def mean_loss(model, text):
    """Over 512 windows of a text, the same in every call."""
    batches = windows(text, 512, torch.Generator().manual_seed(0)).split(64)
    return torch.stack([losses(model, batch).mean() for batch in batches]).mean().item()


def train(shares, learn, seed, steps, data, part=slice(None), sharded=False):
    """(test loss, weights of the sources) of a model whose windows are sampled by `shares`. part: this process's of them.
    learn: None, "guided", or N steps to go back through."""
    texts, val, test = data
    torch.manual_seed(seed)
    model = new_model(sharded)
    generator = torch.Generator().manual_seed(seed)  # all processes draw the same batches
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    logits = torch.zeros(len(NAMES), requires_grad=learn is not None)  # λ, in every process the same plain tensor
    n = learn if isinstance(learn, int) else 0
    meta_optimizer = torch.optim.Adam([logits], lr=META_LR * max(n / META_EVERY, 1) ** 0.5)
    trajectory = evograd.Trajectory(model, optimizer, [logits]) if n else None
    for step in (bar := tqdm(range(steps), mininterval=1, **({"disable": True} if part.start else {}))):
        batch, source = (t[part] for t in sample(texts, shares, generator))
        val_batch = windows(val, VAL_BATCH, generator)[part]
        train_loss = lambda m: (len(NAMES) * logits.softmax(0)[source] * losses(m, batch)).mean()
        val_loss = lambda m: losses(m, val_batch).mean()
        remembered, result = n and step >= WARM_UP, None
        if remembered:
            trajectory.step(train_loss)
            result = trajectory.hypergradient(val_loss) if len(trajectory) == n else None
        elif learn == "guided" and step % META_EVERY == 0:
            result = evograd.guided(train_loss, val_loss, model, [logits], inner_lr=LR)
        if result is not None:
            logits.grad = result.grads[0]
            meta_optimizer.step()
            bar.set_postfix_str(" ".join(f"{n} {w:.2f}" for n, w in zip(NAMES, logits.softmax(0))), refresh=False)
        if not remembered:
            optimizer.zero_grad()
            train_loss(model).backward()  # what it adds to λ's gradient is written over above
            optimizer.step()
    return mean_loss(model, test), logits.detach().softmax(0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=1, help="of the model and the batches")
    parser.add_argument("--steps", type=at_least(1), default=500, help="training steps")
    parser.add_argument("--horizon", type=at_least(1), nargs="*", default=[20], metavar="N", help="steps to go back through")
    parser.add_argument("--fsdp", action="store_true", help="shard the model over the processes that torchrun has started")
    parser.add_argument("--out", type=writable, help="JSON-lines file that result lines are appended to")
    args = parser.parse_args(argv)
    if args.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp given; it needs torchrun --nproc-per-node 2 -m resources.examples.data_mixture --fsdp")
    if args.fsdp:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if args.fsdp else (0, 1)
    if BATCH % size or VAL_BATCH % size:
        parser.error(f"torchrun started {size} processes; a number that divides {BATCH} and {VAL_BATCH} is accepted")
    data, uniform, learned = sources(), torch.full((len(NAMES),), 1 / len(NAMES)), None
    methods = [(m, {"learned": "guided"}.get(m)) for m in METHODS]
    methods += [pair for n in args.horizon for pair in ((f"N = {n}", n), (f"N = {n}, sampled", None))]
    for method, learn in methods:
        start, shares = time.perf_counter(), learned if "sampled" in method else uniform
        test_loss, weights = train(shares, learn, args.seed, args.steps, data, slice(rank, None, size), args.fsdp)
        seconds = time.perf_counter() - start
        learned, weights = (weights, weights) if learn else (learned, shares)
        if rank == 0:
            shown = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(NAMES, weights))
            print(f"{method:18} test loss {test_loss:.4f} ({shown}), {seconds:.0f} s", flush=True)
            if args.out:
                config = {"method": method, "seed": args.seed, "steps": args.steps, "processes": size}
                metrics = {"test_loss": test_loss, "weights": dict(zip(NAMES, weights.tolist()))}
                append_run(args.out, "examples_data_mixture", config, metrics, {"seconds": seconds}, "cpu")
    if args.fsdp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
