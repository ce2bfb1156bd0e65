"""Learn by how much the validation images are rotated, as a hyperparameter of the training data.

    python -m rotation.train --method evograd                                          embedded digits, half a minute on a CPU
    python -m rotation.train --method evograd --data mnist --data-dir DIR --seed 1     the paper's
    torchrun --nproc-per-node 4 -m rotation.train ...                                  the same in four processes

Training images are upright, validation and test images are rotated by 30 degrees. One learnable angle, at first 0, rotates
the training images, and is learned by hypergradients of the validation loss. The record of the run (accuracy on the rotated
and on the upright test images, the angle over training, cost of a step) is appended to --out as one JSON line.
"""

import math

import torch
import torch.nn.functional as F

from evograd.lab import cli
from evograd.lab.checkpoints import Keeper
from evograd.lab.data import batches
from evograd.lab.methods import MetaStep, baseline, learned, optimizer, table
from evograd.lab.processes import ALONE, processes
from evograd.lab.records import seed_everything, step_cost
from evograd.measuring import measure

from .data import DATASETS, TRUE_ANGLE, data_fingerprint, download_mnist, load, normalize, rotate
from .model import lenet

# inner_lr, η: where the lookahead is the step that was made it is only the scale of the hypergradient, which Adam does not see;
# the others take the model's.
METHODS = table(
    baseline("baseline"),
    learned("evograd", temperature=0.05),
    learned("evograd_guided", around="step", inner_lr=0.1),
    learned("mixed_mode", around="step", inner_lr=0.1),
    learned("second_order", inner_lr=1e-3),
    learned("second_order_functional", inner_lr=1e-3),
    learned("finite_difference", around="step", inner_lr=0.1),
    learned("neumann", inner_lr=1e-3),
    learned("conjugate_gradient"),
    learned("trajectory", horizon=1),
)
TESTED = {"accuracy_rotated": TRUE_ANGLE, "accuracy_upright": 0}  # how the test images are turned
EPOCHS = {"digits": 20, "mnist": 5}  # of 7 and 312 steps


def parse_args(argv=None):
    parser = cli.experiment_parser(__doc__, METHODS, DATASETS)
    parser.add_argument("--download", action="store_true", help="fetch MNIST into --data-dir if it is not there")
    parser.add_argument("--epochs", type=cli.at_least(1), help=f"default: {EPOCHS}")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=128, help="of training and of validation images")
    parser.add_argument("--lr", type=cli.positive, default=1e-3, help="of the model's Adam")
    parser.add_argument("--angle-lr", type=cli.positive, default=1e-2, help="of the angle's Adam")
    cli.add_evograd_arguments(parser)
    args = parser.parse_args(argv)
    cli.settle(parser, args, METHODS, {"--batch-size": args.batch_size})
    args.epochs = args.epochs or EPOCHS[args.data]
    args.out = args.out or f"rotation/results/{args.data}.jsonl"
    return args


class Trainer:
    """Model, angle, their optimizers and one step of each: what train and compare both need."""

    def __init__(self, args, train, val, processes=ALONE):
        self.args, self.train, self.processes = args, train, processes
        self.x_val, self.y_val = rotated(val, TRUE_ANGLE)
        self.meta = MetaStep(METHODS[args.method], args, processes)
        self.model = lenet().to(args.device)
        self.ordinary = processes.data_parallel(self.model, self.model.parameters())  # the same parameters
        self.angle = torch.zeros((), device=args.device, requires_grad=True)
        self.optimizer = optimizer(torch.optim.Adam, self.model.parameters(), lr=args.lr)
        self.meta_optimizer = torch.optim.Adam([self.angle], lr=args.angle_lr)
        self.trajectory = self.meta.trajectory_of(self.ordinary, self.optimizer, [self.angle])
        # Its own, on the device: every method sees the same batches, and no index has to be sent there.
        self.random = torch.Generator(args.device).manual_seed(args.seed)
        self.train_batches = batches(len(train), args.batch_size, self.random)
        self.val_batches = batches(len(val), args.batch_size, self.random)

    def batch(self):
        """Training images and labels, and which validation images: (what this process trains on, what its estimator sees)."""
        x, y = self.train.batch(next(self.train_batches))
        return self.processes.divide((x, y, next(self.val_batches)), self.args.share)

    def losses(self, x, y, val_index):
        """(ℓ_T, ℓ_V) as functions of the model."""

        def train_loss(model):
            return F.cross_entropy(model(normalize(rotate(x, self.angle) if self.meta.learns else x)), y)

        def val_loss(model):
            return F.cross_entropy(model(self.x_val[val_index]), self.y_val[val_index])

        return train_loss, val_loss

    def step(self):
        """The model's update on rotated training images, then the angle's. Returns the training loss."""
        own, batch = self.batch()
        own_loss, _ = self.losses(*own)
        train_loss, val_loss = self.losses(*batch)
        if self.trajectory is not None:  # which makes the update, and remembers it
            loss = self.trajectory.step(train_loss)
            if len(self.trajectory) == self.args.horizon:
                self.optimizer.zero_grad()
                self.learn(self.trajectory.hypergradient(val_loss))
            return self.processes.mean(loss)
        before = self.meta.remember(self.model.named_parameters())

        with self.meta.pattern(own is batch):
            loss = own_loss(self.ordinary)
            loss.backward(inputs=list(self.model.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad()  # their memory is free for the candidates

        if self.meta.learns:
            self.learn(self.meta(train_loss, val_loss, self.model, [self.angle], before, lr=self.args.lr))
        return self.processes.mean(loss.detach())

    def learn(self, result):
        self.angle.grad = result.grads[0]
        self.meta_optimizer.step()

    def parts(self):
        """What a checkpoint holds, by the names that it has there."""
        names = ("model", "optimizer", "train_batches", "val_batches")
        return {name: getattr(self, name) for name in names} | {"angle_optimizer": self.meta_optimizer, "quality": self.meta}

    def state_dict(self):
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return {**parts, "angle": self.angle.detach(), "random": self.random.get_state()}

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name] if name != "quality" else {"n_calls": state.get("n_steps"), **state[name]})
        self.angle.data.copy_(state["angle"])
        self.random.set_state(state["random"])


def rotated(split, angle):
    """(normalised images turned by `angle` radians, labels) of a whole split."""
    x, y = split.batch(torch.arange(len(split), device=split.labels.device))
    return normalize(rotate(x, angle) if angle else x), y


@torch.no_grad()
def accuracy(model, images, labels, look=lambda: None):
    """Per cent of the images that the model classifies correctly. look: called before each batch."""
    correct = 0
    for x, y in zip(images.split(1000), labels.split(1000)):
        look()
        correct += (model(x).argmax(1) == y).sum()
    return 100 * correct.item() / len(labels)


def describe_angles(angles, steps_an_epoch):
    """The learned angle over training, in degrees."""
    every = max(1, len(angles) // 200)
    return {
        "angle": angles[-1],
        "angle_last_epoch": sum(angles[-steps_an_epoch:]) / steps_an_epoch,
        "angle_steps": list(range(0, len(angles), every)),
        "angles": [round(angle, 3) for angle in angles[::every]],
    }


def main(argv=None):
    args = parse_args(argv)
    with processes(args.device) as several:
        run(args, several)


def run(args, processes):
    with cli.exit_on_bad_input():
        if args.download and args.data == "mnist":
            download_mnist(args.data_dir)
        config = {**cli.config_of(args), "fingerprint": data_fingerprint(args.data, args.data_dir)}
        keeper = Keeper(args, "rotation", config, processes)
        found = keeper.start()
        if found is None:
            return
        train, val, test = load(args.data, args.data_dir, args.device)
        for split, what in ((train, "training images"), (val, "validation images")):
            cli.check_batch(args.batch_size, len(split), what)
            processes.check_equal_parts(min(len(split), args.batch_size), what)
    seed_everything(args.seed)
    trainer = Trainer(args, train, val, processes)

    steps_an_epoch = max(1, len(train) // args.batch_size)
    n_steps = args.epochs * steps_an_epoch
    angles, losses = [], []  # tensors on the device, read when all is done
    if found:
        trainer.load_state_dict(found["trainer"])
        angles, losses = (list(found[name].to(args.device)) for name in ("angles", "losses"))
    state = lambda: {
        "trainer": trainer.state_dict(),
        "angles": torch.stack(angles),
        "losses": torch.stack(losses[-max(50, steps_an_epoch) :]),
    }
    label = f"rotation {args.data} {args.method} seed {args.seed}"
    with keeper:
        for step in keeper.steps(n_steps, state, label, whole=lambda: trainer.meta.whole):
            losses.append(trainer.step())
            angles.append(trainer.angle.detach().clone())
            if step % 50 == 0 or step + 1 == n_steps:
                angle = {"angle": math.degrees(angles[-1].item())} if trainer.meta.learns else {}
                keeper.show(loss=keeper.mean(losses[-50:]), **angle)

        n = args.horizon or 1  # steps of which one has a meta-update

        def steps():
            for _ in range(n):
                keeper.look()
                trainer.step()

        with keeper.paused():
            found = {name: accuracy(trainer.model, *rotated(test, angle), keeper.look) for name, angle in TESTED.items()}
            metrics = found | {"train_loss": torch.stack(losses[-steps_an_epoch:]).mean()}
            if trainer.meta.learns:
                metrics |= describe_angles(torch.rad2deg(torch.stack(angles)).tolist(), steps_an_epoch) | trainer.meta.metrics()
            keeper.show(**found)
            result = f"{metrics['accuracy_rotated']:.2f} % rotated, {metrics['accuracy_upright']:.2f} % upright"
            result += f", angle {metrics['angle']:.1f} degrees" if "angle" in metrics else ""
            print(f"{label}: {result}, {keeper.clock.seconds:.0f} s")
            cli.say_if_chance(label, max(found.values()), test.labels.tolist(), "A lower --lr or more --epochs may help.")
            trainer.meta.forget()
            args.log_quality = None  # what follows is the step's own cost, after the training, whose result is taken
            keeper.record(metrics, {}, lambda: step_cost(measure(steps, repeats=5, warmup=1), n))


if __name__ == "__main__":
    main()
