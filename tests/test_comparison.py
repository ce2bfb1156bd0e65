"""How the agreement of two hypergradients is measured."""

import pytest
import torch

from evograd.comparison import agreement, estimates
from evograd.lab.quality import QualityLog

from .problems import bilevel


def test_agreement_is_over_all_hyperparameters_as_one_vector():
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    same = agreement([2 * g for g in exact], exact)
    assert same == pytest.approx({"cosine": 1, "sign": 1, "norm": 2})
    other = agreement([torch.tensor([4.0, 0.0]), torch.tensor([[-3.0]])], exact)
    assert other == pytest.approx({"cosine": 0, "sign": 2 / 3, "norm": 1})
    assert agreement([-g for g in exact], exact)["cosine"] == pytest.approx(-1)


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
