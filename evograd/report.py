"""From result lines to what people read: one self-contained HTML page, and the Markdown tables of the README.

    python -m evograd.report                                        report/index.html from <experiment>/results/*.jsonl
    python -m evograd.report FILE.jsonl … --out page.html           the same from these files
    python -m evograd.report --readme README.md */README.md         also rewrites the tables between <!-- table:NAME --> markers

What the tables hold, and the published numbers with their sources, is described in resources/paper_tables.json. Figures are
the files <experiment>_*.png beside the result files.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from glob import glob
from pathlib import Path

from .records import BrokenLine, mean_std, read_runs, write_text


@dataclass
class Table:
    """A table as text. experiment: the section it stands in.  rows: cells, the first one the row's label."""

    name: str
    experiment: str
    title: str
    header: list[str]
    rows: list[list[str]]
    source: str | None
    runs: list[dict]
    notes: list[str] = field(default_factory=list)


def build_table(spec: dict, runs: list[dict]) -> Table:
    """The table that `spec` (an entry of resources/paper_tables.json) describes, from the runs that it selects."""
    runs = [run for run in runs if run["experiment"] == spec["experiment"] and _matches(run["config"], spec.get("where", {}))]
    if spec.get("kind") == "cost":
        return _cost_table(spec, runs)
    columns = spec["columns"]
    across = ("seed", *(key for column in columns for key in column.get("where", {})))  # what runs of one row may differ in
    with_paper = {key for row in spec["rows"] for key in row.get("paper", {})}
    header = ["Method", "runs"]
    for column in columns:
        header.append(column["label"])
        if _key(column) in with_paper:
            header.append("published")  # of the column before it
    rows, shown = [], {}
    for row in spec["rows"]:
        groups = _groups([run for run in runs if _matches(run["config"], row["match"])], across) or [("", [])]
        for suffix, group in groups:
            cells, counts = [], []
            for column in columns:
                mine = [run for run in group if _matches(run["config"], column.get("where", {}))]
                shown |= {id(run): run for run in mine}
                counts.append(len(mine))
                decimals = column.get("decimals", 2)
                mean, std, _ = mean_std(_value(run, column) for run in mine)
                cells.append(_cell(mean, std, decimals))
                if _key(column) in with_paper:
                    published = row.get("paper", {}).get(_key(column)) if not suffix else None
                    cells.append(_cell(published["mean"], published.get("std"), decimals) if published else "–")
            different = dict.fromkeys(map(str, counts))
            n_runs = "/".join(different if len(different) == 1 else map(str, counts)) if group else "not run"
            rows.append([row["label"] + suffix, n_runs, *cells])
    left = len(runs) - len(shown)
    notes = [spec["note"]] if spec.get("note") else []
    if any("±" in cell for cells in rows for cell in cells):
        notes.append("Mean ± sample standard deviation over runs with different seeds.")
    if left:
        notes.append(f"{left} more runs of other settings are in the result files and in no row.")
    section, source = spec.get("section", spec["experiment"]), spec.get("source")
    return Table(spec["name"], section, spec["title"], header, rows, source, list(shown.values()), notes)


def _cost_table(spec: dict, runs: list[dict]) -> Table:
    """Time, FLOPs and peak of one step of every method, over those of the plain step measured beside it: the last run."""
    header = ["Method", "time / plain", "FLOPs / plain", "peak / plain", "peak", "time / T1–T2", "peak / T1–T2"]
    rows, notes = [], [spec["note"]] if spec.get("note") else []
    if runs:
        methods = runs[-1]["metrics"]
        plain, second = methods["plain"], methods.get("second_order")
        for method, cost in methods.items():
            ratios = [f"{cost[key] / plain[key]:.2f}" for key in ("seconds", "flops", "peak_bytes")]
            to_second = [f"{cost[key] / second[key]:.2f}" if second else "–" for key in ("seconds", "peak_bytes")]
            rows.append([spec["labels"].get(method, method), *ratios, f"{cost['peak_bytes'] / 1e6:.1f} MB", *to_second])
        notes.append(f"One step measured side by side on: {runs[-1]['environment']['device']}.")
    return Table(spec["name"], spec.get("section", spec["experiment"]), spec["title"], header, rows, None, runs[-1:], notes)


def _key(column: dict) -> str:
    """By what name a row's published numbers speak of a column."""
    return column.get("key", column["value"])


def _groups(runs: list[dict], across: Sequence[str]) -> list[tuple[str, list[dict]]]:
    """Runs of one configuration but for the keys `across` are one row; what sets further rows apart follows their label."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run["config"].items() if k not in across}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    ordered = sorted(groups.values(), key=len, reverse=True)
    result = []
    for group in ordered:
        usual, this = ordered[0][0]["config"], group[0]["config"]
        different = [k for k in {**usual, **this} if k not in across and usual.get(k) != this.get(k)]
        result.append(("".join(f", {k} {this.get(k)}" for k in different), group))
    return result


def _matches(config: dict, wanted: dict) -> bool:
    return all(config.get(key) == value for key, value in wanted.items())


def _value(run: dict, column: dict) -> float | None:
    """`column["value"]` is a path such as metrics.angle; `scale` turns it into the unit that the label names."""
    value = run
    for key in column["value"].split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value * column.get("scale", 1) if isinstance(value, (int, float)) else None


def _cell(mean: float | None, std: float | None, decimals: int) -> str:
    if mean is None:
        return "–"
    return f"{mean:.{decimals}f}" + (f" ± {std:.{decimals}f}" if std is not None else "")


def to_markdown(table: Table) -> str:
    lines = [table.header, [":--"] + ["--:"] * (len(table.header) - 1), *table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text + "\n\n" + " ".join(_remarks(table)) + "\n"


def _remarks(table: Table) -> list[str]:
    return table.notes + ([f"Published numbers: {table.source}."] if table.source else [])


def update_markdown(text: str, tables: list[Table]) -> str:
    """`text` with what stands between <!-- table:NAME --> and <!-- /table --> made anew; ValueError for an unknown name."""
    known = {table.name: table for table in tables}

    def renew(match: re.Match) -> str:
        if match["name"] not in known:
            raise ValueError(f"marker <!-- table:{match['name']} -->: no such table; there are {', '.join(known)}")
        return f"{match['start']}\n{to_markdown(known[match['name']])}{match['end']}"

    pattern = r"(?P<start><!-- table:(?P<name>[\w-]+) -->).*?(?P<end><!-- /table -->)"
    return re.sub(pattern, renew, text, flags=re.DOTALL)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--soft); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .small { font-size: .85rem; opacity: .8; } code, pre { background: var(--soft); border-radius: 4px; }
pre { padding: .6rem; overflow-x: auto; } .broken { border-left: 4px solid #d55e00; padding-left: .8rem; }
"""


def to_html(spec: dict, tables: list[Table], figures: dict[str, list[tuple[Path, str]]], broken: list[BrokenLine]) -> str:
    """One page that needs nothing else: styles and figures are inside of it."""
    escape = html.escape
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(spec['title'])}</title><style>{STYLE}</style><body>",
        f"<h1>{escape(spec['title'])}</h1><p>{escape(spec['about'])}</p>",
    ]
    if broken:
        items = "".join(f"<li>{escape(str(line))}</li>" for line in broken)
        parts.append(f"<div class='broken'><p>Lines of the result files that could not be read:</p><ul>{items}</ul></div>")
    for experiment in spec["experiments"]:
        mine = [table for table in tables if table.experiment == experiment["name"] and table.runs]
        pictures = figures.get(experiment["name"], [])
        if not mine and not pictures:
            continue
        parts.append(f"<h2 id='{experiment['name']}'>{escape(experiment['title'])}</h2><p>{escape(experiment['about'])}</p>")
        parts.append(f"<pre>{escape(experiment['command'])}</pre>")
        for table in mine:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
            parts.append(f"<h3>{escape(table.title)}</h3><div class='scroll'><table><tr>{head}</tr>{body}</table></div>")
            parts.append(f"<p class='small'>{escape(' '.join(_remarks(table)))}</p>{_provenance(table.runs)}")
        for path, caption in pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f"<figure><img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>")
            parts.append(f"<figcaption>{escape(caption)}</figcaption></figure>")
    made = datetime.now(timezone.utc).isoformat(timespec="minutes")
    parts.append(
        f"<p class='small'>Made {made} by <code>python -m evograd.report</code>, from result lines alone.</p></body></html>"
    )
    return "\n".join(parts)


def _provenance(runs: list[dict]) -> str:
    """What the numbers of a table were made with."""
    environments = [run["environment"] for run in runs]
    commits = sorted({str(e.get("commit"))[:10] for e in environments})
    devices = sorted({str(e.get("device")) for e in environments})
    versions = sorted({", ".join(f"{k} {v}" for k, v in e.get("versions", {}).items()) for e in environments})
    days = sorted({str(e.get("time"))[:10] for e in environments})
    items = {"commit": commits, "device": devices, "versions": versions, "day": days}
    text = "".join(f"<li>{name}: {html.escape('; '.join(values))}</li>" for name, values in items.items())
    return f"<details class='small'><summary>Behind these numbers</summary><ul>{text}</ul></details>"


def find_figures(spec: dict, folders: list[Path]) -> dict[str, list[tuple[Path, str]]]:
    """{experiment: [(file, caption)]}: the files <experiment>_*.png of the folders; of one name, the last folder's."""
    figures = {}
    for experiment in spec["experiments"]:
        found = {path.name: path for folder in folders for path in sorted(folder.glob(f"{experiment['name']}_*.png"))}
        captions = experiment.get("figures", {})
        figures[experiment["name"]] = [(path, captions.get(path.stem, path.stem)) for path in found.values()]
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", help="result files; default: <experiment>/results/*.jsonl")
    parser.add_argument(
        "--tables", default="resources/paper_tables.json", help="what the tables hold, and the published numbers"
    )
    parser.add_argument("--out", default="report/index.html", help="the page")
    parser.add_argument("--readme", nargs="+", default=[], metavar="FILE", help="Markdown files whose tables are made anew")
    args = parser.parse_args(argv)
    files = args.results or sorted(set(glob("*/results/*.jsonl")) - set(glob("report/results/*.jsonl")))
    missing = [name for name in [*files, args.tables, *args.readme] if not Path(name).is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if not files:
        parser.error("no result files: run an experiment first, or name the files")

    spec = json.loads(Path(args.tables).read_text(encoding="utf-8"))
    runs, broken = read_runs(files)
    tables = [build_table(table, runs) for table in spec["tables"]]
    folders = list(dict.fromkeys(Path(name).parent for name in files))
    page = Path(args.out)
    write_text(page, to_html(spec, tables, find_figures(spec, folders), broken))
    for name in args.readme:
        write_text(name, update_markdown(Path(name).read_text(encoding="utf-8"), tables))
    print(f"{len(runs)} runs from {len(files)} files: {page.resolve()}")
    if broken:
        sys.exit("\n".join(f"error: {line}" for line in broken))


if __name__ == "__main__":
    main()
