"""The measuring, and what it must show: the peak memory and the FLOPs of every estimator."""

import time
import weakref

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from evograd import measuring
from evograd.measuring import Cost, compare, compare_made, counts, flops, launches, measure, peak_bytes, seconds
from label_noise_mwn.models import resnet

from .networks import parameter_bytes, steps

MB = 2**20


def test_peak_bytes_counts_what_is_alive():
    kept = torch.zeros(MB // 4)  # 1 MB that the step uses

    def step():
        a = kept + 1  # 2 MB alive
        b = a[: MB // 8] + 1  # 2.5 MB
        del a
        return (b * 2).sum()  # 2 MB: kept, b, b * 2

    assert peak_bytes(step) == int(2.5 * MB)
    assert peak_bytes(step) == peak_bytes(step)


def test_peak_bytes_sees_graphs_and_views():
    x, w = torch.zeros(MB // 4), torch.ones(1, requires_grad=True)

    def step():
        y = (x * w).exp()  # x * w is not kept, its exponential is
        return y.view(2, -1)[0]  # no storage of its own

    assert peak_bytes(step) == 3 * MB + 4
    assert peak_bytes(lambda: step().sum().backward()) == 4 * MB + 4 + 4 * 3


def test_peak_bytes_of_a_step_includes_the_state_that_stays():
    model = nn.Linear(512, 512, bias=False)  # 1 MB
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.zeros(1, 512)

    def step():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    assert 3 * MB <= peak_bytes(step) < 3.1 * MB  # weight, momentum, gradient


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_are_their_parts():
    x = torch.zeros(100, 1)
    eye = torch.eye(100)
    for sparse, expected in ((eye.to_sparse(), 100 * (16 + 4)), (eye.to_sparse_csr(), 101 * 8 + 100 * (8 + 4))):
        assert peak_bytes(lambda s=sparse: s @ x) >= expected + 400 + 400  # operations may copy the places
        assert counts(lambda s=sparse: s @ x)[0] == peak_bytes(lambda s=sparse: s @ x)


def test_flops_are_counted_where_a_loss_takes_gradients_by_its_inputs():
    model, x = nn.Linear(10, 10, bias=False), torch.zeros(5, 10, requires_grad=True)
    assert flops(lambda: torch.autograd.grad(model(x).sum(), x)) == 2 * 2 * 5 * 10 * 10
    assert counts(lambda: model(x).sum().backward(inputs=[x]))[1] == 2 * 2 * 5 * 10 * 10


@pytest.mark.parametrize("name", ["plain", "evograd", "mixed_mode", "unrolled"])
def test_counts_in_two_runs_are_those_of_one_counter_at_a_time(name):
    step = steps(resnet(8, 10), size=8, batch=4)[name]
    step()  # what the optimizer keeps is there
    runs = []
    counted = counts(lambda: runs.append(step()))
    assert len(runs) == 2
    assert counted == (peak_bytes(step), flops(step), launches(step))


def test_flops_and_seconds():
    a, b = torch.zeros(10, 20), torch.zeros(20, 30)
    assert flops(lambda: a @ b) == 2 * 10 * 20 * 30
    times = seconds({"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.01)}, repeats=3, warmup=1)
    assert 0.001 <= times["fast"] < times["slow"]
    assert times["slow"] >= 0.01
    cost = measure(lambda: a @ b, repeats=2, warmup=0)
    assert cost == Cost(cost.seconds, (200 + 600 + 300) * 4, 12_000, 1)


def test_launches_are_operations_that_compute():
    x, out = torch.ones(4, 4), [torch.ones(2), torch.ones(3)]

    def step():
        y = x.view(16)[3:].detach()  # views
        y = torch.empty(13).copy_(y)  # one, the copy
        torch._foreach_add_(out, 1)  # one, however many tensors
        x.is_same_size(x)  # no tensor comes of it
        return (y * 2).sum()  # two

    assert launches(step) == 4
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert launches(step) == 4


def test_seconds_take_turns():
    order = []
    seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3


def test_fake_tensors_give_the_same_bytes():
    def measured(fake):
        torch.manual_seed(0)
        with FakeTensorMode() if fake else torch.enable_grad():
            named = steps(resnet(8, 10), size=8, batch=4)
            chosen = {name: named[name] for name in ("plain", "evograd", "guided", "mixed_mode", "unrolled")}
            return compare(chosen, repeats=1, warmup=0)

    real, fake = measured(False), measured(True)
    for name in real:
        assert fake[name].seconds is None
        assert fake[name].flops == real[name].flops
        assert fake[name].peak_bytes == pytest.approx(real[name].peak_bytes, rel=0.001)


def test_resnet18_stream_needs_one_copy_of_the_parameters():
    """ResNet-18 at 128 px, batch 64: the limits that the method promises, without computing anything."""
    with FakeTensorMode():
        model = torchvision.models.resnet18(num_classes=10)
        named = steps(model, size=128, batch=64)
        plain, plain_flops = peak_bytes(named["plain"]), flops(named["plain"])
        # guided at θ looks at the pattern there, by one more forward pass, unless the training step hands it over
        for name, at_most in (("evograd", 2.70), ("guided", 3.05), ("guided_own_kinks", 2.70)):
            assert peak_bytes(named[name]) <= plain + 1.1 * parameter_bytes(model)
            assert (flops(named[name]) + plain_flops) / plain_flops <= at_most
        assert peak_bytes(named["unrolled"]) > 2.5 * plain


def test_mixed_mode_needs_two_copies_of_the_parameters():
    """ResNet-32, batch 100, a weight net behind the loss."""
    with FakeTensorMode():
        model = resnet(32, 10)
        named = steps(model, size=32, batch=100)
        plain = peak_bytes(named["plain"])
        assert peak_bytes(named["mixed_mode"]) <= plain + 2.2 * parameter_bytes(model)
        assert peak_bytes(named["evograd"]) <= plain + 1.1 * parameter_bytes(model)
        assert peak_bytes(named["unrolled"]) > 2.5 * plain


def test_memory_does_not_grow_with_the_number_of_candidates():
    named = steps(resnet(14, 10), size=16, batch=16)
    assert peak_bytes(named["many"]) <= 1.02 * peak_bytes(named["evograd"])


def test_peak_on_cuda_is_the_steps_own(monkeypatch):
    """The allocator counts whatever lies on the card; a step's peak is what it adds, and the tensors there that it uses."""
    allocated = {"memory_allocated": 700 * MB, "max_memory_allocated": 703 * MB}  # other models, other data
    for name, value in allocated.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(measuring, "_on_cuda", lambda: True)
    with FakeTensorMode(), torch.device("cuda"):
        kept, other = torch.zeros(MB // 4), torch.zeros(MB)
        on_host = torch.zeros(MB, device="cpu")
        assert peak_bytes(lambda: (kept + 1, on_host + 1)) == 4 * MB  # kept, and the allocator's 3
    assert other.device.type == "cuda"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_are_made_one_at_a_time_on_cuda(monkeypatch, device):
    alive, most = weakref.WeakSet(), []

    class Model:
        def __init__(self):
            self.itself = self  # models live in cycles
            alive.add(self)
            most.append(len(alive))

        def step(self):
            return None

    def costs(steps, repeats, warmup):
        assert (repeats, warmup) == (3, 1)
        return {name: Cost(1.0, 2, 3, 4) for name in steps}

    monkeypatch.setattr(measuring, "compare", costs)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    makers = {name: lambda: Model().step for name in ("plain", "evograd", "unrolled")}
    assert compare_made(makers, torch.device(device), repeats=3, warmup=1) == dict.fromkeys(makers, Cost(1.0, 2, 3, 4))
    assert most == ([1, 1, 1] if device == "cuda" else [1, 2, 3])


def test_a_step_that_has_taken_enough_is_not_repeated(monkeypatch):
    taken = {"quick": 1.0, "slow": 3.0}
    calls = []
    monkeypatch.setattr(measuring, "_timed", lambda step: taken[step()])
    steps = {name: lambda name=name: calls.append(name) or name for name in taken}
    assert measuring.seconds(steps, repeats=5, warmup=0, enough=5.0) == taken
    assert (calls.count("quick"), calls.count("slow")) == (5, 2)
    calls.clear()
    seen = []
    assert measuring.seconds(steps, 5, warmup=3, enough=2.0, progress=lambda turns: seen.append(len(turns)) or turns) == taken
    assert (calls.count("quick"), calls.count("slow")) == (3 + 3, 1 + 1)
    assert seen == [2 * (3 + 5)]
