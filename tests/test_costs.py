"""The paper's cost figures: published numbers, cases, how they are measured, ratios and figures."""

import importlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from cross_domain_fewshot import compare as fewshot
from evograd.lab import cli, cost_figures, costs, tables
from evograd.lab.records import append_line
from evograd.measuring import Cost
from label_noise_mwn import compare as label_noise
from metaxl import compare as metaxl

ROOT = Path(__file__).resolve().parents[1]
SPEC = json.loads((ROOT / "resources/paper_tables.json").read_text(encoding="utf-8"))["cost_figures"]

# Figure, case, and GB and seconds an epoch of EvoGrad, of T1-T2, and of joint training: typed from the authors' poster.
PUBLISHED = """
3 1-shot, ResNet-10: 4.8 92.3 8.3 167.3
3 5-shot, ResNet-10: 5.3 115.8 8.5 254.7
4 CIFAR-10: 0.4 98.7 0.9 144.9
4 CIFAR-100: 0.4 92.9 0.9 142.0
5 width 1, 0.47 M parameters: 0.41 98 0.92 169
5 width 2, 1.9 M parameters: 0.89 102 1.88 220
5 width 3, 4.2 M parameters: 1.41 138 2.86 320
5 width 4, 7.4 M parameters: 2.0 159 3.86 409
5 width 5, 11.5 M parameters: 2.6 205 4.87 546
6 XLM-R base: 12.5 3447.9 17.1 4745.7 8.0 1412.7
"""


def test_every_published_number_stands_beside_ours_or_beside_not_run():
    shown = {}
    _, *built = tables.build_tables({"tables": [], "experiments": [], "cost_figures": SPEC}, [])
    for figure, table in zip(SPEC["figures"], built):
        assert table.header[2:6] == ["memory (GB)", "published", "seconds an epoch", "published"]
        assert all(row[2] == row[4] == row[6] == "not run" for row in table.rows)
        assert "poster" in table.remarks
        shown |= {(figure["number"], case, method): (gb, s) for case, method, _, gb, _, s, _ in table.rows}
    methods = [SPEC["methods"]["evograd"], SPEC["methods"]["second_order"], "joint training"]
    n = 0
    for line in PUBLISHED.strip().splitlines():
        place, numbers = line.rsplit(": ", 1)
        number, case = place.split(" ", 1)
        numbers = numbers.split()
        for method, cell in zip(methods, zip(numbers[::2], numbers[1::2])):
            assert shown.pop((int(number), case, method)) == cell
            n += 2
    assert n == 42
    assert not shown


# --- cases


def captured(monkeypatch):
    """Where the cases go that the compare scripts would measure."""
    cases = []
    monkeypatch.setattr(costs, "record_case", lambda args, experiment, config, makers: cases.append((args, experiment, config)))
    return cases


def test_the_script_measures_every_case_of_the_figures_and_no_other(monkeypatch):
    printed = subprocess.run(
        ["bash", "resources/cost.sh", "--print", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cases, runs = captured(monkeypatch), []
    for line in printed.stdout.splitlines():
        _, _, module, *arguments = shlex.split(line)
        importlib.import_module(module).main(arguments)
        args, experiment, config = cases.pop()
        assert args.out == f"{experiment}/results/paper_cost.jsonl"
        assert [m for m in SPEC["methods"] if m != "plain"] == args.methods
        runs.append(record(experiment, {**config, "device": "cpu"}, costs_of()))
    of_cases = [case["run"] for figure in SPEC["figures"] for case in tables.cost_cases(figure, runs)]
    assert None not in of_cases
    assert {id(run) for run in runs} == {id(run) for run in of_cases}


def test_shots_and_classes_are_those_asked_for():
    parsed = dict(backbone="resnet10", image_size=32, methods=[])
    one, five = (
        costs.counted(fewshot.makers(argparse_like(n_shot=n, **parsed), torch.device("cpu"))["plain"]).flops for n in (1, 5)
    )
    assert 1.1 < five / one < 21 / 17  # images of an episode, beside the auxiliary batch
    task = label_noise.random_task(argparse_like(batch_size=16, n_classes=100), "cpu")
    assert task.n_classes == 100


def argparse_like(**values):
    return type("Arguments", (), values)()


def test_a_case_is_measured_once(tmp_path, capsys):
    out = tmp_path / "cost.jsonl"
    small = ["--model", "small", "--batch-size", "16", "--repeats", "3"]
    arguments = ["--paper-cost", "--device", "cpu", *small, "--out", str(out)]
    label_noise.main([*arguments, "--methods", "evograd"])
    label_noise.main([*arguments, "--methods", "evograd"])
    assert "nothing to do" in capsys.readouterr().out
    label_noise.main([*arguments, "--methods", "evograd", "--width", "2"])
    label_noise.main([*arguments, "--methods", "evograd", "mixed_mode"])
    first, wide, more = map(json.loads, out.read_text().splitlines())
    assert first["experiment"] == "label_noise_mwn_paper_cost"
    assert (first["config"].get("width"), wide["config"]["width"]) == (None, 2)
    assert list(more["metrics"]) == ["plain", "evograd", "mixed_mode"]
    label_noise.main([*arguments[1:-1], str(tmp_path / "real.jsonl"), "--methods", "evograd"])
    real = json.loads((tmp_path / "real.jsonl").read_text())
    for method, cost in first["metrics"].items():
        assert cost["seconds"] > 0
        assert cost["flops"] == real["metrics"][method]["flops"]
        assert cost["peak_bytes"] == pytest.approx(real["metrics"][method]["peak_bytes"], rel=0.01)


def test_xlm_r_is_of_one_size_and_length(monkeypatch, refused):
    cases = captured(monkeypatch)
    metaxl.main(["--paper-cost", "--device", "cpu", "--architectures", "base", "--length", "200"])
    assert cases[0][2] == {"encoder": "xlm-roberta-base", "length": 200, "batch_size": 12}
    refused(metaxl.main, ["--paper-cost", "--device", "cpu"], "of one encoder and one length")
    refused(metaxl.main, ["--paper-cost", "--encoder", "x", "--architectures", "base", "--length", "9"], "--encoder given, but")
    for script in (label_noise, fewshot, metaxl):
        refused(script.main, ["--paper-cost", "--fake", "--device", "cpu"], "--fake and --paper-cost given")


# --- measuring


def costs_of(plain=10, evograd=20, second=40):
    return {"plain": Cost(None, 1, plain, 1), "evograd": Cost(None, 1, evograd, 1), "second_order": Cost(None, 1, second, 1)}


ALONE = [(1, 1, 0)] * 3  # a long step: (methods, turns, turns to warm up) of each measurement


@pytest.mark.parametrize(
    ("seconds_of_plain", "expected"), [(16.0, []), (14.0, ALONE), (7.0, ALONE), (3.0, [(3, 3, 1)]), (0.5, [(3, 8, 1)])]
)
def test_time_is_taken_where_no_step_is_too_long(monkeypatch, seconds_of_plain, expected):
    """FLOPs say that T1-T2 takes four times as long as the plain step. No two long steps are in memory together."""
    asked = []

    def seconds(steps, repeats, warmup, progress=None):
        asked.append((len(steps), repeats, warmup))
        return dict.fromkeys(steps, seconds_of_plain)

    monkeypatch.setattr(costs, "seconds", seconds)
    monkeypatch.setattr(costs, "flops_a_second", lambda: 1e9)
    makers = dict.fromkeys(costs_of(), lambda: None)
    found = costs.case_seconds(makers, costs_of(), most=9)
    assert found == (dict.fromkeys(makers, seconds_of_plain) if expected else {})
    assert asked[1:] == expected


def test_what_is_out_of_reach_is_not_begun(monkeypatch):
    def begun():
        raise AssertionError

    makers = dict.fromkeys(costs_of(), begun)
    monkeypatch.setattr(costs, "flops_a_second", lambda: 0.5)  # T1-T2's 40 FLOPs would take 80 seconds
    assert costs.case_seconds(makers, costs_of(), most=9) == {}
    monkeypatch.setattr(costs, "flops_a_second", lambda: 1e9)
    large = {**costs_of(), "second_order": Cost(None, 10**15, 40, 1)}
    assert costs.case_seconds(makers, large, most=9) == {}
    with pytest.raises(AssertionError):
        costs.case_seconds(makers, costs_of(), most=9)


def test_what_does_not_fit_into_a_card_is_counted(monkeypatch, capsys):
    def compare_made(makers, device, repeats, enough, progress):
        (name,) = makers
        if name == "second_order":
            raise torch.cuda.OutOfMemoryError
        return {name: Cost(1.0, 4_000, 8, 1)}

    monkeypatch.setattr(costs, "compare_made", compare_made)
    x = torch.zeros(8, 8)
    makers = lambda device: {name: lambda: lambda: x @ x for name in ("plain", "second_order")}
    found = costs.case_costs(makers, torch.device("cuda"), 1)
    assert found == {"plain": Cost(1.0, 4_000, 8, 1), "second_order": Cost(None, 2 * 8 * 8 * 4, 2 * 8**3, 1)}
    assert "second_order does not fit into the card" in capsys.readouterr().out
    # A second that is None says which it was, in the printed table as well.
    cli.finish_comparison(argparse_like(json=None, out=None), "toy", {}, found)
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["second_order", "–", "–"]


# --- ratios and figures


def record(experiment, config, metrics, device="CPU"):
    metrics = {name: cost.as_dict() if isinstance(cost, Cost) else cost for name, cost in metrics.items()}
    return {
        "experiment": f"{experiment}_paper_cost",
        "config": config,
        "metrics": metrics,
        "cost": {},
        "environment": {"device": device},
    }


CASE = {"model": "resnet32", "width": 3, "batch_size": 100, "channels_last": False}


def ratios(*runs):
    table = tables.cost_ratios(SPEC, list(runs))
    memory, time = (f"EvoGrad, K = 2: {what} / T1–T2" for what in ("memory", "time"))
    assert table.header[:5] == ["Case", memory, "published", time, "published"]
    return {row[0]: row[1:5] for row in table.rows}, table


def test_ratios_by_hand():
    cost = lambda seconds, peak, flops: Cost(seconds, peak, flops, 1)
    timed = {"plain": cost(1.0, 100, 10), "evograd": cost(2.0, 110, 27), "second_order": cost(8.0, 440, 43)}
    counted = {name: Cost(None, c.peak_bytes, c.flops, 1) for name, c in timed.items()}
    place, other = "Label noise, width 3, 4.2 M parameters", "Label noise, width 4, 7.4 M parameters"
    on_cpu = record("label_noise_mwn", {**CASE, "device": "cpu"}, timed)
    rows, _ = ratios(on_cpu)
    assert rows[place] == ["0.25", "0.49", "0.25", "0.43"]
    assert rows[other] == ["not run", "0.52", "not run", "0.39"]
    assert rows["Few-shot, 1-shot, ResNet-34"] == ["not run", "–", "not run", "–"]
    rows, _ = ratios(on_cpu, record("label_noise_mwn", {**CASE, "device": "cpu"}, counted))
    assert rows[place] == ["0.25", "0.49", "0.63 (FLOPs)", "0.43"]
    # What was measured on CUDA comes first; T1-T2 did not fit there.
    fits = {**timed, "second_order": counted["second_order"]}
    rows, table = ratios(record("label_noise_mwn", {**CASE, "device": "cuda"}, fits, "card"), on_cpu)
    assert rows[place] == ["0.25 (counted)", "0.49", "0.63 (FLOPs)", "0.43"]
    assert "Here: card." in table.remarks


def test_ratios_of_a_few_runs_are_of_their_cases_alone():
    run = record("label_noise_mwn", {**CASE, "device": "cpu"}, costs_of())
    table = tables.cost_ratios(SPEC, [run], whole=False)
    assert [row[0] for row in table.rows] == ["Label noise, width 3, 4.2 M parameters"]


def test_a_figure_s_table_has_gigabytes_and_seconds_an_epoch():
    timed = {name: Cost(2.0, 3_000_000_000, cost.flops, 1) for name, cost in costs_of().items()}
    spec = {"tables": [], "experiments": [], "cost_figures": SPEC}
    run = record("label_noise_mwn", {**CASE, "device": "cpu"}, timed)
    table = next(t for t in tables.build_tables(spec, [run]) if t.name == "label-noise-mwn-figure-5")
    row = next(row for row in table.rows if row[:2] == ["width 3, 4.2 M parameters", "T1–T2"])
    assert row[2:] == ["3.00", "2.86", "980", "320", "0.00"]


def test_figures_are_drawn_for_the_cases_that_there_are(tmp_path, capsys):
    out = tmp_path / "cost.jsonl"
    for figure in SPEC["figures"]:
        for i, case in enumerate(figure["cases"]):
            # Of the widths, the first two are timed.
            seconds = 1.0 if i < 2 else None
            metrics = {m: Cost(seconds, 10**9 * (j + 1), 10**9 * (j + 1), 1) for j, m in enumerate(SPEC["methods"])}
            append_line(out, json.dumps(record(figure["experiment"], {**case["match"], "device": "cpu"}, metrics)))
    cost_figures.main([str(out), "--out-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == [
        "cross_domain_fewshot_paper_cost_figure_3.png",
        "label_noise_mwn_paper_cost_figure_4.png",
        "label_noise_mwn_paper_cost_figure_5.png",
        "metaxl_paper_cost_figure_6.png",
    ]
    assert "| Cross-lingual, XLM-R base | 0.40 | 0.73 | 1.00 | 0.73 |" in printed
    (tmp_path / drawn[0]).unlink()
    out.write_text("\n".join(line for line in out.read_text().splitlines() if "fewshot" not in line) + "\n")
    cost_figures.main([str(out), "--out-dir", str(tmp_path)])
    assert f"figure 3: no case of it in {out}" in capsys.readouterr().out
    assert not (tmp_path / drawn[0]).exists()


def test_no_results_no_figures(tmp_path, refused):
    refused(cost_figures.main, [str(tmp_path / "none.jsonl")], "no such file")
