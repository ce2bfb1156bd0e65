"""The other estimators: against closed forms, finite differences and each other."""

import copy
import re
import threading
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpoint
from torch import nn

import evograd
from evograd import baselines
from evograd.host import precision
from evograd.operations import forward_mode, recomputation

from .problems import KINDS, Bilevel, OnceDifferentiable, bilevel
from .test_hypergradient import Vector, quadratic, relative_difference

ETA = 0.3
FORWARD_MODE_KINDS = [kind for kind in KINDS if kind != "weight_norm"]  # PyTorch has no forward-mode formula for it


def test_unrolled_equals_the_closed_form():
    args, exact = quadratic()
    torch.testing.assert_close(evograd.baselines.unrolled(*args, inner_lr=ETA).grads[0], exact(ETA), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        evograd.mixed_mode(*args, inner_lr=ETA, lookahead="sgd").grads[0], exact(ETA), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "batchnorm", "tied", "lstm", "parametrized"])
def test_unrolled_equals_finite_differences(kind, n_steps):
    problem = bilevel(kind)
    (weights,) = problem.hyperparameters

    def validation():
        """ℓ_V after n_steps of plain SGD."""
        theta = {n: p.detach().clone().requires_grad_() for n, p in problem.model.named_parameters()}
        call = lambda *args: torch.func.functional_call(problem.model, theta, args)
        for _ in range(n_steps):
            grads = torch.autograd.grad(problem.train_loss(call), list(theta.values()))
            theta = {n: (p - ETA * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), grads)}
        return problem.val_loss(call).item()

    estimated, step = torch.empty_like(weights), 1e-4
    for i in range(len(weights)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[i] += sign * step
            values.append(validation())
            with torch.no_grad():
                weights[i] -= sign * step
        estimated[i] = (values[0] - values[1]) / (2 * step)
    result = evograd.baselines.unrolled(*problem.args(), inner_lr=ETA, n_steps=n_steps)
    assert relative_difference(result.grads, [estimated]) < 1e-6


@pytest.mark.parametrize("kind", FORWARD_MODE_KINDS)
def test_mixed_mode_equals_unrolled(kind):
    problem = bilevel(kind)
    results = []
    for method, settings in ((evograd.baselines.unrolled, {}), (evograd.mixed_mode, {"lookahead": "sgd"})):
        torch.manual_seed(4)  # the same dropout
        results.append(method(*problem.args(), inner_lr=ETA, parameters=problem.parameters, **settings))
    assert relative_difference(results[1].grads, results[0].grads) < 1e-10
    torch.testing.assert_close(results[1].val_loss, results[0].val_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(results[1].candidate_losses, results[0].candidate_losses, rtol=1e-12, atol=0)


def test_mixed_mode_with_given_lookahead():
    """The named parameters one SGD step ahead are what lookahead='sgd' makes of them; G there and not at θ."""
    problem = bilevel("mixed_shapes")
    model = problem.model
    grads = torch.autograd.grad(problem.train_loss(model), list(model.parameters()))
    ahead = {n: p.detach() - ETA * g for (n, p), g in zip(model.named_parameters(), grads)}
    given, sgd, none = (
        evograd.mixed_mode(*problem.args(), inner_lr=ETA, lookahead=look).grads for look in (ahead, "sgd", None)
    )
    assert relative_difference(given, sgd) < 1e-12
    assert relative_difference(none, sgd) > 1e-3


@pytest.mark.parametrize("method", ["mixed_mode", "unrolled", "guided"])
def test_statistics_of_the_training_pass_are_not_seen_in_validation(method):
    """A validation loss in eval mode uses the running statistics that the model came with, in every estimator."""
    problem = bilevel("batchnorm")

    def val_loss(model):
        return problem.val_loss(model.eval())

    args = (lambda m: problem.train_loss(m.train()), val_loss, problem.model, problem.hyperparameters)
    estimate = {
        "mixed_mode": lambda: evograd.mixed_mode(*args, inner_lr=1e-9, lookahead="sgd"),
        "unrolled": lambda: evograd.baselines.unrolled(*args, inner_lr=1e-9),
        "guided": lambda: evograd.guided(*args, inner_lr=0.1, lookahead=None),
    }[method]
    with torch.no_grad():
        expected = val_loss(problem.model)
    problem.model.train()
    torch.testing.assert_close(estimate().val_loss, expected, rtol=1e-6, atol=0)


def test_an_operation_without_forward_mode_is_named():
    with pytest.raises(NotImplementedError, match="forward mode.*weight_norm.*plain form"):
        evograd.mixed_mode(*bilevel("weight_norm").args(), inner_lr=0.1)


def test_a_loss_that_lambda_enters_only_through_validation():
    model, lam = nn.Linear(3, 1), torch.tensor(2.0, requires_grad=True)
    x = torch.randn(4, 3)
    problem = Bilevel(model, [lam], lambda m: m(x).square().mean(), lambda m: m(x).square().mean() + lam**2)
    for result in (
        evograd.hypergradient(*problem.args()),
        evograd.mixed_mode(*problem.args(), inner_lr=0.1),
        evograd.baselines.unrolled(*problem.args(), inner_lr=0.1),
    ):
        assert result.grads[0].item() == pytest.approx(4.0)


def test_unrolled_perturbs_only_the_named_parameters():
    problem = bilevel("mlp")
    head = evograd.baselines.unrolled(*problem.args(), inner_lr=ETA, parameters=["2.weight", "2.bias"]).grads
    whole = evograd.baselines.unrolled(*problem.args(), inner_lr=ETA).grads
    assert relative_difference(head, whole) > 1e-2


# --- finite differences and the implicit function theorem ---------------------------------------------------------------


def quadratic_with_derivatives():
    """(arguments, A, G) of the quadratic: H = A and ∂²ℓ_T/∂λ∂θ = −A, so that dℓ_V/dλ = A v."""
    args, _ = quadratic()
    train_loss, val_loss, model, _ = args
    x = model.x.detach()
    a = torch.func.hessian(lambda x: train_loss(Namespace(x=x)))(x)
    return args, a, torch.func.grad(lambda x: val_loss(Namespace(x=x)))(x)


def test_finite_difference_equals_the_closed_form():
    args, exact = quadratic()
    for radius in (1e-3, 1.0):  # the quadratic has no third derivative
        estimate = evograd.baselines.finite_difference(*args, inner_lr=ETA, radius=radius).grads
        assert relative_difference(estimate, [exact(ETA)]) < 1e-9
    at_theta = evograd.baselines.finite_difference(*args, inner_lr=ETA, lookahead=None).grads
    assert relative_difference(at_theta, evograd.mixed_mode(*args, inner_lr=ETA, lookahead=None).grads) < 1e-9


def test_neumann_and_conjugate_gradient_converge_to_the_closed_form():
    torch.manual_seed(4)  # A of condition 245: the series takes as many terms for each digit
    args, a, g = quadratic_with_derivatives()
    exact = a @ torch.linalg.solve(a, g)
    smallest, *_, largest = torch.linalg.eigvalsh(a).tolist()
    series = evograd.baselines.neumann(*args, inner_lr=1 / largest, n_terms=int(16 * largest / smallest)).grads
    assert relative_difference(series, [exact]) < 1e-6
    conjugate_gradient, n = evograd.baselines.conjugate_gradient, len(g)
    assert relative_difference(conjugate_gradient(*args, n_iterations=n).grads, [exact]) < 1e-6
    assert relative_difference(conjugate_gradient(*args, n_iterations=n - 2).grads, [exact]) > 1e-4
    damped = a @ torch.linalg.solve(a + 0.5 * torch.eye(n).to(a), g)
    assert relative_difference(conjugate_gradient(*args, n_iterations=n, damping=0.5).grads, [damped]) < 1e-6


def test_truncated_neumann_series_equals_its_sum():
    """v = η Σ_{i<3} (I − η A)^i G, written out; one term is T1–T2 with G at θ."""
    args, a, g = quadratic_with_derivatives()
    step = lambda v: v - ETA * a @ v
    expected = a @ (ETA * (g + step(g) + step(step(g))))
    assert relative_difference(evograd.baselines.neumann(*args, inner_lr=ETA, n_terms=3).grads, [expected]) < 1e-12
    one = evograd.baselines.neumann(*args, inner_lr=ETA, n_terms=1).grads
    assert relative_difference(one, evograd.mixed_mode(*args, inner_lr=ETA, lookahead=None).grads) < 1e-12


def test_conjugate_gradient_stays_finite():
    """Along a direction of negative curvature it stops, and after convergence nothing moves."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for curvature, n_iterations in ((torch.tensor([1.0, -1.0]), 5), (torch.tensor([2.0, 2.0]), 30)):
        model, lam = Vector(2), torch.zeros(2, dtype=torch.float64, requires_grad=True)
        model.x.data.copy_(x)
        args = (lambda m, c=curvature: 0.5 * (c * (m.x - lam).square()).sum(), lambda m: m.x.square().sum() / 2, model, [lam])
        (grad,) = evograd.baselines.conjugate_gradient(*args, n_iterations=n_iterations).grads
        assert grad.isfinite().all()
    torch.testing.assert_close(grad, x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dropout"])
def test_on_networks(kind):
    """Against mixed mode: finite differences with the same lookahead, one term of the Neumann series without."""
    problem = bilevel(kind)
    settings = dict(inner_lr=ETA, parameters=problem.parameters)
    exact = evograd.baselines.unrolled(*problem.args(), **settings).grads
    finite = evograd.baselines.finite_difference(*problem.args(), radius=1e-4, **settings).grads
    assert relative_difference(finite, exact) < 1e-5
    one = evograd.baselines.neumann(*problem.args(), n_terms=1, **settings).grads
    close = evograd.baselines.finite_difference(*problem.args(), radius=1e-4, lookahead=None, **settings).grads
    assert relative_difference(one, close) < 1e-5


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("unrolled", dict(inner_lr=0.1, n_steps=0), "n_steps=0 must be an integer of at least 1"),
        ("finite_difference", dict(inner_lr=0.1, radius=0), "radius=0 must be a positive"),
        ("finite_difference", dict(inner_lr=0.1, lookahead="adam"), "lookahead='adam' is unknown"),
        ("neumann", dict(inner_lr=-1), "inner_lr=-1 must be a positive"),
        ("neumann", dict(inner_lr=0.1, n_terms=1.5), "n_terms=1.5 must be an integer"),
        ("conjugate_gradient", dict(n_iterations=0), "n_iterations=0 must be an integer"),
        ("conjugate_gradient", dict(damping=-0.1), "damping=-0.1 must be a positive"),
    ],
)
def test_bad_settings(method, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        getattr(evograd.baselines, method)(*bilevel("mlp").args(), **settings)


@pytest.mark.parametrize("place", ["before", "after", "first"])
@pytest.mark.parametrize(
    "normalization",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.BatchNorm1d(6, affine=False),
        nn.BatchNorm1d(6).eval(),
        nn.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.GroupNorm(2, 6),
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    ],
    ids=str,
)
def test_mixed_mode_with_normalizations(normalization, place, float64):
    """λ below the normalization, where PyTorch's own formulas, reverse over forward, are wrong without a word; above it; and
    above one that is the network's first layer, whose input does not depend on θ."""
    layers = [nn.Linear(4, 6), copy.deepcopy(normalization).double(), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers[place == "first" :])
    n_in = 6 if place == "first" else 4
    scale = torch.rand(n_in if place == "before" else 9, requires_grad=True)
    x, y, x_val, y_val = torch.randn(9, n_in), torch.randint(3, (9,)), torch.randn(9, n_in), torch.randint(3, (9,))

    def train_loss(model):
        if place == "before":
            return F.cross_entropy(model(x * scale), y)
        return (scale * F.cross_entropy(model(x), y, reduction="none")).mean()

    def val_loss(model):
        return F.cross_entropy(model(x_val), y_val)

    args = (train_loss, val_loss, model, [scale])
    exact = evograd.baselines.unrolled(*args, inner_lr=ETA).grads[0]
    mixed = evograd.mixed_mode(*args, inner_lr=ETA, lookahead="sgd").grads[0]
    torch.testing.assert_close(mixed, exact, rtol=1e-10, atol=1e-14)


class Normed(nn.Linear):
    """weight_norm written out, its parameters under the names of the old weight_norm."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        v = self.weight.detach().clone()
        del self.weight
        self.weight_g, self.weight_v = nn.Parameter(v.square().sum(1, keepdim=True).sqrt()), nn.Parameter(v)

    def forward(self, x):
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.square().sum(1, keepdim=True).sqrt(), self.bias)


NORMED = {
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "hook": lambda layer: nn.utils.weight_norm(layer),
}
SECOND_ORDER = {
    "unrolled": lambda *args: baselines.unrolled(*args, inner_lr=1.0),
    "unrolled, 5 steps": lambda *args: baselines.unrolled(*args, inner_lr=1.0, n_steps=5),
    "neumann": lambda *args: baselines.neumann(*args, inner_lr=1.0, n_terms=10),
    "conjugate_gradient": lambda *args: baselines.conjugate_gradient(*args, damping=0.3),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", SECOND_ORDER)
@pytest.mark.parametrize("kind", NORMED)
def test_weight_norm_has_the_second_derivative_of_what_it_computes(kind, method, float64):
    """PyTorch's own formula for double backward takes the norms for constants."""
    x, y, x_val, y_val = torch.randn(24, 5), torch.randint(3, (24,)), torch.randn(24, 5), torch.randint(3, (24,))
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    normed, written_out = copy.deepcopy(plain), copy.deepcopy(plain)
    for i in (0, 2):
        NORMED[kind](normed[i])
        written_out[i] = Normed(plain[i].in_features, plain[i].out_features)
        written_out[i].load_state_dict(nn.utils.weight_norm(copy.deepcopy(plain[i])).state_dict())
    w = torch.zeros(24, requires_grad=True)
    train_loss = lambda m: (w.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()
    estimates = [
        SECOND_ORDER[method](train_loss, lambda m: F.cross_entropy(m(x_val), y_val), model, [w]).grads
        for model in (normed, written_out)
    ]
    assert relative_difference(*estimates) < 1e-10


def test_weight_norm_with_lambda_before_it(float64):
    """One step, and λ in the path to the directions."""
    x, _, g = torch.randn(9, 5), torch.randn(3, 5), torch.rand(3, 1)
    model, lam = nn.Linear(5, 3), torch.rand(3, 5, requires_grad=True)
    square = lambda norm: lambda m: F.linear(x, norm(m.weight + lam, g)).sin().square().mean()
    written_out = lambda v, g: g * v / v.square().sum(1, keepdim=True).sqrt()
    val_loss = lambda m: m(x).square().mean()
    grads = [
        baselines.unrolled(square(norm), val_loss, model, [lam], inner_lr=1.0).grads
        for norm in (lambda *both: torch._weight_norm(*both), written_out)
    ]
    assert relative_difference(*grads) < 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_weight_norm_in_torchscript_is_refused_by_name():
    class Scripted(nn.Linear):
        def forward(self, x):
            return F.linear(x, torch._weight_norm(self.weight, self.bias[:, None], 0))

    problem = bilevel("mlp")
    problem.model.insert(0, torch.jit.script(Scripted(5, 5).double()))
    for name in ("unrolled", "neumann", "conjugate_gradient"):
        with pytest.raises(NotImplementedError, match="torch._weight_norm in TorchScript"):
            SECOND_ORDER[name](*problem.args())


def test_threads_leave_torch_as_it_was():
    """Of two blocks the one that began first ends first."""
    before, inside, ended = torch._C._functions.DelayedError, threading.Event(), threading.Event()

    def second():
        with baselines._changed:
            inside.set()
            assert ended.wait(60)

    other = threading.Thread(target=second)
    with baselines._changed:
        other.start()
        assert inside.wait(60)
    assert torch._C._functions.DelayedError is not before  # the other goes on
    ended.set()
    other.join(60)
    assert torch._C._functions.DelayedError is before


@pytest.mark.parametrize("estimator", ["evograd", "guided", "mixed_mode", "unrolled"])
def test_threads_wait_for_each_other(estimator):
    """A search over seeds with a thread pool: levels of forward mode and random numbers are one for all threads."""
    problems = [bilevel("dropout", seed) for seed in range(4)]
    run = {
        "evograd": lambda *a: evograd.hypergradient(*a, common_random_numbers=True, inner_lr=ETA),
        "guided": lambda *a: evograd.guided(*a, inner_lr=ETA),
        "mixed_mode": lambda *a: evograd.mixed_mode(*a, inner_lr=ETA),
        "unrolled": lambda *a: evograd.baselines.unrolled(*a, inner_lr=ETA),
    }[estimator]
    largest, errors = [], []

    def norms(problem):
        return [torch.stack([g.norm() for g in run(*problem.args()).grads]).norm().item() for _ in range(10)]

    def work(problem):
        try:
            largest.extend(norms(problem))
        except Exception as error:
            errors.append(error)

    alone = max(norm for problem in problems for norm in norms(problem))
    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and len(largest) == 40 and max(largest) < 5 * alone


@pytest.mark.parametrize("block", [recomputation._patched, precision._watching, forward_mode._unfused, baselines._changed])
def test_what_is_changed_in_torch_is_changed_till_the_last_block_ends(block):
    places = [(checkpoint, "CheckpointFunction"), (torch.amp.autocast, "__enter__"), (torch._C._functions, "DelayedError")]
    state = lambda: [torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, *(getattr(*place) for place in places)]
    before, first, second = state(), block, block  # as often as it is entered
    first.__enter__()
    changed = state()
    assert changed != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == changed
    second.__exit__(None, None, None)
    assert state() == before


def attention(m):
    q = m(torch.ones(2, 4, 8))
    return F.scaled_dot_product_attention(q, q, q).square().mean()


def ctc(m):
    log_probabilities = m(torch.ones(5, 2, 8)).log_softmax(-1)
    return F.ctc_loss(log_probabilities, torch.ones(2, 3).long(), torch.full((2,), 5), torch.full((2,), 3))


@pytest.mark.parametrize(
    "loss, words",
    [
        (attention, r"fused attention, which PyTorch has not \(.*attention.*take it within sdpa_kernel\(SDPBackend.MATH\)"),
        (ctc, r"an operation, which PyTorch has not \(derivative for aten::_ctc_loss_backward is not implemented\)"),
    ],
)
def test_an_operation_of_one_derivative_is_named(loss, words):
    model, lam = nn.Linear(8, 8), torch.tensor(0.3, requires_grad=True)
    problem = (lambda m: lam * loss(m), lambda m: m.weight.square().sum(), model, [lam])
    for estimate in (evograd.baselines.unrolled, evograd.baselines.neumann):
        with pytest.raises(RuntimeError, match=f"double backward through {words}"):
            estimate(*problem, inner_lr=ETA)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = evograd.guided(*problem, inner_lr=ETA).grads
        if loss is attention:
            assert relative_difference(found, evograd.baselines.unrolled(*problem, inner_lr=ETA).grads) < 1e-2


def test_a_function_without_second_derivative_is_refused_where_it_would_be_left_out():
    """Autograd calls the part of such a function unused; guided and mixed mode need no second derivative."""
    problem = bilevel("mlp")
    problem.model.insert(1, OnceDifferentiable())
    arguments = problem.args()
    before = torch._C._functions.DelayedError
    double_backward = [
        lambda: evograd.baselines.unrolled(*arguments, inner_lr=ETA),
        lambda: evograd.baselines.unrolled(*arguments, inner_lr=ETA, engine="higher"),
        lambda: evograd.baselines.neumann(*arguments, inner_lr=ETA),
        lambda: evograd.baselines.conjugate_gradient(*arguments),
    ]
    for estimate in double_backward:
        with pytest.raises(RuntimeError, match="marked once_differentiable. EvoGrad and guided need first"):
            estimate()
        assert torch._C._functions.DelayedError is before
    mixed = evograd.mixed_mode(*arguments, inner_lr=ETA, lookahead="sgd").grads[0]
    guided = evograd.guided(*arguments, inner_lr=ETA, lookahead="sgd").grads[0]

    class Sine(nn.Module):
        def forward(self, x):
            return x.sin()

    problem.model[1] = Sine()
    exact = evograd.baselines.unrolled(*arguments, inner_lr=ETA).grads[0]
    torch.testing.assert_close(mixed, exact, rtol=1e-9, atol=1e-14)
    assert relative_difference(guided, exact) < 1e-4


@pytest.mark.parametrize("estimator", ["guided", "mixed_mode"])
def test_train_loss_draws_what_the_training_step_draws(estimator):
    """Dropout's masks after torch.manual_seed are those of a training step after it, wherever G is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x, y, lam = torch.randn(8, 5).double(), torch.randint(3, (8,)), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    seen = []

    def train_loss(m):
        seen.append(torch.rand(()).item())  # drawn on the way, as a mask is
        return (lam.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()

    def val_loss(m):
        torch.rand(3)
        return F.cross_entropy(m(x), y)

    torch.manual_seed(5)
    expected = torch.rand(()).item()
    for lookahead in (None, "sgd", dict(model.named_parameters())):
        torch.manual_seed(5)
        getattr(evograd, estimator)(train_loss, val_loss, model, [lam], inner_lr=ETA, lookahead=lookahead)
        assert set(seen) == {expected}
        seen.clear()
