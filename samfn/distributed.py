"""More than one device: the one module that knows torch.distributed.

torchrun starts one process for each device, a rank. All of them take the same steps on
batches of their own, and hold the same state, bit for bit. What of it they share is a
placement, which `sam_update` and `compile_update` take:

    placement      perturbation of                communication in a step of SAM
    "replica"      each rank, from its batch      one all-reduce
    "group:n"      n ranks, from their batches    two all-reduces of n ranks, one of all
    "global"       all ranks, from all batches    two all-reduces
    "sharded"      as "global"; each rank keeps   two all-gathers, two reduce-scatters
                   a part of every tensor

Nothing of this happens inside of the function that is differentiated. What a pass has to
share travels in one message.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.batches import length_of
from samfn.border import some
from samfn.gradient import Evaluate, Pass
from samfn.method import Descended, Descent, Method, MethodState, Point
from samfn.stateless import normalised_over
from samfn.tree import Batch, Params

TIMEOUT = 60.0  # seconds
FIRST = 0  # the rank that prints and writes
# PyTorch's functional collectives: they return new tensors, and graphs hold them.
_OPERATIONS = torch.ops._c10d_functional
GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, odd, as a signed number


class RanksDifferError(RuntimeError):
    """What should be the same on all ranks is not."""


class Placement(NamedTuple):
    """Which ranks share a perturbation, and who keeps what; `placement` makes them."""

    name: str
    ranks: int
    sharing: int
    """How many ranks share a perturbation."""
    spread: Callable[[Method], Method]
    """Of the method on one rank, make the one on all of them."""
    shard: Callable[[Any], Any]
    """Of a whole state or tree of it, make what this rank keeps."""
    gather: Callable[[Any], Any]
    """Of what the ranks keep, make the whole, on every rank; all have to call it."""
    whole: Callable[[Params], Params]
    """Of what a rank keeps, tell the whole tensors' shapes and dtypes."""
    mean: Callable[[Any, Batch], Any]
    """(small tensors, batch of this rank) -> their mean over all examples."""
    sharded: "dist.ProcessGroup | None" = None

    def m(self, rows: int) -> int:
        """Return how many examples a perturbation is found on, with `rows` on each rank."""
        return self.sharing * rows

    @contextlib.contextmanager
    def norms(self) -> Iterator[None]:
        """Let `tree.norm` and `tree.dot` be those of the whole vectors."""
        if self.sharded is None:
            yield
        else:
            with tree.summed(_Sum(self.sharded)):
                yield


def placement(name: str = "replica", *, like: Params | None = None) -> Placement:
    """Return a placement of the perturbation.

    Gradients and losses are means over all examples, so that ranks may have batches of
    different lengths. BatchNorm normalises by each rank's batch; its statistics, and what
    the method remembers, are averaged in every step with the gradients.

    "replica" on n ranks is `per_micro_batch(method, m, statistics="averaged")` on one
    device; "global" is `accumulated(method, m, statistics="averaged")`, which is the step
    on the whole batch where there is no BatchNorm.

    Args:
        name: "replica", as in the paper; "group:n"; "global"; or "sharded".
        like: the whole parameters, for "sharded" alone.

    Raises:
        RuntimeError: no process group was begun.
        ValueError: there is no such placement, or n does not divide the ranks.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 4.1 and its official code:
        `sync_perturbations` and `inner_group_size`.
    """
    ranks = size()
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group: start with torchrun, and enter samfn.distributed.ranks()"
        )
    kind, _, number = name.partition(":")
    everyone = dist.group.WORLD
    assert everyone is not None
    if name == "sharded":
        if like is None:
            raise ValueError("a sharded placement needs like=, the whole parameters")
        return _sharded(like, everyone)
    if name == "replica":
        return _replicated(name, 1, None, everyone)
    if name == "global":
        return _replicated(name, ranks, everyone, everyone)
    if kind != "group" or not number.isdecimal() or not int(number):
        raise ValueError(
            f'placement must be "replica", "group:n", "global" or "sharded", got {name!r}'
        )
    sharing = int(number)
    if ranks % sharing:
        raise ValueError(
            f"placement {name!r}: {sharing} does not divide the number of ranks, {ranks}"
        )
    if sharing in (1, ranks):
        inner = everyone if sharing == ranks else None
        return _replicated(name, sharing, inner, everyone)
    inner, _ = dist.new_subgroups(sharing)
    return _replicated(name, sharing, inner, everyone)


def _replicated(
    name: str,
    sharing: int,
    inner: "dist.ProcessGroup | None",
    everyone: "dist.ProcessGroup",
) -> Placement:
    def spread(method: Method) -> Method:
        def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
            if inner is not None:
                evaluate = _on_all(evaluate, inner)
            seen, new = method.descent(evaluate, point, memory)
            if inner is everyone:
                return seen, new
            return _mean_descent(seen, new, point, memory, everyone)

        return method._replace(descent=descent)

    average = _alike if inner is everyone else partial(_mean_fields, everyone)
    return Placement(name, size(), sharing, spread, _same, _same, _same, average)


def _same(values: Any) -> Any:
    return values


def _alike(values: Any, batch: Batch) -> Any:
    return values


def _mean_fields(group: "dist.ProcessGroup", values: Any, batch: Batch) -> Any:
    mean, _ = _mean(values._asdict(), length_of(batch), group, {})
    return type(values)(**mean)


def _on_all(evaluate: Evaluate, group: "dist.ProcessGroup") -> Evaluate:
    """Return the function that evaluates on the batches of all ranks of a group."""

    def on_all(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
        seen = evaluate(params, buffers, batch, **how)
        shared = {
            "grads": seen.grads,
            "loss": seen.loss,
            "buffers": _changed(seen.buffers, buffers),
        }
        mean, _ = _mean(shared, length_of(batch), group, params)
        buffers = {**seen.buffers, **mean["buffers"]}
        return seen._replace(loss=mean["loss"], grads=mean["grads"], buffers=buffers)

    return on_all


def _mean_descent(
    seen: Descent,
    memory: MethodState,
    point: Point,
    before: MethodState,
    group: "dist.ProcessGroup",
) -> Descended:
    """Average what the ranks descend with, and what they saw and remember."""
    shared = {
        "grads": seen.grads,
        "beside": seen.beside,
        "loss": seen.clean.loss,
        "perturbed": seen.perturbed_loss,
        "length": seen.perturbation_norm,
        "grad_norm": tree.norm(seen.clean.grads),
        "buffers": _changed(seen.clean.buffers, point.buffers),
        "memory": _changed(memory, before),
    }
    mean, _ = _mean(shared, length_of(point.batch), group, point.params)
    buffers = {**seen.clean.buffers, **mean["buffers"]}
    return Descent(
        grads=mean["grads"],
        clean=seen.clean._replace(loss=mean["loss"], buffers=buffers),
        perturbed_loss=mean["perturbed"],
        perturbation_norm=mean["length"],
        beside=mean["beside"],
        grad_norm=mean["grad_norm"],
    ), {**memory, **mean["memory"]}


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not the very same as before, as frozen weights are."""
    return {key: value for key, value in new.items() if value is not old.get(key)}


def _mean(
    values: Mapping[str, Any], rows: int, group: "dist.ProcessGroup", params: Params
) -> tuple[dict[str, Any], Tensor]:
    """Average nested mappings of tensors over all examples of a group, in one message.

    Whole numbers, as BatchNorm's count of batches, are alike on all ranks, and stay.

    Args:
        values: what the rank found.
        rows: from how many examples.
        group: the ranks.
        params: whose layout in memory counts, as it is the same on all ranks.

    Returns:
        The means, and the number of examples, shape ().
    """
    leaves = [(name, leaf) for name, leaf in _leaves(values) if leaf.is_floating_point()]
    wide = _wide(leaf for _, leaf in leaves)
    layouts = [_Layout.of(leaf, params.get(name)) for name, leaf in leaves]
    parts = [
        layout.flat(leaf).to(wide)
        for layout, (_, leaf) in zip(layouts, leaves, strict=True)
    ]
    count = torch.ones(1, dtype=wide, device=parts[0].device)
    total = _all_reduce(rows * torch.cat([*parts, count]), group)
    means = torch.split(total[:-1] / total[-1], [part.numel() for part in parts])
    found = iter(
        layout.whole(mean).to(leaf.dtype)
        for layout, mean, (_, leaf) in zip(layouts, means, leaves, strict=True)
    )
    return _replaced(values, found), total[-1]


class _Layout(NamedTuple):
    """How a tensor lies in memory, so that a vector of it needs no transposition."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """Its dimensions, from the one with the largest stride on."""

    @classmethod
    def of(cls, tensor: Tensor, like: Tensor | None = None) -> "_Layout":
        """Return the layout of `like`, if that has the tensor's shape."""
        if like is None or like.shape != tensor.shape:
            return cls(tuple(tensor.shape), tuple(range(tensor.ndim)))
        strides = like.stride()
        order = sorted(range(like.ndim), key=lambda place: (-strides[place], place))
        return cls(tuple(like.shape), tuple(order))

    def flat(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order).reshape(-1)

    def whole(self, vector: Tensor) -> Tensor:
        laid = vector.view([self.shape[place] for place in self.order])
        return laid.permute([self.order.index(place) for place in range(len(self.order))])


def _leaves(node: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the tensors of nested mappings, each with its own key."""
    if isinstance(node, Mapping):
        return [leaf for key, child in node.items() for leaf in _leaves(child, key)]
    return [] if node is None else [(name, node)]


def _replaced(node: Any, found: Iterator[Tensor]) -> Any:
    """Rebuild nested mappings with others in place of their floating-point tensors."""
    if isinstance(node, Mapping):
        return {key: _replaced(child, found) for key, child in node.items()}
    return node if node is None or not node.is_floating_point() else next(found)


def _wide(leaves: Any) -> torch.dtype:
    # Half precision would lose what small gradients add up to.
    return reduce(torch.promote_types, {leaf.dtype for leaf in leaves}, torch.float32)


def _all_reduce(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the sum over the ranks."""
    return _done(_OPERATIONS.all_reduce(values, "sum", group.group_name))


class _Total(torch.autograd.Function):
    """The sum over the ranks; what each rank's loss owes to it comes back to all."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        return _done(_OPERATIONS.all_reduce(values, "sum", group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = _OPERATIONS.all_reduce(grad.contiguous(), "sum", ctx.group)
        return _done(summed), None


def total(values: Tensor) -> Tensor:
    """Return the sum over the ranks of a tensor, for use inside of a loss function.

    Its derivative is that of the sum of all ranks' losses.
    """
    if size() == 1:
        return values
    assert dist.group.WORLD is not None
    apply: Any = _Total.apply
    summed: Tensor = apply(values, dist.group.WORLD.group_name)
    return summed


def synchronised(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose BatchNorm normalises by the batches of all ranks.

    With the placement "global" the step is then that of one process on the whole batch.
    With others, ranks see each other's perturbed activations: a perturbation depends on
    more examples than its m. The ranks' batches must be of one length. It costs an
    all-reduce for each layer and direction of a pass; evaluation is each rank's own.

    Args:
        model: the same module on all ranks; unchanged.
    """
    return normalised_over(model, total, size())


def _all_gather(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the rows of all ranks one after the other."""
    ranks = dist.get_world_size(group)
    name = group.group_name
    return _done(_OPERATIONS.all_gather_into_tensor(values, ranks, name))


def _reduce_scatter(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return this rank's rows of the sum over the ranks."""
    ranks = dist.get_world_size(group)
    name = group.group_name
    return _done(_OPERATIONS.reduce_scatter_tensor(values, "sum", ranks, name))


def _done(begun: Tensor) -> Tensor:
    """Wait for a collective; a compiled graph does so where it needs the values."""
    done: Tensor = _OPERATIONS.wait_tensor(begun)
    return done


def _sharded(params: Params, group: "dist.ProcessGroup") -> Placement:
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    layouts = {name: _Layout.of(w, w) for name, w in params.items()}
    sizes = {name: -(-w.numel() // ranks) for name, w in params.items()}
    shapes = {name: layout.shape for name, layout in layouts.items()}
    dtypes = {name: w.dtype for name, w in params.items()}
    kinds = {dtype: [n for n in params if dtypes[n] == dtype] for dtype in dtypes.values()}

    def padded(name: str, whole: Tensor) -> Tensor:
        """Return the rows of the ranks, shape (ranks, size); zeros fill up the last."""
        vector = layouts[name].flat(whole)
        missing = ranks * sizes[name] - vector.numel()
        return torch.nn.functional.pad(vector, (0, missing)).view(ranks, sizes[name])

    def joined(name: str, rows: Tensor) -> Tensor:
        # A copy always: BatchNorm's backward pass on a CPU ignores strides of its weight.
        vector = rows.contiguous().view(-1)
        return layouts[name].whole(vector[: torch.Size(shapes[name]).numel()])

    def gather(shards: Params) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for dtype, names in kinds.items():
            if names := [name for name in names if name in shards]:
                flat = torch.cat([shards[name].to(dtype) for name in names])
                rows = _all_gather(flat, group).view(ranks, -1)
                parts = torch.split(rows, [sizes[name] for name in names], dim=1)
                whole |= {n: joined(n, part) for n, part in zip(names, parts, strict=True)}
        return {name: whole[name] for name in shards}

    def scatter(grads: Params, rows: int) -> dict[str, Tensor]:
        """Return what this rank keeps of the sum over the ranks of rows times `grads`."""
        names = list(grads)
        wide = _wide(grads.values())
        flat = torch.cat([padded(name, grads[name]).to(wide) for name in names], dim=1)
        own_rows = _reduce_scatter(rows * flat.view(-1), group)
        parts = torch.split(own_rows, [sizes[name] for name in names])
        return dict(zip(names, parts, strict=True))

    def spread(method: Method) -> Method:
        def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
            def on_shards(
                params: Params, buffers: Params, batch: Batch, **how: Any
            ) -> Pass:
                seen, rows = (
                    evaluate(gather(params), buffers, batch, **how),
                    length_of(batch),
                )
                shared = {"loss": seen.loss, "buffers": _changed(seen.buffers, buffers)}
                mean, total = _mean(shared, rows, group, {})
                grads = scatter(seen.grads, rows) if seen.grads else {}
                return seen._replace(
                    loss=mean["loss"],
                    buffers={**seen.buffers, **mean["buffers"]},
                    grads={n: (g / total).to(dtypes[n]) for n, g in grads.items()},
                )

            return method.descent(on_shards, point, memory)

        return method._replace(descent=descent)

    def keep(name: str, whole: Tensor) -> Tensor:
        return padded(name, whole)[own].clone()

    def restore(name: str, shard: Tensor) -> Tensor:
        return joined(name, _all_gather(shard, group)).clone(
            memory_format=torch.preserve_format
        )

    shard_shapes = {name: (size,) for name, size in sizes.items()}

    def whole(shards: Params) -> dict[str, Tensor]:
        return {
            name: torch.empty(shapes[name], dtype=dtypes[name], device="meta")
            for name in shards
        }

    shard = partial(_mapped, keep, shapes)
    together = partial(_mapped, restore, shard_shapes)
    return Placement(
        "sharded", ranks, ranks, spread, shard, together, whole, _alike, sharded=group
    )


def _mapped(
    change: Callable[[str, Tensor], Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    node: Any,
) -> Any:
    """Change the tensors of those mappings whose names and shapes are these."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):  # A state.
        return type(node)(*(_mapped(change, shapes, child) for child in node))
    if not isinstance(node, Mapping):
        return node
    if all(
        isinstance(leaf, Tensor) and tuple(leaf.shape) == shapes.get(name)
        for name, leaf in node.items()
    ):
        return {name: change(name, leaf) for name, leaf in node.items()}
    return {key: _mapped(change, shapes, child) for key, child in node.items()}


class _Sum:
    """The sum over the ranks that each keep a part."""

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self._group = group

    def __call__(self, values: Tensor) -> Tensor:
        return _all_reduce(values, self._group)


@contextlib.contextmanager
def ranks(*, timeout: float = TIMEOUT) -> Iterator[torch.device | None]:
    """Join the other processes that torchrun started, until the end.

    A collective that a rank waits for longer than the timeout, as for one that was killed
    or stopped, raises; torchrun ends all ranks then, and begins anew up to --max-restarts
    times.

    Args:
        timeout: in seconds, from a fast rank to the slowest.

    Yields:
        The device of this rank; None where torchrun started nothing, and this does nothing.

    Raises:
        ValueError: there are fewer GPUs on this machine than ranks.
    """
    if not launched():
        yield None
        return
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"rank {local} of this machine has no GPU: {found} found")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=timeout)
    store, own, count = next(rendezvous("env://", timeout=patience))
    # torchrun may keep the store when it begins anew, with the addresses of before in it.
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=store, rank=own, world_size=count, timeout=patience
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def is_lost(error: Exception) -> bool:
    """Return whether an error says that another rank ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)  # It has no type.
    )


def launched() -> bool:
    """Return whether torchrun, or what sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def rank() -> int:
    """Return which of the ranks this is, or is to become; 0 where there is one alone."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def size() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Batch) -> Batch:
    """Return the rows of a batch that are this rank's, of one that all ranks have whole."""
    own, parts = rank(), size()
    return pytree.tree_map(lambda leaf: leaf.tensor_split(parts)[own], batch)


def mean(values: Mapping[str, float], weight: float) -> dict[str, float]:
    """Return the means of what the ranks found, each with its weight; the same on all."""
    if size() == 1:
        return dict(values)
    found = torch.tensor([*values.values(), 1.0], dtype=torch.float64) * weight
    dist.all_reduce(found)
    *sums, total = found.tolist()
    return {name: value / total for name, value in zip(values, sums, strict=True)}


def concatenated(part: Tensor) -> Tensor:
    """Return the parts of all ranks, in their order, along the first dimension."""
    if size() == 1:
        return part
    lengths = [
        torch.zeros((), dtype=torch.int64, device=part.device) for _ in range(size())
    ]
    dist.all_gather(lengths, torch.tensor(len(part), device=part.device))
    counts = [int(length) for length in lengths]
    padded = part.new_zeros(max(counts), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([some[:count] for some, count in zip(parts, counts, strict=True)])


class Agreement:
    """What ranks ask for between steps, so that all do it after the same one.

    Args:
        count: how many numbers are asked for; the largest that a rank asks counts.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pending: tuple[dist.Work, Tensor] | None = None

    def later(self, *asked: int) -> list[int]:
        """Ask, and return what was asked for in the call before; does not wait."""
        if size() == 1:
            return list(asked)
        before = self._take()
        self._begin(asked)
        return before

    def now(self, *asked: int) -> list[int]:
        """Ask, and return what was asked for since the last call; waits for all ranks."""
        before = self.later(*asked)
        return [*map(max, before, self._take())] if size() > 1 else before

    def _begin(self, asked: tuple[int, ...]) -> None:
        values = torch.tensor(asked)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)
        assert work is not None  # It is asynchronous, and this rank is in the group.
        self._pending = work, values

    def _take(self) -> list[int]:
        if self._pending is None:
            return [0] * self._count
        work, values = self._pending
        work.wait()
        self._pending = None
        return [int(value) for value in values]


def from_first(value: Any) -> Any:
    """Return what the first rank has: numbers, texts, and what holds them."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=FIRST)
    return box[0]


def require_alike(values: Any) -> None:
    """Raise unless nested mappings of tensors are the same on all ranks, bit for bit.

    It waits for all ranks and for a GPU; compares 64 bits of each tensor.

    Raises:
        RanksDifferError: on all ranks; names the first tensors that differ.
    """
    if size() == 1:
        return
    if isinstance(values, tuple) and hasattr(values, "_asdict"):
        values = values._asdict()
    named = _paths(values)
    own = torch.stack([_digest(leaf) for leaf in named.values()])
    found = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(found, own)
    differs = torch.stack(found).ne(found[0]).any(0).tolist()
    if names := [name for name, differ in zip(named, differs, strict=True) if differ]:
        raise RanksDifferError(
            f"expected the same state on all {size()} ranks, but {some(names)} differ"
        )


def _paths(node: Any, place: str = "") -> dict[str, Tensor]:
    if isinstance(node, Tensor):
        return {place: node}
    found: dict[str, Tensor] = {}
    for key, child in (node or {}).items():
        found |= _paths(child, f"{place}/{key}" if place else key)
    return found


def _digest(leaf: Tensor) -> Tensor:
    """Return 64 bits that depend on every bit of a tensor, and where it is."""
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = leaf.reshape(-1).view(whole[leaf.element_size()]).to(torch.int64)
    # Odd factors lose no change of a single entry; products and sums wrap around.
    factors = torch.arange(1, 2 * len(bits), 2, device=bits.device) * GOLDEN
    return (bits * factors).sum()
