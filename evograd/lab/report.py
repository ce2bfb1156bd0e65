"""From result lines to what people read: one self-contained HTML page, and the Markdown tables of the README.

    python -m evograd.lab.report                                             report/index.html from <experiment>/results/*.jsonl
    python -m evograd.lab.report FILE.jsonl … --out page.html                from these files alone, without what they hold no run of
    python -m evograd.lab.report --readme                                    also tables between <!-- table:NAME --> markers,
                                                                             in the READMEs and in resources/*.md

What the tables hold, and the published numbers with their sources, is described in resources/paper_tables.json. Figures are
the files <experiment>_*.png beside the result files.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from glob import glob
from pathlib import Path

from . import cli
from .page import to_html
from .records import read_runs, write_text
from .tables import build_tables, safe_name, update_markdown

MARKDOWN = ("README.md", "[a-z]*/README.md", "[a-z]*/*/README.md", "resources/*.md")


def find_figures(spec: dict, folders: Iterable[Path], runs: list[dict], whole: bool) -> dict[str, list[tuple[Path, str]]]:
    """{experiment: [(file, caption)]}: the files <experiment>_*.png of the folders; of one name, the last folder's.

    whole: False leaves out figures whose name is of a kind or of data that these runs do not have.
    """
    data = {safe_name(name): name for run in runs if isinstance(name := run["config"].get("data"), str)}
    figures = {}
    for experiment in spec["experiments"]:
        found = {path.name: path for folder in folders for path in sorted(folder.glob(f"{experiment['name']}_*.png"))}
        chosen = [path for path in found.values() if whole or any(_may_show(path.stem, run) for run in runs)]
        figures[experiment["name"]] = [(path, _caption(path.stem, experiment.get("figures", {}), data)) for path in chosen]
    return figures


def _may_show(name: str, run: dict) -> bool:
    data = run["config"].get("data")
    return name.startswith(f"{run['experiment']}_") and (data is None or f"_{safe_name(str(data))}_" in f"{name}_")


def _caption(name: str, captions: dict[str, str], data: dict[str, str]) -> str:
    """The caption of that name, or of what it begins with (a name that ends in *), {} in it being the data; else the name."""
    for start, caption in captions.items():
        if start.endswith("*") and name not in captions and name.startswith(start[:-1]):
            rest = name.removeprefix(start[:-1])
            return caption.replace("{}", data.get(rest, rest))
    return captions.get(name, name)


def markdown_files(root: Path = Path()) -> list[str]:
    """The Markdown files that hold tables."""
    return [str(path) for pattern in MARKDOWN for path in sorted(root.glob(pattern))]


def _kinds(spec: dict) -> set[str]:
    """The kinds of result lines that a table is of."""
    parts = [part for t in spec["tables"] for part in (t, *t.get("columns", []))]
    kinds = {part["experiment"] for part in parts if "experiment" in part}
    for experiment in spec["experiments"]:
        kinds |= {part["name"] for part in (experiment, *experiment.get("also", [])) if "measures" in part}
    return kinds | {f"{figure['experiment']}_paper_cost" for figure in spec.get("cost_figures", {}).get("figures", [])}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("results", nargs="*", help="result files; default: <experiment>/results/*.jsonl")
    parser.add_argument(
        "--tables", default="resources/paper_tables.json", help="what the tables hold, and the published numbers"
    )
    parser.add_argument("--out", default="report/index.html", help="the page")
    what = "Markdown files whose tables are made anew; without FILE the READMEs and resources/*.md"
    parser.add_argument("--readme", nargs="*", metavar="FILE", help=what)
    args = parser.parse_args(argv)
    args.readme = markdown_files() if args.readme == [] else args.readme or []
    default = sorted(set(glob("*/results/*.jsonl")) - set(glob("report/results/*.jsonl")))
    # Of a file that is named twice the last place counts, as of equal runs the last does.
    files = list({Path(name).resolve(): name for name in reversed(args.results or default)}.values())[::-1]
    cli.check_files(parser, [*files, args.tables, *args.readme])
    if not files:
        parser.error("no result files: run an experiment first, or name the files")

    spec = json.loads(Path(args.tables).read_text(encoding="utf-8"))
    runs, broken = read_runs(files)
    named = {Path(name).resolve() for name in files}
    whole = not args.results or (bool(default) and all(Path(name).resolve() in named for name in default))
    tables = build_tables(spec, runs, whole)
    folders = dict.fromkeys(Path(name).parent for name in files)
    figures = find_figures(spec, folders, runs, whole)
    known = _kinds(spec)
    unknown = Counter(run["experiment"] for run in runs if run["experiment"] not in known)
    page = Path(args.out)
    write_text(page, to_html(spec, Path(args.tables).parent, tables, figures, broken, unknown, whole))
    for name in args.readme:
        write_text(name, update_markdown(Path(name).read_text(encoding="utf-8"), build_tables(spec, runs)))
    print(f"{len(runs)} runs from {len(files)} files: {page.resolve()}")
    if unknown:
        print(f"of a kind that no table is of: {', '.join(f'{name} ({n})' for name, n in unknown.items())}")
    if broken:
        sys.exit("\n".join(f"error: {line}" for line in broken))


if __name__ == "__main__":
    main()
