"""What combinators make of a method."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
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


def test_passes_draw_anew_by_default():
    loss_fn, params, batch, masks = dropout_case()
    descent_of(samfn.sam(), loss_fn, params, batch)
    assert str(masks[0]) != str(masks[1])


def test_same_randomness_moves_on_between_steps():
    loss_fn, params, batch, masks = dropout_case()
    for _ in range(2):
        descent_of(samfn.same_randomness(samfn.sam()), loss_fn, params, batch)
    assert str(masks[0]) != str(masks[2])
