"""Which of many directories are runs."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

from recipes.errors import ConfigError
from recipes.settings.saved import CONFIG_FILE
from recipes.study import runs
from recipes.terminal.console import Display


@contextlib.contextmanager
def somebody():
    """Be a user who is not the administrator, if this is the administrator."""
    own, nobody = os.geteuid(), 65534
    if own == 0:
        os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(own)


def test_a_run_that_may_not_be_looked_into_is_not_left_out(capsys):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Others may enter it.
        own = Path(folder)
        own.chmod(0o755)
        (own / "report").mkdir()
        (own / "closed").mkdir()
        (own / "closed" / CONFIG_FILE).touch()
        (own / "closed").chmod(0)
        paths = [own / "report", own / "closed", own / "closed" / "within", own / "none"]
        with somebody():
            found = runs.among(paths, Display())
        assert found == tuple(paths[1:])
    assert "report is no run: it holds no config.toml" in capsys.readouterr().err


NAMES, ARMS = ["arms.json", "arms.png", "arms.md"], "python -m recipes.arms"


def put(folder, *names, command=f"{ARMS} --seeds 1"):
    """Write files, of which the first says the command that wrote it."""
    for name in names:
        (folder / name).write_text("notes")
    runs.write_json(folder / names[0], {"command": command, "rows": []})


@pytest.mark.parametrize("command", ["python -m recipes.sweep", "", f"sh {ARMS}"])
def test_a_report_sets_aside_what_no_report_of_its_command_wrote(tmp_path, command):
    put(tmp_path, *NAMES, command=command)
    (tmp_path / "results.json").write_text("precious")
    before, told = (tmp_path / NAMES[0]).read_text(), []
    runs.make_way(tmp_path, NAMES, ARMS, told.append)
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    aside = {f"{name}.superseded": "notes" for name in NAMES}
    assert kept == aside | {"arms.json.superseded": before, "results.json": "precious"}
    assert f"{tmp_path / 'arms.md'} of before is arms.md.superseded now" in told


def test_a_report_replaces_an_older_one_of_its_command(tmp_path):
    put(tmp_path, *NAMES)
    runs.make_way(tmp_path, NAMES, ARMS, pytest.fail)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(NAMES)


def test_data_that_an_older_version_called_otherwise_stand_beside_no_new_report(tmp_path):
    put(tmp_path, "results.json", "arms.md")
    runs.make_way(tmp_path, NAMES, ARMS, print)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["arms.md.superseded", "results.json.superseded"]


def test_the_directory_of_a_run_is_none_for_reports(tmp_path):
    runs.make_directory(tmp_path / "a" / "b")
    runs.make_directory(tmp_path / "a" / "b")
    (tmp_path / "a" / CONFIG_FILE).touch()
    with pytest.raises(ConfigError, match="for reports, got that of a run, "):
        runs.make_directory(tmp_path / "a")
