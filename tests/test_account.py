"""REPRODUCTION.md: its tables agree with the result lines, and say something of every claim, table and figure of the paper."""

import json
import re
from statistics import fmean, stdev

import pytest

from evograd.lab import account, tables
from evograd.lab.records import read_runs
from evograd.lab.tables import Table
from tests.test_report import COMMITTED, ROOT

SPEC = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
TEXT = (ROOT / "REPRODUCTION.md").read_text(encoding="utf-8")
# What the account refers to and nobody has run; a run fills it in.
NOT_YET = {"{label-noise-cifar10-jpeg-60|cross-entropy, one seed, JPEG|last epoch, 40 % noise (%)}"}


def table(rows, header=("Method", "runs", "accuracy", "published", "F1"), n_labels=1):
    return Table("t", "x", "T", list(header), rows, None, [], n_labels=n_labels)


KNOWN = {
    "t": table([["a", "3", "91.0 ± 2.0", "90.2 ± 1.5", "–"], ["b", "3/1", "80.0", "–", "5.0"]]),
    "two": table([["case", "method", "0.25\n*0.5*"]], ("Case", "method", "memory"), n_labels=2),
}


def test_cells_of_other_tables_by_name():
    text = account.filled("{t|a|accuracy} for {t|a|accuracy|published}, {two|case: method|memory} and {t|c|F1}{t|a|F1}", KNOWN)
    assert text == "91.0 ± 2.0 for 90.2 ± 1.5, 0.25 and not runnot run"
    for wrong, words in (("{u|a|accuracy}", "no table u; there are t, two"), ("{t|a|speed}", "no column speed")):
        with pytest.raises(ValueError, match=words):
            account.filled(wrong, KNOWN)


def test_effects_by_hand():
    """Of the second method, with one run, the spread is the column's: 2; 2 √(2²/3 + 2²/1) = 4.6. Of F1 no spread is known."""
    row = {"label": "x", "table": "t", "methods": ["a", "b"], "column": "accuracy", "published": ["{t|a|accuracy}", "{t|b|F1}"]}
    known = {
        "t": table([["a", "3", "91.0 ± 2.0", "–", "–"], ["b", "1/7", "80.0", "–", "5.0"], ["c", "2", "1.0 ± 2.0", "–", "–"]])
    }
    assert account.effects_rows([row], known) == [["x", "3 and 1", "2.0 and 2.0", "4.6", "-11.0", "-86.0", "2"]]
    assert account.effects_rows([{**row, "column": "F1", "published": []}], known) == [
        ["x", "3 and 7", "–", "–", "–", "–", "–"]
    ]
    known["t"].rows[1] = ["b", "4", "80.0 ± 1.0", "–", "–"]
    assert account.effects_rows([row], known)[0][2:4] == ["2.0 and 1.0", "2.5"]  # each its own
    known["t"].rows.append(["d", "1", "–", "1.0", "0.0"])  # 4 (2² + 1²) / 1² seeds show a difference of 1
    assert account.effects_rows([{**row, "published": ["{t|d|F1}", "{t|d|accuracy|published}"]}], known)[0][-2:] == [
        "+1.0",
        "20",
    ]


def test_settings_in_words():
    entries = [
        {"name": "optimizer", "value": {"kind": "Adam", "lr": 1e-3, "betas": [0.9, 0.999]}, "source": "code"},
        {"name": "model", "value": [[6, 1, 5, 5], [6]], "source": "code"},
        {"name": "starts", "value": [[-1.8, 0.2]], "source": "code"},
        {"name": "noise", "value": {"kind": "f", "level": 0.4}, "ours": {"kind": "f", "level": 0.3}, "why": "so"},
        {"name": "flip", "value": {"on": True, "scale": None}, "source": "code"},
    ]  # fmt: skip
    ((title, theirs, ours),) = account.settings_rows({"e": entries}, {"e": "Title"})
    assert title == "Title" and ours == "**noise** level 0.3: so"
    assert theirs == (
        "**optimizer** Adam, lr 0.001, betas (0.9, 0.999); **model** 6×1×5×5, 6; **starts** (-1.8, 0.2); "
        "**noise** f, level 0.4; **flip** on yes, scale its own"
    )


@pytest.fixture(scope="module")
def committed():
    runs, _ = read_runs(COMMITTED)
    return runs, {t.name: t for t in tables.build_tables(SPEC, runs)}


def test_every_reference_is_a_number_that_was_run(committed):
    _, built = committed
    cells = [cell for row in SPEC["account"]["claims"]["rows"] for cell in row]
    cells += [reference for row in SPEC["account"]["effects"]["rows"] for reference in row["published"]]
    references = set(re.findall(r"\{[^{}]+\}", "".join(cells)))
    assert len(references) > 60
    assert {r for r in references if not re.match(r"-?\d", account.filled(r, built))} <= NOT_YET


def of(runs, experiment, **config):
    return [r for r in runs if r["experiment"] == experiment and all(r["config"].get(k) == v for k, v in config.items())]


def test_the_account_agrees_with_the_result_lines(committed):
    """Some of its figures, taken from the lines without the tables' code."""
    runs, built = committed
    said = {row[0]: row[2] for row in built["account"].rows}
    cell = lambda values: f"{fmean(values):.2f} ± {stdev(values):.2f}"
    angle = of(runs, "rotation", data="mnist", method="evograd")
    assert cell([r["metrics"]["accuracy_rotated"] for r in angle]) + " %" in said["An angle is learned (MNIST)"]
    noisy = {}
    for method, k in (("evograd", 2), ("second_order", 2), ("cross_entropy", 2), ("evograd_guided", 2)):
        mine = of(runs, "label_noise_mwn", data="mnist", noise_level=0.4, method=method, n_candidates=k)
        noisy[method] = cell([r["metrics"]["test_accuracy_last"] for r in mine])
    (text,) = [text for claim, text in said.items() if "(Table 4)" in claim]
    assert (
        "MNIST, 40 %: {evograd} %, T1–T2 {second_order}, guided {evograd_guided}, cross-entropy {cross_entropy};".format(
            **noisy
        )
        in text
    )
    (cost,) = of(runs, "metaxl_paper_cost")
    own, second = cost["metrics"]["evograd"], cost["metrics"]["second_order"]
    (text,) = [text for claim, text in said.items() if "(Figure 6)" in claim]
    ratios = [own[name] / second[name] for name in ("peak_bytes", "seconds")]
    assert text.startswith("{:.2f} and {:.2f}.".format(*ratios))


def test_displacement_agrees_with_the_result_lines(committed):
    runs, built = committed
    found = of(runs, "displacement", application="label_noise", first_step=0)
    assert sorted(r["config"]["seed"] for r in found) == [1, 23, 345]
    at = built["displacement"].header.index
    (row,) = [row for row in built["displacement"].rows if row[0] == "Label noise: 300"]
    windows = [r["metrics"]["windows"]["300"] for r in found]
    for name, column in (("evograd", "EvoGrad"), ("second_order", "T1–T2"), ("decay", "decay of λ"), ("moved", "λ has moved")):
        assert row[at(column)].split(" ± ")[0] == f"{fmean(w[name] for w in windows):.2g}"
    for application in ("label_noise", "few_shot", "cross_lingual"):
        assert len({r["config"]["seed"] for r in of(runs, "displacement", application=application)}) == 3


def test_verdicts_have_their_reasons(committed):
    """Each claim whose verdict is not "holds" has a paragraph; each table and figure of the paper stands in a claim."""
    _, built = committed
    rows = built["account"].rows
    assert {row[3] for row in rows} >= {"holds", "holds in part", "not tried here", "does not follow"}
    reasons = re.findall(r"^\*\*(.+?)\*\* ", TEXT.split("## Where it does not hold")[1].split("\n## ")[0], re.MULTILINE)
    assert len(reasons) == len([row for row in rows if row[3] != "holds"])
    claims = "".join(row[0] for row in rows)
    assert all(f"Figure {n}" in claims for n in range(1, 7))
    assert all(f"Table {n}" in claims for n in range(2, 6))


def test_two_screens_that_readers_find():
    assert len(TEXT.splitlines()) <= 120
    second = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")[1:5]
    assert any("](REPRODUCTION.md)" in paragraph for paragraph in second)
    outside = re.sub(r"<!-- table:.*?<!-- /table -->", "", TEXT, flags=re.DOTALL)
    assert not re.findall(r"(?<![\w.–-])\d+\.\d+(?![\w.])", outside)  # figures stand in the tables, which are made
