"""samfn.SAM over micro-batches: what is kept, and passes that saw less than the other."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import checkpoint

import samfn
from tests.samfn.imperative.test_optimizer import (
    BASES,
    TwoHeads,
    data,
    net,
    two_steps,
    weights,
)

COUNTS = "backward passes: {} before first_step, {} after it"
COUNT = 4  # micro-batches in a step


def made(dtype=torch.float32, **settings):
    model = net(dtype)
    settings = {"rho": 0.5, "lr": 0.1, "momentum": 0.9, **settings}
    return model, samfn.SAM(model.parameters(), torch.optim.SGD, **settings)


def micro_batches(batch, count=COUNT):
    return [*zip(*(part.chunk(count) for part in batch), strict=True)]


def backward(model, batch, scaler=None, by=1 / COUNT):
    loss = F.cross_entropy(model(batch[0]), batch[1]) * by
    (loss if scaler is None else scaler.scale(loss)).backward()


def accumulate(optimizer, model, batch, scaler=None, spoil=(), clip=None, count=COUNT):
    """Take a step with a perturbation for each micro-batch, as the docstring says."""
    for place, micro_batch in enumerate(micro_batches(batch, count)):
        for number in (0, 1):
            by = torch.inf if (place, number) == spoil else 1 / count
            backward(model, micro_batch, scaler, by)
            if number == 0:
                optimizer.first_step(zero_grad=True)
        if place + 1 < count:
            optimizer.keep_step(zero_grad=True)
            assert optimizer.kept == place + 1
    if clip:
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if scaler is None:
        optimizer.second_step(zero_grad=True)
    else:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.kept == 0


def functional(dtype, clip=None, *, steps=6, count=COUNT):
    """Return the weights that `per_micro_batch` comes to."""
    model = net(dtype)
    method = samfn.per_micro_batch(samfn.sam(), 16 // count)
    optimizer = samfn.sgd(0.9, weight_decay=1e-3)
    if clip:
        optimizer = samfn.clipped(optimizer, clip)
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    given = {"optimizer": optimizer, "method": method}
    given["loss_fn"] = samfn.supervised(model, F.cross_entropy)
    for batch in data(dtype, steps):
        state, _ = samfn.sam_update(state, batch, rho=0.5, lr=0.1, **given)
    return dict(state.params)


def close(found, expected, bar):
    for name, leaf in expected.items():
        assert (found[name] - leaf).norm() <= bar * leaf.norm(), name


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("scaled", [False, True])
def test_each_micro_batch_has_the_perturbation_of_per_micro_batch(dtype, bar, clip, scaled):
    model, optimizer = made(dtype, weight_decay=1e-3)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    for batch in data(dtype):
        accumulate(optimizer, model, batch, scaler, clip=clip)
    # PyTorch's clipping adds 1e-6 to the norm.
    close(weights(model), functional(dtype, clip), max(bar, 1e-7) if clip else bar)
    plain, other = made(dtype, weight_decay=1e-3)
    for batch in data(dtype):
        two_steps(other, plain, batch)
    assert not torch.allclose(weights(plain)["0.weight"], weights(model)["0.weight"], 1e-3)


@pytest.mark.parametrize(("base", "settings"), BASES)
def test_one_micro_batch_is_the_step_of_two(base, settings):
    model, reference = net(), net()
    optimizer = samfn.SAM(model.parameters(), base, **settings)
    other = samfn.SAM(reference.parameters(), base, **settings)
    for batch in data():
        accumulate(optimizer, model, batch, count=1)
        two_steps(other, reference, batch)
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


def test_the_last_micro_batch_may_come_by_a_closure():
    model, optimizer = made()
    reference, other = made()
    for batch in data():
        accumulate(other, reference, batch, count=2)
        one, last = micro_batches(batch, 2)
        backward(model, one, by=0.5)
        optimizer.first_step(zero_grad=True)
        backward(model, one, by=0.5)
        optimizer.keep_step(zero_grad=True)

        def closure(last=last):
            optimizer.zero_grad()
            backward(model, last, by=0.5)

        optimizer.step(closure)
        optimizer.zero_grad()
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


def test_a_closure_without_a_perturbation_adds_what_was_kept():
    model, optimizer = made(rho=0.0)
    plain = torch.optim.SGD((reference := net()).parameters(), lr=0.1, momentum=0.9)
    for one, last in zip(data()[::2], data()[1::2], strict=True):
        backward(model, one)
        optimizer.first_step(zero_grad=True)
        backward(model, one)
        optimizer.keep_step(zero_grad=True)
        optimizer.step(lambda batch=last: backward(model, batch))
        optimizer.zero_grad()
        for batch in (one, last):
            backward(reference, batch)
        plain.step()
        plain.zero_grad()
    assert_close(weights(model), weights(reference))


@pytest.mark.parametrize("place", range(COUNT))
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_not_finite_in_any_micro_batch_skips_the_step(place, number, scaled):
    model, optimizer = made(skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    accumulate(optimizer, model, data()[0], scaler)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    accumulate(optimizer, model, data()[1], scaler, spoil=(place, number))
    assert_close(weights(model), before, rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert optimizer.skipped == 1
    if scaled:
        assert scaler.get_scale() == 2.0**15
    accumulate(optimizer, model, data()[2], scaler)
    assert optimizer.skipped == 1
    assert not torch.equal(weights(model)["0.weight"], before["0.weight"])


def test_a_first_pass_that_is_not_finite_counts_where_no_second_pass_tells():
    model = TwoHeads()
    settings = {"lr": 0.1, "skip_nonfinite": True}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    before = weights(model)
    for factor, step in ((torch.inf, optimizer.keep_step), (1, optimizer.second_step)):
        (factor * model.loss("a")).backward()
        optimizer.first_step(zero_grad=True)
        model.b.grad = torch.ones(2)  # by hand, so that nothing marks it
        step(zero_grad=True)
    assert optimizer.skipped == 1
    assert_close(weights(model), before, rtol=0, atol=0)


def test_parameters_that_some_micro_batches_use_get_what_those_saw():
    model = TwoHeads()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    for names, step in (("a", optimizer.keep_step), ("ab", optimizer.second_step)):
        for each in (optimizer.first_step, step):
            model.loss(*names).backward()
            each(zero_grad=True)
    assert_close(model.a.detach(), torch.tensor([1.0, 2.0]) * 0.6)
    assert_close(model.b.detach(), torch.tensor([3.0, 4.0]) * 0.8)
    assert model.unused == 5


def test_sparse_gradients_are_kept_as_dense_ones_are():
    def trained(sparse):
        torch.manual_seed(0)
        model = nn.Embedding(10, 4, sparse=sparse)
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.5)
        for rows, step in (([1, 3], optimizer.keep_step), ([3, 4], optimizer.second_step)):
            for each in (optimizer.first_step, step):
                model(torch.tensor(rows)).square().sum().backward()
                each(zero_grad=True)
        return model.weight.detach()

    assert_close(trained(True), trained(False))


def keep_one(model, optimizer, batch):
    for step in (optimizer.first_step, optimizer.keep_step):
        backward(model, batch)
        step(zero_grad=True)


# What is kept is said, refused or given up, never lost.


@pytest.mark.parametrize("when", ["between", "perturbed"])
def test_what_is_kept_is_in_no_state_and_no_copy(when):
    model, optimizer = made()
    two_steps(optimizer, model, data()[0])
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    keep_one(model, optimizer, data()[1])
    if when == "perturbed":
        backward(model, data()[2])
        optimizer.first_step(zero_grad=True)
    with optimizer.unperturbed():
        for copied in (optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
            with pytest.raises(RuntimeError, match="gradients of 1 micro-batch are kept"):
                copied()
        with pytest.raises(RuntimeError, match=r"are kept.* call second_step or restore"):
            pickle.dumps(optimizer)
    with pytest.raises(RuntimeError, match=r"call restore\(\) before a state is loaded"):
        optimizer.load_state_dict(state)
    assert optimizer.kept == 1
    optimizer.guard(model)  # From both, training goes on before this step.
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    optimizer.restore()
    assert optimizer.kept == 0
    assert_close(weights(model), before, rtol=0, atol=0)
    assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    copy.deepcopy(optimizer).load_state_dict(state)


def test_to_load_a_guarded_model_gives_up_what_is_kept():
    model, optimizer = made()
    optimizer.guard(model)
    state = copy.deepcopy(model.state_dict())
    keep_one(model, optimizer, data()[0])
    model.load_state_dict(state)
    assert optimizer.kept == 0


def test_a_step_after_one_that_was_given_up_is_as_if_that_had_not_been():
    model, optimizer = made()
    reference, other = made()
    for number, batch in enumerate(data()):
        keep_one(model, optimizer, batch)
        if number % 2:
            backward(model, batch)
            optimizer.first_step(zero_grad=True)
        optimizer.restore()
        for each, its in ((model, optimizer), (reference, other)):
            two_steps(its, each, batch)
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_pass_that_fails_gives_up_the_step_and_one_that_does_not_goes_on(error):
    model, optimizer = made()
    before = weights(model)
    keep_one(model, optimizer, data()[0])
    with optimizer.restore_on_error():
        backward(model, data()[1])
        optimizer.first_step(zero_grad=True)
    assert optimizer.perturbed
    with pytest.raises(error), optimizer.restore_on_error():
        raise error
    assert not optimizer.perturbed
    assert optimizer.kept == 0
    assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("where", ["before", "between"])
def test_gradients_may_be_cleared_by_the_optimizer_while_others_are_kept(
    where, set_to_none
):
    model, optimizer = made()
    reference, other = made()
    for batch in data():
        accumulate(other, reference, batch, count=2)
        for micro_batch, end in zip(
            micro_batches(batch, 2),
            (optimizer.keep_step, optimizer.second_step),
            strict=True,
        ):
            for step in (optimizer.first_step, end):
                if where == "before" or step is end:
                    optimizer.zero_grad(set_to_none)
                backward(model, micro_batch, by=0.5)
                step(zero_grad=True)
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.parametrize(
    "clear",
    [
        lambda model: model.zero_grad(),
        lambda model: model.zero_grad(set_to_none=False),
    ],
)
@pytest.mark.parametrize("end", ["keep_step", "second_step"])
def test_what_is_kept_is_not_cleared_by_others_unnoticed(clear, end):
    model, optimizer = made()
    before = weights(model)
    keep_one(model, optimizer, data()[0])
    backward(model, data()[1])
    optimizer.first_step(zero_grad=True)
    clear(model)
    backward(model, data()[1])
    with pytest.raises(RuntimeError, match="that keep_step kept were cleared"):
        getattr(optimizer, end)(zero_grad=True)
    assert_close(weights(model), before, rtol=0, atol=0)
    assert optimizer.kept == 0
    two_steps(optimizer, model, data()[2])


def test_what_is_kept_is_not_cleared_with_what_was_added_to_it():
    model, optimizer = made()
    keep_one(model, optimizer, data()[0])
    backward(model, data()[1])
    optimizer.first_step(zero_grad=True)
    backward(model, data()[1])
    with pytest.raises(RuntimeError, match="the gradients hold what keep_step kept"):
        optimizer.zero_grad()
    optimizer.second_step(zero_grad=True)


def test_calls_in_the_wrong_order_are_errors():
    model, optimizer = made()
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.keep_step()
    keep_one(model, optimizer, data()[0])
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.keep_step()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.second_step()
    backward(model, data()[1])
    with pytest.raises(RuntimeError, match=r"call first_step\(zero_grad=True\)"):
        optimizer.first_step()
    optimizer.first_step(zero_grad=True)
    for end in (optimizer.keep_step, optimizer.second_step):
        with pytest.raises(RuntimeError, match=COUNTS.format(1, 0)):
            end(zero_grad=True)
        assert not optimizer.perturbed
        keep_one(model, optimizer, data()[0])
        backward(model, data()[1])
        optimizer.first_step(zero_grad=True)


def test_a_gradient_that_nobody_clears_is_in_no_second_sum():
    """Without zero_grad, the next first pass would begin with it."""
    model, optimizer = made()
    backward(model, data()[0])
    optimizer.first_step(zero_grad=True)
    backward(model, data()[0])
    optimizer.keep_step()
    assert all(p.grad is not None for p in model.parameters())
    backward(model, data()[1])
    optimizer.first_step(zero_grad=True)
    backward(model, data()[1])
    with pytest.raises(RuntimeError, match=COUNTS.format(2, 1)):
        optimizer.second_step()


# A pass that saw less than the other.


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("way", ["second_step", "keep_step", "step", "closure"])
def test_a_pass_of_fewer_backward_passes_is_an_error(counts, way):
    model, optimizer = made()
    before = weights(model)
    left = iter(counts)

    def closure():
        for batch in data()[: next(left)]:
            backward(model, batch)

    def whole():
        if way == "closure":
            optimizer.step(closure)
            return
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        getattr(optimizer, way)()

    with pytest.raises(RuntimeError, match=COUNTS.format(*counts)):
        whole()
    assert not optimizer.perturbed
    assert_close(weights(model), before, rtol=0, atol=0)
    optimizer.zero_grad()
    two_steps(optimizer, model, data()[0])


def test_it_is_one_where_a_grad_scaler_steps():
    model, optimizer = made()
    before, scaler = weights(model), torch.amp.GradScaler("cpu")
    for batch in data()[:2]:
        backward(model, batch, scaler)
    optimizer.first_step(zero_grad=True)
    backward(model, data()[1], scaler)
    with pytest.raises(RuntimeError, match=COUNTS.format(2, 1)):
        scaler.step(optimizer)
    assert_close(weights(model), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_cleared_between_the_passes_is_an_error():
    model, optimizer = made()
    backward(model, data()[0])
    optimizer.first_step()
    backward(model, data()[0])
    with pytest.raises(RuntimeError, match=COUNTS.format(1, 2) + ".*zero_grad=True"):
        optimizer.second_step()


def cleared_by_hand(model):
    for p in model.parameters():
        p.grad = None


CLEARED = {
    "by the model": lambda model, optimizer: model.zero_grad(),
    "in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by the base": lambda model, optimizer: optimizer.base_optimizer.zero_grad(),
    "by hand": lambda model, optimizer: [
        setattr(p, "grad", None) for p in model.parameters()
    ],
    "here": lambda model, optimizer: optimizer.zero_grad(),
    "here, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("way", CLEARED)
@pytest.mark.parametrize("count", [1, 3])
def test_a_loop_that_clears_gradients_anywhere_is_right(way, count):
    model, optimizer = made()
    reference, other = made()
    for batch in data():
        for step in (optimizer.first_step, optimizer.second_step):
            if way not in ("in place", "here, in place"):
                backward(model, data()[0])  # looked at, and dropped
            CLEARED[way](model, optimizer)
            for _ in range(count):
                backward(model, batch)
            torch.autograd.grad(model(batch[0]).sum(), [*model.parameters()])
            step()
        for step in (other.first_step, other.second_step):
            for _ in range(count):
                backward(reference, batch)
            step(zero_grad=True)
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.parametrize("cleared", ["model", "optimizer"])
def test_two_networks_in_a_game_train_as_they_should(cleared):
    """The loss of each goes through the other, whose gradients it leaves behind."""

    def train(make):
        torch.manual_seed(0)
        one, two = (nn.Linear(3, 3) for _ in range(2))
        ours, theirs = make(one), make(two)
        for step in range(6):
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            for player, optimizer, sign in ((one, ours, 1), (two, theirs, -1)):
                for end in ("first_step", "second_step"):
                    (player if cleared == "model" else optimizer).zero_grad()
                    for part in inputs.chunk(2):
                        (sign * two(one(part).tanh()).square().mean()).backward()
                    if end == "first_step" and hasattr(optimizer, end):
                        optimizer.first_step()
                    elif end == "second_step":
                        optimizer.step()
        return weights(nn.ModuleList([one, two]))

    found = train(lambda m: samfn.SAM(m.parameters(), torch.optim.SGD, rho=0, lr=0.1))
    expected = train(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_and_several_losses_are_no_difference(reentrant):
    model, optimizer = made()
    reference, other = made()

    def outputs(model, inputs):
        inputs = inputs.detach().requires_grad_()
        hidden = checkpoint.checkpoint(model[0], inputs, use_reentrant=reentrant)
        return checkpoint.checkpoint(model[2], hidden.tanh(), use_reentrant=reentrant)

    for inputs, targets in data():
        for step in (optimizer.first_step, optimizer.second_step):
            (F.cross_entropy(outputs(model, inputs), targets) / 2).backward()
            (F.cross_entropy(outputs(model, inputs), targets) / 2).backward()
            step(zero_grad=True)
        two_steps(other, reference, (inputs, targets))
    assert_close(weights(model), weights(reference))


@pytest.mark.parametrize("frozen", [0, 2])
def test_passes_are_counted_where_the_ends_of_a_network_are_frozen_or_thawed(frozen):
    model, optimizer = made()
    model[frozen].requires_grad_(False)
    two_steps(optimizer, model, data()[0])
    model[frozen].requires_grad_(True)
    model[2 - frozen].requires_grad_(False)
    two_steps(optimizer, model, data()[0])  # From here on, others are watched.
    for batch in data()[:2]:
        backward(model, batch)
    optimizer.first_step(zero_grad=True)
    backward(model, data()[1])
    with pytest.raises(RuntimeError, match=COUNTS.format(2, 1)):
        optimizer.second_step()


def test_passes_are_counted_where_steps_are_of_parts_of_a_network_by_turns():
    heads = nn.ModuleList([nn.Linear(5, 3) for _ in range(4)])
    optimizer = samfn.SAM(heads.parameters(), torch.optim.SGD, lr=0.1)
    for head in heads[1:3]:  # Neither has the first parameter or the last.
        two_steps(optimizer, head, data()[0])
    for batch in data()[:2]:
        backward(heads[1], batch)
    optimizer.first_step(zero_grad=True)
    backward(heads[1], data()[1])
    with pytest.raises(RuntimeError, match=COUNTS.format(2, 1)):
        optimizer.second_step()


@pytest.mark.parametrize("again", ["copied", "loaded"])
def test_passes_are_counted_after_a_copy_and_a_load(again):
    model, optimizer = made()
    two_steps(optimizer, model, data()[0])
    if again == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    two_steps(optimizer, model, data()[0])
    for batch in data()[:2]:
        backward(model, batch)
    optimizer.first_step(zero_grad=True)
    backward(model, data()[1])
    with pytest.raises(RuntimeError, match=COUNTS.format(2, 1)):
        optimizer.second_step()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_passes_through_a_compiled_model_are_counted(backend):
    model, optimizer = made()
    compiled = torch.compile(model, backend=backend)
    two_steps(optimizer, compiled, data()[0])
    for batch in data()[:2]:
        backward(compiled, batch)
    optimizer.first_step(zero_grad=True)
    backward(compiled, data()[1])
    with pytest.raises(RuntimeError, match=COUNTS.format(2, 1)):
        optimizer.second_step()


def test_gradients_that_others_clear_after_a_step_are_freed():
    model, optimizer = made()
    backward(model, data()[0])
    optimizer.first_step(zero_grad=True)
    backward(model, data()[0])
    optimizer.second_step()
    seen = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad()
    assert [each() for each in seen] == [None] * 4
