"""Train a Wide ResNet with SAM on CIFAR-10, on your own images, or on digits.

    python -m recipes.cifar_wrn --rho 0.05                  # whatever this machine has
    python -m recipes.cifar_wrn --rho 0                     # the same with plain SGD
    python -m recipes.cifar_wrn --preset digits-noise --rho 0.2
    python -m recipes.cifar_wrn --data-dir my-images        # train/<class>/*, test/...
    python -m recipes.cifar_wrn --preset foret2021          # WRN-28-10, on a GPU
    torchrun --nproc-per-node 8 -m recipes.cifar_wrn --preset foret2021

A run leaves a directory with its settings, metrics, picture and checkpoints.
"""

import sys
from collections.abc import Sequence

from recipes.train.running import start


def main(args: Sequence[str] | None = None) -> int:
    """Run the recipe; return its exit code."""
    return start(args)


if __name__ == "__main__":
    sys.exit(main())
