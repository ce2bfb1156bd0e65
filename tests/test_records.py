"""Run records: whole lines whoever appends, broken ones named, seeds, means."""

import itertools
import json
import multiprocessing
import random
import sys

import numpy as np
import pytest
import torch

from evograd.lab.records import append_line, append_run, mean_std, read_runs, seed_everything


def append_many(path, process, n):
    for i in range(n):
        line = json.dumps({"process": process, "i": i, "text": "x" * (i % 700)})
        try:
            append_line(path, line)
        except OSError:  # the disk was full; it is not any more
            append_line(path, line)


def test_twenty_processes_append_whole_lines(tmp_path, monkeypatch):
    """Also while the lines of others fail and are taken back. Nothing is really synced: 20,000 times may take minutes."""
    path, n_processes, n = tmp_path / "runs.jsonl", 20, 1000
    syncs = itertools.count(1)

    def sync(descriptor):
        if next(syncs) % 20 == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", sync)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, p, n)) for p in range(n_processes)]
    [p.start() for p in processes]
    [p.join() for p in processes]
    assert [p.exitcode for p in processes] == [0] * n_processes
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(r["text"] == "x" * (r["i"] % 700) for r in records)
    assert sorted((r["process"], r["i"]) for r in records) == [(p, i) for p in range(n_processes) for i in range(n)]


def test_a_record_says_what_and_where(tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    metrics = {"accuracy": torch.tensor(98.5), "loss": float("nan"), "curve": np.arange(2)}
    append_run(path, "rotation", {"seed": 1, "device": torch.device("cpu")}, metrics, {"seconds": 2.0}, "cpu")
    (run,), broken = read_runs([path])
    assert not broken
    assert run["metrics"] == {"accuracy": 98.5, "loss": None, "curve": [0, 1]}
    assert run["config"] == {"seed": 1, "device": "cpu"}
    assert run["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert run["environment"]["versions"]["python"] == sys.version.split()[0]
    assert run["environment"]["device"].startswith("CPU")
    assert run["environment"]["time"].endswith("+00:00")
    assert "commit" in run["environment"]


def test_a_broken_line_keeps_to_itself(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_run(path, "rotation", {"seed": 1}, {"accuracy": 1.0}, {}, "cpu")
    with open(path, "a") as file:
        file.write('{"experiment": "rotation", "config": {"se')  # a process that was killed; no newline
    append_run(path, "rotation", {"seed": 2}, {"accuracy": 2.0}, {}, "cpu")
    append_line(path, '{"experiment": "rotation"}')
    append_line(path, "[]")
    append_line(path, '{"experiment": 3, "config": {}, "metrics": {}, "cost": {}, "environment": {}}')
    runs, broken = read_runs([path])
    assert "'experiment' is not a string" in str(broken.pop())
    assert [run["metrics"]["accuracy"] for run in runs] == [1.0, 2.0]
    assert [(line.file, line.number) for line in broken] == [(str(path), 2), (str(path), 4), (str(path), 5)]
    assert "no 'config'" in str(broken[1])


def test_a_repeated_run_counts_once(tmp_path):
    path = tmp_path / "runs.jsonl"
    for accuracy in (1.0, 2.0):
        append_run(path, "rotation", {"seed": 1}, {"accuracy": accuracy}, {}, "cpu")
    append_run(path, "rotation", {"seed": 2}, {"accuracy": 3.0}, {}, "cpu")
    assert [run["metrics"]["accuracy"] for run in read_runs([path])[0]] == [2.0, 3.0]


def test_a_failed_write_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    append_line(path, "{}")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, '{"a": 1}')
    assert path.read_text() == "{}\n"


def test_mean_and_sample_standard_deviation():
    assert mean_std([1.0, 3.0, None]) == (2.0, pytest.approx(2**0.5), 2)
    assert mean_std([4.0]) == (4.0, None, 1)
    assert mean_std([None]) == (None, None, 0)


def test_seed_everything():
    def draws():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws() == draws()
