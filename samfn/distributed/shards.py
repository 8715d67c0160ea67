"""The placement where every rank holds a part of every tensor.

A tensor is read as a vector, filled up with zeros, and cut into one part for each rank.
Nothing that is computed entry by entry sees the difference; norms and inner products are
summed over the ranks. Only a pass needs whole tensors: it gathers them, and scatters the
gradients.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from samfn.distributed.collectives import (
    Layout,
    all_gather,
    changed,
    mean,
    reduce_scatter,
    weighted,
    wide,
)
from samfn.distributed.replicas import Placement, alike, put
from samfn.loss import Evaluate, Pass
from samfn.methods.base import Descended, Method, MethodState, Point
from samfn.tree import Batch, Params


def sharded(params: Params, rank: int, ranks: int, group: str) -> Placement:
    """Return the placement of a state whose whole parameters are like these."""
    parts = Parts(params, rank, ranks, group)

    def spread(method: Method) -> Method:
        def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
            return method.descent(parts.gathering(evaluate, point.weigh), point, memory)

        return method._replace(descent=descent)

    return Placement(
        name="sharded",
        ranks=ranks,
        sharing=ranks,
        spread=spread,
        shard=partial(_mapped, parts.keep, parts.shapes),
        gather=parts.gather,
        whole=parts.whole,
        mean=alike,
        sharded=group,
    )


class Parts:
    """How tensors are cut into parts, and put together again."""

    def __init__(self, params: Params, rank: int, ranks: int, group: str) -> None:
        self._rank, self._ranks, self._group = rank, ranks, group
        self._layouts = {name: Layout.of(w, w) for name, w in params.items()}
        self._dtypes = {name: w.dtype for name, w in params.items()}
        self._sizes = {name: -(-w.numel() // self._ranks) for name, w in params.items()}
        self.shapes = {name: layout.shape for name, layout in self._layouts.items()}
        self.kept_shapes = {name: (size,) for name, size in self._sizes.items()}

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of a tensor."""
        return self._rows(name, tensor)[self._rank].clone()

    def gather(self, kept: Any, device: torch.device | str | None = None) -> Any:
        """Return what the ranks hold parts of; one tensor after the other."""

        def whole(name: str, part: Tensor) -> Tensor:
            joined = self._joined(name, all_gather(part, self._ranks, self._group))
            if device is None:
                return joined.clone(memory_format=torch.preserve_format)
            return joined.to(device, copy=True)

        return put(_mapped(whole, self.kept_shapes, kept), device)

    def whole(self, kept: Params) -> dict[str, Tensor]:
        """Return the whole tensors, without their values."""
        return {
            name: torch.empty(self.shapes[name], dtype=self._dtypes[name], device="meta")
            for name in kept
        }

    def gathering(
        self, evaluate: Evaluate, weigh: Callable[[Batch], int | Tensor]
    ) -> Evaluate:
        """Return the function that takes and gives parts, and evaluates on all batches."""

        def on_parts(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
            seen = evaluate(self._gather(params), buffers, batch, **how)
            rows = weigh(batch)
            shared = {"loss": seen.loss, "buffers": changed(seen.buffers, buffers)}
            found, examples = mean(shared, rows, self._group, {})
            return seen._replace(
                loss=found["loss"],
                buffers={**seen.buffers, **found["buffers"]},
                grads=self._scatter(seen.grads, rows, examples) if seen.grads else {},
            )

        return on_parts

    def _gather(self, kept: Params) -> dict[str, Tensor]:
        """Put all parameters together, in one message for each dtype."""
        found: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(part.dtype for part in kept.values()):
            names = [name for name, part in kept.items() if part.dtype == dtype]
            own = torch.cat([kept[name] for name in names])
            rows = all_gather(own, self._ranks, self._group).view(self._ranks, -1)
            columns = torch.split(rows, [self._sizes[name] for name in names], dim=1)
            found |= {n: self._joined(n, c) for n, c in zip(names, columns, strict=True)}
        return {name: found[name] for name in kept}

    def _scatter(
        self, grads: Params, rows: int | Tensor, examples: Tensor
    ) -> dict[str, Tensor]:
        """Return this rank's part of the mean gradient, which took one message."""
        dtype = wide(grads.values())
        columns = [self._rows(name, grad).to(dtype) for name, grad in grads.items()]
        flat = weighted(columns, rows, dim=1).view(-1)
        own = reduce_scatter(flat, self._ranks, self._group).div_(examples)
        parts = torch.split(own, [self._sizes[name] for name in grads])
        return {
            name: part.to(grad.dtype)
            for (name, grad), part in zip(grads.items(), parts, strict=True)
        }

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return the parts of all ranks, shape (ranks, size)."""
        vector = self._layouts[name].flat(tensor)
        missing = self._ranks * self._sizes[name] - vector.numel()
        return pad(vector, (0, missing)).view(self._ranks, -1)

    def _joined(self, name: str, rows: Tensor) -> Tensor:
        # A copy always: BatchNorm's backward pass on a CPU ignores strides of its weight.
        vector = rows.contiguous().view(-1)
        layout = self._layouts[name]
        return layout.whole(vector[: torch.Size(layout.shape).numel()])


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
