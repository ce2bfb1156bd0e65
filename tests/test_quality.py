"""How the agreement of two hypergradients is measured."""

import pytest
import torch

from evograd.quality import agreement


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
