"""samfn.SAM in loops as they are written: davda54's arithmetic, and what it lacked."""

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import samfn
from tests.reference import batches, small_network


class Davda54:
    """The arithmetic of davda54/sam, by hand: overwrite, look again, put back, step."""

    def __init__(self, groups, base, **settings):
        self.base = base(groups, **settings)

    def step(self, loss_of):
        loss = loss_of()
        loss.backward()
        groups = self.base.param_groups
        with torch.no_grad():
            total = 0.0
            for group in groups:
                for p in group["params"]:
                    scale = p.abs() if group["adaptive"] else 1.0
                    total = total + ((scale * p.grad) ** 2).sum()
            for group in groups:
                factor = group["rho"] / (total.sqrt() + 1e-12)
                for p in group["params"]:
                    p.old = p.detach().clone()
                    p.add_((p**2 if group["adaptive"] else 1.0) * p.grad * factor)
        self.base.zero_grad()
        loss_of().backward()
        with torch.no_grad():
            for group in groups:
                for p in group["params"]:
                    p.copy_(p.old)
        self.base.step()
        self.base.zero_grad()
        return loss


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype=torch.float32, steps=6):
    source = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 5, generator=source).to(dtype),
            torch.randint(3, (16,), generator=source),
        )
        for _ in range(steps)
    ]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def groups_of(model, adaptive=False):
    return [
        {"params": model[0].parameters(), "rho": 0.05, "adaptive": adaptive},
        {"params": model[2].parameters(), "rho": 0.2, "adaptive": False, "lr": 0.05},
    ]


def two_steps(optimizer, model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.second_step(zero_grad=True)
    return loss


BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    (torch.optim.AdamW, {"lr": 0.01}),
]


@pytest.mark.parametrize(("base", "settings"), BASES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_takes_the_steps_of_davda54(base, settings, adaptive, dtype):
    model = net(dtype)
    other = copy.deepcopy(model)
    optimizer = samfn.SAM(groups_of(model, adaptive), base, **settings)
    theirs = Davda54(groups_of(other, adaptive), base, **settings)
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {}
    for inputs, targets in data(dtype):
        loss = two_steps(optimizer, model, (inputs, targets))
        expected = theirs.step(lambda x=inputs, y=targets: F.cross_entropy(other(x), y))
        assert_close(loss, expected, **close)
        assert_close(weights(model), weights(other), **close)


def test_it_takes_the_steps_of_sam_update():
    model = small_network()
    loss_fn = samfn.supervised(copy.deepcopy(model), F.cross_entropy)
    base = samfn.sgd(0.9, weight_decay=1e-3)
    state = samfn.init(*samfn.split(model), optimizer=base)
    optimizer = samfn.SAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3
    )
    for batch in batches(3):
        two_steps(optimizer, model, batch)
        state, _ = samfn.sam_update(state, batch, loss_fn=loss_fn, optimizer=base, lr=0.1)
        assert_close(weights(model), dict(state.params), rtol=1e-9, atol=1e-12)


def closure_of(optimizer, model, batch, calls=None, clear=False):
    def closure():
        if clear:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        if calls is not None:
            calls.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("way", ["before", "no pass before", "neither cleared after"])
def test_a_closure_takes_the_same_step_with_a_first_step_before_and_without(way, clear):
    model, reference = net(), net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for batch in data():
        calls = []
        closure = closure_of(optimizer, model, batch, calls, clear)
        if way == "before":
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.first_step(zero_grad=True)
        returned = optimizer.step(closure)
        expected = two_steps(other, reference, batch)
        assert len(calls) == (1 if way == "before" else 2)
        assert returned.item() == calls[0]
        if way != "before":
            assert returned.item() == expected.item()
        assert_close(weights(model), weights(reference), rtol=0, atol=0)
        if way != "neither cleared after":
            optimizer.zero_grad(set_to_none=not clear)


@pytest.mark.parametrize(("base", "settings"), BASES)
def test_with_a_rho_of_0_a_closure_takes_the_base_step_in_one_pass(base, settings):
    model, reference = net(), net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = samfn.SAM(groups, base, rho=0, **settings)
    other = base(reference.parameters(), **settings)
    for batch in data():
        calls = []
        returned = optimizer.step(closure_of(optimizer, model, batch, calls))
        assert [returned.item()] == calls
        other.zero_grad()
        F.cross_entropy(reference(batch[0]), batch[1]).backward()
        other.step()
        assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_closure_beside_gradients_of_another_batch_is_an_error(rho):
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1)
    one, other = data()[:2]
    before = weights(model)
    F.cross_entropy(model(one[0]), one[1]).backward()  # accumulated, as trainers do
    with pytest.raises(RuntimeError, match="found gradients of a backward pass outside"):
        optimizer.step(closure_of(optimizer, model, other))
    assert_close(weights(model), before, rtol=0, atol=0)


def test_a_closure_through_all_micro_batches_takes_the_step_of_the_whole_batch():
    model, reference = net(torch.float64), net(torch.float64)
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for inputs, targets in data(torch.float64):
        halves = [*zip(inputs.chunk(2), targets.chunk(2), strict=True)]

        def closure(halves=halves):
            optimizer.zero_grad()
            for x, y in halves:  # of one length
                (F.cross_entropy(model(x), y) / 2).backward()

        optimizer.step(closure)
        two_steps(other, reference, (inputs, targets))
        assert_close(weights(model), weights(reference))


@pytest.mark.parametrize("passes", [1, 2])
def test_a_closure_that_raises_leaves_the_weights_where_they_were(passes):
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before, calls = weights(model), []

    def closure():
        calls.append(None)
        if len(calls) == passes:
            raise KeyError("data")
        F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()

    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert_close(weights(model), before, rtol=0, atol=0)
    optimizer.zero_grad()
    optimizer.step(closure)  # It can go on.
    assert not torch.equal(weights(model)["0.weight"], before["0.weight"])


def test_after_ctrl_c_at_any_call_of_a_step_by_a_closure_no_weight_is_perturbed():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before, folder, left = copy.deepcopy(model.state_dict()), samfn.__path__[0], 0

    def closure():
        loss = F.cross_entropy(model(data()[0][0]), data()[0][1])
        loss.backward()
        return loss

    def trace(frame, event, _):
        nonlocal left
        left -= frame.f_code.co_filename.startswith(folder)
        if left == 0:
            raise KeyboardInterrupt

    optimizer.step(closure)
    ends = before, copy.deepcopy(model.state_dict())
    former = sys.gettrace()
    for after in itertools.count(1):
        model.load_state_dict(before)
        optimizer.zero_grad()
        left = after
        sys.settrace(trace)
        try:
            optimizer.step(closure)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(former)
        assert not optimizer.perturbed
        now = model.state_dict()
        assert any(all(torch.equal(now[n], end[n]) for n in now) for end in ends), after
    assert after > 20


def test_what_it_cannot_train_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match="whose step needs no closure, got LBFGS"):
        samfn.SAM(net().parameters(), torch.optim.LBFGS, lr=0.1)


@pytest.mark.parametrize("rho", [0.1, torch.tensor(0.0)])
def test_one_rho_that_is_not_the_number_0_makes_two_passes(rho):
    model, calls = net(), []
    groups = [{"params": model[0].parameters(), "rho": 0.0}]
    groups += [{"params": model[2].parameters(), "rho": rho}]
    optimizer = samfn.SAM(groups, torch.optim.SGD, lr=0.1)
    optimizer.step(closure_of(optimizer, model, data()[0], calls))
    assert len(calls) == 2
    assert (calls[0] != calls[1]) == (rho > 0)


def test_a_group_with_a_rho_of_0_does_not_move_whatever_its_gradient():
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "rho": 0.0}, {"params": [other], "rho": 0.1}]
    optimizer = samfn.SAM(groups, torch.optim.SGD, lr=0.1)
    weight.grad, other.grad = torch.tensor([torch.inf, 1.0]), torch.tensor([3.0, 4.0])
    optimizer.first_step(zero_grad=True)
    assert torch.equal(weight.detach(), torch.ones(2))
    optimizer.second_step()
    weight.grad, other.grad = torch.zeros(2), torch.tensor([3.0, 4.0])
    optimizer.first_step()
    assert_close(other.detach(), torch.tensor([1.06, 1.08]))


@pytest.mark.parametrize(("base", "settings"), BASES)
def test_resuming_is_not_stopping_bit_for_bit(base, settings):
    steps = data(steps=8)
    model = net()
    optimizer = samfn.SAM(groups_of(model), base, **settings)
    for batch in steps[:4]:
        two_steps(optimizer, model, batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for batch in steps[4:]:
        two_steps(optimizer, model, batch)
    again = net()
    fresh = samfn.SAM(groups_of(again), base, **{**settings, "lr": 9.0})
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for batch in steps[4:]:
        two_steps(fresh, again, batch)
    assert_close(weights(again), weights(model), rtol=0, atol=0)
    assert fresh.base_optimizer.state is fresh.state
    assert fresh.base_optimizer.param_groups is fresh.param_groups


def test_a_state_of_davda54_loads_without_his_copy_of_the_weights():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    theirs = optimizer.state_dict()
    theirs["state"] = {i: {"old_p": torch.ones(1)} for i in range(4)}
    optimizer.load_state_dict(theirs)
    two_steps(optimizer, model, data()[0])
    assert all(state.keys() == {"momentum_buffer"} for state in optimizer.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original(copied):
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    steps = data()
    two_steps(optimizer, model, steps[0])
    other_model, other = copied((model, optimizer))
    for batch in steps[1:]:
        two_steps(optimizer, model, batch)
        two_steps(other, other_model, batch)
    assert_close(weights(other_model), weights(model), rtol=0, atol=0)


class TwoHeads(nn.Module):
    """Two parameters, of which a pass uses those that it is told to."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.unused = nn.Parameter(torch.tensor([5.0]))
        self.frozen = nn.Parameter(torch.tensor([6.0]), requires_grad=False)

    def loss(self, *names):
        return sum(getattr(self, name).square().sum() for name in names)


def test_parameters_of_one_pass_only_are_put_back_and_moved_by_what_they_saw():
    model = TwoHeads()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    model.loss("a").backward()
    optimizer.first_step(zero_grad=True)
    assert_close(model.a.detach(), torch.tensor([1.0, 2.0]) * (1 + 0.5 / 5**0.5))
    model.loss("b").backward()
    optimizer.second_step(zero_grad=True)
    assert torch.equal(model.a.detach(), torch.tensor([1.0, 2.0]))  # put back, unmoved
    assert_close(model.b.detach(), torch.tensor([3.0, 4.0]) * 0.8)  # at its own place
    assert model.unused == 5
    assert model.frozen == 6


def test_sparse_gradients_perturb_as_dense_ones_do():
    def trained(sparse):
        torch.manual_seed(0)
        model = nn.Embedding(10, 4, sparse=sparse)
        settings = {"rho": 0.1, "lr": 0.5, "skip_nonfinite": sparse}
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
        for _ in range(3):
            for last in (False, True):
                model(torch.tensor([1, 3, 3])).square().sum().backward()
                assert model.weight.grad.is_sparse == sparse
                (optimizer.second_step if last else optimizer.first_step)(zero_grad=True)
        return model.weight.detach()

    assert_close(trained(True), trained(False))


def test_the_perturbation_has_length_rho_where_davda54s_is_half_a_percent_short():
    grad = torch.tensor([1.2e-10, -1.6e-10])  # of length 2e-10
    weight, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    weight.grad = grad.clone()
    samfn.SAM([weight], torch.optim.SGD, rho=0.05, lr=0.1).first_step()
    assert weight.norm().item() == pytest.approx(0.05, rel=1e-6)
    seen = []

    def loss():
        seen.append(theirs.detach().norm().item())
        return (theirs * grad).sum()

    group = {"params": [theirs], "rho": 0.05, "adaptive": False}
    Davda54([group], torch.optim.SGD, lr=0.1).step(loss)
    assert seen[1] == pytest.approx(0.05 * 0.995, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_zero_gradient_moves_nothing(dtype, adaptive):
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    optimizer = samfn.SAM([weight], torch.optim.SGD, adaptive=adaptive, lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.first_step()
    assert torch.equal(weight.detach(), torch.tensor([1.0, -2.0], dtype=dtype))
    optimizer.second_step()
    assert torch.equal(weight.detach(), torch.tensor([1.0, -2.0], dtype=dtype))


def test_small_gradients_of_float16_move_small_weights_by_rho():
    weight = nn.Parameter(torch.full((4,), 2.0**-8, dtype=torch.float16))
    optimizer = samfn.SAM([weight], torch.optim.SGD, lr=0.1, rho=2.0, adaptive=True)
    weight.grad = torch.full((4,), 2.0**-14, dtype=torch.float16)
    optimizer.first_step()
    assert_close(weight.detach() - 2.0**-8, torch.full((4,), 2.0**-8).half())


def test_large_gradients_of_float16_do_not_overflow_the_norm():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = samfn.SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
    weight.grad = torch.full_like(weight, 6e4)
    optimizer.first_step()
    assert_close(weight.detach(), torch.full_like(weight, 1.25))


@pytest.mark.parametrize("skips", [False, True])
def test_a_gradient_whose_norm_overflows_perturbs_nothing_and_is_skipped_if_asked(skips):
    weight = nn.Parameter(torch.ones(4))
    optimizer = samfn.SAM([weight], torch.optim.SGD, lr=1e-20, skip_nonfinite=skips)
    weight.grad = torch.full((4,), 1e20)
    optimizer.first_step()
    assert torch.equal(weight.detach(), torch.ones(4))
    optimizer.second_step()
    assert optimizer.skipped == skips
    assert_close(weight.detach(), torch.full((4,), float(skips)), rtol=0, atol=1e-6)


def test_addresses_never_change():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    places = [p.data_ptr() for p in model.parameters()]
    for batch in data():
        two_steps(optimizer, model, batch)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_weights_come_back_bit_for_bit():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=3.0, lr=0.0)
    before = weights(model)
    for batch in data():
        two_steps(optimizer, model, batch)
        assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_schedulers_work_on_either_object_without_a_warning(inner, closure):
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    chosen = optimizer.base_optimizer if inner else optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(chosen, step_size=1, gamma=0.5)
        for batch in data(steps=3):
            if closure:
                optimizer.step(closure_of(optimizer, model, batch))
            else:
                two_steps(optimizer, model, batch)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.125


def test_a_group_that_is_added_later_is_trained_too():
    model = net()
    optimizer = samfn.SAM(model[0].parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": model[2].parameters(), "rho": 0.3, "lr": 0.2})
    before = weights(model)
    two_steps(optimizer, model, data()[0])
    assert all(not torch.equal(w, before[n]) for n, w in weights(model).items())
    assert optimizer.param_groups[1]["momentum"] == 0.9
    assert optimizer.base_optimizer.param_groups[1]["rho"] == 0.3


# Dynamo looks at the loss itself for a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("closure", [False, True])
def test_it_works_inside_of_torch_compile(closure):
    def closure_step(optimizer, model, batch):
        optimizer.step(closure_of(optimizer, model, batch))
        optimizer.zero_grad()

    torch.compiler.reset()
    model, reference = net(), net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    step = torch.compile(closure_step if closure else two_steps, backend="eager")
    for batch in data():
        step(optimizer, model, batch)
        two_steps(other, reference, batch)
        assert_close(weights(model), weights(reference))


# Steps that are not finite.


def three_steps(way, spoil, by, skip_nonfinite, adaptive, base, settings):
    """Take three steps, of which the second has `by` in pass number `spoil`, if any."""
    model = net()
    extra = nn.Parameter(torch.ones(2))  # without a gradient
    groups = [*groups_of(model, adaptive), {"params": [extra]}]
    asked = {"skip_nonfinite": True} if skip_nonfinite else {}
    optimizer = samfn.SAM(groups, base, **settings, **asked)
    for number, (inputs, targets) in enumerate(data(steps=3)):
        if number == 1 and spoil is None:
            continue
        seen = iter([by if (number, each) == (1, spoil) else 1.0 for each in (0, 1)])

        def closure(seen=seen, inputs=inputs, targets=targets):
            loss = F.cross_entropy(model(inputs), targets) * next(seen)
            loss.backward()
            return loss

        if way != "closure":
            closure()
            optimizer.first_step(zero_grad=True)
        if way == "two steps":
            closure()
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(closure)
            optimizer.zero_grad()
    assert next(seen, None) is None  # Both passes were taken.
    return weights(model), optimizer


@pytest.mark.parametrize("way", ["two steps", "closure", "closure after a first step"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("base", "settings"), BASES)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(way, adaptive, base, settings):
    expected, plain = three_steps(way, None, 1.0, False, adaptive, base, settings)
    assert plain.skipped == 0
    for spoil in (0, 1):
        for by in (torch.inf, torch.nan):
            given = way, spoil, by, True, adaptive, base, settings
            found, optimizer = three_steps(*given)
            assert_close(found, expected, rtol=0, atol=0)
            ours, theirs = (each.state_dict()["state"] for each in (optimizer, plain))
            assert_close(ours, theirs, rtol=0, atol=0)
            assert optimizer.skipped == 1


def test_it_is_taken_where_nobody_asked_to_skip_it():
    found, optimizer = three_steps("closure", 1, torch.inf, False, False, *BASES[0])
    assert not found["0.weight"].isfinite().all()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_a_first_pass_that_is_not_finite_counts_where_the_second_sees_nothing_of_it(scaled):
    model = TwoHeads()
    settings = {"rho": 0.5, "lr": 0.1, "skip_nonfinite": True}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for factor in (torch.inf, 1.0):
        scaler.scale(factor * model.loss("a")).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(model.loss("b")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.skipped == 1
    assert_close(model.b.detach(), torch.tensor([3.0, 4.0]) * 0.8)
    optimizer.zero_grad()
    model.a.grad = torch.ones(2)
    optimizer.first_step(zero_grad=True)
    optimizer.second_step()  # There is no gradient at all, nor was a backward pass.
    assert optimizer.skipped == 1


def test_statistics_of_the_second_pass_see_no_weight_that_is_not_finite():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    settings = {"lr": 0.1, "skip_nonfinite": True}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    inputs, _ = data()[0]
    for by in (torch.nan, 1.0):
        (model(inputs).square().mean() * by).backward()
        (optimizer.first_step if by != 1 else optimizer.second_step)(zero_grad=True)
    assert optimizer.skipped == 1
    assert model[1].num_batches_tracked == 2
    assert model[1].running_mean.isfinite().all()


def test_how_many_were_skipped_is_kept_and_copied():
    _, optimizer = three_steps("closure", 0, torch.inf, True, False, *BASES[0])
    fresh = samfn.SAM(groups_of(net()), torch.optim.SGD, lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"].pop()
    fresh.load_state_dict(state)
    assert fresh.skipped == 1
    del state["skipped"]  # as it was before they were counted
    fresh.load_state_dict(state)
    assert fresh.skipped == 0
    copied = pickle.loads(pickle.dumps(optimizer))
    assert (copied.skipped, copied.skip_nonfinite) == (1, True)


class Waits(TorchDispatchMode):
    """Counts how often Python reads the value of a tensor, for which a GPU would wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_gpu_waits_once_a_step_where_it_may_be_skipped_and_else_never(skip_nonfinite):
    model = net()
    settings = {"lr": 0.1, "momentum": 0.9, "skip_nonfinite": skip_nonfinite}
    optimizer = samfn.SAM(groups_of(model, True), torch.optim.SGD, **settings)
    for batch in data():
        with Waits() as waits:
            two_steps(optimizer, model, batch)
        assert waits.count == skip_nonfinite


# torch.amp.GradScaler, on the CPU.


def scaled_steps(optimizer, scaler, model, batch, unscale=(), spoil=None):
    for number in (0, 1):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        if spoil == number:
            next(model.parameters()).grad[0, 0] = float("inf")
        if number in unscale:
            scaler.unscale_(optimizer)
        if number == 0:
            optimizer.first_step(zero_grad=True)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("unscale", [(), (1,)])
def test_the_recipe_with_a_grad_scaler_takes_the_unscaled_step(unscale):
    model, reference = net(), net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for batch in data():
        scaled_steps(optimizer, scaler, model, batch, unscale)
        two_steps(other, reference, batch)
        assert_close(weights(model), weights(reference))


@pytest.mark.parametrize("spoil", [0, 1])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_grad_scaler_that_skips_leaves_the_weights_as_they_were(spoil, skip_nonfinite):
    model = net()
    settings = {"lr": 0.1, "momentum": 0.9, "skip_nonfinite": skip_nonfinite}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    scaler = torch.amp.GradScaler("cpu")
    batch = data()[0]
    scaled_steps(optimizer, scaler, model, batch)
    before, scale = weights(model), scaler.get_scale()
    momentum = copy.deepcopy(optimizer.state_dict()["state"])
    scaled_steps(optimizer, scaler, model, batch, spoil=spoil)
    assert_close(weights(model), before, rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], momentum, rtol=0, atol=0)
    assert scaler.get_scale() == scale / 2
    assert optimizer.skipped == 1
    scaled_steps(optimizer, scaler, model, batch)
    assert not torch.equal(weights(model)["0.weight"], before["0.weight"])


def test_ways_with_a_grad_scaler_that_would_be_silently_wrong_are_errors():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    batch, before = data()[0], weights(model)
    with pytest.raises(RuntimeError, match=r"unscale_.* was called for the first pass"):
        scaled_steps(optimizer, torch.amp.GradScaler("cpu"), model, batch, unscale=(0,))
    assert_close(weights(model), before, rtol=0, atol=0)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
    with pytest.raises(RuntimeError, match="step cannot take a closure"):
        scaler.step(optimizer, closure_of(optimizer, model, batch))
    with pytest.raises(RuntimeError, match="call first_step"):
        scaler.step(optimizer)
    assert_close(weights(model), before, rtol=0, atol=0)


def test_calls_in_the_wrong_order_are_errors():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="no parameter has a gradient: call backward"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.step()
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step was called twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="perturbed, so there is no state to save"):
        optimizer.state_dict()


class Wrapper:
    """Passes for what it wraps, as `self.optimizers()` does in a module of Lightning."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_a_wrapper_that_passes_for_it_holds_nothing_of_its_own():
    model, reference = net(), net()
    settings = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, **settings)
    wrapper = Wrapper(optimizer)
    assert isinstance(wrapper, samfn.SAM)
    assert wrapper.param_groups is optimizer.param_groups
    wrapper.guard(model)
    for inputs, targets in data():
        for each, net_ in ((wrapper, model), (other, reference)):
            for half in (0, 8):
                part = inputs[half : half + 8], targets[half : half + 8]
                end = each.second_step if half else each.keep_step
                before = weights(net_)
                for number, step in enumerate((each.first_step, end)):
                    each.zero_grad()
                    F.cross_entropy(net_(part[0]), part[1]).backward()
                    step(zero_grad=True)
                    if number == 0:
                        with each.unperturbed():
                            assert_close(weights(net_), before, rtol=0, atol=0)
                        assert each.perturbed
                assert not each.perturbed
        wrapper.load_state_dict(wrapper.state_dict())
    assert_close(weights(model), weights(reference), rtol=0, atol=0)
    F.cross_entropy(model(inputs), targets).backward()
    wrapper.first_step(zero_grad=True)
    wrapper.restore()
    assert not optimizer.perturbed
    assert_close(weights(model), weights(reference), rtol=0, atol=0)
    assert [*vars(wrapper)] == ["optimizer"]


def test_every_parameter_may_be_a_group_of_its_own():
    model, reference = net(), net()
    groups = [{"params": [p], "rho": 0.05} for p in model.parameters()]
    optimizer = samfn.SAM(groups, torch.optim.SGD, lr=0.1)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    for batch in data():
        two_steps(optimizer, model, batch)
        two_steps(other, reference, batch)
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_rho_that_is_none_is_an_error_in_every_group(rho):
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        samfn.SAM([weight], torch.optim.SGD, rho=rho, lr=0.1)
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        samfn.SAM([{"params": [weight], "rho": rho}], torch.optim.SGD, lr=0.1)


def test_nothing_is_kept_between_steps():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    two_steps(optimizer, model, data()[0])
    gc.collect()
    assert not optimizer.state_dict()["state"]
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    assert hooks == [1, 0, 0, 1]  # which count backward passes
    del optimizer
    gc.collect()
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(not p._backward_hooks for p in model.parameters())


def replica(rank, store, results):
    """Train on this rank's half of each batch, as the README's recipe for DDP says."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    for kind in ("per replica", "global"):
        model = nn.parallel.DistributedDataParallel(net(torch.float64))
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
        for inputs, targets in data(torch.float64, steps=3):
            half = slice(8 * rank, 8 * rank + 8)
            alone = contextlib.nullcontext if kind == "global" else model.no_sync
            with alone():  # The forward pass, too.
                F.cross_entropy(model(inputs[half]), targets[half]).backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(model(inputs[half]), targets[half]).backward()
            optimizer.second_step(zero_grad=True)
        torch.save(weights(model.module), f"{results}/{kind}-{rank}")
    model = nn.parallel.DistributedDataParallel(net())
    settings = {"lr": 0.1, "skip_nonfinite": True}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    inputs, targets = data()[rank]
    with model.no_sync():  # One replica's first pass is not finite.
        (F.cross_entropy(model(inputs), targets) * (1.0, torch.inf)[rank]).backward()
    optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.second_step(zero_grad=True)
    torch.save((optimizer.skipped, weights(model.module)), f"{results}/skipped-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_under_ddp_it_perturbs_on_each_replica_or_for_all_of_them(tmp_path):
    arguments = str(tmp_path / "store"), str(tmp_path)
    torch.multiprocessing.spawn(replica, arguments, nprocs=2)
    model = net(torch.float64)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    for kind, method in {
        "per replica": samfn.per_micro_batch(samfn.sam(), 8),
        "global": samfn.sam(),
    }.items():
        optimizer = samfn.sgd(0.0)
        state = samfn.init(*samfn.split(model), optimizer=optimizer)
        common = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
        for batch in data(torch.float64, steps=3):
            state, _ = samfn.sam_update(state, batch, **common, rho=0.3, lr=0.1)
        found = [torch.load(tmp_path / f"{kind}-{rank}") for rank in (0, 1)]
        assert_close(found[0], found[1], rtol=0, atol=0)
        assert_close(found[0], dict(state.params), rtol=1e-9, atol=1e-11)
    for rank in (0, 1):
        skipped, found = torch.load(tmp_path / f"skipped-{rank}")
        assert skipped == 1
        assert_close(found, weights(net()), rtol=0, atol=0)


@pytest.mark.parametrize("by_closure", [False, True])
def test_one_autocast_around_a_loop_hides_no_perturbation(by_closure):
    def losses(around, within):
        torch.manual_seed(0)
        model, (inputs, targets) = nn.Linear(6, 3), (torch.randn(8, 6), torch.arange(8) % 3)
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.3)
        seen = []

        def closure():
            with within():
                loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            seen.append(loss.item())
            return loss

        with around():
            for _ in range(2):
                if by_closure:
                    optimizer.step(closure)
                    continue
                closure()
                optimizer.first_step(zero_grad=True)
                closure()
                optimizer.second_step(zero_grad=True)
        return seen

    half = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    found = losses(half, contextlib.nullcontext)
    assert found == losses(contextlib.nullcontext, half)
    assert found[1] > found[0] + 0.5


def test_one_autocast_around_a_loop_hides_nothing_that_is_loaded():
    model, inputs = nn.Linear(6, 3), torch.ones(1, 6)
    params, buffers = samfn.split(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        samfn.load(model, {name: 2 * w for name, w in params.items()}, buffers)
        assert_close(model(inputs), 2 * before)


def test_one_autocast_around_a_loop_hides_no_weights_that_were_put_back():
    model, inputs = torch.nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=10.0, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        before.sum().backward()
        optimizer.first_step(zero_grad=True)
        assert not torch.equal(model(inputs), before)
        optimizer.restore()
        assert torch.equal(model(inputs), before)


def test_going_back_to_a_state_that_was_kept_forgets_no_gradient_that_was_used():
    # As skorch's Checkpoint(load_best=True) does, and then goes on.
    ends = []
    for goes_back in (False, True):
        torch.manual_seed(0)
        model, batch = nn.Linear(8, 3), (torch.randn(9, 8), torch.randint(3, (9,)))
        given = {"lr": 0.1, "momentum": 0.9}
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **given)

        def closure(model=model, optimizer=optimizer, batch=batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        if goes_back:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.step(closure)
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        optimizer.step(closure)
        ends.append(model.weight.detach())
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(RuntimeError, match="gradients of a backward pass outside"):
            optimizer.step(closure)
    assert torch.equal(*ends)
