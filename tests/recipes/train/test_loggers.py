"""Loggers, each with its real package, and read back by the package's own reader."""

import contextlib
import functools
import json
import math
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from recipes.cifar_wrn import main
from recipes.errors import ConfigError
from recipes.settings.config import Config
from recipes.settings.resolve import configure
from recipes.terminal.signals import Stopped
from recipes.train import loggers
from recipes.train.directory import RunDirectory
from recipes.train.loggers import Loggers
from tests import ROOT
from tests.recipes.test_recipe import equal, stop_after, tensors, train

SETTINGS = {"lr": 0.1, "flip": True, "clip_norm": None, "data_dir": "<b>[red]x</b>"}
NAMES = [*loggers.MAKERS]


def row(epoch, loss=1.0):
    """Return an epoch with labels and values as awkward as they come."""
    return {
        "epoch": epoch,
        "step": 22 * epoch,
        "train_loss": loss / epoch,
        "accuracy/<b>[bold]cat</b> ü.": 50.0,
        "diverged": math.nan,
        "label": "[red]cat",
        "flag": True,
    }


def numbers(rows):
    """Return what loggers are to show: by step, the columns that are numbers."""
    dropped = {"step", "label", "flag"}
    return {
        row["step"]: pytest.approx(
            {k: v for k, v in row.items() if k not in dropped}, rel=1e-6, nan_ok=True
        )
        for row in rows
    }


# A process that logs and, if it kept no epochs, is killed; it writes down whom it calls.
WRITE = """
import os, signal, time
path, seen, names, settings, kept, rows = args
handle = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
calls = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostby")

def hook(event, args):
    if event.startswith(calls):
        os.write(handle, f"{event} {args}\\n".encode())

sys.addaudithook(hook)
from pathlib import Path
from recipes.train.loggers import Loggers
Loggers(["wandb"], Path(seen).parent, settings, [], sys.exit)  # never ended
several = Loggers(names, Path(path), settings, kept, sys.exit)
print("epochs", flush=True)
for row in rows:
    several.log(row)
if not kept:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
several.close()
"""


def call(code, *values, **environment):
    """Run Python in a new process, which finds `values` as `args`; return what it did."""
    code = f"import json, sys; args = json.loads(sys.argv[1])\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(values)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run that was killed after three epochs, and went on after the second.

    Its user has set all that could make a logger call a server, and this is the server.
    """
    root = tmp_path_factory.mktemp("loggers")
    path, seen, home = root / "[bold]run", root / "seen", root / "home"
    path.mkdir()
    home.mkdir()
    done, ids = [], []
    with serving(seen) as address:
        environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_TOKEN": "hf_x"}
        environment |= {"WANDB_MODE": "online", "WANDB_BASE_URL": address}
        environment |= {"WANDB_API_KEY": "0" * 40, "TRACKIO_WRITE_TOKEN": "x"}
        environment |= {"TRACKIO_SERVER_URL": address, "HF_ENDPOINT": address}
        for name in ("http_proxy", "https_proxy"):
            environment |= {name: address, name.upper(): address}
        for kept, rows in (
            ([], [row(1), row(2), row(3)]),
            ([row(1), row(2)], [row(3, 5.0), row(4)]),
        ):
            args = str(path), str(seen), NAMES, SETTINGS, kept, rows
            done.append(call(WRITE, *args, **environment))
            ids += [file.stem for file in path.glob("wandb/offline-run-*/*.wandb")]
            for name in () if kept else NAMES:
                (path / name / "notes.txt").write_text("mine")
    calls = seen.read_text().splitlines()
    return SimpleNamespace(path=path, home=home, calls=calls, done=done, ids=ids)


@contextlib.contextmanager
def serving(seen):
    """Be a server that hangs up, and writes down that it was called."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with seen.open("a") as file:
                file.write("the server was called\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def read_tensorboard(path):
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in found.setdefault(event.step, {})
            found[event.step][tag] = event.value
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = HParamsPluginData.FromString(content).session_start_info
    kinds = {name: value.WhichOneof("kind") for name, value in session.hparams.items()}
    return found, {k: getattr(session.hparams[k], kind) for k, kind in kinds.items()}


@functools.cache
def records(path):
    """Return what W&B wrote."""
    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    output = subprocess.run(inspect, capture_output=True, check=True).stdout
    return [*map(json.loads, output.splitlines())]


def read_wandb(path):
    found, settings = {}, {}
    for record in records(path):
        if record["type"] == "run":
            settings = record["run"]["config"]["update"]
        if record["type"] == "history":
            step = record["history"]["step"]["num"]
            assert step not in found
            items = record["history"]["item"].items()
            found[step] = {k: float(v) for k, v in items if not k.startswith("_")}
    return found, {k: v for k, v in settings.items() if not k.startswith("_")}


TRACKIO = """
import trackio
(run,) = trackio.Api().runs("samfn")
logs = trackio.SQLiteStorage.get_logs("samfn", run.name, run_id=run.id)
assert not trackio.SQLiteStorage.get_system_logs("samfn", run.name, run_id=run.id)
print(json.dumps([run.name, run.config, logs]))
"""


def read_trackio(path):
    output = call(TRACKIO, TRACKIO_DIR=str(path / "trackio"), HF_HUB_OFFLINE="1").stdout
    name, settings, logs = json.loads(output)
    assert name == path.name
    found = {}
    for log in logs:
        del log["timestamp"]
        assert log["step"] not in found
        found[log.pop("step")] = log
    return found, {k: v for k, v in settings.items() if not k.startswith("_")}


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_killed_and_goes_on_is_logged_once(written, name):
    found, _ = READ[name](written.path)
    assert found == numbers([row(1), row(2), row(3, 5.0), row(4)])


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_logged(written, name):
    _, settings = READ[name](written.path)
    texts = {"lr": 0.1, "flip": "True", "data_dir": "<b>[red]x</b>"}
    assert settings == (texts if name == "tensorboard" else SETTINGS)


def test_a_run_stays_the_same_for_wandb(written):
    before, now = written.ids
    assert before == now


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_put_beside_a_log_stays(written, name):
    assert (written.path / name / "notes.txt").read_text() == "mine"


def test_wandb_is_told_nothing_of_the_machine_or_the_code(written):
    kinds = {record["type"] for record in records(written.path)}
    assert kinds == {"header", "run", "telemetry", "summary", "history", "exit"}


def test_a_row_can_be_read_in_tensorboard_at_once(tmp_path):
    logger = loggers.TensorBoard(tmp_path, {})
    logger.log(row(1))
    assert read_tensorboard(tmp_path)[0] == numbers([row(1)])
    logger.close()


def test_nobody_is_called(written):
    # All but the socket between the two processes of wandb, which is a file.
    assert written.calls
    for call in written.calls:
        assert re.fullmatch(r"socket.connect .*, '/.*/wandb-[\d-]+/socket'\)", call)


def test_nothing_is_written_elsewhere_nor_shown(written):
    assert {path.name for path in written.path.iterdir()} == set(NAMES)
    assert not list(written.home.iterdir())
    killed, ended = written.done
    assert (killed.returncode, ended.returncode) == (-signal.SIGKILL, 0)
    assert {(done.stdout, done.stderr) for done in written.done} == {("epochs\n", "")}


class Recorder:
    """A logger that raises where it is told to."""

    def __init__(self, failing=None, error=None):
        self.failing, self.error = failing, error or OSError("no [bold]space[/]\nleft")
        self.rows, self.closed = [], False
        self.reach("start")

    def reach(self, place):
        if place == self.failing:
            raise self.error

    def log(self, row):
        self.reach("log")
        self.rows.append(row)

    def close(self):
        self.reach("close")
        self.closed = True


@pytest.fixture
def recorders(monkeypatch):
    """Make recorders of all loggers; the second fails where, and with what, it is told."""

    def make(*failing):
        made = {}

        def maker(name, *args):
            return lambda path, settings: made.setdefault(name, Recorder(*args))

        first, second, third = NAMES
        makers = {first: maker(first), second: maker(second, *failing)}
        monkeypatch.setattr(loggers, "MAKERS", makers | {third: maker(third)})
        return made

    return make


@pytest.mark.parametrize("place", ["start", "log", "close"])
@pytest.mark.parametrize("kept", [[], [row(1)]])
def test_a_logger_that_fails_is_named_once_and_dropped(recorders, tmp_path, place, kept):
    made, warnings = recorders(place), []
    several = Loggers([*NAMES, NAMES[0]], tmp_path, SETTINGS, kept, warnings.append)
    several.log(row(2))
    several.log(row(3))
    several.close()
    first, failing, third = (made.get(name) for name in NAMES)
    for recorder in (first, third):
        assert recorder.rows == [*kept, row(2), row(3)]
        assert recorder.closed
    reason = "OSError: no [bold]space[/] left"
    assert warnings == [f"--log wandb failed, and the run goes on without it: {reason}"]
    assert failing is None or not failing.closed


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_directory_of_the_run_is_written_to_by_no_logger(tmp_path, name):
    run, other, said = tmp_path / "run", tmp_path / "other", []
    run.mkdir()
    other.mkdir()
    (other / "mine").write_text("mine")
    (run / name).symlink_to(other)
    Loggers([name], run, SETTINGS, [row(1)], said.append).close()
    assert [path.name for path in other.iterdir()] == ["mine"]
    assert "got a link:" in said.pop()
    (run / name).unlink()
    os.mkfifo(run / name)  # Some packages would wait for whoever writes into it.
    Loggers([name], run, SETTINGS, [row(1)], said.append).close()
    assert "got something else:" in said.pop()


@pytest.mark.parametrize("place", ["start", "log", "close"])
def test_a_signal_is_no_failure_of_a_logger(recorders, tmp_path, place):
    recorders(place, Stopped(signal.SIGTERM))

    def run():
        Loggers(NAMES, tmp_path, SETTINGS, [row(1)], pytest.fail).close()

    with pytest.raises(Stopped):
        run()


def test_training_is_the_same_with_a_logger_that_fails(recorders, tmp_path, capsys):
    made = recorders("log")
    assert train(tmp_path / "plain", "--epochs", "1") == 0
    assert train(tmp_path / "logged", "--epochs", "1", "--log", *NAMES) == 0
    assert equal(tensors(tmp_path / "plain"), tensors(tmp_path / "logged"))
    assert made[NAMES[0]].rows == RunDirectory(tmp_path / "logged").rows()
    assert made[NAMES[0]].closed
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning --log wandb failed")
    assert said.endswith("no [bold]space[/] left")


def test_a_logger_that_is_chosen_on_resuming_has_all_epochs(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert stop_after(30, run, monkeypatch) == 130
    assert main(["--resume", str(run), "--log", "tensorboard"]) == 0
    found, settings = read_tensorboard(run)
    rows = RunDirectory(run).rows()
    assert [row["step"] for row in rows] == [22, 44] == [*found]
    assert found == numbers(rows)
    assert settings["model"] == "wrn-10-1"
    assert {*loggers.SHOWN} <= rows[0].keys()


def test_a_damaged_row_is_passed_over(recorders, tmp_path):
    made = recorders()
    with RunDirectory.create(tmp_path / "run", Config()) as run:
        for damaged in ({"epoch": 1}, {"epoch": 1, "step": "x"}, row(2)):
            run.append(damaged)
        with loggers.logged(run, Config().replace(log=("wandb",)), pytest.fail):
            run.log(row(3))
    assert [row["step"] for row in made["wandb"].rows] == [44, 66]


def test_a_package_that_is_missing_is_named_before_anything_is_done(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path / "run", "--log", "tensorboard", "wandb") == 2
    said = 'error --log: wandb is not installed: pip install -e ".[wandb]"\n'
    assert capsys.readouterr().err == said
    assert not (tmp_path / "run").exists()


def test_evaluating_needs_no_logger(tmp_path, monkeypatch):
    config = Config().replace(data="digits", precision="float32", log=("wandb",))
    with RunDirectory.create(tmp_path / "run", config):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    flags = ["--resume", str(tmp_path / "run")]
    assert configure([*flags, "--eval-only"]).call.eval_only
    assert configure([*flags, "--eval-only", "--log", "trackio"]).call.eval_only
    assert configure(flags).recording.log == (
        "wandb",
    )  # What the run has is left out, and told.
    with pytest.raises(ConfigError, match="trackio is not installed"):
        configure([*flags, "--log", "wandb", "trackio"])


def test_trackio_refuses_a_second_directory_in_one_process(tmp_path, monkeypatch):
    other, said = SimpleNamespace(TRACKIO_DIR=tmp_path / "other"), []
    monkeypatch.setitem(sys.modules, "trackio", other)
    with mock.patch.dict(os.environ):
        Loggers(["trackio"], tmp_path / "run", {}, [], said.append)
    assert re.search(rf"this process writes to {tmp_path}/other already$", said[0])
