"""The shell scripts, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shell(*command, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


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
    done = shell("rotation/run.sh", *arguments, METHODS="baseline evograd", SEEDS="1", JOBS=jobs)
    assert done.returncode == 0, done.stderr
    assert "rotation digits evograd seed 1:" in done.stdout
    methods = {json.loads(line)["config"]["method"] for line in out.read_text().splitlines()}
    assert methods == {"baseline", "evograd"}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_failed_run_ends_the_script(jobs, tmp_path):
    arguments = ("--epochs", "no", "--out", str(tmp_path / "runs.jsonl"))
    done = shell("rotation/run.sh", *arguments, METHODS="baseline evograd", SEEDS="1 2", JOBS=jobs)
    assert done.returncode != 0
    assert "argument --epochs: 'no' given; a number (int) is accepted" in done.stderr


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
