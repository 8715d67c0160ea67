"""samfn.SAM around whatever base optimizer, and its settings wherever they come from."""

import copy
import math
import warnings
from collections import defaultdict
from functools import partial

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.testing import assert_close

import samfn
from tests.samfn.imperative.test_optimizer import (
    Davda54,
    TwoHeads,
    closure_of,
    data,
    groups_of,
    net,
    scaled_steps,
    two_steps,
    weights,
)

WRONG = [
    ("rho", -0.1, ValueError, "rho must be finite and at least 0, got -0.1"),
    ("rho", math.nan, ValueError, "rho must be finite and at least 0, got nan"),
    ("rho", math.inf, ValueError, "rho must be finite and at least 0, got inf"),
    ("rho", torch.tensor(-1.0), ValueError, "rho must be finite and at least 0, got -1"),
    ("rho", torch.tensor(math.nan), ValueError, "rho must be finite and .*, got nan"),
    ("rho", torch.ones(2), ValueError, r"0-d tensor, got shape \(2,\)"),
    ("rho", torch.tensor(1j), TypeError, "rho must be a number .*, got torch.complex"),
    ("rho", "0.1", TypeError, "rho must be a number or a 0-d tensor, got str"),
    ("rho", None, TypeError, "rho must be a number or a 0-d tensor, got NoneType"),
    ("rho", True, TypeError, "rho must be a number or a 0-d tensor, got bool"),
    ("adaptive", "False", TypeError, "adaptive must be True or False, got 'False'"),
    ("adaptive", math.nan, TypeError, "adaptive must be True or False, got nan"),
    ("adaptive", None, TypeError, "adaptive must be True or False, got None"),
    ("differentiable", True, ValueError, "differentiable must be False"),
]


def by_constructor(optimizer, model, wrong):
    samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, **wrong)


def by_group(optimizer, model, wrong):
    samfn.SAM([{"params": model.parameters(), **wrong}], torch.optim.SGD, lr=0.1)


def by_added_group(optimizer, model, wrong):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **wrong})


def by_state(optimizer, model, wrong):
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(lr=9.0)
    state["param_groups"][1].update(wrong)
    optimizer.load_state_dict(state)


def by_assignment(optimizer, model, wrong):
    optimizer.param_groups[1].update(wrong)
    two_steps(optimizer, model, data()[0])


def by_group_of_base(optimizer, model, wrong):
    weight = nn.Parameter(torch.ones(1))
    optimizer.base_optimizer.add_param_group({"params": [weight], **wrong})
    two_steps(optimizer, model, data()[0])


@pytest.mark.parametrize(
    "way",
    [by_constructor, by_group, by_added_group, by_state, by_assignment, by_group_of_base],
)
@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_a_setting_that_is_none_is_refused_wherever_it_comes_from(
    way, name, value, error, message
):
    model = net()
    optimizer = samfn.SAM(groups_of(model), torch.optim.SGD, lr=0.1, momentum=0.9)
    two_steps(optimizer, model, data()[0])
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        way(optimizer, model, {name: value})
    assert not optimizer.perturbed
    assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    if way not in (by_assignment, by_group_of_base):
        assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)
        two_steps(optimizer, model, data()[1])


def test_a_group_added_to_the_base_optimizer_has_the_rho_of_all():
    model = net()
    settings = {"rho": 0.3, "adaptive": True, "lr": 0.1}
    optimizer = samfn.SAM(model[0].parameters(), torch.optim.SGD, **settings)
    optimizer.base_optimizer.add_param_group({"params": model[2].parameters()})
    reference = net()
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, **settings)
    for batch in data():
        two_steps(optimizer, model, batch)
        two_steps(other, reference, batch)
        assert_close(weights(model), weights(reference), rtol=0, atol=0)


def trained_plainly():
    """Return a model, and the state of its optimizer, which has momentum."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer.state_dict()


def test_a_state_of_the_base_optimizer_alone_goes_on_with_the_rho_that_there_is():
    """As where SAM is for the end of a training."""
    model, state = trained_plainly()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=9.0)
    optimizer.load_state_dict(copy.deepcopy(state))
    reference = copy.deepcopy(model)
    group = {"params": reference.parameters(), "rho": 0.3, "adaptive": False}
    theirs = Davda54([group], torch.optim.SGD)
    state["param_groups"][0].update(rho=0.3, adaptive=False)
    theirs.base.load_state_dict(state)
    for inputs, targets in data():
        two_steps(optimizer, model, (inputs, targets))
        theirs.step(lambda x=inputs, y=targets: F.cross_entropy(reference(x), y))
        assert_close(weights(model), weights(reference))
    optimizer = samfn.SAM(groups_of(net()), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)


def test_what_the_base_optimizer_loads_by_itself_is_what_both_have():
    model, state = trained_plainly()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=9.0)
    optimizer.base_optimizer.load_state_dict(state)
    with pytest.raises(TypeError, match=r"rho must be a number .*, got NoneType"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert len(optimizer.state_dict()["state"]) == 4
    with pytest.raises(TypeError, match=r"rho must be a number .*, got NoneType"):
        two_steps(optimizer, model, data()[0])
    optimizer.param_groups[0]["rho"] = 0.0
    with pytest.raises(TypeError, match="adaptive must be True or False, got None"):
        two_steps(optimizer, model, data()[0])
    optimizer.param_groups[0]["adaptive"] = False
    optimizer.zero_grad()
    two_steps(optimizer, model, data()[0])


CLASSES = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.ASGD,
    torch.optim.Rprop,
    torch.optim.Adafactor,
    pytorch_optimizer.Lion,
]
FLAGS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("base", CLASSES)
def test_every_base_optimizer_takes_the_steps_of_davda54(base, flags):
    model, other = net(torch.float64), net(torch.float64)
    try:
        optimizer = samfn.SAM(groups_of(model, True), base, lr=0.01, **flags)
    except TypeError:
        pytest.skip(f"{base.__name__} has no {flags}")
    theirs = Davda54(groups_of(other, True), base, lr=0.01, **flags)
    for inputs, targets in data(torch.float64, steps=3):
        two_steps(optimizer, model, (inputs, targets))
        theirs.step(lambda x=inputs, y=targets: F.cross_entropy(other(x), y))
        assert_close(weights(model), weights(other), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("base", CLASSES)
@pytest.mark.parametrize("groups", ["all", "the second"])
def test_to_maximise_is_to_minimise_the_negative(base, groups):
    """Of the parameters that maximise, as a game of two networks may have it."""
    one, other = net(torch.float64), net(torch.float64)

    def loss_of(model, batch, sign):
        hidden = model[1](model[0](batch[0]))
        last = model[2] if groups == "the second" else model
        held = [p.requires_grad_(False) for p in last.parameters()]
        first = F.cross_entropy(model[2](hidden), batch[1])
        for p in held:
            p.requires_grad_(True)
        if groups == "all":
            return sign * F.cross_entropy(model(batch[0]), batch[1])
        return first + sign * F.cross_entropy(model[2](hidden.detach()), batch[1])

    def made(model, maximise):
        settings = [
            {"params": model[0].parameters(), "maximize": maximise and groups == "all"},
            {"params": model[2].parameters(), "maximize": maximise, "adaptive": True},
        ]
        kind = base
        if base is pytorch_optimizer.Lion:  # It keeps this for all groups, in itself.
            kind = partial(base, maximize=maximise)
            for group in settings:
                del group["maximize"]
        return samfn.SAM(settings, kind, rho=0.5, lr=0.01)

    if base is pytorch_optimizer.Lion and groups != "all":
        pytest.skip("no groups of it")
    ours, theirs = made(one, True), made(other, False)
    for batch in data(torch.float64, steps=3):
        for model, optimizer, sign in ((one, ours, 1), (other, theirs, -1)):
            for step in (optimizer.first_step, optimizer.second_step):
                loss_of(model, batch, sign).backward()
                step(zero_grad=True)
        assert_close(weights(one), weights(other), rtol=1e-7, atol=1e-9)


def test_what_a_base_optimizer_cannot_do_leaves_the_weights():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.Adam, capturable=True, lr=0.1)
    before = weights(model)
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        two_steps(optimizer, model, data()[0])  # Not on a CPU.
    assert_close(weights(model), before, rtol=0, atol=0)
    assert not optimizer.perturbed


class AsksForTheLoss(torch.optim.SGD):
    def step(self, *, loss, **others):
        return super().step()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (AsksForTheLoss, "needs no closure, got AsksForTheLoss, whose step needs 'loss'"),
        (lambda groups, lr: object(), "expected a base optimizer of PyTorch, got object"),
        (
            lambda groups, lr: samfn.SAM(groups, torch.optim.SGD, lr=lr),
            "got samfn.SAM inside of samfn.SAM",
        ),
    ],
)
def test_what_is_no_base_optimizer_is_refused_when_it_is_made(base, message):
    with pytest.raises(TypeError, match=message):
        samfn.SAM(net().parameters(), base, lr=0.1)


# Modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_is_the_same_in_every_mode(mode, closure):
    model, reference = net(), net()
    settings = {"lr": 0.1, "momentum": 0.9, "skip_nonfinite": True}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, **settings)
    for number, batch in enumerate(data()):
        chosen = mode if number % 2 else torch.enable_grad
        if closure:
            with chosen():
                optimizer.step(closure_of(optimizer, model, batch))
            optimizer.zero_grad()
        else:
            for step in (optimizer.first_step, optimizer.second_step):
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                with chosen():
                    step(zero_grad=True)
        two_steps(other, reference, batch)
        assert_close(weights(model), weights(reference), rtol=0, atol=0)
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("returned", [None, 1.5, torch.ones(2), {"loss": 1}])
def test_a_closure_may_return_anything(returned):
    model, reference = net(), net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, lr=0.1)
    closure = closure_of(optimizer, model, data()[0])
    assert optimizer.step(lambda: (closure(), returned)[1]) is returned
    two_steps(other, reference, data()[0])
    assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_complex_weights_are_pairs_of_real_ones_with_one_size(adaptive, skip_nonfinite):
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    two = nn.Parameter(torch.randn(3, dtype=torch.float64))
    grads = torch.randn_like(one), torch.randn_like(two)
    settings = {"rho": 0.5, "adaptive": adaptive, "skip_nonfinite": skip_nonfinite}
    optimizer = samfn.SAM([one, two], torch.optim.SGD, lr=0.1, **settings)
    before = one.detach().clone(), two.detach().clone()
    one.grad, two.grad = (g.clone() for g in grads)
    optimizer.first_step()
    sizes = [w.abs() if adaptive else torch.ones(3) for w in before]
    pairs = list(zip(sizes, grads, strict=True))
    total = sum((size * g).abs().square().sum() for size, g in pairs).sqrt()
    for p, w, (size, g) in zip((one, two), before, pairs, strict=True):
        assert_close(p.detach(), w + 0.5 * size**2 * g / total)
    optimizer.second_step()
    assert_close(one.detach(), before[0] - 0.1 * grads[0])


def test_a_frozen_parameter_with_a_gradient_of_before_is_no_error():
    model = net()
    settings = {"lr": 0.1, "skip_nonfinite": True}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    model[2].bias.requires_grad_(False)
    before = weights(model)
    optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    optimizer.second_step()
    assert torch.equal(model[2].bias, before["2.bias"])
    assert not torch.equal(model[2].weight, before["2.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_may_be_on_several_devices(adaptive):
    def trained(device):
        model = net(torch.float64)
        model[2].to(device)
        settings = {"rho": 0.5, "adaptive": adaptive, "skip_nonfinite": True}
        optimizer = samfn.SAM(model.parameters(), torch.optim.AdamW, lr=0.01, **settings)
        for inputs, targets in data(torch.float64):
            for step in (optimizer.first_step, optimizer.second_step):
                outputs = model[2](model[1](model[0](inputs)).to(device))
                F.cross_entropy(outputs.cpu(), targets).backward()
                step(zero_grad=True)
        return weights(model.cpu())

    assert_close(trained("cuda"), trained("cpu"), rtol=1e-9, atol=1e-10)


# torch.amp.GradScaler, whichever parameters have a gradient.


class Dead(nn.Module):
    """A network with a small parameter that gets no gradient, or one of 0."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.passes = kind, 0
        self.weight = nn.Parameter(torch.ones(5, 3))
        self.small = nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.ones(0))

    def forward(self, inputs):
        self.passes += 1
        outputs = inputs @ self.weight + self.empty.sum()
        if self.kind == "zero":
            outputs = outputs + 0 * self.small
        if self.kind == "zero second" and self.passes % 2 == 0:
            outputs = outputs + 0 * self.small
        if self.kind in ("none second", "zero second") and self.passes % 2 == 1:
            outputs = outputs * self.small
        if self.kind == "all zero":
            outputs = 0 * outputs
        return outputs


KINDS = ["zero", "zero second", "none second", "none", "all zero"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_what_is_unscaled_too_early_is_found_whatever_has_a_gradient(kind, scale):
    model = Dead(kind)
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with pytest.raises(RuntimeError, match=r"unscale_.* was called for the first pass"):
        scaled_steps(optimizer, scaler, model, data()[0], unscale=(0,))
    assert_close(weights(model), before, rtol=0, atol=0)
    assert not optimizer.perturbed


def test_what_is_unscaled_too_early_is_found_where_gradients_are_cleared_by_themselves():
    model, batch = net(), data()[0]
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
    scaler.unscale_(optimizer)
    optimizer.first_step()
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
    with pytest.raises(RuntimeError, match=r"unscale_.* was called for the first pass"):
        scaler.step(optimizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("unscale", [(), (1,)])
def test_what_is_unscaled_in_time_is_the_plain_step(kind, scale, unscale):
    model, reference = Dead(kind), Dead(kind)
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    other = samfn.SAM(reference.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for batch in data():
        scaled_steps(optimizer, scaler, model, batch, unscale=unscale)
        two_steps(other, reference, batch)
        assert_close(weights(model), weights(reference))


def test_a_first_pass_that_is_not_finite_lowers_the_scale_by_any_gradient_of_the_second():
    for second in ("a", "b"):
        model = TwoHeads()
        settings = {"lr": 0.1, "skip_nonfinite": True}
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)
        scaler = torch.amp.GradScaler("cpu")
        scale = scaler.get_scale()
        scaler.scale(torch.inf * model.loss("a")).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(scale and model.loss(second)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert optimizer.skipped == 1


# What goes around it.

SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=6),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "in a row": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 3)],
        [3],
    ),
    "averaging": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_sets_what_it_sets_without_sam(name, inner):
    model, reference = net(), net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    chosen = optimizer.base_optimizer if inner else optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "in a row":  # PyTorch warns of it by itself.
            warnings.filterwarnings("ignore", "Detected call of|The epoch parameter")
        pair = SCHEDULERS[name](chosen), SCHEDULERS[name](plain)
        for batch in data(steps=5):
            two_steps(optimizer, model, batch)
            plain.step()
            for scheduler in pair:
                scheduler.step(*([1.0] if name == "plateau" else []))
            found, expected = optimizer.param_groups[0], plain.param_groups[0]
            assert found["lr"] == expected["lr"]
            assert found["momentum"] == expected["momentum"]
        state = pair[0].state_dict()
        copied = copy.deepcopy(optimizer)  # A scheduler wraps its step.
    assert copied.param_groups[0]["lr"] == found["lr"]
    assert state["_last_lr"] == [found["lr"]]


def test_weights_are_averaged_after_steps():
    model = net()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer.guard(model)
    average, seen = swa_utils.AveragedModel(model), []
    for batch in data():
        two_steps(optimizer, model, batch)
        average.update_parameters(model)
        seen.append(weights(model))
    expected = {name: sum(one[name] for one in seen) / len(seen) for name in seen[0]}
    assert_close(weights(average.module), expected)


def test_a_base_optimizer_that_has_a_rho_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match=r"without a setting rho, got Adadelta, .*from_torch"
    ):
        samfn.SAM(net().parameters(), torch.optim.Adadelta, rho=0.05)


@pytest.mark.parametrize("by", ["verbs", "step", "closure", "scaler"])
def test_hooks_of_steps_are_called_once_a_step_whatever_takes_it(by):
    model, (inputs, targets) = net(), data()[0]
    optimizer, seen = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1), []
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(
        lambda own, args, kwargs: seen.extend([own is optimizer, weights(model)])
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=by == "scaler")

    def closure():
        loss = F.cross_entropy(model(inputs), targets)
        scaler.scale(loss).backward()
        return loss

    if by == "closure":
        optimizer.step(closure)
    else:
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        {
            "verbs": optimizer.second_step,
            "step": optimizer.step,
            "scaler": lambda: scaler.step(optimizer),
        }[by]()
    before, is_own, after = seen
    assert before == "before"
    assert is_own
    assert_close(after, weights(model), rtol=0, atol=0)
    assert not torch.equal(next(model.parameters()), start[0])


def test_a_memory_that_is_put_in_its_place_is_that_of_the_base_optimizer():
    model, batch = net(), data()[0]
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    two_steps(optimizer, model, batch)
    optimizer.state = defaultdict(dict)
    assert not optimizer.base_optimizer.state
    before = weights(model)
    two_steps(optimizer, model, batch)
    for name, p in model.named_parameters():
        assert_close(optimizer.state[p]["momentum_buffer"], (before[name] - p) / 0.1)
