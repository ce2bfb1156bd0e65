"""How far evograd.guided, at its defaults, is from exact T1–T2, network by network: the table of resources/accuracy.md.

    python -m resources.accuracy [NETWORK …]          measure, and append a line for each case to resources/accuracy.jsonl
    python -m resources.accuracy --table               write the table from these lines

Networks are trained five steps, then one hypergradient is taken by sample weights, by scales of the inputs where these are
images, and by the weights of two domains, which nearly cancel. The measure is T1–T2 by double backward in float64. The radius
begins where it does by itself, a thousand times nearer and a thousand times further. gpt2 with adapters needs peft. About five
minutes on two cores.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import evograd
from cross_domain_fewshot.models import FewShotModel, episode_targets
from evograd.lab.records import append_run, read_runs
from evograd.lab.tables import write_between_markers
from evograd.radius import start
from label_noise_mwn.models import resnet

ROOT = Path(__file__).parent
BATCH, LR, IMAGE, CLASSES, VOCABULARY = 8, 0.02, 64, 5, 128


def vision(make, size=IMAGE):
    def made():
        return make(num_classes=CLASSES), lambda: (torch.randn(BATCH, 3, size, size), torch.randint(CLASSES, (BATCH,)))

    return made


def few_shot(backbone, size):
    """An episode of 5 classes, 1 shot, 2 queries; a sample is a query."""

    class Episodic(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = FewShotModel(backbone, "relationnet", 5, size, 5, width=16, transform=False)

        def forward(self, images):
            return self.model(images, 1)

    def data():
        images = torch.randn(5, 3, 3, size, size)
        return images, episode_targets(torch.zeros(10, 5))

    return lambda: (Episodic(), data)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(VOCABULARY, 32), nn.LSTM(32, 48, 2, batch_first=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class LastToken(nn.Module):
    """A language model, of which the logits of the last token are taken."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens).logits[:, -1, :CLASSES]


def text(make):
    return lambda: (make(), lambda: (torch.randint(VOCABULARY, (BATCH, 16)), torch.randint(CLASSES, (BATCH,))))


def gpt2(adapter=None):
    def made():
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
        if adapter is not None:
            import peft

            configs = {
                "lora": lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
                "ia3": lambda: peft.IA3Config(
                    target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True
                ),
                "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            }
            model = peft.get_peft_model(model, configs[adapter]())
        return LastToken(model)

    return text(made)


def mlp(width):
    layers = [nn.Flatten(), nn.Linear(3 * 16 * 16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return vision(lambda num_classes: nn.Sequential(*layers, nn.Linear(width, num_classes)), 16)


NETWORKS = {
    "MLP, 8 wide": mlp(8),
    "MLP, 32 wide": mlp(32),
    "MLP, 64 wide": mlp(64),
    "ResNet-18 (torchvision)": vision(torchvision.models.resnet18),
    "ShuffleNet (torchvision)": vision(torchvision.models.shufflenet_v2_x0_5),
    "EfficientNet-B0 (torchvision)": vision(torchvision.models.efficientnet_b0),
    "ViT of 4 layers (torchvision)": vision(
        lambda num_classes: torchvision.models.VisionTransformer(IMAGE, 16, 4, 4, 64, 128, dropout=0.1, num_classes=num_classes)
    ),
    "few-shot Conv-4": few_shot("conv4", 84),
    "few-shot ResNet-10": few_shot("resnet10", 64),
    "label noise ResNet-32": vision(lambda num_classes: resnet(32, num_classes), 32),
    "LSTM": text(Recurrent),
    "GPT-2": gpt2(),
    "GPT-2, LoRA": gpt2("lora"),
    "GPT-2, IA3": gpt2("ia3"),
    "GPT-2, prompt tuning": gpt2("prompt"),
}
STARTS = {"as it begins": 1, "1,000 times nearer": 1e-3, "1,000 times further": 1e3}


def closures(by, dtype, x, y, x_val, y_val):
    """(train_loss, val_loss, λ) of one kind of hyperparameters."""
    cast = lambda t: t.to(dtype) if t.is_floating_point() else t
    x, x_val, n = cast(x), cast(x_val), len(y)
    size = {"sample weights": n, "input scales": x.shape[-1], "two domains": 2}[by]
    lam = torch.full((size,), 1.0 if by == "input scales" else 0.0, dtype=dtype, requires_grad=True)

    def train_loss(model):
        losses = F.cross_entropy(model(x * lam if by == "input scales" else x), y, reduction="none")
        if by == "sample weights":
            losses = 2 * lam.sigmoid() * losses
        if by == "two domains":
            losses = 2 * lam.softmax(0)[torch.arange(n) % 2] * losses
        return losses.mean()

    return train_loss, lambda model: F.cross_entropy(model(x_val), y_val), lam


def measured(name):
    """A (config, metrics) for each kind of λ, precision and start."""
    torch.manual_seed(0)
    model, data = NETWORKS[name]()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    for _ in range(5):
        x, y = data()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    batch = (*data(), *data())
    images = batch[0].is_floating_point()
    for by in ("sample weights", "two domains", *(["input scales"] if images else [])):
        exact = None
        for dtype in (torch.float64, torch.float32):
            train_loss, val_loss, lam = closures(by, dtype, *batch)
            problem = (train_loss, val_loss, model.to(dtype), [lam])
            torch.manual_seed(1)
            second_order = evograd.baselines.unrolled(*problem, inner_lr=LR).grads[0].double()
            exact = second_order if exact is None else exact
            for where, factor in STARTS.items():
                torch.manual_seed(1)
                radius = evograd.Radius(factor * start(torch.finfo(dtype).eps))
                result = evograd.guided(*problem, inner_lr=LR, radius=radius)
                error, own = (((g - exact).norm() / exact.norm()).item() for g in (result.grads[0].double(), second_order))
                config = {"network": name, "by": by, "dtype": str(dtype)[6:], "start": where}
                yield (
                    config,
                    {"error": error, "curvature": result.curvature, "retakes": radius.retakes, "second_order_error": own},
                )
        yield from in_low_precision(name, by, (train_loss, val_loss, model, [lam]), exact)
        model.to(torch.float32)


def in_low_precision(name, by, problem, exact):
    """The same where the losses run under autocast to bfloat16. error: None where guided says that nothing resolves."""
    train_loss, val_loss, *rest = problem

    def low(loss):
        def run(model):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(model)

        return run

    torch.manual_seed(1)
    radius = evograd.Radius()
    try:
        result = evograd.guided(low(train_loss), low(val_loss), *rest, inner_lr=LR, radius=radius)
        metrics = {
            "error": ((result.grads[0].double() - exact).norm() / exact.norm()).item(),
            "cosine": F.cosine_similarity(result.grads[0].double().flatten(), exact.flatten(), dim=0).item(),
            "curvature": result.curvature,
        }
    except RuntimeError as error:
        metrics = {"error": None, "cosine": None, "reason": str(error)}
    config = {"network": name, "by": by, "dtype": "bfloat16", "start": "as it begins"}
    yield config, metrics | {"retakes": radius.retakes, "second_order_error": None}


def table(runs):
    """Relative errors, the largest over kinds of λ; the two domains have columns of their own."""
    cells = {tuple(run["config"][key] for key in ("network", "by", "dtype", "start")): run["metrics"] for run in runs}

    def of(name, two, dtype, where):
        return [m for (n, by, d, s), m in cells.items() if (n, d, s) == (name, dtype, where) and (by == "two domains") == two]

    columns = [(dtype, where) for dtype in ("float64", "float32") for where in STARTS]
    heads = [f"{dtype}, {where}" for dtype, where in columns]
    heads += ["T1–T2 in float32", "two domains, float64", "two domains, float32", "bfloat16: cosine"]
    lines = ["| Network | " + " | ".join(heads) + " |", "| :-- |" + " --: |" * len(heads)]
    for name in dict.fromkeys(run["config"]["network"] for run in runs):
        row = []
        for dtype, where in columns:
            found = of(name, False, dtype, where)
            row.append(f"{max(m['error'] for m in found):.0e} ({sum(m['retakes'] for m in found)})")
        row.append(f"{max(m['second_order_error'] for m in of(name, False, 'float32', columns[0][1])):.0e}")
        row += [f"{of(name, True, dtype, columns[0][1])[0]['error']:.0e}" for dtype in ("float64", "float32")]
        low = [m["cosine"] for m in of(name, False, "bfloat16", columns[0][1])]
        row.append(", ".join("error" if cosine is None else f"{cosine:.3f}" for cosine in low))
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def command(argv, doc, networks, measured, table, name):
    """The command line of this script, and of `accuracy_steps`: result lines in NAME.jsonl, the table in NAME.md."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="*", metavar="NETWORK", help=f"of {', '.join(networks)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / f"{name}.jsonl")
    parser.add_argument("--table", nargs="?", type=Path, const=ROOT / f"{name}.md", help="write the table into this file")
    args = parser.parse_args(argv)
    if unknown := set(args.network) - networks.keys():
        parser.error(f"{', '.join(sorted(unknown))} given; accepted are {', '.join(networks)}")
    if args.table:
        write_between_markers(args.table, {name: table(read_runs([args.out])[0])})
        return
    for network in (bar := tqdm(args.network or networks)):
        bar.set_description(network)
        for config, metrics in measured(network):
            append_run(args.out, name, config, metrics, {}, "cpu")
            bar.write(json.dumps({**config, **metrics}))


def main(argv=None):
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        command(argv, __doc__, NETWORKS, measured, table, "accuracy")


if __name__ == "__main__":
    main()
