"""Runs are not taken at their word: what they say is held against their checkpoints."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import samfn
from recipes import compare, landscape, plots, sharpness
from recipes.cifar_wrn import main as train
from recipes.errors import ConfigError
from recipes.settings.config import SETTINGS, of_roles
from recipes.settings.resolve import configure
from recipes.settings.saved import CONFIG_FILE, of_run
from recipes.study import grid, measurements
from recipes.terminal.console import Display
from recipes.terminal.signals import watched
from recipes.train import loop, recorded, running
from recipes.train.directory import RunDirectory
from recipes.train.layers import WHAT

SMALL = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "256", "--epochs", "3"]
CHEAP = ["--images", "20", "--steps", "1", "--eigenvalues", "0", "--probes", "0"]
# What reads a run, given its directory and that of another one.
COMMANDS = {
    "compare": lambda run, other: compare.main([str(run), str(other), "--no-sharpness"]),
    "sharpness": lambda run, other: sharpness.main([str(run), *CHEAP]),
    "landscape": lambda run, other: landscape.main([str(run), "--points", "5", *CHEAP[:2]]),
    "resume": lambda run, other: train(["--resume", str(run)]),
    "evaluate": lambda run, other: train(["--resume", str(run), "--eval-only"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs that differ in rho alone."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rho in (("sgd", "0"), ("sam", "0.2")):
        assert train([*SMALL, "--rho", rho, "--output", str(folder / name)]) == 0
    return folder


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Nobody looks at the pictures."""
    for name in ("side_by_side", "curves", "surfaces", "lines"):
        monkeypatch.setattr(plots, name, lambda *args: None)


def edited(run, before, after, name=CONFIG_FILE):
    text = (run / name).read_text()
    assert before in text
    (run / name).write_text(text.replace(before, after))


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def read(run):
    """Return what a run recorded, and the lines that were told."""
    told = []
    return recorded.read(run, told.append), told


def checkpoints(run):
    return RunDirectory(run).checkpoints().paths()


# Commands and the words of an edit ----------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_settings_that_were_edited_are_believed_by_no_command(runs, capsys, command):
    edited(runs[1], "rho = 0.2", "rho = 0.0")
    before = {path: path.read_bytes() for path in runs[1].rglob("*") if path.is_file()}
    assert COMMANDS[command](runs[1], runs[0]) == 2
    assert re.search(r"rho (is 0.2 in it and 0.0 there|was 0.2, is now 0.0)", said(capsys))
    after = {path: path.read_bytes() for path in before}
    assert after == before


@pytest.mark.parametrize("step", [1, 99])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_of_another_run_is_called_by_no_name(runs, capsys, command, step):
    newest = checkpoints(runs[0])[-1]
    shutil.copy(newest, runs[1] / "checkpoints" / f"step_{step:09d}.safetensors")
    assert COMMANDS[command](runs[1], runs[0]) == 2
    assert re.search(r"rho (is 0.0 in it and 0.2 there|was 0.0, is now 0.2)", said(capsys))


# What a run may have in place of what this one has.
OTHER = {
    "data": "cifar10", "label_noise": 0.1, "validation": 0.1, "crop_padding": 2,
    "flip": True, "cutout": 3, "policy": "trivialaugment", "mixup_alpha": 0.5,
    "cutmix_alpha": 0.5, "model": "wrn-10-2", "layout": "davda54", "zero_head": True,
    "dropout": 0.1, "method": "asam", "rho": 0.3, "same_dropout": True, "epochs": 4,
    "batch_size": 128, "lr": 0.3, "momentum": 0.8, "nesterov": True,
    "weight_decay": 0.1, "decay_norm": False, "decay_in_loss": True, "clip_norm": 1.0,
    "label_smoothing": 0.2, "schedule": "constant", "warmup_epochs": 1.0,
    "ema_decay": 0.9, "patience": 2, "precision": "bf16", "seed": 7,
}  # fmt: skip


def test_no_setting_that_decides_on_a_run_can_be_edited(trained, record_property):
    run, told = trained / "sam", pytest.fail
    whole = recorded.read(run, told)
    (_, newest) = recorded.checkpoints_of(RunDirectory(run), told)[-2:]
    for name, value in OTHER.items():
        settings = newest.settings | {name: value}
        with pytest.raises(ConfigError, match=f"{name} is .* in it and .* there"):
            recorded._require_own(newest._replace(settings=settings), [newest.settings])
        assert not recorded.is_own(settings, run)
    for name in SETTINGS.keys() - of_roles(SETTINGS).keys():
        assert recorded.is_own(newest.settings | {name: "other"}, run)
    assert recorded.is_own(newest.settings | {"of another version": 1}, run)
    assert whole.config == of_run(run)
    assert OTHER.keys() <= of_roles(SETTINGS).keys()
    record_property("trials", len(OTHER))


def test_a_checkpoint_of_other_images_is_refused(runs, capsys):
    path = checkpoints(runs[0])[-1]
    tensors, texts = samfn.storage.tensorfile.read(path)
    samfn.storage.tensorfile.write(path, tensors, texts | {"data": json.dumps("other")})
    with pytest.raises(ConfigError, match="trained on other images or labels"):
        read(runs[0])


def test_a_header_that_was_edited_is_no_word_of_the_run(runs):
    """The settings of a checkpoint are of the bytes that its digest is of."""
    before, _ = read(runs[0])
    path = checkpoints(runs[0])[-1]
    content = path.read_bytes()
    rho = b'\\"method\\": \\"sam\\", \\"rho\\": 0.'
    assert content.count(rho + b"0") == 1
    path.write_bytes(content.replace(rho + b"0", rho + b"2"))
    after, told = read(runs[0])
    assert after.rows == before.rows
    assert len(told) == 1
    assert re.search("is damaged: its content is not that of the SHA-256 in it", told[0])


@pytest.mark.parametrize("text", [b"", b"\x00" * 8, b"x" * 1000])
def test_damaged_checkpoints_are_told_and_left_out(runs, text):
    for path in checkpoints(runs[0]):
        path.write_bytes(text)
    run, told = read(runs[0])
    assert (run.data, run.versions, len(run.rows)) == (None, {}, 3)
    assert len(told) == len(checkpoints(runs[0]))


@pytest.mark.parametrize(
    "texts",
    [
        {"config": "3"}, {"config": None}, {"progress": "[]"}, {"row": "3"},
        {"data": "[1]"}, {"data": None}, {"versions": '{"torch": 1}'},
        {"progress": '{"epoch": 1' + "0" * 400 + "}"}, {"config": "{"},
        {"config": "[" * 100_000}, {"progress": '{"step": 6, "epoch": -1, "batch": 0}'},
        {"progress": '{"step": 6, "epoch": 3, "batch": 0.5}'}, {"progress": '{"epoch": 3}'},
        {"progress": '{"step": 6, "epoch": 7, "batch": 0}'},
        {"row": '{"a": {"b": 1}}'}, {"row": '{"epoch": 3}'}, {"ranks": "3"},
        {"ranks": '{"m": "x"}'}, {"ranks": '{"m": 1' + "0" * 400 + "}"},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_is_refused(runs, texts):
    path = checkpoints(runs[0])[-1]
    tensors, before = samfn.storage.tensorfile.read(path)
    given = {k: v for k, v in (before | texts).items() if v is not None}
    samfn.storage.tensorfile.write(path, tensors, given)
    with pytest.raises(ConfigError, match="is none of this recipe's"):
        read(runs[0])


FORGED = {
    "a row": ({"row": '{"epoch": 3}'}, "its row is {'epoch': 3}"),
    "ranks": ({"ranks": '{"m": 1' + "0" * 400 + "}"}, "its ranks is {'m': 1000"),
    "a step": (
        {"progress": '{"step": 5, "epoch": 3, "batch": 0}'},
        "it says 5 steps, and its state has taken",
    ),
    "sums": (
        {"memory.meter": '{"sums": [1, 2], "seconds": 1}'},
        "keeps no meter that fits",
    ),
    "no sums": ({"memory.meter": "3"}, "no meter that fits"),
    "patience": (
        {"memory.early_stopping": '["x", 1]'},
        "keeps no early_stopping that fits",
    ),
    "counts": ({"memory.easy_counts": "[1]"}, "no easy_counts that fits"),
    "scores": ({"memory.scores": torch.ones(3)}, "no scores that fits"),
    "layers": ({"memory.layers": torch.ones(3, 3)}, "no layers that fits"),
    "average": ({"memory.ema": "3"}, "expected an average by name, got a int"),
    "weights": ({"memory.ema/params/x": torch.ones(3)}, "must have the same names"),
}


@pytest.mark.parametrize(("forged", "message"), FORGED.values(), ids=FORGED)
def test_what_no_run_keeps_is_named_under_a_right_digest_too(runs, capsys, forged, message):
    for path in checkpoints(runs[0]):
        tensors, texts = samfn.storage.tensorfile.read(path)
        for name, value in forged.items():
            if isinstance(value, str):
                texts[name] = value
            else:
                tensors[f"metadata/{name}"] = value
        samfn.storage.tensorfile.write(path, tensors, texts)
    assert train(["--resume", str(runs[0])]) == 2
    assert message in said(capsys)


def test_settings_that_were_overridden_are_those_of_a_part(runs, capsys):
    """Who goes on with other settings has checkpoints of both, by flag or by hand."""
    flags = ["--resume-override", "--epochs", "4"]
    assert train(["--resume", str(runs[1]), "--rho", "0.1", *flags]) == 0
    edited(runs[1], "rho = 0.1", "rho = 0.05")
    edited(runs[1], "epochs = 4", "epochs = 5")
    assert train(["--resume", str(runs[1]), "--resume-override"]) == 0
    rhos = {one.settings["rho"] for one in map(recorded.said, checkpoints(runs[1]))}
    assert len(rhos) > 1
    assert rhos <= {0.2, 0.1, 0.05}
    for command in COMMANDS.values():
        assert command(runs[1], runs[0]) == 0
    for path in checkpoints(runs[1]):
        assert train(["--resume", str(path), "--eval-only"]) == 0
    run, told = read(runs[1])
    assert (run.config.rho, [row["epoch"] for row in run.rows]) == (0.05, [1, 2, 3, 4, 5])
    assert told == []


# Rows belong to epochs ----------------------------------------------------------------


def lines_of(run):
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def put(run, lines):
    (run / "metrics.jsonl").write_text("".join(lines))


def test_a_line_cut_anywhere_is_the_epoch_that_its_checkpoint_says(
    trained, tmp_path, record_property
):
    run = shutil.copytree(trained / "sam", tmp_path / "sam")
    whole, told = read(run)
    assert told == []
    directory, told = RunDirectory(run), []
    known = recorded.checkpoints_of(directory, pytest.fail)
    *lines, last = lines_of(run)
    for cut in range(len(last) - 1):
        put(run, [*lines, last[:cut]])
        found = recorded.epochs_of(directory, whole.config, known, told.append)
        assert found == whole.rows
    assert len(told) >= len(last) - 1
    record_property("trials", len(last) - 1)


@given(st.data())
def test_lines_in_any_order_and_number_are_the_same_epochs(trained, data):
    run, before = trained / "sam", lines_of(trained / "sam")
    whole, _ = read(run)
    spoilt = [
        json.dumps(json.loads(line) | {name: value}) + "\n"
        for line in before[1:]
        for name in ("test_accuracy", "train_loss", "seconds")
        for value in (float("nan"), float("inf"), -1.0, 101 if "acc" in name else -0.5)
    ]
    odd = [*spoilt, "\n", "[]\n", '{"epoch": true}\n', '{"epoch": 0}\n', '{"epoch": 99}\n']
    chosen = data.draw(st.lists(st.sampled_from(before + odd), max_size=12))
    lines = data.draw(st.permutations([before[0], *chosen]))
    try:
        put(run, lines)
        found, told = read(run)
    finally:
        put(run, before)
    assert found == whole
    assert (told == []) == (sorted(lines) == sorted(before))


def test_an_epoch_without_its_numbers_is_none(trained, record_property):
    row, trials = RunDirectory(trained / "sam").rows()[0], 0
    assert recorded.is_whole(row, 1)
    assert not recorded.is_whole(row | {"epoch": 2}, 1)
    odd = (float("nan"), float("inf"), -1.0, "1", None, True, [1.0])
    for name in ("test_accuracy", "train_loss", "seconds", "images_per_second"):
        for value in odd:
            assert not recorded.is_whole(row | {name: value}, 1)
            trials += 1
    assert not recorded.is_whole(row | {"test_accuracy": 100.5}, 1)
    assert not recorded.is_whole(row | {"ema_test_accuracy": -1.0}, 1)
    watched = {what: {"a": 1.0, "b": 2} for what in WHAT}
    assert recorded.is_whole(row | {"layers": watched}, 1)
    odd = ({}, 5, None, {"norm": "x"}, watched | {"cosine": {}}, watched | {"weight": 1})
    for value in (*odd, watched | {"update": {"a": 1.0, "b": "x"}}):
        assert not recorded.is_whole(row | {"layers": value}, 1)
    assert not recorded.is_whole(row | {"step": {"a": 1}}, 1)
    record_property("trials", trials + 3)


def test_numbers_that_were_edited_are_those_of_the_checkpoint_or_told(runs):
    whole, _ = read(runs[0])
    rows = [json.loads(line) for line in lines_of(runs[0])]
    best = recorded.said(RunDirectory(runs[0]).checkpoints().best()[0])
    for row in rows:
        forged = [one | ({"test_accuracy": 99.9} if one is row else {}) for one in rows]
        put(runs[0], [json.dumps(one) + "\n" for one in forged])
        found, told = read(runs[0])
        assert len(told) == 1
        if row["epoch"] in {one.epoch for one in map(recorded.said, checkpoints(runs[0]))}:
            assert found == whole
            assert f"is not what checkpoints say of epochs {row['epoch']}" in told[0]
        else:
            assert f"epochs {row['epoch']} are better there than the best" in told[0]
    assert whole.best["epoch"] == best.epoch


@pytest.mark.parametrize("damage", ["cut", "gone", "nan", "reordered", "text"])
def test_going_on_leaves_no_epoch_out_and_names_the_best_of_the_model(
    trained, tmp_path, monkeypatch, capsys, damage
):
    accuracies = iter([50.0, 60.0, 90.0, 80.0])
    monkeypatch.setattr(loop, "evaluate", lambda *args: (1.0, next(accuracies)))
    run, flags = tmp_path / "run", ["--epochs", "4"]
    assert train([*SMALL[:-2], "--epochs", "3", "--output", str(run)]) == 0
    before = RunDirectory(run).rows()
    lines = lines_of(run)
    spoilt = {
        "cut": [*lines[:2], lines[2][:-9]],
        "gone": lines[:2],
        "nan": [*lines[:2], lines[2].replace("90.0", "NaN")],
        "text": [*lines[:2], lines[2].replace("90.0", '"much"')],
        "reordered": [lines[2], *lines[:2]],
    }[damage]
    put(run, spoilt)
    capsys.readouterr()
    assert train(["--resume", str(run), *flags, "--resume-override"]) == 0
    rows = RunDirectory(run).rows()
    assert rows[:3] == before
    assert [row["test_accuracy"] for row in rows] == [50.0, 60.0, 90.0, 80.0]
    assert [json.loads(line) for line in lines_of(run)] == rows
    assert "test accuracy 90.00 % in epoch 3" in " ".join(capsys.readouterr().out.split())


def test_the_summary_names_the_epoch_of_the_model_whatever_the_log_says(
    trained, tmp_path, capsys
):
    run = shutil.copytree(trained / "sgd", tmp_path / "run")
    best = recorded.said(RunDirectory(run).checkpoints().best()[0])
    other = next(n for n in (1, 2) if n != best.epoch)
    rows = RunDirectory(run).rows()
    rows[other - 1]["test_accuracy"] = 99.5
    put(run, [json.dumps(row) + "\n" for row in rows])
    assert train(["--resume", str(run)]) == 0
    assert f"% in epoch {best.epoch}, chosen by" in " ".join(
        capsys.readouterr().out.split()
    )


# Records of sharpness -----------------------------------------------------------------

FORGED = [
    ("value", 123_456), ("value", -5), ("value", "nan"), ("value", "inf"), ("value", None),
    ("value", int("1" + "0" * 400)), ("value", 0.0), ("error", -1), ("cost", -1),
    ("cost", "x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """Return a run with its sharpness."""
    run = shutil.copytree(trained / "sgd", tmp_path_factory.mktemp("measured") / "sgd")
    assert sharpness.main([str(run), *CHEAP]) == 0
    return run


def records(run):
    return json.loads((run / "sharpness.json").read_text())["measurements"]


def test_a_record_that_was_edited_is_measured_again(
    measured, trained, tmp_path, capsys, record_property
):
    settings = sharpness.Settings(runs=(), images=20, steps=1, eigenvalues=0, probes=0)
    run = shutil.copytree(measured, tmp_path / "sgd")
    (record,) = records(run)
    config, trials = of_run(run), 0
    assert measurements.known(run, config, settings, Display()) == record
    for part, value in FORGED:
        for name in record["numbers"]:
            forged = json.loads(json.dumps(record))
            forged["numbers"][name][part] = value
            (run / "sharpness.json").write_text(json.dumps({"measurements": [forged]}))
            assert measurements.known(run, config, settings, Display()) is None
            trials += 1
    record_property("trials", trials)
    capsys.readouterr()
    assert compare.main([str(run), str(trained / "sam"), *CHEAP]) == 0
    told = said(capsys)
    assert "1 of 1 records are not as they were written, and are measured anew" in told
    (again,) = records(run)
    assert again["numbers"] == record["numbers"]


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("loss", "value", -5),
        ("worst_case", "value", "nan"),
        ("adaptive", "value", "inf"),
        ("loss", "cost", -1),
        ("m_sharpness", "error", -1),
    ],
)
def test_what_cannot_be_measured_is_none_even_with_a_checksum(measured, name, part, value):
    (record,) = records(measured)
    record["checksum"] = measurements.checksum(record)
    assert measurements.is_whole(record)
    record["numbers"][name][part] = value
    record["checksum"] = measurements.checksum(record)
    assert not measurements.is_whole(record)


def test_what_an_older_version_measured_is_kept_and_not_believed(measured, tmp_path):
    run = shutil.copytree(measured, tmp_path / "sgd")
    (record,) = records(run)
    older = {k: v for k, v in record.items() if k != "checksum"} | {"sha256": "other"}
    (run / "sharpness.json").write_text(json.dumps({"measurements": [older]}))
    assert not measurements.is_whole(older)
    measurements.keep(record, run / "sharpness.json", Display())
    assert records(run) == [older, record]


# Studies ------------------------------------------------------------------------------


def conduct(arms, output):
    with watched() as signals:
        cells = grid.plan(arms, 1, output)
        return grid.run(cells, output, Display(), signals, lambda groups: None)


def stopped_after(epochs, arms, output, monkeypatch):
    """Leave a study whose only run stopped after so many epochs."""
    (cell,) = grid.plan(arms, 1, output)
    real = RunDirectory.append

    def append(run, row):
        real(run, row)
        if row["epoch"] == epochs:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", append)
        with pytest.raises(grid.Stopped):
            conduct(arms, output)
    return cell


SGD = replace(configure(SMALL), rho=0.0)
ARMS = [("SGD", SGD)]


@pytest.mark.parametrize("kind", ["empty", "foreign", "of another run", "cut", "too early"])
def test_a_model_file_makes_no_run_finished(trained, tmp_path, monkeypatch, kind):
    cell = stopped_after(2, ARMS, tmp_path / "study", monkeypatch)
    path = RunDirectory(cell.path).weights
    whole = (trained / "sam" / "model.safetensors").read_bytes()
    if kind == "foreign":
        save_file({"x": torch.ones(3)}, path)
    elif kind == "too early":
        (best,) = RunDirectory(cell.path).checkpoints().best()
        tensors, _ = samfn.storage.tensorfile.read(best)
        parts = ("params/", "buffers/")
        model = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(parts)}
        samfn.storage.tensorfile.write(path, model, {})
        assert recorded.holds_best_model(RunDirectory(cell.path), cell.config)
    else:
        path.write_bytes({"empty": b"", "of another run": whole, "cut": whole[:-1]}[kind])
    (group,) = conduct(ARMS, tmp_path / "study")
    assert [row["epoch"] for row in group.runs[0].rows] == [1, 2, 3]
    assert load_file(path).keys() == load_file(trained / "sgd" / "model.safetensors").keys()


@pytest.mark.parametrize("kind", ["foreign", "of another run", "gone"])
def test_a_finished_run_whose_model_was_swapped_gets_its_own(trained, tmp_path, kind):
    (before,) = conduct(ARMS, tmp_path)
    path = RunDirectory(before.runs[0].path).weights
    expected = load_file(path, backend="pread")  # files change here
    if kind == "foreign":
        save_file({"x": torch.ones(3)}, path)
    elif kind == "gone":
        path.unlink()
    else:
        shutil.copy(trained / "sam" / "model.safetensors", path)
    (after,) = conduct(ARMS, tmp_path)
    assert after == before
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_with_an_average_its_model_is_the_runs(tmp_path, monkeypatch):
    arms = [("SGD", SGD.replace(ema_decay=0.5, epochs=1))]
    before = conduct(arms, tmp_path)
    monkeypatch.setattr(running, "run", lambda *args: pytest.fail("it was finished"))
    assert conduct(arms, tmp_path) == before


def test_a_study_refuses_checkpoints_of_another_run(trained, tmp_path):
    (group,) = conduct(ARMS, tmp_path)
    shutil.copy(checkpoints(trained / "sam")[0], checkpoints(group.runs[0].path)[0])
    with pytest.raises(ConfigError, match=r"rho is 0.2 in it and 0.0 there"):
        conduct(ARMS, tmp_path)


def test_what_a_killed_process_left_in_a_study_is_deleted(tmp_path):
    for name in (".samfn-a", ".samfn-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    conduct([("SGD", replace(SGD, epochs=1))], tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine", "sgd-seed0", samfn.storage.files.LOCK}
