"""What the command lines of the experiments share, so that the same flag means the same in all of them."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from tqdm import tqdm

from ..host.processes import SHARES
from ..measuring import Cost, by_architecture
from . import methods
from .methods import ESTIMATORS, Method
from .processes import world_size
from .records import append_run, check_writable, environment, write_text


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and defaults beside the flags that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Patient:
    """A stream whose reader may go away, as a terminal does: what cannot be written is dropped, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # ± in a locale that has none

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Nowhere(io.TextIOBase):
    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)


def fill_descriptors() -> None:
    """Of 0, 1 and 2 those that are closed, so that no file gets a number that libraries print errors to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def patient_streams() -> None:
    """stdout and stderr outlive their terminal, and print what they cannot encode as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = Nowhere()
            fill_descriptors()
        if not isinstance(stream, Patient):
            setattr(sys, name, Patient(stream))


class Parser(argparse.ArgumentParser):
    """A wrong argument is answered with one line on usage and one on the error, and exit code 2."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Help, **settings)

    def parse_known_args(self, *arguments, **settings):
        patient_streams()
        return super().parse_known_args(*arguments, **settings)

    def error(self, message: str):
        self.exit(2, f"usage: {self.prog} [flags]; --help lists them\n{self.prog}: error: {message}\n")


def check_files(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """An error that names the files that are not there."""
    missing = [str(name) for name in names if not os.path.exists(name) or os.path.isdir(name)]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")


def experiment_parser(
    description: str, table: Iterable[str], data: Sequence[str], data_file: str | None = None
) -> argparse.ArgumentParser:
    """A parser with the flags of every training script. data_file: suffix of the files that --data takes beside the names."""
    parser = Parser(description=description)
    parser.add_argument("--method", choices=tuple(table), default="evograd", help="how the hyperparameters are learned")
    parser.add_argument("--seed", type=seed, default=1, help="of Python, NumPy, torch and the order of the data")
    names = ", ".join(data) + (f" or FILE{data_file}" if data_file else "")
    parser.add_argument(
        "--data",
        type=_dataset(data, data_file, names),
        default=data[0],
        help=f"data set: {names}; {data[0]} is embedded and needs no files",
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="folder of the data sets that need files")
    add_device_argument(parser)
    parser.add_argument(
        "--out",
        type=writable,
        metavar="FILE",
        help="JSON-lines file that the run's record is appended to; default: <experiment>/results/<data>.jsonl",
    )
    group = add_resume_arguments(parser)
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="where it is written; given, the file stays when the run has ended. Default: beside --out, in checkpoints/",
    )
    group.add_argument("--skip-done", action="store_true", help="do nothing if --out has the result of this configuration")
    group.add_argument("--tensorboard", metavar="DIR", help="also write losses, accuracies and what is learned for TensorBoard")
    return parser


def add_resume_arguments(parser: argparse.ArgumentParser):
    """The flags of every script that goes on where it was; returns their group."""
    group = parser.add_argument_group("long runs")
    group.add_argument("--checkpoint-every", type=at_least(1), default=1000, metavar="N", help="steps")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint, if the run has one and has not ended")
    return group


# Where and how a run is done, not what: no record holds it. What --log-quality measures, the record's metrics say.
NOT_RECORDED = ("out", "data_dir", "download", "checkpoint", "checkpoint_every", "resume", "skip_done", "tensorboard", "log_quality")


def config_of(args: argparse.Namespace, left_out: Sequence[str] = ()) -> dict:
    """The configuration that a run's record holds: what the result depends on, and no paths."""
    return {name: value for name, value in vars(args).items() if name not in (*NOT_RECORDED, *left_out)}


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N"
    )


def add_evograd_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of the estimators."""
    group = parser.add_argument_group("hypergradient")
    group.add_argument("--n-candidates", type=at_least(2), default=2, metavar="K", help="EvoGrad's number of perturbed models")
    group.add_argument("--sigma", type=positive, default=1e-3, help="EvoGrad's standard deviation of the perturbation")
    group.add_argument("--temperature", type=positive, help="EvoGrad's temperature of the softmax; default: 0.05")
    group.add_argument(
        "--radius", type=positive, help="how far guided candidates lie from the model; default: the library's, by its size"
    )
    group.add_argument("--common-random-numbers", action="store_true", help="all candidates draw the same random numbers")
    group.add_argument("--inner-lr", type=positive, help="inner learning rate of the T1-T2 hypergradient; default: by method")
    group.add_argument(
        "--log-quality", type=at_least(1), metavar="N", help="every N meta-steps compare all estimates with exact T1-T2; takes long"
    )
    group.add_argument(
        "--inner-steps",
        type=at_least(1),
        metavar="N",
        help="SGD steps of second_order (default 1), terms of neumann, iterations of conjugate_gradient (default 5)",
    )
    group.add_argument(
        "--horizon",
        type=at_least(1),
        metavar="N",
        help="training steps that trajectory goes back through, with a meta-update after each N of them; default: by method",
    )
    group.add_argument(
        "--share",
        choices=SHARES,
        help="what torchrun's processes divide in evograd's meta-step; default: batch, the faster one",
    )


def settle(
    parser: argparse.ArgumentParser, args: argparse.Namespace, table: Mapping[str, Method], divided: Mapping[str, int]
) -> None:
    """What follows from the method: flags that it does not read are refused, and settings not given are the table's.

    divided: see `check_processes`.
    """
    methods.refuse_unread(parser, args, table)
    check_processes(parser, args, table[args.method], divided)
    methods.defaults(args, table)


def check_processes(
    parser: argparse.ArgumentParser, args: argparse.Namespace, method: Method, divided: Mapping[str, int]
) -> None:
    """args.processes and args.share of a run under torchrun; None without it.

    divided: {flag: number} of what each process has its part of. It ends with an error where the parts would not be equal.
    """
    n = world_size()
    args.processes = n if n > 1 else None
    if n == 1:
        if args.share:
            parser.error(f"--share {args.share} given, but this is the only process; torchrun --nproc-per-node N starts more")
        return
    for flag, number in divided.items():
        if number % n:
            parser.error(f"{flag} {number} cannot be divided equally among {n} processes; a multiple of {n} is accepted")
    if args.device.index is not None:
        parser.error(f"--device {args.device} given, but there are {n} processes; with --device cuda each has one of its own")
    if args.log_quality:
        parser.error(f"--log-quality given, but it compares estimates of one process, and there are {n}")
    shares = method.estimator.shares if method.estimator else ()
    if args.share == "candidates" and args.n_candidates < n:
        parser.error(f"--n-candidates {args.n_candidates} cannot be shared out among {n} processes; give at least {n}")
    if not args.share and shares:
        args.share = shares[0]


def say_if_chance(what: str, found: float, labels: Sequence[int], advice: str) -> None:
    """Say it if a run has learned nothing, or next to nothing, by its accuracy `found` (per cent). labels: of its tests."""
    share = max(Counter(labels).values()) / len(labels)  # one label for all
    by_chance = share + 2 * math.sqrt(share * (1 - share) / len(labels))
    if found / 100 <= max(by_chance, share + LITTLE * (1 - share)):
        much = "no more" if found / 100 <= by_chance else "little more"
        print(f"{what}: {found:.2f} % is {much} than chance ({100 * share:.2f} %) with these settings. {advice}")


def check_batch(batch_size: int, n: int, what: str) -> None:
    """ValueError where there are fewer of them than a batch is to have."""
    if batch_size > n:
        raise ValueError(f"--batch-size {batch_size} given, but there are {n:,} {what}; at most as many are accepted")


LITTLE = 0.05  # of the way from chance to 100 %
progress = partial(tqdm, desc="measuring", unit="step", leave=False, mininterval=1)
MEASURING = {"enough": 30.0, "progress": progress}  # of a comparison's measurements, see evograd.measuring.seconds


def comparison_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every script that measures one step of each method."""
    parser = Parser(description=description)
    add_device_argument(parser)
    words = "timed turns of each method, of which the median counts; none after a method's first 30 seconds"
    parser.add_argument("--repeats", type=at_least(1), default=10, help=words)
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(ESTIMATORS), default=list(methods.MAIN), metavar="METHOD", help=", ".join(ESTIMATORS)
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--out", type=writable, metavar="FILE", help="JSON-lines file that the record is appended to")
    return parser


def finish_comparison(
    args: argparse.Namespace,
    experiment: str,
    config: dict,
    costs: dict[str, Cost],
    further: dict | None = None,
    kind: str | None = None,
) -> None:
    """Print the costs as a table, over those of the plain step, and write them where the flags say.

    Seconds may be None (FakeTensorMode). further: other figures for the --json file.
    kind: of the record in --out; default: <experiment>_cost, or <experiment>_architecture where the plain step has no seconds.
    """
    plain = costs["plain"]
    heads = f"{'':16}{'seconds':>10}{'time/plain':>12}{'GFLOP':>9}{'FLOPs/plain':>13}{'peak MB':>10}{'peak/plain':>12}"
    print(f"{heads}{'launches':>10}{'launches/plain':>16}")
    for name, cost in costs.items():
        timed = cost.seconds is not None and plain.seconds is not None
        time = f"{cost.seconds:10.4f}{cost.seconds / plain.seconds:12.2f}" if timed else f"{'–':>10}{'–':>12}"
        print(
            f"{name:16}{time}{cost.flops / 1e9:9.2f}{cost.flops / plain.flops:13.2f}"
            f"{cost.peak_bytes / 1e6:10.1f}{cost.peak_bytes / plain.peak_bytes:12.2f}"
            f"{cost.launches:10}{cost.launches / plain.launches:16.2f}"
        )
    figures = {name: cost.as_dict() for name, cost in costs.items()}
    if args.json:
        content = {"methods": figures, **(further or {}), "config": config, "environment": environment(args.device)}
        write_text(args.json, json.dumps(content, indent=1))
    if args.out and kind:
        append_run(args.out, kind, config, figures, {}, args.device)
    elif args.out and plain.seconds is None:
        append_run(args.out, f"{experiment}_architecture", config, by_architecture(costs), {}, args.device)
    elif args.out:
        append_run(args.out, f"{experiment}_cost", config, figures, {}, args.device)


def _dataset(names: Sequence[str], suffix: str | None, accepted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names or (suffix and text.lower().endswith(suffix)):
            return text
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted: {accepted}")

    return parse


def positive(text: str) -> float:
    value = _number(text, float)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} given; a positive, finite number is accepted")
    return value


def not_negative(text: str) -> float:
    value = _number(text, float)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} given; a finite number of at least 0 is accepted")
    return value


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _number(text, int)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} given; an integer of at least {minimum} is accepted")
        return value

    return parse


def seed(text: str) -> int:
    value = _number(text, int)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} given; an integer from 0 to {2**32 - 1} is accepted")
    return value


def device(text: str) -> torch.device:
    try:
        value = torch.device(text)
    except RuntimeError:
        value = None
    if value is None or value.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} given; cpu, cuda and cuda:N are accepted")
    if value.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if value.index is None else value.index  # torchrun: one device a process
        if index >= torch.cuda.device_count():
            of = f" for process {index}" if value.index is None and index else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} given{of}, but this machine has {torch.cuda.device_count()} CUDA devices; --device cpu runs anywhere"
            )
        torch.cuda.set_device(index)  # so that what is measured is measured there
        # candidates differ in loss by less than TF32 resolves
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return value


def writable(text: str) -> str:
    try:
        check_writable(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"records cannot be appended to {text!r}: {error.strerror}") from error
    return text


@contextmanager
def exit_on_bad_input():
    """Bad input ends a script with its message and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _number(text: str, kind: type):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; a number ({kind.__name__}) is accepted") from None
