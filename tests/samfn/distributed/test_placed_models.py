"""Models that hold DTensors, and frozen weights beside parameters in parts."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    SequenceParallel,
    parallelize_module,
)

import samfn
from samfn import distributed, measure
from samfn.storage.export import export_program
from samfn.tree import is_sharded
from tests.ranks import on_ranks
from tests.samfn.distributed.test_sharded import SGD, criterion, difference, examples

STEPS = 2
PLACES = {"2.weight": Shard(1), "4.bias": Replicate(), "1.weight": Replicate()}


def network(frozen=("0.weight", "0.bias", "4.bias"), norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9), norm(9), nn.Linear(9, 9), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(9, 5)).double()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def place(model, mesh, buffers=True):
    """Let a model hold DTensors: weights in parts, buffers as `distribute_module` does."""

    def placed(own, last):
        return distribute_tensor(own, mesh, [*[Replicate()] * (mesh.ndim - 1), last])

    for prefix, module in model.named_modules():
        for name, own in module.named_parameters(recurse=False):
            last = PLACES.get(f"{prefix}.{name}", Shard(0))
            part = nn.Parameter(placed(own.detach(), last), own.requires_grad)
            module.register_parameter(name, part)
        for name, own in module.named_buffers(recurse=False):
            if buffers:
                module.register_buffer(name, placed(own, Replicate()))
    return model


def trained(model, parameters, buffers, batch, step=samfn.sam_update, loss_fn=None):
    """Return the state after some steps, whole, and as each rank has it."""
    if loss_fn is None:
        parts = is_sharded(next(iter(parameters.values())))
        together = distributed.synchronised(model) if parts else model
        loss_fn = samfn.supervised(together, criterion)
    state = start = samfn.init(parameters, buffers, optimizer=SGD)
    for _ in range(STEPS):
        state, _ = step(state, batch, loss_fn=loss_fn, optimizer=SGD, lr=0.1)
    for name, own in start.buffers.items():
        assert is_sharded(state.buffers[name]) == is_sharded(own), name
    return distributed.gather(state), state


def apart(state, wanted):
    """Return how far parameters and statistics are from those of another state."""
    statistics = {n: b for n, b in wanted.buffers.items() if b.is_floating_point()}
    own = difference(state.params, wanted.params)
    return max(own, difference(state.buffers, statistics))


def compiled(plan):
    def step(state, batch, *, lr, **given):
        if plan not in steps:
            steps[plan] = samfn.compile_update(**given, plan=plan, backend="aot_eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # that it is taken uncompiled
            return steps[plan](state, batch, lr=lr)

    steps = {}
    return step


def other(params, buffers, batch):
    """Return a loss of no module, beside frozen weights and a buffer that it writes."""
    hidden = nn.functional.linear(batch[0], buffers["0.weight"]) @ params["2.weight"]
    seen = buffers["1.running_mean"] + hidden.detach().mean(0)
    return hidden.cos().mean(), samfn.Aux(hidden, {**buffers, "1.running_mean": seen})


def beside_frozen(dims):
    """On a rank: steps with frozen weights that are whole, and such that are in parts."""
    mesh, batch, found = init_device_mesh("cpu", dims), examples(torch.float64), {}
    own = distributed.share(batch)

    def states(model):
        params, buffers = samfn.split(model)
        frozen = {n: buffers[n] for n, _ in model.named_parameters() if n in buffers}
        assert len(frozen) == 3
        some = {**buffers, **distributed.shard(frozen, mesh)}
        return params, buffers, distributed.shard(params, mesh), some

    ways = {"eager": {}, "a function": {"loss_fn": other}}
    for name, how in ways.items():
        params, buffers, parts, some = states(model := network())
        wanted, _ = trained(model, params, buffers, batch, **how)
        for kind, beside in {"whole": buffers, "in parts": some}.items():
            state, _ = trained(model, parts, beside, own, **how)
            found[name, kind] = apart(state, wanted)
    for plan in ("whole", "loss") if len(dims) == 1 else ():  # Graphs take long.
        *whole, parts, some = states(plain := network(norm=nn.LayerNorm))
        state, _ = trained(plain, parts, some, own, compiled(plan))
        found[plan] = apart(state, trained(plain, *whole, batch)[0])
    params, buffers, parts, some = states(model := network())
    for loss_fn in (other, samfn.supervised(model.eval(), criterion)):
        product = measure.hessian_product(loss_fn, params, buffers, batch, params)
        way = loss_fn, parts, some, own, parts
        whole = distributed.gather(measure.hessian_product(*way))
        reached = {name: leaf for name, leaf in product.items() if leaf.any()}
        found["curvature", len(found)] = difference(whole, reached)
    return found


@pytest.mark.parametrize("dims", [(2,), (2, 2)])
def test_frozen_weights_beside_parts_are_whole_or_in_parts(dims):
    for found in on_ranks(torch.Size(dims).numel(), beside_frozen, dims):
        assert max(found.values()) <= 1e-13, found


def of_dtensors(dims, directory):
    """On a rank: what a model of DTensors makes, beside one of plain tensors."""
    mesh, plain, batch = init_device_mesh("cpu", dims), network(), examples(torch.float64)
    own, found = distributed.share(batch), {}
    wanted, _ = trained(plain, *samfn.split(plain), batch)
    model = place(network(), mesh)
    for _, held in (*model.named_parameters(), *model.named_buffers()):
        assert is_sharded(held)
    params, buffers = samfn.split(model)
    for name, w in model.named_parameters():
        kept = {**params, **buffers}[name]
        assert kept.placements == w.placements
        assert kept.to_local().data_ptr() != w.to_local().data_ptr()
    assert not any(is_sharded(buffers[name]) for name, _ in model.named_buffers())
    whole, state = trained(model, params, buffers, own)
    found["eager"] = apart(whole, wanted)
    if len(dims) == 1:
        way = trained(model, params, buffers, own, compiled("whole"))
        found["one graph"] = apart(way[0], wanted)
    for name, w in model.named_parameters():  # The model is as it was.
        assert torch.equal(w.full_tensor(), plain.get_parameter(name))
    samfn.save(directory / "state.sharded", state)
    again, _ = samfn.restore(directory / "state.sharded", state)
    found["restored"] = apart(distributed.gather(again), whole)
    evaluated = samfn.modules.trained(model, *again[:2])
    assert not any(map(is_sharded, evaluated.state_dict().values()))
    samfn.load(plain, *state[:2])
    assert torch.equal(evaluated(batch[0]), plain.eval()(batch[0]))
    samfn.load(model, *samfn.split(plain))  # of plain ones
    for name, w in model.state_dict().items():
        assert is_sharded(w)
        assert torch.equal(w.full_tensor(), plain.state_dict()[name]), name
    mixed = samfn.modules.state_dict(model, *samfn.split(plain))
    assert [*map(is_sharded, mixed.values())] == [True] * len(mixed)
    model.load_state_dict(mixed)
    statistics = samfn.reestimated(model, params, buffers, [batch])
    expected = samfn.reestimated(network(), *samfn.split(network()), [batch])
    assert difference(statistics, {n: b for n, b in expected.items() if b.any()}) == 0
    if distributed.size() == 2:
        path = directory / f"program{distributed.rank()}.pt2"
        export_program(path, model, *state[:2], batch[0])
        assert path.exists()
    return found


@pytest.mark.parametrize("dims", [(2,), (2, 2)])
def test_a_model_of_dtensors_is_trained_as_it_is(dims, tmp_path):
    for found in on_ranks(torch.Size(dims).numel(), of_dtensors, dims, tmp_path):
        assert max(found.values()) <= 1e-13, found


def refused():
    """On a rank: what is said to models and states of DTensors that cannot be trained."""
    mesh, batch = init_device_mesh("cpu", (2,)), distributed.share(examples(torch.float64))
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    ways = {
        "0": ColwiseParallel(use_local_output=False),
        "1": SequenceParallel(),
        "2": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
    }
    said = []

    def step(model, change=dict):
        params, buffers = samfn.split(model)
        state = samfn.init(params, change(buffers), optimizer=SGD)
        given = {"loss_fn": samfn.supervised(model, criterion), "optimizer": SGD}
        return samfn.sam_update(state, batch, **given, lr=0.1)

    def statistics_in_parts(buffers):
        mean = buffers["1.running_mean"]
        return {**buffers, "1.running_mean": DTensor.from_local(mean, mesh, [Replicate()])}

    def only_some():
        model = place(network(frozen=()), mesh)
        model[2] = nn.Linear(9, 9)
        return model

    for attempt in (
        *[lambda k=k: parallelize_module(network(), mesh, {k: ways[k]}) for k in ways],
        lambda: place(network(), alone),
        only_some,
    ):
        said.append(message(lambda make=attempt: step(make())))
    said.append(message(lambda: step(place(network(), mesh), statistics_in_parts)))
    frozen_alone = place(network(["0.weight"]), mesh, buffers=False)
    lone = distribute_tensor(frozen_alone[0].weight.full_tensor(), alone, [Shard(0)])
    frozen_alone[0].weight = nn.Parameter(lone, requires_grad=False)
    said.append(message(lambda: step(frozen_alone)))
    return said


def message(attempt):
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def test_what_cannot_be_trained_is_named():
    expected = (
        *[f"one that parallelize_module has changed at {k}: pass it as" for k in range(3)],
        "expected a mesh of all 2 ranks, got one of 1",
        "params must be DTensors, all or none of them, 2.weight is not",
        "buffers that a forward pass may write to['1.running_mean'] must be a plain",
        "expected a mesh of all 2 ranks, got one of 1",
    )
    for said in on_ranks(2, refused):
        for text, part in zip(said, expected, strict=True):
            assert part in text
