"""A state of DTensors takes the steps of one process, with no other argument."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import samfn
from recipes.settings.method_expression import MAKERS
from samfn import distributed, tree
from samfn.measure import landscape, per_example, sharpness
from tests import ROOT
from tests.ranks import Sent, on_ranks
from tests.reference import methods_by_default

ROWS, PART, STEPS = 16, 2, 10
METHODS = {
    "sam": samfn.sam(),
    "asam": samfn.asam(),
    "gsam": samfn.gsam(),
    "looksam": samfn.looksam(3),
    "friendly_sam": samfn.friendly_sam(),
    "fisher_sam": samfn.fisher_sam(),
    "per_micro_batch": None,  # of as many examples on all ranks together
}


def other(params, buffers, batch):
    """Return another loss of the batch, of the first layer of `network` alone."""
    return nn.functional.linear(batch[0], params["0.weight"], params["0.bias"]).cos().mean()


OTHERS = {
    **{n: method for n, method in methods_by_default().items() if n not in METHODS},
    "ascent_on": samfn.ascent_on(samfn.sam(), other),
    "on_loss": samfn.on_loss(samfn.sam(), other),
    "ae_sam": samfn.ae_sam(2 * STEPS),
    "every": samfn.every(samfn.sam(), 2),
    "on_parameters": samfn.on_parameters(samfn.sam(), "*.weight"),
    "loss_scaled": samfn.loss_scaled(samfn.sam()),
    "same_randomness": samfn.same_randomness(samfn.sam()),
    "sub_batch_ascent": samfn.sub_batch_ascent(samfn.sam(), 0.5),
    "esam": samfn.esam(beta=1, gamma=1),
    "preconditioned": samfn.functional_sam(samfn.preconditioned()),
    "watched": samfn.watched(samfn.sam()),
    "nothing": samfn.every(samfn.sam(), 100),
}
OPTIMIZERS = {
    "nesterov": samfn.sgd(0.9, nesterov=True),
    "adam": samfn.adam(),
    "amsgrad": samfn.adamw(amsgrad=True),
    "nadam": samfn.nadam(),
    "rmsprop": samfn.rmsprop(momentum=0.9, centered=True),
    "adagrad": samfn.adagrad(),
    "clipped": samfn.clipped(samfn.sgd(), 0.1),
    "grouped": samfn.grouped(samfn.sgd(), (["0.bias"], samfn.adam())),
    "muon": samfn.grouped(samfn.muon(), (["0.bias", "2.bias", "4.bias"], samfn.sgd())),
    "scaled_lr": samfn.scaled_lr(samfn.sgd(), 0.5),
}
SGD = samfn.sgd(0.9, weight_decay=1e-2)
criterion = nn.CrossEntropyLoss(reduction="none")


def network(dtype=torch.float32, normed=False):
    torch.manual_seed(0)
    # More rows than ranks, fewer, and a number that they do not divide.
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 5)]
    if normed:
        layers.insert(1, nn.BatchNorm1d(9))
    return nn.Sequential(*layers).to(dtype)


def examples(dtype=torch.float32, rows=ROWS):
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 6, generator=source, dtype=dtype)
    return inputs, torch.randint(0, 5, (rows,), generator=source)


def in_turn(batch):
    """Return the batch of one process whose parts hold a part of each rank's."""
    ranks = distributed.size()
    order = torch.arange(len(batch[0])).view(ranks, -1, PART).transpose(0, 1).reshape(-1)
    return tuple(leaf[order] for leaf in batch)


def difference(found, expected):
    """Return the largest relative difference of a tensor."""
    return max(
        float((found[name].double() - leaf.double()).norm() / leaf.double().norm())
        for name, leaf in expected.items()
    )


def both(model, method, batch, *, optimizer=SGD, steps=STEPS, mesh=None, alone=None, **how):
    """Train on one process and on all ranks; return states, whole, and last metrics."""
    start = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    given = {"optimizer": optimizer, "rho": 0.05, "lr": 0.1}
    found = []
    for state, own, used, net in (
        (start, in_turn(batch), alone or method, model),
        (
            distributed.shard(start, mesh),
            distributed.share(batch),
            method,
            distributed.synchronised(model),  # Where there is no BatchNorm, a copy.
        ),
    ):
        loss_fn = samfn.supervised(net, criterion, **how)
        torch.manual_seed(0)
        for _ in range(steps):
            state, metrics = samfn.sam_update(
                state, own, loss_fn=loss_fn, method=used, **given
            )
        found.append((distributed.gather(state), metrics))
    return found


def compared(names, dims, dtype, steps=STEPS, normed=False):
    """On a rank: how far steps of methods are from those of one process."""
    mesh, found = init_device_mesh("cpu", dims), {}
    model, batch = network(dtype, normed), examples(dtype)
    for name in names:
        method = {**METHODS, **OTHERS}[name] or samfn.per_micro_batch(samfn.sam(), PART)
        alone = None
        if name == "per_micro_batch":
            alone = samfn.per_micro_batch(samfn.sam(), PART * distributed.size())
        how = {"mesh": mesh, "alone": alone, "steps": steps}
        (one, seen), (all_, told) = both(model, method, batch, **how)
        found[name] = difference(all_.params, one.params)
        if normed:
            statistics = {n: b for n, b in one.buffers.items() if b.is_floating_point()}
            found[name, "statistics"] = difference(all_.buffers, statistics)
        for field in ("loss", "grad_norm", "perturbation_norm", "descent_norm"):
            torch.testing.assert_close(getattr(told, field), getattr(seen, field))
        if told.layers is not None:
            for own, wanted in zip(told.layers, seen.layers, strict=True):
                torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    return found


BARS = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.mark.parametrize(
    ("dims", "dtypes"),
    [((2,), BARS), *((dims, [torch.float64]) for dims in ((1, 2), (4,), (2, 2)))],
)
def test_a_sharded_state_takes_the_steps_of_one_process(dims, dtypes):
    ranks = torch.Size(dims).numel()
    for dtype in dtypes:  # Four steps hold one of looksam's rounds.
        steps = STEPS if len(dtypes) > 1 else 4
        for found in on_ranks(ranks, compared, [*METHODS], dims, dtype, steps):
            for name, apart in found.items():
                # On one process, another order of the rows alone moves looksam by 1.1e-6.
                rounding = (name, dtype) == ("looksam", torch.float32)
                assert apart <= (2e-6 if rounding else BARS[dtype]), (name, dtype)


def test_ranks_that_normalise_together_take_the_steps_of_one_process():
    how = [*METHODS], (2, 2), torch.float64, 4, True
    for found in on_ranks(4, compared, *how):
        assert max(found.values()) <= BARS[torch.float64], found


def with_the_norm_of_each_part():
    """On a rank: how far a step is from that of one process if no norms are added up."""
    with mock.patch.object(tree, "_completed", lambda sums, leaves: torch.stack(sums)):
        model, batch = network(torch.float64), examples(torch.float64)
        (one, _), (all_, _) = both(model, samfn.sam(), batch, steps=1)
    return difference(all_.params, one.params)


@pytest.mark.parametrize("count", [2, 4])
def test_with_the_norm_of_each_part_they_would_take_others(count):
    assert min(on_ranks(count, with_the_norm_of_each_part)) > 1e-4


def test_every_method_and_combinator_takes_dtensors():
    assert MAKERS.keys() <= {*METHODS, *OTHERS, "accumulated"}  # The last one is below.
    for found in on_ranks(2, compared, [*OTHERS], (2,), torch.float64, 3):
        assert max(found.values()) <= 1e-13, found


def optimizers():
    """On a rank: how far steps of optimizers are from those of one process."""
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        model, batch = network(torch.float64), examples(torch.float64)
        how = {"optimizer": optimizer, "steps": 3}
        (one, _), (all_, _) = both(model, samfn.sam(), batch, **how)
        found[name] = difference(all_.params, one.params)
    return found


def test_every_optimizer_takes_dtensors():
    for found in on_ranks(2, optimizers):
        assert max(found.values()) <= 1e-11, found


class Tied(nn.Module):
    """Reads weights in more ways than by a call of the layer that has them."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.kind = nn.Linear(6, 5), kind
        self.middle = nn.Linear(5, 5)
        self.recurrent = nn.LSTM(5, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(5, 5)
        self.last.weight = self.middle.weight

    def forward(self, inputs):
        hidden = self.first(inputs)[:, None]
        if self.kind == "plain":
            hidden = self.inner(hidden)
        else:
            hidden = checkpoint(self.inner, hidden, use_reentrant=self.kind == "reentrant")
        return self.last(hidden[:, 0]) * self.scale

    def inner(self, hidden):
        hidden = self.recurrent(self.middle(hidden))[0]
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        penalty = sum(w.square().sum() for w in self.parameters())
        return torch.tanh(self.normed(hidden)) * (1 + penalty / 100)


def peculiar():
    """On a rank: how far steps of models are that read weights in many ways."""
    found = {}
    for kind in ("plain", "checkpointed", "reentrant"):
        for again in (True, False):
            torch.manual_seed(3)
            model, batch = Tied(kind).double(), examples(torch.float64)
            how = {"steps": 3, "reshard_after_forward": again}
            (one, _), (all_, _) = both(model, samfn.sam(), batch, **how)
            found[kind, again] = difference(all_.params, one.params)
    return found


def test_weights_are_whole_wherever_a_model_reads_them():
    for found in on_ranks(2, peculiar):
        assert max(found.values()) <= 1e-11, found


def measured():
    """On a rank: what instruments find on DTensors, and on one process."""
    model, batch = network(torch.float64), examples(torch.float64)
    params, buffers = samfn.split(model)
    loss_fn = samfn.l2_regularized(samfn.supervised(model, criterion), 0.1)
    shards = distributed.shard(params)
    pairs = {}
    for key, w, batches in (
        ("one", params, [in_turn(batch), in_turn(batch)]),
        ("all", shards, [distributed.share(batch)] * 2),
    ):
        objective = samfn.Objective(loss_fn, buffers, batches)
        random = [torch.Generator().manual_seed(5) for _ in range(4)]
        m = PART if key == "all" else PART * distributed.size()
        noise = landscape.filter_normalised(w, random[0])
        up = landscape.ascent(w, buffers, batches, loss_fn=loss_fn)
        grid = w, buffers, batches, (noise, up), [0.0, 0.1], [0.2]
        grads = samfn.evaluate(loss_fn, w, buffers, batches[0]).grads
        moved = samfn.moving_average(w, samfn.perturb(w, grads, 0.3), 0.9)
        where = samfn.mean_of([w, samfn.perturb_adaptive(moved, grads, 0.3)])
        several = samfn.Objective(loss_fn, buffers, [batches[0], cut_in_half(batches[0])])
        pairs[key] = {
            "perturbed": distributed.gather(where),
            "product": distributed.gather(objective.product(w, grads)),
            "worst_case": sharpness.worst_case(objective, w, rho=0.1, steps=2).increase,
            "m_sharpness": sharpness.m_sharpness(objective, w, m=m, rho=0.1)[:2],
            "average_case": sharpness.average_case(
                objective, w, rho=0.1, samples=2, generator=random[1]
            )[:2],
            "trace": sharpness.hessian_trace(objective, w, probes=2, generator=random[2])[
                :2
            ],
            "noise": sharpness.gradient_noise(objective, w).variance.value,
            "lengths": several.loss(w),
            "plane": landscape.plane(*grid, loss_fn=loss_fn)[2:],
        }
        count = len(batches[0][0]) * (1 if key == "one" else distributed.size())
        assert objective.examples(w) == 2 * count
        assert len(per_example.losses(w, buffers, batches, loss_fn=loss_fn)) in (16, 32)
    with pytest.raises(TypeError, match="must be a plain tensor, got a DTensor"):
        sharpness.hessian_eigenvalues(objective, shards)
    for name, expected in pairs["one"].items():
        torch.testing.assert_close(pairs["all"][name], expected, rtol=1e-9, atol=1e-12)


def cut_in_half(batch):
    return tuple(leaf[: len(leaf) // 2] for leaf in batch)


def test_instruments_measure_the_mean_over_all_ranks():
    on_ranks(2, measured)


def ignoring(placement):
    """On a rank: accumulate over parts of which the ranks count different numbers."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    loss_fn = samfn.supervised(model, nn.CrossEntropyLoss(ignore_index=7))
    inputs = torch.randn(8, 4, dtype=torch.float64)
    targets = torch.tensor([0, 7, 1, 2, 7, 7, 7, 1])
    given = {"loss_fn": loss_fn, "optimizer": SGD, "rho": 0.1, "lr": 0.1}
    state = samfn.init(*samfn.split(model), optimizer=SGD)
    one, _ = samfn.sam_update(state, (inputs, targets), **given)
    method = samfn.accumulated(samfn.sam(), 2)
    if placement:
        method = distributed.placed(method, placement)
    else:
        state = distributed.shard(state)
    own = distributed.share((inputs, targets))
    found, _ = samfn.sam_update(state, own, method=method, **given)
    return difference(distributed.gather(found).params, one.params)


@pytest.mark.parametrize("placement", [None, "global"])
def test_parts_of_batches_weigh_what_all_ranks_count_in_them(placement):
    assert max(on_ranks(2, ignoring, placement)) < 1e-13


class Alive(TorchDispatchMode):
    """Notes how many bytes of gathered tensors are alive at most."""

    def __init__(self):
        super().__init__()
        self.peak, self._held = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("_c10d_functional::all_gather"):
            storage = result.untyped_storage()
            self._held.append((StorageWeakRef(storage), storage.nbytes()))
        self._held = [(one, size) for one, size in self._held if not one.expired()]
        self.peak = max(self.peak, sum(size for _, size in self._held))
        return result


def gathered(again):
    """On a rank: what a step of ten layers gathers, and what of it is there at once."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(10)])
    loss_fn = samfn.supervised(model, nn.MSELoss(), reshard_after_forward=again)
    state = samfn.init(distributed.shard(samfn.split(model)[0]), {}, optimizer=SGD)
    batch = torch.randn(4, 32), torch.randn(4, 32)
    with Sent() as sent, Alive() as alive:
        samfn.sam_update(state, batch, loss_fn=loss_fn, optimizer=SGD, lr=0.1)
    names = [name for name, *_ in sent.found]
    return alive.peak / (4 * 32 * 32), {name: names.count(name) for name in {*names}}


def test_a_layer_is_whole_while_it_is_in_use_or_is_kept_if_that_is_wished():
    for peak, counts in on_ranks(2, gathered, True):
        # One that is in use and the next; each of gloo's two threads keeps its last
        # result until it takes up another.
        assert peak <= 2 + 2
        # The first layer's weight is not read in the backward pass.
        assert counts["all_gather_into_tensor"] == 2 * (10 + 9)
        assert counts["reduce_scatter_tensor"] == 2 * 10
    for peak, counts in on_ranks(2, gathered, False):
        assert peak == 9
        assert counts["all_gather_into_tensor"] == 2 * 10


class Writes(nn.Linear):
    def forward(self, inputs):
        if self.out_features == 2:
            with torch.no_grad():
                self.weight.mul_(2)
        hidden = torch.sigmoid(super().forward(inputs))
        return hidden.mul_(2) if self.out_features == 3 else hidden


def refused():
    """On a rank: what is said to what cannot be."""
    said = []
    model = network()
    start = samfn.init(*samfn.split(model), optimizer=SGD)
    state = distributed.shard(start)
    loss_fn = samfn.supervised(model, criterion)

    def step(state, loss_fn=loss_fn, **how):
        given = {"loss_fn": loss_fn, "optimizer": SGD, "lr": 0.1} | how
        return lambda: samfn.sam_update(state, distributed.share(examples()), **given)

    def of(model):
        parts = samfn.init(distributed.shard(samfn.split(model)[0]), {}, optimizer=SGD)
        return step(parts, samfn.supervised(model, lambda outputs, _: outputs.mean()))

    hooked = network()
    hooked[0].weight.register_hook(lambda grad: grad)
    mixed = state._replace(params={**state.params, "0.bias": start.params["0.bias"]})
    for attempt in (
        step(state, method=distributed.placed(samfn.sam(), "replica")),
        step(mixed),
        of(hooked),
        of(Writes(6, 2)),
        of(Writes(6, 3)),
        lambda: distributed.shard(state),
    ):
        try:
            attempt()
            said.append("nothing")
        except (RuntimeError, TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_cannot_be_is_refused():
    for said in on_ranks(2, refused):
        for message, part in zip(
            said,
            (
                "a sharded state has one perturbation for all ranks",
                "params must be DTensors, all or none of them, 0.bias is not",
                "0.weight has a hook for its gradient",
                "the forward pass writes to weight",
                "modified by an in-place operation",
                "got DTensors, which are placed already",
            ),
            strict=True,
        ):
            assert part in message


def drawing():
    """On a rank: take a step that draws which weights move."""
    torch.manual_seed(distributed.rank())  # Ranks need not draw alike.
    model, mesh = network(), init_device_mesh("cpu", (2, 2))
    state = distributed.shard(samfn.init(*samfn.split(model), optimizer=SGD), mesh)
    loss_fn, method = samfn.supervised(model, criterion), samfn.esam()
    batch = distributed.share(examples())
    given = {"loss_fn": loss_fn, "optimizer": SGD, "lr": 0.1, "method": method}
    state, metrics = samfn.sam_update(state, batch, **given)
    return {n: w.to_local() for n, w in state.params.items()}, metrics.perturbation_norm


def test_copies_of_a_part_draw_alike():
    first, second, third, fourth = on_ranks(4, drawing)
    for one, other in ((first, third), (second, fourth)):
        for name, part in one[0].items():
            assert torch.equal(part, other[0][name]), name
    assert 0 < first[1] == fourth[1]


def compiled(plan):
    """On a rank: take compiled steps, and the same ones eagerly."""
    model, batch = network(), distributed.share(examples())
    loss_fn, optimizer = samfn.supervised(model, criterion), samfn.adam()
    start = distributed.shard(samfn.init(*samfn.split(model), optimizer=optimizer))
    given = {"loss_fn": loss_fn, "optimizer": optimizer}
    backend = "inductor" if plan == "loss" else "aot_eager"
    step = samfn.compile_update(**given, plan=plan, backend=backend)
    states = [start, start]
    for _ in range(3):
        states[0], _ = step(states[0], batch, lr=0.01)
        states[1], _ = samfn.sam_update(states[1], batch, lr=0.01, **given)
    one, other = (distributed.gather(state).params for state in states)
    return step.plan, difference(one, other), tree.is_sharded(states[0].params["0.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["whole", "loss"])
def test_a_sharded_step_is_compiled(plan):
    for found, apart, sharded in on_ranks(2, compiled, plan):
        assert found == plan
        assert apart < 1e-5
        assert sharded


def test_the_program_of_the_page_runs_under_torchrun(tmp_path):
    page = (ROOT / "samfn/distributed/README.md").read_text()
    _, text = page.split("## A state in parts")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    told = "assert type(state.params['weight']).__name__ == 'DTensor'\nprint(params)\n"
    path = tmp_path / "program.py"
    path.write_text(program + told)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = re.findall(r"{[^}]*}", done.stdout)  # Ranks print at one time.
    assert first == second
