"""The command that puts runs side by side."""

import json
import re
import shutil
import statistics

import pytest

from recipes import compare as recipe
from recipes import plots, sharpness
from recipes.cifar_wrn import main as train
from recipes.settings.resolve import configure
from recipes.settings.saved import to_toml
from recipes.study import correlation, measurements
from recipes.study.groups import differing, grouped
from recipes.study.report import PASSES, remarks_of, unlike
from recipes.terminal.console import Display
from recipes.train import recorded
from recipes.train.directory import RunDirectory

CHEAP = ["--images", "20", "--steps", "1", "--eigenvalues", "0", "--probes", "0"]
ROWS = [(2.0, 50.0, 1.0), (1.0, 90.0, 3.0), (0.5, 80.0, 2.0)]  # loss, accuracy, seconds


@pytest.fixture(autouse=True)
def drawn(monkeypatch, request):
    """Only who asks for pictures waits for them."""

    def side_by_side(curves, path, title):
        path.write_bytes(b"")

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(plots, "side_by_side", side_by_side)


@pytest.fixture
def pictures():
    """Draw, and do not only seem to."""


def made(path, flags="", rows=ROWS, **more):
    """Leave what a run on the digits leaves, but for checkpoints."""
    path.mkdir(parents=True)
    config = configure(["--data", "digits", "--epochs", "3", *flags.split()])
    (path / "config.toml").write_text(to_toml(config))
    lines = [
        {
            "epoch": epoch,
            "train_loss": loss,
            "test_accuracy": accuracy,
            "seconds": seconds,
            "images_per_second": 1200 / seconds,
        }
        | {name: value[epoch - 1] for name, value in more.items()}
        for epoch, (loss, accuracy, seconds) in enumerate(rows, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return path


def shifted(by):
    return [(loss + by, accuracy + by, seconds) for loss, accuracy, seconds in ROWS]


def compared(*paths, flags=("--no-sharpness",)):
    assert recipe.main([*map(str, paths), *flags]) == 0
    text = (paths[0].parent / "compare" / "compare.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def report(folder):
    return (folder / "compare" / "compare.md").read_text()


def cells(text, name):
    """Return the cells of the rows that begin so, table after table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [line[1:] for line in lines if line[0] == name]


def test_the_report_has_accuracy_cost_and_what_differs(tmp_path, pictures, capsys):
    sgd = made(tmp_path / "sgd", "--rho 0")
    slow = [(loss, accuracy + 5, 4 * seconds) for loss, accuracy, seconds in ROWS]
    sam = made(tmp_path / "sam", "--rho 0.2", slow)
    found = compared(sgd, sam)
    text = report(tmp_path)
    assert cells(text, "SGD") == [
        ["1: seed 0", "3", "80.00", "90.00", "-", "0.5", "-", "test"],
        ["2", "600", "1", "1.00"],
    ]
    assert cells(text, "sam, rho 0.2") == [
        ["1: seed 0", "3", "85.00", "95.00", "-", "0.5", "-", "test"],
        ["8", "150", "2", "4.00"],
    ]
    assert cells(text, "rho") == [["0", "0.2"]]
    assert text.count("\n| ") == 2 + 2 + 2 + 2 + 3  # nothing else differs
    command = f"\npython -m recipes.compare {sgd} {sam} --no-sharpness\n"
    assert command in text
    assert found["command"] == command.strip()
    assert found["torch"] in text
    assert found["hardware"] in text
    assert found["settings"] == {"rho": [0.0, 0.2]}
    one, other = found["rows"]
    assert one["runs"][0] | {"versions": {}} == {
        "path": str(sgd),
        "seed": 0,
        "epochs": 3,
        "ended": True,
        "diverged": None,
        "last": 80.0,
        "best": 90.0,
        "best_epoch": 2,
        "seconds": 6.0,
        "versions": {},
        "before": [],
        "m": ["64"],
        "earlier": [],
        "data": None,
        "sharpness": None,
        "metrics": RunDirectory(sgd).rows(),
    }
    assert other["numbers"]["seconds"] == {"mean": 8, "deviation": None, "values": [8]}
    assert other["config"]["rho"] == 0.2
    folder = tmp_path / "compare"
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name.partition(".")[0] for p in folder.iterdir()} == {"compare"}
    out = capsys.readouterr().out
    assert re.search(r"sam, rho 0.2 +1: seed 0 +3 +85.00 +95.00", out)
    assert str(folder / "compare.md") in out


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    paths = [
        made(tmp_path / f"{name}-{seed}", f"--rho {rho} --seed {seed}", shifted(0.1 * seed))
        for seed in (0, 1, 5)
        for name, rho in (("sgd", 0), ("sam", 0.2))
    ]
    rows = compared(*paths)["rows"]
    assert [row["name"] for row in rows] == ["SGD", "sam, rho 0.2"]
    for row in rows:
        assert [run["seed"] for run in row["runs"]] == [0, 1, 5]
        values = [80, 80.1, 80.5]
        found = row["numbers"]["last"]
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert found["deviation"] == pytest.approx(statistics.stdev(values))
        assert found["values"] == pytest.approx(values)
    text = report(tmp_path)
    assert "| SGD | 3: seeds 0, 1, 5 | 3 | 80.20 ± 0.26 | 90.20 ± 0.26 |" in text
    assert "seed" not in text.split("## Settings")[1].split("## ")[0].partition("---")[2]


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ("--seed 3", 1),
        ("--seed 3 --save-steps 7", 1),
        ("--max-skipped 3", 1),
        ("--seed 3 --lr 0.3", 2),
        ("--label-noise 0.1", 2),
        ("--epochs 4", 2),
        ("--ema-decay 0.9", 2),
        ("--compile yes", 2),
    ],
)
def test_only_what_decides_nothing_may_differ_in_a_row(tmp_path, flags, rows):
    more = {"ema_test_accuracy": [1.0, 2.0, 3.0]}
    one, other = made(tmp_path / "a"), made(tmp_path / "b", flags, **more)
    assert len(compared(one, other)["rows"]) == rows


@pytest.mark.parametrize(
    ("before", "earlier"),
    [
        ("--rho 0 --schedule constant", "rho 0"),
        ("--epochs 2 --rho 0 --schedule constant", "epochs 2, rho 0"),
        ("--epochs 2", "epochs 2, schedule cosine"),
        ("--epochs 2 --schedule constant", None),
        ("--max-skipped 3 --schedule constant", None),
    ],
)
def test_a_run_of_which_a_part_had_other_settings_is_a_row_of_its_own(
    tmp_path, before, earlier
):
    one, other = (
        made(tmp_path / str(seed), f"--schedule constant --seed {seed}") for seed in (0, 1)
    )
    config = configure(["--data", "digits", "--epochs", "3", *before.split()])
    (one / "config.toml.1").write_text(to_toml(config))
    rows, text = compared(one, other)["rows"], report(tmp_path)
    told = f"- {one}: a part was trained with {earlier}; so it is a row of its own"
    assert (told in text) == (len(rows) == 2) == (earlier is not None)
    if earlier:
        assert cells(text, "earlier") == [[earlier, "the same"]]


NAMES = [
    (["--rho 0", "--rho 0.1"], ["SGD", "sam, rho 0.1"]),
    (["--rho 0", "--rho 0 --lr 0.3"], ["SGD, lr 0.2", "SGD, lr 0.3"]),
    (["--lr 0.3", "--epochs 4", "--batch-size 32"], ["a", "b", "c"]),
]


@pytest.mark.parametrize(("flags", "names"), NAMES)
def test_rows_have_the_shortest_names_that_differ(tmp_path, flags, names):
    paths = [made(tmp_path / p, f) for p, f in zip("abc", flags, strict=False)]
    assert [row["name"] for row in compared(*paths)["rows"]] == names


def test_other_images_make_another_row_and_unknown_ones_do_not(tmp_path):
    run = recipe.read(made(tmp_path / "a"), Display())
    rows = [run, run._replace(data="x"), run._replace(data="y"), run._replace(data="x")]
    for some, expected in (
        (rows, [[None], ["x", "x"], ["y"]]),
        (rows[:2], [[None, "x"]]),
        (rows[:1] * 2, [[None, None]]),
    ):
        found = grouped(some)
        assert [[one.data for one in group.runs] for group in found] == expected
    assert differing(rows)["images"] == [None, "x", "y", "x"]
    assert "images" not in differing(rows[:2])


def test_directories_of_one_name_are_told_apart_by_their_paths(tmp_path):
    flags = "--lr {0} --epochs {1} --batch-size {1}"
    one = made(tmp_path / "a" / "run", flags.format(0.1, 3))
    other = made(tmp_path / "b" / "run", flags.format(0.2, 4))
    names = [row["name"] for row in compared(one, other)["rows"]]
    assert names == [str(one), str(other)]


def test_a_report_takes_the_place_of_reports_alone(tmp_path, capsys):
    paths = [made(tmp_path / "a"), made(tmp_path / "b", "--rho 0")]
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "compare.md").write_text("notes")
    for _ in range(2):
        compared(*paths)
    (aside,) = (tmp_path / "compare").glob("*.superseded*")
    assert aside.read_text() == "notes"
    assert capsys.readouterr().err.count("compare.md.superseded now") == 1
    assert recipe.main([*map(str, paths), "--output", str(paths[0])]) == 2
    assert "got that of a run, " in capsys.readouterr().err


def test_a_seed_that_is_there_twice_is_told(tmp_path, capsys):
    paths = [made(tmp_path / name) for name in "ab"]
    compared(*paths)
    assert "seed 0 is there more than once" in capsys.readouterr().out
    assert "seed 0 is there more than once" in report(tmp_path)


def test_the_best_epoch_is_that_of_the_set_it_was_chosen_by(tmp_path):
    one = made(tmp_path / "a", "--validation 0.1", validation_accuracy=[9.0, 7.0, 8.0])
    other = made(
        tmp_path / "b",
        "--validation 0.1 --ema-decay 0.9",
        validation_accuracy=[9.0, 7.0, 8.0],
        ema_validation_accuracy=[5.0, 6.0, 7.0],
        ema_test_accuracy=[11.0, 12.0, 13.0],
    )
    rows = compared(one, other)["rows"]
    assert [row["chosen_by"] for row in rows] == ["validation"] * 2
    best = [row["numbers"]["best"]["mean"] for row in rows]
    assert best == [50.0, 13.0]  # and not the 90 that the test set would choose
    assert [row["runs"][0]["best_epoch"] for row in rows] == [1, 3]


def test_a_run_that_goes_on_is_marked_and_one_that_lost_its_patience_is_not(
    tmp_path, capsys
):
    whole = made(tmp_path / "whole", "--patience 2")
    part = made(tmp_path / "part", "--seed 1 --patience 2", ROWS[:2])
    (part / "model.safetensors").touch()  # It says nothing of how far a run is.
    patient = made(tmp_path / "patient", "--seed 2 --epochs 5 --patience 1")
    rows = compared(whole, part, patient)["rows"]
    assert [run["ended"] for row in rows for run in row["runs"]] == [True, False, True]
    out = capsys.readouterr().out
    assert "2 to 3 of 3" in out
    assert f"{part}: 2 of 3 epochs" in out
    assert f"- {part}: 2 of 3 epochs" in report(tmp_path)
    assert "patient: " not in out
    assert rows[0]["numbers"]["last"]["values"] == [80, 90]


def test_a_run_that_has_not_begun_has_empty_cells_and_no_curve(tmp_path, capsys):
    paths = [made(tmp_path / "new", rows=[]), made(tmp_path / "sgd", "--rho 0")]
    new, other = compared(*paths)["rows"]
    assert new["numbers"]["last"] is new["numbers"]["seconds"] is None
    assert new["runs"][0]["epochs"] == 0
    assert cells(report(tmp_path), other["name"])[1][-1] == "-"
    seen = capsys.readouterr()
    assert f"{paths[0]} has no epoch recorded" in seen.err
    assert re.search(r"sam, rho 0.05 +1: seed 0 +0 of 3 +- +- +- +- +- +test", seen.out)
    shutil.rmtree(tmp_path / "compare")
    shutil.copy(paths[0] / "metrics.jsonl", paths[1])
    compared(*paths)
    assert not (tmp_path / "compare" / "compare.png").exists()
    assert "compare.png" not in report(tmp_path)


def test_lines_that_lack_numbers_are_left_out_and_told(tmp_path, capsys):
    paths = [made(tmp_path / "a"), made(tmp_path / "b", "--rho 0")]
    whole = RunDirectory(paths[0]).rows()[-1]
    with (paths[0] / "metrics.jsonl").open("a") as file:
        for line in ('{"epoch": 4}', json.dumps(whole | {"train_loss": "x"}), "no JSON"):
            file.write(f"{line}\n")
    assert len(compared(*paths)["rows"][0]["runs"][0]["metrics"]) == 3
    assert "3 damaged or repeated lines left out" in capsys.readouterr().err


NOT_COMPARABLE = [
    ("--rho 0.2", [], []),
    ("--model wrn-10-2", [], ["another network"]),
    ("--layout davda54", [], ["another network"]),
    ("--label-noise 0.4", [], ["other labels"]),
    ("--label-noise 0.4 --split test", [], []),
]


@pytest.mark.parametrize(("flags", "accuracy", "sharp"), NOT_COMPARABLE)
def test_what_cannot_be_compared_is_marked(tmp_path, flags, accuracy, sharp):
    flags, _, split = flags.partition(" --split ")
    runs = [
        recipe.read(made(tmp_path / p, f), Display()) for p, f in (("a", ""), ("b", flags))
    ]
    split = split or "train"
    one, other = ([run] for run in runs)
    found = unlike(one, other, split)
    for table, texts in (("accuracy", accuracy), ("sharpness", sharp)):
        said = [text for name, text in found if name == table]
        assert len(said) == len(texts)
        assert all(part in text for part, text in zip(texts, said, strict=True))
    other = [runs[1]._replace(data="other")]
    tables = [table for table, _ in unlike([runs[0]._replace(data="x")], other, split)]
    assert "accuracy" in tables


def test_seconds_of_other_machines_are_marked_with_what_differs(tmp_path):
    run = recipe.read(made(tmp_path / "a"), Display())
    one = run._replace(versions={"torch": "2", "threads": "1", "ranks": "1"})
    other = one._replace(versions=one.versions | {"threads": "4"})
    assert unlike([one], [one, run], "train") == []
    said = [("cost", "trained with threads 4, not 1")]
    assert unlike([one], [other], "train") == said
    said = [("cost", "trained with threads 1 and 4, not 1")]
    assert unlike([one], [one, other], "train") == said
    gpu = run._replace(config=run.config.replace(device="cuda"))
    said = [("cost", "trained with --device cuda, not cpu")]
    assert unlike([run], [gpu], "train") == said


def test_a_row_of_several_machines_says_so(tmp_path):
    paths = [made(tmp_path / p, f"--seed {i}") for i, p in enumerate("ab")]
    one, other = (recipe.read(path, Display()) for path in paths)
    one = one._replace(versions={"threads": "1", "ranks": "1"})
    unlike_others = other._replace(versions={"threads": "2", "ranks": "1"})
    went_on = one._replace(before=[{"threads": "2", "ranks": "1", "m": "64"}])
    for runs in ([one, unlike_others], [went_on, other]):
        (remark,) = remarks_of(grouped(runs), [])
        assert "trained with threads " in remark
        assert "and" in remark
        assert remark.endswith("; so its seconds are not of one machine")
    assert remarks_of(grouped([one, other._replace(versions=one.versions)]), []) == []


def test_runs_of_another_m_are_no_repetition(tmp_path):
    whole, parts, same, mixed = (
        made(tmp_path / name, f"--batch-size 64 --seed {seed}", **more)
        for seed, (name, more) in enumerate(
            {
                "whole": {},
                "parts": {"m": [32.0] * 3},
                "same": {"m": [64.0] * 3},
                "mixed": {"m": [64.0, 32.0, 32.0]},
            }.items()
        )
    )
    found = compared(whole, parts, same, mixed)
    rows = [[run["path"] for run in row["runs"]] for row in found["rows"]]
    assert rows == [[str(whole), str(same)], [str(parts)], [str(mixed)]]
    assert found["settings"] == {"m": ["the batch", "32", "64 then 32"]}
    text = "a perturbation was found on m = 64 then 32 images; so it is a row of its own"
    assert f"- {mixed}: {text}" in report(tmp_path)
    assert text not in report(tmp_path).replace(f"{mixed}: {text}", "")


def test_a_mark_stands_in_the_table_that_it_is_of(tmp_path, capsys):
    one = made(tmp_path / "a", "--rho 0")
    other = made(tmp_path / "b", "--rho 0.1 --model wrn-10-2")
    runs = [recipe.read(path, Display()) for path in (one, other)]
    numbers = {"epoch": 2, "numbers": {"loss": {"value": 1.0, "error": None, "cost": 0}}}
    settings, groups = recipe.Settings(runs=(one, other)), grouped(runs)
    records = {one: numbers, other: numbers}
    tables = recipe.tables_of(settings, records)
    page = recipe.page_of(settings, groups, tables, records)
    names = {
        title: [row[0] for row in rows] for title, (_, (_, rows)) in page.parts.items()
    }
    assert names["sharpness"] == ["SGD", "sam, rho 0.1 *"]
    assert names["accuracy"] == names["cost"] == ["SGD", "sam, rho 0.1"]
    (remark,) = page.remarks
    assert "not comparable with SGD: weights of another network" in remark
    assert "* sam" in remark
    _, (columns, rows) = page.parts["sharpness"]
    assert rows[1][1:] == ["1", *"-----------"[: len(columns) - 2]]


@pytest.mark.parametrize(("flag", "measured", "epoch"), [("best", 3, 2), ("last", 2, 3)])
def test_sharpness_of_another_epoch_than_the_accuracy_is_told_and_ranks_nothing(
    tmp_path, flag, measured, epoch
):
    paths = [made(tmp_path / p, f"--seed {i}") for i, p in enumerate("ab")]
    runs = [recipe.read(path, Display()) for path in paths]
    settings = recipe.Settings(runs=tuple(paths), last=flag == "last")
    numbers = {"numbers": {"loss": {"value": 1.0, "error": None, "cost": 0}}}
    records = {
        paths[0]: numbers | {"epoch": epoch},
        paths[1]: numbers | {"epoch": measured},
    }
    tables = recipe.tables_of(settings, records)
    page = recipe.page_of(settings, grouped(runs), tables, records)
    (remark,) = page.remarks
    said = f"sharpness is of epoch {measured}, and the {flag} one is {epoch}"
    assert remark == f"{paths[1]}: {said}, so that it is in no rank correlation"
    points = recipe.points_of(settings, page, tables, records)["loss"]
    assert [*points.values()] == [[(1.0, {"best": 90.0, "last": 80.0}[flag])]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three runs of an epoch, two of which differ in the seed alone."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "256"]
    for name, rho, seed in (
        ("sgd-0", "0", "0"),
        ("sgd-1", "0", "1"),
        ("sam-0", "0.2", "0"),
    ):
        own = ["--rho", rho, "--seed", seed, "--output", str(folder / name)]
        assert train([*small, "--epochs", "1", *own]) == 0
    return [folder / name for name in ("sgd-0", "sgd-1", "sam-0")]


def test_sharpness_is_that_of_the_runs_and_measured_once(trained, tmp_path, capsys):
    paths = [shutil.copytree(path, tmp_path / path.name) for path in trained]
    assert sharpness.main([str(paths[0]), *CHEAP]) == 0
    capsys.readouterr()
    found = compared(*paths, flags=CHEAP)
    out = capsys.readouterr().out
    assert "sharpness of 1 of 3 runs is known already" in out
    assert "measuring 2 runs: at most 8 gradients" in out
    losses = []
    for path in paths:
        records = json.loads((path / "sharpness.json").read_text())["measurements"]
        losses.append(records[0]["numbers"]["loss"]["value"])
    sgd, sam = found["rows"]
    assert sgd["numbers"]["loss"]["values"] == losses[:2]
    assert sam["numbers"]["loss"]["values"] == losses[2:]
    assert sgd["runs"][0]["sharpness"]["numbers"]["loss"]["value"] == losses[0]
    mean, deviation = statistics.mean(losses[:2]), statistics.stdev(losses[:2])
    (_, _, sharp) = cells(report(tmp_path), "SGD")
    assert sharp[0] == sharpness.quantity(mean, deviation)
    assert found["measured"]["images"] == 20
    compared(*paths, flags=CHEAP)
    assert "measuring" not in capsys.readouterr().out
    compared(*paths, flags=[*CHEAP, "--rho", "0.1"])
    assert "measuring 3 runs" in capsys.readouterr().out


def test_it_is_said_how_measures_rank_the_runs_if_they_are_enough(
    trained, tmp_path, monkeypatch
):
    paths = [shutil.copytree(path, tmp_path / path.name) for path in trained]
    assert compared(*paths, flags=CHEAP)["correlation"]["loss"] == {
        "runs": None,
        "seeds": None,
    }
    assert "## Rank correlation" not in report(tmp_path)
    monkeypatch.setattr(correlation, "FEWEST", 3)
    monkeypatch.setattr(correlation, "VARIANCE", 0.0)  # so that n - 4 may be below 0
    found = compared(*paths, flags=CHEAP)
    sgd, sam = (row["numbers"] for row in found["rows"])
    losses, bests = ([*sgd[key]["values"], *sam[key]["values"]] for key in ("loss", "best"))
    signs = [
        (losses[i] < losses[j]) == (bests[i] < bests[j])
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert found["correlation"]["loss"]["runs"]["tau"] == pytest.approx(
        2 * sum(signs) / 3 - 1
    )
    assert "| loss | " in report(tmp_path).partition("## Rank correlation")[2]
    assert (tmp_path / "compare" / "correlation.png").stat().st_size


def test_a_checkpoint_that_cannot_be_read_is_told_and_the_others_measured(
    trained, tmp_path, capsys
):
    paths = [shutil.copytree(path, tmp_path / path.name) for path in trained]
    for checkpoint in RunDirectory(paths[0]).checkpoints().paths():
        checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    shutil.rmtree(paths[1] / "checkpoints")
    found = compared(*paths, flags=CHEAP)
    sgd, sam = found["rows"]
    assert sgd["numbers"]["loss"] is None
    assert sam["numbers"]["loss"]
    seen = capsys.readouterr()
    assert "SGD, seed 0 is not measured:" in seen.err
    assert "SGD: sharpness of 0 of 2 runs" in seen.out


def test_what_is_measured_is_used_even_if_it_cannot_be_kept(
    trained, tmp_path, capsys, monkeypatch
):
    def full(path, found):
        raise OSError("no space")

    paths = [shutil.copytree(path, tmp_path / path.name) for path in trained[1:]]
    monkeypatch.setattr(measurements, "write_json", full)
    assert compared(*paths, flags=CHEAP)["rows"][0]["numbers"]["loss"]
    assert (
        f"cannot write {paths[0] / 'sharpness.json'}: no space" in capsys.readouterr().err
    )


def test_curves_are_drawn_against_epochs_gradients_and_seconds(
    tmp_path, pictures, monkeypatch
):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    paths = [
        made(tmp_path / "sgd", "--rho 0"),
        made(tmp_path / "sam-0", "--rho 0.2"),
        made(tmp_path / "sam-1", "--rho 0.2 --seed 1", shifted(1)[:2]),
    ]
    compared(*paths)
    axes = figures[0].axes
    labels = [place.get_xlabel() for place in axes[3:]]
    assert labels == ["epoch", PASSES, "seconds of training"]
    assert [axes[0].get_ylabel(), axes[3].get_ylabel()] == [
        "training loss",
        "test accuracy (%)",
    ]
    sgd, *thin, mean = [
        [*zip(*map(list, line.get_data()), strict=True)] for line in axes[0].get_lines()
    ]
    assert sgd == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert thin == [[(1, 2.0), (2, 1.0), (3, 0.5)], [(1, 3.0), (2, 2.0)]]
    assert mean == [(1, 2.5), (2, 1.5)]  # as far as both go
    ends = [[line.get_xdata()[-1] for line in place.get_lines()] for place in axes[:3]]
    assert ends == [[3, 3, 2, 2], [3, 6, 4, 4], [6, 6, 4, 4]]
    styles = [
        (a.get_color(), a.get_linestyle(), a.get_marker()) for a in axes[0].get_lines()
    ]
    assert all(one != other for one, other in zip(styles[0], styles[-1], strict=True))
    compared(paths[0], made(tmp_path / "ae", "--method ae_sam"))
    labels = [place.get_xlabel() for place in figures[1].axes[2:]]
    assert labels == ["epoch", "seconds of training"]


def test_a_run_that_diverged_is_told_and_in_no_mean(tmp_path, capsys):
    paths = [made(tmp_path / "a"), made(tmp_path / "b", "--seed 1", shifted(9)[:1])]
    recorded.write_divergence(paths[1], "stage1 is not finite after 7 steps")
    (row,) = compared(*paths)["rows"]
    assert row["numbers"]["last"]["values"] == [80]
    assert [bool(run["diverged"]) for run in row["runs"]] == [False, True]
    assert "2: seeds 0, 1; 1 diverged" in report(tmp_path)
    assert "b diverged, and is in no mean: stage1 is" in capsys.readouterr().out


def test_names_may_hold_anything(tmp_path, pictures, capsys):
    paths = [
        made(tmp_path / name, f"--lr {lr} --epochs {3 + i} --batch-size 3{i}")
        for i, (lr, name) in enumerate(((0.1, "a|b$_{`\x1b[31m"), (0.2, "[bold]c\udc80")))
    ]
    compared(*paths)
    text = report(tmp_path)
    assert "| a\\|b$_{`?[31m |" in text
    assert "\x1b" not in text + capsys.readouterr().out


def test_what_is_no_run_is_left_out_so_that_a_pattern_may_find_the_report(tmp_path, capsys):
    paths = [made(tmp_path / "a"), made(tmp_path / "b", "--rho 0")]
    compared(*paths)
    assert len(compared(*sorted(tmp_path.iterdir()))["rows"]) == 2
    assert "compare is no run" in capsys.readouterr().err


WRONG = [
    (["A"], "expected at least two runs, got 1"),
    ([], "expected at least two runs, got none"),
    (["A", "absent"], "cannot read absent/config.toml"),
    (["A", "A/../a"], "expected different runs"),
    (["A", "A/config.toml"], "expected directories of runs, got the file"),
    (["A", "B", "--rho", "-1"], "--rho: expected a finite number above 0, got -1.0"),
    (["A", "B", "--output", "A/config.toml"], "--output: cannot write"),
    (["A", "DAMAGED"], "config.toml is no TOML"),
    (["A", "B", "--device", "junk"], "--device: 'junk' cannot be used"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_input_ends_with_its_code(tmp_path, capsys, flags, message):
    names = {"A": "a", "B": "b", "DAMAGED": "damaged"}
    for name in names.values():
        made(tmp_path / name, "--rho 0" if name == "b" else "")
    (tmp_path / "damaged" / "config.toml").write_text("[")
    for name, folder in names.items():
        flags = [re.sub(rf"^{name}\b", str(tmp_path / folder), flag) for flag in flags]
    assert recipe.main(flags) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_written_ends_with_its_code(tmp_path, capsys):
    paths = [made(tmp_path / "a"), made(tmp_path / "b", "--rho 0")]
    (tmp_path / "compare" / "compare.md").mkdir(parents=True)
    assert recipe.main([*map(str, paths), "--no-sharpness"]) == 5
    assert "cannot write" in capsys.readouterr().err
