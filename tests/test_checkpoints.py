"""Long runs: killed and resumed, each experiment ends bit for bit as it would have; and what ends a run says what to do."""

import importlib
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from evograd.lab import checkpoints
from evograd.lab.data import batches
from evograd.lab.records import append_run
from evograd.measuring import Cost
from tests import forked

# The tiniest settings, and how many steps they make.
TINY = {
    "rotation": ["--epochs", "2", "--batch-size", "128"],
    "label_noise_mwn": ["--epochs", "2", "--train-images", "500", "--batch-size", "50"],
    "cross_domain_fewshot": "--width 4 --n-query 2 --epochs 3 --episodes 4 --test-episodes 4 --auxiliary-batch 4".split(),
    "metaxl": "--epochs 3 --source-size 48 --target-size 12 --dev-size 10".split(),
}
N_STEPS = {"rotation": 14, "label_noise_mwn": 20, "cross_domain_fewshot": 12, "metaxl": 12}


class Killed(BaseException):
    """Nothing in a script catches this."""


def module(experiment):
    return importlib.import_module(f"{experiment}.train")


def arguments(experiment, folder, *extra):
    files = ["--out", str(folder / "runs.jsonl"), "--checkpoint", str(folder / "run.pt")]
    return ["--device", "cpu", *files, *TINY[experiment], *extra]


def result(folder):
    """(metrics of the only result line, content of the checkpoint without its clock)"""
    (line,) = (folder / "runs.jsonl").read_text().splitlines()
    content = checkpoints.load(folder / "run.pt")
    assert content.pop("seconds") > 0
    return json.loads(line)["metrics"], content


def assert_equal(a, b, where=""):
    """Bit for bit, whatever is nested in what."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def without_cost(train, set_attribute=setattr):
    """What a step costs is not measured after the training."""
    nothing = {"measure": Cost(0.0, 0, 0, 0), "peak_bytes": 0, "flops": 0, "launches": 0}
    for name in nothing.keys() & vars(train).keys():
        set_attribute(train, name, lambda *args, value=nothing[name], **settings: value)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(experiment, {n: function}): in the run that follows, function(trainer) is called at the end of the n-th step."""

    def patch(experiment, what):
        train = module(experiment)
        step, count = original.setdefault(experiment, train.Trainer.step), [0]

        def patched(trainer, *args):
            count[0] += 1
            value = step(trainer, *args)
            if count[0] in what:
                what[count[0]](trainer)
            return value

        monkeypatch.setattr(train.Trainer, "step", patched)
        without_cost(train, monkeypatch.setattr)

    original = {}
    return patch


def kill(trainer):
    raise Killed


# --- bit for bit ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fewer_estimates")
@pytest.mark.parametrize(
    ("experiment", "extra"),
    [
        ("label_noise_mwn", ["--log-quality", "100"]),
        ("label_noise_mwn", ["--method", "evograd_guided", "--meta-every", "3", "--meta-optimizer", "sgd"]),
        ("cross_domain_fewshot", []),
        ("cross_domain_fewshot", ["--method", "none"]),
        ("metaxl", ["--method", "evograd_guided"]),
        ("metaxl", ["--method", "target_only"]),
        ("rotation", ["--method", "trajectory", "--horizon", "3"]),
        ("label_noise_mwn", ["--method", "trajectory", "--horizon", "3"]),
        ("cross_domain_fewshot", ["--method", "trajectory", "--horizon", "3"]),
        ("metaxl", ["--method", "trajectory", "--horizon", "3"]),
    ],
)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_is_not(experiment, extra, tmp_path, at_step, capsys):
    main, draw = module(experiment).main, random.Random(f"{experiment} {extra}")
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()

    again = arguments(experiment, tmp_path / "stopped", *extra, "--checkpoint-every", "2", "--resume")
    at_step(experiment, {})
    main(arguments(experiment, tmp_path / "whole", *extra))
    every = max(2, int(extra[-1])) if "--horizon" in extra else 2  # a checkpoint waits for the end of a trajectory
    done = 0
    for _ in range(3):
        n = draw.randint(1, (N_STEPS[experiment] - done) // 2)
        at_step(experiment, {n: kill})
        with pytest.raises(Killed):
            main(again)
        done += (done + n - 1) // every * every - done  # the last checkpoint before the step that was not finished
    at_step(experiment, {})
    main(again)
    printed = capsys.readouterr().out
    assert f"going on after step {done}, from" in printed or not done
    metrics, content = result(tmp_path / "stopped")
    expected, whole = result(tmp_path / "whole")
    assert metrics == expected
    assert content["step"] == N_STEPS[experiment]
    assert_equal(content, whole)


def test_a_signal_waits_for_the_end_of_a_trajectory(tmp_path, at_step, capsys):
    flags = ["--method", "trajectory", "--horizon", "4"]
    main = module("rotation").main
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    at_step("rotation", {})
    main(arguments("rotation", tmp_path / "whole", *flags))
    at_step("rotation", {6: lambda trainer: signal.raise_signal(signal.SIGTERM)})
    with pytest.raises(SystemExit):
        main(arguments("rotation", tmp_path / "stopped", *flags))
    assert "stopped by SIGTERM after step 8 of 14" in capsys.readouterr().err
    at_step("rotation", {})
    main(arguments("rotation", tmp_path / "stopped", *flags, "--resume"))
    assert result(tmp_path / "stopped")[0] == result(tmp_path / "whole")[0]


def main_without_cost(arguments):
    without_cost(module("rotation"))
    module("rotation").main(arguments)


def run_in_child(folder, *extra):
    train = arguments("rotation", folder, "--batch-size", "64", *extra)
    process = forked.CONTEXT.Process(target=main_without_cost, args=(train,))
    process.start()
    return process


def changes(path, n, process):
    """Wait until the file at `path` has been replaced n times."""
    seen, before = 0, None
    while seen < n:
        assert process.is_alive(), "the run ended before it was killed"
        now = path.stat().st_mtime_ns if path.exists() else None
        seen += now != before and now is not None
        before = now
        time.sleep(0.001)


def test_a_run_that_is_killed_five_times_ends_as_one_that_is_not(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run_in_child(tmp_path / "whole")
    draw, file = random.Random(), tmp_path / "killed" / "run.pt"
    steps = []
    for _ in range(5):
        process = run_in_child(tmp_path / "killed", "--checkpoint-every", "1", "--resume")
        changes(file, draw.randint(1, 4), process)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(checkpoints.load(file)["step"])  # whole, wherever the kill fell
    assert steps == sorted(steps) and 0 < steps[-1] < 30
    for process in (run_in_child(tmp_path / "killed", "--checkpoint-every", "1", "--resume"), whole):
        process.join()
        assert process.exitcode == 0
    metrics, content = result(tmp_path / "killed")
    expected, never_killed = result(tmp_path / "whole")
    assert metrics == expected
    assert_equal(content, never_killed)
    assert len(list((tmp_path / "killed").iterdir())) == 2  # nothing is left of writes that were cut off


def test_random_states_are_those_of_every_library():
    draws = lambda: (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    draws()
    states = checkpoints.random_states()
    first = draws()
    assert draws() != first
    checkpoints.restore_random_states(states)
    assert draws() == first


@pytest.mark.parametrize(("n", "size"), [(10, 3), (3, 10)])
def test_batches_go_on_where_they_were(n, size):
    def plain(generator):
        while True:
            yield from torch.randperm(n, generator=generator).split(size)[: max(1, n // size)]

    expected = [index.tolist() for index, _ in zip(plain(torch.Generator().manual_seed(4)), range(9))]
    generator = torch.Generator().manual_seed(4)
    order = batches(n, size, generator)
    for k, index in enumerate(expected):
        state, random_state = order.state_dict(), generator.get_state()
        assert next(order).tolist() == index
        other = batches(n, size, torch.Generator())
        other.load_state_dict(state)
        other.generator.set_state(random_state)
        assert [next(other).tolist() for _ in expected[k:]] == expected[k:]


# --- runs that have ended ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", TINY)
def test_a_run_that_has_ended_says_so_and_does_nothing(experiment, tmp_path, monkeypatch, capsys):
    started = []

    def start(keeper):
        started.append(keeper)
        raise Killed

    def main(*extra):
        module(experiment).main([*arguments(experiment, tmp_path), *extra])

    monkeypatch.setattr(checkpoints.Keeper, "resume", start)
    with pytest.raises(Killed):
        main("--resume")
    append_run(tmp_path / "runs.jsonl", experiment, started[0].config, {"accuracy": 1.0}, {}, "cpu")
    before = (tmp_path / "runs.jsonl").read_bytes()
    for flag in ("--resume", "--skip-done"):
        main(flag)
        assert "runs.jsonl has the result of this run, of 20" in capsys.readouterr().out
        with pytest.raises(Killed):  # another one has not ended
            main(flag, "--seed", "2")
    with pytest.raises(Killed):  # without the flags it runs again
        main()
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert not any("/" in str(value) for value in started[0].config.values())


def test_short_runs_leave_no_checkpoint_and_long_ones_none_that_was_not_asked_for(tmp_path, at_step, capsys):
    main, written = module("rotation").main, []
    common = ["--device", "cpu", "--out", str(tmp_path / "runs.jsonl"), *TINY["rotation"]]
    look = lambda trainer: written.extend((tmp_path / "checkpoints").iterdir())
    at_step("rotation", {13: look})
    main(common)
    assert not written
    at_step("rotation", {13: look})
    main([*common, "--checkpoint-every", "5", "--seed", "2"])
    assert [path.name[:22] for path in written] == ["digits-evograd-seed2-" + written[0].name[21]]
    assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / "asked").mkdir()
    main(arguments("rotation", tmp_path / "asked"))
    assert result(tmp_path / "asked")[1]["step"] == 14


# --- what ends a run -----------------------------------------------------------------------------------------------------


def ends(capsys, main, arguments, code):
    """The message with which the script ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    message = capsys.readouterr().err
    assert "\nerror: " in message
    return message.split("\nerror: ")[1]


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_first(number, tmp_path, at_step, capsys):
    handler = signal.getsignal(number)
    at_step("rotation", {6: send(number)})
    message = ends(capsys, module("rotation").main, arguments("rotation", tmp_path), 128 + number)
    assert f"stopped by {number.name} after step 6 of 14" in message
    assert f"checkpoint is {tmp_path}/run.pt, of step 6; the same command with --resume goes on from there" in message
    assert checkpoints.load(tmp_path / "run.pt")["step"] == 6
    assert not (tmp_path / "runs.jsonl").exists()
    assert signal.getsignal(number) is handler


def test_the_second_ctrl_c_does_not_wait(tmp_path, at_step, capsys):
    at_step("rotation", {6: lambda trainer: [send(signal.SIGINT)(trainer) for _ in range(2)]})
    again = [*arguments("rotation", tmp_path), "--checkpoint-every", "4"]
    message = ends(capsys, module("rotation").main, again, 130)
    assert "stopped by SIGINT in step 6" in message and "of step 4; the same command with --resume" in message
    assert checkpoints.load(tmp_path / "run.pt")["step"] == 4


def interrupt(monkeypatch, train, name, nth):
    """SIGTERM in the n-th call of train.<name>, which looks up whether one has come as ever. Returns the calls that ended."""
    original, count, ended = getattr(train, name), [0], []

    def interrupted(*args, **settings):
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        value = original(*args, **settings)
        ended.append(count[0])
        return value

    monkeypatch.setattr(train, name, interrupted)
    return ended


@pytest.mark.parametrize(
    ("experiment", "name", "nth", "step"),
    [
        ("rotation", "accuracy", 1, 14),  # after the last step
        ("label_noise_mwn", "losses_and_accuracy", 2, 10),  # of the first epoch the test images
        ("label_noise_mwn", "losses_and_accuracy", 5, 20),  # of the end the training images' weights
        ("cross_domain_fewshot", "score", 1, 12),
        ("metaxl", "predict", 2, 8),
        ("metaxl", "predict", 4, 12),  # the test sentences, with the best epoch's parameters
    ],
)
def test_a_signal_does_not_wait_for_an_evaluation(experiment, name, nth, step, tmp_path, at_step, monkeypatch, capsys):
    train = module(experiment)
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    at_step(experiment, {})
    train.main(arguments(experiment, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        ended = interrupt(patch, train, name, nth)
        message = ends(capsys, train.main, arguments(experiment, tmp_path / "stopped"), 143)
    assert ended == list(range(1, nth))  # this one was left
    assert f"stopped by SIGTERM in the evaluation after step {step}. The last checkpoint is" in message
    assert checkpoints.load(tmp_path / "stopped" / "run.pt")["step"] == step
    assert not (tmp_path / "stopped" / "runs.jsonl").exists()
    train.main(arguments(experiment, tmp_path / "stopped", "--resume"))
    for resumed, expected in zip(result(tmp_path / "stopped"), result(tmp_path / "whole")):
        assert_equal(resumed, expected)


@pytest.mark.parametrize("experiment", ["rotation", "label_noise_mwn", "metaxl"])
def test_a_signal_after_the_last_step_costs_no_result(experiment, tmp_path, monkeypatch, capsys):
    """While the cost of a step is measured, which is then left out."""
    train, n_steps, done = module(experiment), N_STEPS[experiment], []
    step = train.Trainer.step

    def signalled(trainer, *args):
        done.append(step(trainer, *args))
        if len(done) == n_steps + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    monkeypatch.setattr(train.Trainer, "step", signalled)
    monkeypatch.setattr(train, "measure", lambda step, **settings: [step() for _ in range(9)], raising=False)
    monkeypatch.setattr(train, "peak_bytes", lambda step: [step() for _ in range(9)], raising=False)
    message = ends(capsys, train.main, arguments(experiment, tmp_path), 143)
    assert f"stopped by SIGTERM. The result is in {tmp_path}/runs.jsonl" in message
    assert len(done) == n_steps + 1
    (line,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert line["metrics"]["train_loss" if experiment != "metaxl" else "test_f1"] is not None
    assert "seconds" in line["cost"] and "flops" not in line["cost"]
    assert ("seconds_per_step" in line["cost"]) == (experiment == "metaxl")  # which needs no measuring


def test_a_cost_that_cannot_be_measured_costs_no_result(tmp_path, monkeypatch, capsys):
    def measure(*args, **settings):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(module("rotation"), "measure", measure)
    module("rotation").main(arguments("rotation", tmp_path))
    assert "the cost of a step could not be measured: no memory is left" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "runs.jsonl").read_text())["cost"]) == ["seconds"]


@pytest.mark.parametrize(("signals", "step"), [(1, 8), (2, 4)])
def test_a_signal_while_a_checkpoint_is_written(signals, step, tmp_path, monkeypatch, capsys):
    """One signal: it is written to the end. The second Ctrl-C cuts it off: the one before is intact."""
    write, n = torch.save, []

    def interrupted(content, file):
        n.append(content["step"])
        file.write(b"PK")
        if content["step"] == 8:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        file.seek(0)
        write(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    again = [*arguments("rotation", tmp_path), "--checkpoint-every", "4"]
    message = ends(capsys, module("rotation").main, again, 130)
    assert "stopped by SIGINT" in message and f"of step {step}" in message
    assert n == [4, 8]
    assert checkpoints.load(tmp_path / "run.pt")["step"] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt"]


@pytest.mark.parametrize(
    ("experiment", "extra", "words"),
    [
        ("rotation", ["--lr", "1e30"], ["step 1: train_loss of candidate 0 is nan", "--angle-lr (0.01)"]),
        ("rotation", ["--lr", "1e30", "--method", "baseline"], ["step 2: the training loss is nan"]),
        ("label_noise_mwn", ["--lr", "1e30", "--method", "cross_entropy", "--amp"], ["step 2: the training loss", "out --amp"]),
        ("label_noise_mwn", ["--lr", "1e30", "--method", "mixed_mode"], ["step 1: val_loss is nan", "--meta-lr (0.003)"]),
        ("cross_domain_fewshot", ["--lr", "1e30", "--method", "fixed", "--head", "protonet"], ["step 2: the training loss"]),
        ("metaxl", ["--lr", "1e30", "--method", "joint_training"], ["step 2: the training loss is nan"]),
    ],
)  # fmt: skip
def test_nan_ends_a_run_with_what_to_try(experiment, extra, words, tmp_path, capsys):
    message = ends(capsys, module(experiment).main, arguments(experiment, tmp_path, *extra), 1)
    for word in [*words, "There is no checkpoint yet (--checkpoint-every 1000)", "Try a lower --lr (1e+30)"]:
        assert word in message
    assert not (tmp_path / "runs.jsonl").exists() and not (tmp_path / "run.pt").exists()


def test_no_checkpoint_holds_a_nan(tmp_path, at_step, capsys):
    def poison(trainer):
        trainer.model[0].bias.data[2] = float("nan")

    at_step("rotation", {6: poison})
    baseline = [*arguments("rotation", tmp_path, "--method", "baseline"), "--checkpoint-every"]
    message = ends(capsys, module("rotation").main, [*baseline, "3"], 1)
    assert "step 6: trainer.model." in message and "bias holds numbers that are not finite" in message
    assert f"The last good checkpoint is {tmp_path}/run.pt, of step 3." in message
    assert checkpoints.load(tmp_path / "run.pt")["step"] == 3

    at_step("rotation", {6: poison})
    message = ends(capsys, module("rotation").main, [*baseline, "100"], 1)
    assert "step 7: the training loss is nan. There is no checkpoint yet" in message  # the one that lies there is another run's

    at_step("rotation", {14: poison})  # the last step's loss was still finite
    assert "step 14: trainer.model." in ends(capsys, module("rotation").main, [*baseline, "100"], 1)
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, at_step, capsys):
    def fill(trainer):
        (tmp_path / f"run.pt.tmp{os.getpid()}").symlink_to("/dev/full")

    at_step("rotation", {6: fill})
    again = [*arguments("rotation", tmp_path), "--checkpoint-every", "4"]
    message = ends(capsys, module("rotation").main, again, 1)
    assert f"after step 8: checkpoint {tmp_path}/run.pt could not be written: No space left on device" in message
    assert f"The last checkpoint is {tmp_path}/run.pt, of step 4" in message
    assert checkpoints.load(tmp_path / "run.pt")["step"] == 4


def test_a_result_that_cannot_be_written_is_not_lost(tmp_path, at_step, capsys):
    out = tmp_path / "runs.jsonl"

    def in_the_way(trainer):
        out.mkdir()

    at_step("rotation", {6: in_the_way})
    message = ends(capsys, module("rotation").main, arguments("rotation", tmp_path), 1)
    assert f"the result could not be appended to {out}: Is a directory" in message
    assert "of step 14; the same command with --resume" in message
    out.rmdir()
    at_step("rotation", {1: kill})
    module("rotation").main([*arguments("rotation", tmp_path), "--resume"])  # no step is left
    assert result(tmp_path)[0]["accuracy_rotated"] > 0


# --- checkpoints that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint of a run of rotation that was stopped after 4 steps, and its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    train, patch = module("rotation"), pytest.MonkeyPatch()
    step = train.Trainer.step

    def two(trainer):
        if trainer.optimizer.state and next(iter(trainer.optimizer.state.values()))["step"] == 2:
            raise Killed
        return step(trainer)

    patch.setattr(train.Trainer, "step", two)
    with pytest.raises(Killed):
        train.main(arguments("rotation", folder, "--checkpoint-every", "1"))
    patch.undo()
    return (folder / "run.pt").read_bytes()


def of_another_experiment(content):
    content["experiment"] = "metaxl"


def of_nothing_that_is_known(content):
    del content["experiment"]


def of_an_older_form(content):
    del content["step"]


@pytest.mark.parametrize(
    ("change", "extra", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], [], ["run.pt is no checkpoint, or not whole"]),
        (lambda raw: b"", [], ["run.pt is no checkpoint, or not whole"]),
        (lambda raw: b"{}", [], ["run.pt is no checkpoint, or not whole"]),
        (of_another_experiment, [], ["run.pt is of metaxl, not of a run of rotation"]),
        (of_nothing_that_is_known, [], ["run.pt is of something else, not of a run of rotation"]),
        (of_an_older_form, [], ["run.pt is", "not of a run of rotation"]),
        (None, ["--lr", "0.5"], ["another configuration: lr 0.5 given, 0.001 in the checkpoint"]),
        (None, ["--seed", "7", "--method", "baseline"], ["method 'baseline' given, 'evograd' in", "seed 7 given, 1 in"]),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_named_and_left_alone(change, extra, words, stopped, tmp_path, refused):
    path = tmp_path / "run.pt"
    path.write_bytes(stopped)
    if change in (of_another_experiment, of_nothing_that_is_known, of_an_older_form):
        content = checkpoints.load(path)
        change(content)
        checkpoints.save(path, content)
    elif change:
        path.write_bytes(change(stopped))
    before = path.read_bytes()
    refused(module("rotation").main, [*arguments("rotation", tmp_path, *extra), "--resume"], ["--resume: ", *words])
    assert path.read_bytes() == before


def test_a_run_without_a_checkpoint_starts_and_says_so(stopped, tmp_path, monkeypatch, capsys):
    def start(trainer):
        raise Killed

    monkeypatch.setattr(module("rotation").Trainer, "step", start)
    for there, flags, words in (
        (False, ["--resume"], f"no checkpoint {tmp_path}/run.pt: starting from the beginning"),
        (True, [], f"starting from the beginning; --resume would go on from {tmp_path}/run.pt"),
        (True, ["--resume"], f"going on after step 2, from {tmp_path}/run.pt"),
    ):
        if there:
            (tmp_path / "run.pt").write_bytes(stopped)
        with pytest.raises(Killed):
            module("rotation").main([*arguments("rotation", tmp_path), *flags])
        assert words in capsys.readouterr().out
