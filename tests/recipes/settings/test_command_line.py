import sys

import pytest
import tyro

from recipes.settings import command_line
from recipes.settings.command_line import parse
from recipes.settings.resolve import resolve
from recipes.settings.saved import to_toml

events = []
"""What the interpreter did while it was watched: names of events and their arguments."""
watched = False


def audit(event, args):
    if watched and event.startswith(("socket.", "open", "os.listdir", "os.scandir")):
        events.append((event, str(args[0])))


sys.addaudithook(audit)


@pytest.fixture
def watch(monkeypatch):
    """Let what opens files and connections be recorded."""
    monkeypatch.setattr(sys.modules[__name__], "watched", True)
    events.clear()


@pytest.fixture
def images(tmp_path):
    """Return class folders that hold what is no image."""
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize(
    "flags", ["", "--data cifar10", "--preset finetune", "--data folder", "--device cuda:7"]
)
def test_parsing_reads_no_data_and_opens_no_connection(images, flags, watch):
    asked = parse([*flags.split(), "--data-dir", str(images), "--rho", "0.3"])
    assert asked.values["data_dir"] == images
    assert asked.values["rho"] == 0.3
    touched = [e for e in events if e[0].startswith("socket.") or str(images) in e[1]]
    assert touched == []
    parse(flags.split())  # in the user's cache, or else on the network
    parse([*flags.split(), "--data-dir", "/no/such/directory"])
    assert not [e for e in events if e[0].startswith("socket.")]


def test_settling_where_images_come_from_reads_none(images, watch):
    config = resolve(parse(["--data-dir", str(images), "--device", "cpu"]))
    assert (config.data, config.preset) == ("folder", "small-wrn")
    assert not [e for e in events if str(images) in e[1]]


def test_a_lone_dash_dash_ends_the_flags():
    assert parse(["--rho", "0.3", "--"]).values == {"rho": 0.3}
    with pytest.raises(SystemExit, match="2"):
        parse(["--", "--rho", "0.3"])


def test_the_command_line_is_read_once(tmp_path, monkeypatch):
    calls, cli = [], tyro.cli
    monkeypatch.setattr(
        tyro, "cli", lambda *args, **how: calls.append(1) or cli(*args, **how)
    )
    file = tmp_path / "c.toml"
    file.write_text('preset = "small"\nepochs = 7\n')
    config = resolve(parse(["--config", str(file), "--data", "digits", "--lr", "0.1"]))
    assert (config.preset, config.epochs, config.model) == ("small", 7, "airbench94")
    assert len(calls) == 1
    (tmp_path / "config.toml").write_text(to_toml(config))
    resolve(parse(["--resume", str(tmp_path)]))
    assert len(calls) == 2


def test_a_flag_that_repeats_a_default_is_given_all_the_same(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("lr = 0.5\nflip = false\nbetas = [0.5, 0.5]\n")
    flags = ["--lr=0.1", "--flip", "--betas", "0.9", "0.999", "--data_dir", "a-b"]
    asked = parse(["--config", str(file), *flags])
    config = command_line.Config.of(asked.values)
    assert (config.lr, config.augmentation.flip) == (0.1, True)
    assert config.descent.betas == (0.9, 0.999)
    assert [*asked.values] == ["lr", "flip", "betas", "config", "data_dir"]


def test_help_shows_a_panel_for_each_group_after_one_of_the_most_used(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    lines = [line.strip("╭─╮ ") for line in shown.splitlines()]
    titles = [line for line in lines if line.endswith(" options") or line == "options"]
    groups = [
        "data, augmentation, network, perturbation, loss and optimizer, learning rate",
        "averaging, selection, stopping, arithmetic, multi-device, recording, resuming",
    ]
    names = ["options", *(f"{name} options" for name in ", ".join(groups).split(", "))]
    assert titles == names
    first, used = shown.partition(titles[1])[0], "data model method rho epochs lr seed"
    assert all(f"--{flag} " in first for flag in used.split())
    assert "--momentum" not in first
