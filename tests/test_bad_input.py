"""What a wrong argument is answered with, before any long work starts: exit code 2, and a message that names what was given and
what is accepted."""

import importlib

import pytest

CASES = {
    "rotation": [
        (["--method", "evolution"], ["'evolution'", "evograd_guided", "second_order"]),
        (["--data", "cifar"], ["'cifar'", "digits", "mnist"]),
        (["--n-candidates", "1"], ["--n-candidates", "1 given", "at least 2"]),
        (["--sigma", "0"], ["--sigma", "0 given", "positive"]),
        (["--temperature", "-1"], ["--temperature", "-1 given", "positive"]),
        (["--temperature", "warm"], ["--temperature", "'warm' given", "number"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--device", "tpu"], ["--device", "'tpu' given", "cuda"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99' given", "CUDA devices"]),
        (["--out", "/dev/null/runs.jsonl"], ["--out", "/dev/null/runs.jsonl"]),
        (
            ["--method", "mixed_mode", "--n-candidates", "10"],
            ["--n-candidates", "mixed_mode does not read it", "evograd_guided"],
        ),
        (["--method", "baseline", "--inner-lr", "0.5"], ["--inner-lr", "baseline does not read it", "second_order"]),
        (["--checkpoint-every", "0"], ["--checkpoint-every", "0 given", "at least 1"]),
        (["--checkpoint", "tests"], ["--checkpoint tests is a folder"]),
        (["--checkpoint", "/dev/null/run.pt"], ["/dev/null"]),
        (["--checkpoint", "requirements.txt"], ["--checkpoint requirements.txt is there and no checkpoint", "another file"]),
        (["--data", "mnist", "--data-dir", "/nowhere"], ["no MNIST under /nowhere", "--data-dir", "--download"]),
    ],
    "label_noise_mwn": [
        (["--data", "svhn"], ["'svhn'", "digits", "cifar100", "FILE.npz"]),
        (["--data", "/nowhere/set.npz"], ["/nowhere/set.npz", "no such file"]),
        (["--data", "cifar10", "--data-dir", "/nowhere"], ["no cifar10 under /nowhere", "--data-dir", "--download"]),
        (["--noise-level", "1.5"], ["--noise-level 1.5", "[0, 1]"]),
        (["--noise-level", "nan"], ["--noise-level nan", "[0, 1]"]),
        (["--noise", "hierarchical"], ["--noise hierarchical", "superclasses"]),
        (["--noise", "given"], ["--noise given", "y_noisy"]),
        (["--noise", "given", "--noise-level", "0.1"], ["--noise-level given", "noisy already"]),
        (["--noise", "salt"], ["'salt'", "hierarchical"]),
        (["--meta-images", "2000"], ["--meta-images 2000", "200 images of each class", "of class 0 there are"]),
        (["--meta-images", "15"], ["--meta-images 15", "multiple", "10"]),
        (["--val-images", "0"], ["--val-images", "at least 1"]),
        (["--train-images", "5000"], ["--train-images 5000", "1,097 are left of 1,297"]),
        (["--method", "cross_entropy", "--meta-lr", "1"], ["--meta-lr", "cross_entropy does not read it"]),
        (["--method", "mixed_mode", "--weight-input", "model"], ["--weight-input", "mixed_mode does not read it", "evograd"]),
        (["--method", "second_order", "--sigma", "1"], ["--sigma", "second_order does not read it"]),
        (["--checkpoint", "tests"], ["--checkpoint tests is a folder"]),
        (["--checkpoint-every", "epoch"], ["--checkpoint-every", "'epoch' given", "number"]),
        (["--model", "vgg"], ["'vgg'", "resnet32"]),
        (["--compile", "--log-quality", "5"], ["--compile given", "--log-quality", "leave out one"]),
        (["--meta-every", "0"], ["--meta-every", "at least 1"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--out", "/dev/null/runs.jsonl"], ["--out", "/dev/null/runs.jsonl"]),
    ],
    "cross_domain_fewshot": [
        (["--held-out", "stix", "--seen", "stix", "sans"], ["--held-out stix is among the seen domains"]),
        (["--held-out", "serif", "--seen", "sans"], ["--seen sans", "two or more"]),
        (["--held-out", "comic"], ["domain 'comic' is not there", "computer_modern"]),
        (["--method", "fixed", "--transform-lr", "0.1"], ["--transform-lr", "fixed does not read it"]),
        (["--method", "mixed_mode", "--sigma", "0.1"], ["--sigma", "mixed_mode does not read it"]),
        (["--checkpoint", "tests"], ["--checkpoint tests is a folder"]),
        (["--encoder", "nowhere.pt"], ["no checkpoint nowhere.pt"]),
        (["--backbone", "vgg"], ["vgg", "resnet10"]),
        (["--head", "linear"], ["linear", "protonet"]),
    ],
    "metaxl": [
        (["--method", "finite_difference", "--perturb", "head"], ["--perturb head given", "finite_difference", "accepts all"]),
        (["--method", "evolution"], ["'evolution'", "joint_training", "second_order"]),
        (["--data", "wiki"], ["'wiki'", "toy", "sentiment"]),
        (["--method", "joint_training", "--rtn-lr", "1"], ["--rtn-lr given", "joint_training does not read it", "evograd"]),
        (["--method", "mixed_mode", "--sigma", "1"], ["--sigma given", "mixed_mode does not read it"]),
        (["--method", "evograd", "--common-random-numbers"], ["--common-random-numbers", "--perturb head", "--perturb all"]),
        (["--rtn-input", "model"], ["--rtn-input model given", "--perturb head", "--perturb all reads it"]),
        (["--method", "mixed_mode", "--rtn-input", "model"], ["--rtn-input given", "mixed_mode does not read it", "guided"]),
        (["--share", "batch"], ["--share batch given", "only process", "torchrun"]),
        (["--download"], ["--download", "toy"]),
        (["--target-size", "1"], ["--target-size", "at least 2"]),
        (["--checkpoint", "tests"], ["--checkpoint tests is a folder"]),
        (["--target", "east"], ["'east' given", "north and south"]),
        (["--target-size", "5000"], ["--target-size 5000", "toy south", "1000 sentences"]),
        (["--rtn-layers", "3"], ["--rtn-layers 3", "1 to 2"]),
        (["--rtn-layers", "1", "1"], ["--rtn-layers 1 1", "different"]),
        (["--max-length", "129"], ["--max-length 129", "limit of the encoder", "128 sub-words"]),
        (["--encoder", "/nowhere/bert"], ["--encoder /nowhere/bert", "no such folder"]),
        (["--encoder", "tests"], ["--encoder tests is no folder of an encoder", "config.json"]),
        (["--data", "ner", "--data-dir", "/nowhere"], ["no folder /nowhere/en", "train, dev, test", "--data-dir"]),
    ],
}


@pytest.mark.parametrize(
    ("experiment", "arguments", "words"),
    [(experiment, *case) for experiment, cases in CASES.items() for case in cases],
)
def test_bad_input(experiment, arguments, words, tmp_path, refused):
    """An error is as long as it has to be: one line says where the usage is."""
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "runs.jsonl")]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    message = refused(importlib.import_module(f"{experiment}.train").main, [*arguments, *out, *device], words)
    assert len(message.strip().splitlines()) <= 2
