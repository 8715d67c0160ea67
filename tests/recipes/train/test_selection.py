"""Images that an epoch of the recipe leaves out, and what comes of it."""

import json
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import samfn
from recipes.cifar_wrn import main
from recipes.data import augment
from recipes.data.sources import load
from recipes.settings.resolve import configure
from recipes.train import selection
from recipes.train.batches import StopError, augmented, order
from recipes.train.build import assemble
from samfn.gradient import evaluate
from samfn.training.loop import Training

SMALL = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "128", "--no-flip"]
EASY = ["--select", "easy-skipped", "--select-every", "1", "--easy-scans", "1"]
DIGITS = load("digits", None)


def task_of(*flags):
    return assemble(configure([*SMALL, *flags]), DIGITS)


def never():
    return False


def scanned(task, state, memory=None):
    task.model.eval()
    return selection.scan(task, memory or {}, state, task.config.rho, never)


def clean_loss(task, params, buffers, images, labels):
    inputs = augment.normalise(images, task.mean, task.std)
    leaves = {name: w.clone().requires_grad_() for name, w in params.items()}
    outputs = torch.func.functional_call(task.model, leaves | buffers, (inputs,))
    return F.cross_entropy(outputs, labels, reduction="none"), leaves


def test_before_the_first_scan_an_epoch_is_of_all_images():
    task, state = task_of(*EASY)
    assert torch.equal(selection.chosen(task, Training(state)), torch.arange(1437))


def test_easy_images_are_left_out_but_for_some_that_come_back_in_turn():
    task, state = task_of(*EASY, "--easy-replay", "0.5")
    counts = torch.zeros(1437, dtype=torch.int8)
    counts[:1000] = 1
    epochs = [
        selection.chosen(task, Training(state, epoch=e, memory={"easy_counts": counts}))
        for e in (3, 3, 4)
    ]
    for found in epochs:
        assert len(found) == 437 + 500
        assert {*range(1000, 1437)} < {*found.tolist()}
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_fewer_images_than_a_batch_are_no_epoch():
    task, state = task_of(*EASY, "--easy-replay", "0")
    counts = torch.ones(1437, dtype=torch.int8)
    for left, expected in ((128, 128), (127, 1437)):
        counts[:left] = 0
        counts[left:] = 1
        training = Training(state, memory={"easy_counts": counts})
        assert len(selection.chosen(task, training)) == expected


def test_a_run_that_is_resumed_without_its_selection_has_all_images():
    task, state = task_of()
    memory = {"easy_counts": torch.full((1437,), 5, dtype=torch.int8)}
    assert len(selection.chosen(task, Training(state, epoch=1, memory=memory))) == 1437
    task, state = task_of("--select", "loss")
    assert len(selection.chosen(task, Training(state, epoch=1, memory=memory))) == 1437


def test_epochs_before_a_selection_spared_nothing():
    task, _ = task_of(*EASY)
    first = {"step": 11, "seconds": 2.0}
    second = {"step": 16, "seconds": 1.0, "trained_images": 700, "scan_seconds": 0.5}
    said = selection.summarise(task, [first, second])
    assert said == "25.6% of the images and 6 steps, about 1.1 s; scans took 0.5 s"


def test_a_share_is_drawn_that_prefers_high_scores():
    task, state = task_of("--select", "loss", "--select-share", "0.25")
    scores = torch.full((1437,), 0.01)
    scores[:359] = 100.0
    training = Training(state, epoch=1, memory={"scores": scores})
    found = selection.chosen(task, training)
    assert len(found) == 359
    assert len(found.unique()) == 359
    assert (found < 359).sum() > 250


@pytest.mark.parametrize(
    ("select", "every", "epochs"),
    [("all", 2, []), ("loss", 2, [1, 3]), ("loss", 1, [0, 1, 2, 3]), ("loss", 5, [])],
)
def test_scans_end_every_few_epochs_but_not_the_last(select, every, epochs):
    flags = ["--select", select, "--epochs", "5"]
    flags += ["--select-every", str(every)] if select != "all" else []
    config = configure([*SMALL, *flags])
    assert [e for e in range(5) if selection.is_due(config, e)] == epochs


def test_a_scan_by_loss_sees_every_image_as_it_is():
    task, state = task_of("--select", "loss", "--crop-padding", "2", "--cutout", "4")
    found = scanned(task, state)["scores"]
    given = state.params, state.buffers
    expected, _ = clean_loss(task, *given, task.train_images, task.train_labels)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_scan_by_sharpness_sees_the_growth_of_each_loss_within_its_batch():
    task, state = task_of("--select", "sharpness", "--rho", "0.2")
    found = scanned(task, state)["scores"]
    assert found.shape == (1437,)
    images, labels = task.train_images[:500], task.train_labels[:500]  # a batch of a scan
    losses, leaves = clean_loss(task, state.params, state.buffers, images, labels)
    grads = torch.autograd.grad(losses.mean(), [*leaves.values()])
    named = dict(zip(leaves, grads, strict=True))
    there = samfn.perturb(state.params, named, 0.2)
    high, _ = clean_loss(task, there, state.buffers, images, labels)
    expected = (high - losses).detach()
    torch.testing.assert_close(found[:500], expected, rtol=1e-3, atol=1e-4)
    assert found.mean() > 0


def test_scans_count_on_from_those_before():
    task, state = task_of(*EASY[:4], "--easy-scans", "2", "--easy-confidence", "0.1")
    once = scanned(task, state)
    twice = scanned(task, state, once)
    easy = once["easy_counts"] == 1
    assert 0 < easy.sum() < 1437
    assert torch.equal(twice["easy_counts"], 2 * easy.to(torch.int8))


def test_a_scan_that_is_asked_to_end_keeps_nothing():
    task, state = task_of(*EASY)
    memory = {}
    with pytest.raises(StopError):
        selection.scan(task, memory, state, 0.05, lambda: True)
    assert memory == {}


def test_an_epoch_of_some_images_holds_these_in_the_order_of_all():
    task, _ = task_of()
    among = torch.arange(300, 1000)
    rows = order(task, 2, among)
    assert rows.shape == (5, 128)
    everyone = order(task, 2).flatten()
    expected = [i for i in everyone.tolist() if 300 <= i < 1000]
    assert rows.flatten().tolist()[: len(expected)] == expected[: 5 * 128]
    assert len([*augmented(task, 2, 0, among)]) == 5


def test_schedules_go_by_epochs_however_many_images_these_have(tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*SMALL, *EASY, "--easy-confidence", "0.1", "--easy-replay", "0"]
    assert main([*flags, "--epochs", "4", "--output", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    task, _ = task_of(*EASY, "--epochs", "4")
    steps = [b["step"] - a["step"] for a, b in pairwise(rows)]
    assert rows[0]["step"] == 11
    assert min(steps) < 11
    for row, taken in zip(rows, [11, *steps], strict=True):
        assert row["trained_images"] // 128 == taken
        place = (row["epoch"] - 1) * 11 + (taken - 1) * 11 // taken
        assert row["lr"] == task.lr(place)
        assert row["skipped_steps"] == 0
        assert (row["scan_seconds"] > 0) == (row["epoch"] < 4)
    saved = 44 - rows[-1]["step"]
    said = " ".join(capsys.readouterr().out.split())
    share = 1 - sum(row["trained_images"] for row in rows) / (4 * 1437)
    assert f"skipped {share:.1%} of the images and {saved} steps" in said


def test_with_nothing_skipped_the_run_is_that_of_all_images(tmp_path):
    runs = {"all": [], "none skipped": [*EASY, "--easy-confidence", "1"]}
    for name, flags in runs.items():
        out = ["--epochs", "2", "--output", str(tmp_path / name)]
        assert main([*SMALL, *flags, *out]) == 0
    one, other = (
        samfn.restore(sorted((tmp_path / name / "checkpoints").glob("*"))[-1], like)[0]
        for name in runs
        for like in [task_of()[1]]
    )
    assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)


def test_evaluation_gives_each_loss():
    task, state = task_of()
    images = augment.normalise(task.test.images[:8], task.mean, task.std)
    batch = images, task.test.labels[:8]
    seen = evaluate(task.eval_fn, state.params, state.buffers, batch)
    assert seen.losses.shape == (8,)
    torch.testing.assert_close(seen.losses.mean(), seen.loss)
