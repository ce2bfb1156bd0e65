"""The report: tables from result lines alone, as they were written down once by hand."""

import json
from pathlib import Path

import pytest

from evograd.lab import figures, report, tables
from evograd.lab.records import append_line, read_runs

ROOT = Path(__file__).resolve().parents[1]

SPEC = {
    "title": "Title <of> the page",
    "about": "About.",
    "experiments": [
        {
            "name": "toy",
            "title": "Toy",
            "about": "A toy.",
            "plot": "python -m toy.plot",
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


def make(results, tmp_path, *extra, spec=SPEC):
    described = tmp_path / "tables.json"
    described.write_text(json.dumps(spec))
    page = tmp_path / "page.html"
    report.main([str(results), "--tables", str(described), "--out", str(page), *extra])
    return page.read_text()


def test_golden_table(results, tmp_path):
    runs, _ = read_runs([results])
    assert tables.to_markdown(tables.build_table(SPEC["tables"][0], runs)) == GOLDEN


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
    table = tables.build_table({**SPEC["tables"][0], "columns": columns, "rows": [row]}, read_runs([path])[0])
    assert table.header == ["Method", "runs", "noise 0.0", "noise 0.4", "published"]
    assert table.rows == [["ours", "2/1", "96 ± 1", "60", "61"]]
    assert len(table.runs) == 3


def test_page_is_self_contained(results, tmp_path):
    (tmp_path / "toy_curve.png").write_bytes(b"\x89PNG not really")
    page = make(results, tmp_path)
    assert "Title &lt;of&gt; the page" in page
    assert "91.0<span class='spread'> ± 1.0</span>" in page
    assert "A curve &amp; more" in page
    assert "data:image/png;base64,iVBORyBub3QgcmVhbGx5" in page
    assert "commit: abc" in page
    assert "python -m toy.plot" in page
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
    assert "91.0<span class='spread'> ± 1.0</span>" in page
    assert "line 8" in page


def test_missing_files_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path / "nowhere.jsonl")])
    assert ended.value.code == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_committed_readmes_follow_from_committed_results():
    """python -m evograd.report --readme README.md */README.md was run after the last change of results."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    runs, broken = read_runs(sorted(ROOT.glob("*/results/*.jsonl")))
    assert not broken
    built = tables.build_tables(spec, runs)
    for readme in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        text = readme.read_text(encoding="utf-8")
        assert tables.update_markdown(text, built) == text, readme


def test_published_numbers_name_their_source():
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    for table in spec["tables"]:
        published = [value for row in table.get("rows", []) for value in row.get("paper", {}).values() if value]
        assert not published or table["source"], table["name"]


# --- summary, costs over T1-T2, the page ---------------------------------------------------------------------------------


def cost_line(time, peak, second_time, second_peak, **config):
    cost = {"seconds": time, "peak_bytes": peak, "flops": 1}
    second = {"seconds": second_time, "peak_bytes": second_peak, "flops": 1}
    metrics = {"plain": {**cost, "seconds": 1.0}, "evograd": cost, "second_order": second}
    return json.dumps({**json.loads(line("x", 1, 0)), "experiment": "toy_cost", "config": config, "metrics": metrics})


def with_summary():
    columns = [
        {"value": "metrics.accuracy", "label": f"in {where}", "where": {"place": where}, "decimals": 1} for where in ("a", "b")
    ]
    places = {
        "name": "places",
        "experiment": "toy",
        "title": "Places",
        "command": "python -m toy --place PLACE",
        "where": {"data": "places"},
        "columns": columns,
        "rows": [{"label": "ours", "match": {"method": "a"}}, {"label": "theirs", "match": {"method": "b"}}],
    }
    cost = {"name": "toy-cost", "experiment": "toy_cost", "section": "toy", "kind": "cost", "title": "Cost", "labels": {}}
    ratios = {
        "name": "applications",
        "kind": "ratios",
        "section": "summary",
        "title": "Applications",
        "methods": {"evograd": "EvoGrad", "mixed_mode": "mixed"},
        "rows": [{"label": "toy", "cost": "toy-cost"}, {"label": "never run", "cost": "places"}],
    }
    rows = {"evograd": "ours", "second_order": "theirs"}
    summary = {
        "title": "One line each",
        "methods": {"baseline": "none", "evograd": "EvoGrad", "second_order": "T1–T2"},
        "published": "evograd",
        "costs_of": "evograd",
        "entries": [
            {
                "experiment": "toy",
                "measures": [
                    {"table": "places", "label": "mean over places", "columns": ["in a", "in b"], "rows": rows},
                    {"table": "toy-table", "label": "accuracy", "columns": ["accuracy (%)"], "rows": rows},
                ],
                "cost": "toy-cost",
            }
        ],
    }
    return {**SPEC, "highlight": "EvoGrad", "summary": summary, "tables": [*SPEC["tables"], places, cost, ratios]}


def built(path):
    return {table.name: table for table in tables.build_tables(with_summary(), read_runs([path])[0])}


def test_summary_is_of_the_first_measure_that_was_run(results):
    """Known by hand: 91 ± 1 and 80 from `results`; a step that takes 3 s and 2 bytes where T1-T2's takes 4 s and 8 bytes."""
    append_line(results, cost_line(9.0, 9, 9.0, 9, batch_size=8))
    append_line(results, cost_line(3.0, 2, 4.0, 8))
    summary = built(results)["summary"]
    costs = ["EvoGrad's cost: time / T1–T2", "EvoGrad's cost: peak / T1–T2"]
    assert summary.header == ["Experiment", "measured", "none", "EvoGrad", "published", "T1–T2", *costs]
    assert summary.rows == [["Toy", "accuracy", "–", "91.0 ± 1.0", "90.2 ± 1.5", "80.0", "0.75", "0.25"]]
    assert len(summary.runs) == 3 + 1 + 1

    append_line(results, line("a", 1, 60.0, data="places", place="a"))
    assert built(results)["summary"].rows[0][1] == "accuracy"  # a mean over places needs all places
    append_line(results, line("a", 1, 70.0, data="places", place="b"))
    append_line(results, line("b", 1, 10.0, data="places", place="b"))
    assert built(results)["summary"].rows == [["Toy", "mean over places", "–", "65.0", "–", "–", "0.75", "0.25"]]


def test_applications_are_ratios_to_second_order(results):
    append_line(results, cost_line(3.0, 2, 4.0, 8_000_000))
    table = built(results)["applications"]
    names = [f"{method}: {what} / T1–T2" for method in ("EvoGrad", "mixed") for what in ("time", "peak")]
    assert table.header == ["Application", *names, "T1–T2: peak"]
    assert table.rows == [["toy", "0.75", "0.00", "–", "–", "8 MB"], ["never run", "–", "–", "–", "–", "not run"]]
    assert "CPU" in table.remarks


def test_nothing_run_makes_a_page_that_says_so(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    summary = built(path)["summary"]
    assert summary.rows == [["Toy", "mean over places", "–", "not run", "–", "not run", "–", "–"]]
    page = make(path, tmp_path, spec=with_summary())
    assert "Not run yet" in page
    assert "python -m toy --place PLACE" in page
    append_line(path, line("a", 1, 90.0))
    page = make(path, tmp_path, spec=with_summary())
    assert "Not run yet" not in page
    assert "<li>Places</li>" in page


def test_a_column_of_text_and_a_row_with_a_key(tmp_path):
    record = json.loads(line("a", 1, 1.0))
    record["metrics"] = {"deepest": {"a": {"12": "resnet18"}, "b": {"12": "resnet34"}}}
    path = tmp_path / "runs.jsonl"
    append_line(path, json.dumps(record))
    columns = [{"value": "metrics.deepest.*.12", "label": "into 12 GB"}]
    rows = [{"label": "ours", "key": "a", "match": {}}, {"label": "theirs", "key": "b", "match": {}}]
    table = tables.build_table({**SPEC["tables"][0], "columns": columns, "rows": rows}, read_runs([path])[0])
    assert table.rows == [["ours", "1", "resnet18"], ["theirs", "1", "resnet34"]]


def test_the_page_marks_rows_published_columns_and_groups(results, tmp_path):
    append_line(results, cost_line(3.0, 2, 4.0, 8))
    page = make(results, tmp_path, spec=with_summary())
    assert "<a href='#summary'>" in page and "<h2 id='summary'>" in page
    assert "colspan='2'>accuracy (%)</th>" in page  # here and published
    assert "<td class='published'>90.2<span class='spread'> ± 1.5</span></td>" in page
    assert "style='--part:0.750'" in page and "style='--part:0.250'" in page
    assert "<tr class=mine><th class='left' scope='row'>evograd" not in page
    labelled = with_summary()
    labelled["tables"][2]["labels"] = {"evograd": "+ EvoGrad"}
    assert "<tr class=mine><th class='left' scope='row'>+ EvoGrad</th>" in make(results, tmp_path, spec=labelled)


def test_the_spec_is_whole():
    """Every name that the summary, the ratios and the figures' captions use is there."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    assert tables.build_tables(spec, [])[0].name == "summary"
    assert [entry["experiment"] for entry in spec["summary"]["entries"]] == [e["name"] for e in spec["experiments"]]
    sections = {"summary", *(experiment["name"] for experiment in spec["experiments"])}
    for table in tables.build_tables(spec, []):
        assert table.experiment in sections, table.name
        assert table.command or table.experiment == "summary", table.name
    assert all((ROOT / "resources" / picture["file"]).is_file() for picture in spec["pictures"])


def test_the_quality_table_and_figure(tmp_path, capsys):
    """Rows are estimates, columns problems; FLOPs and time over those of T1–T2, never the other way round."""

    def logged(experiment, cosine):
        cosines = dict.fromkeys(figures.ESTIMATES, cosine)
        flops = dict.fromkeys(cosines, 300) | {"exact": 400}
        seconds = dict.fromkeys(cosines, 2.0 if experiment == "a" else 3.0) | {"exact": 4.0}
        return {
            "experiment": experiment,
            "config": {"seed": 1, "data": "d"},
            "metrics": {"cosine": cosines, "quality_flops": flops, "quality_seconds": seconds},
            "cost": {},
            "environment": {},
        }

    runs = [logged("a", 0.25), logged("b", 0.9997), logged("b", -1.0) | {"metrics": {"cosine": {}}}]
    columns = [{"label": e, "experiment": e, "where": {"data": "d"}} for e in ("a", "b", "c")]
    rows = [{"label": "guided", "estimate": "guided"}, {"label": "other", "estimate": "evograd_k3"}]
    table = tables.build_table({"name": "q", "kind": "quality", "title": "Q", "columns": columns, "rows": rows}, runs)
    assert table.header == ["Estimate", "a", "b", "c", "FLOPs / T1–T2", "time / T1–T2"]
    assert table.rows == [
        ["guided", "0.250", "1.000", "not run", "0.75", "0.50 to 0.75"],
        ["other", "–", "–", "not run", "–", "–"],
    ]
    path = tmp_path / "quality.jsonl"
    for run in runs[:2]:
        append_line(path, json.dumps(run))
    figures.main([str(path), "--out", str(tmp_path / "quality.png")])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        figures.main(["/dev/null"])
    assert "no run with --log-quality in /dev/null" in capsys.readouterr().err


def test_a_setting_that_is_none_makes_no_new_row(tmp_path):
    """Runs from before a script learned a setting stand beside those after."""
    path = tmp_path / "results.jsonl"
    for record in (line("a", 1, 90.0), line("a", 2, 91.0, new=None), line("a", 1, 92.0, new=None), line("a", 1, 93.0, new=1)):
        append_line(path, record)
    runs, _ = read_runs([path])
    assert [run["metrics"]["accuracy"] for run in runs] == [92.0, 91.0, 93.0]
    assert [row[1:3] for row in tables.build_table(SPEC["tables"][0], runs).rows[:2]] == [["2", "91.5 ± 0.7"], ["1", "93.0"]]
