"""What one step of each method costs, measured side by side: time, FLOPs, peak bytes.

    python -m metaxl.compare [--json FILE]                      the tiny encoder for real, XLM-R base and large by architecture
    python -m metaxl.compare --encoder FOLDER                   an encoder on disk for real
    python -m metaxl.compare --architectures base --length 48 200
    python -m metaxl.compare --fake                             the architectures alone: nothing is timed
    python -m metaxl.compare --paper-cost --architectures base --length 200     a case of the paper's cost figures, see
                                                                                evograd/lab/costs.py

A step is the tagger's update and the RTN's, on 12 source and 12 target sentences of --length sub-words (measured for real: the
shortest length given), each of them a word; "plain" is joint training's update on the same 24 sentences. Architectures are
measured in fake tensors: the bytes and FLOPs of a model of any size, which is never made.
"""

from __future__ import annotations

from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evograd.lab import cli, costs
from evograd.lab.methods import MAIN
from evograd.lab.records import append_run, seed_everything
from evograd.measuring import by_architecture, compare_made

from .data import Batch, toy_language
from .models import Tagger, encoder_name, load_encoder, longest, tiny_encoder
from .train import Step, Trainer, parse_args

# What sets XLM-R large apart from XLM-R base, which has 12 layers of 768.
XLM_R = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
N_LABELS = 7  # BIO tags of three kinds of entities


def random_batch(n, length, n_ids, device):
    """n sentences without padding; every sub-word but the first and the last one carries a label."""
    ids = torch.randint(5, n_ids, (n, length), device=device)
    positions = torch.arange(n * length, device=device).view(n, length)[:, 1:-1].flatten()
    labels = torch.randint(N_LABELS, positions.shape, device=device)
    return Batch(ids, None, positions, labels, [length - 2] * n, [length] * n)


def step_of(method, make_encoder, length, batch_size, device):
    """One step of a method, on an encoder of its own, as a function without arguments."""
    args = parse_args([*costs.flags_of(method), "--device", str(device)])
    seed_everything(1)
    encoder = make_encoder()
    depth, n_ids = encoder.config.num_hidden_layers, encoder.config.vocab_size
    with torch.device(device):
        model = Tagger(encoder, N_LABELS, () if method == "joint_training" else (depth,))
    trainer = costs.carried_on(Trainer(args, model.train(), n_steps=100))
    half = batch_size if method == "joint_training" else batch_size // 2
    step = Step(*(random_batch(n, length, n_ids, device) for n in (batch_size, half)), None)
    if method != "joint_training":
        step.val = random_batch(batch_size - half, length, n_ids, device)
    return partial(trainer.step, step)


def makers(methods, make_encoder, length, batch_size, device):
    """{method: function that makes its step}, with joint training's as "plain"."""
    make = lambda method: step_of(method, make_encoder, length, batch_size, device)
    return {"plain" if m == "joint_training" else m: partial(make, m) for m in ("joint_training", *methods)}


def xlm_r(size):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    special = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    config = XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, **special, **XLM_R[size])
    return XLMRobertaModel(config, add_pooling_layer=False)


def architecture_costs(size, length, batch_size, methods=MAIN):
    """{method: {peak_bytes, flops, peak_over_plain, flops_over_plain}} of a step with XLM-R of this size."""
    with FakeTensorMode():
        cpu = torch.device("cpu")
        to_make = makers(methods, lambda: xlm_r(size), length, batch_size, cpu)
        return by_architecture(compare_made(to_make, cpu, **cli.MEASURING))


def parse_comparison(argv):
    parser = cli.comparison_parser(__doc__)
    parser.add_argument("--encoder", default="tiny", metavar="FOLDER", help="that is measured for real: a folder, or tiny")
    parser.add_argument("--length", type=cli.at_least(3), nargs="+", default=[64, 200], help="sub-words of the sentences")
    parser.add_argument("--architectures", nargs="*", choices=tuple(XLM_R), default=tuple(XLM_R), help="of XLM-R")
    parser.add_argument("--fake", action="store_true", help="measure nothing for real")
    parser.add_argument("--batch-size", type=cli.at_least(2), default=12, help="source sentences, and as many target sentences")
    costs.add_argument(parser)
    args = parser.parse_args(argv)
    costs.check_argument(parser, args)
    if args.paper_cost and (len(args.architectures) != 1 or len(args.length) != 1):
        parser.error("--paper-cost is of one encoder and one length, such as --architectures base --length 200")
    if args.paper_cost and args.encoder != "tiny":
        parser.error("--encoder given, but --paper-cost is of --architectures")
    if args.fake and (args.encoder != "tiny" or args.json):
        parser.error(f"{'--json' if args.json else '--encoder'} given, but --fake measures no encoder for real")
    return args


def measured(args):
    """(configuration, {method: cost}) of the encoder that is run for real."""
    length = min(args.length)
    with cli.exit_on_bad_input():
        if args.encoder == "tiny":
            sentences = toy_language("north")["train"][:200]
            make_encoder = lambda: tiny_encoder(sentences)[0].to(args.device)
            limit = longest(*tiny_encoder(sentences))
        else:
            make_encoder = lambda: load_encoder(args.encoder)[0].to(args.device)
            limit = longest(*load_encoder(args.encoder))
        if length > limit:
            raise ValueError(f"--length {length}: the encoder {encoder_name(args.encoder)} takes {limit} sub-words")
    to_make = makers(args.methods, make_encoder, length, args.batch_size, args.device)
    found = compare_made(to_make, args.device, args.repeats, **cli.MEASURING)
    return {"encoder": encoder_name(args.encoder), "length": length, "batch_size": args.batch_size}, found


def record_case(args):
    """A case of the paper's cost figures: XLM-R with random weights."""
    (size,), (length,) = args.architectures, args.length

    def on(device):
        # Fake tensors cannot be moved, not even nowhere.
        make_encoder = lambda: xlm_r(size) if device.type == "cpu" else xlm_r(size).to(device)
        return makers(args.methods, make_encoder, length, args.batch_size, device)

    config = {"encoder": f"xlm-roberta-{size}", "length": length, "batch_size": args.batch_size}
    costs.record_case(args, "metaxl", config, on)


def main(argv=None):
    args = parse_comparison(argv)
    if args.paper_cost:
        record_case(args)
        return
    config, found = (None, None) if args.fake else measured(args)
    architectures = []
    for size in args.architectures:
        for length in args.length:
            architecture = {"encoder": f"xlm-roberta-{size}", "length": length, "batch_size": args.batch_size}
            methods = architecture_costs(size, length, args.batch_size, args.methods)
            architectures.append({**architecture, "methods": methods})
            print(f"\nXLM-R {size}, {args.batch_size} + {args.batch_size} sentences of {length} sub-words, by architecture")
            print(f"{'':16}{'GFLOP':>10}{'FLOPs/plain':>13}{'peak MB':>10}{'peak/plain':>12}{'launches/plain':>16}")
            for method, cost in methods.items():
                print(
                    f"{method:16}{cost['flops'] / 1e9:10.1f}{cost['flops_over_plain']:13.3f}"
                    f"{cost['peak_bytes'] / 1e6:10.1f}{cost['peak_over_plain']:12.3f}{cost['launches_over_plain']:16.2f}"
                )
            if args.out:
                append_run(args.out, "metaxl_architecture", architecture, methods, {}, args.device)
    if found:
        print()
        cli.finish_comparison(args, "metaxl", config, found, {"architectures": architectures})


if __name__ == "__main__":
    main()
