"""samfn.SAM between its steps: what is saved, copied, loaded there is w, or refused."""

import copy
import gc
import io
import os
import pickle
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import samfn
from tests import ROOT
from tests.samfn.imperative.test_optimizer import data, net, two_steps, weights

SETTINGS = {"rho": 0.5, "lr": 0.1, "momentum": 0.9}


def made(model=None):
    model = model or net()
    return model, samfn.SAM(model.parameters(), torch.optim.SGD, **SETTINGS)


def backward(model, batch):
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def perturbed(model=None):
    """Return a model between the steps of its optimizer, and its weights before."""
    model, optimizer = made(model)
    two_steps(optimizer, model, data()[0])
    backward(model, data()[1])
    before = copy.deepcopy(model.state_dict())
    optimizer.first_step(zero_grad=True)
    assert optimizer.perturbed
    return model, optimizer, before


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert_close(dict(found), dict(expected), rtol=0, atol=0)


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model


def with_buffers_and_frozen():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].bias.requires_grad_(False)
    return model


def nested():
    return nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.PReLU()), nn.Linear(4, 3))


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))


class Twice(nn.Sequential):
    """A network with one parameter under two names, in one module."""

    def __init__(self):
        super().__init__(nn.Linear(5, 3))
        self.scale = nn.Parameter(torch.ones(3))
        self.register_parameter("again", self.scale)

    def forward(self, inputs):
        return super().forward(inputs) * self.scale


MODELS = [net, Twice, tied, with_buffers_and_frozen, nested, parametrized]
WAYS = {
    "whole": lambda model: model.state_dict(),
    "variables": lambda model: model.state_dict(keep_vars=True),
    "compiled": lambda model: torch.compile(model, backend="eager").state_dict(),
    "a part": lambda model: model[-1].state_dict(),
    "inside of another": lambda model: nn.ModuleDict({"inner": model}).state_dict(),
    "on disk": lambda model: saved(model.state_dict()),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved(model),
    "average": lambda model: AveragedModel(model).module,
    "deepcopy of a part": lambda model: copy.deepcopy(nn.ModuleList([model]))[0],
}


def saved(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=not isinstance(what, nn.Module))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made_model", MODELS)
def test_a_state_dict_between_the_steps_of_a_guarded_model_is_that_of_before(
    made_model, way
):
    model, optimizer, _ = perturbed(made_model())
    with optimizer.unperturbed():
        expected = copy.deepcopy(WAYS[way](model))
    moved = WAYS[way](model)
    assert any(not torch.equal(moved[name], w) for name, w in expected.items())
    optimizer.guard(model)
    equal(WAYS[way](model), expected)
    optimizer.restore()
    equal(WAYS[way](model), expected)


def test_what_a_signal_saves_at_every_line_of_a_step_is_what_was_before_it(
    record_property,
):
    """The step is taken again from each of them, and the training goes on bit for bit."""
    model, optimizer = made()
    optimizer.guard(model)
    steps = data(steps=3)
    two_steps(optimizer, model, steps[0])
    before, places = copy.deepcopy(model.state_dict()), []
    taken = []

    def save(number, frame):
        equal(model.state_dict(), before)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        taken[:] = [*taken[:3], state]

    def trace(frame, event, argument):
        if ROOT / "samfn" not in Path(frame.f_code.co_filename).parents:
            return None
        if frame.f_code.co_name == "_descend" or places[-1:] == ["_descend"]:
            places.append("_descend")
            return None
        if event == "line":
            places.append(frame.f_lineno)
            os.kill(os.getpid(), signal.SIGUSR1)
        return trace

    handler = signal.signal(signal.SIGUSR1, save)
    sys.settrace(trace)
    try:
        two_steps(optimizer, model, steps[1])
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGUSR1, handler)
    assert places.pop() == "_descend"
    assert len(places) > 50
    record_property("trials", len(places))
    two_steps(optimizer, model, steps[2])
    for weights_of, state in taken:
        again, fresh = made()
        again.load_state_dict(weights_of)
        fresh.load_state_dict(state)
        for batch in steps[1:]:
            two_steps(fresh, again, batch)
        equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("made_model", MODELS)
def test_a_guarded_model_is_copied_unperturbed_or_not_at_all(made_model, copied):
    if made_model is parametrized and copied in ("pickle", "torch.save"):
        pytest.skip("PyTorch pickles no parametrized module")
    model, optimizer, before = perturbed(made_model())
    optimizer.guard(model)
    with pytest.raises(RuntimeError, match="of the model are perturbed: copy, pickle"):
        COPIES[copied](model)
    with optimizer.unperturbed():
        inside = COPIES[copied](model)
    equal(inside.state_dict(), before)
    inside.load_state_dict(before)  # The copy is nobody's.
    assert optimizer.perturbed
    optimizer.restore()
    equal(COPIES[copied](model).state_dict(), before)
    if made_model is not parametrized:
        assert b"samfn.imperative.optimizer" not in pickle.dumps(model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, pickle.dumps, lambda x: copy.deepcopy([x])]
)
def test_the_optimizer_is_not_copied_where_weights_are_perturbed(copied):
    model, optimizer, before = perturbed()
    with pytest.raises(
        RuntimeError, match="the weights are perturbed: copy, pickle, split"
    ):
        copied(optimizer)
    with optimizer.unperturbed():
        other_model, other = copy.deepcopy((model, optimizer))
    equal(other_model.state_dict(), before)
    assert not other.perturbed
    backward(model, data()[1])
    optimizer.second_step(zero_grad=True)
    backward(other_model, data()[1])  # The copy takes the step from its beginning.
    other.first_step(zero_grad=True)
    backward(other_model, data()[1])
    other.second_step(zero_grad=True)
    equal(other_model.state_dict(), model.state_dict())


def test_the_state_of_the_optimizer_goes_with_a_guard_of_all_its_weights():
    model, optimizer, _ = perturbed(nested())
    momentum = copy.deepcopy([optimizer.state[p] for p in model.parameters()])
    for part in (None, model[0]):
        if part is not None:
            optimizer.guard(part)
        with pytest.raises(RuntimeError, match="perturbed, so there is no state to save"):
            optimizer.state_dict()
    with optimizer.unperturbed():
        assert_close([*optimizer.state_dict()["state"].values()], momentum, rtol=0, atol=0)
    optimizer.guard(model)
    assert_close([*optimizer.state_dict()["state"].values()], momentum, rtol=0, atol=0)


def test_a_guard_keeps_no_optimizer():
    model, optimizer, _ = perturbed()
    optimizer.guard(model)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    model.load_state_dict(copy.deepcopy(model).state_dict())


def test_unperturbed_shows_the_weights_and_puts_the_perturbation_back_bit_for_bit():
    model, optimizer, before = perturbed()
    worst = weights(model)
    with optimizer.unperturbed():
        assert not optimizer.perturbed
        equal(model.state_dict(), before)
        with optimizer.unperturbed():
            equal(model.state_dict(), before)
        equal(model.state_dict(), before)
        assert not optimizer.perturbed
        with pytest.raises(RuntimeError, match="first_step was called twice"):
            optimizer.first_step()
    assert optimizer.perturbed
    equal(weights(model), worst)
    with pytest.raises(KeyError), torch.inference_mode(), optimizer.unperturbed():
        raise KeyError
    equal(weights(model), worst)
    average = AveragedModel(model)
    with optimizer.unperturbed():
        average.update_parameters(model)
    equal(average.module.state_dict(), before)
    optimizer.restore()
    with optimizer.unperturbed():
        equal(model.state_dict(), before)
    equal(model.state_dict(), before)


@pytest.mark.parametrize("written", ["loaded", "data", "all"])
def test_weights_that_are_written_while_unperturbed_stay(written):
    model, optimizer, before = perturbed()
    moved = {name: w - before[name] for name, w in weights(model).items()}
    other = {name: w + 1 for name, w in weights(model).items()}
    with optimizer.unperturbed():
        if written == "data":
            model[0].weight.data.copy_(other["0.weight"])
        elif written == "loaded":
            model[0].load_state_dict({"weight": other["0.weight"]}, strict=False)
        else:
            model.load_state_dict(other, strict=False)
        wanted = weights(model)
    for name, w in weights(model).items():  # w + e, of the new w
        torch.testing.assert_close(w - wanted[name], moved[name], rtol=0, atol=1e-6)
    optimizer.restore()
    equal(weights(model), wanted)


@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_a_step_that_ends_while_unperturbed_has_ended(end):
    model, optimizer, before = perturbed()
    reference, other, _ = perturbed()
    for each, its in ((model, optimizer), (reference, other)):
        backward(each, data()[1])
        if its is other:
            getattr(its, end)()
            continue
        with its.unperturbed():
            getattr(its, end)()
    equal(model.state_dict(), reference.state_dict())
    assert (end == "restore") == torch.equal(model[0].weight, before["0.weight"])
    assert not optimizer.perturbed


def test_a_step_that_is_given_up_leaves_the_weights_and_another_can_be_taken():
    model, optimizer, before = perturbed()
    reference, other = made()
    two_steps(other, reference, data()[0])
    optimizer.restore()
    optimizer.restore()
    equal(model.state_dict(), before)
    assert not optimizer.perturbed
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.second_step()
    for batch in data()[1:3]:
        two_steps(optimizer, model, batch)
        two_steps(other, reference, batch)
    equal(model.state_dict(), reference.state_dict())


def test_a_first_step_that_fails_half_way_leaves_the_weights():
    model = net()
    nowhere = torch.zeros((), device="meta")  # cannot be multiplied with
    groups = [{"params": model[0].parameters()}]
    groups += [{"params": model[2].parameters(), "rho": nowhere}]
    optimizer = samfn.SAM(groups, torch.optim.SGD, **SETTINGS)
    before = weights(model)
    backward(model, data()[0])
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.first_step()
    equal(weights(model), before)
    assert not optimizer.perturbed
    optimizer.param_groups[1]["rho"] = 0.5
    optimizer.first_step()


@pytest.mark.parametrize("guarded", [False, True])
def test_what_is_loaded_between_the_steps_stays(guarded):
    model, optimizer, before = perturbed()
    loaded, state = {n: w + 1 for n, w in before.items()}, made()[1].state_dict()
    with pytest.raises(RuntimeError, match=r"perturbed: call restore\(\) before"):
        optimizer.load_state_dict(state)
    assert optimizer.perturbed
    if guarded:
        optimizer.guard(model)
    else:
        optimizer.restore()
    model.load_state_dict(loaded)
    optimizer.load_state_dict(state)
    equal(model.state_dict(), loaded)
    two_steps(optimizer, model, data()[1])
    reference, other = made()
    reference.load_state_dict(loaded)
    two_steps(other, reference, data()[1])
    equal(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("inside", [False, True])
def test_a_guarded_model_is_neither_split_nor_loaded_between_the_steps(inside):
    model, optimizer, before = perturbed()
    optimizer.guard(model)
    whole = nn.Sequential(model) if inside else model
    there = weights(model)
    for call in (lambda: samfn.split(whole), lambda: samfn.load(whole, before, {})):
        with pytest.raises(RuntimeError, match="are perturbed: copy, pickle, split or"):
            call()
    equal(weights(model), there)
    with optimizer.unperturbed():
        kept, buffers = samfn.split(model)
    equal(kept, before)
    optimizer.restore()
    samfn.load(model, {name: w + 1 for name, w in kept.items()}, buffers)
    equal(model.state_dict(), {name: w + 1 for name, w in before.items()})


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_are_cleared_between_the_steps_do_not_matter(set_to_none):
    model, optimizer, _ = perturbed()
    reference, other, _ = perturbed()
    backward(model, data()[2])
    optimizer.zero_grad(set_to_none)
    for each, its in ((model, optimizer), (reference, other)):
        backward(each, data()[1])
        its.second_step()
    equal(model.state_dict(), reference.state_dict())


def test_a_group_that_is_added_between_the_steps_moves_by_what_the_second_pass_saw():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = samfn.SAM([first], torch.optim.SGD, rho=0.5, lr=0.1)
    first.grad = torch.tensor([3.0, 4.0])
    optimizer.first_step(zero_grad=True)
    assert_close(first.detach(), torch.tensor([1.3, 1.4]))
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = torch.zeros(2), torch.tensor([1.0, 2.0])
    optimizer.second_step()
    assert torch.equal(first.detach(), torch.ones(2))
    assert_close(second.detach(), torch.tensor([0.9, 0.8]))
    optimizer.param_groups.reverse()  # Weights are known by themselves, not by place.
    first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.zeros(2)
    optimizer.first_step()
    optimizer.param_groups.reverse()
    optimizer.restore()
    assert torch.equal(first.detach(), torch.ones(2))


def test_a_weight_that_is_frozen_between_the_steps_is_put_back():
    model, optimizer, before = perturbed()
    model[0].requires_grad_(False)
    backward(model, data()[1])
    optimizer.second_step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])
