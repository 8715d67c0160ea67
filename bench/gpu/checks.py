"""Whether what is fast on a GPU is also right."""

import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import samfn
from bench import measure, scaling
from bench.gpu.setup import Row, Setup
from bench.networks import RHO, Network, build
from recipes.settings.method_expression import MAKERS
from samfn import distributed
from samfn.tree import Params


def checks(setup: Setup) -> list[Row]:
    """Check that what is fast is also right."""
    name = setup.networks["small"]
    network = build(name, setup.batch, setup.device)
    start = samfn.split(network.model)[0]
    optimizer = samfn.sgd(0.9, weight_decay=5e-4)
    batches = [
        (torch.randn_like(network.inputs), torch.randint_like(network.targets, 10))
        for _ in range(4)
    ]

    def trained(dtype: torch.dtype | None, **settings: Any) -> tuple[Any, list[float]]:
        loss_fn = samfn.supervised(network.model, F.cross_entropy, dtype=dtype)
        common: Any = {"loss_fn": loss_fn, "optimizer": optimizer}
        state = samfn.init(*samfn.split(network.model), optimizer=optimizer)
        losses = []
        made = {"backend": setup.backend, **common, **settings}
        step: Any = samfn.compile_update(**made) if settings else None
        for i in range(setup.steps):
            rho, lr = RHO * (1 + i % 3), 0.02 / (1 + i % 2)
            batch = batches[i % 4]
            if step is None:
                state, seen = samfn.sam_update(state, batch, **common, rho=rho, lr=lr)
            else:
                state, seen = step(state, batch, rho=rho, lr=lr)
            losses.append(seen.loss)
        return state.params, [float(loss) for loss in losses]

    counters = torch._dynamo.utils.counters
    full = trained(None)
    counters.clear()
    fast = trained(setup.dtype, plan="whole")
    graphs = counters["stats"]["unique_graphs"]
    parted = trained(setup.dtype, plan="gradient")
    difference = max(abs(a - b) for a, b in zip(full[1], fast[1], strict=True))
    rows: list[Row] = [
        {
            "check": f"compiled {setup.precision} against eager float32, largest"
            " difference in loss",
            "value": difference,
            "passed": difference < 0.25 * full[1][0],
        },
        {
            "check": "losses fall in both, to",
            "value": [statistics.mean(x[1][-4:]) for x in (full, fast)],
            "passed": all(statistics.mean(x[1][-4:]) < x[1][0] for x in (full, fast)),
        },
        {
            "check": "one gradient called twice against one graph, largest difference",
            "value": max(abs(a - b) for a, b in zip(fast[1], parted[1], strict=True)),
            "passed": measure.distance(start, parted[0], fast[0]) < 1.0,
        },
        {"check": "graphs for all steps", "value": graphs, "passed": graphs == 1},
        *_random_checks(setup),
    ]
    if setup.device == "cuda":
        plain = trained(setup.dtype, plan="whole", cuda_graph=False)
        rows.append(
            {
                "check": "CUDA graph against none, distance over way",
                "value": measure.distance(start, fast[0], plain[0]),
                "passed": max(abs(a - b) for a, b in zip(fast[1], plain[1], strict=True))
                < 0.1 * fast[1][0],
            }
        )
    return rows


def methods(setup: Setup) -> list[Row]:
    """Check every method, compiled, against its eager step, in float64."""
    given = {
        "accumulated": samfn.accumulated(samfn.sam(), 5),
        "ae_sam": samfn.ae_sam(7),
        "esam": samfn.esam(beta=1.0),  # A graph draws by other kernels: no draws.
        "every": samfn.every(samfn.sam(), 2),
        "loss_scaled": samfn.loss_scaled(samfn.sam()),
        "on_parameters": samfn.on_parameters(samfn.sam(), ("0.weight", "3.bias")),
        "per_micro_batch": samfn.per_micro_batch(samfn.sam(), 5),
        "same_randomness": samfn.same_randomness(samfn.sam()),
        "sub_batch_ascent": samfn.sub_batch_ascent(samfn.sam()),
    }
    made = {name: make() for name, make in MAKERS.items() if name not in given}
    rows: list[Row] = []
    every = made | given
    for name in setup.methods or sorted(every):
        torch._dynamo.reset()
        (slow, _), (fast, plan) = (
            _trained(setup, every[name], how) for how in (False, True)
        )
        worst = max(float((slow[n] - fast[n]).abs().max()) for n in slow)
        row: Row = {"method": name, "compiled": plan, "largest difference": worst}
        rows.append(row | {"passed": worst < 1e-9})
    return rows


def _trained(setup: Setup, method: Any, fast: bool) -> tuple[dict[str, Tensor], Any]:
    """Return the weights after seven steps, and what was compiled."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)
    model = nn.Sequential(*layers).double().to(setup.device)
    loss_fn = samfn.supervised(model, partial(F.cross_entropy, reduction="none"))
    optimizer = samfn.sgd(0.9, nesterov=True, weight_decay=5e-4)
    common: Any = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    how: Any = {"backend": setup.backend}
    if setup.backend == "inductor":  # It would draw other numbers than the eager step.
        how["options"] = {"fallback_random": True}
    step: Any = partial(samfn.sam_update, **common)
    if fast:
        step = samfn.compile_update(**common, **how)
    for number in range(7):
        torch.manual_seed(number)
        drawn = torch.randn(12, 8).double(), torch.randint(4, (12,))
        batch = tuple(part.to(setup.device) for part in drawn)
        rho, lr = 0.1 / (1 + number % 2), 0.1 / (1 + number)
        state, _ = step(state, batch, rho=rho, lr=lr)
    found = {name: w.detach().clone() for name, w in state.params.items()}
    return found, step.plan if fast else None


class Trained(NamedTuple):
    """What some steps led to."""

    weights: dict[str, Tensor]
    losses: list[float]
    seconds: float
    """Of a step, without the first one, which compiles."""


def one_rank(setup: Setup) -> list[Row]:
    """Check the step of several devices with one: its collectives change nothing.

    They are in the graph of a state in parts; NCCL on a GPU, gloo on a CPU. Beside it the
    same of samfn.SAM and `fully_shard`, eager both.
    """
    network = build(setup.networks["small"], setup.batch, setup.device)
    ways: dict[str, tuple[Callable[[], Trained], Callable[[], Trained]]] = {
        "sharded": (
            partial(_by_functions, setup, network, "sharded"),
            partial(_by_functions, setup, network),
        ),
        "fully_shard, samfn.SAM": (
            partial(_in_place, setup, network, shards=True),
            partial(_in_place, setup, network),
        ),
    }
    start = samfn.split(network.model)[0]
    alone = {name: one() for name, (_, one) in ways.items()}
    with mock.patch.dict(os.environ, _of_one_rank()), distributed.ranks():
        return [
            {"placement": name, **_beside(several(), alone[name], start)}
            for name, (several, _) in ways.items()
        ]


def _of_one_rank() -> dict[str, str]:
    """Return what torchrun would tell a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def _by_functions(setup: Setup, network: Network, placement: str | None = None) -> Trained:
    params, buffers = samfn.split(network.model)
    optimizer, method = samfn.sgd(0.9), samfn.sam()
    if placement:
        method, params = scaling.placed(placement, params)
    how: Any = {"plan": "whole", "backend": setup.backend, "method": method}
    loss_fn = samfn.supervised(network.model, F.cross_entropy)
    update = samfn.compile_update(loss_fn=loss_fn, optimizer=optimizer, **how)
    state = samfn.init(params, buffers, optimizer=optimizer)
    batch = network.inputs, network.targets

    def step() -> Tensor:
        nonlocal state
        state, seen = update(state, batch, rho=RHO, lr=0.01)
        return seen.loss

    losses, seconds = _followed(step, setup.steps)
    whole = distributed.gather(state)
    distributed.require_alike(whole)
    return Trained(dict(whole.params), losses, seconds)


def _in_place(setup: Setup, network: Network, *, shards: bool = False) -> Trained:
    model, step = scaling.in_place(network, shards=shards, lr=0.01)
    losses, seconds = _followed(step, setup.steps)
    params = {name: p.detach() for name, p in model.named_parameters()}
    return Trained(distributed.gather(params), losses, seconds)


def _followed(step: Callable[[], Tensor], steps: int) -> tuple[list[float], float]:
    losses, begun = [], 0.0
    for _ in range(steps):
        losses.append(float(step()))
        begun = begun or time.perf_counter()
    return losses, (time.perf_counter() - begun) / (steps - 1)


def _beside(several: Trained, alone: Trained, start: Params) -> Row:
    pairs = zip(several.losses, alone.losses, strict=True)
    worst = max(abs(one - other) for one, other in pairs)
    return {
        "largest difference in loss": worst,
        "distance over way": measure.distance(start, several.weights, alone.weights),
        "of the step alone": several.seconds / alone.seconds,
        "passed": worst < 0.1 * alone.losses[0],
    }


def _random_checks(setup: Setup) -> list[Row]:
    """Check dropout inside of the compiled step: new masks, and the seed fixes them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).to(
        setup.device
    )
    loss_fn = samfn.supervised(model, F.mse_loss)
    optimizer = samfn.sgd(0.0)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    batch = tuple(torch.randn(2, 16, 64, device=setup.device))
    given: Any = {"loss_fn": loss_fn, "optimizer": optimizer, "backend": setup.backend}
    step = samfn.compile_update(**given)
    seen, places = [], set()
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.manual_seed(seed)
        state, metrics = step(state, batch, rho=0.05, lr=torch.tensor(0.0))
        seen.append(metrics.outputs)
        places.add(state.params["0.weight"].data_ptr())
    stays = setup.device == "cpu" or len(places) == 1
    return [
        {
            "check": "dropout differs from step to step",
            "value": "",
            "passed": not torch.equal(seen[2], seen[3]),
        },
        {
            "check": "the seed fixes dropout",
            "value": "",
            "passed": torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]),
        },
        {
            "check": "the state stays at its address",
            "value": len(places),
            "passed": stays,
        },
    ]
