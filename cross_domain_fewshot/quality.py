"""How good each estimate of the hypergradient of γ and β is: cosine to exact T1-T2, on the state of one checkpoint.

    python -m cross_domain_fewshot.quality FILE.pt [--data-dir DIR] [--steps 20] [--out FILE.jsonl]

For each of --steps pairs of episodes, the exact hypergradient is that through one SGD step of the model's learning rate on the
pseudo-seen episode (double backward), for one draw of the transformations' noise. Every estimate starts from the same draw.
EvoGrad's candidates after the first then draw others; with common random numbers (…_common) they all have that of the exact
hypergradient. Parameters, γ and β stay as they are. Each estimator has a record of its own: means over the steps.
"""

import argparse

import torch
from tqdm import tqdm

from evograd.comparison import agreement
from evograd.lab import checkpoints, cli
from evograd.lab.records import append_run, mean_std, seed_everything

from .data import TrainingSteps, data_fingerprint, load_domain, prepare_loading, stream
from .models import transformations
from .train import Trainer, prepare


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "checkpoint", help="file that train.py has written, of a method with transformations: the state to look at"
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="folder of the file lists")
    parser.add_argument("--steps", type=cli.at_least(2), default=20, help="pairs of episodes")
    parser.add_argument("--seed", type=cli.seed, default=1, help="of the episodes and of the noise")
    cli.add_device_argument(parser)
    parser.add_argument("--out", type=cli.writable, metavar="FILE", help="JSON-lines file that the records are appended to")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with cli.exit_on_bad_input():
        state = checkpoints.load(args.checkpoint)
        if state.get("kind") != "few-shot":
            raise ValueError(f"{args.checkpoint} is no checkpoint of train.py")
        config = state["config"]
        if config["method"] == "none":
            raise ValueError(f"{args.checkpoint} is of method 'none': it has no transformations")
        here = {"device": args.device, "data_dir": args.data_dir, "log_quality": None, "share": None}
        settings = argparse.Namespace(**{**config, **here})
        trainer = Trainer(settings, state["n_classes"])
        trainer.model.load_state_dict(state["model"])
        domains = [load_domain(config["data"], args.data_dir, name, "base", config["image_size"]) for name in config["seen"]]
        n_workers = prepare_loading(domains, 4.0, None, args.device)
    seed_everything(args.seed)
    n_images = config["n_shot"] + config["n_query"]
    # Other episodes than those that it was trained on, each pair from domains of its own.
    steps = TrainingSteps(domains, args.seed + 10_000, 1, config["n_way"], n_images, 1, with_unseen=True)
    generator = torch.Generator().manual_seed(args.seed)
    modules = transformations(trainer.model).values()
    parts = {"": trainer.hyperparameters, "_gamma": [m.gamma for m in modules], "_beta": [m.beta for m in modules]}
    places = {
        key: [next(i for i, h in enumerate(trainer.hyperparameters) if h is p) for p in part] for key, part in parts.items()
    }
    for p in trainer.hyperparameters:
        p.requires_grad_(True)
    seen = {}  # {estimator: {measure and part: values}}
    batches = stream(steps, range(args.steps), n_workers, pin=args.device.type == "cuda")
    for t, batch in enumerate(tqdm(batches, total=args.steps, desc="quality", unit="step", mininterval=1)):
        train_loss, val_loss = trainer.losses(*prepare(settings, batch, generator)[:2])

        def grads(estimate):
            torch.manual_seed(args.seed * 1_000_003 + t)  # the same draws of the transformations for all
            return estimate().grads

        problem = (train_loss, val_loss, trainer.model, trainer.hyperparameters)
        estimates = trainer.meta.estimates(*problem, parameters=list(trainer.episodic), lr=settings.lr)
        exact = grads(estimates.pop("exact"))
        for name, estimate in estimates.items():
            grad, values = grads(estimate), seen.setdefault(name, {})
            for key, indices in places.items():
                result = agreement([grad[i] for i in indices], [exact[i] for i in indices])
                for measure, value in result.items():
                    values.setdefault(f"{measure}{key}", []).append(value)
    metrics = {}
    print(f"{'mean of ' + str(args.steps) + ' steps':26}{'cosine':>10}{'± s.d.':>9}{'γ':>8}{'β':>8}{'sign':>8}{'norm':>9}")
    for name, values in seen.items():
        means = {key: mean_std(numbers)[0] for key, numbers in values.items()}
        deviation = mean_std(values["cosine"])[1]
        metrics[name] = {**means, "cosine_std": deviation, "positive": mean_std(float(c > 0) for c in values["cosine"])[0]}
        print(
            f"{name:26}{means['cosine']:10.3f}{deviation:9.3f}{means['cosine_gamma']:8.3f}{means['cosine_beta']:8.3f}"
            f"{means['sign']:8.3f}{means['norm']:9.2f}"
        )
    if args.out:
        tested = {"quality_steps": args.steps, "quality_seed": args.seed}
        tested["quality_fingerprint"] = data_fingerprint(domains)
        for name, values in metrics.items():
            append_run(
                args.out, "cross_domain_fewshot_quality", {**config, **tested, "estimator": name}, values, {}, args.device
            )


if __name__ == "__main__":
    main()
