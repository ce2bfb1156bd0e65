"""What one step of each method costs at the paper's size, measured side by side: time, FLOPs, peak bytes.

    python -m label_noise_mwn.compare [--json FILE] [--model resnet32] [--width 1] [--n-classes 10] [--channels-last]
    python -m label_noise_mwn.compare --fake --model wrn28_10       without time, on any machine: FLOPs and bytes are counted
                                                                    on tensors that have shapes and no values (FakeTensorMode)
    python -m label_noise_mwn.compare --paper-cost --width 5        a case of the paper's cost figures: resources/cost.sh
    python -m label_noise_mwn.compare --variants                    what channels last, torch.compile, CUDA graphs and autocast save

A step is the weight net's update and the model's, on random images of CIFAR's size; "plain" is the model's update alone.
"trajectory" has a horizon of one step, and is beyond its first ones: its radius is found.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evograd.lab import cli, costs
from evograd.lab.records import append_run, seed_everything
from evograd.measuring import compare_made, seconds

from .data import CIFAR_MEAN, CIFAR_STD, Source, make_task
from .models import MODELS
from .train import Trainer, parse_args


def random_source(n, n_classes=10, size=32):
    """n training images of random pixels, as many of each class as of the others."""
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(n) % n_classes
    return Source(images, labels, images[:n_classes], labels[:n_classes], mean=CIFAR_MEAN, std=CIFAR_STD)


def random_task(args, device):
    """A batch of noisy images of it, a batch of clean ones, and one image of each class to validate."""
    n_meta = -(-args.batch_size // args.n_classes) * args.n_classes
    source = random_source(args.batch_size + n_meta + args.n_classes, args.n_classes)
    return make_task(source, "flip2", 0.4, n_meta, args.n_classes, None, 1, device)


def makers(args, settings, device):
    """{method: function that makes its step on that device}"""
    task = random_task(args, device)  # outside of any fake mode
    parsed = lambda method: parse_args([*settings, "--device", str(device), *costs.flags_of(method)])
    make = lambda method: costs.carried_on(Trainer(parsed(method), task)).step
    return {"plain" if m == "cross_entropy" else m: partial(make, m) for m in ("cross_entropy", *args.methods)}


VARIANTS = {
    "contiguous": [],
    "channels_last": ["--channels-last"],
    "compiled": ["--compile"],
    "channels_last_compiled": ["--channels-last", "--compile"],
    "cuda_graphs": ["--compile", "reduce-overhead"],
    "autocast": ["--amp"],  # in the ordinary step
}


def variants(args, settings):
    """How many times faster each method's step is with each variant than without; all take turns."""
    steps, task = {}, random_task(args, args.device)
    chosen = {name: flags for name, flags in VARIANTS.items() if name != "cuda_graphs" or args.device.type == "cuda"}
    for method in ("cross_entropy", *args.methods):
        for variant, flags in chosen.items():
            arguments = [*settings, *flags, "--device", str(args.device), *costs.flags_of(method)]
            trainer = costs.carried_on(Trainer(parse_args(arguments), task))
            steps["plain" if method == "cross_entropy" else method, variant] = trainer.step
    times = seconds(steps, args.repeats, warmup=3, **cli.MEASURING)
    faster = {variant: {} for variant in chosen}
    for (method, variant), time in times.items():
        faster[variant][method] = times[method, "contiguous"] / time
    for variant, methods in faster.items():
        print(f"{variant:24}" + "".join(f"{method:>16}{value:6.2f}" for method, value in methods.items()))
    return faster


def main(argv=None):
    parser = cli.comparison_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="resnet32")
    parser.add_argument("--width", type=cli.at_least(1), default=1, metavar="N", help="N times the model's channels")
    parser.add_argument("--n-classes", type=cli.at_least(3), default=10, metavar="N", help="of the images: CIFAR-10's or 100")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=100, help="of noisy and of meta images")
    parser.add_argument("--channels-last", action="store_true", help="memory format of images and model")
    parser.add_argument("--fake", action="store_true", help="take no time: count FLOPs and bytes only")
    parser.add_argument("--variants", action="store_true", help="of every step: what memory format, compiler and autocast save")
    costs.add_argument(parser)
    args = parser.parse_args(argv)
    if args.variants and (args.fake or args.channels_last or args.json):
        parser.error("--variants goes with --model, --width, --n-classes, --batch-size, --methods, --repeats and --out alone")
    costs.check_argument(parser, args)
    seed_everything(1)
    settings = ["--data", "cifar10", "--model", args.model, "--width", str(args.width), "--batch-size", str(args.batch_size)]
    late = {"width": (args.width, 1), "n_classes": (args.n_classes, 10)}  # older records do not have them
    config = {"model": args.model, **{name: value for name, (value, usual) in late.items() if value != usual}}
    config["batch_size"] = args.batch_size
    if args.variants:
        faster = variants(args, settings)
        if args.out:
            append_run(args.out, "label_noise_mwn_variants", config, faster, {}, args.device)
        return
    settings += ["--channels-last"] * args.channels_last
    config["channels_last"] = args.channels_last
    if args.paper_cost:
        costs.record_case(args, "label_noise_mwn", config, partial(makers, args, settings))
        return
    to_make = makers(args, settings, args.device)
    with FakeTensorMode(allow_non_fake_inputs=True) if args.fake else nullcontext():
        found = compare_made(to_make, args.device, args.repeats, **cli.MEASURING)
    cli.finish_comparison(args, "label_noise_mwn", config, found)


if __name__ == "__main__":
    main()
