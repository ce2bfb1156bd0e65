"""Small bilevel problems in float64, one for every kind of model that the step must handle."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import evograd

N, D, C = 8, 5, 3  # samples, features, classes


@dataclass
class Bilevel:
    model: nn.Module
    hyperparameters: list[Tensor]
    train_loss: object
    val_loss: object
    parameters: object = None

    def args(self):
        return self.train_loss, self.val_loss, self.model, self.hyperparameters


class Tied(nn.Module):
    """An auto-encoder in front of a classifier: its weight is used twice."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.head(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))


class Gate(nn.Module):
    """Features scaled by a hyperparameter inside of the model."""

    def __init__(self):
        super().__init__()
        self.features, self.gate, self.head = nn.Linear(D, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.gate * torch.tanh(self.features(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(D, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(1).repeat(1, 3, 1))[0][:, -1])


class Sum(nn.Module):
    """Two parameters that are only ever added: autograd hands both the same gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, D)), nn.Linear(D, C))

    def forward(self, x):
        return self.head(torch.tanh(x @ (self.a + self.b)))


def mlp(*layers):
    return nn.Sequential(nn.Linear(D, 6), *layers, nn.Tanh(), nn.Linear(6, C))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


class _Once(Sine):
    backward = staticmethod(once_differentiable(Sine.backward))


class OnceDifferentiable(nn.Module):
    """A sine with a jvp, whose second derivative by reverse mode is marked as missing."""

    def forward(self, x):
        return _Once.apply(x)


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


def normed():
    model = mlp()
    weight_norm(model[0])
    return model


class Softplus(nn.Module):
    def forward(self, x):
        return F.softplus(x)


def parametrized():
    model = mlp()
    register_parametrization(model[0], "weight", Softplus())
    return model


MODELS = {
    "mlp": mlp,
    "batchnorm": lambda: mlp(nn.BatchNorm1d(6)),
    "dropout": lambda: mlp(nn.Dropout(0.3)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, D)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)),
    "tied": Tied,
    "sum": Sum,
    "frozen": frozen,
    "weight_norm": normed,
    "parametrized": parametrized,
    "lstm": Recurrent,
}
KINDS = [*MODELS, "eval_mode", "hyperparameters_inside", "val_depends_directly", "mixed_shapes", "head_only"]


def bilevel(kind: str, seed: int = 0) -> Bilevel:
    """A problem of one of KINDS: classification with learned weights of the samples, unless the kind says otherwise."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        special = {"hyperparameters_inside": Gate, "eval_mode": MODELS["batchnorm"]}
        model = {**MODELS, **special}.get(kind, mlp)()
        x, y, x_val, y_val = torch.randn(N, D), torch.randint(0, C, (N,)), torch.randn(N, D), torch.randint(0, C, (N,))
        weights = torch.randn(N, requires_grad=True)
        decay, shift = torch.tensor(0.3, requires_grad=True), torch.randn(2, D, requires_grad=True)
    finally:
        torch.set_default_dtype(torch.float32)

    def weighted(model):
        return (weights.sigmoid() * F.cross_entropy(model(x), y, reduction="none")).mean()

    def val_loss(model):
        return F.cross_entropy(model(x_val), y_val)

    if kind == "hyperparameters_inside":
        return Bilevel(model, [model.gate], lambda m: F.cross_entropy(m(x), y), val_loss)
    if kind == "eval_mode":  # set by the closure of the validation loss, which the training loss must not see
        return Bilevel(model, [weights], weighted, lambda m: val_loss(m.eval()))
    if kind == "val_depends_directly":
        return Bilevel(
            model,
            [decay],
            lambda m: weighted(m) + decay * F.cross_entropy(m(x), y),
            lambda m: val_loss(m) + (decay - 1) ** 2,
        )
    if kind == "mixed_shapes":  # a scalar, a vector and a matrix that is used before the network

        def train_loss(model):
            losses = F.cross_entropy(model(x + shift.sum(0)), y, reduction="none")
            return (weights.sigmoid() * losses).mean() + decay * losses.square().mean()

        return Bilevel(model, [decay, weights, shift], train_loss, val_loss)
    return Bilevel(model, [weights], weighted, val_loss, parameters=["2.weight", "2.bias"] if kind == "head_only" else None)


def estimate(*problem, noise="sign", estimator=None, **settings):
    """The paper's estimator by its kind of noise, or guided, which is a function of its own; at θ and the paper's scale."""
    if "guided" in (noise, estimator):
        return evograd.guided(*problem, **{"inner_lr": 1e-5, "lookahead": None, **settings})
    return evograd.hypergradient(*problem, noise=noise, **settings)
