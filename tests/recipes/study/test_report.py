"""One report of any runs: numbers of groups, tables, pictures and files."""

import json
import statistics
from functools import partial
from pathlib import Path

import pytest

from recipes import arms, plots
from recipes.settings.resolve import configure
from recipes.study import report
from recipes.study.groups import (
    Group,
    Spread,
    arranged,
    best,
    best_of,
    chosen,
    last,
    number,
    percent,
    seconds,
    series_of,
    summary,
)
from recipes.terminal.console import Display
from recipes.train.recorded import Recorded
from samfn import schedules

FLAGS = ["--data", "digits", "--batch-size", "256"]


def group(label, flags, seeds):
    """Return runs of some seeds from the rows of each; None is one that diverged."""
    runs = []
    for seed, rows in enumerate(seeds):
        config = configure([*flags, "--seed", str(seed)])
        whole = [
            {"epoch": n, "train_loss": 1.0, "seconds": 1.0, "images_per_second": 9.0} | row
            for n, row in enumerate(rows or [], 1)
        ]
        runs.append(Recorded(Path(f"{label}-{seed}"), config, whole, True, None, {}))
    lost = {run.path: "step 3" for run, rows in zip(runs, seeds, strict=True) if not rows}
    return Group(label, runs, lost)


def rows_of(file):
    """Return the rows of a data file by their names."""
    rows = json.loads(file.read_text())["rows"]
    return {row["name"]: row for row in rows}


def made(rows, *flags):
    """Return a group of one run that had these epochs."""
    return group("a", [*FLAGS, *flags], [rows])


def test_the_best_epoch_is_that_of_the_split_that_chooses():
    rows = [
        {"test_accuracy": 90.0, "validation_accuracy": 70.0, "seconds": 1.5},
        {"test_accuracy": 80.0, "validation_accuracy": 75.0, "seconds": 2.0},
        {"test_accuracy": 85.0, "validation_accuracy": 72.0, "seconds": 1.0},
    ]
    by_test, by_validation = made(rows), made(rows, "--validation", "0.1")

    def found(group):
        return [value(group.runs[0]) for value in (last, best, chosen, seconds)]

    assert found(by_test) == [85.0, 90.0, 90.0, 4.5]
    assert found(by_validation) == [85.0, 80.0, 75.0, 4.5]
    series = series_of({0.1: by_test, 0.2: by_validation})
    assert series == plots.Series({0.1: [85.0], 0.2: [85.0]}, {0.1: [90.0], 0.2: [80.0]})


def test_of_an_average_its_own_accuracy_counts():
    rows = [
        {"test_accuracy": 90.0, "ema_test_accuracy": 10.0},
        {"test_accuracy": 80.0, "ema_test_accuracy": 20.0},
    ]
    averaged = made(rows, "--ema-decay", "0.9")
    assert averaged.values(last) == averaged.values(best) == [20.0]


def test_spread_is_mean_and_sample_deviation():
    assert percent(Spread.of([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert percent(Spread.of([1.0, 3.0])) == "2.00 ± 1.41"
    assert percent(Spread.of([5.0])) == "5.00"  # One value has no deviation.


def test_groups_stand_by_name_in_their_order_and_by_place_ascending():
    flags = [("b", 0.2), ("a", 0.4), ("b", 0.1)]
    found = [group(f"{n}{x}", [*FLAGS, "--lr", str(x)], [None]) for n, x in flags]
    names = {id(one.config): one.name[0] for one in found}
    nested = arranged(found, lambda c: names[id(c)], lambda c: c.lr)
    assert {name: [*arms] for name, arms in nested.items()} == {"b": [0.1, 0.2], "a": [0.4]}
    assert [*nested] == ["b", "a"]
    assert nested["b"][0.1] is found[2]


def test_a_data_file_has_settings_accuracies_and_seconds_of_each_run(tmp_path):
    rows = [{"test_accuracy": 90.0, "seconds": 2.0}, {"test_accuracy": 80.0}]
    groups = [made(rows), group("b", [*FLAGS, "--rho", "0.4"], [None, rows])]
    groups[1].runs[0].rows.extend(groups[0].runs[0].rows)  # It diverged after these.
    page = report.side_by_side(groups, report.TABLES)
    report.write(page, "the command", "cpu", tmp_path, "x")
    text = (tmp_path / "x.json").read_text()
    data = json.loads(text)
    assert data["command"] == "the command"
    assert data["settings"] == {"rho": [0.05, 0.4]}
    one, other = data["rows"]
    assert one["numbers"]["seconds"]["values"] == [1.5]
    run = one["runs"][0]
    assert (run["last"], run["best"], run["best_epoch"]) == (80.0, 90.0, 1)
    assert (run["seconds"], run["diverged"]) == (3.0, None)
    assert other["config"]["rho"] == 0.4
    assert [run["diverged"] for run in other["runs"]] == ["step 3", None]
    assert [run["best"] for run in other["runs"]] == [None, 90.0]
    assert other["numbers"]["best"] == {"mean": 90.0, "deviation": None, "values": [90.0]}


def test_what_diverged_is_in_no_mean_and_told():
    rows = [{"test_accuracy": 90.0}]
    page = report.side_by_side([made(rows), group("b", FLAGS, [rows, None])], report.TABLES)
    _, (_, lines) = page.parts["accuracy"]
    assert lines[1][:5] == [
        "b",
        "2: seeds 0, 1; 1 diverged",
        "0 to 1 of 16",
        "90.00",
        "90.00",
    ]
    assert page.remarks == ["b-1 diverged, and is in no mean: step 3"]
    assert summary(group("b", FLAGS, [rows, None]), best) == "90.00 (1 of 2 diverged)"


def test_times_are_medians_of_epochs_and_ratios_to_the_first_row():
    def timed(label, *runs):
        rows = [[{"test_accuracy": 1.0, "seconds": s} for s in run] for run in runs]
        return group(label, FLAGS, rows)

    groups = [timed("SGD", [0.5, 0.4, 9.0]), timed("SAM", [1.0], [2.0]), timed("wild", [])]
    _, (columns, rows) = report.side_by_side(groups, report.TABLES).parts["cost"]
    assert (columns[1], columns[-1]) == ("s/epoch", "s/epoch against the first")
    assert [(row[1], row[-1]) for row in rows] == [
        ("0.5", "1.00"),
        ("1.50 ± 0.71", "3.00"),
        ("-", "-"),
    ]


@pytest.mark.parametrize("lengths", [[2, 2], [2, 3], [0, 2], [0, 0]])
@pytest.mark.parametrize("draw", [report.draw, report.rank])
def test_what_ended_early_or_diverged_is_drawn_too(tmp_path, lengths, draw):
    rows = [[{"test_accuracy": 90.0}] * n for n in lengths]
    draw = partial(draw, times=True) if draw is report.draw else draw
    drawn = draw(
        [group("a", FLAGS, rows), group("b", FLAGS, [None])], "", tmp_path / "x.png"
    )
    assert drawn == (tmp_path / "x.png").exists() == any(lengths)


@pytest.mark.parametrize(("count", "drawn"), [(5, "side_by_side"), (6, "ranking")])
def test_many_arms_are_drawn_as_points(tmp_path, monkeypatch, count, drawn):
    calls = []
    for name in ("side_by_side", "ranking"):

        def record(*args, name=name):
            calls.append((name, args))

        monkeypatch.setattr(plots, name, record)
    rows = [{"test_accuracy": 90.0}, {"test_accuracy": 80.0}]
    groups = [group(str(i), FLAGS, [rows]) for i in range(count)]
    page = arms.page(arms.Settings(title="All"), groups)
    assert page.draw(tmp_path / "x")
    ((name, args),) = calls
    assert (name, args[-1]) == (drawn, "All")
    assert len(args[0]) == count
    if drawn == "side_by_side":
        assert "seconds of training" in args[0]["1"][0].x
        arms.page(arms.Settings(times=False), groups).draw(tmp_path / "x")
        assert "seconds of training" not in calls[1][1][0]["1"][0].x
    if drawn == "ranking":
        assert (args[0]["1"], args[1]["1"]) == ([80.0], [90.0])


def test_tables_hold_any_text(capsys):
    table = ["", "a|b"], [["x\ny", "1.00 ± 2.00"], ["[bold]", "3"]]
    assert report.markdown(table) == (
        "|  | a\\|b |\n| --- | --- |\n| x y | 1.00 ± 2.00 |\n| [bold] | 3 |"
    )
    Display().table(["", "a"], [["[bold]x", "1.00 ± 2.00"], ["y", "3"]])
    assert capsys.readouterr().out == (
        "                   a\n[bold]x  1.00 ± 2.00\ny                  3\n"
    )


def test_numbers_are_short_and_different():
    texts = [number(x) for x in (0.0, 0.05, 1.0, 0.1234567, 0.1234568, 1e-7)]
    assert texts == ["0", "0.05", "1", "0.1234567", "0.1234568", "1e-07"]


def test_arms_of_a_command_stand_in_lines_of_their_own():
    text = report.called("python -m x", ["--arm", "a: --rho 0", "--", "--lr", "1"])
    assert text == "python -m x \\\n    --arm 'a: --rho 0' -- --lr 1"


def test_sam_at_the_end_costs_its_share_and_an_epoch_takes_the_mean_time():
    flags = ["--epochs", "8", "--rho", "0.1", "--sam-last", "0.25"]
    (run,) = made([{"test_accuracy": 1.0}] * 8, *flags).runs
    counted = [report.gradients(run._replace(rows=run.rows[:n])) for n in (1, 6, 7, 8)]
    assert counted == pytest.approx([1, 1, 8 / 7, 10 / 8])
    assert report.gradients(run._replace(rows=[])) is None
    flags = [*FLAGS, "--epochs", "4", "--rho", "0.1"]
    rows = [{"seconds": 1.0}] * 3 + [{"seconds": 2.0}]
    late = group("late", [*flags, "--sam-last", "0.25"], [rows])
    other = group("always", flags, [rows])
    taken = report.TABLES["cost"]["seconds"].value
    assert [taken(each.runs[0]) for each in (late, other)] == [1.25, 1.0]


@pytest.mark.parametrize(
    ("epochs", "whole", "share"), [(3, 1, 0.1), (7, 3, 0.29), (3, 22, 0.5), (1, 3, 1.0)]
)
def test_gradients_are_those_of_the_steps_that_sam_took(epochs, whole, share):
    flags = ["--epochs", str(epochs), "--rho", "0.1", "--sam-last", str(share)]
    rows = [{"step": n * whole, "test_accuracy": 1.0} for n in range(1, epochs + 1)]
    (run,) = made(rows, *flags).runs
    rho = schedules.tail(0.1, epochs * whole, share)
    counts = [1 + (rho(step) > 0) for step in range(epochs * whole)]
    assert report.gradients(run) == pytest.approx(statistics.mean(counts))
    ends = [sum(counts[: n * whole]) / whole for n in range(1, epochs + 1)]
    assert report.passes(run) == pytest.approx(ends)
    # Also where the log lacks epochs.
    assert report.passes(run._replace(rows=run.rows[-1:]))[-1] == pytest.approx(ends[-1])


def test_of_epochs_with_fewer_images_sam_begins_at_its_place_in_whole_ones():
    flags = ["--epochs", "3", "--rho", "0.1", "--select", "loss", "--sam-last", "0.5"]
    rows = [{"step": step, "test_accuracy": 1.0} for step in (10, 15, 19)]
    (run,) = made(rows, *flags).runs
    late = [place >= 15 for place in [*range(10), 10, 12, 14, 16, 18, 20, 22, 25, 27]]
    assert run.perturbed == [0, 0.4, 1]
    assert run.share_perturbed == statistics.mean(late)


def test_of_a_run_that_had_other_settings_each_epoch_says_whether_it_perturbed():
    rows = [{"rho": rho, "step": 10 * n} for n, rho in enumerate([0.0, 0.0, 0.1, 0.1], 1)]
    (run,) = made(rows, "--epochs", "8", "--rho", "0.1", "--sam-last", "0.5").runs
    assert report.gradients(run) == 1
    run = run._replace(earlier=[{"epochs": 4}])
    assert report.gradients(run) == 1.5
    assert report.passes(run) == [1, 2, 4, 6]


def test_fewer_images_cost_fewer_steps_and_a_scan_its_seconds():
    flags = ["--epochs", "3", "--rho", "0.1", "--select", "loss", "--select-every", "1"]
    steps, seconds = [10, 20, 23], [(2.0, 1.0), (2.0, 1.0), (0.5, 0.0)]
    rows = [
        {"step": s, "seconds": t, "scan_seconds": scan, "test_accuracy": 1.0}
        for s, (t, scan) in zip(steps, seconds, strict=True)
    ]
    (run,) = made(rows, *flags).runs
    assert report.passes(run) == [2, 4, 4.6]
    curve = report.curve(run, report.axes_of([run], times=True))
    assert curve.x["seconds of training"] == [3, 6, 6.5]
    assert curve.x[report.PASSES] == [2, 4, 4.6]
    assert report.TABLES["cost"]["seconds"].value(run) == pytest.approx(6.5 / 3)
    assert report.gradients(run) == 2


def shares(*counts):
    """Return counts of 360 images in percent."""
    return [100 * count / 360 for count in counts]


def test_of_groups_with_as_many_right_images_the_first_is_the_best():
    rows = [[{"test_accuracy": share}] for share in shares(335, 336, 342, 335, 337, 341)]
    first, second = (group("a", FLAGS, rows[:3]), group("b", FLAGS, rows[3:]))
    low, high = sorted([first, second], key=lambda one: one.spread(chosen).mean)
    assert low.spread(chosen).mean < high.spread(chosen).mean
    assert best_of([low, high]) is low


def test_p_is_that_of_differences_between_runs_of_one_seed():
    def runs(*ends):
        return [[{"test_accuracy": end}] if end else None for end in ends]

    first = group("a", FLAGS, runs(70.0, 72.0, 74.0, 90.0))
    # The differences are 1, 2 and 3: t is 2 / (1 / sqrt(3)), with two degrees of freedom.
    other = group("b", FLAGS, runs(71.0, 74.0, 77.0, None))
    assert report.paired(other, first) == "0.074"
    far = group("c", FLAGS, runs(170.0, 172.001, 174.0))
    assert report.paired(far, first) == "< 0.0001"
    alone = group("d", FLAGS, runs(71.0))
    assert report.paired(first, first) == report.paired(alone, first) == "-"
    # An image of 360 more in each, which floats do not tell so.
    assert shares(341)[0] - shares(340)[0] != shares(354)[0] - shares(353)[0]
    some, more = (group("e", FLAGS, runs(*shares(n, n + 13))) for n in (340, 341))
    assert report.paired(more, some) == "-"
    page = report.side_by_side([first, other], report.TABLES)
    columns, rows = page.parts["accuracy"][1]
    assert [row[columns.index("p")] for row in rows] == ["-", "0.074"]


@pytest.mark.parametrize("count", [len(plots.COLOURS), len(plots.COLOURS) + 1])
def test_settings_of_many_rows_stand_in_rows_of_their_own(count):
    rhos = [f"0.{number + 1}" for number in range(count)]
    rows = [{"test_accuracy": 90.0}]
    groups = [group(f"at {rho}", [*FLAGS, "--rho", rho], [rows]) for rho in rhos]
    columns, table = report.side_by_side(groups, report.TABLES).parts["settings"][1]
    if count > len(plots.COLOURS):
        assert columns == ["setting", "rho"]
        assert table == [[f"at {rho}", rho] for rho in rhos]
    else:
        assert columns == ["setting", *(f"at {rho}" for rho in rhos)]
        assert table == [["rho", *rhos]]


def test_who_judges_is_told_with_what_is_wrong_about_it():
    config = configure(FLAGS)
    assert report.judge(config) == "the test set itself, which flatters"
    held = config.replace(validation=0.1)
    assert report.judge(held) == "the validation set"
    noisy = held.replace(noisy_validation=True)
    assert report.judge(noisy) == "the validation set with wrong labels"
