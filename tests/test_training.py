"""Each setting changes training as it says, and evaluation is what it should be."""

import inspect
from itertools import islice

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from recipes import augment, methods, training
from recipes.config import parse
from recipes.console import Display
from recipes.data import load
from recipes.keeping import Keeper
from recipes.rundir import RunDirectory
from recipes.signals import watched
from recipes.task import Split, assemble
from samfn.compiled import CompiledUpdate
from samfn.engine import Training

DIGITS = load("digits")
BASE = ["--data", "digits", "--preset", "none", "--model", "wrn-10-1", "--epochs", "2"]


def task_of(*flags):
    return assemble(parse([*BASE, "--crop-padding", "1", *flags]), DIGITS)


def after_two_steps(*flags):
    task, state = task_of(*flags)
    for index, batch in islice(training.batches(task, 0), 2):
        state, metrics = training.step(task, state, index, batch)
    return state, metrics


def differ(left, right):
    return any(
        not torch.equal(left.params[name], right.params[name]) for name in left.params
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--rho 0.1",
        "--rho 0",
        "--method asam",
        "--method gsam",
        "--precision fp16",
        "--momentum 0.5",
        "--nesterov",
        "--weight-decay 0.1",
        "--decay-in-loss",
        "--clip-norm 0.01",
        "--lr 0.2",
        "--schedule step --epochs 1",
        "--schedule constant",
        "--warmup-epochs 1",
        "--label-smoothing 0.1",
        "--label-noise 0.4",
        "--validation 0.1",
        "--crop-padding 2",
        "--no-flip",
        "--cutout 4",
        "--dropout 0.3",
        "--zero-head",
        "--layout davda54",
        "--precision bf16",
        "--batch-size 64",
        "--seed 1",
        "--model wrn-10-2",
    ],
)
def test_every_setting_changes_the_step(flags):
    plain, _ = after_two_steps()
    changed, metrics = after_two_steps(*flags.split())
    assert metrics.finite
    if plain.params.keys() == changed.params.keys():
        shapes = [[p.shape for p in s.params.values()] for s in (plain, changed)]
        assert shapes[0] != shapes[1] or differ(plain, changed)


def test_the_same_dropout_mask_changes_the_step():
    with_dropout = ["--dropout", "0.3"]
    one, _ = after_two_steps(*with_dropout)
    other, _ = after_two_steps(*with_dropout, "--same-dropout")
    assert differ(one, other)


def test_methods_have_the_length_of_their_metric():
    names = ("sam", "asam", "asam(0.0, adapts=everything)")
    norms = {name: after_two_steps("--method", name)[1].perturbation_norm for name in names}
    assert norms["sam"].item() == pytest.approx(0.05, rel=1e-4)
    assert len({round(norm.item(), 5) for norm in norms.values()}) == 3


@pytest.mark.parametrize("name", [*methods.MAKERS, "on_parameters(gsam, norm_layers)"])
def test_every_method_trains_the_recipe(name):
    argument = {
        "accumulated": "(sam, 48)",
        "per_micro_batch": "(sam, 48)",
        "on_parameters": "(sam, '*.weight')",
        "every": "(sam, 2)",
    }
    around = argument.get(name, "(sam)" if takes_method(name) else "")
    _, metrics = after_two_steps("--method", name + around)
    assert metrics.finite


def takes_method(name):
    maker = methods.MAKERS.get(name)
    return bool(maker) and "method" in inspect.signature(maker).parameters


def test_learning_rates_are_those_of_the_schedules():
    steps = 1437 // 128
    cosine, _ = task_of("--warmup-epochs", "1", "--lr", "0.4")
    expected = samfn.schedules.warmup(samfn.schedules.cosine(0.4, 2 * steps), steps)
    values = [cosine.lr(t) for t in range(2 * steps)]
    assert values == [expected(t) for t in range(2 * steps)]
    assert values[0] == pytest.approx(0.4 / steps)
    step, _ = task_of("--schedule", "step", "--lr", "1")
    values = {round(step.lr(t), 6) for t in range(2 * steps)}
    assert values == {1.0, 0.2, 0.04, 0.008}
    constant, _ = task_of("--schedule", "constant", "--lr", "0.3")
    assert {constant.lr(t) for t in range(2 * steps)} == {0.3}


def test_a_batch_is_its_own_images_augmented_with_their_labels():
    task, _ = task_of("--crop-padding", "0", "--no-flip", "--label-noise", "0.4")
    for index, (images, labels) in training.batches(task, 1):
        picked = training.order(task, 1)[index]
        expected = augment.normalise(task.train_images[picked], task.mean, task.std)
        assert torch.equal(images, expected)
        assert torch.equal(labels, task.train_labels[picked])


def test_batches_are_the_same_from_wherever_they_start():
    # 22 batches are one chunk and a smaller one; each epoch is augmented differently.
    task, _ = task_of("--batch-size", "64", "--cutout", "3")
    whole = dict(training.batches(task, 0))
    assert [*whole] == [*range(22)]
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)
    for start in (1, 15, 16, 21):
        rest = dict(training.batches(task, 0, start))
        assert [*rest] == [*range(start, 22)]
        assert all(torch.equal(rest[i][0], whole[i][0]) for i in rest)
    again = training.batches(task, 1)
    assert not any(torch.equal(batch[0], whole[i][0]) for i, batch in again)


def test_a_step_has_the_dials_of_its_position():
    seen = []

    def spying(state, batch, **dials):
        seen.append(dials)
        return state, None

    task, state = task_of("--rho", "0.2", "--schedule", "cosine")
    training.step(task._replace(update=spying), state, 3, None)
    assert seen == [{"rho": 0.2, "lr": task.lr(3)}]


@pytest.mark.parametrize(
    ("flags", "compiled", "why"),
    [
        ("", "no", "no: 22 steps on a CPU would not pay for it (--compile yes)"),
        ("--epochs 2000", "yes", "yes: 22,000 steps on a CPU pay for it"),
        ("--model wrn-28-10", "no", "no: a CPU spends its time in the convolutions either"),
        ("--compile yes", "yes", "yes"),
        ("--compile no --epochs 2000", "no", "no"),
    ],
)
def test_a_step_is_compiled_where_the_run_pays_for_it(flags, compiled, why):
    task, _ = task_of("--device", "cpu", *flags.split())
    assert (task.config.compile, task.compiling[: len(why)]) == (compiled, why)
    assert isinstance(task.update, CompiledUpdate) == (compiled == "yes")


def test_without_a_compiler_the_banner_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    task, _ = task_of("--device", "cpu", "--compile", "yes")
    assert task.compiling == "no: found no C++ compiler (no-such-compiler)"
    assert task.config.compile == "no"


def test_an_epoch_shows_every_image_at_most_once_in_another_order_each_time():
    task, _ = task_of()
    first, second = training.order(task, 0), training.order(task, 1)
    assert first.shape == (11, 128)
    assert len(first.unique()) == first.numel()
    assert torch.equal(first, training.order(task, 0))
    assert not torch.equal(first, second)


def test_evaluation_is_that_of_the_module_over_all_images():
    task, _ = task_of()
    state, _ = after_two_steps()
    # 1,437 images are two whole batches of evaluation and a smaller one.
    everything = Split("train", task.train_images, task.train_labels)
    loss, accuracy = training.evaluate(task, state, everything)
    assert task.model.training
    samfn.load(task.model, state.params, state.buffers)
    task.model.eval()
    with torch.no_grad():
        inputs = augment.normalise(everything.images, task.mean, task.std)
        outputs = task.model(inputs)
    expected = F.cross_entropy(outputs, everything.labels).item()
    assert loss == pytest.approx(expected, rel=1e-4)
    hits = (outputs.argmax(1) == everything.labels).sum().item()
    assert accuracy == pytest.approx(100 * hits / 1437, abs=0.1)


def metrics(loss, finite=True):
    value = torch.tensor(loss)
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return samfn.Metrics(
        value, outputs, value, value, value + 1, value, torch.tensor(finite)
    )


def test_a_meter_averages_the_steps_that_were_taken():
    meter, labels = training.Meter(torch.device("cpu")), torch.tensor([0, 0])
    meter.add(metrics(1.0), labels)
    meter.add(metrics(float("nan"), finite=False), labels)
    meter.add(metrics(4.0), labels)
    means, steps = meter.read()
    assert steps == 2
    assert means["loss"] == 2.5
    assert means["accuracy"] == 50
    assert means["sharpness"] == 1
    kept = meter.kept()
    again = training.Meter(torch.device("cpu"), kept)
    assert_close(again.sums, meter.sums)
    assert again.seconds > kept["seconds"] > 0


def test_skipped_steps_are_counted_in_the_row(tmp_path):
    task, state = task_of("--epochs", "1")
    taken = []

    def update(state, batch, **dials):
        taken.append(None)
        poison = float("nan") if len(taken) == 3 else 1.0
        return task.update(state, (poison * batch[0], batch[1]), **dials)

    with RunDirectory.create(tmp_path / "run", task.config) as run:
        display, start = Display(), Training(state)
        keeper = Keeper(task, run.checkpoints(), display.warn)
        with watched() as signals:
            poisoned = task._replace(update=update)
            assert training.train(poisoned, start, run, keeper, display, signals)
        (row,) = run.rows()
    assert row["skipped_steps"] == 1
    assert row["train_loss"] > 0
    assert row["step"] == task.steps_per_epoch
