"""samfn.SAM on what PyTorch shards: the steps of one process, on all ranks alike."""

import contextlib
import copy
import functools
from collections import OrderedDict
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import samfn
from samfn import distributed, tree
from tests.ranks import on_ranks

ROWS, STEPS = 16, 10
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
BARS = {torch.float32: 1e-6, torch.float64: 1e-13}


def network(dtype=torch.float64):
    """A network of which a tensor has fewer rows than there are ranks."""
    torch.manual_seed(1)
    layers = {
        "norm": nn.LayerNorm(6),
        "up": nn.Linear(6, 8),
        "act": nn.Tanh(),
        "down": nn.Linear(8, 3),
    }
    return nn.Sequential(OrderedDict(layers)).to(dtype)


def batch_of(step, dtype):
    source = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 6, generator=source, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 3, (ROWS,), generator=source)


# Each makes a model parallel in place, and returns how many ranks have batches of their
# own, and which of them this is.


def by_layer(model, mesh, **how):
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)
    return dist.get_world_size(), dist.get_rank()


def fsdp(model, **how):
    return by_layer(model, init_device_mesh("cpu", (dist.get_world_size(),)), **how)


def offloaded(model):
    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def two_by(count):
    names = ("replicate", "shard")
    return init_device_mesh("cpu", (2, count // 2), mesh_dim_names=names)


def hsdp(model):
    return by_layer(model, two_by(dist.get_world_size()))


TENSOR_PARALLEL = {"up": ColwiseParallel, "down": RowwiseParallel}


def tensor_parallel(model):
    """The normalisation stays of plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {name: way() for name, way in TENSOR_PARALLEL.items()})
    return 1, 0


def sequence_parallel(model):
    """Gradients of the normalisation are terms of a sum."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)
    model.register_forward_pre_hook(
        lambda _, args: (args[0].chunk(mesh.size())[mesh.get_rank()],)
    )
    return 1, 0


def fsdp_over_tensor_parallel(model):
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    plan = {name: way() for name, way in TENSOR_PARALLEL.items()}
    parallelize_module(model, mesh["tp"], plan)
    by_layer(model, mesh["dp"])
    return shape[0], mesh["dp"].get_local_rank()


def two_meshes(model):
    count = dist.get_world_size()
    fully_shard(model.up, mesh=init_device_mesh("cpu", (count,)))
    fully_shard(model, mesh=two_by(count))
    return count, dist.get_rank()


def some_ignored(model):
    """Of plain tensors, whose gradients the user averages."""
    count = dist.get_world_size()
    ignored = {model.norm.weight, model.down.bias}
    for p in ignored:
        p.register_hook(averaged)
    mesh = init_device_mesh("cpu", (count,))
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return count, dist.get_rank()


def averaged(grad):
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def data_parallel(model):
    """By hand what DDP does, which is a module of its own."""
    for p in model.parameters():
        p.register_hook(averaged)
    return dist.get_world_size(), dist.get_rank()


WAYS = {
    "fsdp": fsdp,
    "fsdp, resharded": functools.partial(fsdp, reshard_after_forward=True),
    "fsdp, kept": functools.partial(fsdp, reshard_after_forward=False),
    "fsdp, offloaded": offloaded,
    "hsdp": hsdp,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "fsdp over tensor parallel": fsdp_over_tensor_parallel,
    "two meshes": two_meshes,
    "some ignored": some_ignored,
    "data parallel": data_parallel,
}
CUT = ["fsdp", "hsdp", "tensor parallel", "fsdp over tensor parallel"]
OPTIONS = {
    "sam": {},
    "adaptive": {"adaptive": True, "rho": 0.5},
    "groups": {"groups": True, "skip_nonfinite": True},
    "closure": {"closure": True},
    "frozen": {"frozen": True, "foreach": False},
    "accumulated": {"accumulated": 2},
}


def made(way=None, dtype=torch.float64, **how):
    """Return a model, its optimizer, and what gives this rank its part of a batch."""
    model = network(dtype)
    if how.pop("frozen", False):
        model.up.bias.requires_grad_(False)
    count, place = (1, 0) if way is None else WAYS[way](model)
    params = [*model.parameters()]
    if how.pop("groups", False):
        params = [
            {"params": [*model.up.parameters()], "rho": 0.5},
            {"params": [*model.norm.parameters(), *model.down.parameters()], "rho": 0.2},
        ]
        params[1]["adaptive"] = True
    optimizer = samfn.SAM(params, torch.optim.SGD, **{"rho": 0.3, **SETTINGS, **how})
    return model, optimizer, lambda batch: [part.chunk(count)[place] for part in batch]


def backward(model, batch, by=1.0):
    (F.cross_entropy(model(batch[0]), batch[1]) * by).backward()


def step_of(model, optimizer, batch, closure=False, accumulated=1, own=lambda batch: batch):
    if closure:
        optimizer.step(lambda: backward(model, own(batch)))
        optimizer.zero_grad()
        return
    parts = [*zip(*(part.chunk(accumulated) for part in batch), strict=True)]
    for number, part in enumerate(parts):
        for end in (optimizer.first_step, optimizer.keep_step):
            if number + 1 == accumulated and end == optimizer.keep_step:
                end = optimizer.second_step
            backward(model, own(part), 1 / accumulated)
            end(zero_grad=True)


def full(model):
    """Return whole weights, by name."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.state_dict().items()
    }


def trained(way=None, dtype=torch.float64, steps=3, **how):
    loop = {name: how.pop(name) for name in ("closure", "accumulated") if name in how}
    model, optimizer, own = made(way, dtype, **how)
    for step in range(steps):
        step_of(model, optimizer, batch_of(step, dtype), own=own, **loop)
    return full(model)


def difference(found, expected):
    return max(
        float((found[name] - leaf).norm() / leaf.norm()) for name, leaf in expected.items()
    )


OFTEN = ("fsdp", "hsdp", "fsdp over tensor parallel", "sequence parallel", "some ignored")
USUAL = [(way, "sam", dtype) for way in (*CUT, "two meshes") for dtype in BARS]
CASES = {
    2: [
        *USUAL,
        *(
            (way, option, torch.float64)
            for way in WAYS
            for option in OPTIONS
            if option == "groups" or (option != "sam" and way in OFTEN)
        ),
        *((way, "sam", torch.float64) for way in WAYS if way not in (*CUT, "two meshes")),
    ],
    4: [*USUAL, ("some ignored", "accumulated", torch.float64)],
}


def steps_of(option):
    return STEPS if option == "sam" else 3


def train_all():
    """On a rank: train in many ways, and with the norm of each rank's part."""
    found = {
        (way, option, dtype): trained(way, dtype, steps_of(option), **OPTIONS[option])
        for way, option, dtype in CASES[dist.get_world_size()]
    }
    own = mock.patch.object(tree, "_completed", lambda sums, wholes: torch.stack(sums))
    with own:
        wrong = {way: trained(way) for way in CUT}
    return found, wrong


@functools.cache
def on(count):
    return on_ranks(count, train_all)


@functools.cache
def on_one(option, dtype, steps):
    return trained(dtype=dtype, steps=steps, **OPTIONS[option])


@pytest.mark.parametrize("count", CASES)
def test_ranks_take_the_steps_of_one_process(count):
    for found, _ in on(count):
        for way, option, dtype in CASES[count]:
            apart = difference(
                found[way, option, dtype], on_one(option, dtype, steps_of(option))
            )
            assert apart <= BARS[dtype], (way, option, dtype)


@pytest.mark.parametrize("way", CUT)
def test_with_the_norm_of_each_part_they_would_take_others(way):
    for _, wrong in on(4):
        assert difference(wrong[way], on_one("sam", torch.float64, 3)) > 1e-3


# On each rank, what one process cannot say.


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def parts_of(optimizer):
    groups = optimizer.param_groups
    return [local(p.detach()) for group in groups for p in group["params"]]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def look_between_the_steps(way):
    """Weights come back bit for bit, and nothing else of the model is saved."""
    model, optimizer, own = made(way)
    batch = own(batch_of(0, torch.float64))
    step_of(model, optimizer, batch_of(1, torch.float64), own=own)
    before, whole = [p.clone() for p in parts_of(optimizer)], full(model)
    optimizer.guard(model)
    backward(model, batch)
    optimizer.first_step(zero_grad=True)
    moved = [p.clone() for p in parts_of(optimizer)]
    assert same(full(model).values(), whole.values())
    with optimizer.unperturbed():
        assert same(parts_of(optimizer), before)
        assert same(full(model).values(), whole.values())
    assert same(parts_of(optimizer), moved)
    optimizer.restore()
    assert same(parts_of(optimizer), before)
    length = sum(float((a - b).square().sum()) for a, b in zip(moved, before, strict=True))
    return 0.0 if same(moved, before) else length


def resume(way):
    """The states that PyTorch's checkpoints are made of go on bit for bit."""
    steps = [batch_of(step, torch.float64) for step in range(6)]
    model, optimizer, own = made(way, nesterov=True)
    for batch in steps[:3]:
        step_of(model, optimizer, batch, own=own)
    saved = copy.deepcopy(dcp.get_state_dict(model, optimizer))
    for batch in steps[3:]:
        step_of(model, optimizer, batch, own=own)
    again, fresh, own = made(way, lr=9.0, rho=9.0, nesterov=True)
    dcp.set_state_dict(again, fresh, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert fresh.param_groups[0]["rho"] == 0.3
    for batch in steps[3:]:
        step_of(again, fresh, batch, own=own)
    assert same(parts_of(fresh), parts_of(optimizer))


SCALERS = [
    (torch.amp.GradScaler, False),
    (torch.amp.GradScaler, True),
    (ShardedGradScaler, True),
]


def skip_together(way):
    """All ranks leave out a step that is not finite on the last alone."""
    for kind, scaled in SCALERS:
        for spoiled in (0, 1):
            model, optimizer, own = made(way, torch.float32, skip_nonfinite=True)
            scaler = kind("cpu", enabled=scaled)
            before, scale = [p.clone() for p in parts_of(optimizer)], scaler.get_scale()
            batch = own(batch_of(0, torch.float32))
            for number in (0, 1):
                last = dist.get_rank() + 1 == dist.get_world_size()
                by = torch.inf if last and number == spoiled else 1.0
                loss = F.cross_entropy(model(batch[0]), batch[1]) * by
                scaler.scale(loss).backward()
                if number == 0:
                    optimizer.first_step(zero_grad=True)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert optimizer.skipped == 1, (kind, scaled, spoiled)
            assert same(parts_of(optimizer), before)
            assert scaler.get_scale() == (scale / 2 if scaled else 1.0)


def scaled_steps():
    """A GradScaler takes the unscaled step."""
    found = []
    for kind, scaled in SCALERS:
        model, optimizer, own = made("fsdp")
        scaler = kind("cpu", enabled=scaled)
        for step in range(3):
            batch = own(batch_of(step, torch.float64))
            for number in (0, 1):
                loss = F.cross_entropy(model(batch[0]), batch[1])
                scaler.scale(loss).backward()
                if number == 0:
                    optimizer.first_step(zero_grad=True)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(full(model))
    for scaled in found[1:]:
        assert difference(scaled, found[0]) < 1e-13


def disagree():
    """A GradScaler that asks the ranks of the first gradient alone is found out.

    PyTorch's sharded one asks all, where it unscales by itself.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = distribute_tensor(torch.ones(3), mesh)
    cut = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    params = [nn.Parameter(whole), nn.Parameter(cut)]
    optimizer = samfn.SAM(params, torch.optim.SGD, lr=0.1)
    told = pytest.raises(RuntimeError, match=r"inf or NaN on 1 of \d ranks")
    for kind, expected in (
        (torch.amp.GradScaler, told),
        (ShardedGradScaler, contextlib.nullcontext()),
    ):
        scaler = kind("cpu")
        for number in (0, 1):
            loss = sum(p.square().sum() for p in params)
            scaler.scale(loss).backward()
            if number == 0:
                optimizer.first_step(zero_grad=True)
        if dist.get_rank() == 0:
            local(params[1].grad).fill_(torch.inf)
        if kind is ShardedGradScaler:
            scaler.unscale_(optimizer)
        with expected:
            scaler.step(optimizer)
        assert not optimizer.perturbed
        optimizer.zero_grad()
    assert optimizer.skipped == 1


def count_passes():
    """What FSDP2 adds up by itself is counted; what it does not show is refused."""
    model, optimizer, own = made("fsdp")
    batch = own(batch_of(0, torch.float64))
    for clear in (optimizer.zero_grad, model.zero_grad):
        for _ in range(2):
            backward(model, batch)
        clear()
        backward(model, batch)
        optimizer.first_step(zero_grad=True)
        backward(model, batch)
        optimizer.second_step(zero_grad=True)
    for _ in range(2):
        backward(model, batch)
    optimizer.first_step(zero_grad=True)
    backward(model, batch)
    with pytest.raises(RuntimeError, match="passes: 2 before first_step, 1 after"):
        optimizer.second_step()
    optimizer.zero_grad()
    model.set_requires_gradient_sync(False)
    backward(model, batch)
    with pytest.raises(RuntimeError, match=r"with set_requires_gradient_sync\(True\)"):
        optimizer.first_step(zero_grad=True)
    model.set_requires_gradient_sync(True)


def passes_of(model, batch, *, unsynchronised):
    """Go backward several times, and synchronise at the last."""
    for left in reversed(range(unsynchronised + 1)):
        model.set_requires_gradient_sync(left == 0)
        backward(model, batch)


def count_unsynchronised():
    """In a guarded model, passes that do not synchronise count in the next that does."""
    counts = "passes: {} before first_step, {} after"
    # Those of other dtypes are added up elsewhere.
    half = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    for how in ({}, {"mp_policy": half}, {"reshard_after_forward": False}):
        count, place = fsdp(model := network(), **how)
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **SETTINGS)
        optimizer.guard(model)
        batch = [part.chunk(count)[place] for part in batch_of(0, torch.float64)]
        for first, second in ((1, 0), (0, 2), (1, 1)):
            optimizer.zero_grad()
            passes_of(model, batch, unsynchronised=first)
            optimizer.first_step(zero_grad=True)
            passes_of(model, batch, unsynchronised=second)
            if first == second:
                optimizer.second_step()
                continue
            found = counts.format(first + 1, second + 1)
            with pytest.raises(RuntimeError, match=found):
                optimizer.second_step()
        optimizer.zero_grad()
        backward(model, batch)
        model.set_requires_gradient_sync(False)
        backward(model, batch)  # Its gradient will be in that of the second pass.
        model.set_requires_gradient_sync(True)
        optimizer.first_step(zero_grad=True)
        backward(model, batch)
        with pytest.raises(RuntimeError, match=counts.format(1, 2)):
            optimizer.second_step()
        optimizer.zero_grad()
        model.set_requires_gradient_sync(False)
        backward(model, batch)
        model.set_requires_gradient_sync(True)
        with pytest.raises(RuntimeError, match=counts.format(2, 1)):
            optimizer.step(lambda model=model, batch=batch: backward(model, batch))


def accumulate_unsynchronised():
    """The last backward pass of a pass may do it for all; with what is kept, each must."""
    model, optimizer, own = made("fsdp")
    optimizer.guard(model)
    other, reference, _ = made("fsdp")
    for step in range(3):
        batch = own(batch_of(step, torch.float64))
        halves = [*zip(*(part.chunk(2) for part in batch), strict=True)]
        for end in ("first_step", "second_step"):
            for number, half in enumerate(halves):
                model.set_requires_gradient_sync(number == 1)
                backward(model, half, 0.5)
                backward(other, half, 0.5)
            getattr(optimizer, end)(zero_grad=True)
            getattr(reference, end)(zero_grad=True)
    assert difference(full(model), full(other)) < 1e-13
    for first in (True, False):
        backward(model, batch)
        optimizer.first_step(zero_grad=True)
        if not first:
            model.set_requires_gradient_sync(False)
        backward(model, batch)
        if first:
            optimizer.keep_step(zero_grad=True)
            continue
        with pytest.raises(RuntimeError, match="passes: 1 before first_step, 0 after"):
            optimizer.keep_step(zero_grad=True)


def evaluate_between():
    """After `reshard`, the second pass sees the perturbed weights again."""
    found = []
    for looks in (False, True):
        model, optimizer, own = made("fsdp")
        for step in range(2):
            batch = own(batch_of(step, torch.float64))
            backward(model, batch)
            optimizer.first_step(zero_grad=True)
            if looks:
                with optimizer.unperturbed(), torch.no_grad():
                    model(batch[0])
                    model.reshard()
            backward(model, batch)
            optimizer.second_step(zero_grad=True)
        found.append(full(model))
    assert difference(*found) == 0


def half_precision():
    """The perturbation is of float32, whatever the passes compute with."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = network(torch.float32)
    fsdp(model, mp_policy=policy)
    optimizer = samfn.SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=0.01)
    batch = batch_of(0, torch.float32)
    before = full(model)
    backward(model, (batch[0].bfloat16(), batch[1]))
    optimizer.first_step(zero_grad=True)
    moved = full(model)
    length = torch.stack([(moved[n] - before[n]).norm() for n in before]).norm()
    torch.testing.assert_close(length, torch.tensor(0.5))
    backward(model, (batch[0].bfloat16(), batch[1]))
    optimizer.second_step(zero_grad=True)
    assert not optimizer.perturbed


DDP = {
    "each pass": {},
    "views": {"gradient_as_bucket_view": True},
    "the last": {"last": True},
    "the last, views": {"last": True, "gradient_as_bucket_view": True},
}


def accumulate_on_replicas():
    """Return weights after steps with a perturbation for each micro-batch of a rank."""
    found = {}
    for name, how in DDP.items():
        how = dict(how)
        last = how.pop("last", False)
        inner = network()
        model = nn.parallel.DistributedDataParallel(inner, **how)
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.3, **SETTINGS)
        count, rank = dist.get_world_size(), dist.get_rank()
        for step in range(STEPS):
            own = [part.chunk(count)[rank] for part in batch_of(step, torch.float64)]
            halves = [*zip(*(part.chunk(2) for part in own), strict=True)]
            for half, end in zip(halves, ("keep_step", "second_step"), strict=True):
                with model.no_sync():
                    backward(model, half, 0.5)
                optimizer.first_step(zero_grad=True)
                quiet = last and end == "keep_step"
                with model.no_sync() if quiet else contextlib.nullcontext():
                    backward(model, half, 0.5)
                getattr(optimizer, end)(zero_grad=True)
        for passes in ((2, 1), (1, 2)):  # Each averages what is accumulated.
            for end, number in zip(("first_step", "second_step"), passes, strict=True):
                for _ in range(number):
                    backward(model, own)
                if end == "first_step":
                    optimizer.first_step(zero_grad=True)
            with pytest.raises(
                RuntimeError, match="passes: {} before .*, {} aft".format(*passes)
            ):
                optimizer.second_step()
            optimizer.zero_grad()
        found[name] = full(inner)
    return found


def normalise(way, together):
    """Return the model after steps with BatchNorm, by each rank's batch or by all."""
    model = normalising()
    if together:
        model = distributed.synchronised(model)
    count, place = WAYS[way](model)
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.3, **SETTINGS)
    for step in range(STEPS):
        batch = [part.chunk(count)[place] for part in batch_of(step, torch.float64)]
        step_of(model, optimizer, batch)
    return full(model)


def normalising():
    torch.manual_seed(1)
    layers = {"up": nn.Linear(6, 8), "norm": nn.BatchNorm1d(8), "down": nn.Linear(8, 3)}
    return nn.Sequential(OrderedDict(layers)).double()


def normalised_in_turn(count):
    """Return the same of one process that goes through the ranks' batches in turn."""
    model = normalising()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, rho=0.3, **SETTINGS)
    for step in range(STEPS):
        parts = [part.chunk(count) for part in batch_of(step, torch.float64)]
        for end in (optimizer.first_step, optimizer.second_step):
            for part in zip(*parts, strict=True):
                backward(model, part, 1 / count)
            end(zero_grad=True)
    return full(model)


def normalise_all():
    """On a rank: in parts, and in copies of parts."""
    return {(w, t): normalise(w, t) for w in ("fsdp", "hsdp") for t in (True, False)}


@pytest.mark.parametrize("count", [2, 4])
def test_batch_norm_is_of_each_rank_or_of_all(count):
    in_turn, whole = normalised_in_turn(count), normalised_in_turn(1)
    params = [name for name, _ in normalising().named_parameters()]
    for found in on_ranks(count, normalise_all):
        for (way, together), ours in found.items():
            wanted = whole if together else tree.only(in_turn, params)
            wanted = {n: w for n, w in wanted.items() if w.is_floating_point()}
            assert difference(ours, wanted) < 1e-13, (way, together)
    assert difference(whole, tree.only(in_turn, params)) > 1e-3


def check_all():
    """On a rank: all of the above; on four, where a mesh has two dimensions."""
    if dist.get_world_size() == 4:
        several = ("hsdp", "fsdp over tensor parallel", "two meshes")
        lengths = {way: look_between_the_steps(way) for way in several}
        resume("fsdp over tensor parallel")
        skip_together("hsdp")
        return lengths, accumulate_on_replicas()
    lengths = {way: look_between_the_steps(way) for way in WAYS}
    for way in ("fsdp", "fsdp, offloaded"):
        resume(way)
        skip_together(way)
    for check in (
        scaled_steps,
        disagree,
        count_passes,
        count_unsynchronised,
        accumulate_unsynchronised,
        evaluate_between,
        half_precision,
    ):
        check()
    return lengths, accumulate_on_replicas()


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_agree_on_what_they_save_skip_count_and_keep(count):
    results = on_ranks(count, check_all)
    for lengths, _ in results:
        assert all(lengths.values())
    # A perturbation for each micro-batch of each rank, as the functional form has it.
    model = network()
    method = samfn.per_micro_batch(samfn.sam(), ROWS // count // 2)
    base = samfn.sgd(0.9, weight_decay=1e-3)
    state = samfn.init(*samfn.split(model), optimizer=base, method=method)
    given = {"optimizer": base, "method": method}
    given["loss_fn"] = samfn.supervised(model, F.cross_entropy)
    for step in range(STEPS):
        batch = batch_of(step, torch.float64)
        state, _ = samfn.sam_update(state, batch, rho=0.3, lr=0.1, **given)
    for _, found in results:
        for name in DDP:
            assert difference(found[name], dict(state.params)) < 1e-13, name
