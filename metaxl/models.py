"""An encoder of transformers, the representation transformation network (RTN) inside of it, and a linear classifier on top."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evograd.lab.data import fingerprint, fingerprint_of_file

from .data import Batch, Sentence

TINY_LENGTH = 128  # sub-words that the tiny encoder takes
# Encoders whose layers all have one mask, that of the padding, and read it nowhere else.
ONE_MASK = ("albert", "bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta", "xlm-roberta-xl")


class RTN(nn.Module):
    """x -> x + scale · sigmoid(g) ⊙ h, where (h, g) = Linear(ReLU(Linear(z))) and z is `seen`, or x detached.

    x, z: (…, d).  g: (…, 1), the gate.  h: (…, d).
    """

    def __init__(self, d: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(d, d // 2), nn.Linear(d // 2, d + 1)
        for linear in (self.inner, self.outer):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0, seen: Tensor | None = None) -> Tensor:
        z = x.detach() if seen is None else seen
        h, g = self.outer(F.relu(self.inner(z))).split([x.shape[-1], 1], dim=-1)
        return x + scale * torch.sigmoid(g) * h


class Switch:
    """What the RTNs do in this forward pass. No module, so that copies of the model (functional_call, higher) share it.

    scales: what they multiply by; None: they are passed by.
    held: what they see in place of the states that reach them.  record: a list that gets those states.
    """

    scales: Sequence[Tensor | float] | None = None
    held: Sequence[Tensor] | None = None
    record: list[Tensor] | None = None

    def pass_rtn(self, rtn: RTN, index: int, x: Tensor) -> Tensor:
        if self.record is not None:
            self.record.append(x.detach())
        return rtn(x, self.scales[index], None if self.held is None else self.held[index])


class Transformed(nn.Module):
    """A layer of the encoder with an RTN on its hidden states."""

    def __init__(self, layer: nn.Module, rtn: RTN, switch: Switch, index: int):
        super().__init__()
        self.layer, self.rtn, self.switch, self.index = layer, rtn, switch, index

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        if self.switch.scales is None:
            return output
        hidden, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        hidden = self.switch.pass_rtn(self.rtn, self.index, hidden)
        return hidden if rest is None else (hidden, *rest)


class Tagger(nn.Module):
    """Batch -> (w, n_labels): the classifier's scores at the labelled sub-words.

    rtn_layers: after which layers, counted from 1, hidden states pass an RTN if `transform`; none: () . After the last layer it
    works on the labelled sub-words alone, since nothing else is read there. Several RTNs have learned softmax weights α.
    """

    def __init__(self, encoder: nn.Module, n_labels: int, rtn_layers: Sequence[int] = (), dropout: float = 0.1):
        super().__init__()
        d, depth = encoder.config.hidden_size, encoder.config.num_hidden_layers
        wrong = [layer for layer in rtn_layers if not 1 <= layer <= depth]
        if wrong or len(set(rtn_layers)) < len(rtn_layers):
            raise ValueError(f"--rtn-layers {' '.join(map(str, rtn_layers))}: different numbers from 1 to {depth} are accepted")
        self.encoder, self.dropout, self.head = encoder, nn.Dropout(dropout), nn.Linear(d, n_labels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.rtn_layers, self.switch = tuple(sorted(rtn_layers)), Switch()
        self.square_masks = takes_square_masks(encoder)
        layers = next((m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
        self.last_rtn = None
        for index, number in enumerate(self.rtn_layers):
            if number == depth:
                self.last_rtn = RTN(d)
            elif layers is None:
                raise ValueError(
                    f"--rtn-layers {number}: the layers of {type(encoder).__name__} were not found; only {depth} is accepted"
                )
            else:
                layers[number - 1] = Transformed(layers[number - 1], RTN(d), self.switch, index)
        self.alpha = nn.Parameter(torch.zeros(len(rtn_layers))) if len(rtn_layers) > 1 else None

    def rtns(self) -> list[RTN]:
        """In the order of rtn_layers."""
        return [m for m in self.encoder.modules() if isinstance(m, RTN)] + ([] if self.last_rtn is None else [self.last_rtn])

    def hyperparameters(self) -> list[Tensor]:
        """λ: the parameters of the RTNs, and the logits of α."""
        return [p for rtn in self.rtns() for p in rtn.parameters()] + ([] if self.alpha is None else [self.alpha])

    def theta(self) -> list[Tensor]:
        """θ: all other parameters."""
        hyper = {id(p) for p in self.hyperparameters()}
        return [p for p in self.parameters() if id(p) not in hyper]

    def features(self, batch: Batch, transform: bool = False, held=None, record=None) -> Tensor:
        """(w, d), dropout included, at the labelled sub-words.  held, record: see Switch."""
        if transform:
            self.switch.scales = [1.0] if self.alpha is None else list(self.alpha.softmax(0))
            self.switch.held, self.switch.record = held, record
        try:
            hidden = self.encoder(input_ids=batch.input_ids, attention_mask=self.mask(batch)).last_hidden_state
            x = hidden.flatten(0, 1).index_select(0, batch.positions)
            if transform and self.last_rtn is not None:
                x = self.switch.pass_rtn(self.last_rtn, -1, x)
        finally:
            self.switch.scales = self.switch.held = self.switch.record = None
        return self.dropout(x)

    def mask(self, batch: Batch) -> Tensor | None:
        """The attention mask as the encoder takes it. One of two dimensions it reads from the host: does it hide anything?"""
        mask = batch.attention_mask
        if mask is None or not self.square_masks:
            return None if mask is None else mask.long()
        return mask[:, None, None].expand(-1, -1, mask.shape[1], -1)

    def cached_features(self, batch: Batch, transform: bool = False) -> Tensor:
        """The same, without a graph to θ: from the first RTN on there is one to λ, and no other."""
        theta = self.theta()
        for p in theta:
            p.requires_grad_(False)
        try:
            return self.features(batch, transform)
        finally:
            for p in theta:
                p.requires_grad_(True)

    def forward(self, batch: Batch, transform: bool = False, held=None, record=None) -> Tensor:
        return self.head(self.features(batch, transform, held, record))

    @contextmanager
    def checkpointing(self, on: bool):
        """Gradient checkpointing inside of the block, if `on`, by the encoder's own switch."""
        if not on:
            yield
            return
        new = hasattr(self.encoder, "activation_checkpointing_enable")  # its name from transformers 5 on
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        getattr(self.encoder, f"{name}_enable")({"use_reentrant": False})
        if getattr(self.encoder, "_require_grads_hook", None) is not None:
            self.encoder.disable_input_require_grads()  # transformers 5 adds hooks for reentrant checkpointing, and leaves them
        try:
            yield
        finally:
            getattr(self.encoder, f"{name}_disable")()


def takes_square_masks(encoder: nn.Module) -> bool:
    """Whether it hands a boolean mask (n, 1, length, length) on to attention as it is: the numbers of the mask (n, length)."""
    config, module = encoder.config, sys.modules[type(encoder).__module__]
    one_mask = getattr(config, "model_type", None) in ONE_MASK and not getattr(config, "is_decoder", False)
    # From transformers 5 on; and eager attention would add its mask.
    return one_mask and hasattr(module, "create_bidirectional_mask") and config._attn_implementation == "sdpa"


def encoder_name(encoder: str) -> str:
    """What records call it: a hub's name as it is, a folder by its last two parts."""
    return "/".join(Path(encoder).resolve().parts[-2:]) if Path(encoder).is_dir() else encoder


def encoder_fingerprint(encoder: str) -> str | None:
    """Of the files of a folder that make an encoder and its tokenizer; None for a name on the hub, and for tiny."""
    folder = Path(encoder)
    if not folder.is_dir():
        return None
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))  # transformers takes the first kind if both are there
    others = [file for suffix in ("json", "txt", "model") for file in sorted(folder.glob(f"*.{suffix}"))]
    return fingerprint(*(f"{file.name} {fingerprint_of_file(file)}" for file in [*weights, *others] if file.is_file()))


def load_encoder(encoder: str):
    """(encoder, tokenizer) of a folder or a name on the Hugging Face hub. OSError or ValueError if it is none."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if Path(encoder).exists() and not (Path(encoder) / "config.json").is_file():
        raise OSError(f"--encoder {encoder} is no folder of an encoder: it has no config.json")
    if encoder.startswith((".", "/", "~")) and not Path(encoder).exists():
        raise OSError(f"--encoder {encoder}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(encoder)
        # byte-level tokenizers of RoBERTa take words that are split already only so
        prefix = {"add_prefix_space": True} if config.model_type == "roberta" else {}
        tokenizer = AutoTokenizer.from_pretrained(encoder, **prefix)
        model = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    except Exception as error:  # whatever the packages that read it raise
        raise OSError(f"--encoder {encoder} could not be loaded: {str(error).strip() or type(error).__name__}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"--encoder {encoder}: its tokenizer is not a fast one, and only those tell the words of sub-words")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"--encoder {encoder} is an encoder with a decoder ({config.model_type}); encoders alone are accepted")
    check_encoder(model, encoder)
    if getattr(model, "pooler", None) is not None:
        del model.pooler  # nothing here reads it
        model.pooler = None  # an attribute and no submodule: `higher` cannot copy submodules that are None
    return model, tokenizer


@torch.no_grad()
def check_encoder(model: nn.Module, name: str) -> None:
    """ValueError if it does not make hidden states of sub-words and of a mask."""
    ids = torch.tensor([[1, 2, 3], [2, 1, 0]])
    try:
        size, _ = model.config.hidden_size, model.config.num_hidden_layers
        states = model.eval()(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
        right = states.shape == (2, 3, size)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--encoder {name} ({type(model).__name__}) is no encoder of text: {why}") from error
    if not right:
        raise ValueError(f"--encoder {name} ({type(model).__name__}) gives states of {tuple(states.shape)}, not (2, 3, {size})")


def tiny_encoder(sentences: Sequence[Sentence]):
    """(encoder, tokenizer): XLM-R's class, small and with random weights, and a byte-pair tokenizer made from `sentences`."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's, with its ids
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator((word for s in sentences for word in s.words), trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TINY_LENGTH,
    )
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=TINY_LENGTH + 2, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return XLMRobertaModel(config, add_pooling_layer=False), tokenizer


def longest(encoder: nn.Module, tokenizer) -> int:
    """How many sub-words, special tokens included, the encoder takes; a million where nothing limits them."""
    limit = min(tokenizer.model_max_length, 1_000_000)  # tokenizers that know no limit say 10³⁰
    table = next(
        (m for name, m in encoder.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)), None
    )
    if table is not None:  # RoBERTa's count from padding_idx + 1
        return min(limit, table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    said = getattr(encoder.config, "max_position_embeddings", None)  # of tables of other names, and of computed positions
    return min(limit, said) if isinstance(said, int) and said > 0 else limit
