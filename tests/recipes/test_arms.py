"""Arms that are named: trained over seeds, and compared."""

import re

import pytest

from recipes import arms, plots
from recipes.study.groups import Spread, percent
from recipes.train.directory import RunDirectory

FLAGS = ["--data", "digits", "--epochs", "2", "--batch-size", "700"]
ARMS = ["--seeds", "2", "--arm", "SGD: --rho 0", "--arm", "SAM: --rho 0.1"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Call the command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: arms.main([*flags, "--", *FLAGS])


def test_all_arms_are_run_and_reported(study, tmp_path, capsys):
    assert study(*ARMS, "--title", "Toy") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\d/4 (.*?):", out, re.MULTILINE) == [
        "SGD, seed 0",
        "SAM, seed 0",
        "SGD, seed 1",
        "SAM, seed 1",
    ]
    assert out.count("handwritten digits") == 1
    text = (tmp_path / "runs/arms/arms.md").read_text()
    assert text.startswith("# Toy")
    assert "| s/epoch | images/s | gradients/step | s/epoch against the first |" in text
    for arm in ("SGD", "SAM"):
        rows = [
            RunDirectory(tmp_path / "runs" / "arms" / f"{arm.lower()}-seed{seed}").rows()
            for seed in range(2)
        ]
        accuracies = [[row["test_accuracy"] for row in run] for run in rows]
        last = percent(Spread.of([values[-1] for values in accuracies]))
        best = percent(Spread.of([max(values) for values in accuracies]))
        assert f"| {arm} | 2: seeds 0, 1 | 2 | {last} | {best} |" in text
    assert "--arm 'SAM: --rho 0.1' --title Toy -- --data digits" in text
    assert (tmp_path / "runs/arms/arms.png").read_bytes().startswith(b"\x89PNG")
    # What is finished is not run again.
    assert study(*ARMS, "--no-times") == 0
    assert "4 runs in runs/arms, 4 of them finished" in capsys.readouterr().out
    assert "s/epoch" not in (tmp_path / "runs/arms/arms.md").read_text()
    assert study("--arm", "SGD: --rho 0 --lr 0.3", "--seeds", "1") == 2
    assert "sgd-seed0 holds a run of other settings: lr was" in capsys.readouterr().err


def test_a_study_replaces_neither_files_of_others_nor_a_run(study, tmp_path, capsys):
    theirs = {name: f"{name} of mine" for name in ("results.json", "arms.json", "arms.md")}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    one = ["--seeds", "1", "--arm", "SGD: --rho 0 --epochs 1", "--output"]
    assert study(*one, ".") == 0
    texts = [
        path.read_text()
        for path in tmp_path.glob("*")
        if path.is_file() and path.suffix != ".png"
    ]
    assert {*theirs.values()} < {*texts}
    assert (tmp_path / "arms.md").read_text().startswith("# digits")
    capsys.readouterr()
    assert study(*one, "sgd-seed0") == 2
    assert "got that of a run, sgd-seed0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected at least one arm, got none"),
        (["--arm", "SGD"], "--arm: expected 'label: flags', got 'SGD'"),
        (["--arm", "a:", "--arm", "a : --rho 0"], "expected different arms, got a twice"),
        (["--arm", "a: --resume x"], "a: --resume: it is for one run alone"),
        (["--arm", "a: --epochs 0"], "a: --epochs: expected at least 1, got 0"),
        (["--arm", 'a: --lr "'], "--arm: cannot read 'a: --lr \"': No closing quotation"),
    ],
)
def test_wrong_arms_are_refused(study, capsys, flags, message):
    assert study(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_default_of_its_own_has_the_help_of_all_studies_as_one_paragraph(
    monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        arms.main(["--help"])
    text = "Runs of this study that it holds are not run again. (default: runs/arms)"
    assert text in capsys.readouterr().out


def test_runs_that_ended_alike_are_drawn_though_their_sum_is_rounded(tmp_path):
    alike = {"a": [97.63774618976615] * 3, "b": [98.0, 99.0]}
    assert sum(alike["a"]) / 3 < 97.63774618976615
    plots.ranking(alike, alike, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").exists()
