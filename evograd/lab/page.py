"""The report as one HTML page that needs nothing else: styles and figures are inside of it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from .records import BrokenLine
from .tables import ACCOUNT, NOT_RUN, PUBLISHED, SUMMARY, Table

ACROSS = {
    "name": "across",
    "title": "Across experiments",
    "about": "What is of no single experiment: costs, agreement with exact T1–T2, examples.",
}

STYLE = """
:root {
  color-scheme: light dark;
  --back: #fff; --text: #1c2026; --dim: #5b6470; --line: #d9dee5; --soft: #f3f5f8;
  --accent: #0072b2; --mine: #e9f3fa; --note: #b8500a; --note-back: #fdf3ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --text: #e3e6ea; --dim: #9aa4b0; --line: #343b45; --soft: #1e2329;
    --accent: #62b3e6; --mine: #182f40; --note: #f0a469; --note-back: #2c2219;
  }
  .picture { filter: brightness(.9); }
}
* { box-sizing: border-box; }
body {
  font: 16px/1.55 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem 1.2rem 4rem;
  background: var(--back); color: var(--text); -webkit-text-size-adjust: 100%;
}
h1 { line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { margin: 3.5rem 0 .8rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); }
h3 { margin: 2.2rem 0 .3rem; }
.lead, h2 + p { max-width: 48rem; }
.lead { font-size: 1.05rem; }
.small, figcaption { font-size: .85rem; color: var(--dim); max-width: 52rem; margin: .5rem 0; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1.2rem 0; }
nav a { padding: .25rem .8rem; border: 1px solid var(--line); border-radius: 1rem; text-decoration: none; font-size: .9rem; }
nav a:hover { background: var(--mine); }

.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { background: var(--soft); white-space: normal; vertical-align: bottom; min-width: 4.8rem; line-height: 1.3; }
thead tr:first-child th, thead tr + tr th { border-top: 0; }
thead tr + tr th { font-weight: 400; white-space: nowrap; }
thead .group { text-align: center; border-left: 1px solid var(--line); }
tbody th { font-weight: 400; background: var(--back); }
tbody td { vertical-align: top; }
tbody th, thead tr:first-child th:first-child { position: sticky; left: 0; }
.left { text-align: left; white-space: normal; min-width: 10rem; }
.mine, tbody .mine th { background: var(--mine); }
tbody .mine th { font-weight: 600; box-shadow: inset 3px 0 var(--accent); }
thead tr:first-child .mine { box-shadow: inset 0 3px var(--accent); }
.published { font-style: italic; color: var(--dim); border-left: 1px dashed var(--line); border-right: 1px dashed var(--line); }
.below { display: block; font-size: .92em; color: var(--dim); }
.spread { font-size: .92em; color: var(--dim); }
.none { color: var(--dim); }
.bar {
  background-image: linear-gradient(var(--accent), var(--accent)); background-repeat: no-repeat;
  background-size: calc(var(--part) * (100% - 1.5rem)) 3px; background-position: .75rem 1.75rem;
}

figure { margin: 1.6rem 0; }
.cover { max-width: 52rem; }
.picture { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .7rem; overflow-x: auto; }
.picture img { display: block; max-width: 100%; height: auto; margin: 0 auto; cursor: zoom-in; }
.picture input { position: absolute; opacity: 0; }
.picture :checked + img { max-width: none; width: 75rem; cursor: zoom-out; }
details { font-size: .85rem; color: var(--dim); margin: .3rem 0; }
summary { cursor: pointer; }
.folded { font-size: 1rem; color: var(--text); border: 1px solid var(--line); border-radius: 8px; padding: .4rem .75rem; }
code, pre { font: .82rem/1.6 ui-monospace, monospace; background: var(--soft); border-radius: 6px; }
code { padding: .1rem .3rem; }
pre { padding: .6rem .8rem; overflow-x: auto; border: 1px solid var(--line); }
.what { color: var(--dim); }
.box { border-left: 4px solid var(--note); background: var(--note-back); border-radius: 0 8px 8px 0; padding: .1rem 1rem; }
.box { margin: 1rem 0; }

@media (max-width: 40rem) {
  body { padding: .5rem .8rem 3rem; }
  h2 { margin-top: 2.5rem; }
  th, td { padding: .38rem .5rem; }
  .left { min-width: 8rem; max-width: 10rem; }
  .picture { padding: .3rem; border-radius: 6px; }
}
"""


def to_html(
    spec: dict,
    folder: Path,
    tables: list[Table],
    figures: dict[str, list[tuple[Path, str]]],
    broken: list[BrokenLine],
    unknown: Mapping[str, int] = MappingProxyType({}),
    whole: bool = True,
) -> str:
    """The page: the cover, the account, the summary, then the sections; what was not run says so, with its command.

    folder: where spec["cover"] and spec["pictures"] lie.
    spec["highlight"]: what rows and columns to be found at a glance have in their name, before a comma.
    unknown: how many result lines there are of each kind that no table is of.
    whole: False leaves out the cover, the pictures and the experiments without a table.
    """
    highlight = spec.get("highlight")
    experiments = [e for e in spec["experiments"] if whole or any(table.experiment == e["name"] for table in tables)]
    summary = [table for table in tables if table.name == SUMMARY]
    across = [table for table in tables if table.experiment == SUMMARY and table.name != SUMMARY]
    account = sorted((table for table in tables if table.experiment == ACCOUNT), key=lambda table: table.name != ACCOUNT)
    links = [(ACCOUNT, "What holds")] * bool(account) + [(SUMMARY, "Summary")] * bool(summary)
    links += [(e["name"], e["title"]) for e in [ACROSS] * bool(across) + experiments]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(spec['title'])}</title><style>{STYLE}</style><body>",
        f"<h1>{escape(spec['title'])}</h1><p class='lead'>{escape(spec['about'])}</p>",
        "<nav>" + "".join(f"<a href='#{name}'>{escape(title)}</a>" for name, title in links) + "</nav>",
        *_problems(broken, unknown, bool(experiments)),
    ]
    if whole and "cover" in spec:
        parts.append(f"<div class='cover'>{_figure(folder / spec['cover']['file'], spec['cover']['caption'])}</div>")
    if account:
        parts.append(f"<h2 id='{ACCOUNT}'>What of the paper holds</h2><p>{escape(spec['account']['more'])}</p>")
        parts += [_folded(table, None) if table.name == "settings" else _table(table, None) for table in account]
        figure = spec["account"]["figure"]
        parts.append(_figure(folder / figure["file"], figure["caption"]))
    if summary:
        parts += [f"<h2 id='{SUMMARY}'>Summary</h2>", *(_table(table, highlight) for table in summary)]
    pictures = [(folder / picture["file"], picture["caption"]) for picture in spec.get("pictures", []) if whole]
    if across:
        parts += _section(ACROSS, across, pictures, highlight, whole)
    for experiment in experiments:
        mine = [table for table in tables if table.experiment == experiment["name"]]
        parts += _section(experiment, mine, figures.get(experiment["name"], []), highlight, whole)
    made = datetime.now(timezone.utc).isoformat(timespec="minutes")
    parts.append(
        f"<p class='small'>Made {made} by <code>python -m evograd.lab.report</code>, from result lines alone.</p></body></html>"
    )
    return "\n".join(parts)


def _problems(broken: list[BrokenLine], unknown: Mapping[str, int], any_section: bool) -> list[str]:
    """Boxes that say what of the result files is not on the page."""
    parts = []
    if broken:
        items = "".join(f"<li>{escape(str(line))}</li>" for line in broken)
        parts.append(f"<div class='box'><p>Lines of the result files that could not be read:</p><ul>{items}</ul></div>")
    if unknown:
        kinds = "".join(f"<li>{escape(name)}: {n}</li>" for name, n in unknown.items())
        parts.append(f"<div class='box'><p>Result lines of a kind that no table here is of:</p><ul>{kinds}</ul></div>")
    if not (any_section or unknown):
        parts.append("<div class='box'><p>The result files hold no run.</p></div>")
    return parts


def _section(
    experiment: dict, tables: list[Table], pictures: list[tuple[Path, str]], highlight: str | None, whole: bool
) -> list[str]:
    parts = [f"<h2 id='{experiment['name']}'>{escape(experiment['title'])}</h2><p>{escape(experiment['about'])}</p>"]
    run = [table for table in tables if table.runs]
    published = [table for table in tables if not table.runs and table.source]
    missing = [table for table in tables if not (table.runs or table.source)]
    parts += [_table(table, highlight) for table in run]
    if published:
        parts += ["<h3>Published, and nothing of it run here</h3>", *(_folded(table, highlight) for table in published)]
    parts += [_figure(path, caption) for path, caption in pictures]
    if not run and experiment is not ACROSS:
        parts.append(
            "<div class='box'><p><strong>Not run yet:</strong> the result files hold no line of this experiment.</p></div>"
        )
    elif missing:
        items = "".join(f"<li>{escape(table.title)}</li>" for table in missing)
        parts.append(f"<div class='box'><p>Not run, so without a table here:</p><ul>{items}</ul></div>")
    commands = {}  # a command may make several tables
    for table in tables:
        if table.command:
            commands.setdefault(table.command, []).append(table.title)
    if experiment.get("plot"):
        commands[experiment["plot"] + ("" if whole else " FILE.jsonl … --out-dir DIR")] = ["Figures"]
    lines = []
    for command, titles in commands.items():
        lines += [f"<span class='what'># {escape(title)}</span>" for title in titles] + [escape(command)]
    if lines:
        parts.append("<h3>Commands</h3><pre>" + "\n".join(lines) + "</pre>")
    return parts


def _table(table: Table, highlight: str | None) -> str:
    return f"<h3>{escape(table.title)}</h3>{_cells(table, highlight)}"


def _folded(table: Table, highlight: str | None) -> str:
    return f"<details class='folded'><summary>{escape(table.title)}</summary>{_cells(table, highlight)}</details>"


def _cells(table: Table, highlight: str | None) -> str:
    """A table's cells, remarks, and what is behind them."""
    is_mine = lambda text: highlight is not None and highlight in text.partition(",")[0]
    n = table.n_labels  # several labels share a cell, one below the other
    groups = _grouped([table.header[0], *table.header[n:]])
    own_rows = [[row[0], *row[n:]] for row in table.rows]
    # A column is marked by its own name or its group's; not in tables whose rows are.
    by_row = any(is_mine(row[0]) for row in own_rows)
    classes, top, below = [], [], []
    for group, names in groups:
        for name in names:
            mine = not by_row and classes and is_mine(group or name) and name != PUBLISHED
            words = ["published"] * (name == PUBLISHED) + ["mine"] * bool(mine)
            words += ["left"] * (not classes or table.words)
            classes.append(" ".join(words))
        mine = " mine" * (not by_row and len(top) > 0 and is_mine(group or names[0]))
        if group is None:
            top.append(f"<th rowspan='2' class='{classes[-1]}'>{escape(names[0])}</th>")
        else:
            top.append(f"<th class='group{mine}' colspan='{len(names)}'>{escape(group)}</th>")
            own = classes[-len(names) :]
            below += [f"<th class='{c}'>{escape('here' if n == group else n)}</th>" for n, c in zip(names, own)]
    if not below:
        top = [cell.replace(" rowspan='2'", "") for cell in top]
    rows = []
    for labels, row in zip(table.rows, own_rows):
        below_it = "".join(f"<span class='below'>{escape(text)}</span>" for text in labels[1:n])
        cells = [f"<th class='{classes[0]}' scope='row'>{escape(row[0])}{below_it}</th>"]
        cells += [_cell(text, name, c) for text, name, c in zip(row[1:], table.header[n:], classes[1:])]
        rows.append(f"<tr{' class=mine' * is_mine(row[0])}>{''.join(cells)}</tr>")
    head = f"<tr>{''.join(top)}</tr>" + (f"<tr>{''.join(below)}</tr>" if below else "")
    return (
        f"<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class='small'>{escape(table.remarks)}</p>{_provenance(table.runs)}"
    )


def _grouped(header: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Columns that belong together: a number and the published one, and neighbours called "group: column"."""
    groups = []
    for name in header:
        group, colon, own = name.partition(": ")
        if name == PUBLISHED and groups[-1][0] is None:
            label = groups.pop()[1][0]
            groups.append((label, [label, name]))
        elif name == PUBLISHED:
            groups[-1][1].append(name)
        elif colon and groups and groups[-1][0] == group:
            groups[-1][1].append(own)
        else:
            groups.append((group, [own]) if colon else (None, [name]))
    return groups


def _cell(text: str, header: str, classes: str) -> str:
    text, *published = text.split("\n")
    style = ""
    if "/ T1–T2" in header and re.fullmatch(r"[\d.]+", text):  # what it costs, at a glance
        classes, style = f"{classes} bar", f" style='--part:{min(float(text), 1):.3f}'"
    if text in ("–", NOT_RUN):
        classes += " none"
    number, sign, spread = text.partition(" ± ") if text.count("±") == 1 else (text, "", "")
    text = escape(number) + (f"<span class='spread'>{sign}{escape(spread)}</span>" if sign else "")
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub(r"`(.+?)`", r"<code>\1</code>", text))
    text += "".join(f"<i class='below' title='published'>{escape(number)}</i>" for number in published)
    return f"<td class='{classes.strip()}'{style}>{text}</td>"


def _figure(path: Path, caption: str) -> str:
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    image = f"<img alt='{escape(caption)}' src='data:image/{kind};base64,{data}'>"
    image = f"<label><input type='checkbox' aria-label='enlarge'>{image}</label>"  # a click enlarges, without a script
    return f"<figure><div class='picture'>{image}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _provenance(runs: list[dict]) -> str:
    """What the numbers of a table were made with."""
    environments = [run["environment"] for run in runs]
    if not environments:
        return ""
    commits = sorted({re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", str(e.get("commit"))) for e in environments})
    devices = sorted({str(e.get("device")) for e in environments})
    versions = sorted({", ".join(f"{k} {v}" for k, v in e.get("versions", {}).items()) for e in environments})
    days = sorted({str(e.get("time"))[:10] for e in environments})
    items = {"commit": commits, "device": devices, "versions": versions, "day": days}
    text = "".join(f"<li>{name}: {escape('; '.join(values))}</li>" for name, values in items.items())
    lines = f"{len(runs)} result line{'s' * (len(runs) > 1)}"
    return f"<details><summary>Behind these numbers: {lines}</summary><ul>{text}</ul></details>"


def escape(text: str) -> str:
    return html.escape(text, quote=True)
