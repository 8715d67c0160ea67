"""Whether a run compiles its step, and where what is compiled is kept."""

import os
from collections.abc import Callable

import torch

from recipes.config import Config
from recipes.data import user_cache
from samfn.compiled import ARITHMETIC, missing_compiler

# On a CPU, the saving must be more than compiling takes: half a minute for WRN-10-1 on two
# cores, without a cache. Where a compiled step is faster at all, it saves about 5 ms of
# Python's time, and a sixth of the arithmetic's.
SECONDS_TO_COMPILE = 45.0
SECONDS_OF_PYTHON = 5e-3
OPERATIONS_PER_SECOND = 1.3e11
SHARE_OF_ARITHMETIC = 1 / 6


def decide(
    config: Config, steps: int, device: torch.device, operations: Callable[[], int]
) -> tuple[bool, str]:
    """Return whether to compile the step, and why in a few words.

    Args:
        config: of the run.
        steps: in the whole run.
        device: that they are taken on.
        operations: counts the floating-point operations of one gradient.
    """
    if config.compile == "no":
        return False, "no"
    if missing := missing_compiler(device):
        return False, f"no: {missing}"
    if config.compile == "yes":
        return True, "yes"
    if device.type != "cpu":
        return True, "yes, on a GPU"
    if (count := operations()) > ARITHMETIC:
        return False, "no: a CPU spends its time in the convolutions either way"
    passes = 1 if config.rho == 0 else 2
    arithmetic = passes * count / OPERATIONS_PER_SECOND
    saving = SECONDS_OF_PYTHON + SHARE_OF_ARITHMETIC * arithmetic
    if steps * saving > SECONDS_TO_COMPILE:
        return True, f"yes: {steps:,} steps on a CPU pay for it"
    return False, f"no: {steps:,} steps on a CPU would not pay for it (--compile yes)"


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
