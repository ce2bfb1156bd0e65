"""The tables of the horizon are those of the committed lines, and of nothing else."""

import json

import pytest

from evograd.lab.records import append_run
from resources import horizon


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Before\n<!-- augmentation -->\nold\n<!-- /augmentation -->\nAfter\n", encoding="utf-8")
    return path


def line(out, method, seed, accuracy, **settings):
    metrics = {
        "test_accuracy": accuracy,
        "test_loss": 0.5,
        "strengths": dict(rotation=0.5, shift=0.1, contrast=0.1, noise=0.25),
    }
    append_run(out, "examples_augmentation", {"method": method, "seed": seed, "steps": 9, **settings}, metrics, {}, "cpu")


def test_a_table_has_means_errors_and_how_many_runs(tmp_path, page):
    out = tmp_path / "runs.jsonl"
    for seed, accuracy in ((1, 80.0), (2, 81.0), (3, 82.0)):
        line(out, "N = 50", seed, accuracy, lr=0.1, momentum=0.0)
    line(out, "N = 50", 1, 70.0)
    line(out, "N = 50", 1, 71.0)  # made again
    horizon.main([str(out), "--page", str(page), "--figure", str(tmp_path / "figure.png")])
    first, *_, last = page.read_text(encoding="utf-8").splitlines()
    rows = [row for row in page.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    assert (first, last) == ("Before", "After") and len(rows) == 3
    cells = [cell.strip() for cell in rows[-1].split("|")[1:-1]]
    assert cells[:3] == ["Trajectory, N = 50", "81.0 ± 1.0", "0.500 ± 0.000"] and cells[5] == "71.0 (1)"
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_committed_tables_are_made_of_the_committed_lines(tmp_path):
    text = (horizon.ROOT / "horizon.md").read_text(encoding="utf-8")
    copy = tmp_path / "page.md"
    copy.write_text(text, encoding="utf-8")
    horizon.main(["--page", str(copy), "--figure", str(tmp_path / "figure.png")])
    assert copy.read_text(encoding="utf-8") == text


def test_through_fifty_steps_the_strengths_of_the_test_images_are_reached():
    """At a learning rate of 0.1, where one step ahead finds nothing: within two points of accuracy with each seed."""
    lines = [json.loads(text) for text in horizon.LINES[1].read_text(encoding="utf-8").splitlines()]
    of = lambda method: horizon.found(lines, "augmentation", method, lr=0.1, momentum=0.0)
    found, true, one = ([run["test_accuracy"] for run in of(method)] for method in ("N = 50", "the true conditions", "N = 1"))
    assert len(found) == len(true) == len(one) == 3
    assert all(a > b - 2 for a, b in zip(found, true)) and all(a < b - 10 for a, b in zip(one, true))
