"""From result lines to what people read: one self-contained HTML page, and the Markdown tables of the README.

    python -m evograd.lab.report                                        report/index.html from <experiment>/results/*.jsonl
    python -m evograd.lab.report FILE.jsonl … --out page.html           the same from these files
    python -m evograd.lab.report --readme README.md */README.md         also rewrites the tables between <!-- table:NAME --> markers

What the tables hold, and the published numbers with their sources, is described in resources/paper_tables.json. Figures are
the files <experiment>_*.png beside the result files.
"""

from __future__ import annotations

import argparse
import json
import sys
from glob import glob
from pathlib import Path

from .page import to_html
from .records import read_runs, write_text
from .tables import build_tables, update_markdown


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
    tables = build_tables(spec, runs)
    folders = list(dict.fromkeys(Path(name).parent for name in files))
    page = Path(args.out)
    write_text(page, to_html(spec, Path(args.tables).parent, tables, find_figures(spec, folders), broken))
    for name in args.readme:
        write_text(name, update_markdown(Path(name).read_text(encoding="utf-8"), tables))
    print(f"{len(runs)} runs from {len(files)} files: {page.resolve()}")
    if broken:
        sys.exit("\n".join(f"error: {line}" for line in broken))


if __name__ == "__main__":
    main()
