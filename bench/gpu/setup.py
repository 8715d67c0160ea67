"""On what the suite of a GPU runs: there, and at toy size on a CPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from bench.candidates import DTYPES
from recipes.terminal.hardware import emulated

Row = dict[str, Any]


class Setup(NamedTuple):
    """Size of all measurements, and their device."""

    device: str
    batch: int
    networks: dict[str, str]
    """Role in the targets -> network."""
    stages: dict[str, tuple[tuple[int, int], ...]]
    """Network -> channels and side of its stages' convolutions."""
    steps: int
    """Steps in the checks of correctness."""
    seconds: float
    """Time spent on each case."""
    backend: str = "inductor"
    """Of torch.compile, but in the cases of speed."""
    methods: tuple[str, ...] = ()
    """That are checked; () is all."""
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered to measure: of cases side by side, one at a time does."""

    @property
    def precision(self) -> str:
        """That of the passes: bf16, but float32 on a CPU that would emulate it."""
        return "float32" if emulated(torch.bfloat16, self.device) else "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """That of the passes."""
        return DTYPES[self.precision] or torch.float32


GPU = Setup(
    "cuda",
    128,
    {
        "large": "wrn-28-10",
        "wide": "wrn-16-8",
        "small": "wrn-16-4",
        "deep": "wrn-40-2",
        "davda54": "davda54 wrn-16-8",
        "tiny": "mlp",
    },
    {
        "wrn-28-10": ((160, 32), (320, 16), (640, 8)),
        "wrn-16-8": ((128, 32), (256, 16), (512, 8)),
    },
    steps=100,
    seconds=6.0,
)
SMOKE = Setup(
    "cpu",
    8,
    {"small": "mlp-small"},
    {"wrn-10-1": ((16, 8),)},
    steps=6,
    seconds=0.5,
    backend="aot_eager",
    methods=("esam", "looksam", "sam"),
)
Case = Callable[[Setup], list[Row]]
"""Measures, and returns rows of the report."""
