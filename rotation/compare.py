"""What one step of each method costs, measured side by side: time, FLOPs, peak bytes.

    python -m rotation.compare [--json FILE]

A step is the model's update and the angle's, on batches of 128 embedded digits; "plain" is the model's update alone.
"""

from functools import partial

from evograd.lab import cli, costs
from evograd.lab.records import seed_everything
from evograd.measuring import compare_made

from .data import load
from .train import Trainer, parse_args


def main(argv=None):
    args = cli.comparison_parser(__doc__).parse_args(argv)
    seed_everything(1)
    train, val, _ = load("digits", "", args.device)
    parsed = lambda method: parse_args([*costs.flags_of(method), "--device", str(args.device)])
    make = lambda method: costs.carried_on(Trainer(parsed(method), train, val)).step
    makers = {"plain" if m == "baseline" else m: partial(make, m) for m in ("baseline", *args.methods)}
    found = compare_made(makers, args.device, args.repeats, **cli.MEASURING)
    cli.finish_comparison(args, "rotation", {"data": "digits", "batch_size": 128}, found)


if __name__ == "__main__":
    main()
