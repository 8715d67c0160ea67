import re

import pytest

from bench import compare
from recipes.settings.config import parse
from recipes.study import reports
from recipes.study.grid import Cell, Result
from recipes.train.directory import RunDirectory

FLAGS = ["--data", "digits", "--epochs", "2", "--batch-size", "700"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run the comparison in an empty directory, with results in it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "new" / "results")
    return lambda *flags: compare.main(["toy", *flags, "--", *FLAGS])


ARMS = ["--seeds", "2", "--arm", "SGD: --rho 0", "--arm", "SAM: --rho 0.1"]


def test_a_comparison_runs_all_arms_and_reports_them(bench, tmp_path, capsys):
    assert bench(*ARMS, "--title", "Toy") == 0
    assert re.findall(r"^\d/4 (.*?):", capsys.readouterr().out, re.MULTILINE) == [
        "SGD, seed 0",
        "SAM, seed 0",
        "SGD, seed 1",
        "SAM, seed 1",
    ]
    (report,) = tmp_path.glob("new/results/toy_*.md")
    text = report.read_text()
    assert text.startswith("# Toy")
    assert "|  | last epoch | best epoch | s/epoch | against SGD |" in text
    for arm in ("SGD", "SAM"):
        rows = [
            RunDirectory(tmp_path / "runs" / "toy" / f"{arm.lower()}-seed{seed}").rows()
            for seed in range(2)
        ]
        accuracies = [[row["test_accuracy"] for row in run] for run in rows]
        last = reports.spread([values[-1] for values in accuracies])
        best = reports.spread([max(values) for values in accuracies])
        assert f"| {arm} | {last} | {best} |" in text
    assert "--arm 'SAM: --rho 0.1' \\\n    -- --data digits" in text
    (picture,) = tmp_path.glob("new/results/toy_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    # What is finished is not run again.
    assert bench(*ARMS, "--title", "Toy") == 0
    assert "4 runs in runs/toy, 4 of them finished" in capsys.readouterr().out
    assert bench("--arm", "SGD: --rho 0 --lr 0.3", "--seeds", "1") == 2
    assert "sgd-seed0 holds a run of other settings: lr was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--arm: expected at least one, got none"),
        (["--arm", "SGD"], "--arm: expected a new 'label: flags', got 'SGD'"),
        (
            ["--arm", "a:", "--arm", "a : --rho 0"],
            "expected a new 'label: flags', got 'a :",
        ),
        (["--arm", "a: --resume x"], "--resume: it is for one run alone"),
    ],
)
def test_wrong_arms_are_refused(bench, capsys, flags, message):
    assert bench(*flags) == 2
    assert message in capsys.readouterr().err


def made(label, lengths, seconds=1.0):
    """Return results of an arm, of runs with so many epochs; of none, it diverged."""
    row = {"test_accuracy": 90.0, "seconds": seconds}
    cell = Cell(label, parse(FLAGS), None)
    return [Result(cell, [row] * n, None if n else "step 3") for n in lengths]


def test_times_are_medians_of_epochs_and_ratios_to_the_first_arm():
    comparison = compare.Comparison("x")
    results = made("SGD", [2, 2], 0.5) + made("SAM", [2, 0], 1.0) + made("wild", [0])
    columns, rows = compare.table(comparison, results)
    assert columns[3:] == ["s/epoch", "against SGD"]
    assert [row[3:] for row in rows] == [["0.50", "1.00"], ["1.00", "2.00"], ["nan", "nan"]]
    assert rows[1][1] == "90.00 (1 of 2 diverged)"


@pytest.mark.parametrize("lengths", [[2, 2], [2, 3], [0, 2], [0, 0]])
def test_what_ended_early_or_diverged_is_drawn_too(tmp_path, lengths):
    compare.draw(made("SGD", lengths) + made("SAM", lengths), tmp_path / "x.png", "")
    assert (tmp_path / "x.png").exists()
