"""Tables from result lines: what resources/paper_tables.json describes, as text and as Markdown."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .account import NOT_RUN, PUBLISHED, effects_rows, filled, settings_rows
from .methods import ESTIMATORS
from .records import FINGERPRINTS, by_configuration, known, mean_std

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "summary"  # name of the table that comes first, and of the section that it stands in
ACCOUNT = "account"  # name of the table of claims, and of the section that it stands in
FLOPS = "FLOPs"  # what stands in the place of a time that was not measured
# Settings whose default is the method's, and those that only methods read which learn hyperparameters.
OF_METHOD = ("temperature", "sigma", "inner_lr", "inner_steps", "share", "weight_input", "perturb", "rtn_input")
OF_LEARNING = (
    "n_candidates", "common_random_numbers", "angle_lr", "meta_every", "meta_optimizer", "meta_lr", "normalize_weights",
    "transform_lr", "rtn_lr", "rtn_layers",
)  # fmt: skip


@dataclass
class Table:
    """A table as text.

    experiment: the section it stands in.  rows: cells, the first n_labels of them labels; a second line in a cell is the
    published number.  command: makes the result lines.  source: of the published numbers, None where there are none.
    words: whether its cells are words, so that lines may break.
    """

    name: str
    experiment: str
    title: str
    header: list[str]
    rows: list[list[str]]
    source: str | None
    runs: list[dict]
    notes: list[str] = field(default_factory=list)
    command: str | None = None
    n_labels: int = 1
    words: bool = False

    @property
    def remarks(self) -> str:
        return " ".join(self.notes + ([f"Published numbers: {self.source}."] if self.source else []))


def build_tables(spec: dict, runs: list[dict], whole: bool = True) -> list[Table]:
    """All tables of resources/paper_tables.json, the summary first; last, those of the runs that stand in none of them.

    whole: False leaves out the tables without a run, and the lines of the summary and of the ratios that have none.
    """
    specs = {table["name"]: table for table in spec["tables"]}
    of_others = {"ratios": _ratio_table, "folded": _folded_table}
    tables = [
        of_others[t["kind"]](t, specs, runs, whole) if t.get("kind") in of_others else build_table(t, runs, whole)
        for t in specs.values()
    ]
    if "cost_figures" in spec:
        tables += _cost_figures(spec["cost_figures"], runs, whole)
    shown = {id(run) for table in tables for run in table.runs}
    left = [run for run in runs if id(run) not in shown]
    parts = [part for experiment in spec["experiments"] for part in (experiment, *experiment.get("also", []))]
    others = [_other_table(part, spec.get("methods", {}), left) for part in parts]
    tables += [table for table in others if table.runs]
    tables += _account(spec, tables) if whole and "account" in spec else []
    if "summary" in spec:
        tables.insert(0, _summary(spec["summary"], specs, spec["experiments"], runs, whole))
    return [table for table in tables if table.runs or whole]


def _account(spec: dict, tables: list[Table]) -> list[Table]:
    """The paper's claims with what was found of them, its settings, and what effects could have been seen."""
    known, of = {table.name: table for table in tables}, spec["account"]
    titles = {experiment["name"]: experiment["title"] for experiment in spec["experiments"]}
    settings = json.loads((ROOT / of["settings"]["file"]).read_text(encoding="utf-8"))["experiments"]
    rows = {
        "claims": [[filled(cell, known) for cell in row] for row in of["claims"]["rows"]],
        "effects": effects_rows(of["effects"]["rows"], known),
        "settings": settings_rows(settings, titles),
    }
    made = [_table({**of[name], "section": ACCOUNT}, of[name]["header"], rows[name], [], [of[name]["note"]]) for name in rows]
    for table, name in zip(made, rows):
        table.words = name != "effects"
    return made


def build_table(spec: dict, runs: list[dict], whole: bool = True) -> Table:
    """The table that `spec` (an entry of resources/paper_tables.json) describes, from the runs that it selects.

    A row without `match` has published numbers alone; a column with `mean_of` is the mean of those that it names, if all are there.
    """
    if spec.get("kind") == "quality":
        return _quality_table(spec, runs, whole)
    if spec.get("kind") == "text":
        return _table(spec, spec["header"], spec["rows"], [], [spec["note"]] if spec.get("note") else [])
    runs = _select(spec, runs)
    if spec.get("kind") == "cost":
        return _cost_table(spec, runs)
    columns = spec["columns"]
    across = _across(columns)
    with_paper = {key for row in spec["rows"] for key in row.get("paper", {})}
    header = [spec.get("first", "Method"), "runs"]
    for column in columns:
        header.append(column["label"])
        if _key(column) in with_paper:
            header.append(PUBLISHED)
    rows, shown = [], {}
    for row in spec["rows"]:
        groups = _groups(_shown(runs, row, columns), across) or [("", [])]
        for suffix, group in groups:
            cells, counts, means = [], [], {}
            for column in columns:
                if "mean_of" in column:
                    cells.append(_cell(_mean(means[key] for key in column["mean_of"]), None, column))
                else:
                    mine = [run for run in group if _matches(run["config"], column.get("where", {}))]
                    shown |= {id(run): run for run in mine}
                    counts.append(len(mine))
                    means[_key(column)], spread = _statistics(mine, column, row)
                    cells.append(_cell(means[_key(column)], spread, column))
                if _key(column) in with_paper:
                    cells.append(_published(row, column) if not suffix else "–")
            different = dict.fromkeys(map(str, counts))
            n_runs = "/".join(different if len(different) == 1 else map(str, counts)) if group else NOT_RUN if "match" in row else "–"
            rows.append([row["label"] + suffix, n_runs, *cells])
    left = len(runs) - len(shown)
    notes = [spec["note"]] if spec.get("note") else []
    if any("±" in cell for cells in rows for cell in cells):
        notes.append("Mean ± sample standard deviation over runs with different seeds.")
    if left:
        more = "1 more run of other settings is" if left == 1 else f"{left} more runs of other settings are"
        notes.append(f"{more} in no row of this table.")
    return _table(spec, header, rows, list(shown.values()), notes)


def _quality_table(spec: dict, runs: list[dict], whole: bool) -> Table:
    """One line for each estimator, one column for each problem: mean cosine to exact T1–T2 in the runs that logged it.

    The last columns are the estimate's FLOPs and time over those of T1–T2 in the same problem, as ranges over the problems.
    """
    kinds = {"quality_flops": "FLOPs / T1–T2", "quality_seconds": "time / T1–T2"}
    columns = [(c, [run for run in _select(c, runs) if "quality_flops" in run["metrics"]]) for c in spec["columns"]]
    columns = [(column, mine) for column, mine in columns if mine or whole]
    header = ["Estimate", *(column["label"] for column, _ in columns), *kinds.values()]
    rows = []
    for row in spec["rows"]:
        cells, costs = [], {kind: [] for kind in kinds}
        for column, mine in columns:
            name = column.get("names", {}).get(row["estimate"], row["estimate"])
            found = [run["metrics"] for run in mine if name in run["metrics"]["cosine"]]
            cells.append(_cell(*mean_std(m["cosine"][name] for m in found)[:2], {"decimals": 3}) if mine else NOT_RUN)
            for kind, values in costs.items():
                values += [m[kind][name] / m[kind]["exact"] for m in found if name in m.get(kind, {})]
        ranges = [[f"{f(values):.2f}" if values else "–" for f in (min, max)] for values in costs.values()]
        rows.append([row["label"], *cells, *(low if low == high else f"{low} to {high}" for low, high in ranges)])
    used = [run for _, mine in columns for run in mine]
    return _table(spec, header, rows, used, [spec["note"]] if spec.get("note") else [])


def _cost_table(spec: dict, runs: list[dict]) -> Table:
    """What one step of every method takes, over what the plain step measured beside it takes: the last run.

    Launches are there if they were counted.
    """
    measured = {"time": "seconds", "FLOPs": "flops", "peak": "peak_bytes"}
    if runs and all("launches" in cost for cost in runs[-1]["metrics"].values()):
        measured["launches"] = "launches"
    header = ["Method", *(f"{name} / plain" for name in measured), "peak", "time / T1–T2", "peak / T1–T2"]
    rows, notes = [], [spec["note"]] if spec.get("note") else []
    if runs:
        methods = runs[-1]["metrics"]
        plain = methods["plain"]
        for method, cost in methods.items():
            ratios = [f"{cost[key] / plain[key]:.2f}" for key in measured.values()]
            peak = f"{cost['peak_bytes'] / 1e6:.1f} MB"
            rows.append([spec["labels"].get(method, method), *ratios, peak, *_over_second_order(methods, method)])
        notes.append(f"One step measured side by side on: {runs[-1]['environment']['device']}.")
    return _table(spec, header, rows, runs[-1:], notes)


def _over_second_order(methods: dict, method: str) -> list[str]:
    """(time, peak) of a method's step over those of T1–T2, from the metrics of a cost record."""
    own, second = methods.get(method), methods.get("second_order")
    return [f"{own[key] / second[key]:.2f}" if own and second else "–" for key in ("seconds", "peak_bytes")]


def _ratio_table(spec: dict, specs: dict[str, dict], runs: list[dict], whole: bool) -> Table:
    """One line for each cost table that the spec names: time and peak of methods over those of T1–T2, from the last record."""
    header, rows, used, notes = ["Application"], [], [], [spec["note"]] if spec.get("note") else []
    for title in spec["methods"].values():
        header += [f"{title}: time / T1–T2", f"{title}: peak / T1–T2"]
    for row in spec["rows"]:
        last = _select(specs[row["cost"]], runs)[-1:]
        if not (last or whole):
            continue
        methods = last[0]["metrics"] if last else {}
        cells = [cell for method in spec["methods"] for cell in _over_second_order(methods, method)]
        second = methods.get("second_order")
        rows.append([row["label"], *cells, f"{second['peak_bytes'] / 1e6:.0f} MB" if second else NOT_RUN])
        used += last
    header.append("T1–T2: peak")
    if used:
        notes.append(f"One step of each method measured side by side on: {devices(used)}.")
    return _table(spec, header, rows, used, notes)


def _folded_table(spec: dict, specs: dict[str, dict], runs: list[dict], whole: bool) -> Table:
    """The lines and columns of several tables that have a published number; "ours (published …)" where it was run as well.

    Its rows name a table each, and what the data are called.
    """
    lines, columns, used = [], {}, []
    for row in spec["rows"]:
        table = build_table(specs[row["table"]], runs, whole)
        at = [i for i, title in enumerate(table.header) if title == PUBLISHED]
        columns |= {table.header[i - 1]: None for i in at}
        used += table.runs
        for cells in table.rows:
            mine = {table.header[i - 1]: (cells[i - 1], cells[i]) for i in at}
            lines.append((row["label"], cells[0], mine))
    rows = []
    for label, method, mine in lines:
        found = [mine.get(column, ("–", "–")) for column in columns]
        if any(cell != "–" for pair in found for cell in pair):
            both = lambda own, theirs: theirs if own == "–" else own if theirs == "–" else f"{own} (published {theirs})"
            rows.append([label, method, *(both(*pair) for pair in found)])
    header = [spec["first"], "Method", *columns]
    table = _table(spec, header, rows, used, [spec["note"]] if spec.get("note") else [])
    table.n_labels = 2
    return table


def _cost_figures(spec: dict, runs: list[dict], whole: bool) -> list[Table]:
    """The table of ratios, and one for each of the paper's cost figures."""
    return [cost_ratios(spec, runs, whole), *(_cost_figure(figure, spec, runs, whole) for figure in spec["figures"])]


def cost_cases(figure: dict, runs: list[dict]) -> list[dict]:
    """The figure's cases, to each of which is added:

    run: its record, None if there is none; of several the last on CUDA, else the last.
    ours, paper: {method: {gb, seconds_an_epoch, time over that of T1–T2, time_is}}; time_is: whether FLOPs stand in its place.
    """
    kind, cases = f"{figure['experiment']}_paper_cost", []
    for case in figure["cases"]:
        of_case = [run for run in runs if run["experiment"] == kind and _matches(run["config"], case["match"])]
        of_case.sort(key=lambda run: run["config"]["device"] == "cuda")
        run = of_case[-1] if of_case else None
        ours, paper = {}, {method: dict(cost) for method, cost in case.get("paper", {}).items()}
        for method, cost in (run["metrics"] if run else {}).items():
            steps = figure["steps_an_epoch"]
            ours[method] = {
                "gb": cost["peak_bytes"] / 1e9,
                "seconds_an_epoch": None if cost["seconds"] is None else cost["seconds"] * steps,
                "tflop": cost["flops"] / 1e12,
                "counted": cost["seconds"] is None and run["config"]["device"] == "cuda",
            }
        for costs in (ours, paper):
            second = costs.get("second_order", {})
            for cost in costs.values():
                timed = cost.get("seconds_an_epoch") is not None and second.get("seconds_an_epoch") is not None
                key = "seconds_an_epoch" if timed else "tflop"
                cost["time"] = cost[key] / second[key] if key in cost and key in second else None
                cost["time_is"] = "time" if timed else FLOPS
        cases.append({**case, "run": run, "ours": ours, "paper": paper})
    return cases


def cost_ratios(spec: dict, runs: list[dict], whole: bool = True) -> Table:
    """One line for each case of the cost figures: memory and time of the methods over those of T1–T2, the paper's and ours."""
    header, rows, used = ["Case"], [], []
    for method in spec["compared"]:
        title, paper = spec["methods"][method], method == spec["published"]
        header += [f"{title}: memory / T1–T2", *[PUBLISHED] * paper, f"{title}: time / T1–T2", *[PUBLISHED] * paper]
    for figure in spec["figures"]:
        for case in cost_cases(figure, runs):
            if not (case["run"] or whole):
                continue
            cells = []
            for method in spec["compared"]:
                ours, paper = (_cost_ratio(case[source], method) for source in ("ours", "paper"))
                for own, published in zip(ours if case["run"] else (NOT_RUN, NOT_RUN), paper):
                    cells += [own, *[published] * (method == spec["published"])]
            rows.append([f"{figure['what']}, {case['label']}", *cells])
            used += [case["run"]] if case["run"] else []
    notes = [spec["note"], *_measured_on(used)]
    return Table("cost-ratios", SUMMARY, spec["title"], header, rows, spec["source"], used, notes, spec["command"])


def _cost_ratio(costs: dict, method: str) -> tuple[str, str]:
    """(memory, time) of a method over those of T1–T2."""
    own, second = costs.get(method), costs.get("second_order")
    if not (own and second):
        return "–", "–"
    memory = f"{own['gb'] / second['gb']:.2f}" + " (counted)" * (own.get("counted") != second.get("counted"))
    return memory, f"{own['time']:.2f}" + f" ({FLOPS})" * (own["time_is"] == FLOPS)


def _cost_figure(figure: dict, spec: dict, runs: list[dict], whole: bool) -> Table:
    """The numbers of one figure: a line for each method in each case."""
    header = ["Case", "method", "memory (GB)", PUBLISHED, "seconds an epoch", PUBLISHED, "TFLOP a step"]
    titles, rows, used = {**spec["methods"], **figure.get("methods", {})}, [], []
    for case in cost_cases(figure, runs):
        if not (case["run"] or whole):
            continue
        used += [case["run"]] if case["run"] else []
        for method in titles:
            ours, paper = case["ours"].get(method, {}), case["paper"].get(method, {})
            if not (ours or paper):
                continue
            cells = [NOT_RUN] * 3
            if ours:
                seconds = ours["seconds_an_epoch"]
                memory = f"{ours['gb']:.2f}" + " (counted)" * ours["counted"]
                cells = [memory, "–" if seconds is None else f"{seconds:.0f}", f"{ours['tflop']:.2f}"]
            published = [str(paper.get(key, "–")) for key in ("gb", "seconds_an_epoch")]
            rows.append([case["label"], titles[method], cells[0], published[0], cells[1], published[1], cells[2]])
    notes = [figure["note"], *_measured_on(used)]
    name, command = f"{figure['experiment']}-figure-{figure['number']}".replace("_", "-"), spec["command"]
    return Table(name, figure["experiment"], figure["title"], header, rows, figure["source"], used, notes, command, n_labels=2)


def _measured_on(runs: list[dict]) -> list[str]:
    return [f"Here: {devices(runs)}."] if runs else []


def devices(runs: Iterable[dict]) -> str:
    """On what they ran."""
    return "; ".join(dict.fromkeys(run["environment"]["device"] for run in runs))


def _summary(spec: dict, specs: dict[str, dict], experiments: list[dict], runs: list[dict], whole: bool) -> Table:
    """A line or two for each experiment: a column of one of its tables by method, and what it says of the paper's claim.

    Published numbers stand in the cells below ours. Of the entry's `measures` the first one that was run counts; those before
    it that have published numbers stand above it, not run. Several columns are averaged, where all of them were run.
    """
    titles = {experiment["name"]: experiment["title"] for experiment in experiments}
    rows, used = [], {}
    for entry in spec["entries"]:
        lines = [(measure, *_measure(spec, measure, specs[measure["table"]], runs)) for measure in entry["measures"]]
        n, (measure, cells, _, mine) = next((line for line in enumerate(lines) if set(line[1][2]) - {None}), (0, lines[0]))
        if not (mine or whole):
            continue
        title = titles[entry["experiment"]]
        rows += [[title, above["label"], *own, NOT_RUN] for above, own, *_ in lines[:n] if "\n" in "".join(own)]
        rows.append([title, measure["label"], *cells, measure["verdict"] if mine else NOT_RUN])
        used |= {id(run): run for run in mine}
    header = ["Experiment", "measured", *spec["methods"].values(), "the paper's claim"]
    notes = [spec["note"]] if spec.get("note") else []
    return Table(SUMMARY, SUMMARY, spec["title"], header, rows, spec.get("source"), list(used.values()), notes, n_labels=2)


def _measure(spec: dict, measure: dict, table: dict, runs: list[dict]) -> tuple[list[str], list[float | None], list[dict]]:
    """(cells of one line of the summary, our own values in them, the runs behind them).

    A method whose row the table does not have was not run; one that the measure does not name has no place there.
    """
    columns = {column["label"]: column for column in table["columns"]}
    columns = [columns[label] for label in measure["columns"]]
    labelled = {row["label"]: row for row in table["rows"]}
    cells, values, used = [], [], []
    for method in spec["methods"]:
        row = labelled.get(measure["rows"].get(method))
        wanted = _shown(_select(table, runs), row, table["columns"]) if row else []
        group = next((group for _, group in _groups(wanted, _across(table["columns"]))), [])
        chosen = [[run for run in group if _matches(run["config"], column.get("where", {}))] for column in columns]
        found = [_statistics(mine, column, row) for mine, column in zip(chosen, columns)]
        if len(found) > 1:  # the average is shown without a spread: what the columns stand for differs
            found = [(_mean(mean for mean, _ in found), None)]
        values.append(found[0][0])
        cells.append(_cell(*found[0], columns[0]) if group or method not in measure["rows"] else NOT_RUN)
        theirs = [(row or {}).get("paper", {}).get(_key(column)) for column in columns]
        if all(theirs):
            mean = _mean(cell["mean"] for cell in theirs)
            cells[-1] += "\n" + _cell(mean, theirs[0].get("std") if len(theirs) == 1 else None, columns[0])
        used += [run for mine in chosen for run in mine]
    return cells, values, used


def _other_table(experiment: dict, methods: dict[str, str], runs: list[dict]) -> Table:
    """One line for each configuration of the experiment's own among `runs`, which no other table shows.

    experiment: its `data` are the settings that have a column, its `measures` the columns of numbers. What it has `also` are other
    kinds of its records, each with a title of its own.
    methods: their titles, in the order of the lines.
    """
    runs = [run for run in runs if run["experiment"] == experiment["name"] and experiment.get("measures")]
    columns, measures = experiment.get("data", []), experiment.get("measures", [])
    apart = [name for column in columns for name in column["settings"]]
    own, usual = differences([run["config"] for run in runs], apart)
    number = {id(run): i for i, run in enumerate(runs)}
    groups = [[number[id(run)] for run in group] for group in by_configuration(runs)]
    order = {name: i for i, name in enumerate(methods)}

    def place(group: list[int]) -> tuple:
        config = runs[group[0]]["config"]
        return [_sortable(config.get(name)) for name in apart], order.get(str(config.get("method")), len(order))

    rows = []
    for group in sorted(groups, key=place):
        mine = [runs[i] for i in group]
        config = mine[0]["config"]
        method = _text(config.get("method"))
        label = ", ".join([methods.get(method, method), *([named(own[group[0]])] if own[group[0]] else [])])
        data = [
            column.get("between", " ").join(_text(config[n]) for n in column["settings"] if config.get(n) is not None) or "–"
            for column in columns
        ]
        numbers = [_cell(*_statistics(mine, measure, None), measure) for measure in measures]
        rows.append([label, *data, str(len(mine)), *numbers])
    header = ["Method", *(column["label"] for column in columns), "seeds", *(measure["label"] for measure in measures)]
    notes = ["Every configuration that no other table shows."]
    common = {name: value for name, value in usual.items() if value is not None and value is not False}
    if common:
        notes.append(f"Settings, where a line names no other: {named(common)}.")
    if any("±" in cell for cells in rows for cell in cells):
        notes.append("Mean ± sample standard deviation over runs with different seeds.")
    section = experiment.get("of", experiment["name"])
    title = experiment["title"] if "of" in experiment else "Runs with data or settings of their own"
    return Table(f"{experiment['name']}-others", section, title, header, rows, None, runs, notes)


def differences(configs: Sequence[dict], without: Iterable[str] = ()) -> tuple[list[dict], dict]:
    """({setting: value} of what each configuration has other than most of them, what most have).

    Not of the seed, the method, and the settings `without`. Where the method decides on a setting's default, or on whether it
    is read, a configuration is compared with those of its method, and the second dict does not have the setting.
    """
    names = dict.fromkeys(name for config in configs for name in config if name not in ("seed", "method", *FINGERPRINTS, *without))

    def peers(name: str, config: dict) -> tuple[str, str | None]:
        method = str(config.get("method"))
        return name, method if name in OF_METHOD or (name in OF_LEARNING and method not in ESTIMATORS) else None

    counts: dict[tuple[str, str | None], Counter] = {}
    for config in configs:
        for name in names:
            counts.setdefault(peers(name, config), Counter())[json.dumps(config.get(name), sort_keys=True)] += 1
    usual = {key: json.loads(values.most_common(1)[0][0]) for key, values in counts.items()}
    own = [{n: config.get(n) for n in names if config.get(n) != usual[peers(n, config)]} for config in configs]
    return own, {name: value for (name, method), value in usual.items() if method is None}


def named(settings: dict) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {_text(value)}" for name, value in settings.items())


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not given" if value is None else str(value)


def _sortable(value: object) -> tuple[bool, float, str]:
    """Numbers before words."""
    number = isinstance(value, (int, float))
    return not number, value if number else 0, _text(value)


def safe_name(text: str) -> str:
    """A name of data as a part of a file's name: what may not stand there is replaced, and a digest tells such names apart."""
    safe = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip(".")[:80]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _table(spec: dict, header: list[str], rows: list[list[str]], runs: list[dict], notes: list[str]) -> Table:
    section = spec.get("section", spec.get("experiment"))
    return Table(spec["name"], section, spec["title"], header, rows, spec.get("source"), runs, notes, spec.get("command"))


def _select(spec: dict, runs: list[dict]) -> list[dict]:
    return [run for run in runs if run["experiment"] == spec["experiment"] and _matches(run["config"], spec.get("where", {}))]


def _shown(runs: list[dict], row: dict, columns: Sequence[dict]) -> list[dict]:
    """The runs of a row that one of the columns is of."""
    mine = [run for run in runs if "match" in row and _matches(run["config"], row["match"])]
    return [run for run in mine if any(_matches(run["config"], column.get("where", {})) for column in columns)]


def _across(columns: Sequence[dict]) -> tuple[str, ...]:
    """What runs of one row may differ in."""
    return ("seed", *(key for column in columns for key in column.get("where", {})))


def _key(column: dict) -> str:
    """By what name a row's published numbers speak of a column."""
    return column.get("key", column["value"])


def _groups(runs: list[dict], across: Sequence[str]) -> list[tuple[str, list[dict]]]:
    """Runs of one configuration but for the keys `across` are one row; what sets further rows apart follows their label."""
    ordered = sorted(by_configuration(runs, across), key=len, reverse=True)
    result = []
    for group in ordered:
        usual, this = ordered[0][0]["config"], group[0]["config"]
        same = (*across, *FINGERPRINTS)
        different = [k for k in {**usual, **this} if k not in same and usual.get(k) != this.get(k)]
        if group is not ordered[0] and not different:
            different = [name for name in FINGERPRINTS if known(group, name) != known(ordered[0], name)]
        values = {k: known(group, k) if k in FINGERPRINTS else this.get(k) for k in different}
        result.append(("".join(f", {k} {_text(value)}" for k, value in values.items()), group))
    return result


def _matches(config: dict, wanted: dict) -> bool:
    return all(config.get(key) == value for key, value in wanted.items())


def _statistics(runs: list[dict], column: dict, row: dict | None) -> tuple[float | str | None, float | None]:
    """(mean, standard deviation) of a column; of text, which has neither, the last run's."""
    values = [_value(run, column, row) for run in runs]
    text = [value for value in values if isinstance(value, str)]
    return (text[-1], None) if text else mean_std(values)[:2]


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else sum(values) / len(values)


def _value(run: dict, column: dict, row: dict | None) -> float | str | None:
    """`column["value"]` is a path such as metrics.angle, a * in it the row's `key`; `scale` turns it into the label's unit."""
    value = run
    for key in column["value"].split("."):
        key = row["key"] if key == "*" else key
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, (int, float)):
        return value * column.get("scale", 1)
    return value if isinstance(value, str) else None


def _cell(mean: float | str | None, std: float | None, column: dict) -> str:
    if mean is None or isinstance(mean, str):
        return mean or "–"
    form = column.get("format", f".{column.get('decimals', 2)}f")
    return f"{mean:{form}}" + (f" ± {std:{form}}" if std is not None else "")


def _published(row: dict, column: dict) -> str:
    published = row.get("paper", {}).get(_key(column))
    return _cell(published["mean"], published.get("std"), column) if published else "–"


def to_markdown(table: Table) -> str:
    n = len(table.header) if table.words else table.n_labels
    align = [":--"] * n + ["--:"] * (len(table.header) - n)
    rows = [[_in_markdown(cell) for cell in row] for row in table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [table.header, align, *rows])
    return text + "\n\n" + table.remarks + "\n"


def _in_markdown(cell: str) -> str:
    ours, *published = cell.replace("|", "\\|").split("\n")
    return "".join([ours, *(f"<br>*{number}*" for number in published)])


def update_markdown(text: str, tables: list[Table]) -> str:
    """`text` with what stands between <!-- table:NAME --> and <!-- /table --> made anew; ValueError for an unknown name."""
    known = {table.name: table for table in tables}

    def renew(match: re.Match) -> str:
        if match["name"] not in known:
            raise ValueError(f"marker <!-- table:{match['name']} -->: no such table; there are {', '.join(known)}")
        return f"{match['start']}\n{to_markdown(known[match['name']])}{match['end']}"

    pattern = r"(?P<start><!-- table:(?P<name>[\w-]+) -->).*?(?P<end><!-- /table -->)"
    return re.sub(pattern, renew, text, flags=re.DOTALL)


def write_between_markers(page: Path, parts: Mapping[str, str]) -> None:
    """Each part between <!-- NAME --> and <!-- /NAME --> in a file; one whose markers it has not is left out."""
    text = page.read_text(encoding="utf-8")
    for name, made in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
