"""What a report says of the machine that it was made on."""

import platform
from pathlib import Path

import torch


def hardware(device: str) -> str:
    """Return what computes on a device, as "cpu" or "cuda:0", in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{_cpu_name()}, {count} thread{'s' * (count != 1)}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
