"""Score checkpoints on episodes of any domain, all of them on the same episodes.

    python -m cross_domain_fewshot.evaluate FILE.pt … --domain cub --data filelists --data-dir DIR

Prints, and appends to --out, the mean accuracy and its 95 % interval for each checkpoint, and for each but the first the mean
of the difference to the first one with its own interval, which is narrower since the episodes are the same.
"""

import argparse
from pathlib import Path

from evograd.lab import checkpoints, cli
from evograd.lab.records import append_run

from .data import DATASETS, add_loading_arguments, data_fingerprint, load_domain, prepare_loading
from .models import BACKBONES, HEADS, model_of
from .testing import TEST_SEED, interval, score


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", help="files that train.py has written")
    parser.add_argument("--domain", required=True, help="domain to test on, whatever was held out in training")
    parser.add_argument("--split", choices=("base", "val", "novel"), default="novel", help="its classes")
    parser.add_argument("--data", choices=DATASETS, default="glyphs", help="as in train.py")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="folder of the file lists")
    parser.add_argument("--episodes", type=cli.at_least(2), default=1000, help="how many")
    parser.add_argument("--seed", type=cli.seed, default=TEST_SEED, help="of the episodes")
    parser.add_argument("--n-shot", type=cli.at_least(1), help="support images of each class; default: as in training")
    parser.add_argument("--n-query", type=cli.at_least(1), help="queries of each class; default: as in training")
    parser.add_argument("--backbone", choices=BACKBONES, help="refuse checkpoints of another")
    parser.add_argument("--head", choices=tuple(HEADS), help="refuse checkpoints of another")
    cli.add_device_argument(parser)
    add_loading_arguments(parser)
    parser.add_argument("--out", type=cli.writable, metavar="FILE", help="JSON-lines file that the records are appended to")
    return parser.parse_args(argv)


def load_model(path, args):
    """(model, config) of a checkpoint; ValueError if it is not what `args` asks for."""
    state = checkpoints.load(path)
    if state.get("kind") != "few-shot":
        raise ValueError(f"{path} is no checkpoint of train.py")
    config = state["config"]
    for name in ("backbone", "head"):
        asked = getattr(args, name, None)
        if asked and asked != config[name]:
            raise ValueError(f"{path} is of --{name} {config[name]}; --{name} {asked} was asked for")
    model = model_of(config, state["n_classes"])
    model.load_state_dict(state["model"])
    return model.to(args.device), config


def main(argv=None):
    args = parse_args(argv)
    with cli.exit_on_bad_input():
        models = [load_model(path, args) for path in args.checkpoints]
        first = models[0][1]
        for path, (_, config) in zip(args.checkpoints, models):
            for name in ("image_size", "n_way", *(name for name in ("n_shot", "n_query") if getattr(args, name) is None)):
                if config[name] != first[name]:
                    raise ValueError(
                        f"{path} was trained with {name} {config[name]}, {args.checkpoints[0]} with {first[name]}: "
                        "they cannot share episodes"
                    )
        settings = argparse.Namespace(**{name: first[name] for name in ("n_way", "n_shot", "n_query", "image_size")})
        settings.n_shot, settings.n_query = args.n_shot or settings.n_shot, args.n_query or settings.n_query
        images = load_domain(args.data, args.data_dir, args.domain, args.split, settings.image_size)
        images.check(settings.n_way, settings.n_shot, settings.n_query)
        n_workers = prepare_loading([images], args.cache_gb, args.workers, args.device)
    results = [score(model, images, settings, args.episodes, args.seed, n_workers) for model, _ in models]
    for path, (_, config), accuracies in zip(args.checkpoints, models, results):
        mean, half_width = interval(accuracies)
        metrics = {"accuracy": mean, "interval": half_width}
        line = f"{Path(path).stem}: {mean:.2f} ± {half_width:.2f} %"
        if accuracies is not results[0]:
            metrics["difference"], metrics["difference_interval"] = interval(accuracies - results[0])
            line += f"; {metrics['difference']:+.2f} ± {metrics['difference_interval']:.2f} to the first"
        print(line)
        if args.out:
            tested = {"domain": args.domain, "split": args.split, "test_episodes": args.episodes, "test_seed": args.seed}
            tested["test_fingerprint"] = data_fingerprint([images])
            config = {**config, **vars(settings), **tested}
            append_run(args.out, "cross_domain_fewshot_test", config, metrics, {}, args.device)


if __name__ == "__main__":
    main()
