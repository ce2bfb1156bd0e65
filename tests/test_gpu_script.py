"""resources/gpu.sh: every command parses, what is done is not done again, and what fails is not taken for done."""

import importlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from evograd.lab import cli
from tests.forked import python

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ("rotation", "label_noise_mwn", "cross_domain_fewshot", "metaxl")


def call(*arguments, **environment):
    command = ["bash", str(ROOT / "resources/gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=300)


def commands(*arguments):
    """[(module, its arguments)] of a dry run."""
    lines = call("--dry-run", *arguments).stdout.splitlines()
    return [(words[2], words[3:]) for words in map(shlex.split, lines)]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("tiny", [[], ["--tiny"]])
def test_every_command_parses(tiny, tmp_path, monkeypatch):
    real = cli.Parser.parse_args

    def parse_args(parser, argv):
        real(parser, argv)
        raise Parsed

    found = commands("--device", "cpu", "--results", tmp_path, "--cifar10", tmp_path, "--filelists", tmp_path / "a b", *tiny)
    for module, arguments in found:
        script = importlib.import_module(module) if module != "pytest" else None
        if module.endswith(".train"):
            args = script.parse_args(arguments)
            assert args.resume and args.device.type == "cpu" and args.out.startswith(str(tmp_path))
        elif module.endswith(".compare"):
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(cli.Parser, "parse_args", parse_args)
                script.main(arguments)
        else:
            assert module == "pytest" and all((ROOT / name).is_file() for name in arguments if name.startswith("tests/"))
    modules = {module for module, _ in found}
    assert modules >= {f"{name}.{script}" for name in EXPERIMENTS for script in ("train", "compare")}
    assert any("flip2" in arguments for _, arguments in found)
    assert any(arguments.count(str(tmp_path / "a b")) for _, arguments in found)


def test_what_needs_data_is_left_out_without():
    assert not any("cifar10" in arguments and "--data-dir" in arguments or "filelists" in arguments for _, arguments in commands())


def test_the_papers_cost_figures_are_a_part():
    cases = [arguments for module, arguments in commands() if "--paper-cost" in arguments]
    assert len(cases) == 11 and all(arguments[-2:] == ["--device", "cuda"] for arguments in cases)


def test_a_part_is_done_once(tmp_path):
    flags = ("--device", "cpu", "--tiny", "--results", tmp_path, "--only", "rotation.train --method baseline")
    first, second = call(*flags, PYTHON=python()), call(*flags, PYTHON=python())
    assert first.returncode == second.returncode == 0, first.stderr
    assert "nothing is left" in first.stdout and "rotation.train" in first.stdout
    assert second.stdout == "gpu.sh: nothing is left\n"
    assert len([json.loads(line) for line in (tmp_path / "gpu_smoke.jsonl").read_text().splitlines()]) == 1


def test_what_fails_or_is_stopped_is_left(tmp_path):
    flags = ("--device", "cpu", "--results", tmp_path, "--only", "rotation.train --method baseline")
    for code, words in ((1, "exit code 1 of"), (143, "its time is over")):
        python = tmp_path / f"python{code}"
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
        failed = call(*flags, PYTHON=str(python))
        assert failed.returncode == 1 and words in failed.stdout + failed.stderr
        assert "1 commands are left" in failed.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--jobs", "0"], "0 given"), (["--minutes"], "--minutes needs a value"), (["--cuda"], "--cuda given")],
)
def test_bad_arguments(arguments, words):
    refused = call(*arguments)
    assert refused.returncode == 2 and words in refused.stderr and len(refused.stderr.splitlines()) == 1
