"""samfn.SAM in trainers that people have: a few lines for each, to import or to copy."""

from typing import Any

import samfn


def sam_of(optimizer: Any) -> samfn.SAM:
    """Return the samfn.SAM that a trainer's optimizer is, or is put around.

    Raises:
        TypeError: it is another.
    """
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, samfn.SAM):
        raise TypeError(
            f"expected samfn.SAM as the trainer's optimizer, got {type(found).__name__}"
        )
    return found
