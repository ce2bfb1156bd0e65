"""The paper's settings, read back from what the scripts really build at their defaults: resources/paper_settings.json.

Each function below gives {setting: value} of one experiment. A setting that is changed anywhere between the command line and
the optimizer turns its line red.
"""

import inspect
import itertools
import json
import math
import tempfile
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import cross_domain_fewshot.data as fewshot_data
import cross_domain_fewshot.models as fewshot_models
import cross_domain_fewshot.pretrain as pretrain
import cross_domain_fewshot.train as fewshot
import illustration_1d.train as illustration
import label_noise_mwn.data as noise_data
import label_noise_mwn.train as noise
import metaxl.train as metaxl
import rotation.data as rotation_data
import rotation.train as rotation
from metaxl.models import RTN
from tests.test_metaxl import step as tagger_step
from tests.test_metaxl import tagger
from tests.test_scripts import shell

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = json.loads((ROOT / "resources/paper_settings.json").read_text(encoding="utf-8"))["experiments"]
CPU = torch.device("cpu")


# --- what several experiments have


def optimizer(made):
    """Its kind, and the settings of its groups, which must agree."""
    names = ("lr", "momentum", "nesterov", "betas", "eps", "weight_decay")
    (settings,) = {tuple((name, group[name]) for name in names if name in group) for group in made.param_groups}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings}
    return {"kind": type(made).__name__, **settings, "lr": made.param_groups[0].get("initial_lr", settings["lr"])}


def estimator(trainer):
    """What `evograd.hypergradient` gets: the run's settings, else its own defaults."""
    made = trainer.meta.estimator
    usual = {name: p.default for name, p in inspect.signature(made.func).parameters.items() if p.default is not p.empty}
    settings = usual | made.keywords
    names = {"K": "n_candidates", "σ": "sigma", "τ": "temperature", "noise": "noise", "inner learning rate": "inner_lr"}
    found = {ours: settings[theirs] for ours, theirs in names.items()}
    return found | {"common random numbers": settings["common_random_numbers"]}


pytestmark = pytest.mark.filterwarnings("ignore:hyperparameters.0.")  # of black images


def shapes(module):
    return [list(p.shape) for p in module.parameters()]


def order(model, meta, step):
    """Whose optimizer steps first."""
    seen = []
    hooks = [o.register_step_post_hook(lambda *_, name=name: seen.append(name)) for name, o in (("model", model), ("λ", meta))]
    step()
    for hook in hooks:
        hook.remove()
    return seen


def flags(script, *arguments):
    """{flag: the values that the runs have for it which `bash script --print` names, in order}"""
    lines = shell(script, "--print", *arguments).stdout.splitlines()
    runs = [line for line in lines if " --method " in line and " --check " not in line]
    found = {}
    for name, value in itertools.pairwise(" ".join(runs).split()):
        if name.startswith("--"):
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


# --- the experiments


def of_illustration():
    given = []
    with pytest.MonkeyPatch.context() as patch:
        real = illustration.hypergradient
        patch.setattr(illustration, "hypergradient", lambda *a, **settings: given.append(settings) or real(*a, **settings))
        path = illustration.trajectory(lambda x, lam: illustration.library_hypergradient(x, lam, 2))
    still = illustration.trajectory(lambda x, lam: torch.zeros_like(lam))
    x, lam = torch.tensor([0.3]), torch.tensor([0.7])
    loss = lambda x: (x - 1) ** 2 + lam * x**2
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss(x), x)
    assert illustration.train_gradient(x, lam).item() == pytest.approx(slope.item())
    moved = (still[1, :, 0] - still[0, :, 0]) / -illustration.train_gradient(*still[0].unbind(1))
    settings = given[0]
    return {
        "estimator": {
            "K": list(illustration.CANDIDATES),
            "σ": settings["sigma"],
            "τ": settings["temperature"],
            "noise": settings["noise"],
        },
        "values of λ": {
            "from": round(illustration.LAMBDAS[0].item(), 6),
            "to": illustration.LAMBDAS[-1].item(),
            "number": len(illustration.LAMBDAS),
        },
        "draws": illustration.N_DRAWS,
        "true hypergradient at λ = 0.5": round(illustration.true_hypergradient(torch.tensor(0.5)).item(), 4),
        "steps": {"number": len(path) - 1, "lr": round(moved[0].item(), 6)},
        "starts (x, λ)": [[round(v, 6) for v in start] for start in path[0].tolist()],
    }


def numbered(n):
    """(black images, their numbers as labels)"""
    return torch.zeros(1, dtype=torch.uint8).expand(n, 28, 28), torch.arange(n)


def of_rotation():
    args = rotation.parse_args(["--data", "mnist", "--device", "cpu"])
    turned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation_data, "_mnist", lambda root, part: numbered({"train": 60_000, "t10k": 10_000}[part]))
        patch.setattr(rotation_data, "check_mnist", lambda root: None)
        train, val, test = rotation_data.load("mnist", "", CPU)
        real = rotation.rotate
        patch.setattr(rotation, "rotate", lambda images, angle: turned.append(angle) or real(images, angle))
        trainer = rotation.Trainer(args, train, val)
    ends = {
        name: [labels[0].item(), labels[-1].item()]
        for name, labels in (("train", trainer.train.labels), ("val", trainer.y_val))
    }
    for labels in (trainer.train.labels, trainer.y_val):
        labels.remainder_(10)  # classes, for the step below
    x, y, index = trainer.batch()[0]
    black, white = (rotation.normalize(torch.tensor(v)).item() for v in (0.0, 1.0))
    std = 1 / (white - black)
    return {
        "training images": {"number": len(train), "from, to": ends["train"]},
        "validation images": {"number": len(val), "from, to": ends["val"], "turned by (°)": round(math.degrees(turned[0]), 4)},
        "test images": {"number": len(test), "turned by (°)": [round(math.degrees(a), 4) for a in rotation.TESTED.values()]},
        "normalisation": {"mean": round(-black * std, 6), "std": round(std, 6)},
        "model": shapes(trainer.model),
        "angle at first (°)": trainer.angle.item(),
        "batch size": {"training": len(x), "validation": len(index)},
        "epochs": args.epochs,
        "model's optimizer": optimizer(trainer.optimizer),
        "angle's optimizer": optimizer(trainer.meta_optimizer),
        "order of a step": order(trainer.optimizer, trainer.meta_optimizer, trainer.step),
        "estimator": estimator(trainer),
        "seeds": [int(seed) for seed in flags("rotation/run.sh", "--data", "mnist")["--seed"]],
    }


class StopHere(Exception):
    pass


def label_noise_run(folder):
    """(trainer, scheduler) that a run on CIFAR-10 makes before its first step, all settings at their defaults."""
    made = []

    class Spy(noise.Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    def schedule(*arguments, **settings):
        made.append(torch.optim.lr_scheduler.MultiStepLR(*arguments, **settings))
        raise StopHere

    (folder / "cifar-10-batches-py").mkdir()
    labels = [i % 10 for i in range(1000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_data, "_published", lambda *_: True)
        patch.setattr(noise_data, "_cifar_entry", lambda file: {"data": np.zeros((1000, 3072), np.uint8), "labels": labels})
        patch.setattr(noise, "Trainer", Spy)
        patch.setattr(noise, "MultiStepLR", schedule)
        with pytest.raises(StopHere):
            noise.main(["--data", "cifar10", "--data-dir", str(folder), "--device", "cpu", "--out", str(folder / "runs.jsonl")])
    return made


def augmentation(trainer, size=32, n=2000):
    """What the trainer does to an image whose red and green are its row and its column."""
    place = torch.arange(size, dtype=torch.uint8)
    image = torch.stack(
        [place[:, None].expand(size, size), place.expand(size, size), torch.zeros(size, size, dtype=torch.uint8)]
    )
    split = noise_data.Split(image[None], torch.zeros(1).long(), torch.zeros(1).long())
    out, _ = trainer.images(split, torch.zeros(n, dtype=torch.int64), trainer.random)
    rows, columns = ((out * trainer.task.std + trainer.task.mean) * 255).round().long()[:, :2].unbind(1)
    shift = rows[:, size // 2, 0] - size // 2
    border = rows[:, 0, 0]  # |shift| where what lies outside is a reflection
    mirrored = columns[:, 0, 10] > columns[:, 0, 20]
    return {
        "crop": [out.shape[-2], out.shape[-1]],
        "shifts": [shift.min().item(), shift.max().item()],
        "outside": "reflect" if torch.equal(border, shift.abs()) else "other",
        "mirrored": round(mirrored.double().mean().item(), 1),
    }


@cache
def label_noise_trainer():
    with tempfile.TemporaryDirectory() as folder:
        return label_noise_run(Path(folder))


def chosen_epoch(trainer):
    """Of a run that is best on validation images after the first of two epochs, and on test images after the second."""
    curves = {"train_loss": [1.0, 1.0], "val_accuracy": [90.0, 80.0], "test_accuracy": [70.0, 75.0]}
    found = noise.describe(SimpleNamespace(meta=SimpleNamespace(learns=False)), trainer.task, curves, {})
    return {"last": found["test_accuracy_last"] == 75.0, "best by": {1: "validation", 2: "test"}[found["best_epoch"]]}


def second_order_rate(trainer):
    """The inner learning rate that T1–T2 gets where the model's is 0.01."""
    args = noise.parse_args(["--data", "cifar10", "--method", "second_order", "--device", "cpu"])
    other, given = noise.Trainer(args, trainer.task), []

    def spy(*problem, **settings):
        given.append(settings["inner_lr"])
        raise StopHere

    other.meta.estimator = spy
    other.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(StopHere):
        other.step()
    return "the model's" if given == [0.01] else given[0]


def of_label_noise():
    trainer, scheduler = label_noise_trainer()
    args, task = trainer.args, trainer.task
    matrix = noise_data.noise_matrix(args.noise, args.noise_level, 10, None, torch.Generator().manual_seed(0))
    layers = [m for m in trainer.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    batch = trainer.batch()[0]
    weights = trainer.weighted_mean(torch.ones(3), torch.tensor([0.1, 1.0, 5.0])).item()
    printed = flags("label_noise_mwn/run.sh", "--data", "cifar10")
    return {
        "noise": {"kind": args.noise, "level": args.noise_level, "a class's labels": sorted(matrix[0][matrix[0] > 0].tolist())},
        "meta images": {"number": len(task.meta), "of each class": list(set(task.meta.labels.bincount().tolist()))[0]},
        "validation images": len(task.val),
        "noise and split by": "seed" if not torch.equal(*_labels_of_two_seeds()) else "fixed",
        "augmentation": augmentation(trainer),
        "normalisation": {"mean · 255": _rounded(255 * task.mean), "std · 255": _rounded(255 * task.std)},
        "model": {
            "layers": len(layers),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "convolutions 1x1": sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in layers),
        },
        "weight net": shapes(trainer.weight_net) + [type(list(trainer.weight_net)[-1]).__name__],
        "weight net's input": "losses of each candidate" if args.weight_input == "candidate" else "losses of the model",
        "weights": "divided by their sum" if weights == pytest.approx(1) else "as they are",
        "batch size": {"noisy": len(batch[0]), "meta": len(batch[2])},
        "epochs": args.epochs,
        "schedule": {"milestones": sorted(Counter(scheduler.milestones)), "factor": scheduler.gamma},
        "model's optimizer": optimizer(trainer.optimizer),
        "weight net's optimizer": optimizer(trainer.meta_optimizer),
        "order of a step": order(trainer.optimizer, trainer.meta_optimizer, trainer.step),
        "T1–T2's inner learning rate": second_order_rate(trainer),
        "estimator": estimator(trainer),
        "epoch": chosen_epoch(trainer),
        "table": {"levels": [float(v) for v in printed["--noise-level"]], "seeds": [int(v) for v in printed["--seed"]]},
    }


def _rounded(tensor):
    return [round(v, 2) for v in tensor.flatten().tolist()]


def _labels_of_two_seeds():
    images, labels = torch.zeros(400, 3, 2, 2, dtype=torch.uint8), torch.arange(400) % 10
    source = noise_data.Source(images, labels, images[:10], labels[:10])
    return [noise_data.make_task(source, "flip2", 0.4, 100, 100, None, seed, CPU).noise_matrix for seed in (1, 2)]


def transformation():
    """What a transformation does at ones, with both draws one: γ and β at first, and the softplus's beta."""
    module = fewshot_models.FeatureWiseTransformation(2)
    at_first = {"γ": round(module.gamma.mean().item(), 6), "β": round(module.beta.mean().item(), 6)}
    h = torch.ones(1, 2, 1, 1)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn", lambda *shape, **kwargs: torch.ones(*shape))
        module.gamma.zero_(), module.beta.zero_()
        beta = 2 * math.log(2) / (module(h)[0, 0].item() - 1)
    return at_first | {"beta of softplus": round(beta), "in evaluation": "identity" if module.eval()(h) is h else "acts"}


def image_augmentation():
    """The ends of what `augmented` draws."""

    def made(image, *draws):
        values = torch.tensor(draws)[:, None]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fewshot_data.torch, "rand", lambda *shape, **kwargs: values)
            out = fewshot_data.augmented(image, 32, None)
        mean, std = (torch.tensor(v)[:, None, None] for v in (fewshot_data.MEAN, fewshot_data.STD))
        return out[0] * std + mean

    place = torch.arange(128, dtype=torch.uint8)
    rows_and_columns = torch.stack([place[:, None].expand(128, 128), place.expand(128, 128), place.expand(128, 128)])[None]
    usual = {
        "area": 0.5,
        "ratio": 0.5,
        "x": 0.5,
        "y": 0.5,
        "mirror": 1.0,
        "brightness": 0.5,
        "contrast": 0.5,
        "saturation": 0.5,
    }
    crop = lambda **draws: made(rows_and_columns, *(usual | draws).values())
    width = lambda out: (out[1, 16, 31] - out[1, 16, 0]).item() * 255 * 32 / 31 / 128
    height = lambda out: (out[0, 31, 16] - out[0, 0, 16]).item() * 255 * 32 / 31 / 128
    small, wide = crop(area=0.0), crop(area=0.0, ratio=1.0)
    grey = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    dark, bright = (made(grey, *(usual | {"brightness": v}).values())[0, 0, 0].item() * 2.55 for v in (0.0, 1.0))
    halves = torch.cat([grey - 40, grey + 40], 3)
    contrasts = [made(halves, *(usual | {"area": 1.0, "contrast": v}).values())[0, 16, [0, 31]] for v in (0.0, 1.0)]
    colour = grey.clone()
    colour[:, 0] += 60
    reds = [made(colour, *(usual | {"saturation": v}).values())[:, 0, 0] for v in (0.0, 1.0)]
    return {
        "area": [round(width(small) * height(small), 2), round(width(full := crop(area=1.0)) * height(full), 2)],
        "ratio": [round(height(wide) / width(wide), 2), round(width(wide) / height(wide), 2)],
        "mirrored": 0.5 if width(crop(mirror=0.4999)) < 0 < width(crop(mirror=0.5)) else None,
        "brightness": [round(dark, 2), round(bright, 2)],
        "contrast": [round((ends[1] - ends[0]).item() * 255 / 80, 2) for ends in contrasts],
        "saturation": [round((red[0] - red[1]).item() * 255 / 60, 2) for red in reds],
    }


def modes():
    """In which mode each loss sees the model."""
    seen = []

    class Fake:
        train = lambda self: seen.append("train")
        eval = lambda self: seen.append("eval")
        __call__ = lambda self, episode, n_shot: torch.zeros(10, 5)

    trainer = SimpleNamespace(args=SimpleNamespace(n_shot=1, head="relationnet"))
    for loss in fewshot.Trainer.losses(trainer, None, None):
        loss(Fake())
    return dict(zip(("training loss", "validation loss"), seen))


def of_few_shot():
    usual = ["--data", "filelists", "--held-out", "cub", "--device", "cpu"]
    args = fewshot.parse_args(usual)
    seed_of = lambda: torch.manual_seed(0)
    seed_of()
    trainer = fewshot.Trainer(args, 64)
    small = fewshot.Trainer(
        fewshot.parse_args(["--data", "filelists", "--held-out", "cub", "--device", "cpu", "--image-size", "32"]), 64
    )
    episodes = torch.randn(2, 5, 3, 3, 32, 32)
    step = partial(small.step, (*episodes, torch.randn(2, 3, 32, 32), torch.zeros(2).long()), 1.0)
    printed = flags("cross_domain_fewshot/run.sh", "--data", "filelists", "--data-dir", "data")
    conv = fewshot.parse_args([*usual, "--backbone", "conv4"])
    encoder = pretrain.parse_args(["--data", "filelists", "--out", "x", "--device", "cpu"])
    weight = fewshot.auxiliary_weight
    layers = [m for m in trainer.model.encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return {
        "domains": sorted([*args.seen, args.held_out]),
        "auxiliary classes' domain": args.seen[0],
        "episode": {"n_way": args.n_way, "n_query": args.n_query},
        "epochs": {"number": args.epochs, "episodes": args.episodes},
        "image size": {args.backbone: args.image_size, conv.backbone: conv.image_size},
        "augmentation": image_augmentation(),
        "normalisation": {"mean": list(fewshot_data.MEAN), "std": list(fewshot_data.STD)},
        "backbone": {
            "name": args.backbone,
            "convolutions 3x3 and 7x7": len(layers),
            "features": list(trainer.model.encoder.shape),
        },
        "head": {"name": args.head, "shapes": shapes(trainer.model.head)},
        "transformations": {"number": len(fewshot.transformations(trainer.model)), **transformation()},
        "auxiliary classifier": shapes(trainer.model.classifier),
        "auxiliary loss": {
            "batch size": args.auxiliary_batch,
            "weight after 0, 20, 200, 399 epochs": [round(weight(e, args.epochs), 4) for e in (0, 20, 200, 399)],
        },
        "model's optimizer": optimizer(trainer.optimizer),
        "optimizer of γ and β": optimizer(trainer.meta_optimizer),
        "modes": modes(),
        "order of a step": order(small.optimizer, small.meta_optimizer, step),
        "estimator": estimator(trainer),
        "warm start": {"domain": encoder.domain, "batch size": encoder.batch_size, "lr of Adam": encoder.lr},
        "test": {"episodes": args.test_episodes},
        "table": {
            "held out": printed["--held-out"],
            "shots": [int(v) for v in printed["--n-shot"]],
            "backbones": printed["--backbone"],
        },
    }


def schedule(trainer, n_steps):
    """Where the multiplier of the learning rate has its top, and what it is a step before the end."""
    of = trainer.schedule.lr_lambdas[0]
    factors = [of(step) for step in range(n_steps)]
    top = max(range(n_steps), key=factors.__getitem__)
    straight = all(a - b == pytest.approx(1 / (n_steps - top - 1)) for a, b in itertools.pairwise(factors[top + 1 :]))
    return {"warm-up": (top + 1) / n_steps, "at its top": factors[top], "then": "linear to 0" if straight else "other"}


def clipping(trainer):
    norms = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append((len(list(parameters)), norm)))
        trainer.step(tagger_step())
    ((n, norm),) = norms
    return norm if n == len(trainer.theta) else f"{norm} of {n} parameters"


def best_epoch(dev):
    """The epoch whose parameters are tested, of one with this dev F1 in each."""
    seen = {"dev_f1": [], "losses": [0.0], "best": None, "best_epoch": None}
    keeper = SimpleNamespace(paused=nullcontext, board=None, show=lambda **shown: None)
    trainer = SimpleNamespace(args=SimpleNamespace(eval_every=None, epochs=len(dev)), model=nn.Linear(1, 1))
    for epoch, found in enumerate(dev, start=1):
        metaxl.evaluated(keeper, trainer, lambda split, found=found: found if split == "dev" else None, seen, {}, epoch)
    return seen["best_epoch"]


def of_metaxl():
    args = metaxl.parse_args(["--data", "ner", "--data-dir", "x", "--device", "cpu"])
    n_steps = 200
    trainer = metaxl.Trainer(args, tagger().train(), n_steps)
    printed = flags("metaxl/run.sh", "--data", "ner", "--data-dir", "x")
    toy = metaxl.parse_args(["--device", "cpu", "--source-size", "24", "--dev-size", "4", "--test-size", "4"])
    model, examples, *_ = metaxl.prepare(toy)
    batch = next(metaxl.Steps(args, examples["source"], examples["train"]))
    rtn, depth = RTN(768), model.encoder.config.num_hidden_layers
    schedules = [part for part in vars(trainer).values() if isinstance(part, torch.optim.lr_scheduler.LRScheduler)]
    return {
        "encoder": args.encoder,
        "sentences": {
            "source": args.source,
            "source sentences": args.source_size,
            "target sentences": args.target_size,
            "sub-words": args.max_length,
        },
        "batch": {
            "source": len(batch.source.counts),
            "target, to train": len(batch.target.counts),
            "to validate": len(batch.val.counts),
        },
        "epochs": args.epochs,
        "RTN": {"after": "the last layer" if model.rtn_layers == (depth,) else "others", "shapes": shapes(rtn)},
        "RTN at first": {
            "biases": rtn.inner.bias.abs().max().item() + rtn.outer.bias.abs().max().item(),
            "std of weights · 100": round(100 * rtn.inner.weight.std().item(), 1),
        },
        "perturbed": {"head.": "classifier", "": "all"}[trainer.perturbed],
        "model's optimizer": optimizer(trainer.optimizer),
        "RTN's optimizer": optimizer(trainer.meta_optimizer),
        "schedule": schedule(trainer, n_steps),
        "RTN's schedule": "none" if len(schedules) == 1 else "the model's",
        "gradient norm": clipping(trainer),
        "order of a step": order(trainer.optimizer, trainer.meta_optimizer, partial(trainer.step, tagger_step())),
        "estimator": estimator(trainer),
        "epoch": {3: "dev F1"}.get(best_epoch([10.0, 20.0, 30.0, 25.0]), "other"),
        "table": {"targets": printed["--target"], "seeds": [int(v) for v in printed["--seed"]]},
    }


BUILT = {
    "illustration_1d": of_illustration,
    "rotation": of_rotation,
    "label_noise_mwn": of_label_noise,
    "cross_domain_fewshot": of_few_shot,
    "metaxl": of_metaxl,
}


@cache
def built(experiment):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILT[experiment]()


CASES = [(experiment, entry["name"]) for experiment, entries in SETTINGS.items() for entry in entries]


def test_every_setting_is_read_back():
    assert {name: len(entries) for name, entries in SETTINGS.items()} == {name: len(built(name)) for name in BUILT}
    assert len(set(CASES)) == len(CASES) > 70


@pytest.mark.parametrize(("experiment", "name"), CASES)
def test_a_setting_is_the_papers_or_differs_as_it_says(experiment, name):
    (entry,) = [entry for entry in SETTINGS[experiment] if entry["name"] == name]
    assert built(experiment)[name] == entry.get("ours", entry["value"])
    assert ("ours" in entry) == ("why" in entry) and entry["source"]
    assert "ours" not in entry or entry["ours"] != entry["value"]
