"""What `pip install` gives: the library, without the laboratory of the experiments, and nothing but torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = [p for p in ROOT.glob("evograd/**/*.py") if "lab" not in p.parts]


def imported(path):
    """The modules that a file imports, wherever in it: relative ones as `.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} | {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return names


def test_arrows_run_from_the_laboratory_to_the_library():
    assert len(LIBRARY) >= 8
    for path in LIBRARY:
        names = imported(path)
        assert not [name for name in names if "lab" in name.split(".")], path
        assert not [name for name in names if name.split(".")[0] in ("numpy", "tqdm", "matplotlib", "sklearn")], path


def test_experiments_are_not_imported_by_what_they_share():
    experiments = {"illustration_1d", "rotation", "label_noise_mwn", "cross_domain_fewshot", "metaxl"}
    for path in [*LIBRARY, *ROOT.glob("evograd/lab/*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & experiments, path


def test_importing_the_library_loads_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import evograd; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} | "
        "{name for name in sys.modules if name.startswith('evograd.lab')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    assert "evograd" in new
    assert not new & {"numpy", "tqdm", "matplotlib", "sklearn", "higher", "transformers", "evograd.lab"}, new
    assert {name for name in new if name not in sys.stdlib_module_names} <= {"evograd", "torch", "sympy", "mpmath"}, new  # the last two are torch's


def test_the_distribution_is_the_library_alone():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # a list of its own: evograd.lab is not taken along
    assert re.search(r'^packages = \["evograd", "evograd.host", "evograd.operations"\]', text, re.MULTILINE)
    assert re.search(r'^dependencies = \["torch>=[\d.]+"\]$', text, re.MULTILINE)
    assert (ROOT / "evograd/py.typed").is_file() and 'evograd = ["py.typed"]' in text
