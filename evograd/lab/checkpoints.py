"""Checkpoints: written whole or not at all, loaded without running code; when a run writes one and how it goes on from it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from ..host.result import NotFinite
from . import board, records
from .processes import ALONE, Processes
from .records import append_run, find_run, given, plain, replacing


def save(path: str | Path, content: dict) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts. OSError if that fails; an earlier file stays as it was."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a file that cannot be written to the end
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
        raise OSError(f"checkpoint {path} could not be written: {reason}") from error


def load(path: str | Path) -> dict:
    """The content of a checkpoint, on the CPU; FileNotFoundError or ValueError that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]  # EOFError has no words
        raise ValueError(f"{path} is no checkpoint, or not whole: {why}") from error
    if not isinstance(content, dict) or "config" not in content:
        raise ValueError(f"{path} is no checkpoint of this project")
    return content


def check_writable(path: str | Path, flag: str = "--checkpoint") -> None:
    """Raise OSError now, not after hours, if a checkpoint cannot be written at `path`, which is what `flag` has given."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.check_regular(path)
        records.check_folder(path)
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be written: {error.strerror}") from error


def check_ours(path: str | Path, flag: str) -> None:
    """FileExistsError if there is a file at `path` that torch.save has not written: it is somebody's."""
    path = Path(path)
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise FileExistsError(f"{flag} {path} is there and no checkpoint; it is not written over. Name another file")


def random_states() -> dict:
    """The states of Python's, NumPy's and torch's generators, the CPU's and that of this process's CUDA device."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def restore_random_states(states: dict) -> None:
    """Draw on from `random_states()`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        here = torch.cuda.current_device()
        # older checkpoints hold those of all devices
        torch.cuda.set_rng_state(states["cuda"][here if here < len(states["cuda"]) else 0])


def outlive_signals(worker: int) -> None:
    """For DataLoader(worker_init_fn=…): a signal to all processes of a run does not take its data away before it has saved.

    Terminals and schedulers send such signals. A worker ends with the run, or by a SIGTERM of the run's own.
    """

    def obey_the_run() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_the_run, daemon=True).start()


class Interrupted(BaseException):
    """A signal has come, and what is being done after a whole step can be left."""


class Signals:
    """SIGTERM, Ctrl-C and SIGHUP (a terminal is gone) within the block are kept until it is looked what came.

    The second Ctrl-C does not wait. SIGHUP that is ignored, as under nohup, stays so.
    """

    received: int | None = None

    def __enter__(self) -> Signals:
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self.handlers = {number: signal.signal(number, self._keep) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if sys.__stderr__ is None:  # it was closed before: 2 may be another file by now
            return
        with suppress(OSError):  # a terminal that is gone
            os.write(2, f"\n{self.name}: the run ends after this step; Ctrl-C ends it at once\n".encode())

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name


class Clock:
    """Seconds that have passed since it was started, pauses left out, and those of the runs before it."""

    def __init__(self):
        self.before, self.since = 0.0, None

    def start(self) -> None:
        self.since = perf_counter()

    def stop(self) -> None:
        self.before, self.since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.since is None else perf_counter() - self.since)


class Keeper:
    """The checkpoint of one training run, and what is said where the run ends before its time.

        keeper = Keeper(args, "rotation", config, processes)
        found = keeper.start()  # what `state` had returned; {}: the run is at its beginning; None: it has ended, which is said
        with keeper:
            for step in keeper.steps(n_steps, state, label):  # with a progress bar
                …
                keeper.show(loss=keeper.mean(losses))
            with keeper.paused():
                metrics = …  # between two batches: keeper.look()
                keeper.record(metrics, cost, measure_more)

    A signal is kept until a step is whole. One that comes after the last step costs the record nothing but the cost of a step.
    An evaluation looks whether one has come: the run then ends with a checkpoint of the step before, and a resumed one makes up
    for the evaluation (`state` must tell whether it has been).

    A checkpoint is written after every args.checkpoint_every steps, on SIGTERM and Ctrl-C after the step that they meet, and
    after the last step, unless the run is too short for the first kind. It is removed when the result line is there, unless
    `keep` or --checkpoint asks for it. Losses and parameters are looked at before each, so it never holds a NaN.

    Among several processes the first one writes, and all read the same file; they end a run after the same step.

    args: out, checkpoint, checkpoint_every, resume, skip_done and device of `cli.experiment_parser`.
    config: what the result line holds. A checkpoint of another one is refused.
    name: of the default file, to which a digest of the configuration is added.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        experiment: str,
        config: dict,
        processes: Processes = ALONE,
        *,
        name: str | None = None,
        keep: bool = False,
    ):
        self.args, self.experiment, self.config, self.processes = args, experiment, config, processes
        self.keep = keep or args.checkpoint is not None
        # What no record holds but a run cannot change on its way.
        self.settings = given(plain({**config, "log_quality": getattr(args, "log_quality", None)}))
        name = name or f"{config['data']}-{config['method']}-seed{config['seed']}"
        digest = hashlib.sha256(json.dumps([experiment, self.settings], sort_keys=True).encode()).hexdigest()[:8]
        self.path = Path(args.checkpoint or Path(args.out).parent / "checkpoints" / f"{name}-{digest}.pt")
        self.step = 0  # steps done
        self.saved = None  # the step of the checkpoint that is there
        self.within = self.recorded = False  # between `steps`' yield and the next; the result line is there
        self.bar, self.whole = None, lambda: True
        self.signals, self.clock = Signals(), Clock()
        self.board = None

    # --- before the run

    def start(self) -> dict | None:
        """The checkpoint that the run goes on from, {} at its beginning, None if --skip-done or --resume finds it has ended.

        ValueError or OSError: nothing can be written where it must be, or there is a checkpoint that does not fit. What is
        returned is emptied when the first step starts, so that no second copy of the model stays in memory.
        """
        if self.processes.rank == 0:
            try:
                records.check_writable(self.args.out)
            except OSError as error:
                why = f"records cannot be appended to {self.args.out}: {error.strerror}"
                raise OSError(f"{why}. --out FILE names another file") from error
        if self._done():
            return None
        found = self.resume()
        if self.processes.rank == 0:
            self.board = board.open_board(self.args.tensorboard, self.path.stem, self.step)
        return found

    def _done(self) -> bool:
        if not (self.args.skip_done or self.args.resume):
            return False
        run = find_run(self.args.out, self.experiment, self.config)
        if run is not None:
            print(f"{self.args.out} has the result of this run, of {run['environment'].get('time')}: nothing to do")
        return self.processes.all(run is not None)[0]

    def resume(self) -> dict:
        """What `start` returns, without a look at --out."""
        if self.processes.rank == 0:
            check_writable(self.path)
        self.found = {}
        there = self.path.is_file()
        if self.args.resume and there:
            try:
                self.found = load(self.path)
                self._check(self.found)
            except ValueError as error:
                raise ValueError(
                    f"--resume: {error}. Without --resume the run starts from the beginning and writes over it"
                ) from error
            self.step = self.saved = self.found["step"]
            self.clock.before = self.found.get("seconds", 0.0)
            if self.processes.rank == 0:
                for leftover in self.path.parent.glob(f"{self.path.name}.tmp*"):  # of a process that was killed while writing
                    leftover.unlink(missing_ok=True)
            print(f"going on after step {self.step}, from {self.path}")
        elif self.args.resume:
            print(f"no checkpoint {self.path}: starting from the beginning")
        elif there:
            check_ours(self.path, "--checkpoint")
            print(f"starting from the beginning; --resume would go on from {self.path}")
        steps = self.processes.all(self.step)
        if len(set(steps)) > 1:
            raise ValueError(f"{self.path}: the processes see different files, of steps {steps}; they need a folder in common")
        return self.found

    def _check(self, found: dict) -> None:
        if found.get("experiment") != self.experiment or "step" not in found:
            what = found.get("experiment") or found.get("kind") or "something else"
            raise ValueError(f"{self.path} is of {what}, not of a run of {self.experiment}")
        missing = object()
        before = given(found["settings"])
        differ = [
            f"{name} {self.settings.get(name)!r} given, {before.get(name)!r} in the checkpoint"
            for name in sorted({*self.settings, *before})
            if self.settings.get(name, missing) != before.get(name, missing)
        ]
        if differ:
            raise ValueError(f"{self.path} is of another configuration: {'; '.join(differ)}")

    # --- on the way

    def __enter__(self) -> Keeper:
        self.signals.__enter__()
        self.clock.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.clock.stop()
        try:
            if isinstance(error, Interrupted):  # the step is whole
                self.step, self.within = self.step + self.within, False
                if self.saved != self.step:
                    self._save(self.state())
                self.processes.all(None)  # none ends before the first one has written: torchrun would end it too
        except KeyboardInterrupt:
            pass  # the second Ctrl-C, while that is written
        finally:
            self.signals.__exit__()
        if isinstance(error, NotFinite):
            self._not_finite(self.step + 1, str(error))
        if isinstance(error, Interrupted):
            if self.processes.rank:
                raise SystemExit(128 + self.signals.received)
            self._stopped(f"in the evaluation after step {self.step}")
        if not self.signals.received or isinstance(error, SystemExit):
            return
        if self.recorded:
            self._end(128 + self.signals.received, f"stopped by {self.signals.name}. The result is in {self.args.out}.")
        self._stopped(f"in step {self.step + 1}" if self.within else f"after step {self.step}")  # a step's middle is lost

    def steps(
        self,
        n_steps: int,
        state: Callable[[], dict],
        label: str,
        unit: str = "step",
        whole: Callable[[], bool] = lambda: True,
    ) -> Iterator[int]:
        """Step numbers up to n_steps, from where the run stands, with a progress bar.

        state(): what the run needs to go on after a whole step.
        whole(): whether it can go on from there; a checkpoint, and the end that a signal asks for, wait until it can.
        """
        self.state, self.whole = state, lambda: self.step == n_steps or whole()
        self.bar = self.processes.progress(total=n_steps, initial=self.step, desc=label, unit=unit)
        if self.found:
            restore_random_states(self.found["random"])
            self.found.clear()
        every, due = self.args.checkpoint_every, False
        for step in range(self.step, n_steps):
            self.within = True
            yield step
            self.within = False
            self.bar.update()
            self.step = step + 1
            due = due or self.step % every == 0 or (self.step == n_steps and (self.keep or n_steps > every))
            if not self.whole():
                continue
            if due:
                self._save(state())
                due = False
            asked = self.processes.largest(self.signals.received or 0)
            if asked:
                self.signals.received = asked
                if self.saved != self.step:
                    self._save(state())
                self.processes.all(None)  # none ends before the first one has written: torchrun would end it too
                if self.processes.rank:
                    raise SystemExit(128 + asked)
                self._stopped(f"after step {self.step} of {n_steps}")
        self._look_for_nan(state())
        self.bar.close()

    def show(self, **values: float) -> None:
        """Numbers of the step that is being made, or was made last, at the progress bar's end and in --tensorboard's folder."""
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, self.step + self.within)

    def look(self) -> None:
        """Interrupted if a signal has come, to whichever process. For what is done after a whole step.

        Several processes call it equally often: they leave at the same place.
        """
        self.signals.received = self.processes.largest(self.signals.received or 0) or None
        if self.signals.received and self.whole():
            raise Interrupted

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still within the block."""
        self.clock.stop()
        yield
        self.clock.start()

    def mean(self, losses: list[Tensor]) -> float:
        """The mean of the training losses of the last steps, this one's last, read from the device. A NaN ends the run."""
        stacked = torch.stack(losses)
        mean = stacked.mean().item()
        if not math.isfinite(mean):
            wrong = [(i, value) for i, value in enumerate(stacked.tolist()) if not math.isfinite(value)]
            i, value = wrong[0] if wrong else (len(losses) - 1, mean)
            self._not_finite(self.step + 2 + i - len(losses), f"the training loss is {value}")
        return mean

    def _save(self, state: dict) -> None:
        self._look_for_nan(state)
        if self.processes.rank == 0:
            head = {"experiment": self.experiment, "config": plain(self.config), "settings": self.settings, "step": self.step}
            try:
                save(self.path, {**head, "random": random_states(), "seconds": self.clock.seconds, **state})
            except OSError as error:
                self._end(1, f"after step {self.step}: {error}. {self._where('last')}")
        self.saved = self.step

    # --- after it

    def record(self, metrics: dict, cost: dict, measured: Callable[[], dict] | None = None) -> None:
        """Append the result line to --out. The checkpoint has done its work. cost: beside the seconds that the run took.

        measured(): what of the cost has still to be measured. It is left out if a signal comes before that has been done, or if
        that fails: the run has its result.
        """
        if measured is not None and not self.processes.largest(self.signals.received or 0):
            try:
                cost = cost | measured()
            except Interrupted:
                pass
            except (NotFinite, RuntimeError) as error:
                print(f"\nthe cost of a step could not be measured: {error}", file=sys.stderr)
        if self.processes.rank:
            self.recorded = True
            return
        cost = {"seconds": self.clock.seconds, **cost}
        try:
            append_run(self.args.out, self.experiment, self.config, metrics, cost, self.args.device)
        except OSError as error:
            self._end(
                1, f"the result could not be appended to {self.args.out}: {error.strerror or error}. {self._where('last')}"
            )
        self.recorded = True
        if self.board is not None:
            self.board.close()
        if not self.keep:
            self.path.unlink(missing_ok=True)

    # --- before its time

    def _look_for_nan(self, state: dict) -> None:
        tensors = [(path, t) for path, t in tree_flatten_with_path(state)[0] if isinstance(t, Tensor) and t.is_floating_point()]
        finite: dict[torch.device, list[Tensor]] = {}
        for _, tensor in tensors:
            finite.setdefault(tensor.device, []).append(tensor.isfinite().all())
        if all(torch.stack(found).all() for found in finite.values()):  # read once from each device
            return
        for path, tensor in tensors:
            if not tensor.isfinite().all():
                name = ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
                self._not_finite(self.step, f"{name} holds numbers that are not finite")

    def _not_finite(self, step: int, what: str) -> None:
        rates = {name: value for name, value in vars(self.args).items() if name == "lr" or name.endswith("_lr")}
        lower = [f"--{name.replace('_', '-')} ({value})" for name, value in rates.items() if value is not None]
        amp = ", or leave out --amp" if getattr(self.args, "amp", False) else ""
        self._end(1, f"step {step}: {what}. {self._where('last good')} Try a lower {' or '.join(lower)}{amp}.")

    def _stopped(self, when: str) -> None:
        self._end(128 + self.signals.received, f"stopped by {self.signals.name} {when}. {self._where('last')}")

    def _where(self, which: str) -> str:
        if self.saved is None:
            return f"There is no checkpoint yet (--checkpoint-every {self.args.checkpoint_every})."
        hint = "; the same command with --resume goes on from there" if which == "last" else ""
        return f"The {which} checkpoint is {self.path}, of step {self.saved}{hint}."

    def _end(self, code: int, message: str) -> None:
        print(f"\nerror: {message}", file=sys.stderr)  # on a line of its own, after that of a progress bar
        raise SystemExit(code)
