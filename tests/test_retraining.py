"""λ moved along the hypergradient of a few steps changes the validation loss as predicted, and the table says so."""

import json
from pathlib import Path

import pytest

from resources import retraining


@pytest.mark.parametrize(("optimizer", "lr"), [(retraining.SGD, 0.02), (retraining.ADAMW, 1e-3)])
def test_the_change_is_as_predicted(optimizer, lr):
    metrics = retraining.measured(optimizer, lr, warm_up=20, second_moment="exact", n=3, seed=1)
    assert metrics["ratios"]["1.0"] == pytest.approx(1, abs=0.1)
    assert not metrics["warned"]


def test_the_table_is_of_the_lines(tmp_path, monkeypatch):
    out, table = tmp_path / "lines.jsonl", tmp_path / "table.md"
    monkeypatch.setattr(retraining, "CASES", [(retraining.SGD, 0.02, 2, "exact")])
    retraining.main(["--seeds", "1", "2", "--horizons", "2", "--out", str(out)])
    found = [json.loads(line)["metrics"]["ratios"] for line in out.read_text(encoding="utf-8").splitlines()]
    table.write_text("Before\n<!-- retraining -->\nold\n<!-- /retraining -->\nAfter\n", encoding="utf-8")
    retraining.main(["--table", str(table), "--out", str(out)])
    text = table.read_text(encoding="utf-8")
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    cells = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    assert cells[:4] == [f"{retraining.SGD}, 0.02", "2", "–", "2"] and cells[-1] == "0 of 2"
    assert cells[5] == ", ".join(f"{ratios['0.1']:.2f}" for ratios in found)
    assert float(cells[6]) == pytest.approx(sum(ratios["1.0"] for ratios in found) / 2, abs=0.006)


def test_the_committed_table_is_made_of_the_committed_lines(tmp_path):
    table = tmp_path / "table.md"
    table.write_text((retraining.ROOT / "retraining.md").read_text(encoding="utf-8"), encoding="utf-8")
    retraining.main(["--table", str(table)])
    assert table.read_text(encoding="utf-8") == (retraining.ROOT / "retraining.md").read_text(encoding="utf-8")


def test_accuracy_of_steps_is_tabled_from_its_lines(tmp_path):
    from resources import accuracy_steps

    page = Path(accuracy_steps.__file__).with_suffix(".md")
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    accuracy_steps.main(["--table", str(copy)])
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    rows = [line for line in copy.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(accuracy_steps.NETWORKS)
