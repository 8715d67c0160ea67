import pytest

from recipes import plots
from recipes.errors import ConfigError
from recipes.settings.config import Config
from recipes.settings.saved import read_toml
from recipes.train.directory import RunDirectory, reserved
from tests.special import make_special


def rows(count):
    return [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, count + 1)]


def filled(path, count=3):
    with RunDirectory.create(path, Config()) as run:
        for row in rows(count):
            run.append(row)
    return run


def test_what_was_appended_is_read_back(tmp_path):
    assert filled(tmp_path / "run").rows() == rows(3)
    assert RunDirectory(tmp_path / "absent").rows() == []


def test_settings_are_written(tmp_path):
    filled(tmp_path / "run")
    assert Config.of(read_toml(tmp_path / "run" / "config.toml")) == Config(preset="none")


def test_no_epoch_is_added_to_another_run_of_that_name(tmp_path):
    with RunDirectory.create(tmp_path / "run", Config()) as run:
        run.path.rename(tmp_path / "moved")
        filled(tmp_path / "other").path.rename(run.path)
        with pytest.raises(FileNotFoundError, match="another of this name"):
            run.append({"epoch": 4})
        assert RunDirectory(run.path).rows() == rows(3)


def test_a_line_that_was_cut_off_is_no_epoch(tmp_path):
    run = filled(tmp_path / "run")
    run.metrics.write_text(run.metrics.read_text()[:-5])
    assert run.rows() == rows(2)


def test_rows_are_replaced_and_the_next_one_follows(tmp_path):
    run = filled(tmp_path / "run")
    run.rewrite(rows(2))
    assert run.rows() == rows(2)
    run.append(rows(3)[2])
    assert run.rows() == rows(3)


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for name, said in (
        ("file", r"expected a directory, got the file"),
        ("file/run", r"cannot write .*file/run"),
    ):
        with (
            pytest.raises(ConfigError, match=said),
            RunDirectory.create(tmp_path / name, Config()),
        ):
            pass


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
def test_no_epoch_is_added_to_what_is_no_file(tmp_path, kind):
    run = RunDirectory(tmp_path)
    make_special(run.metrics, kind)
    with pytest.raises(OSError, match=f"expected a regular file, got {kind}"):
        run.append({"epoch": 1})
    run.metrics.unlink()
    run.append({"epoch": 2})
    assert run.rows() == [{"epoch": 1}, {"epoch": 2}]


def test_epochs_that_are_given_up_are_kept_beside(tmp_path):
    run = RunDirectory(tmp_path)
    for row in rows(5):
        run.append(row)
    before = run.metrics.read_bytes()
    run.rewrite(rows(4))  # The last one had no checkpoint yet.
    assert [*tmp_path.iterdir()] == [run.metrics]
    for number in range(2):
        run.metrics.write_bytes(before)
        run.rewrite(rows(number))
        assert run.rows() == rows(number)
    names = ("metrics.jsonl.superseded", "metrics.jsonl.superseded.1")
    assert [(tmp_path / name).read_bytes() for name in names] == [before] * 2


def test_runs_that_nobody_named_have_directories_of_their_own(tmp_path):
    name = tmp_path / "runs" / "20261127-sam-seed0"
    found = [reserved(name).name for _ in range(3)]
    assert found == ["20261127-sam-seed0", "20261127-sam-seed0-2", "20261127-sam-seed0-3"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output: cannot write"):
        reserved(tmp_path / "file" / "x")


def test_a_picture_takes_the_place_of_a_link_and_what_that_led_to_stays(tmp_path):
    mine, picture = tmp_path / "mine", tmp_path / "curves.png"
    mine.write_text("precious")
    picture.symlink_to(mine)
    row = {"epoch": 1, "train_loss": 1, "train_accuracy": 1, "test_loss": 1}
    plots.curves([row | {"test_accuracy": 1}], picture, "")
    assert mine.read_text() == "precious"
    assert picture.read_bytes().startswith(b"\x89PNG")
