"""The worked examples at reduced size: what they print holds, and what they learn is right."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

from resources.examples import augmentation, data_mixture, loss_weights, schedule
from tests.forked import run

ROOT = Path(__file__).resolve().parents[1]


SMALL = dict(LENGTH=24, BATCH=12, VAL_BATCH=12)  # of data_mixture


def records(main, steps, tmp_path, horizon):
    """{method: record} of a run with that many steps, the last one also through `horizon` steps."""
    out = tmp_path / "runs.jsonl"
    main(["--steps", str(steps), "--seed", "1", "--horizon", str(horizon), "--out", str(out)])
    return {run["config"]["method"]: run for run in map(json.loads, out.read_text(encoding="utf-8").splitlines())}


def values(runs, name):
    return {method: run["metrics"][name] for method, run in runs.items()}


@pytest.fixture(scope="module")
def texts():
    return data_mixture.sources()


def test_data_mixture(texts, tmp_path, monkeypatch):
    for name, value in dict(SMALL, META_EVERY=2, META_LR=0.3, sources=lambda: texts).items():
        monkeypatch.setattr(data_mixture, name, value)
    monkeypatch.setattr(data_mixture, "WARM_UP", 20)
    runs = records(data_mixture.main, 150, tmp_path, 10)
    assert tuple(runs) == (*data_mixture.METHODS, "N = 10", "N = 10, sampled")
    weights, losses = values(runs, "weights"), values(runs, "test_loss")
    for learned, sampled in (("learned", "sampled as learned"), ("N = 10", "N = 10, sampled")):
        assert weights[learned] == weights[sampled]
        assert weights[learned]["docstrings"] > 0.5 > weights[learned]["code"] > weights[learned]["shuffled"]
        assert losses[sampled] < losses["uniform"] - 0.1
    assert all(weight == pytest.approx(1 / 3) for weight in weights["uniform"].values())
    assert losses["learned"] < losses["uniform"]


def test_texts_do_not_overlap(texts):
    """No docstring of validation or test stands in a source: λ and the figures are of modules that training has not seen."""
    texts, val, test = texts
    decode = lambda text: bytes(text.tolist()).decode()
    source, val, test = decode(texts["docstrings"]), decode(val), decode(test)
    long = lambda text: [part for part in text.split("\n\n") if len(part) > 200]
    assert len(long(val)) > 50 and len(long(test)) > 50
    for own, others in ((long(val), source + test), (long(test), source + val)):
        assert sum(part in others for part in own) <= 0.05 * len(own)  # modules that copy a sentence from another
    assert '"""' not in decode(texts["code"])[:100_000]
    assert sorted(decode(texts["shuffled"])) == sorted(decode(texts["code"]))


def test_sampling_follows_the_shares():
    texts = {name: torch.full((1000,), i) for i, name in enumerate(data_mixture.NAMES)}
    shares = torch.tensor([0.7, 0.25, 0.05])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(200):
        batch, source = data_mixture.sample(texts, shares, generator)
        assert (batch == source[:, None]).all()
        counts += source.bincount(minlength=3)
    assert (counts / counts.sum()).tolist() == pytest.approx(shares.tolist(), abs=0.01)


def sharded(rank, texts, out):
    """The example's part of one process, in texts that were read once."""
    vars(data_mixture).update(SMALL, sources=lambda: torch.load(texts))
    vars(data_mixture).update(WARM_UP=3)
    data_mixture.main(["--fsdp", "--steps", "9", "--seed", "1", "--horizon", "3", "--out", str(out)])


def test_data_mixture_sharded_is_that_of_one_process(texts, tmp_path, monkeypatch):
    for name, value in dict(SMALL, WARM_UP=3, sources=lambda: texts).items():
        monkeypatch.setattr(data_mixture, name, value)
    alone = records(data_mixture.main, 9, tmp_path, 3)
    out = tmp_path / "sharded.jsonl"
    torch.save(texts, tmp_path / "texts.pt")
    found = run(tmp_path, sharded, tmp_path / "texts.pt", out)
    assert [f["code"] for f in found] == [0, 0], found[0]["err"]
    sharded_runs = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [one["config"]["processes"] for one in sharded_runs] == [2] * 5
    for one in sharded_runs:
        own = alone[one["config"]["method"]]["metrics"]
        assert one["metrics"]["test_loss"] == pytest.approx(own["test_loss"], rel=1e-3)
        assert one["metrics"]["weights"] == pytest.approx(own["weights"], rel=1e-3)


def test_loss_weights(tmp_path):
    runs = records(loss_weights.main, 300, tmp_path, 10)
    assert tuple(runs) == (*loss_weights.METHODS, "N = 10")
    accuracy, losses, ratio = (values(runs, name) for name in ("test_accuracy", "test_loss", "rare_over_frequent"))
    for learned in ("learned", "N = 10"):
        assert accuracy[learned] > accuracy["uniform"] + 3 and losses[learned] < losses["uniform"] and ratio[learned] > 3
    assert accuracy["grid search"] > accuracy["uniform"]
    assert ratio["uniform"] == pytest.approx(1)
    steps = {"uniform": 300, "grid search": 2400, "learned": 300, "learned, then fixed": 600, "N = 10": 300}
    assert values(runs, "steps") == steps


def test_augmentation(tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation, "N_TRIALS", 1)
    runs = records(augmentation.main, 300, tmp_path, 2)
    assert tuple(runs) == (*augmentation.METHODS, "N = 2")
    accuracy, strengths = values(runs, "test_accuracy"), values(runs, "strengths")
    for learned in ("learned", "N = 2"):
        assert accuracy[learned] > accuracy["no augmentation"] + 3
        assert strengths[learned]["rotation"] > 0.2 and strengths[learned]["noise"] > 0.15  # both began at 0.1
    assert strengths["the true conditions"]["rotation"] == pytest.approx(30 * 3.14159 / 180, rel=1e-3)
    assert strengths["no augmentation"] == dict.fromkeys(augmentation.NAMES, 0)
    assert values(runs, "steps")["random search"] == 300


def test_augmentation_at_another_learning_rate_is_another_configuration(tmp_path):
    out = tmp_path / "runs.jsonl"
    for further in ([], ["--lr", "0.1", "--momentum", "0"]):
        augmentation.main(["--steps", "4", "--methods", "--horizon", "2", "--out", str(out), *further])
    one, other = (json.loads(line)["config"] for line in out.read_text(encoding="utf-8").splitlines())
    assert one == {"method": "N = 2", "seed": 1, "steps": 4} and other == {**one, "lr": 0.1, "momentum": 0}


def test_schedule(tmp_path, monkeypatch):
    """From a learning rate that is far too low; a whole training through 60 steps, and its derivative is the difference."""
    out = tmp_path / "runs.jsonl"
    monkeypatch.setattr(schedule, "RATES", (0.03, 0.1))
    monkeypatch.setattr(schedule, "DECAYS", (1e-3,))
    schedule.main(["--steps", "60", "--trainings", "5", "--out", str(out)])
    grid, learned = (json.loads(line)["metrics"] for line in out.read_text(encoding="utf-8").splitlines())
    assert (grid["trainings"], learned["trainings"]) == (2, 5)
    assert learned["val_loss"] == min(learned["val_losses"]) < learned["val_losses"][0] - 0.3
    assert min(learned["rates"]) > 2 * schedule.START[0]
    rates, splits = [0.01] * schedule.PARTS, schedule.data(1)
    (val_loss, _), (by_rates, _) = schedule.train(rates, 1e-3, 1, 60, splits, learn=True)
    assert val_loss == schedule.train(rates, 1e-3, 1, 60, splits)[0][0]
    moved = [schedule.train([0.01 * f, *rates[1:]], 1e-3, 1, 60, splits)[0][0] for f in (1.02, 1 / 1.02)]
    assert by_rates[0].item() == pytest.approx((moved[0] - moved[1]) / (2 * math.log(1.02)), rel=0.15)


def test_augmenting_by_nothing_changes_nothing():
    images = torch.rand(5, 1, 8, 8)
    assert torch.allclose(augmentation.augment(images, torch.zeros(4)), images, atol=1e-5)
    for i in range(4):
        strengths = torch.zeros(4)
        strengths[i] = 0.5
        assert (augmentation.augment(images, strengths) - images).abs().amax((1, 2, 3)).min() > 0.01, augmentation.NAMES[i]


@pytest.mark.parametrize("example", [augmentation, data_mixture, loss_weights])
def test_wrong_arguments_and_splits(example, refused):
    refused(example.main, ["--steps", "0"], ["--steps", "0 given", "at least 1"])
    refused(example.main, ["--seed", "-1"], ["--seed", "-1 given"])
    assert len(Path(example.__file__).read_text(encoding="utf-8").splitlines()) < 170
    if example is not data_mixture:
        splits = example.data(3)
        images = [tuple(x.flatten().tolist()) for x, _ in splits.values() for x in x]
        assert len(images) > 700 and len(images) - len(set(images)) <= 2  # the data set itself may hold an image twice


def test_fsdp_wants_torchrun(refused, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    refused(data_mixture.main, ["--fsdp"], ["--fsdp", "torchrun"])


def test_the_shell_script_runs_every_example_with_every_seed():
    printed = subprocess.run(
        ["bash", "resources/examples/run.sh", "--print", "--steps", "7"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = [re.search(r"resources\.examples\.(\w+) --seed (\d) .* --steps 7$", line).groups() for line in printed]
    assert sorted(found) == sorted((e, s) for e in ("data_mixture", "loss_weights", "augmentation") for s in "123")


def test_fsdp2_in_two_processes_is_that_of_one(tmp_path):
    found = {}
    for size in (1, 2):
        ends = run(tmp_path, sharded_loop, size=size)
        assert [end["code"] for end in ends] == [0] * size, ends[0]["err"]
        assert "step 20: loss" in ends[0]["out"]
        found[size] = [end["result"] for end in ends]
    for weights in found[2]:
        assert torch.allclose(weights, found[1][0], atol=2e-3)
    assert found[1][0].abs().max() > 0.05


def sharded_loop(rank):
    from resources.examples import fsdp2

    return fsdp2.main()
