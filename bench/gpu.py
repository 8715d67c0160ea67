"""Everything that a GPU must show, in one command: limits, correctness, speed, memory.

    python -m bench.gpu            # one GPU, under nine minutes with compilation
    python -m bench.gpu --smoke    # the same code at toy size, on a CPU; in float32 where
                                   # the CPU has no instructions for bf16

Needs only torch, einops, safetensors and numpy; pytorch_optimizer is compared with where it
is installed. Every finished case is a line of a JSON file, and is not run again: start it
again after an interruption, or when the time was too short. At the end, a table of targets
and a dated report in bench/results/.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import samfn
from bench import measure, scaling
from bench.candidates import DTYPES, TOLERANCE, Samfn, candidates, compiled, started
from bench.networks import RHO, build
from recipes.data import augment
from recipes.terminal.hardware import emulated
from samfn import distributed

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
)
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
WITH_COMPILED_MODEL = (
    "samfn eager",
    "samfn compiled",
    "overwriting compiled model",
    "samfn SGD eager",
    "SGD compiled model",
)


def main() -> None:
    """Run the cases that are not finished, and report on all that are."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no case after")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="directory of the JSON lines"
    )
    parser.add_argument(
        "--report", type=Path, default=measure.RESULTS, help="directory of the report"
    )
    options = parser.parse_args()
    setup = SMOKE if options.smoke else GPU
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a GPU and found none; --smoke runs on a CPU")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # Peers share the code of their modules.
    path = options.output / ("smoke.jsonl" if options.smoke else "gpu.jsonl")
    end = time.monotonic() + 60 * options.minutes
    left = run_cases(setup, path, end)
    text = report(read(path), setup)
    print(text)
    options.report.mkdir(parents=True, exist_ok=True)
    name = f"{'smoke' if options.smoke else 'gpu'}_{time.strftime('%Y-%m-%d')}.md"
    (options.report / name).write_text(text, encoding="utf-8")
    if left:
        print(f"not run yet, start again to go on: {', '.join(left)}")


def run_cases(setup: Setup, path: Path, end: float) -> list[str]:
    """Run what is not in the file yet; return what the time was too short for."""
    done, left = {row["case"] for row in read(path)}, []
    for name, case in cases(setup).items():
        if name in done:
            continue
        if time.monotonic() > end:
            left.append(name)
            continue
        started_at = time.perf_counter()
        try:
            rows = case(setup)
        except Exception as error:  # One case's failure is a finding, not the end.
            rows = [{"failed": f"{type(error).__name__}: {str(error)[:500]}"}]
        seconds = round(time.perf_counter() - started_at, 1)
        about = measure.environment() | {"case": name, "case_seconds": seconds}
        # At once, so that an interruption leaves a case whole or not there.
        lines = [json.dumps(about | row) for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        print("\n".join(lines), flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return left


def cases(setup: Setup) -> dict[str, Callable[[Setup], list[Row]]]:
    """Return the cases, the most wanted ones first."""
    found: dict[str, Callable[[Setup], list[Row]]] = {
        "peak": peak,
        "convolutions": convolutions,
        "checks": checks,
        "one rank": one_rank,
        "data path": data_path,
    }
    for role, name in setup.networks.items():
        if role != "davda54":
            found[f"speed {name}"] = speed(name, TIMED)
    found["designs"] = designs
    found["parameter operations"] = parameter_operations
    for role, name in setup.networks.items():
        if role == "davda54":
            untuned = ("samfn eager", "samfn compiled", "overwriting untuned")
            found[f"speed {name}"] = speed(name, untuned)
        elif role in ("large", "small"):
            found[f"compiled model {name}"] = speed(name, WITH_COMPILED_MODEL)
    return found


def peak(setup: Setup) -> list[Row]:
    """Measure what a large matrix product reaches."""
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


def speed(name: str, wanted: tuple[str, ...]) -> Callable[[Setup], list[Row]]:
    """Return the case that times a network's candidates."""

    def case(setup: Setup) -> list[Row]:
        network = build(name, setup.batch, setup.device)
        # Nobody is there to look into a difference: it is reported, and the time as well.
        found = candidates(network, setup.precision, only=wanted, tolerance=float("inf"))
        steps = {c.name: c.runner.step for c in found}
        times = measure.interleaved(steps, seconds=setup.seconds)
        flops = measure.forward_operations(network.model, network.inputs)
        rows = []
        for c in found:
            seen = measure.quantiles(times[c.name])
            done = flops * (3 if "SGD" in c.name else 6) / seen["median"]
            row = {"candidate": c.name, "TFLOP/s": done / 1e12}
            row |= measure.milliseconds(times[c.name])
            row |= {"images/s": setup.batch / seen["median"], "apart": c.apart}
            row |= {"agrees": c.apart < TOLERANCE[setup.precision]}
            row |= {"host ms": 1e3 * host_seconds(c.runner.step)}
            row |= {"kernels": measure.kernels(c.runner.step)}
            row |= {"MiB": c.bytes / 2**20, "first s": c.first_call_seconds}
            rows.append(row)
        return rows

    return case


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
        tuned = {"max_autotune": True, "coordinate_descent_tuning": True}
        for plan in ("whole", "gradient"):
            made[f"{plan}, no CUDA graph"] = compiled(plan=plan, cuda_graph=False)
        made["whole, reduce-overhead"] = compiled(
            plan="whole", cuda_graph=False, options=graphs
        )
        made["whole, max-autotune, CUDA graph"] = compiled(plan="whole", options=tuned)
    rows: list[Row] = []
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in made.items():
        runner, seconds = started(partial(Samfn, network, setup.dtype, RHO, make))
        for _ in range(4):
            runner.step()
        steps[name] = runner.step
        rows.append({"design": name, "first s": seconds})
    times = measure.interleaved(steps, seconds=setup.seconds)
    for row in rows:
        row["ms"] = 1e3 * statistics.median(times[row["design"]])
        row["host ms"] = 1e3 * host_seconds(steps[row["design"]])
        row["kernels"] = measure.kernels(steps[row["design"]])
    return rows


def parameter_operations(setup: Setup) -> list[Row]:
    """Time a step with a linear loss: norms, perturbation, descent, and little else.

    An upper bound: the loss reads weights and gradients once more in each pass.
    """
    name = setup.networks.get("large", setup.networks["small"])
    model = build(name, setup.batch, setup.device).model
    params, _ = samfn.split(model)
    slope = {n: 1e-3 * torch.randn_like(w) for n, w in params.items()}

    def linear(params: Any, buffers: Any, batch: Any) -> Tensor:
        return torch.stack([(w * slope[n]).sum() for n, w in params.items()]).sum()

    optimizer = samfn.sgd(0.9, weight_decay=5e-4)
    given: Any = {"loss_fn": linear, "optimizer": optimizer, "backend": setup.backend}
    update = samfn.compile_update(**given)
    state = samfn.init(params, {}, optimizer=optimizer)

    def step() -> None:
        nonlocal state
        state, _ = update(state, (), rho=RHO, lr=0.01)

    for _ in range(4):
        step()
    times = measure.interleaved({"step": step}, seconds=1.0)["step"]
    return [{"of": name, "ms": 1e3 * statistics.median(times)}]


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
    times = measure.interleaved({"batch": step}, seconds=1.0)["batch"]
    kernels = measure.kernels(step)
    return [
        {
            "ms": 1e3 * statistics.median(times) / 16,
            "host ms": 1e3 * host_seconds(step) / 16,
            "kernels": kernels / 16,
        }
    ]


def checks(setup: Setup) -> list[Row]:
    """Check that what is fast is also right."""
    name = setup.networks["small"]
    network = build(name, setup.batch, setup.device)
    start = samfn.split(network.model)[0]
    optimizer = samfn.sgd(0.9, weight_decay=5e-4)
    batches = [
        (torch.randn_like(network.inputs), torch.randint_like(network.targets, 10))
        for _ in range(4)
    ]

    def trained(dtype: torch.dtype | None, **settings: Any) -> tuple[Any, list[float]]:
        loss_fn = samfn.supervised(network.model, F.cross_entropy, dtype=dtype)
        common: Any = {"loss_fn": loss_fn, "optimizer": optimizer}
        state = samfn.init(*samfn.split(network.model), optimizer=optimizer)
        losses = []
        made = {"backend": setup.backend, **common, **settings}
        step: Any = samfn.compile_update(**made) if settings else None
        for i in range(setup.steps):
            rho, lr = RHO * (1 + i % 3), 0.02 / (1 + i % 2)
            batch = batches[i % 4]
            if step is None:
                state, seen = samfn.sam_update(state, batch, **common, rho=rho, lr=lr)
            else:
                state, seen = step(state, batch, rho=rho, lr=lr)
            losses.append(seen.loss)
        return state.params, [float(loss) for loss in losses]

    counters = torch._dynamo.utils.counters
    full = trained(None)
    counters.clear()
    fast = trained(setup.dtype, plan="whole")
    graphs = counters["stats"]["unique_graphs"]
    parted = trained(setup.dtype, plan="gradient")
    difference = max(abs(a - b) for a, b in zip(full[1], fast[1], strict=True))
    rows: list[Row] = [
        {
            "check": f"compiled {setup.precision} against eager float32, largest"
            " difference in loss",
            "value": difference,
            "passed": difference < 0.25 * full[1][0],
        },
        {
            "check": "losses fall in both, to",
            "value": [statistics.mean(x[1][-4:]) for x in (full, fast)],
            "passed": all(statistics.mean(x[1][-4:]) < x[1][0] for x in (full, fast)),
        },
        {
            "check": "one gradient called twice against one graph, largest difference",
            "value": max(abs(a - b) for a, b in zip(fast[1], parted[1], strict=True)),
            "passed": measure.distance(start, parted[0], fast[0]) < 1.0,
        },
        {"check": "graphs for all steps", "value": graphs, "passed": graphs == 1},
        *_random_checks(setup),
    ]
    if setup.device == "cuda":
        plain = trained(setup.dtype, plan="whole", cuda_graph=False)
        rows.append(
            {
                "check": "CUDA graph against none, distance over way",
                "value": measure.distance(start, fast[0], plain[0]),
                "passed": max(abs(a - b) for a, b in zip(fast[1], plain[1], strict=True))
                < 0.1 * fast[1][0],
            }
        )
    return rows


def one_rank(setup: Setup) -> list[Row]:
    """Check the step of several devices with one: its collectives change nothing.

    They are in the graph; NCCL on a GPU, gloo on a CPU. Beside it the same of samfn.SAM and
    `fully_shard`, eager both.
    """
    network = build(setup.networks["small"], setup.batch, setup.device)
    optimizer = samfn.sgd(0.9)
    common: Any = {
        "loss_fn": samfn.supervised(network.model, F.cross_entropy),
        "optimizer": optimizer,
    }
    batch = network.inputs, network.targets

    def trained(
        placement: str | None = None,
    ) -> tuple[dict[str, Tensor], list[float], float]:
        params, buffers = samfn.split(network.model)
        method: samfn.Method = samfn.sam()
        if placement:
            method, params = scaling.placed(placement, params)
        how: Any = {"plan": "whole", "backend": setup.backend}
        update = samfn.compile_update(**common, **how, method=method)
        state = samfn.init(params, buffers, optimizer=optimizer)

        def step() -> Tensor:
            nonlocal state
            state, seen = update(state, batch, rho=RHO, lr=0.01)
            return seen.loss

        losses, seconds = followed(step)
        whole = distributed.gather(state)
        distributed.require_alike(whole)
        return dict(whole.params), losses, seconds

    def in_place(shards: bool = False) -> tuple[dict[str, Tensor], list[float], float]:
        model, step = scaling.in_place(network, shards=shards, lr=0.01)
        losses, seconds = followed(step)
        params = {name: p.detach() for name, p in model.named_parameters()}
        return distributed.gather(params), losses, seconds

    def followed(step: Callable[[], Tensor]) -> tuple[list[float], float]:
        losses, begun = [], 0.0
        for _ in range(setup.steps):
            losses.append(float(step()))
            begun = begun or time.perf_counter()  # After the first one, which compiles.
        return losses, (time.perf_counter() - begun) / (setup.steps - 1)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    start = samfn.split(network.model)[0]
    names = ("replica", "global", "sharded") if setup is GPU else ("sharded",)
    ways: Any = {name: (partial(trained, name), trained) for name in names}
    ways["fully_shard, samfn.SAM"] = partial(in_place, shards=True), in_place
    alone: Any = {way: way() for _, way in ways.values()}
    rows = []
    with mock.patch.dict(os.environ, variables), distributed.ranks():
        for name, (several, one) in ways.items():
            expected, losses, seconds = alone[one]
            found = several()
            worst = max(abs(a - b) for a, b in zip(found[1], losses, strict=True))
            rows.append(
                {
                    "placement": name,
                    "largest difference in loss": worst,
                    "distance over way": measure.distance(start, found[0], expected),
                    "of the step alone": found[2] / seconds,
                    "passed": worst < 0.1 * losses[0],
                }
            )
    return rows


def _random_checks(setup: Setup) -> list[Row]:
    """Check dropout inside of the compiled step: new masks, and the seed fixes them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).to(
        setup.device
    )
    loss_fn = samfn.supervised(model, F.mse_loss)
    optimizer = samfn.sgd(0.0)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    batch = tuple(torch.randn(2, 16, 64, device=setup.device))
    given: Any = {"loss_fn": loss_fn, "optimizer": optimizer, "backend": setup.backend}
    step = samfn.compile_update(**given)
    seen, places = [], set()
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.manual_seed(seed)
        state, metrics = step(state, batch, rho=0.05, lr=torch.tensor(0.0))
        seen.append(metrics.outputs)
        places.add(state.params["0.weight"].data_ptr())
    stays = setup.device == "cpu" or len(places) == 1
    return [
        {
            "check": "dropout differs from step to step",
            "value": "",
            "passed": not torch.equal(seen[2], seen[3]),
        },
        {
            "check": "the seed fixes dropout",
            "value": "",
            "passed": torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]),
        },
        {
            "check": "the state stays at its address",
            "value": len(places),
            "passed": stays,
        },
    ]


def read(path: Path) -> list[Row]:
    """Return the rows of the finished cases."""
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def targets(rows: list[Row], setup: Setup) -> list[Row]:
    """Return each target beside what was measured; "-" where it was not."""
    networks = setup.networks

    def first(case: str, what: str, **wanted: Any) -> Tensor:
        """Return a number; nan where it is missing. A tensor divides by zero quietly."""
        for row in rows:
            if row["case"] == case and all(row.get(k) == v for k, v in wanted.items()):
                return torch.tensor(float(row.get(what, "nan")))
        return torch.tensor(float("nan"))

    def value(role: str, candidate: str, what: str, case: str = "speed") -> Tensor:
        return first(f"{case} {networks.get(role)}", what, candidate=candidate)

    def gain(role: str, over: str = "overwriting eager") -> Tensor:
        return value(role, over, "ms") / value(role, "samfn compiled", "ms")

    def ours(role: str, what: str = "ms") -> Tensor:
        return value(role, "samfn compiled", what)

    limit = first("peak", "TFLOP/s")
    large = "large" if "large" in networks else "small"
    batch_ms = first("data path", "ms")
    lines: list[tuple[str, str, str, Tensor]] = [
        (
            "R1",
            f"SAM / SGD step, {networks[large]}",
            "<= 2.00",
            ours(large) / value(large, "samfn SGD compiled", "ms"),
        ),
        ("R2", "over tuned eager, wrn-28-10", ">= 1.15", gain("large")),
        ("R3", "over tuned eager, wrn-16-8", ">= 1.4", gain("wide")),
        ("R4", "over tuned eager, wrn-16-4", ">= 2.5", gain("small")),
        ("R4", "over tuned eager, wrn-40-2", ">= 4", gain("deep")),
        (
            "R5",
            "over untuned davda54, his network",
            ">= 3",
            gain("davda54", "overwriting untuned"),
        ),
        (
            "R6",
            f"share of the matrix peak, {networks[large]}",
            ">= 0.36",
            ours(large, "TFLOP/s") / limit,
        ),
        (
            "R7",
            "the same, wrn-16-8 / wrn-28-10",
            ">= 1.0",
            ours("wide", "TFLOP/s") / ours("large", "TFLOP/s"),
        ),
        (
            "R8",
            f"parameter operations / step, {networks[large]}",
            "<= 0.02",
            first("parameter operations", "ms") / ours(large),
        ),
        (
            "R9",
            f"host / step, {networks[large]}",
            "<= 0.05",
            ours(large, "host ms") / ours(large),
        ),
        (
            "R10",
            f"CUDA graph over none, {networks['small']}",
            ">= 1.5",
            first("designs", "ms", design="whole, no CUDA graph")
            / first("designs", "ms", design="whole, CUDA graph"),
        ),
        (
            "R14",
            f"memory / tuned eager, {networks[large]}",
            "<= 1.1",
            ours(large, "MiB") / value(large, "overwriting eager", "MiB"),
        ),
        ("", f"augmentation / step, {networks[large]}", "<= 0.03", batch_ms / ours(large)),
        (
            "",
            f"over a compiled model, {networks['small']}",
            ">= 1",
            value("small", "overwriting compiled model", "ms", "compiled model")
            / value("small", "samfn compiled", "ms", "compiled model"),
        ),
    ]
    return [
        {
            "": label,
            "what": what,
            "target": target,
            "measured": _verdict(target, float(seen)),
        }
        for label, what, target, seen in lines
    ]


def _verdict(target: str, seen: float) -> str:
    if seen != seen:
        return "-"
    bound = float(target[3:])
    met = seen <= bound if target.startswith("<=") else seen >= bound
    return f"{seen:.3g}" + ("" if met else " (missed)")


def report(rows: list[Row], setup: Setup) -> str:
    """Return the report as Markdown."""
    about = rows[0] if rows else measure.environment()
    kind = "GPU" if setup.device == "cuda" else "smoke"
    seconds = {row["case"]: row["case_seconds"] for row in rows}
    parts = [
        f"# The compiled step: {kind} report",
        f"{about['date']}, {about['device']}, torch {about['torch']}, Python"
        f" {about['python']}; {setup.precision}, batch {setup.batch};"
        f" {sum(seconds.values()):.0f} s in all. Medians of interleaved rounds;"
        " `python -m bench.gpu`.",
        measure.table(targets(rows, setup), ("", "what", "target", "measured")),
    ]
    hidden = {"case", "case_seconds", *measure.environment()}
    for case in seconds:
        found = [row for row in rows if row["case"] == case]
        columns = list(dict.fromkeys(k for row in found for k in row if k not in hidden))
        parts += [
            f"## {case} ({seconds[case]:.0f} s)",
            measure.table(found, columns),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
