"""--tensorboard: what each script writes at which steps, and that a run which goes on continues its curves."""

import os
import signal
import sys
import types

import pytest

from evograd.lab import board
from evograd.measuring import Cost
from tests.test_checkpoints import N_STEPS, TINY, arguments, module

# {experiment: ({tag: the least and the largest value that it may have}, steps)}
WRITTEN = {
    "rotation": ({"loss": (0, 10), "angle": (-90, 90)}, [1, 14]),
    "label_noise_mwn": (
        {"train_loss": (0, 10), "val_accuracy": (0, 100), "test_accuracy": (0, 100), "weight": (0.1, 0.9)}, [10, 20]
    ),
    "cross_domain_fewshot": ({"loss": (0, 10), "gamma": (0.2, 0.4), "beta": (0.4, 0.6)}, [4, 8, 12]),
    "metaxl": (
        {"loss": (0, 10), "dev_f1": (0, 100), "gate_north": (0.1, 0.9), "gate_south": (0.1, 0.9)}, [4, 8, 12]
    ),
}  # fmt: skip
RESULT = {  # written once, with the last step
    "rotation": {"accuracy_rotated": (0, 100), "accuracy_upright": (0, 100)},
    "label_noise_mwn": {"test_accuracy_best": (0, 100), "weight_auc": (0, 1)},
    "cross_domain_fewshot": {"accuracy": (0, 100)},
    "metaxl": {"test_f1": (0, 100)},
}


class FakeWriter:
    """Stands for torch.utils.tensorboard.SummaryWriter, and keeps what it is given."""

    made = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        assert not self.closed
        self.scalars.append((tag, step, value))

    def close(self):
        self.closed = True

    def points(self):
        return [(tag, step) for tag, step, _ in self.scalars]


@pytest.fixture
def writers(monkeypatch):
    """The writers that were made, in place of TensorBoard's."""
    monkeypatch.setattr(FakeWriter, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter))
    return FakeWriter.made


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(experiment, *flags, end=n): the tiniest run, which SIGTERM meets in its n-th step. Returns the exit code."""

    def start(experiment, *flags, end=None):
        train, count = module(experiment), [0]
        step = original.setdefault(experiment, train.Trainer.step)

        def counted(trainer, *args):
            count[0] += 1
            if count[0] == end:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, *args)

        monkeypatch.setattr(train.Trainer, "step", counted)
        monkeypatch.setattr(train, "measure", lambda *args, **settings: Cost(0.0, 0, 0, 0), raising=False)
        for name in ("peak_bytes", "flops"):
            monkeypatch.setattr(train, name, lambda *args: 0, raising=False)
        code = 0
        try:
            train.main([*arguments(experiment, tmp_path), *flags])
        except SystemExit as ended:
            code = ended.code
        return code

    original = {}
    return start


def curve(experiment):
    tags, steps = WRITTEN[experiment]
    return [(tag, step) for step in steps for tag in tags] + [(tag, steps[-1]) for tag in RESULT[experiment]]


@pytest.mark.parametrize("experiment", TINY)
def test_what_a_run_writes(experiment, run, writers, tmp_path):
    assert run(experiment, "--tensorboard", str(tmp_path / "curves")) == 0
    (writer,) = writers
    assert writer.points() == curve(experiment)
    for tag, _, value in writer.scalars:
        least, largest = (WRITTEN[experiment][0] | RESULT[experiment])[tag]
        assert least <= value <= largest, tag
    assert writer.folder == str(tmp_path / "curves/run") and (tmp_path / "curves/run").is_dir()  # by the checkpoint's name
    assert writer.closed
    assert writer.points()[-1][1] == N_STEPS[experiment]


@pytest.mark.parametrize(("experiment", "method"), [("rotation", "baseline"), ("cross_domain_fewshot", "none")])
def test_a_baseline_learns_nothing_that_moves(experiment, method, run, writers, tmp_path):
    assert run(experiment, "--method", method, "--tensorboard", str(tmp_path)) == 0
    values = {tag: {value for t, _, value in writers[0].scalars if t == tag} for tag, _ in writers[0].points()}
    assert len(values.pop("loss")) > 1
    assert all(len(values.pop(tag)) == 1 for tag in RESULT[experiment])
    assert values == {}


@pytest.mark.parametrize("end", [10, 13])
def test_a_run_that_goes_on_continues_its_curves(end, run, writers, tmp_path):
    """Stopped at the end of an epoch, whose values are written already, and within one."""
    flags = ["--tensorboard", str(tmp_path)]
    assert run("label_noise_mwn", *flags, end=end) == 143
    assert run("label_noise_mwn", *flags, "--resume") == 0
    first, second = writers
    assert first.purge_step == 1 and second.purge_step == end + 1
    assert first.folder == second.folder
    assert first.points() + second.points() == curve("label_noise_mwn")
    assert all(step < second.purge_step for _, step in first.points())  # nothing is taken away that is not written again
    assert run("label_noise_mwn", *flags, "--resume") == 0  # it has ended
    assert len(writers) == 2


def test_without_the_package_a_run_ends_with_what_to_install(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ["--tensorboard needs the package tensorboard", "pip install tensorboard"]
    refused(module("rotation").main, [*arguments("rotation", tmp_path), "--tensorboard", str(tmp_path / "curves")], words)
    assert not (tmp_path / "curves").exists() and not (tmp_path / "run.pt").exists()


def test_a_folder_that_cannot_be_made_ends_a_run_before_it_starts(refused, writers, tmp_path):
    (tmp_path / "curves").write_text("a file")
    refused(module("rotation").main, [*arguments("rotation", tmp_path), "--tensorboard", str(tmp_path / "curves")], "curves")
    assert writers == []


def test_without_the_flag_nothing_is_imported(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    assert run("rotation") == 0
    assert board.open_board(None, "run", 0) is None


@pytest.mark.filterwarnings("default")  # TensorBoard's own
def test_tensorboard_reads_the_curves(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read():
        events = EventAccumulator(str(tmp_path / "curves/run")).Reload()
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    flags = ["--tensorboard", str(tmp_path / "curves")]
    tags, steps = WRITTEN["label_noise_mwn"]
    assert run("label_noise_mwn", *flags) == 0
    whole = read()
    final = {tag: whole.pop(tag) for tag in RESULT["label_noise_mwn"]}
    assert all([step for step, _ in points] == steps[-1:] for points in final.values())
    assert whole.keys() == tags.keys() and all([step for step, _ in points] == steps for points in whole.values())
    (tmp_path / "runs.jsonl").unlink()
    (tmp_path / "run.pt").unlink()
    assert run("label_noise_mwn", *flags, end=10) == 143  # a run from the beginning takes the place of the one before
    assert read() == {tag: points[:1] for tag, points in whole.items()}
    assert run("label_noise_mwn", *flags, "--resume") == 0
    assert read() == whole | final
