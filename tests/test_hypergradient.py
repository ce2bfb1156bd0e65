"""The EvoGrad step against differentiation through the softmax, against theory, and as a guest in somebody's model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evograd
from evograd.host.vectors import Layout
from evograd.noise import SeededNoise, sign

from .problems import KINDS, bilevel, estimate
from .reference import evograd_reference, guided_reference


def uniform(like, generator):
    return math.sqrt(12) * (torch.rand(like.shape, dtype=like.dtype, generator=generator) - 0.5)


def relative_difference(a, b):
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


STRATEGIES = [{"strategy": "stream"}, {"strategy": "retain"}, {"strategy": "vmap"}, {"strategy": "vmap", "chunk_size": 2}]

# A large sigma and a small temperature, so that weights are far from uniform and every term of c_k counts.


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, at weight_norm
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("noise", ["sign", "normal", uniform])
@pytest.mark.parametrize("n_candidates", [2, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_differentiation_through_the_softmax(kind, n_candidates, noise, common):
    problem = bilevel(kind)
    settings = dict(n_candidates=n_candidates, sigma=0.1, temperature=0.2, noise=noise, common_random_numbers=common)
    torch.manual_seed(3)
    expected = evograd_reference(problem, **settings)
    for strategy in STRATEGIES:
        if strategy["strategy"] == "vmap" and kind in ("dropout", "lstm"):
            continue  # draws for all candidates at once; has no batching rule
        torch.manual_seed(3)
        result = evograd.hypergradient(*problem.args(), parameters=problem.parameters, **strategy, **settings)
        assert relative_difference(result.grads, expected) < 1e-10
        assert [g.shape for g in result.grads] == [h.shape for h in problem.hyperparameters]


@pytest.mark.parametrize("kind", KINDS)
def test_guided_equals_the_difference_written_out(kind):
    """At a radius so large that the pair is far from its limit; each with its own kinks."""
    problem = bilevel(kind)
    torch.manual_seed(3)
    expected = guided_reference(problem, 0.1, radius=0.3)
    for strategy in ("stream", "retain", "in_place"):
        torch.manual_seed(3)
        settings = dict(parameters=problem.parameters, strategy=strategy, inner_lr=0.1, lookahead=None, radius=0.3)
        settings |= dict(share_kinks=False)
        result = evograd.guided(*problem.args(), **settings)
        assert relative_difference(result.grads, expected) < 1e-10
        assert [g.shape for g in result.grads] == [h.shape for h in problem.hyperparameters]
        assert result.candidate_losses.shape == (2,) and result.weights.tolist() == [0.5, 0.5]


def test_every_dtype_of_result():
    problem = bilevel("mixed_shapes")
    result = evograd.hypergradient(*problem.args(), n_candidates=3)
    assert result.val_loss.shape == () and result.candidate_losses.shape == (3,) and result.weights.shape == (3,)
    torch.testing.assert_close(result.weights, torch.softmax(-result.candidate_losses / 0.05, 0))
    assert not any(t.requires_grad for t in [*result.grads, result.val_loss, result.candidate_losses, result.weights])


@pytest.mark.parametrize("strategy", ["stream", "in_place", "retain", "vmap"])
@pytest.mark.parametrize("noise", ["sign", "guided"])
def test_complex_hyperparameters_are_pairs_of_real_ones(noise, strategy, float64):
    """dℓ_V/dz = dℓ_V/d Re z + i dℓ_V/d Im z, beside a real λ on the same device."""
    if (noise, strategy) == ("guided", "vmap"):
        return
    problem, x, y = bilevel("mlp"), torch.randn(9, 5), torch.randint(3, (9,))
    z, scale = torch.randn(5, dtype=torch.complex128, requires_grad=True), torch.rand(9, requires_grad=True)
    real = [z.detach().real.clone().requires_grad_(), z.detach().imag.clone().requires_grad_()]
    train = lambda re, im: lambda m: (scale * F.cross_entropy(m(x * re + im * im), y, reduction="none")).mean()

    def grads(loss, lam):
        torch.manual_seed(1)
        return estimate(loss, problem.val_loss, problem.model, [*lam, scale], noise=noise, strategy=strategy).grads

    dz, other = grads(lambda m: train(z.real, z.imag)(m), [z])
    re, im, same = grads(train(*real), real)
    torch.testing.assert_close(dz, torch.complex(re, im), rtol=1e-9, atol=0)
    torch.testing.assert_close(other, same, rtol=1e-9, atol=0)
    assert im.norm() > 0.1 * re.norm() > 0


def test_reproducible_bit_for_bit():
    problem = bilevel("dropout")

    def grads(seed, **settings):
        torch.manual_seed(seed)
        return evograd.hypergradient(*problem.args(), **settings).grads[0]

    assert torch.equal(grads(1), grads(1))
    assert not torch.equal(grads(1), grads(2))
    own = [grads(1, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*own) and not torch.equal(own[0], grads(1))


def test_common_random_numbers_draw_once_and_move_on():
    problem = bilevel("dropout")
    draws = []

    def train_loss(model):
        draws.append(torch.rand(()).item())
        return problem.train_loss(model)

    def drawn(**settings):
        draws.clear()
        estimate(train_loss, *problem.args()[1:], **settings)
        return list(draws)

    four = dict(n_candidates=4)
    assert len(set(drawn(**four))) == 4
    first, second = drawn(common_random_numbers=True, **four), drawn(common_random_numbers=True, **four)
    assert len(set(first)) == 1 and len(set(second)) == 1 and first != second
    after = torch.rand(()).item()
    assert after not in first + second
    at_theta, ahead = drawn(estimator="guided", radius=0.1), drawn(estimator="guided", lookahead="sgd", radius=0.1)
    assert len(at_theta) == len(ahead) == 3 and len(set(at_theta)) == len(set(ahead)) == 1 and at_theta[0] != ahead[0]
    assert len(drawn(estimator="guided", radius=0.1, share_kinks=False)) == 2  # of a pass at θ nothing is wanted


def test_parameters_as_tensors_are_taken_for_theta():
    problem = bilevel("mlp")
    elsewhere = {n: p.detach() + 0.1 for n, p in problem.model.named_parameters()}
    moved = copy.deepcopy(problem.model)
    with torch.no_grad():
        for n, p in moved.named_parameters():
            p.copy_(elsewhere[n])
    results = []
    for model, parameters in ((problem.model, elsewhere), (moved, None)):
        torch.manual_seed(0)
        results.append(
            evograd.hypergradient(
                problem.train_loss, problem.val_loss, model, problem.hyperparameters, parameters=parameters
            ).grads
        )
    assert relative_difference(*results) < 1e-12
    guided = [
        evograd.guided(
            problem.train_loss, problem.val_loss, m, problem.hyperparameters, inner_lr=0.1, parameters=p, lookahead=look
        ).grads
        for m, p, look in (
            (problem.model, None, elsewhere),
            (moved, dict(problem.model.named_parameters()), dict(moved.named_parameters())),
        )
    ]
    assert relative_difference(*guided) < 1e-12


def test_sign_noise_is_fair_and_independent():
    draws = torch.stack([sign(torch.empty(1001), torch.Generator().manual_seed(s)) for s in range(400)])
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    assert abs(draws.mean()) < 4 / math.sqrt(draws.numel())
    correlations = (draws.T @ draws / len(draws)).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(len(draws))


def test_noise_differs_between_tensors_and_candidates():
    theta = {name: torch.zeros(64) for name in "ab"}
    noise = SeededNoise(sign, Layout(theta), 2, None)
    drawn = [noise(k, name) for k in range(2) for name in "ab"]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    assert torch.equal(noise(1, "a"), drawn[2])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_batched_candidates_draw_and_move_on(chunk_size):
    """With common random numbers all chunks see the same draws; whoever draws afterwards gets others."""
    problem = bilevel("mlp")
    draws = []

    def train_loss(model):
        draws.append(torch.rand(()).item())
        return problem.train_loss(model)

    settings = dict(n_candidates=4, strategy="vmap", chunk_size=chunk_size, common_random_numbers=True)
    for _ in range(2):
        evograd.hypergradient(train_loss, *problem.args()[1:], **settings)
    n = len(draws) // 2
    assert len(set(draws[:n])) == len(set(draws[n:])) == 1 and draws[0] != draws[n]
    assert torch.rand(()).item() not in draws


# --- theory ------------------------------------------------------------------------------------------------------------


class Vector(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.x = nn.Parameter(torch.randn(n, dtype=torch.float64))


def quadratic(n=6):
    """ℓ_T = ½ (x − λ)ᵀ A (x − λ), ℓ_V = ½ |x − b|²: one SGD step is x' = x − η A (x − λ), so dℓ_V/dλ = η A (x' − b)."""
    model, lam = Vector(n), torch.randn(n, dtype=torch.float64, requires_grad=True)
    root, b = torch.randn(n, n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    a = root @ root.T / n
    train_loss = lambda m: 0.5 * (m.x - lam) @ a @ (m.x - lam)
    val_loss = lambda m: 0.5 * (m.x - b).square().sum()
    x = model.x.detach()

    def exact(eta):
        return eta * a @ (x - eta * a @ (x - lam.detach()) - b)

    return (train_loss, val_loss, model, [lam]), exact


@pytest.mark.parametrize("inner_lr", [None, 0.01])
@pytest.mark.parametrize("noise", ["sign", "normal"])
@pytest.mark.parametrize(("n_candidates", "n_draws", "precision"), [(2, 1000, 0.1), (3, 1000, 0.1), (10, 1000, 0.03)])
def test_scale_law(n_candidates, n_draws, precision, noise, inner_lr):
    """The mean over draws is the T1–T2 hypergradient at η = σ² (K − 1) / (K τ), or at inner_lr."""
    args, exact = quadratic()
    sigma, temperature = 1e-3, 0.05
    eta = sigma**2 * (n_candidates - 1) / (n_candidates * temperature)
    direction = exact(eta) / exact(eta).norm()
    settings = dict(n_candidates=n_candidates, sigma=sigma, temperature=temperature, noise=noise, inner_lr=inner_lr)
    seen = torch.stack([evograd.hypergradient(*args, **settings).grads[0] @ direction for _ in range(n_draws)])
    ratios = seen / exact(eta if inner_lr is None else inner_lr).dot(direction)
    error = ratios.std().item() / math.sqrt(n_draws)
    assert error < precision
    assert abs(ratios.mean().item() - 1) < 4 * error


def smooth_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, y, x_val, y_val = (
        torch.randn(32, 10).double(),
        torch.randint(0, 4, (32,)),
        torch.randn(32, 10).double(),
        torch.randint(0, 4, (32,)),
    )
    weights = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    return (
        lambda m: (weights.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean(),
        lambda m: F.cross_entropy(m(x_val), y_val),
        model,
        [weights],
    )


def test_a_guided_pair_that_shares_its_kinks_is_mixed_mode(float64):
    """ReLU and max-pooling, λ in front of the network; at a radius of 1e-3 activations cross their kinks."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    x, x_val, y, y_val = torch.randn(16, 1, 12, 12), torch.randn(16, 1, 12, 12), torch.randint(4, (16,)), torch.randint(4, (16,))
    scale = torch.rand(12, 12, requires_grad=True)
    args = (lambda m: F.cross_entropy(m(x * scale), y), lambda m: F.cross_entropy(m(x_val), y_val), model, [scale])
    exact = evograd.mixed_mode(*args, inner_lr=0.1, lookahead="sgd").grads
    guided = lambda **settings: evograd.guided(*args, inner_lr=0.1, lookahead="sgd", **settings).grads
    assert relative_difference(guided(radius=1e-6), exact) < 1e-6
    assert relative_difference(guided(), exact) < 1e-6
    assert relative_difference(guided(radius=1e-3), exact) < 1e-5
    assert relative_difference(guided(radius=1e-3, share_kinks=False), exact) > 1


@pytest.mark.parametrize("lookahead", ["sgd", None])
def test_guided_is_close_to_second_order(lookahead):
    args = smooth_network()
    exact = evograd.baselines.unrolled(*args, inner_lr=0.05).grads[0]
    guided = evograd.guided(*args, inner_lr=0.05, lookahead=lookahead).grads[0]
    assert torch.cosine_similarity(guided, exact, dim=0) > 0.99
    assert guided.norm() / exact.norm() == pytest.approx(1, abs=0.05)


# --- a guest in somebody's model ---------------------------------------------------------------------------------------


def test_guided_without_a_validation_gradient():
    """Where G is zero there is no direction: what is left is the direct dependence."""
    problem = bilevel("mlp")
    (weights,) = problem.hyperparameters
    result = evograd.guided(
        problem.train_loss,
        lambda m: m(torch.zeros(1, 5).double()).sum() * 0 + weights.square().sum(),
        *problem.args()[2:],
        inner_lr=0.1,
    )
    torch.testing.assert_close(result.grads[0], 2 * weights.detach())


@pytest.mark.parametrize("method", ["stream", "retain", "guided", "mixed_mode", "unrolled"])
def test_gradients_may_be_written_to(method):
    """Neither views nor each other's storage, although autograd gives both where hyperparameters are only added or summed."""
    problem = bilevel("mlp")
    first, second = (
        torch.zeros(8, dtype=torch.float64, requires_grad=True),
        torch.zeros(8, dtype=torch.float64, requires_grad=True),
    )
    x_val = torch.randn(4, 5).double()
    grads = METHODS[method](
        lambda m: problem.train_loss(m),
        lambda m: m(x_val).square().sum() + (first + second).sum(),
        problem.model,
        [first, second],
    ).grads
    grads[0].mul_(0)
    torch.testing.assert_close(grads[1], torch.ones_like(second))


def test_replayed_draws_do_not_come_again_afterwards():
    """Mixed mode draws for its lookahead, for validation, and again for its directional derivative; then goes on from there."""
    problem = bilevel("dropout")
    draws = []

    def drawing(closure):
        return lambda model: (draws.append(torch.rand(()).item()), closure(model))[1]

    train_loss, val_loss = drawing(problem.train_loss), drawing(problem.val_loss)
    evograd.mixed_mode(train_loss, val_loss, *problem.args()[2:], inner_lr=0.1, lookahead="sgd")
    assert draws[0] == draws[2] != draws[1]
    assert torch.rand(()).item() not in draws


def state_of(problem):
    model = problem.model
    tensors = [*model.parameters(), *model.buffers(), *problem.hyperparameters]
    return (
        [t.clone() for t in tensors],
        [t.requires_grad for t in tensors],
        [None if t.grad is None else (id(t.grad), t.grad.clone()) for t in [*model.parameters(), *problem.hyperparameters]],
        [m.training for m in model.modules()],
    )


def assert_same(before, after):
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1] == after[1] and before[3] == after[3]
    for a, b in zip(before[2], after[2]):
        assert (a is None) == (b is None) and (a is None or (a[0] == b[0] and torch.equal(a[1], b[1])))


METHODS = {
    "stream": lambda *a, **k: evograd.hypergradient(*a, **k),
    "retain": lambda *a, **k: evograd.hypergradient(*a, strategy="retain", **k),
    "guided": lambda *a, **k: evograd.guided(*a, inner_lr=0.1, **k),
    "mixed_mode": lambda *a, **k: evograd.mixed_mode(*a, inner_lr=0.1, lookahead="sgd", **k),
    "unrolled": lambda *a, **k: evograd.baselines.unrolled(*a, inner_lr=0.1, **k),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["batchnorm", "frozen", "hyperparameters_inside"])
def test_the_model_is_as_before(kind, method, fails):
    problem = bilevel(kind)
    problem.train_loss(problem.model).backward()
    problem.model[-1].eval() if kind == "batchnorm" else problem.model.train()
    before = state_of(problem)

    def val_loss(model):
        model.eval()
        value = problem.val_loss(model)
        for p in problem.hyperparameters:
            assert p.grad is None
            p.grad = torch.ones_like(p)  # as a closure that calls backward would leave it
        for p in problem.model.parameters():
            p.requires_grad_(False) if p.is_leaf and p.grad_fn is None and fails else None
        if fails:
            raise KeyError("a mistake in the closure")
        return value

    with pytest.raises(KeyError) if fails else torch.no_grad():
        METHODS[method](problem.train_loss, val_loss, problem.model, problem.hyperparameters)
    assert_same(before, state_of(problem))


def test_closures_may_use_the_model_in_any_way():
    """Submodules, attributes and parameters reached through the model are the candidate's, not the original ones."""
    problem = bilevel("hyperparameters_inside")
    x = torch.randn(4, 5, dtype=torch.float64)
    seen = []

    def train_loss(model):
        seen.append(model.features.weight.detach().clone())
        return model.head(model.gate * model.features(x)).square().mean() + 0.1 * sum(
            p.square().sum() for p in model.parameters()
        )

    evograd.hypergradient(train_loss, *problem.args()[1:], sigma=0.1)
    assert all((w - problem.model.features.weight).abs().allclose(torch.tensor(0.1, dtype=torch.float64)) for w in seen)


@pytest.mark.parametrize("noise", ["sign", "guided"])
def test_six_lines_in_a_loop(noise):
    """The learned rotation of the training inputs comes close to that of the validation inputs."""
    x = torch.randn(256, 2)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    turn = torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]])
    angle = torch.zeros((), requires_grad=True)
    model = nn.Linear(2, 4)
    optimizer, meta_optimizer = torch.optim.Adam(model.parameters(), 0.05), torch.optim.Adam([angle], 0.02)

    def train_loss(m):
        rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        return F.cross_entropy(m(x @ rotation.T), y)

    angles = []
    for _ in range(300):
        optimizer.zero_grad()
        train_loss(model).backward(inputs=list(model.parameters()))
        optimizer.step()
        result = estimate(train_loss, lambda m: F.cross_entropy(m(x @ turn.T), y), model, [angle], noise=noise)
        angle.grad = result.grads[0]
        meta_optimizer.step()
        angles.append(angle.item())
    assert sum(angles[-100:]) / 100 == pytest.approx(0.6, abs=0.2)


STATE = torch.Generator().manual_seed(9).get_state()
SEEDING = {
    "manual_seed": lambda: torch.manual_seed(0),
    "set_rng_state": lambda: torch.set_rng_state(STATE),
    "by turns": lambda: torch.manual_seed(torch.initial_seed() % 2 + 1),
}


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("strategy", ["stream", "in_place", "retain", "vmap"])
@pytest.mark.parametrize("how", SEEDING)
def test_a_seed_that_a_loss_sets_does_not_hold_the_directions(how, strategy, common, which):
    """Each call has directions of its own, and all of them come from the seed before the first."""

    def estimates():
        problem = bilevel("dropout")
        losses = {"train_loss": problem.train_loss, "val_loss": problem.val_loss}
        plain = losses[which]

        def seeded(m):
            SEEDING[how]()
            return plain(m)

        losses[which] = seeded
        torch.manual_seed(7)
        settings = dict(strategy=strategy, common_random_numbers=common, sigma=0.1)
        for _ in range(5):
            yield evograd.hypergradient(*losses.values(), problem.model, problem.hyperparameters, **settings).grads[0]
            seeded(problem.model)  # the training step

    found, again = torch.stack(list(estimates())), torch.stack(list(estimates()))
    assert torch.equal(found, again)
    cosines = F.cosine_similarity(found[:, None], found[None], dim=2)
    assert (cosines - torch.eye(5)).abs().max() < 0.999


def test_the_global_generator_is_left_as_it_was():
    """But for what was drawn: seeds, and what the losses draw."""
    problem = bilevel("dropout")
    torch.manual_seed(11)
    evograd.hypergradient(*problem.args())
    state, seed = torch.get_rng_state(), torch.initial_seed()
    assert seed == 11
    torch.manual_seed(11)
    torch.randint(2**62, (2, 1))
    for loss in (problem.train_loss, problem.train_loss, problem.val_loss):
        loss(problem.model)
    assert torch.equal(state, torch.get_rng_state())
