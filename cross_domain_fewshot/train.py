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
from time import perf_counter

import torch
import torch.nn.functional as F

from evograd import checkpoints, cli, distributed
from evograd.quality import QualityLog, estimates
from evograd.records import check_writable, seed_everything

from .data import DATASETS, GLYPH_FONTS, PAPER_DOMAINS, TrainingSteps, augmented, cache_if_small, centred, load_domain, stream
from .evaluate import TEST_SEED, interval, score
from .models import BACKBONES, HEADS, FewShotModel, episode_loss, transformations

METHODS = ("none", "fixed", *cli.ESTIMATORS)
BY_DATA = {  # what depends on the data: the paper's settings, and small ones for glyphs
    "glyphs": dict(backbone="conv4", image_size=28, width=32, n_query=8, epochs=30, episodes=10, test_episodes=600),
    "filelists": dict(backbone="resnet10", image_size=None, width=64, n_query=16, epochs=400, episodes=100, test_episodes=1000),
}
IMAGE_SIZE = {"conv4": 84, "conv6": 84}  # a ResNet's is 224
# τ. A guided perturbation is σ√P long, in the one direction that matters: with the paper's temperature the softmax is one-hot.
TEMPERATURE = {"evograd": 0.05, "evograd_guided": 1.0}
# η: that of the model's update. With a given lookahead it is only the scale of the hypergradient, which Adam does not see.
INNER_LR = dict.fromkeys(("evograd_guided", "mixed_mode", "second_order", "finite_difference", "neumann"), 1e-3)
CANDIDATES = ("n_candidates", "sigma", "temperature", "common_random_numbers", "inner_lr", "transform_lr", "log_quality")
READS = {
    "none": (),
    "fixed": (),
    "evograd": (*CANDIDATES, "share"),
    "evograd_guided": CANDIDATES,
    "mixed_mode": ("inner_lr", "transform_lr", "log_quality"),
    "second_order": ("inner_lr", "inner_steps", "transform_lr", "log_quality"),
    "finite_difference": ("inner_lr", "transform_lr", "log_quality"),
    "neumann": ("inner_lr", "inner_steps", "transform_lr", "log_quality"),
    "conjugate_gradient": ("inner_steps", "transform_lr", "log_quality"),
}
# These differentiate through the update that was made: the training loss is taken at the parameters before it, with the same
# draws of the transformations. Guided and mixed mode take the validation gradient at the parameters after it, which costs
# a copy of the parameters and no computation; T1-T2 makes an SGD step of its own.
AROUND_THE_UPDATE = ("evograd_guided", "mixed_mode", "finite_difference", "second_order")
LOOKAHEAD = ("evograd_guided", "mixed_mode", "finite_difference")


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
    parser.add_argument("--cache-gb", type=float, default=4.0, help="decode all images into memory if they take no more")
    parser.add_argument(
        "--workers", type=cli.at_least(0), default=2, help="processes that decode images if memory does not hold them"
    )
    cli.add_evograd_arguments(parser)
    args = parser.parse_args(argv)
    cli.refuse_unread(parser, args, READS)
    fill_defaults(args)
    cli.check_processes(parser, args, {"--n-query": args.n_query, "--auxiliary-batch": args.auxiliary_batch})
    if args.method == "evograd_guided":
        args.share = None  # candidates that are shared out have draws of their own, not those of the update that was made
    args.temperature = args.temperature or TEMPERATURE.get(args.method)
    args.inner_lr = args.inner_lr or INNER_LR.get(args.method)
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


def fill_defaults(args):
    """Settings not given -> those that suit the data; shared by the scripts."""
    for name, value in BY_DATA[args.data].items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    args.image_size = args.image_size or IMAGE_SIZE.get(args.backbone, 224)


def run_name(args):
    return f"{args.data}-{args.held_out}-{args.backbone}-{args.head}-{args.n_shot}shot-{args.method}-seed{args.seed}"


def new_model(config, n_classes):
    """The model of a run's configuration."""
    names = ("backbone", "head", "n_way", "image_size", "width")
    return FewShotModel(**{name: config[name] for name in names}, n_classes=n_classes, transform=config["method"] != "none")


class Trainer:
    """Model, transformations, their optimizers and one step of each: what train, compare and quality need."""

    def __init__(self, args, n_classes, processes=distributed.ALONE):
        self.args, self.processes = args, processes
        self.estimator = cli.estimators(args, processes).get(args.method)  # none for the baselines
        self.model = new_model(vars(args), n_classes)
        if args.device.type != "cpu":  # Module.to cannot move fake tensors, not even nowhere
            self.model.to(args.device)
        self.hyperparameters = [p for module in transformations(self.model).values() for p in module.parameters()]
        own = {id(p) for p in self.hyperparameters}
        named = {name: p for name, p in self.model.named_parameters() if id(p) not in own}
        # What an episode's loss depends on: the classifier has the auxiliary loss alone, in which λ is not.
        self.episodic = {name: p for name, p in named.items() if not name.startswith("classifier.")}
        self.weights = list(named.values())
        self.optimizer = torch.optim.Adam(self.weights, lr=args.lr)
        if self.estimator is not None:
            self.transform_optimizer = torch.optim.Adam(self.hyperparameters, lr=args.transform_lr, weight_decay=1e-8)
        for p in self.hyperparameters:
            p.requires_grad_(False)
        self.ordinary = processes.data_parallel(self.model, self.weights)  # the same parameters
        self.draws = random.Random(args.seed)  # seeds of the transformations' noise, one a step
        self.n_steps, self.quality = 0, QualityLog(args.seed)

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

    def step(self, seen, unseen, images, classes, auxiliary_weight):
        """The model's update on the pseudo-seen episode, then that of γ and β. Returns the training loss.

        seen, unseen: (n_way, n_shot + n_query, 3, size, size).  images, classes: those of the auxiliary loss.
        """
        own_seen, own_unseen, images, classes = self.own(seen, unseen, images, classes)
        if self.args.share == "batch":
            seen, unseen = own_seen, own_unseen
        train_loss, val_loss = self.losses(seen, unseen)
        own_loss, _ = self.losses(own_seen, own_unseen)
        draw = self.draws.getrandbits(62)
        before = {}
        log_quality = self.args.log_quality and self.n_steps % self.args.log_quality == 0
        if self.args.method in AROUND_THE_UPDATE or log_quality:
            before = {name: p.detach().clone() for name, p in self.episodic.items()}

        torch.manual_seed(draw)
        self.optimizer.zero_grad()
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=self.args.amp):
            loss = own_loss(self.ordinary)
            self.model.encoder.eval()  # the auxiliary loss sees no transformations, and leaves BatchNorm's statistics alone
            total = loss + auxiliary_weight * F.cross_entropy(self.ordinary(images), classes)
        total.backward()
        self.optimizer.step()
        self.processes.average_buffers(self.model)

        if self.estimator is not None:
            self.optimizer.zero_grad()  # their memory is free for the candidates
            around = {"parameters": list(self.episodic)}
            if self.args.method in AROUND_THE_UPDATE:
                torch.manual_seed(draw)
                around["parameters"] = before
            if self.args.method in LOOKAHEAD:
                around["lookahead"] = self.episodic
            for p in self.hyperparameters:
                p.requires_grad_(True)
            if log_quality:
                self.quality.add(self.n_steps, self.estimates(train_loss, val_loss, before), seen.device)
            result = self.estimator(train_loss, val_loss, self.model, self.hyperparameters, **around)
            for p, gradient in zip(self.hyperparameters, result.grads):
                p.requires_grad_(False)  # in the model's own update no map is kept for them
                p.grad = gradient
            self.transform_optimizer.step()
        self.n_steps += 1
        return self.processes.mean(loss.detach())

    def own(self, seen, unseen, images, classes):
        """Where torchrun started several processes: this one's queries, with the whole support, and its auxiliary images."""
        if self.processes.size == 1:
            return seen, unseen, images, classes
        part, n_shot = self.processes.part, self.args.n_shot
        queries = lambda episode: torch.cat([episode[:, :n_shot], part(episode[:, n_shot:], dim=1)], dim=1)
        return queries(seen), queries(unseen) if unseen.numel() else unseen, part(images), part(classes)

    def estimates(self, train_loss, val_loss, theta=None):
        """The estimators that are compared with exact T1-T2, at `theta`: the parameters before the model's update, or now's."""
        return estimates(
            train_loss,
            val_loss,
            self.model,
            self.hyperparameters,
            inner_lr=INNER_LR["second_order"],
            generator=self.quality.generator,
            sigma=self.args.sigma,
            parameters=theta or list(self.episodic),
            made=self.episodic if theta else None,
        )

    def state_dict(self):
        learned = {} if self.estimator is None else {"transform_optimizer": self.transform_optimizer.state_dict()}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.getstate(),
            "n_steps": self.n_steps,
            "quality": self.quality.state_dict(),
            **learned,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.setstate(state["draws"])
        self.n_steps = state["n_steps"]
        self.quality.load_state_dict(state["quality"])
        if self.estimator is not None:
            self.transform_optimizer.load_state_dict(state["transform_optimizer"])


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


def _without_transformations(encoder, state):
    inside = tuple(f"{name}." for name in transformations(encoder))
    return [name for name in state if not name.startswith(inside)] if inside else list(state)


def recorded(args):
    """The configuration that a record holds: what the result depends on, and no paths."""
    return {**cli.config_of(args, ("encoder", "cache_gb", "workers", "device")), "pretrained": args.encoder is not None}


def softplus_means(model):
    """(γ, β) of each transformation as they act: means of softplus over the channels. Tensors (layers,)."""
    modules = transformations(model).values()
    if not modules:
        return None
    return tuple(
        torch.stack([F.softplus(getattr(module, name).detach(), beta=100).mean() for module in modules])
        for name in ("gamma", "beta")
    )


def main(argv=None):
    args = parse_args(argv)
    with distributed.processes(args.device) as processes:
        run(args, processes)


def run(args, processes):
    keeper = checkpoints.Keeper(args, "cross_domain_fewshot", recorded(args), processes, name=run_name(args), keep=True)
    with cli.exit_on_bad_input():
        check_writable(args.out)
        if keeper.done():
            return
        found = keeper.resume()
        n_images = args.n_shot + args.n_query
        domains = [load_domain(args.data, args.data_dir, name, "base", args.image_size) for name in args.seen]
        test = load_domain(args.data, args.data_dir, args.held_out, "novel", args.image_size)
        for images in (*domains, test):
            images.check(args.n_way, n_images)
        seed_everything(args.seed)
        n_classes = len(domains[0].classes)
        trainer = Trainer(args, n_classes, processes)
        if args.encoder:
            load_encoder(trainer.model, args)
    in_memory = cache_if_small([*domains, test], args.cache_gb)
    n_workers = 0 if in_memory else args.workers

    n_steps = args.epochs * args.episodes
    learns = trainer.estimator is not None
    steps = TrainingSteps(domains, args.seed, args.episodes, args.n_way, n_images, args.auxiliary_batch, learns)
    losses, history = [], []  # of this epoch; γ and β by layer, after each epoch
    generator = torch.Generator()  # of the augmentations
    if found:
        trainer.load_state_dict(found)
        losses, history = [loss.to(args.device) for loss in found["losses"]], found["history"]
        generator.set_state(found["augmentations"])
    start = perf_counter() - found.get("seconds", 0)
    state = lambda: {  # episodes follow from the seed and the step
        "kind": "few-shot",
        "n_classes": n_classes,
        **trainer.state_dict(),
        "losses": losses,
        "history": history,
        "augmentations": generator.get_state(),
        "seconds": perf_counter() - start,
    }
    progress = keeper.progress(n_steps, run_name(args), unit="episode")
    with keeper:
        batches = stream(steps, range(keeper.step, n_steps), n_workers, pin=args.device.type == "cuda")
        for step in keeper.steps(n_steps, state):
            epoch = step // args.episodes
            if step % args.episodes == 0:
                losses = []
                generator.manual_seed(args.seed * 1_000_003 + epoch)
            batch = prepare(args, next(batches), generator)
            losses.append(trainer.step(*batch, auxiliary_weight(epoch, args.epochs)))
            progress.update()
            if (step + 1) % args.episodes == 0:
                if learns:
                    history.append([values.tolist() for values in softplus_means(trainer.model)])
                progress.set_postfix(loss=f"{keeper.mean(losses):.3f}")
    progress.close()
    seconds = perf_counter() - start

    accuracies = score(trainer.model, test, args, args.test_episodes, TEST_SEED, n_workers, processes)
    mean, half_width = interval(accuracies)
    metrics = {"accuracy": mean, "interval": half_width, "train_loss": torch.stack(losses).mean()}
    if learns:
        every = max(1, args.epochs // 100)
        metrics |= {
            "layers": list(transformations(trainer.model)),
            "epochs": list(range(1, args.epochs + 1, every)),
            "gamma": [[round(v, 5) for v in values[0]] for values in history[::every]],
            "beta": [[round(v, 5) for v in values[1]] for values in history[::every]],
        }
        if args.log_quality:
            metrics |= trainer.quality.metrics()
    keeper.record(metrics, {"seconds": seconds, "seconds_per_step": seconds / n_steps})
    print(f"{run_name(args)}: {mean:.2f} ± {half_width:.2f} % of {args.test_episodes} episodes, {seconds:.0f} s")


if __name__ == "__main__":
    main()
