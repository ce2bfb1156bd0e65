"""The problems at the size at which memory is measured: a network, and weights of the samples as hyperparameters."""

import torch
import torch.nn.functional as F
from torch import nn

import evograd


class Block(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.stride = n_out // n_in
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, self.stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
        return F.relu(out + x)


def resnet(depth=32, n_classes=10):
    """ResNet-32 (or 8, 14, 20, …) for CIFAR-10, shortcuts of option A."""
    n = (depth - 2) // 6
    widths = [16] * (n + 1) + [32] * n + [64] * n
    blocks = [Block(a, b) for a, b in zip(widths[:-1], widths[1:])]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes))


def steps(model, size, batch, **settings):
    """{name: a plain training step (SGD with momentum), or one meta-step}, with a weight net of the samples' losses."""
    weight_net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y, x_val, y_val = (f() for f in [lambda: torch.randn(batch, 3, size, size), lambda: torch.randint(0, 10, (batch,))] * 2)

    def train_loss(m):
        losses = F.cross_entropy(m(x), y, reduction="none")
        return (weight_net(losses.detach()[:, None])[:, 0] * losses).mean()

    def val_loss(m):
        return F.cross_entropy(m(x_val), y_val)

    def plain():
        optimizer.zero_grad()
        train_loss(model).backward(inputs=list(model.parameters()))
        optimizer.step()

    def meta(estimator, **settings):
        def step():
            optimizer.zero_grad()  # a meta-step comes before the model's gradients are there, or after they were used
            estimator(train_loss, val_loss, model, list(weight_net.parameters()), **settings)

        return step

    return {
        "plain": plain,
        "evograd": meta(evograd.hypergradient),
        "many": meta(evograd.hypergradient, n_candidates=64),
        "guided": meta(evograd.hypergradient, noise="guided"),
        "mixed_mode": meta(evograd.mixed_mode, inner_lr=0.1, lookahead="sgd"),
        "unrolled": meta(evograd.baselines.unrolled, inner_lr=0.1),
    }


def parameter_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())
