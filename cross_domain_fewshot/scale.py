"""What one step needs as the backbone gets deeper and the candidates more: peak bytes and FLOPs, by method.

    python -m cross_domain_fewshot.scale [--out FILE.jsonl]                                    ResNet-10 … 152, K = 2 … 128
    python -m cross_domain_fewshot.scale --check --image-size 84 --backbones resnet18 resnet34    are the counts right?

The step is that of compare.py, at 224 px. It runs on tensors that have shapes and no values (FakeTensorMode), so a laptop can
tell what does not fit into it; what is counted are live tensors, to which a real device adds workspaces. --check runs the
same steps for real, on --device, and compares the peaks. One record is appended to --out. The whole takes a quarter of an
hour of one CPU core.
"""

from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from evograd.lab import cli
from evograd.lab.costs import counted
from evograd.lab.records import append_run, seed_everything
from evograd.measuring import peak_bytes

from .compare import PLAIN, make_step
from .models import RESNETS

METHODS = {"plain": PLAIN, **{m: m for m in ("evograd", "evograd_guided", "mixed_mode", "second_order")}}
CARDS = (12, 24, 80)  # GB = 10⁹ bytes
BACKBONE = "resnet18"  # of the sweep over K
STRATEGIES = ("stream", "retain")  # retain: all K graphs alive at once, as in the authors' code


def over_backbones(backbones, image_size):
    """{backbone: {method: {peak_bytes, flops}}}"""
    result = {}
    for backbone in (progress := tqdm(backbones, unit="backbone")):
        progress.set_description(backbone)
        result[backbone] = {}
        for name, method in METHODS.items():
            cost = counted(partial(make_step, method, backbone, image_size, torch.device("cpu")))
            result[backbone][name] = {"peak_bytes": cost.peak_bytes, "flops": cost.flops}
    return result


def over_candidates(numbers, image_size):
    """{strategy: {K: peak bytes}}"""
    result = {strategy: {} for strategy in STRATEGIES}
    for strategy, k in (progress := tqdm([(s, k) for s in STRATEGIES for k in numbers], unit="setting")):
        progress.set_description(f"{BACKBONE}, {strategy}, K = {k}")
        result[strategy][k] = simulated_peak("evograd", BACKBONE, image_size, n_candidates=k, strategy=strategy)
    return result


def simulated_peak(method, backbone, image_size, **settings):
    """Peak bytes of a step that is not computed. settings: of the estimator."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = make_step(method, backbone, image_size, torch.device("cpu"))
        return peak_bytes(partial(step, **settings), first=step)


def deepest(costs):
    """{method: {GB: the last backbone of `costs` whose peak fits, or "none"}}"""
    result = {}
    for method in METHODS:
        fits = {card: [b for b, of in costs.items() if of[method]["peak_bytes"] <= card * 1e9] for card in CARDS}
        result[method] = {card: names[-1] if names else "none" for card, names in fits.items()}
    return result


def check(backbones, image_size, device):
    """{backbone: {method: {simulated, measured}}}, both peak bytes."""
    result = {}
    for backbone in backbones:
        result[backbone] = {}
        for name, method in METHODS.items():
            measured = peak_bytes(make_step(method, backbone, image_size, device))
            simulated = simulated_peak(method, backbone, image_size)
            result[backbone][name] = {"simulated": simulated, "measured": measured, "ratio": simulated / measured}
            print(
                f"{backbone:12}{name:16} simulated {simulated / 1e6:9.1f} MB, "
                f"measured {measured / 1e6:9.1f} MB, {100 * (simulated / measured - 1):+.2f} %"
            )
    return result


def main(argv=None):
    parser = cli.Parser(description=__doc__)
    cli.add_device_argument(parser)
    parser.add_argument("--backbones", nargs="+", choices=tuple(RESNETS), default=tuple(RESNETS), help="from shallow to deep")
    parser.add_argument("--image-size", type=cli.at_least(32), default=224, help="pixels")
    parser.add_argument(
        "--n-candidates",
        type=cli.at_least(2),
        nargs="+",
        default=(2, 8, 32, 128),
        metavar="K",
        help="with ResNet-18",
    )
    parser.add_argument("--check", action="store_true", help="run the steps for real as well, and compare the peaks")
    parser.add_argument("--out", type=cli.writable, metavar="FILE", help="JSON-lines file that the record is appended to")
    args = parser.parse_args(argv)
    if args.check and args.n_candidates != parser.get_default("n_candidates"):
        parser.error("--n-candidates given, but --check does not read it")
    seed_everything(1)
    config = {"head": "relationnet", "image_size": args.image_size, "n_shot": 5, "backbones": args.backbones}
    if args.check:
        metrics = check(args.backbones, args.image_size, args.device)
        if args.out:
            append_run(args.out, "cross_domain_fewshot_scale_check", config, metrics, {}, args.device)
        return

    backbones = over_backbones(args.backbones, args.image_size)
    candidates = over_candidates(args.n_candidates, args.image_size)
    metrics = {"backbones": backbones, "deepest": deepest(backbones), "candidates": candidates}
    config |= {"n_candidates": args.n_candidates, "backbone_of_candidates": BACKBONE}
    if args.out:
        append_run(args.out, "cross_domain_fewshot_scale", config, metrics, {}, torch.device("cpu"))
    print(f"\n{'peak (GB)':16}" + "".join(f"{name:>16}" for name in METHODS))
    for backbone, costs in backbones.items():
        print(f"{backbone:16}" + "".join(f"{costs[name]['peak_bytes'] / 1e9:16.2f}" for name in METHODS))
    for card in CARDS:
        print(f"{f'fits into {card}':16}" + "".join(f"{metrics['deepest'][name][card]:>16}" for name in METHODS))
    print(f"\n{f'{BACKBONE} (GB)':16}" + "".join(f"{strategy:>16}" for strategy in STRATEGIES))
    for k in args.n_candidates:
        print(f"{f'K = {k}':16}" + "".join(f"{candidates[s][k] / 1e9:16.2f}" for s in STRATEGIES))


if __name__ == "__main__":
    main()
