"""What the suite of a GPU found, beside its targets."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.gpu.setup import Row, Setup


def read(path: Path) -> list[Row]:
    """Return the rows of the finished cases."""
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def finished(path: Path) -> set[str]:
    """Return the names of the cases that a file holds."""
    return {row["case"] for row in read(path)}


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
            f"kernels on all weights / step, {networks[large]}",
            "<= 0.02",
            ours(large, "weights ms") / ours(large),
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
    parts = [
        f"# The compiled step: {kind} report",
        f"{about['date']}, {about['device']}, torch {about['torch']}, Python"
        f" {about['python']}; {setup.precision}, batch {setup.batch}. Medians of"
        " interleaved rounds; `python -m bench.gpu`.",
        measure.table(targets(rows, setup), ("", "what", "target", "measured")),
    ]
    hidden = {"case", "case_seconds", *measure.environment()}
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [row for row in rows if row["case"] == case]
        columns = list(dict.fromkeys(k for row in found for k in row if k not in hidden))
        parts += [
            f"## {case}",
            measure.table(found, columns),
        ]
    return "\n\n".join(parts) + "\n"
