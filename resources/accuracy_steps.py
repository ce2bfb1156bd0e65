"""How far evograd.Trajectory, at its defaults, is from differentiating twice through the same steps: the table of
resources/accuracy_steps.md.

    python -m resources.accuracy_steps [NETWORK …]     measure, and append a line for each case to resources/accuracy_steps.jsonl
    python -m resources.accuracy_steps --table          write the table from these lines

Networks are trained 100 steps, or none; then N steps of momentum SGD and of AdamW are remembered, and one hypergradient is taken, in
float32, by one side and by two. The measure goes back through the same float32 steps by double backward (by="unrolled"). λ: 500 sample
weights and a scale of the inputs on scikit-learn's digits with 30 % wrong labels; for GPT-2 the weights of three sources.
GPT-2 with LoRA needs peft. Some ten minutes on one core.
"""

import warnings

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import nn

import evograd

from .accuracy import command

N_TRAIN, WARM, HORIZONS = 500, (100, 0), (1, 20)


class Rows(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.lstm(x[:, 0])[0][:, -1])


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn():
    first = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def of_digits(make, size, batch, sgd, adamw):
    """A function that makes (model, λ, next training loss, validation loss, learning rates)."""

    def made():
        digits = load_digits()
        order = torch.randperm(len(digits.target))
        x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None], torch.tensor(digits.target)[order]
        x = F.interpolate(x, size=(size, size), mode="bilinear").expand(-1, 1 if size == 8 else 3, -1, -1)
        wrong = torch.rand(N_TRAIN) < 0.3
        y[:N_TRAIN] = torch.where(wrong, (y[:N_TRAIN] + 1) % 10, y[:N_TRAIN])
        weights, scale = torch.zeros(N_TRAIN, requires_grad=True), torch.ones(1, 1, 1, requires_grad=True)

        def train_loss():
            i = torch.randint(N_TRAIN, (batch,))
            return lambda m: (2 * weights.sigmoid()[i] * F.cross_entropy(m(x[i] * scale), y[i], reduction="none")).mean()

        val = slice(N_TRAIN, N_TRAIN + 200)
        return make(), [weights, scale], train_loss, lambda m: F.cross_entropy(m(x[val]), y[val]), {"sgd": sgd, "adamw": adamw}

    return made


def language_model(lora):
    def made():
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
        texts, weights = torch.randint(128, (3, 512)), torch.zeros(3, requires_grad=True)

        def windows(source):
            start = torch.randint(512 - 33, (len(source),))
            own = [texts[k, i : i + 32] if k < 2 else torch.randint(128, (32,)) for k, i in zip(source.tolist(), start.tolist())]
            return torch.stack(own)

        def losses(m, x):
            return F.cross_entropy(m(input_ids=x).logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)

        def train_loss():
            source = torch.randint(3, (24,))
            x = windows(source)
            return lambda m: (3 * weights.softmax(0)[source] * losses(m, x)).mean()

        x_val = windows(torch.zeros(32, dtype=torch.long))
        return model, [weights], train_loss, lambda m: losses(m, x_val).mean(), {"sgd": 0.1, "adamw": 3e-3}

    return made


NETWORKS = {
    "MLP": of_digits(mlp, 8, 64, 0.05, 1e-3),
    "CNN": of_digits(cnn, 8, 64, 0.05, 1e-3),
    "LSTM": of_digits(Rows, 8, 64, 0.1, 3e-3),
    "GPT-2": language_model(False),
    "GPT-2, LoRA": language_model(True),
    "ResNet-18 (torchvision)": of_digits(lambda: torchvision.models.resnet18(num_classes=10), 32, 16, 0.02, 1e-3),
}


def found(name, optimizer, warm, n, **settings):
    """(λ's gradient as one vector, curvature of the last pair, warnings)"""
    torch.manual_seed(0)
    model, lam, train_loss, val_loss, rates = NETWORKS[name]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, options = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}[optimizer]
    optimizer = kind(parameters, lr=rates[optimizer], **options)
    trajectory = evograd.Trajectory(model, optimizer, lam, **settings)
    for _ in range(warm):
        optimizer.zero_grad()
        train_loss()(model).backward(inputs=parameters)
        optimizer.step()
    for _ in range(n):
        trajectory.step(train_loss())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = trajectory.hypergradient(val_loss)
    told = [w for w in told if "hypergradient may be far off" in str(w.message)]
    return torch.cat([g.flatten() for g in result.grads]).double(), result.curvature, len(told)


def measured(name):
    for optimizer in ("sgd", "adamw"):
        for warm in WARM:
            for n in HORIZONS:
                exact, *_ = found(name, optimizer, warm, n, by="unrolled")
                for sides in (1, 2):
                    grads, curvature, told = found(name, optimizer, warm, n, sides=sides)
                    config = {"network": name, "optimizer": optimizer, "warm": warm, "n": n, "sides": sides}
                    cosine = F.cosine_similarity(grads, exact, dim=0).item()
                    norm = (grads.norm() / exact.norm()).item()
                    yield config, {"cosine": cosine, "norm": norm, "curvature": curvature, "warned": bool(told)}


def table(runs):
    """cosine, norm over norm of each case."""
    cells = {tuple(run["config"].values()): run["metrics"] for run in runs}
    columns = [(warm, n, sides) for warm in WARM for n in HORIZONS for sides in (1, 2)]
    heads = [f"{f'after {w} steps' if w else 'from scratch'}, N = {n}, {'one side' if s == 1 else 'two'}" for w, n, s in columns]
    lines = ["| Network | Optimizer | " + " | ".join(heads) + " |", "| :-- | :-- |" + " --: |" * len(heads)]
    for name, optimizer in dict.fromkeys((run["config"]["network"], run["config"]["optimizer"]) for run in runs):
        row = [cells.get((name, optimizer, *column)) for column in columns]
        row = ["–" if m is None else f"{m['cosine']:.5f}, {m['norm']:.3f}{' (warned)' * m['warned']}" for m in row]
        lines.append(f"| {name} | {'AdamW' if optimizer == 'adamw' else 'SGD, momentum'} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(argv=None):
    command(argv, __doc__, NETWORKS, measured, table, "accuracy_steps")


if __name__ == "__main__":
    main()
