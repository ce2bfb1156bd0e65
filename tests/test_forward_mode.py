"""Forward mode under reverse mode against double backward: PyTorch's own list of operations, every name of one, its draws."""

import copy
import subprocess
import sys
import types
import unittest
import warnings
from itertools import islice
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

import evograd
from evograd.operations.forward_mode import ROWS, directional, explained

from .problems import Sine
from .test_hypergradient import relative_difference

SAMPLES = 6  # of each operation, spread over those that PyTorch gives


# --- the sweep ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def op_db():
    """PyTorch's list of operations with sample inputs. Importing it forbids to set flags of backends from then on; not here."""
    pytest.importorskip("numpy")
    stand_in = types.ModuleType("expecttest")  # of which the module needs nothing but the name
    stand_in.TestCase, stand_in.assert_expected_inline = unittest.TestCase, None
    with mock.patch.object(torch.backends, "disable_global_flags"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added = sys.modules.setdefault("expecttest", stand_in) is stand_in
        try:
            return pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
        finally:
            if added:
                del sys.modules["expecttest"]


def named(op) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def status(op) -> str:
    """ "right", "refused", or why it cannot be compared; "WRONG" and how far, if it is."""
    if torch.float64 not in op.supported_dtypes("cpu"):
        return "no float64"
    if op.name in ("bfloat16", "half", "chalf", "float", "cfloat"):
        return "lower precision"
    if not (op.supports_autograd and op.supports_gradgrad):
        return "no double backward"
    samples = list(islice(filter(places, op.sample_inputs("cpu", torch.float64, requires_grad=True)), 60))
    results = [compared(op, sample) for sample in samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]]
    for kind in ("WRONG", "refused", "double backward is wrong", "reverse mode is wrong", "right"):
        found = [result for result in results if result.startswith(kind)]
        if found:
            return found[0]
    return results[0] if results else "no input to scale"


def places(sample) -> list[int]:
    """Where the tensors to scale stand, among all of its arguments."""
    flat, _ = tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = ((i, t) for i, t in enumerate(flat) if isinstance(t, Tensor) and t.numel())
    return [i for i, t in tensors if t.dtype == torch.float64 and t.requires_grad]


def compared(op, sample) -> str:
    """Of f(z · λ) by z along v, at λ = 1, the derivative by λ; f weights what the operation returns."""
    flat, structure = tree_flatten((sample.input, sample.args, sample.kwargs))
    flat = [t.detach() if isinstance(t, Tensor) else t for t in flat]
    z = {i: flat[i].clone() for i in places(sample)}
    lam = {i: torch.ones_like(z[i]).requires_grad_() for i in z}
    generator = torch.Generator().manual_seed(0)
    v = {i: torch.randn(z[i].shape, generator=generator, dtype=torch.float64) for i in z}

    def f(z, lam=lam):
        torch.default_generator.manual_seed(1)  # torch.manual_seed takes longer than most operations
        values = [z[i] * lam[i] if i in z else t for i, t in enumerate(flat)]
        x, args, kwargs = tree_unflatten(values, structure)
        return weighted(sample.output_process_fn_grad(op.gradcheck_wrapper(op.op, x, *args, **kwargs)))

    def forward(lam=lam):
        with explained():
            return directional(lambda z: f(z, lam), z, v)

    try:
        leaves = {i: t.clone().requires_grad_() for i, t in z.items()}
        value = f(leaves)
        slope = inner(torch.autograd.grad(value, list(leaves.values()), create_graph=True, allow_unused=True), v.values())
        expected = gradient(slope, lam)
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        return f"the reference raises {type(error).__name__}"
    if not (value.isfinite() and all(g.isfinite().all() for g in expected)):
        return "the reference is not finite"
    try:
        value_2, slope_2 = forward()
    except NotImplementedError:
        return "refused"
    got = gradient(slope_2, lam)
    if close([value_2, slope_2], [value, slope]) and close(got, expected):
        return "right"
    step, u = 1e-5, {i: torch.randn(z[i].shape, generator=generator, dtype=torch.float64) for i in z}
    near = [f({i: z[i] + s * v[i] for i in z}).detach() for s in (step, -step)]
    slopes = [forward({i: (lam[i] + s * u[i]).detach() for i in lam})[1] for s in (step, -step)]
    differences = [(near[0] - near[1]) / (2 * step), (slopes[0] - slopes[1]) / (2 * step)]
    if close([slope_2.detach(), inner(got, u.values())], differences, 1e-6):
        return "double backward is wrong"  # and forward mode agrees with finite differences
    if not close([slope.detach()], differences[:1], 1e-6) and close([slope_2.detach()], differences[:1], 1e-6):
        return "reverse mode is wrong"  # in its first derivative already
    return f"WRONG: {slope_2.item()} and {got}, not {slope.item()} and {expected}"


def weighted(result) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
    for i, t in enumerate(tensors):
        t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        total = total + (t * torch.cos(torch.arange(1.0, t.numel() + 1).double() * (1.3 + i)).reshape(t.shape)).sum()
    return total


def inner(a, b) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b) if x is not None), torch.zeros((), dtype=torch.float64))


def gradient(value: Tensor, by: dict) -> list[Tensor]:
    by = list(by.values())
    grads = torch.autograd.grad(value, by, allow_unused=True) if value.requires_grad else [None] * len(by)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, by)]


def close(a, b, relative=1e-8) -> bool:
    a, b = (torch.cat([t.detach().reshape(-1) for t in tensors]) for tensors in (a, b))
    return bool((a - b).norm() <= relative * b.norm() + 0.01 * relative)


def sweep(op_db) -> dict[str, str]:
    # PyTorch looks through the whole stack for a test of its own, for each list of samples.
    with warnings.catch_warnings(), mock.patch("inspect.stack", list):
        warnings.simplefilter("ignore")
        return {named(op): status(op) for op in op_db}


# Of torch 2.14, by what `status` says of them. All others are right.
LISTED = {
    "refused": """
        cdist sparse.sampled_addmm native_layer_norm native_batch_norm _native_batch_norm_legit _batch_norm_with_update ormqr
        index_reduce.mean index_reduce.prod index_reduce.amin index_reduce.amax to_sparse native_dropout_backward
        nn.functional.grid_sample grid_sampler_2d grid_sampler_3d nn.functional.pdist
    """,
    "reverse mode is wrong": """
        as_strided_scatter nn.functional.max_unpool1d nn.functional.max_unpool2d nn.functional.max_unpool3d
    """,
    "double backward is wrong": "nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none",
    "the reference is not finite": "torch.ops.aten._safe_softmax.default __rpow__",
    "the reference raises RuntimeError": "nn.functional.ctc_loss",
    "lower precision": "bfloat16 float half cfloat chalf",
    "no float64": """
        broadcast_shapes bitwise_not bitwise_left_shift bitwise_right_shift view_as_real istft imag bitwise_and bitwise_or
        bitwise_xor lcm gcd torch._scaled_mm_v2 torch._scaled_mm torch.ops.aten._flash_attention_forward
        torch.ops.aten._efficient_attention_forward nn.functional.silu.complex nn.functional.batch_norm.without_cudnn __rand__
        __ror__ __rxor__ unravel_index bincount triu_indices tril_indices nn.functional.one_hot
    """,
    "no double backward": """
        item arange cauchy exponential geometric log_normal normal.in_place uniform allclose equal eq sparse.mm.reduce
        floor_divide ge geqrf gt isin le linspace linspace.tensor_overload logspace logspace.tensor_overload logical_not lt
        logical_and logical_or logical_xor heaviside isclose nn.functional.multi_margin_loss
        nn.functional.multilabel_margin_loss torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        nn.functional.hardsigmoid igamma igammac ne signbit isfinite isinf isposinf isneginf isreal isnan unique
        unique_consecutive bool byte char int long short empty_like zeros_like ones_like randn randn_like rand_like randint
        randint_like full_like new_zeros new_ones ones zeros full new_empty new_empty_strided empty_strided empty eye
        empty_permuted scalar_tensor new_full multinomial _chunk_cat histogram histogramdd histc bucketize searchsorted resize_
        resize_as_ nonzero nonzero_static jiterator_unary jiterator_binary jiterator_4inputs_with_extra_args
        jiterator_binary_return_by_ref jiterator_2inputs_2outputs nn.functional.embedding_bag argwhere all any argmax argmin
        count_nonzero hash_tensor argsort _segment_reduce.lengths _segment_reduce.offsets linalg.ldl_factor
        linalg.ldl_factor_ex linalg.ldl_solve linalg.matrix_rank linalg.matrix_rank.hermitian signal.windows.hamming
        signal.windows.hann signal.windows.bartlett signal.windows.blackman signal.windows.cosine signal.windows.exponential
        signal.windows.gaussian signal.windows.kaiser signal.windows.general_cosine signal.windows.general_hamming
        signal.windows.nuttall special.zeta special.airy_ai special.bessel_j0 special.bessel_j1 special.bessel_y0
        special.bessel_y1 special.chebyshev_polynomial_t special.chebyshev_polynomial_u special.chebyshev_polynomial_v
        special.chebyshev_polynomial_w special.hermite_polynomial_h special.hermite_polynomial_he special.laguerre_polynomial_l
        special.legendre_polynomial_p special.modified_bessel_i0 special.modified_bessel_i1 special.modified_bessel_k0
        special.modified_bessel_k1 special.scaled_modified_bessel_k0 special.scaled_modified_bessel_k1
        special.shifted_chebyshev_polynomial_t special.shifted_chebyshev_polynomial_u special.shifted_chebyshev_polynomial_v
        special.shifted_chebyshev_polynomial_w special.spherical_bessel_j0 masked.argmax masked.argmin bmm.triton_optimized
    """,
}


def test_every_operation_is_right_or_refused(op_db):
    """But for those whose reference is not: what is refused, and what cannot be compared, is what is listed here."""
    found = sweep(op_db)
    assert {name: what for name, what in found.items() if what.startswith("WRONG")} == {}
    if torch.__version__.startswith("2.14."):
        right = [name for name, what in found.items() if what == "right"]
        assert {name: what for name, what in found.items() if what != "right"} == {
            name: what for what, names in LISTED.items() for name in names.split()
        }
        assert len(right) >= 500


# --- every name of an operation -----------------------------------------------------------------------------------------


def difference(loss, model, x, lookahead="sgd") -> float:
    """Relative, of mixed_mode from double backward for loss(model, λ), λ one number for each of x's rows."""
    lam = (0.5 + torch.rand(len(x), dtype=torch.float64)).requires_grad_()
    args = (lambda m: loss(m, lam), lambda m: m(x).square().mean(), model, [lam])
    torch.manual_seed(3)
    exact = evograd.baselines.unrolled(*args, inner_lr=0.3)
    torch.manual_seed(3)
    mixed = evograd.mixed_mode(*args, inner_lr=0.3, lookahead=lookahead)
    torch.testing.assert_close(mixed.candidate_losses, exact.candidate_losses, rtol=1e-10, atol=0)
    assert exact.grads[0].norm() > 0
    return relative_difference(mixed.grads, exact.grads)


SQUARES = {  # of a positive definite matrix a, its Cholesky factor l, and b
    "torch.linalg.solve": lambda a, l, b: torch.linalg.solve(a, b),
    "torch.linalg.solve(left=False)": lambda a, l, b: torch.linalg.solve(a, b.T, left=False),
    "torch.linalg.solve_ex": lambda a, l, b: torch.linalg.solve_ex(a, b)[0],
    "torch.linalg.tensorsolve": lambda a, l, b: torch.linalg.tensorsolve(a, b[:, 0]),
    "torch.det": lambda a, l, b: torch.det(a),
    "torch.linalg.det": lambda a, l, b: torch.linalg.det(a),
    "Tensor.det": lambda a, l, b: a.det(),
    "torch.logdet": lambda a, l, b: torch.logdet(a),
    "Tensor.logdet": lambda a, l, b: a.logdet(),
    "torch.slogdet": lambda a, l, b: torch.slogdet(a)[1],
    "torch.linalg.slogdet": lambda a, l, b: torch.linalg.slogdet(a).logabsdet,
    "Tensor.slogdet": lambda a, l, b: a.slogdet()[1],
    "torch.linalg.eigh": lambda a, l, b: torch.linalg.eigh(a)[1].abs(),
    "torch.cholesky_inverse": lambda a, l, b: torch.cholesky_inverse(l),
    "Tensor.cholesky_inverse": lambda a, l, b: l.cholesky_inverse(),
    "torch.cholesky_solve": lambda a, l, b: torch.cholesky_solve(b.expand(2, -1, -1), l),
    "Tensor.cholesky_solve": lambda a, l, b: b.cholesky_solve(l),
    "torch.triangular_solve": lambda a, l, b: torch.triangular_solve(torch.ones(4, 1), a)[0],
    "torch.triangular_solve(transpose)": lambda a, l, b: torch.triangular_solve(b, l, False, True).solution,
    "Tensor.triangular_solve": lambda a, l, b: b.triangular_solve(l, upper=False, unitriangular=True)[0],
    "torch.triangular_solve, batched": lambda a, l, b: torch.triangular_solve(input=b.expand(2, -1, -1), A=a)[0],
    "torch.triangular_solve, the matrix": lambda a, l, b: sum(torch.triangular_solve(b[:, :1], l)),
    "torch.linalg.householder_product": lambda a, l, b: torch.linalg.householder_product(a, b[:, 0]),
    "torch.orgqr": lambda a, l, b: torch.orgqr(a, b[:, 0]),
    "torch.cumprod": lambda a, l, b: torch.cumprod(l, 1),
    "Tensor.cumprod": lambda a, l, b: l.cumprod(0),
    "Tensor.cumprod_": lambda a, l, b: (l * 1).cumprod_(0),
    "torch.prod": lambda a, l, b: l.prod(1),
    "torch.logcumsumexp": lambda a, l, b: torch.logcumsumexp(100 * a, 1) / 100,
    "Tensor.logcumsumexp": lambda a, l, b: (100 * a).logcumsumexp(0) / 100,
    "torch.scatter_reduce": lambda a, l, b: torch.scatter_reduce(a, 0, torch.zeros(4, 4).long(), a + 1, "prod"),
    "torch.distributions": lambda a, l, b: torch.distributions.MultivariateNormal(b[:, 0], a).log_prob(b[:, 1]),
}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", SQUARES)
def test_linear_algebra_by_every_name(name, place, float64):
    x, model, generator = torch.randn(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Tanh()), torch.Generator().manual_seed(2)

    def loss(m, lam):
        z = m(x * lam[:, None]) if place == "before" else m(x)
        a = z.T @ z + torch.diag(torch.arange(1.0, 5))
        result = SQUARES[name](a, torch.linalg.cholesky(a), z[:4, :2].contiguous() + 2)
        weights = torch.rand(result.shape, generator=generator.manual_seed(2))
        return (weights * result).sum() * (lam.square().mean() if place == "after" else 1)

    assert difference(loss, model, x) < 1e-10


class Applied(nn.Module):
    """A layer, something in between, and one to classes."""

    def __init__(self, between, n_in=5):
        super().__init__()
        self.features, self.between, self.head = nn.Linear(n_in, 8), between, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.between(self.features(x)))


def classification(x, y, place="before"):
    def loss(m, lam):
        rows = lam.view(-1, *[1] * (x.ndim - 1))
        z = m(x * rows if place == "before" else x)
        return (lam * F.cross_entropy(z.reshape(len(x), -1, 3).mean(1), y, reduction="none")).mean()

    return loss


NORMALIZED = {
    "torch.layer_norm": lambda h: torch.layer_norm(h, [8]),
    "torch.batch_norm": lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.instance_norm": lambda h: torch.instance_norm(
        h.unflatten(1, (2, 4)), None, None, None, None, True, 0.1, 1e-5, False
    ).flatten(1),
    "torch.group_norm": lambda h: torch.group_norm(h, 2),
    "torch.native_group_norm": lambda h: torch.native_group_norm(h, None, None, 6, 8, 1, 2, 1e-5)[0],
    "torch.compile, eager": torch.compile(nn.LayerNorm(8, dtype=torch.float64), backend="eager"),
}
if hasattr(F, "rms_norm"):
    NORMALIZED |= {"F.rms_norm": lambda h: F.rms_norm(h, [8]), "torch.rms_norm": lambda h: torch.rms_norm(h, [8])}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_normalization_by_other_names(name, place, float64):
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dynamo's, about functorch
        assert difference(classification(x, y, place), Applied(NORMALIZED[name]), x) < 1e-10


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("between", "name"),
    [
        (lambda h: torch.native_layer_norm(h, [8], None, None, 1e-5)[0], "native_layer_norm"),
        (lambda h: torch.ops.aten.native_batch_norm(h, None, None, None, None, True, 0.1, 1e-5)[0], "native_batch_norm"),
        (lambda h: torch.ops.aten.linalg_solve(h.T @ h + torch.eye(8), h.T).T, "_linalg_solve_ex"),
        ("nn.LayerNorm(8)", "native_layer_norm"),
        ("nn.BatchNorm1d(8)", "native_batch_norm"),
    ],
)
def test_what_gets_past_python_is_refused_where_it_would_be_wrong(between, name, place, float64):
    if isinstance(between, str):
        between = torch.jit.script(eval(between))
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    if place == "after":
        assert difference(classification(x, y, place), Applied(between), x) < 1e-10
    else:
        with pytest.raises(NotImplementedError, match=f"cannot take {name} in forward mode.*pytorch issue.*evograd.guided"):
            difference(classification(x, y, place), Applied(between), x)


class Hidden(nn.Module):
    """An operation that Python does not see when this is scripted."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, h):
        square = h.t() @ h + torch.eye(8)
        if self.name == "cholesky_inverse":
            return h + torch.cholesky_inverse(torch.linalg.cholesky(square))[:6]
        if self.name == "cholesky_solve":
            return torch.cholesky_solve(h.t(), torch.linalg.cholesky(square)).t()
        if self.name == "triangular_solve":
            return torch.triangular_solve(h.t(), square)[0].t()
        if self.name == "logcumsumexp":
            return torch.logcumsumexp(h, 1)
        if self.name == "scatter_reduce":
            return h + torch.scatter_reduce(h, 0, torch.zeros([6, 8], dtype=torch.int64), h + 2, "prod")
        if self.name == "dropout":
            return F.dropout(h.t(), 0.5, True).t()
        return F.alpha_dropout(h.t(), 0.5, True).t()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "name",
    ["cholesky_inverse", "cholesky_solve", "triangular_solve", "logcumsumexp", "scatter_reduce", "dropout", "alpha_dropout"],
)
def test_what_leaves_no_node_is_refused_too(name, place, float64):
    """In TorchScript with λ after it alone; and dropout, which draws in another order than in the pass before."""
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    assert difference(classification(x, y, place), Applied(Hidden(name)), x) < 1e-10
    words = "dropout" if "dropout" in name else name
    with pytest.raises(NotImplementedError, match=f"cannot take {words} in forward mode.*TorchScript.*evograd.guided"):
        difference(classification(x, y, place), Applied(torch.jit.script(Hidden(name))), x)
    assert difference(classification(x, y, place), Applied(Hidden(name)), x) < 1e-10  # also while it is looked


LOADED = """
import sys, torch, evograd
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), torch.jit.load(sys.argv[1]))
x, lam = torch.randn(6, 8), torch.rand(6, requires_grad=True)
try:
    evograd.mixed_mode(lambda m: (lam * m(x).square().mean(1)).sum(), lambda m: m(x).sum(), model, [lam], inner_lr=0.1)
except NotImplementedError as error:
    print("refused:", error)
"""


@pytest.mark.filterwarnings("ignore")
def test_torchscript_from_a_file_is_looked_at_too(tmp_path):
    """In a process that has scripted nothing itself."""
    torch.jit.script(Hidden("dropout")).save(tmp_path / "hidden.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path / "hidden.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: mixed_mode cannot take dropout in forward mode")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", ["cholesky_inverse", "logcumsumexp"])
def test_operations_of_the_dispatcher_are_right(name, place, float64):
    square = lambda h: torch.linalg.cholesky(h.T @ h + torch.eye(8))
    between = {
        "cholesky_inverse": lambda h: h + torch.ops.aten.cholesky_inverse.default(square(h))[:6],
        "logcumsumexp": lambda h: torch.ops.aten.logcumsumexp.default(h, 1),
    }
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    assert difference(classification(x, y, place), Applied(between[name]), x) < 1e-10


def test_a_compiled_network_is_right(float64):
    """Which has no double backward: against the same network, not compiled."""
    x, y, lam = torch.randn(6, 5), torch.randint(3, (6,)), torch.rand(6, requires_grad=True)
    plain = Applied(nn.LayerNorm(8))
    results = []
    for model in (plain, torch.compile(plain, backend="aot_eager")):
        loss = classification(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = (lambda m: loss(model, lam), lambda m: m(x).square().mean(), plain, [lam])
            results.append(evograd.mixed_mode(*args, inner_lr=0.3, lookahead="sgd").grads)
    assert relative_difference(*results) < 1e-10


# --- random draws -------------------------------------------------------------------------------------------------------


def turned(f):
    return lambda h: f(h.transpose(0, 1)).transpose(0, 1)


DRAWN = {
    "F.dropout": turned(lambda h: F.dropout(h, 0.3)),
    "F.dropout, in place": turned(lambda h: F.dropout(h, 0.3, True, True)),
    "torch.dropout": turned(lambda h: torch.dropout(h, 0.3, True)),
    "torch.native_dropout": turned(lambda h: torch.native_dropout(h, 0.3, True)[0]),
    "F.alpha_dropout": turned(lambda h: F.alpha_dropout(h, 0.3, True)),
    "F.dropout1d": lambda h: F.dropout1d(h.transpose(1, 2), 0.3).transpose(1, 2),
    "F.feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h.transpose(1, 2), 0.3, True).transpose(1, 2),
    "F.rrelu": turned(lambda h: F.rrelu(h, training=True)),
    "F.gumbel_softmax": turned(lambda h: F.gumbel_softmax(h, dim=-1)),
    "rand_like": turned(lambda h: h * torch.rand_like(h)),
    "rand_like of detached": turned(lambda h: h * torch.rand_like(h.detach())),
    "bernoulli": turned(lambda h: h * torch.bernoulli(h.sigmoid())),
    "empty_like and bernoulli_": turned(lambda h: h * torch.empty_like(h).bernoulli_(0.5)),
    "normal": turned(lambda h: h + torch.normal(h, 1.0).detach()),
    "nn.TransformerEncoderLayer": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).double(),
    "nn.TransformerEncoderLayer, pre": nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True, norm_first=True).double(),
    "F.scaled_dot_product_attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.3),
    "nn.MultiheadAttention": lambda h, attend=nn.MultiheadAttention(8, 2, 0.3, batch_first=True).double(): attend(h, h, h)[0],
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", DRAWN)
def test_the_same_numbers_are_drawn(name, place, float64):
    x, y = torch.randn(4, 3, 5), torch.randint(3, (4,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert difference(classification(x, y, place), Applied(DRAWN[name]), x) < 1e-10


def test_the_same_numbers_are_drawn_in_channels_last(float64):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Flatten())
            self.head = nn.Linear(54, 3)

        def forward(self, x):
            return self.head(self.layers(x.contiguous(memory_format=torch.channels_last)))

    x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4,))
    assert difference(classification(x, y), Network().to(memory_format=torch.channels_last), x) < 1e-10


# --- what functorch does not allow --------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, packed=None, **settings):
        super().__init__()
        self.packed, self.net = packed, getattr(nn, kind)(5, 3, batch_first=True, **settings)

    def forward(self, x):
        if not self.packed:
            return self.net(x)[0][..., :3]
        lengths = [4, 3, 2, 1] if self.packed == "sorted" else [3, 1, 4, 2]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.packed == "sorted")
        return nn.utils.rnn.pad_packed_sequence(self.net(packed)[0], batch_first=True)[0]


SEVERAL = {"num_layers": 2, "dropout": 0.4, "bidirectional": True}


@pytest.mark.parametrize("settings", [{}, {"packed": "sorted"}, {"packed": "unsorted"}, SEVERAL], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_networks(kind, settings, float64):
    x, y = torch.randn(4, 4, 5), torch.randint(3, (4,))
    assert difference(classification(x, y), Recurrent(kind, **settings), x) < 1e-10


def test_a_fused_lstm_in_single_precision():
    x, y, model, lam = torch.randn(4, 4, 5), torch.randint(3, (4,)), Recurrent("LSTM"), torch.rand(4)
    results = []
    for dtype in (torch.float32, torch.float64):
        weights, loss = lam.to(dtype, copy=True).requires_grad_(), classification(x.to(dtype), y)
        model = model.to(dtype)
        args = (lambda m: loss(m, weights), lambda m: m(x.to(dtype)).square().mean(), model, [weights])
        results.append(evograd.mixed_mode(*args, inner_lr=0.3).grads[0].double())
    assert relative_difference(results[:1], results[1:]) < 1e-5


ALLOWED = {
    "glu": lambda h: torch.cat([F.glu(h)] * 2, -1),
    "numpy": lambda h: h * float(h.detach().numpy().mean()),
    "tolist": lambda h: h * h.detach().mean(0).tolist()[0],
    "item": lambda h: h * h.mean().item(),
    "deepcopy": lambda h: h * copy.deepcopy(h.detach()),
    "prediction": lambda h: h * float((h.argmax(1).numpy() > 3).mean()),
    "control by values": lambda h: h * 2 if h.sum() > 0 else h * 3,
    "in place on a view": lambda h: (lambda z: (z[:, 0].mul_(2), z)[1])(h * 1),
    "foreach norms": lambda h: h * torch.stack(torch._foreach_norm([h, h.square()])).sum(),
    "foreach 1-norms": lambda h: h * torch.stack(torch._foreach_norm([h, h.exp()], 1)).sum(),
    "in place on integers": lambda h: h * torch.empty_like(h, dtype=torch.long).fill_(2).scatter_(0, torch.zeros_like(h).long(), 3),
    "tensor_split": lambda h: torch.cat(h.tensor_split(torch.tensor([2, 5]), 1)[::-1], 1),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_functorch_does_not_allow_is_done_otherwise(name, float64):
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    assert difference(classification(x, y), Applied(ALLOWED[name]), x) < 1e-10


@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_embeddings(max_norm, float64):
    words, y = torch.randint(7, (4, 3)), torch.randint(3, (4,))
    model = nn.Sequential(nn.Embedding(7, 8, max_norm=max_norm), nn.Linear(8, 3))
    assert difference(classification(words, y, "after"), model, words) < 1e-10


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Clipped(nn.Linear):
    def forward(self, x):
        self.weight.data = self.weight.data.clamp(-1, 1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (Reversal.apply, "autograd.Function.*setup_context"),
        (Clipped(8, 8).double(), "tensor.data cannot be assigned"),
        (lambda h: h * torch.cdist(h, h).mean(1, keepdim=True), "no formula.*cdist.*plain form"),
        (lambda h, seen=torch.zeros(6, 8).double(): h + seen.add_(h), "from outside"),
    ],
    ids=["function", "data", "cdist", "outside"],
)
def test_what_cannot_be_taken_in_forward_mode_is_one_sentence(between, words, float64):
    x, y, lam = torch.randn(6, 5), torch.randint(3, (6,)), torch.rand(6, requires_grad=True)
    loss = classification(x, y)
    args = (lambda m: loss(m, lam), lambda m: m.head(m.features(x)).square().mean(), Applied(between), [lam])
    with pytest.raises(NotImplementedError, match=f"forward mode.*{words}.*evograd.guided") as refused:
        evograd.mixed_mode(*args, inner_lr=0.1, lookahead=None)
    assert isinstance(refused.value.__cause__, RuntimeError)
    assert "\n" not in str(refused.value)


def test_errors_of_the_loss_are_its_own(float64):
    """What has nothing to do with forward mode is raised as it is."""
    x, lam = torch.randn(6, 5), torch.rand(6, requires_grad=True)

    for error in (NotImplementedError("a head of the user's"), RuntimeError("a shape of the user's")):

        def train_loss(m):
            raise error

        with pytest.raises(type(error), match="of the user's") as raised:
            evograd.mixed_mode(train_loss, lambda m: m(x).square().mean(), nn.Linear(5, 1), [lam], inner_lr=0.1)
        assert raised.value is error


# --- what is computed without gradients ---------------------------------------------------------------------------------


class EnablesWithin(Sine):
    """Its forward pass, for which PyTorch has gradients off by itself, switches them on and off again."""

    @staticmethod
    def forward(x):
        with torch.enable_grad():
            return x.sin()


def switched_off(h):
    torch.set_grad_enabled(False)
    h = h.sin()
    torch.set_grad_enabled(True)
    return h


def within(block, operation=torch.sin):
    def run(h):
        with block():
            return operation(h)

    return run


def in_turns(h):
    with torch.no_grad():
        first = h.sin()
        with torch.enable_grad():
            second = h.cos()
        return first + second + h.exp()


def out_of_inference(h):
    with torch.inference_mode():
        first = h.sin()
        with torch.inference_mode(False):
            second = h.cos()
    return first.clone() + second


def in_a_hook(h):
    layer, seen = nn.Identity(), []
    layer.register_forward_hook(torch.no_grad()(lambda module, inputs, output: seen.append(output.sin())))
    return layer(h) + seen[0]


def after_a_backward_pass(h):
    """Of something else, whose hook finds gradients off, as PyTorch has them there, and leaves them so."""
    z = torch.ones(3, requires_grad=True)
    z.register_hook(torch.no_grad()(lambda gradient: 2 * gradient))
    torch.autograd.grad(z.sum(), z)
    return h.sin()


def scripted(h):
    """Made here, and not before: with TorchScript in the process more is looked at in all of it."""
    return torch.jit.script(nn.Tanh())(h)


CONSTANT = {  # of a hidden layer: all of it is a constant, or a part
    "no_grad": within(torch.no_grad),
    "decorated": torch.no_grad()(torch.sin),
    "set_grad_enabled": within(lambda: torch.set_grad_enabled(False)),
    "for good": switched_off,
    "inference_mode": lambda h: within(torch.inference_mode)(h).clone(),
    "inference_mode, decorated": lambda h: torch.inference_mode()(torch.sin)(h).clone(),
    "inference_mode, a layer": lambda h: within(torch.inference_mode, lambda h: F.linear(h[:, :6], h.T))(h).clone(),
    "in turns": in_turns,
    "out of inference mode": out_of_inference,
    "TorchScript": within(torch.no_grad, scripted),
    "after TorchScript": lambda h: scripted(h) + within(torch.no_grad)(h),
    "a function with a jvp": within(torch.no_grad, EnablesWithin.apply),
    "after a function that enables": lambda h: scripted(EnablesWithin.apply(h)) + within(torch.no_grad)(h) + h.cos(),
    "in a hook": in_a_hook,
    "after a backward pass": after_a_backward_pass,
    "checkpointed": lambda h: checkpoint(within(torch.no_grad), h, use_reentrant=False) + h,
    "checkpointed, reentrant": lambda h: checkpoint(within(torch.no_grad), h, use_reentrant=True) + h,
    "compiled": within(torch.no_grad, torch.compile(torch.sin, backend="eager")),
    "get_total_norm": lambda h: nn.utils.get_total_norm(list(h)) * h,
    "layer_norm": within(torch.no_grad, lambda h: F.layer_norm(h, [8])),
    "rows of the table": within(torch.no_grad, lambda h: F.dropout(h, 0.3) + h.cumprod(1) + h.logcumsumexp(1)),
}


@pytest.mark.parametrize("how", CONSTANT)
def test_what_is_computed_without_gradients_is_a_constant(how, float64):
    """As it is to double backward: an input of a weight net, say."""
    if how == "get_total_norm" and not hasattr(nn.utils, "get_total_norm"):
        pytest.skip("of a later torch")
    x, y, model = torch.randn(6, 5), torch.randint(3, (6,)), Applied(nn.Tanh())

    def loss(m, lam):
        h = m.features(x * lam[:, None])
        losses = F.cross_entropy(m.head(torch.tanh(h)), y, reduction="none")
        return (lam * CONSTANT[how](h).mean(1).sigmoid() * losses).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dynamo's
        assert difference(loss, model, x) < 1e-10
    assert torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()
    with torch.inference_mode():
        assert torch.ones(1).sin().is_inference()


def test_a_weight_decay_without_gradients_is_none(float64):
    x, lam = torch.randn(6, 5), torch.tensor(-1.0, requires_grad=True)

    def loss(m):
        return m(x).square().mean() + lam.exp() * torch.no_grad()(lambda: sum(p.square().sum() for p in m.parameters()))()

    with pytest.raises(RuntimeError, match="does not depend on it"):
        evograd.mixed_mode(loss, lambda m: m(x).mean(), nn.Linear(5, 1), [lam], inner_lr=0.1)


# --- singular points ----------------------------------------------------------------------------------------------------


SINGULAR = {  # of values with zeros among them; right where double backward is finite
    "norm": lambda h: h.norm(dim=1),
    "vector_norm": lambda h: torch.linalg.vector_norm(h, dim=1),
    "normalize": lambda h: F.normalize(h, dim=1),
    "cosine_similarity": lambda h: F.cosine_similarity(h, h.flip(0) + 1, dim=1),
    "cumprod": lambda h: h.cumprod(1),
    "prod": lambda h: h.prod(1),
    "square": lambda h: h.abs() ** 2.0,
    "sqrt": lambda h: h.square().sqrt(),
    "xlogy": lambda h: torch.xlogy(h.square(), h.square()),
    "std": lambda h: h.std(1),
    "det": lambda h: torch.linalg.det(h[:, :6] * torch.ones(6)),
    "log_softmax": lambda h: h.masked_fill(h == 0, -torch.inf).softmax(1),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_points(name, float64):
    x, lam = torch.randn(6, 5), (0.5 + torch.rand(6)).requires_grad_()
    model = nn.Linear(5, 8)
    zeros = torch.ones(6, 8)
    zeros[0], zeros[1, 2], zeros[2, 3:6] = 0, 0, 0

    def loss(m):
        result = SINGULAR[name](m(x * lam[:, None]) * zeros)
        return (result * torch.arange(1.0, result.numel() + 1).reshape(result.shape).sin()).sum()

    args = (loss, lambda m: m(x).square().mean(), model, [lam])
    try:
        exact = evograd.baselines.unrolled(*args, inner_lr=0.1).grads
    except RuntimeError as error:
        assert "not finite" in str(error) or "is nan" in str(error)
        with pytest.raises(RuntimeError, match="not finite|is nan"):
            evograd.mixed_mode(*args, inner_lr=0.1, lookahead="sgd")
    else:
        assert relative_difference(evograd.mixed_mode(*args, inner_lr=0.1, lookahead="sgd").grads, exact) < 1e-8


def test_the_table_says_what_is_wrong():
    for row in ROWS:
        assert row.names or row.aten
        assert row.wrong.startswith(("it", "in"))
        assert row.issue is None or row.issue > 100_000


# --- gradients that a loss takes itself -----------------------------------------------------------------------------------


def _leaf(model, x, given):
    return torch.autograd.grad(model(given).sum(), given, create_graph=True)[0]


def _made(model, x, given):
    x = x.clone().requires_grad_()
    u = model(x)
    return torch.autograd.grad(outputs=u, inputs=x, grad_outputs=u.square(), create_graph=True)[0]


def _set(model, x, given):
    x = x * 1
    x.requires_grad = True
    return torch.autograd.grad([model(x).square().sum()], [x], create_graph=True)[0]


def _factory(model, x, given):
    x = torch.full(x.shape, 0.3, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    found, nothing = torch.autograd.grad(model(x).sum(), (x, unused), create_graph=True, allow_unused=True)
    assert nothing is None
    return found


def _third(model, x, given):
    found = torch.autograd.grad(model(given).sum(), given, create_graph=True)[0]
    for i in range(2):
        found = torch.autograd.grad(found[:, i].sum(), given, create_graph=True)[0]
    return found


def _hidden(model, x, given):
    h = model[0](x).exp().requires_grad_()  # PyTorch makes its tangent of its value
    return torch.autograd.grad(model[1:](h).square().sum(), h, create_graph=True)[0]


def _hidden_in_a_graph(model, x, given):
    h = model[0](given).exp()
    by_h, by_given = torch.autograd.grad(model[1:](h.sigmoid()).square().sum(), [h, given], create_graph=True)
    return by_h + by_given


def _batched(model, x, given):
    rows = torch.eye(len(x))[:, :, None]
    return torch.autograd.grad(model(given).square(), given, rows, create_graph=True, is_grads_batched=True)[0].sum(0)


def _jacobian(model, x, given):
    return torch.autograd.functional.jacobian(lambda x: model(x).square().sum(0), given, create_graph=True)[0]


def _attack(model, x, given):
    x = x.clone().requires_grad_()
    return model(x + 0.3 * torch.autograd.grad(model(x).square().sum(), x)[0])  # without create_graph: a constant


def _asked(model, x, given):
    h = model[0](x)
    return h.square() if h.requires_grad else 0 * h


GRADIENTS = [_leaf, _made, _set, _factory, _third, _hidden, _hidden_in_a_graph, _batched, _jacobian, _attack, _asked]


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "layer_norm"])
@pytest.mark.parametrize("found", GRADIENTS, ids=lambda found: found.__name__[1:])
def test_gradients_by_inputs_in_a_loss(found, normalized, float64):
    """Gradient penalties, physics-informed losses, adversarial inputs: λ weighs samples, and is the strength of the penalty."""
    torch.manual_seed(0)
    norm = [nn.LayerNorm(4)] if normalized and found is not _third else []  # PyTorch's own third derivative of it is wrong
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *norm, nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 1))
    x, y, given = torch.randn(5, 4), torch.randn(5, 1), torch.randn(5, 4, requires_grad=True)
    weights, strength = torch.zeros(5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)

    def train_loss(m):
        penalty = found(m, x, given).square().sum(1)
        return F.mse_loss(m(x), y) + (weights.exp() * penalty).mean() + strength.exp() * (penalty + 0.1).sqrt().mean()

    problem = train_loss, lambda m: F.mse_loss(m(x), y), model, [weights, strength]
    right = evograd.baselines.unrolled(*problem, inner_lr=0.1).grads
    assert relative_difference(evograd.mixed_mode(*problem, inner_lr=0.1).grads, right) < 1e-10
    if found not in (_attack, _asked):  # what is detached moves with a candidate, which has no graph
        assert relative_difference(evograd.guided(*problem, inner_lr=0.1).grads, right) < 1e-6


def _by_weights(model, x):
    return torch.autograd.grad(model(x).square().sum(), model.parameters(), create_graph=True)[0]


def _unmarked(model, x):
    h = model[0](x)
    return torch.autograd.grad(model[1:](h).sum(), h, create_graph=True)[0]


@pytest.mark.parametrize("estimator", [evograd.guided, evograd.hypergradient, evograd.mixed_mode])
@pytest.mark.parametrize("found", [_by_weights, _unmarked])
def test_gradients_without_a_graph_are_one_sentence(found, estimator):
    model, x, strength = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(5, 4), torch.ones((), requires_grad=True)
    train_loss = lambda m: m(x).square().mean() + strength * found(m, x).square().sum()
    with pytest.raises(
        RuntimeError, match=r"gradient.* by the model's parameters .* for evograd.baselines.unrolled.* requires_grad_\(\)"
    ):
        estimator(train_loss, lambda m: m(x).sum(), model, [strength], inner_lr=0.1)


def test_backward_in_a_loss_is_refused(float64):
    model, x, strength = nn.Linear(4, 4), torch.randn(5, 4), torch.ones((), requires_grad=True)

    def train_loss(m):
        m(x).sum().backward()
        return strength * m(x).square().mean()

    with pytest.raises(NotImplementedError, match="backward.. in it cannot be followed; call torch.autograd.grad"):
        evograd.mixed_mode(train_loss, lambda m: m(x).sum(), model, [strength], inner_lr=0.1)


class Equilibrium(nn.Module):
    """z = tanh(w z + u x), by iteration; its gradient by a hook on z, or through the iteration."""

    def __init__(self, hooked):
        super().__init__()
        self.w, self.u, self.out, self.hooked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1), hooked
        nn.init.uniform_(self.w.weight, -0.2, 0.2)

    def forward(self, x):
        step, z = lambda z: torch.tanh(self.w(z) + self.u(x)), torch.zeros(len(x), 4)
        with torch.set_grad_enabled(not self.hooked):
            for _ in range(60):
                z = step(z)
        if self.hooked:
            z = step(z)
            if z.requires_grad:
                at = z.detach().requires_grad_()
                once = step(at)

                def solved(g):
                    v = g
                    for _ in range(60):
                        v = torch.autograd.grad(once, at, v, retain_graph=True)[0] + g
                    return v

                z.register_hook(solved)
        return self.out(z)


def test_a_hook_on_a_tensor_is_refused_and_those_of_modules_are_as_without_gradients(float64):
    """An implicit gradient: guided has the right value, and mixed mode would not call the hook."""
    torch.manual_seed(0)
    x, y, weights = torch.randn(8, 4), torch.randn(8, 1), torch.zeros(8, requires_grad=True)
    train_loss, val_loss = lambda m: (weights.exp() * (m(x) - y).square()[:, 0]).mean(), lambda m: F.mse_loss(m(x), y)
    plain, hooked = Equilibrium(False), Equilibrium(True)
    hooked.load_state_dict(plain.state_dict())
    right = evograd.baselines.unrolled(train_loss, val_loss, plain, [weights], inner_lr=0.3).grads
    assert relative_difference(evograd.guided(train_loss, val_loss, hooked, [weights], inner_lr=0.3).grads, right) < 1e-6
    with pytest.raises(NotImplementedError, match="does not call the hooks of a tensor .register_hook.*or use evograd.guided"):
        evograd.mixed_mode(train_loss, val_loss, hooked, [weights], inner_lr=0.3)
    seen = []
    plain.out.register_full_backward_hook(lambda *_: seen.append(1))
    plain.out.register_full_backward_pre_hook(lambda *_: seen.append(1))
    assert relative_difference(evograd.mixed_mode(train_loss, val_loss, plain, [weights], inner_lr=0.3).grads, right) < 1e-10
    assert seen  # in the passes of first order
