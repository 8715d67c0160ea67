"""Which tensors share memory, and which show when they are written to."""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

from samfn.tree import Params, local

PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


def address(tensor: Tensor) -> int | None:
    """Return what tells the memory of a tensor from others, if it has any."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return None
    return int(tensor.untyped_storage()._cdata)


def is_watchable(tensor: Tensor) -> bool:
    """Return whether a tensor has memory and a version that shows when it is written to."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_inference():
        return False
    # Whether a tensor is a fake one is asked of those that can be: it takes a while.
    plain = type(tensor) in PLAIN and not (
        torch._is_functional_tensor(tensor) or is_functorch_wrapped_tensor(tensor)
    )
    return bool(tensor.numel()) and (plain or not is_fake(tensor))


def sharing(tensors: Params) -> Iterator[tuple[str, str]]:
    """Yield the names of each two tensors that have an entry of memory in common."""
    tensors = {name: local(tensor) for name, tensor in tensors.items()}
    owners: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if (memory := address(tensor)) is not None:
            owners.setdefault(memory, []).append(name)
    for names in owners.values():
        for one, other in combinations(names, 2):
            if _overlap(tensors[one], tensors[other]):
                yield one, other


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one storage have an entry in common."""
    (begin, end), (start, stop) = _span(one), _span(other)
    if end <= start or stop <= begin:
        return False
    if one.dtype != other.dtype:
        return True
    length = one.untyped_storage().nbytes() // one.element_size()
    taken = torch.zeros(length, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the bytes of its storage between which a tensor lies."""
    steps = (
        (size - 1) * stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin, size = tensor.storage_offset(), tensor.element_size()
    return int(begin * size), int((begin + sum(steps) + 1) * size)
