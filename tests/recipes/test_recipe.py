"""The recipe end to end, on real images."""

import itertools
import json
import os
import pty
import re
import signal
import time
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import samfn
from recipes.cifar_wrn import main
from recipes.data.sources import hold_out, load
from recipes.settings.config import Config
from recipes.settings.resolve import configure
from recipes.settings.saved import read_toml
from recipes.train import loop, running
from recipes.train.build import assemble, generator
from recipes.train.directory import RunDirectory
from tests import commands
from tests.recipes.data.test_sources import make_folder
from tests.special import make_special

SMALL = ["--data", "digits", "--model", "wrn-10-1", "--epochs", "2", "--compile", "no"]


def rows(path):
    return RunDirectory(path).rows()


def without_times(path):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows(path)]


def train(path, *flags):
    return main([*SMALL, "--output", str(path), *flags])


def tensors(path, name="last"):
    return load_file(checkpoint(path, name), backend="pread")  # files change here


def checkpoint(path, name="last"):
    checkpoints = RunDirectory(path).checkpoints()
    return checkpoints.paths()[-1] if name == "last" else checkpoints.best()[0]


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_leaves_settings_metrics_picture_and_checkpoints(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--rho", "0.05") == 0
    assert {p.name for p in run.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
        "model.safetensors",
        ".samfn.lock",
    }
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    first, last = rows(run)
    assert (first["epoch"], last["epoch"], last["step"]) == (1, 2, 44)
    assert last["perturbation_norm"] == pytest.approx(0.05, rel=1e-4)
    assert last["train_loss"] < first["train_loss"]
    assert last["test_accuracy"] > 60
    assert last["sharpness"] > 0
    assert last["skipped_steps"] == 0
    out = capsys.readouterr().out
    assert "digits, 1,437 training and 360 test images, 8x8" in out
    assert "sam, rho 0.05" in out
    for row in (first, last):
        assert re.search(rf" {row['epoch']}/2 .*{row['test_accuracy']:.2f}", out)
    assert f"--eval-only --resume {run}" in out.replace("\n", "")
    assert "\x1b" not in out


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    flags = ["--batch-size", "128", "--lr", "0.01"]
    assert train(tmp_path / "eager", *flags, "--compile", "auto") == 0
    assert train(tmp_path / "compiled", *flags, "--compile", "yes") == 0
    out = capsys.readouterr().out
    assert re.search(r"compiled +no: 22 steps on a CPU would not pay", out)
    assert re.search(r"compiled +yes", out)
    assert re.search(r"compiling the training step took \d+\.\d s", out)
    assert read_toml(tmp_path / "compiled" / "config.toml")["compile"] == "yes"
    for one, other in zip(
        rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True
    ):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.01)
    parts = tmp_path / "parts"
    assert stop_after(5, parts, monkeypatch, *flags, "--compile", "yes") == 130
    assert main(["--resume", str(parts)]) == 0
    assert equal(tensors(tmp_path / "compiled"), tensors(parts))


def test_the_checkpoint_of_the_best_epoch_evaluates_to_what_was_recorded(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run) == 0
    capsys.readouterr()
    assert main(["--eval-only", "--resume", str(run)]) == 0
    best = max(rows(run), key=lambda row: row["test_accuracy"])
    said = f"best epoch {best['epoch']}: test accuracy {best['test_accuracy']:.2f} %"
    assert said in capsys.readouterr().out


def test_no_command_is_suggested_that_would_be_refused(tmp_path, capsys):
    flags, run = ["--epochs", "1", "--batch-size", "256"], tmp_path / "run"
    assert train(run, *flags, "--select", "sharpness") == 0
    out = capsys.readouterr().out
    assert "--eval-only" in out
    assert "--rho" not in out
    assert main(["--config", str(run / "config.toml"), "--rho", "0"]) == 2
    again = [*flags, "--select", "all", "--resume-override"]
    assert main(["--resume", str(run), *again]) == 0
    assert f"--config {run / 'config.toml'} --rho 0" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train(tmp_path / name, "--seed", seed, "--epochs", "1", "--dropout", "0.1")
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert equal(a, b)
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    assert not equal(a, c)


VARIANTS = {
    "average": ["--ema-decay", "0.9", "--ema-start", "0.3", "--ema-copy", "1"],
    "sam": ["--dropout", "0.2"],
    "sgd": ["--rho", "0", "--nesterov", "--no-decay-norm"],
    "asam": ["--method", "asam", "--rho", "0.5"],
    "mixed": [
        *("--policy", "trivialaugment", "--mixup-alpha", "0.2", "--cutmix-alpha", "1"),
        *("--method", "gsam", "--rho-schedule", "proportional"),
    ],
    "easy images skipped": [
        *("--select", "easy-skipped", "--select-every", "1", "--easy-scans", "1"),
        *("--easy-confidence", "0.1", "--lr", "0.02"),
    ],
    "drawn by the sharpness the average sees": [
        *("--select", "sharpness", "--select-every", "1", "--monitor"),
        *("--ema-decay", "0.9", "--select-with", "average"),
    ],
    "all": ["--same-dropout", "--dropout", "0.2", "--clip-norm", "1", "--decay-in-loss"],
}


def stop_after(steps, run, monkeypatch, *flags, start=train):
    """Start a run that is stopped, by the signal, after so many steps."""
    taken, real = [], loop.step

    def step(*args):
        taken.append(None)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", step)
        return start(run, *flags)


# Some CPUs take long over bf16, so it stops once.
STOPS = [*itertools.product(VARIANTS, (1, 3, 5, 7)), ("bf16", 3)]
VARIANTS["bf16"] = ["--precision", "bf16"]


def flags_of(variant):
    flags = [*VARIANTS[variant], "--schedule", "step", "--cutout", "3"]
    return [*flags, "--validation", "0.75"]  # of the digits, so that an epoch has few steps


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory):
    """Return what trains a variant in one go, once for all places where others stop."""
    directory = tmp_path_factory.mktemp("whole")

    @cache
    def trained(variant):
        assert train(directory / variant, *flags_of(variant)) == 0
        return directory / variant

    return trained


@pytest.mark.parametrize(("variant", "steps"), STOPS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path, monkeypatch, whole_of, variant, steps
):
    flags, whole, parts = flags_of(variant), whole_of(variant), tmp_path / "parts"
    assert stop_after(steps, parts, monkeypatch, *flags) == 130
    saved, metadata = samfn.restore(checkpoint(parts), like=fresh(parts))
    assert saved.step == steps
    where = metadata["progress"]
    assert where["epoch"] * 5 + where["batch"] == steps
    assert main(["--resume", str(parts)]) == 0
    assert equal(tensors(whole), tensors(parts))
    assert equal(tensors(whole, "best"), tensors(parts, "best"))
    assert without_times(whole) == without_times(parts)


def fresh(run):
    config = configure(["--resume", str(run)])
    return assemble(config, load("digits"))[1]


def test_resuming_with_other_settings_is_refused_and_changes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    train(run)
    before = tensors(run)
    assert main(["--resume", str(run), "--lr", "0.3", "--rho", "1"]) == 2
    assert "lr was 0.2, is now 0.3; rho was 0.05, is now 1.0" in capsys.readouterr().err
    assert equal(before, tensors(run))


def test_resuming_on_other_data_is_refused(tmp_path, capsys):
    images, run = make_folder(tmp_path / "images", sizes=((8, 8),)), tmp_path / "run"
    flags = ["--data-dir", str(images), "--model", "wrn-10-1", "--batch-size", "3"]
    assert main([*flags, "--epochs", "1", "--output", str(run)]) == 0
    (images / "test" / "dog" / "0.png").write_bytes(
        (images / "test" / "cat" / "0.png").read_bytes()
    )
    assert main(["--resume", str(run)]) == 2
    assert "was trained on other images or labels" in capsys.readouterr().err


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path):
    run = tmp_path / "run"
    train(run)
    before = tensors(run), rows(run)
    assert main(["--resume", str(run)]) == 0
    assert equal(before[0], tensors(run))
    assert rows(run) == before[1]


def test_a_run_without_perturbation_is_called_by_its_optimizer():
    names = [running.name(Config().replace(rho=0, optimizer=o)) for o in ("sgd", "adamw")]
    assert names == ["SGD", "AdamW"]
    assert running.new_name(Config().replace(rho=0, optimizer="adam")).name.endswith(
        "-adam-seed0"
    )


def test_two_runs_that_begin_in_one_second_are_both_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running.time, "strftime", lambda form: "20261127-200000")
    for rho in ("0.1", "0.2"):
        assert main([*SMALL, "--epochs", "1", "--rho", rho]) == 0
    assert len([*tmp_path.glob("runs/20261127-200000-*/model.safetensors")]) == 2


def test_one_command_begins_a_run_goes_on_with_it_and_shows_its_end(
    tmp_path, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--no-decay-norm", "--optimizer", "adamw", "--batch-size", "128"]
    assert train(whole, *flags) == 0
    flags += ["--preset", "digits", "--auto-resume"]
    assert stop_after(15, parts, monkeypatch, *flags) == 130
    assert train(parts, *flags) == 0
    out = capsys.readouterr().out
    assert "resuming after 1 epochs and 4 steps" in out
    assert "batch 128, AdamW, lr 0.2 cosine" in " ".join(out.split())
    assert "try plain AdamW" in out
    assert equal(tensors(whole), tensors(parts))
    before = (parts / "metrics.jsonl").read_bytes()
    assert train(parts, *flags) == 0
    assert "resuming after 2 epochs and 0 steps" in (out := capsys.readouterr().out)
    assert "best epoch" in out
    assert (parts / "metrics.jsonl").read_bytes() == before
    assert not list(parts.glob("config.toml.*"))


def test_a_command_that_goes_on_by_itself_leaves_other_files_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert train(tmp_path, "--auto-resume") == 2
    assert "expected a new or empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] in (
        ["precious"],
        ["precious", ".samfn.lock"],
        [".samfn.lock", "precious"],
    )


def test_a_directory_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert train(tmp_path) == 2
    said = capsys.readouterr().err
    assert "expected a new or empty directory" in said
    assert "--resume" not in said  # It holds no run.
    assert (tmp_path / "precious").read_text() == "x"
    (tmp_path / "config.toml").touch()
    assert train(tmp_path) == 2
    assert "--resume goes on with a run" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--dry-run"]) == 0
    assert "dry run: one step taken, loss" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_validation_chooses_the_best_epoch(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--validation", "0.1", "--epochs", "3") == 0
    assert "chosen by the validation set" in capsys.readouterr().out
    accuracies = [row["validation_accuracy"] for row in rows(run)]
    best = accuracies.index(max(accuracies)) + 1
    assert tensors(run, "best")["step"] == rows(run)[best - 1]["step"]


def test_the_best_epoch_need_not_be_the_last(tmp_path, monkeypatch):
    accuracies = iter([50.0, 70.0, 60.0, 70.0])
    monkeypatch.setattr(loop, "evaluate", lambda *args: (1.0, next(accuracies)))
    run = tmp_path / "run"
    assert train(run, "--epochs", "4") == 0
    assert tensors(run, "best")["step"] == 2 * 22
    assert tensors(run, "last")["step"] == 4 * 22


def test_an_epoch_that_was_recorded_but_not_saved_is_recorded_once(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert stop_after(30, run, monkeypatch) == 130
    RunDirectory(run).append({"epoch": 2, "step": -1})
    assert main(["--resume", str(run)]) == 0
    assert [(row["epoch"], row["step"]) for row in rows(run)] == [(1, 22), (2, 44)]


OPTIONS = {
    "--policy autoaugment --schedule polynomial": {"lr": 0.2 * (1 / 44) ** 0.9},
    "--policy trivialaugment --schedule one-cycle": {"lr": 0.2 / 25 / 1e4},
    "--mixup-alpha 0.2 --schedule step --milestones 1": {"lr": 0.04},
    "--cutmix-alpha 1 --rho-schedule linear --rho-final 0.006": {"rho": 0.007},
    "--mixup-alpha 0.2 --cutmix-alpha 1 --method esam --label-smoothing 0.1"
    " --schedule step --rho-schedule proportional": {"rho": 0.05 * 0.2**3},
}


@pytest.mark.parametrize("flags", OPTIONS)
def test_every_schedule_and_augmentation_trains(tmp_path, capsys, flags):
    assert train(tmp_path / "run", *flags.split()) == 0
    first, last = rows(tmp_path / "run")
    assert last["train_loss"] < first["train_loss"]
    assert last["test_accuracy"] > 20
    assert {name: last[name] for name in OPTIONS[flags]} == pytest.approx(OPTIONS[flags])
    varies = re.search(r"rho 0.05 to [\d.]+ (linear|proportional)", capsys.readouterr().out)
    assert bool(varies) == ("--rho-schedule" in flags)


def test_label_noise_lowers_training_and_never_touches_the_test_set(tmp_path):
    config = configure([*SMALL, "--label-noise", "0.4"])
    digits = load("digits")
    task, _ = assemble(config, digits)
    assert (task.train_labels != digits.train_labels).sum() == round(0.4 * 1437)
    assert torch.equal(task.test.labels, digits.test_labels)
    clean = configure([*SMALL, "--label-noise", "0.4", "--validation", "0.1"])
    task, _ = assemble(clean, digits)
    source = generator(clean.seed, "validation")
    held = hold_out(digits, 0.1, source)[2]
    assert torch.equal(task.chosen_by.labels, held)
    noisy, _ = assemble(clean.replace(noisy_validation=True), digits)
    assert torch.equal(noisy.chosen_by.images, task.chosen_by.images)
    assert torch.equal(noisy.test.labels, digits.test_labels)
    wrong = (noisy.chosen_by.labels != held).float().mean()
    assert 0.3 < wrong < 0.5
    order = torch.randperm(1437, generator=generator(clean.seed, "validation"))
    both = torch.cat([noisy.chosen_by.labels, noisy.train_labels])
    assert (both != digits.train_labels[order]).sum() == round(0.4 * 1437)


@pytest.mark.parametrize("more", [[], ["--rho", "0"]])
def test_a_run_that_diverges_ends_with_its_own_code(tmp_path, capsys, more):
    assert train(tmp_path / "run", "--lr", "1e12", "--weight-decay", "1e6", *more) == 3
    # The weights are finite, and too large, after the first epoch's first steps.
    said = " ".join(capsys.readouterr().err.split())
    where = r"step 23, pass 1: the (loss is nan|gradient of [\w.]+): none of the 22 steps"
    assert re.search(f"{where} of epoch 2 had a finite loss and gradient: try", said)


def test_a_batch_larger_than_the_training_set_is_an_error(tmp_path, capsys):
    assert train(tmp_path / "run", "--batch-size", "2000") == 2
    assert "at most the 1437 training images, got 2000" in capsys.readouterr().err


def test_resuming_what_is_no_run_is_an_error(tmp_path, capsys):
    assert main(["--resume", str(tmp_path / "absent")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_run_without_checkpoint_starts_anew(tmp_path, capsys):
    with RunDirectory.create(tmp_path / "run", configure(SMALL)):
        pass
    assert main(["--resume", str(tmp_path / "run"), "--eval-only"]) == 2
    assert "holds no checkpoint of a whole epoch" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert "holds no checkpoint: starting from the beginning" in capsys.readouterr().out
    assert train(tmp_path / "whole") == 0
    assert equal(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


def test_the_summary_names_a_run_that_differs_in_rho_alone(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(run, "--label-noise", "0.4", "--seed", "3", "--epochs", "1") == 0
    out = " ".join(capsys.readouterr().out.split())
    command = re.search(r"try plain SGD python -m recipes.cifar_wrn (.*--rho 0)", out)
    args = [*command[1].split(), "--output", str(other)]
    assert main(args) == 0
    saved = [read_toml(path / "config.toml") for path in (run, other)]
    assert saved[1] == saved[0] | {"rho": 0.0}


def test_file_names_are_shown_as_they_are(tmp_path, capsys):
    run = tmp_path / "[bold]x[/bold]"
    assert train(run, "--epochs", "1") == 0
    assert "[bold]x[/bold]" in capsys.readouterr().out.replace("\n", "")


def start(run, *flags, **options):
    command = ["-m", "recipes.cifar_wrn", *SMALL, "--output", run]
    return commands.start(*command, *flags, **options)


def wait_for(text, read):
    seen, deadline = "", time.monotonic() + 300
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += read()
    return seen


def test_ctrl_c_in_a_terminal_ends_cleanly_and_the_run_can_go_on(tmp_path):
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    flags = ["--epochs", "500", "--compile", "no"]
    process = start(run, *flags, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = wait_for("images/s", lambda: os.read(ours, 9999).decode(errors="replace"))
    os.kill(process.pid, signal.SIGINT)
    while True:
        try:
            chunk = os.read(ours, 9999)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk.decode(errors="replace")
    process.join(300)
    assert process.exitcode == 130
    assert "Traceback" not in seen
    assert "stopping after this step" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen).replace("\r\n", "")
    assert "--resume" in plain
    state, _ = samfn.restore(checkpoint(run), like=fresh(run))
    assert state.step > 0


def test_output_into_a_file_is_plain_lines(tmp_path):
    with (tmp_path / "out").open("w") as file:
        process = start(tmp_path / "run", "--epochs", "1", stdout=file.fileno())
        process.join(300)
    assert process.exitcode == 0
    out = (tmp_path / "out").read_bytes().decode()
    assert "\x1b" not in out
    assert "\r" not in out
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["epoch"] == 1


def test_with_an_average_it_is_what_is_chosen_evaluated_and_exported(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--ema-decay", "0.95", "--epochs", "3") == 0
    best = max(rows(run), key=lambda row: row["ema_test_accuracy"])
    found = f"test accuracy of the average {best['ema_test_accuracy']:.2f} %"
    assert f"{found} in epoch {best['epoch']}" in capsys.readouterr().out
    assert any(row["ema_test_loss"] != row["test_loss"] for row in rows(run))
    path = samfn.Checkpoints(run / "checkpoints").best("ema")[0]
    average = samfn.restore(path, like=fresh(run))[1]["memory.ema"]
    exported = load_file(run / "model.safetensors")
    name = next(name for name in exported if name.endswith("weight"))
    assert torch.equal(exported[name], average[f"params/{name}"])
    assert main(["--eval-only", "--resume", str(run)]) == 0
    said = f"epoch {best['epoch']}: test accuracy {best['ema_test_accuracy']:.2f} %"
    assert said in capsys.readouterr().out


def test_a_run_may_go_on_without_its_average_or_with_one(tmp_path):
    run, more = tmp_path / "run", ["--resume", str(tmp_path / "run"), "--resume-override"]
    assert train(run, "--ema-decay", "0.9", "--epochs", "1") == 0
    assert main([*more, "--epochs", "2", "--ema-decay", "None"]) == 0
    assert main([*more, "--epochs", "3", "--ema-decay", "0.9"]) == 0
    assert ["ema_test_loss" in row for row in rows(run)] == [True, False, True]


def test_a_run_cannot_go_on_to_an_epoch_that_it_has_behind_it(runs, capsys):
    args = ["--resume", str(runs[0]), "--resume-override", "--epochs"]
    before = {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()}
    assert main([*args, "1"]) == 2
    said = "--epochs: expected at least 2, which the run has begun, got 1"
    assert said in capsys.readouterr().err
    assert {p: p.read_bytes() for p in runs[0].rglob("*") if p in before} == before
    first = min((runs[0] / "checkpoints").glob("*.safetensors"))
    args[1] = str(first)  # From there, it is none.
    assert main([*args, "1"]) == 0


@pytest.mark.parametrize("how", ["edited", "a named pipe"])
def test_epochs_that_somebody_spoils_while_a_run_trains_are_left_out(
    tmp_path, monkeypatch, how
):
    run, real = tmp_path / "run", running.train

    def spoilt(*args):
        finished = real(*args)
        file = run / "metrics.jsonl"
        first, *_ = file.read_text().splitlines(keepends=True)
        file.write_text(first + '{"epoch": 2, "test_accuracy": 1.0}\n')
        if how != "edited":
            make_special(file, how)
        return finished

    monkeypatch.setattr(running, "train", spoilt)
    assert train(run, "--epochs", "2") == 0
    assert (run / "model.safetensors").exists()


def test_patience_ends_a_run_and_stays_at_its_end(tmp_path, capsys):
    run, flags = tmp_path / "run", ["--epochs", "9", "--lr", "1e-12", "--patience", "2"]
    assert train(run, *flags, "--sam-last", "0.1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no better test_accuracy for 2 epochs" in said
    assert re.search(r"perturbed in none of [\d,]+ steps, as the run ended before", said)
    before = rows(run)
    assert 3 <= len(before) < 9
    assert main(["--resume", str(run)]) == 0
    assert rows(run) == before
