"""samfn.SAM in trainers that people have: a few lines for each, to import or to copy."""

from typing import Any

import samfn


def sam_of(optimizer: Any, *, prepared: bool = False) -> samfn.SAM:
    """Return the samfn.SAM that a trainer's optimizer is, or is put around.

    Args:
        optimizer: of the trainer.
        prepared: the trainer has put something around it.

    Raises:
        TypeError: it is another, or is not prepared.
    """
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, samfn.SAM):
        raise TypeError(
            f"expected samfn.SAM as the trainer's optimizer, got {type(found).__name__}"
        )
    if prepared and found is optimizer:
        raise TypeError("expected what accelerator.prepare returns, got samfn.SAM itself")
    return found
