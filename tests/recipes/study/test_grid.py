"""Many runs at once: the finished stay, the stopped go on, the diverged are told."""

import io
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import samfn
from recipes import errors
from recipes.cifar_wrn import main as train
from recipes.errors import ConfigError
from recipes.settings.config import plain_values
from recipes.settings.resolve import configure
from recipes.settings.saved import of_run, to_toml
from recipes.study import grid
from recipes.study.groups import last, percent, series_of, summary
from recipes.terminal import cli
from recipes.terminal.console import Display, QuietConsole
from recipes.terminal.signals import watched
from recipes.train import loop, running
from recipes.train.directory import RunDirectory

FLAGS = ["--data", "digits", "--batch-size", "256"]
CONFIG = configure([*FLAGS, "--epochs", "2"])
SGD, SAM = replace(CONFIG, rho=0.0), replace(CONFIG, rho=0.1)
ARMS = [("SGD", SGD), ("sam, rho 0.1", SAM)]
WILD = [("SGD", SGD), ("wild", replace(CONFIG, lr=1e6))]


def conduct(arms, output, seeds=2, report=lambda groups: None):
    """Run a study as commands do."""
    cells = grid.plan(arms, seeds, output)
    with watched() as signals:
        return grid.run(cells, output, Display(), signals, report)


def coded(arms, output, report=lambda groups: None, seeds=2):
    """Run a study as a command; return its exit code."""

    def body(display, signals):
        grid.run(grid.plan(arms, seeds, output), output, display, signals, report)
        return 0

    return cli.run(body, grid.LEFT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a study of two arms and two seeds, its results, and what was reported."""
    output, reported = tmp_path_factory.mktemp("study") / "whole", []
    return output, conduct(ARMS, output, report=reported.append), reported


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """Return a study of which one arm diverged."""
    output = tmp_path_factory.mktemp("study") / "wild"
    return output, conduct(WILD, output)


@pytest.fixture
def runs(monkeypatch):
    """Return the directories of the runs that are begun or go on."""
    begun, real = [], running.run

    def run(config, *args):
        begun.append((config.resume or config.output).name)
        return real(config, *args)

    monkeypatch.setattr(running, "run", run)
    return begun


def weights(run):
    return load_file(RunDirectory(run.path).weights)


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def without_times(rows):
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def test_a_cell_is_the_run_that_the_recipe_makes_alone(whole, tmp_path):
    run = whole[1][1].runs[1]
    flags = [*FLAGS, "--epochs", "2", "--rho", "0.1", "--seed", "1"]
    assert train([*flags, "--output", str(tmp_path / "alone")]) == 0
    alone = RunDirectory(tmp_path / "alone")
    assert equal(weights(run), load_file(alone.weights))
    assert without_times(run.rows) == without_times(alone.rows())
    files = {path.name for path in alone.path.iterdir()}
    assert {path.name for path in run.path.iterdir()} == files


def test_seeds_are_outermost_and_count_from_that_of_the_settings(tmp_path):
    arms = [(label, replace(config, seed=5)) for label, config in ARMS]
    cells = grid.plan(arms, 2, tmp_path)
    found = [(cell.label, cell.config.seed, cell.config.rho) for cell in cells]
    assert found == [
        ("SGD", 5, 0.0),
        ("sam, rho 0.1", 5, 0.1),
        ("SGD", 6, 0.0),
        ("sam, rho 0.1", 6, 0.1),
    ]
    assert cells[2].path == tmp_path / "sgd-seed6"
    assert re.fullmatch(r"sam-rho-0\.1-[0-9a-f]{8}-seed6", cells[3].path.name)


def test_what_is_finished_is_read_and_only_what_is_new_is_run(whole, runs, capsys):
    output, before, _ = whole
    reported = []
    assert conduct(ARMS, output, report=reported.append) == before
    assert (runs, reported) == ([], [before])
    assert f"4 runs in {output}, 4 of them finished" in capsys.readouterr().out
    more = [ARMS[1], ("asam", replace(CONFIG, method="asam"))]
    after = conduct(more, output, seeds=1)
    assert runs == ["asam-seed0"]
    assert after[0].runs == before[1].runs[:1]


def test_each_run_has_a_line_and_no_more_is_said_of_it(tmp_path, monkeypatch, capsys):
    read, real = [], grid.read_data
    monkeypatch.setattr(grid, "read_data", lambda *args: read.append(args) or real(*args))
    one = replace(CONFIG, epochs=1)
    arms = [("a [b]", one), ("c", one), ("d", replace(one, data_dir=tmp_path))]
    (first, *_) = conduct(arms, tmp_path / "x", seeds=1)
    start, *lines = capsys.readouterr().out.splitlines()
    assert start == f"3 runs in {tmp_path / 'x'}, 0 of them finished"
    accuracy = f"{last(first.runs[0]):.2f} %"
    values = f"last epoch {accuracy}, best {accuracy}"
    assert lines[0].startswith(f"1/3 a [b], seed 0: {values}, ")
    assert re.search(r" s, [\d.]+ s left$", lines[0])
    assert re.search(r"^3/3 d, seed 0: .* s$", lines[2])
    # Data are read once, and anew where they are others.
    assert [config.data_dir for config, *_ in read] == [None, tmp_path]


def test_reports_come_after_each_seed_with_all_that_is_known(whole):
    first, both = whole[2]
    assert both == whole[1]
    assert [group.runs for group in first] == [group.runs[:1] for group in both]


def stop_after(steps, monkeypatch, number=signal.SIGINT):
    """Send a signal to this process after so many steps."""
    taken, real = [], loop.step

    def step(*args):
        taken.append(None)
        if len(taken) == steps:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "step", step)


@pytest.mark.parametrize(
    ("steps", "number", "code"),
    [(13, signal.SIGINT, 130), (20, signal.SIGTERM, 143), (14, signal.SIGHUP, 129)],
)
def test_a_study_that_was_stopped_goes_on_bit_for_bit(
    whole, tmp_path, monkeypatch, capsys, runs, steps, number, code
):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run by nohup.
    with monkeypatch.context() as patch:
        stop_after(steps, patch, number)  # in the second run, and in its last step
        assert coded(ARMS, tmp_path, seeds=1) == code
    signal.signal(signal.SIGHUP, before)
    error = capsys.readouterr().err
    assert f"{number.name} ended this; the same command goes on\n" in error
    del runs[:]
    groups = conduct(ARMS, tmp_path, seeds=1)
    assert len(runs) == 1  # What was finished before is not run again.
    for group, expected in zip(groups, whole[1], strict=True):
        assert equal(weights(group.runs[0]), weights(expected.runs[0]))
        assert without_times(group.runs[0].rows) == without_times(expected.runs[0].rows)


def test_a_signal_as_a_run_finishes_ends_the_study_after_it(
    tmp_path, monkeypatch, capsys, runs
):
    real = RunDirectory.append

    def append(*args):
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(RunDirectory, "append", append)
    arms = [(label, replace(config, epochs=1)) for label, config in ARMS]
    assert coded(arms, tmp_path) == 130
    assert runs == ["sgd-seed0"]
    assert "1/4 SGD, seed 0: last epoch" in capsys.readouterr().out
    assert grid.read(grid.plan(arms, 1, tmp_path)[0], pytest.fail)


def test_a_signal_between_runs_ends_a_study_too(whole, capsys):
    def report(groups):
        os.kill(os.getpid(), signal.SIGTERM)

    assert coded(ARMS, whole[0], report) == 143
    assert "SIGTERM ended this; the same command goes on" in capsys.readouterr().err


def test_a_run_of_other_settings_is_refused_before_anything_is_run(whole, runs):
    other = [("new", CONFIG), *((k, replace(v, lr=0.3)) for k, v in ARMS)]
    named = r"sgd-seed0 holds a run of other settings: lr was 0\.2, is now 0\.3; move"
    with pytest.raises(ConfigError, match=named):
        conduct(other, whole[0])
    assert runs == []


@pytest.mark.parametrize(
    "changes",
    [
        {"data_dir": Path("/moved/elsewhere")},
        {"max_skipped": 3, "allow_modified_data": True},
        {"preset": "none", "compile": "yes", "save_steps": 7, "log": ("wandb",)},
    ],
)
def test_what_a_run_may_go_on_with_does_not_make_it_that_of_other_settings(
    whole, runs, changes
):
    other = [("SGD", SGD.replace(**changes))]
    assert conduct(other, whole[0], seeds=1)[0].runs == whole[1][0].runs[:1]
    assert runs == []


def test_a_run_of_which_a_part_had_other_settings_is_refused(whole, tmp_path):
    run = shutil.copytree(whole[1][1].runs[0].path, tmp_path / "run")
    cell = grid.Cell("sam", replace(SAM, output=None), run)
    assert grid.read(cell, pytest.fail)
    (run / "config.toml.1").write_text(to_toml(SGD))
    text = r"run holds a run of which a part was trained with rho 0; move it away"
    with pytest.raises(ConfigError, match=text):
        grid.read(cell, pytest.fail)


def test_a_run_of_several_ranks_is_none_of_a_study(tmp_path):
    (cell,) = grid.plan(ARMS[:1], 1, tmp_path)
    with RunDirectory.create(cell.path, cell.config) as run:
        numbers = ("train_loss", "test_accuracy", "seconds", "images_per_second")
        run.append({"epoch": 1, "m": 256.0} | dict.fromkeys(numbers, 1.0))
        assert grid.read(cell, pytest.fail) is None
        run.append({"epoch": 2, "m": 128.0} | dict.fromkeys(numbers, 1.0))
    with pytest.raises(ConfigError, match="of m = 128 images, not 256; move it away"):
        grid.read(cell, pytest.fail)


def test_images_that_moved_keep_neither_a_run_nor_a_study_from_going_on(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "before" / split).mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    begun = configure(["--data-dir", str(tmp_path / "before")])
    (run / "config.toml").write_text(to_toml(begun))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = ["--data-dir", str(tmp_path / "after")]
    assert configure(["--resume", str(run), *moved]).data_dir == tmp_path / "after"
    cell = grid.Cell("SGD", configure(moved), run)
    assert grid.read(cell, pytest.fail) is None  # It goes on.
    with pytest.raises(ConfigError, match=r"other settings: seed was 0, is now 1; move"):
        grid.read(cell._replace(config=replace(cell.config, seed=1)), pytest.fail)


def test_what_diverged_is_recorded_and_ends_nothing(wild, runs, capsys):
    output, (tame, wild_) = wild
    assert not tame.diverged
    for run in wild_.runs:
        assert "is not finite after" in wild_.diverged[run.path] == run.diverged
    assert conduct(WILD, output) == [tame, wild_]
    assert runs == []


def edited(file):
    file.write_text("step 3: " + file.read_text())


def of_seed_1(file):
    shutil.copy(file.parent.parent / "wild-seed1" / file.name, file)


def by_hand(file):
    file.write_text("it did\n")


def deep(file):
    file.write_text("it did\n" + "[" * 100_000)


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def of_an_earlier_time(file):
    checkpoints = RunDirectory(file.parent).checkpoints()
    state = samfn.init({"w": torch.ones(1)}, {}, optimizer=samfn.sgd())
    about = {
        "config": plain_values(of_run(file.parent)),
        "progress": {"step": 0, "epoch": 0, "batch": 0},
    }
    checkpoints.save(state, **about, data="x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edited, "is not as it was written"),
        (of_seed_1, "is of a run of other settings"),
        (by_hand, "is not as it was written"),
        (deep, "cannot be read"),
        (a_pipe, "cannot be read"),
        (of_an_earlier_time, "says what came after no checkpoint, and the run is at step_"),
    ],
)
def test_a_forged_divergence_does_not_count(wild, tmp_path, change, reason):
    output = shutil.copytree(wild[0], tmp_path / "wild")
    said = []
    cell = grid.plan(WILD, 2, output)[1]
    assert grid.read(cell, said.append).diverged  # The twin: nothing was touched.
    change(cell.path / "diverged.txt")
    assert grid.read(cell, said.append) is None
    (line,) = [one for one in said if "diverged.txt" in one]
    assert reason in line
    assert line.endswith(": it does not count") or "and does not count: " in line


def test_a_run_that_ended_did_not_diverge_whatever_a_file_says(whole, wild, tmp_path):
    output = shutil.copytree(whole[0], tmp_path / "whole")
    cell = grid.plan(ARMS, 2, output)[0]
    shutil.copy(wild[1][1].runs[0].path / "diverged.txt", cell.path)
    said = []
    assert grid.read(cell, said.append).diverged is None
    assert len(said) == 1


def test_a_divergence_that_did_not_count_is_kept_aside(wild, tmp_path, runs):
    output = shutil.copytree(wild[0], tmp_path / "wild")
    file = output / "wild-seed0" / "diverged.txt"
    by_hand(file)
    _, again = conduct(WILD, output)
    assert runs == ["wild-seed0"]
    assert again.diverged[file.parent] == wild[1][1].runs[0].diverged
    assert file.with_name("diverged.txt.superseded").read_text() == "it did\n"


def test_means_exclude_what_diverged_openly(wild):
    tame, wild_ = wild[1]
    both = tame._replace(runs=tame.runs + wild_.runs, diverged=wild_.diverged)
    values = [last(run) for run in tame.runs]
    assert both.values(last) == values
    assert summary(both, last) == f"{percent(tame.spread(last))} (2 of 4 diverged)"
    assert summary(wild_, last) == "2 of 2 diverged"
    assert series_of({0.1: both}).last == {0.1: values}


def test_an_exit_code_of_a_run_is_that_of_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run", lambda *args: errors.OUT_OF_MEMORY)
    assert coded(ARMS, tmp_path) == 4


def test_a_study_is_run_by_one_process_at_a_time(whole, capsys):
    with samfn.held(whole[0]):
        assert coded(ARMS, whole[0]) == 2
    assert f"{whole[0]} is in use by process" in capsys.readouterr().err


def test_a_study_whose_model_is_lost_is_told_nothing_of_flags_that_it_lacks(
    tmp_path, monkeypatch, capsys
):
    def lost(*args, **options):
        raise ConfigError("it is damaged")

    monkeypatch.setattr(running, "restore_best", lost)
    arms = [("SGD", replace(SGD, epochs=1))]
    assert coded(arms, tmp_path, seeds=1) == 5
    said = capsys.readouterr().err
    assert "no best checkpoint is left to export: it is damaged; who goes on" in said
    (tmp_path / "sam-seed0").mkdir()
    (tmp_path / "sam-seed0" / "other").touch()
    assert coded([("SAM", SAM)], tmp_path, seeds=1) == 2
    said += capsys.readouterr().err
    assert "expected a new or empty directory" in said
    assert "--resume" not in said


def test_what_cannot_be_written_ends_with_its_code(whole, tmp_path, capsys):
    def report(groups):
        raise OSError("no space")

    assert coded(ARMS, whole[0], report) == 5
    assert "cannot write: no space" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert coded(ARMS, tmp_path / "file" / "x") == 2
    assert "--output: cannot write" in capsys.readouterr().err


def test_a_finished_run_without_its_metrics_is_refused(tmp_path):
    arms = [("a", replace(CONFIG, epochs=1))]
    before = conduct(arms, tmp_path, seeds=1)
    directory = RunDirectory(before[0].runs[0].path)
    for text in ("", '{"epoch": 1, "seconds": 1}\n'):
        directory.metrics.write_text(text)
        assert conduct(arms, tmp_path, seeds=1) == before  # The checkpoint knows it.
    shutil.rmtree(directory.checkpoints().directory)
    with pytest.raises(ConfigError, match=r"metrics.jsonl is damaged or gone"):
        conduct(arms, tmp_path, seeds=1)


@given(st.text(), st.text())
def test_labels_that_differ_have_names_that_differ(one, other):
    names = [grid.slug(label) for label in (one, other)]
    assert names[0] != names[1] or one.lower() == other.lower()
    for name in names:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*", name)
        assert len(name) < 60


def test_no_label_is_the_name_of_another():
    assert grid.slug("SGD") == "sgd"
    for label in ("asam(0.01)", "asam-0.01", "../x", "", "a" * 50, "\udc80", "."):
        name = grid.slug(label)
        assert grid.slug(name) != name
        assert re.search(r"-[0-9a-f]{8}$", name)


def test_labels_that_differ_by_case_alone_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="differ by more than case"):
        grid.plan([("SAM", CONFIG), ("sam", CONFIG)], 1, tmp_path)


WRONG = [
    (["--output", "x"], "--output: it is for one run alone, drop it"),
    (["--resume=x"], "--resume: it is for one run alone"),
    (["--eval-only"], "--eval-only: it is for one run alone"),
    (["--auto-resume"], "--auto-resume: it is for one run alone"),
    (["--no-dry-run"], "--no-dry-run: it is for one run alone"),
    (["--rho", "0.1"], "--rho: the runs differ in it, drop it after --"),
    (["--label_noise=0.1"], "--label_noise: the runs differ in it"),
    (["--lr", "0"], "--lr: expected a finite number above 0"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_flags_that_a_study_cannot_have_are_refused(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        grid.common([*FLAGS, *flags], {"rho", "label_noise"})


def test_a_logger_that_knows_one_run_of_a_process_is_refused(monkeypatch):
    logged = CONFIG.replace(log=("tensorboard", "trackio"))
    monkeypatch.setattr(grid, "configure", lambda *args: logged)
    with pytest.raises(ConfigError, match="--log: trackio logs one run of a process"):
        grid.common([])


def test_flags_of_the_recipe_follow_two_dashes():
    assert grid.split(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
    assert grid.split(["a"]) == (["a"], [])


def test_a_terminal_shows_the_run_under_way_and_tables_as_they_are():
    shown = io.StringIO()
    console = QuietConsole(file=shown, force_terminal=True, width=100)
    with Display(console).brief("2/3 a {x} [b]").training(2, 5, 0) as live:
        live.step(1, 3, 0.5, 1000.0)
    assert "2/3 a {x} [b]" in shown.getvalue()
    assert "epoch 2/2, loss 0.500" in shown.getvalue()
    assert "train %" not in shown.getvalue()
    Display(console).table(["[bold]", "a"], [["[red]x", "[b]"]])
    head, _, row = [line for line in shown.getvalue().splitlines() if line.strip()][-3:]
    assert "[bold]" in head
    assert row.split() == ["[red]x", "[b]"]


def test_what_is_left_is_by_arm_and_else_the_mean():
    took = {"SGD": 10.0, "sam": 30.0}
    assert grid.remaining(["sam", "sam"], took) == ", 60 s left"
    assert grid.remaining(["SGD", "new"], took) == ", 30 s left"
    assert grid.remaining([], took) == grid.remaining(["sam"], {}) == ""
    assert [grid.duration(s) for s in (0.25, 99, 100, 5900, 6100)] == [
        "0.2 s",
        "99 s",
        "2 min",
        "98 min",
        "1.7 h",
    ]


def test_warnings_and_failures_say_of_which_run(capsys):
    display = Display().brief("2/3 a {x} [b]")
    display.say("hidden")
    display.facts("hidden", {"a": "b"})
    display.warn("odd")
    display.fail("wrong")
    with display.training(2, 5, 0) as live:
        assert not live.due()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "warning 2/3 a {x} [b]: odd\nerror 2/3 a {x} [b]: wrong\n"
