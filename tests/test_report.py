"""The report: tables from result lines alone, as they were written down once by hand."""

import base64
import html
import importlib
import json
import re
from pathlib import Path

import pytest

from evograd.lab import figures, report, tables
from evograd.lab.records import append_line, read_runs

ROOT = Path(__file__).resolve().parents[1]
# Without what ./reproduce.sh has left in report/.
COMMITTED = sorted(set(ROOT.glob("*/results/*.jsonl")) - set(ROOT.glob("report/results/*.jsonl")))

SPEC = {
    "title": "Title <of> the page",
    "about": "About.",
    "experiments": [
        {
            "name": "toy",
            "title": "Toy",
            "about": "A toy.",
            "plot": "python -m toy.plot",
            "figures": {"toy_curve_real": "A curve & more", "toy_curve_*": "Curve of {}"},
            "data": [{"label": "data", "settings": ["data"]}, {"label": "at", "settings": ["place", "hour"], "between": " → "}],
            "measures": [{"value": "metrics.accuracy", "label": "accuracy (%)", "decimals": 1}],
        }
    ],
    "methods": {"d": "method d", "evograd": "EvoGrad", "a": "method a"},
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

A note. Mean ± sample standard deviation over runs with different seeds. 1 more run of other settings is in no row of this \
table. Published numbers: a paper.
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
    report.main([*([str(results)] if results else []), "--tables", str(described), "--out", str(page), *extra])
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
    (tmp_path / "toy_curve_real.png").write_bytes(b"\x89PNG not really")
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
    """python -m evograd.lab.report --readme was run after the last change of results."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    runs, broken = read_runs(COMMITTED)
    assert not broken
    built = tables.build_tables(spec, runs)
    files = [Path(name) for name in report.markdown_files(ROOT)]
    own = {
        ROOT / "README.md",
        ROOT / "REPRODUCTION.md",
        *ROOT.glob("[a-z]*/README.md"),
        *ROOT.glob("[a-z]*/*/README.md"),
        *ROOT.glob("resources/*.md"),
    }
    assert own == set(files)
    for readme in files:
        text = readme.read_text(encoding="utf-8")
        assert tables.update_markdown(text, built) == text, readme


def test_readme_alone_means_every_markdown_file_with_tables(results, tmp_path, monkeypatch):
    (tmp_path / "resources").mkdir()
    inside = "<!-- table:toy-table -->\n{}<!-- /table -->\n".format
    for name in ("README.md", "resources/costs.md"):
        (tmp_path / name).write_text(inside("old\n"))
    monkeypatch.chdir(tmp_path)
    make(results, tmp_path, "--readme")
    assert all((tmp_path / name).read_text() == inside(GOLDEN) for name in ("README.md", "resources/costs.md"))


def test_tables_of_published_numbers_fold_into_one(results):
    """Every published cell of the tables that it names, and our own number before it where there is one."""
    folded = {"name": "f", "kind": "folded", "section": "readme", "title": "F", "first": "Data", "source": "a paper"}
    folded["rows"] = [{"label": "real data", "table": "toy-table"}]
    spec = {**SPEC, "tables": [*SPEC["tables"], folded]}
    for runs, cell in (([], "90.2 ± 1.5"), (read_runs([results])[0], "91.0 ± 1.0 (published 90.2 ± 1.5)")):
        table = {t.name: t for t in tables.build_tables(spec, runs)}["f"]
        assert table.header == ["Data", "Method", "accuracy (%)"]
        assert table.rows[0] == ["real data", "ours", cell]
    committed = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    built = {table.name: table for table in tables.build_tables(committed, [])}
    for spec in [table for table in committed["tables"] if table.get("kind") == "folded"]:
        cells = lambda table: [c for row in table.rows for c in row[2:] if c not in ("–", "not run")]
        assert cells(built[spec["name"]]) == [c for row in spec["rows"] for c in cells(built[row["table"]])]


COSTS = {
    "label_noise_mwn": "label-noise-cost",
    "cross_domain_fewshot": "cross-domain-fewshot-cost",
    "metaxl": "metaxl-cost",
    "rotation": "rotation-cost",
}


def test_costs_in_sentences_are_those_of_the_tables():
    """Over the plain step: (time, peak, FLOPs) of guided and of T1–T2."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    built = {t.name: t for t in tables.build_tables(spec, read_runs(COMMITTED)[0])}
    cost = {}
    for folder, name in COSTS.items():
        table = built[name]
        at = [table.header.index(f"{what} / plain") for what in ("time", "peak", "FLOPs")]
        cost[folder] = {row[0].removeprefix("+ "): [row[i] for i in at] for row in table.rows}
        text = " ".join((ROOT / folder / "README.md").read_text(encoding="utf-8").split("## Cost of a step")[1].split())
        guided, second = cost[folder]["EvoGrad, guided"], cost[folder]["T1–T2 (higher)"]
        assert f"a step with guided takes {guided[0]} times" in text.replace("A step", "a step")
        assert f"and {guided[1]} times its memory" in text
        assert f"with T1–T2 {second[0]} and {second[1]}" in text
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split("**What it costs:**")[1].split("\n- ")[0].split())
    applications = list(COSTS)[:3]
    for method, digits in (("EvoGrad, guided", (1, 2)), ("T1–T2 (higher)", (1, 1))):
        for i, n in enumerate(digits):
            values = [float(cost[folder][method][i]) for folder in applications]
            low, high = (f"{f(values) + 1e-9:.{n}f}" for f in (min, max))
            assert f"{low} to {high} times" in text, (method, low, high)
    text = " ".join((ROOT / "evograd/README.md").read_text(encoding="utf-8").split())
    of = cost["label_noise_mwn"]
    assert "T1–T2 by double backward costs {2} and {1}.".format(*of["T1–T2 (higher)"]) in text
    assert "**Cost, K = 2:** {2} of the FLOPs, {1} of the memory.".format(*of["EvoGrad, K = 2"]) in text
    assert "**Cost:** {2} of the FLOPs, {1} of the memory.".format(*of["mixed mode"]) in text
    assert "**Cost:** {2} of the FLOPs, {1} of the memory, beside".format(*of["EvoGrad, guided"]) in text


def test_every_committed_run_stands_in_a_table():
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    runs, _ = read_runs(COMMITTED)
    shown = {id(run) for table in tables.build_tables(spec, runs)[1:] for run in table.runs}
    measured = [experiment["name"] for experiment in spec["experiments"] if "measures" in experiment]
    assert len(measured) == 4
    for run in runs:
        assert id(run) in shown or run["experiment"] not in measured, run["config"]
    assert {run["experiment"] for run in runs} <= report._kinds(spec)


def test_published_numbers_name_their_source():
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    for table in spec["tables"]:
        published = [value for row in table.get("rows", []) if "paper" in row for value in row["paper"].values() if value]
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
    rows = {"evograd": "ours", "second_order": "theirs", "trajectory": "not yet"}
    summary = {
        "title": "One line each",
        "methods": {"baseline": "none", "evograd": "EvoGrad", "second_order": "T1–T2", "trajectory": "N steps"},
        "entries": [
            {
                "experiment": "toy",
                "measures": [
                    {
                        "table": "places",
                        "label": "mean over places",
                        "columns": ["in a", "in b"],
                        "rows": rows,
                        "verdict": "no",
                    },
                    {"table": "toy-table", "label": "accuracy", "columns": ["accuracy (%)"], "rows": rows, "verdict": "holds"},
                ],
            }
        ],
    }
    return {**SPEC, "highlight": "EvoGrad", "summary": summary, "tables": [*SPEC["tables"], places, cost, ratios]}


def built(path):
    return {table.name: table for table in tables.build_tables(with_summary(), read_runs([path])[0])}


def test_summary_is_of_the_first_measure_that_was_run(results):
    """Known by hand: 91 ± 1 and 80 from `results`. A method that the table has no row of was not run."""
    summary = built(results)["summary"]
    assert summary.header == ["Experiment", "measured", "none", "EvoGrad", "T1–T2", "N steps", "the paper's claim"]
    assert summary.rows == [["Toy", "accuracy", "–", "91.0 ± 1.0\n90.2 ± 1.5", "80.0", "not run", "holds"]]
    assert "| 91.0 ± 1.0<br>*90.2 ± 1.5* | 80.0 |" in tables.to_markdown(summary)
    assert len(summary.runs) == 3 + 1

    append_line(results, line("a", 1, 60.0, data="places", place="a"))
    assert built(results)["summary"].rows[0][1] == "accuracy"  # a mean over places needs all places
    append_line(results, line("a", 1, 70.0, data="places", place="b"))
    append_line(results, line("b", 1, 10.0, data="places", place="b"))
    assert built(results)["summary"].rows == [["Toy", "mean over places", "–", "65.0", "–", "not run", "no"]]


def test_published_numbers_of_what_was_not_run_stand_in_the_summary(results):
    spec = with_summary()
    spec["tables"] = [{**table} for table in spec["tables"]]
    places = next(table for table in spec["tables"] if table["name"] == "places")
    places["columns"] = [{**column, "key": column["label"]} for column in places["columns"]]
    theirs = {column["key"]: {"mean": mean, "std": 1} for column, mean in zip(places["columns"], (60, 70))}
    places["rows"] = [{**row, "paper": theirs} if row["label"] == "theirs" else row for row in places["rows"]]
    summary = {table.name: table for table in tables.build_tables(spec, read_runs([results])[0])}["summary"]
    assert summary.rows[0] == ["Toy", "mean over places", "–", "not run", "not run\n65.0", "not run", "not run"]
    assert summary.rows[1][1] == "accuracy" and len(summary.rows) == 2


def test_a_mean_of_columns_needs_all_of_them_and_a_row_without_runs_has_published_numbers_alone(results):
    columns = [{"value": "metrics.accuracy", "key": place, "label": place, "where": {"place": place}} for place in "ab"]
    paper = {"a": {"mean": 50}, "mean": {"mean": 55}}
    spec = {
        "name": "t", "experiment": "toy", "title": "T", "where": {"data": "places"}, "source": "a poster",
        "columns": [*columns, {"mean_of": ["a", "b"], "value": "metrics.accuracy", "key": "mean", "label": "mean"}],
        "rows": [{"label": "ours", "match": {"method": "a"}}, {"label": "their own run", "paper": paper}],
    }  # fmt: skip
    append_line(results, line("a", 1, 60.0, data="places", place="a"))
    rows = tables.build_table(spec, read_runs([results])[0]).rows
    assert rows == [["ours", "1/0", "60.00", "–", "–", "–", "–"], ["their own run", "–", "–", "50.00", "–", "–", "55.00"]]
    append_line(results, line("a", 1, 70.0, data="places", place="b"))
    assert tables.build_table(spec, read_runs([results])[0]).rows[0][2:] == ["60.00", "–", "70.00", "65.00", "–"]


def test_applications_are_ratios_to_second_order(results):
    append_line(results, cost_line(3.0, 2, 4.0, 8_000_000))
    table = built(results)["applications"]
    names = [f"{method}: {what} / T1–T2" for method in ("EvoGrad", "mixed") for what in ("time", "peak")]
    assert table.header == ["Application", *names, "T1–T2: peak"]
    assert table.rows == [["toy", "0.75", "0.00", "–", "–", "8 MB"], ["never run", "–", "–", "–", "–", "not run"]]
    assert "CPU" in table.remarks


@pytest.fixture
def default(tmp_path, monkeypatch):
    """The result file that the report takes where none is named."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy/results/runs.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("")
    return path


def test_nothing_run_makes_a_page_that_says_so(default, tmp_path):
    summary = built(default)["summary"]
    assert summary.rows == [["Toy", "mean over places", "–", "not run", "not run", "not run", "not run"]]
    page = make(None, tmp_path, spec=with_summary())
    assert "Not run yet" in page
    assert "python -m toy --place PLACE" in page
    append_line(default, line("a", 1, 90.0))
    page = make(None, tmp_path, spec=with_summary())
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
    labelled["tables"][2]["labels"] = {"evograd": "+ EvoGrad", "second_order": "T1–T2, the EvoGrad authors' own run"}
    page = make(results, tmp_path, spec=labelled)
    assert "<tr class=mine><th class='left' scope='row'>+ EvoGrad</th>" in page
    assert "<tr><th class='left' scope='row'>T1–T2, the EvoGrad authors" in page


@pytest.fixture(scope="module")
def committed_page(tmp_path_factory):
    """(the page of all committed lines, the tables on it)."""
    page = tmp_path_factory.mktemp("page") / "index.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        report.main(["--out", str(page)])
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    runs, _ = read_runs(COMMITTED)
    return page.read_text(encoding="utf-8"), tables.build_tables(spec, runs)


def section(page, name):
    return html.unescape(page.partition(f"<h2 id='{name}'>")[2].partition("<h2 ")[0])


def folds(text):
    """{title: what is folded under it} of the tables."""
    return dict(re.findall(r"<details class='folded'><summary>(.*?)</summary>(.*?)</details>", text))


def cells(text):
    """Cells as the page shows them, without marks."""
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", text)]


def test_a_published_number_stands_in_the_summary_below_ours(results, tmp_path):
    page = make(results, tmp_path, spec=with_summary())
    mine = "91.0<span class='spread'> ± 1.0</span><i class='below' title='published'>90.2 ± 1.5</i></td>"
    assert mine in section(page, "summary")
    assert page.count("title='published'") == 1  # where nothing was published there is no line for it


def test_the_summary_fits_the_page(committed_page):
    """In a window of 1,200 pixels it has 1,112. Lines of cells do not break, but for the first, which take 160 at least."""
    page, built = committed_page
    summary = built[0]
    text = section(page, "summary")
    numbers = [list(column) for column in zip(*summary.rows)][summary.n_labels :]
    lines = [max((line for cell in column for line in cell.split("\n")), key=len) for column in numbers]
    words = [max(name.split(), key=len) for name in summary.header[summary.n_labels :]]
    assert 160 + sum(24 + 8 * max(len(line), len(word)) for line, word in zip(lines, words)) < 1112
    shown = [line.replace("\n", "") for row in summary.rows for line in row[summary.n_labels :]]
    assert cells(text) == shown and text.count("<table>") == 1


def test_the_cover_comes_first_then_account_and_summary_then_the_sections(committed_page):
    page, _ = committed_page
    assert re.findall(r"<h1>|class='cover'|<h2 id='\w+'", page) == [
        "<h1>", "class='cover'", "<h2 id='account'", "<h2 id='summary'", "<h2 id='across'", "<h2 id='illustration_1d'",
        "<h2 id='rotation'", "<h2 id='label_noise_mwn'", "<h2 id='cross_domain_fewshot'", "<h2 id='metaxl'",
    ]  # fmt: skip
    first = page.partition("src='data:image/png;base64,")[2].partition("'")[0]
    assert base64.b64decode(first) == (ROOT / "resources/cover.png").read_bytes()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"!\[.*?\]\((.*?)\)", readme)[1] == "resources/cover.png"


def test_published_tables_stand_in_their_sections_folded_where_nothing_was_run(committed_page):
    """Whether something was run is read off the cells, not off what the page goes by."""
    page, built = committed_page
    folded = []
    for table in [table for table in built if table.source and table.experiment != "readme"]:  # what the page has unfolded
        place = section(page, "across" if table.experiment == "summary" else table.experiment)
        text = [(name, cell) for row in table.rows for name, cell in list(zip(table.header, row))[table.n_labels :]]
        all_published = table.name == "complexity"
        ours = {cell for name, cell in text if name != tables.PUBLISHED and not all_published}
        if ours <= {tables.NOT_RUN, "–"}:
            folded.append(table.title)
            shown = folds(place)[table.title]
            assert f"<h3>{table.title}</h3>" not in place and f"<li>{table.title}</li>" not in place
        else:
            assert table.title not in folds(place)
            shown = place.partition(f"<h3>{table.title}</h3>")[2].partition("</table>")[0]
        assert cells(shown) == [cell for _, cell in text], table.name
    (settings,) = [table.title for table in built if table.name == "settings"]
    assert folded and sorted(folds(html.unescape(page))) == sorted([*folded, settings])


def test_a_published_table_unfolds_with_its_first_run(default, tmp_path):
    page = make(None, tmp_path, spec=with_summary())
    assert list(folds(section(page, "toy"))) == ["Accuracy"] and "<h3>Accuracy</h3>" not in page
    assert cells(folds(page)["Accuracy"])[:3] == ["not run", "–", "90.2 ± 1.5"]
    assert "Published numbers: a paper." in folds(page)["Accuracy"]
    append_line(default, line("b", 1, 80.0))
    page = make(None, tmp_path, spec=with_summary())
    assert folds(page) == {} and "<h3>Accuracy</h3>" in section(page, "toy")


def test_the_spec_is_whole():
    """Every name that the summary, the ratios and the figures' captions use is there."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    assert tables.build_tables(spec, [])[0].name == "summary"
    assert [entry["experiment"] for entry in spec["summary"]["entries"]] == [e["name"] for e in spec["experiments"]]
    sections = {"summary", *(experiment["name"] for experiment in spec["experiments"])}
    sections |= {"readme", "account"}  # readme: what the page has unfolded
    for table in tables.build_tables(spec, []):
        assert table.experiment in sections, table.name
        assert table.command or table.experiment in ("summary", "account"), table.name
    assert all((ROOT / "resources" / picture["file"]).is_file() for picture in [spec["cover"], *spec["pictures"]])


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


def test_the_first_figure_is_of_the_shown_comparisons():
    shown = (ROOT / "resources/comparisons.md").read_text(encoding="utf-8")
    for problem in figures.PROBLEMS:
        found = figures.compared(shown, problem)
        assert set(figures.COVER) < set(found) and found["T1–T2"]["cosine"] == 1
        assert all({"cosine", "time", "memory"} < set(values) for values in found.values())


def test_a_setting_that_is_none_makes_no_new_row(tmp_path):
    """Runs from before a script learned a setting stand beside those after."""
    path = tmp_path / "results.jsonl"
    for record in (line("a", 1, 90.0), line("a", 2, 91.0, new=None), line("a", 1, 92.0, new=None), line("a", 1, 93.0, new=1)):
        append_line(path, record)
    runs, _ = read_runs([path])
    assert [run["metrics"]["accuracy"] for run in runs] == [92.0, 91.0, 93.0]
    assert [row[1:3] for row in tables.build_table(SPEC["tables"][0], runs).rows[:2]] == [["2", "91.5 ± 0.7"], ["1", "93.0"]]


# --- runs that no table of the spec is of --------------------------------------------------------------------------------


def others(path, name="toy-others"):
    return {t.name: t for t in tables.build_tables(SPEC, read_runs([path])[0])}.get(name)


def test_runs_that_no_table_shows_have_one_of_their_own(results):
    """By hand: 3 seeds of "a" and one with 9 epochs stand in toy-table, "d" and data "other" do not."""
    for record in (
        line("evograd", 1, 70.0, data="own|1", place="x", hour=3, lr=0.1, flip=False),
        line("evograd", 2, 72.0, data="own|1", place="x", hour=3, lr=0.1, flip=False),
        line("evograd", 1, 50.0, data="own|1", place="x", hour=10, lr=0.5, layers=[1, 2], flip=True),
        line("a", 1, 60.0, data="own|1", place="x", hour=10, lr=0.1, flip=False),
    ):
        append_line(results, record)
    table = others(results)
    assert table.header == ["Method", "data", "at", "seeds", "accuracy (%)"]
    assert table.rows == [
        ["method a, lr not given, flip not given", "other", "–", "1", "2.0"],
        ["EvoGrad", "own|1", "x → 3", "2", "71.0 ± 1.4"],
        ["EvoGrad, lr 0.5, flip True, layers 1 2", "own|1", "x → 10", "1", "50.0"],
        ["method a", "own|1", "x → 10", "1", "60.0"],
        ["method d, lr not given, flip not given", "real", "–", "1", "1.0"],
    ]
    assert len(table.runs) == 6 and table.experiment == "toy"
    assert "names no other: lr 0.1." in table.remarks and "Mean ± sample" in table.remarks
    assert "| EvoGrad | own\\|1 | x → 3 |" in tables.to_markdown(table)


def test_no_table_without_a_run_that_stands_nowhere_else(tmp_path):
    path = tmp_path / "runs.jsonl"
    for record in (line("a", 1, 90.0), line("b", 2, 90.0, epochs=3), cost_line(1.0, 1, 1.0, 1)):
        append_line(path, record)
    assert others(path) is None


def test_a_run_in_no_column_makes_no_row(tmp_path):
    """A table by place has no row of runs at a place that it has no column for; they stand in the last table."""
    path = tmp_path / "runs.jsonl"
    for seed, place, settings in ((1, "c", {"epochs": 2}), (2, "c", {"epochs": 2}), (1, "a", {})):
        append_line(path, line("a", seed, 90.0, data="places", place=place, **settings))
    by_name = built(path)
    assert [row[:2] for row in by_name["places"].rows] == [["ours", "1/0"], ["theirs", "not run"]]
    assert [row[0] for row in by_name["toy-others"].rows] == ["method a"]
    assert by_name["toy-others"].rows[0][-2:] == ["2", "90.0 ± 0.0"]


def test_settings_that_the_method_decides_on_are_compared_within_it():
    usual = {"method": "evograd", "temperature": 0.05, "meta_lr": 3, "epochs": 5, "data": "d"}
    guided = {**usual, "method": "evograd_guided", "temperature": 1.0}
    baseline = {**usual, "method": "none", "temperature": None, "meta_lr": 1}
    own, common = tables.differences([usual, usual, guided, baseline, {**guided, "temperature": 2.0}], ["data"])
    assert own == [{}, {}, {}, {}, {"temperature": 2.0}]
    assert common == {"meta_lr": 3, "epochs": 5}
    assert tables.differences([usual, usual, {**guided, "meta_lr": 4}])[0][2] == {"meta_lr": 4}
    less = {"method": "evograd", "epochs": 5}
    assert tables.differences([usual, less])[0] == [{}, {"temperature": None, "meta_lr": None, "data": None}]


def test_names_of_data_are_safe_in_file_names():
    assert tables.safe_name("cifar10_jpeg-v1.2") == "cifar10_jpeg-v1.2"
    odd = ["a/b", "a b", "a:b", "ä", "..", "", "a" * 300, "a" * 301]
    safe = [tables.safe_name(name) for name in odd]
    assert len(set(safe)) == len(odd)
    assert all(len(name) < 100 and set(name) <= set("ab_-0123456789cdef") for name in safe)


def test_a_page_of_ones_own_files_leaves_out_what_they_have_no_run_of(default, tmp_path):
    picture = tmp_path / "own.svg"
    picture.write_text("<svg/>")
    other = {"name": "never", "title": "Never run", "about": "."}
    spec = with_summary()
    spec |= {"pictures": [{"file": "own.svg", "caption": "The diagram"}], "experiments": [*SPEC["experiments"], other]}
    spec["summary"]["entries"].append({**spec["summary"]["entries"][0], "experiment": "never", "measures": [
        {**spec["summary"]["entries"][0]["measures"][0], "label": "nothing"}]})  # fmt: skip
    append_line(default, cost_line(3.0, 2, 4.0, 8))
    folder = tmp_path / "mine"
    folder.mkdir()
    own = folder / "own.jsonl"
    for seed in (1, 2):
        append_line(own, line("a", seed, 40.0 + seed, data="my <own>"))
    append_line(own, line("a", 1, 55.0))
    name = tables.safe_name("my <own>")
    for figure in ("toy_curve_real", f"toy_curve_{name}", "toy_curve_elsewhere"):
        (folder / f"{figure}.png").write_bytes(b"\x89PNG")

    page = make(own, tmp_path, spec=spec)
    assert "<td class=''>my &lt;own&gt;</td>" in page and "41.5<span class='spread'> ± 0.7</span>" in page
    shown = ["A curve &amp; more", "alt='Curve of my &lt;own&gt;'", "<h3>Accuracy</h3>", "One line each"]
    for there in (*shown, "python -m toy.plot FILE.jsonl … --out-dir DIR"):
        assert there in page, there
    for absent in ("Never run", "elsewhere", "The diagram", "Places", "Applications", "<h3>Cost</h3>", "nothing", "Not run"):
        assert absent not in page, absent

    page = make(None, tmp_path, spec=spec)  # the default files: as complete as it was
    folded = "<summary>Accuracy</summary>"
    for there in ("Never run", "Not run yet", "The diagram", "<li>Places</li>", folded, "nothing", "Applications"):
        assert there in page, there
    report.main([str(own), str(default), "--tables", str(tmp_path / "tables.json"), "--out", str(tmp_path / "page.html")])
    assert "The diagram" in (tmp_path / "page.html").read_text()  # the default files among others


def test_own_runs_alone_are_not_called_not_run(default, tmp_path):
    append_line(default, line("a", 1, 41.0, data="own"))
    page = make(None, tmp_path, spec=with_summary())
    assert "Not run yet" not in page and "<h3>Runs with data or settings of their own</h3>" in page
    assert "<summary>Accuracy</summary>" in page and "<li>Accuracy</li>" not in page
    assert all(f"<li>{title}</li>" in page for title in ("Places", "Cost"))


def test_the_quality_table_of_own_files_has_their_columns_alone():
    logged = {"experiment": "b", "config": {}, "environment": {}, "cost": {}}
    logged["metrics"] = {"cosine": {"guided": 0.5}, "quality_flops": {"guided": 3, "exact": 4}}
    columns = [{"label": e, "experiment": e} for e in ("a", "b")]
    rows = [{"label": "guided", "estimate": "guided"}]
    described = {"name": "q", "kind": "quality", "section": "summary", "title": "Q", "columns": columns, "rows": rows}
    spec = {"experiments": [], "tables": [described]}
    (table,) = tables.build_tables(spec, [logged], whole=False)
    assert table.header == ["Estimate", "b", "FLOPs / T1–T2", "time / T1–T2"]
    assert table.rows == [["guided", "0.500", "0.75", "–"]]
    assert tables.build_tables(spec, [], whole=False) == []


def test_readmes_are_made_of_all_tables_whatever_the_page_leaves_out(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:places -->\n<!-- /table -->")
    make(results, tmp_path, "--readme", str(readme), spec=with_summary())
    assert "| ours | not run | – | – |" in readme.read_text()


# --- result files that are not as they should be -------------------------------------------------------------------------


def test_of_a_file_named_twice_the_last_place_counts(results, tmp_path, capsys):
    newer = tmp_path / "newer.jsonl"
    append_line(newer, line("b", 1, 33.0))
    append_line(newer, "{")
    (tmp_path / "folder").mkdir()
    again = tmp_path / "folder" / ".." / "newer.jsonl"
    described = tmp_path / "tables.json"
    described.write_text(json.dumps(SPEC))
    for files, value in (((newer, results, again), "33.0"), ((newer, results), "80.0")):
        with pytest.raises(SystemExit) as ended:
            report.main([*map(str, files), "--tables", str(described), "--out", str(tmp_path / "page.html")])
        assert str(ended.value.code).count("line 2") == 1
        assert f"runs from {len(set(map(str, map(Path.resolve, files))))} files" in capsys.readouterr().out
        page = (tmp_path / "page.html").read_text()
        assert (f">{value}<" in page) and page.count("line 2: not a result line") == 1


@pytest.mark.parametrize("content", ["", "\n\n", "{\nnonsense\n"])
def test_a_file_without_a_run_makes_a_page_that_says_so(content, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    if content.strip():
        with pytest.raises(SystemExit, match="line 1.*\n.*line 2"):
            make(path, tmp_path, spec=with_summary())
    else:
        make(path, tmp_path, spec=with_summary())
    page = (tmp_path / "page.html").read_text()
    assert "The result files hold no run." in page and ("could not be read" in page) == bool(content.strip())
    assert "<table>" not in page and "<h2" not in page


def test_records_of_an_unknown_experiment_are_named(results, tmp_path, capsys):
    strange = [{**json.loads(line("a", seed, 1.0)), "experiment": "toy_<sweep>"} for seed in (1, 2)]
    for record in strange:
        append_line(results, json.dumps(record))
    page = make(results, tmp_path)
    assert "<li>toy_&lt;sweep&gt;: 2</li>" in page
    assert "toy_<sweep> (2)" in capsys.readouterr().out
    assert "91.0<span" in page
    alone = tmp_path / "alone.jsonl"
    append_line(alone, json.dumps(strange[0]))
    page = make(alone, tmp_path)
    assert "<li>toy_&lt;sweep&gt;: 1</li>" in page and "hold no run" not in page and "<h2" not in page
    append_line(results, cost_line(3.0, 2, 4.0, 8))
    assert "toy_cost" not in make(results, tmp_path, spec=with_summary()).replace("toy_<sweep>", "")


# --- figures: one configuration a line, and what they leave out they say -------------------------------------------------


@pytest.fixture
def titles(monkeypatch):
    """{name of a figure: what stands above it}, of those saved from here on."""
    found = {}

    def save(figure, path, remark=""):
        found[path.name] = figure.get_suptitle().replace("\n", " ")
        write(figure, path, remark)

    write = figures.save
    monkeypatch.setattr(figures, "save", save)
    return found


def changed(record, **config):
    return {**record, "config": {**record["config"], **config}}


def committed(name):
    return read_runs([ROOT / name])[0]


def drawn(plot, records, folder, titles):
    path = folder / "runs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    titles.clear()
    plot.main([str(path), "--out-dir", str(folder)])
    for name in titles:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    return dict(titles)


def test_figures_of_rotation_keep_settings_apart(tmp_path, titles):
    from rotation import plot

    usual = [r for r in committed("rotation/results/digits.jsonl") if r["config"]["method"] == "evograd"]
    longer = [changed(r, epochs=50) for r in usual]
    more = changed(usual[0], epochs=50, n_candidates=10)
    records = [*usual, *longer, more, changed(usual[0], method="neumann", device="cuda")]
    assert drawn(plot, records, tmp_path, titles) == {
        "rotation_angle_digits.png": "digits, default settings",
        "rotation_angle_digits_other.png": "digits, other settings than the default. Not shown: 1 run with other n_candidates",
    }
    assert plot.changed_label(longer[0]["config"]) == "EvoGrad, epochs 50"
    assert drawn(plot, usual, tmp_path, titles).keys() == {"rotation_angle_digits.png"}
    assert list(drawn(plot, [changed(usual[0], data="a/b")], tmp_path, titles)) == [
        f"rotation_angle_{tables.safe_name('a/b')}_other.png"
    ]


def test_figures_of_label_noise_say_what_they_leave_out(tmp_path, titles):
    from label_noise_mwn import plot

    runs = [r for r in committed("label_noise_mwn/results/digits.jsonl") if r["config"]["noise_level"] == 0.4]
    runs = [r for r in runs if r["config"]["n_candidates"] == 2 and r["config"]["seed"] < 5]
    runs = [r for r in runs if r["config"]["method"] != "trajectory"]  # whose horizon a figure names
    own = [changed(r, data="my $\\own$ data", noise="given", noise_level=None) for r in runs]
    mixed = [changed(r, lr=0.5) for r in own if r["config"]["method"] == "mixed_mode"]
    second = [changed(r, lr=0.7) for r in own if r["config"]["method"] == "second_order"]
    records = [*runs, *own, *mixed, *second, changed(second[0], seed=99)]
    found = drawn(plot, records, tmp_path, titles)
    name = tables.safe_name("my $\\own$ data")
    assert found["label_noise_mwn_accuracy_digits.png"] == "digits"
    assert found[f"label_noise_mwn_accuracy_{name}.png"] == (
        "my $\\own$ data. T1–T2 (higher): lr 0.7. Not shown: 4 runs with other lr"
    )
    seed = mixed[0]["config"]["seed"]
    start = f"my $\\own$ data, given noise, seed {seed}. T1–T2 (higher): lr 0.7. Not shown: "
    assert found[f"label_noise_mwn_weights_{name}.png"].startswith(start)
    kinds = ("accuracy", "weights", "histograms")
    assert found.keys() == {f"label_noise_mwn_{kind}_{data}.png" for kind in kinds for data in ("digits", name)}


def test_figures_of_own_domains_stand_alone(tmp_path, titles):
    from cross_domain_fewshot import plot

    runs = [r for r in committed("cross_domain_fewshot/results/filelists.jsonl") if r["config"]["held_out"] == "omniglot"]
    runs = list({r["config"]["method"]: r for r in runs if "horizon" not in r["config"]}.values())
    own = [changed(r, held_out="my/$\\own$", seen=["photos", "prints"]) for r in runs]
    longer = [changed(r, epochs=99, seed=seed) for r in own if r["config"]["method"] == "evograd" for seed in (1, 2)]
    found = drawn(plot, [*runs, *own, *longer], tmp_path, titles)
    assert found["cross_domain_fewshot_accuracy_filelists_conv4_relationnet.png"] == "filelists, conv4, relationnet"
    start = "filelists, own domains, conv4, relationnet"
    assert found["cross_domain_fewshot_accuracy_filelists_own_conv4_relationnet.png"] == (
        f"{start}. EvoGrad: epochs 99. Not shown: 1 run with other epochs"
    )
    last = found["cross_domain_fewshot_transformations_filelists_own_conv4_relationnet.png"]
    assert last.startswith(f"{start}, held out my/$\\own$, 5-shot, seed ")


def test_figures_of_own_languages_name_their_settings(tmp_path, titles):
    from metaxl import plot

    runs = [r for r in committed("metaxl/results/ner.jsonl") if r["config"]["target"] == "pcm" and "horizon" not in r["config"]]
    own = [changed(r, target="$\\own$", encoder="own/encoder") for r in runs]
    own = [{**r, "metrics": {k: v for k, v in r["metrics"].items() if k != "gates"}} for r in own]
    found = drawn(plot, [*runs, *own, changed(own[0], seed=9, lr=1.0)], tmp_path, titles)
    assert found == {
        "metaxl_dev_f1_ner.png": "ner. en → $\\own$: encoder own/encoder. Not shown: 1 run with other lr",
        "metaxl_gates_ner.png": "ner",
    }


def test_a_figure_of_nothing_is_not_made(tmp_path, titles, capsys):
    from rotation import plot

    assert drawn(plot, [], tmp_path, titles) == {}
    assert "no run of rotation in" in capsys.readouterr().out


def test_fingerprints_tell_data_apart_where_both_are_known(tmp_path):
    """Runs from before data had one stand with those after; two different ones are two rows."""
    path = tmp_path / "results.jsonl"
    for seed, accuracy, mark in ((1, 90.0, None), (2, 92.0, "ab"), (3, 94.0, "ab")):
        append_line(path, line("a", seed, accuracy, **({"fingerprint": mark} if mark else {})))
    rows = lambda: [row[:3] for row in tables.build_table(SPEC["tables"][0], read_runs([path])[0]).rows[:2]]
    assert rows()[0] == ["ours", "3", "92.0 ± 2.0"]
    append_line(path, line("a", 1, 10.0, fingerprint="cd"))
    assert rows() == [["ours", "3", "92.0 ± 2.0"], ["ours, fingerprint cd", "1", "10.0"]]


def test_columns_of_other_data_have_other_fingerprints(tmp_path):
    """Two languages are one row, though of different files; a second set of files of one language is another row."""
    columns = [{"value": "metrics.accuracy", "label": t, "where": {"target": t}, "decimals": 0} for t in ("x", "y")]
    spec = {**SPEC["tables"][0], "columns": columns, "rows": [{"label": "ours", "match": {"method": "a"}}]}
    path = tmp_path / "runs.jsonl"
    for target, accuracy, fingerprint in (("x", 1, "fx"), ("y", 2, "fy"), ("y", 3, "fz")):
        append_line(path, line("a", accuracy, accuracy, target=target, fingerprint=fingerprint))
    assert tables.build_table(spec, read_runs([path])[0]).rows == [
        ["ours", "1", "1", "2"],
        ["ours, fingerprint fz", "0/1", "–", "3"],
    ]


def test_encoders_of_one_name_are_told_apart_where_both_are_known(tmp_path):
    path = tmp_path / "results.jsonl"
    for seed, accuracy, mark in ((1, 90.0, None), (2, 92.0, "ab"), (3, 94.0, "ab")):
        append_line(path, line("a", seed, accuracy, fingerprint="data", **({"encoder_fingerprint": mark} if mark else {})))
    rows = lambda: [row[:3] for row in tables.build_table(SPEC["tables"][0], read_runs([path])[0]).rows[:2]]
    assert rows()[0] == ["ours", "3", "92.0 ± 2.0"]
    append_line(path, line("a", 1, 10.0, fingerprint="data", encoder_fingerprint="cd"))
    assert rows() == [["ours", "3", "92.0 ± 2.0"], ["ours, encoder_fingerprint cd", "1", "10.0"]]


@pytest.mark.parametrize("module", ["evograd.lab.report", "evograd.lab.figures", "rotation.plot"])
@pytest.mark.parametrize(("arguments", "words"), [(["nowhere.jsonl"], "no such file: nowhere.jsonl"), (["--page"], "--page")])
def test_wrong_arguments_are_answered_in_two_lines(module, arguments, words, refused):
    message = refused(importlib.import_module(module).main, arguments, words).splitlines()
    assert len(message) == 2 and message[0].endswith("--help lists them")


def test_few_shot_runs_and_tests_of_checkpoints_have_intervals(tmp_path):
    """Records as train.py and evaluate.py write them: in the page, each with its interval, and with the difference to the first."""
    spec = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))
    config = {"data": "filelists", "seen": ["a", "b"], "held_out": "c", "n_shot": 1, "method": "evograd", "seed": 1}
    tested = {**config, "domain": "d", "split": "novel"}
    metrics = {"accuracy": 41.5, "interval": 1.25}
    both = {"accuracy": 44.0, "interval": 1.5, "difference": 2.5, "difference_interval": 0.75}
    runs = [
        {"experiment": "cross_domain_fewshot", "config": config, "metrics": metrics},
        {"experiment": "cross_domain_fewshot_test", "config": tested, "metrics": metrics},
        {"experiment": "cross_domain_fewshot_test", "config": {**tested, "method": "fixed"}, "metrics": both},
    ]
    runs = [{**run, "cost": {}, "environment": {}} for run in runs]
    found = {table.name: table for table in tables.build_tables(spec, runs, whole=False) if table.runs}
    own, test = found["cross_domain_fewshot-others"], found["cross_domain_fewshot_test-others"]
    assert own.header[-2:] == ["accuracy (%)", "± (95 %)"] and own.rows[0][-2:] == ["41.50", "1.25"]
    assert test.experiment == "cross_domain_fewshot" and "d, novel" in test.rows[0]
    assert {tuple(row[-4:]) for row in test.rows} == {("41.50", "1.25", "–", "–"), ("44.00", "1.50", "2.50", "0.75")}
    assert "cross_domain_fewshot_test" in report._kinds(spec)


@pytest.mark.parametrize(("epochs", "limits"), [([1], (0.5, 1.5)), ([7], (6.5, 7.5)), ([1, 2, 3], None)])
def test_an_axis_of_one_epoch_has_a_width(epochs, limits):
    figure, axis = figures.plt.subplots()
    axis.plot(epochs, epochs, marker="o")
    figures.over_epochs(axis)
    figure.canvas.draw()
    assert limits is None or axis.get_xlim() == limits
    inside = [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
    assert inside and all(tick == int(tick) for tick in inside) and set(epochs) >= set(inside)
    figures.plt.close(figure)
