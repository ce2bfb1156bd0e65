"""Learn by how much the validation images are rotated, as a hyperparameter of the training data.

    python -m rotation.train --method evograd                                          embedded digits, half a minute on a CPU
    python -m rotation.train --method evograd --data mnist --data-dir DIR --seed 1     the paper's
    torchrun --nproc-per-node 4 -m rotation.train ...                                  the same in four processes

Training images are upright, validation and test images are rotated by 30 degrees. One learnable angle, at first 0, rotates
the training images, and is learned by hypergradients of the validation loss. The record of the run (accuracy on the rotated
and on the upright test images, the angle over training, cost of a step) is appended to --out as one JSON line.
"""

import math
from time import perf_counter

import torch
import torch.nn.functional as F

from evograd import checkpoints, cli, distributed
from evograd.data import batches
from evograd.measuring import measure
from evograd.quality import QualityLog, estimates
from evograd.records import check_writable, seed_everything

from .data import DATASETS, TRUE_ANGLE, download_mnist, load, normalize, rotate
from .model import lenet

METHODS = ("baseline", *cli.ESTIMATORS)
EPOCHS = {"digits": 20, "mnist": 5}  # of 7 and 312 steps
# τ. A guided perturbation is σ√P = 0.25 long, in the one direction that matters: with the paper's temperature the softmax is
# nearly one-hot, and little is left of the difference of the candidates.
TEMPERATURE = {"evograd": 0.05, "evograd_guided": 1.0}
# η. With a given lookahead it is only the scale of the hypergradient, which Adam does not see; second_order takes the model's.
INNER_LR = {"evograd_guided": 0.1, "mixed_mode": 0.1, "finite_difference": 0.1, "second_order": 1e-3, "neumann": 1e-3}
CANDIDATES = ("n_candidates", "sigma", "temperature", "common_random_numbers", "inner_lr")
READS = {
    "baseline": (),
    "evograd": (*CANDIDATES, "share", "log_quality"),
    "evograd_guided": (*CANDIDATES, "log_quality"),
    "mixed_mode": ("inner_lr", "log_quality"),
    "second_order": ("inner_lr", "inner_steps", "log_quality"),
    "finite_difference": ("inner_lr", "log_quality"),
    "neumann": ("inner_lr", "inner_steps", "log_quality"),
    "conjugate_gradient": ("inner_steps", "log_quality"),
}
# These take the validation gradient after the model's update and the training loss before it: T1-T2 through the step that was
# really made, which costs one copy of the parameters and no computation.
LOOKAHEAD = ("evograd_guided", "mixed_mode", "finite_difference")


def parse_args(argv=None):
    parser = cli.experiment_parser(__doc__, METHODS, DATASETS)
    parser.add_argument("--download", action="store_true", help="fetch MNIST into --data-dir if it is not there")
    parser.add_argument("--epochs", type=cli.at_least(1), help=f"default: {EPOCHS}")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=128, help="of training and of validation images")
    parser.add_argument("--lr", type=cli.positive, default=1e-3, help="of the model's Adam")
    parser.add_argument("--angle-lr", type=cli.positive, default=1e-2, help="of the angle's Adam")
    cli.add_evograd_arguments(parser)
    args = parser.parse_args(argv)
    cli.refuse_unread(parser, args, READS)
    cli.check_processes(parser, args, {"--batch-size": args.batch_size})
    args.epochs = args.epochs or EPOCHS[args.data]
    args.temperature = args.temperature or TEMPERATURE.get(args.method)
    args.inner_lr = args.inner_lr or INNER_LR.get(args.method)
    args.out = args.out or f"rotation/results/{args.data}.jsonl"
    return args


class Trainer:
    """Model, angle, their optimizers and one step of each: what train and compare both need."""

    def __init__(self, args, train, val, processes=distributed.ALONE):
        self.args, self.train, self.processes = args, train, processes
        self.x_val, self.y_val = rotated(val, TRUE_ANGLE)
        self.estimator = cli.estimators(args, processes).get(args.method)  # none for the baseline
        self.model = lenet().to(args.device)
        self.ordinary = processes.data_parallel(self.model, self.model.parameters())  # the same parameters
        self.angle = torch.zeros((), device=args.device, requires_grad=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.angle_optimizer = torch.optim.Adam([self.angle], lr=args.angle_lr)
        self.random = torch.Generator().manual_seed(args.seed)  # its own: every method sees the same batches
        self.train_batches = batches(len(train), args.batch_size, self.random)
        self.val_batches = batches(len(val), args.batch_size, self.random)
        self.n_steps, self.quality = 0, QualityLog(args.seed)

    def step(self):
        """The model's update on rotated training images, then the angle's. Returns the training loss."""
        x, y = self.train.batch(next(self.train_batches))
        val_index = next(self.val_batches).to(y.device)
        own_x, own_y = self.processes.part(x), self.processes.part(y)  # where torchrun started several processes
        if self.args.share == "batch":
            x, y, val_index = own_x, own_y, self.processes.part(val_index)

        def train_loss(model, x=x, y=y):
            return F.cross_entropy(model(normalize(x if self.estimator is None else rotate(x, self.angle))), y)

        def val_loss(model):
            return F.cross_entropy(model(self.x_val[val_index]), self.y_val[val_index])

        around, made = {}, dict(self.model.named_parameters())
        log_quality = self.args.log_quality and self.n_steps % self.args.log_quality == 0
        if self.args.method in LOOKAHEAD or log_quality:
            before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.args.method in LOOKAHEAD:
            around = {"parameters": before, "lookahead": made}

        loss = train_loss(self.ordinary, own_x, own_y)
        loss.backward(inputs=list(self.model.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad()  # their memory is free for the candidates
        if log_quality:
            problem = (train_loss, val_loss, self.model, [self.angle])
            settings = dict(inner_lr=INNER_LR["second_order"], generator=self.quality.generator, sigma=self.args.sigma)
            self.quality.add(self.n_steps, estimates(*problem, parameters=before, made=made, **settings), self.args.device)
        if self.estimator is not None:
            result = self.estimator(train_loss, val_loss, self.model, [self.angle], **around)
            self.angle.grad = result.grads[0]
            self.angle_optimizer.step()
        self.n_steps += 1
        return self.processes.mean(loss.detach())

    PARTS = ("model", "optimizer", "angle_optimizer", "train_batches", "val_batches", "quality")

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {**parts, "angle": self.angle.detach(), "random": self.random.get_state(), "n_steps": self.n_steps}

    def load_state_dict(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.angle.data.copy_(state["angle"])
        self.random.set_state(state["random"])
        self.n_steps = state["n_steps"]


def rotated(split, angle):
    """(normalised images turned by `angle` radians, labels) of a whole split."""
    x, y = split.batch(torch.arange(len(split)))
    return normalize(rotate(x, angle) if angle else x), y


@torch.no_grad()
def accuracy(model, images, labels):
    """Per cent of the images that the model classifies correctly."""
    correct = sum((model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000)))
    return 100 * correct.item() / len(labels)


def main(argv=None):
    args = parse_args(argv)
    with distributed.processes(args.device) as processes:
        run(args, processes)


def run(args, processes):
    keeper = checkpoints.Keeper(args, "rotation", cli.config_of(args), processes)
    with cli.exit_on_bad_input():
        check_writable(args.out)
        if keeper.done():
            return
        found = keeper.resume()
        if args.download:
            download_mnist(args.data_dir)
        train, val, test = load(args.data, args.data_dir, args.device)
        for split, what in ((train, "training images"), (val, "validation images")):
            processes.check_equal_parts(min(len(split), args.batch_size), what)
    seed_everything(args.seed)
    trainer = Trainer(args, train, val, processes)

    steps_an_epoch = max(1, len(train) // args.batch_size)
    n_steps = args.epochs * steps_an_epoch
    angles, losses = [], []  # tensors on the device, read when all is done
    if found:
        trainer.load_state_dict(found["trainer"])
        angles, losses = (list(found[name].to(args.device)) for name in ("angles", "losses"))
    start = perf_counter() - found.get("seconds", 0)
    state = lambda: {
        "trainer": trainer.state_dict(),
        "angles": torch.stack(angles),
        "losses": torch.stack(losses[-max(50, steps_an_epoch) :]),
        "seconds": perf_counter() - start,
    }
    label = f"rotation {args.data} {args.method} seed {args.seed}"
    progress = keeper.progress(n_steps, label)
    with keeper:
        for step in keeper.steps(n_steps, state):
            losses.append(trainer.step())
            angles.append(trainer.angle.detach().clone())
            progress.update()
            if step % 50 == 0 or step + 1 == n_steps:
                loss, angle = keeper.mean(losses[-50:]), math.degrees(angles[-1].item())
                progress.set_postfix(loss=f"{loss:.3f}", angle=f"{angle:.1f} deg")
    progress.close()
    angles = torch.rad2deg(torch.stack(angles)).tolist()
    seconds = perf_counter() - start

    every = max(1, n_steps // 200)
    metrics = {
        "accuracy_rotated": accuracy(trainer.model, *rotated(test, TRUE_ANGLE)),
        "accuracy_upright": accuracy(trainer.model, *rotated(test, 0)),
        "train_loss": torch.stack(losses[-steps_an_epoch:]).mean(),
    }
    if args.method != "baseline":
        metrics["angle"] = angles[-1]
        metrics["angle_last_epoch"] = sum(angles[-steps_an_epoch:]) / steps_an_epoch
        metrics["angle_steps"] = list(range(0, n_steps, every))
        metrics["angles"] = [round(angle, 3) for angle in angles[::every]]
        if args.log_quality:
            metrics |= trainer.quality.metrics()
    args.log_quality = None  # what follows is the step's own cost
    step_cost = measure(trainer.step, repeats=5, warmup=1)  # after the training, whose result is taken
    cost = {
        "seconds": seconds,
        "seconds_per_step": step_cost.seconds,
        "peak_bytes": step_cost.peak_bytes,
        "flops": step_cost.flops,
    }
    keeper.record(metrics, cost)
    result = f"{metrics['accuracy_rotated']:.2f} % rotated, {metrics['accuracy_upright']:.2f} % upright"
    result += f", angle {metrics['angle']:.1f} degrees" if "angle" in metrics else ""
    print(f"{label}: {result}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
