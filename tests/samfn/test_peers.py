"""In step with the peers where they are right, and away from them where they are wrong."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from tests.ranks import on_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peers = pytest.importorskip("pytorch_optimizer")
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")

RHO, LR, STEPS = 0.3, 0.05, 8


class Line(nn.Module):
    """One tensor, or two, under tanh."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1, bias=bias)

    def forward(self, x):
        return self.layer(x).tanh()


def data():
    source = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 4, generator=source), torch.randn(12, 1, generator=source))
        for _ in range(STEPS)
    ]


def ours(method, bias=True, momentum=0.9):
    """Return the weights after each step."""
    model, optimizer = Line(bias), samfn.sgd(momentum)
    common = {"loss_fn": samfn.supervised(model, F.mse_loss), "optimizer": optimizer}
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    trace = []
    for batch in data():
        state, _ = samfn.sam_update(state, batch, **common, method=method, rho=RHO, lr=LR)
        trace.append(dict(state.params))
    return trace


def theirs(make, bias=True):
    model = Line(bias)
    optimizer = make(model)
    trace = []
    for inputs, targets in data():
        if hasattr(optimizer, "set_closure"):
            optimizer.set_closure(F.mse_loss, inputs, targets)
            optimizer.step()
        else:

            def closure(inputs=inputs, targets=targets):
                optimizer.zero_grad()
                loss = F.mse_loss(model(inputs), targets)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)
        trace.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return trace


class Constant:
    """A schedule of rho, as their GSAM wants it."""

    def step(self):
        return RHO


SGD = {"lr": LR, "momentum": 0.9}
PEERS = {
    "SAM": (
        samfn.sam(),
        lambda m: peers.SAM(m.parameters(), torch.optim.SGD, rho=RHO, **SGD),
    ),
    "adaptive SAM": (
        samfn.asam(0.0, adapts=samfn.everything),
        lambda m: peers.SAM(m.parameters(), torch.optim.SGD, rho=RHO, adaptive=True, **SGD),
    ),
    "GSAM": (
        samfn.gsam(0.4),
        lambda m: peers.GSAM(
            m.parameters(), torch.optim.SGD(m.parameters(), **SGD), m, Constant()
        ),
    ),
    "WSAM": (
        samfn.wsam(0.9),
        lambda m: peers.WSAM(m, m.parameters(), torch.optim.SGD, rho=RHO, **SGD),
    ),
    "FriendlySAM": (
        samfn.friendly_sam(1.0, 0.9),
        lambda m: peers.FriendlySAM(m.parameters(), torch.optim.SGD, rho=RHO, **SGD),
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_in_step_with_pytorch_optimizer(name):
    method, make = PEERS[name]
    assert_close(ours(method), theirs(make), rtol=2e-5, atol=2e-6)


def looksam_of_theirs(model):
    return peers.LookSAM(
        model.parameters(), torch.optim.SGD, rho=RHO, k=3, alpha=0.7, **SGD
    )


def test_looksam_of_pytorch_optimizer_projects_each_tensor_by_itself():
    # The same with one tensor; with two, the paper's projection is over both together.
    method = samfn.looksam(3, 0.7)
    one = ours(method, bias=False), theirs(looksam_of_theirs, bias=False)
    two = ours(method), theirs(looksam_of_theirs)
    assert_close(*one, rtol=2e-5, atol=2e-6)
    assert not torch.allclose(two[0][-1]["layer.weight"], two[1][-1]["layer.weight"], 1e-3)


def test_in_step_with_optax():
    # In a process of its own: JAX starts threads, after which none should be forked.
    on_ranks(1, in_step_with_optax)


def in_step_with_optax():
    """Raise unless optax takes the same steps."""
    model = Line(True)
    weight = jax.numpy.array(model.layer.weight.detach().numpy())
    params = weight, jax.numpy.array(model.layer.bias.detach().numpy())
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    optimizer = optax.contrib.sam(optax.sgd(LR, 0.9), adversary, opaque_mode=True)
    state = optimizer.init(params)
    for (inputs, targets), expected in zip(data(), ours(samfn.sam()), strict=True):
        x, y = inputs.numpy(), targets.numpy()

        def loss(params, x=x, y=y):
            return ((jax.numpy.tanh(x @ params[0].T + params[1]) - y) ** 2).mean()

        slope = jax.grad(loss)
        changes, state = optimizer.update(
            slope(params), state, params, grad_fn=lambda p, _, slope=slope: slope(p)
        )
        params = optax.apply_updates(params, changes)
        found = torch.tensor(params[0].tolist())
        assert_close(found, expected["layer.weight"], rtol=2e-5, atol=2e-6)
