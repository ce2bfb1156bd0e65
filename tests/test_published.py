"""Every number that the paper and its relatives published stands in the tables, in the line and the column where it belongs.

The cells below are typed from the sources, in another form than resources/paper_tables.json has them.
"""

import json
import re
from pathlib import Path

import pytest

from evograd.lab.tables import PUBLISHED, build_table, to_markdown

TABLES = json.loads((Path(__file__).parents[1] / "resources/paper_tables.json").read_text(encoding="utf-8"))["tables"]
TABLES = {table["name"]: table for table in TABLES}
OWN_RUN = "T1–T2, the EvoGrad authors' own run"
FEW_SHOT = ("no transformation", "fixed transformation", "T1–T2 (higher)", OWN_RUN, "EvoGrad")
LABEL_NOISE = ("cross-entropy", "T1–T2 (higher)", OWN_RUN, "EvoGrad, K = 2")

# Table 3 of the paper. Shots and backbone; then, by method as in FEW_SHOT, CUB, Cars, Places, Plantae, each ± 95 % interval.
TABLE_3 = """
resnet10-1
  44.33 0.59   29.53 0.45   47.76 0.63   33.76 0.52
  44.67 0.58   30.38 0.47   48.40 0.64   35.40 0.53
  48.38 0.63   32.21 0.51   50.74 0.66   35.00 0.52
  46.03 0.60   31.50 0.49   49.29 0.65   36.34 0.59
  47.39 0.61   32.51 0.56   50.70 0.66   36.00 0.56

resnet34-1
  45.61 0.59   29.54 0.46   48.87 0.65   35.03 0.54
  45.15 0.59   30.28 0.44   49.96 0.66   35.69 0.54
  -
  -
  45.97 0.60   33.21 0.54   50.76 0.67   38.23 0.58

resnet10-5
  62.13 0.74   40.64 0.54   64.34 0.57   46.29 0.56
  63.64 0.77   42.24 0.57   65.42 0.58   47.81 0.51
  64.99 0.54   43.44 0.59   67.35 0.54   50.39 0.52
  65.94 0.56   43.88 0.56   65.57 0.57   51.43 0.55
  64.63 0.56   42.64 0.58   66.54 0.57   52.92 0.57

resnet34-5
  63.33 0.59   40.50 0.55   64.94 0.56   50.20 0.55
  62.48 0.56   41.06 0.52   64.39 0.57   50.08 0.55
  -
  -
  66.40 0.56   44.25 0.55   67.23 0.56   52.47 0.56
"""

# Table 4: 0, 20 and 40 % flip2 noise, by method as in LABEL_NOISE, each ± standard deviation.
TABLE_4 = """
cifar10
  92.89 0.32   76.83 2.30   70.77 2.31
  92.04 0.15   90.33 0.61   87.54 0.23
  91.10 0.19   89.31 0.40   85.90 0.45
  92.02 0.31   89.86 0.64   87.74 0.54

cifar100
  70.50 0.12   50.86 0.27   43.01 1.16
  70.11 0.33   64.22 0.28   58.64 0.47
  68.42 0.36   63.43 0.43   56.54 0.90
  69.16 0.49   64.05 0.63   57.44 1.25
"""

# Meta-Weight-Net's poster, WRN-28-10, 0, 40 and 60 % uniform noise: cross-entropy, then T1–T2.
UNIFORM = """
cifar10-unif
  95.60 0.22   68.07 1.23   53.12 3.03
  94.52 0.25   89.27 0.28   84.07 0.33

cifar100-unif
  79.95 1.26   51.11 0.42   30.92 0.33
  78.76 0.24   67.73 0.26   58.75 0.11
"""

# Table 5: Quechua, Min Dong, Ilocano, Mingrelian, Meadow Mari, Maori, Turkmen, Guarani, average.
TABLE_5 = {
    "joint training": "66.10 55.83 80.77 69.32 71.11 82.29 61.61 65.44 69.06",
    "T1–T2 (higher)": "68.67 55.97 77.57 73.73 68.16 88.56 66.99 69.37 71.13",
    "joint training, the EvoGrad authors' own run": "59.75 49.19 79.43 68.85 68.42 89.94 61.90 69.44 68.37",
    OWN_RUN: "65.29 56.33 76.50 67.24 71.17 89.41 66.67 64.11 69.59",
    "EvoGrad (classifier)": "71.00 57.02 85.99 70.40 65.45 88.12 66.97 70.91 71.98",
}


def published(name):
    """({line's label: its published cells}, what stands below the table) of a table that nothing was run for."""
    table = build_table(TABLES[name], [])
    columns = [i for i, title in enumerate(table.header) if title == PUBLISHED]
    return {row[0]: [row[i] for i in columns] for row in table.rows}, table


def blocks(text):
    """{name: lines of cells "mean ± spread"}; a line of "-" is a method that has none."""
    for block in re.split(r"\n(?=\S)", text.strip()):
        name, *lines = block.splitlines()
        yield name, [re.findall(r"([\d.]+) ([\d.]+)", line) for line in lines]


def expected(text, methods):
    for name, lines in blocks(text):
        yield name, {m: [f"{mean} ± {spread}" for mean, spread in line] for m, line in zip(methods, lines, strict=False) if line}


CASES = [
    *((f"cross-domain-fewshot-{name}", cells, "Table 3") for name, cells in expected(TABLE_3, FEW_SHOT)),
    *((f"label-noise-{name}", cells, "Table 4") for name, cells in expected(TABLE_4, LABEL_NOISE)),
    *((f"label-noise-{name}", cells, "Meta-Weight-Net") for name, cells in expected(UNIFORM, LABEL_NOISE)),
    ("metaxl-wikiann", {label: cells.split() for label, cells in TABLE_5.items()}, "Table 5"),
]


@pytest.mark.parametrize(("name", "cells", "source"), CASES, ids=[name for name, *_ in CASES])
def test_published_numbers_stand_in_their_cells_and_nowhere_else(name, cells, source):
    found, table = published(name)
    shown = {label: [cell for cell in row if cell != "–"] for label, row in found.items()}
    assert {label: row for label, row in shown.items() if row} == cells
    assert source in table.source and "NeurIPS" in table.source
    assert all(row[1] == ("–" if "own run" in row[0] else "not run") for row in table.rows)


def test_all_published_cells_are_here():
    numbers = [sum(map(len, cells.values())) for _, cells, _ in CASES]
    assert numbers == [20, 12, 20, 12, 12, 12, 6, 6, 45]


def test_asymptotic_costs_are_shown_as_published():
    text = to_markdown(build_table(TABLES["complexity"], []))
    assert "| EvoGrad | O(KP+H) | O(P+H) |" in text and "| T1–T2 | O(PH) | O(P+H) |" in text and "Table 2" in text


def test_rotation_and_its_time_are_the_notebooks():
    found, table = published("rotation-mnist")
    assert found["no rotation"][:2] == ["81.79 ± 0.64", "98.40 ± 0.07"]
    assert found["EvoGrad"] == ["98.11 ± 0.32", "77.23 ± 6.55", "28.47 ± 5.23"]
    assert "6.3 to 6.4 s" in table.remarks and "14.2 to 15.6 s" in table.remarks
