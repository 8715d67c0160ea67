"""Products with the Hessian for every network of torchvision, beside finite differences.

python -m tests.zoo_hessian              # all of them, as a table
python -m tests.zoo_hessian vit_b_16     # some
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

import samfn
from recipes import models
from samfn import tree
from samfn.kernels import NotTwiceDifferentiableError
from samfn.objective import Objective

SIZES = {"inception_v3": 75, "alexnet": 63}  # in pixels; others take the smallest, 32
WINDOWED = 224  # of maxvit, whose windows divide it
# Of networks of more parameters than LARGE, tensors of at most SMALL entries are trained:
# each layer takes part, and it fits into memory.
LARGE, SMALL = 100_000_000, 1_000_000


def size_of(name: str) -> int:
    """Return the pixels of images that are as small as a network allows."""
    return WINDOWED if name.startswith("maxvit") else SIZES.get(name, 32)


def objective(name: str, seed: int = 0) -> tuple[Objective, dict[str, Tensor]]:
    """Return the loss of a new network on two random images, float64, in evaluation."""
    torch.manual_seed(seed)
    size = size_of(name)
    model = models.make(name, 3, shape=(3, size, size)).double()
    images = torch.randn(2, 3, size, size).double()
    with torch.no_grad():  # Statistics of the data, or its numbers grow by the layer.
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        model(images)
    if sum(w.numel() for w in model.parameters()) > LARGE:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.numel() <= SMALL)
    params, buffers = samfn.split(model.eval())
    loss_fn = samfn.supervised(model, F.cross_entropy)
    return Objective(loss_fn, buffers, (images, torch.tensor([0, 2]))), params


def verdict(name: str) -> str:
    """Return whether a product equals the central difference of gradients."""
    for seed in range(9):
        loss, params = objective(name, seed)
        direction = {key: torch.randn_like(w) for key, w in params.items()}
        direction = tree.scale(direction, 1 / tree.norm(direction))
        try:
            product = loss.product(params, direction)
        except NotTwiceDifferentiableError as error:
            return f"refused: {error}"
        if tree.norm(product) > 0:  # A last ReLU can leave nothing of both images.
            break
    error = min(apart(loss, params, direction, product, step) for step in STEPS)
    return f"{'exact' if error < 1e-4 else 'WRONG'}, off by {error:.0e}"


# The smallest error counts: a step across a kink, as of ReLU, makes the difference wrong.
STEPS = (1e-6, 1e-7)


def apart(
    loss: Objective,
    params: dict[str, Tensor],
    direction: dict[str, Tensor],
    product: dict[str, Tensor],
    step: float,
) -> float:
    """Return how far a product is from the central difference, as a share of it."""
    up = loss.gradient(tree.add_scaled(params, step, direction))[1]
    down = loss.gradient(tree.add_scaled(params, -step, direction))[1]
    difference = tree.scale(tree.subtract(up, down), 1 / (2 * step))
    return float(tree.norm(tree.subtract(product, difference)) / tree.norm(product))


def main(names: list[str]) -> None:
    """Print a row for each network, as it is known."""
    print("| network | images | Hessian |\n| --- | --- | --- |")
    for name in names or models._torchvision_names():
        print(f"| {name} | {size_of(name)} | {verdict(name)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
