"""What the recipe does when its disk, memory, log or terminal fails it."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.faults.trial import RECIPE, again, finish, recipe, result, start
from recipes import plots
from recipes.cifar_wrn import main
from recipes.data.sources import load
from recipes.terminal.console import plain
from recipes.terminal.signals import Stopped
from recipes.train import loop
from recipes.train.directory import RunDirectory
from tests import ROOT, commands
from tests.recipes.data.test_sources import make_folder
from tests.recipes.test_recipe import SMALL, checkpoint, equal, rows, tensors, train


class FullAfter:
    """From a step on, the kernel refuses what is longer than `limit` bytes."""

    def __init__(self, step, limit, until=999):
        self.step, self.limit, self.until = step, limit, until

    def __call__(self):
        real, self.taken = loop.step, 0

        def step(*args):
            self.taken += 1
            if self.taken == self.step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, -1))
            if self.taken == self.until:
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            return real(*args)

        loop.step = step


def run(root, name, *flags, hook=None):
    log = root / f"{name}.log"
    args = [*RECIPE.split(), "--output", str(root / name), *flags]
    return finish(start(recipe, args, str(log), hook)), log.read_text()


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_whole(tmp_path):
    code, said = run(tmp_path, "run", hook=FullAfter(7, 10_000))
    assert code == 5
    said = " ".join(said.split())
    assert "cannot write" in said
    assert "File too large" in said
    assert "checkpoints before are whole" in said
    assert tensors(tmp_path / "run")["step"] == 6
    assert not list((tmp_path / "run").rglob(".samfn-*"))
    assert finish(start(recipe, again(tmp_path / "run"), str(tmp_path / "log"))) == 0
    assert run(tmp_path, "whole")[0] == 0  # The twin: a disk with space.
    assert result(tmp_path / "run") == result(tmp_path / "whole")


@pytest.mark.parametrize(("until", "code"), [(12, 0), (999, 5)])
def test_with_a_full_disk_training_goes_on_if_that_is_wanted(tmp_path, until, code):
    hook = FullAfter(7, 10_000, until)
    found, said = run(tmp_path, "run", "--on-write-error", "warn", hook=hook)
    assert found == code
    assert said.count("cannot write") >= 2
    assert ("done" in said) == (code == 0)
    assert tensors(tmp_path / "run")["step"] == (22 if code == 0 else 6)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    for path in (whole, run):
        assert train(path, "--save-steps", "5") == 0
    newest = checkpoint(run)
    damage(newest)
    assert main(["--resume", str(newest)]) == 2  # Who names it wants no other.
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged: its content is not that of the SHA-256 in it" in said
    assert newest.exists()
    assert main(["--resume", str(run)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("is damaged") == 1
    assert f"kept as {newest.name}.corrupt, going on with the one before" in said
    assert equal(tensors(run), tensors(whole))
    assert main(["--resume", str(run)]) == 0  # The twin: nothing is damaged any more.
    assert "damaged" not in capsys.readouterr().err


def test_a_damaged_only_checkpoint_makes_it_start_anew(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run) == 0
    before, metrics = tensors(run), RunDirectory(run).metrics.read_bytes()
    for path in RunDirectory(run).checkpoints().paths():
        damage(path)
    assert main(["--resume", str(run), "--eval-only"]) == 2
    assert main(["--resume", str(run)]) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert equal(tensors(run), before)
    assert (run / "metrics.jsonl.superseded").read_bytes() == metrics


def test_an_older_checkpoint_may_be_named(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--save-steps", "5") == 0
    older = RunDirectory(run).checkpoints().paths()[-2]
    before = tensors(run)
    assert main(["--resume", str(older)]) == 0
    assert "resuming after 1 epochs and 18 steps" in capsys.readouterr().out
    assert equal(tensors(run), before)
    assert len(list(run.rglob("*.superseded"))) == 1


LOSSES = """
import sys, torch
from recipes.train import loop
from recipes.cifar_wrn import main
torch.set_num_threads(1)
real = loop.step
def step(*args):
    state, metrics = real(*args)
    print("loss", float(metrics.loss).hex(), file=sys.stderr)
    return state, metrics
loop.step = step
sys.exit(main(sys.argv[1:]))
"""


def test_every_loss_of_200_steps_is_the_same_in_another_process(tmp_path):
    def losses(name, *flags):
        few = ["--validation", "0.75", "--batch-size", "16", "--dropout", "0.1"]
        given = [*SMALL, "--epochs", "10", *few, "--output", tmp_path / name, *flags]
        done = commands.run("-c", LOSSES, *given)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith("loss")]

    first = losses("a")
    assert len(first) == 220
    assert losses("b") == first
    assert losses("c", "--seed", "1", "--epochs", "1")[0] != first[0]


class LittleMemory:
    """From a step on, the process may have `more` bytes of address space beside its own."""

    def __init__(self, step, more):
        self.step, self.more = step, more

    def __call__(self):
        real, self.taken = loop.step, 0

        def step(*args):
            self.taken += 1
            if self.taken == self.step:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + self.more
                resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
            return real(*args)

        loop.step = step


@pytest.mark.parametrize(("more", "code"), [(2**20, 4), (2**22, 4), (2**36, 0)])
def test_too_little_memory_ends_the_run_with_advice(tmp_path, more, code):
    assert run(tmp_path, "run", "--epochs", "1")[0] == 0
    hook, log = LittleMemory(1, more), tmp_path / "log"
    args = [*again(tmp_path / "run"), "--epochs", "2", "--resume-override"]
    assert finish(start(recipe, args, str(log), hook)) == code
    said = " ".join(log.read_text().split())
    assert ("out of memory with --batch-size 128" in said) == (code == 4)
    assert "Traceback" not in said
    assert tensors(tmp_path / "run")["step"] == (11 if code else 22)


PATHS = ["with spaces", "ünïcödé-目录", "[red]markup[/]", "a" * 200, "new\nline", "-dash"]


@pytest.mark.parametrize("name", PATHS)
def test_strange_paths_are_paths(tmp_path, name, capsys):
    run = tmp_path / name / "run"
    assert train(run, "--epochs", "1") == 0
    before = tensors(run)
    assert main(["--resume", str(run), "--eval-only"]) == 0
    assert main(["--resume", str(run)]) == 0
    assert equal(tensors(run), before)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J[bold]é", r"\x1b[2J\[bold]é"),
        ("a\nb\tc\r", "a\nb\\tc\\r"),
        ("\u202egnp.exe\x07", r"\u202egnp.exe\x07"),
    ],
)
def test_a_terminal_shows_names_and_does_not_obey_them(text, shown):
    assert plain(text) == shown


@pytest.mark.parametrize("limit", [10, 200, 350])
def test_a_log_that_cannot_be_written_is_written_later(
    tmp_path, monkeypatch, capsys, limit
):
    real, calls = RunDirectory.append, []

    def append(self, row):
        calls.append(row)
        if len(calls) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            real(self, row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(RunDirectory, "append", append)
    try:
        assert train(tmp_path / "run", "--epochs", "3") == 0
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert "lacks epoch 1 for now" in " ".join(capsys.readouterr().err.split())
    monkeypatch.undo()
    assert train(tmp_path / "whole", "--epochs", "3") == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert equal(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_damaged_log_loses_its_damaged_lines_alone(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--epochs", "3") == 0
    log = run / "metrics.jsonl"
    first, second, third = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + second[:50] + b"\xff\n" + b'["x"]\n' + third)
    assert [row["epoch"] for row in rows(run)] == [1, 3]
    assert main(["--resume", str(run)]) == 0
    assert [row["epoch"] for row in rows(run)] == [1, 2, 3]  # Its checkpoint knows it.
    log.unlink()
    assert main(["--resume", str(run)]) == 0
    assert [row["epoch"] for row in rows(run)] == [2, 3]
    assert "lacks epochs 1" in " ".join(capsys.readouterr().err.split())


def test_a_log_line_that_was_cut_off_is_replaced(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append({"epoch": 1})
    with directory.metrics.open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert directory.rows() == [{"epoch": 1}]
    directory.append({"epoch": 2})
    assert directory.rows() == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("kind", ["pipe", "full"])
def test_a_log_or_terminal_that_is_gone_changes_nothing(tmp_path, kind):
    command = ["-m", "recipes.cifar_wrn", *SMALL, "--output", tmp_path / "run"]
    if kind == "pipe":
        reading, out = os.pipe()
        os.close(reading)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    with (tmp_path / "errors").open("w") as errors:
        process = commands.start(*command, stdout=out, stderr=errors.fileno())
        os.close(out)
        assert finish(process) == 0
    assert (tmp_path / "errors").read_text() == ""
    assert train(tmp_path / "whole") == 0
    assert equal(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


def test_what_changed_since_is_told_on_resuming(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert main(["--resume", str(run)]) == 0
    finally:
        torch.set_num_threads(threads)
    said = " ".join(capsys.readouterr().err.split())
    assert f"threads was {threads}, is now {threads + 1}: going on, but not bit" in said
    assert main(["--resume", str(run), "--epochs", "2", "--resume-override"]) == 0
    assert len(rows(run)) == 2
    kept = (run / "config.toml.1").read_text()
    assert "epochs = 1" in kept
    assert "epochs = 2" in (run / "config.toml").read_text()


def test_a_checkpoint_knows_the_settings_it_was_made_with(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--save-steps", "5") == 0
    older, config = RunDirectory(run).checkpoints().paths()[0], run / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.2", "lr = 0.3"))
    for path in (run, older):
        assert main(["--resume", str(path)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "lr was 0.2, is now 0.3; --resume-override" in said
    assert not list(run.rglob("*.superseded"))
    assert main(["--resume", str(run), "--resume-override"]) == 0


def test_a_checkpoint_that_is_named_is_the_one_that_is_evaluated(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--epochs", "3") == 0
    for path in RunDirectory(run).checkpoints().paths():
        number = int(path.stem[5:]) // 22
        assert main(["--resume", str(path), "--eval-only"]) == 0
        accuracy = rows(run)[number - 1]["test_accuracy"]
        said = f"{path.name}, after epoch {number}: test accuracy {accuracy:.2f} %"
        assert said in " ".join(capsys.readouterr().out.split())


def test_a_damaged_best_checkpoint_gives_way_to_the_next(tmp_path, monkeypatch, capsys):
    accuracies = iter([50.0, 70.0, 60.0, 40.0])
    monkeypatch.setattr(loop, "evaluate", lambda *args: (1.0, next(accuracies)))
    run = tmp_path / "run"
    assert train(run, "--epochs", "4") == 0
    assert tensors(run, "best")["step"] == 2 * 22
    damage(checkpoint(run, "best"))
    assert main(["--resume", str(run)]) == 0
    assert "step_000000044.safetensors is damaged" in capsys.readouterr().err
    assert tensors(run, "best")["step"] == 3 * 22


class FullAndStopped(FullAfter):
    """A full disk, and one step later a signal."""

    def __call__(self):
        super().__call__()
        real = loop.step

        def step(*args):
            if self.taken == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        loop.step = step


@pytest.mark.parametrize(("limit", "code"), [(10_000, 5), (2**30, 143)])
def test_a_stop_that_could_not_save_does_not_pass_for_one_that_did(tmp_path, limit, code):
    hook = FullAndStopped(7, limit)
    found, said = run(tmp_path, "run", "--on-write-error", "warn", hook=hook)
    assert found == code
    assert ("goes on where this ended" in said) == (code == 143)


def test_a_run_exports_its_best_model(tmp_path):
    from safetensors.torch import load_file

    run = tmp_path / "run"
    assert train(run, "--export") == 0
    weights, best = load_file(run / "model.safetensors"), tensors(run, "best")
    assert all(
        torch.equal(w, best.get(f"params/{name}", best.get(f"buffers/{name}")))
        for name, w in weights.items()
    )
    program = torch.export.load(run / "model.pt2").module()
    assert program(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_a_program_of_weights_before_does_not_stay_beside_others(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--export") == 0
    before = (run / "model.pt2").read_bytes()
    assert main(["--resume", str(run), "--epochs", "4", "--resume-override"]) == 0
    assert not (run / "model.pt2").exists()
    assert (run / "model.pt2.superseded").read_bytes() == before
    assert "model.pt2 of before is model.pt2.superseded now" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys, monkeypatch):
    real = loop.step

    def step(task, state, position, batch, place):
        state, metrics = real(task, state, position, batch, place)
        if position == 30:
            name = next(iter(state.params))
            state.params[name].view(-1)[0] = float("inf")
        return state, metrics

    monkeypatch.setattr(loop, "step", step)
    assert train(tmp_path / "run", "--save-steps", "31") == 3
    assert "is not finite after 31 steps" in " ".join(capsys.readouterr().err.split())
    assert tensors(tmp_path / "run")["step"] == 22


def test_a_step_that_is_not_finite_is_named_with_its_pass_and_tensor(
    tmp_path, capsys, monkeypatch
):
    real = loop.augmented

    def augmented(task, epoch, start=0, among=None):
        found = real(task, epoch, start, among)
        for index, (images, labels) in enumerate(found, start):
            spoilt = epoch == 1 and index >= 8
            yield (images * float("nan") if spoilt else images, labels)

    monkeypatch.setattr(loop, "augmented", augmented)
    assert train(tmp_path / "run", "--max-skipped", "7") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "step 38, pass 1: the loss is nan: the last 8 of 38 steps" in said
    assert tensors(tmp_path / "run")["step"] == 22
    assert all(t.isfinite().all() for t in tensors(tmp_path / "run").values())


@pytest.mark.parametrize(("allowed", "code"), [("2", 3), ("3", 0)])
def test_bad_steps_in_a_row_count_wherever_they_are(
    tmp_path, capsys, monkeypatch, allowed, code
):
    real = loop.augmented

    def augmented(task, epoch, start=0, among=None):
        found = real(task, epoch, start, among)
        for index, (images, labels) in enumerate(found, start):
            spoilt = epoch == 1 and 3 <= index < 6
            yield (images * float("nan") if spoilt else images, labels)

    monkeypatch.setattr(loop, "augmented", augmented)
    assert train(tmp_path / "run", "--max-skipped", allowed) == code
    said = " ".join(capsys.readouterr().err.split())
    assert ("the last 3 of 38 steps" in said) == (code == 3)


def test_closed_streams_are_no_place_for_checkpoints(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "recipes.cifar_wrn", *SMALL, "--output", str(run)]
    shell = f"{' '.join(command)} <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT, check=False).returncode == 0
    assert (run / ".samfn.lock").read_text().strip().isdigit()
    assert train(tmp_path / "whole") == 0
    assert equal(tensors(run), tensors(tmp_path / "whole"))


def test_a_hundred_random_configs_and_rows_run_no_code(tmp_path):
    """Whatever stands in files that are read, nothing of it is run."""
    seen = []
    active = [True]

    def hook(event, args):
        if active[0] and event in ("pickle.find_class", "os.system", "subprocess.Popen"):
            seen.append((event, args))

    sys.addaudithook(hook)
    chance, run = random.Random(0), tmp_path / "run"
    try:
        assert train(run, "--epochs", "1") == 0
        assert main(["--resume", str(run)]) == 0
        assert main(["--resume", str(run), "--eval-only"]) == 0
        images = make_folder(tmp_path / "images")
        assert len(load("folder", images).classes) == len(load("folder", images).classes)
        config = (run / "config.toml").read_bytes()
        for _ in range(100):
            content = bytearray(config)
            for _ in range(chance.randrange(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            (run / "config.toml").write_bytes(content)
            assert main(["--resume", str(run), "--eval-only"]) in (0, 2)
        row = {"epoch": 1, "__reduce__": ["os.system", "x"]}
        (run / "metrics.jsonl").write_text(json.dumps(row))
        assert RunDirectory(run).rows() == [row]
    finally:
        active[0] = False
    assert not seen


class FailsInC:
    """C code drew a picture, was interrupted if so asked, and raised what it liked."""

    def __init__(self, interrupted):
        self.interrupted = interrupted

    def __call__(self):
        def curves(*args):
            with contextlib.suppress(Stopped):
                if self.interrupted:
                    os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("Invalid bounding box")  # As matplotlib did in a soak.

        plots.curves = curves


@pytest.mark.parametrize(("interrupted", "code"), [(True, 143), (False, 1)])
def test_a_signal_that_c_code_makes_an_error_of_is_a_signal(tmp_path, interrupted, code):
    found, said = run(tmp_path, "run", hook=FailsInC(interrupted))
    assert found == code
    assert ("SIGTERM ended this" in said) == interrupted
    assert ("Traceback" in said) == (not interrupted)
    assert tensors(tmp_path / "run")["step"] == 22
