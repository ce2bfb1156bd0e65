"""What one step of each method costs, measured side by side: time, FLOPs, peak bytes.

    python -m cross_domain_fewshot.compare [--json FILE]                 the paper's size; on a CPU it takes long
    python -m cross_domain_fewshot.compare --fake                        the same without time, on any machine, in a minute
    python -m cross_domain_fewshot.compare --image-size 84 --repeats 3   a size at which a small CPU can take the time
    python -m cross_domain_fewshot.compare --paper-cost --n-shot 1       a case of the paper's cost figures: resources/cost.sh

A step is the model's update and that of γ and β: RelationNet, 5-way 5-shot, 16 queries, auxiliary batch 16, random pixels.
"plain" is the model's update alone, with fixed transformations. On a CUDA device the peak is the allocator's; elsewhere
peak and FLOPs are counted on tensors that have shapes and no values (FakeTensorMode): the same numbers as of real ones.
Deeper backbones, more candidates and what fits into which card: scale.py.
"""

from dataclasses import replace
from functools import partial

import torch

from evograd.lab import cli, costs
from evograd.lab.costs import all_counted
from evograd.lab.records import seed_everything
from evograd.measuring import compare_made, seconds

from .models import RESNETS
from .train import Trainer, parse_args

N_CLASSES = 64  # miniImagenet's base classes
PLAIN = "fixed"


def make_step(method, backbone, image_size, device, n_shot=5):
    """One step of a method on a batch of random pixels, a function of further settings of the estimator, if any."""
    arguments = [*costs.flags_of(method), "--data", "filelists", "--held-out", "cub", "--n-shot", str(n_shot)]
    arguments += ["--backbone", backbone, "--image-size", str(image_size), "--device", str(device)]
    args = parse_args(arguments)
    trainer = costs.carried_on(Trainer(args, N_CLASSES))
    seen, unseen = torch.randn(2, args.n_way, args.n_shot + args.n_query, 3, image_size, image_size, device=device)
    images = torch.randn(args.auxiliary_batch, 3, image_size, image_size, device=device)
    classes = torch.arange(args.auxiliary_batch, device=device) % N_CLASSES
    estimator = trainer.meta.estimator

    def step(**settings):
        trainer.meta.estimator = partial(estimator, **settings) if settings else estimator
        return trainer.step((seen, unseen, images, classes), 1.0)

    return step


def makers(args, device):
    """{method: function that makes its step on that device}"""
    make = lambda method: make_step(method, args.backbone, args.image_size, device, args.n_shot)
    return {"plain" if m == PLAIN else m: partial(make, m) for m in (PLAIN, *args.methods)}


def main(argv=None):
    parser = cli.comparison_parser(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--backbone", choices=tuple(RESNETS), default="resnet10", help="of the encoder")
    parser.add_argument("--n-shot", type=cli.at_least(1), default=5, help="support images of each class")
    parser.add_argument("--image-size", type=cli.at_least(32), default=224, help="pixels")
    parser.add_argument("--fake", action="store_true", help="take no time: count FLOPs and bytes only")
    costs.add_argument(parser)
    args = parser.parse_args(argv)
    costs.check_argument(parser, args)
    seed_everything(1)
    config = {"backbone": args.backbone, "head": "relationnet", "image_size": args.image_size, "n_shot": args.n_shot}
    if args.paper_cost:
        costs.record_case(args, "cross_domain_fewshot", config, partial(makers, args))
        return
    to_make = makers(args, args.device)
    if args.device.type == "cuda" and not args.fake:
        found = compare_made(to_make, args.device, args.repeats, **cli.MEASURING)
    else:
        found = all_counted(makers(args, torch.device("cpu")))
    if args.device.type == "cpu" and not args.fake:
        times = seconds({name: make() for name, make in to_make.items()}, args.repeats, warmup=1, **cli.MEASURING)
        found = {name: replace(cost, seconds=times[name]) for name, cost in found.items()}
    cli.finish_comparison(args, "cross_domain_fewshot", {**config, "fake": args.fake}, found)


if __name__ == "__main__":
    main()
