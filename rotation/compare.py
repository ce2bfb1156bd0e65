"""What one step of each method costs, measured side by side: time, FLOPs, peak bytes.

    python -m rotation.compare [--json FILE]

A step is the model's update and the angle's, on batches of 128 embedded digits; "plain" is the model's update alone.
"""

from evograd.lab import cli
from evograd.lab.records import seed_everything
from evograd.measuring import compare

from .data import load
from .train import Trainer, parse_args


def main(argv=None):
    args = cli.comparison_parser(__doc__).parse_args(argv)
    seed_everything(1)
    train, val, _ = load("digits", "", args.device)
    trainers = {
        m: Trainer(parse_args(["--method", m, "--device", str(args.device)]), train, val) for m in ("baseline", *args.methods)
    }
    costs = compare({"plain" if m == "baseline" else m: t.step for m, t in trainers.items()}, args.repeats)
    cli.finish_comparison(args, "rotation", {"data": "digits", "batch_size": 128}, costs)


if __name__ == "__main__":
    main()
