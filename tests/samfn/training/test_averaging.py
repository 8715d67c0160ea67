import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import samfn
from tests.reference import small_network


def test_a_moving_average_is_that_of_torch():
    model = small_network()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    average = samfn.split(model)[0]
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        averaged.update_parameters(model)
        average = samfn.moving_average(average, samfn.split(model)[0], 0.9)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(average[name], p.detach())


def test_counters_are_not_averaged_and_the_old_average_stays():
    old = {"w": torch.zeros(2), "n": torch.tensor(1)}
    new = {"w": torch.ones(2), "n": torch.tensor(7)}
    found = samfn.moving_average(old, new, 0.75)
    assert found["w"].tolist() == [0.25, 0.25]
    assert found["n"] == 7
    assert old["w"].tolist() == [0, 0]


def test_strides_stay_since_convolutions_round_by_them():
    for shape in ((4, 1, 3, 3), (4, 5, 1, 1), (4, 5, 3, 3)):
        last = torch.randn(shape).to(memory_format=torch.channels_last)
        found = samfn.moving_average({"w": last.clone()}, {"w": last}, 0.9)
        assert found["w"].stride() == last.stride()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        samfn.moving_average({"w": torch.ones(1)}, {"w": torch.ones(1)}, decay)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9))
def test_the_mean_is_rounded_once(values):
    found = samfn.mean_of({"w": torch.tensor([value])} for value in values)
    exact = torch.tensor(sum(map(float, values)) / len(values), dtype=torch.float64)
    assert found["w"].item() == exact.float().item()


def test_the_mean_of_counters_is_the_last():
    found = samfn.mean_of([{"n": torch.tensor(1)}, {"n": torch.tensor(4)}])
    assert found["n"] == 4


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="something to average, got nothing"):
        samfn.mean_of([])
    with pytest.raises(ValueError, match="what is averaged must have the same shapes"):
        samfn.mean_of([{"w": torch.ones(1)}, {"w": torch.ones(2)}])


def test_statistics_are_taken_anew_as_torch_does():
    model = small_network().float()
    inputs = [torch.randn(5, 2, 4, 4) for _ in range(3)]
    params, buffers = samfn.split(model)
    moved = {name: w + 0.3 for name, w in params.items()}
    before = {name: b.clone() for name, b in buffers.items()}
    found = samfn.reestimated(model, moved, buffers, inputs)
    expected = copy.deepcopy(model)
    samfn.load(expected, moved, buffers)
    update_bn(inputs, expected)
    statistics = dict(expected.named_buffers())
    assert found.keys() == buffers.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, statistics[name])
        assert not tensor.requires_grad
        assert torch.equal(buffers[name], before[name])
        assert torch.equal(dict(model.named_buffers())[name], before[name])
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_a_network_without_statistics_keeps_its_buffers():
    model = nn.Linear(3, 2)
    model.register_buffer("scale", torch.ones(1))
    params, buffers = samfn.split(model)
    assert samfn.reestimated(model, params, buffers, [torch.ones(4, 3)]).keys() == {"scale"}


def test_there_are_no_statistics_of_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    params, buffers = samfn.split(model)
    batches = iter([torch.randn(4, 3)])
    samfn.reestimated(model, params, buffers, batches)
    with pytest.raises(ValueError, match="at least one batch of inputs, got none"):
        samfn.reestimated(model, params, buffers, batches)


def test_models_of_several_inputs_get_statistics_too():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, a, b):
            return self.norm(a + b)

    model = Sum()
    params, buffers = samfn.split(model)
    pairs = [((torch.randn(4, 3), torch.randn(4, 3)), None) for _ in range(2)]
    found = samfn.reestimated(model, params, buffers, pairs)
    means = torch.stack([(a + b).mean(0) for (a, b), _ in pairs])
    torch.testing.assert_close(found["norm.running_mean"], means.mean(0))
