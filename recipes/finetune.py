"""Train one of torchvision's networks with SAM on your own images.

    python -m recipes.finetune --data-dir my-images         # train/<class>/*, test/...
    python -m recipes.finetune --data-dir my-images --model vit_b_16 --clip-norm 1
    python -m recipes.finetune --data-dir my-images --freeze --lr 0.1   # the last layer
    python -m recipes.finetune --data-dir my-images --weights resnet18-f37072fd.pth

The settings are those of recipes.cifar_wrn, the preset is finetune, and either command goes
on with a run of the other.
"""

import sys
from collections.abc import Sequence

from recipes.train.running import start

PROGRAM = "python -m recipes.finetune"


def main(args: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    return start(args, PROGRAM, base="finetune")


if __name__ == "__main__":
    sys.exit(main())
