"""Every script on a pretended CUDA device, see `pretended_cuda`: nothing is mixed, and the host waits where it must, no more.

A meta-step reads from the device once, in `check_finite`. Around the steps every place that waits stands in OUTSIDE, with how
often a run may come there; whatever is more is named with file and line.

What a pretence cannot show, and a first run on a GPU has to: operations that have no CUDA kernel, or no forward-mode or second
derivative there, and kernels that differ from the CPU's (cuDNN's, channels last, fused attention, fused optimizers, bfloat16);
TF32; torch.compile and CUDA graphs; NCCL and several devices; what the allocator holds, streams, and how long anything takes.
"""

import functools
import json
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cross_domain_fewshot.train as fewshot
import evograd
import label_noise_mwn.compare as label_noise_compare
import label_noise_mwn.train as label_noise
import metaxl.compare as crosslingual_compare
import metaxl.train as crosslingual
import rotation.compare as rotation_compare
import rotation.train as rotation
from cross_domain_fewshot import data as fewshot_data
from cross_domain_fewshot import evaluate, models, pretrain, quality
from evograd import baselines
from evograd.lab.checkpoints import Keeper
from label_noise_mwn.data import Split
from tests.pretended_cuda import pretended_cuda
from tests.test_cross_domain_fewshot import FILES, write_domain

pytestmark = pytest.mark.filterwarnings("ignore:(train_loss of step|the curvature of pairs|the direction has grown)")  # from scratch
CUDA = torch.device("cuda")
SMALL = {  # of each script: two or three steps, two batches of what is tested on
    rotation: "--epochs 1 --batch-size 8",
    label_noise: "--epochs 1 --train-images 24 --batch-size 8",
    fewshot: "--epochs 1 --episodes 2 --test-episodes 3 --width 4 --image-size 16 --n-query 1 --auxiliary-batch 4 "
    "--seen computer_modern stix --held-out serif",
    crosslingual: "--epochs 1 --source-size 12 --target-size 12 --batch-size 6 --dev-size 40 --test-size 40",
}
NAMES = ["rotation", "label_noise", "fewshot", "crosslingual"]
METHODS = {f"{name}-{method}": (script, method) for name, script in zip(NAMES, SMALL) for method in script.METHODS}

IN_A_STEP = {"evograd/host/result.py check_finite": 1}
WITH_PAIRS = {**IN_A_STEP, "evograd/products.py _by_pairs": 3}  # and where one shows the radius, twice again at most
WITH_QUALITY = {name: 1000 for name in ("evograd/host/result.py check_finite", "evograd/lab/quality.py add")}
OUTSIDE = {
    # losses as they are shown; before each checkpoint and after the last step; the training loss, for the record
    "evograd/lab/checkpoints.py mean": 2,
    "evograd/lab/checkpoints.py _look_for_nan": 5,
    "evograd/lab/records.py plain": 1,
    # the angle, at every 50th step and the last; the accuracies of rotated and of upright images; the labels
    "rotation/train.py run": 4,
    "rotation/train.py accuracy": 2,
    # the curve's grid goes to the device, the mean weight comes; accuracies of val and test, the losses of training images
    "label_noise_mwn/train.py evaluated": 2,
    "label_noise_mwn/train.py losses_and_accuracy": 3,
    "label_noise_mwn/train.py describe_weights": 2,
    "label_noise_mwn/train.py describe": 2,
    "label_noise_mwn/train.py finish": 1,
    # mean and deviation of images, once a process; γ and β of the epoch; accuracies
    "cross_domain_fewshot/data.py _mean_and_std": 2,
    "cross_domain_fewshot/train.py run": 2,
    "cross_domain_fewshot/testing.py score": 1,
    # tags of dev and of test sentences; the best parameters, kept on the host; gates by language; how far λ has moved
    "metaxl/train.py predict": 2,
    "metaxl/train.py evaluated": 50,
    "metaxl/train.py tested": 100,
    "metaxl/train.py gates": 2,
    "metaxl/train.py describe": 2,
}


def check(events, allowed):
    found, more = Counter(), []
    for event in events:
        found[event.function] += 1
        if found[event.function] > allowed.get(event.function, 0):
            more.append(str(event))
    assert not more, "the host waits for the device:\n" + "\n".join(more)


@pytest.fixture(scope="module", autouse=True)
def _drawn_once():
    with mock.patch.object(fewshot_data, "draw_glyphs", functools.lru_cache(fewshot_data.draw_glyphs)):
        yield


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    load = rotation.load

    def short(*arguments):
        return [type(split)(split.images[:n], split.labels[:n]) for split, n in zip(load(*arguments), (24, 16, 40))]

    monkeypatch.setattr(rotation, "load", short)


@pytest.fixture
def run(tmp_path, capsys):
    """run(script, method, *flags): the record of a run on the pretended device, in which the host waits where it may alone.

    in_a_step: where it may wait in a step.  stop: after so many steps, without a record.  cost: a step's cost is measured too.
    """

    def watched(script, method, *flags, in_a_step=IN_A_STEP, stop=None, cost=False):
        steps = []
        step, all_steps, record = script.Trainer.step, Keeper.steps, Keeper.record

        def step_alone(trainer, *args):
            if len(steps) == stop:
                raise KeyboardInterrupt
            before = len(cuda.events)
            result = step(trainer, *args)
            steps.append(cuda.events[before:])
            del cuda.events[before:]
            return result

        def from_the_first_step_on(keeper, *args, **settings):
            cuda.events.clear()
            yield from all_steps(keeper, *args, **settings)

        with (
            mock.patch.object(script.Trainer, "step", step_alone),
            mock.patch.object(Keeper, "steps", from_the_first_step_on),
            mock.patch.object(Keeper, "record", record if cost else lambda keeper, *given: record(keeper, *given[:2])),
            pretended_cuda() as cuda,
        ):
            out = tmp_path / "runs.jsonl"
            small = SMALL[script].replace("--width 4 ", "" if any("resnet" in flag for flag in flags) else "--width 4 ")
            arguments = ["--method", method, *small.split(), "--device", "cuda", "--out", str(out), *flags]
            if stop is not None:
                with pytest.raises(KeyboardInterrupt):
                    script.main(arguments)
                return None
            script.main(arguments)
        assert steps
        learns = script.METHODS[method].estimator is not None
        for events in steps:
            check(events, in_a_step)
            assert any(e.function == "evograd/host/result.py check_finite" for e in events) == learns
        check(cuda.events, OUTSIDE)
        return json.loads(out.read_text().splitlines()[-1])

    return watched


# --- the scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "method"), METHODS.values(), ids=METHODS)
def test_every_method_of_every_script(script, method, run):
    flags = ["--inner-steps", "2"] if method in ("neumann", "conjugate_gradient") else []
    flags += ["--horizon", "1"] if method == "trajectory" else []
    record = run(script, method, *flags, in_a_step=WITH_PAIRS if method == "trajectory" else IN_A_STEP)
    assert record["config"]["device"] == "cuda" if script is not fewshot else "device" not in record["config"]
    assert record["environment"]["device"] == "pretended"


@pytest.mark.parametrize("head", models.HEADS)
def test_every_head(head, run):
    run(fewshot, "evograd_guided", "--head", head)


@pytest.mark.parametrize("backbone", [b for b in models.BACKBONES if b != "conv4"])
def test_every_backbone(backbone, run, monkeypatch):
    one_block = dict.fromkeys(models.RESNETS, (1, 1, 1, 1))  # all blocks of a stage are alike
    monkeypatch.setattr(models, "RESNETS", one_block)
    monkeypatch.setattr(Keeper, "_save", lambda *_: None)  # large
    head = "relationnet" if backbone in ("conv6", "resnet10") else "protonet"
    run(fewshot, "evograd_guided", "--backbone", backbone, "--head", head)


@pytest.mark.usefixtures("fewer_estimates")
@pytest.mark.parametrize(
    ("script", "method", "flags"),
    [
        (rotation, "evograd_guided", ""),
        (label_noise, "evograd_guided", "--amp --channels-last --flip"),
        (fewshot, "evograd_guided", "--amp"),
        (crosslingual, "evograd", "--amp --accumulate 2 --rtn-layers 1 2 --perturb all"),
    ],
    ids=NAMES,
)
def test_quality_logging_mixed_precision_and_cost(script, method, flags, run):
    flags = [*flags.split(), "--log-quality", "100"]
    record = run(script, method, *flags, in_a_step=WITH_QUALITY, cost=script is not crosslingual)
    assert record["metrics"]["cosine"]["mixed_sgd"] > 0.99
    assert record["cost"]["seconds"] > 0


@pytest.mark.parametrize("method", ["evograd", "mixed_mode"])
@pytest.mark.parametrize("padded", [False, True])
def test_padded_and_unpadded_sentences(method, padded, run, monkeypatch):
    seen, split = [], crosslingual.cross_entropy
    monkeypatch.setattr(crosslingual, "cross_entropy", lambda s, b: seen.append(b.attention_mask is not None) or split(s, b))
    run(crosslingual, method, *([] if padded else ["--max-length", "4", "--dev-size", "1", "--test-size", "1"]))
    assert any(seen) == padded


def test_gradient_checkpointing(run):
    run(crosslingual, "evograd", "--gradient-checkpointing")


def test_images_of_files(run, tmp_path, capsys):
    for domain in "abc":
        write_domain(tmp_path, domain)
    flags = [*FILES, "--device", "cuda", "--data-dir", str(tmp_path / "lists"), "--seen", "a", "b", "--held-out", "c", "--workers", "0"]
    run(fewshot, "evograd_guided", *flags)


@pytest.mark.usefixtures("fewer_estimates")
def test_few_shot_scripts_around_the_training(run, tmp_path, capsys):
    """An encoder, a model that starts from it, its tests, and the quality of its hypergradients."""
    encoder, model = str(tmp_path / "encoder.pt"), str(tmp_path / "model.pt")
    on_cuda = ["--device", "cuda", "--out"]
    small = ["--backbone", "conv4", "--width", "4", "--image-size", "16", "--epochs", "1", "--batch-size", "2000"]
    with pretended_cuda() as cuda:
        pretrain.main(["--domain", "stix", *small, *on_cuda, encoder])
    outside = OUTSIDE | {"cross_domain_fewshot/pretrain.py main": 28}  # its parameters go there, the accuracy comes twice
    check(cuda.events, outside)
    run(fewshot, "evograd", "--encoder", encoder, "--checkpoint", model)
    with pretended_cuda() as cuda:
        evaluate.main([model, "--domain", "serif", "--episodes", "4", *on_cuda, str(tmp_path / "tests.jsonl")])
    check(cuda.events, OUTSIDE | {"cross_domain_fewshot/evaluate.py load_model": 100})
    with pretended_cuda():
        quality.main([model, "--steps", "2", *on_cuda, str(tmp_path / "quality.jsonl")])


@pytest.mark.parametrize("script", SMALL, ids=NAMES)
def test_a_stopped_run_goes_on_to_the_same_result(script, run, tmp_path):
    flags = ["--checkpoint-every", "1"]
    whole = run(script, "evograd", *flags)
    (tmp_path / "runs.jsonl").unlink()
    run(script, "evograd", *flags, stop=1)
    assert run(script, "evograd", *flags, "--resume")["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (rotation_compare, ""),
        (label_noise_compare, "--batch-size 4 --model small"),
        (crosslingual_compare, "--batch-size 2 --length 8 --architectures"),
    ],
    ids=["rotation", "label_noise", "crosslingual"],  # few-shot learning's has no small size
)
def test_costs_are_measured(script, flags, tmp_path, capsys):
    with pretended_cuda():
        arguments = ["--device", "cuda", "--repeats", "1", "--methods", "evograd", "--json", str(tmp_path / "costs.json")]
        script.main([*flags.split(), *arguments])
    costs = json.loads((tmp_path / "costs.json").read_text())["methods"]
    assert costs["evograd"]["launches"] > costs["plain"]["launches"] and costs["plain"]["seconds"] > 0


def test_one_read_an_evaluation_however_many_batches():
    images, labels = torch.zeros(2001, 1, 8, 8, dtype=torch.uint8), torch.zeros(2001, dtype=torch.int64)
    with pretended_cuda() as cuda:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(CUDA)
        images, labels = images.to(CUDA), labels.to(CUDA)
        task = SimpleNamespace(normalize=lambda pixels: pixels.float())
        split = Split(images, labels, labels)
        cuda.events.clear()
        rotation.accuracy(model, images.float(), labels)
        assert len(cuda.events) == 1
        label_noise.losses_and_accuracy(model, task, split)
        assert len(cuda.events) == 2


@pytest.mark.parametrize(("back", "error"), [(False, RuntimeError), (True, AssertionError)])
def test_what_is_taken_to_the_host_within_a_step_is_found(back, error, run):
    normalize = rotation.normalize

    def by_the_host(images):
        return normalize(images.cpu().to(images.device) if back else images.cpu())

    words = r"(?s)the host waits for the device:\n\s+tests/test_cuda.py:\d+ < rotation/train.py:\d+ \(.*copy to cpu"
    with mock.patch.object(rotation, "normalize", by_the_host), pytest.raises(error, match=words if back else "same device"):
        run(rotation, "evograd")


# --- the library -------------------------------------------------------------------------------------------------------


def directions(tensor, generator):
    return torch.randn(tensor.shape, generator=generator, device=tensor.device)


def evograd_with(**settings):
    def estimate(*problem):
        generator = torch.Generator().manual_seed(1)
        return evograd.hypergradient(*problem, n_candidates=4, inner_lr=0.1, generator=generator, **settings)

    return estimate


ESTIMATORS = {
    "stream": evograd_with(),
    "retain": evograd_with(strategy="retain"),
    "vmap": evograd_with(strategy="vmap"),
    "vmap_in_chunks": evograd_with(strategy="vmap", chunk_size=3),
    "common_random_numbers": evograd_with(common_random_numbers=True),
    "normal": evograd_with(noise="normal"),
    "directions": evograd_with(noise=directions),
    "guided": functools.partial(evograd.guided, inner_lr=0.1, lookahead="sgd"),
    "guided_retain": functools.partial(evograd.guided, inner_lr=0.1, strategy="retain", share_kinks=False, radius=1e-2),
    "mixed_mode": functools.partial(evograd.mixed_mode, inner_lr=0.1, lookahead="sgd"),
    "unrolled": functools.partial(baselines.unrolled, inner_lr=0.1, n_steps=2),
    "higher": functools.partial(baselines.unrolled, inner_lr=0.1, engine="higher"),
    "finite_difference": functools.partial(baselines.finite_difference, inner_lr=0.1),
    "neumann": functools.partial(baselines.neumann, inner_lr=0.1),
    "conjugate_gradient": functools.partial(baselines.conjugate_gradient, damping=0.1),
}


def problem(device, dropout):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), *([nn.Dropout(0.3)] if dropout else []), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).to(device)
    x, y = torch.randn(10, 6).to(device), torch.arange(10).remainder(3).to(device)
    lam = torch.rand(10).to(device).requires_grad_()

    def train_loss(m):
        return (lam.sigmoid() * F.cross_entropy(m(x), y, reduction="none")).mean()

    def val_loss(m):
        return F.cross_entropy(m(x.flip(0)), y.flip(0))

    return train_loss, val_loss, model, [lam]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_read_once_and_give_the_numbers_of_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # there is a warning else
    """With CUDA's own random numbers, where they are seeded alike."""
    found = {}
    for device in ("cpu", "cuda"):
        with pretended_cuda() as cuda:
            arguments = problem(device, dropout=not name.startswith("vmap"))  # vmap does not tell where it draws its masks
            for _ in range(2):  # the first call makes tables that stay
                torch.manual_seed(3)
                cuda.events.clear()
                result = ESTIMATORS[name](*arguments)
            tensors = (*result.grads, result.val_loss, result.candidate_losses, result.weights)
            assert {t.device.type for t in tensors} == {device}
            drawn = torch.rand(5, device=device).tolist()
        check(cuda.events[:-1], IN_A_STEP)
        found[device] = result
        found[device, "drawn"] = drawn
    assert torch.equal(found["cpu"].grads[0], found["cuda"].grads[0])
    assert found["cpu", "drawn"] == found["cuda", "drawn"]  # generators are left in the same states


# --- the pretence ------------------------------------------------------------------------------------------------------


def test_devices_are_told_apart():
    with pretended_cuda() as cuda:
        host, there = torch.ones(3), torch.ones(3, device="cuda")
        with torch.device("cuda"):
            assert torch.zeros(2).device == torch.device("cuda", 0)
        assert (host.device.type, there.device, there.is_cuda) == ("cpu", torch.device("cuda", 0), True)
        assert (there[1:] + 1).view(-1).clone().is_cuda and torch.zeros_like(there).is_cuda and not host.double().is_cuda
        assert there.to(host).device.type == "cpu" and host.to(there.device).is_cuda and nn.Linear(2, 2).cuda().weight.is_cuda
        for wrong in (
            lambda: host + there,
            lambda: torch.cat([host, there]),
            lambda: torch.stack([torch.tensor(1.0), there[0]]),
            lambda: there @ host,
            lambda: torch._foreach_add([there], [host]),
            lambda: host[torch.zeros(2, dtype=torch.int64, device="cuda")],
            lambda: F.linear(there, torch.ones(2, 3)),
        ):
            with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
                wrong()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        with pytest.raises(RuntimeError, match="'cuda' device type for generator but found 'cpu'"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="'cpu' device type for generator but found 'cuda'"):
            host.normal_(generator=torch.Generator("cuda"))
        cuda.events.clear()
        assert (there * torch.tensor(2.0)).is_cuda  # a number may come from the host
        there[1:] = 0
        assert not cuda.events
    assert there.device.type == "cpu" and not torch.cuda.is_initialized()


def test_devices_are_told_apart_in_backward_passes_and_transforms():
    with pretended_cuda():
        w, x = torch.ones(3, device="cuda", requires_grad=True), torch.ones(2, 3, device="cuda")
        w.register_hook(lambda g: g + torch.ones(3))
        with pytest.raises(RuntimeError, match="at least two devices"):
            (x @ w).sum().backward()
        host = torch.ones(3)
        for transform in (
            lambda: torch.func.jvp(lambda w: x @ (w * host), (w,), (w,)),
            lambda: torch.func.vmap(lambda row: row * host)(x),
            lambda: torch.func.grad(lambda w: (x @ (w * host)).sum())(w),
        ):
            with pytest.raises(RuntimeError, match="at least two devices"):
                transform()
        assert torch.func.vmap(lambda row: row * w.detach())(x).is_cuda
        assert torch.func.jvp(lambda w: x @ w, (w.detach(),), (x[0],))[1].is_cuda


WAITS = {
    "item": lambda host, there: there[0].item(),
    "float": lambda host, there: float(there[0]),
    "bool": lambda host, there: bool(there[0] > 0),
    "tolist": lambda host, there: there.tolist(),
    "cpu": lambda host, there: there.cpu(),
    "to the host": lambda host, there: there.to("cpu", non_blocking=True),
    "to the device": lambda host, there: host.to(CUDA),
    "not pinned": lambda host, there: host.to(CUDA, non_blocking=True),
    "pinned and waited for": lambda host, there: host.pin_memory().to(CUDA),
    "copy_": lambda host, there: there.copy_(host),
    "tensor": lambda host, there: torch.tensor([1.0], device="cuda"),
    "as_tensor": lambda host, there: torch.as_tensor(host, device="cuda"),
    "mask": lambda host, there: there[there > 0],
    "nonzero": lambda host, there: there.nonzero(),
    "equal": lambda host, there: torch.equal(there, there + 1),
    "index from the host": lambda host, there: there[torch.tensor([0, 1])],
    "one_hot": lambda host, there: F.one_hot(there.long()),
}
DOES_NOT_WAIT = {
    "pinned": lambda host, there: host.pin_memory().to(CUDA, non_blocking=True),
    "pinned copy_": lambda host, there: there.copy_(host.pin_memory(), non_blocking=True),
    "host's own": lambda host, there: (host[0].item(), host[host > 0], host.tolist()),
    "index": lambda host, there: there[torch.arange(2, device="cuda")],
    "where": lambda host, there: torch.where(there > 0, there, 0.0).sum(),
    "factory": lambda host, there: torch.arange(3, device="cuda") + torch.full((), 2.0, device="cuda"),
    "one_hot": lambda host, there: F.one_hot(there.long(), 3),
    "clip": lambda host, there: nn.utils.clip_grad_norm_([nn.Parameter(there)], 1.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits(name):
    with pretended_cuda() as cuda:
        host, there = torch.ones(3), torch.ones(3, device="cuda")
        WAITS[name](host, there)
        assert cuda.events
    with pytest.raises(AssertionError, match=r"tests/test_cuda.py:\d+"):
        check(cuda.events, {})


@pytest.mark.parametrize("name", DOES_NOT_WAIT)
def test_the_host_does_not_wait(name):
    with pretended_cuda() as cuda:
        host, there = torch.ones(3), torch.ones(3, device="cuda")
        DOES_NOT_WAIT[name](host, there)
        assert not cuda.events


def test_random_numbers_of_the_device_are_its_own():
    with pretended_cuda():
        torch.manual_seed(5)
        first = torch.rand(4, device="cuda").cpu()
        torch.manual_seed(5)
        assert torch.equal(torch.rand(4), first)  # seeded alike, and not the same stream
        assert torch.equal(torch.rand(4, device="cuda").cpu(), first)
        with torch.random.fork_rng(devices=[torch.device("cuda", 0)]):
            inside = torch.rand(4, device="cuda").cpu()
        assert torch.equal(torch.rand(4, device="cuda").cpu(), inside)
