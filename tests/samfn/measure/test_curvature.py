"""Curvature is computed by kernels that have a second derivative, or plainly refused."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from bench.zoo import habits, networks
from bench.zoo.check import check
from samfn import tree
from samfn.measure import curvature
from samfn.measure.curvature import (
    NotTwiceDifferentiableError,
    hessian_product,
    twice_differentiable,
)
from samfn.measure.objective import Objective


def apart(loss, params, direction, product, step):
    """Return how far a product is from the central difference, as a share of it."""
    up = loss.gradient(tree.add_scaled(params, step, direction))[1]
    down = loss.gradient(tree.add_scaled(params, -step, direction))[1]
    difference = tree.scale(tree.subtract(up, down), 1 / (2 * step))
    return float(tree.norm(tree.subtract(product, difference)) / tree.norm(product))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.cells(inputs)[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.inwards, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        inner = self.inwards(inputs)
        return self.head(self.attention(inner, inner, inner, need_weights=False)[0][:, 0])


MODELS = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": Attending,
    **{
        name: lambda kind=kind: nn.Sequential(
            nn.Flatten(), nn.Linear(15, 6), kind(), nn.Linear(6, 2)
        )
        for name, kind in {
            "hardswish": nn.Hardswish,
            "hardsigmoid": nn.Hardsigmoid,
            "hardsigmoid in place": lambda: nn.Hardsigmoid(inplace=True),
            "relu": nn.ReLU,
        }.items()
    },
}


def given(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    params, buffers = samfn.split(model)
    batch = 3 * torch.randn(4, 5, 3).to(dtype), torch.tensor([0, 1, 1, 0])
    return samfn.supervised(model, F.cross_entropy), params, buffers, batch


@pytest.mark.parametrize("name", MODELS)
def test_a_product_is_the_derivative_of_the_gradient_in_either_precision(name):
    loss_fn, params, buffers, batch = given(name, torch.float64)
    objective = Objective(loss_fn, buffers, batch)
    direction = {key: torch.randn_like(w) for key, w in params.items()}
    product = objective.product(params, direction)
    assert apart(objective, params, direction, product, 1e-6) < 1e-6
    # Of single precision, recurrent layers have kernels of their own.
    loss_fn, _, _, batch = given(name, torch.float32)
    single = Objective(loss_fn, buffers, batch).product(
        *(
            {key: leaf.float() for key, leaf in leaves.items()}
            for leaves in (params, direction)
        )
    )
    rounded = {key: leaf.double() for key, leaf in single.items()}
    assert tree.norm(tree.subtract(rounded, product)) < 1e-5 * tree.norm(product)


@pytest.mark.parametrize("name", ["attention", "hardsigmoid"])
def test_without_them_pytorch_has_no_second_derivative(name, monkeypatch):
    monkeypatch.setattr(curvature, "twice_differentiable", contextlib.nullcontext)
    loss_fn, params, buffers, batch = given(name, torch.float32)
    with pytest.raises(RuntimeError, match=r"is not implemented"):
        hessian_product(loss_fn, params, buffers, batch, params)


def test_the_formula_is_that_of_the_kernel():
    x = torch.linspace(-5, 5, 401).double()
    formula = curvature.FORMULAS[F.hardsigmoid]
    torch.testing.assert_close(formula(x), F.hardsigmoid(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"dim": -1}, {"p": 1.0}, {"eps": 2.0}])
def test_normalising_is_what_it_was(options):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5, 4), torch.zeros(1, 4)]).double()
    formula = curvature.FORMULAS[F.normalize]
    torch.testing.assert_close(formula(x, **options), F.normalize(x, **options))


def test_a_vector_of_zeros_is_normalised_without_a_nan_in_the_curvature(monkeypatch):
    def loss_fn(params, buffers, batch):
        return F.normalize(batch @ params["w"], dim=1).exp().sum()

    torch.manual_seed(0)
    batch = torch.cat([torch.randn(3, 4), torch.zeros(1, 4)]).double()
    objective, params = Objective(loss_fn, {}, batch), {"w": torch.randn(4, 4).double()}
    direction = {"w": torch.randn(4, 4).double()}
    product = objective.product(params, direction)
    assert apart(objective, params, direction, product, 1e-6) < 1e-6
    monkeypatch.setattr(curvature, "twice_differentiable", contextlib.nullcontext)
    assert hessian_product(loss_fn, params, {}, batch, direction)["w"].isnan().any()


def test_what_has_no_second_derivative_is_refused_and_named(monkeypatch):
    monkeypatch.setattr(curvature, "FORMULAS", {})
    params = {"w": torch.randn(4)}
    loss = Objective(lambda p, b, x: F.hardsigmoid(p["w"]).sum(), {}, torch.zeros(1))
    expected = r"expected a loss that PyTorch can differentiate twice, got: .*hardsigmoid_b"
    with pytest.raises(NotTwiceDifferentiableError, match=expected):
        loss.product(params, params)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mine") as raised, twice_differentiable():
        raise RuntimeError("mine")
    assert type(raised.value) is RuntimeError


def flags():
    library = torch.backends.mkldnn
    return library.enabled, library.fp32_precision, torch.backends.cuda.flash_sdp_enabled()


def test_kernels_are_what_they_were_afterwards():
    before = flags()
    with twice_differentiable():
        assert flags() == (*before[:2], False)
        nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
        assert flags() == (*before[:2], False)
    assert flags() == before


# Of each kind that needs other kernels one, and one that needs none.
FAST = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]


@pytest.mark.parametrize("name", FAST)
def test_networks_have_the_curvature_that_differences_show(name):
    (case,) = (c for c in networks.of_torchvision() if c.name == f"torchvision {name}")
    assert check(case, only="Hessian")["Hessian"] == "exact"


def test_what_selective_checkpointing_keeps_has_no_second_derivative_and_is_refused():
    torch.manual_seed(0)
    model = habits.Around(habits.selectively).double().eval()
    plain = habits.Around(habits.plainly).double().eval()
    plain.load_state_dict(model.state_dict())
    params, buffers = samfn.split(model)
    batch = habits.vectors(), habits.classes()
    found = [
        samfn.evaluate(samfn.supervised(network, F.cross_entropy), params, buffers, batch)
        for network in (model, plain)
    ]
    assert_close(found[0].grads, found[1].grads)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    with pytest.raises(NotTwiceDifferentiableError, match="selective gradient checkp"):
        hessian_product(loss_fn, params, buffers, batch, params)
