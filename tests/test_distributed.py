"""Real gloo processes share out a hypergradient: the same result as one process, little on the wire, nobody left waiting."""

import contextlib
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evograd
from label_noise_mwn.models import resnet, weight_net

from .forked import CONTEXT, server
from .problems import bilevel
from .problems import estimate as by_noise

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
SIZES = (1, 2, 4)
SETTINGS = {
    "sign": {},
    "odd": {"n_candidates": 5, "inner_lr": 0.1},
    "normal": {"noise": "normal", "n_candidates": 64},
    "retain": {"strategy": "retain", "n_candidates": 6},
    "common": {"common_random_numbers": True, "inner_lr": 0.1},
}
GUIDED = {
    "guided": {"estimator": "guided", "radius": 0.1},
    "guided_retain": {"estimator": "guided", "radius": 0.1, "strategy": "retain"},
    "guided_sgd": {"estimator": "guided", "radius": 0.1, "lookahead": "sgd", "inner_lr": 0.1},
}
KINDS = ["mixed_shapes", "val_depends_directly", "hyperparameters_inside", "batchnorm"]
OWN_SEEDS = ("sign", "common")
FLOAT32 = {  # the paper's σ and τ, at which rounding matters most
    "stream": {"n_candidates": 64, "sigma": 0.001, "temperature": 0.05},
    "retain": {"n_candidates": 8, "sigma": 0.001, "temperature": 0.05, "strategy": "retain"},
}


def estimate(args, group=None, seed=3, **settings):
    """Everything that a call returns, as one list of tensors."""
    torch.manual_seed(seed)
    if settings.get("estimator") != "guided":
        settings = {"n_candidates": 4, "sigma": 0.1, "temperature": 0.2, **settings}
    result = by_noise(*args, group=group, **settings)
    return [*result.grads, result.val_loss, result.candidate_losses, result.weights]


def in_parts(rank=0, size=1, dtype=torch.float64):
    """Means over a batch, of which this process has every `size`-th sample; λ is a weight net and shifts of the inputs, one of
    them complex."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    net, shift = nn.Linear(5, 1).to(dtype), torch.randn(5, dtype=dtype, requires_grad=True)
    turn = torch.randn(5, dtype=dtype.to_complex(), requires_grad=True)
    x, x_val = torch.randn(16, 5, dtype=dtype), torch.randn(8, 5, dtype=dtype)
    y, y_val = torch.randint(0, 3, (16,)), torch.randint(0, 3, (8,))
    own = slice(rank, None, size)

    def train_loss(m):
        inputs = x[own] + shift + turn.real * turn.imag
        return (net(x[own])[:, 0].sigmoid() * F.cross_entropy(m(inputs), y[own], reduction="none")).mean()

    def val_loss(m):
        return F.cross_entropy(m(x_val[own]), y_val[own]) + (x_val[own] * shift).square().mean()

    return train_loss, val_loss, model, [*net.parameters(), turn, shift]


def label_noise(depth, batch=4):
    """Float32, λ a weight net of the samples' losses: the problem at which bytes are counted."""
    torch.manual_seed(0)
    model, net = resnet(depth, 10), weight_net()
    x, y, x_val, y_val = (f() for f in [lambda: torch.randn(batch, 3, 8, 8), lambda: torch.randint(0, 10, (batch,))] * 2)

    def train_loss(m):
        losses = F.cross_entropy(m(x), y, reduction="none")
        return (net(losses.detach()[:, None])[:, 0] * losses).mean()

    return train_loss, lambda m: F.cross_entropy(m(x_val), y_val), model, list(net.parameters())


class WireBytes(TorchDispatchMode):
    """Bytes of the tensors handed to torch.distributed, by whichever of its functions."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.calls.append(sum(t.numel() * t.element_size() for t in tensors))
        return function(*args, **(kwargs or {}))


def wire_bytes(rank, *args, **settings):
    """Counted in the first process alone: sums are the same in all, and to enter such a mode takes seconds once."""
    with WireBytes() if rank == 0 else contextlib.nullcontext() as wire:
        estimate(*args, **settings)
    return wire.calls if wire else []


def caught(call):
    """(message of the RuntimeError or ValueError, or the result; seconds)"""
    start = time.perf_counter()
    try:
        result = call()
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        result = str(error)
    return result, time.perf_counter() - start


def process(rank, folder):
    """One of four processes: runs every check, and leaves what it saw in a file. The checks that fail come last."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    seen = {("not_in_group",): caught(lambda: estimate(bilevel("mlp").args(), groups[1]))} if rank else {}
    for size in (s for s in SIZES if rank < s):
        group = groups[size]
        for name, settings in SETTINGS.items():
            for kind in KINDS:
                seen["candidates", size, kind, name] = estimate(bilevel(kind).args(), group, **settings)
            seen["candidates", size, "dropout", name] = estimate(bilevel("dropout").args(), group, **settings)
            seen["batch", size, name] = estimate(in_parts(rank, size), group, share="batch", **settings)
        for name, settings in GUIDED.items():
            seen["batch", size, name] = estimate(in_parts(rank, size), group, share="batch", **settings)
        radius = evograd.Radius(1e-12)  # so near that the pair is taken again, by all of them
        ahead = dict(estimator="guided", lookahead="sgd", inner_lr=0.1, radius=radius, share="batch")
        seen["far", size] = estimate(in_parts(rank, size), group, **ahead)
        seen["retakes", size] = radius.retakes, radius.value
        seen["batch", size, "float32"] = estimate(in_parts(rank, size, torch.float32), group, share="batch")
        for name, settings in FLOAT32.items():
            seen["float32", size, name] = estimate(label_noise(8), group, **settings)
    world, args = groups[4], bilevel("mlp").args()
    for share in ("candidates", "batch"):
        seen["bytes", share] = [wire_bytes(rank, label_noise(depth), world, share=share) for depth in (8, 32)]
    seen["bytes", "K = 64"] = wire_bytes(rank, bilevel("mlp").args(), world, n_candidates=64)

    # several steps in a row draw as one process draws
    torch.manual_seed(7)
    seen["steps",] = [evograd.hypergradient(*args, n_candidates=4, group=world).grads[0] for _ in range(3)]
    # each process seeded otherwise
    seen["seeds",] = caught(lambda: estimate(args, world, seed=rank))
    dropout = bilevel("dropout").args()
    for name in OWN_SEEDS:
        for size in (1, 4) if rank == 0 else (4,):
            settings = {**SETTINGS[name], "generator": torch.Generator().manual_seed(5)}
            seen["own_seeds", name, size] = estimate(dropout, groups[size], seed=rank + size, **settings)
    generator = torch.Generator().manual_seed(5)
    seen["own_seeds", "batch"] = estimate(dropout, world, share="batch", seed=rank, generator=generator)
    # arguments
    seen["too_few",] = caught(lambda: estimate(args, world, n_candidates=3))
    seen["guided_candidates",] = caught(lambda: estimate(args, world, estimator="guided", share="candidates"))
    # a closure that fails in one process, at every stage of the step
    train_loss, val_loss, model, hyperparameters = args

    def failing(closure, at):
        calls = iter(range(100))

        def fails(m):
            if rank == 1 and next(calls) == at:
                raise KeyError("a mistake in process 1")
            return closure(m)

        return fails

    for share in ("candidates", "batch"):
        for name, bad in {
            "train_loss": (failing(train_loss, 1), val_loss),
            "val_loss": (train_loss, failing(val_loss, 0)),
            "nan": (lambda m: train_loss(m) * (torch.nan if rank == 1 else 1), val_loss),
        }.items():
            problem = (*bad, model, hyperparameters)
            seen["failing", name, share] = caught(lambda: estimate(problem, world, n_candidates=8, share=share))
    for name, bad in {
        "guided": (train_loss, failing(val_loss, 0)),
        "guided_sgd": (failing(train_loss, 0), val_loss),
        "guided_pair": (failing(train_loss, 2), val_loss),
    }.items():
        ahead = dict(estimator="guided", inner_lr=0.1, lookahead="sgd")
        seen["failing", name] = caught(lambda: estimate((*bad, model, hyperparameters), world, **ahead))
    seen["after",] = estimate(args, world)

    # a process that dies
    def dies(m):
        if rank == 3:
            torch.save(seen, f"{folder}/{rank}.pt")
            os._exit(9)
        return train_loss(m)

    seen["death",] = caught(lambda: estimate((dies, val_loss, model, hyperparameters), world))
    torch.save(seen, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the four processes saw."""
    folder = tmp_path_factory.mktemp("gloo")
    server()
    processes = [CONTEXT.Process(target=process, args=(rank, folder)) for rank in range(4)]
    [p.start() for p in processes]
    end = time.monotonic() + 180
    [p.join(max(0, end - time.monotonic())) for p in processes]
    waiting = [rank for rank, p in enumerate(processes) if p.is_alive()]
    [p.kill() for p in processes]
    assert not waiting
    assert [p.exitcode for p in processes] == [0, 0, 0, 9]
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(4)]


def difference(a, b):
    """Largest relative difference over the tensors of two results."""
    return max(((x - y).abs().double().norm() / y.abs().double().norm()).item() for x, y in zip(a, b, strict=True))


def of_group(seen, *key, size):
    """The result of a group's processes, which must be the same bits in each."""
    results = [seen[rank][key] for rank in range(size)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    return results[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_candidates_shared_out_give_what_one_process_gives(seen, name):
    for kind in KINDS:
        expected = estimate(bilevel(kind).args(), **SETTINGS[name])
        for size in SIZES:
            assert difference(of_group(seen, "candidates", size, kind, name, size=size), expected) < 1e-12


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_that_closures_draw_do_not_depend_on_the_number_of_processes(seen, name):
    expected = of_group(seen, "candidates", 1, "dropout", name, size=1)
    for size in SIZES[1:]:
        assert difference(of_group(seen, "candidates", size, "dropout", name, size=size), expected) < 1e-12


@pytest.mark.parametrize("name", [*SETTINGS, *GUIDED])
def test_parts_of_the_batch_give_what_the_whole_gives(seen, name):
    expected = estimate(in_parts(), **(SETTINGS | GUIDED)[name])
    for size in SIZES:
        assert difference(of_group(seen, "batch", size, name, size=size), expected) < 1e-12


def test_processes_agree_on_taking_a_pair_again(seen):
    expected = estimate(in_parts(), estimator="guided", lookahead="sgd", inner_lr=0.1)
    for size in SIZES:
        assert difference(of_group(seen, "far", size, size=size)[:-2], expected[:-2]) < 1e-6
        assert len({seen[rank]["retakes", size] for rank in range(size)}) == 1 and seen[0]["retakes", size][0] > 0


def test_float32(seen):
    expected = {name: estimate(label_noise(8), **settings) for name, settings in FLOAT32.items()}
    parts = estimate(in_parts(dtype=torch.float32))
    for size in SIZES:
        assert difference(of_group(seen, "float32", size, "stream", size=size), expected["stream"]) < 1e-6
        # autograd's own sums over the graphs, and a mean over a batch, are in float32 and depend on what is summed first
        assert difference(of_group(seen, "float32", size, "retain", size=size), expected["retain"]) < 1e-3
        # λ as one vector: what is left of a single bias after terms have cancelled may have fewer digits. The largest difference
        # that 400 draws of data and directions gave is 2e-7
        both = (of_group(seen, "batch", size, "float32", size=size), parts)
        whole = [torch.cat([g.flatten() for g in result[:-3]]) for result in both]
        assert difference(whole[:1], whole[1:]) < 1e-5


def test_bytes_on_the_wire_do_not_grow_with_the_model(seen):
    """K losses, K slopes; and one number from each process, the validation loss and λ's gradient: float64, three sums."""
    n_hyperparameters = sum(p.numel() for p in weight_net().parameters())
    for share in ("candidates", "batch"):
        for calls in seen[0]["bytes", share]:  # ResNet-8, ResNet-32
            assert calls == [8 * 4, 8 * 4, 8 * (4 + 1 + n_hyperparameters)]
    assert seen[0]["bytes", "K = 64"] == [8 * 64, 8 * 64, 8 * (4 + 1 + 8)]


def test_steps_in_a_row_draw_as_one_process_draws(seen):
    args = bilevel("mlp").args()
    torch.manual_seed(7)
    expected = [evograd.hypergradient(*args, n_candidates=4).grads[0] for _ in range(3)]
    assert difference(of_group(seen, "steps", size=4), expected) < 1e-12


def test_processes_must_draw_the_same_noise(seen):
    for rank in range(4):
        assert "drew different noise" in seen[rank]["seeds",][0]
        assert "generator=torch.Generator().manual_seed" in seen[rank]["seeds",][0]
    # with a generator given they do, however torch is seeded, and closures draw the same too
    for name in OWN_SEEDS:
        assert difference(of_group(seen, "own_seeds", name, 4, size=4), seen[0]["own_seeds", name, 1]) < 1e-12
    of_group(seen, "own_seeds", "batch", size=4)


def test_an_error_in_one_process_is_an_error_in_all(seen):
    for key in seen[0]:
        if key[0] == "failing":
            for rank in range(4):
                message, seconds = seen[rank][key]
                if "nan" in key:
                    assert "is nan; a finite loss is needed" in message
                elif rank == 1:
                    assert message == "'a mistake in process 1'"
                else:
                    assert "process 1 of the group failed" in message
                assert seconds < 30
    # and who catches it may go on
    expected = estimate(bilevel("mlp").args())
    assert difference(of_group(seen, "after", size=4), expected) < 1e-12


def test_nobody_waits_for_a_process_that_died(seen):
    for rank in range(3):
        message, seconds = seen[rank]["death",]
        assert isinstance(message, str)
        assert seconds < 30


def test_arguments(seen):
    args = bilevel("mlp").args()
    with pytest.raises(ValueError, match="share='lambda' is unknown; accepted are 'candidates', 'batch'"):
        estimate(args, share="lambda")
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup.*not bool"):
        estimate(args, True)
    for rank in range(4):
        assert "n_candidates=3 cannot be shared out over 4 processes" in seen[rank]["too_few",][0]
        assert "the two of a guided pair stay together" in seen[rank]["guided_candidates",][0]
        assert rank == 0 or "group must be" in seen[rank]["not_in_group",][0]


@pytest.mark.skipif(TORCH < (2, 11), reason="older fake tensors cannot be sent")
@pytest.mark.parametrize("settings", [{}, {"share": "batch"}, {"estimator": "guided"}, {"strategy": "retain"}])
def test_nothing_is_read_on_the_host(settings):
    """Fake tensors have no values: a step that reads one, and so would make the host wait for the device, raises."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=1, world_size=4)
    try:
        with FakeTensorMode():
            args = label_noise(8)
            settings = settings if settings.get("estimator") else {"n_candidates": 8, **settings}
            result = by_noise(*args, group=dist.group.WORLD, **settings)
    finally:
        dist.destroy_process_group()
    assert [g.shape for g in result.grads] == [h.shape for h in args[3]]
