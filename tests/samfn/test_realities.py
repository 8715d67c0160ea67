"""The parts of training where SAM usually breaks: precision, statistics, bad numbers."""

import copy
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import samfn
from bench.measure import distance
from bench.networks import Transformer
from samfn.loss import Aux
from tests.reference import overwriting_sam_step


def trained(steps, dtype, method):
    """Train a small network; return the start, the state, and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = samfn.sgd(0.9)
    loss_fn = samfn.supervised(model, F.cross_entropy, dtype=dtype)
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    start, losses = state.params, []
    for _ in range(steps):
        inputs = torch.randn(32, 6)
        batch = inputs, (inputs.sum(1) > 0).long()
        common = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
        state, metrics = samfn.sam_update(state, batch, **common, lr=0.1)
        losses.append(metrics.loss)
    return start, state, torch.stack(losses)


@pytest.mark.parametrize("method", [samfn.sam(), samfn.asam(), samfn.gsam()])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float16, 0.005), (torch.bfloat16, 0.05)]
)
def test_100_steps_in_half_precision_are_those_of_float32(method, dtype, rounding):
    half = samfn.loss_scaled(method) if dtype is torch.float16 else method
    start, state, losses = trained(100, dtype, half)
    _, expected, others = trained(100, None, method)
    assert state.skipped == 0
    assert all(w.dtype is torch.float32 for w in state.params.values())
    assert distance(start, expected.params, state.params) < rounding
    assert_close(losses, others, rtol=rounding, atol=rounding)


def test_a_loss_scale_that_overflows_backs_off_until_training_goes_on():
    method = samfn.loss_scaled(samfn.sam(), 2.0**40)
    _, state, losses = trained(60, torch.float16, method)
    skipped = int(state.skipped)
    assert 10 < skipped < 40
    assert state.skipped_in_a_row == 0
    assert state.method_state["loss_scale"] == 2.0 ** (40 - skipped)
    assert losses[-1] < losses[0] / 2


# Places of what is not finite: the loss, or one entry of one gradient, of either pass.
PLACES = ("clean loss", "clean gradient", "perturbed loss", "perturbed gradient")


def spoilt(params, buffers, batch):
    """Return a loss of which `batch` says where and how it is not finite."""
    x, y, start, places, entry = batch
    here = params["weight"].detach()
    clean = (here == start).all()
    bad = torch.where(clean, places[:2], places[2:])
    losses = ((x @ params["weight"] + params["bias"]).tanh() - y).square().sum(1)
    losses = losses + torch.where(bad[0] > 0, float("nan"), 0.0)
    # The root is 0 there, and its slope infinite.
    zero = (params["weight"] - here).flatten() @ F.one_hot(entry, 6).double()
    steep = bad[1] * (zero + 1 - bad[1]).sqrt()
    return losses.mean() + steep - steep.detach(), Aux(
        None, {"count": buffers["count"] + 1}, losses
    )


METHODS = {
    "sam": samfn.sam(),
    "asam": samfn.asam(),
    "gsam": samfn.gsam(),
    "wsam": samfn.wsam(),
    "friendly_sam": samfn.friendly_sam(),
    "looksam": samfn.looksam(3),
    "loss_scaled": samfn.loss_scaled(samfn.vasso()),
    "spectral_sam": samfn.spectral_sam(),
    "multi_step_sam": samfn.multi_step_sam(),
    "ssam": samfn.ssam(),
    "awp": samfn.awp(),
    "unified_sam": samfn.unified_sam(),
    "light_sam": samfn.light_sam(),
    "ae_sam": samfn.ae_sam(9, -9.0, -9.0),
    "every": samfn.every(samfn.fisher_sam(), 3),
}
OPTIMIZERS = [samfn.sgd(0.9, weight_decay=1e-3), samfn.adamw()]


def injected(case, step_of, optimizers=OPTIMIZERS):
    """Train for three steps, spoil the fourth, and check that it changed nothing."""
    choose = random.Random(case)
    place, entry = PLACES[case % 4], choose.randrange(6)
    name = list(METHODS)[case // 4 % len(METHODS)]
    method, optimizer = METHODS[name], choose.choice(optimizers)
    source = torch.Generator().manual_seed(case)
    params = {
        "weight": torch.randn(3, 2, generator=source, dtype=torch.float64),
        "bias": torch.randn(2, generator=source, dtype=torch.float64),
    }
    buffers = {"count": torch.tensor(0)}
    state = samfn.init(params, buffers, optimizer=optimizer, method=method)
    for number in range(4):
        places = torch.zeros(4, dtype=torch.float64)
        places[PLACES.index(place)] = float(number == 3)
        batch = (
            torch.randn(8, 3, generator=source, dtype=torch.float64),
            torch.randn(8, 2, generator=source, dtype=torch.float64),
            state.params["weight"].clone(),
            places,
            torch.tensor(entry),
        )
        before = pytree.tree_map(torch.clone, state)
        state, metrics = step_of(state, batch, optimizer, method)
        assert metrics.finite == (number < 3), (name, place, number)
    return before, state


def assert_unchanged(before, after):
    old, new = before._asdict(), after._asdict()
    for key in ("params", "buffers", "opt_state"):
        assert_close(dict(new[key]), dict(old[key]), rtol=0, atol=0)
    memory = dict(new["method_state"])
    if "loss_scale" in memory:
        assert memory.pop("loss_scale") == old["method_state"]["loss_scale"] / 2
        assert memory.pop("loss_scale_finite_steps") == 0
    kept = {key: old["method_state"][key] for key in memory}
    assert_close(memory, kept, rtol=0, atol=0)
    assert (after.step, after.skipped, after.skipped_in_a_row) == (4, 1, 1)


@pytest.mark.parametrize("block", range(4))
def test_160_bad_numbers_leave_every_tensor_bit_equal(block, record_property):
    record_property("trials", 40)

    def step_of(state, batch, optimizer, method):
        common = {"loss_fn": spoilt, "optimizer": optimizer, "method": method}
        return samfn.sam_update(state, batch, **common, rho=0.1, lr=0.1)

    for case in range(40 * block, 40 * block + 40):
        assert_unchanged(*injected(case, step_of))


@pytest.mark.slow
def test_40_bad_numbers_in_a_compiled_step_leave_every_tensor_bit_equal(record_property):
    record_property("trials", 40)
    made = {}

    def step_of(state, batch, optimizer, method):
        torch.compiler.reset() if len(made) % 8 == 7 else None
        key = id(optimizer), id(method)
        if key not in made:
            common = {"loss_fn": spoilt, "optimizer": optimizer, "method": method}
            made[key] = samfn.compile_update(**common, plan="gradient", backend="aot_eager")
        return made[key](state, batch, rho=0.1, lr=0.1)

    for case in range(40):  # Each method with one optimizer, which is compiled once.
        optimizers = [OPTIMIZERS[case // 4 % 2]]
        assert_unchanged(*injected(case, step_of, optimizers))


PASSES = {"pass 1: the loss is nan": 0, "pass 1: the gradient of weight": 1}
PASSES |= {"pass 2: the loss is nan": 2, "pass 2: the gradient of weight": 3}


@pytest.mark.parametrize("said", PASSES)
@pytest.mark.parametrize("name", ["sam", "gsam", "loss_scaled"])
def test_what_was_not_finite_is_found_in_its_pass(name, said):
    method, optimizer = METHODS[name], samfn.sgd()
    params = {"weight": torch.randn(3, 2).double(), "bias": torch.randn(2).double()}
    buffers = {"count": torch.tensor(0)}
    state = samfn.init(params, buffers, optimizer=optimizer, method=method)
    common = {"loss_fn": spoilt, "method": method, "rho": 0.1}
    for spoiled in (False, True):
        places = torch.zeros(4).double()
        places[PASSES[said]] = float(spoiled)
        batch = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        batch = *batch, state.params["weight"].clone(), places, torch.tensor(3)
        state, metrics = samfn.sam_update(
            state, batch, **common, optimizer=optimizer, lr=0.1
        )
        assert metrics.finite != spoiled
        found = samfn.find_nonfinite(state, batch, **common)
        # After a step that was taken, the weights that `spoilt` knows are others.
        assert found == said if spoiled else found is None


def test_the_caller_chooses_to_raise_or_to_go_on():
    optimizer = samfn.sgd()
    state = samfn.init({"w": torch.ones(1)}, {}, optimizer=optimizer)

    def step(state, value):
        return samfn.sam_update(
            state,
            torch.tensor(value),
            loss_fn=lambda p, b, x: (p["w"] * x).sum(),
            optimizer=optimizer,
            lr=0.1,
        )[0]

    state = step(step(state, 1.0), float("nan"))
    samfn.require_finite(state, in_a_row=2)
    with pytest.raises(samfn.NonFiniteError, match="last 1 of 2 steps"):
        samfn.require_finite(state)
    state = step(state, float("nan"))
    with pytest.raises(ArithmeticError, match="last 2 of 3 steps"):
        samfn.require_finite(state, in_a_row=2)
    state = step(state, 1.0)
    samfn.require_finite(state)
    assert state.skipped == 2


NORMS = {
    "BatchNorm, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_every_normalisation_are_those_of_the_clean_pass(name):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), NORMS[name](), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)
    model = nn.Sequential(*layers).double()
    reference = copy.deepcopy(model)
    base = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    optimizer = samfn.sgd(0.9)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    for _ in range(3):
        batch = torch.randn(6, 3, 6, 6).double(), torch.randint(2, (6,))
        common = {"loss_fn": loss_fn, "optimizer": optimizer}
        state, _ = samfn.sam_update(state, batch, **common, rho=0.05, lr=0.1)

        def loss_of(model, batch=batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        overwriting_sam_step(reference, base, loss_of, 0.05)
        assert_close(dict(state.buffers), dict(reference.named_buffers()))
        expected = {n: p.detach() for n, p in reference.named_parameters()}
        assert_close(dict(state.params), expected)


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_a_tied_weight_is_perturbed_once():
    model = Tied().double()
    reference = copy.deepcopy(model)
    optimizer, base = samfn.sgd(), torch.optim.SGD(reference.parameters(), 0.1, 0.9)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    assert list(state.params) == ["embedding.weight"]
    tokens = torch.arange(10)
    for _ in range(3):
        batch = tokens, tokens.flip(0)
        common = {"loss_fn": loss_fn, "optimizer": optimizer}
        state, metrics = samfn.sam_update(state, batch, **common, rho=0.3, lr=0.1)
        assert_close(metrics.perturbation_norm.item(), 0.3)
        overwriting_sam_step(
            reference, base, lambda m: F.cross_entropy(m(tokens), tokens.flip(0)), 0.3
        )
    assert_close(state.params["embedding.weight"], reference.embedding.weight.detach())


def test_a_generator_and_a_discriminator_train_against_each_other():
    torch.manual_seed(0)
    nets = {
        "g": nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1)),
        "d": nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1)),
    }
    reals = F.binary_cross_entropy_with_logits

    def d_loss(params, buffers, batch):  # The other network comes as buffers.
        noise, real = batch
        fake = functional_call(nets["g"], buffers, noise)
        scores = [functional_call(nets["d"], params, x) for x in (real, fake)]
        loss = reals(scores[0], torch.ones_like(real)) + reals(
            scores[1], torch.zeros_like(fake)
        )
        return loss, Aux(fake, buffers)

    def g_loss(params, buffers, batch):
        fake = functional_call(nets["g"], params, batch[0])
        return reals(functional_call(nets["d"], buffers, fake), torch.ones_like(fake))

    def both(params, buffers, batch):  # Several models and losses in one update.
        g = {n.removeprefix("g."): w for n, w in params.items() if n.startswith("g.")}
        d = {n.removeprefix("d."): w for n, w in params.items() if n.startswith("d.")}
        held = [{n: w.detach() for n, w in part.items()} for part in (g, d)]
        return d_loss(d, held[0], batch)[0] + g_loss(g, held[1], batch)

    optimizer = samfn.adam((0.5, 0.9))
    states, joint = {}, {}
    for name, net in nets.items():
        params = samfn.split(net)[0]
        states[name] = samfn.init(params, {}, optimizer=optimizer)
        joint |= {f"{name}.{key}": w for key, w in params.items()}
    together = samfn.init(joint, {}, optimizer=optimizer)
    for step in range(250):
        batch = torch.randn(64, 2), 3 + 0.5 * torch.randn(64, 1)
        for name, other, loss_fn in (("d", "g", d_loss), ("g", "d", g_loss)):
            # Made anew with what the other has become; only the buffers differ.
            state = states[name]._replace(buffers=states[other].params)
            common = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 5e-3}
            states[name], metrics = samfn.sam_update(state, batch, **common, rho=0.02)
            assert metrics.finite
        common = {"loss_fn": both, "optimizer": optimizer, "lr": 5e-3}
        before = together.params
        together, metrics = samfn.sam_update(together, batch, **common, rho=0.02)
        if step == 0:
            for name in "gd":
                moved = [n for n in before if n.startswith(name)]
                assert any(not torch.equal(before[n], together.params[n]) for n in moved)
    noise = torch.randn(2000, 2)
    g = {n[2:]: w for n, w in together.params.items() if n.startswith("g.")}
    for params in (states["g"].params, g):
        made = functional_call(nets["g"], dict(params), noise)
        assert abs(made.mean() - 3) < 0.5


def resnet10():
    """Return half of a network of torchvision's, in a precision that two ways agree in."""
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10)
    # Two more stages would prove the same, and take as long to compile.
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return model.double(), torch.randn(4, 3, 32, 32).double(), torch.randint(10, (4,))


def transformer():
    """Return one layer of width 16 on sequences of 8."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(64, (4, 8)), torch.randint(64, (32,))
    return Transformer(1, 16, 8, vocabulary=64), tokens, targets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "backend"), [(resnet10, "inductor"), (transformer, "aot_eager")]
)
def test_models_that_others_wrote_train_eagerly_and_compiled(make, backend):
    model, inputs, targets = make()
    optimizer = samfn.sgd(0.9)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    eager = compiled = samfn.init(*samfn.split(model), optimizer=optimizer)
    common = {"loss_fn": loss_fn, "optimizer": optimizer}
    step, losses = samfn.compile_update(**common, plan="gradient", backend=backend), []
    for _ in range(4):
        eager, expected = samfn.sam_update(eager, (inputs, targets), **common, lr=0.02)
        compiled, seen = step(compiled, (inputs, targets), lr=0.02)
        assert_close(seen.loss, expected.loss, rtol=1e-4, atol=1e-5)
        losses.append(seen.loss)
    assert step.plan == "gradient"
    assert losses[-1] < losses[0]
