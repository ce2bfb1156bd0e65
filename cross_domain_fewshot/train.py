"""Learn feature-wise transformations that make few-shot classifiers work in a domain that they have not seen.

    python -m cross_domain_fewshot.train --method evograd --held-out serif            glyphs, minutes on a CPU
    python -m cross_domain_fewshot.train --method evograd --data filelists --data-dir DIR --held-out cub --n-shot 5 \\
        --encoder FILE.pt                                                             the paper's
    torchrun --nproc-per-node 4 -m cross_domain_fewshot.train ...                     the same in four processes

Each epoch draws two of the seen domains. A step is the model's update on an episode of the pseudo-seen one, with
transformations, and then that of the transformations' γ and β, by the hypergradient of the loss on an episode of the
pseudo-unseen one, without transformations. The record of the run (accuracy on episodes of the held-out domain's novel classes,
γ and β over training) is appended to --out as one JSON line. The checkpoint stays, for evaluate.py and quality.py.
"""

import random

import torch
import torch.nn.functional as F

from evograd.lab import checkpoints, cli
from evograd.lab.data import fingerprint
from evograd.lab.methods import MetaStep, baseline, learned, optimizer, table
from evograd.lab.processes import ALONE, processes
from evograd.lab.records import seed_everything

from .data import (
    DATASETS,
    GLYPH_FONTS,
    PAPER_DOMAINS,
    TrainingSteps,
    add_loading_arguments,
    augmented,
    centred,
    data_fingerprint,
    load_domain,
    prepare_loading,
    stream,
)
from .models import BACKBONES, HEADS, episode_loss, model_of, transformations
from .testing import TEST_SEED, interval, score

# around: these differentiate through the update that was made, with the same draws of the transformations. T1-T2 makes an SGD
# step of its own from the parameters before it.
# inner_lr, η: that of the model's update. With a given lookahead it is only the scale of the hypergradient, which Adam does not
# see.
METHODS = table(
    baseline("none"),
    baseline("fixed"),
    learned("evograd", temperature=0.05),
    learned("evograd_guided", around="step", inner_lr=1e-3),
    learned("mixed_mode", around="step", inner_lr=1e-3),
    learned("second_order", around="before", inner_lr=1e-3),
    learned("second_order_functional", around="before", inner_lr=1e-3),
    learned("finite_difference", around="step", inner_lr=1e-3),
    learned("neumann", inner_lr=1e-3),
    learned("conjugate_gradient"),
    learned("trajectory", horizon=5),
    reads=("transform_lr",),
)
BY_DATA = {  # what depends on the data: the paper's settings, and small ones for glyphs
    "glyphs": dict(backbone="conv4", image_size=28, width=32, n_query=8, epochs=30, episodes=10, test_episodes=600),
    "filelists": dict(backbone="resnet10", image_size=None, width=64, n_query=16, epochs=400, episodes=100, test_episodes=1000),
}
IMAGE_SIZE = {"conv4": 84, "conv6": 84}  # a ResNet's is 224


def parse_args(argv=None):
    parser = cli.experiment_parser(__doc__, METHODS, DATASETS)
    parser.add_argument(
        "--held-out", default="serif", metavar="DOMAIN", help="domain that is tested on and not seen in training"
    )
    parser.add_argument(
        "--seen",
        nargs="+",
        metavar="DOMAIN",
        help="domains to train on; the auxiliary classes are the first one's. Default: the other four of "
        f"{', '.join(GLYPH_FONTS)} or of {', '.join(PAPER_DOMAINS)}",
    )
    parser.add_argument("--backbone", choices=BACKBONES, help=f"default: {by_data('backbone')}")
    parser.add_argument("--head", choices=tuple(HEADS), default="relationnet", help="what classifies the queries")
    parser.add_argument("--width", type=cli.at_least(1), help=f"channels of a Conv-4 or Conv-6; default: {by_data('width')}")
    parser.add_argument("--image-size", type=cli.at_least(8), help="pixels; default: glyphs 28, Conv-4/6 84, ResNets 224")
    parser.add_argument("--n-way", type=cli.at_least(2), default=5, help="classes of an episode")
    parser.add_argument("--n-shot", type=cli.at_least(1), default=1, help="support images of each class")
    parser.add_argument("--n-query", type=cli.at_least(1), help=f"queries of each class; default: {by_data('n_query')}")
    parser.add_argument("--epochs", type=cli.at_least(1), help=f"default: {by_data('epochs')}")
    parser.add_argument("--episodes", type=cli.at_least(1), help=f"training episodes an epoch; default: {by_data('episodes')}")
    parser.add_argument(
        "--auxiliary-batch", type=cli.at_least(1), default=16, help="images of the auxiliary classification loss"
    )
    parser.add_argument("--lr", type=cli.positive, default=1e-3, help="of the model's Adam")
    parser.add_argument("--transform-lr", type=cli.positive, default=1e-3, help="of the Adam of γ and β")
    parser.add_argument("--encoder", metavar="FILE", help="checkpoint of pretrain.py to start from; default: random weights")
    parser.add_argument("--amp", action="store_true", help="bfloat16 in the model's own update; hypergradients stay in float32")
    parser.add_argument("--test-episodes", type=cli.at_least(2), help=f"default: {by_data('test_episodes')}")
    parser.add_argument("--check", action="store_true", help="look whether the lists have images enough, and end")
    add_loading_arguments(parser)
    cli.add_evograd_arguments(parser)
    args = parser.parse_args(argv)
    fill_defaults(parser, args)
    cli.settle(parser, args, METHODS, {"--n-query": args.n_query, "--auxiliary-batch": args.auxiliary_batch})
    if args.method == "evograd_guided":
        args.share = None  # candidates that are shared out have draws of their own, not those of the update that was made
    args.seen = args.seen or [d for d in (GLYPH_FONTS if args.data == "glyphs" else PAPER_DOMAINS) if d != args.held_out]
    if args.held_out in args.seen:
        parser.error(f"--held-out {args.held_out} is among the seen domains ({', '.join(args.seen)}); it must not be seen")
    if len(set(args.seen)) < max(2, len(args.seen)):
        parser.error(
            f"--seen {' '.join(args.seen)}: two or more different domains are needed, a pseudo-seen and a pseudo-unseen one"
        )
    args.out = args.out or f"cross_domain_fewshot/results/{args.data}.jsonl"
    return args


def by_data(name):
    return ", ".join(f"{values[name]} ({data})" for data, values in BY_DATA.items() if values[name])


def fill_defaults(parser, args):
    """Settings not given -> those that suit the data; shared by the scripts."""
    width = args.width
    for name, value in BY_DATA[args.data].items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    if width is not None and not args.backbone.startswith("conv"):
        parser.error(f"--width {width} given, but --backbone {args.backbone} has its own; Conv-4 and Conv-6 take it")
    args.image_size = args.image_size or IMAGE_SIZE.get(args.backbone, 224)


def run_name(args):
    return f"{args.data}-{args.held_out}-{args.backbone}-{args.head}-{args.n_shot}shot-{args.method}-seed{args.seed}"


class Trainer:
    """Model, transformations, their optimizers and one step of each: what train, compare and quality need."""

    def __init__(self, args, n_classes, processes=ALONE):
        self.args, self.processes = args, processes
        self.meta = MetaStep(METHODS[args.method], args, processes)
        self.model = model_of(vars(args), n_classes)
        if args.device.type != "cpu":  # Module.to cannot move fake tensors, not even nowhere
            self.model.to(args.device)
        self.hyperparameters = [p for module in transformations(self.model).values() for p in module.parameters()]
        own = {id(p) for p in self.hyperparameters}
        named = {name: p for name, p in self.model.named_parameters() if id(p) not in own}
        # What an episode's loss depends on: the classifier has the auxiliary loss alone, in which λ is not.
        self.episodic = {name: p for name, p in named.items() if not name.startswith("classifier.")}
        self.weights = list(named.values())
        self.optimizer = optimizer(torch.optim.Adam, self.weights, lr=args.lr)
        if self.meta.learns:
            self.meta_optimizer = torch.optim.Adam(self.hyperparameters, lr=args.transform_lr, weight_decay=1e-8)
        for p in self.hyperparameters:
            p.requires_grad_(self.meta.method.remembers)  # in other methods' steps no map is kept for them
        self.ordinary = processes.data_parallel(self.model, self.weights)  # the same parameters
        self.trajectory = self.meta.trajectory_of(self.ordinary, self.optimizer, self.hyperparameters)
        self.draws = random.Random(args.seed)  # seeds of the transformations' noise, one a step

    def part(self, batch):
        """Where torchrun started several processes: this one's queries, with the whole support, and its auxiliary images."""
        seen, unseen, images, classes = batch
        part, n_shot = self.processes.part, self.args.n_shot
        queries = lambda episode: torch.cat([episode[:, :n_shot], part(episode[:, n_shot:], dim=1)], dim=1)
        return queries(seen), queries(unseen) if unseen.numel() else unseen, part(images), part(classes)

    def losses(self, seen, unseen):
        """(ℓ_T, ℓ_V) as functions of the model: episodes with transformations in training, and without in eval mode."""
        n_shot, head = self.args.n_shot, self.args.head

        def train_loss(model):
            model.train()
            return episode_loss(model(seen, n_shot), head)

        def val_loss(model):
            model.eval()
            return episode_loss(model(unseen, n_shot), head)

        return train_loss, val_loss

    def step(self, batch, auxiliary_weight):
        """The model's update on the pseudo-seen episode, then that of γ and β. Returns the training loss.

        batch: (seen, unseen, images, classes), episodes (n_way, n_shot + n_query, 3, size, size) and those of the auxiliary loss.
        """
        own, whole = self.processes.divide(batch, self.args.share, self.part)
        (own_seen, own_unseen, images, classes), (seen, unseen, *_) = own, whole
        own_loss, val_loss = self.losses(own_seen, own_unseen)
        before = self.meta.remember(self.episodic.items())
        draw = self.draws.getrandbits(62)
        shown = []  # the episode's loss

        def total_loss(model):
            with torch.autocast(seen.device.type, torch.bfloat16, enabled=self.args.amp):
                with self.meta.pattern(own is whole):
                    loss = own_loss(model)
                self.model.encoder.eval()  # the auxiliary loss sees no transformations, and leaves BatchNorm's statistics alone
                shown.append(loss.detach())
                return loss + auxiliary_weight * F.cross_entropy(model(images), classes)

        torch.manual_seed(draw)
        if self.trajectory is not None:
            self.remembered_step(total_loss, val_loss)
            return self.processes.mean(shown[0])
        self.optimizer.zero_grad()
        total_loss(self.ordinary).backward()
        self.optimizer.step()
        self.processes.average_buffers(self.model)

        if self.meta.learns:
            self.optimizer.zero_grad()  # their memory is free for the candidates
            self.meta_step(*self.losses(seen, unseen), before, draw)
        return self.processes.mean(shown[0])

    def remembered_step(self, total_loss, val_loss):
        """The model's update, which the trajectory makes, and that of γ and β where its horizon is reached."""
        self.trajectory.step(total_loss)
        self.processes.average_buffers(self.model)
        if len(self.trajectory) == self.args.horizon:
            self.optimizer.zero_grad()
            self.learn(self.trajectory.hypergradient(val_loss))

    def meta_step(self, train_loss, val_loss, before, draw):
        """The update of γ and β.  draw: of the noise, for those around that update."""
        if self.meta.around:
            torch.manual_seed(draw)
        for p in self.hyperparameters:
            p.requires_grad_(True)
        problem = (train_loss, val_loss, self.model, self.hyperparameters)
        self.learn(self.meta(*problem, before, parameters=list(self.episodic), lr=self.args.lr))
        for p in self.hyperparameters:
            p.requires_grad_(False)

    def learn(self, result):
        for p, gradient in zip(self.hyperparameters, result.grads):
            p.grad = gradient
        self.meta_optimizer.step()

    def state_dict(self):
        learned = {"transform_optimizer": self.meta_optimizer.state_dict()} if self.meta.learns else {}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.getstate(),
            "quality": self.meta.state_dict(),
            **learned,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.setstate(state["draws"])
        self.meta.load_state_dict({"n_calls": state.get("n_steps"), **state["quality"]})
        if self.meta.learns:
            self.meta_optimizer.load_state_dict(state["transform_optimizer"])


def auxiliary_weight(epoch, epochs):
    return 0.9 ** (20 * epoch // epochs)


def prepare(args, batch, generator):
    """A step of TrainingSteps -> what Trainer.step takes: on the device, augmented (glyphs are distorted already)."""
    seen, unseen, images, classes = (t.to(args.device, non_blocking=True) for t in batch)
    if args.data == "glyphs":
        seen, unseen, images = (centred(t, args.image_size) if t.numel() else t for t in (seen, unseen, images))
    else:
        seen, unseen, images = (augmented(t, args.image_size, generator) if t.numel() else t for t in (seen, unseen, images))
    return seen, unseen, images, classes


def load_encoder(model, args):
    """Weights of a checkpoint of pretrain.py -> the model's encoder; ValueError if it is of something else."""
    state = checkpoints.load(args.encoder)
    if state.get("kind") != "encoder":
        raise ValueError(f"{args.encoder} is no checkpoint of pretrain.py")
    for name in ("backbone", "width"):
        given, found = getattr(args, name), state["config"][name]
        if given != found and (name != "width" or args.backbone.startswith("conv")):
            raise ValueError(f"{args.encoder} is of --{name} {found}; this run has --{name} {given}")
    own = model.encoder.state_dict()
    weights = _without_transformations(model.encoder, own)
    # Transformations shift the numbers of the layers: what counts is the order of the tensors, and that their shapes agree.
    found = list(state["encoder"].values())
    if [t.shape for t in found] != [own[name].shape for name in weights]:
        raise ValueError(f"{args.encoder}: its tensors do not fit {args.backbone}")
    model.encoder.load_state_dict({**own, **dict(zip(weights, found))})


def encoder_fingerprint(file):
    """Of the weights in a checkpoint of pretrain.py; None without one. Files of the same weights may differ."""
    weights = checkpoints.load(file).get("encoder", {}) if file else {}
    return fingerprint(*(f"{tuple(t.shape)} ".encode() + t.numpy().tobytes() for t in weights.values())) if weights else None


def _without_transformations(encoder, state):
    inside = tuple(f"{name}." for name in transformations(encoder))
    return [name for name in state if not name.startswith(inside)] if inside else list(state)


def recorded(args):
    """The configuration that a record holds: what the result depends on, and no paths."""
    return {**cli.config_of(args, ("encoder", "cache_gb", "workers", "device", "check")), "pretrained": args.encoder is not None}


def softplus_means(model):
    """(γ, β) of each transformation as they act: means of softplus over the channels. Tensors (layers,)."""
    modules = transformations(model).values()
    if not modules:
        return None
    return tuple(
        torch.stack([F.softplus(getattr(module, name).detach(), beta=100).mean() for module in modules])
        for name in ("gamma", "beta")
    )


def describe(trainer, history, accuracies):
    """The metrics of a run that has ended. history: γ and β by layer, after each epoch."""
    mean, half_width = interval(accuracies)
    metrics = {"accuracy": mean, "interval": half_width}
    if not trainer.meta.learns:
        return metrics
    every = max(1, len(history) // 100)
    return {
        **metrics,
        "layers": list(transformations(trainer.model)),
        "epochs": list(range(1, len(history) + 1, every)),
        "gamma": [[round(v, 5) for v in values[0]] for values in history[::every]],
        "beta": [[round(v, 5) for v in values[1]] for values in history[::every]],
        **trainer.meta.metrics(),
    }


def main(argv=None):
    args = parse_args(argv)
    with processes(args.device) as several:
        run(args, several)


def run(args, processes):
    def load_lists():
        lists = [(name, "base") for name in args.seen] + [(args.held_out, "novel")]
        return [load_domain(args.data, args.data_dir, *which, args.image_size) for which in lists]

    with cli.exit_on_bad_input():
        lists = load_lists() if args.data == "filelists" else None  # a run is one of its files; glyphs take long to draw
        for images in lists or ():
            images.check(args.n_way, args.n_shot, args.n_query)
        if args.check:
            return
        found = {"fingerprint": data_fingerprint(lists or []), "encoder_fingerprint": encoder_fingerprint(args.encoder)}
        config = {**recorded(args), **found}
        keeper = checkpoints.Keeper(args, "cross_domain_fewshot", config, processes, name=run_name(args), keep=True)
        found = keeper.start()
        if found is None:
            return
        n_images = args.n_shot + args.n_query
        *domains, test = lists or load_lists()
        seed_everything(args.seed)
        n_classes = len(domains[0].classes)
        trainer = Trainer(args, n_classes, processes)
        if args.encoder:
            load_encoder(trainer.model, args)
        n_workers = prepare_loading([*domains, test], args.cache_gb, args.workers, args.device)

    n_steps = args.epochs * args.episodes
    learns = trainer.meta.learns
    steps = TrainingSteps(domains, args.seed, args.episodes, args.n_way, n_images, args.auxiliary_batch, learns)
    losses, history = [], []  # of this epoch; γ and β by layer, after each epoch
    generator = torch.Generator()  # of the augmentations
    if found:
        trainer.load_state_dict(found)
        losses, history = [loss.to(args.device) for loss in found["losses"]], found["history"]
        generator.set_state(found["augmentations"])
    state = lambda: {  # episodes follow from the seed and the step
        "kind": "few-shot",
        "n_classes": n_classes,
        **trainer.state_dict(),
        "losses": losses,
        "history": history,
        "augmentations": generator.get_state(),
    }
    with keeper:
        batches = stream(steps, range(keeper.step, n_steps), n_workers, pin=args.device.type == "cuda")
        for step in keeper.steps(n_steps, state, run_name(args), "episode", lambda: trainer.meta.whole):
            epoch = step // args.episodes
            if step % args.episodes == 0:
                losses = []
                generator.manual_seed(args.seed * 1_000_003 + epoch)
            losses.append(trainer.step(prepare(args, next(batches), generator), auxiliary_weight(epoch, args.epochs)))
            if (step + 1) % args.episodes == 0:
                if learns:
                    history.append([values.tolist() for values in softplus_means(trainer.model)])
                means = zip(("gamma", "beta"), history[-1]) if learns else ()
                keeper.show(loss=keeper.mean(losses), **{name: sum(values) / len(values) for name, values in means})

        with keeper.paused():
            accuracies = score(trainer.model, test, args, args.test_episodes, TEST_SEED, n_workers, processes, keeper.look)
            finish(keeper, args, describe(trainer, history, accuracies) | {"train_loss": torch.stack(losses).mean()})


def finish(keeper, args, metrics):
    """Say what came out, and record it."""
    keeper.show(accuracy=metrics["accuracy"])
    result = f"{metrics['accuracy']:.2f} ± {metrics['interval']:.2f} % of {args.test_episodes} episodes"
    print(f"{run_name(args)}: {result}, {keeper.clock.seconds:.0f} s")
    labels = [*range(args.n_way)] * (args.n_query * args.test_episodes)
    cli.say_if_chance(run_name(args), metrics["accuracy"], labels, "More --epochs or an --encoder may help.")
    keeper.record(metrics, {"seconds_per_step": keeper.clock.seconds / (args.epochs * args.episodes)})


if __name__ == "__main__":
    main()
