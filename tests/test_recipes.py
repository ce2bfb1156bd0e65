"""Recipes for other people's loops: Hugging Face's Trainer trains as it does without, and learns; Lightning's text is code.

The scripts of resources/recipes.md are run by tests/test_readmes.py.
"""

import copy
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evograd
from resources.examples import trainer
from resources.examples.data_mixture import NAMES, losses, new_model

RECIPES = Path(trainer.__file__).resolve().parents[1] / "recipes.md"


@pytest.fixture
def arguments(tmp_path):
    pytest.importorskip("accelerate")
    settings = dict(per_device_train_batch_size=6, gradient_accumulation_steps=2, learning_rate=3e-3, seed=0)
    settings |= dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=True, use_cpu=True)
    further = dict(settings, remove_unused_columns=False)
    return lambda steps, clip: trainer.TrainingArguments(str(tmp_path), max_steps=steps, max_grad_norm=clip, **further)


TEXTS = {name: torch.randint(128, (500,), generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}


def parts():
    """(data, λ, the weighted loss)"""
    logits = torch.zeros(3, requires_grad=True)

    def weighted_loss(m, inputs):
        return (3 * logits.softmax(0)[inputs["source"]] * losses(m, inputs["input_ids"])).mean()

    return trainer.Windows(TEXTS, torch.Generator().manual_seed(1)), logits, weighted_loss


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trainer_trains_as_it_does_without(arguments):
    """Bit for bit, but for clipping, where accelerate sums the norm in another order."""

    class Plain(trainer.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return weighted_loss(model, inputs)

    torch.manual_seed(0)
    base, models, found = new_model(False), [], []
    for kind in (Plain, trainer.LearningTrainer):
        data, logits, weighted_loss = parts()
        further = dict(weighted_loss=weighted_loss, val_loss=None, meta_optimizer=torch.optim.Adam([logits]))
        models.append(copy.deepcopy(base))
        run = kind(models[-1], arguments(5, 0.0), train_dataset=data, **(further if kind is not Plain else {}))
        found.append(run.train().training_loss)
    assert found[0] == found[1]
    for before, a, b in zip(base.parameters(), *(m.parameters() for m in models)):
        assert torch.equal(a, b)
        assert not torch.allclose(before, a, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trainer_learns_which_source_is_of_use(arguments):
    """After a warm-up of two steps λ moves after every three, towards the source that validation is of."""
    torch.manual_seed(0)
    data, logits, weighted_loss = parts()
    moved, meta_optimizer = [], torch.optim.Adam([logits], lr=0.3)
    meta_optimizer.register_step_post_hook(lambda *_: moved.append(len(run.trajectory)))
    val = TEXTS["code"][: 64 * 7].view(7, 64)
    further = dict(weighted_loss=weighted_loss, val_loss=lambda m: losses(m, val).mean(), meta_optimizer=meta_optimizer)
    run = trainer.LearningTrainer(new_model(False), arguments(14, 0.5), train_dataset=data, every=3, warm_up=2, **further)
    run.train()
    assert moved == [0] * 4
    assert logits[NAMES.index("code")] == logits.max() > logits.mean() + 0.2


def test_the_example_runs_tiny(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(trainer, "sources", lambda: (TEXTS, TEXTS["code"], TEXTS["code"]))
    for name, value in dict(BATCH=3, VAL_BATCH=4, EVERY=2, WARM_UP=0).items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer.LearningTrainer.__init__, "__kwdefaults__", dict(every=2, warm_up=0))
    trainer.main(["--steps", "4", "--out", str(tmp_path / "runs.jsonl")])
    uniform, learned = (line for line in capsys.readouterr().out.splitlines() if "test loss" in line)
    assert uniform.startswith("uniform") and "docstrings 0.333" in uniform
    assert learned.startswith("learned") and "docstrings 0.333" not in learned


def test_lightning_by_a_stand_in():
    """The text's class, on what Lightning gives it: manual optimisation and optimizers in a wrapper."""

    class LightningModule(nn.Module):
        def optimizers(self):
            self.own = getattr(self, "own", None) or self.configure_optimizers()
            return types.SimpleNamespace(optimizer=self.own)

    (text,) = re.findall(r"^```text\n(.*?)^```$", RECIPES.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names = {"lightning": types.SimpleNamespace(LightningModule=LightningModule), "torch": torch, "F": F, "evograd": evograd}
    exec(text, names)
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    module = names["Weighted"](nn.Linear(8, 3), 64)
    module.val_batch = x, y
    assert not module.automatic_optimization and "weights" not in dict(module.named_parameters())
    before = [p.clone() for p in module.net.parameters()]
    module.on_train_start()
    for step in range(20):
        i = torch.randperm(64)[:16]
        loss = module.training_step((i, x[i], y[i]), step)
        assert loss.ndim == 0 and (module.weights == 0).all() == (step < 19)
    assert all(not torch.equal(p, b) for p, b in zip(module.net.parameters(), before))


def test_recipes_are_short():
    codes = re.findall(r"^```(?:python|text)\n(.*?)^```$", RECIPES.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(codes) == 4
    for code in codes:
        lines = [line for line in code.split("# The recipe.\n")[-1].splitlines() if line]
        assert 5 <= len(lines) <= 18
