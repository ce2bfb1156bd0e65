"""Hugging Face's Trainer: fine-tune a small GPT-2 by LoRA, and learn how much each text source counts, on the way.

    python -m resources.examples.trainer                    needs peft and accelerate; five minutes on one CPU core

The text is that of data_mixture: docstrings, code, shuffled code; target: docstrings of other modules. A GPT-2 is trained on
all of it alike, then adapters of rank 8 are trained by AdamW, with gradients accumulated over two batches, clipped, under
autocast to bfloat16. λ are three logits, the weights of the sources. `evograd.Trajectory` goes back through every 20 steps.
To make it your own: take `LearningTrainer` as it is, with your `weighted_loss`, `val_loss` and λ.
"""

import argparse
import tempfile
import time
import warnings

import torch
from transformers import Trainer, TrainingArguments

import evograd
from evograd.lab.cli import at_least, seed, writable
from evograd.lab.records import append_run  # result lines of this repository
from resources.examples.data_mixture import NAMES, losses, mean_loss, new_model, sources, windows

METHODS = ("uniform", "learned")
BATCH, VAL_BATCH, ACCUMULATED, EVERY, WARM_UP = 12, 128, 2, 20, 20
BASE_LR, LR, META_LR = 3e-3, 3e-3, 0.3


class LearningTrainer(Trainer):
    """A Trainer whose steps are remembered, and which moves λ after every so many of them.

    weighted_loss: (model, inputs) -> the loss, in which λ is.  val_loss: of the model.  meta_optimizer: of λ alone.
    """

    def __init__(self, *args, weighted_loss, val_loss, meta_optimizer, every=EVERY, warm_up=WARM_UP, **settings):
        super().__init__(*args, **settings)
        self.weighted_loss, self.val_loss, self.meta_optimizer = weighted_loss, val_loss, meta_optimizer
        self.every, self.warm_up, self.waiting, self.trajectory = every, warm_up, [], None

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs, weighted_loss, context = self._prepare_inputs(inputs), self.weighted_loss, self.compute_loss_context_manager

        def loss(m):
            with context():
                return weighted_loss(m, inputs)

        self.waiting.append(loss)
        if not self.accelerator.sync_gradients:  # more is to be accumulated
            return torch.zeros((), device=self.args.device)
        (lam,) = self.meta_optimizer.param_groups[0]["params"]
        self.trajectory = self.trajectory or evograd.Trajectory(model, self.optimizer.optimizer, [lam])
        value, self.waiting = self.trajectory.step(self.waiting, clip_norm=self.args.max_grad_norm or None), []
        if self.state.global_step < self.warm_up:
            self.trajectory.clear()
        if len(self.trajectory) == self.every:
            lam.grad = self.trajectory.hypergradient(self.val_loss).grads[0]
            self.meta_optimizer.step()
        model.zero_grad()  # the step is made: Trainer's own finds no gradients, and changes nothing
        return value


class Windows(torch.utils.data.IterableDataset):
    """Windows of the sources, in turns."""

    def __init__(self, texts, generator):
        self.texts, self.generator = texts, generator

    def __iter__(self):
        while True:
            for i, name in enumerate(NAMES):
                yield {"input_ids": windows(self.texts[name], 1, self.generator)[0], "source": i}


def base(seed, steps, texts):
    """A GPT-2 that has seen all sources alike."""
    torch.manual_seed(seed)
    model, generator = new_model(False), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = torch.cat([windows(text, BATCH * ACCUMULATED // 3, generator) for text in texts.values()])
        losses(model, batch).mean().backward()
        optimizer.step()
    return model


def fine_tune(model, learn, seed, steps, data):
    """(test loss, weights of the sources) after LoRA."""
    import peft

    texts, val, test = data
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of GPT-2's transposed weights
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["c_attn", "c_fc"], lora_dropout=0.0))
    logits = torch.zeros(len(NAMES), requires_grad=True)  # λ
    generator = torch.Generator().manual_seed(seed)
    val_batch = windows(val, VAL_BATCH, generator)

    def weighted_loss(m, inputs):
        return (len(NAMES) * logits.softmax(0)[inputs["source"]] * losses(m, inputs["input_ids"])).mean()

    with tempfile.TemporaryDirectory() as folder:
        settings = dict(per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATED, learning_rate=LR, seed=seed)
        settings |= dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        trainer = LearningTrainer(
            model,
            TrainingArguments(folder, max_steps=steps, bf16=True, use_cpu=True, remove_unused_columns=False, **settings),
            train_dataset=Windows(texts, generator),
            weighted_loss=weighted_loss,
            val_loss=lambda m: losses(m, val_batch).mean(),
            meta_optimizer=torch.optim.Adam([logits], lr=META_LR if learn else 0.0),
        )
        trainer.train()
    model.eval()
    return mean_loss(model, test), logits.detach().softmax(0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=1, help="of the models and the batches")
    parser.add_argument("--steps", type=at_least(1), default=300, help="of the optimizer, before LoRA and with it")
    parser.add_argument("--out", type=writable, help="JSON-lines file that result lines are appended to")
    args = parser.parse_args(argv)
    data = sources()
    state = base(args.seed, args.steps, data[0]).state_dict()
    for method in METHODS:
        start, model = time.perf_counter(), new_model(False)
        model.load_state_dict(state)
        test_loss, weights = fine_tune(model, method == "learned", args.seed, args.steps, data)
        seconds = time.perf_counter() - start
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(NAMES, weights))
        print(f"{method:8} test loss {test_loss:.4f} ({shown}), {seconds:.0f} s", flush=True)
        if args.out:
            config = {"method": method, "seed": args.seed, "steps": args.steps}
            metrics = {"test_loss": test_loss, "weights": dict(zip(NAMES, weights.tolist()))}
            append_run(args.out, "examples_trainer", config, metrics, {"seconds": seconds}, "cpu")


if __name__ == "__main__":
    main()
