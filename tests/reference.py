"""Slow, obvious oracles, written the usual way, and small things that tests share."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.settings.method_expression import MAKERS
from samfn import Method
from samfn.gradient import evaluator
from samfn.methods.base import Point


def overwriting_sam_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module], Tensor],
    rho: float,
) -> float:
    """Take a SAM step by writing to the weights and putting them back."""
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    total = sum(float((p.grad**2).sum()) for p in parameters) ** 0.5
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad, alpha=rho / total)
    optimizer.zero_grad()
    loss_of(model).backward()
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    optimizer.step()
    return loss.item()


def flat(tree: dict[str, Tensor]) -> Tensor:
    """Return all entries as one vector, in the order of the names."""
    return torch.cat([tree[name].reshape(-1) for name in sorted(tree)])


def asam_perturbation(
    w: list[float], g: list[float], rho: float, eta: float
) -> list[float]:
    """Return rho T^2 g / ||T g|| with T = |w| + eta, number by number."""
    t = [abs(x) + eta for x in w]
    length = sum((a * b) ** 2 for a, b in zip(t, g, strict=True)) ** 0.5
    return [rho * a * a * b / length for a, b in zip(t, g, strict=True)]


def small_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a network with convolution, BatchNorm, bias and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Any]]:
    """Return batches for `small_network`, different each time within a list."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 2, 4, 4, generator=generator, dtype=dtype),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


class NextToken(nn.Module):
    """A language model that computes its own loss, as those of transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, input_ids, labels=None, *, num_items_in_batch=None, use_cache=None):
        assert use_cache is not True
        logits = self.head(torch.tanh(self.embed(input_ids)).cumsum(1))
        if labels is None:
            return {"loss": None, "logits": logits}
        next_ones = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
        how = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.view(-1, 9), next_ones, reduction=how)
        return {"loss": loss / (num_items_in_batch or 1), "logits": logits}


def tokens():
    """Return a batch for `NextToken`, of whose rows different numbers count."""
    ids = torch.arange(30).reshape(5, 6) * 7 % 9
    labels = ids.clone()
    labels[0, 2:], labels[1, :5], labels[3] = -100, -100, -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def methods_by_default() -> dict[str, Method]:
    """Return every method that needs no argument, by name; a new one is among them."""
    found = {}
    for name, maker in MAKERS.items():
        with contextlib.suppress(TypeError):  # It needs one.
            found[name] = maker()
    return found


class Counted:
    """A loss function that counts how often it is evaluated."""

    def __init__(self, loss_fn):
        self.loss_fn, self.count = loss_fn, 0

    def __call__(self, *args):
        self.count += 1
        return self.loss_fn(*args)


def descent_of(method, loss_fn, params, batch=None, rho=0.1, buffers=None):
    """Return what a method does in its first step."""
    kind = method.kind(0) if method.kind else None
    point = Point(params, buffers or {}, batch, rho, tuple(params), kind=kind)
    memory = method.init(params, params)
    return method.descent(evaluator(loss_fn), point, memory)[0]
