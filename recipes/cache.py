"""The user's own cache directory, and what is kept in it."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the directory for what can be made or downloaded again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samfn"


def keep_compiled() -> None:
    """Let PyTorch keep compiled kernels in the user's cache, closed to everyone else.

    Left alone it takes a directory below /tmp. What TORCHINDUCTOR_CACHE_DIR says goes
    before; where nothing can be written, nothing changes.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    path = user_cache() / "compiled"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError:
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
