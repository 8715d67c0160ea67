"""Scaling of a SAM step over processes of this machine, and its bounds.

    python -m bench.scaling --case wrn-16-2:128 --case mlp-2048:64

Starts itself with torchrun, each process on one thread of a CPU, and measures by gloo:
steps of each placement in turns, against one process with the whole batch; messages by
their size; memory of replicated and sharded states. From messages and the step of one
process alone it predicts, as `bench/cost_model.py` does, the steps that it has measured.
"""

import copy
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import samfn
from bench import cost_model, measure
from bench.cost_model import Message
from bench.networks import LR, MOMENTUM, RHO, WEIGHT_DECAY, Network, build
from recipes.terminal import cli
from samfn import distributed
from samfn.tree import is_sharded

CASES = ("wrn-16-2:128", "mlp-2048:64")
PLACEMENTS = ("replica", "global", "sharded")
MODES = ("eager", "compiled")
# What is timed beside the placements: the whole batch on the first rank alone; its part of
# the batch, alone; and the parts on all ranks at once, of which none hears of the others.
WHOLE, ALONE, BESIDE = "one process", "a part, alone", "parts, no messages"
SIZES = tuple(4**power for power in range(6, 14))  # 4 KiB to 64 MiB
HELD = "mlp-2048"  # 17 million parameters, and next to no activations
HELD_BY = (1, 2, 4)
HOLDERS = ("global", "sharded")
PATIENCE = 600.0  # seconds: other ranks wait while the first one compiles
Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Options:
    """Cases, placements and modes, and how often each is timed."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK:BATCH, the batch being that of all ranks; once for each case."""
    placement: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Placements to time; none is all but groups, which two ranks have none of."""
    ranks: int = 2
    """Processes that share a step."""
    held_by: tuple[int, ...] = HELD_BY
    """Processes that share a state, whose memory is measured."""
    held: str = HELD
    """Network whose state that is."""
    mode: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """eager or compiled; none is both."""
    rounds: int = 3
    """Turns of each, at least 2."""
    output: Path | None = None
    """File that the JSON lines are appended to."""
    report: Path | None = None
    """Markdown file to write."""
    worker: str = ""
    """Name in `WORKERS`, which torchrun starts on this rank."""


class Line(NamedTuple):
    """Seconds of a message by its bytes: a straight line."""

    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes a second."""

    def __call__(self, size: float) -> float:
        """Return the seconds of a message."""
        return self.latency + size / self.bandwidth


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """Return the line with the least squares of relative errors."""
    x, t = (torch.tensor(values, dtype=torch.float64) for values in (sizes, seconds))
    found = torch.linalg.lstsq(
        torch.stack([1 / t, x / t], dim=1), torch.ones(len(t), 1).to(x)
    )
    latency, slope = found.solution.flatten().tolist()
    return Line(latency, 1 / slope)


def in_turns(
    steps: Mapping[Key, Callable[[], Any]], *, rounds: int, alone: Collection[Key] = ()
) -> dict[Key, list[float]]:
    """Time each in turn, on all ranks; return the seconds of one call, of the slowest rank.

    Args:
        steps: what is timed, the same on all ranks.
        rounds: turns of each.
        alone: what the first rank does while the others wait.
    """

    def sample(key: Key, repeats: int) -> float:
        _slowest(0.0)  # All begin together.
        idle = key in alone and distributed.rank() != distributed.FIRST
        return _slowest(0.0 if idle else measure.timed(steps[key], repeats))

    for key in steps:
        sample(key, 1)  # Compiles.
    repeats = {key: max(1, round(0.02 / sample(key, 1))) for key in steps}
    turns = [{key: sample(key, repeats[key]) for key in steps} for _ in range(rounds)]
    return {key: [turn[key] for turn in turns] for key in steps}


def _slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def own_part(network: Network) -> Network:
    """Return the network with this rank's part of the batch."""
    rank, size = distributed.rank(), distributed.size()
    inputs, targets = (
        leaf.tensor_split(size)[rank] for leaf in (network.inputs, network.targets)
    )
    return network._replace(inputs=inputs, targets=targets)


def placed(
    placement: str, params: dict[str, Tensor]
) -> tuple[samfn.Method, dict[str, Tensor]]:
    """Return SAM on several devices, and what this rank keeps of the parameters."""
    if placement == "sharded":
        return samfn.sam(), distributed.shard(params)
    return distributed.placed(samfn.sam(), placement), params


def stepper(
    network: Network,
    mode: str,
    placement: str | None = None,
    optimizer: samfn.Optimizer | None = None,
) -> tuple[samfn.TrainState, Callable[[], None]]:
    """Return the state that training starts from, and what takes the next step."""
    loss_fn = samfn.supervised(network.model, F.cross_entropy)
    optimizer = optimizer or samfn.sgd(MOMENTUM, weight_decay=WEIGHT_DECAY)
    params, buffers = samfn.split(network.model)
    method, params = placed(placement, params) if placement else (samfn.sam(), params)
    state = samfn.init(params, buffers, optimizer=optimizer, method=method)
    how: Any = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    compiled = mode == "compiled"
    update: Any = (
        samfn.compile_update(**how) if compiled else partial(samfn.sam_update, **how)
    )
    batch, now = (network.inputs, network.targets), state

    def step() -> None:
        nonlocal now
        now, _ = update(now, batch, rho=RHO, lr=LR)

    return state, step


def in_place(
    network: Network, *, shards: bool = False, lr: float = LR
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a copy of a model, and what takes the next step of samfn.SAM in it.

    Args:
        network: left as it is.
        shards: whether `fully_shard` cuts the copy over all ranks.
        lr: of SGD.
    """
    # FSDP2 takes no parameters that are channels last.
    model = copy.deepcopy(network.model).to(memory_format=torch.contiguous_format)
    if shards:
        fully_shard(model, mesh=distributed.mesh_of(network.inputs.device.type))
    settings: Any = {"rho": RHO, "lr": lr, "momentum": MOMENTUM}
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **settings)

    def step() -> Tensor:
        losses: list[Tensor] = []
        for end in (optimizer.first_step, optimizer.second_step):
            loss: Any = F.cross_entropy(model(network.inputs), network.targets)
            loss.backward()
            end(zero_grad=True)
            losses.append(loss.detach())
        return losses[0]

    return model, step


def steps(options: Options) -> list[Row]:
    """On a rank: time the steps of a case."""
    (case,) = options.case
    name, _, batch = case.rpartition(":")
    network = build(name, int(batch))
    part = own_part(network)
    made: dict[tuple[str, str], Callable[[], None]] = {}
    for mode in options.mode:
        beside = stepper(part, mode)[1]
        made[mode, WHOLE] = stepper(network, mode)[1]
        made |= {(mode, ALONE): beside, (mode, BESIDE): beside}
        for placement in options.placement:
            made[mode, placement] = stepper(part, mode, placement)[1]
    alone = [key for key in made if key[1] in (WHOLE, ALONE)]
    seen = in_turns(made, rounds=options.rounds, alone=alone)
    params, buffers = samfn.split(network.model)
    about = {
        "case": case,
        "ranks": distributed.size(),
        "parameters": sum(leaf.numel() for leaf in params.values()),
        "buffers": sum(b.numel() for b in buffers.values() if b.is_floating_point()),
        "tensors": len(params),
    }
    rows = []
    for (mode, step), values in seen.items():
        row = {"mode": mode, "step": step, "seconds": measure.quantiles(values)}
        ratios = measure.ratios(values, seen[mode, WHOLE])
        rows.append(about | row | {"of one process": ratios})
    return rows


def messages(options: Options) -> list[Row]:
    """On a rank: time messages by operation, size, and number of ranks that share them."""
    rows = []
    for count in sorted({distributed.size(), *map(group_of, options.placement)} - {1}):
        group = dist.group.WORLD
        if count < distributed.size():
            group, _ = dist.new_subgroups(count)
        calls = {
            (operation, size): exchange(operation, size, count, group)
            for operation in cost_model.HALVES
            for size in SIZES
        }
        for (operation, size), values in in_turns(calls, rounds=options.rounds).items():
            seen = measure.quantiles(values)
            message = Message(operation, size, count)
            rows.append(message._asdict() | {"seconds": seen})
    return rows


def group_of(placement: str) -> int:
    """Return how many ranks "group:n" is of; 1 for other placements."""
    kind, _, number = placement.partition(":")
    return int(number) if kind == "group" else 1


def exchange(operation: str, size: int, ranks: int, group: Any) -> Callable[[], Any]:
    """Return what sends a message of so many bytes."""
    whole = torch.zeros(size // cost_model.FLOAT)
    part = torch.zeros(len(whole) // ranks)
    whole = whole[: ranks * len(part)]
    calls: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part, group),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
    }
    return calls[operation]


def memory(options: Options) -> list[Row]:
    """On a rank: measure what a state takes, with Adam, and an eager step at its peak."""
    network = own_part(build(options.held, 4 * distributed.size()))
    rows: list[Row] = []
    for placement in [p for p in HOLDERS if p in options.placement] or HOLDERS:
        before = measure.resident()
        state, step = stepper(network, "eager", placement, samfn.adam())
        params, buffers = samfn.split(network.model)
        held = cost_model.Network(
            parameters=sum(leaf.numel() for leaf in params.values()),
            buffers=sum(b.numel() for b in buffers.values() if b.is_floating_point()),
        )
        del params, buffers
        kept = [
            leaf.to_local() if is_sharded(leaf) else leaf
            for leaf in pytree.tree_leaves(state)
        ]
        found = {
            "network": options.held,
            "placement": placement,
            "ranks": distributed.size(),
            "state": float(sum(leaf.nbytes for leaf in kept)),
            "resident": float(measure.resident() - before),
        }
        predicted = cost_model.memory(held, placement, distributed.size())
        del state, kept
        step()
        found["step"] = float(measure.resident() - before + measure.peak_memory(step))
        with measure.Live() as live:
            for _ in range(2):  # The second one begins with tensors that were seen.
                step()
        found["tensors"] = float(live.peak)
        found |= {f"{key}, model": value for key, value in predicted._asdict().items()}
        rows.append(found)
        del step
    return rows


WORKERS: dict[str, Callable[[Options], list[Row]]] = {
    "steps": steps,
    "messages": messages,
    "memory": memory,
}


def work(options: Options) -> None:
    """On a rank: measure; the first one writes what was found."""
    with distributed.ranks(timeout=PATIENCE):
        rows = WORKERS[options.worker](options)
        if distributed.rank() == distributed.FIRST:
            for row in rows:
                about = {"measured": options.worker} | measure.environment()
                measure.emit(about | row, options.output)


def started(worker: str, ranks: int, options: Options, *more: str) -> list[Row]:
    """Measure in processes that torchrun starts; return what the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines.jsonl")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "bench.scaling"]
        command += ["--worker", worker, "--rounds", str(options.rounds)]
        command += ["--output", str(lines), "--held", options.held, *more]
        for flag, values in (("--placement", options.placement), ("--mode", options.mode)):
            command += [text for value in values for text in (flag, value)]
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if worker == "memory":  # See `Memory` in bench/cost.py; it makes steps slow.
            variables["MALLOC_MMAP_THRESHOLD_"] = "65536"
        subprocess.run(command, env=os.environ | variables, check=True)
        return [json.loads(line) for line in lines.read_text().splitlines()]


TIMES = ("step", "mode", "ms", "q20", "q80", "of one process")
ACCOUNT = (
    "step",
    "mode",
    "ms",
    "shared out",
    "does not shrink",
    "cores",
    "messages",
    "messages, model",
    "ms, model",
    "measured / model",
    "most lost to",
)
LINES = ("operation", "ranks", "latency ms", "GB/s")
HOLDS = (
    "placement",
    "ranks",
    "state MiB",
    "of the whole",
    "model MiB",
    "resident MiB",
    "in a step MiB",
    "at least, model MiB",
)


def times(rows: Sequence[Row]) -> list[Row]:
    """Return the table of all steps of a case."""
    return [
        {
            "step": row["step"],
            "mode": row["mode"],
            "ms": 1e3 * row["seconds"]["median"],
            "q20": 1e3 * row["seconds"]["q20"],
            "q80": 1e3 * row["seconds"]["q80"],
            "of one process": row["of one process"]["median"],
        }
        for row in rows
    ]


def account(rows: Sequence[Row], lines: Mapping[tuple[str, int], Line]) -> list[Row]:
    """Return what the step of each placement is made of, and what the model says of it.

    Args:
        rows: the steps of a case.
        lines: seconds of messages, by operation and ranks.
    """
    median = {(row["mode"], row["step"]): row["seconds"]["median"] for row in rows}
    found = []
    for row in rows:
        mode, step, ranks = row["mode"], row["step"], row["ranks"]
        if step in (WHOLE, ALONE, BESIDE):
            continue
        about = {key: row[key] for key in ("parameters", "buffers", "tensors")}
        sent = cost_model.messages(cost_model.Network(**about), step, ranks)
        predicted = sum(lines[m.operation, m.ranks](m.size) for m in sent)
        share, alone = median[mode, WHOLE] / ranks, median[mode, ALONE]
        beside, seconds = median[mode, BESIDE], median[mode, step]
        lost = {
            "does not shrink": 1e3 * (alone - share),
            "cores": 1e3 * (beside - alone),
            "messages": 1e3 * (seconds - beside),
        }
        about = {"step": step, "mode": mode, "ms": 1e3 * seconds}
        model = {
            "messages, model": 1e3 * predicted,
            "ms, model": 1e3 * (alone + predicted),
            "measured / model": seconds / (alone + predicted),
            "most lost to": max(lost, key=lambda key: lost[key]),
        }
        found.append(about | {"shared out": 1e3 * share} | lost | model)
    return found


def fitted(rows: Sequence[Row]) -> dict[tuple[str, int], Line]:
    """Return the line of each operation and number of ranks."""
    kinds = dict.fromkeys((row["operation"], row["ranks"]) for row in rows)
    found = {}
    for kind in kinds:
        own = [row for row in rows if (row["operation"], row["ranks"]) == kind]
        seen = [row["seconds"]["median"] for row in own]
        found[kind] = fit([row["size"] for row in own], seen)
    return found


def by_size(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Return the table of messages, and its columns."""
    found: dict[float, Row] = {}
    for row in rows:
        column = f"{row['operation']}, {row['ranks']} ranks, ms"
        line = found.setdefault(row["size"], {"KiB": row["size"] // 1024})
        line[column] = 1e3 * row["seconds"]["median"]
    return [*found.values()], [*found[rows[0]["size"]]]


def holds(rows: Sequence[Row]) -> list[Row]:
    """Return the table of memory."""
    whole = max(row["state"] for row in rows)
    return [
        {
            "placement": row["placement"],
            "ranks": row["ranks"],
            "state MiB": row["state"] / 2**20,
            "of the whole": row["state"] / whole,
            "model MiB": row["state, model"] / 2**20,
            "resident MiB": row["resident"] / 2**20,
            "in a step MiB": row["step"] / 2**20,
            "at least, model MiB": row["step, model"] / 2**20,
        }
        for row in sorted(rows, key=lambda row: (row["placement"], row["ranks"]))
    ]


def report(
    cases: Mapping[str, Sequence[Row]],
    sent: Sequence[Row],
    held: Sequence[Row],
    command: str,
) -> str:
    """Return the report as Markdown."""
    lines = fitted(sent)
    about = sent[0]
    device = f"{about['device']} for each rank, {os.cpu_count()} cores"
    slopes = [
        {
            "operation": operation,
            "ranks": count,
            "latency ms": 1e3 * line.latency,
            "GB/s": line.bandwidth / 1e9,
        }
        for (operation, count), line in lines.items()
    ]
    parts = "\n\n".join(
        f"## {case}\n\n{measure.table(times(rows), TIMES)}\n\n"
        f"{measure.table(account(rows, lines), ACCOUNT)}"
        for case, rows in cases.items()
    )
    return f"""# How the step of SAM scales over processes of one machine

Steps of SAM, the batch shared out over the ranks (strong scaling), one thread each, by
gloo; all take turns in the same processes. Beside the placements there are

- {WHOLE}: the first rank with the whole batch, while the others wait;
- {ALONE}: the first rank with its part of the batch, while the others wait;
- {BESIDE}: all ranks at once with their parts, each for itself.

"of one process" is the median over the rounds of the ratio to the first, ideally 1/ranks.
In the second table of a case, the milliseconds of a step are the sum of four: those of one
process, shared out over the ranks; what does not shrink with the batch, as the update that
every rank repeats (a part alone, less the first); cores, which share the memory's bandwidth
(parts beside each other, less one alone); and messages (what a placement adds to these).
The model has a part alone, and each message of `bench/cost_model.py` for as long as its
line below says; the machine's cores are not in it.

{parts}

## Messages

Median of one, by its size, and the line of least relative errors through them.

{measure.table(*by_size(sent))}

{measure.table(slopes, LINES)}

## Memory

State of {held[0]["network"]} with Adam on each rank: bytes of its tensors, what the process
grew by, and what it had grown by at the peak of an eager step. "global" stands for all that
is replicated. The model's step has one state and one vector for each thing; an eager step
has the old state and the new, and copies of what it sends.

{measure.table(holds(held), HOLDS)}

{about["date"]}, {device}, torch {about["torch"]}, Python {about["python"]}.

```
{command}
```
"""


def main(options: Options) -> None:
    """Start the measurements, and report."""
    if options.worker:
        work(options)
        return
    cases = options.case or CASES
    for case in cases:
        if int(case.rpartition(":")[2]) % options.ranks:
            raise SystemExit(
                f"--case {case}: {options.ranks} ranks do not divide the batch"
            )
    placements, modes = options.placement or PLACEMENTS, options.mode or MODES
    options = replace(options, placement=placements, mode=modes)
    sent = started("messages", options.ranks, options)
    seen = {
        case: started("steps", options.ranks, options, "--case", case) for case in cases
    }
    held = [row for ranks in options.held_by for row in started("memory", ranks, options)]
    command = " ".join(["python -m bench.scaling", *map(shlex.quote, sys.argv[1:])])
    text = report(seen, sent, held, command)
    print(f"\n{text}")
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    if options.output is not None:
        everything = [*sent, *(row for rows in seen.values() for row in rows), *held]
        with options.output.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in everything))


if __name__ == "__main__":
    main(cli.parsed(Options, prog="python -m bench.scaling", description=__doc__))
