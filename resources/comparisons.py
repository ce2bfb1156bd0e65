"""evograd.compare on three problems: the output that resources/comparisons.md shows.

    python -m resources.comparisons [mlp | resnet32 | lora] [--readme resources/comparisons.md]

lora needs the package peft. --readme writes what was printed between <!-- compare:NAME --> and <!-- /compare -->.
"""

import argparse
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import evograd
from label_noise_mwn.models import resnet, weight_net


def weighted(x, y, x_val, y_val, weights):
    """Closures of sample weights that are λ: (training loss, validation loss)."""
    train_loss = lambda model: (weights.sigmoid() * F.cross_entropy(model(x), y, reduction="none")).mean()
    return train_loss, lambda model: F.cross_entropy(model(x_val), y_val)


def mlp():
    """A network of three layers, 6,467 parameters, batch 32; λ weighs the samples."""
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
    )
    x, y, x_val, y_val = torch.randn(32, 32), torch.randint(3, (32,)), torch.randn(32, 32), torch.randint(3, (32,))
    weights = torch.zeros(32, requires_grad=True)
    return *weighted(x, y, x_val, y_val, weights), model, [weights]


def resnet32():
    """Label noise: ResNet-32, batch 100; λ are the parameters of a weight net, which sees the samples' losses at θ."""
    model, net = resnet(32, 10), weight_net()
    x, y, x_val, y_val = (make() for make in 2 * [lambda: torch.randn(100, 3, 32, 32), lambda: torch.randint(10, (100,))])
    with torch.no_grad():
        seen = F.cross_entropy(model(x), y, reduction="none")[:, None]

    def train_loss(model):
        weights = net(seen)[:, 0]
        return (weights * F.cross_entropy(model(x), y, reduction="none")).sum() / weights.sum()

    return train_loss, lambda model: F.cross_entropy(model(x_val), y_val), model, list(net.parameters())


def lora():
    """A BERT of four layers and 256 channels with LoRA (peft) of rank 8 on queries and values: a frozen base, θ are the adapters;
    32 sequences of 64 tokens, λ weighs the samples."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=3,
        attn_implementation="eager",
    )  # fmt: skip
    adapters = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(BertForSequenceClassification(config), adapters)
    x, y, x_val, y_val = (make() for make in 2 * [lambda: torch.randint(1000, (32, 64)), lambda: torch.randint(3, (32,))])
    weights = torch.zeros(32, requires_grad=True)
    train_loss, val_loss = weighted(x, y, x_val, y_val, weights)
    logits = lambda loss: lambda model: loss(lambda tokens: model(input_ids=tokens).logits)
    return logits(train_loss), logits(val_loss), model, [weights]


PROBLEMS = {"mlp": mlp, "resnet32": resnet32, "lora": lora}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"{', '.join(PROBLEMS)}; default: all")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the output between its markers there")
    args = parser.parse_args(argv)
    unknown = set(args.problems) - set(PROBLEMS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} given; accepted are {', '.join(PROBLEMS)}")
    for name in args.problems or PROBLEMS:
        print(f"\n== {name}: {' '.join(PROBLEMS[name].__doc__.split())}")
        torch.manual_seed(0)
        start = time.perf_counter()
        result = evograd.compare(*PROBLEMS[name](), inner_lr=0.1)
        print(f"{result}\nIt took {time.perf_counter() - start:.0f} s.")
        if args.readme:
            block = f"<!-- compare:{name} -->\n```text\n{result}\n```\n<!-- /compare -->"
            text = args.readme.read_text(encoding="utf-8")
            pattern = rf"<!-- compare:{name} -->.*?<!-- /compare -->"
            if not re.search(pattern, text, re.DOTALL):
                raise SystemExit(f"error: {args.readme} has no marker <!-- compare:{name} -->")
            args.readme.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
