"""The house: where arrows may lead, and how long a thing may be. Consequences of its shape, looked at so that they stay."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import evograd

ROOT = Path(evograd.__file__).resolve().parent
FILES = {str(p.relative_to(ROOT)): p for p in sorted(ROOT.rglob("*.py"))}
LIBRARY = {name: p for name, p in FILES.items() if not name.startswith("lab/")}
# From the top down: a file may import from its own floor's row if that comes before it, and from the rows below.
FLOORS = [
    ["lab"],
    ["__init__"],
    ["comparison"],
    ["ranking"],
    ["trajectory"],
    ["products", "lookback"],
    ["baselines"],
    ["hypergradient", "guided", "mixed_mode"],
    ["recording"],
    ["noise", "evaluation", "measuring", "radius", "optimizers"],
    ["host"],
    ["operations"],
]


def module_of(name):
    first = name.split("/")[0]
    return first.removesuffix(".py")


def imported(path):
    """Names of the library's modules that a file imports, wherever in it."""
    inside = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = inside[: len(inside) - (node.level - 1)]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from ("/".join((*base, *name.split("."))) for name in names)
            elif node.module and node.module.split(".")[0] == "evograd":
                yield "/".join(node.module.split(".")[1:])
        elif isinstance(node, ast.Import):
            yield from ("/".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == "evograd")


@pytest.mark.parametrize("name", FILES)
def test_arrows_run_down(name):
    floor = {module: i for i, row in enumerate(FLOORS) for module in row}
    own = module_of(name)
    for target in imported(FILES[name]):
        assert target, f"{name} imports the package itself"
        other = module_of(target)
        assert floor[other] > floor[own] or other == own in ("host", "operations", "lab"), f"{name} imports {target}"


def test_every_file_is_on_a_floor():
    assert {module_of(name) for name in FILES} == {module for row in FLOORS for module in row}


def test_within_a_floor_nothing_goes_round():
    for folder in ("host", "operations"):
        edges = {
            name.removesuffix(".py"): {t for t in imported(p) if module_of(t) == folder and "/" in t}
            for name, p in LIBRARY.items()
            if module_of(name) == folder
        }
        while edges:
            ends = {name for name, targets in edges.items() if not targets & edges.keys() - {name}}
            assert ends, f"imports go round among {sorted(edges)}"
            edges = {name: targets for name, targets in edges.items() if name not in ends}


def bodies():
    """(file, function, lines of its body without the docstring, lines of the docstring)"""
    for name, path in LIBRARY.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                has = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
                start = node.body[1] if has else first
                docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
                yield name, node.name, node.end_lineno - start.lineno + 1, docstring


def test_no_body_is_long():
    for name, function, lines, docstring in bodies():
        assert lines <= 60, f"{name}: {function} has {lines} lines"
        assert docstring <= 60, f"{name}: the docstring of {function} has {docstring} lines"


@pytest.mark.parametrize("name", ["hypergradient", "guided", "mixed_mode", "trajectory"])
def test_an_estimator_is_read_at_a_glance(name):
    function = "hypergradient" if name == "trajectory" else name
    (lines,) = [lines for file, of, lines, _ in bodies() if (file, of) == (f"{name}.py", function)]
    assert lines <= 40


def test_few_keywords():
    def keywords(function):
        return [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]

    assert len(keywords(evograd.hypergradient)) <= 13
    assert len(keywords(evograd.guided)) <= 9
    ours = {p.name for p in keywords(evograd.guided)}
    assert not ours & {"n_candidates", "sigma", "temperature", "noise", "generator", "chunk_size", "common_random_numbers"}
    assert not {p.name for p in keywords(evograd.hypergradient)} & {"lookahead", "radius", "share_kinks"}


def test_no_file_is_long():
    tables = {"operations/kinks.py", "operations/forward_mode.py"}
    for name, path in LIBRARY.items():
        n = len(path.read_text(encoding="utf-8").splitlines())
        assert n <= 350 or name in tables, f"{name} has {n} lines"


def test_passes_are_subtracted_in_one_place():
    """θ ± r·v is made by `Pair`, and by nobody else."""
    makers = [name for name, path in LIBRARY.items() if re.search(r"class (Pair|Side)\b", path.read_text(encoding="utf-8"))]
    users = [name for name, path in LIBRARY.items() if re.search(r"\bPair\(", path.read_text(encoding="utf-8"))]
    assert makers == users == ["guided.py"]
