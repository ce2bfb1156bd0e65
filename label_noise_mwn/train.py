"""Learn from noisy labels: a weight net gives each sample its weight by its loss, and is learned on a few clean images.

    python -m label_noise_mwn.train --method evograd_guided                             embedded digits, under a minute on a CPU
    python -m label_noise_mwn.train --method evograd --data cifar10 --data-dir DIR      the paper's
    python -m label_noise_mwn.train --method evograd --data FILE.npz                    arrays x_train, y_train, x_test, y_test,
                                                                                        and y_noisy for --noise given
    torchrun --nproc-per-node 4 -m label_noise_mwn.train ...                            the same in four processes

Meta-Weight-Net (Shu et al., NeurIPS 2019): the training loss is a weighted mean over the batch, with weights from a net of one
hidden layer whose input is the sample's loss. Its parameters are the hyperparameters λ; the validation loss of the bilevel
problem is that of the clean meta images. The record of the run (accuracies over epochs, weights of clean and of noisy samples,
noise as it was drawn, cost of a step) is appended to --out as one JSON line.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from evograd.lab import cli
from evograd.lab.checkpoints import Keeper
from evograd.lab.data import batches
from evograd.lab.methods import MetaStep, baseline, learned, optimizer, table
from evograd.lab.processes import ALONE, processes
from evograd.lab.records import seed_everything, step_cost
from evograd.measuring import measure

from .data import DATASETS, NOISES, data_fingerprint, load, make_task
from .models import MODELS, weight_net

# weight_input: whose losses the weight net sees: each candidate's own, as in the authors' code, or those of the model for all.
# horizon: through one step some weight nets turn over, see README.md.
OF_WEIGHT_NET = ("meta_optimizer", "meta_lr", "normalize_weights")
METHODS = table(
    baseline("cross_entropy"),
    learned("evograd", holds="weight_input", temperature=0.05, weight_input="candidate"),
    learned("evograd_guided", around="step", holds="weight_input", weight_input="model"),
    learned("mixed_mode", around="step", weight_input="model"),
    learned("second_order", weight_input="model"),
    learned("second_order_functional", weight_input="model"),
    learned("finite_difference", around="step", holds="weight_input", weight_input="model"),
    learned("neumann", weight_input="model"),
    learned("conjugate_gradient", weight_input="model"),
    reads=("meta_every", *OF_WEIGHT_NET),
) | table(learned("trajectory", weight_input="model", horizon=5), reads=OF_WEIGHT_NET)
CIFAR = dict(
    model="resnet32", epochs=60, meta_images=1000, val_images=1000, lr=0.1, crop_padding=4, flip=True,
    meta_optimizer="sgd", meta_lr=1e-3,
)  # fmt: skip
DIGITS = dict(
    model="small", epochs=60, meta_images=100, val_images=100, lr=0.05, crop_padding=1, flip=False,
    meta_optimizer="adam", meta_lr=3e-3,
)  # fmt: skip
MOMENTUM = dict(momentum=0.9, nesterov=True, weight_decay=5e-4)  # of the model's SGD and of the weight net's
LOSS_GRID = torch.linspace(0, 10, 101)  # at which the learned weight is recorded


def parse_args(argv=None):
    parser = cli.experiment_parser(__doc__, METHODS, DATASETS, data_file=".npz")
    add = parser.add_argument
    add("--download", action="store_true", help="fetch the data set into --data-dir if it is not there")
    add("--noise", choices=NOISES, default="flip2", help="how training labels are made wrong; given: they are (y_noisy)")
    add("--noise-level", type=float, metavar="P", help="probability in [0, 1]; default: 0.4")
    add("--train-images", type=cli.at_least(1), metavar="N", help="use N noisy training images; default: all that are left")
    add("--meta-images", type=cli.at_least(1), metavar="N", help="clean images for the weight net; default: 1000, digits 100")
    add("--val-images", type=cli.at_least(1), metavar="N", help="clean images that choose the best epoch; default: likewise")
    add("--model", choices=list(MODELS), help="default: resnet32, digits small (a ResNet-8 of 8, 16, 32 channels)")
    add("--width", type=cli.at_least(1), metavar="N", help="N times the model's channels, or an MLP's 256 units; default: 1")
    add("--epochs", type=cli.at_least(1), help="default: 60; the rate is divided by 10 after 2/3 and after 5/6 of them")
    add("--eval-every", type=cli.at_least(1), metavar="N", help="evaluate every N epochs and after the last; default: 1")
    add("--batch-size", type=cli.at_least(1), default=100, help="of noisy and of meta images")
    add("--lr", type=cli.positive, help="of the model's SGD (Nesterov 0.9, weight decay 5e-4); default: 0.1, digits 0.05")
    add("--crop-padding", type=cli.at_least(0), metavar="N", help="reflected pixels around a random crop; default: 4, digits 1")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror one image in two; default: all data but digits")
    add("--amp", action="store_true", help="bfloat16 autocast in the ordinary step; hypergradients stay in float32")
    add("--channels-last", action="store_true", help="memory format of images and model")
    add(
        "--compile", nargs="?", const=True, default=False, choices=(True, "reduce-overhead"), metavar="MODE",
        help="torch.compile the model for the ordinary step and for candidates; reduce-overhead: on CUDA as CUDA graphs",
    )  # fmt: skip
    group = parser.add_argument_group("weight net")
    add = group.add_argument
    add("--meta-every", type=cli.at_least(1), default=1, metavar="N", help="one meta-update every N steps")
    add("--meta-optimizer", choices=("sgd", "adam"), help="default: sgd (momentum and decay as the model's), digits adam")
    add("--meta-lr", type=cli.positive, help="default: 1e-3, digits 3e-3")
    add("--weight-input", choices=("candidate", "model"), help="whose losses the weight net sees; default: by method")
    add("--normalize-weights", action=argparse.BooleanOptionalAction, default=True, help="divide weights by their sum")
    cli.add_evograd_arguments(parser)
    args = parser.parse_args(argv)

    cli.settle(parser, args, METHODS, {"--batch-size": args.batch_size})
    if args.compile and args.log_quality:
        parser.error("--compile given, but not all estimators of --log-quality can use it; leave out one of them")
    if args.noise == "given" and args.noise_level is not None:
        parser.error("--noise-level given, but with --noise given the labels are noisy already")
    if args.noise != "given" and args.noise_level is None:
        args.noise_level = 0.4
    for name, value in (DIGITS if args.data == "digits" else CIFAR).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.width = None if args.width == 1 else args.width  # the same configuration as in records that are older than the flag
    args.out = args.out or f"label_noise_mwn/results/{data_name(args)}.jsonl"
    return args


def data_name(args):
    """The data set's name, or that of the npz file without its folder, and without .npz unless a data set has that name."""
    file = Path(args.data)
    return file.name if file.stem in DATASETS and args.data not in DATASETS else file.stem


class Trainer:
    """Model, weight net, their optimizers and one step of each: what train and compare both need."""

    def __init__(self, args, task, processes=ALONE):
        self.args, self.task, self.processes = args, task, processes
        self.meta = MetaStep(METHODS[args.method], args, processes)
        self.format = torch.channels_last if args.channels_last else torch.contiguous_format
        with args.device:
            self.model = MODELS[args.model](task.n_classes, tuple(task.train.images.shape[1:]), args.width or 1)
            self.weight_net = weight_net()  # for every method, so that all have the same random numbers from here on
        if args.channels_last:
            self.model = self.model.to(memory_format=self.format)
        # The same parameters, or what the estimators put in their place.
        mode = None if args.compile is True else args.compile
        self.compiled = torch.compile(self.model, mode=mode) if args.compile else self.model
        self.ordinary = processes.data_parallel(self.compiled, self.model.parameters())
        self.optimizer = optimizer(torch.optim.SGD, self.model.parameters(), lr=args.lr, **MOMENTUM)
        if args.meta_optimizer == "sgd":
            self.meta_optimizer = torch.optim.SGD(self.weight_net.parameters(), lr=args.meta_lr, **MOMENTUM)
        else:
            self.meta_optimizer = torch.optim.Adam(self.weight_net.parameters(), lr=args.meta_lr)
        # Their own generators, on the device: every method sees the same batches, and no index has to be sent there.
        self.random = torch.Generator(args.device).manual_seed(args.seed)
        self.meta_random = torch.Generator(args.device).manual_seed(args.seed + 1)
        self.train_batches = batches(len(task.train), args.batch_size, self.random)
        self.meta_batches = batches(len(task.meta), args.batch_size, self.meta_random)
        self.trajectory = self.meta.trajectory_of(self.ordinary, self.optimizer, list(self.weight_net.parameters()))
        self.n_steps = 0

    def batch(self):
        """Noisy images and labels, then meta images and labels: (what this process trains on, what its estimator sees)."""
        batch = self.images(self.task.train, next(self.train_batches), self.random)
        if self.meta.learns:  # in every step, so that --meta-every does not change who comes next
            batch += self.images(self.task.meta, next(self.meta_batches), self.meta_random)
        return self.processes.divide(batch, self.args.share)

    def images(self, split, index, generator):
        images = self.task.augmented(split.images[index], self.args.crop_padding, self.args.flip, generator)
        return images.contiguous(memory_format=self.format), split.labels[index]

    def weighted_mean(self, losses, inputs, total=torch.sum):
        """Σ v_i ℓ_i / Σ v_i over the batch, with weights v of the weight net at `inputs`, losses that are held constant.

        total: of the weights, where these losses are those of a part of the batch.
        """
        if not self.meta.learns:
            return losses.mean()
        weights = self.weight_net(inputs.detach().unsqueeze(1)).squeeze(1)
        return (weights * losses).sum() / (total(weights).clamp_min(1e-8) if self.args.normalize_weights else len(losses))

    def step(self):
        """One update of the weight net (if it is its turn) and one of the model. Returns the training loss."""
        own, batch = self.batch()
        if self.trajectory is not None:
            return self.remembered_step(*own)
        x, y, *_ = own
        meta_turn = self.meta.learns and self.n_steps % self.args.meta_every == 0
        if meta_turn and not self.meta.around:  # the paper's order
            self.meta_step(batch)

        before = self.meta.remember(self.model.named_parameters()) if meta_turn else None
        with self.meta.pattern(meta_turn and own is batch):
            with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp):
                logits = self.ordinary(x)
            losses = F.cross_entropy(logits.float(), y, reduction="none")
            loss = self.weighted_mean(losses, losses, lambda weights: self.processes.mean(weights.sum()))
        loss.backward(inputs=list(self.model.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad()  # their memory is free for the candidates
        self.processes.average_buffers(self.model)

        if meta_turn and self.meta.around:  # this step has the losses that the weight net needs, and shows where θ goes
            known = losses.detach()
            self.meta_step(batch, before, known if self.args.share == "batch" else self.processes.whole(known))
        self.n_steps += 1
        return self.processes.mean(loss.detach())

    def meta_step(self, batch, before=None, known=None):
        """The weight net's update. known: the samples' losses at θ; EvoGrad has its own scale, T1-T2 the model's current rate."""
        x, y, x_meta, y_meta = batch  # with --share batch weights are divided by their sum in the process's part

        def sample_losses(model):
            return F.cross_entropy(self.logits(model, x), y, reduction="none")

        def train_loss(model, inputs=None):
            losses = sample_losses(model)
            return self.weighted_mean(losses, losses if inputs is None else inputs)

        def val_loss(model):
            return F.cross_entropy(self.logits(model, x_meta), y_meta)

        problem = (train_loss, val_loss, self.model, list(self.weight_net.parameters()))
        self.learn(self.meta(*problem, before, held=sample_losses if known is None else known, lr=self.lr))

    def remembered_step(self, x, y, x_meta, y_meta):
        """One update of the model, which the trajectory makes, and one of the weight net where its horizon is reached."""
        known = []  # the samples' losses in the training step, which the weight net sees in later passes of it too

        def train_loss(model):
            with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp):
                logits = model(x)
            losses = F.cross_entropy(logits.float(), y, reduction="none")
            if not known:
                known.append(losses.detach())
            return self.weighted_mean(losses, *known)  # of several processes each divides by the weights of its own part

        loss = self.trajectory.step(train_loss)
        self.processes.average_buffers(self.model)
        if len(self.trajectory) == self.args.horizon:
            self.optimizer.zero_grad()  # their memory is free for the candidates
            self.learn(self.trajectory.hypergradient(lambda model: F.cross_entropy(model(x_meta), y_meta)))
        self.n_steps += 1
        return self.processes.mean(loss)

    def learn(self, result):
        for p, gradient in zip(self.weight_net.parameters(), result.grads):
            p.grad = gradient
        self.meta_optimizer.step()

    def logits(self, model, x):
        """model(x), compiled where that is asked for and helps: forward mode and double backward fall back, and only lose."""
        return (self.compiled if self.meta.method.estimator.first_order and model is self.model else model)(x)

    @property
    def lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def parts(self):
        """What a checkpoint holds, by the names that it has there."""
        names = ("model", "weight_net", "optimizer", "meta_optimizer", "train_batches", "meta_batches")
        return {name: getattr(self, name) for name in names} | {"quality": self.meta}

    def state_dict(self):
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        random = {"random": self.random.get_state(), "meta_random": self.meta_random.get_state()}
        return {**parts, **random, "n_steps": self.n_steps}

    def load_state_dict(self, state):
        self.n_steps = state["n_steps"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name] if name != "quality" else {"n_calls": self.n_steps, **state[name]})
        self.random.set_state(state["random"])
        self.meta_random.set_state(state["meta_random"])


@torch.no_grad()
def losses_and_accuracy(model, task, split, look=lambda: None):
    """((n,) losses, per cent of correct labels), in eval mode and without augmentation. look: called before each batch."""
    model.eval()
    losses, correct = [], 0
    for images, labels in zip(split.images.split(1000), split.labels.split(1000)):
        look()
        logits = model(task.normalize(images))
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        correct += (logits.argmax(1) == labels).sum()
    model.train()
    return torch.cat(losses), 100 * correct.item() / len(split)


@torch.no_grad()
def learned_weights(net: nn.Module, losses):
    return net(losses.unsqueeze(1)).squeeze(1)


def describe_weights(net, losses, noisy):
    """How the weights tell clean samples from noisy ones: area under the ROC curve, histograms over [0, 1].

    noisy: None if it is not known which are; the only histogram is then that of all.
    """
    weights = learned_weights(net, losses).cpu()
    if noisy is None:
        all_of_them = torch.histc(weights, 25, 0, 1).long()
        return {"weight_auc": None, "weights_clean": None, "weights_noisy": None, "weights_all": all_of_them}
    noisy = noisy.cpu()
    both = noisy.any() and not noisy.all()
    return {
        "weight_auc": float(roc_auc_score((~noisy).numpy(), weights.numpy())) if both else None,
        "weights_clean": torch.histc(weights[~noisy], 25, 0, 1).long(),
        "weights_noisy": torch.histc(weights[noisy], 25, 0, 1).long(),
    }


def describe(trainer, task, curves, weight_curves, look=lambda: None):
    """The metrics of a run that has ended. Of the epochs that were not evaluated, curves have None."""
    evaluated = [epoch for epoch, accuracy in enumerate(curves["val_accuracy"]) if accuracy is not None]
    best = max(evaluated, key=lambda epoch: curves["val_accuracy"][epoch])
    matrix, known = task.noise_matrix, task.noise_matrix is not None  # known: of the noisy images, the true labels
    noisy = task.train.labels != task.train.clean
    metrics = {
        "test_accuracy_last": curves["test_accuracy"][-1],
        "test_accuracy_best": curves["test_accuracy"][best],  # of the epoch that the validation images choose
        "best_epoch": best + 1,
        **curves,
        "noise_rate": noisy.double().mean() if known else None,
        # Row by row, the labels that a class is given with what probability; those that are zero left out.
        "noise_matrix": [{j: round(p, 6) for j, p in enumerate(row) if p > 0} for row in matrix.tolist()] if known else None,
    }
    if not trainer.meta.learns:
        return metrics
    return {
        **metrics,
        **describe_weights(
            trainer.weight_net, losses_and_accuracy(trainer.model, task, task.train, look)[0], noisy if known else None
        ),
        "weight_losses": [round(value, 3) for value in LOSS_GRID.tolist()],
        "weight_curves": {e: [round(w, 4) for w in curve.tolist()] for e, curve in weight_curves.items()},
        **trainer.meta.metrics(),
    }


def main(argv=None):
    args = parse_args(argv)
    with processes(args.device) as several:
        run(args, several)


def run(args, processes):
    with cli.exit_on_bad_input():
        config = {**cli.config_of(args), "data": data_name(args), "fingerprint": data_fingerprint(args.data, args.data_dir)}
        keeper = Keeper(args, "label_noise_mwn", config, processes)
        found = keeper.start()
        if found is None:
            return
        with processes.first_alone():
            source = load(args.data, args.data_dir, args.download)
        task = make_task(
            source, args.noise, args.noise_level, args.meta_images, args.val_images, args.train_images, args.seed, args.device
        )
        task.check_padding(args.crop_padding)
        cli.check_batch(args.batch_size, len(task.train), "training images")
        for split, what in ((task.train, "training images"), (task.meta, "meta images")):
            processes.check_equal_parts(min(len(split), args.batch_size), what)
    seed_everything(args.seed)
    trainer = Trainer(args, task, processes)
    scheduler = MultiStepLR(trainer.optimizer, [round(args.epochs * 2 / 3), round(args.epochs * 5 / 6)])

    steps_an_epoch = max(1, len(task.train) // args.batch_size)
    label = f"label noise {data_name(args)} {args.noise} {args.noise_level} {args.method} seed {args.seed}"
    curves = {"train_loss": [], "val_accuracy": [], "test_accuracy": []}
    weight_curves = {0: learned_weights(trainer.weight_net, LOSS_GRID.to(args.device))}
    losses = []  # of this epoch: tensors on the device, read when it is done
    if found:
        trainer.load_state_dict(found["trainer"])
        scheduler.load_state_dict(found["scheduler"])
        curves, weight_curves = found["curves"], found["weight_curves"]
        losses = [loss.to(args.device) for loss in found["losses"]]
    state = lambda: {
        "trainer": trainer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "curves": curves,
        "weight_curves": weight_curves,
        "losses": losses,
    }

    evaluate = partial(evaluated, keeper, trainer, task, curves, weight_curves)
    with keeper:
        if len(curves["train_loss"]) > len(curves["val_accuracy"]):  # the run was stopped while it evaluated
            evaluate(len(curves["train_loss"]))
        for step in keeper.steps(args.epochs * steps_an_epoch, state, label, whole=lambda: trainer.meta.whole):
            losses.append(trainer.step())
            if (step + 1) % steps_an_epoch:
                continue
            scheduler.step()
            curves["train_loss"].append(keeper.mean(losses))
            losses = []
            evaluate((step + 1) // steps_an_epoch)

        with keeper.paused():
            finish(keeper, label, trainer, task, describe(trainer, task, curves, weight_curves, keeper.look))


def evaluated(keeper, trainer, task, curves, weight_curves, epoch):
    """Accuracies after this epoch, if it is its turn; the curves get them together, when both are there."""
    args, seen = trainer.args, {}
    if epoch % (args.eval_every or 1) == 0 or epoch == args.epochs:
        splits = {"val": task.val, "test": task.test}
        seen = {part: losses_and_accuracy(trainer.model, task, split, keeper.look) for part, split in splits.items()}
    for part in ("val", "test"):
        curves[f"{part}_accuracy"].append(seen[part][1] if seen else None)
    if epoch in {round(args.epochs * part) for part in (0.1, 0.25, 0.5, 1)}:
        weight_curves[epoch] = learned_weights(trainer.weight_net, LOSS_GRID.to(args.device))
    shown = {name: values[-1] for name, values in curves.items() if values[-1] is not None}
    if seen and trainer.meta.learns:  # of the validation images, whose labels are right
        shown["weight"] = learned_weights(trainer.weight_net, seen["val"][0]).mean().item()
    keeper.show(**shown)


def finish(keeper, label, trainer, task, metrics):
    """Say what came out, measure the step's own cost, now that the training's result is taken, and record both."""
    auc, last, best = metrics.get("weight_auc"), metrics["test_accuracy_last"], metrics["test_accuracy_best"]
    keeper.show(test_accuracy_best=best, **({} if auc is None else {"weight_auc": auc}))
    result = f"test accuracy {last:.2f} % at the end, {best:.2f} % at the best epoch ({metrics['best_epoch']})"
    result += "" if auc is None else f", area under the ROC curve of the weights {auc:.3f}"
    print(f"{label}: {result}, {keeper.clock.seconds:.0f} s")
    cli.say_if_chance(label, last, task.test.labels.tolist(), "A lower --lr or more --epochs may help.")
    if auc is not None and auc < 0.5:
        print(f"{label}: the weights are larger for wrong labels than for right ones. Another --meta-lr or more epochs may help.")
    trainer.args.log_quality = None
    trainer.meta.forget()
    n = trainer.args.horizon or 1  # of them one has a meta-update

    def steps_alone():
        for _ in range(n):
            keeper.look()
            trainer.step()

    keeper.record(metrics, {}, lambda: step_cost(measure(steps_alone, repeats=5, warmup=1), n))


if __name__ == "__main__":
    main()
