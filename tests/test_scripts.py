"""The shell scripts, as a user runs them."""

import errno
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evograd.lab import checkpoints, cli, records
from tests.forked import python
from tests.test_checkpoints import arguments, ends

ROOT = Path(__file__).resolve().parents[1]


def shell(*command, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_print_gives_one_command_a_line():
    done = shell("rotation/run.sh", "--print", "--data", "mnist", "--data-dir", "a folder", "--skip-done")
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 5 * 5
    assert all(line.startswith(f"{sys.executable} -m rotation.train --method ") for line in lines)
    assert all("--data mnist --data-dir a\\ folder --skip-done" in line for line in lines)
    assert shell("illustration_1d/run.sh", "--print").stdout == f"{sys.executable} -m illustration_1d.train\n"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_runs_are_appended(jobs, tmp_path):
    out = tmp_path / "runs.jsonl"
    arguments = ("--epochs", "1", "--device", "cpu", "--out", str(out))
    done = shell("rotation/run.sh", *arguments, METHODS="baseline evograd", SEEDS="1", JOBS=jobs, PYTHON=python())
    assert done.returncode == 0, done.stderr
    assert "rotation digits evograd seed 1:" in done.stdout
    methods = {json.loads(line)["config"]["method"] for line in out.read_text().splitlines()}
    assert methods == {"baseline", "evograd"}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_failed_run_ends_the_script(jobs, tmp_path):
    arguments = ("--epochs", "no", "--out", str(tmp_path / "runs.jsonl"))
    done = shell("rotation/run.sh", *arguments, METHODS="baseline evograd", SEEDS="1 2", JOBS=jobs, PYTHON=python())
    assert done.returncode != 0
    assert "argument --epochs: 'no' given; a number (int) is accepted" in done.stderr


@pytest.mark.parametrize("jobs", ["abc", "0", "-1", "1.5"])
def test_jobs_are_a_number(jobs):
    done = shell("rotation/run.sh", "--print", JOBS=jobs)
    assert done.returncode == 2 and done.stderr == (
        f"error: JOBS={jobs} given; the number of runs at a time, at least 1, is accepted\n"
    )


def test_labels_that_are_noisy_already_have_no_level():
    done = shell("label_noise_mwn/run.sh", "--print", "--data", "x.npz", NOISES="given flip", METHODS="evograd", SEEDS="1 2")
    lines = done.stdout.splitlines()
    assert [line.split(" --noise ")[1].split(" --method")[0] for line in lines if "given" in line] == ["given"] * 2
    assert sum("--noise flip --noise-level 0.4" in line for line in lines) == 2 and len(lines) == 2 + 2 * 3


def test_lists_are_looked_at_before_encoders_are_trained():
    done = shell("cross_domain_fewshot/run.sh", "--print", "--data", "filelists", "--data-dir", "none", "--n-query", "9")
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if "pretrain" in line)
    assert first == 4 and all("train --check" in line and "--n-query 9" in line for line in lines[:first])
    assert not any("--check" in line or "--print" in line for line in lines[first:])
    done = shell("cross_domain_fewshot/run.sh", "--print", "--data", "filelists", "--horizon", "5", METHODS="trajectory")
    assert all("--method trajectory" in line for line in done.stdout.splitlines() if "cross_domain_fewshot.train" in line)


def test_reproduce_says_how_to_run_the_real_thing():
    done = shell("reproduce.sh", "--help")
    assert done.returncode == 0
    assert "rotation/run.sh --data mnist" in done.stdout
    unknown = shell("reproduce.sh", "--everything")
    assert unknown.returncode == 2
    assert "--everything given; only --help is accepted" in unknown.stderr


def test_an_old_python_is_named():
    done = shell("reproduce.sh", BASE_PYTHON="/bin/false")
    assert done.returncode == 1
    assert "Python 3.10 or later is needed; /bin/false" in done.stderr


@pytest.mark.parametrize("experiment", ["rotation", "label_noise_mwn", "cross_domain_fewshot", "metaxl", "illustration_1d"])
def test_relative_paths_are_the_callers(experiment, tmp_path):
    (tmp_path / "my.npz").touch()
    given = ["--out", "a b.jsonl", "--data-dir=d", "--tensorboard", "/t", "--data", "my.npz", "--encoder", "bert", "--flip"]
    done = shell(str(ROOT / experiment / "run.sh"), "--print", *given, cwd=tmp_path, SEEDS="1", BACKBONES="resnet10")
    here = tmp_path.resolve()
    line = done.stdout.splitlines()[-1]
    assert f"--out {here}/a\\ b.jsonl --data-dir={here}/d --tensorboard /t --data {here}/my.npz --encoder bert --flip" in line
    from_root = shell(f"{experiment}/run.sh", "--print", "--out", "a.jsonl", SEEDS="1").stdout.splitlines()[-1]
    assert from_root.endswith("--out a.jsonl")


def test_scripts_are_checked_out_as_they_are():
    """A checkout that ends lines as Windows does leaves no shell script that runs."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    files = ["reproduce.sh", "rotation/run.sh", "rotation/train.py"]
    done = subprocess.run(["git", "check-attr", "eol", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{file}: eol: lf" for file in files]


# --- where a run prints, and where it writes -----------------------------------------------------------------------------


class Gone(io.StringIO):
    """A terminal that is not there any more."""

    def __init__(self, number):
        super().__init__()
        self.number, self.asked = number, 0

    def write(self, text=""):
        self.asked += 1
        raise OSError(self.number, os.strerror(self.number))

    flush = write


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_terminal_that_is_gone_ends_no_run(number, tmp_path, monkeypatch):
    gone = [Gone(number), Gone(number)]
    monkeypatch.setattr(sys, "stdout", gone[0])
    monkeypatch.setattr(sys, "stderr", gone[1])
    importlib.import_module("rotation.train").main(arguments("rotation", tmp_path, "--method", "baseline"))
    assert all(stream.asked for stream in gone)
    assert json.loads((tmp_path / "runs.jsonl").read_text())["metrics"]["accuracy_upright"] > 0


def test_streams_that_were_closed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    importlib.import_module("rotation.train").main(arguments("rotation", tmp_path, "--method", "baseline"))
    assert (tmp_path / "runs.jsonl").read_text()


def test_what_a_locale_does_not_have_is_printed_all_the_same(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli.Parser().parse_args([])
    print("45.0 ± 1.2 γ")
    sys.stdout.flush()
    assert raw.getvalue() == b"45.0 \\xb1 1.2 \\u03b3\n"
    before = sys.stdout
    cli.Parser().parse_args([])
    assert sys.stdout is before


def test_a_terminal_that_hangs_up_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    train = importlib.import_module("rotation.train")
    step, done = train.Trainer.step, []

    def hung_up(trainer):
        done.append(step(trainer))
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return done[-1]

    monkeypatch.setattr(train.Trainer, "step", hung_up)
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        message = ends(capsys, train.main, arguments("rotation", tmp_path, "--method", "baseline"), 128 + signal.SIGHUP)
        assert "stopped by SIGHUP after step 3" in message
        assert checkpoints.load(tmp_path / "run.pt")["step"] == 3
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        done.clear()
        train.main(arguments("rotation", tmp_path, "--method", "baseline"))
        assert len(done) > 14
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("script", "given"),
    [
        ("rotation.train", []),
        ("illustration_1d.train", []),
        ("rotation.compare", []),
        ("cross_domain_fewshot.evaluate", ["x.pt", "--domain", "serif"]),
        ("cross_domain_fewshot.quality", ["x.pt"]),
    ],
)
def test_records_go_into_regular_files_alone(script, given, tmp_path, refused):
    os.mkfifo(tmp_path / "fifo")
    main = importlib.import_module(script).main
    for path in ("/dev/null", tmp_path / "fifo"):  # it would wait for somebody who reads
        refused(main, [*given, "--out", str(path)], ["--out", f"'{path}'", "a device or a pipe", "only a regular file"])


def test_a_checkpoint_replaces_no_device(tmp_path, refused):
    os.mkfifo(tmp_path / "fifo")
    given = ["--out", str(tmp_path / "runs.jsonl"), "--checkpoint", str(tmp_path / "fifo"), "--device", "cpu"]
    refused(importlib.import_module("rotation.train").main, given, ["fifo", "a device or a pipe"])


@pytest.mark.parametrize(
    ("script", "given"),
    [
        *((f"{experiment}.train", []) for experiment in ("rotation", "label_noise_mwn", "cross_domain_fewshot", "metaxl")),
        ("illustration_1d.train", []),
        ("cross_domain_fewshot.pretrain", ["--out", "x.pt"]),
        ("cross_domain_fewshot.evaluate", ["x.pt", "--domain", "serif"]),
        ("cross_domain_fewshot.quality", ["x.pt"]),
    ],
)
def test_seeds_are_taken_or_refused_alike(script, given, refused):
    main = importlib.import_module(script).main
    for seed in ("-1", "4294967296", "1.5"):
        accepted = "number" if seed == "1.5" else "from 0 to 4294967295"
        refused(main, [*given, "--seed", seed], ["argument --seed", seed, accepted])


def test_a_read_only_checkout_is_told_of_out(monkeypatch, refused):
    def read_only(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(records, "check_writable", read_only)
    words = ["records cannot be appended to rotation/results/digits.jsonl: Permission denied", "--out FILE names another"]
    refused(importlib.import_module("rotation.train").main, ["--device", "cpu"], words)
