"""The command that measures how sharp the minima of runs are."""

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import samfn
from recipes import compare, finetune
from recipes import sharpness as recipe
from recipes.cifar_wrn import main as train
from recipes.settings import method_expression
from recipes.settings.saved import of_run
from recipes.study import measurements, measures
from recipes.study.runs import digest, read
from recipes.terminal.console import Display
from recipes.train.build import generator
from recipes.train.directory import RunDirectory
from samfn.measure import curvature, sharpness
from samfn.measure.objective import Objective
from tests import ROOT, commands
from tests.recipes.data.test_sources import make_folder

SMALL = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "256", "--epochs", "2"]
FAST = ["--images", "80", "--m", "20", "--steps", "3", "--probes", "2"]
FAST += ["--eigenvalues", "2", "--iterations", "3"]
CHEAP = ["--images", "20", "--steps", "1", "--eigenvalues", "0", "--probes", "0"]


def records(run):
    text = (run / "sharpness.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found["measurements"]


def settings_of(*paths, **options):
    small = {"images": 80, "m": 20, "steps": 3, "probes": 2, "iterations": 3}
    return recipe.Settings(runs=paths, **small | {"eigenvalues": 2} | options)


def test_the_numbers_are_those_of_the_library(runs, capsys):
    assert recipe.main([*map(str, runs), *FAST]) == 0
    out = capsys.readouterr().out
    for run in runs:
        (record,) = records(run)
        solution = read(run, settings_of(run), Display())
        params = solution.params
        whole = Objective(solution.loss_fn, solution.buffers, solution.batches(80))
        parts = Objective(solution.loss_fn, solution.buffers, solution.batches(20))
        assert whole.examples(params) == record["images"] == 80
        one = sharpness.worst_case(whole, params, rho=0.05)
        metric = samfn.adaptive_metric(params)
        adaptive = sharpness.worst_case(whole, params, rho=0.5, steps=3, metric=metric)
        count = sum(w.numel() for w in params.values())
        noise = generator(0, "average case")
        average = sharpness.average_case(
            whole, params, rho=0.01 * count**0.5, samples=2, generator=noise
        )
        eigen = sharpness.hessian_eigenvalues(
            whole, params, count=2, iterations=3, generator=generator(0, "eigenvalues")
        )
        trace = sharpness.hessian_trace(
            whole, params, probes=2, generator=generator(0, "trace")
        )
        steps = sharpness.worst_case(whole, params, rho=0.05, steps=3)
        m = sharpness.m_sharpness(whole, params, m=20, rho=0.05)
        bound = max(eigen.errors[0], eigen.highest - eigen.values[0])
        expected = {
            "loss": (one.loss, None, 0),
            "worst_case": (one.increase, None, one.cost),
            "worst_case_steps": (steps.increase, None, steps.cost),
            "adaptive": (adaptive.increase, None, adaptive.cost),
            "m_sharpness": m,
            "average_case": average,
            "eigenvalue_1": (eigen.values[0], bound, eigen.cost),
            "eigenvalue_2": (eigen.values[1], eigen.errors[1], 0),
            "trace": trace,
            "noise": sharpness.gradient_noise(parts, params).variance,
        }
        assert record["numbers"].keys() == expected.keys()
        for name, values in expected.items():
            number = record["numbers"][name]
            found = [number[key] for key in ("value", "error", "cost")]
            for one_, other in zip(found, values, strict=True):
                assert one_ == (None if other is None else pytest.approx(other, rel=2e-3))
        value = record["numbers"]["loss"]["value"]
        assert re.search(rf"(SGD|sam, rho 0.2) +{value:.3g} ", out)
    assert records(runs[0])[0]["numbers"] != records(runs[1])[0]["numbers"]
    assert str(runs[1] / "sharpness.json") in out


def test_the_loss_of_the_test_set_is_what_the_run_recorded(runs):
    flags = ["--split", "test", "--images", "1000", "--eigenvalues", "0", "--probes", "0"]
    assert recipe.main([str(runs[0]), *flags, "--steps", "1"]) == 0
    (record,) = records(runs[0])
    best = max(RunDirectory(runs[0]).rows(), key=lambda row: row["test_accuracy"])
    assert (record["epoch"], record["images"]) == (best["epoch"], 360)
    loss = record["numbers"]["loss"]["value"]
    assert loss == pytest.approx(best["test_loss"], rel=1e-5)
    left = {"loss", "worst_case", "adaptive", "m_sharpness"}
    assert record["numbers"].keys() == left  # 360 images are fewer than 4 x 128


def test_the_bar_reaches_the_cost_that_was_announced(runs):
    settings = settings_of(runs[0])
    solution = read(runs[0], settings, Display())
    told = []
    found = measures.numbers_of(solution, settings, told.append, pytest.fail)
    announced = measures.costs(settings)
    assert sum(told) == pytest.approx(sum(announced.values()))
    assert min(told) > -1e-9
    spent = sum(number.cost for number in found.values())
    assert spent == pytest.approx(sum(announced.values()))  # Lanczos found no early end.
    assert announced["worst_case_steps"] == pytest.approx(3 + 1 / 3)
    assert announced["trace"] == 6
    few = measures.costs(settings_of(images=79, steps=1, probes=0, eigenvalues=0))
    assert few.keys() == {"worst_case", "adaptive", "m_sharpness"}


def test_an_early_end_of_lanczos_counts_as_spent_on_the_bar(runs):
    told = []
    with measures.spending(9.0, told.append) as progress:
        progress(1, 3)
    assert told == [3.0, 6.0]


def test_what_is_announced_is_at_most_what_is_spent_and_said(runs, capsys):
    assert recipe.main([*map(str, runs), *CHEAP]) == 0
    out = capsys.readouterr().out
    each = 3 * (1 + 1 / 3)  # worst case, adaptive and m-sharpness
    text = (
        f"measuring 2 runs: at most {2 * each:,.0f} gradients, {each:,.0f} a run, each over"
    )
    assert f"{text} 20 training images" in out
    assert re.search(rf"measuring SGD took [\d.]+ s and {each:,.0f} gradients", out)


def test_the_model_is_measured_in_evaluation_mode_and_images_do_not_depend_on_batches(runs):
    solution = read(runs[0], settings_of(runs[0]), Display())
    losses = [
        measures.objective(solution, size).loss(solution.params).item() for size in (7, 80)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_measuring_changes_no_checkpoint(runs):
    paths = RunDirectory(runs[0]).checkpoints().paths()
    before = [digest(path) for path in paths]
    assert recipe.main([str(runs[0]), *CHEAP]) == 0
    assert [digest(path) for path in paths] == before
    assert records(runs[0])[0]["sha256"] in before


def test_the_last_epoch_or_a_checkpoint_can_be_measured(runs):
    (first, last) = RunDirectory(runs[0]).checkpoints().paths()
    assert recipe.main([str(runs[0]), "--last", *CHEAP]) == 0
    assert recipe.main([str(first), str(last), *CHEAP]) == 0
    newest, one, two = records(runs[0])
    assert [r["checkpoint"] for r in (newest, one, two)] == [
        last.name,
        first.name,
        last.name,
    ]
    assert newest["numbers"] == two["numbers"] != one["numbers"]
    assert (one["epoch"], two["epoch"]) == (1, 2)


def test_other_settings_are_kept_beside_and_the_same_replaced(runs):
    for flags in ([], ["--rho", "0.1"], []):
        assert recipe.main([str(runs[0]), *CHEAP, *flags]) == 0
    found = records(runs[0])
    assert [record["settings"]["rho"] for record in found] == [0.1, 0.05]
    rises = [record["numbers"]["worst_case"]["value"] for record in found]
    assert rises[0] > rises[1]


def test_numbers_of_other_networks_are_told_to_be_no_measure(runs, capsys):
    assert recipe.main([*map(str, runs), *CHEAP]) == 0
    assert "no measure of each other" not in capsys.readouterr().err
    small = [*SMALL[:2], "--model", "wrn-10-2", *SMALL[4:], "--epochs", "1"]
    assert train([*small, "--output", str(runs[0].parent / "wide")]) == 0
    assert recipe.main([str(runs[0]), str(runs[0].parent / "wide"), *CHEAP]) == 0
    assert "no measure of each other" in capsys.readouterr().err


def test_one_file_can_hold_all(runs, tmp_path):
    output = tmp_path / "all.json"
    assert recipe.main([*map(str, runs), *CHEAP, "--output", str(output)]) == 0
    found = json.loads(output.read_text())["measurements"]
    assert [record["path"] for record in found] == [*map(str, runs)]
    assert not (runs[0] / "sharpness.json").exists()


CHANGES = {
    "nothing": lambda run, settings: settings,
    "device": lambda run, settings: replace(settings, device="cpu"),
    "rho": lambda run, settings: replace(settings, rho=0.06),
    "images": lambda run, settings: replace(settings, images=79),
    "seed": lambda run, settings: replace(settings, seed=1),
    "split": lambda run, settings: replace(settings, split="test"),
    "content": lambda run, settings: rewritten(run) or settings,
    "labels": lambda run, settings: (
        edited(run, "label_noise = 0.0", "label_noise = 0.1") or settings
    ),
    "version": lambda run, settings: (
        edited(run, '"version": 2', '"version": 1', "sharpness.json") or settings
    ),
}


def rewritten(run):
    """Write the best checkpoint with other weights."""
    from tests.recipes.test_recipe import fresh

    (path,) = RunDirectory(run).checkpoints().best()
    state, metadata = samfn.restore(path, like=fresh(run))
    params = {name: 1.01 * w for name, w in state.params.items()}
    samfn.save(path, state._replace(params=params), **metadata)


def edited(run, before, after, name="config.toml"):
    text = (run / name).read_text()
    assert before in text
    (run / name).write_text(text.replace(before, after))


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_is_known_again_unless_something_changed(measured, tmp_path, change):
    run = shutil.copytree(measured, tmp_path / "elsewhere")
    settings = CHANGES[change](run, settings_of(run))
    found = measurements.known(run, of_run(run), settings, Display())
    assert (found is not None) == (change in ("nothing", "device"))


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """Return a run with its sharpness."""
    run = shutil.copytree(trained / "sgd", tmp_path_factory.mktemp("measured") / "sgd")
    assert recipe.main([str(run), *FAST]) == 0
    return run


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"measurements": 3}',
        '{"measurements": [3, {"numbers": {"loss": {"value": "x"}}}]}',
        "\xff",
    ],
)
def test_a_damaged_file_is_measured_anew_and_replaced(measured, tmp_path, capsys, text):
    run = shutil.copytree(measured, tmp_path / "run")
    (run / "sharpness.json").write_bytes(text.encode("latin-1"))
    assert measurements.known(run, of_run(run), settings_of(run), Display()) is None
    (record,) = records(measured)
    measurements.keep(record, run / "sharpness.json", Display())
    assert measurements.known(run, of_run(run), settings_of(run), Display()) == record
    kept = [path.read_bytes() for path in run.glob("sharpness.json.corrupt*")]
    assert kept == [text.encode("latin-1")] * (not text.startswith('{"measurements": ['))


def test_records_that_are_written_at_once_are_all_kept(measured, tmp_path):
    file = tmp_path / "sharpness.json"
    writers = 4
    processes = [
        commands.context().Process(
            target=keep_several, args=(records(measured)[0], file, n)
        )
        for n in range(writers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
    found = json.loads(file.read_text())["measurements"]
    assert sorted(one["path"] for one in found) == sorted(
        f"{n} {m}" for n in range(writers) for m in range(10)
    )


def keep_several(record, file, writer):
    for number in range(10):
        own = record | {"path": f"{writer} {number}"}
        measurements.keep(own | {"checksum": measurements.checksum(own)}, file, Display())


def test_a_damaged_record_hides_no_other(measured, tmp_path):
    run = shutil.copytree(measured, tmp_path / "run")
    (record,) = records(measured)
    for damage in ({"numbers": {"loss": {"value": "x"}}}, {"numbers": 3}, {"sha256": 1}):
        text = json.dumps({"measurements": [record | damage, {}, record]})
        (run / "sharpness.json").write_text(text)
        assert measurements.known(run, of_run(run), settings_of(run), Display()) == record


def test_a_directory_without_a_run_is_left_out_and_told(runs, tmp_path, capsys):
    (tmp_path / "landscape").mkdir()
    paths = [str(runs[0]), str(tmp_path / "landscape")]
    assert recipe.main([*paths, *CHEAP]) == 0
    assert f"{paths[1]} is no run: it holds no config.toml" in capsys.readouterr().err
    assert recipe.main([paths[1]]) == 2
    assert "expected at least one run, got none" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_measured(runs, capsys):
    (best,) = RunDirectory(runs[0]).checkpoints().best()
    best.write_bytes(best.read_bytes()[:-100])
    assert recipe.main([str(runs[0]), *CHEAP]) == 0
    assert "going on with the one before" in capsys.readouterr().err
    (record,) = records(runs[0])
    (left,) = RunDirectory(runs[0]).checkpoints().paths()
    assert (record["checkpoint"], record["sha256"]) == (left.name, digest(left))


def test_a_measure_that_a_network_does_not_have_is_left_out_with_its_reason(
    tmp_path, capsys, monkeypatch
):
    images = make_folder(tmp_path / "images", sizes=((32, 32),), count=4)
    flags = ["--data-dir", str(images), "--image-size", "32", "--batch-size", "4"]
    flags += ["--model", "mobilenet_v3_small", "--weights", "none", "--epochs", "1"]
    flags += ["--warmup-epochs", "0", "--output", str(tmp_path / "run")]
    assert finetune.main(flags) == 0
    run = tmp_path / "run"
    few = ["--images", "4", "--m", "1", *FAST[4:]]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(curvature, "FORMULAS", {})
        assert recipe.main([str(run), *few]) == 0
        said = " ".join(capsys.readouterr().err.split())
        (record,) = records(run)
        assert record["left_out"].keys() == {"eigenvalues", "trace"}
        assert "eigenvalue_1" not in record["numbers"]
        assert "noise" in record["numbers"]
        for measure in ("eigenvalues", "trace"):
            expected = f"{measure} is left out: expected a loss that PyTorch can"
            assert expected in said
        other = shutil.copytree(run, tmp_path / "other")
        assert compare.main([str(run), str(other), *few]) == 0
        assert "trace is left out: expected" in " ".join(capsys.readouterr().err.split())
    (run / "sharpness.json").unlink()
    assert recipe.main([str(run), *few]) == 0
    (record,) = records(run)
    assert not record["left_out"]
    assert {"eigenvalue_1", "trace"} <= record["numbers"].keys()


def test_what_is_not_finite_is_written_and_shown():
    numbers = {"loss": {"value": "nan", "error": None, "cost": 0}}
    (row,) = recipe.table(settings_of(), {"x": {"numbers": numbers}})
    assert row[:2] == ["x", "nan"]
    assert {*row[2:]} == {"-"}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0123, 0.0004, "0.01230 ± 0.00040"),
        (1523.4, 120.0, "1,523 ± 120"),
        (0.5, None, "0.5"),
        (0.5, 0.0, "0.5"),
        (4581.2, None, "4,581"),
        (1e-7, 2e-8, "1e-07 ± 2e-08"),
        (-1.5, 0.25, "-1.50 ± 0.25"),
        ("inf", "nan", "inf"),
        (math.nan, 1.0, "nan"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_leave(value, error, text):
    assert recipe.quantity(value, error) == text


WRONG = [
    (["absent"], "cannot read absent/config.toml"),
    (["RUN", "--rho", "0"], "--rho: expected a finite number above 0, got 0.0"),
    (["RUN", "--adaptive-rho", "nan"], "--adaptive-rho: expected a finite number above 0"),
    (["RUN", "--sigma", "-1"], "--sigma: expected a finite number above 0, got -1.0"),
    (["RUN", "--steps", "0"], "--steps: expected at least 1, got 0"),
    (["RUN", "--m", "0"], "--m: expected at least 1, got 0"),
    (["RUN", "--probes", "1"], "--probes: expected 0, or at least 2, got 1"),
    (["RUN", "--eigenvalues", "-1"], "--eigenvalues: expected 0 to 1000, got -1"),
    (["RUN", "--eigenvalues", "99999999"], "--eigenvalues: expected 0 to 1000, got 999"),
    (
        ["RUN", "--eigenvalues", "31"],
        "--iterations: expected at least 1, and --eigenvalues",
    ),
    (["RUN", "--images", "0"], "--images: expected at least 1, got 0"),
    (["RUN", "RUN/../sgd"], "expected different runs, got"),
    (["RUN", "--device", "nowhere"], "--device: 'nowhere' cannot be used"),
    (["RUN", "--output", "RUN"], "--output: expected a file, got the directory"),
    (["RUN", "--output", "RUN/config.toml"], "--output: expected a new file, or one of"),
    (["RUN", "--output", "RUN/none/x"], "is no directory that can be written"),
    (["RUN/checkpoints/damaged"], "checkpoints/damaged is no safetensors file"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_input_ends_with_its_code(trained, capsys, flags, message):
    (trained / "sgd" / "checkpoints" / "damaged").write_text("x")
    flags = [flag.replace("RUN", str(trained / "sgd")) for flag in flags]
    assert recipe.main(flags) == 2
    assert message in capsys.readouterr().err


def test_numbers_are_shown_even_if_they_cannot_be_written(runs, capsys, monkeypatch):
    def full(path, found):
        raise OSError("no space")

    monkeypatch.setattr(measurements, "write_json", full)
    assert recipe.main([str(runs[0]), *CHEAP]) == 5
    seen = capsys.readouterr()
    assert "cannot write" in seen.err
    assert re.search(r"SGD +\d", seen.out)


# Expression -> gradients of a batch in six steps.
STEPS = {
    "sam": 12,
    "asam(0.1)": 12,
    "fisher_sam": 12,
    "gsam": 12,
    "wsam": 12,
    "ssam": 12,
    "awp": 12,
    "gsam(metric=perturb_layerwise)": 12,
    "s2_sam": 6,
    "rwp": 12,
    "rwp(1.0)": 6,
    "usam": 12,
    "unified_sam": 12,
    "le_sam": 12,
    "light_sam": 12,
    "sagm": 12,
    "friendly_sam": 12,
    "vasso": 12,
    "momentum_sam": 6,
    "looksam(k=3)": 8,
    "looksam(2, 0.5)": 9,
    "functional_sam": 12,
    "sam(preconditioned)": 12,
    "spectral_sam": 12,
    "multi_step_sam": 18,
    "multi_step_sam(ascents=3)": 24,
    "every(sam, 3)": 8,
    "every(k=2, method=multi_step_sam(ascents=4))": 18,
    "sub_batch_ascent(sam)": 7.5,
    "sub_batch_ascent(sam, 0.5)": 9,
    "on_parameters(sam, norm_layers)": 12,
    "per_micro_batch(momentum_sam, 4)": 6,
    "accumulated(sam, 4)": 12,
    "same_randomness(sam)": 12,
    "loss_scaled(every(sam, 2))": 9,
}


@pytest.mark.parametrize("text", STEPS)
def test_the_gradients_of_a_step_are_those_that_are_taken(text):
    taken = 0

    def loss_fn(params, buffers, batch):
        nonlocal taken
        taken += len(batch)
        outputs = batch @ params["weight"]
        return outputs.square().mean(), samfn.Aux(outputs, buffers)

    criterion = lambda outputs, batch: outputs.square().mean()  # noqa: E731
    loss = samfn.Loss(loss_fn, criterion=criterion)
    method = method_expression.parse(text, steps=6, norm_layers=["weight"])
    optimizer = samfn.sgd()
    params = {"weight": torch.ones(3), "head": torch.ones(1)}
    state = samfn.init(params, {}, optimizer=optimizer, method=method)
    given = {"loss_fn": loss, "optimizer": optimizer, "method": method}
    for _ in range(6):
        state, _ = samfn.sam_update(state, torch.ones(8, 3), **given, rho=0.1, lr=0.1)
    assert method_expression.gradients(text) == pytest.approx(STEPS[text] / 6)
    assert taken / 8 == pytest.approx(STEPS[text])


def test_gradients_are_not_known_where_data_decide_and_every_method_is_counted():
    for text in ("esam", "ae_sam(5)", "every(ae_sam, 2)", "sub_batch_ascent(looksam)"):
        assert method_expression.gradients(text) is None
    counted = {re.match(r"\w+", text)[0] for text in STEPS}
    assert counted == method_expression.MAKERS.keys() - {"esam", "ae_sam"}
    assert method_expression.gradients("every(sam, steps)") is None


def test_a_table_that_is_too_wide_for_a_terminal_is_turned(tmp_path):
    code = (
        "from recipes.terminal.console import Display;"
        "Display().table(['', *(f'[i]column {i}' for i in range(9))],"
        " [['[b]name', *['1.5 ± 0.5'] * 9]])"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "TERM": "dumb"}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, cwd=ROOT, env=environment)
    text = os.read(ours, 10_000).decode()
    assert "[b]name" in text
    assert re.search(r"\[i\]column 3 +1.5 ± 0.5", text)
    assert max(map(len, text.splitlines())) <= 60
