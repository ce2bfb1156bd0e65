"""What people train with, and which estimator takes it: every cell is a test of the right value, or of the error.

    python -m tests.test_matrix              runs the cells, and writes the table into evograd/README.md from what they recorded

The value is that of an equivalent plain model in float64: T1–T2 by double backward; for EvoGrad differentiation through the
softmax, with the same noise.
"""

import contextlib
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import evograd
from evograd.baselines import finite_difference, unrolled
from evograd.host.sharded import local
from evograd.host.vectors import Layout
from evograd.noise import SeededNoise
from evograd.trajectory import one_step

from . import test_precision as precision
from .forked import CONTEXT, server
from .problems import Bilevel, C, D, N, bilevel, mlp
from .reference import evograd_reference, second_order_reference
from .test_sharded import Given, fully_shard


def trajectory(train_loss, val_loss, model, hyperparameters, parameters=None, **settings):
    """Through one step of SGD, which is T1–T2."""
    hyper = {id(h) for h in hyperparameters}
    of = [p for p in model.parameters() if p.requires_grad and id(p) not in hyper]
    optimizer = torch.optim.SGD(of, lr=LR)
    return one_step(train_loss, val_loss, model, hyperparameters, optimizer=optimizer, parameters=parameters, **settings)


README = Path(__file__).resolve().parents[1] / "evograd/README.md"
LR, SEED, PROCESSES = 0.1, 7, 2
ESTIMATORS = {
    "evograd": evograd.hypergradient,
    "guided": lambda *args, **settings: evograd.guided(*args, **{**SGD, **settings}),
    "mixed_mode": lambda *args, **settings: evograd.mixed_mode(*args, **{**SGD, **settings}),
    "Trajectory": trajectory,
    "unrolled": lambda *args, **settings: unrolled(*args, inner_lr=LR, **settings),
    "finite_difference": lambda *args, **settings: finite_difference(*args, **{"inner_lr": LR, "radius": 1e-4, **settings}),
}
SGD = {"lookahead": "sgd", "inner_lr": LR}
ERRORS = {"evograd": 1e-7, "guided": 1e-6, "Trajectory": 1e-6, "mixed_mode": 1e-10, "unrolled": 1e-10, "finite_difference": 1e-6}  # relative


# --- cells


@dataclass
class Had:
    """The value, to a relative error; said in the table after "yes". warned: of lower precision, without the settings."""

    said: str = ""
    error: float | None = None  # None: that of ERRORS
    settings: dict = field(default_factory=dict)
    warned: bool = False


@dataclass
class Refused:
    """The error, whose type and message are these; said in the table after "no"."""

    kind: type[Exception]
    message: str
    said: str


NO_DOUBLE_BACKWARD = "no double backward"
NO_FORWARD_MODE = "no forward mode"
FUSED = {
    "mixed_mode": Refused(NotImplementedError, "no formula for that.*_scaled_dot_product_flash_attention", NO_FORWARD_MODE),
    "unrolled": Refused(RuntimeError, "derivative for aten::_scaled_dot_product_flash_.*not impl", NO_DOUBLE_BACKWARD),
}
COMPILED = {"unrolled": Refused(RuntimeError, "^double backward through a compiled model", NO_DOUBLE_BACKWARD)}
SHARDED = "is a DTensor.*sharded models are for evograd.hypergradient"


@dataclass
class Row:
    """make() -> the problem. plain() -> the same without the feature. outside: what is around the call.

    cells: those that are not plainly had.  needs: a package.
    """

    name: str
    make: Callable[[], Bilevel]
    plain: Callable[[], Bilevel]
    cells: dict = field(default_factory=dict)
    outside: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    needs: str | None = None

    def cell(self, column):
        return self.cells.get(column, Had())


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def problem(model, part=slice(None), train=None):
    """λ behind the network and in front of it. part: of the batch.  train: ℓ_T of (model, inputs, targets), for each sample."""
    draws = torch.Generator().manual_seed(1)
    x, x_val = torch.randn(2, N, D, generator=draws, dtype=torch.float64)
    y, y_val = torch.randint(0, C, (2, N), generator=draws)
    weights = torch.randn(N, generator=draws, dtype=torch.float64).requires_grad_()
    shift = torch.randn(D, generator=draws, dtype=torch.float64).requires_grad_()
    train = train or (lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"))

    def train_loss(m):
        return (weights[part].sigmoid() * train(m, x[part] + shift, y[part])).mean()

    return Bilevel(model, [weights, shift], train_loss, lambda m: F.cross_entropy(m(x_val[part]), y_val[part]))


def penalized(m, x, y):
    """With the gradient by the inputs in it."""
    losses = F.cross_entropy(m(x), y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + gradient.square().sum(1)


class Attention(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.tokens, self.qkv, self.head, self.kernel = nn.Linear(D, 32), nn.Linear(8, 24), nn.Linear(8, C), kernel

    def forward(self, x):
        qkv = self.qkv(self.tokens(x).view(-1, 4, 8)).chunk(3, -1)
        with sdpa_kernel(self.kernel):  # an error where it cannot be this one
            out = F.scaled_dot_product_attention(*(t.view(-1, 4, 2, 4).transpose(1, 2) for t in qkv))
        return self.head(out.transpose(1, 2).reshape(-1, 4, 8).mean(1))


class Checkpointed(nn.Module):
    """reentrant: None for no checkpointing."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.head, self.reentrant = nn.Linear(D, 6), nn.Linear(6, C), reentrant
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 6))

    def forward(self, x):
        x = self.stem(x)
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(torch.tanh(x))


def spectral():
    model = mlp()
    spectral_norm(model[0])
    return model


def compiled(**options):
    torch._dynamo.reset()
    return torch.compile(seeded(mlp), **options)


# --- Hugging Face's models: random, tiny, not downloaded

VOCABULARY, TOKENS = 20, 6


def encoder(attention):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8)
    undisturbed = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # with dropout the CPU has no fused kernel
    config = BertConfig(vocab_size=VOCABULARY, **sizes, **undisturbed, num_labels=C, attn_implementation=attention)
    return seeded(lambda: BertForSequenceClassification(config))


def causal(attention):
    """Its input and output embeddings are one tensor."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8, initializer_range=0.2)
    undisturbed = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = seeded(lambda: GPT2LMHeadModel(GPT2Config(**sizes, **undisturbed, attn_implementation=attention)))
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def adapted(attention, base=torch.float64):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations
        lora = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)
        model = get_peft_model(causal(attention).bfloat16(), lora)
        with torch.no_grad():  # as after some training
            [p.normal_(0, 0.05) for name, p in model.named_parameters() if "lora_B" in name]
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        p.data = p.data.to(base if not p.requires_grad or base == torch.float64 else torch.float32)
    return model


def of_text(model, n=N):
    """The models' own outputs: logits, and their loss."""
    draws = torch.Generator().manual_seed(1)
    text, text_val = torch.randint(0, VOCABULARY, (2, n, TOKENS), generator=draws)
    y, y_val = torch.randint(0, C, (2, n), generator=draws)
    weights = torch.randn(n, generator=draws, dtype=torch.float64).requires_grad_()
    classes = hasattr(model.config, "id2label") and model.config.model_type == "bert"

    def train_loss(m):
        logits = m(input_ids=text).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if classes:
            return (weights.sigmoid() * F.cross_entropy(logits, y, reduction="none")).mean()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
        return (weights.sigmoid() * losses.mean(1)).mean()

    return Bilevel(model, [weights], train_loss, lambda m: m(input_ids=text_val, labels=y_val if classes else text_val).loss)


# --- rows


@contextlib.contextmanager
def default_device():
    """Tensors that name no device have no memory: nothing of an estimator may be among them."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def same(name, make, cells=None, outside=contextlib.nullcontext):
    return Row(name, make, make, cells or {}, outside)


def low(by):
    """One in bfloat16, of test_precision: of a size at which rounding averages out."""
    return precision.low(torch.bfloat16, by), precision.problem(precision.network().double())


PLAIN = lambda: problem(seeded(mlp))
LOW = {
    "evograd": Had("within 15 % for `sigma=0.02`, a warning at the default", 0.15, {"sigma": 0.02}, warned=True),
    "guided": Had("within 10 %", 0.1),
    "Trajectory": Had("within 10 %", 0.1),
    "mixed_mode": Had("within 1 %", 0.01),
    "unrolled": Had("within 1 %", 0.01),
    "finite_difference": Had("within 15 % for `radius=0.05`, an error where it is too small", 0.15, {"radius": 0.05}),
}
EVERY = lambda *refused: dict.fromkeys(ESTIMATORS, Refused(*refused))
ROWS = [
    Row("`torch.compile` (Inductor)", lambda: problem(compiled()), PLAIN, COMPILED),
    Row("`torch.compile`, `backend=\"eager\"`", lambda: problem(compiled(backend="eager")), PLAIN),
    Row(
        "`torch.compile`, double backward in the loss",
        lambda: problem(compiled(backend="aot_eager"), train=penalized),
        lambda: problem(seeded(mlp), train=penalized),
        EVERY(RuntimeError, "double backward|donated buffers", "training has it neither"),
    ),
    Row(
        "fused attention (SDPA, flash)",
        lambda: problem(seeded(lambda: Attention(SDPBackend.FLASH_ATTENTION))),
        lambda: problem(seeded(lambda: Attention(SDPBackend.MATH))),
        FUSED,
    ),
    *(
        Row(
            f"gradient checkpointing, {name}reentrant",
            lambda reentrant=reentrant: problem(seeded(lambda: Checkpointed(reentrant))),
            lambda: problem(seeded(lambda: Checkpointed(None))),
        )
        for name, reentrant in (("", True), ("non-", False))
    ),
    Row("autocast to bfloat16 in the closure", lambda: low("autocast")[0], lambda: low("autocast")[1], LOW),
    Row("bfloat16 parameters", lambda: low("parameters")[0], lambda: low("parameters")[1], LOW),
    same("tied weights", lambda: bilevel("tied")),
    Row("Hugging Face encoder (BERT)", lambda: of_text(encoder("sdpa")), lambda: of_text(encoder("eager")), FUSED),
    Row(
        "Hugging Face causal language model (GPT-2, tied)",
        lambda: of_text(causal("sdpa")),
        lambda: of_text(causal("eager")),
        FUSED,
    ),
    Row("LoRA by `peft`", lambda: of_text(adapted("sdpa")), lambda: of_text(adapted("eager")), FUSED, needs="peft"),
    Row(
        "LoRA in float32, base in bfloat16",
        lambda: of_text(adapted("sdpa", torch.bfloat16), 32),
        lambda: of_text(adapted("eager"), 32),
        {**LOW, **FUSED},
        needs="peft",
    ),
    same("BatchNorm", lambda: bilevel("batchnorm")),
    same("dropout", lambda: bilevel("dropout")),
    same("spectral_norm", lambda: problem(seeded(spectral))),
    same(
        "weight_norm",
        lambda: bilevel("weight_norm"),
        {"mixed_mode": Refused(NotImplementedError, "no formula for that.*_weight_norm_interface", NO_FORWARD_MODE)},
    ),
    same("LSTM", lambda: bilevel("lstm")),
    same("`torch.no_grad` around the call", PLAIN, outside=torch.no_grad),
    same("`torch.inference_mode` around the call", PLAIN, outside=torch.inference_mode),
    same("`torch.set_default_device`", PLAIN, outside=default_device),
]


# --- rows of several processes: each has its own part of the batch, or all of it

DDP, FSDP = "DistributedDataParallel", "FSDP2 (`fully_shard`)"
PART = {"strategy": "in_place", "share": "batch"}
OF_PROCESSES = [
    Row(
        DDP,
        lambda: nn.parallel.DistributedDataParallel(seeded(mlp)),
        PLAIN,
        {
            "evograd": Had('wrapped, `strategy="in_place", share="batch"`', settings=PART),
            "guided": Had('wrapped, `strategy="in_place", share="batch"`', settings=PART),
            "mixed_mode": Had("on `ddp.module`, each process the whole batch"),
            "unrolled": Had("on `ddp.module`, each process the whole batch"),
            "finite_difference": Had("on `ddp.module`, each process the whole batch"),
        },
    ),
    Row(
        FSDP,
        lambda: sharded(seeded(mlp)),
        PLAIN,
        {
            "mixed_mode": Refused(NotImplementedError, SHARDED, "tensors put in the shards' place are not seen"),
            "unrolled": Refused(NotImplementedError, SHARDED, "tensors put in the shards' place are not seen"),
        },
    ),
]


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in (model[0], model[-1], model):
        fully_shard(layer, mesh=mesh)
    return model


def process(rank, folder):
    """One of two processes: what each cell of OF_PROCESSES gives, in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    seen = {}
    for row in OF_PROCESSES if fully_shard is not None else OF_PROCESSES[:1]:
        for column in ESTIMATORS:
            model, settings = row.make(), dict(getattr(row.cell(column), "settings", {}))
            if row.name == DDP and settings.get("share") != "batch" and column != "Trajectory":
                of = problem(model.module)
            else:
                of = problem(model, slice(rank, None, PROCESSES))
            if "share" in settings:
                settings["group"] = dist.group.WORLD
            torch.manual_seed(SEED)
            try:
                seen[row.name, column] = ESTIMATORS[column](*of.args(), **settings).grads
            except Exception as error:
                seen[row.name, column] = f"{type(error).__name__}: {error}"
        if row.name == FSDP:
            shards = {name: local(p) for name, p in model.named_parameters()}
            torch.manual_seed(SEED)
            epsilon = SeededNoise("sign", Layout(shards), 2, None, (rank, PROCESSES))
            seen["noise"] = {(k, name): epsilon(k, name).clone() for k in range(2) for name in shards}
    dist.barrier()
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each process saw."""
    folder = tmp_path_factory.mktemp("matrix")
    server()
    processes = [CONTEXT.Process(target=process, args=(rank, folder)) for rank in range(PROCESSES)]
    [p.start() for p in processes]
    end = time.monotonic() + 120
    [p.join(max(0, end - time.monotonic())) for p in processes]
    [p.kill() for p in processes if p.is_alive()]
    assert [p.exitcode for p in processes] == [0] * PROCESSES
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


# --- the cells

CELLS = [(row, column) for row in ROWS for column in ESTIMATORS]
CELLS_OF_PROCESSES = [(row, column) for row in OF_PROCESSES for column in ESTIMATORS]


def told(cell):
    """The cell in the table."""
    return f"{'no' if isinstance(cell, Refused) else 'yes'}{': ' if cell.said else ''}{cell.said}"


def relative(found, expected):
    vectors = [torch.cat([g.double().flatten() for g in grads]) for grads in (found, expected)]
    return ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()


def expected(row, column):
    of = row.plain()
    torch.manual_seed(SEED)
    return evograd_reference(of, **row.cell(column).settings) if column == "evograd" else second_order_reference(of, LR)


def names(cells):
    return [f"{row.name}-{column}" for row, column in cells]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks, and hides it
@pytest.mark.parametrize(("row", "column"), CELLS, ids=names(CELLS))
def test_cell(row, column, record_property):
    if row.needs:
        pytest.importorskip(row.needs)
    of, cell = row.make(), row.cell(column)

    def call(settings):
        with row.outside():
            torch.manual_seed(SEED)
            return ESTIMATORS[column](*of.args(), **settings).grads

    if isinstance(cell, Refused):
        with pytest.raises(cell.kind, match=re.compile(cell.message, re.DOTALL)) as caught:
            call({})
        assert type(caught.value) is cell.kind
    else:
        assert relative(call(cell.settings), expected(row, column)) < (cell.error or ERRORS[column])
        if cell.warned:
            with pytest.warns(UserWarning, match="losses are computed in torch.bfloat16"):
                call({})
        if "an error" in cell.said:
            with pytest.raises(ValueError, match="is not resolved by torch.bfloat16"):
                call({"radius": 1e-4})
    record_property("cell", (row.name, column, told(cell)))


@pytest.mark.parametrize(("row", "column"), CELLS_OF_PROCESSES, ids=names(CELLS_OF_PROCESSES))
def test_cell_of_processes(row, column, seen, record_property):
    if (row.name, column) not in seen[0]:
        pytest.skip(f"torch {torch.__version__} has no torch.distributed.fsdp.fully_shard for CPUs")
    cell, results = row.cell(column), [one[row.name, column] for one in seen]
    if isinstance(cell, Refused):
        for result in results:
            assert re.match(f"{cell.kind.__name__}: .*{cell.message}", result, re.DOTALL)
    elif (row.name, column) == (FSDP, "evograd"):  # with the noise of the shards
        of = row.plain()
        reference = evograd_reference(of, noise=Given(of.model, [one["noise"] for one in seen]))
        assert all(relative(result, reference) < ERRORS[column] for result in results)
    else:
        reference = expected(Row(row.name, row.make, row.plain), column)
        assert all(relative(result, reference) < ERRORS[column] for result in results), results
    record_property("cell", (row.name, column, told(cell)))


def test_a_compiled_model_is_compiled_once():
    """The next step finds everything compiled, with candidates beside the model and in it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for strategy in ("stream", "in_place"):
        for column in ("evograd", "guided"):
            of = problem(compiled(backend=backend))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ESTIMATORS[column](*of.args(), strategy=strategy)
                first = len(graphs)
                for _ in range(3):
                    ESTIMATORS[column](*of.args(), strategy=strategy)
            assert len(graphs) == first > 0, (strategy, column)
            graphs.clear()


# --- the table

MARKED = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)


def table(cells):
    """Markdown of {(row, column): text}."""
    lines = [["", *(f"`{column}`" for column in ESTIMATORS)], [":--"] * (1 + len(ESTIMATORS))]
    for row in (*ROWS, *OF_PROCESSES):
        lines.append([row.name, *(cells[row.name, column] for column in ESTIMATORS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_table_is_what_the_cells_say():
    """Each of which is what its test asserts."""
    cells = {(row.name, column): told(row.cell(column)) for row, column in (*CELLS, *CELLS_OF_PROCESSES)}
    (found,) = MARKED.finditer(README.read_text(encoding="utf-8"))
    assert found[0] == found[1] + table(cells) + found[2], "python -m tests.test_matrix writes it"


class Record:
    """What the cells recorded."""

    def __init__(self):
        self.cells = {}

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name == "cell" and report.when == "call" and report.passed:
                self.cells[value[0], value[1]] = value[2]


def main():
    record = Record()
    pytest.main([str(Path(__file__).relative_to(Path.cwd())), "-k", "test_cell"], plugins=[record])
    every = [(row.name, column) for row, column in (*CELLS, *CELLS_OF_PROCESSES)]
    missing = [", ".join(cell) for cell in every if cell not in record.cells]
    if missing:
        sys.exit(f"error: nothing is written; cells without a passed test: {'; '.join(missing)}")
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKED.sub(lambda found: found[1] + table(record.cells) + found[2], text), encoding="utf-8")
    print(f"{len(record.cells)} cells: {README}")


if __name__ == "__main__":
    main()
