"""How far λ moves: norms of hypergradients along trainings, and what decay alone would do."""

import json

import pytest
import torch
import torch.nn.functional as F

import evograd
from label_noise_mwn import train
from resources import displacement

DIGITS = ["--data", "digits", "--device", "cpu", "--train-images", "200"]


def rows(tmp_path, *arguments):
    out = tmp_path / "displacement.jsonl"
    displacement.main([*arguments, "--out", str(out)])
    return json.loads(out.read_text().splitlines()[-1])


def test_the_norms_are_those_of_the_estimates(float64, monkeypatch):
    model, weights = torch.nn.Linear(3, 2), torch.zeros(8, requires_grad=True)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    seen = lambda m: F.cross_entropy(m(x), y, reduction="none")

    def train_loss(m, inputs=None):
        return ((weights + (seen(m) if inputs is None else inputs).detach()).sigmoid() * seen(m)).mean()

    problem = (train_loss, lambda m: F.cross_entropy(m(x[:4]), y[:4]), model, [weights])
    closures = []
    real = displacement.hypergradient
    monkeypatch.setattr(displacement, "hypergradient", lambda loss, *rest: closures.append(loss) or real(loss, *rest))
    probe = displacement.Probe(lambda *problem, held, lr: evograd.hypergradient(*problem))
    before = torch.get_rng_state()
    first = probe(*problem, held=seen, lr=0.1)
    torch.set_rng_state(before)
    probe.measuring = True
    again = probe(*problem, held=seen, lr=0.1)
    assert torch.equal(first.grads[0], again.grads[0])  # measuring changes nothing
    (row,) = probe.rows
    exact = evograd.baselines.unrolled(*problem, inner_lr=0.1).grads[0].norm().item()
    assert row["second_order"] == pytest.approx(exact, rel=1e-9) and row["evograd"] == again.grads[0].norm().item()
    other = torch.nn.Linear(3, 2)
    assert row["evograd_model"] > 0 and closures[0](other) == train_loss(other, seen(model)) != train_loss(other)


def test_what_decay_alone_and_gradients_alone_would_do(tmp_path):
    """One step of Nesterov's SGD without a gradient shrinks λ by lr · decay · 1.9."""
    usual = ("label_noise", *DIGITS, "--steps", "2", "--every", "2", "--window", "1")
    sgd = rows(tmp_path, *usual, "--meta-optimizer", "sgd", "--meta-lr", "1e-3")
    assert sgd["config"]["application"] == "label_noise" and sgd["metrics"]["hyperparameters"] == 301
    first, last = (sgd["metrics"]["windows"][step] for step in ("0", "2"))
    assert first["moved_by_decay"] == pytest.approx(1.9 * 1e-3 * 5e-4, rel=0.1)
    assert 0 < first["moved_by_gradient"] != first["moved"]
    assert first["decay"] > 0 == first["eps"] and last["moved_by_decay"] > 3 * first["moved_by_decay"]
    adam = rows(tmp_path, *usual)["metrics"]["windows"]["2"]
    assert adam["moved_by_decay"] == adam["decay"] == 0 < adam["moved"] == adam["moved_by_gradient"]
    assert adam["eps"] == pytest.approx(1e-8 * 301**0.5)


def test_from_a_checkpoint(tmp_path, capsys):
    file = tmp_path / "model.pt"
    some = [*DIGITS, "--epochs", "2", "--out", str(tmp_path / "runs.jsonl"), "--checkpoint", str(file)]
    train.main(["--method", "cross_entropy", "--seed", "3", *some])
    run = rows(tmp_path, "label_noise", *DIGITS, "--steps", "0", "--window", "2", "--start", str(file))
    assert list(run["metrics"]["windows"]) == ["4"]
    assert run["config"]["first_step"] == 4 and run["config"]["start"] == "cross_entropy, seed 3"
    trainer = displacement.label_noise(["--method", "evograd", *DIGITS], str(file))[0]
    state = torch.load(file, weights_only=False)["trainer"]
    assert torch.equal(trainer.model[0].weight, state["model"]["0.weight"])


def test_the_other_applications(tmp_path):
    short = ("--steps", "0", "--window", "1", "--every", "1", "--device", "cpu")
    glyphs = rows(tmp_path, "few_shot", *short, "--width", "4", "--n-query", "2")["metrics"]["windows"]["0"]
    assert glyphs["decay"] == pytest.approx(1e-8 * (4 * 4 * (0.3**2 + 0.5**2)) ** 0.5, rel=1e-3)
    toy = rows(tmp_path, "cross_lingual", *short, "--source-size", "24", "--target-size", "12")["metrics"]["windows"]["0"]
    assert (
        toy["decay"] > toy["second_order"] > 0 < toy["evograd"] and toy["moved_by_decay"] > 0
    )  # decay as in the authors' code


def test_figure(tmp_path):
    out = tmp_path / "results" / "displacement.jsonl"
    displacement.main(["label_noise", *DIGITS, "--steps", "0", "--window", "1", "--out", str(out)])
    displacement.main(["figure", "--out", str(out)])
    assert (tmp_path / "displacement.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["few_shot", "--start", "x.pt"], "--start given"),
        (["label_noise", "--every", "2"], "--every 2 is less than --window 6"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words, tmp_path, refused):
    refused(displacement.main, [*arguments, "--out", str(tmp_path / "x.jsonl")], words)
