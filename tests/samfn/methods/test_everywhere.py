"""Every method works in parts of a batch and in half precision."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import samfn
from samfn import tree
from samfn.gradient import evaluator
from samfn.methods.base import Point
from tests.samfn.methods.test_published import LR, ORACLES, RHO, layer, problem, train

PART = 4  # of ten rows: the last part is smaller


def every_method(loss_fn):
    """Return all methods by name; `loss_fn` is what two of them climb, a mean over rows."""
    others = {
        "ascent_on": samfn.ascent_on(samfn.sam(), loss_fn),
        "on_loss": samfn.on_loss(samfn.sam(), loss_fn),
    }
    return {name: method for name, (method, _) in ORACLES.items()} | others


def steep(params, buffers, batch):
    """Return the mean of the squares of the losses of rows."""
    return layer(params, buffers, batch)[1].losses.square().mean()


METHODS = every_method(steep)
PLAIN = sorted(METHODS.keys() - {"loss_scaled"})  # It is not put around itself.


def weights(trace):
    return [dict(state.params) for state, _ in trace]


@pytest.mark.parametrize("name", METHODS)
def test_in_parts_a_batch_is_the_whole_batch_to_every_method(name):
    found = []
    for method in (METHODS[name], samfn.accumulated(METHODS[name], PART)):
        torch.manual_seed(0)
        found.append(weights(train(method)))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_each_part_of_a_batch_is_a_batch_to_every_method(name):
    method = METHODS[name]
    torch.manual_seed(0)
    found = weights(train(samfn.per_micro_batch(method, PART)))
    torch.manual_seed(0)
    _, _, params, batches = problem()
    memory = method.init(params, params)
    for step, batch in enumerate(batches):
        kind = method.kind(step) if method.kind else None
        total = tree.zeros_like(params)
        for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
            part = tuple(leaf[rows] for leaf in batch)
            point = Point(params, {}, part, RHO, tuple(params), kind=kind)
            seen, memory = method.descent(evaluator(layer), point, memory)
            both = seen.grads if seen.beside is None else tree.add(seen.grads, seen.beside)
            total = tree.add_scaled(total, len(part[0]) / 10, both)
        params = tree.add_scaled(params, -LR, total)
        assert_close(found[step], params, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PLAIN)
def test_a_scaled_loss_changes_no_method(name):
    found = []
    for method in (METHODS[name], samfn.loss_scaled(METHODS[name])):
        torch.manual_seed(0)
        found.append(weights(train(method)))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_bit_for_bit_from_a_file(tmp_path, name):
    method, optimizer, path = METHODS[name], samfn.sgd(), tmp_path / "state.safetensors"
    given = {"loss_fn": layer, "optimizer": optimizer, "method": method}
    _, _, params, batches = problem()
    state = start = samfn.init(params, {}, optimizer=optimizer, method=method)
    for number, batch in enumerate(batches):
        if number == 4:  # Between two looks of `looksam`.
            samfn.save(path, state, random=samfn.random_state())
        state, _ = samfn.sam_update(state, batch, **given, rho=RHO, lr=LR)
    again, kept = samfn.restore(path, like=start)
    samfn.set_random_state(kept["random"])
    for batch in batches[4:]:
        again, _ = samfn.sam_update(again, batch, **given, rho=RHO, lr=LR)
    assert_close(again, state, rtol=0, atol=0)


def in_half(outputs, targets):
    """Return the loss of each row of what a layer makes of it, in float16 or not."""
    return (outputs.tanh() - targets).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLAIN)
def test_every_method_steps_nearly_alike_in_half_precision_and_remembers_in_float32(
    name, dtype
):
    torch.manual_seed(0)
    model, optimizer = nn.Linear(3, 2), samfn.sgd()
    batch = torch.randn(10, 3), torch.randn(10, 2)
    found = []
    for kind in (None, dtype):
        loss_fn = samfn.supervised(model, in_half, dtype=kind)
        method = every_method(loss_fn)[name]
        if kind is torch.float16:
            method = samfn.loss_scaled(method, 2.0**10)
        given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
        state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
        torch.manual_seed(1)
        for _ in range(2):
            state, metrics = samfn.sam_update(state, batch, **given, rho=0.1, lr=0.1)
            assert metrics.finite
        leaves = torch.utils._pytree.tree_leaves((state.params, state.method_state))
        floating = {leaf.dtype for leaf in leaves if leaf.is_floating_point()}
        assert floating == {torch.float32}
        found.append(tree.subtract(state.params, samfn.split(model)[0]))
    off = tree.norm(tree.subtract(*found)) / tree.norm(found[0])
    assert 0 < off < 0.05


@pytest.mark.parametrize("exponent", [-22, -12, 8])
@pytest.mark.parametrize("name", PLAIN)
def test_every_method_moves_float16_weights_as_far_as_float32_ones(name, exponent):
    def squares(outputs, targets):
        return (outputs.float() - targets.float()).square().sum(1) * 2.0**exponent

    torch.manual_seed(0)
    layer, optimizer, found = nn.Linear(3, 2).half(), samfn.sgd(), []
    batch = torch.randn(10, 3).half(), torch.randn(10, 2).half()
    for dtype in (torch.float32, torch.float16):
        model = layer.to(dtype)
        loss_fn = samfn.supervised(model, squares)
        method = every_method(loss_fn)[name]
        given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
        state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
        torch.manual_seed(1)
        batch = tuple(leaf.to(dtype) for leaf in batch)
        found.append(samfn.sam_update(state, batch, **given, rho=0.1, lr=0.0)[1])
    assert found[1].finite
    rounding = torch.finfo(torch.float16).eps * tree.norm(state.params)
    lengths = [metrics.perturbation_norm for metrics in found]
    assert_close(lengths[1], lengths[0], rtol=0.1, atol=float(rounding))
