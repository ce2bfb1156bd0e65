"""What REPRODUCTION.md is made of: cells of other tables by name, settings in words, effects that could have been seen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

NOT_RUN = "not run"
PUBLISHED = "published"  # header of a column of published numbers, which belong to the column before it


def filled(text: str, tables: Mapping) -> str:
    """`text` with every {table|row|column} replaced by that cell; "not run" where there is no such row or nothing in it.

    A row is named by its labels, joined by ": "; {table|row|column|published} is the cell after it.  ValueError for an unknown
    table or column.
    """
    return re.sub(r"\{([^{}]+)\}", lambda match: _cell(match[1], tables), text)


def _cell(reference: str, tables: Mapping) -> str:
    name, row, column, *published = reference.split("|")
    if name not in tables:
        raise ValueError(f"{{{reference}}}: no table {name}; there are {', '.join(tables)}")
    table = tables[name]
    if column not in table.header:
        raise ValueError(f"{{{reference}}}: no column {column}; there are {', '.join(table.header)}")
    at = table.header.index(column) + (published == [PUBLISHED])
    found = next((cells[at] for cells in table.rows if ": ".join(cells[: table.n_labels]) == row), "–")
    return NOT_RUN if found == "–" else found.split("\n")[0]


def settings_rows(experiments: Mapping[str, Sequence[dict]], titles: Mapping[str, str]) -> list[list[str]]:
    """(experiment, the paper's settings in words, where ours differ and why) of resources/paper_settings.json."""
    rows = []
    for experiment, entries in experiments.items():
        said = "; ".join(f"**{entry['name']}** {in_words(entry['value'])}" for entry in entries)
        differing = [entry for entry in entries if "ours" in entry]
        own = "; ".join(f"**{e['name']}** {in_words(_changed(e['value'], e['ours']))}: {e['why']}" for e in differing)
        rows.append([titles[experiment], said, own or "–"])
    return rows


def _changed(value: object, ours: object) -> object:
    """What of ours is not the paper's."""
    if isinstance(value, dict) and isinstance(ours, dict):
        return {name: v for name, v in ours.items() if value.get(name) != v}
    return ours


def in_words(value: object, inside: bool = False) -> str:
    """A setting as a reader wants it: 384×768 for shapes, names before values.  inside: of a list, whether it is in another."""
    if isinstance(value, dict):
        return ", ".join(in_words(v) if name == "kind" else f"{name} {_listed(v)}" for name, v in value.items())
    if isinstance(value, list):
        shape = value and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if inside:
            return "×".join(map(str, value)) if shape else f"({', '.join(map(in_words, value))})"
        return ", ".join(in_words(v, inside=isinstance(v, list)) for v in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.10g}"
    return {None: "its own", True: "yes", False: "no"}.get(value, value)


def _listed(value: object) -> str:
    """A value behind its name: in brackets where it is several."""
    several = isinstance(value, list) and len(value) > 1
    return f"({in_words(value)})" if several else in_words(value)


def effects_rows(rows: Sequence[dict], tables: Mapping) -> list[list[str]]:
    """What comparing a baseline with another method could have shown, for each row {label, table, column, methods, published}.

    (label, runs of both, spreads over their seeds, two standard errors of the difference, the difference, the published one,
    seeds of each method with which the published one would be two standard errors).
    Of a method with one run the spread is that of the column's other methods, pooled.  published: two references, see `filled`.
    """
    made = []
    for row in rows:
        table, names = tables[row["table"]], row["methods"]
        at = table.header.index(row["column"])
        column = {cells[0]: cells[at] for cells in table.rows}
        runs = {cells[0]: _runs(cells[1], table.header[2:at]) for cells in table.rows}
        spreads = {name: float(cell.split(" ± ")[1]) for name, cell in column.items() if " ± " in cell}
        used, two_errors, theirs = [], None, _difference([filled(reference, tables) for reference in row.get("published", [])])
        if spreads and all(runs[name] for name in names):
            pooled = math.sqrt(sum(s**2 for s in spreads.values()) / len(spreads))
            used = [spreads.get(name, pooled) for name in names]
            two_errors = 2 * math.sqrt(sum(s**2 / runs[name] for s, name in zip(used, names)))
        made.append([
            row["label"],
            " and ".join(str(runs[name] or NOT_RUN) for name in names),
            " and ".join(f"{s:.1f}" for s in used) or "–",
            "–" if two_errors is None else f"{two_errors:.1f}",
            _difference([column[name] for name in names]),
            theirs,
            str(max(2, math.ceil(4 * sum(s**2 for s in used) / float(theirs) ** 2))) if used and theirs != "–" else "–",
        ])  # fmt: skip
    return made


def _runs(text: str, before: Sequence[str]) -> int:
    """How many a cell "3" or "1/3/1" says of the column that comes after those."""
    counts = text.split("/")
    count = counts[len([name for name in before if name != PUBLISHED])] if len(counts) > 1 else counts[0]
    return int(count) if count.isdigit() else 0


def _difference(cells: Sequence[str]) -> str:
    """The second number minus the first one."""
    found = [re.match(r"[\d.]+", cell) for cell in cells]
    return f"{float(found[1][0]) - float(found[0][0]):+.1f}" if len(found) == 2 and all(found) else "–"
