"""A sweep over rho: SGD once, the best rho by the right split, and the picture."""

import pytest

from recipes import plots, sweep
from recipes.settings.resolve import configure
from recipes.study.groups import Spread, percent
from recipes.study.report import write
from recipes.train import running
from tests.recipes.study.test_report import group, rows_of

FLAGS = ["--data", "digits", "--epochs", "1", "--batch-size", "256"]
OWN = ["--rhos", "0.2", "0", "--methods", "sam", "asam(0.01)", "--seeds", "2"]
CONFIG = configure(FLAGS)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return the directory of a sweep, and what was given to be drawn."""
    output, drawn = tmp_path_factory.mktemp("sweep"), []
    with pytest.MonkeyPatch.context() as patch:
        real = plots.sweep
        patch.setattr(plots, "sweep", lambda *args: drawn.append(args) or real(*args))
        assert sweep.main([*OWN, "--output", str(output), "--", *FLAGS]) == 0
    return output, drawn


def found(output, label, which):
    """Return the accuracies of an arm, by seed."""
    return [run[which] for run in rows_of(output / "sweep.json")[label]["runs"]]


def test_sgd_is_run_once_for_all_methods(swept):
    rows = rows_of(swept[0] / "sweep.json")
    assert [*rows] == ["SGD", "sam, rho 0.2", "asam(0.01), rho 0.2"]
    for row in rows.values():
        assert [run["seed"] for run in row["runs"]] == [0, 1]
    assert [row["config"]["rho"] for row in rows.values()] == [0, 0.2, 0.2]


def test_the_report_has_table_command_and_picture(swept):
    output = swept[0]
    text = (output / "sweep.md").read_text()
    for label, name in (("SGD", "SGD | 0"), ("asam(0.01), rho 0.2", "asam(0.01) | 0.2")):
        last, best = (
            percent(Spread.of(found(output, label, which))) for which in ("last", "best")
        )
        assert f"| {name} | {last} | {best} |\n" in text
    assert "the best epoch is chosen by the test set" in text
    assert "best rho of sam, by the test set itself, which flatters: 0.2 (" in text
    command = f"--seeds 2 --output {output} -- {' '.join(FLAGS)}\n"
    assert "--rhos 0.2 0 --methods sam 'asam(0.01)' " + command in text
    assert "torch " in text
    assert "![Accuracy by ρ: digits, wrn-10-1, 1 epochs](sweep.png)" in text
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_is_what_was_found(swept):
    output, (series, base, *_) = swept[0], swept[1][-1]
    assert len(swept[1]) == 2  # after each seed
    assert [*series] == ["sam", "asam(0.01)"]
    for method, drawn in series.items():
        for which in ("last", "best"):
            expected = {0.2: found(output, f"{method}, rho 0.2", which)}
            assert close(getattr(drawn, which), expected)
    for which in ("last", "best"):
        assert close(getattr(base, which), {0: found(output, "SGD", which)})


def close(drawn, expected):
    """Return whether numbers are those of a file, which has nine digits of each."""
    return drawn == {k: pytest.approx(v, rel=1e-8) for k, v in expected.items()}


def test_a_larger_sweep_takes_what_is_there(swept, tmp_path, monkeypatch, capsys):
    begun, real = [], running.run

    def run(config, *args):
        begun.append((config.method, config.rho, config.seed))
        return real(config, *args)

    monkeypatch.setattr(running, "run", run)
    own = ["--rhos", "0", "0.2", "0.5", "--seeds", "1", "--output", str(swept[0])]
    assert sweep.main([*own, "--", *FLAGS]) == 0
    assert begun == [("sam", 0.5, 0)]
    out = capsys.readouterr().out
    assert "method    ρ  last epoch  best epoch\n" in out
    assert "best rho of sam, by the test set itself, which flatters: 0." in out


def test_radii_are_ascending_whatever_their_order():
    settings = sweep.Settings(rhos=(0.2, 0.0, 0.05), methods=("sam", "asam"))
    assert [(c.method, c.rho) for _, c in sweep.arms(settings, lambda: CONFIG)] == [
        ("sam", 0),
        ("sam", 0.05),
        ("sam", 0.2),
        ("asam", 0.05),
        ("asam", 0.2),
    ]


def made(scores, *flags):
    """Return arms of sam by rho, from test and validation accuracies of each seed.

    None is those of a run that diverged.
    """
    names = ("test_accuracy", "validation_accuracy")
    return [
        group(
            f"sam, rho {rho}",
            [*FLAGS, "--rho", str(rho), *flags],
            [[dict(zip(names, one, strict=True))] if one else None for one in seeds],
        )
        for rho, seeds in scores.items()
    ]


def best(groups):
    """Return the best rho of sam, as a number."""
    return float(sweep.best_rhos(groups)["sam"].partition(" ")[0])


def test_the_best_rho_is_by_the_validation_set_where_there_is_one():
    scores = {0.1: [(90, 60)], 0.2: [(80, 70)], 0.4: [(85, 65)]}
    assert best(made(scores)) == 0.1
    validated = made(scores, "--validation", "0.1")
    assert sweep.page(None, validated).remarks == [
        "best rho of sam, by the validation set: 0.2 (80.00 %)"
    ]
    columns, rows = sweep.table(validated)
    assert columns[-1] == "validation"
    assert rows[1] == ["sam", "0.2", "80.00", "80.00", "70.00"]


def test_the_best_rho_is_the_best_on_average_and_of_equal_ones_the_smallest():
    scores = {0.1: [(90, 0), (70, 0)], 0.4: [(85.5, 0)], 0.2: [(85, 0), (86, 0)]}
    assert best(made(scores)) == 0.2


def test_a_rho_that_diverges_is_none():
    groups = made({0.1: [(90, 0)], 0.2: [(99, 0), None], 0.4: [None]})
    assert best(groups) == 0.1
    assert {row[1]: row[2] for row in sweep.table(groups)[1]} == {
        "0.1": "90.00",
        "0.2": "99.00 (1 of 2 diverged)",
        "0.4": "1 of 1 diverged",
    }
    assert sweep.best_rhos(made({0.1: [None], 0.2: [None]})) == {"sam": "none"}


@pytest.fixture
def figures(monkeypatch):
    """Return the figures that are drawn."""
    found = []
    monkeypatch.setattr(plots.plt, "close", found.append)
    return found


def test_rho_is_logarithmic_and_sgd_a_band_across(tmp_path, figures):
    values = {0.05: [80.0, 90.0], 0.2: [95.0], 0.5: []}
    series = {"sam": plots.Series(values, {0.05: [99.0, 99.0]})}
    base = plots.Series({0.0: [70.0, 72.0]}, {0.0: []})
    plots.sweep(series, base, tmp_path / "x.png", "$x_")
    left, right = figures[0].axes
    assert (left.get_xscale(), right.get_xscale()) == ("log", "log")
    assert [axes.get_title() for axes in (left, right)] == ["last epoch", "best epoch"]
    (band,) = left.patches
    low, high = band.get_extents().transformed(left.transData.inverted()).intervaly
    assert (low, high) == pytest.approx((71 - 2**0.5, 71 + 2**0.5))
    assert not right.patches  # All of SGD diverged, or none was asked for.
    (line, _, (bars,)) = left.containers[0]
    assert line.get_xydata().tolist() == [[0.05, 85.0], [0.2, 95.0]]
    assert right.containers[0][0].get_xydata().tolist() == [[0.05, 99.0]]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends[0] == pytest.approx([85 - 50**0.5, 85 + 50**0.5])
    assert ends[1] == [95.0, 95.0]
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert names == ["ρ 0", "sam"]


def test_methods_differ_in_colour_and_in_marker(tmp_path, figures):
    count = len(plots.STYLES)
    series = {str(i): plots.Series({0.1: [i]}, {0.1: [i]}) for i in range(count)}
    plots.sweep(series, None, tmp_path / "x.png", "")
    lines = [container[0] for container in figures[0].axes[0].containers]
    assert len({line.get_color() for line in lines}) == count
    assert len({line.get_marker() for line in lines}) == count


def test_a_sweep_of_which_all_diverged_is_still_reported(tmp_path):
    groups = made({0.1: [None]})
    write(sweep.page(None, groups), "", "cpu", tmp_path, "sweep")
    assert "flatters: none" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


WRONG = [
    (["--rhos", "0"], "--rhos: expected one above 0, got"),
    (["--rhos", "0", "-0.1"], "rho -0.1: --rho: expected a finite number of at least 0"),
    (["--rhos", "nan"], "sam, rho nan: --rho: expected a finite number of at least 0"),
    (["--rhos", "0.1", "0.1"], "expected different arms, got sam, rho 0.1 twice"),
    (["--methods", "sam", "sam"], "expected different arms, got sam, rho 0.01 twice"),
    (["--rhos", "0.1", "--methods"], "expected at least one arm, got none"),
    (["--methods", "adam"], "adam, rho 0.01: --method: adam is not known"),
    (["--seeds", "0"], "--seeds: expected 1 to 1000, got 0"),
    (["--seeds", str(10**9)], "--seeds: expected 1 to 1000, got 1000000000"),
    (["--", "--seed", str(2**63 - 2)], "--seed: expected a number of at most 64 bits"),
    (["--", "--rho", "0.1"], "--rho: the runs differ in it"),
    (["--", "--method=sam"], "--method: the runs differ in it"),
    (["--", "--epochs", "0"], "--epochs: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_input_ends_with_its_code(tmp_path, capsys, flags, message):
    own = ["--output", str(tmp_path / "x"), *flags]
    assert sweep.main(own if "--" in own else [*own, "--", *FLAGS]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
