"""What one step of each method costs at the paper's size, measured side by side: time, FLOPs, peak bytes.

    python -m label_noise_mwn.compare [--json FILE] [--model resnet32] [--width 1] [--batch-size 100] [--channels-last]
    python -m label_noise_mwn.compare --fake --model wrn28_10       without time, on any machine: FLOPs and bytes are counted
                                                                    on tensors that have shapes and no values (FakeTensorMode)
    python -m label_noise_mwn.compare --variants                    what channels last, torch.compile, CUDA graphs and autocast save

A step is the weight net's update and the model's, on random images of CIFAR's size; "plain" is the model's update alone.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evograd.lab import cli
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


VARIANTS = {
    "contiguous": [],
    "channels_last": ["--channels-last"],
    "compiled": ["--compile"],
    "channels_last_compiled": ["--channels-last", "--compile"],
    "cuda_graphs": ["--compile", "reduce-overhead"],
    "autocast": ["--amp"],  # in the ordinary step
}


def variants(args, common, task):
    """How many times faster each method's step is with each variant than without; all take turns."""
    steps = {}
    chosen = {name: flags for name, flags in VARIANTS.items() if name != "cuda_graphs" or args.device.type == "cuda"}
    for method in ("cross_entropy", *args.methods):
        for variant, flags in chosen.items():
            trainer = Trainer(parse_args([*common, *flags, "--method", method]), task)
            steps["plain" if method == "cross_entropy" else method, variant] = trainer.step
    times = seconds(steps, args.repeats, warmup=3)
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
    parser.add_argument("--batch-size", type=cli.at_least(1), default=100, help="of noisy and of meta images")
    parser.add_argument("--channels-last", action="store_true", help="memory format of images and model")
    parser.add_argument("--fake", action="store_true", help="take no time: count FLOPs and bytes only")
    parser.add_argument("--variants", action="store_true", help="of every step: what memory format, compiler and autocast save")
    args = parser.parse_args(argv)
    if args.variants and (args.fake or args.channels_last or args.json):
        parser.error("--variants goes with --model, --width, --batch-size, --methods, --repeats and --out alone")
    seed_everything(1)
    n_meta = -(-args.batch_size // 10) * 10
    task = make_task(random_source(args.batch_size + n_meta + 10), "flip2", 0.4, n_meta, 10, None, 1, args.device)
    common = ["--data", "cifar10", "--device", str(args.device), "--model", args.model, "--width", str(args.width)]
    common += ["--batch-size", str(args.batch_size)]
    config = {"model": args.model, "width": args.width if args.width > 1 else None, "batch_size": args.batch_size}
    if args.variants:
        faster = variants(args, common, task)
        if args.out:
            append_run(args.out, "label_noise_mwn_variants", config, faster, {}, args.device)
        return
    common += ["--channels-last"] * args.channels_last
    with FakeTensorMode(allow_non_fake_inputs=True) if args.fake else nullcontext():
        make = lambda method: Trainer(parse_args([*common, "--method", method]), task).step
        makers = {"plain" if m == "cross_entropy" else m: partial(make, m) for m in ("cross_entropy", *args.methods)}
        costs = compare_made(makers, args.device, args.repeats)
    cli.finish_comparison(args, "label_noise_mwn", {**config, "channels_last": args.channels_last}, costs)


if __name__ == "__main__":
    main()
