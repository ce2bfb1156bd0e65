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

import argparse
import contextlib
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from evograd import checkpoints, cli, distributed, hypergradient
from evograd.data import batches
from evograd.measuring import flops, peak_bytes
from evograd.quality import QualityLog, estimates
from evograd.records import check_writable, seed_everything

from .data import DATASETS, Batch, Examples, download_wikiann, load
from .models import Tagger, encoder_name, load_encoder, longest, tiny_encoder

METHODS = ("joint_training", "target_only", *cli.ESTIMATORS)
# By data set: languages, encoder, epochs (of the source sentences), sentences, longest sentence, learning rates of θ and of λ.
REAL = dict(source="en", encoder="xlm-roberta-base", epochs=20, source_size=5000, max_length=200, lr=3e-5, rtn_lr=1e-6)
TOY = dict(source="north", encoder="tiny", epochs=5, source_size=1000, max_length=64, lr=1e-3, rtn_lr=1e-3)
DEFAULTS = {"toy": TOY | {"target": "south"}, "ner": REAL | {"target": "qu"}, "sentiment": REAL | {"target": "fa"}}
# Whose copies the estimator makes: EvoGrad's perturb the classifier, the others take their step in all parameters.
PERTURB = {method: "head" if method == "evograd" else "all" for method in cli.ESTIMATORS}
# What RTNs see in the training loss of the candidates: what reaches them in each, or what did in the model, for all candidates.
# It is detached, so T1-T2 takes it as a constant; candidates that see their own differ in it.
RTN_INPUT = {"evograd": "candidate", "evograd_guided": "model", "finite_difference": "model"}
TEMPERATURE = {"evograd": 0.05, "evograd_guided": 1.0}
# η. Where the lookahead is given it is only the scale of the hypergradient; second_order takes the model's learning rate.
INNER_LR = {"evograd_guided": 0.1, "mixed_mode": 0.1, "finite_difference": 0.1}
SIGMA = {"evograd": 1e-3}
RADIUS = 0.02  # of guided candidates: σ√P, whatever P is
CANDIDATES = ("n_candidates", "sigma", "temperature", "common_random_numbers", "inner_lr")
RTN = ("perturb", "rtn_lr", "rtn_layers", "log_quality")
READS = {
    "joint_training": (),
    "target_only": (),
    "evograd": (*CANDIDATES, *RTN, "rtn_input", "share"),
    "evograd_guided": (*CANDIDATES, *RTN, "rtn_input"),
    "mixed_mode": ("inner_lr", *RTN),
    "second_order": ("inner_lr", "inner_steps", *RTN),
    "finite_difference": ("inner_lr", *RTN, "rtn_input"),
    "neumann": ("inner_lr", "inner_steps", *RTN),
    "conjugate_gradient": ("inner_steps", *RTN),
}
# These take the validation gradient after the model's update and the training loss before it: T1-T2 through the step that was
# really made, which costs one copy of the perturbed parameters and no computation.
LOOKAHEAD = ("evograd_guided", "mixed_mode", "finite_difference")
DOUBLE_BACKWARD = ("second_order", "neumann", "conjugate_gradient")


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
    parser.add_argument("--max-length", type=cli.at_least(4), help=f"sub-words of a training sentence; {by_data('max_length')}")
    parser.add_argument("--epochs", type=cli.at_least(1), help=f"of the source sentences; {by_data('epochs')}")
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
    group.add_argument("--perturb", choices=("head", "all"), help=f"parameters that the estimator works on; default: {PERTURB}")
    group.add_argument(
        "--rtn-input", choices=("candidate", "model"), help="whose states RTNs see, with --perturb all; default: by method"
    )
    cli.add_evograd_arguments(parser)
    parser.set_defaults(sigma=None)
    args = parser.parse_args(argv)
    cli.refuse_unread(parser, args, READS)
    cli.check_processes(parser, args, {})
    if args.download and args.data != "ner":
        parser.error(f"--download given, but it fetches WikiAnn, which --data {args.data} does not read")
    for name, value in DEFAULTS[args.data].items():
        if getattr(args, name) is None and not (name == "rtn_lr" and not READS[args.method]):
            setattr(args, name, value)
    args.perturb = args.perturb or PERTURB.get(args.method)
    if args.common_random_numbers and args.perturb == "head":
        parser.error(
            "--common-random-numbers given, but with --perturb head all candidates have the same features, drawn once; "
            "--perturb all reads it"
        )
    if args.method == "finite_difference" and args.perturb == "head":
        parser.error(
            "--perturb head given, but finite_difference goes back twice through features that are there once; it accepts all"
        )
    if args.rtn_input and args.perturb == "head":
        parser.error(
            f"--rtn-input {args.rtn_input} given, but with --perturb head no state below the RTNs moves; --perturb all reads it"
        )
    if args.perturb == "all":
        args.rtn_input = args.rtn_input or RTN_INPUT.get(args.method)
    halves = 2 if READS[args.method] else 1
    for flag, n in {"--batch-size": args.batch_size, "--target-size": args.target_size}.items():
        if n // halves < (args.processes or 1):
            parser.error(f"{flag} {n} is too small for {args.processes} processes: each needs a sentence of every part")
    args.temperature = args.temperature or TEMPERATURE.get(args.method)
    args.sigma = args.sigma or SIGMA.get(args.method)
    args.inner_lr = args.inner_lr or (args.lr if args.method in ("second_order", "neumann") else INNER_LR.get(args.method))
    args.out = args.out or f"metaxl/results/{args.data}.jsonl"
    return args


@dataclass
class Step:
    """The sentences of one step. target: those that train.  val: those that validate, for the methods that do."""

    source: Batch
    target: Batch
    val: Batch | None


class Trainer:
    """Tagger, its RTN, their optimizers and one step of each: what train and compare both need."""

    def __init__(self, args, model, n_steps, processes=distributed.ALONE):
        self.args, self.model, self.processes = args, model, processes
        self.hyperparameters, theta = model.hyperparameters(), model.theta()
        self.perturbed = "head." if args.perturb == "head" else ""
        self.sigma = args.sigma
        if args.method == "evograd_guided" and args.sigma is None:
            n_perturbed = sum(p.numel() for p in (model.head.parameters() if args.perturb == "head" else theta))
            self.sigma = RADIUS / n_perturbed**0.5
        # none for joint_training and target_only
        self.estimator = cli.estimators(argparse.Namespace(**{**vars(args), "sigma": self.sigma}), processes).get(args.method)
        self.theta = theta
        self.ordinary = processes.data_parallel(model, theta)  # the same parameters
        self.n_steps, self.quality = 0, QualityLog(args.seed)
        self.optimizer = torch.optim.Adam(theta, lr=args.lr)
        warm_up = max(1, n_steps // 10)
        decay = lambda step: min((step + 1) / warm_up, max(0.0, (n_steps - step) / max(1, n_steps - warm_up)))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        if self.estimator is not None:
            # T1-T2 hypergradients of an inner step of 3e-5 are no larger than Adam's usual eps, which would hold the RTN still.
            self.rtn_optimizer = torch.optim.Adam(self.hyperparameters, lr=args.rtn_lr, eps=1e-15)

    def step(self, step):
        """The model's update, then the RTN's. Returns the training loss."""
        transform = self.estimator is not None
        batches = (
            [(step.target, False)] if self.args.method == "target_only" else [(step.source, transform), (step.target, False)]
        )
        around_the_update = self.args.method in LOOKAHEAD or self.args.rtn_input == "model"
        before = {name: p.detach().clone() for name, p in self._named(self.perturbed)} if around_the_update else None
        log_quality = self.args.log_quality and self.n_steps % self.args.log_quality == 0
        everything = {name: p.detach().clone() for name, p in self._named("")} if log_quality else None

        seen, record = [], None  # by the RTNs, on the source sentences
        if self.args.rtn_input == "model" and self.processes.size > 1 and self.args.share != "batch":
            seen = self.rtn_inputs(step.source)  # of all sentences: this process trains on a part of them
        elif self.args.rtn_input == "model":
            record = seen  # the training step's own pass shows it for nothing

        loss = torch.zeros((), device=step.target.labels.device)
        self.processes.seed(self.args.seed, self.n_steps)  # of the dropout
        own = [(self.own(batch), transform) for batch, transform in batches]  # where torchrun started several processes
        parts = [(part, transform) for batch, transform in own for part in batch.split(self.args.accumulate)]
        for i, (part, transform) in enumerate(parts, start=1):
            checkpointing = self.model.checkpointing(self.args.gradient_checkpointing)
            with self.processes.averaging(self.ordinary, last=i == len(parts)), checkpointing:
                with torch.autocast(part.labels.device.type, torch.bfloat16, enabled=self.args.amp):
                    part_loss = cross_entropy(self.ordinary(part, transform, record=record), part)
                part_loss.backward(inputs=self.theta)
            loss += part_loss.detach()
        torch.nn.utils.clip_grad_norm_(self.theta, 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

        if log_quality:
            self.log_quality(step, everything)
        if self.estimator is not None:
            if self.args.share == "batch":
                step = Step(*map(self.own, (step.source, step.target, step.val)))
            self.processes.seed(self.args.seed, self.n_steps, alike=True)
            held = self.whole_batch(seen) if self.args.rtn_input == "model" else None
            for p, gradient in zip(self.hyperparameters, self.hypergradient(step, before, held).grads):
                p.grad = gradient
            self.rtn_optimizer.step()
        self.n_steps += 1
        return self.processes.mean(loss)

    def own(self, batch):
        """This process's sentences; the mean over all processes of the losses on them is that on the whole batch."""
        if self.processes.size == 1:
            return batch
        part = batch.split(self.processes.size)[self.processes.rank]
        return replace(part, share=part.share * self.processes.size)

    @torch.no_grad()
    def rtn_inputs(self, batch):
        """What each RTN sees on these sentences."""
        seen = []
        self.processes.seed(self.args.seed, self.n_steps, alike=True)
        self.model(batch, transform=True, record=seen)
        return seen

    def whole_batch(self, seen):
        """What each RTN has seen, part by part of the batch -> on the whole batch, in the parameters' dtype."""
        n = len(self.model.rtn_layers)
        return [torch.cat(seen[i::n]).to(self.theta[0].dtype) for i in range(n)]

    def hypergradient(self, step, before=None, held=None):
        """dℓ_V/dλ, in float32.

        before: the perturbed parameters before the model's update, around which candidates lie.  held: what the RTNs see.
        """
        around = {}
        if before is not None:
            around = {"parameters": before}
            if self.args.method in LOOKAHEAD:
                around["lookahead"] = dict(self._named(self.perturbed))
            if self.args.perturb == "head":
                around = {key: {n.removeprefix("head."): p for n, p in tensors.items()} for key, tensors in around.items()}
        if self.args.share:
            around["generator"] = self.processes.generator(self.args.seed, self.n_steps)
        if self.args.perturb == "head":
            train_loss, val_loss = self.head_losses(step)
            if self.args.method in ("evograd", "evograd_guided"):
                around["strategy"] = "retain"  # the candidates share the graph of x_source: one backward pass for all of them
            return self.estimator(train_loss, val_loss, self.model.head, self.hyperparameters, **around)

        train_loss, val_loss = self.losses(step, held)
        # fused attention has neither a double backward nor formulas for forward mode
        plain = self.args.method in ("mixed_mode", *DOUBLE_BACKWARD)
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            return self.estimator(train_loss, val_loss, self.model, self.hyperparameters, **around)

    def losses(self, step, held=None):
        """(ℓ_T, ℓ_V) as functions of the tagger.  held: what the RTNs see; None: what reaches them in that tagger."""

        def train_loss(model):
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

    def log_quality(self, step, before):
        """Every estimate at the parameters `before` the model's update, beside T1-T2 over all of them.

        …_head: EvoGrad perturbs the classifier alone, on cached features. Guided candidates and finite differences have RTNs
        that see what reaches them at `before`, or (…_candidate) their own states.
        """
        common = dict(inner_lr=self.args.lr, generator=self.quality.generator)
        made = dict(self._named(""))
        sigma = RADIUS / sum(p.numel() for p in self.theta) ** 0.5
        of = (self.model, self.hyperparameters)
        settings = dict(sigma=sigma, parameters=before, made=made, **common)
        with torch.random.fork_rng(devices=[d for d in [step.source.labels.device] if d.type == "cuda"]), torch.no_grad():
            held = []  # drawn as exact T1-T2 draws
            functional_call(self.model, before, (step.source,), {"transform": True, "record": held})
        own, with_held = (estimates(*self.losses(step, h), *of, **settings) for h in (None, held))
        chosen = {n: with_held[n] if n.startswith(("guided", "finite")) else estimate for n, estimate in own.items()}
        chosen |= {f"{name}_candidate": own[name] for name in ("guided_sgd", "guided_made")}

        head = {name.removeprefix("head."): p for name, p in before.items() if name.startswith("head.")}

        def on_head(n_candidates):
            problem = (*self.head_losses(step), self.model.head, self.hyperparameters)
            return hypergradient(*problem, n_candidates=n_candidates, strategy="retain", parameters=head, **common)

        chosen |= {f"evograd_k{k}_head": partial(on_head, k) for k in (2, 10, 50)}
        with sdpa_kernel(SDPBackend.MATH):
            self.quality.add(self.n_steps, chosen, step.source.labels.device)

    def state_dict(self):
        learned = {} if self.estimator is None else {"rtn_optimizer": self.rtn_optimizer.state_dict()}
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return {**parts, **learned, "quality": self.quality.state_dict(), "n_steps": self.n_steps}

    def load_state_dict(self, state):
        state = dict(state)
        self.n_steps = state.pop("n_steps")
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def _named(self, prefix):
        """Parameters of θ whose names begin so."""
        hyper = {id(p) for p in self.hyperparameters}
        return [(n, p) for n, p in self.model.named_parameters() if n.startswith(prefix) and id(p) not in hyper]


def cross_entropy(scores, batch):
    """The mean over the labelled words, in float32 at least, times the batch's share."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), batch.labels) * batch.share


class Steps:
    """Steps without end. The order is that of the seed alone: every method sees the same sentences."""

    def __init__(self, args, source, target):
        self.args, self.source, self.target = args, source, target
        self.random = torch.Generator().manual_seed(args.seed)
        self.source_batches = batches(len(source), args.batch_size, self.random)
        self.target_batches = batches(len(target), args.batch_size, self.random)
        self.validates = bool(READS[args.method])

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
def predict(model, examples, device, labels, batch_size=32):
    """The predicted labels of every sentence, as the sentences have them. Words that were cut off are "O"."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples.examples[i].ids))
    predicted = []
    for start in range(0, len(order), batch_size):
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
    return {str(layer): torch.cat(values).mean().item() for layer, values in zip(model.rtn_layers, means)}


def prepare(args):
    """(tagger, {"source", "train", "dev", "test"}: Examples, labels). ValueError or OSError for what does not fit."""
    sizes = dict(source_size=args.source_size, target_size=args.target_size, dev_size=args.dev_size)
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
    rtn_layers = (args.rtn_layers or [encoder.config.num_hidden_layers]) if READS[args.method] else ()
    seed_everything(args.seed)  # the head is drawn before the RTN: the same for every method
    model = Tagger(encoder, len(corpus.labels), rtn_layers).to(args.device)
    # Training sentences are cut at --max-length, the others only where the encoder ends.
    examples = {
        name: Examples(some, tokenizer, corpus.labels, args.max_length if name in ("source", "train") else limit, args.data)
        for name, some in sentences.items()
    }
    return model, examples, corpus.labels


def main(argv=None):
    args = parse_args(argv)
    with distributed.processes(args.device) as processes:
        run(args, processes)


def run(args, processes):
    keeper = checkpoints.Keeper(args, "metaxl", {**cli.config_of(args), "encoder": encoder_name(args.encoder)}, processes)
    with cli.exit_on_bad_input():
        check_writable(args.out)
        if keeper.done():
            return
        found = keeper.resume()
        with processes.first_alone():
            for language in (args.source, args.target) if args.download else ():
                download_wikiann(args.data_dir, language)
        model, examples, labels = prepare(args)
    what = f"metaxl {args.data} {args.source}-{args.target} {args.method} seed {args.seed}"
    cut = {name: e.n_cut for name, e in examples.items() if e.n_cut}
    if cut:
        print(f"{what}: sentences that are too long and are cut: {cut}. In dev and test the lost words count as O")
    steps_an_epoch = max(1, len(examples["source"]) // args.batch_size)
    trainer = Trainer(args, model, args.epochs * steps_an_epoch, processes)
    model.train()
    start_of_lambda = [p.detach().clone() for p in trainer.hyperparameters]
    data = Steps(args, examples["source"], examples["train"])
    gold = {split: [s.labels for s in examples[split].sentences] for split in ("dev", "test")}
    score = lambda split: f1(args.data, gold[split], predict(model, examples[split], args.device, labels))

    dev_f1, losses, best, best_epoch, seconds = [], [], None, None, 0.0
    epoch_losses = []  # tensors on the device, read at the end of the epoch
    if found:
        trainer.load_state_dict(found["trainer"])
        data.load_state_dict(found["data"])
        dev_f1, losses, seconds = found["dev_f1"], found["losses"], found["seconds"]
        best, best_epoch = found["best"], found["best_epoch"]
        epoch_losses = [loss.to(args.device) for loss in found["epoch_losses"]]
    state = lambda: {
        "trainer": trainer.state_dict(),
        "data": data.state_dict(),
        "dev_f1": dev_f1,
        "losses": losses,
        "best": best,
        "best_epoch": best_epoch,
        "seconds": seconds + perf_counter() - start,
        "epoch_losses": epoch_losses,
    }
    progress = keeper.progress(args.epochs * steps_an_epoch, what)
    start = perf_counter()
    with keeper:
        for step in keeper.steps(args.epochs * steps_an_epoch, state):
            epoch_losses.append(trainer.step(next(data)))
            progress.update()
            if (step + 1) % steps_an_epoch:
                continue
            losses.append(keeper.mean(epoch_losses))
            epoch_losses = []
            seconds += perf_counter() - start
            dev_f1.append(score("dev"))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", dev_f1=f"{dev_f1[-1]:.1f}")
            if dev_f1[-1] == max(dev_f1):  # of equal ones the last
                best = {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()}
                best_epoch = (step + 1) // steps_an_epoch
            start = perf_counter()
    progress.close()

    last = [p.detach().clone() for p in trainer.hyperparameters]
    model.load_state_dict(best)
    metrics = {
        "test_f1": score("test"),
        "dev_f1": max(dev_f1),
        "best_epoch": best_epoch,
        "dev_f1_epochs": dev_f1,
        "train_loss_epochs": losses,
    }
    if trainer.hyperparameters:
        norm = lambda tensors: torch.cat([t.flatten() for t in tensors]).norm().item()
        moved = [b - a for a, b in zip(start_of_lambda, last)]
        metrics["rtn_moved"] = norm(moved) / norm(start_of_lambda)  # ‖λ − λ₀‖ / ‖λ₀‖
        metrics["sigma"] = trainer.sigma
        metrics["gates"] = {
            args.source: gates(model, examples["source"], args.device),
            args.target: gates(model, examples["dev"], args.device),
        }
        if args.log_quality:
            metrics |= trainer.quality.metrics()
    args.log_quality = None  # what follows is the step's own cost
    step = lambda: trainer.step(next(data))  # after the training, whose result is taken
    cost = {
        "seconds": seconds,
        "seconds_per_step": seconds / (args.epochs * steps_an_epoch),
        "peak_bytes": peak_bytes(step),
        "flops": flops(step),
    }
    keeper.record(metrics, cost)
    result = f"test F1 {metrics['test_f1']:.2f} %, dev F1 {metrics['dev_f1']:.2f} % (epoch {best_epoch}), {seconds:.0f} s"
    print(f"{what}: {result}")


if __name__ == "__main__":
    main()
