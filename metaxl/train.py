"""Learn how to transform a rich language's representations so that a low-resource language learns from them (MetaXL).

    python -m metaxl.train --method evograd                                       two generated languages, seconds on a CPU
    python -m metaxl.train --method evograd --data ner --data-dir DIR --target qu --encoder xlm-roberta-base       the paper's
    torchrun --nproc-per-node 4 -m metaxl.train ...                               the same in four processes

A tagger is trained on many sentences of a source language and a few of a target language. A representation transformation
network (RTN) works on the source sentences; its parameters are hyperparameters, learned by hypergradients of the loss on the
other half of each batch of target sentences. Dev F1 chooses the epoch whose parameters are tested, once. The record of the run
(test F1, dev F1 of each epoch, the RTN's gates, cost of a step) is appended to --out as one JSON line.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from evograd import hypergradient
from evograd.lab import cli
from evograd.lab.checkpoints import Keeper
from evograd.lab.data import batches
from evograd.lab.methods import MetaStep, baseline, learned, optimizer, table
from evograd.lab.processes import ALONE, processes
from evograd.lab.records import seed_everything
from evograd.measuring import flops, launches, peak_bytes

from .data import DATASETS, Batch, Examples, data_fingerprint, download_wikiann, load
from .models import Tagger, encoder_fingerprint, encoder_name, load_encoder, longest, tiny_encoder

# perturb: whose copies the estimator makes: EvoGrad's perturb the classifier, the others take their step in all parameters.
# rtn_input: what RTNs see in the training loss of the candidates: what reaches them in each, or what did in the model, for all.
# It is detached, so T1-T2 takes it as a constant; candidates that see their own differ in it.
# inner_lr, η: where the lookahead is given it is only the scale of the hypergradient; the others take the model's learning rate.
OF_RTN = ("rtn_lr", "rtn_layers")
METHODS = table(
    baseline("joint_training"),
    baseline("target_only"),
    learned("evograd", holds="rtn_input", temperature=0.05, sigma=1e-3, perturb="head", rtn_input="candidate"),
    learned("evograd_guided", around="step", holds="rtn_input", inner_lr=0.1, perturb="all", rtn_input="model"),
    learned("mixed_mode", around="step", inner_lr=0.1, perturb="all"),
    learned("second_order", perturb="all"),
    learned("second_order_functional", perturb="all"),
    learned("finite_difference", around="step", holds="rtn_input", inner_lr=0.1, perturb="all", rtn_input="model"),
    learned("neumann", perturb="all"),
    learned("conjugate_gradient", perturb="all"),
    reads=("perturb", *OF_RTN),
) | table(learned("trajectory", perturb="all", rtn_input="model", horizon=5), reads=OF_RTN)
CLIP = 10.0  # norm of the gradients
# By data set: languages, encoder, epochs (of the source sentences), sentences, longest sentence, learning rates of θ and of λ.
REAL = dict(source="en", encoder="xlm-roberta-base", epochs=20, source_size=5000, max_length=200, lr=3e-5, rtn_lr=1e-6)
TOY = dict(source="north", encoder="tiny", epochs=5, source_size=1000, max_length=64, lr=1e-3, rtn_lr=1e-3)
DEFAULTS = {"toy": TOY | {"target": "south"}, "ner": REAL | {"target": "qu"}, "sentiment": REAL | {"target": "fa"}}


def parse_args(argv=None):
    parser = cli.experiment_parser(__doc__, METHODS, DATASETS)
    by_data = lambda name: "default: " + ", ".join(f"{values[name]} ({data})" for data, values in DEFAULTS.items())
    parser.add_argument("--source", metavar="LANGUAGE", help=f"folder of --data-dir; {by_data('source')}")
    parser.add_argument("--target", metavar="LANGUAGE", help=f"folder of --data-dir; {by_data('target')}")
    parser.add_argument(
        "--download", action="store_true", help="fetch WikiAnn's languages that are not in --data-dir (--data ner)"
    )
    parser.add_argument("--encoder", metavar="FOLDER", help=f"folder or hub name of an encoder, or tiny; {by_data('encoder')}")
    parser.add_argument("--source-size", type=cli.at_least(1), help=f"training sentences; {by_data('source_size')}")
    parser.add_argument("--target-size", type=cli.at_least(2), default=100, help="training sentences")
    parser.add_argument("--dev-size", type=cli.at_least(1), help="dev sentences, the first ones; default: all")
    parser.add_argument("--test-size", type=cli.at_least(1), help="test sentences, the first ones; default: all")
    parser.add_argument("--max-length", type=cli.at_least(4), help=f"sub-words of a training sentence; {by_data('max_length')}")
    parser.add_argument("--epochs", type=cli.at_least(1), help=f"of the source sentences; {by_data('epochs')}")
    parser.add_argument(
        "--eval-every", type=cli.at_least(1), metavar="N", help="dev F1 every N epochs, and after the last; default: 1"
    )
    parser.add_argument("--batch-size", type=cli.at_least(2), default=12, help="source sentences, and as many target sentences")
    parser.add_argument("--accumulate", type=cli.at_least(1), default=1, metavar="N", help="work a batch off in N parts")
    parser.add_argument("--amp", action="store_true", help="the model's update under autocast to bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in the model's update")
    parser.add_argument("--lr", type=cli.positive, help=f"of the model's Adam; {by_data('lr')}")
    group = parser.add_argument_group("representation transformation")
    group.add_argument("--rtn-lr", type=cli.positive, help=f"of the RTN's Adam; {by_data('rtn_lr')}")
    group.add_argument(
        "--rtn-layers", type=cli.at_least(1), nargs="+", metavar="N", help="after these layers; default: the last"
    )
    group.add_argument("--perturb", choices=("head", "all"), help="parameters that the estimator works on; default: by method")
    group.add_argument(
        "--rtn-input", choices=("candidate", "model"), help="whose states RTNs see, with --perturb all; default: by method"
    )
    cli.add_evograd_arguments(parser)
    parser.set_defaults(sigma=None)
    args = parser.parse_args(argv)
    given = args.rtn_input
    cli.settle(parser, args, METHODS, {})
    if args.download and args.data != "ner":
        parser.error(f"--download given, but it fetches WikiAnn, which --data {args.data} does not read")
    learns = METHODS[args.method].estimator is not None
    for name, value in DEFAULTS[args.data].items():
        if getattr(args, name) is None and (learns or name != "rtn_lr"):
            setattr(args, name, value)
    if args.perturb == "head":
        check_head(parser, args, given)
    for flag, n in {"--batch-size": args.batch_size, "--target-size": args.target_size}.items():
        if n // (2 if learns else 1) < (args.processes or 1):
            parser.error(f"{flag} {n} is too small for {args.processes} processes: each needs a sentence of every part")
    if args.method in ("second_order", "second_order_functional", "neumann"):
        args.inner_lr = args.inner_lr or args.lr
    args.out = args.out or f"metaxl/results/{args.data}.jsonl"
    return args


def check_head(parser, args, rtn_input):
    """Where the classifier alone is perturbed: what cannot be had, and what has no meaning."""
    if args.common_random_numbers:
        parser.error(
            "--common-random-numbers given, but with --perturb head all candidates have the same features, drawn once; "
            "--perturb all reads it"
        )
    if args.method == "finite_difference":
        parser.error(
            "--perturb head given, but finite_difference goes back twice through features that are there once; it accepts all"
        )
    if rtn_input:
        parser.error(
            f"--rtn-input {rtn_input} given, but with --perturb head no state below the RTNs moves; --perturb all reads it"
        )
    args.rtn_input = None


@dataclass
class Step:
    """The sentences of one step. target: those that train.  val: those that validate, for the methods that do."""

    source: Batch
    target: Batch
    val: Batch | None


class Trainer:
    """Tagger, its RTN, their optimizers and one step of each: what train and compare both need."""

    def __init__(self, args, model, n_steps, processes=ALONE):
        self.args, self.model, self.processes = args, model, processes
        self.hyperparameters, self.theta = model.hyperparameters(), model.theta()
        self.perturbed = "head." if args.perturb == "head" else ""
        self.meta = MetaStep(METHODS[args.method], args, processes)
        self.ordinary = processes.data_parallel(model, self.theta)  # the same parameters
        self.n_steps = 0
        self.optimizer = optimizer(torch.optim.Adam, self.theta, lr=args.lr)
        warm_up = max(1, n_steps // 10)
        decay = lambda step: min((step + 1) / warm_up, max(0.0, (n_steps - step) / max(1, n_steps - warm_up)))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        if self.meta.learns:
            # T1-T2 hypergradients of an inner step of 3e-5 are no larger than Adam's usual eps, which would hold the RTN still.
            self.meta_optimizer = torch.optim.Adam(self.hyperparameters, lr=args.rtn_lr, eps=1e-15)
        self.trajectory = self.meta.trajectory_of(self.ordinary, self.optimizer, self.hyperparameters)

    def step(self, step):
        """The model's update, then the RTN's. Returns the training loss."""
        if self.trajectory is not None:
            return self.remembered_step(step)
        own, step = self.processes.divide(step, self.args.share, self.part)
        before = self.meta.remember(self._named("" if self.meta.compares else self.perturbed))
        held = self.rtn_inputs(step.source) if self.meta.holds and own is not step else None
        seen = [] if self.meta.holds and own is step else None  # by the RTNs: the pass of this step shows it for nothing

        with self.meta.pattern(own is step and self.args.accumulate == 1 and not self.perturbed):
            loss = self.backward(own, seen)
        torch.nn.utils.clip_grad_norm_(self.theta, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

        if self.meta.learns:
            self.learn(self.hypergradient(step, before, held if seen is None else self.whole_batch(seen)))
        self.n_steps += 1
        return self.processes.mean(loss)

    def remembered_step(self, step):
        """The model's update, which the trajectory makes, and the RTN's where its horizon is reached."""
        own, _ = self.processes.divide(step, self.args.share, self.part)
        self.processes.seed(self.args.seed, self.n_steps)  # of the dropout
        parts = self.parts(own)

        def loss_on(part, transform):
            seen = []  # by the RTNs in the training step, and held in later passes of it

            def part_loss(model):
                held, record = (self.whole_batch(seen), None) if seen else (None, seen)
                with torch.autocast(part.labels.device.type, torch.bfloat16, enabled=self.args.amp):
                    return len(parts) * cross_entropy(model(part, transform, held, record), part)

            return part_loss

        with self.model.checkpointing(self.args.gradient_checkpointing):
            loss = self.trajectory.step([loss_on(*part) for part in parts], clip_norm=CLIP)
        self.schedule.step()
        if len(self.trajectory) == self.args.horizon:
            self.optimizer.zero_grad()
            self.learn(self.trajectory.hypergradient(lambda model: cross_entropy(model(own.val), own.val)))
        self.n_steps += 1
        return self.processes.mean(loss)

    def learn(self, result):
        for p, gradient in zip(self.hyperparameters, result.grads):
            p.grad = gradient
        self.meta_optimizer.step()

    def backward(self, step, record):
        """Gradients by θ of the loss on source and target sentences, --accumulate parts at a time. Returns the loss."""
        self.processes.seed(self.args.seed, self.n_steps)  # of the dropout
        parts = self.parts(step)
        loss = torch.zeros((), device=step.target.labels.device)
        for i, (part, transform) in enumerate(parts, start=1):
            checkpointing = self.model.checkpointing(self.args.gradient_checkpointing)
            with self.processes.averaging(self.ordinary, last=i == len(parts)), checkpointing:
                with torch.autocast(part.labels.device.type, torch.bfloat16, enabled=self.args.amp):
                    part_loss = cross_entropy(self.ordinary(part, transform, record=record), part)
                part_loss.backward(inputs=self.theta)
            loss += part_loss.detach()
        return loss

    def parts(self, step):
        """(what trains, whether it is transformed), --accumulate parts of each. Their losses add up to the training loss."""
        chosen = [(step.target, False)]
        if self.args.method != "target_only":
            chosen.insert(0, (step.source, self.meta.learns))
        return [(part, transform) for batch, transform in chosen for part in batch.split(self.args.accumulate)]

    def part(self, step):
        """This process's sentences; the mean over all processes of the losses on them is that on the whole batches."""

        def own(batch):
            part = batch.split(self.processes.size)[self.processes.rank]
            return replace(part, share=part.share * self.processes.size)

        return Step(own(step.source), own(step.target), None if step.val is None else own(step.val))

    @torch.no_grad()
    def rtn_inputs(self, batch, model=None):
        """What each RTN sees on these sentences."""
        seen = []
        self.processes.seed(self.args.seed, self.n_steps, alike=True)
        (model or self.model)(batch, transform=True, record=seen)
        return self.whole_batch(seen)

    def whole_batch(self, seen):
        """What each RTN has seen, part by part of the batch -> on the whole batch, in the parameters' dtype."""
        n = len(self.model.rtn_layers)
        return [torch.cat(seen[i::n]).to(self.theta[0].dtype) for i in range(n)]

    def hypergradient(self, step, before=None, held=None):
        """dℓ_V/dλ, in float32.  before: θ before the model's update, around which candidates lie.  held: what the RTNs see."""
        self.processes.seed(self.args.seed, self.n_steps, alike=True)
        settings = dict(held=held, lr=self.args.lr, compared=partial(self.estimates, step, before))
        if self.args.share:
            settings["generator"] = self.processes.generator(self.args.seed, self.n_steps)
        if self.args.perturb == "head":
            if self.args.method in ("evograd", "evograd_guided"):
                settings["strategy"] = "retain"  # the candidates share the graph of x_source: one backward pass for all of them
            return self.meta(*self.head_losses(step), self.model.head, self.hyperparameters, of_head(before), **settings)
        # fused attention has neither a double backward nor formulas for forward mode
        with contextlib.nullcontext() if self.meta.method.estimator.first_order else sdpa_kernel(SDPBackend.MATH):
            return self.meta(*self.losses(step), self.model, self.hyperparameters, before, **settings)

    def losses(self, step):
        """(ℓ_T, ℓ_V) as functions of the tagger.  held: what the RTNs see; None: what reaches them in that tagger."""

        def train_loss(model, held=None):
            on_source = cross_entropy(model(step.source, transform=True, held=held), step.source)
            return on_source + cross_entropy(model(step.target), step.target)

        def val_loss(model):
            return cross_entropy(model(step.val), step.val)

        return train_loss, val_loss

    def head_losses(self, step):
        """The same as functions of the classifier.

        The encoder is the same for all candidates: one pass for each batch, of which only the RTN and what lies above it have
        a graph.
        """
        with torch.no_grad():
            x_target, x_val = self.model.cached_features(step.target), self.model.cached_features(step.val)
        x_source = self.model.cached_features(step.source, transform=True)

        def train_loss(head):
            return cross_entropy(head(x_source), step.source) + cross_entropy(head(x_target), step.target)

        def val_loss(head):
            return cross_entropy(head(x_val), step.val)

        return train_loss, val_loss

    def estimates(self, step, before):
        """Every estimate at θ `before` the model's update, over all of it; …_head: EvoGrad perturbs the classifier, on features."""
        problem = (*self.losses(step), self.model, self.hyperparameters)
        see = lambda model: self.rtn_inputs(step.source, model)
        chosen = self.meta.estimates(*problem, before, lr=self.args.lr, held=see)

        def on_head(n_candidates):
            settings = dict(inner_lr=self.args.lr, generator=self.meta.quality.generator, strategy="retain")
            problem = (*self.head_losses(step), self.model.head, self.hyperparameters)
            return hypergradient(*problem, n_candidates=n_candidates, parameters=of_head(before), **settings)

        chosen |= {f"evograd_k{k}_head": partial(on_head, k) for k in (2, 10, 50)}
        return {name: partial(_with_plain_attention, estimate) for name, estimate in chosen.items()}

    def state_dict(self):
        learned = {"rtn_optimizer": self.meta_optimizer.state_dict()} if self.meta.learns else {}
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return {**parts, **learned, "quality": self.meta.state_dict(), "n_steps": self.n_steps}

    def load_state_dict(self, state):
        self.n_steps = state["n_steps"]
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        if self.meta.learns:
            self.meta_optimizer.load_state_dict(state["rtn_optimizer"])
        self.meta.load_state_dict({"n_calls": self.n_steps, **state["quality"]})

    def _named(self, prefix):
        """Parameters of θ whose names begin so."""
        hyper = {id(p) for p in self.hyperparameters}
        return [(n, p) for n, p in self.model.named_parameters() if n.startswith(prefix) and id(p) not in hyper]


def of_head(parameters):
    """The classifier's among the tagger's parameters, by the names that they have there."""
    if parameters is None:
        return None
    return {name.removeprefix("head."): p for name, p in parameters.items() if name.startswith("head.")}


def _with_plain_attention(estimate):
    with sdpa_kernel(SDPBackend.MATH):
        return estimate()


def cross_entropy(scores, batch):
    """The mean over the labelled words, in float32 at least, times the batch's share; 0 where there are none."""
    if not len(batch.labels):
        return scores.sum()  # of nothing, with a graph: the mean would be NaN
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), batch.labels) * batch.share


class Steps:
    """Steps without end. The order is that of the seed alone: every method sees the same sentences."""

    def __init__(self, args, source, target):
        self.args, self.source, self.target = args, source, target
        self.random = torch.Generator().manual_seed(args.seed)
        self.source_batches = batches(len(source), args.batch_size, self.random)
        self.target_batches = batches(len(target), args.batch_size, self.random)
        self.validates = METHODS[args.method].estimator is not None

    def __iter__(self):
        return self

    def __next__(self):
        source_index, target_index = next(self.source_batches).tolist(), next(self.target_batches).tolist()
        # of the target sentences the first half trains, the second validates
        half = len(target_index) // 2 if self.validates else len(target_index)
        return Step(
            self.source.batch(source_index, self.args.device),
            self.target.batch(target_index[:half], self.args.device),
            self.target.batch(target_index[half:], self.args.device) if self.validates else None,
        )

    def state_dict(self):
        order = {name: getattr(self, name).state_dict() for name in ("source_batches", "target_batches")}
        return {**order, "random": self.random.get_state()}

    def load_state_dict(self, state):
        for name in ("source_batches", "target_batches"):
            getattr(self, name).load_state_dict(state[name])
        self.random.set_state(state["random"])


@torch.no_grad()
def predict(model, examples, device, labels, batch_size=32, look=lambda: None):
    """The predicted labels of every sentence, as the sentences have them. Words that were cut off are "O".

    look: called before each batch.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples.examples[i].ids))
    predicted = []
    for start in range(0, len(order), batch_size):
        look()
        predicted.append(model(examples.batch(order[start : start + batch_size], device)).argmax(1))
    model.train()
    predicted = iter(torch.cat(predicted).tolist())
    result = [["O"] * len(sentence.labels) for sentence in examples.sentences]
    for i in order:
        for word in examples.examples[i].words:
            result[i][word] = labels[next(predicted)]
    return result


def f1(task, gold, predicted):
    """Per cent. Tags: of entities, micro (seqeval). Sentiment: mean over the two classes."""
    if task == "sentiment":
        from sklearn.metrics import f1_score

        return 100 * f1_score(sum(gold, []), sum(predicted, []), average="macro", zero_division=0)
    from seqeval.metrics import f1_score

    return 100 * float(f1_score(gold, predicted, zero_division=0))


@torch.no_grad()
def gates(model, examples, device):
    """{layer: mean of sigmoid(g) over the labelled sub-words of the first 200 sentences}, one for each RTN."""
    means, hooks = [[] for _ in model.rtn_layers], []
    batch = None
    for values, rtn in zip(means, model.rtns()):

        def keep(module, inputs, output, values=values):
            g = output[..., -1]
            values.append(torch.sigmoid(g.flatten()[batch.positions] if output.dim() == 3 else g))

        hooks.append(rtn.outer.register_forward_hook(keep))
    model.eval()
    for start in range(0, min(200, len(examples)), 20):
        batch = examples.batch(range(start, min(start + 20, len(examples))), device)
        model(batch, transform=True)
    model.train()
    for hook in hooks:
        hook.remove()
    means = torch.stack([torch.cat(values).mean() for values in means]).tolist()
    return {str(layer): mean for layer, mean in zip(model.rtn_layers, means)}


def prepare(args):
    """(tagger, {"source", "train", "dev", "test"}: Examples, labels, remarks). ValueError or OSError for what does not fit."""
    sizes = dict(source_size=args.source_size, target_size=args.target_size, dev_size=args.dev_size, test_size=args.test_size)
    corpus = load(args.data, args.data_dir, args.source, args.target, **sizes, seed=args.seed)
    seed_everything(args.seed)
    sentences = {"source": corpus.source, **corpus.target}
    if args.encoder == "tiny":
        encoder, tokenizer = tiny_encoder(corpus.source + corpus.target["train"])
    else:
        encoder, tokenizer = load_encoder(args.encoder)
    limit = longest(encoder, tokenizer)
    if args.max_length > limit:
        raise ValueError(
            f"--max-length {args.max_length} is longer than the limit of the encoder: "
            f"{encoder_name(args.encoder)} takes {limit} sub-words"
        )
    if args.gradient_checkpointing and not encoder.supports_gradient_checkpointing:
        raise ValueError(f"--gradient-checkpointing: {type(encoder).__name__} has none")
    rtn_layers = (args.rtn_layers or [encoder.config.num_hidden_layers]) if METHODS[args.method].estimator else ()
    seed_everything(args.seed)  # the head is drawn before the RTN: the same for every method
    model = Tagger(encoder, len(corpus.labels), rtn_layers).to(args.device)
    # Training sentences are cut at --max-length, the others only where the encoder ends.
    examples = {
        name: Examples(some, tokenizer, corpus.labels, args.max_length if name in ("source", "train") else limit, args.data)
        for name, some in sentences.items()
    }
    check_examples(examples, encoder, encoder_name(args.encoder))
    return model, examples, corpus.labels, corpus.remarks() if args.data == "ner" else []


def check_examples(examples, encoder, name):
    """ValueError for sentences that the encoder cannot take or that teach nothing."""
    for split, some in examples.items():
        if not any(example.labels for example in some.examples):
            raise ValueError(f"{split}: of {len(some)} sentences no word has a sub-word of {name}'s tokenizer")
    known = encoder.get_input_embeddings().num_embeddings
    largest = max(max(some.pad, *e.ids) for some in examples.values() for e in some.examples)
    if largest >= known:
        raise ValueError(
            f"--encoder {name}: its tokenizer gives the sub-word {largest}, but the encoder knows {known} of them, from 0; "
            "the tokenizer must be the encoder's own"
        )


def describe(trainer, data, start, last):
    """What the RTN has learned. data: {language: sentences}.  start, last: λ before and after training."""
    norm = lambda tensors: torch.cat([t.flatten() for t in tensors]).norm().item()
    return {
        "rtn_moved": norm([b - a for a, b in zip(start, last)]) / norm(start),  # ‖λ − λ₀‖ / ‖λ₀‖
        "gates": {language: gates(trainer.model, examples, trainer.args.device) for language, examples in data.items()},
        **trainer.meta.metrics(),
    }


def main(argv=None):
    args = parse_args(argv)
    with processes(args.device) as several:
        run(args, several)


def run(args, processes):
    with cli.exit_on_bad_input():
        with processes.first_alone():
            for language in (args.source, args.target) if args.download else ():
                download_wikiann(args.data_dir, language)
        read = data_fingerprint(args.data, args.data_dir, args.source, args.target)
        of_encoder = {"encoder": encoder_name(args.encoder), "encoder_fingerprint": encoder_fingerprint(args.encoder)}
        config = {**cli.config_of(args), **of_encoder, "fingerprint": read}
        keeper = Keeper(args, "metaxl", config, processes)
        found = keeper.start()
        if found is None:
            return
        model, examples, labels, remarks = prepare(args)
    what = f"metaxl {args.data} {args.source}-{args.target} {args.method} seed {args.seed}"
    for remark in remarks:
        print(f"{what}: {remark}")
    cut = {name: e.n_cut for name, e in examples.items() if e.n_cut}
    if cut:
        print(f"{what}: sentences that are too long and are cut: {cut}. In dev and test the lost words count as O")
    steps_an_epoch = max(1, len(examples["source"]) // args.batch_size)
    n_steps = args.epochs * steps_an_epoch
    trainer = Trainer(args, model.train(), n_steps, processes)
    start_of_lambda = [p.detach().clone() for p in trainer.hyperparameters]
    data = Steps(args, examples["source"], examples["train"])
    gold = {split: [s.labels for s in examples[split].sentences] for split in ("dev", "test")}
    score = lambda split: f1(args.data, gold[split], predict(model, examples[split], args.device, labels, look=keeper.look))

    # losses: of this epoch, tensors on the device, read at its end
    seen = {"dev_f1": [], "losses": [], "best": None, "best_epoch": None, "epoch_losses": []}
    if found:
        trainer.load_state_dict(found["trainer"])
        data.load_state_dict(found["data"])
        seen = {name: found[name] for name in seen}
        seen["epoch_losses"] = [loss.to(args.device) for loss in seen["epoch_losses"]]
    state = lambda: {"trainer": trainer.state_dict(), "data": data.state_dict(), **seen}

    languages = {args.source: examples["source"], args.target: examples["dev"]}
    evaluate = partial(evaluated, keeper, trainer, score, seen, languages)
    with keeper:
        if len(seen["losses"]) > len(seen["dev_f1"]):  # the run was stopped while it evaluated
            evaluate(len(seen["losses"]))
        for step in keeper.steps(n_steps, state, what, whole=lambda: trainer.meta.whole):
            seen["epoch_losses"].append(trainer.step(next(data)))
            if (step + 1) % steps_an_epoch:
                continue
            seen["losses"].append(keeper.mean(seen["epoch_losses"]))
            seen["epoch_losses"] = []
            evaluate((step + 1) // steps_an_epoch)

        with keeper.paused():
            last_of_lambda = [p.detach().clone() for p in trainer.hyperparameters]
            metrics = tested(trainer, score, seen)
            if trainer.meta.learns:
                metrics |= describe(trainer, languages, start_of_lambda, last_of_lambda)
            finish(keeper, what, trainer, data, n_steps, metrics)


def dev_f1(seen):
    """Of the epochs that were evaluated."""
    return [found for found in seen["dev_f1"] if found is not None]


def evaluated(keeper, trainer, score, seen, languages, epoch):
    """Dev F1 after this epoch, if it is its turn."""
    args, model = trainer.args, trainer.model
    with keeper.paused():
        now = epoch % (args.eval_every or 1) == 0 or epoch == args.epochs
        found = score("dev") if now else None
        seen["dev_f1"].append(found)
        if now and found == max(dev_f1(seen)):  # of equal ones the last
            seen["best"] = {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()}
            seen["best_epoch"] = epoch
        shown = {"dev_f1": found} if now else {}
        if keeper.board is not None and now and trainer.meta.learns:
            for language, some in languages.items():
                means = gates(model, some, args.device).values()
                shown[f"gate_{language}"] = sum(means) / len(means)
        keeper.show(loss=seen["losses"][-1], **shown)


def tested(trainer, score, seen):
    """Test F1 of the parameters that dev F1 chose, which the model has afterwards."""
    model = trainer.model
    trained = {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()}
    trainer.meta.forget()
    model.load_state_dict(seen["best"])
    try:
        found = {"test_f1": score("test"), "dev_f1": max(dev_f1(seen)), "best_epoch": seen["best_epoch"]}
    except BaseException:
        model.load_state_dict(trained)  # a checkpoint holds these
        raise
    return {**found, "dev_f1_epochs": seen["dev_f1"], "train_loss_epochs": seen["losses"]}


def finish(keeper, what, trainer, data, n_steps, metrics):
    """Say what came out, measure the step's own cost, now that the training's result is taken, and record both."""
    keeper.show(test_f1=metrics["test_f1"])
    result = f"test F1 {metrics['test_f1']:.2f} %, dev F1 {metrics['dev_f1']:.2f} % (epoch {metrics['best_epoch']})"
    print(f"{what}: {result}, {keeper.clock.seconds:.0f} s")
    if not metrics["test_f1"]:
        print(f"{what}: nothing was found rightly: nothing was learned. More --epochs or another --lr may help.")
    trainer.args.log_quality = None

    n = trainer.args.horizon or 1  # steps of which one has a meta-update

    def steps_alone():
        for _ in range(n):
            keeper.look()
            trainer.step(next(data))

    counts = {"flops": flops, "launches": launches}
    each = lambda: {name: counted(steps_alone) // n for name, counted in counts.items()}
    costs = lambda: {"peak_bytes": peak_bytes(steps_alone), **each()}
    keeper.record(metrics, {"seconds_per_step": keeper.clock.seconds / n_steps}, costs)


if __name__ == "__main__":
    main()
