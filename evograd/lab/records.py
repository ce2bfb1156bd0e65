"""The record of a run: one JSON line, appended whole whoever else appends; seeds in one place; mean ± std over them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from ..measuring import Cost

# What tells data of one name apart, and pretrained encoders of one name.
FINGERPRINTS = ("fingerprint", "encoder_fingerprint")
FIELDS = ("experiment", "config", "metrics", "cost", "environment")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment(device: torch.device | str) -> dict:
    """Where and with what a run happened: commit, versions, device, time of day (UTC)."""
    device = torch.device(device)
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "higher", "numpy", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_cuda = device.type == "cuda"
    return {
        "commit": _commit(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device)
        if on_cuda
        else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def step_cost(cost: Cost, n_steps: int = 1) -> dict:
    """What a record says of the cost of one step, where that of n_steps was measured."""
    each = {"seconds_per_step": cost.seconds / n_steps, "flops": cost.flops // n_steps, "launches": cost.launches // n_steps}
    return {"peak_bytes": cost.peak_bytes, **each}


def append_run(path: str | Path, experiment: str, config: dict, metrics: dict, cost: dict, device: torch.device | str) -> dict:
    """Append the record of one run to the JSON-lines file at `path`, and return it. Numbers that are not finite become null."""
    values = (experiment, config, metrics, cost, environment(device))
    record = plain(dict(zip(FIELDS, values)))
    append_line(path, json.dumps(record, allow_nan=False))
    return record


def append_line(path: str | Path, line: str) -> None:
    """Append one line, whole or not at all, to a file that other processes may append to."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:  # a line that an earlier process left broken keeps to itself
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else "\n" + line
        data = line.encode() + b"\n"
        try:
            if file.write(data) != len(data):
                raise OSError(f"could not write the whole line to {path}: no space left?")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, so that nobody ever sees half of it.

    If the block fails, `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file, or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_regular(path: Path) -> None:
    """OSError if `path` is there and a device, a pipe or the like: these can be neither locked nor replaced."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a device or a pipe; only a regular file is accepted", str(path))


def check_writable(path: str | Path) -> None:
    """Raise OSError now, not after hours, if records cannot be appended to `path`. What is not there is not made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_regular(path)
    if path.exists():
        with open(path, "ab"):
            pass
    else:
        check_folder(path)


def check_folder(path: Path) -> None:
    """OSError if no file can be made beside `path`."""
    probe = path.with_name(f"{path.name}.tmp{os.getpid()}")
    probe.touch()
    probe.unlink()


@dataclass(frozen=True)
class BrokenLine:
    """A line of a result file that is no record."""

    file: str
    number: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}: {self.why}"


def read_runs(paths: Iterable[str | Path]) -> tuple[list[dict], list[BrokenLine]]:
    """All records of the files, and the lines that are none. Of runs with the same configuration the last one counts."""
    runs, broken = {}, []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
                missing = [field for field in FIELDS if field not in record]
                if missing:
                    raise ValueError(f"no {', '.join(map(repr, missing))}")
                if not isinstance(record["experiment"], str):
                    raise ValueError("'experiment' is not a string")
                wrong = [field for field in FIELDS[1:] if not isinstance(record[field], dict)]
                if wrong:
                    raise ValueError(f"{', '.join(map(repr, wrong))} is not an object")
            except ValueError as error:
                broken.append(BrokenLine(str(path), number, f"not a result line: {error}"))
                continue
            runs[_identity(record["experiment"], record["config"])] = record
    return list(runs.values()), broken


def find_run(path: str | Path, experiment: str, config: dict) -> dict | None:
    """The record of that configuration in the JSON-lines file at `path`, if it is there."""
    runs = read_runs([path])[0] if Path(path).is_file() else []
    identity = _identity(experiment, plain(config))
    return next((run for run in runs if _identity(run["experiment"], run["config"]) == identity), None)


def _identity(experiment: str, config: dict) -> str:
    return experiment + settings_key(config)


def given(settings: dict) -> dict:
    """Without what is None, which is as good as not there: the scripts may learn new settings."""
    return {name: value for name, value in settings.items() if value is not None}


def settings_key(config: dict, without: Iterable[str] = ()) -> str:
    """Equal for equal settings that are given."""
    return json.dumps({k: v for k, v in given(config).items() if k not in without}, sort_keys=True)


def known(runs: Iterable[dict], name: str) -> str | None:
    """A setting that some of the runs, older ones, may not have."""
    return next(filter(None, (run["config"].get(name) for run in runs)), None)


def by_configuration(runs: Iterable[dict], across: Iterable[str] = ("seed",)) -> list[list[dict]]:
    """Runs that differ in nothing but the settings `across`, together.

    A fingerprint tells two groups apart where both have one; older records have none, and stand with the first.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(settings_key(run["config"], (*across, *FINGERPRINTS)), []).append(run)
    result: list[list[dict]] = []
    for group in groups.values():
        kinds: dict[str, list[dict]] = {}  # runs of other languages, say, read other files: each has a first of its own
        for run in group:
            kinds.setdefault(settings_key({k: run["config"].get(k) for k in across if k != "seed"}), []).append(run)
        parts: dict[tuple[str | None, ...], list[dict]] = {}
        for runs in kinds.values():
            first = {name: known(runs, name) for name in FINGERPRINTS}
            for run in runs:
                own = [run["config"].get(name) or first[name] for name in FINGERPRINTS]
                parts.setdefault(tuple(None if v == first[n] else v for n, v in zip(FINGERPRINTS, own)), []).append(run)
        result += parts.values()
    return result


def mean_std(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """(mean, sample standard deviation, n) of the numbers that are there; std is None for fewer than two."""
    values = [v for v in values if v is not None]
    if not values:
        return None, None, 0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def plain(value):
    """Tensors, arrays and paths -> what JSON has; NaN and infinity -> None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _commit() -> str | None:
    """The commit of the source that runs, marked if files differ from it; None outside of a checkout."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ":(top)*.py"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" (changed)" if changed.strip() else "")
