r"""Compare settings of the recipe at equal epochs, over several seeds.

    python -m bench.compare NAME --arm "SGD: --rho 0" --arm "SAM: --rho 0.05" \
        -- --data digits --epochs 20

What follows the lone -- goes to every arm.
Runs every arm with every seed, seeds outermost, so that what slows the machine slows all
arms. Prints one JSON line a run, and writes a dated report and picture to
bench/results/. A run that is finished already, below runs/NAME/, is not run again.
"""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench.measure import RESULTS, cpu_name
from recipes import plots
from recipes.config import CONFIG_FILE, Config, parse, read_toml
from recipes.rundir import RunDirectory

WALL = "wall_seconds"  # file in a run's directory: of the whole command


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    name: Annotated[str, tyro.conf.Positional]
    """Of the report, as label_noise."""
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A label, a colon, and flags of the recipe; once for each arm."""
    seeds: int = 3
    """Runs of each arm."""
    title: str = ""
    """Of the picture and the report."""
    times: bool = True
    """Report the seconds of an epoch and of a run; not where runs shared the machine."""


class Arm:
    """One setting and its finished runs."""

    def __init__(self, text: str) -> None:
        label, colon, flags = text.partition(":")
        if not colon:
            raise SystemExit(f"--arm: expected 'label: flags', got {text!r}")
        self.label, self.flags = label.strip(), flags.strip()
        self.runs: list[list[dict[str, Any]]] = []
        self.walls: list[float] = []

    def last(self) -> list[float]:
        """Return the test accuracy of the last epoch, one for each seed."""
        return [rows[-1]["test_accuracy"] for rows in self.runs]

    def best(self) -> list[float]:
        """Return the highest test accuracy of any epoch, one for each seed."""
        return [max(row["test_accuracy"] for row in rows) for rows in self.runs]

    def wall(self) -> str:
        """Return the median time of the whole command, of runs in one piece."""
        return f"{statistics.median(self.walls):.0f}" if self.walls else "not measured"

    def seconds(self) -> float:
        """Return the median time of a training epoch."""
        times: list[float] = [row["seconds"] for rows in self.runs for row in rows]
        return statistics.median(times)


def main() -> None:
    """Run what is missing, then write the report."""
    own, common = sys.argv[1:], ""
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
        common = shlex.join(rest)
    comparison = tyro.cli(Comparison, prog="python -m bench.compare", args=own)
    arms = [Arm(text) for text in comparison.arm]
    for seed in range(comparison.seeds):
        for arm in arms:
            output = Path("runs") / comparison.name / f"{slug(arm.label)}-{seed}"
            rows = run(output, f"{common} {arm.flags} --seed {seed}")
            arm.runs.append(rows)
            if (output / WALL).exists():
                arm.walls.append(float((output / WALL).read_text()))
            case = {"arm": arm.label, "seed": seed, "last": arm.last()[-1]}
            case |= {"best": arm.best()[-1], "epoch_seconds": rows[-1]["seconds"]}
            print(json.dumps(case), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = RESULTS / f"{comparison.name}_{time.strftime('%Y-%m-%d')}"
    draw(arms, stem.with_suffix(".png"), comparison.title or comparison.name)
    stem.with_suffix(".md").write_text(report(comparison, arms, common, stem.name))
    print(stem.with_suffix(".md").read_text())


def run(output: Path, flags: str) -> list[dict[str, Any]]:
    """Train into `output`, or go on there, and return the rows of its metrics."""
    directory, asked = RunDirectory(output), shlex.split(flags)
    config = replace(parse(asked), preset="none")
    asked += ["--output", str(output)]
    if (output / CONFIG_FILE).exists():
        saved = Config(**read_toml(output / CONFIG_FILE))
        if config.compile == "auto":  # A run decides it.
            config = replace(config, compile=saved.compile)
        if saved != config:
            raise SystemExit(f"{output} holds a run of other settings: move it away")
        asked = ["--resume", str(output)]
    if len(directory.rows()) < config.epochs:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "recipes.cifar_wrn", *asked], check=True)
        if "--resume" not in asked:  # The time of a part would pass for that of the run.
            (output / WALL).write_text(f"{time.perf_counter() - started:.1f}\n")
    return directory.rows()


def draw(arms: list[Arm], path: Path, title: str) -> None:
    """Draw curves, or points where there would be too many curves."""
    if len(arms) <= len(plots.COLOURS):
        series = {arm.label: [accuracies(rows) for rows in arm.runs] for arm in arms}
        plots.comparison(series, path, title)
    else:
        last, best = ({a.label: f(a) for a in arms} for f in (Arm.last, Arm.best))
        plots.ranking(last, best, path, title)


def accuracies(rows: list[dict[str, Any]]) -> list[float]:
    """Return the test accuracy of every epoch."""
    return [row["test_accuracy"] for row in rows]


def report(comparison: Comparison, arms: list[Arm], common: str, stem: str) -> str:
    """Return the report as Markdown."""
    columns = ["", "last epoch", "best epoch"]
    table = [[arm.label, spread(arm.last()), spread(arm.best())] for arm in arms]
    if comparison.times:
        columns += ["s/epoch", f"against {arms[0].label}", "s/run"]
        for cells, arm in zip(table, arms, strict=True):
            ratio = arm.seconds() / arms[0].seconds()
            cells += [f"{arm.seconds():.2f}", f"{ratio:.2f}", arm.wall()]
    rule = ["---"] * len(columns)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, rule, *table)]
    command = [f"python -m bench.compare {comparison.name} --seeds {comparison.seeds}"]
    command += [f'--title "{comparison.title}"'] if comparison.title else []
    command += ["--no-times"] * (not comparison.times)
    command += [f'--arm "{arm.label}: {arm.flags}"' for arm in arms]
    command += [f"-- {common}"]
    rows = [
        f"# {comparison.title or comparison.name}",
        "",
        f"![Test accuracy by epoch]({stem}.png)",
        "",
        f"Test accuracy in percent, mean ± standard deviation of {comparison.seeds} seeds;"
        " the best epoch is chosen by the test set."
        + " Seconds are the median of all training epochs, without evaluation, and that of"
        " the whole command with imports and all." * comparison.times,
        "",
        *lines,
        "",
        f"{time.strftime('%Y-%m-%d')}, {hardware()}, torch {torch.__version__},"
        f" Python {platform.python_version()}.",
        "",
        "```",
        " \\\n    ".join(command),
        "```",
        "",
    ]
    return "\n".join(rows)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def hardware() -> str:
    """Return what the runs were computed on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {cpu_name()}"


def slug(label: str) -> str:
    """Return a label as the name of a directory."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in label.lower())


if __name__ == "__main__":
    main()
