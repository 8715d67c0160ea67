"""Which placement pays on how many GPUs: steps per second, before any is rented.

    python -m bench.cost_model
    python -m bench.cost_model --own.parameters 7e9 --own.operations 8.6e13 --own.total 512
    python -m bench.cost_model --machine.between.bandwidth 12.5e9      # 100 Gbit/s a node

A step takes one after the other

    compute    passes x operations x examples of a rank / (peak x utilisation)
    traffic    bytes that its vectors move / bandwidth of the GPU's memory
    messages   each around a ring or through a tree, `duration`

since samfn sends a message when the whole gradient is there: no communication is hidden
behind computation. It compares the placements of `samfn.distributed`. Utilisation
is assumed, and the same for large and small batches; `bench/scaling.py` measures.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.nn import functional as F

import samfn
from bench import measure
from bench.networks import build
from recipes.terminal import cli
from samfn.compiled import operations

FLOAT = 4  # bytes; parameters, memory and messages are float32, whatever computes
RANKS = (1, 2, 4, 8, 16, 32, 64)
# What of an all-reduce an operation is; it is a reduce-scatter and an all-gather.
HALVES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
# Of vectors that each rank has a part of: gradients, perturbation, and what descends.
NORMS = 4
# Vectors read or written beside the passes: norms of both gradients 2, w + e 3, its
# length 2, the update of w by g 3; reading and writing memory is 2 for each vector of it.
VECTORS = 10


@dataclass(frozen=True)
class Link:
    """A connection of ranks."""

    bandwidth: float
    """Bytes a second, in one direction."""
    latency: float
    """Seconds from one rank to the next."""


@dataclass(frozen=True)
class Machine:
    """Nodes of GPUs. The defaults are DGX H100; an H200 has 141e9 and 4.8e12 of memory.

    Source:
        NVIDIA's data sheets of the H100 (SXM), the H200 and the DGX H100; latencies are
        those that NCCL plans rings with, protocol Simple (src/graph/tuning.cc, hwLat).
    """

    peak: float = 989e12
    """Operations a second of a GPU, bf16 and dense."""
    utilisation: float = 0.4
    """Share of the peak that passes reach: an assumption, in no data sheet."""
    memory: float = 80e9
    """Bytes of a GPU."""
    memory_bandwidth: float = 3.35e12
    """Bytes a second."""
    gpus: int = 8
    """GPUs of a node."""
    inside: Link = Link(450e9, 3.4e-6)
    """Link of a GPU in its node: NVLink 4, half of the 900 GB/s of both directions."""
    between: Link = Link(8 * 50e9, 9.6e-6)
    """Link of a whole node: eight ports of 400 Gbit/s, one for each GPU. NCCL lays rings
    through all of them, so that they add up."""


@dataclass(frozen=True)
class Network:
    """A network, how it is trained, and on how many examples."""

    name: str = "own"
    """Name in the tables."""
    parameters: float = 0
    """Numbers that are trained."""
    operations: float = 0
    """Operations of the gradient of one example; a multiply-add is two."""
    total: int = 256
    """Examples in a step on all ranks together, where these are held fixed."""
    each: int = 32
    """Examples in a step on each rank, where these are held fixed."""
    buffers: float = 0
    """Floating-point numbers that are not trained, as BatchNorm's."""
    tensors: int = 1
    """Number of tensors of the parameters."""
    optimizer: int = 2
    """Vectors that the optimizer remembers: sgd 1, adam 2."""
    method: int = 0
    """Vectors that the method remembers: sam 0, vasso 1."""
    passes: int = 2
    """Gradients in a step."""


class Message(NamedTuple):
    """An exchange of some ranks."""

    operation: str
    """A key of `HALVES`."""
    size: float
    """Bytes of the whole vector, of which each rank may have a part."""
    ranks: int


class Step(NamedTuple):
    """Seconds that a step is predicted to take, by what they are spent on."""

    compute: float
    traffic: float
    messages: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self)


class Memory(NamedTuple):
    """Bytes of one rank, without activations."""

    state: float
    """Parameters, buffers, and what optimizer and method remember."""
    step: float
    """That and the vectors of a pass; the least that a step can do with."""


def messages(network: Network, placement: str, ranks: int) -> list[Message]:
    """Return what a step exchanges, as `samfn.distributed` does.

    Beside gradients and buffers go losses, norms and the number of examples.
    """
    vector = FLOAT * network.parameters
    beside = FLOAT * (network.buffers + 2)
    if placement == "sharded":
        each = vector / network.tensors
        one_pass = [
            # Once more for the backward pass, which reads all but biases and the first.
            *[Message("all-gather", each, ranks)] * network.tensors * 2,
            Message("all-reduce", beside, ranks),
            *[Message("reduce-scatter", each, ranks)] * network.tensors,
        ]
        norms = [Message("all-reduce", FLOAT * network.tensors, ranks)] * NORMS
        return one_pass * network.passes + norms
    sharing = shared_by(placement, ranks)
    found = []
    if sharing > 1:
        found += [Message("all-reduce", vector + beside, sharing)] * network.passes
    if sharing < ranks:
        remembered = vector * network.method + 3 * FLOAT
        found.append(Message("all-reduce", vector + beside + remembered, ranks))
    return found


def shared_by(placement: str, ranks: int) -> int:
    """Return how many ranks share a perturbation.

    Raises:
        ValueError: they do not divide the ranks.
    """
    kind, _, number = placement.partition(":")
    sharing = {"replica": 1, "global": ranks, "sharded": ranks}.get(kind) or int(number)
    if ranks % sharing:
        raise ValueError(f"placement {placement!r}: {sharing} does not divide {ranks}")
    return sharing


def duration(message: Message, machine: Machine) -> float:
    """Return how long a message takes around a ring, or through a tree if that is less.

    ring: h ((n - 1)/n size/bandwidth + (n - nodes) inside + (nodes - 1) between)
    tree: 2 (size/bandwidth + (n/nodes - 1) inside + log2(nodes) between)

    with n ranks, h = 2 for an all-reduce and 1 for its halves, which have no tree; inside
    and between are latencies, and the bandwidth is that of the slowest link on the way.
    Ranks fill one node after the other.

    Source:
        Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002, for the ring's volume;
        NCCL, src/graph/tuning.cc, for the latencies of both.
    """
    operation, size, ranks = message
    inside, between = machine.inside, machine.between
    nodes = math.ceil(ranks / machine.gpus)
    bandwidth = min(inside.bandwidth, between.bandwidth if nodes > 1 else math.inf)
    hops = (ranks - nodes) * inside.latency + (nodes - 1) * between.latency
    ring = HALVES[operation] * ((ranks - 1) / ranks * size / bandwidth + hops)
    if operation != "all-reduce":
        return ring
    depth = (ranks / nodes - 1) * inside.latency + math.log2(nodes) * between.latency
    return min(ring, 2 * (size / bandwidth + depth))


def predict(
    network: Network, placement: str, ranks: int, machine: Machine, examples: float
) -> Step:
    """Return what a step takes.

    Args:
        network: what is trained.
        placement: as `bench.scaling` takes it.
        ranks: how many GPUs.
        machine: which ones.
        examples: of each rank.
    """
    sent = messages(network, placement, ranks)
    work = network.passes * network.operations * examples
    parts = ranks if placement == "sharded" else 1
    moved = FLOAT * network.parameters * (VECTORS + 2 * network.optimizer) / parts
    if ranks > 1:  # Written and read once more, for each half and on both of its sides.
        moved += sum(2 * HALVES[message.operation] * message.size for message in sent)
    return Step(
        compute=work / (machine.peak * machine.utilisation),
        traffic=moved / machine.memory_bandwidth,
        messages=sum(duration(message, machine) for message in sent),
    )


def memory(network: Network, placement: str, ranks: int) -> Memory:
    """Return what one rank holds.

    In the second pass that is w + e and both gradients; sharded, parts of these, and one
    tensor and its gradient whole. An eager step holds the new state and copies
    of the message too: with Adam, bench/scaling.py finds up to 1.7 times as much in all.
    """
    vector = FLOAT * network.parameters
    own = vector / ranks if placement == "sharded" else vector
    state = own * (1 + network.optimizer + network.method) + FLOAT * network.buffers
    working = 2 * vector / network.tensors if placement == "sharded" else 0.0
    return Memory(state, state + 3 * own + working)


def wrn() -> Network:
    """Return WRN-28-10 on CIFAR, counted; a batch of 256, 32 on each of eight ranks.

    Source:
        Foret et al., 2021, arXiv:2010.01412, appendix B, for the batch.
    """
    found = build("wrn-28-10", 1)
    params, buffers = samfn.split(found.model)
    state = samfn.init(params, buffers, optimizer=samfn.sgd())
    loss_fn = samfn.supervised(found.model, F.cross_entropy)
    return Network(
        "WRN-28-10",
        sum(leaf.numel() for leaf in params.values()),
        operations(loss_fn, state, (found.inputs, found.targets)),
        buffers=sum(b.numel() for b in buffers.values() if b.is_floating_point()),
        tensors=len(params),
        optimizer=1,
    )


def transformer() -> Network:
    """Return a transformer; an example is a sequence, a batch a million tokens.

    6 operations per parameter and token: attention's own are left out.

    Source:
        Kaplan et al., 2020, arXiv:2001.08361, section 2.1; for length and batch the
        network of 1.3e9 parameters in Brown et al., 2020, arXiv:2005.14165, table 2.1.
    """
    parameters, length = 1e9, 2048
    total = 2**20 // length
    work = 6 * parameters * length
    return Network("transformer", parameters, work, total=total, each=total // 64)


COLUMNS = (
    "placement",
    "ranks",
    "steps/s",
    "messages",
    "efficiency",
    "steps/s, weak",
    "messages, weak",
    "efficiency, weak",
    "state GB",
    "step GB",
)


def rows(network: Network, machine: Machine) -> list[dict[str, Any]]:
    """Return the table of a network: each placement where it is one of its own."""
    group = f"group:{machine.gpus}"
    return [
        row(network, placement, ranks, machine)
        for placement in ("replica", group, "global", "sharded")
        for ranks in RANKS
        if ranks <= network.total and (placement != group or 1 < machine.gpus < ranks)
    ]


def row(network: Network, placement: str, ranks: int, machine: Machine) -> dict[str, Any]:
    """Return a line of the table."""

    def on(ranks: int, examples: float) -> Step:
        return predict(network, placement, ranks, machine, examples)

    strong, weak = on(ranks, network.total / ranks), on(ranks, network.each)
    alone, small = (
        predict(network, "replica", 1, machine, n) for n in (network.total, network.each)
    )
    held = memory(network, placement, ranks)
    return {
        "placement": placement,
        "ranks": ranks,
        "steps/s": 1 / strong.seconds,
        "messages": _percent(strong.messages / strong.seconds),
        "efficiency": _percent(alone.seconds / strong.seconds / ranks),
        "steps/s, weak": 1 / weak.seconds,
        "messages, weak": _percent(weak.messages / weak.seconds),
        "efficiency, weak": _percent(small.seconds / weak.seconds),
        "state GB": held.state / 1e9,
        "step GB": held.step / 1e9,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def verdict(network: Network, machine: Machine) -> str:
    """Return whether a replicated state fits into a GPU."""
    held = memory(network, "replica", 1).step
    room = machine.memory - held
    if room >= 0:
        return (
            f"Replicated, it leaves at most {room / 1e9:.3g} GB of a GPU for activations."
        )
    return (
        f"Replicated, it takes {held / 1e9:.3g} GB or more, and a GPU has"
        f' {machine.memory / 1e9:.3g}: it has to be "sharded".'
    )


@dataclass(frozen=True)
class Options:
    """Network and machine of the prediction."""

    own: Network = Network()
    """A network of your own, instead of the two; parameters and operations make one."""
    machine: Machine = Machine()


def main(options: Options) -> None:
    """Print the tables."""
    own = options.own
    if bool(own.parameters) != bool(own.operations):
        raise SystemExit("--own.parameters and --own.operations go together, got one")
    for network in [own] if own.parameters else [wrn(), transformer()]:
        print(
            f"\n{network.name}: {network.parameters:.4g} parameters,"
            f" {network.operations:.4g} operations in the gradient of an example;"
            f" {network.total} examples in all, or (weak) {network.each} on each rank.\n"
            f"{verdict(network, options.machine)}\n\n"
            f"{measure.table(rows(network, options.machine), COLUMNS)}"
        )


if __name__ == "__main__":
    main(cli.parsed(Options, prog="python -m bench.cost_model", description=__doc__))
