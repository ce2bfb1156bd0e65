"""Sentences with their labels: BIO files, sentiment files and two generated languages; and the batches made of them."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from evograd.lab.data import fingerprint
from evograd.lab.records import replacing

DATASETS = ("toy", "ner", "sentiment")
SPLITS = ("train", "dev", "test")
SENTIMENTS = ("negative", "positive")


@dataclass
class Sentence:
    """words and their BIO tags, one each; or the words of a text (split at spaces) and one label."""

    words: list[str]
    labels: list[str]


# --- files -------------------------------------------------------------------------------------------------------------


def read_split(data: str, data_dir: str, language: str, split: str) -> list[Sentence]:
    """The sentences of data_dir/language/split. FileNotFoundError or ValueError names the file, and the line."""
    folder = Path(data_dir) / language
    path = folder / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: {language!r} needs one with the files {', '.join(SPLITS)}. See --data-dir"
        )
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no file {split!r} (there: {there}); {', '.join(SPLITS)} are needed")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return (_bio if data == "ner" else _sentiment)(path, lines, language)


def _bio(path: Path, lines: list[str], language: str) -> list[Sentence]:
    """`token<TAB>tag` or `language:token<TAB>tag` a line, an empty line after each sentence."""
    sentences, words, tags = [], [], []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            word, tag = _two_columns(path, number, line, "token<TAB>tag")
            if not re.fullmatch(r"O|[BI]-\S+", tag):
                raise ValueError(f"{path}, line {number}: the tag {tag!r} is not BIO; accepted are O, B-TYPE and I-TYPE")
            words.append(word.removeprefix(f"{language}:"))
            tags.append(tag)
        elif words:
            sentences.append(Sentence(words, tags))
            words, tags = [], []
    return sentences


def _sentiment(path: Path, lines: list[str], language: str) -> list[Sentence]:
    """`text<TAB>label` a line."""
    sentences = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text, label = _two_columns(path, number, line, "text<TAB>label")
            if label not in SENTIMENTS:
                raise ValueError(f"{path}, line {number}: the label {label!r} is unknown; accepted are {', '.join(SENTIMENTS)}")
            sentences.append(Sentence(text.split(), [label]))
    return sentences


def _two_columns(path: Path, number: int, line: str, form: str) -> tuple[str, str]:
    left, tab, right = line.rpartition("\t")
    if not tab:
        raise ValueError(f"{path}, line {number}: no tab in {line[:60]!r}; each line must be {form}")
    return left, right.strip()


def download_wikiann(data_dir: str, language: str) -> None:
    """Write WikiAnn's three files of a language, fetched with `datasets`, unless they are there. No file is written over."""
    folder = Path(data_dir) / language
    there = [split for split in SPLITS if (folder / split).exists()]
    if len(there) == len(SPLITS):
        return
    if there:
        raise FileExistsError(
            f"--download: {folder} has {', '.join(there)} already and not the others of {', '.join(SPLITS)}; "
            "WikiAnn's are not mixed with them. Add those that are missing, or move these away"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise OSError(
            "--download fetches WikiAnn with the package `datasets`, which is not installed: pip install datasets"
        ) from error
    fetched = load_dataset("unimelb-nlp/wikiann", language)
    with contextlib.ExitStack() as stack:  # the three take their places together, when all are written
        for split, name in zip(SPLITS, ("train", "validation", "test")):
            tags = fetched[name].features["ner_tags"].feature.names
            blocks = (
                "".join(f"{language}:{word}\t{tags[tag]}\n" for word, tag in zip(row["tokens"], row["ner_tags"]))
                for row in fetched[name]
            )
            stack.enter_context(replacing(folder / split)).write_text("\n".join(blocks), encoding="utf-8")


def data_fingerprint(data: str, data_dir: str, source: str, target: str) -> str | None:
    """What the record of a run says of the content of its files; None for generated languages, and if a file is missing."""
    files = [Path(data_dir) / source / "train", *(Path(data_dir) / target / split for split in SPLITS)]
    if data == "toy" or not all(file.is_file() for file in files):
        return None
    return fingerprint(*(file.read_bytes() for file in files))


# --- two generated languages -------------------------------------------------------------------------------------------


@lru_cache
def toy_language(name: str) -> dict[str, list[Sentence]]:
    """Sentences of "north" (the source) or "south" (the target), always the same ones.

    North puts the subject first and the kind of an organisation after its name; south puts the verb first and the kind before
    the name, and has words of its own for everything but names, of which it spells half in its own way.
    """
    shared = random.Random(0)
    names = {kind: sorted({_word(shared, "klmnrst", "aei", 2 + (i % 2)) for i in range(90)}) for kind in ("PER", "LOC")}
    own = random.Random(name)
    south = name == "south"
    consonants, vowels = ("bdgpvz", "ou") if south else ("fhjwkt", "aey")
    lexicon = {
        kind: sorted({_word(own, consonants, vowels, 2) for _ in range(n)})
        for kind, n in (("verb", 24), ("noun", 40), ("place", 4), ("link", 4), ("org", 8))
    }
    if south:
        spelling = str.maketrans("ei", "ou")
        names = {kind: [n.translate(spelling) if i % 2 else n for i, n in enumerate(ns)] for kind, ns in names.items()}

    def entity(kind):
        if kind == "PER":
            words = own.sample(names["PER"], own.choice((1, 2)))
        elif kind == "LOC":
            words = [own.choice(names["LOC"])]
        else:  # an organisation is named after a person or a place: only its kind, beside the name, tells
            words = [own.choice(names[own.choice(("PER", "LOC"))]), own.choice(lexicon["org"])]
            words = words[::-1] if south else words
        return [(word.capitalize(), f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(words)]

    def plain(kind):
        return [(own.choice(lexicon[kind]), "O")]

    def sentence():
        someone = entity(own.choice(("PER", "ORG"))) if own.random() < 0.8 else plain("noun")
        something = own.choice((plain("noun"), entity("ORG"), plain("noun") + plain("link") + entity("PER")))
        where = own.choice((entity("LOC"), plain("noun")))
        if south:
            parts = [plain("verb"), someone, something, where, plain("place")]
        else:
            parts = [someone, plain("verb"), something, plain("place"), where]
        words, tags = zip(*(pair for part in parts for pair in part), (".", "O"))
        return Sentence(list(words), list(tags))

    return {split: [sentence() for _ in range(n)] for split, n in (("train", 1000), ("dev", 200), ("test", 400))}


def _word(draw: random.Random, consonants: str, vowels: str, syllables: int) -> str:
    return "".join(draw.choice(consonants) + draw.choice(vowels) for _ in range(syllables))


# --- what a run uses ---------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """The sentences of one run. labels: every label, "O" first where there is one."""

    source: list[Sentence]
    target: dict[str, list[Sentence]]
    labels: list[str]


def load(
    data: str, data_dir: str, source: str, target: str, *, source_size: int, target_size: int, dev_size: int | None, seed: int
) -> Corpus:
    """Training sentences drawn by `seed`, the first `dev_size` dev sentences (None: all), and all test sentences."""
    if data == "toy":
        for language in (source, target):
            if language not in ("north", "south"):
                raise ValueError(f"language {language!r} given; the toy data have north and south")
        read = lambda language, split: toy_language(language)[split]
    else:
        read = lambda language, split: read_split(data, data_dir, language, split)
    name = lambda language, split: f"{data} {language}" if data == "toy" else str(Path(data_dir) / language / split)

    drawn = {}
    for role, language, size in (("source", source, source_size), ("target", target, target_size)):
        sentences = read(language, "train")
        if not sentences:
            raise ValueError(f"{name(language, 'train')} holds no sentence")
        if size > len(sentences):
            raise ValueError(
                f"--{role}-size {size}, but {name(language, 'train')} holds {len(sentences)} sentences; give a smaller number"
            )
        drawn[role] = random.Random(f"{seed} {role}").sample(sentences, size)
    splits = {"train": drawn["target"]} | {split: read(target, split) for split in ("dev", "test")}
    for split in ("dev", "test"):
        if not splits[split]:
            raise ValueError(f"{name(target, split)} holds no sentence")
    splits["dev"] = splits["dev"][:dev_size]
    if data == "sentiment":
        labels = list(SENTIMENTS)
    else:
        every = (drawn["source"], *splits.values())
        kinds = sorted({tag[2:] for sentences in every for s in sentences for tag in s.labels if tag != "O"})
        labels = ["O"] + [f"{b}-{kind}" for kind in kinds for b in "BI"]
    return Corpus(drawn["source"], splits, labels)


# --- batches -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Sentences as the encoder takes them.

    input_ids: (n, length), int64.  attention_mask: likewise, or None where nothing is padded.
    positions: (w,), where in the flattened (n · length) the w labelled sub-words are.  labels: (w,), int64.
    counts: how many of these each sentence has.
    share: what this part's mean loss is multiplied by, so that the parts of a batch add up to the batch's mean loss.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    labels: Tensor
    counts: list[int]
    share: float = 1.0

    def split(self, n: int) -> list[Batch]:
        """At most n batches of about as many sentences each."""
        parts, length, rows = [], self.input_ids.shape[1], len(self.counts)
        n = min(n, rows)
        for a, b in ((i * rows // n, (i + 1) * rows // n) for i in range(n)):
            words = slice(sum(self.counts[:a]), sum(self.counts[:b]))
            mask = None if self.attention_mask is None else self.attention_mask[a:b]
            positions = self.positions[words] - a * length
            share = self.share * len(positions) / len(self.positions)
            parts.append(Batch(self.input_ids[a:b], mask, positions, self.labels[words], self.counts[a:b], share))
        return parts


@dataclass
class Example:
    """ids: of the sub-words, special tokens included.  positions: of the labelled ones.  labels: their indices.
    words: which word of the sentence each labelled sub-word starts."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    words: list[int]


class Examples:
    """Sentences, tokenised once."""

    def __init__(self, sentences: Sequence[Sentence], tokenizer, labels: list[str], max_length: int, task: str):
        """The first sub-word of each word carries the word's label; in `task` "sentiment" the first token, the text's.

        What lies beyond max_length sub-words is cut off; `n_cut` counts the sentences that lose something.
        """
        self.sentences, self.pad = list(sentences), tokenizer.pad_token_id
        index = {label: i for i, label in enumerate(labels)}
        # split at spaces already, so that word_ids tells which sub-words belong to which word
        encoded = tokenizer(
            [s.words for s in self.sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        self.examples, self.n_cut = [], 0
        for i, sentence in enumerate(self.sentences):
            owners, ids = encoded.word_ids(i), encoded["input_ids"][i]
            if len(ids) == max_length:
                self.n_cut += encoded.encodings[i].overflowing != []
            if task == "sentiment":
                self.examples.append(Example(ids, [0], [index[sentence.labels[0]]], [0]))
                continue
            starts = {}  # word -> its first sub-word
            for position, word in enumerate(owners):
                if word is not None:
                    starts.setdefault(word, position)
            labels_of = [index[sentence.labels[word]] for word in starts]
            self.examples.append(Example(ids, list(starts.values()), labels_of, list(starts)))

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        chosen = [self.examples[i] for i in indices]
        length = max(len(e.ids) for e in chosen)
        padded = any(len(e.ids) < length for e in chosen)
        ids = torch.tensor([e.ids + [self.pad] * (length - len(e.ids)) for e in chosen])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (length - len(e.ids)) for e in chosen]) if padded else None
        positions = torch.tensor([row * length + p for row, e in enumerate(chosen) for p in e.positions], dtype=torch.int64)
        labels = torch.tensor([label for e in chosen for label in e.labels], dtype=torch.int64)
        tensors = (None if t is None else t.to(device, non_blocking=True) for t in (ids, mask, positions, labels))
        return Batch(*tensors, [len(e.labels) for e in chosen])
