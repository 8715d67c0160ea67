"""A study of wrong labels: which runs, which table, and what the picture shows."""

from pathlib import Path

import pytest

from recipes import label_noise, plots
from recipes.settings.resolve import configure
from recipes.settings.saved import of_run
from recipes.study.groups import Spread, number, percent
from tests.recipes.study.test_report import group, rows_of

FLAGS = ["--data", "digits", "--epochs", "2", "--batch-size", "256"]
OWN = ["--noise", "0.5", "0", "--methods", "sgd", "every(sam, 2) 0.2", "--seeds", "1"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Return the directory of a study, and what was given to be drawn."""
    output, drawn = tmp_path_factory.mktemp("noise"), []
    with pytest.MonkeyPatch.context() as patch:
        real = plots.label_noise
        patch.setattr(plots, "label_noise", lambda *args: drawn.append(args) or real(*args))
        assert label_noise.main([*OWN, "--output", str(output), "--", *FLAGS]) == 0
    return output, drawn


def found(output):
    """Return what came of each run, by method and share of noise."""
    return {
        ("sam" if row["config"]["rho"] else "SGD", row["config"]["label_noise"]): run
        for row in rows_of(output / "label_noise.json").values()
        for run in row["runs"]
    }


def test_each_method_meets_each_noise(studied):
    runs = found(studied[0])
    assert {*runs} == {(name, share) for name in ("SGD", "sam") for share in (0, 0.5)}
    for (name, share), run in runs.items():
        config = of_run(Path(run["path"]))
        assert config.images.label_noise == share
        expected = ("sam", 0.0) if name == "SGD" else ("every(sam, 2)", 0.2)
        assert (config.method, config.rho) == expected


def test_labels_that_are_held_out_may_be_wrong_as_often(tmp_path):
    own = ["--noise", "0", "0.4", "--methods", "sgd", "--seeds", "1"]
    held = ["--validation", "0.2", "--noisy-validation"]
    flags = ["--data", "digits", "--epochs", "8", *held]
    assert label_noise.main([*own, "--output", str(tmp_path), "--", *flags]) == 0
    rows = (found(tmp_path)["SGD", share]["metrics"][-1] for share in (0, 0.4))
    clean, noisy = (row["test_accuracy"] - row["validation_accuracy"] for row in rows)
    assert abs(clean) < 8 < 20 < noisy


def test_the_table_has_last_and_best_epoch_of_each_method_by_noise(studied):
    runs, text = found(studied[0]), (studied[0] / "label_noise.md").read_text()
    assert "| method | epoch | 0 % | 50 % |\n" in text
    for label, name in (("SGD", "SGD"), ("every(sam, 2), rho 0.2", "sam")):
        for which in ("last", "best"):
            values = [percent(Spread.of([runs[name, share][which]])) for share in (0, 0.5)]
            assert f"| {label} | {which} | {' | '.join(values)} |\n" in text
    assert "--noise 0.5 0 --methods sgd 'every(sam, 2) 0.2' --seeds 1" in text
    assert "# Wrong labels: digits, wrn-10-1, 2 epochs\n" in text
    assert (studied[0] / "label_noise.png").read_bytes().startswith(b"\x89PNG")


def test_shares_of_noise_are_percent_without_what_rounding_adds():
    arms = dict.fromkeys(
        (0.07, 0.29, 0.333), group("SGD", FLAGS, [[{"test_accuracy": 9.0}]])
    )
    head, _ = label_noise.table({label_noise.read("sgd"): arms})
    assert head[2:] == ["7 %", "29 %", "33.3 %"]


def test_last_and_best_epoch_have_rows_of_their_own():
    groups = [
        group(
            f"SGD, noise {share}",
            [*FLAGS, "--rho", "0", "--label-noise", str(share)],
            [[{"test_accuracy": found} for found in (accuracy, accuracy - 5)]],
        )
        for share, accuracy in ((0.4, 60.0), (0, 90.0))
    ]
    settings = label_noise.Settings(noise=(0.4, 0.0), methods=("sgd",))
    assert label_noise.table(label_noise.found_of(settings, groups)) == (
        ["method", "epoch", "0 %", "40 %"],
        [["SGD", "last", "85.00", "55.00"], ["SGD", "best", "90.00", "60.00"]],
    )


def test_each_noise_has_the_best_of_several_rhos_by_what_chose_epochs():
    held = {0.1: (70.0, 50.0), 0.2: (60.0, 80.0)}  # by rho, at 0 and at 40 % noise
    groups = [
        group(
            f"asam, rho {rho}, noise {number(share)}",
            [*FLAGS, "--rho", str(rho), "--validation", "0.1", "--label-noise", str(share)],
            [[{"test_accuracy": 100 * rho + share, "validation_accuracy": held[rho][at]}]],
        )
        for rho in held
        for at, share in enumerate((0.0, 0.4))
    ]
    settings = label_noise.Settings(noise=(0.0, 0.4), methods=("asam 0.1 0.2",))
    page = label_noise.page(settings, groups)
    text, table = page.parts["accuracy"]
    assert table[1] == [
        ["asam, rho 0.1 0.2", "last", "10.00", "20.40"],
        ["asam, rho 0.1 0.2", "best", "10.00", "20.40"],
        ["asam, rho 0.1 0.2", "ρ", "0.1", "0.2"],
    ]
    assert text.endswith("Of several ρ, each noise has the best by the validation set.")
    groups[3] = group(groups[3].name, FLAGS, [None])  # One that diverged is not the best.
    assert label_noise.page(settings, groups).parts["accuracy"][1][1][2][3] == "0.1"


def test_what_is_drawn_is_what_was_found(studied):
    runs, ((series, *_),) = found(studied[0]), studied[1]
    assert [*series] == ["SGD", "every(sam, 2), rho 0.2"]
    for drawn, name in zip(series.values(), ("SGD", "sam"), strict=True):
        for which in ("last", "best"):
            expected = {share: [runs[name, share][which]] for share in (0, 0.5)}
            assert getattr(drawn, which) == {
                share: pytest.approx(values, rel=1e-8)  # A file has nine digits.
                for share, values in expected.items()
            }


def test_the_last_epoch_is_solid_and_the_best_dashed(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    series = {
        "SGD": plots.Series({0.0: [90.0], 0.4: [50.0, 60.0]}, {0.0: [95.0], 0.4: [80.0]}),
        "sam": plots.Series({0.0: [91.0], 0.4: []}, {0.0: [96.0], 0.4: []}),
    }
    plots.label_noise(series, tmp_path / "x.png", "")
    (axes,) = figures[0].axes
    lines = [container[0] for container in axes.containers]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    assert [line.get_ydata().tolist() for line in lines] == [[90, 55], [95, 80], [91], [96]]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert lines[0].get_marker() == lines[1].get_marker() != lines[2].get_marker()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "40"]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(names) == ["SGD", "best epoch", "last epoch", "sam"]


def test_the_defaults_are_the_noise_of_the_paper_and_sgd_among_three_methods():
    settings = label_noise.Settings()
    arms = label_noise.arms(settings, lambda: configure(FLAGS))
    assert settings.noise == (0.0, 0.2, 0.4, 0.6, 0.8)
    assert len(arms) == 20
    assert [(config.method, config.rho) for _, config in arms[:4]] == [
        ("sam", 0.0),
        ("sam", 0.2),
        ("asam", 2.0),
        ("momentum_sam", 3.0),
    ]


def test_the_last_words_of_a_method_are_its_rhos():
    read = label_noise.read
    assert read("sgd") == ("sam", (0.0,), ())
    assert read("asam(eta=0.1) 2") == ("asam(eta=0.1)", (2.0,), ())
    assert read(" every(sam, 5)  1e-1") == ("every(sam, 5)", (0.1,), ())
    late = read("every(sam, 5) .4  0.8 --sam-last 0.3")
    assert late == ("every(sam, 5)", (0.4, 0.8), ("--sam-last", "0.3"))
    assert late.label(0.4) == "every(sam, 5), rho 0.4 --sam-last 0.3"
    assert late.label(*late.rhos) == "every(sam, 5), rho 0.4 0.8 --sam-last 0.3"
    assert read("asam(eta=0.1) 2").label(2.0) == "asam(eta=0.1), rho 2"
    assert read("sgd").label(0.0) == "SGD"


def test_flags_of_a_method_are_those_of_its_runs_alone():
    settings = label_noise.Settings(noise=(0.4,), methods=("sgd", "sam 1 --sam-last 0.5"))
    arms = label_noise.arms(settings, lambda *more: configure([*FLAGS, *more]))
    assert [config.perturbation.sam_last for _, config in arms] == [1.0, 0.5]
    assert [config.images.label_noise for _, config in arms] == [0.4, 0.4]


WRONG = [
    (["--noise", "1.1"], "noise 1.1: --label-noise: expected 0 to 1, got 1.1"),
    (["--noise", "nan"], "noise nan: --label-noise: expected 0 to 1, got nan"),
    (["--noise", "0.1", "0.1"], "expected different arms, got SGD, noise 0.1 twice"),
    (["--methods", "sam"], "above 0 as \"sam 0.2\", or several, got 'sam'"),
    (["--methods", "every(sam, 5)"], "a rho above 0 as"),
    (["--methods", "sam 0"], "a rho above 0 as"),
    (["--methods", "sam inf"], "a rho above 0 as"),
    (["--methods", "0.1 0.2"], "a rho above 0 as"),
    (["--methods", "sam 0.1 --sam-last 2"], "--sam-last: expected above 0 to 1, got 2"),
    (["--methods", "sam 0.1 --title 'x"], "--methods: cannot read"),
    (["--methods", "adam 0.1"], "adam, rho 0.1, noise 0: --method: adam is not known"),
    (["--methods", "sam 0.2", "sam  0.20"], "got sam, rho 0.2, noise 0 twice"),
    (["--seeds", "-1"], "--seeds: expected 1 to 1000, got -1"),
    (["--", "--label-noise", "0.1"], "--label-noise: the runs differ in it"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_input_ends_with_its_code(tmp_path, capsys, flags, message):
    own = ["--output", str(tmp_path / "x"), *flags]
    assert label_noise.main(own if "--" in own else [*own, "--", *FLAGS]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
