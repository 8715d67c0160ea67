"""How commands end where nobody reads what they say."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samfn
from recipes import compare, landscape, sharpness
from recipes.terminal import cli
from recipes.terminal.signals import Stopped, watched
from tests import ROOT, commands

RECIPES = ["cifar_wrn", "finetune", "finetune_text", "sweep", "label_noise", "arms"]
RECIPES += ["compare", "sharpness", "landscape"]
BENCH = ["checkpoints", "cost", "cost_model", "faults", "scaling", "zoo"]
COMMANDS = [*(f"recipes.{name}" for name in RECIPES), *(f"bench.{name}" for name in BENCH)]


def ended(*arguments, out=None, err=None):
    """Return exit code and standard error; nobody reads a stream that is "pipe"."""
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    streams = {"pipe": writing, "full": full}
    seen, told = os.pipe()
    process = commands.start(
        *arguments, stdout=streams.get(out), stderr=streams.get(err, told)
    )
    for handle in (writing, full, told):
        os.close(handle)
    with os.fdopen(seen) as file:
        text = file.read()
    process.join()
    return process.exitcode, text


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (samfn.CheckpointWriteError("full"), 5, "full; checkpoints before are whole"),
        (RuntimeError("can't start new thread"), 4, "ulimit -u"),
    ],
)
def test_an_end_says_what_is_left_or_lacks(error, code, said, capsys):
    def body(display, signals):
        raise error

    assert cli.run(body) == code
    assert said in capsys.readouterr().err


def test_where_the_directory_is_gone_no_checkpoint_is_called_whole(tmp_path, capsys):
    def body(display, signals):
        checkpoints = samfn.Checkpoints(tmp_path / "run")
        checkpoints.save(state)
        shutil.rmtree(tmp_path / "run")
        checkpoints.save(state)

    state = samfn.init({"w": torch.ones(2)}, {}, optimizer=samfn.sgd())
    assert cli.run(body) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("was it deleted, or moved?")
    assert "are whole" not in said


def test_a_held_directory_that_is_gone_is_not_made_anew(tmp_path, capsys):
    def body(display, signals):
        with samfn.held(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            samfn.Checkpoints(tmp_path / "run" / "checkpoints").save(state)

    state = samfn.init({"w": torch.ones(2)}, {}, optimizer=samfn.sgd())
    assert cli.run(body) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("was it deleted, or moved?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_that_nobody_reads_to_its_end_ends_quietly(command):
    assert ended("-m", command, "--help", out="pipe") == (0, "")


@pytest.mark.parametrize("name", RECIPES)
def test_help_that_cannot_be_written_is_told(name):
    code, said = ended("-m", f"recipes.{name}", "--help", out="full")
    assert code == 2
    assert "No space left on device" in said
    assert len(said.splitlines()) == 1


def test_an_error_is_one_line_whatever_the_name_of_a_file(tmp_path):
    name = tmp_path / "run\nerror none\x1b[2J"
    code, said = ended("-m", "recipes.cifar_wrn", "--resume", name)
    assert code == 2
    assert said.count("\n") == 1
    assert r"run\nerror none\x1b[2J" in said


@pytest.mark.parametrize("flags", [["--nonsense"], ["--rho", "x"], ["--resume", "nowhere"]])
def test_what_is_wrong_is_wrong_though_nobody_reads_it(flags):
    assert ended("-m", "recipes.cifar_wrn", *flags, err="pipe")[0] == 2
    assert ended("-m", "recipes.cifar_wrn", *flags, out="pipe", err="pipe")[0] == 2


@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["--nonsense"], 2)])
def test_closed_streams_are_no_error(flags, code):
    command = [sys.executable, "-m", "recipes.cifar_wrn", *flags]
    shell = f"{shlex.join(command)} <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT, check=False).returncode == code


def test_a_closed_terminal_ends_a_command_unless_nohup_says_no():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run by nohup.
    try:
        with pytest.raises(Stopped, match="SIGHUP"), watched():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with watched() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_about_to_end_is_ended_at_once_by_ctrl_c_alone():
    with watched() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(
            os.getpid(), signal.SIGTERM
        )  # As torchrun does, if another rank was faster.
        with pytest.raises(Stopped, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
        # What was raised may have been swallowed.
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("command", [compare, sharpness, landscape])
def test_a_command_that_looks_at_runs_speaks_of_no_checkpoint(command, capsys, monkeypatch):
    monkeypatch.setattr(command, "among", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert command.main(["run"]) == 143
    said = capsys.readouterr().err
    assert "SIGTERM ended this; " in said
    assert "checkpoint" not in said


def heeding_interrupts():
    """Let a process heed SIGINT, which who starts pytest may have it ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("module", ["recipes.compare", "recipes.cifar_wrn"])
def test_an_interrupt_while_modules_are_imported_ends_without_a_traceback(module):
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        preexec_fn=heeding_interrupts,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # The import of torch has begun.
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", None)
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("first", ["import recipes", "import bench.measure"])
def test_recipes_that_are_imported_leave_interrupts_as_they_are(first):
    code = f"import signal; {first}; print(signal.getsignal(signal.SIGINT).__name__)"
    told = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, text=True, preexec_fn=heeding_interrupts
    )
    assert told == "default_int_handler\n"
