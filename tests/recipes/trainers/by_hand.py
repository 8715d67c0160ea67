"""What every trainer is compared with: SAM written as loops do, with momentum by hand.

Five batches of eight rows in an epoch, two epochs. A step is a list of micro-batches, each
with a perturbation of its own; two processes are micro-batches of half the rows, since
their gradients are averaged, too.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, BATCH, EPOCHS = 40, 8, 2
RHO, LR, MOMENTUM, GAMMA, CLIP = 0.2, 0.1, 0.9, 0.9, 0.2
SETTINGS = {"rho": RHO, "lr": LR, "momentum": MOMENTUM}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def table():
    """Return inputs and targets, of all rows."""
    source = torch.Generator().manual_seed(2)
    inputs = torch.randn(ROWS, 8, generator=source)
    return inputs, torch.randint(3, (ROWS,), generator=source)


def batches():
    return [*zip(*(part.split(BATCH) for part in table()), strict=True)]


def single():
    """Return the steps of an epoch: of a micro-batch each."""
    return [[batch] for batch in batches()]


def pairs(steps):
    """Return steps of twice as many micro-batches; the last is of what is left."""
    groups = [steps[at : at + 2] for at in range(0, len(steps), 2)]
    return [[part for step in group for part in step] for group in groups]


def merge(step):
    """Return the micro-batches of a step as one."""
    return tuple(torch.cat(parts) for parts in zip(*step, strict=True))


def divided():
    """Return the steps of an epoch: of half a batch on each of two processes."""
    return [list(zip(*(p.chunk(2) for p in b), strict=True)) for b in batches()]


def cross_entropy(model, batch, bf16=False):
    inputs, targets = batch
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(inputs)
    return F.cross_entropy(outputs.float(), targets)


def train(
    steps,
    model=None,
    *,
    loss_of=cross_entropy,
    rho=RHO,
    parts=None,
    clip=None,
    bf16=False,
    epochs=EPOCHS,
    gamma=GAMMA,
    scales=None,
    decays=None,
    average=None,
    forgets=False,
):
    """Train a copy of a network by hand; return its weights as one vector.

    Args:
        steps: of an epoch; a list of micro-batches each.
        model: not changed.
        loss_of: (model, micro-batch, bf16) -> loss.
        rho: radius, of each micro-batch's perturbation.
        parts: divides each loss; None is as many micro-batches as the step has.
        clip: the largest norm of the sum that is descended by.
        bf16: forward passes by autocast.
        epochs: of these steps.
        gamma: factor of the learning rate after each step.
        scales, decays: of each parameter: factor of the learning rate, weight decay.
        average: the decay of an average of the weights, which is returned with them.
        forgets: the momentum, after half of the steps.
    """
    model = copy.deepcopy(model or network())
    weights = [*model.parameters()]
    scales, decays = scales or [1] * len(weights), decays or [0] * len(weights)
    memory, rate = [torch.zeros_like(w) for w in weights], LR
    averages = [w.detach().clone() for w in weights]
    for number, step in enumerate(steps * epochs):
        if forgets and number == len(steps) * epochs // 2:
            memory = [torch.zeros_like(w) for w in weights]
        total = [torch.zeros_like(w) for w in weights]
        for micro_batch in step:
            seen = gradient(model, weights, loss_of, micro_batch, rho, bf16)
            total = [t + g / (parts or len(step)) for t, g in zip(total, seen, strict=True)]
        if clip is not None:
            length = vector(total).norm()
            total = [g * (clip / (length + 1e-6)).clamp(max=1) for g in total]
        with torch.no_grad():
            for n, (w, g) in enumerate(zip(weights, total, strict=True)):
                memory[n] = MOMENTUM * memory[n] + g + decays[n] * w
                w -= rate * scales[n] * memory[n]
        rate *= gamma
        if average is not None:
            pairs = zip(averages, weights, strict=True)
            averages = [average * a + (1 - average) * w.detach() for a, w in pairs]
    found = flat(model)
    return found if average is None else torch.cat([found, vector(averages)])


def gradient(model, weights, loss_of, batch, rho, bf16):
    """Return the gradient of a loss at w + rho g / ||g||."""
    grads = torch.autograd.grad(loss_of(model, batch, bf16), weights)
    length = vector(grads).norm()
    clean = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, grads, strict=True):
            w += rho * g / length
    found = torch.autograd.grad(loss_of(model, batch, bf16), weights)
    with torch.no_grad():
        for w, before in zip(weights, clean, strict=True):
            w.copy_(before)
    return found


def flat(model):
    """Return the weights of a network as one vector."""
    return vector(p.detach() for p in model.parameters())


def vector(tensors):
    return torch.cat([each.flatten() for each in tensors])


class Cell(NamedTuple):
    """What a trainer came to, and what loops by hand do."""

    found: Callable[[Path], Tensor]
    """Trains in a directory of its own; returns the weights as one vector."""
    right: dict
    """What `train` is given to do the same."""
    wrong: dict
    """And to do what is the easiest to take for it."""


def cells(run, *, parts=None, shared=False, gamma=GAMMA, **own):
    """Return the cells of a trainer.

    Args:
        run: (column, directory) -> weights.
        parts: see `train`; of the steps of an accumulating process.
        shared: whether processes share a perturbation.
        gamma: see `train`; of two processes.
        own: arguments of `train` that are the same in all.
    """
    plain, two = {"steps": single()}, {"parts": parts}
    merged = {"steps": [[merge(step)] for step in pairs(single())]}
    ranks = {"gamma": gamma}
    each, all_ranks = ranks | {"steps": divided()}, ranks | plain
    each_twice = ranks | {"steps": pairs(divided()), "parts": parts and 2 * parts}
    all_twice = ranks | two | {"steps": pairs(single())}
    by_column = {
        "plain": (plain, plain | {"rho": 0}),
        "accumulation": (two | {"steps": pairs(single())}, merged),
        "clipping": (plain | {"clip": CLIP}, plain),
        "bf16": (plain | {"bf16": True}, plain),
        "two ranks": (each, all_ranks),
        "two ranks, accumulation": (each_twice, all_twice),
        "resume": (plain, plain | {"forgets": True}),
    }
    if shared:
        by_column |= {c: by_column[c][::-1] for c in by_column if c.startswith("two ranks")}
    return {
        column: Cell(partial(run, column), {**own, **right}, {**own, **wrong})
        for column, (right, wrong) in by_column.items()
    }
