"""What holds for hundreds of random cases: lengths, and that nothing is touched."""

import random

import pytest
import torch

import samfn
from samfn import tree

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def drawn(case, exponents=(0, 0)):
    """Return some tensors of random shapes, and others of random size to go with them."""
    chance, source = random.Random(case), torch.Generator().manual_seed(case)
    size = 10.0 ** chance.uniform(*exponents)
    params, grads = {}, {}
    for index in range(chance.randrange(1, 5)):
        shape = [chance.randrange(1, 6) for _ in range(chance.randrange(4))]
        params[f"w{index}"] = torch.randn(shape, generator=source, dtype=torch.float64)
        grads[f"w{index}"] = size * torch.randn(
            shape, generator=source, dtype=torch.float64
        )
    return params, grads, chance


def cast(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_500_perturbations_have_length_rho_or_none(record_property):
    record_property("trials", 500)
    none = 0
    for case in range(500):
        params, grads, chance = drawn(case, (-45, 38))
        rho, dtype = 10 ** chance.uniform(-3, 1), DTYPES[case % 4]
        if case % 50 == 0:
            grads = tree.zeros_like(grads)
        largest = torch.finfo(dtype).max
        grads = {name: g.clamp(-largest, largest) for name, g in grads.items()}
        # From zero: what is added is what is measured.
        start = tree.zeros_like(cast(params, torch.promote_types(dtype, torch.float32)))
        moved = samfn.perturb(start, cast(cast(grads, dtype), start["w0"].dtype), rho)
        length = samfn.norm(cast(moved, torch.float64)).item()
        assert length == 0 or length == pytest.approx(rho, rel=1e-4), case
        none += length == 0
    assert 10 < none < 400


def test_500_steps_leave_what_they_were_given(record_property):
    record_property("trials", 500)
    for case in range(500):
        params, targets, chance = drawn(case)
        optimizer = chance.choice([samfn.sgd(), samfn.adamw(), samfn.sgd(0.0)])
        method = chance.choice([samfn.sam(), samfn.asam(), samfn.gsam(), samfn.vasso()])
        buffers = {"count": torch.zeros(())}

        def loss_fn(params, buffers, batch):
            gaps = [(params[name] - batch[name]).square().sum() for name in params]
            return sum(gaps), samfn.Aux(None, {"count": buffers["count"] + 1})

        state = samfn.init(params, buffers, optimizer=optimizer, method=method)
        for _ in range(2):
            leaves = [*state.params.values(), state.buffers["count"], state.step]
            before = [(leaf.clone(), leaf._version) for leaf in leaves]
            new, _ = samfn.sam_update(
                state,
                targets,
                loss_fn=loss_fn,
                optimizer=optimizer,
                method=method,
                rho=chance.uniform(0.0, 2.0),
                lr=0.1,
            )
            for leaf, (value, version) in zip(leaves, before, strict=True):
                assert torch.equal(leaf, value), case
                assert leaf._version == version, case
            assert new.buffers["count"] == state.buffers["count"] + 1
            state = new


def test_500_weights_come_back_from_the_drop_in_bit_for_bit(record_property):
    record_property("trials", 500)
    for case in range(500):
        drawn_params, grads, chance = drawn(case)
        dtype = DTYPES[1 + case % 3]
        params = [w.to(dtype).requires_grad_() for w in drawn_params.values()]
        before = [w.detach().clone() for w in params]
        rho, adaptive = chance.uniform(0.01, 2.0), chance.random() < 0.5
        optimizer = samfn.SAM(params, torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.0)
        for param, grad in zip(params, grads.values(), strict=True):
            param.grad = grad.to(dtype)
        optimizer.first_step()
        moved = any(not torch.equal(w, old) for w, old in zip(params, before, strict=True))
        optimizer.second_step()
        assert moved or dtype is torch.bfloat16, case
        assert all(torch.equal(w, old) for w, old in zip(params, before, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_code_that_raises_in_the_second_pass_leaves_the_state(compiled):
    calls = []

    def loss_fn(params, buffers, batch):
        if not compiled:
            calls.append(None)
            if len(calls) % 2 == 0 and batch.sum() > 0:
                raise RuntimeError("second pass")
        return (params["w"] - batch).square().sum(), samfn.Aux(None, buffers)

    optimizer = samfn.sgd()
    state = samfn.init({"w": torch.randn(3)}, {"b": torch.ones(1)}, optimizer=optimizer)
    common = {"loss_fn": loss_fn, "optimizer": optimizer}
    leaves = [state.params["w"], state.buffers["b"], state.step]
    before = [(leaf.clone(), leaf._version) for leaf in leaves]
    if compiled:  # Whatever makes the call fail: here, a batch of another shape.
        step = samfn.compile_update(**common, backend="aot_eager")
        with pytest.raises(Exception, match=r"size|shape"):
            step(state, torch.ones(4), lr=0.1)
    else:
        with pytest.raises(RuntimeError, match="second pass"):
            samfn.sam_update(state, torch.ones(3), **common, lr=0.1)
        assert len(calls) == 2
    for leaf, (value, version) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, value)
        assert leaf._version == version
