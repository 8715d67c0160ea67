r"""Cost of a step: its time, its compilation, its memory.

    python -m bench.cost steps --case mlp:16:float32 --case wrn-16-2:64:bf16
    python -m bench.cost steps --designs             # samfn's own ways, not the peers
    python -m bench.cost methods --seconds 200 --report methods.md
    python -m bench.cost monitor --case "wrn-10-1 8x8:64:float32"
    python -m bench.cost compiling
    python -m bench.cost memory

A case is a network of `bench/networks.py`, a batch size and a precision. Prints one JSON
line for each candidate and a table for each case; with --output the lines, and with
--report the tables, go to a file too.
"""

import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import tyro
from torch.nn import functional as F

import samfn
from bench import measure
from bench.candidates import (
    DTYPES,
    Gradient,
    Samfn,
    candidates,
    compiled,
    samfn_runners,
    started,
)
from bench.networks import LR, MOMENTUM, RHO, WEIGHT_DECAY, Network, build
from bench.peers import Overwriting, installed, peers
from recipes.roles import Options
from recipes.settings import method_expression
from recipes.terminal import cli
from recipes.terminal.hardware import emulated
from recipes.train.layers import LayerMeter

Row = dict[str, Any]
# Expressions of a method that is not timed with its defaults alone.
EXPRESSIONS = {
    "looksam": ("looksam(k=5)",),
    "multi_step_sam": ("multi_step_sam(2)",),
    "rwp": ("rwp", "rwp(1.0)"),
    "functional_sam": ("functional_sam", "functional_sam(preconditioned)"),
    "on_parameters": ("on_parameters(sam, norm_layers)",),
    "every": ("every(sam, 5)",),
    "sub_batch_ascent": ("sub_batch_ascent(sam, 0.5)", "sub_batch_ascent(sam, 0.25)"),
    "per_micro_batch": ("per_micro_batch(sam, 32)",),
    "accumulated": ("accumulated(sam, 32)",),
    "same_randomness": (),  # The cost is that of the method.
    "loss_scaled": (),
}
# All that the recipe's --method knows.
METHODS = [
    text for name in method_expression.MAKERS for text in EXPRESSIONS.get(name, (name,))
]
# What it cannot name: the methods of another loss, and another optimizer without a method.
OF_A_LOSS = {"ascent_on(sam)": samfn.ascent_on, "on_loss(sam)": samfn.on_loss}
BASELINE, MUON = "SGD", "muon"
OURS, JAX = "samfn compiled", "optax.contrib.sam jitted"
PACKAGES = ("pytorch_optimizer", "optax", "jax")
LONGEST = 60  # steps after which a method has come round


@dataclass(frozen=True, kw_only=True)
class Cost(Options, ABC):
    """A measurement of each case."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK:BATCH:PRECISION; once for each case. None is those of the reports, without
    bf16 on a CPU that has no instructions for it."""
    output: Path | None = None
    """File that the JSON lines are appended to."""
    report: Path | None = None
    """Markdown file to write."""

    cases: ClassVar[tuple[str, ...]] = ("wrn-16-2:64:float32",)

    @abstractmethod
    def rows(self, case: str) -> list[Row]:
        """Return a row for each candidate."""

    def summary(self, found: Mapping[str, list[Row]]) -> str:
        """Return a part of the report on the rows of all cases, or nothing."""
        return ""


def main(options: Cost) -> None:
    """Measure all cases, and report."""
    torch._dynamo.config.recompile_limit = 64  # Peers share the code of their modules.
    if isinstance(options, Apart) and options.only is not None:
        (case,) = options.case
        print(json.dumps(options.here(case, options.only)))
        return
    found, parts = {}, []
    for case in options.case or default_cases(options.cases):
        rows = found[case] = options.rows(case)
        for row in rows:
            measure.emit({"case": case} | measure.environment() | row, options.output)
        parts.append(f"## {case}\n\n{measure.table(rows, tuple(rows[0]))}")
        print(f"\n{parts[-1]}\n", flush=True)
    about = [inspect.cleandoc(type(options).__doc__ or "")]
    if summary := options.summary(found):
        about.append(summary)
        print(summary, flush=True)
    if options.report is not None:
        title = f"What a step costs: {type(options).__name__.lower()}"
        text = measure.page(title, about + parts, "bench.cost")
        options.report.write_text(text, encoding="utf-8")


def default_cases(cases: Sequence[str]) -> list[str]:
    """Return the cases but those that this machine emulates; say which are left out."""
    left_out = [case for case in cases if emulated(DTYPES[case.split(":")[2]])]
    if left_out:
        print(
            f"bf16 is emulated on this CPU; left out: {', '.join(left_out)}; --case takes"
            " them all the same"
        )
    return [case for case in cases if case not in left_out]


def load(case: str, device: str = "cpu") -> tuple[Network, str]:
    """Return the network and the precision of a case."""
    name, *rest = case.split(":")
    if len(rest) != 2 or not rest[0].isdecimal() or rest[1] not in DTYPES:
        raise SystemExit(f"--case: expected NETWORK:BATCH:PRECISION, got {case!r}")
    return build(name, int(rest[0]), device), rest[1]


@dataclass(frozen=True, kw_only=True)
class Steps(Cost):
    """Time of a step, beside every peer.

    All candidates are made in one process, checked to train alike, and timed in turns.
    "ms" is the median over the rounds with its 20 % and 80 % quantiles, of one step, also
    where a call takes several; "of peak" the share of a large matrix product's rate in the
    same precision; "of samfn" the median of the ratios, round by round, to the compiled SAM
    step; "apart" the distance from eager samfn after three calls, relative to the way;
    "first s" the first call, with its compilation and whatever a cache held.
    """

    seconds: float = 20.0
    """Time spent on each case, after everything is compiled."""
    designs: bool = False
    """Designs of the compiled step as candidates, in place of the peers."""

    cases: ClassVar[tuple[str, ...]] = (
        "mlp:16:float32",
        "transformer:16:float32",
        "wrn-10-1 8x8:16:float32",
        "wrn-16-2:64:float32",
        "wrn-16-2:64:bf16",
        "wrn-16-2:128:float32",
        "wrn-16-2:128:bf16",
    )

    def rows(self, case: str) -> list[Row]:
        """Time every candidate."""
        network, precision = load(case)
        flops = measure.forward_operations(network.model, network.inputs)
        peak = measure.peak_flops(DTYPES[precision] or torch.float32, "cpu", self.seconds)
        found = candidates(network, precision, designs=self.designs)
        steps = {c.name: c.runner.step for c in found}
        calls = measure.interleaved(steps, seconds=self.seconds)
        times = {c.name: [t / c.runner.steps for t in calls[c.name]] for c in found}
        return [
            {
                "candidate": c.name,
                **measure.milliseconds(times[c.name]),
                "images/s": len(network.inputs) / median,
                # A backward pass is two forward ones.
                "of peak": (3 if "SGD" in c.name else 6) * flops / median / peak,
                "of samfn": measure.ratios(times[c.name], times[OURS])["median"],
                "kernels": len(measure.kernels(c.runner.step)) / c.runner.steps,
                "apart": c.apart,
                "first s": c.first_call_seconds,
            }
            for c in found
            for median in [measure.quantiles(times[c.name])["median"]]
        ]

    def summary(self, found: Mapping[str, list[Row]]) -> str:
        """Return a table of how many times as fast as its peers the compiled step is."""
        if self.designs:
            return ""
        rows = [short(case, rows) for case, rows in found.items()]
        there = [f"{name} {version(name)}" for name in PACKAGES if installed(name)]
        return (
            "## In short\n\nHow many times as fast as each peer the compiled SAM step is,"
            "\nof one step a call, and of the most that a call takes of both; its time over"
            "\nthat of the compiled SGD step; and the time of the eager step over that of"
            f"\npytorch_optimizer's.\n\n{measure.table(rows, tuple(rows[0]))}\n\n"
            f"Peers: {', '.join(there) or 'no package'}."
        )


def short(case: str, rows: Sequence[Row]) -> Row:
    """Return the row of the summary on a case."""
    network, batch, precision = case.split(":")
    times = {row["candidate"]: row["of samfn"] for row in rows}
    jax = {name: time for name, time in times.items() if "optax.contrib.sam" in name}
    several = [name.partition(", ")[2] for name in jax if ", " in name]
    together = [
        jax[f"{JAX}, {steps}"] / times[f"{OURS}, {steps}"] for steps in several[-1:]
    ]
    torch_peers = [
        time
        for name, time in times.items()
        if "samfn" not in name and "SGD" not in name and name not in jax
    ]
    packaged = [time for name, time in times.items() if "pytorch_optimizer" in name]
    return {
        "network": network,
        "batch": batch,
        "precision": precision,
        "compiled ms": next(row["ms"] for row in rows if row["candidate"] == OURS),
        "pytorch_optimizer": min(packaged, default=math.nan),
        "fastest PyTorch peer": min(torch_peers),
        "optax under JAX": jax.get(JAX, "–"),
        "both, several steps a call": next(iter(together), "–"),
        "SAM / SGD": 1 / times["samfn SGD compiled"],
        "eager samfn / pytorch_optimizer": times["samfn eager"]
        / times.get("pytorch_optimizer eager", math.nan),
    }


class Stepper:
    """Trains a network by a method, compiled."""

    def __init__(
        self, network: Network, precision: str, method: str, *, watch: bool = False
    ) -> None:
        plain = method in (BASELINE, MUON)
        text = "sam" if plain or method in OF_A_LOSS else method
        names = samfn.norm_parameters(network.model)
        made = method_expression.parse(text, steps=1000, norm_layers=names)
        if around := OF_A_LOSS.get(method):
            smooth = partial(F.cross_entropy, label_smoothing=0.1)
            other = samfn.supervised(network.model, smooth, dtype=DTYPES[precision])
            made = around(made, other)
        if watch:
            made = samfn.watched(made)
        criterion = partial(F.cross_entropy, reduction="none")
        loss_fn = samfn.supervised(network.model, criterion, dtype=DTYPES[precision])
        optimizer = samfn.sgd(MOMENTUM, weight_decay=WEIGHT_DECAY)
        if method == MUON:
            params, _ = samfn.split(network.model)
            vectors = [name for name, weight in params.items() if weight.ndim < 2]
            optimizer = samfn.grouped(samfn.muon(), (vectors, optimizer))
        common: dict[str, Any] = {"optimizer": optimizer, "method": made}
        self._state = samfn.init(*samfn.split(network.model), **common)
        self._update = samfn.compile_update(loss_fn=loss_fn, **common)
        self._batch = network.inputs, network.targets
        self._rho = 0.0 if plain else RHO
        meter = LayerMeter(len(self._state.params), network.inputs.device)
        self._watcher = meter if watch else None
        self.period = period(made)

    def step(self) -> None:
        """Take as many steps as it takes to come round."""
        for _ in range(self.period):
            self._state, metrics = self._update(
                self._state, self._batch, rho=self._rho, lr=LR
            )
            if self._watcher is not None:
                self._watcher.add(metrics)


def period(method: samfn.Method) -> int:
    """Return after how many steps the kinds of step of a method repeat."""
    if method.kind is None:
        return 1
    kinds = [method.kind(step) for step in range(2 * LONGEST)]
    for length in range(1, LONGEST + 1):
        if kinds[length:] == kinds[:-length]:
            return length
    raise ValueError(f"no period below {LONGEST} steps")


@dataclass(frozen=True, kw_only=True)
class Apart(Cost):
    """A measurement of each candidate in a process of its own."""

    only: str | None = None
    """Measure this candidate in this process, and print the number."""

    @abstractmethod
    def here(self, case: str, name: str) -> float:
        """Return what this process measures of a candidate."""

    def apart(self, case: str, name: str, **variables: str) -> float:
        """Return what a process of its own measures of a candidate."""
        command = [sys.executable, "-m", "bench.cost", type(self).__name__.lower()]
        run = subprocess.run(
            [*command, "--case", case, "--only", name],
            env=os.environ | variables,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return float(run.stdout.split()[-1])

    def memory(self, case: str, name: str) -> float:
        """Return `apart` of memory."""
        # glibc then gives every larger block back at once, so that a peak is one step's.
        return self.apart(case, name, MALLOC_MMAP_THRESHOLD_="65536")


def peak_of(step: Callable[[], Any]) -> float:
    """Return the bytes that a step needs at its peak, once it is compiled."""
    for _ in range(3):
        step()
    return measure.peak_memory(step)


def before(name: str) -> str:
    """Return what the step of SGD is called that is timed before one of a method."""
    return BASELINE if name == BASELINE else f"{BASELINE} before {name}"


@dataclass(frozen=True, kw_only=True)
class Methods(Apart):
    """Cost of a step of each method, in time and memory, relative to one of SGD.

    All are compiled, in one process, and timed in turns, each behind a step of SGD. "of
    SGD" is the median over the rounds of the ratio of these two; where steps of a method
    differ, of their mean until they come round. The cost of ae_sam depends on the
    gradients: on one batch again and again, as here, its gate is shut; while it is open, a
    step costs what one of sam does. "peak MiB" is what the costliest of a method's kinds of
    step needs at its peak beside weights, memory and batch, each method in a process of its
    own, as `memory` measures it.
    """

    seconds: float = 300.0
    """Time spent on each case, after everything is compiled."""
    method: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Methods to time beside SGD; none is all of them."""

    def rows(self, case: str) -> list[Row]:
        """Time the methods."""
        network, precision = load(case)
        made = {}
        for name in (BASELINE, *(self.method or (*METHODS, *OF_A_LOSS, MUON))):
            made[name] = Stepper(network, precision, name)
            measure.timed(made[name].step, 2)  # Compiles.
        turns: dict[str, Callable[[], Any]] = {}
        for name, stepper in made.items():
            turns |= {before(name): made[BASELINE].step, name: stepper.step}
        times = measure.interleaved(turns, seconds=self.seconds)
        seen = {n: [t / stepper.period for t in times[n]] for n, stepper in made.items()}
        return [
            {
                "method": name,
                **measure.milliseconds(seen[name]),
                "of SGD": measure.ratios(seen[name], times[before(name)])["median"],
                "peak MiB": self.memory(case, name) / 2**20,
            }
            for name in made
        ]

    def here(self, case: str, name: str) -> float:
        """Return the bytes that a step needs at its peak."""
        network, precision = load(case, "cuda" if torch.cuda.is_available() else "cpu")
        return peak_of(Stepper(network, precision, name).step)


@dataclass(frozen=True, kw_only=True)
class Monitor(Cost):
    """Cost of watching every layer.

    A compiled step of SAM that also measures each parameter's gradient, perturbation,
    update, weight and cosine, and adds them up, against the same step without; in turns,
    in one process. "ratio" is the median over the rounds, with its 20 % and 80 % quantiles.
    """

    seconds: float = 120.0
    """Time spent on each case, after everything is compiled."""

    def rows(self, case: str) -> list[Row]:
        """Time a step that watches against one that does not."""
        network, precision = load(case)
        plain, watched = (
            Stepper(network, precision, "sam", watch=watch).step for watch in (False, True)
        )
        for step in (plain, watched):
            measure.timed(step, 3)
        both = {"plain": plain, "watched": watched}
        seen = measure.interleaved(both, seconds=self.seconds)
        ratios = measure.ratios(seen["watched"], seen["plain"])
        return [
            {
                "ms": measure.milliseconds(seen["plain"])["ms"],
                "ms watched": measure.milliseconds(seen["watched"])["ms"],
                "ratio": ratios["median"],
                "q20": ratios["q20"],
                "q80": ratios["q80"],
                "parameters": len(samfn.split(network.model)[0]),
            }
        ]


@dataclass(frozen=True, kw_only=True)
class Compiling(Apart):
    """Time of compilation, in fresh processes: with an empty cache, and a full one.

    It is the first call of a step less a later one: tracing, compiling and, with a full
    cache, loading. Headers that PyTorch precompiles once for a machine are there. "one
    gradient" is what a single pass would cost.
    """

    cases: ClassVar[tuple[str, ...]] = (
        "mlp:16:float32",
        "wrn-10-1 8x8:16:float32",
        "wrn-16-2:64:float32",
    )

    def rows(self, case: str) -> list[Row]:
        """Compile all candidates."""
        found = {name: self.cold_and_warm(case, name) for name in makers(case)}
        single = found["one gradient"][0]
        return [
            {
                "candidate": name,
                "cold s": cold,
                "warm s": warm,
                "of one gradient": cold / single,
                "warm of cold": warm / cold,
            }
            for name, (cold, warm) in found.items()
        ]

    def cold_and_warm(self, case: str, name: str) -> tuple[float, float]:
        """Compile twice, in processes that share an empty cache; return the seconds."""
        with tempfile.TemporaryDirectory() as cache:
            cold = self.apart(case, name, TORCHINDUCTOR_CACHE_DIR=cache)
            return cold, self.apart(case, name, TORCHINDUCTOR_CACHE_DIR=cache)

    def here(self, case: str, name: str) -> float:
        """Return the seconds that compiling takes."""
        runner, first = started(makers(case)[name])
        (later,) = measure.interleaved({name: runner.step}, seconds=0, rounds=1)[name]
        return first - later


def makers(case: str) -> dict[str, Callable[[], Any]]:
    """Return what is compiled, by name."""
    network, precision = load(case)
    dtype = DTYPES[precision]

    def ours(rho: float = RHO, **settings: Any) -> Callable[[], Any]:
        return lambda: Samfn(network, dtype, rho, compiled(**settings))

    return {
        "one gradient": lambda: Gradient(network, dtype),
        "samfn compiled": ours(),
        "samfn whole": ours(plan="whole"),
        "samfn gradient": ours(plan="gradient"),
        "samfn SGD compiled": ours(0.0),
        "overwriting compiled model": lambda: Overwriting(
            network, dtype, tuned=True, compiled=True
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Memory(Apart):
    """Memory of a step at its peak, beside every peer.

    Each candidate runs in a process of its own. On a GPU it is what PyTorch allocated at
    the peak; on a CPU (Linux) what the process grew by while it took three steps, after
    three more.
    """

    cases: ClassVar[tuple[str, ...]] = ("wrn-16-2:128:float32",)

    def rows(self, case: str) -> list[Row]:
        """Measure the peak of all candidates."""
        peaks = {name: self.memory(case, name) / 2**20 for name in runners(case)}
        ours = peaks["samfn compiled"]
        return [
            {
                "candidate": name,
                "peak MiB": peak,
                "of samfn": peak / ours if ours else math.nan,
            }
            for name, peak in peaks.items()
        ]

    def here(self, case: str, name: str) -> float:
        """Return the bytes that a step needs at its peak."""
        return peak_of(runners(case)[name]().step)


def runners(case: str) -> dict[str, Callable[[], Any]]:
    """Return what makes every way to take a step, by name."""
    network, precision = load(case, "cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[precision]
    return {
        name: make
        for sam in (True, False)
        for name, make in (
            samfn_runners(network, dtype, sam=sam) | peers(network, dtype, sam=sam)
        ).items()
    }


if __name__ == "__main__":
    parts: Any = Steps | Methods | Monitor | Compiling | Memory
    main(cli.parsed(parts, prog="python -m bench.cost", description=__doc__))
