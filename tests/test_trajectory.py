"""N steps of the optimizer that really trains: equal to differentiating through its own steps, and training as it is without."""

import copy
import functools
import gc
import math
import tempfile
import warnings
import weakref
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evograd
from evograd import lookback, measuring
from evograd.host.away import Away
from evograd.host.vectors import Bucket
from evograd.lab.processes import ALONE
from evograd.optimizers import UPDATES

from .forked import CONTEXT, server
from .problems import Recurrent, Tied
from .test_torchrun import FEW_SHOT, METAXL, make_step

D, C, BATCH, DTYPE = 5, 3, 8, torch.float64
SGD, ADAM, ADAMW, RMSPROP, ADAGRAD = UPDATES
OPTIMIZERS = {
    "sgd": (SGD, dict(lr=0.1)),
    "momentum": (SGD, dict(lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01)),
    "nesterov": (SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
    "sgd_maximize": (SGD, dict(lr=0.01, momentum=0.5, maximize=True, weight_decay=0.1)),
    "adam": (ADAM, dict(lr=0.01, weight_decay=0.1)),
    "amsgrad": (ADAM, dict(lr=0.01, betas=(0.8, 0.9), amsgrad=True)),
    "adam_maximize": (ADAM, dict(lr=0.01, maximize=True, eps=1e-3)),
    "adamw": (ADAMW, dict(lr=0.01, weight_decay=0.1)),
    "adamw_amsgrad": (ADAMW, dict(lr=0.01, amsgrad=True)),
    "rmsprop": (RMSPROP, dict(lr=0.01, eps=1e-3)),
    "rmsprop_centered": (RMSPROP, dict(lr=0.01, centered=True, momentum=0.5, weight_decay=0.1, eps=1e-3)),
    "adagrad": (ADAGRAD, dict(lr=0.05, lr_decay=0.1, weight_decay=0.01, initial_accumulator_value=0.1)),
}


def mlp():
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, C))


def cnn():
    layers = nn.Conv2d(1, 6, (1, 2)), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
    return nn.Sequential(nn.Unflatten(1, (1, 1, D)), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(16, C))


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


def dropout():
    return nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, C))


MODELS = {"mlp": mlp, "cnn": cnn, "lstm": Recurrent, "tied": Tied, "frozen": frozen, "dropout": dropout}


def guarded(v):
    """√v, with no slope at 0."""
    return torch.where(v > 0, torch.where(v > 0, v, 1) ** 0.5, 0)


class Run:
    """Training of a small model whose samples are weighted and whose inputs are scaled by λ: `warm` steps, then n remembered."""

    def __init__(self, model="mlp", optimizer="momentum", warm=5, dtype=DTYPE, groups=False, decay=None, **settings):
        torch.manual_seed(0)
        kind, of = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        self.model = (MODELS[model] if isinstance(model, str) else model)().to(dtype)
        self.x, self.y = torch.randn(40, BATCH, D, dtype=dtype), torch.randint(C, (40, BATCH))
        self.x_val, self.y_val = torch.randn(BATCH, D, dtype=dtype), torch.randint(C, (BATCH,))
        self.lam = [torch.zeros(BATCH, dtype=dtype, requires_grad=True), torch.ones(D, dtype=dtype, requires_grad=True)]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if groups:
            parameters = [dict(params=parameters[:2], lr=0.02), dict(params=parameters[2:], weight_decay=0.1)]
        self.optimizer = kind(parameters, **of)
        self.settings, self.n = settings, 0
        for _ in range(warm):
            self.optimizer.zero_grad()
            self.next()(self.model).backward(inputs=[p for p in self.model.parameters() if p.requires_grad])
            self.optimizer.step()

    def next(self):
        x, y = self.x[self.n % 40], self.y[self.n % 40]
        self.n += 1
        return lambda m: (self.lam[0].exp() * F.cross_entropy(m(x * self.lam[1]), y, reduction="none")).mean()

    def val_loss(self, m):
        return F.cross_entropy(m(self.x_val), self.y_val)

    def trajectory(self, n, accumulated=1, clip_norm=None, **settings):
        trajectory = evograd.Trajectory(self.model, self.optimizer, self.lam, **{"sides": 2, **self.settings, **settings})
        for _ in range(n):
            closures = [self.next() for _ in range(accumulated)]
            trajectory.step(closures if accumulated > 1 else closures[0], clip_norm=clip_norm)
        return trajectory

    def exact(self, n, accumulated=1, clip_norm=None):
        """(dℓ_V/dλ, dℓ_V/dθ_0): autograd through torch.optim's own steps, by differentiable=True; √ has no slope at 0."""
        own = dict(self.model.named_parameters())
        names = [name for name, p in own.items() if p.requires_grad]
        start = {name: own[name].detach().clone().requires_grad_() for name in names}
        optimizer = copy.deepcopy(self.optimizer)
        places = dict(zip((p for g in self.optimizer.param_groups for p in g["params"]), (
            (g, i) for g in optimizer.param_groups for i in range(len(g["params"]))
        )))  # fmt: skip
        for of in (optimizer.defaults, *optimizer.param_groups):
            of.update(differentiable=True, foreach=False)
        theta = dict(start)
        call = lambda at: lambda x: torch.func.functional_call(self.model, at, (x,))
        for _ in range(n):
            losses = [self.next()(call({**theta, **{b: t.clone() for b, t in self.model.named_buffers()}})) for _ in range(accumulated)]
            grads = torch.autograd.grad(sum(losses) / accumulated, list(theta.values()), create_graph=True)
            if clip_norm is not None:
                norm = torch.stack([g.norm() for g in grads]).norm()
                grads = [g * (clip_norm / (norm + 1e-6)).clamp(max=1) for g in grads]
            for name, g in zip(names, grads):
                group, i = places[own[name]]
                before, p = group["params"][i], theta[name].clone()
                state = optimizer.state.pop(before, {})
                optimizer.state[p] = {k: s.to(DTYPE, copy=True) for k, s in state.items() if s is not None}  # steps too
                group["params"][i], p.grad, theta[name] = p, g, p
            with mock.patch.object(torch.Tensor, "sqrt", guarded):
                optimizer.step()
        loss = self.val_loss(call({**theta, **dict(self.model.named_buffers())}))
        grads = torch.autograd.grad(loss, [*self.lam, *start.values()])
        return grads[:2], dict(zip(names, grads[2:]))


def error(a, b):
    a, b = (torch.cat([t.flatten() for t in (v.values() if isinstance(v, dict) else v)]).double() for v in (a, b))
    return ((a - b).norm() / b.norm()).item()


def both(n, *, model="mlp", optimizer="momentum", groups=False, step={}, **settings):  # noqa: B006
    """(what Trajectory finds, what autograd finds) of the same steps."""
    run, reference = (Run(model, optimizer, groups=groups) for _ in range(2))
    state = torch.get_rng_state()
    result = run.trajectory(n, **step, **settings).hypergradient(run.val_loss, start=True)
    torch.set_rng_state(state)
    return result, reference.exact(n, **step)


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer, n):
    result, (grads, start) = both(n, optimizer=optimizer)
    assert error(result.grads, grads) < 1e-7
    assert error(result.start, start) < 1e-6


VARIANTS = {
    "plain": {},
    "accumulated": dict(step=dict(accumulated=2)),
    "clipped": dict(step=dict(clip_norm=0.3)),
    "groups": dict(groups=True),
    "every": dict(every=3),
    "every_clipped": dict(every=3, step=dict(clip_norm=0.3, accumulated=2)),
    "in_place": dict(strategy="in_place"),
    "mixed_mode": dict(by="mixed_mode"),
    "unrolled": dict(by="unrolled"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "lstm", "tied", "frozen", "dropout"])
def test_every_model(model, optimizer, variant):
    result, (grads, start) = both(5, model=model, optimizer=optimizer, **VARIANTS[variant])
    assert error(result.grads, grads) < 1e-7
    assert error(result.start, start) < 1e-6


def language_model(lora):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    rates = dict(resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel._from_config(GPT2Config(**sizes, **rates), attn_implementation="eager").to(DTYPE)
    if lora:
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)).to(DTYPE)
    return model


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("lora", [False, True])
def test_language_models(lora, optimizer):
    kind, of = OPTIMIZERS[optimizer]
    found = []
    for by in ("guided", "unrolled"):
        model, weights = language_model(lora), torch.zeros(4, dtype=DTYPE, requires_grad=True)
        tokens = torch.randint(16, (12, 4, 8), generator=torch.Generator().manual_seed(0))

        def losses(m, ids):
            return F.cross_entropy(m(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

        optimizer = kind([p for p in model.parameters() if p.requires_grad], **of)
        trajectory = evograd.Trajectory(model, optimizer, [weights], sides=2, by=by)
        for t in range(9):
            if t == 5:
                trajectory.clear()
            trajectory.step(lambda m: (weights.exp() * losses(m, tokens[t])).mean())  # noqa: B023
        found.append(trajectory.hypergradient(lambda m: losses(m, tokens[-1]).mean()).grads)
    assert error(*found) < 1e-7


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw", "rmsprop_centered"])
def test_training_is_as_it_is_without(optimizer):
    plain, run = Run("cnn", optimizer), Run("cnn", optimizer)
    schedules = [torch.optim.lr_scheduler.StepLR(r.optimizer, 2, 0.5) for r in (plain, run)]
    trajectory = run.trajectory(0)
    for t in range(6):
        plain.optimizer.zero_grad()
        closures = [plain.next(), plain.next()]
        losses = []
        for closure in closures:
            loss = closure(plain.model) / 2
            loss.backward(inputs=list(plain.model.parameters()))
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        plain.optimizer.step()
        assert torch.isclose(trajectory.step([run.next(), run.next()], clip_norm=0.5), sum(losses))
        for schedule in schedules:
            schedule.step()
        if t == 3:
            trajectory.hypergradient(run.val_loss)
        assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), run.model.state_dict().values()))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.model.parameters(), run.model.parameters()))
    assert all(h.grad is None for h in run.lam)
    assert len(trajectory) == 2


@pytest.mark.parametrize(
    ("optimizer", "setting", "place"),
    [
        ("momentum", "lr", None),
        ("momentum", "momentum", None),
        ("momentum", "weight_decay", None),
        ("adamw", "lr", None),
        ("adamw", "weight_decay", None),
        ("adam", "betas", 0),
        ("adam", "betas", 1),
        ("rmsprop_centered", "alpha", None),
        ("adagrad", "lr_decay", None),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "groups"])
def test_settings(optimizer, setting, place, variant):
    """Against training with another setting, in the last group."""
    n, groups = 4, variant == "groups"

    def trained(change):
        run = Run("mlp", optimizer, groups=groups)
        group = run.optimizer.param_groups[-1]
        moved = list(group[setting]) if place is not None else [group[setting]]
        moved[place or 0] += change
        group[setting] = moved[0] if place is None else tuple(moved)
        trajectory = run.trajectory(n)
        return trajectory, run

    h = 1e-6
    slope = math.fsum(sign * run.val_loss(run.model).item() for sign in (1, -1) for _, run in [trained(sign * h)]) / (2 * h)
    trajectory, run = trained(0)
    found = trajectory.hypergradient(run.val_loss).settings[-1][setting]
    assert found.shape == (n,) if place is None else (n, 2)
    total = found.sum(0) if place is None else found.sum(0)[place]
    assert total.item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_settings_alone():
    run, whole = Run("mlp", "adamw"), Run("mlp", "adamw")
    run.lam, lam = [], run.lam
    trajectory = run.trajectory(0)
    for x, y in zip(run.x[5:9], run.y[5:9]):
        trajectory.step(lambda m: (lam[0].exp() * F.cross_entropy(m(x * lam[1]), y, reduction="none")).mean())  # noqa: B023
    result, expected = trajectory.hypergradient(run.val_loss), whole.trajectory(4).hypergradient(whole.val_loss)
    assert result.grads == []
    assert error(result.settings[0], expected.settings[0]) < 1e-8


def test_a_momentum_of_zero_has_no_derivative_and_a_decay_of_zero_has():
    run = Run("mlp", "sgd")
    assert set(run.trajectory(2).hypergradient(run.val_loss).settings[0]) == {"lr", "weight_decay"}


def test_one_side_in_float32():
    """Errors of one side and of the other take each other away."""
    lengths = {}
    for sides in (1, 2):
        run, reference = (Run("cnn", "adamw", warm=20, dtype=torch.float32) for _ in range(2))
        found = run.trajectory(20, sides=sides).hypergradient(run.val_loss).grads
        grads = reference.trajectory(20, by="unrolled").hypergradient(reference.val_loss).grads
        a, b = (torch.cat([g.flatten() for g in v]) for v in (found, grads))
        assert F.cosine_similarity(a, b, dim=0) > 0.999
        lengths[sides] = (a.norm() / b.norm()).item()
    assert all(abs(length - 1) < 0.02 for length in lengths.values()), lengths


def test_a_frozen_second_moment():
    """√v as it is, and constant in the product."""
    run, reference = Run("mlp", "adamw"), Run("mlp", "adamw")
    result = run.trajectory(4, second_moment="frozen").hypergradient(run.val_loss).grads

    def adamw(theta, g, state, of):
        beta1, beta2 = of["betas"]
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        t = state["step"] + 1
        root = (v / (1 - beta2**t)).detach().sqrt()
        moved = theta * (1 - of["lr"] * of["weight_decay"]) - of["lr"] * m / (1 - beta1**t) / (root + of["eps"])
        return moved, {"exp_avg": m, "exp_avg_sq": v, "step": t}

    expected = reference.trajectory(4, by="unrolled", update=adamw).hypergradient(reference.val_loss).grads
    assert error(result, expected) < 1e-7
    exact, _ = Run("mlp", "adamw").exact(4)
    assert error(result, exact) > 1e-3


class Centered(torch.optim.Optimizer):
    """A step along the gradient less its mean: by matrices, and not by elements."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["total"] = state.get("total", torch.zeros_like(p)) + p.grad
                p.sub_(group["lr"] * (state["total"] - state["total"].mean(-1, keepdim=True)))


def centered(theta, g, state, settings):
    total = state.get("total", 0) + g
    return theta - settings["lr"] * (total - total.mean(-1, keepdim=True)), {"total": total}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("warm", [0, 3])
def test_an_update_of_ones_own(every, warm):
    run = Run("mlp", (Centered, dict(lr=0.05)), warm=warm)
    result = run.trajectory(5, update=centered, every=every).hypergradient(run.val_loss)
    exact = Run("mlp", (Centered, dict(lr=0.05)), warm=warm)
    expected = exact.trajectory(5, update=centered, by="unrolled").hypergradient(exact.val_loss)
    assert error(result.grads, expected.grads) < 1e-7
    h, losses = 1e-5, []
    for sign in (1, -1):
        other = Run("mlp", (Centered, dict(lr=0.05)), warm=warm)
        with torch.no_grad():
            other.lam[1].add_(sign * h * expected.grads[1])
        other.trajectory(5, update=centered)
        losses.append(other.val_loss(other.model).item())
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(expected.grads[1].square().sum().item(), rel=1e-5)


def test_another_update_than_the_one_that_was_made():
    run = Run("mlp", "momentum")
    trajectory = run.trajectory(3, update=lambda theta, g, state, of: (theta - 2 * of["lr"] * g, state))
    with pytest.raises(RuntimeError, match="step 0 of the trajectory did not do what the optimizer's update does"):
        trajectory.hypergradient(run.val_loss)


def test_p_data_is_noticed():
    run = Run("mlp", "momentum")
    trajectory = run.trajectory(2)
    run.model[0].weight.data.mul_(1.1)
    trajectory.step(run.next())
    with pytest.raises(RuntimeError, match="step 1 of the trajectory did not do"):
        trajectory.hypergradient(run.val_loss)


def test_parameters_without_gradients_stay():
    """A part that is used now and then: its steps count for themselves."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.extra, self.head = nn.Linear(D, 8), nn.Linear(8, 8), nn.Linear(8, C)
            self.calls = 0

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.head(h + torch.tanh(self.extra(h)) if self.uses else h)

    found = []
    for by, every in (("guided", 1), ("guided", 3), ("unrolled", 1)):
        run = Run(Sometimes, "adamw", warm=0)
        trajectory = evograd.Trajectory(run.model, run.optimizer, run.lam, sides=2, by=by, every=every)
        for t in range(7):
            closure = run.next()

            def train_loss(m, closure=closure, uses=t % 3 != 1):
                m.uses = uses
                return closure(m)

            run.model.uses = True
            trajectory.step(train_loss)
        run.model.uses = True
        found.append(trajectory.hypergradient(run.val_loss).grads)
    assert error(found[0], found[2]) < 1e-6
    assert error(found[1], found[2]) < 1e-6


def test_names_of_a_loop_are_kept_as_they_were():
    """x and y, which a loop binds anew, in cells, globals, helpers and partials."""
    found = {}
    for way in ("bound", "cell", "helper", "partial", "global"):
        run = Run("mlp", "momentum")
        trajectory = run.trajectory(0)
        space = {"F": F, "lam": run.lam}
        exec("def loss(m): return (lam[0].exp() * F.cross_entropy(m(x * lam[1]), y, reduction='none')).mean()", space)
        exec("def train_loss(m): return loss(m)", space)

        def loss(m, x, y, lam=run.lam):
            return (lam[0].exp() * F.cross_entropy(m(x * lam[1]), y, reduction="none")).mean()

        def helper(m):
            return loss(m, x, y)

        for x, y in zip(run.x[:4], run.y[:4]):
            space.update(x=x, y=y)
            ways = {
                "bound": lambda m, x=x, y=y: loss(m, x, y),  # noqa: B023
                "cell": lambda m: loss(m, x, y),  # noqa: B023
                "helper": lambda m: helper(m),  # noqa: B023, PLW0108
                "partial": functools.partial(loss, x=x, y=y),  # noqa: B023
                "global": space["train_loss"],
            }
            trajectory.step(ways[way])
        found[way] = trajectory.hypergradient(run.val_loss).grads
    assert all(torch.equal(a, b) for grads in found.values() for a, b in zip(grads, found["bound"]))


def test_attributes_that_have_changed_are_noticed():
    class Loop:
        def loss(self, m):
            return (self.lam[0].exp() * F.cross_entropy(m(self.x * self.lam[1]), self.y, reduction="none")).mean()

    run, loop = Run("mlp", "momentum"), Loop()
    loop.lam = run.lam
    for sides in (1, 2):
        trajectory = run.trajectory(0, sides=sides)
        for loop.x, loop.y in zip(run.x[:4], run.y[:4]):
            trajectory.step(loop.loss)
        with pytest.warns(UserWarning, match=r"train_loss of step \d has another value beside θ .* bind what it needs"):
            trajectory.hypergradient(run.val_loss)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_states_in_the_hosts_memory(model, monkeypatch):
    """As on CUDA, but for the streams."""
    plain = Run(model, "adamw")
    expected = plain.trajectory(4).hypergradient(plain.val_loss).grads
    monkeypatch.setattr(Away, "of", lambda device, parameters: device and Away(torch.device("cpu")))
    for every in (1, 3):
        run = Run(model, "adamw")
        trajectory = run.trajectory(4, device="cpu", every=every)
        assert error(trajectory.hypergradient(run.val_loss).grads, expected) < 1e-8


def test_modes_buffers_and_draws_are_those_of_the_step():
    """Evaluation in between changes nothing; statistics are those of training alone."""
    results = []
    for disturbed in (False, True):
        run = Run("cnn", "momentum")
        run.model.append(nn.Dropout(0.2))
        trajectory = run.trajectory(3)
        if disturbed:
            torch.rand(7)
            run.model.eval()
        statistics = copy.deepcopy(run.model.state_dict())
        results.append(trajectory.hypergradient(lambda m: run.val_loss(m.eval())).grads)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(statistics.values(), run.model.state_dict().values()))
        assert run.model.training is not disturbed
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_buffers_that_training_reads():
    """A running mean that each step moves and the next one reads."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()
            self.register_buffer("mean", torch.zeros(D))

        def forward(self, x):
            out = self.inner(x - self.mean)
            with torch.no_grad():
                self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
            return out

    found = []
    for settings in ({}, {"every": 2}, {"strategy": "in_place"}, {"by": "unrolled"}):
        run = Run(Shifted, "momentum")
        found.append(run.trajectory(5, **settings).hypergradient(run.val_loss).grads)
    assert all(error(grads, found[-1]) < 1e-7 for grads in found[:-1])


def test_a_radius_is_shared():
    radius = evograd.Radius()
    run = Run("mlp", "momentum", dtype=torch.float32)
    trajectory = evograd.Trajectory(run.model, run.optimizer, run.lam, radius=radius)
    for _ in range(2):
        trajectory.step(run.next())
        trajectory.hypergradient(run.val_loss)
    assert radius.value is not None
    assert radius.age == 1  # one pair, then one side
    again = evograd.Radius()
    again.load_state_dict(radius.state_dict())
    assert (again.value, again.age) == (radius.value, 1)


def test_flops_of_one_side():
    """2N + 1 plain steps, and 2N + 1/3 where λ enters after the network."""
    for inputs, limit in ((True, 1.1), (False, 0.4)):
        for n in (1, 10):
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            x, scale = torch.randn(32, 64), torch.ones(64 if inputs else 32, requires_grad=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            loss = (lambda m: m(x * scale).square().mean()) if inputs else (lambda m: (scale * m(x).square().mean(1)).mean())  # noqa: B023
            radius = evograd.Radius(1e-3)
            radius.run = 16  # carried over
            trajectory = evograd.Trajectory(model, optimizer, [scale], radius=radius)

            def steps():
                for _ in range(n):  # noqa: B023
                    trajectory.step(loss)  # noqa: B023
                trajectory.hypergradient(lambda m: m(x).square().mean())  # noqa: B023

            plain = measuring.flops(lambda: loss(model).backward(inputs=[*model.parameters(), scale]))  # noqa: B023
            assert measuring.flops(steps) / plain <= 2.1 * n + limit


def test_memory():
    """A plain step, N times (θ, s, g), and three copies of θ."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(1200, 1200), nn.ReLU())])
    x, weights = torch.randn(32, 1200), torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    radius = evograd.Radius(1e-3)
    trajectory = evograd.Trajectory(model, optimizer, [weights], radius=radius)
    loss = lambda m: (weights.exp() * m(x).square().mean(1)).mean()

    def plain():
        optimizer.zero_grad()
        loss(model).backward(inputs=list(model.parameters()))
        optimizer.step()

    def steps():
        radius.run, radius.age = 16, 0
        for _ in range(4):
            trajectory.step(loss)
        trajectory.hypergradient(lambda m: m(x + 1).square().mean())

    size = sum(4 * p.numel() for p in model.parameters())
    assert measuring.peak_bytes(steps) - measuring.peak_bytes(plain) < (4 * 3 + 3.5) * size


def test_what_is_remembered_is_freed():
    run = Run("mlp", "adamw")
    for ends in ("hypergradient", "clear", "error", "changed"):
        trajectory = run.trajectory(3)
        seen = [weakref.ref(flat) for step in trajectory.recording.steps for flat in step.theta]
        if ends == "hypergradient":
            result = trajectory.hypergradient(run.val_loss)
        elif ends == "clear":
            trajectory.clear()
        elif ends == "error":
            with pytest.raises(ZeroDivisionError):
                trajectory.hypergradient(lambda m: 1 / 0)
        else:
            run.optimizer.step()
            with pytest.raises(RuntimeError, match="have changed since"):
                trajectory.step(run.next())
        assert len(trajectory) == 0
        gc.collect()
        assert not any(ref() is not None for ref in seen), ends
    del result


def test_autocast_and_a_scaler():
    """A training pass in few digits: candidates are taken in all of them, on both sides; a skipped step was not made."""
    exact = Run("mlp", "adamw", dtype=torch.float32)
    expected = exact.trajectory(3, by="unrolled").hypergradient(exact.val_loss).grads
    for inside in (False, True):
        run = Run("mlp", "adamw", dtype=torch.float32)
        trajectory = evograd.Trajectory(run.model, run.optimizer, run.lam)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        cast = lambda closure: torch.autocast("cpu")(closure)
        for t in range(4):
            closure = run.next()
            if t == 3:
                trajectory.step(lambda m, closure=closure: closure(m) * math.inf, scaler=scaler)
            elif inside:
                trajectory.step(cast(closure), scaler=scaler)
            else:
                with torch.autocast("cpu"):
                    trajectory.step(closure, scaler=scaler)
        assert len(trajectory) == 3
        assert scaler.get_scale() == 64.0
        found = trajectory.hypergradient(cast(run.val_loss)).grads
        assert error(found, expected) < 0.05
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="every=2 runs steps again"):
        evograd.Trajectory(run.model, run.optimizer, run.lam, every=2).step(run.next())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks there
def test_a_compiled_model():
    run, plain = Run("mlp", "momentum"), Run("mlp", "momentum")
    expected = plain.trajectory(3).hypergradient(plain.val_loss).grads
    compiled = torch.compile(run.model, backend="eager")
    trajectory = evograd.Trajectory(compiled, run.optimizer, run.lam, sides=2)
    for _ in range(3):
        trajectory.step(run.next())
    assert error(trajectory.hypergradient(run.val_loss).grads, expected) < 1e-6


def test_a_warning_where_the_direction_grows():
    run = Run("mlp", (SGD, dict(lr=30.0)), warm=0)
    trajectory = run.trajectory(8)
    with pytest.warns(UserWarning, match=r"the direction has grown more than 1(e\+)?0+\d* times .* take fewer steps, or sides=2"):
        trajectory.hypergradient(run.val_loss)


def bad():
    run = Run("mlp", "momentum")
    make = lambda **settings: lambda: evograd.Trajectory(run.model, run.optimizer, run.lam, **settings)
    of = lambda optimizer, lam=run.lam, model=run.model: lambda: evograd.Trajectory(model, optimizer, lam)
    parameters = list(run.model.parameters())
    other = nn.Linear(2, 2).to(DTYPE)
    yield make(sides=3), ValueError, "sides=3 must be 1 or 2"
    yield make(by="second_order"), ValueError, "accepted are 'guided', 'mixed_mode', 'unrolled'"
    yield make(every=0), ValueError, "every=0"
    yield make(radius=-1.0), ValueError, "radius=-1.0"
    yield make(second_moment="none"), ValueError, "accepted are 'exact', 'frozen'"
    yield make(second_moment="frozen"), ValueError, "is for Adam, AdamW, RMSprop and Adagrad"
    yield make(device="cuda"), ValueError, "device='cuda' must be 'cpu', or None"
    yield make(strategy="vmap"), ValueError, "accepted are 'stream', 'in_place'"
    yield make(parameters=["nothing"]), ValueError, "'nothing' is no name of a parameter"
    yield of(torch.optim.NAdam(parameters)), ValueError, "NAdam, whose update is not known.*SGD, Adam, AdamW.*update="
    yield of("sgd"), TypeError, "optimizer must be a torch.optim.Optimizer, not str"
    yield of(torch.optim.SGD([*parameters, *run.lam])), ValueError, r"hyperparameters\[0\] is among the optimizer's parameters"
    yield of(torch.optim.SGD([*parameters, *other.parameters()])), ValueError, "no parameters of the model"
    yield lambda: make()().hypergradient(run.val_loss), RuntimeError, "call step"
    yield lambda: make()().step(3), TypeError, "train_loss must be a function of the model"
    yield lambda: make()().step(run.next(), clip_norm=0), ValueError, "clip_norm=0"
    yield lambda: make()().step(run.next(), clip_norm=True), ValueError, "clip_norm=True must be a positive, finite number"
    yield lambda: make()().step(run.next(), clip_norm=math.nan), ValueError, "clip_norm=nan"
    yield lambda: make()().step(lambda m: None), ValueError, "train_loss must return a scalar.*it returned NoneType"
    yield lambda: make()().state_dict(), NotImplementedError, "no state_dict: its steps hold closures"


@pytest.mark.parametrize("i", range(20))
def test_bad_input(i):
    call, kind, words = list(bad())[i]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("change", ["parameters", "a part that is held fixed", "λ", "state", "another", "groups", "trained"])
def test_what_may_not_change_between_steps(change):
    run = Run("mlp", "momentum")
    trajectory = run.trajectory(2)
    words = "parameters .* have changed since the trajectory's last step"
    if change == "parameters":
        with torch.no_grad():
            run.model[0].weight.mul_(0.9)
    elif change == "λ":
        with torch.no_grad():
            run.lam[1].add_(0.1)
        words = r"hyperparameters \(\[1\]\) have changed"
    elif change == "a part that is held fixed":
        trajectory = evograd.Trajectory(run.model, run.optimizer, run.lam, parameters=["0.weight"])
        trajectory.step(run.next())
        with torch.no_grad():
            run.model[-1].weight.mul_(0.9)
    elif change == "trained":
        run.model.late = nn.Linear(2, 2).to(DTYPE)
        run.optimizer.add_param_group(dict(params=list(run.model.late.parameters())))
        words = "'late.weight' is trained now, and was not when the trajectory's steps began"
    elif change == "state":
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        words = "states of the optimizer have changed"
    elif change == "another":
        another = torch.optim.SGD(run.model.parameters(), lr=0.1)
        run.next()(run.model).backward()
        another.step()
    else:
        run.optimizer.param_groups[0]["params"].pop()
        words = "the optimizer steps no longer in"
    with pytest.raises(RuntimeError, match=words):
        trajectory.step(run.next())
    assert len(trajectory) == 0


@pytest.mark.parametrize("how", ["requires_grad_", "add_param_group"])
@pytest.mark.parametrize("forgotten", ["clear", "hypergradient"])
def test_layers_that_are_unfrozen_between_trajectories(how, forgotten):
    """θ is what is trained when the steps begin."""
    found = []
    for new in (False, True):
        run = Run("mlp", "momentum", warm=0)
        if how == "add_param_group":
            run.optimizer = SGD(run.model[-1].parameters(), lr=0.05, momentum=0.9)
        run.model[0].requires_grad_(False)
        trajectory = run.trajectory(2)
        trajectory.clear() if forgotten == "clear" else trajectory.hypergradient(run.val_loss)
        run.model[0].requires_grad_(True)
        if how == "add_param_group":
            run.optimizer.add_param_group(dict(params=list(run.model[0].parameters())))
        if new:
            trajectory = run.trajectory(0)
        for _ in range(3):
            trajectory.step(run.next())
        found.append(trajectory.hypergradient(run.val_loss, start=True))
    assert "0.weight" in found[0].start
    assert error(found[0].grads, found[1].grads) < 1e-7
    assert error(found[0].start, found[1].start) < 1e-7


class Alternating(nn.Module):
    """Whose first layer has a gradient at every second call alone."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(D, 8), nn.Linear(8, C), 0

    def forward(self, x, whole=True):
        h = self.first(x).tanh()
        return self.last(h if whole else h.detach())


@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [(SGD, dict(lr=0.1, momentum=0.9)), (ADAMW, dict(lr=0.02, eps=0.1))], ids=["sgd", "adamw"])
@pytest.mark.parametrize("sides", [1, 2])
def test_layers_that_have_a_gradient_in_some_steps_alone(optimizer, every, n, sides):
    """Their state goes on where steps are run again; and the last step may be the first of its kind."""
    found = []
    for settings in (dict(by="unrolled"), dict(every=every, sides=sides)):
        run = Run(Alternating, optimizer, warm=0)
        trajectory = run.trajectory(0, **settings)
        for t in range(n):
            trajectory.step(lambda m, loss=run.next(), t=t: loss(lambda x: m(x, t % 2 == 0)))
        found.append(trajectory.hypergradient(run.val_loss, start=True))
    assert error(found[1].grads, found[0].grads) < 1e-4
    assert error(found[1].start, found[0].start) < 1e-4


class Centred(nn.Module):
    """Logits less a running mean, which each call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(C, dtype=DTYPE))

    def forward(self, logits):
        out = logits - self.centre
        self.centre.mul_(0.7).add_(logits.detach().mean(0), alpha=0.3)
        return out


class WithCentred(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.centred = mlp(), Centred()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("settings", [{}, dict(every=3), dict(by="mixed_mode")], ids=str)
def test_state_of_a_loss_module_beside_the_model_is_that_of_the_step(settings):
    """As if it were a part of the model."""
    found = []
    for inside in (False, True):
        run, centred = Run(WithCentred, "momentum", warm=0), Centred()
        trajectory = run.trajectory(0, **settings)
        for _ in range(5):
            trajectory.step(lambda m, loss=run.next(): loss(lambda x: (m.centred if inside else centred)(m(x))))  # noqa: B023
        buffer = (run.model.centred if inside else centred).centre
        before = buffer.clone()
        found.append(trajectory.hypergradient(run.val_loss).grads)
        assert before.any()
        assert torch.equal(buffer, before)
    assert error(found[0], found[1]) < 1e-9


@pytest.mark.parametrize("what", ["a batch", "a teacher", "by another function"])
def test_what_a_loss_reads_may_not_be_written_into_meanwhile(what):
    run = Run("mlp", "momentum")
    batch, teacher = run.x[0].clone(), mlp().to(DTYPE)
    losses = {
        "a batch": lambda m: (run.lam[0].exp() * m(batch).square().mean(1)).mean(),
        "a teacher": lambda m: (run.lam[0].exp() * (m(run.x[1]) - teacher(run.x[1])).square().mean(1)).mean(),
    }
    losses["by another function"] = lambda m, other=losses["a batch"]: other(m)
    trajectory = run.trajectory(0)
    trajectory.step(losses[what])
    with torch.no_grad():
        (teacher[0].weight if what == "a teacher" else batch).mul_(0.5)
    name = "teacher.0.weight" if what == "a teacher" else "batch"
    with pytest.raises(RuntimeError, match=f"train_loss of step 0 reads '[0a-z.]*{name}', which has been written into since"):
        trajectory.hypergradient(run.val_loss)
    assert len(trajectory) == 0


def test_what_is_kept_beside_a_loss_may_be_written_into():
    """An object's attributes are not all its loss's: a log, an average of the weights."""
    run = Run("mlp", "momentum")

    class Trainer:
        def __init__(self):
            self.log, self.average = torch.zeros(3), copy.deepcopy(run.model)

        def loss(self, m):
            return run.next()(m)

    trainer, trajectory = Trainer(), run.trajectory(0)
    for _ in range(2):
        x = run.next()
        trajectory.step(lambda m, x=x: (trainer.loss, x)[1](m))
        trainer.log.add_(1)
        with torch.no_grad():
            torch._foreach_lerp_(list(trainer.average.parameters()), list(run.model.parameters()), 0.1)
    trajectory.hypergradient(run.val_loss)


def test_a_sparse_embedding_with_momentum():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, C)).to(DTYPE)
        words, y, lam = torch.randint(9, (6, BATCH)), torch.randint(C, (BATCH,)), torch.zeros(BATCH, dtype=DTYPE, requires_grad=True)
        trajectory = evograd.Trajectory(model, SGD(model.parameters(), lr=0.1, momentum=0.9), [lam], sides=2)
        for w in words:
            trajectory.step(lambda m, w=w: (lam.exp() * F.cross_entropy(m(w), y, reduction="none")).mean())
        found.append(trajectory.hypergradient(lambda m: F.cross_entropy(m(words[0]), y)).grads)
    assert error(found[1], found[0]) < 1e-7


def test_a_hook_on_a_parameter_is_told_of():
    """It halves a gradient in training; in place it is there on the way back too."""
    found = []
    for strategy in (None, "in_place"):
        run = Run("mlp", "momentum", warm=0)
        run.model[0].weight.register_hook(lambda g: g / 2)
        trajectory = run.trajectory(4, strategy=strategy)
        if strategy is None:
            with pytest.warns(UserWarning, match="'0.weight' has a hook .*strategy='in_place' takes it in"):
                trajectory.hypergradient(run.val_loss)
        else:
            found = trajectory.hypergradient(run.val_loss).grads
    values = []
    for shift in (1e-5, -1e-5):
        run = Run("mlp", "momentum", warm=0)
        run.model[0].weight.register_hook(lambda g: g / 2)
        with torch.no_grad():
            run.lam[0].add_(shift)
        run.trajectory(4)
        values.append(run.val_loss(run.model).item())
    assert found[0].sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_a_loss_of_another_model_is_told_of():
    run, other = Run("mlp", "momentum"), mlp().to(DTYPE)
    trajectory = run.trajectory(0)
    loss = run.next()
    trajectory.step(lambda _: loss(other))
    with pytest.raises(RuntimeError, match="no step has moved a parameter: train_loss depends on none of the model's"):
        trajectory.hypergradient(run.val_loss)
    trajectory.step(run.next())
    trajectory.step(lambda _: loss(other))  # one such step among others is one that moves nothing
    trajectory.hypergradient(run.val_loss)


def test_clipping_by_infinity_measures_alone():
    found = []
    for clip_norm in (None, math.inf):
        run = Run("mlp", "momentum")
        found.append(run.trajectory(3, clip_norm=clip_norm).hypergradient(run.val_loss).grads)
    assert error(*found) < 1e-12


def test_a_loss_without_lambda():
    run = Run("mlp", "momentum")
    trajectory = evograd.Trajectory(run.model, run.optimizer, [torch.ones(2, requires_grad=True)])
    trajectory.step(run.next())
    with pytest.raises(RuntimeError, match=r"hyperparameters\[0\].*does not depend on it"):
        trajectory.hypergradient(run.val_loss)


def test_a_loss_that_is_not_finite_is_named():
    run = Run("mlp", "momentum")
    trajectory = run.trajectory(1)
    trajectory.step(lambda m, closure=run.next(): closure(m) * math.nan)
    with pytest.raises(RuntimeError, match="train_loss of step 1 is nan"):
        trajectory.hypergradient(run.val_loss)


# --- several processes


def in_process(rank, size, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results = {}
    for host in ("ddp", "fsdp"):
        for optimizer in ("momentum", "adamw"):
            for every, sides, clip in ((1, 2, None), (1, 1, None), (2, 2, 0.3)):
                run = Run("mlp", optimizer, warm=0)
                model = run.model
                if host == "fsdp":
                    for module in (model[0], model[2], model):
                        fully_shard(module, mesh=init_device_mesh("cpu", (size,)))
                    kind, of = OPTIMIZERS[optimizer]
                    run.optimizer = kind(model.parameters(), **of)
                else:
                    model = nn.parallel.DistributedDataParallel(model)
                run.x, run.y = run.x[:, rank::size], run.y[:, rank::size]
                run.lam[0] = run.lam[0].detach().requires_grad_()
                part = lambda w, rank=rank: w[rank::size]
                trajectory = evograd.Trajectory(model, run.optimizer, run.lam, sides=sides, every=every)
                for t in range(6):
                    if t == 2:
                        trajectory.clear()
                    x, y = run.x[t], run.y[t]
                    trajectory.step(
                        lambda m: (part(run.lam[0]).exp() * F.cross_entropy(m(x * run.lam[1]), y, reduction="none")).mean(),  # noqa: B023
                        clip_norm=clip,
                    )
                result = trajectory.hypergradient(run.val_loss)
                key = host, optimizer, every, sides
                results[key] = result.grads, {n: t for group in result.settings for n, t in group.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes():
    if not dist.is_available():
        pytest.skip("torch.distributed is not there")
    server()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [CONTEXT.Process(target=in_process, args=(rank, 2, folder)) for rank in range(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
        yield [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize(("every", "sides"), [(1, 2), (1, 1), (2, 2)])
@pytest.mark.parametrize("host", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(processes, host, optimizer, every, sides):
    run = Run("mlp", optimizer, warm=0)
    trajectory = run.trajectory(0, sides=2, every=every)
    for t in range(6):
        if t == 2:
            trajectory.clear()
        trajectory.step(run.next(), clip_norm=0.3 if every == 2 else None)
    result = trajectory.hypergradient(run.val_loss)
    for seen in processes:
        grads, settings = seen[host, optimizer, every, sides]
        assert error(grads, result.grads) < (1e-7 if sides == 2 else 1e-3)
        assert error(settings, {n: t for group in result.settings for n, t in group.items()}) < (1e-6 if sides == 2 else 1e-3)


# --- the experiments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "extra"), [("rotation", ()), ("label_noise_mwn", ()), ("cross_domain_fewshot", FEW_SHOT), ("metaxl", METAXL)]
)
def test_experiments_train_as_ever_and_find_the_exact_hypergradient(experiment, extra):
    """Their losses hold what they detach, and draw what they drew: else passes beside θ would be of another problem."""
    thetas, found = [], []
    for method, flags in {"evograd_guided": (), "trajectory": ("--horizon", "3")}.items():
        trainer, step = make_step(experiment, method, (*extra, *flags), ALONE)
        torch.manual_seed(5)
        step()
        thetas.append([p.detach().clone() for group in trainer.optimizer.param_groups for p in group["params"]])
    for a, b in zip(*thetas, strict=True):
        assert torch.equal(a, b)
    for by in ("guided", "mixed_mode"):
        trainer, step = make_step(experiment, "trajectory", (*extra, "--horizon", "3"), ALONE)
        of = trainer.trajectory.recording
        trainer.trajectory = evograd.Trajectory(of.model, of.optimizer, of.lam.tensors, by=by)
        torch.manual_seed(5)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Adam's first steps
            [step() for _ in range(3)]
        found.append(torch.cat([h.grad.flatten() for h in of.lam.tensors]))
    assert torch.cosine_similarity(*found, dim=0) > 0.999
    assert found[0].norm() == pytest.approx(found[1].norm().item(), rel=0.02)


def test_pieces_of_an_update_fit_a_cache_on_the_cpu_and_are_few_elsewhere():
    for device, n in (("cpu", 4), ("cuda", 1)):
        with FakeTensorMode():
            bucket = Bucket(torch.empty(1, device=device))
        bucket.size = 2**21
        found = list(lookback.pieces(bucket, 2**22))
        assert len(found) == n
        assert sum(len(range(bucket.size)[part]) for part in found) == bucket.size
