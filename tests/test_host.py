"""Every estimator as a guest in somebody's model: what it may be, what is done in it, and that it is afterwards what it was."""

import copy
import functools
import importlib
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import evograd

from .problems import Bilevel, C, D, N, Softplus, bilevel, estimate
from .reference import evograd_reference
from .test_hypergradient import relative_difference

ETA = 0.3
b = evograd.baselines
ESTIMATORS = {
    "stream": lambda *a, **k: evograd.hypergradient(*a, n_candidates=4, sigma=0.01, **k),
    "retain": lambda *a, **k: evograd.hypergradient(*a, strategy="retain", **k),
    "vmap": lambda *a, **k: evograd.hypergradient(*a, strategy="vmap", **k),
    "guided": lambda *a, **k: evograd.guided(*a, inner_lr=ETA, lookahead="sgd", **k),
    "mixed_mode": lambda *a, **k: evograd.mixed_mode(*a, inner_lr=ETA, lookahead="sgd", **k),
    "unrolled": lambda *a, **k: b.unrolled(*a, inner_lr=ETA, **k),
    "higher": lambda *a, **k: b.unrolled(*a, inner_lr=ETA, engine="higher", **k),
    "finite_difference": lambda *a, **k: b.finite_difference(*a, inner_lr=ETA, radius=1e-4, **k),
    "neumann": lambda *a, **k: b.neumann(*a, inner_lr=ETA, **k),
    "conjugate_gradient": lambda *a, **k: b.conjugate_gradient(*a, **k),
}
EXACT = ("guided", "mixed_mode", "unrolled", "finite_difference")  # T1–T2, through one SGD step of ETA


class Twice(nn.Module):
    """A module under two names; with `tied` one of its parameters under a third."""

    def __init__(self, tied):
        super().__init__()
        self.seq, self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.Linear(D, C)
        self.also = self.seq
        self.bias = self.seq[0].bias if tied else None

    def forward(self, x):
        return self.head(self.also(x) + (0 if self.bias is None else self.bias))


class Sibling(nn.Module):
    """A child that is also its sibling's child."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.outer = nn.Sequential(self.inner, nn.Tanh())
        self.head = nn.Linear(D, C)

    def forward(self, x):
        return self.head(self.outer(self.inner(x)))


class InContainers(nn.Module):
    """Parameters that the module reaches by a list and a dict of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.weights, self.named = [self.a.weight], {"bias": self.a.bias}

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.weights[0], self.named["bias"])))


def parametrized():
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
    register_parametrization(model[0], "weight", Softplus())
    return model


MODELS = {
    "twice": lambda: Twice(False),
    "twice_tied": lambda: Twice(True),
    "sibling": Sibling,
    "containers": InContainers,
    "parametrized": parametrized,
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, C)),
    "by_hooks": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, C)),
}


def problem_of(model, where="inputs"):
    torch.manual_seed(1)
    x, x_val, y, y_val = torch.randn(N, D), torch.randn(N, D), torch.randint(C, (N,)), torch.randint(C, (N,))
    lam = torch.rand(D if where == "inputs" else N, requires_grad=True)

    def train_loss(m):
        if where == "inputs":
            return F.cross_entropy(m(x * lam), y)
        return (lam * F.cross_entropy(m(x), y, reduction="none")).mean()

    return Bilevel(model, [lam], train_loss, lambda m: F.cross_entropy(m(x_val), y_val))


def objects(model):
    """Every parameter, buffer and attribute of every module, by object."""
    found = []
    for module in model.modules():
        for place in (module._parameters, module._buffers, {k: v for k, v in vars(module).items()}):
            found += [(id(module), name, id(value)) for name, value in place.items()]
        found += [(id(module), name, [id(v) for v in value]) for name, value in vars(module).items() if type(value) is list]
    return found


def t1_t2(problem, forward):
    """By double backward, with `forward` in place of the model: a function of {name: tensor} and the input."""
    own = {n: p.detach().clone().requires_grad_() for n, p in problem.model.named_parameters()}
    call = lambda tensors: lambda x: forward(tensors, x)
    grads = torch.autograd.grad(problem.train_loss(call(own)), list(own.values()), create_graph=True)
    moved = {n: p - ETA * g for (n, p), g in zip(own.items(), grads)}
    return torch.autograd.grad(problem.val_loss(call(moved)), problem.hyperparameters)


NOT_TAKEN = {  # and why
    ("vmap", "spectral_norm"), ("vmap", "by_hooks"),  # in place on what is not batched; no batching rule
    ("higher", "twice"), ("higher", "twice_tied"), ("higher", "sibling"), ("higher", "containers"),  # copies know one name
    ("higher", "parametrized"), ("higher", "spectral_norm"), ("higher", "by_hooks"),
}  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_object_is_afterwards_the_one_it_was(kind, estimator, fails, float64):
    problem = problem_of(MODELS[kind]())
    problem.train_loss(problem.model)  # what a first call makes
    before, values = objects(problem.model), [p.detach().clone() for p in problem.model.parameters()]

    def val_loss(m):
        value = problem.val_loss(m)
        if fails:
            m.train(not m.training)
            m.left_behind = value
            raise KeyError("a mistake")
        return value

    args = (problem.train_loss, val_loss, problem.model, problem.hyperparameters)
    if fails or (estimator, kind) in NOT_TAKEN:
        with pytest.raises(KeyError) if (estimator, kind) not in NOT_TAKEN else _anything():
            ESTIMATORS[estimator](*args)
    else:
        ESTIMATORS[estimator](*args)
    assert objects(problem.model) == before
    assert all(map(torch.equal, problem.model.parameters(), values))
    assert all(isinstance(p, nn.Parameter) for m in problem.model.modules() for p in m._parameters.values() if p is not None)


class _anything:
    def __enter__(self):
        pass

    def __exit__(self, kind, *rest):
        return kind is not None and issubclass(kind, Exception)


def linear(t, name, x):
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


BY_HAND = {  # without any module
    "twice": lambda t, x: linear(t, "head", torch.tanh(linear(t, "seq.0", x))),
    "twice_tied": lambda t, x: linear(t, "head", torch.tanh(linear(t, "seq.0", x)) + t["seq.0.bias"]),
    "sibling": lambda t, x: linear(t, "head", torch.tanh(linear(t, "inner", linear(t, "inner", x)))),
    "containers": lambda t, x: linear(t, "head", torch.tanh(linear(t, "a", x))),
}


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("kind", BY_HAND)
def test_shared_modules_give_the_value_of_plain_autograd(kind, estimator, float64):
    """The first estimate, and the one after it."""
    problem = problem_of(MODELS[kind]())
    every = dict(problem.model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in problem.model.named_parameters()}
    forward = lambda tensors, x: BY_HAND[kind]({n: tensors[first[id(p)]] for n, p in every.items()}, x)

    expected = t1_t2(problem, forward)
    for _ in range(2):
        found = ESTIMATORS[estimator](*problem.args()).grads
        assert relative_difference(found, expected) < (1e-10 if estimator in ("mixed_mode", "unrolled") else 1e-4)


def test_training_goes_on_after_a_call():
    problem = problem_of(Twice(False))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    first = problem.train_loss(problem.model).item()
    for _ in range(50):
        optimizer.zero_grad()
        problem.train_loss(problem.model).backward(inputs=list(problem.model.parameters()))
        optimizer.step()
        evograd.hypergradient(*problem.args())
    assert problem.train_loss(problem.model).item() < 0.5 * first


# --- work that is done in the backward pass ----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.norm, self.head, self.reentrant = nn.BatchNorm1d(D), nn.Linear(D, C), reentrant

    def forward(self, x):
        for block in self.blocks:
            run = lambda x, block=block: torch.relu(self.norm(block(x)))
            x = run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("where", ["inputs", "losses"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in ("higher", "vmap")])
def test_gradient_checkpointing_changes_nothing(estimator, reentrant, where, float64):
    found = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        problem = problem_of(Checkpointed(kind), where)
        torch.manual_seed(3)
        found.append(ESTIMATORS[estimator](*problem.args()))
    assert relative_difference(found[1].grads, found[0].grads) < 1e-12
    torch.testing.assert_close(found[1].candidate_losses, found[0].candidate_losses, rtol=1e-13, atol=0)


def test_offloaded_activations_change_nothing(float64):
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        problem = problem_of(Checkpointed(None))

        def train_loss(m, problem=problem, offload=offload):
            with torch.autograd.graph.save_on_cpu() if offload else torch.enable_grad():
                return problem.train_loss(m)

        for estimator in ("stream", "retain", "guided", "unrolled"):
            torch.manual_seed(3)
            found.append(ESTIMATORS[estimator](train_loss, *problem.args()[1:]).grads)
    for plain, offloaded in zip(found[:4], found[4:]):
        assert relative_difference(offloaded, plain) < 1e-12


# --- state that is neither parameter nor buffer ------------------------------------------------------------------------


class Stateful(nn.Module):
    """Truncated backpropagation through time, with a counter, a cache and a log of its own."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNNCell(D, 6), nn.Linear(6, C)
        self.state, self.calls, self.seen, self.cache = torch.zeros(N, 6), 0, [], {}
        self.steps, self.tensors = torch.zeros(()), [torch.zeros(3)]

    def forward(self, x):
        state = self.cell(x, self.state + 0.1 * self.calls + 0.1 * len(self.seen) + self.steps + self.cache.get("last", 0))
        self.state = state.detach()
        self.calls += 1
        self.seen.append(self.calls)
        self.cache["last"] = 0.3
        self.steps += 0.1  # in place
        return self.head(state)


class Fresh(nn.Module):
    """The same model, in whose every call all is as at first."""

    def __init__(self, model):
        super().__init__()
        self.cell, self.head = model.cell, model.head

    def forward(self, x):
        return self.head(self.cell(x, torch.zeros(N, 6)))


@pytest.mark.parametrize("estimator", ["stream", "retain", "guided", "unrolled", "finite_difference", "neumann"])
def test_candidates_do_not_see_what_others_left_behind(estimator, float64):
    torch.manual_seed(0)
    model = Stateful()
    found = []
    for m in (model, Fresh(model)):
        problem = problem_of(m, "losses")
        torch.manual_seed(3)
        found.append(ESTIMATORS[estimator](*problem.args()).grads)
    assert relative_difference(*found) < 1e-12
    assert torch.equal(model.state, torch.zeros(N, 6)) and model.calls == 0 and model.seen == [] and model.cache == {}
    assert model.steps.item() == 0


@pytest.mark.parametrize("estimator", [*(name for name in ESTIMATORS if name != "higher"), "in_place"])
def test_a_cache_of_parametrizations_is_of_one_evaluation(estimator, float64):
    """Within parametrize.cached(), and where that has computed something from θ already."""
    in_place = lambda *a: evograd.guided(*a, strategy="in_place", inner_lr=ETA)
    problem = problem_of(parametrized(), "losses")
    call = {**ESTIMATORS, "in_place": in_place}[estimator]
    torch.manual_seed(3)
    expected = call(*problem.args()).grads
    with parametrize.cached():
        problem.train_loss(problem.model)
        before = dict(parametrize._cache)
        assert before
        torch.manual_seed(3)
        grads = call(*problem.args()).grads
        assert parametrize._cache.keys() == before.keys() and all(parametrize._cache[key] is before[key] for key in before)
    assert relative_difference(grads, expected) < 1e-12


class Growing(nn.Module):
    """At its first call it adds something to itself or to its parts, and takes note of that."""

    def __init__(self, what):
        super().__init__()
        self.a, self.head, self.parts = nn.Linear(D, 6), nn.Linear(6, C), nn.ModuleList()
        self.what, self.built = what, False
        self.register_buffer("later", None)

    def forward(self, x):
        if not self.built:
            GROWTH[self.what](self)
            self.built = True
        h = self.a(x)
        for part in self.parts:
            h = part(h)
        return self.head(self.act(h) if hasattr(self, "act") else h) + (0 if self.later is None else self.later)


class Grown(Growing):
    pass


GROWTH = {
    "hook": lambda m: m.a.register_forward_hook(lambda module, inputs, output: output.sin()),
    "pre-hook": lambda m: m.a.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),)),
    "hook of a state": lambda m: m.a.register_state_dict_post_hook(lambda *_: None),
    "submodule": lambda m: m.add_module("act", nn.Tanh()),
    "in a list": lambda m: m.parts.append(nn.Tanh()),
    "buffer": lambda m: m.a.register_buffer("made", torch.ones(3), persistent=False),
    "buffer that was None": lambda m: setattr(m, "later", torch.tensor([1.0, 2.0, 3.0])),
    "class": lambda m: setattr(m, "__class__", Grown),
}
PARAMETERS = {
    "layer": lambda m: m.parts.append(nn.Linear(6, 6)),
    "parameter": lambda m: setattr(m, "later_scale", nn.Parameter(torch.ones(3))),
    "of a part": lambda m: m.a.register_parameter("scale", nn.Parameter(torch.ones(6), requires_grad=False)),
}
GROWTH |= PARAMETERS
CALLS = {**ESTIMATORS, "in_place": lambda *a, **k: estimate(*a, noise="guided", strategy="in_place", inner_lr=ETA, **k)}


def registered(model):
    """All that can be added to a module, without the note of it."""
    kinds = [(name, type(m)) for name, m in model.named_modules()]
    return kinds, [*dict(model.named_buffers())], [len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k]


@pytest.mark.parametrize("estimator", [name for name in CALLS if name != "higher"])
@pytest.mark.parametrize("what", [what for what in GROWTH if what not in PARAMETERS])
def test_what_a_first_call_adds_is_taken_back(what, estimator, float64):
    """The value is that of a model that was called before, and the user's first call is still to come."""
    found = []
    for called in (True, False):
        torch.manual_seed(0)
        problem = problem_of(Growing(what), "losses")
        if called:
            problem.train_loss(problem.model)
        before = registered(problem.model)
        for _ in range(2):
            torch.manual_seed(3)
            found.append(CALLS[estimator](*problem.args()).grads)
        assert registered(problem.model) == before and problem.model.built == called
    assert all(relative_difference(other, found[0]) < 1e-12 for other in found[1:])


@pytest.mark.parametrize("estimator", [name for name in CALLS if name not in ("higher", "vmap")])
@pytest.mark.parametrize("what", PARAMETERS)
def test_parameters_that_a_first_call_adds_are_named(what, estimator, float64):
    problem = problem_of(Growing(what), "losses")
    before = registered(problem.model)
    with pytest.raises(RuntimeError, match=r"a loss has added parameters to the model, '.*call the model once before"):
        CALLS[estimator](*problem.args())
    assert registered(problem.model) == before and not problem.model.built
    problem.train_loss(problem.model)
    CALLS[estimator](*problem.args())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("which", ["a parameter", "a buffer", "λ"])
def test_what_is_on_the_meta_device_has_no_values(which, estimator):
    problem = problem_of(nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, C)), "losses")
    if which == "λ":
        problem.hyperparameters[:] = [torch.zeros(3, device="meta", requires_grad=True)]
        words = r"hyperparameters\[0\] is on the meta device, without values"
    else:
        problem.model[2 if which == "a parameter" else 1].to("meta")
        words = "model: '(weight|running_mean)' is on the meta device, without values; model.to_empty"
    with pytest.raises(ValueError, match=words):
        ESTIMATORS[estimator](*problem.args())


@pytest.mark.parametrize("lazy", [nn.LazyLinear(6), nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_module_has_to_be_called_once_before(lazy):
    problem = problem_of(nn.Sequential(nn.Linear(D, 6), lazy, nn.Linear(6, C)), "losses")
    with pytest.raises(ValueError, match="model: '(weight|running_mean)' of a lazy module is not there yet; call the model once"):
        evograd.hypergradient(*problem.args())
    problem.train_loss(problem.model)
    evograd.hypergradient(*problem.args())


class Remembering(nn.Module):
    """What it computes is written, graph and all, into a tensor of its own, which is used then."""

    def __init__(self, kind):
        super().__init__()
        self.head, self.other = nn.Linear(D, C), nn.Linear(D, C)
        last = torch.zeros(N + 1, C)[:N] if kind == "view" else torch.zeros(N, C)
        if kind == "attribute":
            self.last = last
        else:
            self.register_buffer("last", last)

    def forward(self, x):
        before = self.last.clone()
        self.last.copy_(self.other(x).tanh())
        return self.head(x) + self.last + before


@pytest.mark.parametrize("estimator", ["stream", "in_place", "in_place_guided", "retain", "unrolled"])
@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_tensor_that_a_graph_is_written_into_has_none_afterwards(kind, estimator, float64):
    torch.manual_seed(0)
    problem = problem_of(Remembering(kind), "losses")
    in_place = lambda *a, **k: estimate(*a, strategy="in_place", inner_lr=ETA, **k)
    call = {"in_place": in_place, "in_place_guided": lambda *a: in_place(*a, estimator="guided", lookahead="sgd")}
    result = {**ESTIMATORS, **call}[estimator](*problem.args())
    last = problem.model.last
    assert last.grad_fn is None and not last.requires_grad and not last.any()
    if estimator == "in_place_guided":
        assert relative_difference(result.grads, ESTIMATORS["guided"](*problem.args()).grads) < 1e-6


def test_a_view_that_a_graph_is_written_into_is_named(float64):
    problem = problem_of(Remembering("view"), "losses")
    with pytest.raises(RuntimeError, match=r"'last', a tensor of shape \(\d+, \d+\), has got a graph.*x.detach\(\)"):
        evograd.hypergradient(*problem.args(), strategy="in_place")


def test_a_large_tensor_that_is_written_into_is_named():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.log = nn.Linear(D, C), torch.zeros(100_000)

        def forward(self, x):
            self.log += 1
            return self.head(x)

    problem = problem_of(Log())
    with pytest.raises(RuntimeError, match=r"Log.log, a tensor of shape \(100000,\), was written into.*register_buffer"):
        evograd.hypergradient(*problem.args())


def test_embeddings_that_renormalise_themselves_are_left_alone(float64):
    class Bag(nn.Module):
        def __init__(self, max_norm):
            super().__init__()
            self.e, self.head = nn.Embedding(11, 4, max_norm=max_norm), nn.Linear(4, C)

        def forward(self, i):
            return self.head(torch.tanh(self.e(i).mean(1)))

    torch.manual_seed(0)
    model, i, i_val = Bag(1.0), torch.randint(11, (N, 3)), torch.randint(11, (N, 3))
    y, lam = torch.randint(C, (N,)), torch.rand(N, requires_grad=True)
    before = model.e.weight.detach().clone()
    args = ((lambda m: (lam * F.cross_entropy(m(i), y, reduction="none")).mean()), lambda m: F.cross_entropy(m(i_val), y))
    for name in ("stream", "retain", "guided", "mixed_mode", "unrolled", "finite_difference", "neumann"):
        try:
            ESTIMATORS[name](*args, model, [lam])
        except NotImplementedError:
            assert name == "mixed_mode"
        assert torch.equal(model.e.weight, before), name


class Encoders(nn.Module):
    """A frozen encoder beside the one that is trained."""

    def __init__(self):
        super().__init__()
        self.encoder, self.frozen, self.head = nn.Linear(D, 6), nn.Linear(D, 6).requires_grad_(False), nn.Linear(6, C)

    def forward(self, x):
        return self.head(torch.tanh(self.encoder(x) + self.frozen(x)))


def momentum(m):
    for p, q in zip(m.frozen.parameters(), m.encoder.parameters()):
        p.data.mul_(0.9).add_(0.1 * q.detach())


def assigned(m):
    for p, q in zip(m.frozen.parameters(), m.encoder.parameters()):
        p.data = 0.9 * p.data + 0.1 * q.data


WRITTEN = "a loss has written into the model's parameters '(head|encoder|frozen)"
SAID = {"vmap": f"{WRITTEN}|batch|broadcast", "mixed_mode": f"{WRITTEN}|tensor.data cannot be assigned to"}
WRITING = {  # and whether the model is left as it was
    "mul_": (torch.no_grad()(lambda m: m.head.weight.mul_(0.9)), False),
    "load_state_dict": (lambda m: m.load_state_dict({n: 0.5 * t for n, t in m.state_dict().items()}), False),
    "frozen": (lambda m: m.frozen.weight.mul_(0.9), False),
    "data, mul_": (lambda m: m.head.weight.data.mul_(0.9), True),
    "data, an element": (lambda m: m.head.bias.data.__setitem__(0, 0.0), True),
    "data, assigned": (lambda m: setattr(m.head.weight, "data", 0.5 * m.head.weight.data), True),
    "vector_to_parameters": (lambda m: nn.utils.vector_to_parameters(torch.zeros(6 * C), [m.head.weight]), True),
    "momentum encoder": (momentum, True),
    "momentum encoder, assigned": (assigned, True),
}


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
@pytest.mark.parametrize("estimator", CALLS)
@pytest.mark.parametrize("how", WRITING)
def test_a_loss_that_writes_into_parameters_is_an_error(how, estimator, which, float64):
    torch.manual_seed(0)
    problem = problem_of(Encoders(), "losses")
    before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    write, left = WRITING[how]
    losses = {"train_loss": problem.train_loss, "val_loss": problem.val_loss}
    plain = losses[which]

    def writing(m):
        write(m)
        return plain(m)

    losses[which] = writing
    with pytest.raises((RuntimeError, NotImplementedError), match=SAID.get(estimator, WRITTEN)):
        CALLS[estimator](*losses.values(), problem.model, problem.hyperparameters)
    assert all(type(p) is nn.Parameter and not vars(p) for p in problem.model.parameters())
    if left:
        assert all(torch.equal(p, before[name]) for name, p in problem.model.named_parameters())




def test_a_loss_that_writes_into_parameters_that_it_holds_is_an_error():
    problem = problem_of(nn.Linear(D, C))

    def train_loss(m):
        with torch.no_grad():
            own.clamp_(-0.1, 0.1)
        return problem.train_loss(m)

    own = problem.model.weight
    with pytest.raises(RuntimeError, match="a loss has written into the model's parameters 'weight': the model is changed"):
        evograd.hypergradient(train_loss, *problem.args()[1:])


READING = {
    "data": lambda m: m.frozen.weight.data.norm() + m.head.weight.data.norm(),
    "a copy": lambda m: copy.deepcopy(m),
    "to": lambda m: m.to("cpu", torch.float64),
    "parameters_to_vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
    "state_dict": lambda m: m.state_dict(),
}


@pytest.mark.parametrize("estimator", CALLS)
@pytest.mark.parametrize("how", READING)
def test_a_loss_may_read_what_it_must_not_write(how, estimator, float64):
    if (how, estimator) in {("a copy", "higher"), ("to", "vmap")}:
        pytest.skip("an error of theirs")
    torch.manual_seed(0)
    problem = problem_of(Encoders(), "losses")
    found = []
    for read in (lambda m: None, READING[how]):

        def train_loss(m, read=read):
            read(m)
            return problem.train_loss(m)

        torch.manual_seed(3)
        found.append(CALLS[estimator](train_loss, *problem.args()[1:]).grads)
    assert relative_difference(*found) < 1e-12
    assert all(type(p) is nn.Parameter and not vars(p) for p in problem.model.parameters())


# --- what a loss has beside the model ----------------------------------------------------------------------------------


class Weighing(nn.Module):
    """A network of weights of losses, whose parameters are λ, with a state of its own."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(5)
        linear = nn.Linear(4, 4)
        self.kind, self.calls, self.last, self.seen = kind, 0, torch.zeros(4), []
        self.first = nn.Linear(1, 4)
        self.between = {"spectral_norm": lambda: spectral_norm(linear), "old spectral_norm": lambda: nn.utils.spectral_norm(linear)}
        self.between = self.between.get(kind, lambda: nn.BatchNorm1d(4) if kind == "BatchNorm" else linear)()
        self.net = nn.Sequential(self.first, nn.Tanh(), self.between, nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, losses):
        losses = losses[:, None].detach()
        if self.kind == "bound anew":
            self.mean = 0.5 * self.mean + losses.mean()
        elif self.kind == "in place":
            self.mean.mul_(0.5).add_(losses.mean())
        elif self.kind == "attributes":
            self.calls += 1
            self.last += self.calls
            self.seen.append(losses)
        elif self.kind == "a hook" and not self.calls:
            self.first.register_forward_hook(lambda m, i, o: 2 * o)
            self.calls = 1
        return self.net(losses - self.mean + self.last.sum() + len(self.seen))[:, 0]


class Holder:
    """An object with the network in an attribute, whose loss is a method, or which is a loss itself."""

    def __init__(self, net, loss):
        self.parts, self.plain = {"net": [net]}, loss

    def loss(self, m):
        return self.plain(m, self.inner())

    def inner(self):
        return self.parts["net"][0]

    def __call__(self, m):
        return self.loss(m)


class Trained(nn.Module):
    """The model and the network in one module."""

    def __init__(self, model, net, loss):
        super().__init__()
        self.model, self.net, self.plain = model, net, loss

    def loss(self, m):
        return self.plain(m, self.net)


def weighed(kind, how="a cell"):
    """A problem, and the network of its weights, which the training loss reaches in one way or another."""
    x, y, known = torch.randn(N, D), torch.randint(C, (N,)), torch.rand(N)
    model, net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)), Weighing(kind)
    loss = lambda m, net: (net(known) * F.cross_entropy(m(x), y, reduction="none")).mean()
    if how == "a cell":
        train_loss = lambda m: loss(m, net)
    elif how == "a global":
        globals()["_net"] = net
        train_loss = lambda m: (lambda: loss(m, _net))()
    elif how == "a partial function":
        train_loss = functools.partial(loss, net=net)
    elif how == "a default":
        train_loss = lambda m, net=net: loss(m, net)
    elif how == "the module with all":
        train_loss = Trained(model, net, loss).loss
    else:
        holder = Holder(net, loss)
        train_loss = {"a method": holder.loss, "an object": holder, "a method of a cell": lambda m: holder.loss(m)}[how]
    x_val, y_val = torch.randn(N, D), torch.randint(C, (N,))
    return Bilevel(model, list(net.parameters()), train_loss, lambda m: F.cross_entropy(m(x_val), y_val)), net


STATES = ["bound anew", "in place", "spectral_norm", "old spectral_norm", "BatchNorm", "attributes", "a hook"]
WAYS = ["a global", "a partial function", "a default", "the module with all", "a method", "an object", "a method of a cell"]
WRITTEN_INTO = {("vmap", "spectral_norm"), ("vmap", "old spectral_norm"), ("mixed_mode", "attributes")}
REACHED = [(kind, "a cell") for kind in STATES] + [("in place", way) for way in WAYS]


@pytest.mark.parametrize("estimator", CALLS)
@pytest.mark.parametrize(("kind", "how"), REACHED)
def test_the_state_of_what_belongs_to_lambda_is_that_before_the_call(kind, how, estimator, float64):
    """Each evaluation begins with it, whatever others have done, and it is there afterwards."""
    torch.manual_seed(0)
    problem, net = weighed(kind, how)
    if (estimator, kind) in WRITTEN_INTO:
        with pytest.raises((RuntimeError, NotImplementedError), match="vmap|cannot be written into"):
            CALLS[estimator](*problem.args())
        return
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(3)
    found = CALLS[estimator](*problem.args()).grads
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert net.calls == 0 and not net.seen and not net.last.any() and not net.first._forward_hooks
    torch.manual_seed(0)
    problem, net = weighed(kind)

    def fresh(m):
        torch.manual_seed(0)
        other, used = weighed(kind)
        own = dict(net.named_parameters())
        for name, p in used.named_parameters():
            *path, last = name.split(".")
            vars(functools.reduce(getattr, path, used))["_parameters"][last] = own[name]
        return other.train_loss(m)

    torch.manual_seed(3)
    estimator = "retain" if estimator == "vmap" else estimator  # the same, and modules can be made in it
    expected = CALLS[estimator](fresh, *problem.args()[1:]).grads
    assert relative_difference(found, expected) < 1e-10


class Searched(nn.Module):
    """λ is a buffer, beside BatchNorm's."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, C)
        self.register_buffer("alphas", torch.ones(6, requires_grad=True))

    def forward(self, x):
        return self.head(self.alphas.softmax(0) * torch.tanh(self.norm(self.a(x))))


@pytest.mark.parametrize("estimator", [name for name in CALLS if name not in ("higher", "vmap")])
def test_lambda_may_be_a_buffer(estimator, float64):
    """As if it were a parameter of the same values."""
    torch.manual_seed(0)
    model, x, y = Searched(), torch.randn(N, D), torch.randint(C, (N,))
    other, found = copy.deepcopy(model), []
    del other._buffers["alphas"]
    other.alphas = nn.Parameter(torch.ones(6))
    for m in (model, other):
        torch.manual_seed(3)
        args = (lambda m: F.cross_entropy(m(x), y), lambda m: F.cross_entropy(m(x + 1), y), m, [m.alphas])
        found.append(CALLS[estimator](*args).grads)
    assert relative_difference(*found) < 1e-12
    assert model.alphas.requires_grad and torch.equal(model.norm.running_mean, torch.zeros(6))


class Queue:
    def __init__(self):
        self.kept = {"scale": torch.ones(2)}


KEPT = torch.zeros(3)


@pytest.mark.parametrize("estimator", CALLS)
@pytest.mark.parametrize("what", ["mean", "held.kept.scale", "KEPT", "x", r"hyperparameters\[0\]", "weight"])
def test_a_loss_that_writes_into_what_it_has_beside_the_model_is_named(what, estimator, float64):
    """A running mean, a queue, data, λ itself, a teacher."""
    x, y, lam = torch.randn(N, D), torch.randint(C, (N,)), torch.rand(N, requires_grad=True)
    x_val, model, teacher = torch.randn(N, D), nn.Linear(D, C), nn.Linear(D, C)
    mean, held = torch.zeros(()), Queue()
    writes = {
        "mean": lambda: mean.mul_(0.9).add_(0.1),
        "held.kept.scale": lambda: held.kept["scale"].mul_(0.9),
        "KEPT": lambda: KEPT.__setitem__(0, 1.0),
        "x": lambda: x.mul_(0.9),
        r"hyperparameters\[0\]": lambda: lam.clamp_(0, 1),
        "weight": lambda: teacher.weight.mul_(0.9),
    }
    write = torch.no_grad()(writes[what])

    def train_loss(m):
        write()
        return (lam * F.cross_entropy(m(x) + teacher(x).detach(), y, reduction="none")).mean() + mean + held.kept["scale"].sum()

    said = "from outside of it cannot be written into" if estimator == "mixed_mode" else f"a loss has written into '[^']*{what}', which"
    with pytest.raises(RuntimeError, match=said):
        CALLS[estimator](train_loss, lambda m: F.cross_entropy(m(x_val), y), model, [lam])


# --- parameters, gradients, modes --------------------------------------------------------------------------------------


def test_sparse_gradients(float64):
    def model(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, C))

    i, y, lam = torch.randint(11, (N, 3)), torch.randint(C, (N,)), torch.rand(N, requires_grad=True)
    args = ((lambda m: (lam * F.cross_entropy(m(i), y, reduction="none")).mean()), lambda m: F.cross_entropy(m(i), y))
    for name in ("stream", "retain", "guided", "mixed_mode", "unrolled", "finite_difference"):
        found = []
        for sparse in (False, True):
            torch.manual_seed(2)
            found.append(ESTIMATORS[name](*args, model(sparse), [lam]).grads)
        assert relative_difference(*found) < 1e-10, name


def test_complex_parameters_are_named():
    model = nn.Linear(D, C)
    model.register_parameter("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    problem = problem_of(model)
    with pytest.raises(ValueError, match=r"'phase' is torch.complex64.*parameters=\["):
        evograd.hypergradient(*problem.args())
    evograd.hypergradient(*problem.args(), parameters=["weight", "bias"])


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "higher"])
def test_called_in_inference_mode(estimator, float64):
    problem = bilevel("mlp")
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(3)
        with mode():
            found.append(ESTIMATORS[estimator](*problem.args()).grads)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[2][0])


def test_tensors_of_inference_mode_are_named():
    with torch.inference_mode():
        problem = problem_of(nn.Linear(D, C))
        lam = problem.hyperparameters
    with pytest.raises((RuntimeError, ValueError), match="inference_mode|requires_grad"):
        evograd.hypergradient(problem.train_loss, problem.val_loss, problem.model, lam)


# --- losses that take gradients themselves, and closures over the model -------------------------------------------------


def sharpness(plain):
    def val_loss(m):
        value = plain(m)
        grads = torch.autograd.grad(value, [p for p in m.parameters() if p.requires_grad], create_graph=True)
        return value + sum(g.square().sum() for g in grads)

    return val_loss


@pytest.mark.parametrize("bucket", [2**21, 20])  # θ in one, or in several, whose gradients are dropped on the way
@pytest.mark.parametrize("strategy", ["stream", "retain", "vmap"])
def test_a_validation_loss_with_gradients_of_its_own(strategy, bucket, monkeypatch, float64):
    monkeypatch.setattr(importlib.import_module("evograd.host.vectors"), "BUCKET", bucket)
    problem = bilevel("mlp")
    problem.val_loss = sharpness(problem.val_loss)
    settings = dict(n_candidates=3, sigma=0.1, temperature=0.2)
    torch.manual_seed(3)
    expected = evograd_reference(problem, **settings)
    torch.manual_seed(3)
    result = evograd.hypergradient(*problem.args(), strategy=strategy, **settings)
    assert relative_difference(result.grads, expected) < 1e-10


def test_exact_estimators_agree_on_losses_with_gradients_of_their_own(float64):
    problem = bilevel("mlp")
    problem.val_loss = sharpness(problem.val_loss)
    exact = ESTIMATORS["unrolled"](*problem.args())
    for name, precision in (("mixed_mode", 1e-10), ("guided", 1e-6), ("finite_difference", 1e-5)):
        result = ESTIMATORS[name](*problem.args())
        assert relative_difference(result.grads, exact.grads) < precision
        torch.testing.assert_close(result.val_loss, exact.val_loss)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "higher"])
def test_closures_may_call_the_model_itself(estimator, float64):
    problem = bilevel("batchnorm")
    model = problem.model
    found = []
    for args in (problem.args(), (lambda m: problem.train_loss(model), lambda m: problem.val_loss(model), *problem.args()[2:])):
        torch.manual_seed(3)
        found.append(ESTIMATORS[estimator](*args).grads)
    assert torch.equal(found[0][0], found[1][0])


# --- T1–T2's two engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "batchnorm", "tied", "lstm", "mixed_shapes", "head_only", "hyperparameters_inside"])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_engines_agree_where_both_can(kind, n_steps):
    problem = bilevel(kind)
    settings = dict(inner_lr=ETA, n_steps=n_steps, parameters=problem.parameters)
    own, other = (b.unrolled(*problem.args(), engine=engine, **settings) for engine in b.ENGINES)
    assert relative_difference(own.grads, other.grads) < 1e-10
    torch.testing.assert_close(own.val_loss, other.val_loss, rtol=1e-12, atol=0)


def test_what_higher_does_not_do_the_model_itself_does(float64):
    """Submodules in a closure, hooks, slices of a ModuleList: against mixed mode."""

    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(D, D) for _ in range(3)), nn.Linear(D, C)

        def features(self, x):
            for layer in self.layers[:2]:
                x = torch.tanh(layer(x))
            return x

        def forward(self, x):
            return self.head(self.features(x))

    model = Slices()
    model.layers[0].register_forward_hook(lambda m, i, o: 2 * o)
    model.head.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    problem = problem_of(model)
    x, y, lam = torch.randn(N, D), torch.randint(C, (N,)), torch.rand(D, requires_grad=True)
    train_loss = lambda m: F.cross_entropy(m.head(m.features(x * lam)), y)
    exact = b.unrolled(train_loss, problem.val_loss, model, [lam], inner_lr=ETA).grads
    mixed = evograd.mixed_mode(train_loss, problem.val_loss, model, [lam], inner_lr=ETA, lookahead="sgd").grads
    assert relative_difference(exact, mixed) < 1e-12


def test_an_unknown_engine_and_a_missing_package(monkeypatch):
    args = bilevel("mlp").args()
    with pytest.raises(ValueError, match="engine='torch' is unknown; accepted are 'functional', 'higher'"):
        b.unrolled(*args, inner_lr=0.1, engine="torch")
    monkeypatch.setitem(__import__("sys").modules, "higher", None)
    with pytest.raises(ImportError, match=r"pip install 'evograd-hypergradients\[baselines\]'"):
        b.unrolled(*args, inner_lr=0.1, engine="higher")
    b.unrolled(*args, inner_lr=0.1)


# --- parameters by other ways -------------------------------------------------------------------------------------------


def decayed(which):
    """A loss with a penalty over the parameters that `which` gives of a model, for log λ."""
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    log_decay = torch.full((), -3.0, requires_grad=True)
    return lambda m: F.cross_entropy(m(x), y) + log_decay.exp() * sum(p.square().sum() for p in which(m)), log_decay


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "in_place"])
def test_a_penalty_over_what_requires_grad(estimator, float64):
    """Stand-ins say that they do, as the parameters do; those that do not are left out."""
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
    model[0].bias.requires_grad_(False)
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    run = ESTIMATORS.get(estimator, lambda *a, **k: evograd.hypergradient(*a, strategy="in_place", **k))
    results = []
    for which in (
        lambda m: (p for p in m.parameters() if p.requires_grad),
        lambda m: (m[0].weight, m[2].weight, m[2].bias),
    ):
        torch.manual_seed(1)
        loss, log_decay = decayed(which)
        results.append(run(loss, lambda m: F.cross_entropy(m(x), y), model, [log_decay]).grads)
    assert relative_difference(*results) < 1e-12
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_stand_ins_can_be_frozen_and_copied(float64):
    model, (x, y) = nn.Linear(D, C), (torch.randn(N, D), torch.randint(C, (N,)))
    lam = torch.zeros(N, requires_grad=True)
    seen = []

    def loss(m):
        assert isinstance(m.weight, nn.Parameter) and not isinstance(m.weight + 1, nn.Parameter)
        seen.append((m.weight.requires_grad, type(m.weight + 1), type(copy.deepcopy(m).weight)))
        m.weight.requires_grad = False
        seen.append(m.weight.requires_grad)
        m.bias.requires_grad_(False)
        seen.append(m.bias.requires_grad)
        return (lam.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()

    evograd.hypergradient(loss, lambda m: F.cross_entropy(m(x), y), model, [lam])
    assert seen == [(True, torch.Tensor, torch.Tensor), False, False] * 2


class Nested(nn.Module):
    """Its weights are reached by a tuple, by a list in a dict, by a view, or by a partial function."""

    def __init__(self, by):
        super().__init__()
        self.first, self.second = nn.Linear(D, 8), nn.Linear(8, C)
        weights = [self.first.weight, self.second.weight]
        self.weights = {"tuple": tuple(weights), "nested": {"all": weights}, "view": [w.view(-1).view_as(w) for w in weights]}.get(by)
        self.second_layer = functools.partial(F.linear, weight=self.second.weight) if by == "partial" else None
        self.by = by

    def forward(self, x):
        if self.by == "partial":
            return self.second_layer(torch.tanh(self.first(x)))
        first, second = self.weights["all"] if self.by == "nested" else self.weights
        return F.linear(torch.tanh(F.linear(x, first)), second)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("by", ["tuple", "nested", "view", "partial", "listed before"])
def test_a_loss_that_goes_back_to_the_models_own_parameters_is_refused(estimator, by, float64):
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    model = nn.Linear(D, C) if by == "listed before" else Nested(by)
    if by == "listed before":
        groups = torch.optim.SGD(model.parameters(), lr=0.1).param_groups
        loss, lam = decayed(lambda m: groups[0]["params"])
    else:
        lam = torch.zeros(N, requires_grad=True)
        loss = lambda m: (lam.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()
    for _ in range(2):  # the second time too
        with pytest.raises(RuntimeError, match="uses the model's own parameter '.*strategy='in_place'"):
            ESTIMATORS[estimator](loss, lambda m: F.cross_entropy(m(x), y), model, [lam])


class Decay:
    """A loss that goes over parameters that were listed before, if it is told to."""

    def __init__(self, x, y, listed, on, lam=None):
        self.x, self.y, self.listed, self.on, self.lam = x, y, listed, on, lam

    def __call__(self, m):
        losses = F.cross_entropy(m(self.x), self.y, reduction="none")
        loss = losses.mean() if self.lam is None else (self.lam * losses).mean()
        return loss + 0.4 * sum(p.square().sum() for p in self.listed) if self.on else loss


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["switched on", "the same code", "a function that is made"])
def test_own_parameters_are_looked_for_each_time(how, estimator, float64):
    """A penalty that begins later; two losses of one class, or out of one function."""
    model, lam = nn.Linear(D, C), torch.rand(N, requires_grad=True)
    made = (lambda loss: lambda m: loss(m)) if how == "a function that is made" else lambda loss: loss
    train, val = (Decay(torch.randn(N, D), torch.randint(C, (N,)), list(model.parameters()), False) for _ in range(2))
    train.lam, train.on = lam, how != "switched on"
    problem = (made(train), made(val), model, [lam])
    if how == "switched on":
        ESTIMATORS[estimator](*problem)
        train.on = True
    with pytest.raises(RuntimeError, match="train_loss uses the model's own parameter '.*strategy='in_place'"):
        ESTIMATORS[estimator](*problem)
    train.on, val.on = False, True
    with pytest.raises(RuntimeError, match="val_loss uses the model's own parameter '"):
        ESTIMATORS[estimator](*problem)


@pytest.mark.parametrize("by", ["tuple", "nested", "partial", "plain"])
def test_in_place_they_are_the_same(by, float64):
    """What the refusal recommends is right."""
    x, y, lam = torch.randn(N, D), torch.randint(C, (N,)), torch.zeros(N, requires_grad=True)
    model = Nested(by if by != "plain" else "tuple")
    plain = lambda m: F.linear(torch.tanh(F.linear(x, m.first.weight)), m.second.weight)
    if by == "partial":
        plain = lambda m: F.linear(torch.tanh(m.first(x)), m.second.weight)
    forward = plain if by == "plain" else lambda m: m(x)
    weighted = lambda f: lambda m: (lam.sigmoid() * F.cross_entropy(f(m), y, reduction="none")).mean()
    loss = lambda f: lambda m: F.cross_entropy(f(m), y)
    settings = dict(inner_lr=ETA, lookahead="sgd", strategy="in_place")
    found = evograd.guided(weighted(forward), loss(forward), model, [lam], **settings).grads
    expected = b.unrolled(weighted(plain), loss(plain), model, [lam], inner_lr=ETA).grads
    assert relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS])
@pytest.mark.parametrize("how", ["no_grad", "another model"])
def test_a_validation_loss_without_the_model_is_an_error(estimator, how, float64):
    problem = bilevel("mlp")
    train, val, model, lam = problem.args()
    other = copy.deepcopy(model)
    wrong = torch.no_grad()(val) if how == "no_grad" else lambda m: val(other)
    with pytest.raises(RuntimeError, match="val_loss depends on neither|does not depend on it"):
        ESTIMATORS[estimator](train, wrong, model, lam)


AVERAGED = {
    "the model": lambda m, x, average: functional_call(m, average, (x,)),
    "a part": lambda m, x, average: m[2](functional_call(m[0], {n: average[f"0.{n}"] for n in ("weight", "bias")}, (x,))),
}


@pytest.mark.parametrize("how", AVERAGED)
def test_higher_refuses_functional_calls(how, float64):
    """An exponential average in val_loss: of its copies they would take other parameters. The model itself takes those given."""
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))
    problem, x_val, y_val = problem_of(model, "losses"), torch.randn(N, D), torch.randint(C, (N,))
    average = lambda m: {name: 0.1 * p for name, p in m.named_parameters()}
    val_loss = lambda m: F.cross_entropy(AVERAGED[how](m, x_val, average(m)), y_val)
    args = (problem.train_loss, val_loss, model, problem.hyperparameters)
    with pytest.raises(NotImplementedError, match="functional_call in a loss.*engine='functional'"):
        b.unrolled(*args, inner_lr=ETA, engine="higher")
    assert relative_difference(ESTIMATORS["mixed_mode"](*args).grads, ESTIMATORS["unrolled"](*args).grads) < 1e-12


@pytest.mark.parametrize("estimator", [name for name in CALLS if name != "vmap"])
def test_a_cast_in_a_loss_is_taken_back(estimator):
    """model.double(), also of λ in the model."""
    torch.manual_seed(0)
    problem = problem_of(Encoders(), "losses")
    model, lam = problem.model, problem.hyperparameters
    model.scale = nn.Parameter(torch.ones(()))
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))

    def train_loss(m):
        m.double()
        return (lam[0] * F.cross_entropy(m(x) * m.scale, y, reduction="none")).mean()

    if estimator in ("mixed_mode", "higher"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            CALLS[estimator](train_loss, problem.val_loss, model, [*lam, model.scale])
    else:
        CALLS[estimator](train_loss, problem.val_loss, model, [*lam, model.scale])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(type(p) is nn.Parameter and not vars(p) for p in model.parameters())


@pytest.mark.parametrize("estimator", ["stream", "guided", "in_place", "finite_difference"])
def test_a_loss_that_finds_no_parameters_is_told(estimator, float64):
    """One that asks for their type, which is another one's in their places: no estimate is zero without a word."""
    model, x, y = nn.Sequential(nn.Linear(D, 16), nn.Linear(16, C)), torch.randn(N, D), torch.randint(C, (N,))
    loss, lam = decayed(lambda m: (p for p in m.parameters() if type(p) is nn.Parameter))
    with pytest.warns(UserWarning, match=r"hyperparameters\[0\]: the gradients of two candidates by it differ by 0 eps"):
        found = CALLS[estimator](loss, lambda m: F.cross_entropy(m(x), y), model, [lam]).grads
    assert found[0] == 0


# --- differences that rounding hides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("decay of a wide network", {"estimator": "guided"}),
        ("λ in bfloat16", {}),
        ("small radius", {"estimator": "guided", "radius": 1e-8}),
        ("small sigma", {"sigma": 1e-9}),
        ("none", {"estimator": "guided"}),
        ("none", {}),
    ],
)
def test_there_is_a_warning_where_two_candidates_are_not_told_apart(kind, settings):
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randint(3, (64,))
    lam = torch.zeros(64, requires_grad=True, dtype=torch.bfloat16 if kind == "λ in bfloat16" else torch.float32)
    loss = lambda m: (lam.float().sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
    if kind == "decay of a wide network":
        model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
        lam = torch.full((), -3.0, requires_grad=True)
        loss = lambda m: F.cross_entropy(m(x), y) + lam.exp() * sum(p.square().sum() for p in m.parameters())
    expected = nullcontext() if kind == "none" else pytest.warns(UserWarning, match=r"hyperparameters\[0\].* eps of .*mixed_mode")
    with expected:
        estimate(loss, lambda m: F.cross_entropy(m(x), y), model, [lam], **settings)


def test_a_pair_goes_as_far_apart_as_its_hyperparameters_have_digits():
    """λ in bfloat16: its gradients have three digits, whatever the losses have."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randint(3, (64,))
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
    for dtype, precision in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        lam = torch.zeros(64, requires_grad=True, dtype=dtype)
        loss = lambda m, lam=lam: (lam.float().sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()
        problem = (loss, lambda m: F.cross_entropy(m(x), y), model, [lam])
        found, exact = evograd.guided(*problem, inner_lr=ETA), b.unrolled(*problem, inner_lr=ETA)
        assert relative_difference([found.grads[0].float()], [exact.grads[0].float()]) < precision
        assert 0 < found.curvature < 0.3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_higher_refuses_what_runs_before_a_module(float64):
    """Its copies call no hooks, so that weight_norm's weight would be of another step."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(D, 4)), nn.Tanh(), nn.Linear(4, C))
    x, y, lam = torch.randn(N, D), torch.randint(C, (N,)), torch.zeros(N, requires_grad=True)
    problem = (
        lambda m: (lam.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean(),
        lambda m: F.cross_entropy(m(x), y),
        model,
        [lam],
    )
    with pytest.raises(NotImplementedError, match="engine='higher' calls no hooks, and '0'.*engine='functional'"):
        b.unrolled(*problem, inner_lr=ETA, engine="higher")
    found, exact = b.unrolled(*problem, inner_lr=ETA).grads, ESTIMATORS["guided"](*problem).grads
    assert relative_difference(exact, found) < 1e-6


class Dropped(nn.Module):
    """An LSTM some of whose weights are dropped: a tensor, or another parameter, at each call."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.net = kind, nn.LSTM(D, C, batch_first=True)
        self.raw = self.net._parameters.pop("weight_hh_l0")

    def forward(self, x):
        self.net.weight_hh_l0 = self.kind(F.dropout(self.raw, 0.5))
        return self.net(x[:, None])[0][:, 0]


@pytest.mark.parametrize("kind", [nn.Identity(), nn.Parameter])
def test_what_higher_cannot_copy_is_said(kind):
    x, y, lam = torch.randn(N, D), torch.randint(C, (N,)), torch.zeros(N, requires_grad=True)
    losses = lambda m: (lam.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean(), lambda m: F.cross_entropy(m(x), y)
    model = Dropped(kind)
    model(x)
    with pytest.raises(NotImplementedError, match="engine='higher' cannot call its copy of this model .*use engine='functional'"):
        b.unrolled(*losses, model, [lam], inner_lr=ETA, engine="higher")
    parts = nn.Sequential(nn.Linear(D, 5), nn.Linear(5, C))
    losses = [lambda m, loss=loss: loss(lambda x: m[1](m[0](x))) for loss in losses]
    with pytest.raises(NotImplementedError, match="engine='higher' cannot call its copy of this model"):
        b.unrolled(*losses, parts, [lam], inner_lr=ETA, engine="higher")


class Fixed(nn.Module):
    """A layer whose matrix is a buffer of another kind: float8, quantised, sparse. `rebinds`: to what it has itself computed."""

    def __init__(self, matrix, rebinds=False):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.first, self.last, self.rebinds = nn.Linear(D, 6).double(), nn.Linear(6, C).double(), rebinds

    def forward(self, x):
        self.calls += 1
        now = self.matrix
        if self.rebinds:
            self.matrix = self.matrix.clone()
        if now.layout in (torch.strided, torch._mkldnn):
            return self.last(torch.tanh(self.first(x @ dense(now))))
        return self.last(torch.tanh(self.first((now @ x.T).T)))


def dense(matrix):
    plain = matrix if matrix.layout is torch.strided else matrix.to_dense()
    return (plain.dequantize() if plain.is_quantized else plain).double()


MATRICES = {
    "float8_e4m3fn": lambda m: m.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda m: m.to(torch.float8_e5m2),
    "uint16": lambda m: m.abs().mul(9).to(torch.uint16),
    "bool": lambda m: m > 0,
    "quint8": lambda m: torch.quantize_per_tensor(m.float(), 0.02, 128, torch.quint8),
    "quint8, by channel": lambda m: torch.quantize_per_channel(m.float(), torch.full((D,), 0.02), torch.zeros(D).int(), 0, torch.quint8),
    "mkldnn": lambda m: m.float().to_mkldnn(),
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
}


@pytest.mark.filterwarnings("ignore:Sparse CS", "ignore:.*[qQ]uantiz")
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "in_place", "in_place_guided"])
@pytest.mark.parametrize("kind", MATRICES)
def test_buffers_of_other_kinds(kind, estimator, float64):
    """Values are those of a dense float64 buffer, or an error names the way out; the buffer is afterwards what it was."""
    torch.manual_seed(0)
    problem, square = bilevel("mlp"), torch.randn(D, D).double()
    # x @ matrix and matrix @ x: of a symmetric one they are the same
    matrix = MATRICES[kind](((square + square.T) * (square + square.T > 0)).clamp(-2, 2))
    results = []
    for of, rebinds in ((dense(matrix), False), (matrix, True)):
        model = Fixed(of, rebinds)
        model.first.load_state_dict({n: torch.linspace(-1, 1, p.numel()).view_as(p) for n, p in model.first.state_dict().items()})
        model.last.load_state_dict({n: torch.linspace(-1, 1, p.numel()).view_as(p) for n, p in model.last.state_dict().items()})
        run = {
            "in_place": lambda *a: evograd.hypergradient(*a, strategy="in_place"),
            "in_place_guided": lambda *a: evograd.guided(*a, inner_lr=ETA, strategy="in_place"),
            **ESTIMATORS,
        }[estimator]
        torch.manual_seed(0)
        if of is matrix and estimator == "mixed_mode" and kind in ("csr", "csc"):
            with pytest.raises(NotImplementedError, match="make them dense, or use evograd.guided"):
                run(problem.train_loss, problem.val_loss, model, problem.hyperparameters)
        else:
            results.append(run(problem.train_loss, problem.val_loss, model, problem.hyperparameters).grads)
        assert model.matrix is of and model.calls == 0
    assert len(results) == 1 or relative_difference(*results) < 1e-6


class Sets(nn.Module):
    """Of a set of vectors each, in a nested tensor, or in a list: the mean of what a layer makes of them."""

    def __init__(self, kinked):
        super().__init__()
        self.first, self.last, self.kinked = nn.Linear(D, 6).double(), nn.Linear(6, C).double(), kinked

    def forward(self, sets):
        if isinstance(sets, torch.Tensor):
            parts = self.kinked(self.first(sets)).unbind()
        else:
            parts = [self.kinked(self.first(part)) for part in sets]
        return self.last(torch.stack([part.mean(0) for part in parts]))


KINKED = {"relu": F.relu, "relu6": F.relu6, "elu": lambda t: F.elu(t, 2.0), "clamp": lambda t: t.clamp(-0.3, 0.3)}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("kinked", KINKED)
def test_nested_tensors_are_for_estimators_of_first_order(kinked, monkeypatch):
    torch.manual_seed(0)
    sets, y = [torch.randn(n, D).double() for n in (3, 9, 2, 4)], torch.tensor([0, 1, 2, 1])
    weights, model = torch.zeros(4).double().requires_grad_(), Sets(KINKED[kinked])
    nested = torch.nested.nested_tensor(sets, layout=torch.jagged)
    of = lambda x: (
        lambda m: (weights.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean(),
        lambda m: F.cross_entropy(m(x), y),
        model,
        [weights],
    )
    right = b.unrolled(*of(sets), inner_lr=ETA).grads
    ahead = {name: p.detach() for name, p in model.named_parameters()}
    for settings in ({}, dict(strategy="in_place"), dict(share_kinks=False)):
        assert relative_difference(evograd.guided(*of(nested), inner_lr=ETA, **settings).grads, right) < 1e-6
    kinks = evograd.operations.kinks.Kinks(packed=True)
    with kinks.record():
        of(nested)[0](model)
    settings = dict(inner_lr=ETA, lookahead=ahead)
    expected = evograd.guided(*of(sets), **settings).grads
    assert relative_difference(evograd.guided(*of(nested), kinks=kinks, **settings).grads, expected) < 1e-6
    for looking in (False, True):  # where there is TorchScript
        monkeypatch.setattr(evograd.operations.forward_mode, "scripted", lambda model, looking=looking: looking)
        with pytest.raises(NotImplementedError, match="nested tensors cannot be used.*unbind.* or use evograd.guided"):
            evograd.mixed_mode(*of(nested), inner_lr=ETA)
    for estimator in (b.unrolled, b.neumann):
        with pytest.raises(RuntimeError, match="double backward through a nested tensor, .*unbind.* guided need first derivatives alone"):
            estimator(*of(nested), inner_lr=ETA)
