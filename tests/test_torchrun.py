"""The four training scripts in several processes: the steps of one process, one that writes, an end that all come to."""

import contextlib
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from torch import nn

from evograd.lab import checkpoints, processes
from label_noise_mwn.data import load, make_task
from tests.forked import python, run
from tests.test_checkpoints import TINY, assert_equal, without_cost
from tests.test_metaxl import step as metaxl_step
from tests.test_metaxl import tagger


def module(experiment):
    return importlib.import_module(f"{experiment}.train")


# --- the steps of one process --------------------------------------------------------------------------------------------


class NoNorm(nn.Identity):
    """In place of BatchNorm, whose statistics are each process's own."""


def make_step(experiment, method, extra, processes):
    """(trainer, one step of it), the same in every process."""
    train = module(experiment)
    args = train.parse_args(["--method", method, "--device", "cpu", *extra])
    torch.manual_seed(0)
    if experiment == "rotation":
        from rotation.data import load as load_images

        train_images, val, _ = load_images("digits", "", args.device)
        trainer = train.Trainer(args, train_images, val, processes)
        return trainer, trainer.step
    if experiment == "label_noise_mwn":
        trainer = train.Trainer(
            args, make_task(load("digits", "", False), "flip", 0.4, 100, 100, None, 1, args.device), processes
        )
        trainer.model.eval()  # with running statistics
        return trainer, trainer.step
    if experiment == "cross_domain_fewshot":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn, "BatchNorm2d", NoNorm)
            trainer = train.Trainer(args, 8, processes)
        seen, unseen = torch.randn(2, 5, 1 + args.n_query, 3, 28, 28)
        images, classes = torch.randn(4, 3, 28, 28), torch.arange(4)
        return trainer, lambda: trainer.step((seen, unseen, images, classes), 1.0)
    trainer = train.Trainer(args, tagger((1, 2) if train.METHODS[method].estimator else ()).train(), 10, processes)
    sentences = metaxl_step(8)
    return trainer, lambda: trainer.step(sentences)


def three_steps(experiment, method, extra, processes, share=None):
    """(θ after three steps, the optimizer's mean of gradients by θ, the last gradient by λ, the training losses)"""
    trainer, step = make_step(experiment, method, extra, processes)
    if share:
        trainer.args.share = share
    if trainer.trajectory is not None:  # through Adam's first steps small gradients' rounding would be seen
        for group in trainer.optimizer.param_groups:
            group["eps"] = 1e-3  # which SGD does not read
    torch.manual_seed(5)
    losses = [step() for _ in range(3)]
    owner = {"rotation": lambda: [trainer.angle], "label_noise_mwn": lambda: list(trainer.weight_net.parameters())}
    hyper = owner.get(experiment, lambda: trainer.hyperparameters)()
    ids = {id(p) for p in hyper}
    theta = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if id(p) not in ids])
    states = trainer.optimizer.state.values()
    means = torch.cat([state.get("exp_avg", state.get("momentum_buffer")).flatten() for state in states])
    grads = [p.grad.flatten() for p in hyper if p.grad is not None] or [torch.zeros(1)]
    return theta, means, torch.cat(grads), torch.stack(losses)


def steps_of_all(rank, cases):
    with processes.processes(torch.device("cpu")) as several:
        return {case: three_steps(*case, several) for case in cases}


# At which rounding is small beside what the candidates differ by.
WIDE, FAR = ("--sigma", "0.1", "--temperature", "0.2"), ("--radius", "0.02")
FEW_SHOT = ("--lr", "1e-6", "--width", "8", "--n-query", "4", "--auxiliary-batch", "4")
METAXL = ("--batch-size", "8")
CASES = [
    ("rotation", "baseline", ()),
    ("rotation", "evograd", ("--share", "candidates", *WIDE)),
    ("rotation", "evograd", ("--share", "batch", "--n-candidates", "4", *WIDE)),
    ("rotation", "evograd_guided", FAR),
    ("rotation", "mixed_mode", ()),
    ("rotation", "second_order", ()),
    ("rotation", "trajectory", ("--horizon", "3", *FAR)),
    ("label_noise_mwn", "cross_entropy", ()),
    ("label_noise_mwn", "evograd", ("--share", "candidates", *WIDE)),
    ("label_noise_mwn", "evograd", ("--share", "candidates", "--weight-input", "model", *WIDE)),
    ("label_noise_mwn", "evograd", ("--share", "batch", "--no-normalize-weights", *WIDE)),
    ("label_noise_mwn", "evograd_guided", FAR),
    ("label_noise_mwn", "trajectory", ("--horizon", "3", "--no-normalize-weights", *FAR)),
    ("label_noise_mwn", "mixed_mode", ()),
    ("label_noise_mwn", "finite_difference", ()),
    ("cross_domain_fewshot", "none", FEW_SHOT),
    ("cross_domain_fewshot", "evograd", ("--share", "batch", *FEW_SHOT, *WIDE)),
    ("cross_domain_fewshot", "evograd_guided", (*FEW_SHOT, *FAR)),
    ("cross_domain_fewshot", "trajectory", ("--horizon", "3", *FEW_SHOT, *FAR)),
    ("cross_domain_fewshot", "mixed_mode", FEW_SHOT),
    ("cross_domain_fewshot", "second_order", FEW_SHOT),
    ("metaxl", "joint_training", (*METAXL, "--accumulate", "2")),
    ("metaxl", "target_only", METAXL),
    ("metaxl", "evograd", ("--share", "batch", *METAXL, *WIDE)),
    ("metaxl", "evograd", ("--share", "candidates", *METAXL, *WIDE)),
    ("metaxl", "evograd", ("--share", "batch", "--perturb", "all", *METAXL, *WIDE)),
    ("metaxl", "evograd_guided", (*METAXL, *FAR)),
    ("metaxl", "trajectory", ("--horizon", "3", *METAXL, *FAR)),
    ("metaxl", "mixed_mode", METAXL),
    ("metaxl", "second_order", METAXL),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    found = run(tmp_path_factory.mktemp("steps"), steps_of_all, CASES)
    assert [f["code"] for f in found] == [0, 0], found[0]["err"]
    return [f["result"] for f in found]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], case[1], *case[2][:2]]))
def test_two_processes_take_the_steps_of_one(steps, case):
    experiment, method, extra = case
    ours, theirs = (rank[case] for rank in steps)
    assert_equal(ours, theirs)  # λ and θ are the same bits in both, or they would drift apart
    share = extra[1] if extra[:1] == ("--share",) else None
    extra = extra[2:] if share else extra
    seeded = share if experiment == "metaxl" else None  # there noise has a generator of its own where processes share out
    expected = three_steps(experiment, method, extra, processes.ALONE, seeded)
    # θ: Adam moves what has no gradient to speak of by its sign
    for name, a, b, tolerance in zip(("θ", "∂θ", "∂λ", "losses"), ours, expected, (2e-3, 1e-3, 5e-3, 1e-4)):
        assert (a - b).norm() <= tolerance * b.norm(), (name, (a - b).norm() / b.norm())


def together(rank, folder):
    with processes.processes(torch.device("cpu")) as several:
        norm, batch = nn.BatchNorm1d(2), torch.arange(12.0).view(6, 2)
        norm.running_mean.fill_(rank)
        norm.num_batches_tracked.fill_(3)
        several.average_buffers(norm)
        with several.first_alone():
            order = [p for p in (0, 1) if os.path.exists(f"{folder}/{p}")]
            open(f"{folder}/{rank}", "w").close()
        assert order == list(range(rank))
        with pytest.raises(ValueError, match="a batch of 5 samples cannot be divided equally among 2 processes"):
            several.part(torch.ones(5))
        several.seed(4, 0)
        own = torch.rand(()).item()
        several.seed(4, 0, alike=True)
        return {
            "part": several.part(batch).tolist(),
            "dim": several.part(batch, dim=1).tolist(),
            "whole": several.whole(several.part(batch)).tolist(),
            "mean": several.mean(torch.tensor(float(rank))).item(),
            "all": several.all({"rank": rank}),
            "largest": several.largest(5 * rank),
            "buffers": [norm.running_mean.tolist(), norm.running_var.tolist(), norm.num_batches_tracked.item()],
            "own": own,
            "alike": [torch.rand(()).item(), torch.rand((), generator=several.generator(4, 0)).item()],
        }


def test_what_processes_do_together(tmp_path):
    first, second = (f["result"] for f in run(tmp_path, together, tmp_path))
    batch = torch.arange(12.0).view(6, 2).tolist()
    assert first.pop("part") == batch[:3] and second.pop("part") == batch[3:]
    assert first.pop("dim") == [[a] for a, _ in batch] and second.pop("dim") == [[b] for _, b in batch]
    assert first.pop("own") != second.pop("own")
    assert first == second
    assert first["whole"] == batch
    assert first["mean"] == 0.5 and first["largest"] == 5 and first["all"] == [{"rank": 0}, {"rank": 1}]
    assert first["buffers"] == [[0.5, 0.5], [1.0, 1.0], 3]
    # and alone nothing is done
    assert processes.ALONE.part(torch.ones(3)).tolist() == [1, 1, 1]
    assert processes.ALONE.all(1) == [1] and processes.ALONE.largest(2) == 2
    state = torch.get_rng_state()
    processes.ALONE.seed(1, 1)
    assert torch.equal(torch.get_rng_state(), state)


# --- whole runs ----------------------------------------------------------------------------------------------------------


def arguments(experiment, folder, *extra):
    files = ["--out", str(folder / "runs.jsonl"), "--checkpoint", str(folder / "run.pt")]
    return ["--device", "cpu", *files, *TINY[experiment], *extra]


# In a test of one process's signal: three test episodes, of which the second has one; two batches of sentences to evaluate.
EXTRA = {"cross_domain_fewshot": ["--test-episodes", "3"], "metaxl": ["--dev-size", "40"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(experiment): the folder of a run in two processes that nothing disturbs, and what each of them printed."""

    @functools.cache
    def made(experiment):
        folder = tmp_path_factory.mktemp("whole")
        return folder, run(folder, script, experiment, arguments(experiment, folder, *EXTRA.get(experiment, [])))

    return made


def disturbed(rank, experiment, arguments, trouble=None):
    """main() without the cost of a step, which `whole` has measured."""
    without_cost(module(experiment))
    script(rank, experiment, arguments, trouble)


def script(rank, experiment, arguments, trouble=None):
    """main(), with `trouble(rank, number of the step)` after each step."""
    train = module(experiment)
    if trouble is not None:
        step, count = train.Trainer.step, [0]

        def troubled(trainer, *args):
            count[0] += 1
            value = step(trainer, *args)
            trouble(rank, count[0])
            return value

        train.Trainer.step = troubled
    train.main(arguments)


def content(folder):
    found = checkpoints.load(folder / "run.pt")
    found.pop("seconds")
    return found


def only_line(folder):
    (line,) = (folder / "runs.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize("experiment", TINY)
def test_scripts_run_and_one_process_writes(experiment, whole):
    folder, found = whole(experiment)
    assert [f["code"] for f in found] == [0, 0], found[0]["err"] + found[1]["err"]
    record = only_line(folder)
    assert record["config"]["processes"] == 2 and record["config"]["share"] == "batch"
    assert found[0]["out"] and not found[1]["out"]
    assert "step/s" in found[0]["err"] or "episode/s" in found[0]["err"]
    assert "it/s" not in found[1]["err"] and "step/s" not in found[1]["err"] and "episode/s" not in found[1]["err"]


def signal_second(rank, step):
    if rank == 1 and step == 5:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_they_go_on(whole, tmp_path):
    (tmp_path / "stopped").mkdir()
    expected, _ = whole("rotation")
    stopped = arguments("rotation", tmp_path / "stopped", "--resume")
    found = run(tmp_path, disturbed, "rotation", stopped, signal_second)
    assert [f["code"] for f in found] == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM after step 5 of 14" in found[0]["err"]
    assert checkpoints.load(tmp_path / "stopped" / "run.pt")["step"] == 5
    assert [f["code"] for f in run(tmp_path, disturbed, "rotation", stopped)] == [0, 0]
    assert_equal(content(tmp_path / "stopped"), content(expected))
    assert only_line(tmp_path / "stopped")["metrics"] == only_line(expected)["metrics"]

    # what was begun by two is not gone on with by one
    checkpoints.save(tmp_path / "run.pt", {**checkpoints.load(expected / "run.pt"), "step": 5})
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
        module("rotation").main(arguments("rotation", tmp_path, "--resume"))
    assert "processes None given, 2 in the checkpoint" in err.getvalue()
    # and a run that has ended does nothing in any process
    assert [f["code"] for f in run(tmp_path, disturbed, "rotation", stopped)] == [0, 0]
    assert only_line(tmp_path / "stopped")


def signalled_while_it_evaluates(rank, experiment, arguments):
    """The second process gets a signal before it looks for the second time."""
    look, count = checkpoints.Keeper.look, [0]

    def signalled(keeper):
        count[0] += 1
        if (rank, count[0]) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        look(keeper)

    checkpoints.Keeper.look = signalled
    without_cost(module(experiment))
    try:
        module(experiment).main(arguments)
    finally:
        checkpoints.Keeper.look = look
        assert count[0] == 2


@pytest.mark.parametrize("experiment", ["cross_domain_fewshot", "metaxl"])
def test_a_signal_to_one_process_does_not_wait_for_the_evaluation_of_all(experiment, whole, tmp_path):
    (tmp_path / "stopped").mkdir()
    expected, undisturbed = whole(experiment)
    assert [f["code"] for f in undisturbed] == [0, 0]
    stopped = arguments(experiment, tmp_path / "stopped", *EXTRA[experiment], "--resume")
    found = run(tmp_path, signalled_while_it_evaluates, experiment, stopped)
    assert [f["code"] for f in found] == [128 + signal.SIGTERM] * 2, found[0]["err"] + found[1]["err"]
    assert "stopped by SIGTERM in the evaluation after step" in found[0]["err"] and "stopped by" not in found[1]["err"]
    assert not (tmp_path / "stopped" / "runs.jsonl").exists()
    assert [f["code"] for f in run(tmp_path, disturbed, experiment, stopped)] == [0, 0]
    assert only_line(tmp_path / "stopped")["metrics"] == only_line(expected)["metrics"]


def fails(rank, step):
    if rank == 1 and step == 3:
        os._exit(7)


@pytest.mark.parametrize("experiment", ["rotation", "metaxl"])
def test_who_is_left_alone_ends_with_a_message(experiment, tmp_path):
    start = time.monotonic()
    first, second = run(tmp_path, script, experiment, arguments(experiment, tmp_path), fails)
    assert time.monotonic() - start < 60
    assert second is None  # died without a word
    assert first["code"] == 1
    assert "error: process 0: " in first["err"] and "If another process has ended before, its message counts" in first["err"]


def test_nan_ends_all(tmp_path):
    found = run(tmp_path, script, "rotation", arguments("rotation", tmp_path, "--lr", "1e30", "--method", "baseline"))
    assert [f["code"] for f in found] == [1, 1]
    assert "step 2: the training loss is nan" in found[0]["err"]


@pytest.mark.parametrize(
    ("experiment", "extra", "words"),
    [
        ("rotation", ["--batch-size", "33"], "--batch-size 33 cannot be divided equally among 4 processes"),
        ("rotation", ["--share", "candidates"], "--n-candidates 2 cannot be shared out among 4 processes; give at least 4"),
        ("rotation", ["--method", "mixed_mode", "--share", "batch"], "--share given, but --method mixed_mode does not read it"),
        ("label_noise_mwn", ["--batch-size", "50"], "--batch-size 50 cannot be divided"),
        ("label_noise_mwn", ["--log-quality", "5"], "--log-quality given, but it compares estimates of one process"),
        ("cross_domain_fewshot", ["--n-query", "6"], "--n-query 6 cannot be divided"),
        ("cross_domain_fewshot", ["--n-query", "4", "--auxiliary-batch", "6"], "--auxiliary-batch 6 cannot be divided"),
        ("metaxl", ["--batch-size", "6"], "--batch-size 6 is too small for 4 processes"),
        ("metaxl", ["--target-size", "6"], "--target-size 6 is too small for 4 processes"),
    ],
)
def test_what_cannot_be_divided(experiment, extra, words, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(module(experiment).main, ["--out", str(tmp_path / "runs.jsonl"), "--device", "cpu", *extra], words)


def test_torchrun(tmp_path):
    """The real one, once."""
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rotation.train"]
    command += arguments("rotation", tmp_path)
    environment = {**os.environ, "PYTHON_EXEC": python()}  # which it starts the processes with
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert only_line(tmp_path)["config"]["processes"] == 2
    assert done.stdout.count("rotation digits evograd seed 1") == 1
