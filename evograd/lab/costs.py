"""One case of the paper's cost figures (3 to 6): what a step of every method costs there.

On CUDA everything is measured. On a CPU bytes and FLOPs are counted on tensors without values, exactly, and time is taken where
no step takes more than a minute by its FLOPs. cost_figures.py draws the records.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..measuring import Cost, Step, compare_made, counts, seconds
from ..radius import LONGEST, start
from . import cli
from .methods import ESTIMATORS
from .records import find_run, given
from .tables import named

LIMIT = 60.0  # seconds of a step, by its FLOPs, that are worth waiting for on a CPU
BUDGET = 90.0  # seconds for the turns of a case; one turn there is in any case
Makers = Callable[[torch.device], Mapping[str, Callable[[], Step]]]


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--paper-cost",
        action="store_true",
        help="a case of the paper's cost figures: on a CPU count bytes and FLOPs on tensors without values, and take the time "
        "where by FLOPs no step takes more than a minute; do nothing if --out has the case",
    )


def flags_of(method: str) -> list[str]:
    """Of a training script whose every step is to cost the same."""
    reads = ESTIMATORS[method].reads if method in ESTIMATORS else ()
    return ["--method", method, *(["--horizon", "1"] if "horizon" in reads else [])]


def carried_on(trainer):
    """A new Trainer as it is among many steps: its Radius is found, and most steps of a trajectory need no pair."""
    found = {"value": start(torch.finfo(torch.float32).eps), "retakes": 0, "age": 0, "run": LONGEST}
    if trainer.meta.trajectory is not None:
        trainer.meta.radius.load_state_dict(found)
    return trainer


def check_argument(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.paper_cost and args.fake:
        parser.error("--fake and --paper-cost given, but the latter counts without time wherever time is out of reach")


def record_case(args: argparse.Namespace, experiment: str, config: dict, makers: Makers) -> None:
    """Measure one case, print it and append its record to --out, unless that has it.

    makers: device -> {method: function that makes its step there}, "plain" among them.
    """
    config = {**config, "device": args.device.type}
    kind = f"{experiment}_paper_cost"
    found = find_run(args.out, kind, config) if args.out else None
    if found and {"plain", *args.methods} <= set(found["metrics"]):
        print(f"nothing to do: {args.out} has {named(given(config))} already")
        return
    cli.finish_comparison(args, experiment, config, case_costs(makers, args.device, args.repeats), kind=kind)


def case_costs(makers: Makers, device: torch.device, repeats: int) -> dict[str, Cost]:
    """{method: cost}; its seconds are None where they could not be measured.

    On CUDA one method at a time is measured; what does not fit into the card is counted, as everything is on a CPU. There
    `repeats` is the most turns that are taken.
    """
    if device.type != "cuda":
        costs = all_counted(makers(device))
        times = case_seconds(makers(device), costs, repeats)
        return {name: replace(cost, seconds=times.get(name)) for name, cost in costs.items()}
    costs = {}
    for name, make in makers(device).items():
        try:
            costs |= compare_made({name: make}, device, repeats, **cli.MEASURING)
        except torch.cuda.OutOfMemoryError:
            print(f"{name} does not fit into the card: its bytes and FLOPs are counted")
        if name not in costs:  # outside of the clause, whose error keeps the step's tensors
            torch.cuda.empty_cache()
            costs[name] = counted(makers(torch.device("cpu"))[name])
    return costs


def counted(make: Callable[[], Step]) -> Cost:
    """Cost without seconds: exact, and neither memory nor time of the real size is needed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return Cost(None, *counts(make()))


def all_counted(makers: Mapping[str, Callable[[], Step]]) -> dict[str, Cost]:
    return {name: counted(make) for name, make in cli.progress(list(makers.items()))}


def case_seconds(makers: Mapping[str, Callable[[], Step]], costs: Mapping[str, Cost], most: int) -> dict[str, float]:
    """Median seconds of each method's step over at most `most` turns; {} where one takes longer than LIMIT, by its FLOPs."""
    plain = costs["plain"].flops
    slowest = max(cost.flops for cost in costs.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # No step is faster than its matrix products, so that what is out of reach is not begun.
    if max(cost.peak_bytes for cost in costs.values()) > 3 / 4 * memory or slowest / flops_a_second() > LIMIT:
        return {}
    seconds_of_plain = seconds({"plain": makers["plain"]()}, repeats=1, warmup=0)["plain"]
    if seconds_of_plain * slowest / plain > LIMIT:
        return {}
    turn = seconds_of_plain * sum(cost.flops for cost in costs.values()) / plain
    turns = max(1, min(most, int(BUDGET / turn)))
    if turns == 1:  # one after the other, so that their models are not in memory together
        return {name: seconds({name: makers[name]()}, repeats=1, warmup=0)[name] for name in cli.progress(list(makers))}
    warmup = int(turns > 2)  # the first turn of a long step is no slower than the others
    return seconds({name: make() for name, make in makers.items()}, turns - warmup, warmup, progress=cli.progress)


def flops_a_second() -> float:
    a = torch.ones(1024, 1024)
    return 2 * len(a) ** 3 / seconds({"product": lambda: a @ a}, repeats=3)["product"]
