"""Train an encoder by classification on the base classes of one domain: the warm start of train.py --encoder.

    python -m cross_domain_fewshot.pretrain --out FILE.pt                                     glyphs, a minute on a CPU
    python -m cross_domain_fewshot.pretrain --data filelists --data-dir DIR --domain miniImagenet --out FILE.pt

Adam on batches of 16, cross-entropy of a linear classifier on the encoder's averaged features, no transformations. The encoder
fits every head and method.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from evograd.lab import checkpoints, cli, methods
from evograd.lab.records import given, seed_everything

from .data import DATASETS, add_loading_arguments, augmented, centred, data_fingerprint, load_domain, prepare_loading, stream
from .models import BACKBONES, Encoder
from .train import by_data, fill_defaults


class Batches(Dataset):
    """Batch number t of a run, (images, classes), without repetition within an epoch; its order depends on the seed alone."""

    def __init__(self, images, seed, batch_size):
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.class_index = np.unique(images.labels, return_inverse=True)[1]
        self.per_epoch = max(1, len(images.labels) // batch_size)

    def __getitem__(self, t):
        epoch, k = divmod(t, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.class_index))
        index = order[k * self.batch_size : (k + 1) * self.batch_size]
        return self.images.load(index), torch.from_numpy(self.class_index[index])


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--data", choices=DATASETS, default="glyphs", help="as in train.py")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="folder of the file lists")
    parser.add_argument("--domain", help="default: sans (glyphs), miniImagenet (filelists)")
    parser.add_argument("--backbone", choices=BACKBONES, help="default: conv4 (glyphs), resnet10 (filelists)")
    parser.add_argument("--width", type=cli.at_least(1), help="channels of a Conv-4 or Conv-6; default: as in train.py")
    parser.add_argument("--image-size", type=cli.at_least(8), help="pixels; default: as in train.py")
    parser.add_argument("--epochs", type=cli.at_least(1), help=f"default: {by_data('epochs')}")
    parser.add_argument("--batch-size", type=cli.at_least(2), default=16, help="images")
    parser.add_argument("--lr", type=cli.positive, default=1e-3, help="of Adam")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--seed", type=cli.seed, default=1, help="of the weights and the order of the data")
    cli.add_device_argument(parser)
    add_loading_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the encoder; FILE.part is the checkpoint on the way")
    cli.add_resume_arguments(parser)
    args = parser.parse_args(argv)
    fill_defaults(parser, args)
    args.domain = args.domain or {"glyphs": "sans", "filelists": "miniImagenet"}[args.data]
    return args


def main(argv=None):
    args = parse_args(argv)
    names = ("data", "domain", "backbone", "width", "image_size", "epochs", "batch_size", "lr", "amp", "seed")
    config = {name: getattr(args, name) for name in names}
    args.checkpoint = f"{args.out}.part"
    with cli.exit_on_bad_input():
        images = load_domain(args.data, args.data_dir, args.domain, "base", args.image_size)
        config |= given({"fingerprint": data_fingerprint([images])})
        keeper = checkpoints.Keeper(args, "few-shot encoder", config, name="encoder")
        checkpoints.check_writable(args.out, "--out")
        checkpoints.check_ours(args.out, "--out")
        if args.resume and Path(args.out).is_file() and checkpoints.load(args.out)["config"] == config:
            print(f"{args.out} is this encoder: nothing to do")
            return
        found = keeper.resume()
        seed_everything(args.seed)
        encoder = Encoder(args.backbone, args.image_size, maps=True, width=args.width, transform=False).to(args.device)
        cli.check_batch(args.batch_size, len(images.labels), "images")
        n_workers = prepare_loading([images], args.cache_gb, args.workers, args.device)
    classifier = nn.Linear(encoder.channels, len(images.classes)).to(args.device)
    optimizer = methods.optimizer(torch.optim.Adam, [*encoder.parameters(), *classifier.parameters()], lr=args.lr)
    batches = Batches(images, args.seed, args.batch_size)
    n_steps = args.epochs * batches.per_epoch
    generator = torch.Generator().manual_seed(args.seed)  # of the augmentations
    parts = {"encoder": encoder, "classifier": classifier, "optimizer": optimizer}
    losses, hits = [], []  # of this epoch
    if found:
        for name, part in parts.items():
            part.load_state_dict(found[name])
        generator.set_state(found["augmentations"])
        losses, hits = ([value.to(args.device) for value in found[name]] for name in ("losses", "hits"))
    state = lambda: {
        **{name: part.state_dict() for name, part in parts.items()},
        "augmentations": generator.get_state(),
        "losses": losses,
        "hits": hits,
    }
    with keeper:
        loader = stream(batches, range(keeper.step, n_steps), n_workers, pin=args.device.type == "cuda")
        for step in keeper.steps(n_steps, state, f"encoder {args.backbone} on {args.domain}", unit="batch"):
            if step % batches.per_epoch == 0:
                losses, hits = [], []
            x, y = (t.to(args.device, non_blocking=True) for t in next(loader))
            x = centred(x, args.image_size) if args.data == "glyphs" else augmented(x, args.image_size, generator)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                logits = classifier(encoder(x).mean((2, 3)))
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            hits.append((logits.argmax(1) == y).float().mean())
            if (step + 1) % batches.per_epoch == 0:
                keeper.show(loss=keeper.mean(losses), accuracy=100 * torch.stack(hits).mean().item())
    states = {name: part.state_dict() for name, part in parts.items()}
    with cli.exit_on_bad_input():
        checkpoints.save(args.out, {"kind": "encoder", "config": config, "step": n_steps, **states})
    keeper.path.unlink(missing_ok=True)
    accuracy = 100 * torch.stack(hits).mean().item()
    print(f"encoder {args.backbone}: {accuracy:.1f} % of {args.domain}'s {len(images.classes)} base classes in the last epoch")


if __name__ == "__main__":
    main()
