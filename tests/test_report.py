"""The report: tables from result lines alone, as they were written down once by hand."""

import json
from pathlib import Path

import pytest

from evograd import report
from evograd.records import append_line

ROOT = Path(__file__).resolve().parents[1]

SPEC = {
    "title": "Title <of> the page",
    "about": "About.",
    "experiments": [
        {
            "name": "toy",
            "title": "Toy",
            "about": "A toy.",
            "command": "python -m toy",
            "figures": {"toy_curve": "A curve & more"},
        }
    ],
    "tables": [
        {
            "name": "toy-table",
            "experiment": "toy",
            "title": "Accuracy",
            "where": {"data": "real"},
            "columns": [
                {"value": "metrics.accuracy", "label": "accuracy (%)", "decimals": 1},
                {"value": "cost.peak_bytes", "label": "peak (MB)", "decimals": 0, "scale": 1e-6},
            ],
            "rows": [
                {"label": "ours", "match": {"method": "a"}, "paper": {"metrics.accuracy": {"mean": 90.25, "std": 1.5}}},
                {"label": "theirs", "match": {"method": "b"}, "paper": {"metrics.accuracy": None}},
                {"label": "nobody's", "match": {"method": "c"}},
            ],
            "note": "A note.",
            "source": "a paper",
        }
    ],
}

GOLDEN = """\
| Method | runs | accuracy (%) | published | peak (MB) |
| :-- | --: | --: | --: | --: |
| ours | 3 | 91.0 ± 1.0 | 90.2 ± 1.5 | 2 ± 0 |
| ours, epochs 9 | 1 | 50.0 | – | 2 |
| theirs | 1 | 80.0 | – | – |
| nobody's | not run | – | – | – |

A note. Mean ± sample standard deviation over runs with different seeds. 1 more runs of other settings are in the result \
files and in no row. Published numbers: a paper.
"""


def line(method, seed, accuracy, peak=2_000_000, data="real", **config):
    return json.dumps({
        "experiment": "toy",
        "config": {"method": method, "seed": seed, "data": data, **config},
        "metrics": {"accuracy": accuracy},
        "cost": {"peak_bytes": peak},
        "environment": {"commit": "abc", "versions": {"torch": "2.11"}, "device": "CPU", "time": "2026-01-01T00:00:00+00:00"},
    })  # fmt: skip


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.jsonl"
    for record in (
        line("a", 1, 90.0),
        line("a", 2, 91.0),
        line("a", 3, 92.0),
        line("a", 1, 50.0, epochs=9),
        line("b", 1, 80.0, peak=None),
        line("d", 1, 1.0),
        line("a", 1, 2.0, data="other"),
    ):
        append_line(path, record)
    return path


def make(results, tmp_path, *extra):
    tables = tmp_path / "tables.json"
    tables.write_text(json.dumps(SPEC))
    page = tmp_path / "page.html"
    report.main([str(results), "--tables", str(tables), "--out", str(page), *extra])
    return page.read_text()


def test_golden_table(results, tmp_path):
    runs, _ = report.read_runs([results])
    assert report.to_markdown(report.build_table(SPEC["tables"][0], runs)) == GOLDEN


def test_a_column_may_be_of_some_configurations_alone(tmp_path):
    """One row over noise levels; the row's count of runs names each column's where they differ."""
    path = tmp_path / "runs.jsonl"
    for level, accuracies in ((0.0, (95, 97)), (0.4, (60,))):
        for seed, accuracy in enumerate(accuracies):
            append_line(path, line("a", seed, accuracy, level=level))
    columns = [
        {"value": "metrics.accuracy", "key": f"at {level}", "label": f"noise {level}", "where": {"level": level}, "decimals": 0}
        for level in (0.0, 0.4)
    ]
    row = {"label": "ours", "match": {"method": "a"}, "paper": {"at 0.4": {"mean": 61}}}
    table = report.build_table({**SPEC["tables"][0], "columns": columns, "rows": [row]}, report.read_runs([path])[0])
    assert table.header == ["Method", "runs", "noise 0.0", "noise 0.4", "published"]
    assert table.rows == [["ours", "2/1", "96 ± 1", "60", "61"]]
    assert len(table.runs) == 3


def test_page_is_self_contained(results, tmp_path):
    (tmp_path / "toy_curve.png").write_bytes(b"\x89PNG not really")
    page = make(results, tmp_path)
    assert "Title &lt;of&gt; the page" in page
    assert "91.0 ± 1.0" in page
    assert "A curve &amp; more" in page
    assert "data:image/png;base64,iVBORyBub3QgcmVhbGx5" in page
    assert "commit: abc" in page
    assert "http" not in page and "src='data:" in page and "<link" not in page


def test_readme_tables_are_made_anew(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("Before\n<!-- table:toy-table -->\nold\n<!-- /table -->\nAfter\n")
    make(results, tmp_path, "--readme", str(readme))
    expected = f"Before\n<!-- table:toy-table -->\n{GOLDEN}<!-- /table -->\nAfter\n"
    assert readme.read_text() == expected
    make(results, tmp_path, "--readme", str(readme))
    assert readme.read_text() == expected
    readme.write_text("<!-- table:unknown -->\n<!-- /table -->")
    with pytest.raises(ValueError, match="unknown.*toy-table"):
        make(results, tmp_path, "--readme", str(readme))


def test_broken_lines_are_named_and_the_rest_is_shown(results, tmp_path):
    append_line(results, '{"experiment": "toy", "con')
    with pytest.raises(SystemExit) as ended:
        make(results, tmp_path)
    assert f"{results}, line 8" in str(ended.value.code)
    page = (tmp_path / "page.html").read_text()
    assert "91.0 ± 1.0" in page
    assert "line 8" in page


def test_missing_files_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path / "nowhere.jsonl")])
    assert ended.value.code == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_committed_readmes_follow_from_committed_results():
    """python -m evograd.report --readme README.md */README.md was run after the last change of results."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    runs, broken = report.read_runs(sorted(ROOT.glob("*/results/*.jsonl")))
    assert not broken
    tables = [report.build_table(table, runs) for table in spec["tables"]]
    for readme in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        text = readme.read_text(encoding="utf-8")
        assert report.update_markdown(text, tables) == text, readme


def test_published_numbers_name_their_source():
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    for table in spec["tables"]:
        published = [value for row in table.get("rows", []) for value in row.get("paper", {}).values() if value]
        assert not published or table["source"], table["name"]
