"""How the agreement of two hypergradients is measured, and every estimator compared on a problem of one's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

import evograd
from evograd import comparison, measuring
from evograd.comparison import agreement, estimates
from evograd.lab.quality import QualityLog
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

    printed = capsys.readouterr()
    assert printed.err == "" and printed.out == f"{result}\n"  # no terminal, no progress
    memory = rows["guided"].cost.peak_bytes / rows["T1–T2"].cost.peak_bytes
    assert printed.out.startswith(f"guided: cosine 1.000 to T1–T2 at 0.50 of its time and {memory:.2f} of its memory\n")
    columns = next(line for line in printed.out.splitlines()[2:] if line.startswith("guided ")).split()
    assert columns[:5] == ["guided", "1.000", "1.000", "1.000", "2.00"]
    assert "  guided(inner_lr=0.1)" in printed.out


def test_iterators_last_for_every_estimator(known_seconds):
    """model.named_parameters() and net.parameters(), as one would write them."""
    problem = bilevel("mlp")
    arguments, given = problem.args()[:3], lambda: problem.model.named_parameters()
    result = evograd.compare(*arguments, iter(problem.hyperparameters), inner_lr=0.1, parameters=given(), repeats=1, verbose=False)
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
    assert "T1–T2 could not run: RuntimeError: " in text and "T1–T2 by double backward could not run" in text
    assert text.startswith("guided: cosine ") and " to mixed mode at 0.67 of its time" in text


def test_compare_refuses_what_no_estimator_can_do():
    problem = bilevel("mlp")
    arguments = list(problem.args())
    with pytest.raises(ValueError, match="repeats=0 must be an integer of at least 1"):
        evograd.compare(*arguments, inner_lr=0.1, repeats=0)
    with pytest.raises(ValueError, match="inner_lr=-1"):
        evograd.compare(*arguments, inner_lr=-1)
    arguments[3] = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(RuntimeError, match=r"no estimator could run; T1–T2: RuntimeError: hyperparameters\[0\], of shape \(2,\)"):
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
