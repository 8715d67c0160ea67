import json
from pathlib import Path

import pytest

from bench import compare


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run the comparison in an empty directory, with results in it too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(compare.__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "new" / "results")

    def run(*flags):
        common = "-- --data digits --epochs 2 --batch-size 700"
        monkeypatch.setattr("sys.argv", ["compare", "toy", *flags, *common.split()])
        compare.main()

    return run


ARMS = ["--seeds", "2", "--arm", "SGD: --rho 0", "--arm", "SAM: --rho 0.1"]


def test_a_comparison_runs_all_arms_and_reports_them(bench, tmp_path, capfd):
    bench(*ARMS, "--title", "Toy")
    cases = [json.loads(x) for x in capfd.readouterr().out.splitlines() if x[:1] == "{"]
    assert [(c["arm"], c["seed"]) for c in cases] == [
        ("SGD", 0),
        ("SAM", 0),
        ("SGD", 1),
        ("SAM", 1),
    ]
    (report,) = tmp_path.glob("new/results/toy_*.md")
    text = report.read_text()
    assert text.startswith("# Toy")
    for arm in ("SGD", "SAM"):
        last = [c["last"] for c in cases if c["arm"] == arm]
        assert f"| {arm} | {compare.spread(last)} |" in text
    assert '--arm "SAM: --rho 0.1"' in text
    (picture,) = tmp_path.glob("new/results/toy_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    # What is finished is not run again.
    bench(*ARMS, "--title", "Toy")
    assert "epoch    loss" not in capfd.readouterr().out


def test_a_run_that_was_resumed_has_no_time_of_its_own(bench, tmp_path):
    bench("--seeds", "1", "--arm", "SGD: --rho 0")
    run = tmp_path / "runs" / "toy" / "sgd-0"
    (run / "wall_seconds").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(rows[0])
    bench("--seeds", "1", "--arm", "SGD: --rho 0")
    assert not (run / "wall_seconds").exists()
    assert "| not measured |" in next(tmp_path.glob("new/results/*.md")).read_text()


def test_runs_of_other_settings_are_not_reported(bench):
    bench("--seeds", "1", "--arm", "SGD: --rho 0")
    with pytest.raises(SystemExit, match=r"sgd-0 holds a run of other settings"):
        bench("--seeds", "1", "--arm", "SGD: --rho 0 --lr 0.3")


def test_spread_is_mean_and_standard_deviation():
    assert compare.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert compare.spread([5.0]) == "5.00 ± 0.00"
