"""Whatever stands in the place of a run's files, commands end, and say what it is."""

import json
import re
import shutil
import sys

import pytest

from recipes import compare, landscape, plots, sharpness, sweep
from recipes.cifar_wrn import main as train
from recipes.errors import ConfigError
from recipes.study import grid
from recipes.study.groups import differing, grouped
from recipes.train import checkpoints, recorded
from recipes.train.directory import RunDirectory
from tests.recipes.train.test_recorded import CHEAP, COMMANDS, SMALL, edited, said
from tests.special import make_special

SWEEP = ["--rhos", "0", "0.2", "--seeds", "1"]


pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return a sweep of two runs, one of them measured."""
    folder = tmp_path_factory.mktemp("sweep") / "study"
    assert sweep.main([*SWEEP, "--output", str(folder), "--", *SMALL]) == 0
    assert sharpness.main([str(folder / "sgd-seed0"), *CHEAP]) == 0
    return folder


@pytest.fixture
def study(swept, tmp_path):
    """Return a copy of the sweep, to write into."""
    return shutil.copytree(swept, tmp_path / "study")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Nobody looks at the pictures."""
    for name in ("side_by_side", "curves", "surfaces", "lines", "sweep"):
        monkeypatch.setattr(plots, name, lambda *args: None)


def again(study):
    """Return the command that goes on with a sweep."""
    return sweep.main([*SWEEP, "--output", str(study), "--", *SMALL])


def measured(study):
    """Return the command that compares the two runs, and measures what is not known."""
    (other,) = study.glob("sam*")
    return compare.main([str(study / "sgd-seed0"), str(other), *CHEAP])


def commanded(name, study):
    """Call a command with the runs of a sweep."""
    if name in ("sweep", "measured"):
        return {"sweep": again, "measured": measured}[name](study)
    (other,) = study.glob("sam*")
    return COMMANDS[name](study / "sgd-seed0", other)


ODD = {
    "pipe": "a named pipe",
    "device": "a device",
    "socket": "a socket",
    "directory": "a directory",
    "symbolic links": "a loop of links",
}
# File -> who reads it, and whether that one goes on without it.
READ = {
    "config.toml": ((*COMMANDS, "sweep"), 2),
    "metrics.jsonl": (("compare", "resume", "sweep"), 2),
    "sharpness.json": (("measured",), 0),
    "model.safetensors": (("sweep",), 2),
    "diverged.txt": (("sweep",), 0),
}
CASES = [
    (file, kind, command, code)
    for file, (commands, code) in READ.items()
    for kind in ODD
    for command in (commands if kind == "pipe" else commands[:1])
]


@pytest.mark.parametrize(("file", "kind", "command", "code"), CASES)
def test_only_regular_files_are_opened(study, capsys, file, kind, command, code):
    make_special(study / "sgd-seed0" / file, ODD[kind])
    assert commanded(command, study) == code
    told = said(capsys)
    assert file in told
    assert kind in told
    assert "Traceback" not in told


@pytest.mark.parametrize("command", ["compare", "sharpness", "resume"])
def test_only_regular_files_are_checkpoints(study, capsys, command):
    (newest, *_) = RunDirectory(study / "sgd-seed0").checkpoints().paths()
    make_special(newest, "a named pipe")
    assert commanded(command, study) == 2
    assert "pipe" in said(capsys)


HUGE = "1" + "0" * 400
SECONDS, RIGHT = r'("seconds": )[\d.]+', r'(accuracy": )[\d.]+'
# What a run's files may hold, and how a command then ends.
HELD = [
    ("config.toml", lambda text: "", 2, "does not say data"),
    ("config.toml", lambda text: text.replace('"digits"', '"auto"'), 2, "not say data"),
    (
        "config.toml",
        lambda text: text.replace('precision = "float32"', 'precision = "auto"'),
        2,
        "does not say precision",
    ),
    ("config.toml", lambda text: re.sub("epochs = 3", f"epochs = {HUGE}", text), 2, "64"),
    ("config.toml", lambda text: re.sub("lr = 0.2", f"lr = {HUGE}", text), 2, "64 bits"),
    ("config.toml", lambda text: re.sub("seed = 0", f"seed = {HUGE}", text), 2, "64 bits"),
    (
        "config.toml",
        lambda text: text.replace('weights = "none"', r'weights = "a\u0000b"'),
        2,
        "weights cannot be 'a\\x00b'",
    ),
    ("config.toml", lambda text: "\0", 2, "is no TOML"),
    ("metrics.jsonl", lambda text: text.replace('h": 3', f'h": {HUGE}'), 0, "damaged"),
    ("metrics.jsonl", lambda text: re.sub(SECONDS, rf"\g<1>{HUGE}", text), 0, "damaged"),
    ("metrics.jsonl", lambda text: re.sub(RIGHT, r'\g<1>"high"', text), 0, "damaged"),
    ("metrics.jsonl", lambda text: re.sub(RIGHT, r"\g<1>null", text), 0, "damaged"),
    ("metrics.jsonl", lambda text: "[" * 100_000, 0, "damaged"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["compare", "resume", "sweep"])
@pytest.mark.parametrize(("file", "change", "code", "message"), HELD)
def test_what_no_run_writes_ends_no_command_in_a_traceback(
    study, capsys, command, file, change, code, message
):
    path = study / "sgd-seed0" / file
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    found = commanded(command, study)
    told = said(capsys)
    if code == 2 or command != "sweep":  # which needs all epochs
        assert found == code, told
        assert message in told
    else:
        assert found in (0, 2)
        assert told


@pytest.mark.parametrize(
    "text", [HUGE, '{"measurements": HUGE}', '{"measurements": [HUGE]}']
)
def test_a_number_without_end_is_no_sharpness(study, capsys, text):
    path = study / "sgd-seed0" / "sharpness.json"
    path.write_text(text.replace("HUGE", HUGE))
    assert measured(study) == 0
    assert "measured anew" in said(capsys)


MAINS = {
    "compare": lambda path: compare.main([path, path + "x", "--no-sharpness"]),
    "sharpness": lambda path: sharpness.main([path, *CHEAP]),
    "landscape": lambda path: landscape.main([path]),
    "resume": lambda path: train(["--resume", path]),
    "auto-resume": lambda path: train(["--auto-resume", "--output", path, *SMALL]),
    "output": lambda path: train([*SMALL, "--output", path]),
    "sweep": lambda path: sweep.main([*SWEEP, "--output", path, "--", *SMALL]),
    "config": lambda path: train(["--config", path]),
    "weights": lambda path: train([*SMALL, "--weights", path, "--output", f"{path}-run"]),
}


@pytest.mark.parametrize("command", MAINS)
def test_a_loop_of_links_is_no_run(tmp_path, capsys, command):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert MAINS[command](str(tmp_path / "a")) == 2
    told = said(capsys)
    assert str(tmp_path / "a") in told
    assert "Traceback" not in told


@pytest.mark.parametrize("command", MAINS)
def test_a_path_with_a_nul_is_no_path(tmp_path, capsys, command):
    assert MAINS[command](str(tmp_path / "a\0b")) == 2
    told = said(capsys)
    assert "NUL" in told or "expected none, default or a file" in told
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_with_a_logger_is_read_where_there_is_none(
    study, monkeypatch, capsys, command
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    edited(study / "sgd-seed0", "log = []", 'log = ["wandb"]')
    assert commanded(command, study) == 0
    told = said(capsys)
    assert told.count("wandb") == (command == "resume")
    if command == "resume":
        assert "--log wandb is left out: it is not installed" in told
        assert (
            'log = [\n    "wandb",\n]' in (study / "sgd-seed0" / "config.toml").read_text()
        )
    assert again(study) == 0


def test_a_file_of_a_run_says_nothing_of_a_number_that_is_text(study, capsys):
    """The row that a checkpoint holds is checked like a line of the metrics."""
    rows = RunDirectory(study / "sgd-seed0").rows()
    (study / "sgd-seed0" / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert again(study) == 0
    assert "is not what checkpoints say of epochs 2, 3; they count" in said(capsys)


def test_an_average_says_what_it_lacks_and_stays_beside_no_other_model(runs, capsys):
    (run, _), average = runs, runs[0] / "average.safetensors"
    for count, left, told in (("2", 2, False), ("5", 2, True), ("2", 1, True)):
        if left == 1:
            RunDirectory(run).checkpoints().paths()[0].unlink()
        assert train(["--resume", str(run), "--average-best", count]) == 0
        text = f"only {left} of the {count} best epochs have a checkpoint"
        assert (f"--average-best {count}: {text}" in said(capsys)) == told
    before = average.read_bytes()
    assert train(["--resume", str(run), "--average-best", "None"]) == 0
    assert "without --average-best" in said(capsys)
    assert not average.exists()
    assert (run / "average.safetensors.superseded").read_bytes() == before


def test_a_run_that_goes_on_elsewhere_remembers_where_it_was(runs, monkeypatch, capsys):
    path, real = runs[1], checkpoints.versions
    first = recorded.read(path, print)
    assert (first.before, first.m, first.mixed) == ([], ["256"], False)
    elsewhere = {"threads": "99"}
    monkeypatch.setattr(checkpoints, "versions", lambda task: real(task) | elsewhere)
    assert train(["--resume", str(path), "--epochs", "3", "--resume-override"]) == 0
    assert "is now 99: going on" in said(capsys)
    run = recorded.read(path, print)
    assert run.before == [{**first.versions, "m": "256"}]
    assert [one["threads"] for one in run.machines] == [first.versions["threads"], "99"]
    assert run.m == ["256"]


def test_weights_of_one_name_are_told_apart_by_what_they_are(runs, tmp_path, capsys):
    file, paths = tmp_path / "w.safetensors", [tmp_path / name for name in "abc"]
    for path, first in zip(paths[::2], runs, strict=True):
        shutil.copy(first / "model.safetensors", file)
        flags = ["--epochs", "1", "--weights", str(file), "--output", str(path)]
        assert train([*SMALL, *flags]) == 0
    shutil.copytree(paths[0], paths[1])
    found = [recorded.read(path, print) for path in paths]
    assert [len(group.runs) for group in grouped(found)] == [2, 1]
    assert [*differing(found)] == ["weights"]
    old, *_, new = (grid.Cell("sam", run.config, run.path) for run in found)
    assert grid.read(new, print) is not None
    with pytest.raises(ConfigError, match="holds a run of other weights: "):
        grid.read(old, print)
    said(capsys)
    assert train(["--resume", str(new.path)]) == 0
    assert "--weights" not in said(capsys)
    assert train(["--resume", str(old.path)]) == 0
    assert "is another file than the run began with" in said(capsys)


def test_a_run_knows_its_weights_when_their_file_is_gone(runs, tmp_path):
    file, run = tmp_path / "w.safetensors", tmp_path / "run"
    shutil.copy(runs[0] / "model.safetensors", file)
    flags = ["--weights", str(file), "--output", str(run)]
    assert train([*SMALL, "--epochs", "1", *flags]) == 0
    before = recorded.read(run, print).weights
    file.unlink()
    assert train(["--resume", str(run), "--epochs", "2", "--resume-override"]) == 0
    after = recorded.read(run, print)
    assert (after.done, after.weights) == (2, before)
