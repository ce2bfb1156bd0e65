"""The label-noise experiment: data and noise, models, every method tiny, and bad input."""

import contextlib
import io
import json
import os
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evograd
from evograd.lab import cli, costs, figures
from evograd.lab.methods import MAIN
from evograd.operations.kinks import _Bits
from label_noise_mwn import compare, data, plot, train
from label_noise_mwn.data import Source, load, make_task, noise_matrix, reflect
from label_noise_mwn.models import MODELS, resnet, wide_resnet

CPU = torch.device("cpu")

# --- data --------------------------------------------------------------------------------------------------------------


def task(noise="flip", level=0.4, n_meta=30, n_val=30, n_train=None, seed=1, source=None):
    return make_task(source or load("digits", ""), noise, level, n_meta, n_val, n_train, seed, CPU)


def numbered(n=600, n_classes=6):
    """Images that carry their own number in two pixels."""
    number = torch.arange(n)
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = number % 256, number // 256
    return Source(images, number % n_classes, images[:12], number[:12] % n_classes, superclasses=torch.arange(n_classes) // 3)


def numbers(split):
    return split.images[:, 0, 0, 0].int() + 256 * split.images[:, 0, 0, 1].int()


@pytest.mark.parametrize("seed", [1, 2, 77])
def test_meta_validation_and_training_images_are_disjoint_for_every_seed(seed):
    made = task(n_meta=60, n_val=30, seed=seed, source=numbered())
    parts = [set(numbers(split).tolist()) for split in (made.train, made.meta, made.val)]
    assert [len(part) for part in parts] == [510, 60, 30]
    assert len(set.union(*parts)) == 600
    for split in (made.meta, made.val):
        assert len(set(torch.bincount(split.labels, minlength=6).tolist())) == 1  # balanced
        assert torch.equal(split.labels, split.clean)
    assert torch.equal(made.train.clean, numbers(made.train).long() % 6)  # labels stay with their images


def test_everything_follows_from_the_seed():
    first, again, other = (task(seed=seed, source=numbered()) for seed in (5, 5, 6))
    assert torch.equal(first.train.labels, again.train.labels) and torch.equal(numbers(first.meta), numbers(again.meta))
    assert torch.equal(first.noise_matrix, again.noise_matrix)
    assert not torch.equal(numbers(first.meta), numbers(other.meta))
    assert not torch.equal(first.noise_matrix, other.noise_matrix)


def test_noise_matrices():
    superclasses = torch.tensor([0, 0, 0, 1, 1, 1])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        flip = noise_matrix("flip", 0.4, 6, None, generator)
        assert torch.equal((flip == 0.4).sum(1), torch.ones(6).long())
        torch.testing.assert_close(flip.diagonal(), torch.full((6,), 0.6).double())
        flip2 = noise_matrix("flip2", 0.4, 6, None, generator)
        assert torch.equal((flip2 == 0.2).sum(1), torch.full((6,), 2))
        hierarchical = noise_matrix("hierarchical", 0.4, 6, superclasses, generator)
        torch.testing.assert_close(hierarchical[4], torch.tensor([0, 0, 0, 0.2, 0.6, 0.2]).double())
        unif = noise_matrix("unif", 0.4, 10, None, generator)
        assert unif[3, 3].item() == pytest.approx(0.64) and unif[3, 4].item() == pytest.approx(0.04)
        for matrix in (flip, flip2, hierarchical, unif):
            torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)).double())
    assert torch.equal(noise_matrix("flip", 0.0, 4, None, torch.Generator()), torch.eye(4).double())


@pytest.mark.parametrize(("noise", "rate"), [("flip", 0.4), ("flip2", 0.4), ("unif", 0.36), ("hierarchical", 0.4)])
def test_realised_noise(noise, rate):
    n = 20_000
    images, labels = torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n) % 10
    source = Source(images, labels, images[:10], labels[:10], superclasses=torch.arange(10) // 2)
    made = task(noise, source=source)
    wrong = made.train.labels != made.train.clean
    assert wrong.double().mean().item() == pytest.approx(rate, abs=0.015)
    of_class = torch.bincount(made.train.labels[made.train.clean == 3], minlength=10) / (made.train.clean == 3).sum()
    torch.testing.assert_close(of_class.double(), made.noise_matrix[3], atol=0.05, rtol=0)


def test_labels_that_are_noisy_already():
    source = numbered()
    source.y_noisy = (source.y_train + (torch.arange(600) % 4 == 0)) % 6
    made = task("given", None, source=source, n_meta=6, n_val=6)
    assert torch.equal(made.train.labels, source.y_noisy[numbers(made.train).long()])
    assert (made.train.labels != made.train.clean).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(made.noise_matrix.sum(1), torch.ones(6).double())
    assert made.noise_matrix[0, 2] == 0 < made.noise_matrix[0, 1]


def test_augmentation_is_a_crop_of_the_reflected_image_for_each_sample():
    assert reflect(torch.arange(-2, 6), 4).tolist() == [2, 1, 0, 1, 2, 3, 2, 1]
    made = task()
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    out = made.augmented(images, 2, True, torch.Generator().manual_seed(0))
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    seen = set()
    for i in range(64):
        crops = {(y, x): padded[i : i + 1, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
        crops |= {(y, x, "mirrored"): crop.flip(3) for (y, x), crop in crops.items()}
        found = [place for place, crop in crops.items() if torch.equal(made.normalize(crop)[0], out[i])]
        assert found, i
        seen.update(found)
    assert len(seen) > 30  # of 50: a draw for each sample
    plain = made.augmented(images, 0, False, torch.Generator())
    torch.testing.assert_close(plain, (images / 255 - made.mean) / made.std)


def test_normalised_images_have_mean_zero_and_deviation_one():
    made = task()
    pixels = made.normalize(made.train.images)
    assert pixels.mean().item() == pytest.approx(0, abs=1e-4) and pixels.std().item() == pytest.approx(1, abs=1e-3)


def write_npz(path, **changes):
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(120) % 4,
        "x_test": random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(20) % 4,
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_npz(tmp_path):
    source = load(write_npz(tmp_path / "set.npz", y_noisy=np.ones(120, int), superclasses=np.array([0, 0, 1, 1])), "")
    assert source.x_train.shape == (120, 3, 8, 8) and source.x_train.dtype == torch.uint8
    assert source.n_classes == 4 and source.superclasses.tolist() == [0, 0, 1, 1]
    grey = load(
        write_npz(tmp_path / "grey.npz", x_train=np.zeros((120, 8, 8), np.uint8), x_test=np.zeros((20, 8, 8), np.uint8)), ""
    )
    assert grey.x_test.shape == (20, 1, 8, 8)


def test_cifar_is_read_from_torchvision(tmp_path, monkeypatch):
    """Superclasses are those that CIFAR-100's own file pairs with its labels."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part, n in (("train", 300), ("test", 100)):
        entry = {"data": np.zeros((n, 3072), np.uint8), "fine_labels": [i % 100 for i in range(n)],
                 "coarse_labels": [i % 100 // 5 for i in range(n)]}  # fmt: skip
        (folder / part).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = load("cifar100", str(tmp_path))
    assert source.x_train.shape == (300, 3, 32, 32) and source.n_classes == 100
    assert torch.equal(source.superclasses, torch.arange(100) // 5)
    assert source.mean == data.CIFAR_MEAN


def write_cifar10(root, protocol=2, as_bytes=False, change=lambda entries: None):
    """CIFAR-10's files as another program writes them, each image of one colour."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    entries = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(10_000) % 10
        entries[name] = {"data": np.repeat(labels[:, None].astype(np.uint8) * 20, 3072, 1), "labels": labels.tolist()}
    change(entries)
    written = []
    for name, entry in entries.items():
        for other in written:  # most are alike, 30 MB each
            if entry["labels"] == entries[other]["labels"] and np.array_equal(entry["data"], entries[other]["data"]):
                os.link(folder / other, folder / name)
                break
        else:
            written.append(name)
            entry = {key.encode() if as_bytes else key: value for key, value in entry.items()}
            (folder / name).write_bytes(pickle.dumps(entry, protocol=protocol))
    return str(root)


@pytest.mark.parametrize("settings", [{"protocol": 2}, {"protocol": 5, "as_bytes": True}])
def test_cifar_that_another_program_has_packed_counts_by_what_it_holds(settings, tmp_path):
    source = load("cifar10", write_cifar10(tmp_path, **settings))
    assert source.x_train.shape == (50_000, 3, 32, 32) and source.x_test.shape == (10_000, 3, 32, 32)
    assert torch.equal(source.x_train[:, 2, 5, 7], (source.y_train * 20).to(torch.uint8)) and source.mean == data.CIFAR_MEAN


def test_other_pixels_of_cifar_are_another_run(tmp_path, monkeypatch):
    def other(entries):
        entries["test_batch"]["data"][0, 0] += 1

    a, b, c = (write_cifar10(tmp_path / n, p, change=f) for n, p, f in (("a", 2, len), ("b", 4, len), ("c", 2, other)))
    a, b, c = (data.data_fingerprint("cifar10", root) for root in (a, b, c))
    assert a == b != c and a and c
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    assert data.data_fingerprint("cifar10", str(tmp_path / "c")) is None  # as published


class Asks:
    def __reduce__(self):
        return print, ("run by the file",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("data_batch_3"), "data_batch_3"),
        (lambda e: e["test_batch"].update(labels=[0] * 10_000), "the test labels are not 1000 of each of 10 classes"),
        (lambda e: e["data_batch_1"].update(data=np.zeros((9, 3072), np.uint8)), "the training images are .40009, 3, 32, 32"),
        (lambda e: e["data_batch_2"].update(data=Asks()), "data_batch_2: it asks for .*builtin.*.print, which no array needs"),
    ],
)
def test_cifar_of_something_else_is_named(change, words, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"cifar-10-batches-py is broken: .*{words}.*Delete or rename it"):
        load("cifar10", write_cifar10(tmp_path, change=change))
    assert "run by the file" not in capsys.readouterr().out


def test_cifar_is_fetched_beside_and_never_over_what_is_there(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    asked = []

    def download(self):
        asked.append(self.root)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(CIFAR10, "download", download)
    folder = tmp_path / CIFAR10.base_folder
    with pytest.raises(FileNotFoundError, match="no cifar10 under"):
        load("cifar10", str(tmp_path))
    assert not asked
    with pytest.raises(OSError, match="CIFAR10 could not be fetched into .*corrupted"):
        load("cifar10", str(tmp_path), download=True)
    assert len(asked) == 1 and str(tmp_path) != str(asked[0])
    assert list(tmp_path.iterdir()) == []  # nothing is left of what was cut off
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"mine")
    with pytest.raises(ValueError, match="cifar-10-batches-py is broken.*Delete or rename it"):
        load("cifar10", str(tmp_path), download=True)
    assert len(asked) == 1 and (folder / "data_batch_1").read_bytes() == b"mine"


# --- models ------------------------------------------------------------------------------------------------------------


def test_parameter_counts_and_shapes():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(resnet(32, 10)) == 464_154  # He et al.: 0.46 million
    with FakeTensorMode():
        by_width = [count(MODELS["resnet32"](10, (3, 32, 32), width)) for width in (1, 2, 3, 4, 5)]
        assert by_width == pytest.approx([0.47e6, 1.9e6, 4.2e6, 7.4e6, 11.5e6], rel=0.03)  # the paper's Figure 5
        assert count(MODELS["wrn28_10"](10, (3, 32, 32), 2)) == count(wide_resnet(28, 20, 10))
        wide = wide_resnet(28, 10, 10)
        assert count(wide) == 36_479_194  # Zagoruyko and Komodakis: 36.5 million
        assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert count(MODELS["mlp"](10, (1, 28, 28), 2)) == 784 * 512 + 512 + 512 * 512 + 512 + 5_130
    for name, size in (("small", 8), ("small", 28), ("mlp", 8)):
        small = MODELS[name](10, (1, size, size))
        assert small(torch.zeros(2, 1, size, size)).shape == (2, 10)


# --- the step ----------------------------------------------------------------------------------------------------------


def trainer(method, *arguments):
    args = train.parse_args(["--method", method, "--device", "cpu", *arguments])
    torch.manual_seed(0)
    return train.Trainer(args, task())


def test_weights_are_divided_by_their_sum():
    learner = trainer("evograd")
    learner.weight_net = nn.Sequential(nn.Linear(1, 1))
    nn.init.ones_(learner.weight_net[0].weight), nn.init.zeros_(learner.weight_net[0].bias)
    losses = torch.tensor([1.0, 3.0])
    assert learner.weighted_mean(losses, torch.tensor([3.0, 1.0])).item() == pytest.approx((3 * 1 + 1 * 3) / 4)
    learner.args.normalize_weights = False
    assert learner.weighted_mean(losses, torch.tensor([3.0, 1.0])).item() == pytest.approx((3 * 1 + 1 * 3) / 2)
    leaf = losses.clone().requires_grad_()
    learner.weighted_mean(leaf, leaf).backward()
    assert leaf.grad.tolist() == [0.5, 1.5]  # the input is held constant


def hypergradient_calls(learner, monkeypatch):
    """What each meta-step was given, and the parameters at that time."""
    calls = []

    def estimator(train_loss, val_loss, model, hyperparameters, **settings):
        here = {n: p.detach().clone() for n, p in model.named_parameters()}
        calls.append({"train_loss": train_loss, "here": here, **settings})
        grads = [torch.ones_like(h) for h in hyperparameters]
        return evograd.Hypergradient(grads, torch.zeros(()), torch.zeros(1), torch.ones(1))

    learner.meta.estimator = estimator
    return calls


def test_order_of_the_updates(monkeypatch):
    """The paper's EvoGrad and T1-T2 come before the model's update; guided and mixed mode look at the step really made."""
    for method in (m.name for m in train.METHODS.values() if m.estimator and not m.remembers):
        learner = trainer(method)
        calls = hypergradient_calls(learner, monkeypatch)
        start = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
        learner.step()
        (call,) = calls
        moved = not torch.equal(call["here"]["0.weight"], start["0.weight"])
        around = train.METHODS[method].around == "step"
        assert moved == around == (method in ("evograd_guided", "mixed_mode", "finite_difference"))
        if around:
            assert all(torch.equal(call["parameters"][name], p) for name, p in start.items())
            assert all(call["lookahead"][name] is p for name, p in learner.model.named_parameters())
        assert call.get("inner_lr") == (None if method in ("evograd", "conjugate_gradient") else 0.05)


def test_weight_input_of_the_model_is_the_same_for_all_candidates(monkeypatch):
    for method, extra, same in (
        ("evograd", (), False),
        ("evograd", ("--weight-input", "model"), True),
        ("evograd_guided", (), True),
        ("evograd_guided", ("--weight-input", "candidate"), False),
    ):
        learner = trainer(method, *extra)
        calls = hypergradient_calls(learner, monkeypatch)
        seen = []
        weighted_mean = learner.weighted_mean
        learner.weighted_mean = lambda losses, inputs, *total: (seen.append(inputs.detach()), weighted_mean(losses, inputs))[1]
        learner.step()
        seen.clear()
        closure = calls[0]["train_loss"]
        closure(learner.model)
        other = resnet(8, 10, 1, width=8)
        closure(other)
        assert torch.equal(*seen) == same


def test_meta_every(monkeypatch):
    learner = trainer("evograd_guided", "--meta-every", "3")
    calls = hypergradient_calls(learner, monkeypatch)
    for _ in range(7):
        learner.step()
    assert len(calls) == 3


@pytest.mark.usefixtures("fewer_estimates")
def test_quality_of_estimates():
    """Mixed mode at T1-T2's own lookahead is T1-T2; the log disturbs neither the run nor its random numbers."""
    plain, logged = trainer("evograd"), trainer("evograd", "--log-quality", "2")
    losses = []
    for learner in (plain, logged):
        torch.manual_seed(3)
        losses.append([learner.step().item() for _ in range(3)])
    assert losses[0] == losses[1]
    seldom = [trainer("evograd", "--meta-every", "2", *log) for log in ((), ("--log-quality", "1"))]
    for learner in seldom:  # logging in steps without a meta-update takes no batch from those with one
        torch.manual_seed(3)
        [learner.step() for _ in range(5)]
    for one, other in zip(*(learner.weight_net.parameters() for learner in seldom)):
        assert torch.equal(one, other)
    assert [entry["step"] for entry in logged.meta.quality.entries] == [0, 2]
    for entry in logged.meta.quality.entries:
        assert entry["mixed_sgd"]["cosine"] > 0.999
        assert entry["mixed_sgd"]["norm"] == pytest.approx(1, abs=0.01)
        assert entry["guided_sgd"]["cosine"] > 0.8


# --- runs --------------------------------------------------------------------------------------------------------------


def run(tmp_path, method, *extra):
    out = tmp_path / "runs.jsonl"
    train.main(["--method", method, "--device", "cpu", "--epochs", "2", "--out", str(out), *extra])
    return json.loads(out.read_text().splitlines()[-1])


FEWER = ("--train-images", "400")


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_runs_and_leaves_a_record(method, tmp_path, capsys):
    record = run(tmp_path, method, *FEWER)
    metrics = record["metrics"]
    assert record["experiment"] == "label_noise_mwn" and record["config"]["noise_level"] == 0.4
    assert len(metrics["test_accuracy"]) == len(metrics["val_accuracy"]) == len(metrics["train_loss"]) == 2
    assert metrics["test_accuracy_last"] == metrics["test_accuracy"][-1]
    assert metrics["test_accuracy_best"] == metrics["test_accuracy"][metrics["best_epoch"] - 1]
    assert metrics["noise_rate"] == pytest.approx(0.4, abs=0.06)
    assert all(sum(row.values()) == pytest.approx(1) and len(row) == 3 for row in metrics["noise_matrix"])
    assert {"seconds", "seconds_per_step", "peak_bytes", "flops"} <= set(record["cost"])
    if method == "cross_entropy":
        assert "weight_auc" not in metrics
    else:
        assert 0 <= metrics["weight_auc"] <= 1
        assert sum(metrics["weights_clean"]) + sum(metrics["weights_noisy"]) == 400
        assert set(metrics["weight_curves"]) == {"0", "1", "2"}


def test_same_seed_same_run_and_the_same_batches_for_every_method(tmp_path, capsys):
    first, again = (run(tmp_path, "evograd", "--seed", "5", *FEWER)["metrics"] for _ in range(2))
    assert first == again
    assert first["noise_matrix"] == run(tmp_path, "cross_entropy", "--seed", "5", *FEWER)["metrics"]["noise_matrix"]


def test_without_noise_there_is_no_roc_curve(tmp_path, capsys):
    assert run(tmp_path, "mixed_mode", "--noise-level", "0", *FEWER)["metrics"]["weight_auc"] is None


def test_options_of_the_ordinary_step(tmp_path, capsys):
    usual = run(tmp_path, "evograd_guided", *FEWER)["metrics"]["train_loss"]
    for flags in (["--amp"], ["--channels-last"]):  # the same but for rounding
        assert run(tmp_path, "evograd_guided", *FEWER, *flags)["metrics"]["train_loss"][0] == pytest.approx(usual[0], rel=0.05)
    for flags in (["--meta-optimizer", "sgd"], ["--meta-lr", "0.1"], ["--no-normalize-weights"]):
        assert run(tmp_path, "evograd_guided", *FEWER, *flags)["metrics"]["train_loss"] != usual


@pytest.mark.parametrize(("method", "passes"), [("evograd", 4), ("evograd_guided", 4), ("mixed_mode", 1), ("second_order", 1)])
def test_compiled_model_is_used_in_the_ordinary_step_and_for_candidates(method, passes, monkeypatch):
    """Of the estimators those that take ordinary passes use it, with their parameters in place of the model's."""
    used = []

    class Compiled:
        def __init__(self, model, mode):
            self.model = model
            assert mode == next(modes)

        def __call__(self, x):
            used.append(len(x))
            return self.model(x)

    modes = iter((None, "reduce-overhead"))
    monkeypatch.setattr(torch, "compile", Compiled)
    torch.manual_seed(0)
    learner = trainer(method, "--compile")
    learner.step()
    assert len(used) == passes
    trainer(method, "--compile", "reduce-overhead")
    assert next(modes, None) is None
    torch.manual_seed(0)
    plain = trainer(method)
    plain.step()
    for a, b in zip(learner.weight_net.parameters(), plain.weight_net.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_npz_runs_with_noisy_labels(tmp_path, capsys):
    path = write_npz(tmp_path / "camera.npz", y_noisy=(np.arange(120) + (np.arange(120) % 5 == 0)) % 4)
    sizes = ("--meta-images", "8", "--val-images", "8", "--batch-size", "20", "--model", "small")
    record = run(tmp_path, "evograd", "--data", path, "--noise", "given", *sizes)
    assert record["config"]["data"] == "camera" and record["config"]["noise_level"] is None
    assert record["metrics"]["noise_rate"] == pytest.approx(0.2, abs=0.02)


def test_a_few_clean_images_and_no_true_labels_for_the_rest(tmp_path, capsys, refused):
    truth = np.arange(120) % 4
    y_noisy = (truth + (np.arange(120) % 5 == 0)) % 4
    path = write_npz(tmp_path / "mine.npz", y_train=np.where(np.arange(120) < 40, truth, -1), y_noisy=y_noisy)
    made = task("given", None, source=load(path, ""), n_meta=16, n_val=16)
    assert made.n_classes == 4 and len(made.train) == 120 - 32 and made.noise_matrix is None
    assert (made.meta.labels >= 0).all() and (made.val.labels >= 0).all() and (made.train.labels >= 0).all()
    assert (made.train.clean < 0).sum() == 80
    sizes = ("--meta-images", "16", "--val-images", "16", "--batch-size", "44", "--model", "small")
    metrics = run(tmp_path, "mixed_mode", "--data", path, "--noise", "given", *sizes)["metrics"]
    for name in ("noise_rate", "noise_matrix", "weight_auc", "weights_clean", "weights_noisy"):
        assert metrics[name] is None
    assert sum(metrics["weights_all"]) == 88
    plot.main([str(tmp_path / "runs.jsonl"), "--out-dir", str(tmp_path)])
    assert {p.name.split("_")[3] for p in tmp_path.glob("*.png")} == {"accuracy", "weights"}
    arguments = ["--data", path, *sizes, "--device", "cpu", "--out", str(tmp_path / "other.jsonl")]
    refused(train.main, arguments, ["y_train has labels from -1 to 3", "0 to 3"])  # only with --noise given
    few = [*arguments, "--noise", "given", "--meta-images", "60"]
    refused(train.main, few, ["--meta-images 60 takes 15 images of each class", "of class 0 there are 10"])
    unknown = write_npz(tmp_path / "none.npz", y_train=np.full(120, -1), y_noisy=y_noisy, y_test=np.arange(20) % 4)
    refused(train.main, [*arguments, "--noise", "given", "--data", unknown], ["y_train", "-1"])


def test_epochs_that_are_not_evaluated_have_none(tmp_path, monkeypatch, capsys):
    done, evaluate = [], train.losses_and_accuracy
    monkeypatch.setattr(train, "losses_and_accuracy", lambda *args: (done.append(args[2]), evaluate(*args))[1])
    metrics = run(tmp_path, "cross_entropy", "--epochs", "5", "--eval-every", "2", "--train-images", "100")["metrics"]
    assert len(done) == 2 * 3 and len(metrics["train_loss"]) == 5
    for part in ("val", "test"):
        assert [accuracy is not None for accuracy in metrics[f"{part}_accuracy"]] == [False, True, False, True, True]
    assert metrics["best_epoch"] in (2, 4, 5) and metrics["test_accuracy_last"] == metrics["test_accuracy"][4]
    best = max(a for a in metrics["val_accuracy"] if a is not None)
    assert metrics["val_accuracy"][metrics["best_epoch"] - 1] == best
    plot.main([str(tmp_path / "runs.jsonl"), "--out-dir", str(tmp_path)])
    assert (tmp_path / "label_noise_mwn_accuracy_digits.png").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--crop-padding", "8"], "--crop-padding 8 given; for images of 8 x 8 pixels at most 7 is accepted"),
        (["--batch-size", "100", "--train-images", "99"], "--batch-size 100 given, but there are 99 training images"),
        (
            ["--meta-images", "1200"],
            "--val-images 100 takes 10 images of each class, but of class 4 there are 2 after --meta-images 1200",
        ),
        (["--checkpoint", "{}/file/run.pt"], "--checkpoint {}/file/run.pt cannot be written: File exists"),
        (["--checkpoint", "/proc/run.pt"], "--checkpoint /proc/run.pt cannot be written: "),
        (["--checkpoint", "{}"], "--checkpoint {} is a folder"),
    ],
)
def test_what_cannot_be_names_its_flag_and_leaves_nothing(given, words, tmp_path, refused):
    (tmp_path / "file").touch()
    out = tmp_path / "runs.jsonl"
    given = [word.format(tmp_path) for word in given]
    refused(train.main, ["--device", "cpu", "--epochs", "1", "--out", str(out), *given], words.format(tmp_path))
    assert not out.exists()


def test_the_largest_padding_is_taken():
    made = task("flip", 0.4)
    made.check_padding(7)
    seen = made.augmented(made.train.images[:50], 7, True, torch.Generator().manual_seed(0))
    assert seen.shape == (50, *made.train.images.shape[1:])


def test_weights_that_are_the_wrong_way_round_are_said(tmp_path, capsys, monkeypatch):
    for auc, said in ((0.3, True), (0.7, False)):
        monkeypatch.setattr(train, "roc_auc_score", lambda *_, auc=auc: auc)
        run(tmp_path, "evograd", "--train-images", "200", "--seed", "3" if said else "4")
        assert ("the weights are larger for wrong labels than for right ones. Another --meta-lr" in capsys.readouterr().out) is said


@pytest.mark.parametrize(("found", "words"), [(9.0, "is no more than"), (12.0, "is little more than"), (15.0, None)])
def test_next_to_nothing_is_said_too(found, words, capsys):
    cli.say_if_chance("a run", found, [*range(10)] * 1000, "Advice.")
    assert capsys.readouterr().out == (f"a run: {found:.2f} % {words} chance (10.00 %) with these settings. Advice.\n" if words else "")


def test_a_result_that_is_chance_is_said(tmp_path, capsys):
    run(tmp_path, "cross_entropy", "--train-images", "100", "--lr", "1e-9")
    printed = capsys.readouterr().out
    assert "% is no more than chance (11.80 %) with these settings. A lower --lr or more --epochs may help." in printed
    run(tmp_path, "cross_entropy", "--epochs", "4")
    assert "chance" not in capsys.readouterr().out


def test_a_run_is_one_of_its_data(tmp_path, capsys, refused):
    """Files of one name in two folders, and one that is named as the embedded data are."""
    files = [tmp_path / folder / "set.npz" for folder in "abc"]
    for i, file in enumerate(files):
        file.parent.mkdir()
        write_npz(file, y_train=(np.arange(120) + i % 2) % 4)
    with np.load(files[2]) as read:
        np.savez_compressed(files[2], **dict(read))  # the same content as the first, packed in another way
    sizes = ("--meta-images", "8", "--val-images", "8", "--batch-size", "52", "--model", "small", "--skip-done")
    sizes += ("--checkpoint", str(tmp_path / "run.pt"))
    records = [run(tmp_path, "cross_entropy", "--data", str(file), *sizes) for file in files]
    assert capsys.readouterr().out.count("nothing to do") == 1  # the third
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    assert len({record["config"]["fingerprint"] for record in records}) == 2
    (tmp_path / "runs.jsonl").unlink()
    arguments = ["--method", "cross_entropy", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "runs.jsonl")]
    words = ["another configuration: fingerprint", "in the checkpoint"]
    refused(train.main, [*arguments, "--data", str(files[0]), *sizes, "--resume"], words)  # it is of the second
    name = lambda data: train.data_name(train.parse_args(["--data", data, "--device", "cpu"]))
    assert [name(data) for data in ("digits", "x/digits.npz", "x/cifar10_jpeg.npz")] == ["digits", "digits.npz", "cifar10_jpeg"]


def test_embedded_data_have_no_fingerprint_and_old_records_stay_theirs(tmp_path, capsys):
    record = run(tmp_path, "cross_entropy")
    assert record["config"].pop("fingerprint") is None
    (tmp_path / "runs.jsonl").write_text(json.dumps(record) + "\n")
    run(tmp_path, "cross_entropy", "--skip-done")
    assert "nothing to do" in capsys.readouterr().out


def test_width_is_a_part_of_the_configuration_and_old_records_have_width_one(tmp_path, capsys):
    record = run(tmp_path, "cross_entropy", "--width", "1")
    assert record["config"].pop("width") is None
    (tmp_path / "runs.jsonl").write_text(json.dumps(record) + "\n")
    for width in ([], ["--width", "1"]):
        run(tmp_path, "cross_entropy", "--skip-done", *width)
        assert "nothing to do" in capsys.readouterr().out
    wide = run(tmp_path, "cross_entropy", "--skip-done", "--width", "2")
    assert wide["config"]["width"] == 2
    assert 3.5 < wide["cost"]["flops"] / record["cost"]["flops"] < 4


def test_figures(tmp_path, capsys):
    run(tmp_path, "cross_entropy", *FEWER)
    run(tmp_path, "evograd_guided", *FEWER)
    run(tmp_path, "evograd_guided", "--noise-level", "0", *FEWER)
    plot.main([str(tmp_path / "runs.jsonl"), "--out-dir", str(tmp_path)])
    for name in ("accuracy", "weights", "histograms"):
        assert (tmp_path / f"label_noise_mwn_{name}_digits.png").read_bytes().startswith(b"\x89PNG")


def test_figures_show_the_settings_of_most_runs_of_each_data_set():
    def made(data, seed, lr):
        return {"config": {"data": data, "method": "evograd", "noise": "flip", "noise_level": 0.4, "seed": seed, "lr": lr}}

    many = [made("digits", seed, 0.05) for seed in (1, 2)]
    runs = [made("digits", 1, 0.1), *many, made("cifar10", 1, 0.1), made("cifar10", 1, 0.02)]
    assert figures.usual_settings(runs, ("data", "method")) == [*many, made("cifar10", 1, 0.02)]


COMPARED = ["--device", "cpu", "--repeats", "1", "--model", "small", "--batch-size", "16"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(what is printed, the JSON file's methods, the lines of the record) of all methods."""
    folder = tmp_path_factory.mktemp("compared")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare.main([*COMPARED, "--json", str(folder / "cost.json"), "--out", str(folder / "runs.jsonl")])
    methods = json.loads((folder / "cost.json").read_text())["methods"]
    return printed.getvalue(), methods, [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_compare_prints_and_writes(compared, tmp_path, capsys):
    printed, methods, (narrow,) = compared
    assert list(methods) == ["plain", *MAIN]
    assert all(name in printed for name in methods)
    compare.main([*COMPARED, "--methods", "evograd", "--width", "2", "--out", str(tmp_path / "runs.jsonl")])
    (wide,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (narrow["config"].get("width"), wide["config"]["width"]) == (None, 2)
    assert wide["metrics"]["evograd"]["flops"] > 3.5 * narrow["metrics"]["evograd"]["flops"]


def test_compare_without_time_counts_what_a_real_step_needs(compared, tmp_path):
    _, measured, _ = compared
    compare.main([*COMPARED, "--fake", "--out", str(tmp_path / "runs.jsonl")])
    record = json.loads((tmp_path / "runs.jsonl").read_text())
    assert record["experiment"] == "label_noise_mwn_architecture"
    for method, cost in record["metrics"].items():
        assert cost["flops"] == measured[method]["flops"]
        assert cost["peak_bytes"] == pytest.approx(measured[method]["peak_bytes"], rel=0.01)
        assert cost["flops_over_plain"] == cost["flops"] / measured["plain"]["flops"]


@pytest.fixture(scope="module")
def papers_size():
    """{(method, *flags): cost} of one full step with ResNet-32 and batch 100, simulated."""
    many = ("evograd", "--n-candidates", "10")
    measured = {}
    as_on_cuda = mock.patch.object(_Bits, "by_words", staticmethod(lambda tensor: False))
    with FakeTensorMode(), as_on_cuda:
        for case in (*((m,) for m in ("cross_entropy", *MAIN)), many):
            flags = [*costs.flags_of(case[0]), *case[1:]]  # trajectory through one step
            args = train.parse_args(["--data", "cifar10", "--device", "cpu", *flags])
            measured[case] = train.measure(costs.carried_on(train.Trainer(args, make_fake_task())).step)
    return measured


def test_cost_at_the_papers_size(papers_size):
    """Bytes and FLOPs over those of the plain step and of T1-T2."""
    plain, second = papers_size["cross_entropy",], papers_size["second_order",]
    for method, flops in (("evograd", 2.70), ("evograd_guided", 2.70), ("mixed_mode", 3.1), ("trajectory", 2.4)):
        cost = papers_size[method,]
        assert cost.peak_bytes <= 1.05 * plain.peak_bytes
        assert cost.peak_bytes <= 0.36 * second.peak_bytes
        assert cost.flops <= flops * plain.flops


def test_launches_of_a_step_of_label_noise(papers_size):
    """K = 2 and 10, guided: beside those of the plain step, the optimizer's loop over tensors counted in."""
    counted = {case: cost.launches for case, cost in papers_size.items()}
    plain = counted["cross_entropy",]
    assert counted["evograd",] <= 2.4 * plain
    assert counted["evograd", "--n-candidates", "10"] <= 5 * plain
    assert counted["evograd_guided",] <= 2.4 * plain
    assert counted["trajectory",] <= 2.1 * plain
    assert counted["second_order",] > 4 * plain


def make_fake_task():
    def split(n):
        return data.Split(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), torch.zeros(n))

    channel = torch.ones(3, 1, 1)
    return data.Task(split(100), split(100), split(10), split(10), 10, torch.eye(10), channel, channel)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, ["has no y_test", "needed are x_train, y_train, x_test, y_test"]),
        ({"x_train": np.zeros((120, 8), np.uint8)}, ["x_train is (120, 8)", "(n, h, w, 3)"]),
        ({"x_train": np.zeros((120, 8, 8, 3), np.float32)}, ["x_train", "float32", "uint8"]),
        ({"x_test": np.zeros((20, 9, 9, 3), np.uint8)}, ["x_train has images of (3, 8, 8), x_test of (3, 9, 9)"]),
        ({"y_train": np.arange(119) % 4}, ["y_train is (119,)", "x_train has 120 images"]),
        ({"y_train": np.linspace(0, 1, 120)}, ["y_train", "float64", "one integer"]),
        ({"y_train": np.arange(120) % 4 - 1}, ["y_train has labels from -1 to 2", "0 to 2"]),
        ({"y_test": np.arange(20)}, ["y_test has labels from 0 to 19", "0 to 3"]),
        ({"y_noisy": np.arange(120)}, ["y_noisy has labels from 0 to 119", "0 to 3"]),
        ({"y_noisy": np.arange(7) % 4}, ["y_noisy is (7,)"]),
        ({"superclasses": np.array([0, 1])}, ["superclasses is (2,)", "(4,)"]),
        ({"y_train": np.arange(120) % 4 + 1}, ["y_train has labels from 1 to 4", "no image of class 0", "subtract 1 from all"]),
        ({"y_train": np.arange(120) % 3 * 2}, ["y_train has labels from 0 to 4", "class 1, 3;", "without gaps"]),
        ({"y_train": np.array([None] * 120)}, ["y_train is an array of Python objects", "numbers are accepted"]),
        ({"superclasses": np.arange(4), "noise": "hierarchical"}, ["class 0 is alone in its superclass 0"]),
    ],
)
def test_an_npz_that_does_not_fit(changes, words, tmp_path, refused):
    noise = changes.pop("noise", "flip")
    path = write_npz(tmp_path / "set.npz", **changes)
    arguments = ["--data", path, "--noise", noise, "--meta-images", "4", "--val-images", "4", "--device", "cpu"]
    refused(train.main, [*arguments, "--out", str(tmp_path / "runs.jsonl")], words)


def test_an_array_alone_is_no_npz(tmp_path, refused):
    np.save(tmp_path / "set.npy", np.zeros(3))
    path = (tmp_path / "set.npy").rename(tmp_path / "set.NPZ")
    arguments = ["--data", str(path), "--device", "cpu", "--out", str(tmp_path / "runs.jsonl")]
    refused(train.main, arguments, ["set.NPZ is not a whole npz file", "one array, as np.save", "np.savez"])


def test_an_npz_cut_short(tmp_path, capsys):
    path = tmp_path / "set.npz"
    write_npz(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="set.npz is not a whole npz file"):
        load(str(path), "")
