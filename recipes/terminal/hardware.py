"""The machine: its name, the dtypes that it emulates, and whether its memory is full."""

import functools
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Instructions that multiply 16-bit numbers, as `torch.cpu.get_capabilities` names them.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def hardware(device: str) -> str:
    """Return what computes on a device, as "cpu" or "cuda:0", in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{_cpu_name()}, {count} thread{'s' * (count != 1)}"


def emulated(dtype: torch.dtype | None, device: str | torch.device = "cpu") -> bool:
    """Return whether a device multiplies numbers of a 16-bit dtype by way of another one.

    PyTorch does on a CPU without instructions for them, many times slower than float32.
    An x86 CPU is asked for its instructions. Others, and PyTorch before it could ask, time
    a small product, once in a process.

    Args:
        dtype: of the products; None is that of the weights.
        device: as "cpu" or "cuda:0"; a GPU emulates none.
    """
    if dtype not in _INSTRUCTIONS or torch.device(device).type != "cpu":
        return False
    found = _capabilities()
    if found.get("architecture") == "x86_64":
        return not any(found.get(name) for name in _INSTRUCTIONS[dtype])
    # Emulation takes such a product about twenty times as long, instructions about once.
    return slowness(dtype) > 3


def _capabilities() -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@functools.cache
def slowness(dtype: torch.dtype) -> float:
    """Return how many times as long as in float32 a small product takes on the CPU."""
    products = [torch.randn(128, 128).to(kind) for kind in (dtype, torch.float32)]
    best = [float("inf")] * 2
    for _ in range(6):  # The first of each also chooses its kernel.
        for index, factor in enumerate(products):
            started = time.perf_counter()
            torch.mm(factor, factor)
            best[index] = min(best[index], time.perf_counter() - started)
    return best[0] / best[1]


def lacks_memory(error: Exception) -> bool:
    """Return whether an error says that there is no memory left."""
    # What is raised on a CPU has no type of its own; the third is oneDNN's, and the last
    # tells of bytes that no number counts.
    texts = ["DefaultCPUAllocator", "bad_alloc", "could not create a primitive"]
    texts += ["Storage size calculation overflowed"]
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )


def lacks_threads(error: Exception) -> bool:
    """Return whether an error says that the system starts no thread any more."""
    return "can't start new thread" in str(error)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
