"""Cross-domain few-shot: the split relation module, heads and backbones, episodes, every method tiny, and bad input."""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evograd
from cross_domain_fewshot import compare, data, evaluate, plot, prepare, pretrain, quality, scale, train
from cross_domain_fewshot.models import (
    HEADS,
    ON_MAPS,
    Encoder,
    FeatureWiseTransformation,
    FewShotModel,
    RelationNet,
    episode_loss,
    episode_targets,
    transformations,
)
from evograd.baselines import unrolled
from evograd.lab import checkpoints
from evograd.lab.costs import counted
from evograd.lab.records import append_run
from tests.test_checkpoints import assert_equal
from tests.test_scripts import shell

ROOT = Path(__file__).resolve().parents[1]


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 7, 7), (4, 12, 12), (3, 2, 2)])
def test_split_relation_module_equals_the_concatenated_one(shape, float64):
    split, joined = RelationNet(shape, 5, split=True), RelationNet(shape, 5, split=False)
    joined.load_state_dict(split.state_dict())
    features = torch.randn(5, 2 + 3, *shape)
    results = []
    for head in (split, joined):
        x = features.clone().requires_grad_()
        scores = head(x, 2)
        results.append([scores, *torch.autograd.grad(episode_loss(scores, "relationnet"), [x, *head.parameters()])])
    assert results[0][0].shape == (15, 5)
    assert results[0][0].std() > 1e-3
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_relation_scores_belong_to_their_pair(float64):
    """BatchNorm couples the pairs, but a permutation of classes and queries permutes the scores."""
    head = RelationNet((4, 7, 7), 3)
    features = torch.randn(3, 1 + 2, 4, 7, 7)
    order = torch.tensor([2, 0, 1])
    scores, permuted = head(features, 1), head(features[order], 1)
    torch.testing.assert_close(permuted.view(3, 2, 3), scores.view(3, 2, 3)[order][:, :, order])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n_shot", [1, 3])
def test_heads_tell_classes_apart_that_features_tell_apart(head, n_shot):
    """After some steps on features of separate classes, new ones are classified; queries come ordered by class.

    The GNN takes long to learn that: for it the classes stay the same, and their noise is new.
    """
    shape = (5, 7, 7) if head in ON_MAPS else (5,)
    torch.manual_seed(0)
    module = HEADS[head](shape, 5)
    always = 3 * torch.randn(5, 1, 5)

    def episode():
        centres = always if head == "gnn" else 3 * torch.randn(5, 1, 5, *[1] * (len(shape) - 1))
        return centres + 0.3 * torch.randn(5, n_shot + 2, *shape)

    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3) if list(module.parameters()) else None
    for _ in range(0 if optimizer is None else 60 if head == "gnn" else 150):
        optimizer.zero_grad()
        episode_loss(module(episode(), n_shot), head).backward()
        optimizer.step()
    scores = [module(episode(), n_shot) for _ in range(20)]
    hits = torch.cat([s.argmax(1) == episode_targets(s) for s in scores]).float().mean()
    assert hits > 0.5  # chance is 0.2


def test_transformation_scales_and_shifts_each_channel_in_training_only():
    module, h = FeatureWiseTransformation(3), torch.randn(4, 3, 5, 5)
    assert module.eval()(h) is h
    module.train()
    torch.manual_seed(1)
    out = module(h)
    torch.manual_seed(1)
    n1, n2 = torch.randn(2, 1, 3, 1, 1)
    torch.testing.assert_close(out, (1 + 0.3 * n1) * h + 0.5 * n2)  # softplus with β = 100 is the identity here


@pytest.mark.parametrize(
    ("backbone", "size", "shape", "n_layers"),
    [
        ("conv4", 84, (64, 21, 21), 4),
        ("conv6", 84, (64, 21, 21), 6),
        ("resnet10", 224, (512, 7, 7), 4 + 3),
        ("resnet18", 64, (512, 2, 2), 8 + 3),
        ("resnet34", 84, (512, 3, 3), 16 + 3),
        ("resnet50", 64, (2048, 2, 2), 16 + 4),
        ("resnet152", 64, (2048, 2, 2), 50 + 4),
    ],
)
def test_backbones(backbone, size, shape, n_layers):
    with torch.device("meta"):
        encoder = Encoder(backbone, size, maps=True)
        assert encoder(torch.empty(2, 3, size, size)).shape == (2, *encoder.shape) == (2, *shape)
        vectors = Encoder(backbone, size, maps=False)
        assert vectors(torch.empty(2, 3, size, size)).shape == (2, *vectors.shape)
    assert len(transformations(encoder)) == n_layers


@pytest.mark.parametrize(("backbone", "head"), [*(("conv4", head) for head in HEADS), ("resnet10", "relationnet")])
def test_mixed_mode_is_exact_for_every_head(backbone, head, float64):
    model = FewShotModel(backbone, head, 3, 32, 4, width=6)
    seen, unseen = torch.randn(2, 3, 1 + 2, 3, 32, 32)
    hyperparameters = [p for module in transformations(model).values() for p in module.parameters()]
    own = {id(p) for p in hyperparameters}
    names = [n for n, p in model.named_parameters() if id(p) not in own and not n.startswith("classifier.")]

    def train_loss(model):
        model.train()
        return episode_loss(model(seen, 1), head)

    def val_loss(model):
        model.eval()
        return episode_loss(model(unseen, 1), head)

    grads = []
    for method, settings in ((unrolled, {}), (evograd.mixed_mode, {"lookahead": "sgd"})):
        torch.manual_seed(3)
        grads.append(method(train_loss, val_loss, model, hyperparameters, parameters=names, inner_lr=1e-2, **settings).grads)
    exact, mixed = (torch.cat([g.flatten() for g in gradient]) for gradient in grads)
    assert exact.norm() > 0
    assert (mixed - exact).norm() < 1e-8 * exact.norm()


# --- data --------------------------------------------------------------------------------------------------------------


def test_no_two_classes_of_glyphs_look_the_same():
    """Cyrillic О is O: it would be trained on while O is tested."""
    assert "О" in data.look_alikes() and "O" not in data.look_alikes()
    pixels = [p.tobytes() for c, p in data.draw_characters("sans", 64) if c not in data.look_alikes()]
    assert len(set(pixels)) == len(pixels) > 500
    novel, base = (data.draw_glyphs("sans", split, 28).labels for split in ("novel", "base"))
    assert ord("O") in novel and ord("О") not in base


def test_glyphs():
    lists = {split: data.draw_glyphs("computer_modern", split, 28) for split in ("base", "val", "novel")}
    assert lists["base"].pixels.shape[1:] == (1, 28, 28)
    assert len(lists["base"].classes) > len(lists["novel"].classes) > 10
    codes = [set(images.labels.tolist()) for images in lists.values()]
    assert not codes[0] & codes[1] and not codes[0] & codes[2] and not codes[1] & codes[2]
    again = data.draw_glyphs.__wrapped__("computer_modern", "val", 28)  # not what is kept
    assert again is not lists["val"] and torch.equal(lists["val"].pixels, again.pixels)
    assert all(lists["val"].pixels.flatten(1).any(1))


def some_images(n_classes=6, n_images=8, size=4):
    labels = np.repeat(10 * np.arange(n_classes), n_images)
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)
    return data.Images("some", "base", labels, [], size, pixels.contiguous())


def test_an_episode_has_different_images_of_different_classes():
    images = some_images()
    index = images.episode(np.random.default_rng(0), 5, 7)
    assert index.shape == (5, 7)
    assert len(np.unique(index)) == 35
    labels = images.labels[index]
    assert (labels == labels[:, :1]).all() and len(np.unique(labels[:, 0])) == 5
    assert torch.equal(images.load(index)[:, :, 0, 0, 0], torch.from_numpy(index).to(torch.uint8))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_steps_depend_on_seed_and_number_alone(n_workers):
    domains = [some_images(), some_images(7), some_images(8)]
    steps = data.TrainingSteps(domains, 3, 2, 5, 6, 4, with_unseen=True)
    without = data.TrainingSteps(domains, 3, 2, 5, 6, 4, with_unseen=False)
    loaded = list(data.stream(steps, range(4), n_workers, pin=False))
    for t, batch in enumerate(loaded):
        assert all(torch.equal(a, b) for a, b in zip(batch, steps[t]))
        assert torch.equal(batch[0], without[t][0]) and without[t][1].numel() == 0
        assert batch[3].max() < 6  # classes are numbered from zero
    assert not torch.equal(loaded[0][0], loaded[1][0])
    other = data.TrainingSteps(domains, 4, 2, 5, 6, 4, with_unseen=True)
    assert not torch.equal(loaded[0][0], other[0][0])
    pairs = [data.domain_pair(3, epoch, 3) for epoch in range(50)]
    assert all(seen != unseen for seen, unseen in pairs) and len(set(pairs)) == 6


def test_augmentation_is_drawn_for_each_image_from_the_generator():
    images = torch.randint(0, 256, (2, 3, 3, 20, 20), dtype=torch.uint8)
    images[1] = images[0]
    first = data.augmented(images, 16, torch.Generator().manual_seed(1))
    assert first.shape == (2, 3, 3, 16, 16)
    assert torch.equal(first, data.augmented(images, 16, torch.Generator().manual_seed(1)))
    assert not torch.equal(first[0], first[1])
    middle = data.centred(images, 16)
    torch.testing.assert_close(middle[0, 0, 0], (images[0, 0, 0, 2:18, 2:18] / 255 - 0.485) / 0.229)


# --- scripts on glyphs -------------------------------------------------------------------------------------------------

TINY = ["--device", "cpu", "--width", "4", "--n-query", "2", "--epochs", "2", "--episodes", "2", "--test-episodes", "4"]
TINY += ["--auxiliary-batch", "4", "--seen", "computer_modern", "stix", "--held-out", "serif"]


def run(tmp_path, method, *extra):
    out = tmp_path / "runs.jsonl"
    train.main(["--method", method, *TINY, "--out", str(out), *extra])
    return json.loads(out.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {"trajectory": ["--horizon", "4"]}
    return folder, {method: run(folder, method, *flags.get(method, [])) for method in train.METHODS}


def file_of(folder, method):
    (file,) = (folder / "checkpoints").glob(f"glyphs-serif-conv4-relationnet-1shot-{method}-seed1-*.pt")
    return str(file)


def test_every_method_runs_and_leaves_a_record(trained):
    for method, record in trained[1].items():
        assert record["experiment"] == "cross_domain_fewshot"
        assert record["config"]["method"] == method
        assert 0 < record["metrics"]["accuracy"] <= 100
        assert not any("/" in str(value) for value in record["config"].values())
        if method in ("none", "fixed"):
            assert "gamma" not in record["metrics"]
        else:
            assert len(record["metrics"]["gamma"]) == 2 and len(record["metrics"]["gamma"][0]) == 4
            assert record["metrics"]["gamma"][1] != record["metrics"]["gamma"][0]


def test_checkpoints_hold_what_is_needed_to_go_on(trained):
    folder, _ = trained
    for method in train.METHODS:
        state = checkpoints.load(file_of(folder, method))
        assert {"config", "step", "model", "optimizer", "history", "draws", "random"} <= set(state)
        assert ("transform_optimizer" in state) == (method not in ("none", "fixed"))
        gammas = [p for name, p in state["model"].items() if name.endswith(".gamma")]
        moved = any((p - 0.3).abs().max() > 1e-4 for p in gammas)
        assert (len(gammas), moved) == (0 if method == "none" else 4, method not in ("none", "fixed"))


def test_checkpoints_are_scored_on_the_same_episodes(trained, capsys, tmp_path):
    folder, records = trained
    files = [file_of(folder, method) for method in ("fixed", "evograd")]
    out = tmp_path / "tests.jsonl"
    evaluate.main([*files, "--domain", "serif", "--episodes", "4", "--device", "cpu", "--out", str(out)])
    lines = [json.loads(line)["metrics"] for line in out.read_text().splitlines()]
    for line, method in zip(lines, ("fixed", "evograd")):
        assert line["accuracy"] == pytest.approx(records[method]["metrics"]["accuracy"])
    assert lines[1]["difference"] == pytest.approx(lines[1]["accuracy"] - lines[0]["accuracy"], abs=1e-4)
    assert "to the first" in capsys.readouterr().out


def test_same_seed_same_run(tmp_path):
    assert run(tmp_path, "evograd")["metrics"] == run(tmp_path, "evograd")["metrics"]
    other = run(tmp_path, "evograd", "--common-random-numbers")["metrics"]
    assert other != run(tmp_path, "evograd")["metrics"]


def test_hypergradients_see_the_draws_of_the_update(tmp_path):
    """Guided candidates, mixed mode and T1-T2 take the training loss with the noise of the model's own update."""
    around = {m.name: m.around for m in train.METHODS.values() if m.around}
    assert list(around) == ["evograd_guided", "mixed_mode", "second_order", "second_order_functional", "finite_difference"]
    for method in around:
        args = train.parse_args(["--method", method, *TINY, "--out", str(tmp_path / "runs.jsonl")])
        trainer = train.Trainer(args, 4)
        losses = []
        estimator = trainer.meta.estimator

        def spy(train_loss, *rest, parameters, **settings):
            losses.append(torch.func.functional_call(Call(trainer.model, train_loss), prefixed(parameters), ()).item())
            torch.manual_seed(0)
            assert (set(settings) - {"kinks"} == {"lookahead"}) == (around[method] == "step")
            return estimator(train_loss, *rest, parameters=parameters, **settings)

        trainer.meta.estimator = spy
        seen, unseen = torch.randn(2, 5, 3, 3, 28, 28)
        loss = trainer.step((seen, unseen, torch.randn(4, 3, 28, 28), torch.arange(4)), 1.0)
        assert loss.item() == pytest.approx(losses[0], rel=1e-5)


class Call(torch.nn.Module):
    def __init__(self, model, closure):
        super().__init__()
        self.model, self.closure = model, closure

    def forward(self):
        return self.closure(self.model)


def prefixed(parameters):
    return {f"model.{name}": p for name, p in parameters.items()}


def test_encoder_is_handed_over(tmp_path, capsys):
    file = tmp_path / "encoder.pt"
    common = ["--domain", "computer_modern", "--width", "4", "--epochs", "1", "--device", "cpu", "--batch-size", "64"]
    pretrain.main([*common, "--out", str(file)])
    weights = checkpoints.load(file)["encoder"]
    for method in ("none", "evograd"):
        args = train.parse_args(["--method", method, *TINY, "--encoder", str(file), "--out", str(tmp_path / "runs.jsonl")])
        model = train.Trainer(args, 4).model
        train.load_encoder(model, args)
        convolutions = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
        assert all(torch.equal(m.weight, w) for m, w in zip(convolutions, (w for w in weights.values() if w.ndim == 4)))
    first = run(tmp_path, "none", "--encoder", str(file), "--skip-done")["config"]
    assert first["pretrained"] is True
    state = checkpoints.load(file)
    checkpoints.save(file, {**state, "step": 1})  # another file, of the same weights
    assert run(tmp_path, "none", "--encoder", str(file), "--skip-done")["config"] == first
    assert "nothing to do" in capsys.readouterr().out
    state["encoder"][next(iter(state["encoder"]))] += 1e-3
    checkpoints.save(file, state)
    other = run(tmp_path, "none", "--encoder", str(file), "--skip-done")["config"]
    assert other.pop("encoder_fingerprint") != first.pop("encoder_fingerprint") and other == first
    words = {
        "conv6": "is of --backbone conv4; this run has --backbone conv6",
        "resnet10": "--width 4 given, but --backbone resnet10 has its own; Conv-4 and Conv-6 take it",
    }
    for backbone, word in words.items():
        with pytest.raises(SystemExit):
            run(tmp_path, "none", "--backbone", backbone, "--image-size", "32", "--encoder", str(file))
        assert word in capsys.readouterr().err


def test_an_encoder_that_is_stopped_and_resumed_is_the_same(tmp_path, monkeypatch, capsys):
    common = ["--domain", "computer_modern", "--width", "4", "--epochs", "2", "--device", "cpu", "--batch-size", "64"]
    pretrain.main([*common, "--out", str(tmp_path / "whole.pt")])
    n_steps, stopped = checkpoints.load(tmp_path / "whole.pt")["step"], tmp_path / "stopped.pt"
    step, count = torch.optim.Adam.step, [0]

    def killed(optimizer):
        count[0] += 1
        if count[0] == n_steps // 2 + 2:
            raise KeyboardInterrupt
        return step(optimizer)

    again = [*common, "--out", str(stopped), "--resume", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(again)
    assert not stopped.exists() and (tmp_path / "stopped.pt.part").is_file()
    pretrain.main(again)
    assert f"going on after step {(n_steps // 2 + 1) // 2 * 2}, from" in capsys.readouterr().out
    assert_equal(checkpoints.load(stopped), checkpoints.load(tmp_path / "whole.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.pt", "whole.pt"]
    pretrain.main(again)
    assert "stopped.pt is this encoder: nothing to do" in capsys.readouterr().out


@pytest.mark.usefixtures("fewer_estimates")
def test_quality_is_logged(trained, tmp_path):
    plain, logged = trained[1]["mixed_mode"], run(tmp_path, "mixed_mode", "--log-quality", "3")
    assert logged["metrics"]["accuracy"] == plain["metrics"]["accuracy"] and logged["config"] == plain["config"]
    assert logged["metrics"]["cosine"]["mixed_sgd"] > 0.999
    assert logged["metrics"]["cosine"]["guided_made"] > logged["metrics"]["cosine"]["evograd_k2"]


def test_quality(trained, tmp_path, capsys):
    folder, _ = trained
    out = tmp_path / "quality.jsonl"
    quality.main([file_of(folder, "evograd_guided"), "--steps", "2", "--device", "cpu", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["experiment"] for record in records} == {"cross_domain_fewshot_quality"}
    metrics = {record["config"]["estimator"]: record["metrics"] for record in records}
    assert metrics["mixed_sgd"]["cosine"] > 0.999
    assert metrics["mixed_sgd"]["cosine_beta"] > 0.999
    assert set(metrics) >= {f"evograd_k{k}{kind}" for k in (2, 10, 50) for kind in ("", "_common")}
    assert abs(metrics["evograd_k2"]["cosine"]) < 0.9


def test_figures(trained):
    folder, _ = trained
    plot.main([str(folder / "runs.jsonl"), "--out-dir", str(folder)])
    for name in ("accuracy", "transformations"):
        assert (folder / f"cross_domain_fewshot_{name}_glyphs_conv4_relationnet.png").read_bytes().startswith(b"\x89PNG")


def test_the_paper_size_keeps_the_promises():
    """Counted on tensors without values, so nothing of that size is computed."""
    made = {method: partial(compare.make_step, method, "resnet10", 224, torch.device("cpu")) for method in ("fixed", "evograd")}
    cost = {method: counted(make) for method, make in made.items()}
    assert cost["evograd"].peak_bytes <= 1.03 * cost["fixed"].peak_bytes
    assert cost["evograd"].flops <= 2450e9
    assert cost["fixed"].flops <= 0.62 * 1223e9


def test_simulated_peaks_are_those_of_real_tensors(monkeypatch, capsys):
    """A step small enough to be run; ResNet-18 and ResNet-34: python -m cross_domain_fewshot.scale --check."""
    monkeypatch.delitem(scale.METHODS, "evograd_guided")
    (peaks,) = scale.check(["conv4"], 16, torch.device("cpu")).values()
    assert list(peaks) == ["plain", "evograd", "mixed_mode", "second_order"]
    for method, peak in peaks.items():
        assert peak["simulated"] == pytest.approx(peak["measured"], rel=0.01), method
    assert peaks["second_order"]["measured"] > 1.5 * peaks["plain"]["measured"]
    assert "second_order     simulated" in capsys.readouterr().out


def test_scale(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(scale, "METHODS", {"evograd": "evograd"})
    monkeypatch.setattr(scale, "RESNETS", {"conv4": None})
    monkeypatch.setattr(scale, "BACKBONE", "conv4")
    out = tmp_path / "scale.jsonl"
    scale.main(["--device", "cpu", "--image-size", "32", "--n-candidates", "2", "4", "--out", str(out)])
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["experiment"] == "cross_domain_fewshot_scale"
    assert record["config"]["backbones"] == ["conv4"]
    metrics = record["metrics"]
    stream, retain = metrics["candidates"]["stream"], metrics["candidates"]["retain"]
    assert stream["2"] == metrics["backbones"]["conv4"]["evograd"]["peak_bytes"]
    assert stream["4"] <= 1.02 * stream["2"]
    assert retain["4"] > 1.5 * stream["4"]
    assert metrics["deepest"]["evograd"]["12"] == "conv4"
    assert "fits into 12" in capsys.readouterr().out
    refused(scale.main, ["--check", "--n-candidates", "2"], "--check does not read it")


def made_up_peaks():
    backbones = {"resnet18": (3, 9), "resnet50": (13, 40), "resnet152": (25, 90)}
    return {
        name: {"plain": {"peak_bytes": small * 1e9}, "second_order": {"peak_bytes": large * 1e9}}
        for name, (small, large) in backbones.items()
    }


def test_deepest_backbone_that_fits(monkeypatch):
    monkeypatch.setattr(scale, "METHODS", {"plain": compare.PLAIN, "second_order": "second_order"})
    assert scale.deepest(made_up_peaks()) == {
        "plain": {12: "resnet18", 24: "resnet50", 80: "resnet152"},
        "second_order": {12: "resnet18", 24: "resnet18", 80: "resnet50"},
    }
    assert scale.deepest({"resnet50": made_up_peaks()["resnet50"]})["plain"][12] == "none"


def test_figures_of_scale(tmp_path):
    peaks = {name: dict.fromkeys(plot.SCALE, costs["plain"]) for name, costs in made_up_peaks().items()}
    candidates = {strategy: {"2": 1e9, "4": 2e9} for strategy in scale.STRATEGIES}
    deepest = {"plain": {"12": "resnet18", "24": "resnet50", "80": "resnet152"}}
    metrics = {"backbones": peaks, "candidates": candidates, "deepest": deepest}
    config = {"image_size": 224, "backbone_of_candidates": "resnet18"}
    append_run(tmp_path / "scale.jsonl", "cross_domain_fewshot_scale", config, metrics, {}, "cpu")
    plot.main([str(tmp_path / "scale.jsonl"), "--out-dir", str(tmp_path)])
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == [
        "cross_domain_fewshot_scale_candidates",
        "cross_domain_fewshot_scale_depth",
    ]


# --- bad input ---------------------------------------------------------------------------------------------------------


def write_domain(root, domain, n_classes=8, n_images=4):
    rng = np.random.default_rng(0)
    for c in range(n_classes):
        folder = root / "images" / domain / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(n_images):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    prepare.main(["folders", str(root / "images" / domain), "--domain", domain, "--out", str(root / "lists")])


FILES = ["--data", "filelists", "--backbone", "conv4", "--image-size", "16", "--width", "4", "--n-way", "2", "--n-query", "2"]
FILES += ["--epochs", "1", "--episodes", "2", "--test-episodes", "3", "--device", "cpu", "--auxiliary-batch", "2"]


@pytest.fixture
def lists(tmp_path, capsys):
    for domain in ("a", "b", "c"):
        write_domain(tmp_path, domain)
    capsys.readouterr()
    return tmp_path


def train_on_files(root, *extra):
    arguments = [*FILES, "--data-dir", str(root / "lists"), "--out", str(root / "runs.jsonl")]
    train.main([*arguments, "--seen", "a", "b", "--held-out", "c", *extra])


def test_file_lists(lists):
    content = {split: json.loads((lists / "lists" / "a" / f"{split}.json").read_text()) for split in prepare.SPLITS}
    assert [len(set(content[split]["image_labels"])) for split in prepare.SPLITS] == [4, 2, 2]
    assert all(c["label_names"] == [f"class{i}" for i in range(8)] for c in content.values())
    train_on_files(lists, "--method", "evograd")
    in_memory = json.loads((lists / "runs.jsonl").read_text().splitlines()[-1])
    train_on_files(lists, "--method", "evograd", "--cache-gb", "0", "--workers", "1")
    by_workers = json.loads((lists / "runs.jsonl").read_text().splitlines()[-1])
    assert in_memory["metrics"] == by_workers["metrics"] and in_memory["config"] == by_workers["config"]


def half_white(mode):
    """The left half is black, the right one is white."""
    image = Image.new(mode, (40, 20), {"CMYK": (0, 0, 0, 255), "RGBA": (0, 0, 0, 255), "LA": (0, 255)}.get(mode, 0))
    white = {"RGB": (255,) * 3, "CMYK": (0,) * 4, "RGBA": (255,) * 4, "LA": (255, 255)}.get(mode, 255)
    image.paste(white, (20, 0, 40, 20))
    return image


@pytest.mark.parametrize("kind", ["L", "RGB", "CMYK", "P", "P with transparency", "LA", "RGBA", "16", "1", "turned"])
def test_images_of_every_kind_look_as_they_are(kind, tmp_path):
    path = tmp_path / ("image.jpg" if kind in ("CMYK", "turned") else "image.png")
    if kind == "16":
        pixels = np.zeros((20, 40), np.uint16)
        pixels[:, 20:], pixels[:, 10:20] = 65535, 0x3F00  # dark grey
        Image.fromarray(pixels).save(path)
    elif kind.startswith("P"):
        half_white("RGB").convert("P").save(path, **({"transparency": bytes([255, 128])} if "with" in kind else {}))
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned by 90 degrees
        half_white("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        half_white(kind).save(path)
    left, right = data.decode(str(path), 20).float().mean((0, 1)).split(10)
    assert left.mean() < (70 if kind == "16" else 10) and right.mean() > 245
    assert kind != "16" or left.mean() > 50


def transparent(kind, under):
    """A square that is black on the left and to be seen through on the right, where its file says `under`; and a half between."""
    alpha = Image.new("L", (40, 40), 255)
    alpha.paste(0, (20, 0, 40, 40))
    square = Image.new("L", (40, 40), 0)
    square.paste(under, (20, 0, 40, 40))
    if kind in ("RGBA", "LA"):
        alpha.paste(128, (0, 20, 20, 40))
        square = square.convert(kind[:-1])
        square.putalpha(alpha)
        return square, {}
    if kind == "P":
        return square.convert("RGB").quantize(2), {}
    return square.convert(kind), {"transparency": (under,) * 3 if kind == "RGB" else under}


@pytest.mark.parametrize("under", [30, 255])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_is_white_whatever_lies_under_it(kind, under, tmp_path):
    path = tmp_path / "image.png"
    image, settings = transparent("L" if kind == "I;16" else kind, under)
    if kind == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256)
        settings = {"transparency": under * 256}
    if kind == "P":
        clear = image.getpixel((30, 0))
        settings = {"transparency": bytes(0 if i == clear else 255 for i in range(2))}
    image.save(path, **settings)
    seen = np.asarray(data.open_image(path))
    assert (seen[:, 20:] == 255).all() and (seen[:20, :20] == 0).all()
    assert abs(int(seen[30, 10, 0]) - (127 if kind in ("RGBA", "LA") else 0)) <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_large_jpeg_files_are_decoded_at_a_part_of_their_size(turned, tmp_path):
    random = np.random.default_rng(0)
    rough = Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).resize((600, 400), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    path = tmp_path / "image.jpg"
    rough.save(path, quality=90, exif=exif)
    turn = lambda size: size[::-1] if turned else size
    assert data.open_image(path).size == turn((600, 400))
    assert data.open_image(path, 401).size == data.open_image(path, 201).size == turn((600, 400))  # the shorter side counts
    assert data.open_image(path, 200).size == turn((300, 200))
    assert data.open_image(path, 50).size == turn((75, 50))
    small = data.decode(path, 25).float()
    whole = data.open_image(path).resize(turn((38, 25)), Image.Resampling.BILINEAR).crop(turn((6, 0)) + turn((31, 25)))
    assert (small - torch.from_numpy(np.array(whole)).permute(2, 0, 1)).square().mean().sqrt() < 4
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="truncated"):
        data.open_image(path, 50)


def test_how_many_processes_load_images(monkeypatch):
    lists, decoded = [data.Images("a", "base", np.zeros(10), ["file"] * 10, 10)], []  # 3 KB
    monkeypatch.setattr(data.Images, "cache", lambda images: decoded.append(images))
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    n = lambda device, cache_gb, workers=None: data.prepare_loading(lists, cache_gb, workers, device)
    assert (n(cpu, 0), n(cuda, 0), n(cuda, 0, 3), n(cpu, 0, 0)) == (12, 12, 3, 0) and not decoded
    assert (n(cpu, 1), n(cuda, 1), n(cuda, 1, 0)) == (0, 4, 0) and decoded == lists * 3
    assert data.prepare_loading([data.draw_glyphs("sans", "val", 12)], 1, None, cuda) == 0  # small, and there
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert n(cpu, 0) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert n(cpu, 0) == 1


def test_what_systems_leave_among_images_is_no_class(tmp_path, capsys):
    root = tmp_path / "set"
    for name in ("a", "b", ".hidden", "__MACOSX"):
        (root / name).mkdir(parents=True)
        half_white("L").save(root / name / "1.png")
        (root / name / "._1.png").write_bytes(b"\0\5\x16\7")
        (root / name / "Thumbs.db").write_bytes(b"x")
        (root / name / "folder.png").mkdir()
    found = prepare.class_folders(root)
    assert {name: [f.name for f in files] for name, files in found.items()} == {"a": ["1.png"], "b": ["1.png"]}


def test_broken_images_are_named_all_of_them_before_the_run(lists, refused):
    folder = lists / "images" / "a"
    noise = np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "class0" / "4.jpg")
    whole = (folder / "class0" / "4.jpg").read_bytes()
    (folder / "class0" / "4.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "class1" / "0.png").write_bytes(b"")
    (folder / "class2" / "1.png").write_bytes(b"<html>")
    arguments = ["folders", str(folder), "--domain", "new", "--out", str(lists / "lists")]
    text = refused(prepare.main, arguments, ["3 of 33 images cannot be used", "class0/4.jpg cannot be read", "truncated"])
    assert "class1/0.png is empty" in text and "class2/1.png is no image" in text
    assert not (lists / "lists" / "new").exists()
    train = lambda extra: train_on_files(lists, *extra)
    assert "a/base.json: 1 of 16 images" not in refused(train, [], ["a/base: 1 of 16 images", "class2/1.png is no image"])
    (folder / "class2" / "1.png").write_bytes(b"")
    refused(train, [], ["a/base.json: 1 of 16 images are empty files", "class2/1.png"])


def test_a_run_is_one_of_its_images(lists, capsys):
    """Another folder with domains of the same names is other data; the same images in another place are not."""
    train_on_files(lists, "--method", "fixed")
    train_on_files(lists, "--method", "fixed", "--skip-done")
    assert "nothing to do" in capsys.readouterr().out
    (lists / "images").rename(lists / "moved")
    for domain in "abc":
        prepare.main(["folders", str(lists / "moved" / domain), "--domain", domain, "--out", str(lists / "lists")])
    train_on_files(lists, "--method", "fixed", "--skip-done")
    assert "nothing to do" in capsys.readouterr().out
    changed = lists / "moved" / "c" / "class3" / "0.png"  # of the list that is tested on
    Image.open(changed).rotate(180).save(changed)
    train_on_files(lists, "--method", "fixed", "--skip-done")
    assert "nothing to do" not in capsys.readouterr().out
    records = [json.loads(line)["config"]["fingerprint"] for line in (lists / "runs.jsonl").read_text().splitlines()]
    assert len(set(records)) == len(records) == 2


def test_images_and_augmentations_go_on_where_a_stopped_run_was(lists, monkeypatch):
    """Glyphs are not augmented; of how runs are stopped and resumed, tests/test_checkpoints.py has the rest."""
    settings = ["--method", "fixed", "--episodes", "5", "--cache-gb", "0", "--workers", "1"]
    train_on_files(lists, *settings)
    step, done = train.Trainer.step, []

    def stop(trainer, *batch):
        if len(done) == 3:
            raise InterruptedError
        done.append(step(trainer, *batch))
        return done[-1]

    resumable = [*settings, "--out", str(lists / "stopped" / "runs.jsonl"), "--checkpoint-every", "2", "--resume"]
    monkeypatch.setattr(train.Trainer, "step", stop)
    with pytest.raises(InterruptedError):
        train_on_files(lists, *resumable)
    monkeypatch.undo()
    train_on_files(lists, *resumable)
    whole, stopped = (json.loads((lists / name).read_text())["metrics"] for name in ("runs.jsonl", "stopped/runs.jsonl"))
    assert whole == stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_too(number, lists, monkeypatch, capsys):
    """As a terminal and a scheduler send it: to all processes of a run."""
    step, done = train.Trainer.step, []

    def signalled(trainer, *batch):
        done.append(step(trainer, *batch))
        if len(done) == 2:
            workers = multiprocessing.active_children()
            assert workers
            pids = [str(worker.pid) for worker in workers] + [str(os.getpid())]
            subprocess.run(["kill", f"-{int(number)}", *pids], check=True)
            time.sleep(0.2)
        return done[-1]

    monkeypatch.setattr(train.Trainer, "step", signalled)
    with pytest.raises(SystemExit) as ended:
        train_on_files(lists, "--episodes", "30", "--cache-gb", "0", "--workers", "2")
    assert ended.value.code == 128 + number
    assert f"stopped by {number.name} after step 2 of 30" in capsys.readouterr().err
    (file,) = (lists / "checkpoints").iterdir()
    assert checkpoints.load(file)["step"] == 2


def test_bad_file_lists(lists, refused):
    def message(*extra):
        return refused(lambda extra: train_on_files(lists, *extra), extra)

    assert "domain 'cub' is not there" in (text := message("--held-out", "cub")) and "a, b, c" in text
    few = ("--n-query", "13")
    assert "an episode needs 14 of each class (--n-shot 1 and --n-query 13)" in (text := message(*few)) and "has 4 images" in text
    assert f"in {lists / 'images' / 'a'}" in text
    assert text == message(*few, "--check")
    many = message("--n-way", "5")
    assert "a/base has 4 classes; an episode needs 5 (--n-way); --n-way 4 takes them; prepare folders … --split gives" in many
    train_on_files(lists, "--check")
    assert not (lists / "runs.jsonl").exists()  # by failed runs neither
    assert "Under --data-dir none: no domain. Name another folder" in message("--data-dir", "none")
    for i in range(4):
        (lists / "images" / "b" / "class2" / f"{i}.png").unlink()
    text = message()
    assert "4 of 16 images are missing" in text and "class2/0.png" in text and "class2/2.png" in text
    assert "class2/3.png" not in text
    (lists / "lists" / "a" / "base.json").write_text("{")
    assert "base.json is no file list" in message()


def test_bad_checkpoints(trained, tmp_path, refused):
    folder, _ = trained
    good = file_of(folder, "evograd")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(Path(good).read_bytes()[:1000])
    for arguments, words in (
        ([good, "--head", "gnn"], "is of --head relationnet; --head gnn was asked for"),
        ([good, "--backbone", "resnet18"], "is of --backbone conv4; --backbone resnet18 was asked for"),
        ([str(broken)], "broken.pt is no checkpoint, or not whole"),
        ([str(tmp_path / "none.pt")], "no checkpoint"),
        ([good, "--n-query", "40"], "an episode needs 41 of each class"),
    ):
        refused(evaluate.main, [*arguments, "--domain", "serif", "--device", "cpu"], words)


def image_folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        half_white("L").save(root / name / "1.png")
    return ["folders", str(root), "--domain", "mine", "--out", str(root.parent / "lists")]


def listed(root):
    contents = [json.loads((root / "lists" / "mine" / f"{split}.json").read_text()) for split in prepare.SPLITS]
    return [[content["label_names"][i] for i in content["image_labels"]] for content in contents]


def test_folders_that_are_split_already_stay_so(tmp_path, capsys, refused):
    names = ["train/a", "train/b", "Validation/a", "test/c", "test/a", ".x/y", "__MACOSX/z"]
    arguments = image_folders(tmp_path / "set", names)
    prepare.main(arguments)
    assert listed(tmp_path) == [["a", "b"], ["a"], ["a", "c"]]
    refused(prepare.main, [*arguments, "--split", "1", "1", "1"], ["--split given", "split already: train, Validation, test"])


def test_numbers_of_classes_of_each_split(tmp_path, capsys, refused):
    arguments = image_folders(tmp_path / "set", "abcdefghij")
    prepare.main(arguments)
    assert "fewer classes than an episode of --n-way 5 needs: val 3, novel 2" in capsys.readouterr().out
    prepare.main([*arguments, "--split", "4", "1", "5"])
    assert "fewer classes than an episode of --n-way 5 needs: base 4, val 1." in capsys.readouterr().out
    base, val, novel = listed(tmp_path)
    assert (len(base), len(val), len(novel)) == (4, 1, 5) and sorted(base + val + novel) == list("abcdefghij")
    assert min(base) < max(novel) and min(novel) < max(base)  # spread over the classes in order
    refused(prepare.main, [*arguments, "--split", "4", "1", "6"], ["--split 4 1 6 given", "10 together"])
    refused(prepare.main, ["cub", str(tmp_path / "set"), "--split", "1", "1", "1"], ["--split given, but cub has its own"])


def test_prepare_counts(tmp_path, refused):
    write_domain(tmp_path, "few")
    for kind, words in (("cub", "images is not there"), ("plantae", "gives 8 classes for plantae; 200 are needed")):
        refused(prepare.main, [kind, str(tmp_path / "images" / "few"), "--out", str(tmp_path)], words)


def test_print_gives_one_command_a_line():
    arguments = ("--print", "--data", "filelists", "--data-dir", "a folder")
    done = shell("cross_domain_fewshot/run.sh", *arguments, BACKBONES="resnet10", SEEDS="1 2")
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 4 + 1 + 4 * 2 * 6 * 2  # looks at the lists, the encoder, the runs
    assert "cross_domain_fewshot.pretrain" in lines[4] and "--domain miniImagenet" in lines[4]
    assert all("--data-dir a\\ folder" in line for line in lines)
    args = train.parse_args(lines[-1].replace("a\\ folder", "folder").split("train ")[1].split())
    assert isinstance(args, argparse.Namespace) and args.seen == ["miniImagenet", "cub", "cars", "places"]
