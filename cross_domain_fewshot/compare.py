"""What one step of each method costs, measured side by side: time, FLOPs, peak bytes.

    python -m cross_domain_fewshot.compare [--json FILE]                 the paper's size; on a CPU it takes long
    python -m cross_domain_fewshot.compare --fake                        the same without time, on any machine, in a minute
    python -m cross_domain_fewshot.compare --image-size 84 --repeats 3   a size at which a small CPU can take the time

A step is the model's update and that of γ and β: RelationNet, 5-way 5-shot, 16 queries, auxiliary batch 16, random pixels.
"plain" is the model's update alone, with fixed transformations. On a CUDA device the peak is the allocator's; elsewhere
peak and FLOPs are counted on tensors that have shapes and no values (FakeTensorMode): the same numbers as of real ones.
Also printed: the peak of larger backbones in GB, counted that way, beside the 12 GB of the paper's cards. Deeper ones, more
candidates and what fits into which card: scale.py.
"""

from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evograd.lab import cli
from evograd.lab.records import seed_everything
from evograd.measuring import Cost, compare_made, counts, seconds

from .models import RESNETS
from .train import Trainer, parse_args

N_CLASSES = 64  # miniImagenet's base classes
PLAIN = "fixed"
PRINTED = ("resnet10", "resnet18", "resnet34", "resnet50")  # of the table of peaks


def make_step(method, backbone, image_size, device):
    """One step of a method on a batch of random pixels, a function of further settings of the estimator, if any."""
    arguments = ["--method", method, "--data", "filelists", "--held-out", "cub", "--n-shot", "5"]
    arguments += ["--backbone", backbone, "--image-size", str(image_size), "--device", str(device)]
    args = parse_args(arguments)
    trainer = Trainer(args, N_CLASSES)
    seen, unseen = torch.randn(2, args.n_way, args.n_shot + args.n_query, 3, image_size, image_size, device=device)
    images = torch.randn(args.auxiliary_batch, 3, image_size, image_size, device=device)
    classes = torch.arange(args.auxiliary_batch, device=device) % N_CLASSES
    estimator = trainer.meta.estimator

    def step(**settings):
        trainer.meta.estimator = partial(estimator, **settings) if settings else estimator
        return trainer.step((seen, unseen, images, classes), 1.0)

    return step


def counted(method, backbone, image_size):
    """Cost without seconds: exact, and neither memory nor time of the real size is needed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = make_step(method, backbone, image_size, torch.device("cpu"))
        return Cost(None, *counts(step))


def main(argv=None):
    parser = cli.comparison_parser(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--backbone", choices=tuple(RESNETS), default="resnet10", help="of the comparison of methods")
    parser.add_argument("--image-size", type=cli.at_least(32), default=224, help="pixels")
    parser.add_argument("--fake", action="store_true", help="take no time: count FLOPs and bytes only")
    args = parser.parse_args(argv)
    seed_everything(1)
    methods = [PLAIN, *args.methods]
    if args.device.type == "cuda" and not args.fake:
        makers = {method: partial(make_step, method, args.backbone, args.image_size, args.device) for method in methods}
        costs = compare_made(makers, args.device, args.repeats)
    else:
        costs = {method: counted(method, args.backbone, args.image_size) for method in methods}
    if args.device.type == "cpu" and not args.fake:
        steps = {method: make_step(method, args.backbone, args.image_size, args.device) for method in methods}
        times = seconds(steps, args.repeats, warmup=1)
        costs = {method: replace(cost, seconds=times[method]) for method, cost in costs.items()}
    costs = {"plain" if method == PLAIN else method: cost for method, cost in costs.items()}

    gigabytes = {}
    for backbone in PRINTED:
        of_methods = {"plain": PLAIN, "evograd": "evograd", "second_order": "second_order"}
        peaks = {name: counted(m, backbone, args.image_size).peak_bytes / 1e9 for name, m in of_methods.items()}
        gigabytes[backbone] = peaks
    config = {"backbone": args.backbone, "head": "relationnet", "image_size": args.image_size, "n_shot": 5, "fake": args.fake}
    cli.finish_comparison(args, "cross_domain_fewshot", config, costs, {"peak_gigabytes": gigabytes})
    print(f"\n{'peak (GB)':16}" + "".join(f"{name:>14}" for name in of_methods) + "     the paper's cards have 12")
    for backbone, peaks in gigabytes.items():
        print(f"{backbone:16}" + "".join(f"{peak:14.2f}" for peak in peaks.values()))


if __name__ == "__main__":
    main()
