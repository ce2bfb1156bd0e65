"""The problems at the size at which memory is measured: a network, and weights of the samples as hyperparameters."""

import torch
import torch.nn.functional as F

import evograd
from label_noise_mwn.models import weight_net as make_weight_net


def steps(model, size, batch, **settings):
    """{name: a plain training step (SGD with momentum), or one meta-step}, with a weight net of the samples' losses."""
    weight_net = make_weight_net()
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
        "guided": meta(evograd.guided, inner_lr=0.1, lookahead=None, radius=0.01),
        "guided_own_kinks": meta(evograd.guided, inner_lr=0.1, lookahead=None, radius=0.01, share_kinks=False),
        "mixed_mode": meta(evograd.mixed_mode, inner_lr=0.1, lookahead="sgd"),
        "unrolled": meta(evograd.baselines.unrolled, inner_lr=0.1),
    }


def parameter_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())
