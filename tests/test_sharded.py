"""Candidates in the model's own tensors: plain models, and models that fully_shard has sharded, in real gloo processes."""

import contextlib
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import evograd
from evograd import noise
from evograd.baselines import conjugate_gradient, finite_difference, neumann, unrolled
from evograd.host import vectors
from evograd.host.sharded import Sharding, is_sharded, local

from .forked import CONTEXT, server
from .problems import KINDS, bilevel
from .problems import estimate as by_noise
from .test_distributed import caught, difference, of_group

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
except ImportError:
    fully_shard = None

SIZES = (2, 4)
BATCH, D, HIDDEN, CLASSES = 16, 5, 7, 3  # over four processes the last shard of a layer of 7 is short, and one of 3 is empty
SETTINGS = {
    "sign": {},
    "odd": {"n_candidates": 5, "inner_lr": 0.1},
    "normal": {"noise": "normal", "n_candidates": 3, "sigma": 0.1},
    "guided": {"estimator": "guided"},
    "guided_sgd": {"estimator": "guided", "lookahead": "sgd", "inner_lr": 0.1},
}
RANDOM = [name for name, settings in SETTINGS.items() if settings.get("estimator") != "guided"]
MODELS = ("inputs", "outputs", "tied", "head", "unsharded", "checkpoint", "decay", "gate", "compiled")
CASES = [(2, "inputs", setting) for setting in SETTINGS] + [(4, "inputs", setting) for setting in SETTINGS]
CASES += [(4, name, setting) for name in MODELS[1:] for setting in ("odd", "guided_sgd")]
SEED = 3


class Block(nn.Module):
    """A pre-norm residual block with a kink."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 9), nn.Linear(9, HIDDEN)
        self.checkpointed = checkpointed

    def _branch(self, x):
        return self.down(F.relu(self.up(self.norm(x))))

    def forward(self, x):
        return x + (checkpoint(self._branch, x, use_reentrant=False) if self.checkpointed else self._branch(x))


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.stem = nn.Linear(D, HIDDEN)
        self.blocks = nn.ModuleList(Block(name == "checkpoint") for _ in range(2))
        self.gate = nn.Parameter(torch.rand(HIDDEN)) if name == "gate" else None
        self.neck, self.head = nn.Linear(HIDDEN, D), nn.Linear(HIDDEN, CLASSES)
        if name == "tied":
            self.neck.weight = nn.Parameter(self.stem.weight.detach().T.contiguous())
            self.back = nn.Linear(HIDDEN, D)
            self.back.weight = self.neck.weight
            self.stem.weight.requires_grad_(False)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.stem(self.neck(x if self.gate is None else x * self.gate).tanh())
        return self.head(self.stem(self.back(x)) if hasattr(self, "back") else x)


def problem(name, rank=0, size=1):
    """Means over a batch, of which this process has every `size`-th sample."""
    torch.manual_seed(0)
    model, net = Net(name), nn.Linear(D, 1)
    shift = torch.randn(D, requires_grad=True)
    shift = shift.square() if name == "gate" else shift  # no leaf
    decay = torch.tensor(0.3, requires_grad=True)
    x, x_val = torch.randn(BATCH, D), torch.randn(BATCH, D)
    y, y_val = torch.randint(0, CLASSES, (BATCH,)), torch.randint(0, CLASSES, (BATCH,))
    own = slice(rank, None, size)
    inputs = lambda: x[own] if name == "outputs" else x[own] + shift  # λ is behind the network alone, or in front of it too

    def train_loss(m):
        losses = F.cross_entropy(m(inputs()), y[own], reduction="none")
        loss = (net(x[own])[:, 0].sigmoid() * losses).mean()
        if name == "decay":  # of a block's weights, which are sharded again after the forward pass
            squares = [p.square().sum() for p in m.blocks[0].parameters()]
            loss = loss + decay * sum(s.full_tensor() if is_sharded(s) else s for s in squares)
        return loss

    def val_loss(m):
        return F.cross_entropy(m(x_val[own]), y_val[own]) + (x_val[own] * shift).square().mean()

    more = {"decay": [decay], "gate": [model.gate]}.get(name, [])  # the gate is a parameter of the model
    return train_loss, val_loss, model, [*net.parameters(), shift, *more]


def chosen(name):
    return {"parameters": ["head.weight", "blocks.1.up.weight"]} if name == "head" else {}


def shard(model, mesh, **settings):
    """FSDP2, a block at a time; a parameter that is a hyperparameter stays out of it."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    ignored = {} if model.gate is None else {"ignored_params": {model.gate}}
    fully_shard(model, mesh=mesh, **settings, **ignored)
    return model


def estimate(args, seed=SEED, **settings):
    torch.manual_seed(seed)
    result = by_noise(*args, **settings)
    return [*result.grads, result.val_loss, result.candidate_losses, result.weights]


class Trace:
    """What a call may not change: bits, gradients, flags, buffers, the tensors themselves."""

    def __init__(self, model):
        self.model = model
        self.before = self.now()

    def now(self):
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [(n, id(t), t.requires_grad, id(t.grad), t._version, local(t).clone()) for n, t in named]

    def unchanged(self):
        pairs = zip(self.now(), self.before, strict=True)
        return all(a[:-1] == b[:-1] and torch.equal(a[-1], b[-1]) for a, b in pairs)


# --- plain models, in this process


@pytest.mark.parametrize("name", ["odd", "guided", "guided_sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_equals_stream(kind, name):
    settings = SETTINGS[name]
    of = bilevel(kind)
    expected = estimate(of.args(), strategy="stream", parameters=of.parameters, **settings)
    of = bilevel(kind)
    trace = Trace(of.model)
    found = estimate(of.args(), strategy="in_place", parameters=of.parameters, **settings)
    assert trace.unchanged()
    exact = settings.get("estimator") != "guided" and kind != "lstm"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-7, atol=0 if exact else 1e-9)


@pytest.mark.parametrize("settings", [{}, {"estimator": "guided"}])
def test_several_buckets(settings, monkeypatch):
    monkeypatch.setattr(vectors, "BUCKET", 32)
    monkeypatch.setattr(vectors, "PIECE", 16)
    args = bilevel("mlp").args()
    expected, trace = estimate(args, strategy="stream", **settings), Trace(args[2])
    found = estimate(args, strategy="in_place", **settings)
    assert trace.unchanged() and all(not p._backward_hooks for p in args[2].parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("place", ["own", "own data", "others"])
def test_given_parameters_and_lookahead(place):
    """The step was made already: θ is a copy from before, and G is taken where the model stands now, or the other way round."""
    args = bilevel("mlp").args()
    given = {n: (p if place == "own" else p.data) if place != "others" else p + 0.1 for n, p in args[2].named_parameters()}
    before = {n: p.detach() - 0.1 for n, p in args[2].named_parameters()}
    for parameters, lookahead in ((before, given), (given, before), (given, given)):
        settings = dict(estimator="guided", inner_lr=0.1, parameters=parameters, lookahead=lookahead)
        expected, trace = estimate(args, **settings), Trace(args[2])
        found = estimate(args, strategy="in_place", **settings)
        assert trace.unchanged()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"estimator": "guided"}])
def test_a_compiled_model_is_called_itself(settings):
    train_loss, val_loss, model, hyperparameters = bilevel("mlp").args()
    expected = estimate((train_loss, val_loss, model, hyperparameters), **settings)
    called = []

    def backend(graph, inputs):
        def run(*tensors):
            called.append({id(t) for t in tensors})
            return graph(*tensors)

        return run

    torch._dynamo.reset()  # of what other tests have compiled
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    closures = (lambda m: train_loss(compiled)), (lambda m: val_loss(compiled))  # nothing but the very module, whatever m is
    trace = Trace(model)
    found = estimate((*closures, compiled, hyperparameters), strategy="in_place", **settings)
    assert trace.unchanged() and called
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_after_an_error_the_model_is_what_it_was(at):
    train_loss, val_loss, model, hyperparameters = bilevel("batchnorm").args()
    calls = iter(range(10))

    def failing(closure):
        def fails(m):
            value = closure(m)
            if next(calls) == at:
                raise KeyError("a mistake")
            return value

        return fails

    trace = Trace(model)
    with pytest.raises(KeyError, match="a mistake"):
        estimate((failing(train_loss), failing(val_loss), model, hyperparameters), strategy="in_place")
    assert trace.unchanged()


def test_graphs_from_before_stay_good_and_those_of_candidates_do_not():
    train_loss, val_loss, model, hyperparameters = bilevel("batchnorm").args()
    outer, kept = train_loss(model), []
    expected = torch.autograd.grad(outer, list(model.parameters()), retain_graph=True)
    estimate((lambda m: train_loss(m), val_loss, model, hyperparameters), strategy="in_place")
    assert all(map(torch.equal, torch.autograd.grad(outer, list(model.parameters())), expected))

    def keeping(m):
        kept.append((m[0].weight * hyperparameters[0].sum()).sum())
        return train_loss(m)

    estimate((keeping, val_loss, model, hyperparameters), strategy="in_place")
    for loss in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_a_loss_writes():
    train_loss, val_loss, model, hyperparameters = bilevel("mlp").args()

    def writing(m):
        with torch.no_grad():
            m[0].weight.add_(1)
        return train_loss(m)

    trace = Trace(model)
    with pytest.raises(RuntimeError, match="a loss has written into the model's parameters '0.weight'"):
        estimate((writing, val_loss, model, hyperparameters), strategy="in_place")
    assert trace.unchanged()
    # what a module itself writes is undone: an embedding that renormalises its rows, a buffer that is one number expanded
    embedding = nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Linear(3, 2))
    embedding.register_buffer("expanded", torch.zeros(1).expand(5))
    weights, trace = torch.zeros(4, requires_grad=True), Trace(embedding)
    loss = lambda m: (weights.sigmoid()[:, None] * m(torch.arange(4)).square()).mean()
    args = (loss, lambda m: m(torch.arange(4)).square().mean(), embedding, [weights])
    found = estimate(args, strategy="in_place")
    assert trace.unchanged()
    assert difference(found, estimate(args)) < 1e-6


def test_one_copy_of_the_parameters():
    """Guided candidates take no second one: G makes way for it."""
    model, args = deep(256, 2048)
    peaks = {}
    with pytest.MonkeyPatch.context() as patch:  # many buckets, as a large model has them
        patch.setattr(vectors, "BUCKET", 2**16)
        patch.setattr(vectors, "PIECE", 2**14)
        for name, step in {
            "plain": lambda: args[0](model).backward(inputs=list(model.parameters())),
            "sign": lambda: estimate(args, strategy="in_place"),
            "guided": lambda: estimate(args, strategy="in_place", estimator="guided"),
        }.items():
            peaks[name] = peak(step, model)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert 0 < peaks["plain"]
    more = {name: (value - peaks["plain"]) / size for name, value in peaks.items()}
    assert more["sign"] < 1.1 and more["guided"] < more["sign"] + 0.1, more


def deep(width, batch):
    """A problem in which activations take more than gradients, for candidates too: λ is in front of the network."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Tanh())])
    x, shift = torch.randn(batch, width), torch.zeros(width, requires_grad=True)
    return model, (lambda m: m(x + shift).square().mean(), lambda m: m(x).square().mean(), model, [shift])


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, as large as each is when an operation ends: FSDP2 resizes them."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and not is_sharded(leaf):
                self.add(leaf)
        live = [storage() for storage in self.storages.values()]
        self.peak = max(self.peak, sum(s.nbytes() for s in live if s is not None))
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata: self.storages.pop(key, None))


def peak(step, model):
    """The least of two times, for gloo's threads may hold what they have sent a little longer."""
    peaks = []
    for turn in range(3):  # the first makes what stays
        with Live() if turn else contextlib.nullcontext() as live:
            step()
        for p in model.parameters():
            p.grad = None
        peaks += [live.peak] if turn else []
    return min(peaks)


def test_arguments():
    args = bilevel("mlp").args()
    message = "strategy='store' is unknown; accepted are 'stream', 'in_place', 'retain', 'vmap'"
    with pytest.raises(ValueError, match=message):
        estimate(args, strategy="store")
    with pytest.raises(ValueError, match="chunk_size is of strategy='vmap'"):
        estimate(args, strategy="in_place", chunk_size=2)


# --- sharded models, in four processes


class Wire(TorchDispatchMode):
    """Bytes of every all-reduce: FSDP2 over one dimension sends none."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allreduce" in str(function):
            self.calls.append(sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)))
        return function(*args, **(kwargs or {}))


def shards_of_noise(model, name, kind, n_candidates, where):
    """ε_k of this process's shards: {(k, name): tensor}."""
    wanted = chosen(name).get("parameters", [n for n, p in model.named_parameters() if p.requires_grad and n != "gate"])
    torch.manual_seed(SEED)
    layout = vectors.Layout({n: local(model.get_parameter(n)) for n in wanted})
    epsilon = noise.SeededNoise(kind, layout, n_candidates, None, where)
    return {(k, n): epsilon(k, n).clone() for k in range(n_candidates) for n in wanted}


def in_groups(seen, rank, meshes):
    """The same as one process, at each size."""
    for size in (s for s in SIZES if rank < s):
        for name in dict.fromkeys(name for s, name, _ in CASES if s == size):
            args = problem(name, rank, size)
            model = shard(args[2], meshes[size], reshard_after_forward=name != "unsharded")
            if name == "compiled":
                for block in model.blocks:
                    block.compile(backend="eager")
            for setting in (setting for s, n, setting in CASES if (s, n) == (size, name)):
                settings = SETTINGS[setting]
                if setting in RANDOM:
                    kind, n = settings.get("noise", "sign"), settings.get("n_candidates", 2)
                    seen["noise", size, name, setting] = shards_of_noise(model, name, kind, n, (rank, size))
                trace = Trace(model)
                seen["result", size, name, setting] = estimate(args, **chosen(name), **settings)
                seen["unchanged", size, name, setting] = trace.unchanged()


def process(rank, folder):
    """One of four processes: runs every check, and leaves what it saw in a file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    meshes = {size: DeviceMesh("cpu", torch.arange(size)) for size in SIZES}
    mesh, seen = meshes[4], {}
    in_groups(seen, rank, meshes)

    # replicas of shards: both have the same noise
    args = problem("inputs", rank, 4)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = shard(args[2], hybrid)
    where = (rank % 2, 2)
    seen["noise", "hybrid", "sign"] = shards_of_noise(model, "inputs", "sign", 2, where)
    for setting in ("sign", "guided"):
        seen["result", "hybrid", setting] = estimate(args, **SETTINGS[setting])
    seen["hybrid seeds",] = caught(lambda: estimate(args, seed=rank))
    # without replicas it does not matter how processes are seeded; and a shard has noise of its own
    args = problem("inputs", rank, 4)
    model = shard(args[2], mesh)
    estimate(args, seed=rank)
    seen["noise", "own"] = shards_of_noise(model, "inputs", "sign", 2, (rank, 4))[0, "blocks.0.up.weight"]
    # K losses, K slopes, λ's gradient
    for setting in ("odd", "guided"):
        with Wire() if rank == 0 else contextlib.nullcontext() as wire:
            estimate(args, **SETTINGS[setting])
        seen["bytes", setting] = wire.calls if wire else []
    # a forward pass before, its backward pass afterwards; gradients that are there; an optimizer in hooks; named lookahead
    train_loss = args[0]
    expected = [g.clone() for g in gradients(train_loss, model)]
    loss = train_loss(model)
    result = estimate(args, **SETTINGS["guided"])
    loss.backward(inputs=whole(model))
    found = [local(p.grad) for p in model.parameters()]
    seen["outer graph",] = difference_of(found, expected)
    kept = [p.grad for p in model.parameters()]
    stepped = []
    handles = [p.register_post_accumulate_grad_hook(lambda p: stepped.append(p)) for p in model.parameters()]
    again = estimate(args, **SETTINGS["guided"])
    [handle.remove() for handle in handles]
    seen["gradients kept",] = all(p.grad is g for p, g in zip(model.parameters(), kept)) and not stepped
    seen["again",] = difference_of(again, result)
    ahead = {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    named = dict(estimator="guided", lookahead=ahead, inner_lr=0.1)
    seen["lookahead",] = estimate(args, **named)
    seen["ahead",] = {n: p.full_tensor() for n, p in ahead.items()}
    before = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    seen["given",] = estimate(args, estimator="guided", parameters=before, lookahead=model.named_parameters())
    far = evograd.Radius(1e-12)  # so near that the pair is taken again, by all of them
    seen["far",] = estimate(args, estimator="guided", lookahead="sgd", inner_lr=0.1, radius=far)
    seen["retakes",] = far.retakes, far.value
    seen["finite difference",] = finite_difference(*args, inner_lr=0.1).grads
    for p in model.parameters():
        p.grad = None
    # gradients divided by another number than the processes'
    if hasattr(model, "set_gradient_divide_factor"):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
        seen["factor",] = difference_of(estimate(args, **SETTINGS["guided"]), result)
    # an error, at every stage of the step, within the forward pass of a block and in the backward pass
    expected = estimate(problem_on("inputs", mesh, rank))
    args = problem_on("inputs", mesh, rank)
    trace, model = Trace(args[2]), args[2]
    for stage in range(6):
        with failing(model, stage):
            seen["error", stage] = caught(lambda: estimate(args, **SETTINGS["guided_sgd"]))[0]
        seen["error", stage, "unchanged"] = trace.unchanged()
        seen["error", stage, "after"] = difference_of(estimate(args), expected)
    # memory
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "BUCKET", 2**14)
        patch.setattr(vectors, "PIECE", 2**13)
        patch.setattr(noise, "KEPT", 0)
        model, args = deep(128, 256)
        size = sum(p.numel() * 4 for p in model.parameters())
        for layer in model[::2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        steps = {"plain": lambda: args[0](model).backward(), "sign": lambda: estimate(args)}
        steps["guided"] = lambda: estimate(args, estimator="guided", inner_lr=0.1)
        steps["guided_sgd"] = lambda: estimate(args, estimator="guided", lookahead="sgd", inner_lr=0.1)
        seen["peaks",] = {name: peak(step, model) / (size / 4) for name, step in steps.items()}
    torch.set_default_dtype(torch.float64)
    refusals(seen, rank, mesh)
    wrapped(seen, rank)
    dist.barrier()
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def problem_on(name, mesh, rank, **settings):
    args = problem(name, rank, mesh.size())
    shard(args[2], mesh, **settings)
    return args


def whole(model):
    """The leaves of a graph that a forward pass has just made."""
    return [p._unsharded_param for group in Sharding.of(model).groups for p in group.fsdp_params]


def gradients(train_loss, model):
    train_loss(model).backward()
    grads = [local(p.grad) for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return grads


def difference_of(a, b):
    return max((x - y).abs().max().item() if x.numel() else 0.0 for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def failing(model, stage):
    """The stage-th forward pass of the last block fails, or, from the fourth on, the backward pass of the stage-th."""
    calls = iter(range(100))

    def fail(*_):
        raise KeyError("a mistake")

    def hook(module, inputs, output):
        call = next(calls)
        if stage < 4 and call == stage:
            fail()
        if stage >= 4 and call == stage - 4:
            output.register_hook(fail)

    handle = model.blocks[-1].down.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def refusals(seen, rank, mesh):
    args = problem_on("inputs", mesh, rank)
    train_loss, val_loss, model, hyperparameters = args
    names = [n for n, _ in model.named_parameters()]
    plain = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    pair = dist.new_group([0, 1])
    low = problem_on("inputs", mesh, rank, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    partly = problem("inputs", rank, 4)
    fully_shard(partly[2].blocks[0], mesh=mesh)
    calls = {
        "stream": lambda: estimate(args, strategy="stream"),
        "retain": lambda: estimate(args, strategy="retain"),
        "vmap": lambda: estimate(args, strategy="vmap"),
        "candidates": lambda: estimate(args, share="candidates"),
        "mixed_mode": lambda: evograd.mixed_mode(*args, inner_lr=0.1),
        "unrolled": lambda: unrolled(*args, inner_lr=0.1),
        "neumann": lambda: neumann(*args, inner_lr=0.1),
        "conjugate_gradient": lambda: conjugate_gradient(*args),
        "plain lookahead": lambda: estimate(args, estimator="guided", lookahead=plain),
        "hyperparameter": lambda: estimate((train_loss, val_loss, model, [next(model.parameters())])),
        "group": lambda: estimate(args, group=pair) if rank < 2 else None,
        "bfloat16": lambda: estimate(low),
        "partly": lambda: estimate(partly),
        "partly, named": lambda: estimate(partly, parameters=["blocks.0.up.weight"]),
    }
    for name, call in calls.items():
        try:
            seen["refused", name] = call() and "had"
        except Exception as error:
            seen["refused", name] = f"{type(error).__name__}: {error}"
    model.set_requires_gradient_sync(False)
    train_loss(model).backward()
    seen["refused", "accumulation"] = caught(lambda: estimate(args))[0]
    assert names == [n for n, _ in model.named_parameters()]
    offloaded = problem_on("inputs", mesh, rank, offload_policy=CPUOffloadPolicy(pin_memory=False))
    seen["offloaded",] = caught(lambda: estimate(offloaded))[0]
    seen["not offloaded",] = estimate(problem_on("inputs", mesh, rank), group=dist.group.WORLD, share="batch")


def wrapped(seen, rank):
    """DistributedDataParallel in place, and its bare module as it was: they are the same."""
    for setting in ("sign", "odd"):
        args = problem("inputs", rank, 4)
        args[2].register_buffer("of_rank", torch.tensor(float(rank)))  # DDP sends the first process's buffers to the others
        seen["ddp", setting, "stream"] = estimate(args, group=dist.group.WORLD, share="batch", **SETTINGS[setting])
        ddp = nn.parallel.DistributedDataParallel(args[2], static_graph=setting == "odd")
        ddp.module.of_rank.fill_(rank)
        trace = Trace(ddp)
        closures = (lambda m: args[0](ddp)), (lambda m: args[1](ddp))
        in_place = dict(strategy="in_place", group=dist.group.WORLD, share="batch")
        seen["ddp", setting, "in place"] = estimate((*closures, ddp, args[3]), **in_place, **SETTINGS[setting])
        seen["ddp", setting, "unchanged"] = trace.unchanged()
        closures[0](ddp).backward()  # its gradients are still averaged
        seen["ddp", setting, "gradient"] = ddp.module.head.weight.grad


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the four processes saw."""
    if fully_shard is None:
        pytest.skip(f"torch {torch.__version__} has no torch.distributed.fsdp.fully_shard, and its forerunner none for CPUs")
    folder = tmp_path_factory.mktemp("sharded")
    server()
    processes = [CONTEXT.Process(target=process, args=(rank, folder)) for rank in range(4)]
    [p.start() for p in processes]
    end = time.monotonic() + 180
    [p.join(max(0, end - time.monotonic())) for p in processes]
    [p.kill() for p in processes if p.is_alive()]
    assert [p.exitcode for p in processes] == [0, 0, 0, 0]
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(4)]


class Given:
    """Noise put together from shards, as a function of (tensor, generator): seeds come candidate by candidate."""

    def __init__(self, model, parts):
        self.parts, self.seeds = parts, []
        self.names = {p.data_ptr(): n for n, p in model.named_parameters()}

    def __call__(self, tensor, generator):
        if (seed := generator.initial_seed()) not in self.seeds:
            self.seeds.append(seed)
        key = self.seeds.index(seed), self.names[tensor.data_ptr()]
        return torch.cat([part[key] for part in self.parts])


def one_process(name, parts=None, **settings):
    """The whole batch on the whole model, by strategy="stream"; with the noise of the shards, if there is one."""
    args = problem(name)
    if parts is not None:
        settings = {**settings, "noise": Given(args[2], parts)}
    return estimate(args, **chosen(name), **settings)


@pytest.mark.parametrize(("size", "name", "setting"), CASES)
def test_sharded_equals_one_process(seen, size, name, setting, float64):
    random = setting in RANDOM
    parts = [seen[rank]["noise", size, name, setting] for rank in range(size)] if random else None
    expected = one_process(name, parts, **SETTINGS[setting])
    found = of_group(seen, "result", size, name, setting, size=size)
    assert difference(found, expected) < (1e-10 if random else 1e-6)
    assert all(seen[rank]["unchanged", size, name, setting] for rank in range(size))


def test_replicas_of_shards(seen, float64):
    parts = [seen[rank]["noise", "hybrid", "sign"] for rank in range(2)]
    assert all(torch.equal(parts[0][key], seen[2]["noise", "hybrid", "sign"][key]) for key in parts[0])
    found = of_group(seen, "result", "hybrid", "sign", size=4)
    assert difference(found, one_process("inputs", parts)) < 1e-10
    assert difference(of_group(seen, "result", "hybrid", "guided", size=4), one_process("inputs", estimator="guided")) < 1e-6
    assert all("drew different noise" in seen[rank]["hybrid seeds",][0] for rank in range(4))


def test_each_shard_has_noise_of_its_own(seen):
    shards = [seen[rank]["noise", "own"] for rank in range(3)]
    assert not torch.equal(shards[0], shards[1]) and not torch.equal(shards[1], shards[2])


def test_what_crosses_the_network(seen):
    n_hyperparameters = D + 1 + D
    last = 8 * (4 + 1 + n_hyperparameters)
    assert seen[0]["bytes", "odd"] == [8 * 5, 8 * 5, last]
    assert seen[0]["bytes", "guided"] == [8 * 3, 8 * 2, 8 * 3, last]  # ‖G‖ and the scale of θ, losses, what the radius is judged by


def test_no_trace_in_training(seen, float64):
    for rank in range(4):
        assert seen[rank]["outer graph",] < 1e-12
        assert seen[rank]["gradients kept",]
        assert seen[rank]["again",] == 0
        assert seen[rank].get(("factor",), 0) == 0


def test_processes_take_a_pair_again_together(seen, float64):
    expected = estimate(problem("inputs"), estimator="guided", lookahead="sgd", inner_lr=0.1)
    assert difference(of_group(seen, "far", size=4)[:-2], expected[:-2]) < 1e-6
    assert len({seen[rank]["retakes",] for rank in range(4)}) == 1 and seen[0]["retakes",][0] > 0


def test_lookahead_and_parameters_that_are_given(seen, float64):
    args = problem("inputs")
    ahead = seen[0]["ahead",]
    expected = estimate(args, estimator="guided", lookahead=ahead, inner_lr=0.1)
    assert difference(of_group(seen, "lookahead", size=4), expected) < 1e-6
    before = {n: p.detach() + 0.1 for n, p in args[2].named_parameters()}
    expected = estimate(args, estimator="guided", parameters=before, lookahead=args[2].named_parameters())
    assert difference(of_group(seen, "given", size=4), expected) < 1e-6
    assert difference(of_group(seen, "finite difference", size=4), finite_difference(*args, inner_lr=0.1).grads) < 1e-6


def test_after_an_error_shards_are_what_they_were(seen):
    for rank in range(4):
        for stage in range(6):
            assert seen[rank]["error", stage] == "'a mistake'"
            assert seen[rank]["error", stage, "unchanged"]
            assert seen[rank]["error", stage, "after"] == 0


def test_memory_is_a_plain_step_and_a_copy_of_the_shards(seen):
    """In units of a process's shards."""
    for rank in range(4):
        peaks = seen[rank]["peaks",]
        assert max(peaks.values()) < peaks["plain"] + 1.1, peaks
        assert peaks["guided"] < peaks["sign"] + 0.1, peaks


ELSEWHERE = "sharded models are for evograd.hypergradient with strategy='in_place', its default for them"
REFUSED = {
    **dict.fromkeys(("stream", "retain", "vmap", "mixed_mode", "unrolled", "neumann", "conjugate_gradient"), ELSEWHERE),
    "candidates": "share='candidates' is for processes that have the whole model each",
    "plain lookahead": "lookahead: 'stem.weight' is a plain tensor, but the model's is a DTensor",
    "hyperparameter": "hyperparameters[0] is a DTensor",
    "bfloat16": "model is sharded with a MixedPrecisionPolicy of torch.bfloat16",
    "partly": "parameters: 'stem.weight' is a plain tensor in a sharded model",
    "accumulation": "model is in the midst of gradient accumulation",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(seen, name):
    for rank in range(4):
        assert REFUSED[name] in seen[rank]["refused", name]


def test_groups_and_parts(seen):
    message = "group must be the processes that hold the model's shards, [0, 1, 2, 3]"
    assert all(message in seen[rank]["refused", "group"] for rank in (0, 1))
    assert all(seen[rank]["refused", "partly, named"] == "had" for rank in range(4))
    for rank in range(4):
        assert difference(seen[rank]["offloaded",], seen[rank]["not offloaded",]) == 0


@pytest.mark.parametrize("setting", ["sign", "odd"])
def test_distributed_data_parallel_in_place(seen, setting):
    found, expected = (of_group(seen, "ddp", setting, which, size=4) for which in ("in place", "stream"))
    assert difference(found, expected) < 1e-12
    assert all(seen[rank]["ddp", setting, "unchanged"] for rank in range(4))
    of_group([{("gradient",): [s["ddp", setting, "gradient"]]} for s in seen], "gradient", size=4)
