"""Cross-lingual learning: readers, labels on sub-words, the RTN, the meta-step, every method tiny, bad input."""

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

import evograd
from evograd.comparison import agreement
from evograd.lab.methods import MAIN
from metaxl import compare, data, plot, train
from metaxl.data import Batch, Examples, Sentence, toy_language
from metaxl.models import ONE_MASK, RTN, Tagger, encoder_fingerprint, load_encoder, longest, tiny_encoder
from tests.test_scripts import shell

LABELS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]

AROUND_THE_STEP = [m.name for m in train.METHODS.values() if m.around == "step"]
FINITE_HEAD = ("finite_difference", "head")  # refused


def tagger(rtn_layers=(2,), depth=2, dropout=0.0):
    config = XLMRobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=24, pad_token_id=1,
        max_position_embeddings=40, type_vocab_size=1, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return Tagger(XLMRobertaModel(config, add_pooling_layer=False), len(LABELS), rtn_layers, dropout)


def batch(n, lengths=(7, 9, 5, 9)):
    examples = Examples.__new__(Examples)
    examples.pad, examples.examples = 1, []
    for i in range(n):
        length = lengths[i % len(lengths)]
        ids = torch.randint(4, 50, (length,)).tolist()
        examples.examples.append(data.Example(ids, list(range(1, length - 1, 2)), [i % 7] * len(range(1, length - 1, 2)), []))
    return examples.batch(range(n), torch.device("cpu"))


def trainer(method, *extra, rtn_layers=(2,), depth=2, dropout=0.0):
    args = train.parse_args(["--method", method, "--device", "cpu", *extra])
    model = tagger(rtn_layers if train.METHODS[method].estimator else (), depth, dropout)
    return train.Trainer(args, model.train(), n_steps=10)


def step(n=4):
    return train.Step(batch(n), batch(n // 2), batch(n // 2))


# --- the meta-step -----------------------------------------------------------------------------------------------------


def uncached(step):
    """The two losses as functions of the whole model."""
    train_loss = lambda m: (
        F.cross_entropy(m(step.source, True), step.source.labels) + F.cross_entropy(m(step.target), step.target.labels)
    )
    return train_loss, lambda m: F.cross_entropy(m(step.val), step.val.labels)


@pytest.mark.parametrize(("depth", "rtn_layers"), [(1, (1,)), (2, (1,)), (2, (1, 2))])
@pytest.mark.parametrize("method", ["evograd", "evograd_guided", "mixed_mode", "second_order"])
def test_cached_features_change_nothing(method, depth, rtn_layers, float64):
    wide = ["--radius", "0.1"] if method == "evograd_guided" else []  # at which rounding is small
    t = trainer(method, "--perturb", "head", *wide, rtn_layers=rtn_layers, depth=depth)
    s, head = step(), ["head.weight", "head.bias"]
    torch.manual_seed(3)
    cached = t.hypergradient(s)
    torch.manual_seed(3)
    here = {"lookahead": None} if t.meta.around == "step" else {}
    expected = t.meta.estimator(*uncached(s), t.model, t.hyperparameters, parameters=head, **here)
    assert len(cached.grads) == 4 * len(rtn_layers) + (len(rtn_layers) > 1)
    for ours, theirs in zip(cached.grads, expected.grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert any(g.abs().max() > 1e-9 for g in cached.grads)
    torch.testing.assert_close(cached.candidate_losses, expected.candidate_losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(cached.val_loss, expected.val_loss, rtol=1e-12, atol=0)


def test_a_perturbed_head_runs_the_encoder_once_for_each_batch_without_graph():
    t = trainer("evograd", "--n-candidates", "5")
    outputs = []
    t.model.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output.last_hidden_state))
    t.hypergradient(step())
    assert len(outputs) == 3
    assert not any(o.requires_grad for o in outputs)
    assert all(p.requires_grad for p in t.model.parameters())


@pytest.mark.parametrize("rtn_layers", [(2,), (1,), (1, 2)])
def test_mixed_mode_is_t1_t2_of_the_whole_model(rtn_layers, float64):
    t, s = trainer("second_order", "--inner-lr", "0.1", rtn_layers=rtn_layers), step()
    exact = t.hypergradient(s)
    with sdpa_kernel(SDPBackend.MATH):
        mixed = evograd.mixed_mode(*uncached(s), t.model, t.hyperparameters, inner_lr=0.1, lookahead="sgd")
    for ours, theirs in zip(mixed.grads, exact.grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "perturb"),
    [(method, perturb) for method in AROUND_THE_STEP for perturb in ("head", "all") if (method, perturb) != FINITE_HEAD],
)
def test_guided_and_mixed_mode_look_ahead_by_the_step_that_was_made(method, perturb):
    t = trainer(method, "--perturb", perturb)
    seen, estimator = {}, t.meta.estimator

    def spy(*closures, parameters, lookahead, **rest):
        seen.update(before=parameters, after={n: p.detach().clone() for n, p in lookahead.items()})
        return estimator(*closures, parameters=parameters, lookahead=lookahead, **rest)

    t.meta.estimator = spy
    start = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.step(step())
    prefix = "head." if perturb == "head" else ""
    names = [n for n, _ in t.model.named_parameters() if n.startswith(prefix) and "rtn" not in n]
    assert sorted(prefix + n for n in seen["before"]) == sorted(names)
    for name in names:
        assert torch.equal(seen["before"][name.removeprefix(prefix)], start[name])
    assert not torch.equal(seen["before"]["weight" if prefix else "head.weight"], start["head.weight"] * 0)
    assert not torch.equal(seen["after"]["weight" if prefix else "head.weight"], start["head.weight"])


def test_the_step_moves_the_model_by_its_loss_and_the_rtn_by_the_hypergradient():
    t = trainer("evograd")
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.meta.estimator = lambda *a, **k: types.SimpleNamespace(grads=[torch.ones_like(h) for h in t.hyperparameters])
    t.step(step())
    for name, p in t.model.named_parameters():
        if "rtn" in name:  # Adam's first step is its learning rate, against the gradient
            torch.testing.assert_close(p, before[name] - t.args.rtn_lr, rtol=0, atol=1e-6)
        elif "word_embeddings" not in name and "key.bias" not in name:
            assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("extra", [["--accumulate", "3"], ["--gradient-checkpointing"]])
@pytest.mark.parametrize("method", ["joint_training", "evograd", "evograd_guided"])
def test_accumulation_and_checkpointing_change_nothing(method, extra, float64):
    result = []
    for flags in ([], extra):
        torch.manual_seed(1)
        t = trainer(method, "--perturb", "all", *flags) if method == "evograd_guided" else trainer(method, *flags)
        torch.manual_seed(2)
        s = step(8)
        torch.manual_seed(3)
        losses = [t.step(s), t.step(s)]
        result.append((losses, t.model.state_dict()))
    torch.testing.assert_close(result[0][0], result[1][0], rtol=1e-9, atol=0)
    for name, value in result[0][1].items():
        if "key.bias" not in name:  # its gradient is rounding alone, which Adam makes a step of
            torch.testing.assert_close(value, result[1][1][name], rtol=1e-6, atol=1e-7, msg=name)


def test_gradient_checkpointing_is_on_in_the_model_s_update_alone():
    t = trainer("evograd_guided", "--gradient-checkpointing")
    seen, layer = [], t.model.encoder.encoder.layer[0]
    layer.register_forward_pre_hook(lambda m, i: seen.append(m.gradient_checkpointing))
    t.step(step())
    assert seen[:2] == [True, True]
    assert len(seen) > 4
    assert seen.count(True) <= 4  # recomputed in the backward pass
    assert not any(seen[4:])


@pytest.mark.parametrize("method", ["evograd", "mixed_mode"])
def test_gradient_checkpointing_leaves_no_hooks(method):
    t = trainer(method, "--gradient-checkpointing")
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = lambda: [(name, kind, len(getattr(m, kind))) for name, m in t.model.named_modules() for kind in kinds]
    before = hooks()
    for _ in range(2):
        t.step(step())
        assert hooks() == before
        embedded = t.model.encoder.get_input_embeddings()(torch.tensor([[1, 2]]))
        with torch.no_grad():
            assert not t.model.encoder.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad
    assert embedded.requires_grad


def test_amp_is_for_the_model_s_update_alone():
    t = trainer("evograd", "--amp")
    dtypes = []
    t.model.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    t.step(step())
    assert dtypes[:2] == [torch.bfloat16] * 2
    assert set(dtypes[2:]) == {torch.float32}
    assert len(dtypes) > 4


@pytest.mark.parametrize("rtn_layers", [(2,), (1,), (1, 2)])
@pytest.mark.parametrize("method", ["evograd_guided", "finite_difference"])
def test_rtns_that_see_the_models_states_make_differences_of_candidates_t1_t2(method, rtn_layers, float64):
    """No gradient passes an RTN's input; between candidates with their own inputs a difference is there all the same."""
    t, s = trainer(method, "--inner-lr", "0.1", "--radius", "1e-4", rtn_layers=rtn_layers), step()
    exact = trainer("second_order", "--inner-lr", "0.1", rtn_layers=rtn_layers)
    exact.model.load_state_dict(t.model.state_dict())
    expected = exact.hypergradient(s).grads
    held = t.rtn_inputs(s.source)
    with sdpa_kernel(SDPBackend.MATH):
        train_loss, val_loss = t.losses(s)
        found = {
            name: t.meta.estimator(
                lambda m, h=h: train_loss(m, h), val_loss, t.model, t.hyperparameters, lookahead="sgd"
            ).grads
            for name, h in {"model": held, "candidate": None}.items()
        }
    assert agreement(found["model"], expected)["cosine"] > 0.9999
    assert agreement(found["model"], expected)["norm"] == pytest.approx(1, rel=1e-3)
    assert agreement(found["candidate"], expected)["cosine"] < 0.999


def spy_on_held(t, got):
    """got: what each call of the training loss is told that the RTNs see."""
    losses = t.losses

    def spied(step):
        train_loss, val_loss = losses(step)
        return lambda model, held=None: (got.append(held), train_loss(model, held))[1], val_loss

    t.losses = spied


@pytest.mark.parametrize("rtn_layers", [(2,), (1,), (1, 2)])
@pytest.mark.parametrize("extra", [[], ["--accumulate", "3"], ["--amp"]])
def test_the_training_step_shows_what_rtns_see(rtn_layers, extra):
    t, s, got = trainer("evograd_guided", *extra, rtn_layers=rtn_layers), step(), []
    spy_on_held(t, got)
    expected = t.rtn_inputs(s.source)
    t.step(s)
    held = got.pop(0)
    assert got and all(h is held for h in got)  # the other candidate's, and that of the pass at θ where one is made
    assert len(held) == len(rtn_layers)
    for seen, at_theta in zip(held, expected):
        assert seen.dtype == torch.float32 and not seen.requires_grad
        torch.testing.assert_close(seen, at_theta, rtol=1e-4, atol=1e-5 if "--amp" not in extra else 0.1)
    t, got = trainer("evograd_guided", "--rtn-input", "candidate", rtn_layers=rtn_layers), []
    spy_on_held(t, got)
    t.step(s)
    assert got[0] is None


def test_candidates_lie_where_the_rtn_inputs_were_seen():
    t, seen = trainer("evograd", "--perturb", "all", "--rtn-input", "model"), {}
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    estimator = t.meta.estimator
    t.meta.estimator = lambda *problem, **around: (seen.update(around), estimator(*problem, **around))[1]
    t.step(step())
    assert set(seen) == {"parameters"}
    assert all(torch.equal(p, before[name]) for name, p in seen["parameters"].items())
    assert not torch.equal(before["head.weight"], t.model.head.weight)


# --- the RTN -----------------------------------------------------------------------------------------------------------


def test_rtn_is_a_gated_residual_on_a_detached_input(float64):
    rtn, x = RTN(6), torch.randn(4, 6, requires_grad=True)
    hg = F.relu(x @ rtn.inner.weight.T) @ rtn.outer.weight.T
    expected = x + 0.25 * torch.sigmoid(hg[:, 6:]) * hg[:, :6]
    torch.testing.assert_close(rtn(x, 0.25), expected)
    (gradient,) = torch.autograd.grad(rtn(x).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))
    assert rtn.inner.weight.shape == (3, 6)
    assert rtn.outer.weight.shape == (7, 3)
    assert rtn.outer.bias.abs().max() == 0


def test_rtns_work_on_source_sentences_alone_and_share_softmax_weights():
    model, b = tagger((1, 2)).eval(), batch(3)
    plain, transformed = model(b), model(b, transform=True)
    assert not torch.allclose(plain, transformed)
    assert torch.equal(plain, model(b))
    with torch.no_grad():
        model.alpha.copy_(torch.tensor([-50.0, 50.0]))
    one = tagger((2,)).eval()
    one.load_state_dict({n.replace(".layer.0.layer.", ".layer.0."): p for n, p in model.state_dict().items()}, strict=False)
    torch.testing.assert_close(model(b, transform=True), one(b, transform=True))


# --- data --------------------------------------------------------------------------------------------------------------


def test_the_first_sub_word_of_a_word_carries_its_label():
    sentences = toy_language("north")["train"][:200]
    encoder, tokenizer = tiny_encoder(sentences)
    examples = Examples(sentences, tokenizer, LABELS, 64, "ner")
    assert longest(encoder, tokenizer) == 128
    several = 0
    for sentence, example in zip(sentences, examples.examples):
        tokens = tokenizer.convert_ids_to_tokens(example.ids)
        assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
        starts = [*example.positions, len(tokens) - 1]
        assert ["".join(tokens[a:b]) for a, b in zip(starts, starts[1:])] == sentence.words
        assert [LABELS[i] for i in example.labels] == sentence.labels
        several += len(tokens) - 2 > len(sentence.words)
    assert several > 20


def test_a_batch_is_padded_and_split_without_change():
    b = batch(4)
    assert b.input_ids.shape == (4, 9)
    assert torch.equal(b.attention_mask.sum(1), torch.tensor([7, 9, 5, 9]))
    model = tagger().eval()
    whole = model(b)
    for n in (2, 3, 9):
        parts = b.split(n)
        assert len(parts) == min(n, 4)
        torch.testing.assert_close(torch.cat([model(part) for part in parts]), whole)
        assert torch.equal(torch.cat([part.labels for part in parts]), b.labels)
    assert batch(2, lengths=(6,)).attention_mask is None


def test_a_part_without_padding_has_no_mask():
    b = batch(4)
    assert [part.attention_mask is None for part in b.split(4)] == [length == 9 for length in (7, 9, 5, 9)]


@pytest.mark.parametrize("kind", ONE_MASK)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_as_attention_takes_them_give_the_numbers_of_those_that_the_encoder_makes(kind, attention):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    if kind == "distilbert":
        sizes = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    config = AutoConfig.for_model(kind, vocab_size=50, max_position_embeddings=40, pad_token_id=1, **sizes)
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config, attn_implementation=attention).eval()
    model = Tagger(encoder, len(LABELS)).eval()
    lengths = torch.tensor([30, 12, 5])
    mask, ids = torch.arange(30) < lengths[:, None], torch.randint(2, 50, (3, 30))
    b = Batch(ids, mask, torch.arange(30), torch.zeros(30, dtype=torch.int64), [30, 0, 0], lengths.tolist())
    assert model.square_masks == (attention == "sdpa")
    found = encoder(input_ids=ids, attention_mask=model.mask(b)).last_hidden_state
    assert torch.equal(found, encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
    assert not torch.equal(found, encoder(input_ids=ids).last_hidden_state)


def test_words_that_are_cut_off_count_as_o():
    sentences = toy_language("north")["train"][:20]
    encoder, tokenizer = tiny_encoder(sentences)
    examples = Examples(sentences, tokenizer, LABELS, 5, "ner")
    assert examples.n_cut == 20
    model = Tagger(encoder, len(LABELS))
    with torch.no_grad():
        model.head.bias[5] = 100.0
    for tags, example in zip(train.predict(model, examples, torch.device("cpu"), LABELS), examples.examples):
        assert [i for i, tag in enumerate(tags) if tag != "O"] == example.words
        assert set(tags) == {"B-PER", "O"}


def test_f1_is_of_whole_entities():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"]]
    assert train.f1("ner", gold, gold) == 100
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "B-ORG"]]  # 2 of 3 found, 2 of 4 right
    assert train.f1("ner", gold, predicted) == pytest.approx(100 * 4 / 7)
    assert train.f1("ner", gold, [["O"] * 4, ["O"] * 2]) == 0
    two = [["positive"], ["negative"], ["negative"], ["negative"]]
    assert train.f1("sentiment", two, [["negative"]] * 4) == pytest.approx(100 * (6 / 7) / 2)


def test_every_method_sees_the_same_sentences():
    seen = {}
    for method in train.METHODS:
        args = train.parse_args(["--method", method, "--device", "cpu", "--batch-size", "4"])

        class Spy(list):
            def batch(self, indices, device):
                return list(indices)

        some = train.Steps(args, Spy(range(30)), Spy(range(9)))
        seen[method] = [(s.source, s.target + (s.val or [])) for s, _ in zip(some, range(20))]
        halves = [len(s.target) for s, _ in zip(some, range(3))]
        assert halves == ([2, 2, 2] if train.METHODS[method].estimator else [4, 4, 4])
    assert all(order == seen["evograd"] for order in seen.values())
    assert len({str(s) for s, _ in seen["evograd"]}) == 20


def write_ner(root, language, n=30, prefix=True, kind="north"):
    folder = root / language
    folder.mkdir(parents=True)
    for split in data.SPLITS:
        blocks = (
            "".join(f"{language + ':' if prefix else ''}{w}\t{t}\n" for w, t in zip(s.words, s.labels))
            for s in toy_language(kind)[split][:n]
        )
        (folder / split).write_text("\n".join(blocks), encoding="utf-8")


@pytest.mark.parametrize("prefix", [True, False])
def test_bio_files_are_read_as_they_were_written(prefix, tmp_path):
    write_ner(tmp_path, "aa", prefix=prefix)
    assert data.read_split("ner", str(tmp_path), "aa", "dev") == toy_language("north")["dev"][:30]
    (tmp_path / "aa" / "dev").write_text("aa:aa:b\tO\n:\tB-LOC\n \n\nNew York\tI-LOC", encoding="utf-8")
    read = data.read_split("ner", str(tmp_path), "aa", "dev")
    assert read == [Sentence(["aa:b", ":"], ["O", "B-LOC"]), Sentence(["New York"], ["I-LOC"])]


CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n"
CONLL += "-DOCSTART- -X- -X- O\n\n# NN B-NP O\nPeter NNP B-NP B-PER\n"
READ = [(["EU", "rejects"], ["B-ORG", "O"]), (["#", "Peter"], ["O", "B-PER"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONLL, READ),
        (CONLL.replace(" ", "\t").replace("\n", "\r\n"), READ),
        ("# text = Vitamin O\n# Vitamin O\nVitamin  O\n# O\n", [(["Vitamin", "#"], ["O", "O"])]),
        ("#\thttp://a.b [2009]\nNew York\tx\tB-LOC\t\n", [(["New York"], ["B-LOC"])]),
        ("\ufeffa\tO\n", [(["a"], ["O"])]),
        ("a\u2028b\x85c\x0bd\x1ce\xa0f\tB-PER\ng\tO\n", [(["a\u2028b\x85c\x0bd\x1ce\xa0f", "g"], ["B-PER", "O"])]),
        ("a\xa0b O\n\u3000 O\n", [(["a\xa0b", "\u3000"], ["O", "O"])]),
        ("a\tO\xa0\n\u3000\nb\tO\n", [(["a"], ["O"]), (["b"], ["O"])]),
        ("#\tO\n\u200b\tO\n", [(["#", "\u200b"], ["O", "O"])]),
    ],
)
def test_columns_are_read_as_the_field_reads_them(text, expected, tmp_path):
    """No column but the first comes into a word: the others hold gold tags, too."""
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "train").write_bytes(text.encode())
    assert data.read_split("ner", str(tmp_path), "de", "train") == [Sentence(*pair) for pair in expected]


def test_kinds_that_training_lacks_are_said():
    sentence = lambda *kinds: Sentence(["x"] * len(kinds), [f"B-{kind}" for kind in kinds])
    corpus = data.Corpus([sentence("PER")], {"train": [sentence("PER", "DATE")], "dev": [], "test": [sentence("ORG")]}, [])
    never, few = corpus.remarks()
    assert "entities ORG: no training sentence has one" in never
    assert "entities DATE: no source sentence has one; only the 1 target sentences" in few
    corpus.target["test"], corpus.source = [sentence("DATE")], [sentence("DATE", "PER")]
    assert corpus.remarks() == []


def test_words_without_a_sub_word_are_o_and_teach_nothing():
    sentences = [*toy_language("north")["train"][:20], Sentence(["\u200b", ""], ["B-PER", "O"])]
    encoder, tokenizer = tiny_encoder(sentences[:20])
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("\u200b", "")
    examples = Examples(sentences, tokenizer, LABELS, 64, "ner")
    assert examples.examples[20].positions == [] and examples.examples[0].positions
    model = Tagger(encoder, len(LABELS))
    assert train.predict(model, examples, torch.device("cpu"), LABELS)[20] == ["O", "O"]
    for indices in ([20, 0], [20]):
        parts = examples.batch(indices, torch.device("cpu")).split(2)
        losses = [train.cross_entropy(model(part), part) for part in parts]
        assert losses[0].item() == 0 and losses[0].requires_grad
        assert torch.stack(losses).isfinite().all()
        sum(losses).backward()
    whole = examples.batch([20, 0], torch.device("cpu"))
    model.eval()
    in_parts = sum(train.cross_entropy(model(part), part) for part in whole.split(2))
    torch.testing.assert_close(in_parts, train.cross_entropy(model(whole), whole))


def test_test_sentences_and_evaluations_can_be_fewer(tmp_path, monkeypatch, capsys):
    predicted, predict = [], train.predict
    spied = lambda model, some, *args, **settings: (predicted.append(len(some)), predict(model, some, *args, **settings))[1]
    monkeypatch.setattr(train, "predict", spied)
    record = run(tmp_path, "joint_training", "--epochs", "3", "--eval-every", "2", "--test-size", "11")
    assert predicted == [20, 20, 11]  # dev after epochs 2 and 3, test
    assert record["config"]["test_size"] == 11
    assert [f1 is not None for f1 in record["metrics"]["dev_f1_epochs"]] == [False, True, True]
    assert "nothing was found rightly" in capsys.readouterr().out


def test_a_run_s_sentences_are_drawn_by_its_seed(tmp_path):
    draw = lambda seed: data.load("toy", "", "north", "south", source_size=50, target_size=10, dev_size=7, seed=seed)
    one, again, other = draw(1), draw(1), draw(2)
    assert one == again
    assert one.source != other.source
    assert one.target["train"] != other.target["train"]
    assert (len(one.source), *map(len, one.target.values())) == (50, 10, 7, 400)
    assert one.labels == LABELS


def test_wikiann_is_written_as_files(tmp_path, monkeypatch):
    asked = []

    class Split(list):
        feature = types.SimpleNamespace(names=["O", "B-PER", "I-PER"])
        features = {"ner_tags": types.SimpleNamespace(feature=feature)}

    def load_dataset(name, language):
        asked.append((name, language))
        rows = [{"tokens": ["Ana", "Ru", "x"], "ner_tags": [1, 2, 0]}, {"tokens": ["y"], "ner_tags": [0]}]
        return {split: Split(rows) for split in ("train", "validation", "test")}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data.download_wikiann(str(tmp_path), "qu")
    data.download_wikiann(str(tmp_path), "qu")
    assert asked == [("unimelb-nlp/wikiann", "qu")]
    expected = [Sentence(["Ana", "Ru", "x"], ["B-PER", "I-PER", "O"]), Sentence(["y"], ["O"])]
    assert data.read_split("ner", str(tmp_path), "qu", "dev") == expected


def test_wikiann_is_not_mixed_with_files_that_are_there(tmp_path, monkeypatch):
    load_dataset = lambda *name: pytest.fail("fetched")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (tmp_path / "qu").mkdir()
    (tmp_path / "qu" / "train").write_text("mine")
    with pytest.raises(FileExistsError, match="qu has train already and not the others of train, dev, test"):
        data.download_wikiann(str(tmp_path), "qu")
    assert (tmp_path / "qu" / "train").read_text() == "mine"


def test_wikiann_that_is_cut_off_leaves_no_file(tmp_path, monkeypatch):
    class Cut(dict):
        features = {"ner_tags": types.SimpleNamespace(feature=types.SimpleNamespace(names=["O"]))}

        def __iter__(self):
            yield {"tokens": ["a"], "ner_tags": [0]}
            raise OSError("gone")

    load_dataset = lambda *name: {"train": Cut(), "validation": Cut(), "test": Cut()}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(OSError, match="gone"):
        data.download_wikiann(str(tmp_path), "qu")
    assert not list((tmp_path / "qu").iterdir())


def test_a_run_is_one_of_its_files(tmp_path):
    for folder, kind in (("a", "south"), ("b", "north"), ("c", "south")):
        write_ner(tmp_path / folder, "en", n=5)
        write_ner(tmp_path / folder, "xx", n=5, kind=kind)
    a, b, c = (data.data_fingerprint("ner", str(tmp_path / folder), "en", "xx") for folder in "abc")
    assert a == c != b
    (tmp_path / "c" / "xx" / "test").write_text("a\tO\n")
    assert data.data_fingerprint("ner", str(tmp_path / "c"), "en", "xx") not in (a, b)
    assert data.data_fingerprint("toy", "", "north", "south") is None
    (tmp_path / "c" / "xx" / "test").unlink()
    assert data.data_fingerprint("ner", str(tmp_path / "c"), "en", "xx") is None


# --- whole runs --------------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--epochs", "2", "--source-size", "36", "--target-size", "12", "--dev-size", "20"]


def run(tmp_path, method, *extra):
    out = tmp_path / "runs.jsonl"
    train.main(["--method", method, "--out", str(out), *SMALL, *extra])
    return json.loads(out.read_text().splitlines()[-1])


@pytest.fixture
def short_test_set(monkeypatch):
    short = lambda name: {split: some[:30] if split == "test" else some for split, some in toy_language(name).items()}
    monkeypatch.setattr(data, "toy_language", short)


@pytest.mark.usefixtures("short_test_set")
@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_runs_and_leaves_a_record(method, tmp_path, capsys):
    flags = ["--inner-steps", "2"] if method in ("neumann", "conjugate_gradient") else []
    record = run(tmp_path, method, *flags)
    assert record["experiment"] == "metaxl"
    assert record["config"]["method"] == method
    assert "/" not in json.dumps(record["config"])
    assert len(record["metrics"]["dev_f1_epochs"]) == 2
    assert record["metrics"]["dev_f1"] == max(record["metrics"]["dev_f1_epochs"])
    assert {"seconds", "seconds_per_step", "peak_bytes", "flops"} <= set(record["cost"])
    if train.METHODS[method].estimator:
        assert record["metrics"]["rtn_moved"] > 1e-3
        assert set(record["metrics"]["gates"]) == {"north", "south"}
        assert 0 < record["metrics"]["gates"]["north"]["2"] < 1
    else:
        assert "gates" not in record["metrics"]
        assert record["config"]["rtn_lr"] is None
    assert f"metaxl toy north-south {method} seed 1: test F1" in capsys.readouterr().out


def test_training_learns_and_dev_f1_chooses_the_parameters(tmp_path, capsys):
    record = run(tmp_path, "joint_training", "--epochs", "4", "--source-size", "240", "--target-size", "100", "--lr", "3e-3")
    metrics = record["metrics"]
    assert metrics["dev_f1"] > 20
    assert metrics["train_loss_epochs"][-1] < 0.5 * metrics["train_loss_epochs"][0]
    assert metrics["dev_f1_epochs"][metrics["best_epoch"] - 1] == metrics["dev_f1"]


@pytest.mark.usefixtures("short_test_set")
def test_same_seed_same_run_and_flags_reach_it(tmp_path, capsys):
    usual, again = run(tmp_path, "evograd", "--seed", "5"), run(tmp_path, "evograd", "--seed", "5")
    assert usual["metrics"] == again["metrics"]
    for flags in (["--n-candidates", "4"], ["--perturb", "all"], ["--rtn-layers", "1", "2"], ["--rtn-lr", "1e-4"]):
        other = run(tmp_path, "evograd", "--seed", "5", *flags)
        assert other["metrics"]["rtn_moved"] != usual["metrics"]["rtn_moved"], flags
    plot.main([str(tmp_path / "runs.jsonl"), "--out-dir", str(tmp_path)])
    for name in ("dev_f1", "gates"):
        assert (tmp_path / f"metaxl_{name}_toy.png").read_bytes().startswith(b"\x89PNG")


def save_bert(folder, sentences):
    """A BERT folder, with a pooler, as it lies on disk after a download."""
    _, tokenizer = tiny_encoder(sentences)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=60, pad_token_id=1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("method", ["evograd", "second_order"])
def test_an_encoder_folder_and_bio_files(method, tmp_path, capsys):
    write_ner(tmp_path, "en", n=40)
    write_ner(tmp_path, "xx", kind="south")
    save_bert(tmp_path / "hub" / "bert", toy_language("north")["train"][:100])
    flags = ["--data", "ner", "--data-dir", str(tmp_path), "--target", "xx", "--max-length", "40"]
    record = run(tmp_path, method, "--encoder", str(tmp_path / "hub" / "bert"), *flags)
    assert record["config"]["encoder"] == "hub/bert"
    assert list(record["metrics"]["gates"]["xx"]) == ["3"]
    assert str(tmp_path) not in json.dumps(record["config"])


def test_two_encoders_of_one_name_are_two_runs(tmp_path, capsys):
    sentences = toy_language("north")["train"][:100]
    folder, flags = tmp_path / "hub" / "bert", ["--max-length", "40", "--encoder", str(tmp_path / "hub" / "bert")]
    records = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        save_bert(folder, sentences)
        records.append(run(tmp_path, "joint_training", *flags, "--skip-done"))
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 and capsys.readouterr().out.count("nothing to do") == 1  # the second is the first again
    configs = [json.loads(line)["config"] for line in lines]
    assert len({config.pop("encoder_fingerprint") for config in configs}) == 2 and configs[0] == configs[1]
    (folder / "tokenizer_config.json").write_text("{}")
    assert encoder_fingerprint(str(folder)) != records[-1]["config"]["encoder_fingerprint"]
    assert encoder_fingerprint("tiny") is encoder_fingerprint("xlm-roberta-base") is None


def write_sentiment(root, language, words):
    (root / language).mkdir()
    for split in data.SPLITS:
        lines = (f"{words[i % 2]} {words[2 + i % 3]} film\t{data.SENTIMENTS[i % 2]}" for i in range(40))
        (root / language / split).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("method", ["target_only", "evograd"])
def test_sentiment(method, tmp_path, capsys):
    write_sentiment(tmp_path, "en", ["bad", "good", "old", "new", "long"])
    write_sentiment(tmp_path, "fa", ["zesht", "khub", "kohne", "no", "deraz"])
    flags = ["--data", "sentiment", "--data-dir", str(tmp_path), "--encoder", "tiny", "--max-length", "20", "--lr", "3e-3"]
    record = run(tmp_path, method, *flags, "--epochs", "12")
    assert record["metrics"]["test_f1"] > 90
    assert record["config"]["target"] == "fa"


@pytest.mark.usefixtures("fewer_estimates")
def test_quality_is_logged(tmp_path, capsys):
    metrics = run(tmp_path, "evograd", "--log-quality", "30")["metrics"]
    assert metrics["cosine"]["mixed_sgd"] > 0.999
    assert {"evograd_k2_head", "guided_sgd", "neumann"} <= set(metrics["cosine"])
    assert len(metrics["quality_steps"]) == len(metrics["quality_cosines"]["guided_made"])


# --- cost --------------------------------------------------------------------------------------------------------------


def test_evograd_costs_little_more_than_joint_training_of_xlm_r_base(monkeypatch):
    """With four of its twelve layers, which is less to wait for."""
    monkeypatch.setitem(compare.XLM_R, "base", {**compare.XLM_R["base"], "num_hidden_layers": 4})
    costs = compare.architecture_costs("base", length=64, batch_size=12, methods=("evograd",))
    assert costs["plain"]["peak_bytes"] > 4 * 4 * 220e6  # parameters, gradients and Adam's two averages
    assert costs["evograd"]["peak_over_plain"] <= 1.05
    assert costs["evograd"]["flops_over_plain"] <= 1.3


def test_compare_prints_and_writes(tmp_path, capsys, monkeypatch):
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setattr(compare, "XLM_R", {"base": small})
    flags = ["--device", "cpu", "--repeats", "1", "--length", "16", "--batch-size", "4", "--architectures", "base"]
    compare.main([*flags, "--json", str(tmp_path / "cost.json"), "--out", str(tmp_path / "runs.jsonl")])
    printed = capsys.readouterr().out
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert list(cost["methods"]) == ["plain", *MAIN]
    assert all(name in printed for name in cost["methods"])
    assert (
        cost["methods"]["evograd"]["flops"] < cost["methods"]["mixed_mode"]["flops"] < cost["methods"]["second_order"]["flops"]
    )
    (architecture,) = cost["architectures"]
    assert architecture["encoder"] == "xlm-roberta-base"
    assert architecture["methods"]["plain"]["flops_over_plain"] == 1
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["experiment"] for line in lines] == ["metaxl_architecture", "metaxl_cost"]


def test_compare_without_time_takes_the_architectures_alone(tmp_path, monkeypatch, refused):
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setattr(compare, "XLM_R", {"base": small})
    flags = [
        "--methods",
        "evograd",
        "--device",
        "cpu",
        "--length",
        "16",
        "--batch-size",
        "4",
        "--architectures",
        "base",
        "--fake",
    ]
    compare.main([*flags, "--out", str(tmp_path / "runs.jsonl")])
    (line,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert line["experiment"] == "metaxl_architecture"
    refused(compare.main, [*flags, "--json", str(tmp_path / "cost.json")], "--json given, but --fake")
    refused(compare.main, [*flags, "--encoder", "nowhere"], "--encoder given, but --fake")


# --- the script and bad input ------------------------------------------------------------------------------------------


def test_run_prints_a_command_for_each_language_method_and_seed():
    done = shell("metaxl/run.sh", "--print", "--data", "ner", "--data-dir", "a folder")
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 8 * 6 * 5
    assert all("--data ner --data-dir a\\ folder" in line for line in lines)
    assert {line.split("--target ")[1].split()[0] for line in lines} == set("qu cdo ilo xmf mhr mi tk gn".split())
    assert len(shell("metaxl/run.sh", "--print", TARGETS="south", SEEDS="1").stdout.splitlines()) == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\tO\n\nb\tPER\n", ["xx/train, line 3", "'PER' is not BIO", "B-TYPE"]),
        ("a\tO\nb O\n", ["xx/train, line 2", "no tab in 'b O'", "token<TAB>tag"]),
        ("a NN O\nb O\n", ["xx/train, line 2", "2 columns in 'b O'", "3 in the file's first line"]),
        ("a NN O\nb\n", ["xx/train, line 2", "one column in 'b'", "tag last"]),
        ("New York O\nb O\n", ["xx/train, line 2", "2 columns in 'b O'", "the word first and its tag last"]),
        ("a B-PER NN\nb O NN\n", ["xx/train, line 1", "the tag 'NN' is not BIO"]),
        ("#\thttp://a\n1\tAnna\tB-PER\tO\n2\tx\tO\tO\n", ["xx/train, line 2", "first column counts the words", "GermEval"]),
        (b"a\tO\nb\tO\n\xe4\tO\n", ["xx/train is not UTF-8", "line 3"]),
        ("\n\n", ["xx/train holds no sentence"]),
        ("a\tO\n", ["--target-size 12", "xx/train", "1 sentences"]),
        (b"a\tO\n\xff\tO\n", ["xx/train is not UTF-8"]),
        (None, ["has no file 'train'", "dev, test"]),
    ],
)
def test_bad_files(text, words, tmp_path, refused):
    write_ner(tmp_path, "en", n=40)
    write_ner(tmp_path, "xx")
    file = tmp_path / "xx" / "train"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = ["--method", "evograd", "--data", "ner", "--data-dir", str(tmp_path), "--target", "xx", "--encoder", "tiny"]
    refused(train.main, [*arguments, "--device", "cpu", *SMALL, "--out", str(tmp_path / "runs.jsonl")], words)


def encoder_folder(folder, change):
    """A small BERT's folder after `change` of (config, model, tokenizer)."""
    _, tokenizer = tiny_encoder(toy_language("north")["train"][:50])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=60, pad_token_id=1,
    )  # fmt: skip
    model, tokenizer = change(config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def smaller(config, tokenizer):
    config.vocab_size = 20
    return BertModel(config), tokenizer


def with_a_decoder(config, tokenizer):
    from transformers import T5Config, T5Model

    return T5Model(T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), tokenizer


def without_layers(config, tokenizer):
    from transformers import CLIPConfig, CLIPModel

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = {**small, "vocab_size": len(tokenizer)}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4})), tokenizer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (smaller, ["its tokenizer gives the sub-word", "the encoder knows 20"]),
        (with_a_decoder, ["is an encoder with a decoder (t5)", "encoders alone"]),
        (without_layers, ["CLIPModel", "is no encoder of text"]),
    ],
)
def test_encoders_that_do_not_fit_are_refused_before_the_run(change, words, tmp_path, refused, capsys):
    folder = encoder_folder(tmp_path / "encoder", change)
    arguments = ["--encoder", folder, "--max-length", "40", *SMALL, "--out", str(tmp_path / "runs.jsonl")]
    refused(train.main, arguments, ["--encoder", *words])


def test_an_encoder_without_position_table_and_padding_token(tmp_path, capsys):
    from transformers import RoFormerConfig, RoFormerModel

    def computed(config, tokenizer):
        tokenizer.pad_token, tokenizer.model_max_length = None, int(1e30)
        small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        return RoFormerModel(RoFormerConfig(vocab_size=len(tokenizer), max_position_embeddings=70, **small)), tokenizer

    folder = encoder_folder(tmp_path / "encoder", computed)
    encoder, tokenizer = load_encoder(folder)
    assert longest(encoder, tokenizer) == 70 and tokenizer.pad_token_id is None
    encoder.config.max_position_embeddings = -1
    assert longest(encoder, tokenizer) == 1_000_000
    assert run(tmp_path, "joint_training", "--encoder", folder, "--epochs", "1")["metrics"]["test_f1"] >= 0


def test_bad_sentiment_files(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "train").write_text("fine\tx\tpositive\n")
    with pytest.raises(ValueError, match="train, line 1: 3 columns in .*; each line must be text<TAB>label"):
        data.read_split("sentiment", str(tmp_path), "en", "train")
    (tmp_path / "en" / "train").write_text("fine\tpositive\nso so\tneutral\n")
    with pytest.raises(ValueError, match="train, line 2: the label 'neutral' is unknown; accepted are negative, positive"):
        data.read_split("sentiment", str(tmp_path), "en", "train")


def test_a_batch_is_what_it_says():
    b = batch(2, lengths=(5, 5))
    assert isinstance(b, Batch)
    assert b.counts == [2, 2]
    assert b.positions.tolist() == [1, 3, 6, 8]
