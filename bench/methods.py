r"""What a step of each method costs, relative to one of SGD, all of them compiled.

    python -m bench.methods --network wrn-16-2 --batch 64

All are made in one process and timed in turns. Methods whose steps differ are timed over
as many steps as they need to come round. Prints one JSON line for each method, and a table.
"""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F

import samfn
from bench import measure
from bench.candidates import DTYPES
from bench.networks import Network, build
from bench.peers import LR, MOMENTUM, RHO, WEIGHT_DECAY
from recipes.settings import method_expression

# As the recipe's --method reads them.
METHODS = (
    "sam",
    "asam",
    "fisher_sam",
    "gsam",
    "wsam",
    "friendly_sam",
    "vasso",
    "momentum_sam",
    "looksam(k=5)",
    "multi_step_sam(2)",
    "esam",
    "ae_sam",
    "on_parameters(sam, norm_layers)",
    "every(sam, 5)",
    "sub_batch_ascent(sam, 0.5)",
    "sub_batch_ascent(sam, 0.25)",
    "per_micro_batch(sam, 32)",
    "accumulated(sam, 32)",
)
BASELINE = "SGD"
COLUMNS = ("method", "ms", "q20", "q80", "of SGD", "first s")
LONGEST = 60  # steps after which a method has come round


@dataclass(frozen=True)
class Options:
    """What is timed, and for how long."""

    network: str = "wrn-16-2"
    """A network of `bench/networks.py`."""
    batch: int = 64
    """Examples in a batch."""
    precision: str = "float32"
    """float32 or bf16."""
    seconds: float = 300.0
    """Time spent after everything is compiled."""
    method: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Methods to time beside SGD; none is all of them."""
    output: Path | None = None
    """File that the JSON lines are appended to."""
    report: Path | None = None
    """Markdown file to write."""


class Stepper:
    """A method that trains a network, compiled."""

    def __init__(self, network: Network, precision: str, expression: str) -> None:
        text = "sam" if expression == BASELINE else expression
        names = samfn.norm_parameters(network.model)
        method = method_expression.parse(text, steps=1000, norm_layers=names)
        criterion = partial(F.cross_entropy, reduction="none")
        loss_fn = samfn.supervised(network.model, criterion, dtype=DTYPES[precision])
        optimizer = samfn.sgd(MOMENTUM, weight_decay=WEIGHT_DECAY)
        common: dict[str, Any] = {"optimizer": optimizer, "method": method}
        self._state = samfn.init(*samfn.split(network.model), **common)
        self._update = samfn.compile_update(loss_fn=loss_fn, **common)
        self._batch = network.inputs, network.targets
        self._rho = 0.0 if expression == BASELINE else RHO
        self.period = period(method)

    def step(self) -> None:
        """Take as many steps as it takes to come round."""
        for _ in range(self.period):
            self._state, _ = self._update(self._state, self._batch, rho=self._rho, lr=LR)


def period(method: samfn.Method) -> int:
    """Return after how many steps the kinds of step of a method repeat."""
    if method.kind is None:
        return 1
    kinds = [method.kind(step) for step in range(2 * LONGEST)]
    for length in range(1, LONGEST + 1):
        if kinds[length:] == kinds[:-length]:
            return length
    raise ValueError(f"no period below {LONGEST} steps")


def main(options: Options) -> None:
    """Time all methods."""
    torch._dynamo.config.recompile_limit = 64
    network = build(options.network, options.batch)
    made, first = {}, {}
    for name in (BASELINE, *(options.method or METHODS)):
        stepper = Stepper(network, options.precision, name)
        first[name] = sum(measure.timed(stepper.step, 1) for _ in range(2))
        made[name] = stepper
    times = measure.interleaved(
        {name: stepper.step for name, stepper in made.items()}, seconds=options.seconds
    )
    seen = {
        name: [value / made[name].period for value in values]
        for name, values in times.items()
    }
    rows = [row(name, seen, first[name]) for name in made]
    case = f"{options.network}:{options.batch}:{options.precision}"
    for line in rows:
        measure.emit({"case": case} | measure.environment() | line, options.output)
    text = report(
        case, rows, " ".join(["python -m bench.methods", *map(shlex.quote, sys.argv[1:])])
    )
    print(f"\n{text}")
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


def report(case: str, rows: list[dict[str, Any]], command: str) -> str:
    """Return the report as Markdown."""
    about = measure.environment()
    return f"""# What a step of each method costs: {case}

All compiled, in one process, timed in turns. "of SGD" is the median over the rounds of
the ratio in a round; of methods whose steps differ, of the mean step until they come
round. What ae_sam takes depends on the gradients: here, on one batch again and again, its
gate is shut, and one that is open costs what sam does. "first s" is the time of the first
two rounds, in which everything is compiled.

{measure.table(rows, COLUMNS)}

{about["date"]}, {about["device"]}, torch {about["torch"]}, Python {about["python"]}.

```
{command}
```
"""


def row(name: str, seen: dict[str, list[float]], first: float) -> dict[str, Any]:
    """Return what is reported of a method."""
    quantiles = measure.quantiles(seen[name])
    # Round by round, so that what slows the machine for a while slows both.
    ratios = [a / b for a, b in zip(seen[name], seen[BASELINE], strict=True)]
    return {
        "method": name,
        "ms": 1e3 * quantiles["median"],
        "q20": 1e3 * quantiles["q20"],
        "q80": 1e3 * quantiles["q80"],
        "of SGD": measure.quantiles(ratios)["median"],
        "first s": first,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
