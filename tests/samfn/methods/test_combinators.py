"""What combinators make of a method."""

import random
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from samfn.gradient import evaluator
from samfn.methods.base import Point
from tests.reference import batches, descent_of, small_network

START = {"weight": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}


def supervised_case():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    params, buffers = samfn.split(model)
    batch = (torch.randn(10, 4).double(), torch.randint(3, (10,)))
    return samfn.supervised(model, F.cross_entropy), params, buffers, batch


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
def test_accumulating_takes_the_step_of_the_whole_batch(size):
    loss_fn, params, _, batch = supervised_case()
    whole = descent_of(samfn.sam(), loss_fn, params, batch)
    parts = descent_of(samfn.accumulated(samfn.sam(), size), loss_fn, params, batch)
    assert_close(parts.grads, whole.grads)
    assert_close(parts.clean, whole.clean)
    assert_close(parts.perturbation_norm, whole.perturbation_norm)


@pytest.mark.parametrize("size", [3, 5])
def test_m_sharpness_is_the_mean_of_sam_on_each_micro_batch(size):
    loss_fn, params, _, batch = supervised_case()
    method = samfn.per_micro_batch(samfn.sam(), size)
    seen = descent_of(method, loss_fn, params, batch)
    expected = samfn.tree.zeros_like(params)
    for images, labels in zip(batch[0].split(size), batch[1].split(size), strict=True):
        one = descent_of(samfn.sam(), loss_fn, params, (images, labels))
        share = len(labels) / 10
        expected = {n: expected[n] + share * one.grads[n] for n in params}
    assert_close(seen.grads, expected)
    assert seen.clean.outputs.shape == (10, 3)
    whole = descent_of(samfn.sam(), loss_fn, params, batch)
    assert not torch.allclose(seen.grads["0.weight"], whole.grads["0.weight"])


def test_m_sharpness_of_the_whole_batch_is_sam():
    loss_fn, params, _, batch = supervised_case()
    method = samfn.per_micro_batch(samfn.sam(), 10)
    whole = descent_of(samfn.sam(), loss_fn, params, batch)
    assert_close(descent_of(method, loss_fn, params, batch), whole)


@pytest.mark.parametrize("combine", [samfn.accumulated, samfn.per_micro_batch])
def test_statistics_pass_through_the_micro_batches_of_the_clean_pass_alone(combine):
    model = small_network()
    params, buffers = samfn.split(model)
    batch = batches(1)[0]
    loss_fn = samfn.supervised(model, F.cross_entropy)
    method = combine(samfn.sam(), 4)
    seen = descent_of(method, loss_fn, params, batch, buffers=buffers)
    for images in batch[0].split(4):
        model(images)
    assert seen.clean.buffers["1.num_batches_tracked"] == 2
    assert_close(dict(seen.clean.buffers), dict(model.named_buffers()))


@pytest.mark.parametrize("combine", [samfn.accumulated, samfn.per_micro_batch])
def test_scalar_outputs_are_averaged_and_others_gathered(combine):
    def loss_fn(params, buffers, batch):
        outputs = {"mean": batch.mean(), "all": batch, "name": "x"}
        return (params["weight"].sum() * batch).mean(), samfn.Aux(outputs, buffers)

    batch = torch.arange(5.0).double()
    seen = descent_of(combine(samfn.sam(), 2), loss_fn, START, batch)
    assert_close(seen.clean.outputs["mean"], batch.mean())
    assert_close(seen.clean.outputs["all"], batch)
    assert seen.clean.outputs["name"] == "x"


def test_batches_that_cannot_be_cut_are_errors():
    loss_fn, params, _, (images, labels) = supervised_case()
    method = samfn.accumulated(samfn.sam(), 2)
    with pytest.raises(ValueError, match=r"one length, got shapes \(10, 4\), \(3,\)"):
        descent_of(method, loss_fn, params, (images, labels[:3]))
    with pytest.raises(ValueError, match=r"one length, got shapes \(\)$"):
        descent_of(method, loss_fn, params, torch.tensor(1.0))
    with pytest.raises(ValueError, match="size must be a whole number"):
        samfn.per_micro_batch(samfn.sam(), 0)


def dropout_case():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double()
    params, _ = samfn.split(model)
    masks = []

    def loss_fn(params, buffers, batch):
        hidden = F.linear(batch, params["0.weight"], params["0.bias"])
        dropped = F.dropout(torch.ones_like(hidden), 0.5)
        masks.append(dropped.detach())
        return ((hidden * dropped) @ params["2.weight"].T).square().mean()

    return loss_fn, params, torch.randn(8, 4).double(), masks


def test_same_randomness_draws_one_dropout_mask_for_both_passes():
    loss_fn, params, batch, masks = dropout_case()
    descent_of(samfn.same_randomness(samfn.sam()), loss_fn, params, batch)
    first, second = (mask + 0 for mask in masks)
    assert str(first) == str(second)


def test_same_randomness_is_that_of_numpy_and_python_too():
    drawn = []

    def loss_fn(params, buffers, batch):
        drawn.append((random.random(), numpy.random.rand()))
        return params["w"].square().sum()

    params = {"w": torch.ones(3)}
    descent_of(samfn.same_randomness(samfn.sam()), loss_fn, params, torch.ones(2))
    assert drawn[0] == drawn[1]


def test_passes_draw_anew_by_default():
    loss_fn, params, batch, masks = dropout_case()
    descent_of(samfn.sam(), loss_fn, params, batch)
    assert str(masks[0]) != str(masks[1])


def test_same_randomness_moves_on_between_steps():
    loss_fn, params, batch, masks = dropout_case()
    for _ in range(2):
        descent_of(samfn.same_randomness(samfn.sam()), loss_fn, params, batch)
    assert str(masks[0]) != str(masks[2])


def test_memory_passes_through_the_micro_batches_in_turn_or_is_averaged():
    loss_fn, params, _, batch = supervised_case()
    optimizer = samfn.sgd()

    def memory_after(method, batches):
        state = samfn.init(params, {}, optimizer=optimizer, method=method)
        for one in batches:
            state, _ = samfn.sam_update(
                state, one, loss_fn=loss_fn, optimizer=optimizer, method=method, lr=0.0
            )
        return state.method_state["mean"]

    inner, parts = samfn.vasso(0.5), [*zip(*(t.split(5) for t in batch), strict=True)]
    in_turn = memory_after(samfn.per_micro_batch(inner, 5), [batch])
    assert_close(in_turn, memory_after(inner, parts))
    averaged = samfn.per_micro_batch(inner, 5, statistics="averaged")
    left, right = (memory_after(inner, [part]) for part in parts)
    mean = {name: (left[name] + right[name]) / 2 for name in left}
    assert_close(memory_after(averaged, [batch]), mean)


def masked(outputs, targets):
    """Return the mean over the examples of a mask, NaN if there are none."""
    wanted, mask = targets.unbind(1)
    return ((outputs[:, 0] - wanted).square() * mask).sum() / mask.sum()


@pytest.mark.parametrize("statistics", ["in turn", "averaged"])
@pytest.mark.parametrize(
    "make",
    [
        *(samfn.vasso, samfn.friendly_sam, samfn.momentum_sam, samfn.s2_sam),
        *(samfn.light_sam, samfn.looksam, samfn.unified_sam),
        lambda: samfn.ae_sam(9),
        lambda: samfn.sam(samfn.preconditioned()),
    ],
)
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_in_which_nothing_counts_is_as_if_it_were_not_there(make, statistics, part):
    model = nn.Linear(3, 1).double()
    loss_fn = samfn.supervised(model, masked, weigh=lambda batch: batch[1][:, 1].sum())
    inputs, wanted = torch.randn(8, 3).double(), torch.randn(8).double()
    mask = torch.ones(8).double()
    mask[4 * part : 4 * part + 4] = 0
    counting = mask.bool()
    whole = inputs, torch.stack([wanted, mask], 1)
    rest = inputs[counting], torch.stack([wanted, mask], 1)[counting]
    optimizer = samfn.sgd()
    method = samfn.per_micro_batch(make(), 4, statistics=statistics)

    def after(batches):
        state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
        how = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method, "lr": 0.1}
        for batch in batches:
            state, metrics = samfn.sam_update(state, batch, **how)
            assert metrics.finite
        return state

    assert_close(after([whole, rest]), after([rest, rest]))


def test_running_statistics_can_be_averaged_instead_and_count_once():
    model = small_network()
    params, buffers = samfn.split(model)
    batch = batches(1)[0]
    loss_fn = samfn.supervised(model, F.cross_entropy)
    method = samfn.per_micro_batch(samfn.sam(), 4, statistics="averaged")
    seen = descent_of(method, loss_fn, params, batch, buffers=buffers)
    parts = []
    for images in batch[0].split(4):
        samfn.load(model, params, buffers)
        model(images)
        parts.append(samfn.split(model)[1])
    expected = {n: (parts[0][n] + parts[1][n]) / 2 for n in ("1.running_mean",)}
    assert seen.clean.buffers["1.num_batches_tracked"] == 1
    assert_close(seen.clean.buffers["1.running_mean"], expected["1.running_mean"])
    assert not torch.equal(parts[0]["1.running_mean"], parts[1]["1.running_mean"])
    with pytest.raises(ValueError, match="\"averaged\", got 'no'"):
        samfn.per_micro_batch(samfn.sam(), 4, statistics="no")


class Watched:
    """A loss function that keeps the parameters that it saw, and what it was derived by."""

    def __init__(self, loss_fn):
        self.loss_fn, self.params, self.derived = loss_fn, [], []

    def __call__(self, params, buffers, batch):
        self.params.append({name: w.detach().clone() for name, w in params.items()})
        self.derived.append({name for name, w in params.items() if w.requires_grad})
        return self.loss_fn(params, buffers, batch)


COMPARES = samfn.gsam()  # It needs the clean gradient of every parameter.


@pytest.mark.parametrize("method", [samfn.sam(), samfn.vasso(), COMPARES])
def test_only_the_chosen_parameters_are_perturbed_and_all_descend(method):
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = Watched(samfn.supervised(model, F.cross_entropy))
    chosen = set(samfn.norm_parameters(model))
    assert chosen
    assert chosen < params.keys()
    around = samfn.on_parameters(method, chosen)
    seen = descent_of(around, loss_fn, params, batches(1)[0], buffers=buffers)
    moved = {n for n, w in loss_fn.params[1].items() if not torch.equal(w, params[n])}
    assert moved == chosen
    assert seen.grads.keys() == params.keys()
    # The first pass spares itself the gradients that nobody reads.
    compares = seen.clean.grads.keys() == params.keys()
    assert loss_fn.derived[0] == (params.keys() if compares else chosen)
    assert compares == (method is COMPARES)


def test_parameters_are_chosen_by_names_a_pattern_or_a_function():
    loss_fn, params, _, batch = supervised_case()
    ways = (["0.bias", "2.bias"], "*.bias", lambda name, w: w.ndim == 1)
    found = [
        descent_of(samfn.on_parameters(samfn.sam(), way), loss_fn, params, batch)
        for way in ways
    ]
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert_close(found[0], found[2], rtol=0, atol=0)
    optimizer, method = samfn.sgd(), samfn.on_parameters(samfn.sam(), "*.norm")
    with pytest.raises(ValueError, match=r"'\*.norm' is none of the 4 parameters 0.weight"):
        samfn.init(params, {}, optimizer=optimizer, method=method)


def test_choices_inside_of_choices_are_both_kept():
    loss_fn, params, _, batch = supervised_case()
    inner = samfn.on_parameters(samfn.sam(), "0.*")
    both = samfn.on_parameters(inner, "*.bias")
    found = descent_of(both, loss_fn, params, batch)
    expected = descent_of(
        samfn.on_parameters(samfn.sam(), ["0.bias"]), loss_fn, params, batch
    )
    assert_close(found, expected, rtol=0, atol=0)


def test_kinds_of_steps_count_the_steps_of_what_is_inside():
    method = samfn.every(samfn.looksam(2), 3)
    kinds = [method.kind(step) for step in range(12)]
    plain = ["plain", "plain"]
    assert kinds == ["look", *plain, "go on", *plain, "look", *plain, "go on", *plain]


@pytest.mark.parametrize(("share", "rows"), [(0.25, 3), (0.1, 1), (0.5, 5), (0.01, 1)])
def test_the_ascent_sees_its_share_of_the_batch_rounded_up(share, rows):
    loss_fn, params, _, batch = supervised_case()
    method = samfn.sub_batch_ascent(samfn.sam(), share)
    seen = descent_of(method, loss_fn, params, batch)
    assert torch.equal(
        seen.clean.loss, loss_fn(params, {}, tuple(x[:rows] for x in batch))[0]
    )
    assert len(seen.clean.outputs) == rows
    twice = samfn.sub_batch_ascent(samfn.sub_batch_ascent(samfn.sam(), 0.5), 0.5)
    assert len(descent_of(twice, loss_fn, params, batch).clean.outputs) == 3
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        samfn.sub_batch_ascent(samfn.sam(), 0)


@pytest.mark.parametrize(("share", "rows"), [(0.07, 7), (0.55, 55)])
def test_a_share_that_is_a_whole_number_of_rows_is_that_number(share, rows):
    model, batch = nn.Linear(3, 2), (torch.randn(100, 3), torch.randint(2, (100,)))
    loss_fn = samfn.supervised(model, F.cross_entropy)
    method = samfn.sub_batch_ascent(samfn.sam(), share)
    params, buffers = samfn.split(model)
    seen = descent_of(method, loss_fn, params, batch, buffers=buffers)
    assert len(seen.clean.outputs) == rows


def scaled_training(spoilt=(), steps=6, **settings):
    """Return the states after each step; the batches of `spoilt` steps hold a nan."""
    method = samfn.loss_scaled(samfn.friendly_sam(), 1024.0, **settings)
    optimizer = samfn.sgd(0.9)
    loss_fn, params, _, batch = supervised_case()
    state = samfn.init(params, {}, optimizer=optimizer, method=method)
    states = [state]
    for step in range(steps):
        images = batch[0] * float("nan") if step in spoilt else batch[0]
        state, _ = samfn.sam_update(
            state,
            (images, batch[1]),
            loss_fn=loss_fn,
            optimizer=optimizer,
            method=method,
            lr=0.1,
        )
        states.append(state)
    return states


def test_the_loss_scale_grows_with_good_steps_and_shrinks_with_bad_ones():
    states = scaled_training(spoilt=(3,), interval=2)
    scales = [state.method_state["loss_scale"].item() for state in states]
    assert scales == [1024.0, 1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]
    before, after = states[3], states[4]
    assert_close(after.params, before.params, rtol=0, atol=0)
    assert_close(after.method_state["mean"], before.method_state["mean"], rtol=0, atol=0)
    assert [state.skipped.item() for state in states] == [0, 0, 0, 0, 1, 1, 1]
    assert [state.skipped_in_a_row.item() for state in states] == [0, 0, 0, 0, 1, 0, 0]


def test_the_loss_scale_never_becomes_zero():
    states = scaled_training(spoilt=range(60), steps=60)
    assert states[-1].method_state["loss_scale"] == 2.0**-24


def test_a_scaled_loss_spares_float16_its_underflow():
    def loss_fn(params, buffers, batch):
        # A gradient of 1e-8 on its way through float16, where the smallest is 6e-8.
        return (params["w"].half() * 1e-4).float().sum() * 1e-4

    params = {"w": torch.ones(3)}
    assert not descent_of(samfn.sam(), loss_fn, params).grads["w"].any()
    found = descent_of(samfn.loss_scaled(samfn.sam()), loss_fn, params).grads["w"]
    assert_close(found, torch.full((3,), 1e-8), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samfn.loss_scaled(samfn.sam(), 0.0), "expected a finite initial > 0"),
        (lambda: samfn.loss_scaled(samfn.sam(), float("inf")), "got inf"),
        (lambda: samfn.loss_scaled(samfn.sam(), growth=0.5), "growth >= 1"),
        (lambda: samfn.loss_scaled(samfn.sam(), backoff=1.0), "0 < backoff < 1"),
        (
            lambda: samfn.loss_scaled(samfn.loss_scaled(samfn.sam())),
            "loss_scaled goes inside of loss_scaled, not around",
        ),
        (
            lambda: samfn.every(samfn.loss_scaled(samfn.sam()), 2),
            "every goes inside of loss_scaled, not around",
        ),
        (lambda: samfn.every(samfn.sam(), 0), "k must be a whole number"),
    ],
)
def test_combinations_that_mean_nothing_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


IGNORED = 9


def tokens(counts):
    """Return rows of which some count in the loss: those that are not ignored."""
    inputs = torch.randn(len(counts), 5, dtype=torch.float64)
    targets = torch.tensor([row % 3 if counted else IGNORED for row, counted in counts])
    return inputs, targets


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 4.0, 0.5]).double()])
@pytest.mark.parametrize("compiled", [False, True])
def test_parts_weigh_what_their_losses_are_means_over(weight, compiled):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    criterion = partial(F.cross_entropy, ignore_index=IGNORED, weight=weight)
    # Of the third part nothing counts, whose mean is NaN.
    batch = tokens([*enumerate([1, 1, 0, 1, 0, 0, 1, 0])])
    loss_fn, optimizer = samfn.supervised(model, criterion), samfn.sgd()

    def step(method):
        given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
        state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
        take = partial(samfn.sam_update, **given)
        if compiled:
            take = torch.compile(take, backend="eager", fullgraph=True)
        return take(state, batch, rho=torch.tensor(0.1), lr=torch.tensor(0.1))

    whole, seen = step(samfn.sam())
    parts, mean = step(samfn.accumulated(samfn.sam(), 2))
    assert_close(parts, whole)
    assert_close(mean, seen)
    alone, found = step(samfn.per_micro_batch(samfn.sam(), 2))
    assert found.finite
    assert_close(found.loss, seen.loss)
    assert not torch.equal(alone.params["weight"], whole.params["weight"])


def test_misspelt_names_are_errors_and_an_iterator_of_names_is_none():
    loss_fn, params, _, batch = supervised_case()
    by_iterator = samfn.on_parameters(samfn.sam(), iter(["0.bias"]))
    expected = samfn.on_parameters(samfn.sam(), ["0.bias"])
    for _ in range(2):
        found = descent_of(by_iterator, loss_fn, params, batch)
        assert_close(found, descent_of(expected, loss_fn, params, batch), rtol=0, atol=0)
    method = samfn.on_parameters(samfn.sam(), ["0.bias", "2.bais"])
    with pytest.raises(ValueError, match=r"on_parameters: 2.bais is none of the param"):
        samfn.init(params, {}, optimizer=samfn.sgd(), method=method)


def test_a_tied_weight_of_normalisation_has_the_one_name_of_the_state():
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    model[1].weight = model[0].weight
    names = samfn.norm_parameters(model)
    assert names == ("0.weight", "0.bias", "1.bias")
    method = samfn.on_parameters(samfn.sam(), names)
    samfn.init(*samfn.split(model), optimizer=samfn.sgd(), method=method)


def test_steps_in_between_are_of_all_losses_and_in_the_parts_of_the_method():
    loss_fn, params, _, batch = supervised_case()

    def penalty(params, buffers, batch):
        return params["0.weight"].square().sum()

    def plain_step(method):
        point = Point(params, {}, batch, 0.1, tuple(params), kind="plain")
        method = samfn.every(method, 2)
        return method.descent(evaluator(watched), point, method.init(params, params))[0]

    watched = Watched(loss_fn)
    found = plain_step(samfn.on_loss(samfn.sam(), penalty))
    expected = descent_of(samfn.on_loss(samfn.sam(), penalty), loss_fn, params, batch, 0.0)
    assert_close(found.grads, expected.grads, rtol=0, atol=0)
    watched = Watched(loss_fn)
    found = plain_step(samfn.accumulated(samfn.sam(), 3))
    assert len(watched.params) == 4
    assert_close(found.grads, descent_of(samfn.sam(), loss_fn, params, batch, 0.0).grads)
    assert samfn.every(samfn.on_loss(samfn.sam(), penalty), 2).gradients is None


@pytest.mark.parametrize(
    "method", [samfn.wsam(), samfn.gsam(), samfn.sagm(), samfn.ae_sam(9, 1e9, 1e9)]
)
def test_no_gradient_of_a_part_descends_in_place_of_the_whole_batch(method):
    loss_fn, params, _, batch = supervised_case()
    part = samfn.sub_batch_ascent(method, 0.5)
    with pytest.raises(ValueError, match="sub_batch_ascent: the method also descends"):
        descent_of(part, loss_fn, params, batch)
    plain = descent_of(samfn.sam(), loss_fn, params, batch, 0.0)
    assert_close(descent_of(part, loss_fn, params, batch, 0.0).grads, plain.grads)
