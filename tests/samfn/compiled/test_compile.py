"""The step traces whole, and gives what it gives uncompiled."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import samfn
from recipes.models.wide_resnet import WideResNet
from tests.reference import batches, small_network

OPTIMIZERS = {
    "sgd": samfn.sgd(0.9, nesterov=True, weight_decay=5e-4),
    "sgd without momentum": samfn.sgd(0.0),
    "adam": samfn.adam(),
    "adamw": samfn.adamw(amsgrad=True),
    "nadam": samfn.nadam(),
    "rmsprop": samfn.rmsprop(momentum=0.5, centered=True),
    "adagrad": samfn.adagrad(lr_decay=0.1),
    "muon": samfn.grouped(samfn.muon(), (["1.bias"], samfn.sgd())),
    "clipped": samfn.clipped(samfn.sgd(), 0.1),
    "grouped": samfn.grouped(
        samfn.sgd(weight_decay=0.1),
        (["1.bias"], samfn.scaled_lr(samfn.sgd(0.0), 0.1)),
    ),
}
METHODS = {
    "sam": samfn.sam(),
    "asam": samfn.asam(),
    "asam-all": samfn.asam(eta=0.0, adapts=samfn.everything),
    "functional": samfn.accumulated(samfn.functional_sam(), 4),
    "spectral": samfn.spectral_sam(),
    "accumulated": samfn.accumulated(samfn.sam(), 3),
    "per micro-batch": samfn.per_micro_batch(samfn.sam(), 3),
}


def compiled_step(loss_fn, optimizer, method, backend="aot_eager"):
    """Return the compiled step, and the graphs that were made of it."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def step(state, batch, rho, lr):
        return samfn.sam_update(
            state,
            batch,
            loss_fn=loss_fn,
            optimizer=optimizer,
            method=method,
            rho=rho,
            lr=lr,
        )

    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True, backend=counting), step, graphs


def one_layer():
    """Return a network that traces fast, for the batches of `small_network`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(batches(1)[0][0][0].numel(), 5)).double()


def task_of(model, optimizer, method):
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    return samfn.supervised(model, F.cross_entropy), state


def dials():
    for index in range(5):
        yield torch.tensor(0.01 * (index + 1)), torch.tensor(0.1 / (index + 1))


# In a graph, torch.optim's kernels correct the bias in the counter's float32.
ROUNDED = {"adam", "adamw", "nadam"}


def check_equal_for(loss_of, **tolerance):
    model = small_network(torch.float32)
    optimizer = OPTIMIZERS["sgd"]
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    compiled, eager, graphs = compiled_step(loss_of(model), optimizer, samfn.sam())
    images, labels = batches(1, torch.float32)[0]
    rho, lr = torch.tensor(0.05), torch.tensor(0.1)
    results = [step(state, (images, labels), rho, lr) for step in (compiled, eager)]
    assert_close(*results, **tolerance)
    assert len(graphs) == 1


def test_weight_decay_in_the_loss_traces():
    check_equal_for(
        lambda model: samfn.l2_regularized(samfn.supervised(model, F.cross_entropy), 0.01)
    )


def test_weight_decay_in_the_loss_that_spares_some_traces():
    def loss_of(model):
        loss_fn = samfn.supervised(model, F.cross_entropy)
        names = samfn.no_decay_parameters(model)
        return samfn.l2_regularized(loss_fn, 0.01, without=names)

    check_equal_for(loss_of)


def test_half_precision_traces():
    check_equal_for(
        lambda model: samfn.supervised(model, F.cross_entropy, dtype=torch.bfloat16),
        rtol=0.05,
        atol=0.01,
    )


def check_equal(model, optimizer, method, **tolerance):
    loss_fn, state = task_of(model, optimizer, method)
    compiled, eager, graphs = compiled_step(loss_fn, optimizer, method)
    other = state
    for (rho, lr), batch in zip(dials(), batches(5), strict=True):
        state, metrics = compiled(state, batch, rho, lr)
        other, expected = eager(other, batch, rho, lr)
        assert_close(metrics, expected, **tolerance)
    assert_close(state, other, **tolerance)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_one_graph_for_five_values_of_the_dials(name):
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name in ROUNDED else {}
    check_equal(one_layer(), OPTIMIZERS[name], samfn.sam(), **tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_one_graph_for_five_values_of_the_dials(name):
    check_equal(small_network(), OPTIMIZERS["sgd"], METHODS[name])


def test_inputs_of_the_compiled_step_stay_as_they_were():
    loss_fn, state = task_of(small_network(), OPTIMIZERS["sgd"], samfn.sam())
    compiled, _, _ = compiled_step(loss_fn, OPTIMIZERS["sgd"], samfn.sam())
    copy = pytree.tree_map(torch.clone, state)
    compiled(state, batches(1)[0], torch.tensor(0.1), torch.tensor(0.1))
    assert_close(state, copy, rtol=0, atol=0)


def test_a_wide_resnet_makes_one_graph():
    model = WideResNet(10, 1, 10).to(memory_format=torch.channels_last)
    state = samfn.init(*samfn.split(model), optimizer=OPTIMIZERS["sgd"])
    loss_fn = samfn.supervised(model, F.cross_entropy)
    compiled, eager, graphs = compiled_step(loss_fn, OPTIMIZERS["sgd"], samfn.sam())
    other = state
    for rho, lr in dials():
        batch = (torch.randn(8, 3, 8, 8), torch.randint(10, (8,)))
        state, metrics = compiled(state, batch, rho, lr)
        other, expected = eager(other, batch, rho, lr)
        assert_close(metrics.loss, expected.loss, rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_agrees_with_eager():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    optimizer = OPTIMIZERS["sgd"]
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    compiled, eager, graphs = compiled_step(
        loss_fn, optimizer, samfn.sam(), backend="inductor"
    )
    batch = (torch.randn(8, 3, 8, 8), torch.randint(5, (8,)))
    rho, lr = torch.tensor(0.05), torch.tensor(0.1)
    assert_close(
        compiled(state, batch, rho, lr),
        eager(state, batch, rho, lr),
        rtol=1e-4,
        atol=1e-5,
    )
    assert len(graphs) == 1
