"""What a loss is a mean over is known, told, or an error; it is never guessed wrong."""

import itertools
import random
from collections import UserDict
from functools import partial, wraps

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from samfn.measure import landscape, per_example
from samfn.modules import additive
from samfn.training import loop
from tests.reference import NextToken, tokens

PAD = 1


def problem(ignored=PAD, examples=9):
    """Return a model, and a batch of which the last third is ignored."""
    torch.manual_seed(0)
    targets = torch.tensor([0, 2, 2, 0, 2, 0, ignored, ignored, ignored])[:examples]
    return nn.Linear(4, 3).double(), (torch.randn(examples, 4).double(), targets)


def shifted(ignored, outputs, targets):
    """Return a loss of all examples but the first, as of the next token."""
    return F.cross_entropy(outputs[:-1], targets[1:].clone(), ignore_index=ignored)


def masked(outputs, targets):
    """Return a loss that leaves out what it should by arithmetic of its own."""
    kept = (targets != PAD).double()
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (losses * kept).sum() / kept.sum()


def stepped(model, batch, criterion, method=None, **options):
    method = method or samfn.sam()
    loss_fn = samfn.supervised(model, criterion, **options)
    optimizer = samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    return samfn.sam_update(state, batch, **given, lr=0.1)


CRITERIA = {
    "lambda": lambda out, y: F.cross_entropy(out, y, ignore_index=PAD),
    "other shape": lambda out, y: F.nll_loss(
        out.log_softmax(1), y.view(-1, 1).squeeze(1), ignore_index=PAD
    ),
    "with a penalty": lambda out, y: (
        F.cross_entropy(out, y, ignore_index=PAD, label_smoothing=0.1) + 1
    ),
    "of the same name": partial(torch.compiler.disable(F.cross_entropy), ignore_index=PAD),
    "of the same module": wraps(F.l1_loss)(partial(F.cross_entropy, ignore_index=PAD)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_loss_of_classes_in_a_function_is_weighed_by_what_counts(name):
    criterion = CRITERIA[name]
    model, batch = problem()
    whole, seen = stepped(model, batch, criterion)
    parts, mean = stepped(model, batch, criterion, samfn.accumulated(samfn.sam(), 2))
    assert_close(dict(parts.params), dict(whole.params))
    assert_close(mean.loss, seen.loss)
    apart = samfn.per_micro_batch(samfn.sam(), 2)
    assert_close(stepped(model, batch, criterion, apart)[1].loss, seen.loss)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_mean_over_batches_is_that_of_all_batches_as_one(name):
    model, batch = problem()
    loss_fn = samfn.supervised(model.eval(), CRITERIA[name])
    params, buffers = samfn.split(model)
    whole = samfn.evaluate(loss_fn, params, buffers, batch)
    parts = [*zip(*(part.split(2) for part in batch), strict=True)]
    for batches in (parts, parts[::-1]):
        fresh = samfn.supervised(model, CRITERIA[name])
        found = loop.evaluate(params, buffers, batches, loss_fn=fresh)
        assert found["loss"] == pytest.approx(whole.loss.item())
        fresh = samfn.supervised(model, CRITERIA[name])
        loss, grads = samfn.Objective(fresh, buffers, batches).gradient(params)
        assert loss.item() == pytest.approx(whole.loss.item())
        assert_close(grads, whole.grads)
        fresh = samfn.supervised(model, CRITERIA[name])
        line = landscape.line(params, buffers, batches, params, [0.0], loss_fn=fresh)
        assert line.loss.item() == pytest.approx(whole.loss.item())


@pytest.mark.parametrize(
    "criterion",
    [
        partial(shifted, PAD),
        lambda out, y: F.cross_entropy(out, y, weight=torch.ones(3).double()),
    ],
)
def test_what_cannot_be_counted_from_a_batch_is_an_error_where_it_matters(criterion):
    model, batch = problem()
    stepped(model, batch, criterion)
    with pytest.raises(ValueError, match=r"weigh=lambda batch: "):
        stepped(model, batch, criterion, samfn.accumulated(samfn.sam(), 3))
    loss_fn = samfn.supervised(model, criterion)
    with pytest.raises(ValueError, match=r"weigh=lambda batch: "):
        loop.evaluate(*samfn.split(model), [batch], loss_fn=loss_fn)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(reduction="sum"),
        partial(F.mse_loss, reduction="sum"),
        lambda out, y: F.mse_loss(out, y, reduction="sum"),
        lambda out, y: (out - y).square().sum(),
        lambda out, y: F.cross_entropy(out, y.argmax(1), reduction="sum"),
    ],
)
def test_a_sum_is_never_taken_for_a_mean(criterion):
    model, (inputs, targets) = problem(ignored=0)
    batch = inputs, F.one_hot(targets, 3).double()
    stepped(model, batch, criterion)
    for method in (samfn.accumulated, samfn.per_micro_batch):
        with pytest.raises(ValueError, match=r"expected a mean .* got their sum"):
            stepped(model, batch, criterion, method(samfn.sam(), 4))
    told = {"weigh": lambda batch: 1}
    stepped(model, batch, criterion, samfn.accumulated(samfn.sam(), 4), **told)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: F.mse_loss(out, y, reduction="sum") / len(y),
        lambda out, y: torch.stack([F.mse_loss(out, y), out.square().mean()]).sum(),
        lambda out, y: F.kl_div(out.log_softmax(1), y, reduction="batchmean"),
    ],
)
def test_a_sum_that_is_a_mean_over_examples_is_one(criterion):
    model, (inputs, targets) = problem(ignored=0)
    batch = inputs, F.one_hot(targets, 3).double()
    whole, _ = stepped(model, batch, criterion)
    parts, _ = stepped(model, batch, criterion, samfn.accumulated(samfn.sam(), 4))
    assert_close(dict(parts.params), dict(whole.params))


@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: F.cross_entropy(out[y != PAD], y[y != PAD]),
        lambda out, y: F.cross_entropy(out, y, reduction="none")[y != PAD],
        lambda out, y: F.cross_entropy(out, y, reduction="none")[y != PAD].mean(),
        lambda out, y: out.square().mean(1).masked_select(y != PAD).mean(),
        lambda out, y: F.mse_loss(out[y != PAD, 0], y[y != PAD].double()),
        lambda out, y: F.binary_cross_entropy_with_logits(
            out[(y != PAD).nonzero(as_tuple=True)], F.one_hot(y, 3).double()[y != PAD]
        ),
        lambda out, y: (out[y != PAD] - 1).square().sum(1).mean(),
        lambda out, y: F.l1_loss(
            out[:, 0].index_select(0, (y != PAD).nonzero()[:, 0]), y[y != PAD].double()
        ),
        lambda out, y: -out.log_softmax(1)[:, 0][y != PAD].mean(),
        lambda out, y: out.square().mean(1).masked_select(y != PAD).mean() / 2 + 1,
        lambda out, y: out[y != PAD].square().mean(0).sum(),
        lambda out, y: F.mse_loss(out[y != PAD], F.one_hot(y[y != PAD], 3).double()),
        lambda out, y: F.kl_div(
            out[y != PAD], out[y != PAD].detach().exp(), reduction="batchmean"
        ),
        lambda out, y: out[y != PAD].square().sum() / len(y[y != PAD]),
        masked,
        lambda out, y: (
            (F.cross_entropy(out, y, ignore_index=PAD, reduction="none")).sum()
            / (y != PAD).sum().clamp(min=1)
        ),
        lambda out, y: (out[:, 0] * (y != PAD)).mean() / (y != PAD).double().mean(),
        lambda out, y: (out[:, 0] * (y != PAD)).sum() * (1 / (y != PAD).sum()),
        lambda out, y: (out[:, 0] * (y != PAD) / (y != PAD).sum()).sum(),
        lambda out, y: torch.where(y != PAD, out[:, 0], torch.nan).nanmean(),
    ],
)
def test_a_mean_over_what_a_mask_picks_is_an_error_where_it_matters(criterion):
    model, batch = problem()
    whole, _ = stepped(model, batch, criterion)
    method = samfn.accumulated(samfn.sam(), 5)
    with pytest.raises(ValueError, match=r"a mask picks, .* weigh=lambda batch: "):
        stepped(model, batch, criterion, method)
    told = {"weigh": lambda batch: (batch[1] != PAD).sum()}
    parts, _ = stepped(model, batch, criterion, method, **told)
    assert_close(dict(parts.params), dict(whole.params))


W = torch.tensor([1.0, 2.0, 5.0]).double()


def contrasted(out, y):
    """Return a loss that holds examples against each other, as SimCLR's."""
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


def dice(out, y):
    """Return Dice, of each class over the batch."""
    chances, wanted = out.softmax(1), F.one_hot(y, 3)
    return 1 - (2 * (chances * wanted).sum(0) / (chances.sum(0) + wanted.sum(0))).mean()


OF_BATCHES = {
    "a sum and a penalty": lambda out, y: (
        F.cross_entropy(out, y, reduction="sum") + out.square().sum()
    ),
    "minus a sum": lambda out, y: -out.log_softmax(1)[range(len(y)), y].sum(),
    "over a constant": lambda out, y: out.square().sum() / 9,
    "over a count that is a number": lambda out, y: (
        (F.cross_entropy(out, y, reduction="none") * (y != PAD)).sum()
        / (y != PAD).sum().item()
    ),
    "divided in place": lambda out, y: (
        (out[:, 0] * (y != PAD)).sum().div_((y != PAD).count_nonzero())
    ),
    "weights of classes": lambda out, y: (
        (F.cross_entropy(out, y, reduction="none") * W[y]).sum() / W[y].sum()
    ),
    "a root": lambda out, y: F.mse_loss(out[:, 0], y.double()).sqrt(),
    "Dice": dice,
    "examples against each other": contrasted,
    "half precision": lambda out, y: out.bfloat16().square().sum(),
    "it writes to outputs": lambda out, y: out.add_(1).square().sum(),
}


@pytest.mark.parametrize("name", OF_BATCHES)
def test_a_loss_of_which_parts_have_another_mean_is_an_error_where_it_matters(name):
    model, (inputs, targets) = problem()
    batch = inputs, targets.flip(0)
    criterion, method = OF_BATCHES[name], samfn.accumulated(samfn.sam(), 5)
    stepped(model, batch, criterion)
    with pytest.raises(ValueError, match="expected a mean"):
        stepped(model, batch, criterion, method)
    loss_fn = samfn.supervised(model, criterion)
    with pytest.raises(ValueError, match="expected a mean"):
        loop.evaluate(*samfn.split(model), [batch], loss_fn=loss_fn)
    stepped(model, batch, criterion, method, weigh=lambda batch: len(batch[0]))


def test_later_batches_may_show_it():
    model, (inputs, targets) = problem()
    criterion = OF_BATCHES["over a count that is a number"]
    loss_fn = samfn.supervised(model, criterion)
    given, few = samfn.split(model), (inputs[:6], targets[:6])
    loss_fn(*given, few)
    assert loss_fn.weigh(few) == 6
    loss_fn(*given, (inputs, targets))
    with pytest.raises(ValueError, match=r"expected a mean .* weigh=lambda batch: len"):
        loss_fn.weigh((inputs, targets))


class Remembering(nn.Module):
    """A mean over examples that keeps what it was called with, and draws numbers."""

    def __init__(self, fails):
        super().__init__()
        self.lengths, self.center, self.fails = [], torch.zeros(3).double(), fails

    def forward(self, outputs, targets):
        self.lengths.append(len(outputs))
        self.center.mul_(0.9).add_(outputs.detach().mean(0))
        drawn = random.random() + numpy.random.rand() + torch.rand(())
        if self.fails and len(outputs) < 72:
            raise ValueError("expected a whole batch")
        return outputs.square().mean() + 0 * drawn


def state_of(criterion):
    streams = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().sum()
    return [*criterion.lengths], criterion.center.clone(), streams


@pytest.mark.parametrize("fails", [False, True])
def test_who_looks_whether_a_loss_is_a_mean_leaves_no_traces(fails):
    model, (inputs, _) = problem()
    criterion, batch = Remembering(fails), (inputs.repeat(8, 1), torch.zeros(72))
    loss_fn = samfn.supervised(model, criterion)
    samfn.evaluate(loss_fn, *samfn.split(model), batch)
    assert criterion.lengths == [72]
    before = state_of(criterion)
    assert loss_fn.weigh(batch) == 72
    assert_close(state_of(criterion)[:2], before[:2], rtol=0, atol=0)
    assert state_of(criterion)[2] == before[2]


def test_nobody_looks_where_no_mean_is_taken():
    model, batch = problem()
    calls = itertools.count()

    def criterion(out, y):
        next(calls)
        return F.cross_entropy(out, y)

    stepped(model, batch, criterion)
    assert next(calls) == 2
    stepped(model, batch, criterion, samfn.accumulated(samfn.sam(), 5))
    assert next(calls) > 3 + 4


@pytest.mark.parametrize("rows", [3, 4])
def test_a_look_takes_some_rows_and_not_many_numbers(rows):
    wide = torch.zeros(64, additive.ENTRIES // rows - 1)
    batch = torch.zeros(64, 1), torch.zeros(64)[:, None][:, :0]
    found = additive.sample(wide, batch)
    assert (found is None) == (rows < additive.FEWEST)
    few, of = additive.sample(torch.zeros(64, 2), batch)
    assert len(few) == len(of[0]) == additive.ROWS
    assert additive.sample(torch.zeros(63, 2), batch) is None


MEANS = {
    "in narrower numbers within": lambda out, y: (
        F.cross_entropy(out.float(), y) + 1e-4 * out.logsumexp(-1).square().mean()
    ),
    "focal": lambda out, y: (
        (1 - out.softmax(1)[range(len(y)), y]).square()
        * F.cross_entropy(out, y, reduction="none")
    ).mean(),
    "labels first": lambda out, y: F.cross_entropy(
        out.reshape(-1, 3), y[:, None].expand(-1, 1).t().reshape(-1)
    ),
    "two tasks": lambda out, y: F.cross_entropy(out, y) + out.square().mean(),
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "of each example's own length": lambda out, y: (
        (out / (1 + y)[:, None]).square().sum(1) / (1 + y)
    ).mean(),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MEANS)
def test_means_over_examples_are_seen_to_be_that(name, dtype):
    for seed in range(8):
        model, (inputs, targets) = problem(ignored=0)
        torch.manual_seed(seed)
        batch = torch.randn_like(inputs).float(), targets
        loss_fn = samfn.supervised(model.float(), MEANS[name], dtype=dtype)
        loss_fn(*samfn.split(model), batch)
        assert loss_fn.weigh(batch) == 9


def test_time_is_not_taken_for_examples():
    def criterion(outputs, targets):  # (time, examples, classes) and (examples, time)
        return F.cross_entropy(outputs.reshape(-1, 3), targets.t().reshape(-1))

    model = nn.Linear(4, 3)
    inputs, targets = torch.randn(6, 6, 4), torch.randint(3, (6, 6))
    loss_fn = samfn.supervised(model, criterion)
    loss_fn(*samfn.split(model), (inputs, targets))
    assert loss_fn.weigh((inputs, targets)) == 36  # labels


@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: F.mse_loss(F.dropout(out, 0.5), F.one_hot(y, 3).double()),
        lambda out, y: out.square().mean() + torch.randn(()),
        lambda out, y: (out[:, 0] * torch.arange(9)).mean(),
        lambda out, y: out.view(9, 3).square().mean(),
        lambda out, y: (
            F.mse_loss(out, F.one_hot(y, 3).double(), reduction="sum") / len(y)
            + out.square().sum() / len(y)
        ),
    ],
)
def test_what_cannot_be_seen_of_a_criterion_is_not_held_against_it(criterion):
    model, (inputs, targets) = problem(ignored=0)
    loss_fn = samfn.supervised(model, criterion)
    loss_fn(*samfn.split(model), (inputs, targets))
    assert loss_fn.weigh((inputs, targets)) == 9


def test_rows_that_are_picked_one_for_each_example_are_examples():
    criterion = lambda out, y: F.mse_loss(out[out == out.amax(1, True)], y.double())  # noqa: E731
    model, batch = problem(ignored=0)
    whole, _ = stepped(model, batch, criterion)
    parts, _ = stepped(model, batch, criterion, samfn.accumulated(samfn.sam(), 4))
    assert_close(dict(parts.params), dict(whole.params))


def test_targets_that_were_changed_are_counted_until_some_may_be_ignored():
    method = samfn.accumulated(samfn.sam(), 3)
    criterion = lambda out, y: F.cross_entropy(out, (y + 1) - 1)  # noqa: E731
    stepped(*problem(ignored=0), criterion, method)
    with pytest.raises(ValueError, match="a mean over some of its targets"):
        stepped(*problem(ignored=-100), criterion, method)


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.int32, torch.int64, torch.float32, torch.float64]
)
def test_labels_in_a_column_are_counted_until_some_are_ignored(dtype):
    model, (inputs, labels) = problem(ignored=0)
    loss_fn = samfn.supervised(
        model, lambda out, columns: F.cross_entropy(out, columns[:, 0].long())
    )
    whole = torch.stack([labels, labels], 1).to(dtype)
    loss_fn(*samfn.split(model), (inputs, whole))
    assert loss_fn.weigh((inputs, whole)) == len(labels)
    whole[0] = -100
    with pytest.raises(ValueError, match="a mean over some of its targets"):
        loss_fn.weigh((inputs, whole))


@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: F.mse_loss(out, y) / out.new_ones(3).square().sum(),
        lambda out, y: F.mse_loss(out, y) * y.mean(),
        lambda out, y: F.mse_loss(out, y) + y.mean(),
    ],
)
def test_numbers_beside_a_mean_over_examples_leave_it_one(criterion):
    model, (inputs, targets) = problem(ignored=0)
    loss_fn = samfn.supervised(model, criterion)
    batch = inputs, F.one_hot(targets, 3).double()
    loss_fn(*samfn.split(model), batch)
    assert loss_fn.weigh(batch) == len(inputs)


@pytest.mark.parametrize("examples", [1, 4])
def test_a_mean_over_what_counts_in_each_example_is_one_over_examples(examples):
    def criterion(outputs, mask):
        return ((outputs * mask).sum(1) / mask.sum(1)).mean()

    mask = torch.tensor([[1.0, 1, 0]]).double().repeat(examples, 1)
    batch, model = (torch.randn(examples, 4).double(), mask), nn.Linear(4, 3).double()
    loss_fn = samfn.supervised(model, criterion)
    loss_fn(*samfn.split(model), batch)
    assert loss_fn.weigh(batch) == examples


@pytest.mark.parametrize("criterion", [masked, partial(shifted, PAD)])
def test_it_can_be_told(criterion):
    model, batch = problem()
    skipped = 0 if criterion is masked else 1

    def weigh(batch):
        return (batch[1][skipped:] != PAD).sum()

    loss_fn = samfn.supervised(model, criterion, weigh=weigh)
    assert loss_fn.weigh(batch) == 6 - skipped
    if criterion is masked:
        whole, _ = stepped(model, batch, criterion)
        method = samfn.accumulated(samfn.sam(), 2)
        parts, _ = stepped(model, batch, criterion, method, weigh=weigh)
        assert_close(dict(parts.params), dict(whole.params))


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(ignore_index=PAD), CRITERIA["lambda"]]
)
def test_an_example_that_is_left_out_counts_in_no_accuracy_and_is_easy(criterion):
    model, (inputs, targets) = problem()
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model.eval(), criterion)
    with torch.no_grad():
        right = (model(inputs).argmax(1) == targets)[:6].double().mean().item()
    batches = [*zip(inputs.split(4), targets.split(4), strict=True)]
    measures = {"right": loop.accuracy}
    given = params, buffers, batches
    found = loop.evaluate(*given, loss_fn=loss_fn, measures=measures)
    assert found["right"] == pytest.approx(100 * right)
    line = landscape.line(*given, params, [0.0], loss_fn=loss_fn)
    assert line.accuracy.item() == pytest.approx(100 * right)
    assert per_example.easy(*given, loss_fn=loss_fn)[6:].all()


def test_bytes_are_never_taken_for_the_number_that_is_ignored():
    images, classes = torch.full((4, 2), 156, dtype=torch.uint8), torch.arange(4) % 2

    class Opening(nn.Linear):
        def forward(self, x):
            return super().forward(x / 255)

    criterion = lambda out, y: F.cross_entropy(out, y.clone())  # noqa: E731
    method = samfn.accumulated(samfn.sam(), 2)
    stepped(Opening(2, 2), (images, classes), criterion, method)
    loss_fn = samfn.supervised(nn.Linear(2, 200), F.cross_entropy)
    assert loss_fn.weigh((torch.ones(4, 2), images[:, 0])) == 4


def test_classes_in_bytes_have_the_weights_of_their_numbers():
    model, (inputs, _) = problem()
    targets = torch.tensor([0, 2, 2, 0, 2, 0, 1, 1, 1])
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 4.0]).double())
    loss_fn = samfn.supervised(model, criterion)
    assert loss_fn.weigh((inputs, targets)) == 3 * 1 + 3 * 2 + 3 * 4
    assert loss_fn.weigh((inputs, targets.to(torch.uint8))) == 3 * 1 + 3 * 2 + 3 * 4


def test_a_graph_does_not_guess_what_no_pass_has_shown():
    method = samfn.accumulated(samfn.sam(), 3)
    model, batch = problem()
    whole, _ = stepped(model, batch, CRITERIA["lambda"], method)
    loss_fn, optimizer = samfn.supervised(model, CRITERIA["lambda"]), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    step = torch.compile(samfn.sam_update, backend="eager")
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    with pytest.raises(RuntimeError, match="no pass has shown yet what this criterion's"):
        step(state, batch, **given, lr=torch.tensor(0.1))
    samfn.evaluate(loss_fn, state.params, state.buffers, batch)
    torch.compiler.reset()  # PyTorch 2.11 goes on with half of the step that failed.
    found, _ = step(state, batch, **given, lr=torch.tensor(0.1))
    assert_close(dict(found.params), dict(whole.params))


@pytest.mark.parametrize("own", [False, True])
def test_a_compiled_step_weighs_alike(own):
    method = samfn.accumulated(samfn.sam(), 3)
    model, batch, criterion = *problem(), CRITERIA["lambda"]
    if own:
        model, batch, criterion = NextToken(), UserDict(tokens()), None
    whole, _ = stepped(model, batch, criterion)
    loss_fn, optimizer = samfn.supervised(model, criterion), samfn.sgd()
    step = samfn.compile_update(
        loss_fn=loss_fn,
        optimizer=optimizer,
        method=method,
        plan="whole",
        backend="aot_eager",
    )
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    found, _ = step(state, batch, rho=0.05, lr=0.1)
    assert step.plan == "whole"
    assert_close(dict(found.params), dict(whole.params))


LABELS = {
    "as they are": lambda y: y,
    "padded": lambda y: F.pad(y, (0, 1), value=-100)[..., 1:].contiguous(),
    "cut": lambda y: y[:, 1:].reshape(-1).clone(),
    "padded late": lambda y: F.pad(y.long()[:, 1:], (0, 1), value=-100),
}
OTHERS = {
    "written to": lambda y: y.masked_fill_(y == 3, -100),
    "written to a copy": lambda y: y[:, 1:].clone().masked_fill_(y[:, 1:] == 3, -100),
    "the other end": lambda y: y[:, :-1],
    "some steps": lambda y: y[:, 1:4],
    "two left out": lambda y: y[:, 2:],
    "by columns": lambda y: y.t()[:, 1:],
    "flat": lambda y: y.flatten()[1:],
    "other rows": lambda y: y.view(-1, 4).clone()[:, 1:],
    "padded with a class": lambda y: F.pad(y, (0, 1), value=2)[:, 1:],
}


class Labelled(nn.Module):
    """Scores for whatever its labels are."""

    def __init__(self, change):
        super().__init__()
        self.scores, self._change = nn.Parameter(torch.arange(5.0).double()), change

    def forward(self, labels):
        labels = self._change(labels).reshape(-1)
        return F.cross_entropy(self.scores.expand(len(labels), 5), labels)


def labelled():
    labels = torch.arange(36).reshape(6, 6) * 7 % 5
    labels[0, 2:], labels[2], labels[4, :5] = -100, -100, -100
    return labels


@pytest.mark.parametrize("name", LABELS)
def test_labels_in_a_batch_are_counted_as_the_model_makes_them(name):
    labels, model = labelled(), Labelled(LABELS[name])
    whole, seen = stepped(model, {"labels": labels}, None)
    for method in (samfn.accumulated, samfn.per_micro_batch):
        parts, mean = stepped(model, {"labels": labels}, None, method(samfn.sam(), 2))
        assert_close(mean.loss, seen.loss)
    parts, _ = stepped(model, {"labels": labels}, None, samfn.accumulated(samfn.sam(), 2))
    assert_close(dict(parts.params), dict(whole.params))
    loss_fn = samfn.supervised(model)
    samfn.evaluate(loss_fn, *samfn.split(model), {"labels": labels})
    longer = {"other": 1, "labels": torch.cat([labels, labels], 1)}
    assert loss_fn.weigh(longer) == (LABELS[name](longer["labels"]) != -100).sum()
    assert loss_fn.counts(longer).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("name", OTHERS)
def test_labels_that_are_made_in_another_way_are_an_error_where_it_matters(name):
    model, batch = Labelled(OTHERS[name]), {"labels": labelled()}
    stepped(model, batch, None)
    with pytest.raises(ValueError, match=r"weigh=lambda batch: "):
        stepped(model, batch, None, samfn.accumulated(samfn.sam(), 2))


def written(labels, mask):
    labels = labels.clone()
    labels[mask == 0] = -100
    return labels


MASKED = {
    "written to": written,
    "filled": lambda y, mask: y.masked_fill(mask == 0, -100),
    "a number or another": lambda y, mask: torch.where(mask == 1, y, -100),
    "arithmetic": lambda y, mask: y * mask - 100 * (1 - mask),
    "one tensor or another": lambda y, mask: torch.where(
        mask == 1, y, torch.full_like(y, -100)
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_labels_that_a_model_leaves_out_by_a_mask_are_an_error_where_it_matters(name):
    class Padded(Labelled):
        def forward(self, labels, mask):
            scores = self.scores.expand(labels.numel(), 5)
            return F.cross_entropy(scores, self._change(labels, mask).flatten())

    model, labels = Padded(MASKED[name]), labelled()
    batch = {"labels": labels.abs() % 5, "mask": (torch.arange(6) < 2).long().repeat(6, 1)}
    batch["mask"][:2] = 1  # None is left out of the first part.
    stepped(model, batch, None)
    with pytest.raises(ValueError, match=r"which the model makes, .* weigh=lambda batch: "):
        stepped(model, batch, None, samfn.accumulated(samfn.sam(), 2))


def test_a_sum_that_is_divided_by_another_number_is_an_error_where_it_matters():
    method, model = samfn.accumulated(samfn.sam(), 2), NextToken()
    counted = (tokens()["labels"][:, 1:] != -100).sum().item()
    batch = {**tokens(), "num_items_in_batch": counted}
    whole, _ = stepped(model, batch, None)
    expected, _ = stepped(model, tokens(), None)
    assert_close(dict(whole.params), dict(expected.params))
    with pytest.raises(ValueError, match=r"a number in the batch says.* weigh=lambda"):
        stepped(model, batch, None, method)

    def divided(outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="sum")
        return losses / (targets != -100).sum()

    with pytest.raises(ValueError, match="some of its targets"):
        stepped(*problem(ignored=-100), divided, method)


def test_numbers_weigh_as_tensors_do():
    model, batch = problem()
    weigh, method = lambda batch: int((batch[1] != PAD).sum()), samfn.accumulated
    whole, _ = stepped(model, batch, masked)
    parts, _ = stepped(model, batch, masked, method(samfn.sam(), 2), weigh=weigh)
    assert_close(dict(parts.params), dict(whole.params))
    nothing = batch[0], torch.full_like(batch[1], PAD)
    _, seen = stepped(model, nothing, masked, method(samfn.sam(), 2), weigh=weigh)
    assert not seen.finite


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (torch.ones(4, dtype=torch.bool), ValueError, r"0-d tensor, got shape \(4,\)"),
        (-1, ValueError, "finite and at least 0, got -1"),
        (float("nan"), ValueError, "finite and at least 0, got nan"),
        (None, TypeError, "a number or a 0-d tensor, got NoneType"),
        (True, TypeError, "a number or a 0-d tensor, got bool"),
    ],
)
def test_what_weighs_a_batch_is_a_number(found, error, message):
    model = torch.nn.Linear(2, 3)
    batch = torch.randn(4, 2), torch.randint(3, (4,))
    cross_entropy = torch.nn.functional.cross_entropy
    loss_fn = samfn.supervised(model, cross_entropy, weigh=lambda batch: found)
    with pytest.raises(error, match=f"what weigh returns must be .*{message}"):
        samfn.Objective(loss_fn, {}, [batch]).loss(samfn.split(model)[0])


@pytest.mark.parametrize("name", ["minus a sum", "weights of classes", "Dice"])
def test_a_compiled_step_finds_it_out_without_a_real_pass(name):
    model, batch = problem()
    loss_fn = samfn.supervised(model, OF_BATCHES[name])
    method, optimizer = samfn.accumulated(samfn.sam(), 3), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    step = samfn.compile_update(**given, backend="eager")
    with pytest.raises(ValueError, match="expected a mean"):
        step(state, batch, lr=0.1)
