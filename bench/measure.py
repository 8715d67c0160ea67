"""Timing several candidates against each other, and what a report needs beside it."""

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recipes.terminal.hardware import emulated, hardware

RESULTS = Path(__file__).parent / "results"


def interleaved(
    steps: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: int = 7
) -> dict[str, list[float]]:
    """Time every candidate in turn, again and again, so that noise meets them all alike.

    Args:
        steps: what is timed, by name; all were called before.
        seconds: how long to go on.
        rounds: at least this many for each candidate, whatever the time.

    Returns:
        Seconds of one call, by name, one for every round.
    """
    repeats = {name: _repeats(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
        for name, step in steps.items():
            times[name].append(timed(step, repeats[name]))
    return times


def _repeats(step: Callable[[], Any]) -> int:
    # A sample is about 20 ms, far above what the clock and a switch of candidates cost.
    return max(1, round(0.02 / max(timed(step, 3), 1e-6)))


def timed(step: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one call, the mean over so many."""
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - started) / repeats


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and the 20 % and 80 % quantiles."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": low, "q80": high}


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Return the quantiles of seconds as columns of a table, in milliseconds."""
    names = {"median": "ms", "q20": "q20", "q80": "q80"}
    return {names[name]: 1e3 * value for name, value in quantiles(values).items()}


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the quantiles of ratios, round by round.

    What slows the machine for a while slows both.
    """
    return quantiles([a / b for a, b in zip(values, others, strict=True)])


def peak_flops(dtype: torch.dtype, device: str, seconds: float = 10.0) -> float:
    """Return the operations a second of a large matrix product, the best of seven.

    Args:
        dtype: of the factors.
        device: as "cpu" or "cuda:0".
        seconds: about the longest that it may take; the factors are as large as that
            allows, at most 2048 on a side on a CPU and 8192 on a GPU.
    """
    size, largest = 128, 2048 if device == "cpu" else 8192
    product = _product(size, dtype, device)
    # A side twice as long takes eight times as long, and more where a cache overflows.
    while size < largest and 24 * 8 * timed(product, 1) < seconds:
        size *= 2
        product = _product(size, dtype, device)
    best = min(timed(product, 3) for _ in range(7))
    return 2 * size**3 / best


def _product(size: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)  # The first one chooses the kernel.
    return lambda: torch.mm(left, right, out=out)


def peak_memory(step: Callable[[], Any]) -> int:
    """Return the bytes at the peak of three steps.

    On a GPU all that PyTorch allocated; on a CPU what the process grew by.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Starts a new peak.
    before = resident()
    for _ in range(3):
        step()
    synchronize()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made within it, and are there at once.

    Of a DTensor, those of the rank's part; what a kernel takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count."""
        made = operation(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = getattr(leaf, "_local_tensor", leaf).untyped_storage()
                known = self._held.get(storage._cdata)
                if known is None or known[0].expired():  # type: ignore[no-untyped-call]
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._held[storage._cdata] = weak, storage.nbytes()
        for key in [key for key, (weak, _) in self._held.items() if weak.expired()]:  # type: ignore[no-untyped-call]
            del self._held[key]
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return made


def start_of_peak() -> int:
    """Start a new peak of the GPU's memory; return what is reserved of it."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def reserved_at_peak() -> int:
    """Return the bytes of the GPU that were reserved at the peak, CUDA graphs' too."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def resident(what: str = "VmRSS") -> int:
    """Return the bytes that the process has now, or had at its peak with "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {what}")


def kernels(step: Callable[[], Any]) -> list[tuple[str, float]]:
    """Return names and seconds of the kernels of a step, on a CPU of its operators."""
    kind = "CUDA" if torch.cuda.is_available() else "CPU"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        synchronize()
    events: Any = profile.events()
    own = [e for e in events if e.device_type.name == kind and not e.cpu_parent]
    return [(e.name, (e.device_time if kind == "CUDA" else e.cpu_time) / 1e6) for e in own]


def forward_operations(model: torch.nn.Module, inputs: Tensor) -> int:
    """Count the floating-point operations of a forward pass; a multiply-add is two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    return int(counter.get_total_flops())


def distance(start: Mapping[str, Tensor], a: Any, b: Any) -> float:
    """Return how far two trainings are apart, relative to how far they went.

    ||a - b|| / ||a - start||, over all weights together; nan counts as far
    """
    apart, went = (
        sum(float((x[n].double() - y[n].double()).square().sum()) for n in start) ** 0.5
        for x, y in ((a, b), (a, start))
    )
    return apart / went if apart == apart else float("inf")


def environment() -> dict[str, str]:
    """Return what a report says of hardware and versions."""
    device = hardware("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        bf16 = "emulated" if emulated(torch.bfloat16) else "native"
        device += f" ({torch.backends.cpu.get_cpu_capability()}, {bf16} bf16)"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def page(title: str, parts: Sequence[str], module: str) -> str:
    """Return a report as Markdown, with hardware, versions and the command.

    Args:
        title: of the report.
        parts: texts and tables.
        module: that was called with the arguments of this process.
    """
    about = environment()
    made = (
        f"{about['date']}, {about['device']}, torch {about['torch']},"
        f" Python {about['python']}."
    )
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return "\n\n".join([f"# {title}", *parts, made, f"```\n{command}\n```"]) + "\n"


def emit(row: dict[str, Any], path: Path | None) -> None:
    """Print a result as one line of JSON, and append it to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as a Markdown table."""
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(row[i]) for row in cells))
        for i, column in enumerate(columns)
    ]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
