"""Airbench through the recipe: a run that was stopped goes on, and others read it."""

import re
import time

import pytest
import torch
from PIL import Image
from torch import nn

import samfn
from recipes import compare, landscape, sharpness
from recipes.cifar_wrn import main
from recipes.data import augment
from recipes.models import airbench
from recipes.settings.presets import PRESETS
from recipes.settings.resolve import configure
from recipes.terminal.console import Display
from recipes.train import length, running
from recipes.train.batches import augmented
from recipes.train.build import assemble, generator, read_data
from recipes.train.pretrained import begin
from samfn.gradient import evaluate
from tests.recipes.test_recipe import equal, rows, stop_after, tensors, without_times

IMAGES, STEPS = 24, 4  # in training; in an epoch
FLAGS = "--preset airbench94 --widths 4 6 6 --batch-size 6 --epochs 2 --lr 0.1 --views 2"
FLAGS += " --whitening-epochs 1 --lookahead-every 3 --compile no"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return class folders of noise of 12x12 pixels, brighter in one class."""
    root, source = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", IMAGES // 2), ("test", 5)):
        for level, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(100, (12, 12, 3), generator=source) + 100 * level
                picture = Image.fromarray(pixels.to(torch.uint8).numpy())
                picture.save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def train(images):
    def start(run, *flags):
        return main(
            ["--data-dir", str(images), *FLAGS.split(), "--output", str(run), *flags]
        )

    return start


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 7])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch, train, steps):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole) == 0
    assert stop_after(steps, parts, monkeypatch, start=train) == 130
    assert main(["--resume", str(parts)]) == 0
    assert equal(tensors(whole), tensors(parts))
    assert equal(tensors(whole, "best"), tensors(parts, "best"))
    assert without_times(whole) == without_times(parts)
    kept = tensors(whole)
    slow = kept["metadata/memory.lookahead/params/head.linear.weight"]
    assert torch.equal(kept["params/head.linear.weight"], slow)  # the end is theirs


def test_a_run_is_the_loop_that_is_published(tmp_path, images, train):
    """Written with PyTorch's own SGD: decoupled rates of summed losses, and Lookahead."""
    flags = ["--rho", "0", "--precision", "float32", "--lr", "1"]
    assert train(tmp_path / "run", *flags) == 0
    config = configure(["--data-dir", str(images), *FLAGS.split(), *flags])
    task, fresh = assemble(config, read_data(config, lambda i, *_: i, print))
    samfn.load(task.model, *begin(task, fresh, Display())[:2])
    model, size, total = task.model.train(), config.batch_size, 2 * STEPS
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Published are a rate of 11.5 and a decay of 0.0153 for 1,024 examples, apart from each
    # other, and the rate times 1 + 1 / (1 - momentum); here they are of sums.
    assert PRESETS["airbench94"]["lr"] == pytest.approx(11.5 / (1 + 1 / (1 - 0.85)))
    rate, decay = config.lr / size, 0.0153 / 11.5 * size
    faster = {"lr": 64 * rate, "weight_decay": decay / 64}
    optimizer = torch.optim.SGD(
        [
            {"params": [p for n, p in named.items() if "norm" in n], **faster},
            {"params": [p for n, p in named.items() if "norm" not in n]},
        ],
        lr=rate,
        weight_decay=decay,
        momentum=0.85,
        nesterov=True,
    )
    peak = int(0.23 * total)

    def triangle(step):
        if step < peak:
            return 0.2 + 0.8 * step / peak
        return 1 - 0.93 * (step - peak) / (total - peak)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle)
    slow = {n: t.clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    taken = 0
    for epoch in range(2):
        model.whiten.bias.requires_grad_(epoch < 1)
        for inputs, labels in augmented(task, epoch):
            loss = nn.functional.cross_entropy(
                model(inputs), labels, label_smoothing=0.2, reduction="sum"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            taken += 1
            stay = 0.95**3 * (taken / total) ** 3
            for name, fast in model.state_dict().items():
                if name in slow and taken % 3 == 0:
                    fast.copy_(slow[name].lerp_(fast, 1 - stay))
                elif name in slow and taken == total:
                    fast.copy_(slow[name])
    found = tensors(tmp_path / "run")
    kept = {
        n.split("/", 1)[-1]: t for n, t in found.items() if n[:6] in ("params", "buffer")
    }
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(kept[name], wanted, rtol=1e-4, atol=1e-5)
    moved = [(kept[n] - w).abs().max() for n, w in fresh.params.items()]
    assert min(moved) > 1e-3


def test_the_filter_is_fitted_once_and_stays(tmp_path, images, train):
    assert train(tmp_path / "run") == 0
    config = configure(["--data-dir", str(images), *FLAGS.split()])
    task, fresh = assemble(config, read_data(config, lambda i, *_: i, print))
    state = begin(task, fresh, Display())
    drawn = torch.randperm(IMAGES, generator=generator(0, "whitening"))
    seen = augment.normalise(task.train_images[drawn], task.mean, task.std)
    filters = airbench.whitening(seen)
    assert not torch.equal(fresh.buffers[airbench.WHITENING], filters)
    assert torch.equal(state.buffers[airbench.WHITENING], filters)
    ended = tensors(tmp_path / "run")
    assert torch.equal(ended[f"buffers/{airbench.WHITENING}"], filters)
    # Its bias moves in the first epoch, and not in the second.
    (first,) = {row["step"] for row in rows(tmp_path / "run") if row["epoch"] == 1}
    assert first == STEPS
    assert ended[f"params/{airbench.WHITENING_BIAS}"].any()


def test_a_bias_that_has_trained_enough_stays(tmp_path, monkeypatch, train):
    run = tmp_path / "run"
    flags = ["--lookahead", "0.0"]  # which takes the weights as they are
    assert stop_after(STEPS + 1, run, monkeypatch, *flags, start=train) == 130
    then = tensors(run)
    assert main(["--resume", str(run)]) == 0
    now = tensors(run)
    name = f"params/{airbench.WHITENING_BIAS}"
    assert torch.equal(now[name], then[name])
    other = "params/head.linear.weight"
    assert not torch.equal(now[other], then[other])


def test_what_reads_runs_reads_those_of_airbench(tmp_path, train, capsys):
    run = tmp_path / "run"
    assert train(run, "--optimizer", "muon") == 0
    assert rows(run)[-1]["skipped_steps"] == 0
    assert main(["--eval-only", "--resume", str(run)]) == 0
    best = max(rows(run), key=lambda row: row["test_accuracy"])
    said = f"best epoch {best['epoch']}: test accuracy {best['test_accuracy']:.2f} %"
    assert said in capsys.readouterr().out
    few = ["--images", "10"]
    assert sharpness.main([str(run), *few, "--iterations", "2", "--probes", "2"]) == 0
    assert landscape.main([str(run), *few, "--points", "5"]) == 0
    again = tmp_path / "again"
    assert train(again, "--seed", "1", "--rho", "0") == 0
    assert compare.main([str(run), str(again), "--no-sharpness"]) == 0


def test_a_run_says_its_precision_and_about_how_long_it_takes(
    tmp_path, train, capsys, monkeypatch
):
    monkeypatch.setattr(running, "emulated", lambda dtype, device: True)
    monkeypatch.setattr(length, "seconds_an_image", lambda task, state: 2.0)
    flags = ["--rho", "0.1", "--sam-last", "0.5", "--precision", "float32", "--dry-run"]
    assert train(tmp_path / "run", *flags) == 0
    out = capsys.readouterr().out
    # 48 images in 8 steps, 24 of them twice, and a third of 10 in two views, twice.
    assert re.search(rf"time +about {2 * (48 + 24 + 40 / 3) / 60:.0f} min", out)
    assert re.search(r"device +cpu, float32 as this CPU has no instructions for bf16", out)
    assert out.index("about 3 min") < out.index("training and")


def test_the_time_of_an_image_is_that_of_a_gradient(images):
    config = configure(["--data-dir", str(images), *FLAGS.split()])
    task, state = assemble(config, read_data(config, lambda i, *_: i, print))
    assert 0 < length.seconds_an_image(task, state) < 1


def test_the_first_call_of_a_shape_which_makes_its_kernels_is_not_timed(
    images, monkeypatch
):
    config = configure(["--data-dir", str(images), *FLAGS.split()])
    task, state = assemble(config, read_data(config, lambda i, *_: i, print))
    seen = set()

    def slow_at_first(loss_fn, params, buffers, batch):
        if batch[0].shape not in seen:
            time.sleep(2 * length.LONG_ENOUGH)
        seen.add(batch[0].shape)
        return evaluate(loss_fn, params, buffers, batch)

    monkeypatch.setattr(length, "evaluate", slow_at_first)
    assert length.seconds_an_image(task, state) < length.LONG_ENOUGH / 2
    assert len(seen) > 1
