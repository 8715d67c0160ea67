"""What watching every layer costs a compiled step of SAM.

    python -m bench.monitor --case wrn-16-2:64 --case "wrn-10-1 8x8:64"

Both steps are made in one process and timed in turns, the watched one with the sums that
the recipe's --monitor keeps. Prints a line for each case, and a table.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from torch.nn import functional as F

import samfn
from bench import measure
from bench.networks import Network, build
from bench.peers import LR, MOMENTUM, RHO, WEIGHT_DECAY
from recipes.train.layers import LayerMeter

COLUMNS = ("case", "ms", "ms watched", "ratio", "q20", "q80", "parameters")


@dataclass(frozen=True)
class Options:
    """What is timed, and for how long."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK:BATCH, a network of `bench/networks.py`; none is wrn-16-2:64."""
    seconds: float = 120.0
    """Time spent on each case after everything is compiled."""
    report: Path | None = None
    """Markdown file to write."""


def stepper(network: Network, watch: bool) -> Callable[[], None]:
    """Return what takes one step after the other."""
    loss_fn = samfn.supervised(network.model, partial(F.cross_entropy, reduction="none"))
    optimizer = samfn.sgd(MOMENTUM, weight_decay=WEIGHT_DECAY)
    state = samfn.init(*samfn.split(network.model), optimizer=optimizer)
    method = samfn.watched(samfn.sam()) if watch else samfn.sam()
    update = samfn.compile_update(loss_fn=loss_fn, optimizer=optimizer, method=method)
    meter = LayerMeter(len(state.params), network.inputs.device)

    def step() -> None:
        nonlocal state
        batch = network.inputs, network.targets
        state, metrics = update(state, batch, rho=RHO, lr=LR)
        if watch:
            meter.add(metrics)

    return step


def timed(case: str, seconds: float) -> dict[str, Any]:
    """Return what watching costs in one case."""
    name, _, batch = case.rpartition(":")
    network = build(name, int(batch))
    steps = {text: stepper(network, text == "watched") for text in ("plain", "watched")}
    for step in steps.values():
        measure.timed(step, 3)
    seen = measure.interleaved(steps, seconds=seconds)
    ratios = [a / b for a, b in zip(seen["watched"], seen["plain"], strict=True)]
    spread = measure.quantiles(ratios)
    median = {text: measure.quantiles(values)["median"] for text, values in seen.items()}
    return {
        "case": case,
        "ms": 1e3 * median["plain"],
        "ms watched": 1e3 * median["watched"],
        "ratio": spread["median"],
        "q20": spread["q20"],
        "q80": spread["q80"],
        "parameters": len(samfn.split(network.model)[0]),
    }


def main(options: Options) -> None:
    """Time all cases."""
    rows = [timed(case, options.seconds) for case in options.case or ("wrn-16-2:64",)]
    about = measure.environment()
    command = " ".join(["python -m bench.monitor", *map(shlex.quote, sys.argv[1:])])
    text = f"""# What watching every layer costs

A compiled step of SAM that also measures each parameter's gradient, perturbation, update,
weight and cosine, and adds them up, against the same step without; in turns, in one
process. "ratio" is the median over the rounds, with its 20 % and 80 % quantiles.

{measure.table(rows, COLUMNS)}

{about["date"]}, {about["device"]}, torch {about["torch"]}, Python {about["python"]}.

```
{command}
```
"""
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
