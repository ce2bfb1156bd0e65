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

from evograd.lab.data import fingerprint, sent
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
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")  # a byte-order mark is no part of the first word
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 text, in line {number}: {error}") from error
    # str.splitlines would also cut a line at Unicode's other separators, which words may hold.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return (_bio if data == "ner" else _sentiment)(path, lines, language)


def _bio(path: Path, lines: list[str], language: str) -> list[Sentence]:
    """`word<TAB>tag` or `language:word<TAB>tag` a line, an empty line after each sentence.

    Or more columns, with tabs or blanks between them, as CoNLL's files have them: the first is the word, the last its tag, and
    what lies between is not read. Lines with -DOCSTART- and comments (# where a sentence may begin) are left out.
    """
    is_empty = lambda line: not line.strip() or line.startswith("-DOCSTART-")
    first = next((line for line in lines if not is_empty(line) and not line.startswith("#")), "#\tO")
    tabs, width = "\t" in first, len(_columns(first, "\t" in first))
    sentences, words, tags = [], [], []
    for number, line in enumerate([*lines, ""], start=1):
        if is_empty(line):
            if words:
                sentences.append(Sentence(words, tags))
                words, tags = [], []
            continue
        where, columns = f"{path}, line {number}", _columns(line, tabs)
        if not words and _is_comment(line, columns, tabs, width):
            continue
        if len(columns) == 1:
            what = "no tab" if tabs or width == 1 else "one column"
            raise ValueError(f"{where}: {what} in {line[:60]!r}; each line must be token<TAB>tag, or columns with the tag last")
        if len(columns) != width:
            raise ValueError(
                f"{where}: {len(columns)} columns in {line[:60]!r}, and {width} in the file's first line; "
                "all lines must have the same, the word first and its tag last"
            )
        if not re.fullmatch(TAG, columns[-1]):
            raise ValueError(f"{where}: the tag {columns[-1]!r} is not BIO; accepted are O, B-TYPE and I-TYPE")
        words.append(columns[0].removeprefix(f"{language}:"))
        tags.append(columns[-1])
    counted = [s for s in sentences if s.words[:2] in (["0"], ["1"], ["0", "1"], ["1", "2"])]
    if width > 2 and len(counted) > len(sentences) / 2:
        raise ValueError(
            f"{path}, line {lines.index(first) + 1}: the first column counts the words, as in files of GermEval and CoNLL-U; "
            "the word must be the first column and its tag the last"
        )
    return sentences


TAG = r"O|[BI]-\S+"


def _columns(line: str, tabs: bool) -> list[str]:
    """Where tabs are between columns, blanks are of the words."""
    if not tabs:
        return re.split(r"[ \t]+", line.strip(" \t"))
    *columns, last = line.rstrip(" \t").split("\t")
    return [*columns, last.strip()]


def _is_comment(line: str, columns: list[str], tabs: bool, width: int) -> bool:
    """Whether a line begins with # and is no word: `# key = value`, or not in the form of the file's lines."""
    is_word = len(columns) == width and (tabs or re.fullmatch(TAG, columns[-1])) and not re.match(r"# *\w+ *= ", line)
    return line.startswith("#") and not is_word


def _sentiment(path: Path, lines: list[str], language: str) -> list[Sentence]:
    """`text<TAB>label` a line."""
    sentences = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            columns = _columns(line, tabs=True)
            if len(columns) != 2:
                what = "no tab" if len(columns) == 1 else f"{len(columns)} columns"
                raise ValueError(f"{path}, line {number}: {what} in {line[:60]!r}; each line must be text<TAB>label")
            text, label = columns
            if label not in SENTIMENTS:
                raise ValueError(f"{path}, line {number}: the label {label!r} is unknown; accepted are {', '.join(SENTIMENTS)}")
            sentences.append(Sentence(text.split(), [label]))
    return sentences


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

    def remarks(self) -> list[str]:
        """Of kinds of entities that training has little or nothing of: they count in F1 all the same."""
        kinds = {
            name: {tag[2:] for s in some for tag in s.labels if tag[:2] in ("B-", "I-")}
            for name, some in (("source", self.source), *self.target.items())
        }
        trained, tested = kinds["source"] | kinds["train"], kinds["dev"] | kinds["test"]
        never = "no training sentence has one, so none can be found, and they lower F1"
        few = f"no source sentence has one; only the {len(self.target['train'])} target sentences teach them"
        found = ((sorted(tested - trained), never), (sorted(kinds["train"] - kinds["source"]), few))
        return [f"entities {', '.join(names)}: {what}" for names, what in found if names]


def load(
    data: str,
    data_dir: str,
    source: str,
    target: str,
    *,
    source_size: int,
    target_size: int,
    dev_size: int | None,
    test_size: int | None = None,
    seed: int,
) -> Corpus:
    """Training sentences drawn by `seed`, and the first `dev_size` and `test_size` of the others (None: all)."""
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
    splits["dev"], splits["test"] = splits["dev"][:dev_size], splits["test"][:test_size]
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

    input_ids: (n, length), int64.  attention_mask: likewise, bool, or None where nothing is padded.
    positions: (w,), where in the flattened (n · length) the w labelled sub-words are.  labels: (w,), int64.
    counts: how many of these each sentence has.  lengths: how many sub-words.
    share: what this part's mean loss is multiplied by, so that the parts of a batch add up to the batch's mean loss.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    labels: Tensor
    counts: list[int]
    lengths: list[int]
    share: float = 1.0

    def split(self, n: int) -> list[Batch]:
        """At most n batches of about as many sentences each."""
        parts, length, rows = [], self.input_ids.shape[1], len(self.counts)
        n = min(n, rows)
        for a, b in ((i * rows // n, (i + 1) * rows // n) for i in range(n)):
            words = slice(sum(self.counts[:a]), sum(self.counts[:b]))
            mask = None if min(self.lengths[a:b]) == length else self.attention_mask[a:b]
            positions = self.positions[words] - a * length
            share = self.share * len(positions) / max(1, len(self.positions))
            of_each = self.counts[a:b], self.lengths[a:b]
            parts.append(Batch(self.input_ids[a:b], mask, positions, self.labels[words], *of_each, share))
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
        self.sentences, self.pad = list(sentences), tokenizer.pad_token_id or 0  # the attention mask hides whatever it is
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
            owners, ids = encoded.word_ids(i), encoded["input_ids"][i] or [self.pad]  # of words without a sub-word
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
        lengths = [len(e.ids) for e in chosen]
        length = max(lengths)
        ids = torch.tensor([e.ids + [self.pad] * (length - len(e.ids)) for e in chosen])
        mask = torch.arange(length) < torch.tensor(lengths)[:, None] if min(lengths) < length else None
        positions = torch.tensor([row * length + p for row, e in enumerate(chosen) for p in e.positions], dtype=torch.int64)
        labels = torch.tensor([label for e in chosen for label in e.labels], dtype=torch.int64)
        tensors = (None if t is None else sent(t, device) for t in (ids, mask, positions, labels))
        return Batch(*tensors, [len(e.labels) for e in chosen], lengths)
