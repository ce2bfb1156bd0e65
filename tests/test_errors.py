"""Bad input: at once, with a message that names what was given and what is accepted."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evograd
from evograd.host.slots import meeting
from evograd.operations.kinks import Kinks

from .problems import bilevel

PROBLEM = bilevel("mlp")
TRAIN, VAL, MODEL, HYPER = PROBLEM.args()


def call(method=evograd.hypergradient, train_loss=TRAIN, val_loss=VAL, model=MODEL, hyperparameters=HYPER, **settings):
    return method(train_loss, val_loss, model, hyperparameters, **settings)


def guided(*args, **settings):
    return evograd.guided(*args, **{"inner_lr": 0.1, **settings})


def mixed_mode(*args, **settings):
    return evograd.mixed_mode(*args, **{"inner_lr": 0.1, **settings})


def unrolled(*args, **settings):
    return evograd.baselines.unrolled(*args, **{"inner_lr": 0.1, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"n_candidates": 1}, ValueError, ["n_candidates=1", "at least 2"]),
        ({"n_candidates": 2.5}, ValueError, ["n_candidates=2.5", "integer"]),
        ({"sigma": 0}, ValueError, ["sigma=0", "positive"]),
        ({"sigma": math.nan}, ValueError, ["sigma=nan", "positive"]),
        ({"temperature": -1.0}, ValueError, ["temperature=-1.0", "positive"]),
        ({"inner_lr": -0.1}, ValueError, ["inner_lr=-0.1", "positive"]),
        ({"noise": "pink"}, ValueError, ["noise='pink'", "'sign'", "'normal'", "function"]),
        ({"noise": lambda like, generator: torch.ones(3)}, ValueError, ["noise returned (3,)", "must be"]),
        ({"strategy": "store"}, ValueError, ["strategy='store'", "'stream'", "'retain'"]),
        ({"parameters": ["0.wait"]}, ValueError, ["no parameter '0.wait'", "'0.weight'"]),
        ({"parameters": MODEL.parameters()}, ValueError, ["parameters", "without names", "named_parameters()"]),
        ({"parameters": {"0.bias": 3}}, ValueError, ["'0.bias' is int", "tensor"]),
        ({"parameters": {"0.bias": torch.zeros(6)}}, ValueError, ["float32", "float64"]),
        ({"generator": 0}, ValueError, ["generator is int", "torch.Generator"]),
        ({"hyperparameters": nn.Linear(1, 1)}, TypeError, ["not Linear", "list(module.parameters())"]),
        ({"noise": lambda like, generator: like.float()}, ValueError, ["noise returned", "float32", "float64"]),
        ({"parameters": []}, ValueError, ["parameters is empty"]),
        ({"hyperparameters": []}, ValueError, ["hyperparameters is empty"]),
        ({"hyperparameters": HYPER[0]}, TypeError, ["sequence of tensors"]),
        ({"hyperparameters": [torch.ones(2)]}, ValueError, ["hyperparameters[0]", "requires_grad=True"]),
        (
            {"hyperparameters": [*HYPER, torch.ones(2, requires_grad=True)]},
            RuntimeError,
            ["hyperparameters[1]", "(2,)", "does not depend on it"],
        ),
        ({"train_loss": 3}, TypeError, ["train_loss", "int"]),
        ({"model": lambda x: x}, TypeError, ["model", "Module"]),
        ({"train_loss": lambda m: TRAIN(m) * math.nan}, RuntimeError, ["train_loss", "nan", "finite"]),
        ({"val_loss": lambda m: VAL(m) / 0}, RuntimeError, ["val_loss", "inf", "finite"]),
        ({"train_loss": lambda m: TRAIN(m) * torch.ones(3)}, ValueError, ["train_loss", "scalar", "(3,)"]),
        ({"val_loss": lambda m: 0.5}, ValueError, ["val_loss", "scalar", "float"]),
        ({"train_loss": lambda m: TRAIN(m).long()}, ValueError, ["train_loss", "int64"]),
        ({"model": nn.Linear(5, 3).requires_grad_(False)}, ValueError, ["parameters", "no parameter that requires grad"]),
        ({"method": mixed_mode, "inner_lr": -1}, ValueError, ["inner_lr=-1", "positive"]),
        ({"method": mixed_mode, "lookahead": "adam"}, ValueError, ["lookahead='adam'"]),
        ({"noise": "guided"}, ValueError, ["noise='guided'", "'sign'", "evograd.guided is a function of its own"]),
        ({"method": guided, "lookahead": "adam"}, ValueError, ["lookahead='adam'", "'sgd'"]),
        ({"method": guided, "lookahead": {"0.bias": torch.ones(9)}}, ValueError, ["lookahead", "0.bias", "(9,)", "(6,)"]),
        ({"method": guided, "radius": 0}, ValueError, ["radius=0", "positive"]),
        ({"method": guided, "inner_lr": math.nan}, ValueError, ["inner_lr=nan", "positive"]),
        ({"method": guided, "strategy": "vmap"}, ValueError, ["'vmap'", "'stream', 'in_place', 'retain'"]),
        ({"method": guided, "strategy": "store"}, ValueError, ["'store'", "'stream', 'in_place', 'retain'"]),
        ({"method": guided, "kinks": 3, "lookahead": None}, ValueError, ["kinks must be Kinks()"]),
        ({"method": guided, "kinks": Kinks(), "lookahead": None}, ValueError, ["kinks must be Kinks()", "hold a pass"]),
        ({"method": unrolled, "inner_lr": math.inf}, ValueError, ["inner_lr=inf"]),
        ({"method": unrolled, "n_steps": 0}, ValueError, ["n_steps=0", "at least 1"]),
    ],
)
def test_message(settings, error, words):
    with pytest.raises(error) as raised:
        call(**settings)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("method", [mixed_mode, guided, unrolled])
@pytest.mark.parametrize("loss", ["train_loss", "val_loss"])
def test_losses_are_checked_in_every_estimator(method, loss):
    good = {"train_loss": TRAIN, "val_loss": VAL}[loss]
    with pytest.raises(RuntimeError, match=f"{loss}.*nan"):
        call(method, **{loss: lambda m: good(m) * math.nan})
    with pytest.raises(ValueError, match=f"{loss}.*scalar"):
        call(method, **{loss: lambda m: good(m) * torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"hyperparameters\[0\].*does not depend on it"):
        call(method, hyperparameters=[torch.ones(1, requires_grad=True)])


def test_a_hyperparameter_of_the_model_is_never_perturbed():
    problem = bilevel("hyperparameters_inside")
    with pytest.raises(ValueError, match="'gate' is a hyperparameter"):
        evograd.hypergradient(*problem.args(), parameters=["gate", "head.weight"])
    unused = nn.Parameter(torch.ones(2))
    problem.model.register_parameter("unused", unused)
    with pytest.raises(RuntimeError, match=r"hyperparameters\[0\] \('unused'\)"):
        evograd.hypergradient(problem.train_loss, problem.val_loss, problem.model, [unused])


@pytest.mark.parametrize("memory", [lambda b: b, lambda b: b[2:4], lambda b: b.view(torch.int64).view(torch.float64)])
def test_hyperparameters_in_the_memory_of_a_parameter_are_refused_in_place(memory):
    problem = bilevel("mlp")
    lam = memory(problem.model[0].bias.detach()).requires_grad_()
    loss = lambda m: lam.exp().sum() * problem.train_loss(m)
    with pytest.raises(ValueError, match=r"hyperparameters\[1\] is in the memory of the parameter '0.bias'.*strategy='stream'"):
        call(train_loss=loss, model=problem.model, hyperparameters=[*problem.hyperparameters, lam], strategy="in_place")
    call(train_loss=loss, model=problem.model, hyperparameters=[lam])


def test_hyperparameters_beside_parameters_in_one_storage_are_taken_in_place():
    """Views that have no element in common: the columns of one matrix."""
    problem = bilevel("mlp")
    columns = torch.rand(len(problem.model[0].bias), 2, dtype=torch.float64)
    problem.model[0].bias = nn.Parameter(columns[:, 0])
    lam = columns[:, 1].requires_grad_()
    loss = lambda m: lam.exp().sum() * problem.train_loss(m)
    grads = []
    for strategy in ("stream", "in_place"):
        torch.manual_seed(0)
        grads += call(train_loss=loss, model=problem.model, hyperparameters=[lam], strategy=strategy).grads
    torch.testing.assert_close(*grads, rtol=1e-9, atol=0)


METHODS = {
    "stream": evograd.hypergradient,
    "in_place": lambda *args: evograd.hypergradient(*args, strategy="in_place"),
    "mixed_mode": mixed_mode,
    "unrolled": unrolled,
    "higher": lambda *args: unrolled(*args, engine="higher"),
    "neumann": lambda *args: evograd.baselines.neumann(*args, inner_lr=0.1),
    "compare": lambda *args: evograd.compare(*args, inner_lr=0.1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", [slice(None), slice(2, None)])
def test_two_parameters_in_one_memory_are_refused_in_every_estimator(method, part):
    problem = bilevel("mlp")
    problem.model[0].weight = nn.Parameter(problem.model[0].weight.data)
    problem.model.register_parameter("again", nn.Parameter(problem.model[0].weight.data[part]))
    words = r"parameters: ('again' and '0.weight'|'0.weight' and 'again') are two parameters in the same memory.*tie them"
    with pytest.raises(ValueError, match=words):
        METHODS[method](*problem.args())
    problem.model.again.requires_grad_(False)  # held fixed, it would still be written into
    with pytest.raises(ValueError, match=words):
        METHODS[method](*problem.args())


def test_parameters_in_one_storage_are_taken_where_they_do_not_meet():
    """Parts of a flat tensor, columns of a matrix, no elements, one parameter under two names; and tensors without storage."""
    flat, matrix = torch.rand(12), torch.rand(4, 2)
    apart = {"a": flat[:5], "b": flat[5:], "c": flat[3:3], "d": matrix[:, 0], "e": matrix[:, 1]}
    apart |= {"sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta"), "also": torch.empty(3, device="meta")}
    with FakeTensorMode():
        apart |= {"fake": torch.empty(3), "other": torch.empty(3), "none": torch.empty(0)}
        fake = torch.empty(2, 3)
        same = {"rows": fake[0], "all": fake, "column": fake[:, 1:2]}
    assert list(meeting(apart)) == []
    assert list(meeting({"a": flat[:5], "b": flat[4:]})) == [("a", "b")]
    assert list(meeting({"a": matrix[:, 0], "b": matrix[1:3, 0], "c": matrix[:, 1]})) == [("a", "b")]
    assert sorted(meeting(same)) == [("all", "column"), ("rows", "all"), ("rows", "column")]
    problem = bilevel("tied")
    evograd.hypergradient(*problem.args())


@pytest.mark.parametrize("estimator", [evograd.hypergradient, guided, mixed_mode, unrolled])
def test_a_rate_of_a_schedule(estimator):
    """A tensor, and 0 at its end."""
    args = bilevel("mlp").args()
    for rate, number in ((torch.tensor(0.2), 0.2), (0, 0.0)):
        torch.manual_seed(0)
        found = estimator(*args, inner_lr=rate).grads
        torch.manual_seed(0)
        expected = estimator(*args, inner_lr=float(torch.tensor(number))).grads
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("estimator", [evograd.hypergradient, guided, mixed_mode])
def test_a_graph_from_outside_that_is_gone_is_named(estimator):
    problem, lam = bilevel("mlp"), torch.zeros((), requires_grad=True)
    outside = lam.exp()
    losses = lambda m: outside * problem.train_loss(m), problem.val_loss
    with pytest.raises(RuntimeError, match="a graph that was made outside of it, and is gone .*strategy='retain'"):
        estimator(*losses, problem.model, [lam], inner_lr=0.1)


def test_an_optimizer_and_a_model_are_not_what_is_asked_for():
    train_loss, val_loss, model, _ = bilevel("mlp").args()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="not SGD; those of an optimizer are"):
        guided(train_loss, val_loss, model, optimizer)
    with pytest.raises(TypeError, match="lookahead is a module"):
        guided(*bilevel("mlp").args(), lookahead=model)
