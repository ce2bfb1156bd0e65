"""What the code asks of CUDA, seen on a machine without: flags, optimizers, generators, the device of NCCL."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evograd
from evograd.host import checks
from evograd.host.problem import Problem
from evograd.lab import checkpoints, methods
from evograd.lab import processes as lab_processes
from evograd.lab.quality import QualityLog
from rotation import plot

from .problems import estimate

CUDA = torch.device("cuda", 1)
BACKENDS = {"cudnn": torch.backends.cudnn, "cuda.matmul": torch.backends.cuda.matmul}


def check(dtype=torch.float32):
    """What hypergradient looks at before it starts, of a model that says it is on CUDA."""
    with FakeTensorMode(), torch.device("cuda"):
        model, lam = nn.Linear(2, 1, dtype=dtype), torch.ones((), requires_grad=True)
        loss = lambda m: lam * m.weight.sum()
        checks.check_differences(Problem(loss, loss, model, [lam], None).theta)


@pytest.fixture
def flags():
    before = {name: flag.allow_tf32 for name, flag in BACKENDS.items()}
    yield
    for name, flag in BACKENDS.items():
        flag.allow_tf32 = before[name]


@pytest.mark.parametrize("on", [(), ("cudnn",), ("cuda.matmul",), ("cudnn", "cuda.matmul")])
def test_tf32_is_warned_of_where_losses_would_be_computed_in_it(on, flags):
    for name, flag in BACKENDS.items():
        flag.allow_tf32 = name in on
    assert checks.tf32() == [f"torch.backends.{name}.allow_tf32" for name in BACKENDS if name in on]
    words = " and ".join(checks.tf32()) + " is True.*TF32.*Set it to False"
    with pytest.warns(UserWarning, match=words) if on else contextlib.nullcontext():  # warnings are errors here
        check()
    check(torch.float64)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has not yet the newer flags")
def test_tf32_by_torchs_newer_flags(flags):
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # torch refuses then to say what allow_tf32 is
        assert checks.tf32() == []
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_a_cpu_is_not_warned(flags):
    torch.backends.cudnn.allow_tf32 = True
    lam, model = torch.ones((), requires_grad=True), nn.Linear(2, 1)
    loss = lambda m: (lam * m(torch.ones(3, 2)).square()).mean()
    evograd.hypergradient(loss, loss, model, [lam])


@pytest.mark.parametrize("noise", ["sign", "guided"])
def test_a_cuda_graph_of_a_hypergradient_is_refused(noise, monkeypatch):
    monkeypatch.setattr(checks, "capturing", lambda tensor: True)
    lam, model = torch.ones((), requires_grad=True), nn.Linear(2, 1)
    loss = lambda m: pytest.fail("called")
    with pytest.raises(RuntimeError, match="CUDA graph is being captured.*the same directions"):
        estimate(loss, loss, model, [lam], noise=noise)


def test_optimizers_of_models_are_fused_on_cuda():
    with FakeTensorMode(), torch.device("cuda"):
        there = methods.optimizer(torch.optim.Adam, nn.Linear(2, 1).parameters(), lr=0.1)
    here = methods.optimizer(torch.optim.SGD, nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9)
    assert there.defaults["fused"] is True and there.defaults["lr"] == 0.1
    assert not here.defaults["fused"] and here.defaults["momentum"] == 0.9


def test_figures_touch_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: pytest.fail("a CUDA context"))
    plot.defaults.cache_clear()
    assert plot.changed({"method": "evograd", "data": "digits", "device": "cuda", "lr": 0.5}).keys() >= {"lr"}
    plot.defaults.cache_clear()


def test_the_clock_of_an_estimate_starts_when_the_device_is_idle(monkeypatch):
    """The first estimate of an entry would wait for the step that is still queued."""
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(device))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    log = QualityLog(0)

    def estimate():
        order.append("estimate")
        return evograd.Hypergradient([torch.ones(2)], *[torch.zeros(())] * 3)

    for step in (0, 1):
        log.add(step, {"exact": estimate}, CUDA)
    assert order == ["estimate", CUDA, "estimate"]


def test_nccl_is_told_its_device(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    dist = lab_processes.dist
    monkeypatch.setattr(dist, "init_process_group", lambda *backend, **settings: calls.append((backend, settings)))
    for name in ("get_rank", "get_world_size", "new_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda **settings: 0)
    for device in ("cuda", "cpu"):
        with lab_processes.processes(torch.device(device)):
            pass
    assert calls == [(("nccl",), {"device_id": CUDA}), (("gloo",), {})]


@pytest.mark.parametrize("here", [0, 1])
def test_a_checkpoint_holds_the_generator_of_the_process_s_own_device(here, monkeypatch):
    states, taken = {0: "first", 1: "second"}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[here])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("contexts on every device"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: taken.append(state))
    saved = checkpoints.random_states()
    assert saved["cuda"] == [states[here]]
    checkpoints.restore_random_states(saved)
    checkpoints.restore_random_states({**saved, "cuda": ["first", "second"]})  # an older checkpoint, of all devices
    checkpoints.restore_random_states({**saved, "cuda": []})  # made on a CPU
    assert taken == [states[here]] * 2
