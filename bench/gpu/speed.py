"""How fast the step is on a GPU, beside its peers and what the machine can do."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import measure
from bench.candidates import TOLERANCE, Candidate, Samfn, candidates, compiled, started
from bench.gpu.setup import Case, Row, Setup
from bench.networks import RHO, Network, build
from recipes.data import augment

# The candidates of a speed case; each but the eager ones costs a compilation.
TIMED = (
    "samfn eager",
    "samfn compiled",
    "overwriting eager",
    "pytorch_optimizer eager",
    "samfn SGD eager",
    "samfn SGD compiled",
    "SGD eager",
)
# SGD's graph of the deepest one takes minutes to compile, and no target asks for it.
DEEP = tuple(name for name in TIMED if name != "samfn SGD compiled")
SEVERAL = (
    "samfn eager",
    "samfn compiled",
    "samfn compiled, 8 steps a call",
    "overwriting eager",
    "pytorch_optimizer eager",
    "samfn SGD eager",
    "samfn SGD compiled",
    "SGD eager",
)
WITH_COMPILED_MODEL = (
    "samfn eager",
    "samfn compiled",
    "overwriting compiled model",
    "samfn SGD eager",
    "SGD compiled model",
)


def peak(setup: Setup) -> list[Row]:
    """Measure what a large matrix product reaches."""
    with setup.turn():
        reached = measure.peak_flops(setup.dtype, setup.device, setup.seconds)
    return [{"TFLOP/s": reached / 1e12}]


def convolutions(setup: Setup) -> list[Row]:
    """Measure what each convolution of the networks can reach, in all three passes."""
    rows = []
    for name, stages in setup.stages.items():
        for channels, side in stages:
            shape = (setup.batch, channels, side, side)
            like = {"device": setup.device, "dtype": setup.dtype}
            x, dy = torch.randn(2, *shape, **like).unbind()  # type: ignore[call-overload]
            w = torch.randn(channels, channels, 3, 3, **like)  # type: ignore[call-overload]
            x, dy, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, w))
            passes: dict[str, Callable[[], Any]] = {
                "forward": _forward(x, w),
                "inputs": _backward(dy, x, w, [True, False, False]),
                "weights": _backward(dy, x, w, [False, True, False]),
            }
            for step in passes.values():
                step()
            with setup.turn():
                times = measure.interleaved(passes, seconds=0.3)
            flops = 2 * setup.batch * channels * channels * 9 * side * side
            for which, values in times.items():
                rate = flops / statistics.median(values) / 1e12
                rows.append(
                    {"of": name, "shape": shape, "gradient": which, "TFLOP/s": rate}
                )
    return rows


def _forward(x: Tensor, w: Tensor) -> Callable[[], Any]:
    return lambda: F.conv2d(x, w, padding=1)


def _backward(dy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Callable[[], Any]:
    backward = torch.ops.aten.convolution_backward
    fixed = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)
    return lambda: backward(dy, x, w, *fixed)


def networks(setup: Setup) -> dict[str, Case]:
    """Return the cases that time the networks, by name."""
    untuned = ("samfn eager", "samfn compiled", "overwriting untuned")
    which = {"deep": DEEP, "tiny": SEVERAL, "davda54": untuned}
    found = {
        f"speed {name}": speed(name, which.get(role, TIMED))
        for role, name in setup.networks.items()
    }
    small = setup.networks["small"]
    return found | {f"compiled model {small}": speed(small, WITH_COMPILED_MODEL)}


def speed(name: str, wanted: tuple[str, ...]) -> Case:
    """Return the case that times a network's candidates."""

    def case(setup: Setup) -> list[Row]:
        network = build(name, setup.batch, setup.device)
        # Nobody is there to look into a difference: it is reported, and the time as well.
        found = candidates(network, setup.precision, only=wanted, tolerance=float("inf"))
        with setup.turn():
            return timed(setup, network, found)

    return case


def timed(setup: Setup, network: Network, found: Sequence[Candidate]) -> list[Row]:
    """Time candidates against each other."""
    times = measure.interleaved(
        {c.name: c.runner.step for c in found}, seconds=setup.seconds
    )
    flops = measure.forward_operations(network.model, network.inputs)
    rows = []
    for c in found:
        seen = {
            k: v / c.runner.steps for k, v in measure.milliseconds(times[c.name]).items()
        }
        done = flops * (3 if "SGD" in c.name else 6) / (seen["ms"] / 1e3)
        row = {"candidate": c.name, "TFLOP/s": done / 1e12} | seen
        row |= {"images/s": 1e3 * setup.batch / seen["ms"], "apart": c.apart}
        row |= {"from float32": c.from_float32, "agrees": agrees(c, found, setup.precision)}
        row |= {"host ms": 1e3 * host_seconds(c.runner.step) / c.runner.steps}
        kernels = measure.kernels(c.runner.step)
        of_weights = sum(seconds for name, seconds in kernels if _is_of_weights(name))
        row |= {"kernels": len(kernels) / c.runner.steps}
        row |= {"weights ms": 1e3 * of_weights / c.runner.steps}
        row |= {"MiB": c.bytes / 2**20, "first s": c.first_call_seconds}
        rows.append(row)
    return rows


def agrees(candidate: Candidate, found: Sequence[Candidate], precision: str) -> bool:
    """Return whether a candidate trains as eager samfn does, as far as rounding goes.

    In bf16 the rounding of a deep network is as large as its steps. There it has to be no
    farther from eager samfn in float32 than eager samfn in bf16 is, within a quarter.
    """
    kind = "samfn SGD eager" if "SGD" in candidate.name else "samfn eager"
    allowed = next(1.25 * c.from_float32 for c in found if c.name == kind)
    return candidate.apart < TOLERANCE[precision] or candidate.from_float32 < allowed


def _is_of_weights(kernel: str) -> bool:
    """Return whether a kernel works on a list of tensors, as norms and updates do."""
    return any(part in kernel for part in ("triton_for", "multi_tensor", "lpnorm"))


def host_seconds(step: Callable[[], Any]) -> float:
    """Return how long the host is busy with a step that it does not wait for."""
    measure.synchronize()
    samples = []
    for _ in range(5):
        begun = time.perf_counter()
        step()
        samples.append(time.perf_counter() - begun)
        measure.synchronize()
    return statistics.median(samples)


def designs(setup: Setup) -> list[Row]:
    """Time the ways to run the compiled step against each other."""
    network = build(setup.networks["small"], setup.batch, setup.device)
    made = {
        "whole, CUDA graph": compiled(plan="whole", backend=setup.backend),
        "gradient, CUDA graph": compiled(plan="gradient", backend=setup.backend),
    }
    if setup.device == "cuda":  # A CPU has none of these.
        graphs = {"triton.cudagraphs": True}
        for plan in ("whole", "gradient"):
            made[f"{plan}, no CUDA graph"] = compiled(plan=plan, cuda_graph=False)
        made["whole, reduce-overhead"] = compiled(
            plan="whole", cuda_graph=False, options=graphs
        )
        combined = {"combo_kernels": True}
        made["whole, combined kernels"] = compiled(plan="whole", options=combined)
    rows: list[Row] = []
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in made.items():
        runner, seconds = started(partial(Samfn, network, setup.dtype, RHO, make))
        for _ in range(4):
            runner.step()
        steps[name] = runner.step
        rows.append({"design": name, "first s": seconds})
    with setup.turn():
        times = measure.interleaved(steps, seconds=setup.seconds)
        for row in rows:
            row["ms"] = 1e3 * statistics.median(times[row["design"]])
            row["host ms"] = 1e3 * host_seconds(steps[row["design"]])
            row["kernels"] = len(measure.kernels(steps[row["design"]]))
    return rows


def data_path(setup: Setup) -> list[Row]:
    """Time what makes a batch: choosing, cropping, mirroring, normalising, cutout.

    Sixteen batches at once, as the recipe does it; the time is that of one.
    """
    device = setup.device
    images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8, device=device)
    mean, std = torch.full((2, 3), 0.5, device=device)
    source = torch.Generator(device)

    def step() -> None:
        picked = torch.arange(16 * setup.batch, device=device) % len(images)
        source.manual_seed(0)
        batch = augment.random_crop_flip(images[picked], source, padding=4, flip=True)
        batch = augment.normalise(batch, mean, std)
        augment.cutout(batch, source, size=16, probability=0.5)

    step()
    with setup.turn():
        times = measure.interleaved({"batch": step}, seconds=1.0)["batch"]
        host, kernels = host_seconds(step), len(measure.kernels(step))
    return [
        {
            "ms": 1e3 * statistics.median(times) / 16,
            "host ms": 1e3 * host / 16,
            "kernels": kernels / 16,
        }
    ]
