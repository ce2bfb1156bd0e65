"""How the agreement of two hypergradients is measured, and every estimator compared on a problem of one's own."""

import copy
import functools
import itertools
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import evograd
from evograd import comparison, measuring
from evograd.baselines import unrolled
from evograd.comparison import agreement, estimates
from evograd.lab.quality import QualityLog
from evograd.ranking import Row, ranked
from resources import comparisons

from .problems import OnceDifferentiable, bilevel


def test_agreement_is_over_all_hyperparameters_as_one_vector():
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    same = agreement([2 * g for g in exact], exact)
    assert same == pytest.approx({"cosine": 1, "sign": 1, "norm": 2})
    other = agreement([torch.tensor([4.0, 0.0]), torch.tensor([[-3.0]])], exact)
    assert other == pytest.approx({"cosine": 0, "sign": 2 / 3, "norm": 1})
    assert agreement([-g for g in exact], exact)["cosine"] == pytest.approx(-1)
    turned = agreement([torch.tensor([1 + 1j])], [torch.tensor([1 - 1j])])  # complex numbers are pairs
    assert turned == pytest.approx({"cosine": 0, "sign": 1 / 2, "norm": 1}, abs=1e-12)


def test_a_zero_has_no_direction():
    exact = [torch.ones(2)]
    assert agreement([torch.zeros(2)], exact) == {"cosine": 0, "sign": 0, "norm": 0}
    assert agreement(exact, [torch.zeros(2)])["norm"] == float("inf")


def test_shapes_must_be_the_same():
    with pytest.raises(ValueError, match=r"\[\(2,\)\] and \[\(3,\)\]"):
        agreement([torch.ones(2)], [torch.ones(3)])


def test_log_of_all_estimates():
    """Each starts from the same draws (dropout), so mixed mode is T1–T2; what is logged leaves random numbers as they were."""
    problem = bilevel("dropout")
    log = QualityLog(seed=1)
    ahead = {name: p.detach() for name, p in problem.model.named_parameters()}
    before = torch.get_rng_state()
    for step in (0, 5):
        some = estimates(*problem.args(), inner_lr=0.1, generator=log.generator, made=ahead)
        log.add(step, some, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    metrics = log.metrics()
    assert metrics["quality_steps"] == [0, 5]
    cosine = metrics["cosine"]
    assert cosine["mixed_sgd"] == pytest.approx(1, abs=1e-9) and metrics["norm"]["mixed_sgd"] == pytest.approx(1)
    assert cosine["mixed"] == cosine["mixed_made"] < 1 - 1e-9  # the step "made" is none: G at θ
    assert cosine["guided_sgd"] > 0.95
    assert abs(cosine["evograd_k2"]) < 0.95
    first, second = metrics["quality_cosines"]["evograd_k10_common"]
    assert first != second and cosine["evograd_k10_common"] == pytest.approx((first + second) / 2, abs=1e-4)
    flops = metrics["quality_flops"]
    assert flops["evograd_k2"] < flops["evograd_k10"] < flops["evograd_k50"]
    assert set(metrics["quality_seconds"]) == set(flops) == {"exact", *cosine}


SECONDS = {"plain": 1.0, "T1–T2": 4.0, "mixed mode": 3.0, "guided": 2.0, "guided, G at θ": 2.5, "EvoGrad, K = 2": 0.5}


@pytest.fixture
def known_seconds(monkeypatch):
    """Each step is run as it would be, and takes what SECONDS says, or 9 s."""

    def seconds(steps, repeats, warmup, enough):
        for _ in range(repeats):
            for step in steps.values():
                step()
        return {name: SECONDS.get(name, 9.0) for name in steps}

    monkeypatch.setattr(measuring, "seconds", seconds)


def test_compare_puts_the_cheapest_good_estimate_first(known_seconds, capsys):
    """Dropout and BatchNorm inside: every estimator starts from the same draws, and the model is as it was."""
    problem = bilevel("batchnorm")
    problem.model.append(nn.Dropout(0.1))
    state = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    random = torch.get_rng_state()
    result = evograd.compare(*problem.args(), inner_lr=0.1, repeats=2)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())

    rows = {row.name: row for row in result.rows}
    assert result.exact == "T1–T2" and result.draws == 2
    assert rows["mixed mode"].cosine == pytest.approx(1, abs=1e-9) and rows["mixed mode"].norm == pytest.approx(1)
    assert rows["guided"].cosine > 0.999 and rows["EvoGrad, K = 2"].cosine < 0.99
    assert [row.name for row in result.rows][:4] == ["guided", "guided, G at θ", "mixed mode", "T1–T2"]
    cosines = [row.cosine for row in result.rows if row.cosine < 0.99]
    assert cosines == sorted(cosines, reverse=True) and len(cosines) >= 2
    assert rows["EvoGrad, K = 2"].cost.flops < rows["EvoGrad, K = 10"].cost.flops
    assert result.plain.flops < rows["T1–T2"].cost.flops

    printed, table = capsys.readouterr(), str(result)
    assert printed.err == printed.out == "" and repr(result) == table  # it is short, and the table is the user's to print
    memory = rows["guided"].cost.peak_bytes / rows["T1–T2"].cost.peak_bytes
    assert table.startswith(f"guided: cosine 1.000 to T1–T2 at 0.50 of its time and {memory:.2f} of its memory\n")
    columns = next(line for line in table.splitlines()[2:] if line.startswith("guided ")).split()
    assert columns[:5] == ["guided", "1.000", "1.000", "1.000", "2.00"]
    assert "  guided(inner_lr=0.1)" in table


def test_iterators_last_for_every_estimator(known_seconds):
    """model.named_parameters() and net.parameters(), as one would write them."""
    problem = bilevel("mlp")
    arguments, given = problem.args()[:3], lambda: problem.model.named_parameters()
    result = evograd.compare(
        *arguments, iter(problem.hyperparameters), inner_lr=0.1, parameters=given(), repeats=1, verbose=False
    )
    assert [row.reason for row in result.rows] == [None] * len(result.rows)
    settings = dict(inner_lr=0.1, generator=torch.Generator(), parameters=given(), made=given())
    every = estimates(*arguments, iter(problem.hyperparameters), **settings)
    for name in ("exact", "mixed_made", "guided_made", "neumann"):
        assert every[name]().grads[0].shape == problem.hyperparameters[0].shape


def test_compare_says_what_could_not_run_and_what_it_compares_with_then(known_seconds, capsys):
    """An operation without double backward: no T1–T2, but mixed mode, which is the same."""
    problem = bilevel("mlp")
    problem.model.insert(1, OnceDifferentiable())
    result = evograd.compare(*problem.args(), inner_lr=0.1, repeats=1, verbose=False)
    assert capsys.readouterr().out == ""
    rows = {row.name: row for row in result.rows}
    assert result.exact == "mixed mode" and rows["guided"].cosine > 0.99
    assert "once_differentiable" in rows["T1–T2"].reason and rows["T1–T2"].cost is None
    assert [row.reason is not None for row in result.rows] == sorted(row.reason is not None for row in result.rows)  # last
    text = str(result)
    assert re.search("T1–T2; .*could not run: RuntimeError: ", text) and "T1–T2 by double backward could not run" in text
    assert text.startswith("guided: cosine ") and " to mixed mode at 0.67 of its time" in text


class Attention(nn.Module):
    """A U-Net of one step, with attention at the bottom, which is computed by a fused kernel."""

    def __init__(self, dropout):
        super().__init__()
        self.down, self.attend = nn.Conv2d(1, 4, 2, 2), nn.MultiheadAttention(4, 2, dropout, batch_first=True)
        self.up, self.out = nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(3, 1, 1)

    def forward(self, x):
        low = F.silu(self.down(x))
        tokens = low.flatten(2).mT
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        return self.out(torch.cat([F.silu(self.up(tokens.mT.unflatten(2, low.shape[2:]))), x], 1))


def u_net(dropout=0.0):
    x, y, x_val, y_val = (torch.randn(4, 1, 4, 4) for _ in range(4))
    weights = torch.zeros(4, requires_grad=True)
    train_loss = lambda m: (weights.sigmoid() * (m(x) - y).square().mean((1, 2, 3))).mean()
    return train_loss, lambda m: (m(x_val) - y_val).square().mean(), Attention(dropout), [weights]


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    config = BertConfig(**sizes, max_position_embeddings=4, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    x, y, x_val, y_val = (make() for make in 2 * [lambda: torch.randint(20, (8, 4)), lambda: torch.randint(3, (8,))])
    weights = torch.zeros(8, requires_grad=True)
    train_loss = lambda m: (weights.sigmoid() * F.cross_entropy(m(x).logits, y, reduction="none")).mean()
    return train_loss, lambda m: F.cross_entropy(m(x_val).logits, y_val), BertForSequenceClassification(config), [weights]


def physics():
    """u' = −u: the residual of the network's derivative by t, a leaf that requires grad."""
    model, weights = (
        nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double(),
        torch.zeros(8, 1).double().requires_grad_(),
    )
    t, t_val = torch.linspace(0, 1, 8).double()[:, None].requires_grad_(), torch.linspace(0, 1, 5).double()[:, None]

    def train_loss(m):
        u = m(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return (weights.exp() * (slope + u).square()).mean()

    return train_loss, lambda m: (m(t_val) - (-t_val).exp()).square().mean(), model, [weights]


@pytest.mark.parametrize("make", [bert, u_net, physics])
def test_compare_recommends_no_noise_where_attention_is_fused_or_the_loss_has_a_gradient(make, known_seconds):
    torch.manual_seed(0)
    result = evograd.compare(*make(), inner_lr=0.1, repeats=2)
    rows = {row.name: row for row in result.rows}
    assert result.exact == "T1–T2" and result.rows[0].name == "guided" and result.rows[0].cosine > 0.999
    assert {row.name for row in result.rows if row.good} >= {"guided", "T1–T2", "mixed mode", "finite differences"}
    assert rows["mixed mode"].cosine == pytest.approx(1, abs=1e-4) and rows["mixed mode"].norm == pytest.approx(1, abs=1e-3)
    fused = make is not physics
    assert rows["T1–T2"].call.endswith("in sdpa_kernel(SDPBackend.MATH)") is fused
    assert not rows["guided"].call.endswith("MATH)") and ("fused attention has no second derivative" in str(result)) is fused


class Once(torch.autograd.Function):
    """The identity, of one derivative: neither double backward nor forward mode, as a fused kernel."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented")
        return g


def test_dropout_in_attention_is_alike_for_all(known_seconds, monkeypatch):
    """As on a card, where a fused kernel draws dropout otherwise than plain attention does."""
    plain = F.scaled_dot_product_attention

    def attention(query, *args):
        if torch.backends.cuda.flash_sdp_enabled():
            torch.rand(1)
            query = Once.apply(query)
        return 20 * plain(query, *args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    result = evograd.compare(*u_net(dropout=0.5), inner_lr=0.1, repeats=2)
    rows = {row.name: row for row in result.rows}
    assert rows["T1–T2"].call.endswith("MATH)") and not rows["guided"].call.endswith("MATH)")
    assert rows["guided"].cosine > 0.999


def test_without_double_backward_and_forward_mode_guided_is_the_measure(known_seconds):
    """An operation with neither. A norm that is wrong by a factor is no best choice, however fast."""

    class Identity(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    problem = bilevel("mlp")
    problem.model.insert(1, Identity())
    result = evograd.compare(*problem.args(), inner_lr=0.1, repeats=1)
    assert result.exact == result.rows[0].name == "guided" and result.rows[0].cosine == pytest.approx(1)
    assert "the measure is guided after an SGD step" in str(result) and str(result).startswith(
        "guided, the measure, is the fastest"
    )


def row(name, seconds, **agreement):
    return Row(
        name, "", **agreement, cost=None if seconds is None else measuring.Cost(seconds, 1, 1, 1), reason="no" * (not seconds)
    )


def test_what_is_best():
    long, short = row("long", 0.1, cosine=0.995, norm=20.0), row("short", 0.1, cosine=0.995, norm=0.4)
    slow, fast, off, failed = (
        row("slow", 2.0, cosine=1.0, norm=1.0),
        row("fast", 1.0, cosine=0.991, norm=1.9),
        row("off", 0.1, cosine=0.98, norm=1.0),
        row("failed", None),
    )
    assert ranked([failed, off, long, short, slow, fast]) == (fast, slow, long, short, off, failed)
    first, second = row("EvoGrad, K = 2", 2.0), row("other", 1.0)
    assert ranked([first, second, failed]) == (first, second, failed)  # never by time alone


def test_an_estimator_that_fails_later_is_a_line(known_seconds):
    """With the draws of the second run, say. So is a training loss that cannot run at all."""
    problem = bilevel("mlp")
    calls = []

    def val_loss(model):
        calls.append(1)
        return problem.val_loss(model)

    arguments = problem.train_loss, val_loss, *problem.args()[2:]
    evograd.compare(*arguments, inner_lr=0.1, repeats=1)
    last = len(calls)
    calls.clear()

    def failing(model):
        if len(calls) == last - 1:
            raise ValueError("not this time")
        return val_loss(model)

    result = evograd.compare(arguments[0], failing, *arguments[2:], inner_lr=0.1, repeats=1)
    assert [row.reason for row in result.rows if row.reason] == ["ValueError: not this time"] and len(result.rows) == 10

    def never(model):
        raise ValueError("of no size")

    with pytest.raises(RuntimeError, match="no estimator could run; a plain training step: ValueError: of no size"):
        evograd.compare(never, *arguments[1:], inner_lr=0.1)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_a_line_in_ten_seconds_elsewhere(terminal, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(comparison.sys.stderr, "isatty", lambda: terminal, raising=False)
    show = comparison._Progress(True)
    for seconds in (1, 9, 10, 11, 25):
        now[0] = seconds
        show(f"at {seconds}")
    show(None)
    error = capsys.readouterr().err
    assert error.count("at ") == (5 if terminal else 2) and error.count("\n") == (0 if terminal else 2)
    quiet = comparison._Progress(False)
    now[0] = 100
    quiet("more")
    assert capsys.readouterr().err == ""


def test_time_to_go_is_told(known_seconds, monkeypatch, capsys):
    monkeypatch.setattr(comparison.sys.stderr, "isatty", lambda: True, raising=False)
    problem = bilevel("mlp")
    evograd.compare(*problem.args(), inner_lr=0.1, repeats=1)
    assert re.search(r"timing, guided, run 1, about \d+ s to go", capsys.readouterr().err)


def test_compare_refuses_what_no_estimator_can_do():
    problem = bilevel("mlp")
    arguments = list(problem.args())
    with pytest.raises(ValueError, match="repeats=0 must be an integer of at least 1"):
        evograd.compare(*arguments, inner_lr=0.1, repeats=0)
    with pytest.raises(ValueError, match="inner_lr=-1"):
        evograd.compare(*arguments, inner_lr=-1)
    arguments[3] = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(
        RuntimeError, match=r"no estimator could run; T1–T2: RuntimeError: hyperparameters\[0\], of shape \(2,\)"
    ):
        evograd.compare(*arguments, inner_lr=0.1, verbose=False)


def test_the_shown_comparisons_are_made_by_a_command(known_seconds, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- compare:mlp -->\nold\n<!-- /compare -->\nb\n")
    comparisons.main(["mlp", "--readme", str(readme)])
    printed = capsys.readouterr().out
    assert "T1–T2" in printed and "It took " in printed
    text = readme.read_text()
    assert text.startswith("a\n<!-- compare:mlp -->\n```text\nguided") and text.endswith("\n```\n<!-- /compare -->\nb\n")
    with pytest.raises(SystemExit, match="2"):
        comparisons.main(["other"])
    shown = (Path(__file__).parents[1] / "resources/comparisons.md").read_text(encoding="utf-8")
    for name in comparisons.PROBLEMS:
        block = shown.split(f"<!-- compare:{name} -->")[1].split("<!-- /compare -->")[0]
        assert all(call in block for _, call, _ in comparison._calls(0.1).values())  # of this version, no line left out


@pytest.mark.parametrize("call", [evograd.check, lambda *a: evograd.compare(*a, inner_lr=0.1, repeats=1, verbose=False)])
@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
@pytest.mark.parametrize("how", ["NumPy", "random", "an iterator", "a counter", "a teacher"])
def test_a_loss_that_is_another_one_when_it_is_called_again_is_refused(how, which, call):
    """At one place, with torch's draws alike."""
    problem = bilevel("mlp")
    calls, batches, teacher = [], itertools.cycle([1.0, 2.0, 3.0]), torch.zeros(2)
    draws = {
        "NumPy": np.random.RandomState(0).rand,
        "random": random.Random(0).random,
        "an iterator": lambda: next(batches),
        "a counter": lambda: calls.append(1) or len(calls),
        "a teacher": lambda: float(teacher.data.add_(0.5).sum()),
    }
    losses = {"train_loss": problem.train_loss, "val_loss": problem.val_loss}
    plain = losses[which]
    losses[which] = lambda m: plain(m) * draws[how]()
    with pytest.raises(RuntimeError, match=f"{which} is .*, and .* when it is evaluated again at the same parameters.*NumPy"):
        call(*losses.values(), problem.model, problem.hyperparameters)


def guarded(m):
    """A penalty where what the model computes requires grad, of strength λ."""
    h = m[1](m[0](torch.ones(6, 4)))
    return lam.exp() * h.square().mean() + m[2](h).square().mean() if h.requires_grad else (lam * m[2](h).square()).mean()


lam = torch.zeros((), requires_grad=True)


def test_a_loss_that_asks_what_requires_grad_is_refused_and_told_of():
    """Where no graph is made for a candidate it is another one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    problem = (guarded, lambda m: m(torch.ones(2, 4)).square().mean(), model, [lam])
    for call in (evograd.check, functools.partial(evograd.compare, inner_lr=0.1, repeats=1, verbose=False)):
        with pytest.raises(RuntimeError, match=r"train_loss is .* where a graph is made for the parameters: .*h.requires_grad"):
            call(*problem)
    with pytest.warns(UserWarning, match=r"train_loss is .* at θ and .* on average of a pair beside it: .*h.requires_grad"):
        evograd.guided(*problem, inner_lr=0.1)
    exact = unrolled(*problem, inner_lr=0.1).grads
    torch.testing.assert_close(evograd.mixed_mode(*problem, inner_lr=0.1).grads, exact)


def test_a_loss_that_depends_on_no_parameter_is_refused():
    """Of another model, without gradients, without a derivative."""
    model, other, lam, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.zeros((), requires_grad=True), torch.randn(6, 4)
    train_loss, val_loss = lambda m: lam.exp() * m(x).square().mean(), lambda m: m(x).square().mean()
    losses = {
        "train_loss": [(lambda _: train_loss(other), val_loss), (torch.no_grad()(train_loss), val_loss)],
        "val_loss": [(train_loss, lambda m: (m(x).argmax(1) == 1).float().mean()), (train_loss, lambda _: val_loss(other))],
    }
    for which, pairs in losses.items():
        for pair in pairs:
            for call in (evograd.check, functools.partial(evograd.compare, inner_lr=0.1, repeats=1, verbose=False)):
                with pytest.raises(RuntimeError, match=f"{which} depends on none of the parameters of the model that it is given"):
                    call(*pair, model, [lam])
    evograd.check(train_loss, lambda _: lam.square(), model, [lam])
    with pytest.raises(RuntimeError, match="val_loss is nan; a finite loss is needed"):
        evograd.check(train_loss, lambda m: m(x).mean() * math.nan, model, [lam])


def test_running_statistics_beside_the_model_are_found():
    """Autograd does not count what batch_norm writes."""
    mean, var = torch.zeros(3), torch.ones(3)
    loss = lambda m: F.batch_norm(m(torch.randn(6, 4)), mean, var, training=True).square().mean()
    model, lam = nn.Linear(4, 3), torch.ones((), requires_grad=True)
    for losses in ((lambda m: lam * loss(m), lambda m: m.weight.sum()), (lambda m: lam * m.weight.sum(), loss)):
        with pytest.raises(RuntimeError, match="a loss has written into .*(mean|var).* which it reaches beside the model"):
            evograd.check(*losses, model, [lam])


def test_a_loss_that_draws_by_torch_is_taken():
    problem = bilevel("dropout")
    state = torch.get_rng_state()
    evograd.check(*problem.args())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_against_the_step_of_an_optimizer(kind):
    """Which is taken back: parameters, gradients, statistics, state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y, weights = torch.randn(16, 4), torch.randint(3, (16,)), torch.zeros(16, requires_grad=True)
    settings = {"momentum": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)), "adamw": (torch.optim.AdamW, dict(lr=0.01))}[kind]
    optimizer = settings[0](model.parameters(), **settings[1])
    train_loss = lambda m: (weights.exp() * F.cross_entropy(m(x), y, reduction="none")).mean()
    for _ in range(3):
        optimizer.zero_grad()
        train_loss(model).backward(inputs=list(model.parameters()))
        optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    val_loss = lambda m: F.cross_entropy(m(x + 0.1), y)
    result = evograd.compare(
        train_loss, val_loss, model, [weights], inner_lr=settings[1]["lr"], optimizer=optimizer, repeats=1, verbose=False
    )
    after = model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]
    for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    rows = {row.name: row for row in result.rows}
    assert result.exact == "the optimizer's step"
    assert rows["trajectory, N = 1"].cosine > 0.999
    assert rows["trajectory, N = 1"].norm == pytest.approx(1, abs=0.01)
    assert rows["T1–T2"].good is (kind == "momentum")  # one SGD step is no AdamW step
    assert "Trajectory(by='guided')" in str(result)
