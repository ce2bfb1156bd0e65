"""The rotation experiment: geometry, data, every method tiny, and bad input."""

import gzip
import io
import json
import math
import struct
import urllib.request
from unittest import mock

import pytest
import torch

from evograd.lab.methods import MAIN
from rotation import compare, data, plot, train
from rotation.data import FILES, check_mnist, load, rotate

AROUND_THE_STEP = [m.name for m in train.METHODS.values() if m.around == "step"]


def test_rotate_turns_by_the_angle_that_it_says():
    images = torch.zeros(2, 1, 29, 29)
    images[:, :, 4, 14] = 1  # above the centre
    quarter = rotate(images, math.pi / 2)
    torch.testing.assert_close(quarter, torch.rot90(images, 1, dims=(2, 3)), atol=1e-4, rtol=0)
    smooth = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 29, 29), 5, 1, 2)
    there_and_back = rotate(rotate(smooth, 0.3), torch.tensor(-0.3))
    assert (there_and_back - smooth)[..., 9:20, 9:20].abs().max() < 0.1
    torch.testing.assert_close(rotate(smooth, 0.0), smooth, atol=1e-5, rtol=0)


def test_rotation_is_differentiable_by_the_angle(float64):
    images = torch.nn.functional.avg_pool2d(torch.rand(2, 1, 12, 12), 5, 1, 2)
    angle = torch.tensor(0.2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: rotate(images, a).square().sum(), angle, eps=1e-7, atol=1e-3)


def test_digits_are_split_without_overlap():
    splits = load("digits", "", torch.device("cpu"))
    assert [len(s) for s in splits] == [1000, 297, 500]
    assert all(s.images.shape[1:] == (1, 28, 28) and s.images.dtype == torch.uint8 for s in splits)
    assert all(len(s.labels.unique()) == 10 for s in splits)
    rows = torch.cat([s.images.flatten(1) for s in splits])
    assert len(rows) == 1797


def few(*arguments):
    """As many images as make 15 steps an epoch."""
    train, val, test = load(*arguments)
    return type(train)(train.images[:480], train.labels[:480]), val, test


pytestmark = pytest.mark.filterwarnings("ignore:train_loss of step")  # Adam's first steps, by one angle


def run(tmp_path, method, *extra):
    out = tmp_path / "runs.jsonl"
    arguments = ["--method", method, "--device", "cpu", "--epochs", "2", "--batch-size", "32", "--out", str(out), *extra]
    with mock.patch.object(train, "load", few):
        train.main(arguments)
    return json.loads(out.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The record of a run of EvoGrad without further flags."""
    return run(tmp_path_factory.mktemp("usual"), "evograd")


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_runs_and_leaves_a_record(method, usual, tmp_path, capsys):
    flags = ["--inner-steps", "2"] if method in ("neumann", "conjugate_gradient") else []
    record = usual if method == "evograd" else run(tmp_path, method, *flags)
    assert record["experiment"] == "rotation"
    assert record["config"]["method"] == method
    assert 20 < record["metrics"]["accuracy_upright"] <= 100
    assert {"seconds", "seconds_per_step", "peak_bytes", "flops"} <= set(record["cost"])
    if method == "baseline":
        assert "angle" not in record["metrics"]
    else:
        assert record["metrics"]["angle"] != 0
        assert len(record["metrics"]["angles"]) == len(record["metrics"]["angle_steps"]) == 30


def test_figure_shows_the_runs_of_default_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.EPOCHS, "digits", 2)
    run(tmp_path, "mixed_mode")  # of batches of 32
    plot.main([str(tmp_path / "runs.jsonl"), "--out-dir", str(tmp_path)])
    assert not (tmp_path / "rotation_angle_digits.png").exists()
    run(tmp_path, "mixed_mode", "--batch-size", "128")
    plot.main([str(tmp_path / "runs.jsonl"), "--out-dir", str(tmp_path)])
    assert (tmp_path / "rotation_angle_digits.png").read_bytes().startswith(b"\x89PNG")


def test_flags_reach_the_estimator(usual, tmp_path, capsys):
    more = run(tmp_path, "evograd", "--n-candidates", "10")
    common = run(tmp_path, "evograd", "--common-random-numbers")
    scaled = run(tmp_path, "evograd", "--inner-lr", "1e-12")
    assert more["metrics"]["angle"] != usual["metrics"]["angle"]
    assert more["cost"]["flops"] > 2 * usual["cost"]["flops"]
    assert common["metrics"]["angle"] == usual["metrics"]["angle"]  # this model draws nothing
    assert abs(scaled["metrics"]["angle"]) < 0.5 * abs(usual["metrics"]["angle"])  # as small as Adam's epsilon
    assert common["config"]["common_random_numbers"] is True


def test_same_seed_same_run(usual, tmp_path, capsys):
    assert run(tmp_path, "evograd")["metrics"] == usual["metrics"]


def test_exact_hypergradients_find_the_angle(tmp_path, capsys):
    record = run(tmp_path, "mixed_mode", "--epochs", "12")
    assert record["metrics"]["angle_last_epoch"] == pytest.approx(30, abs=6)


def test_guided_and_mixed_mode_look_ahead_by_the_step_that_was_made():
    """Both are handed θ before the model's update, and take the validation gradient after it."""
    for method in AROUND_THE_STEP:
        args = train.parse_args(["--method", method, "--device", "cpu"])
        trainer = train.Trainer(args, *load("digits", "", args.device)[:2])
        seen = {}
        estimator = trainer.meta.estimator

        def spy(train_loss, val_loss, model, hyperparameters, *, parameters, lookahead, **kinks):
            seen.update(before=parameters, after={n: p.detach().clone() for n, p in lookahead.items()}, **kinks)
            return estimator(train_loss, val_loss, model, hyperparameters, parameters=parameters, lookahead=lookahead, **kinks)

        trainer.meta.estimator = spy
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.step()
        for name, p in trainer.model.named_parameters():
            assert torch.equal(seen["before"][name], start[name])
            assert torch.equal(seen["after"][name], p)
            assert not torch.equal(start[name], p)


def test_quality_is_logged(usual, tmp_path):
    logged = run(tmp_path, "evograd", "--log-quality", "15")  # at two steps
    assert logged["metrics"]["angle"] == usual["metrics"]["angle"]  # it disturbs nothing
    assert logged["config"] == usual["config"] and logged["cost"]["flops"] == usual["cost"]["flops"]
    assert logged["metrics"]["cosine"]["mixed_sgd"] == pytest.approx(1)
    assert logged["metrics"]["norm"]["mixed_sgd"] == pytest.approx(1, abs=0.01)


def test_compare_prints_and_writes(tmp_path, capsys):
    compare.main(
        ["--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "cost.json"), "--out", str(tmp_path / "runs.jsonl")]
    )
    printed = capsys.readouterr().out
    methods = json.loads((tmp_path / "cost.json").read_text())["methods"]
    assert list(methods) == ["plain", *MAIN]
    assert all(name in printed for name in methods)
    assert methods["plain"]["flops"] < methods["evograd"]["flops"] < methods["second_order"]["flops"]
    assert methods["evograd"]["peak_bytes"] < methods["second_order"]["peak_bytes"]


# --- bad input ---------------------------------------------------------------------------------------------------------


def write_mnist(root, truncate=None, packed=False):
    """Four files of the right form, without their content; one of them cut short."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, size in FILES.items():
        n = 60_000 if name.startswith("train") else 10_000
        header = struct.pack(">IIII", 2051, n, 28, 28) if "images" in name else struct.pack(">II", 2049, n)
        content = (header + bytes(size - len(header)))[: 1000 if name == truncate else None]
        if packed:
            stream = gzip.compress(content, 1)
            (folder / f"{name}.gz").write_bytes(stream[:-20] if name == truncate else stream)
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_an_mnist_file_cut_short_is_named(packed, tmp_path):
    write_mnist(tmp_path, truncate="t10k-images-idx3-ubyte", packed=packed)
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.*Delete it and run again with --download"):
        check_mnist(tmp_path)


def test_mnist_of_other_content_is_other_data(tmp_path, monkeypatch):
    fingerprint = lambda: data.data_fingerprint("mnist", str(tmp_path))
    assert fingerprint() is None and data.data_fingerprint("digits", str(tmp_path)) is None
    write_mnist(tmp_path)
    first, path = fingerprint(), tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    assert first and fingerprint() and fingerprint() != first
    path.with_suffix(".gz").write_bytes(gzip.compress(content))
    path.unlink()
    assert fingerprint() == first  # packed or not
    found = {name: data.hashlib.sha256(data._content(tmp_path, name)).hexdigest() for name in FILES}
    monkeypatch.setattr(data, "PUBLISHED", found)
    assert fingerprint() is None


def test_mnist_split(tmp_path):
    write_mnist(tmp_path)
    splits = load("mnist", str(tmp_path), torch.device("cpu"))
    assert [len(s) for s in splits] == [40_000, 10_000, 10_000]
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        data.load("mnist", str(tmp_path), torch.device("cpu"))


@pytest.fixture
def server(monkeypatch):
    """What the network answers, by address; asked: the addresses. Without an answer there is no network."""

    def urlopen(address, timeout=None):
        asked.append(address)
        if answer is None:
            raise urllib.error.URLError("no network")
        return io.BytesIO(answer)

    asked, answer = [], None
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    def answers(content):
        nonlocal answer
        answer = content
        return asked

    return answers


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "download.lock"}


def test_files_count_by_what_they_hold_and_nothing_is_fetched_or_written(server, tmp_path):
    asked = server(b"an answer")
    write_mnist(tmp_path, packed=True)
    raw = tmp_path / "MNIST" / "raw"
    labels = struct.pack(">II", 2049, 10_000) + bytes(range(10)) * 1000
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 9))  # another program's
    (raw / "train-labels-idx1-ubyte.gz").rename(raw / "train-labels-idx1-ubyte")  # packed, and named as if it were not
    before = contents(tmp_path)
    assert load("mnist", str(tmp_path), torch.device("cpu"))[2].labels[:12].tolist() == [*range(10), 0, 1]
    data.download_mnist(str(tmp_path))  # nothing is missing
    assert contents(tmp_path) == before and asked == []


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:8] + b"\x0a" + raw[9:], "has labels up to 10; 0 to 9 are accepted"),
        ("t10k-labels-idx1-ubyte", lambda raw: struct.pack(">II", 2049, 9) + raw[8:], r"numbers \(2049, 9\).*2049, 10000"),
        ("t10k-images-idx3-ubyte", lambda raw: b"<htm" + raw[4:], "begins with the numbers"),
        ("t10k-images-idx3-ubyte", lambda raw: b"\x1f\x8b" + raw[2:], "is broken"),
    ],
)
def test_an_mnist_file_of_something_else_is_named_and_stays(name, change, words, server, tmp_path):
    asked = server(b"an answer")
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(change(path.read_bytes()))
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name}.*{words}.*--download"):
            check_mnist(tmp_path)
        data.download_mnist(str(tmp_path))
    assert path.read_bytes() == before and asked == []


def test_a_download_takes_its_place_when_it_is_right(server, tmp_path, monkeypatch, refused):
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    content = (raw / "t10k-labels-idx1-ubyte").read_bytes()
    (raw / "t10k-labels-idx1-ubyte").unlink()
    before = contents(tmp_path)
    arguments = ["--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out/runs.jsonl"), "--device", "cpu"]
    asked = server(None)
    refused(train.main, [*arguments, "--download"], ["MNIST could not be fetched", "t10k-labels-idx1-ubyte.gz", "no network"])
    assert len(asked) == len(data.MIRRORS)
    for wrong in (b"<html>log in</html>", gzip.compress(content)[:-9], gzip.compress(content[:-1])):
        server(wrong)
        with pytest.raises(OSError, match="t10k-labels-idx1-ubyte.gz: .*something else was sent|is broken"):
            data.download_mnist(str(tmp_path))
        (tmp_path / "out" / "runs.jsonl").unlink(missing_ok=True)
        assert contents(tmp_path) == before
    monkeypatch.setitem(data.PUBLISHED, "t10k-labels-idx1-ubyte", data.hashlib.sha256(content).hexdigest())
    server(gzip.compress(content))
    data.download_mnist(str(tmp_path))
    assert gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes()) == content
    check_mnist(tmp_path)


def test_a_batch_has_no_more_images_than_there_are(tmp_path, refused):
    given = ["--batch-size", "100000", "--device", "cpu", "--out", str(tmp_path / "runs.jsonl")]
    words = ["--batch-size 100000 given, but there are ", " training images; at most as many are accepted"]
    refused(train.main, given, words)
    assert not (tmp_path / "runs.jsonl").exists()
