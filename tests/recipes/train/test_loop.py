"""Each setting changes training as it says, and evaluation is what it should be."""

import inspect
import os
from itertools import islice

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from recipes import errors
from recipes.data import augment
from recipes.data.sources import load
from recipes.errors import ConfigError
from recipes.settings import method_expression
from recipes.settings.resolve import configure
from recipes.settings.saved import to_toml
from recipes.terminal.console import Display
from recipes.terminal.signals import watched
from recipes.train import length, loop, running
from recipes.train.batches import augmented, order
from recipes.train.build import Split, assemble, first_perturbed, generator, seed
from recipes.train.callbacks import Meter
from recipes.train.checkpoints import Keeper
from recipes.train.directory import RunDirectory
from samfn.compiled import CompiledUpdate
from samfn.training import loop as library
from samfn.training.loop import Training

DIGITS = load("digits")
BASE = ["--data", "digits", "--preset", "none", "--model", "wrn-10-1", "--epochs", "2"]


def task_of(*flags):
    return assemble(configure([*BASE, "--crop-padding", "1", *flags]), DIGITS)


def after_two_steps(*flags):
    task, state = task_of(*flags)
    for index, batch in enumerate(islice(augmented(task, 0), 2)):
        state, metrics = loop.step(task, state, index, batch)
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
        "--optimizer adam",
        "--optimizer adamw",
        "--optimizer nadam",
        "--optimizer muon",
        "--momentum 0.5",
        "--nesterov",
        "--norm-bias-lr 64",
        "--weight-decay 0.1",
        "--decay-in-loss",
        "--no-decay-norm",
        "--clip-norm 0.01",
        "--lr 0.3",
        "--schedule polynomial",
        "--schedule one-cycle",
        "--schedule warm-restarts --restart-epochs 1",
        "--lr-final 0.05",
        "--schedule polynomial --lr-final 0.05",
        "--schedule step --epochs 1",
        "--schedule triangle",
        "--schedule constant",
        "--rho-schedule linear",
        "--rho-schedule proportional",
        "--rho-schedule linear --rho-final 0.1",
        "--warmup-epochs 1",
        "--label-smoothing 0.1",
        "--label-noise 0.4",
        "--validation 0.1",
        "--crop-padding 2",
        "--no-flip",
        "--alternate-flip",
        "--padding reflect",
        "--cutout 4",
        "--policy autoaugment",
        "--policy trivialaugment",
        "--mixup-alpha 0.2",
        "--cutmix-alpha 1",
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


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "nadam"])
def test_an_optimizer_is_that_of_the_library_with_the_settings_of_the_run(optimizer):
    given = {"sgd": (0.5, True), "adam": ((0.8, 0.98),)}
    args = given.get(optimizer, given["adam"])
    flags = ["--momentum", "0.5", "--nesterov"]
    flags = flags if optimizer == "sgd" else ["--betas", "0.8", "0.98"]
    flags += ["--optimizer", optimizer, "--weight-decay", "0.1", "--no-decay-norm"]
    found, _ = after_two_steps(*flags, "--lr", "0.01", "--compile", "no")
    make, (task, _) = getattr(samfn, optimizer), task_of("--lr", "0.01")
    names = samfn.no_decay_parameters(task.model)
    expected = samfn.grouped(
        make(*args, weight_decay=0.1), (names, make(*args, weight_decay=0.0))
    )
    criterion = samfn.supervised(task.model, F.cross_entropy)
    state = samfn.init(*samfn.split(task.model), optimizer=expected)
    for index, batch in enumerate(islice(augmented(task, 0), 2)):
        dials = {"rho": 0.05, "lr": task.lr(index), "loss_fn": criterion}
        state, _ = samfn.sam_update(state, batch, optimizer=expected, **dials)
    assert_close(found.params, state.params, rtol=1e-5, atol=1e-6)


def test_muon_moves_hidden_layers_and_adamw_the_rest():
    flags = "--lr 0.01 --compile no --optimizer muon --betas 0.8 0.98 --weight-decay 0.1"
    found, _ = after_two_steps(*flags.split(), "--no-decay-norm")
    task, _ = task_of("--lr", "0.01")
    spared = samfn.no_decay_parameters(task.model)
    head = [n for n, w in task.model.named_parameters() if w.ndim == 2][-1]
    expected = samfn.grouped(
        samfn.muon(weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        (spared, samfn.adamw((0.8, 0.98), weight_decay=0.0)),
        ([head], samfn.adamw((0.8, 0.98), weight_decay=0.1)),
    )
    criterion = samfn.supervised(task.model, F.cross_entropy)
    state = samfn.init(*samfn.split(task.model), optimizer=expected)
    for index, batch in enumerate(islice(augmented(task, 0), 2)):
        dials = {"rho": 0.05, "lr": task.lr(index), "loss_fn": criterion}
        state, _ = samfn.sam_update(state, batch, optimizer=expected, **dials)
    assert_close(found.params, state.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", [[], ["--decay-in-loss"]])
def test_normalisation_and_biases_are_spared_decay_and_nothing_else_is(where):
    # So large a decay that it shows at once; without perturbation only where it acts.
    flags = ["--rho", "0", "--lr", "0.01", *where]
    none, spared, all_of_it = (
        after_one_step(*flags, "--weight-decay", decay, *more)
        for decay, more in (("0", []), ("9", ["--no-decay-norm"]), ("9", []))
    )
    names = samfn.no_decay_parameters(task_of()[0].model)
    assert {name.rpartition(".")[2] for name in names} == {"weight", "bias"}
    for name in none:
        assert torch.equal(spared[name], none[name]) == (name in names)
    assert any(not torch.equal(spared[name], all_of_it[name]) for name in names)


def test_biases_of_normalisation_have_groups_of_torch_of_their_own():
    flags = ["--rho", "0", "--lr", "0.1", "--schedule", "constant", "--nesterov"]
    flags += ["--momentum", "0.8"]
    task, state = task_of(*flags, "--weight-decay", "0.5", "--norm-bias-lr", "8")
    own = {n: torch.nn.Parameter(w.clone()) for n, w in state.params.items()}
    named = [n for n in own if "norm" in n and n.endswith(".bias")]
    rest = [w for n, w in own.items() if n not in named]
    quick = {"params": [own[n] for n in named], "lr": 0.8, "weight_decay": 0.5 / 8}
    torchs = torch.optim.SGD(
        [quick, {"params": rest}], lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.5
    )
    criterion = samfn.supervised(task.model, F.cross_entropy)
    for index, batch in enumerate(islice(augmented(task, 0), 2)):
        there = {n: w.detach().clone() for n, w in own.items()}
        grads = samfn.evaluate(criterion, there, state.buffers, batch).grads
        for name, w in own.items():
            w.grad = grads[name]
        torchs.step()
        state, _ = loop.step(task, state, index, batch)
    assert len(named) == 7
    for name, w in own.items():
        assert_close(state.params[name], w.detach(), rtol=1e-4, atol=1e-6)
    before = task_of()[1].params
    flags += ["--no-decay-norm", "--weight-decay", "9", "--norm-bias-lr", "8"]
    spared = after_one_step(*flags)
    none = after_one_step(*flags, "--weight-decay", "0")
    assert torch.equal(spared[named[0]], none[named[0]])
    assert not torch.equal(spared[named[0]], before[named[0]])


def test_an_evaluation_is_of_the_mean_outputs_of_its_views():
    task, state = task_of("--views", "6")
    with loop.evaluating(task.model):
        images = augment.normalise(task.test.images[:40], task.mean, task.std)
        labels = task.test.labels[:40]
        outputs = sum(
            share
            * samfn.evaluate(
                task.eval_fn, state.params, state.buffers, (view, labels), wrt=()
            ).outputs
            for share, view in augment.views(images, 6)
        )
    split = Split("test", task.test.images[:40], labels)
    loss, accuracy = loop.evaluate(task, state, split)
    assert loss == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (outputs.argmax(1) == labels).float().mean())
    plain = loop.evaluate(task._replace(views_fn=task.eval_fn), state, split)
    assert plain[0] != pytest.approx(loss, rel=1e-5)


def after_one_step(*flags):
    task, state = task_of(*flags)
    state, _ = loop.step(task, state, 0, next(augmented(task, 0)))
    return state.params


@pytest.fixture
def _kernels():
    """Whatever a test chooses, others find what they know."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_kernels")
def test_on_a_cpu_deterministic_kernels_take_the_same_steps(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = ["--dropout", "0.3", "--cutmix-alpha", "1", "--cutout", "3"]
    free, _ = after_two_steps(*flags)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    strict, _ = after_two_steps(*flags, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not differ(free, strict)
    task_of()  # What comes after in the process chooses for itself.
    assert not torch.are_deterministic_algorithms_enabled()


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


@pytest.mark.parametrize(
    "name", [*method_expression.MAKERS, "on_parameters(gsam, norm_layers)"]
)
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
    maker = method_expression.MAKERS.get(name)
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
    at, _ = task_of("--schedule", "step", "--milestones", "1", "--lr", "1")
    assert [at.lr(t) for t in (0, steps - 1, steps, 2 * steps)] == [1.0, 1.0, 0.2, 0.2]
    half = ["--schedule", "step", "--step-factor", "0.5", "--lr", "1"]
    for flags, expected in (([], {1.0, 0.5, 0.25, 0.125}), (["1"], {1.0, 0.5})):
        task, _ = task_of(*half, *(["--milestones", *flags] if flags else []))
        assert {task.lr(t) for t in range(2 * steps)} == expected
    flags = ["--schedule", "warm-restarts", "--restart-epochs", "1"]
    again, _ = task_of(*flags, "--lr", "1")
    assert [again.lr(t) for t in (0, steps, 3 * steps)] == [1.0, 1.0, 1.0]
    assert again.lr(2 * steps) == pytest.approx(0.5)  # The second cosine is twice as long.
    again, _ = task_of(*flags, "--lr-final", "0.02", "--restart-growth", "1")
    expected = samfn.schedules.warm_restarts(0.1, steps, final=0.02)
    assert [again.lr(t) for t in range(50)] == [expected(t) for t in range(50)]
    for name in ("cosine", "polynomial"):
        ended, _ = task_of("--schedule", name, "--lr-final", "0.02")
        assert ended.lr(0) == 0.1
        assert ended.lr(2 * steps) == 0.02
    up = ["--schedule", "triangle", "--lr", "0.4", "--rise", "0.5"]
    for flags, ends in (
        ([], (0.08, 0.028)),
        (["--rise-from", "0.5", "--fall-to", "0.25"], (0.2, 0.1)),
    ):
        triangle, _ = task_of(*up, *flags)
        values = [triangle.lr(t) for t in (0, 2 * steps, steps)]
        assert values == pytest.approx([*ends, 0.4])
    constant, _ = task_of("--schedule", "constant", "--lr", "0.3")
    assert {constant.lr(t) for t in range(2 * steps)} == {0.3}
    for name, make in (("polynomial", "polynomial"), ("one-cycle", "one_cycle")):
        task, _ = task_of("--schedule", name, "--lr", "0.4")
        expected = getattr(samfn.schedules, make)(0.4, 2 * steps)
        assert [task.lr(t) for t in range(50)] == [expected(t) for t in range(50)]


def test_rho_is_that_of_its_schedule():
    steps = 2 * (1437 // 128)
    linear, _ = task_of("--rho", "0.2", "--rho-schedule", "linear", "--rho-final", "0.1")
    expected = [0.2 - 0.1 * t / steps for t in range(steps)]
    assert [linear.rho(t) for t in range(steps)] == pytest.approx(expected)
    flags = ["--rho-schedule", "proportional", "--lr", "0.4", "--warmup-epochs", "1"]
    task, _ = task_of("--rho", "0.2", *flags)
    values = [task.rho(t) for t in range(steps)]
    assert values == pytest.approx([task.lr(t) / 2 for t in range(steps)])
    assert values[0] < max(values) > values[-1]


def test_sam_at_the_end_begins_with_the_cooldown():
    flags = ["--rho", "0.2", "--sam-last", "0.25", "--lr", "0.4"]
    task, _ = task_of(*flags, "--schedule", "wsd", "--cooldown", "0.25")
    steps = range(2 * (1437 // 128))
    late = [t for t in steps if task.rho(t) == 0.2]
    assert late == [*range(22 - 6, 22)]
    assert {task.rho(t) for t in steps if t not in late} == {0.0}
    assert [t for t in steps if task.lr(t + 1) < 0.4] == late
    said = "sam, rho 0.2 in the last 25%: from step 17 of 22 on, 27% of the steps"
    assert running.describe(task)["method"] == said
    # What a run that ended early says, and one that ended before SAM began.
    assert running.perturbed(task, 20) == "from step 17 of 20 on, 20% of the steps"
    ended = "in none of 16 steps, as the run ended before step 17"
    assert running.perturbed(task, 16) == ended


def test_a_run_that_had_other_settings_or_skips_images_says_what_share_perturbed(tmp_path):
    task, _ = task_of("--rho", "0.2", "--sam-last", "0.5")
    row = {"test_accuracy": 9.0, "train_loss": 1.0, "seconds": 1.0, "images_per_second": 9}
    run = RunDirectory(tmp_path)
    for epoch, rho in ((1, 0.2), (2, 0.2)):
        run.append(row | {"epoch": epoch, "rho": rho, "step": 11 * epoch})

    def said():
        return running.summarise(task, run, run.rows()[-1], 1.0, "")["perturbed"]

    run.write_config(task.config)
    assert said() == "from step 12 of 22 on, 50% of the steps"
    run.rewrite([run.rows()[0] | {"rho": 0.0}, run.rows()[1] | {"step": 33}])
    (tmp_path / "config.toml.1").write_text(to_toml(task.config.replace(sam_last=1.0)))
    assert said() == "in 67% of the steps, by the rho of each epoch"
    (tmp_path / "config.toml.1").unlink()
    selecting = task._replace(config=task.config.replace(select="loss"))
    run.rewrite([run.rows()[0] | {"step": 24}, run.rows()[1] | {"step": 32}])
    found = running.summarise(selecting, run, {}, 1.0, "")["perturbed"]
    assert found == "in 25% of the steps, by the rho of each epoch"


def test_both_kinds_of_step_are_compiled_before_training(monkeypatch):
    task, state = task_of("--rho", "0.2", "--sam-last", "0.25", "--compile", "no")
    seen = []

    def update(state, batch, *, rho, lr):
        seen.append(rho)
        return state, None

    task = task._replace(config=task.config.replace(compile="yes"), update=update)
    monkeypatch.setattr(loop, "keep_compiled", lambda warn: None)
    loop.prepare(task, Training(state), Display())
    assert sorted(seen) == [0.0, 0.2]
    seen.clear()
    loop.prepare(task, Training(state, step=20, epoch=1, batch=9), Display())
    assert seen == [0.2]


def test_steps_before_sam_are_those_of_the_plain_optimizer():
    late, _ = after_two_steps("--rho", "0.2", "--sam-last", "0.5")
    plain, _ = after_two_steps("--rho", "0")
    assert not differ(late, plain)


RHO_SCHEDULES = ("constant", "linear", "proportional")


@pytest.mark.parametrize(
    "schedule",
    ["cosine", "polynomial", "one-cycle", "warm-restarts", "step", "wsd", "triangle"],
)
@pytest.mark.parametrize("rho_schedule", RHO_SCHEDULES)
def test_a_rho_above_zero_is_never_zero_in_a_run(schedule, rho_schedule):
    # The number 0 would be another graph to compile, for the last step alone.
    flags = ["--schedule", schedule, "--rho-schedule", rho_schedule]
    task, _ = task_of(*flags, "--warmup-epochs", "1", "--rho", "1e-9")
    assert min(task.rho(t) for t in range(22)) > 0


@pytest.mark.parametrize("rho_schedule", RHO_SCHEDULES)
def test_a_rho_of_zero_stays_the_number_zero(rho_schedule):
    flags = ["--rho-schedule", rho_schedule]
    flags += ["--rho-final", "0.1"] if rho_schedule != "constant" else []
    task, _ = task_of("--rho", "0", *flags)
    assert {task.rho(t) for t in range(22)} == {0.0}
    plain, _ = after_two_steps("--rho", "0")
    assert not differ(plain, after_two_steps("--rho", "0", *flags)[0])


def test_a_step_that_was_not_finite_is_searched_with_its_own_rho(monkeypatch):
    seen = []
    monkeypatch.setattr(samfn, "find_nonfinite", lambda *_, **how: seen.append(how["rho"]))
    task, state = task_of("--rho-schedule", "linear")
    task.find_nonfinite(state._replace(step=torch.tensor(5)), None)
    assert seen == [task.rho(4)] != [task.rho(5)]


def test_a_batch_is_its_own_images_augmented_with_their_labels():
    task, _ = task_of("--crop-padding", "0", "--no-flip", "--label-noise", "0.4")
    for picked, (images, labels) in zip(order(task, 1), augmented(task, 1), strict=True):
        expected = augment.normalise(task.train_images[picked], task.mean, task.std)
        assert torch.equal(images, expected)
        assert torch.equal(labels, task.train_labels[picked])


STRONG = "--policy trivialaugment --mixup-alpha 0.2 --cutmix-alpha 1"


@pytest.mark.parametrize("flags", ["", STRONG])
def test_batches_are_the_same_from_wherever_they_start(flags):
    # 22 batches are one chunk and a smaller one; each epoch is augmented differently.
    task, _ = task_of("--batch-size", "64", "--cutout", "3", *flags.split())
    whole = dict(enumerate(augmented(task, 0)))
    assert [*whole] == [*range(22)]
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)
    for start in (1, 15, 16, 21):
        torch.manual_seed(start)  # The global generator is no part of it.
        rest = dict(enumerate(augmented(task, 0, start), start))
        assert [*rest] == [*range(start, 22)]
        for index, (images, labels) in rest.items():
            assert torch.equal(images, whole[index][0])
            assert torch.equal(labels, whole[index][1])
    again = enumerate(augmented(task, 1))
    assert not any(torch.equal(batch[0], whole[i][0]) for i, batch in again)


def test_crops_come_before_a_policy_and_cutout_and_mixture_after():
    common = ["--batch-size", "64", "--cutout", "3"]
    task, _ = task_of(*common, *STRONG.split())
    indices = order(task, 1)[16:]  # the second chunk
    source = generator(0, "augmentation", 1, 16)
    images = task.train_images[indices.flatten()]
    images = augment.random_crop_flip(images, source, padding=1, flip=True)
    draws = seed(0, "policy", 1, 16)
    images = augment.transform(images, draws, policy="trivialaugment")
    images = augment.normalise(images, task.mean, task.std)
    images = augment.cutout(images, source, size=3, probability=0.5)
    for index, (inputs, shares) in enumerate(augmented(task, 1, 16), 16):
        batch = images.split(64)[index - 16], task.train_labels[indices[index - 16]]
        alphas = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
        expected = augment.mix(*batch, seed(0, "mix", 1, index), **alphas, classes=10)
        assert torch.equal(inputs, expected[0])
        assert torch.equal(shares, expected[1])


def test_without_policy_and_mixture_nothing_else_is_drawn():
    task, _ = task_of("--batch-size", "64")
    images, labels = next(augmented(task, 0))
    source, indices = generator(0, "augmentation", 0, 0), order(task, 0)[:16]
    chunk = task.train_images[indices.flatten()]
    crops = augment.random_crop_flip(chunk, source, padding=1, flip=True)[:64]
    assert torch.equal(images, augment.normalise(crops, task.mean, task.std))
    assert torch.equal(labels, task.train_labels[indices[0]])


@pytest.mark.parametrize(
    "flags",
    [
        "--label-smoothing 0.1",
        "--label-smoothing 0.1 --method esam",
        "--method per_micro_batch(sam,48)",
        "--method sub_batch_ascent(sam)",
        "--precision bf16",
        "--precision fp16",
    ],
)
def test_mixed_labels_go_through_loss_method_and_precision(flags):
    task, state = task_of(*STRONG.split(), *flags.split())
    batch = next(augmented(task, 0))
    _, metrics = loop.step(task, state, 0, batch)
    rows = len(metrics.outputs)
    shares = batch[1][:rows] * (1 - task.config.descent.label_smoothing)
    shares += task.config.descent.label_smoothing / 10
    expected = -(shares * metrics.outputs.float().log_softmax(1)).sum(1).mean()
    assert metrics.finite
    assert_close(metrics.loss.float(), expected, rtol=0.01, atol=0)


def test_a_step_has_the_dials_of_its_position():
    seen = []

    def spying(state, batch, **dials):
        seen.append(dials)
        return state, None

    task, state = task_of("--rho", "0.2", "--schedule", "cosine")
    loop.step(task._replace(update=spying), state, 3, None)
    assert seen == [{"rho": 0.2, "lr": task.lr(3)}]
    task, state = task_of("--rho", "0.2", "--rho-schedule", "linear")
    loop.step(task._replace(update=spying), state, 11, None)
    assert seen[1]["rho"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("flags", "compiled", "why"),
    [
        ("", "no", "no: 22 steps on a CPU would not pay for it (--compile yes)"),
        ("--epochs 2000", "yes", "yes: 22,000 steps on a CPU pay for it"),
        ("--epochs 900", "yes", "yes: 9,900 steps on a CPU pay for it"),
        ("--epochs 900 --sam-last 0.9", "no", "no: 9,900 steps on a CPU would not pay"),
        ("--epochs 900 --sam-last 0.9 --rho 0", "yes", "yes: 9,900 steps on a CPU pay"),
        ("--epochs 900 --model wrn-28-10", "no", "no: a CPU spends its time in the convol"),
        ("--compile yes", "yes", "yes"),
        ("--compile no --epochs 2000", "no", "no"),
    ],
)
def test_a_step_is_compiled_where_the_run_pays_for_it(flags, compiled, why):
    task, _ = task_of("--device", "cpu", *flags.split())
    assert (task.config.arithmetic.compile, task.compiling[: len(why)]) == (compiled, why)
    assert isinstance(task.update, CompiledUpdate) == (compiled == "yes")


def test_without_a_compiler_the_banner_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    task, _ = task_of("--device", "cpu", "--compile", "yes")
    assert task.compiling == "no: found no C++ compiler (no-such-compiler)"
    assert task.config.arithmetic.compile == "no"


def test_an_epoch_shows_every_image_at_most_once_in_another_order_each_time():
    task, _ = task_of()
    first, second = order(task, 0), order(task, 1)
    assert first.shape == (11, 128)
    assert len(first.unique()) == first.numel()
    assert torch.equal(first, order(task, 0))
    assert not torch.equal(first, second)


def test_evaluation_is_that_of_the_module_over_all_images():
    task, _ = task_of()
    state, _ = after_two_steps()
    # 1,437 images are two whole batches of evaluation and a smaller one.
    everything = Split("train", task.train_images, task.train_labels)
    loss, accuracy = loop.evaluate(task, state, everything)
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
    (task, _), labels = task_of(), torch.tensor([0, 0])
    meter, again = Meter(task), Meter(task)
    meter.add(metrics(1.0), labels)
    meter.add(metrics(float("nan"), finite=False), labels)
    meter.add(metrics(4.0), labels)
    means, steps = meter.read()
    assert steps == 2
    assert means["loss"] == 2.5
    assert means["accuracy"] == 50
    assert means["sharpness"] == 1
    kept = meter.kept()
    again.begin(kept)
    assert_close(again.sums, meter.sums)
    assert again.seconds > kept["seconds"] > 0


def train(task, state, path):
    """Train to the end; return the rows."""
    with RunDirectory.create(path, task.config) as run, watched() as signals:
        display, start = Display(), Training(state)
        keeper = Keeper(task, run.checkpoints(), display.warn)
        assert running.train(task, start, run, keeper, display, signals)
        return run.rows()


def test_an_epoch_without_a_finite_step_is_searched_from_its_first_one(tmp_path):
    task, state = task_of("--select", "loss", "--select-every", "1")
    batches, searched = [], []

    def update(state, batch, **dials):
        batches.append(batch[0])
        poison = float("nan") if len(batches) > 11 else 1.0
        return task.update(state, (poison * batch[0], batch[1]), **dials)

    def find_nonfinite(state, batch):
        searched.append((int(state.step), torch.initial_seed(), batch[0]))
        return "pass 2: the loss is nan"

    task = task._replace(find_nonfinite=find_nonfinite)
    said = "step 12, pass 2: the loss is nan: none of the 5 steps of epoch 2 had"
    with pytest.raises(errors.DivergedError, match=said):
        train(task._replace(update=update), state, tmp_path / "run")
    ((step, drawn, images),) = searched
    assert (step, drawn) == (12, seed(0, "dropout", 11))
    assert len(batches) == 11 + 5
    assert torch.equal(images, batches[11])


def test_skipped_steps_are_counted_in_the_row(tmp_path):
    task, state = task_of("--epochs", "1")
    taken = []

    def update(state, batch, **dials):
        taken.append(None)
        poison = float("nan") if len(taken) == 3 else 1.0
        return task.update(state, (poison * batch[0], batch[1]), **dials)

    (row,) = train(task._replace(update=update), state, tmp_path / "run")
    assert row["skipped_steps"] == 1
    assert row["train_loss"] > 0
    assert row["step"] == task.steps_per_epoch


def test_of_mixed_labels_the_larger_share_is_the_right_one():
    meter = Meter(task_of()[0])
    meter.add(metrics(1.0), torch.tensor([[0.4, 0.6], [0.3, 0.7]]))
    assert meter.read()[0]["accuracy"] == 50
    meter.add(metrics(1.0), torch.tensor([[0.6, 0.4], [0.3, 0.7]]))
    assert meter.read()[0]["accuracy"] == 75


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_wrong_wherever_accuracy_is_counted(score):
    def loss_fn(params, buffers, batch):
        return params["w"].sum(), samfn.Aux(batch[0], buffers)

    outputs, labels = torch.tensor([[score, score], [0.0, 1.0]]), torch.tensor([0, 1])
    params, batches = {"w": torch.zeros(1)}, [(outputs, labels)]
    measures = {"accuracy": library.accuracy}
    found = library.evaluate(params, {}, batches, loss_fn=loss_fn, measures=measures)
    meter, one = Meter(task_of()[0]), torch.tensor(1.0)
    step = samfn.Metrics(one, outputs, one, one, one, one, torch.tensor(True), None)
    meter.add(step, labels)
    way = samfn.measure.landscape.line(params, {}, batches, params, [0.0], loss_fn=loss_fn)
    counted = found["accuracy"], meter.read()[0]["accuracy"], float(way.accuracy)
    assert counted == (50, 50, 50)


@pytest.mark.parametrize("flags", ["--rho 0", "--rho 0.1", "--sam-last 0.25"])
def test_a_run_without_end_begins_at_once(flags, monkeypatch):
    task, state = task_of("--epochs", str(2**62), "--compile", "no", *flags.split())
    steps = 2**62 * task.steps_per_epoch
    start = first_perturbed(task)
    assert start == {"--rho 0": steps, "--rho 0.1": 0}.get(flags, steps - steps // 4)
    if 0 < start < steps:
        assert task.rho(start - 1) == 0 < task.rho(start)
    monkeypatch.setattr(length, "seconds_an_image", lambda task, state: 1.0)
    assert length.predicted(task, state) > steps
    running.describe(task)
    taken = []
    monkeypatch.setattr(loop, "step", lambda *args: taken.append(args[-1]))
    monkeypatch.setattr(loop, "keep_compiled", lambda warn: None)
    task = task._replace(config=task.config.replace(compile="yes"))
    loop.prepare(task, Training(state), Display())
    assert taken == ([start, 0] if 0 < start < steps else [0])


@pytest.mark.parametrize(("padding", "most"), [("zeros", 8), ("reflect", 7)])
def test_images_are_shifted_by_no_more_than_their_side(padding, most):
    flags = ["--padding", padding, "--crop-padding"]
    task, _ = task_of(*flags, str(most))
    assert next(augmented(task, 0))[0].shape[2:] == (8, 8)
    with pytest.raises(ConfigError, match=f"--crop-padding: .* at most {most}, .* got"):
        task_of(*flags, str(most + 1))


def test_a_method_of_parameters_that_are_not_there_is_an_error_of_its_flag():
    with pytest.raises(ConfigError, match=r"--method: on_parameters: 'fc\.\*' is none of"):
        task_of("--method", "on_parameters(sam, 'fc.*')")
