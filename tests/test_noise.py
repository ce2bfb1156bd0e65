"""The noise of candidates: its first two moments, its independence, and that it is the same whoever asks for it how often."""

import math

import pytest
import torch

import evograd
from evograd import noise as module
from evograd.host import vectors
from evograd.host.vectors import Layout
from evograd.noise import NOISES, SeededNoise

THETA = {"a": torch.zeros(40, 50), "b": torch.zeros(700), "c": torch.zeros(3, 7, 11), "d": torch.zeros(())}


def all_of(noise, k):
    return torch.cat([noise(k, name).flatten() for name in THETA])


@pytest.mark.parametrize("kind", NOISES)
def test_moments_over_elements_tensors_candidates_and_steps(kind):
    """Mean 0, variance 1, and no correlation between any two of (step, candidate, tensor): each within five standard errors."""
    n_steps, n_candidates, n = 40, 3, 231  # as many elements as the smallest tensor but one has
    torch.manual_seed(3)
    draws = []
    for _ in range(n_steps):
        noise = SeededNoise(kind, Layout(THETA), n_candidates, None)
        draws.append(torch.stack([noise(k, name).flatten()[:n] for k in range(n_candidates) for name in "abc"]))
    draws = torch.stack(draws).double()  # (steps, candidates x tensors, elements)
    count = draws.numel()
    assert abs(draws.mean()) < 5 / math.sqrt(count)
    assert abs(draws.square().mean() - 1) < 5 * math.sqrt(2 / count)
    rows = draws.flatten(0, 1)  # every pair of rows is another (step, candidate, tensor)
    correlations = rows @ rows.T / n
    off = correlations[~torch.eye(len(rows), dtype=torch.bool)]
    assert off.abs().max() < 6 / math.sqrt(n)  # the largest of 65,000
    assert abs(off.square().mean() * n - 1) < 0.05  # as many as chance has, and no more
    # what is left of correlations when one average over all steps is taken
    for a in range(9):
        for b in range(a):
            assert abs((draws[:, a] * draws[:, b]).mean()) < 5 / math.sqrt(n_steps * n)
    lag = (draws[1:] * draws[:-1]).mean()
    assert abs(lag) < 5 / math.sqrt(count)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_the_same_in_any_order_and_at_any_size_of_bucket(kind, monkeypatch):
    torch.manual_seed(5)
    whole = SeededNoise(kind, Layout(THETA), 4, None)
    first = [all_of(whole, k) for k in range(4)]
    assert all(torch.equal(all_of(whole, k), first[k]) for k in (3, 1, 0, 2))
    monkeypatch.setattr(module, "KEPT", 0)  # drawn again instead of kept
    torch.manual_seed(5)
    again = SeededNoise(kind, Layout(THETA), 4, None)
    assert again.kept is None and whole.kept
    assert all(torch.equal(all_of(again, k), first[k]) for k in (2, 0, 3, 1))


@pytest.mark.parametrize("settings", [{}, {"estimator": "guided"}, {"noise": "normal", "strategy": "vmap"}])
def test_many_buckets_and_pieces_give_what_one_gives(settings, monkeypatch, float64):
    """Seeds are per bucket, so the noise is another; the estimate for a given noise is what the reference makes of it."""
    from .problems import bilevel
    from .reference import evograd_reference, guided_reference

    monkeypatch.setattr(vectors, "BUCKET", 20)
    monkeypatch.setattr(vectors, "PIECE", 64)
    for kind in ("mixed_shapes", "conv", "lstm", "tied", "hyperparameters_inside"):
        if settings.get("strategy") == "vmap" and kind == "lstm":
            continue
        problem = bilevel(kind)
        n = sum(p.numel() for p in problem.model.parameters())
        layout = Layout({name: p.detach() for name, p in problem.model.named_parameters()})
        assert len(layout.buckets) > 2 and sum(p.numel() for b in layout.buckets for p in b.tensors) == n
        torch.manual_seed(3)
        if settings.get("estimator") == "guided":
            expected = guided_reference(problem, 0.1, radius=0.1)
            found = evograd.guided(*problem.args(), inner_lr=0.1, lookahead=None, radius=0.1, share_kinks=False).grads
        else:
            given = dict(n_candidates=4, sigma=0.1, temperature=0.2, noise=settings.get("noise", "sign"))
            expected = evograd_reference(problem, **given)
            torch.manual_seed(3)
            found = evograd.hypergradient(*problem.args(), **given, strategy=settings.get("strategy", "stream")).grads
        a, b = (torch.cat([g.flatten() for g in grads]) for grads in (found, expected))
        assert (a - b).norm() < 1e-10 * b.norm(), kind


def test_tensors_keep_their_memory_format():
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    gaps, wide = torch.randn(6, 10)[:, ::2], torch.randn(5).expand(3, 5)
    layout = Layout({"weight": weight, "transposed": torch.randn(5, 7).T, "gaps": gaps, "wide": wide, "empty": torch.zeros(0, 3)})
    (bucket,) = layout.buckets
    moved = bucket.moved(bucket.zeros())
    for name, tensor in zip(bucket.names, bucket.tensors):
        assert torch.equal(moved[name], tensor)
    assert moved["weight"].is_contiguous(memory_format=torch.channels_last)
    assert moved["transposed"].stride() == (1, 7)
    assert moved["gaps"].is_contiguous() and moved["wide"].is_contiguous()
    assert all(offset % 64 == 0 for _, _, offset in bucket.places)


def test_buckets_are_of_one_device_and_dtype_and_bounded():
    theta = {f"p{i}": torch.zeros(1000, dtype=dtype) for i, dtype in enumerate([torch.float32, torch.float64] * 4)}
    layout = Layout(theta)
    assert [b.like.dtype for b in layout.buckets] == [torch.float32, torch.float64]
    big = {f"p{i}": torch.empty(10**6, device="meta") for i in range(40)}
    layout = Layout(big)
    assert max(b.size for b in layout.buckets) <= 40 * 10**6 // 8 + 64
    assert len(Layout({"one": torch.empty(10**9, device="meta"), "two": torch.empty(5, device="meta")}).buckets) == 2
