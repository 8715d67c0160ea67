"""Many runs of the recipe that belong together: arms, each with several seeds.

An arm is a label and settings; with a seed it is a cell, and each cell leaves an ordinary
run directory below that of the study. What is finished is read, what was interrupted goes
on exactly, and what is missing is run. So the same command goes on where it was ended, and
one with more arms or seeds adds these.
"""

import hashlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import samfn
from recipes import errors
from recipes.data.sources import Dataset, Say, Track
from recipes.errors import ConfigError, DivergedError
from recipes.roles import DECIDING, Options, Range, Role, require, setting
from recipes.settings.config import SETTINGS, Config, changes, plain_values, validate
from recipes.settings.resolve import configure
from recipes.settings.saved import CONFIG_FILE, of_run
from recipes.study.groups import Group, best, group_of, last, listed, seconds
from recipes.study.report import Page, called, files_of, show, write
from recipes.study.runs import make_directory, make_way
from recipes.terminal import cli
from recipes.terminal.console import Display, duration
from recipes.terminal.signals import Signals, Stopped
from recipes.train import recorded, running
from recipes.train.build import Read, read_data
from recipes.train.directory import RunDirectory
from recipes.train.pretrained import digest
from recipes.train.recorded import Recorded
from samfn.storage import files

LEFT = "the same command goes on"  # when a signal ends a study


class Cell(NamedTuple):
    """One run of a study."""

    label: str
    """Label of the arm."""
    config: Config
    """Settings of the arm, with the seed of this run."""
    path: Path


Arm = tuple[str, Config]
"""Label and settings."""
Common = Callable[..., Config]
"""Flags of an arm -> settings of the recipe, with those flags that all arms have."""
Report = Callable[[Sequence[Group]], None]
"""Writes what is known of the arms so far."""


@dataclass(frozen=True)
class Settings(Options):
    """Settings of every study."""

    seeds: int = setting(3, Range(lambda seeds: 1 <= seeds <= 1000, "1 to 1000"))
    """Runs of each arm, with seeds from the recipe's --seed on."""
    output: Path = Path("runs/study")
    """Directory of all runs, tables and pictures. Runs of this study that it holds are not
    run again."""


class Study(NamedTuple):
    """A command that makes arms, and its page about them."""

    name: str
    """Name of the module of recipes, and of the report's files."""
    settings: type[Settings]
    varied: Collection[str]
    """Settings of the recipe that differ from arm to arm."""
    arms: Callable[[Any, Common], Sequence[Arm]]
    """Settings of the study, and what makes those of the recipe -> arms."""
    page: Callable[[Any, Sequence[Group]], Page]
    """Settings of the study, and what is known of the arms -> what is reported."""


def conduct(study: Study, about: str | None, args: Sequence[str] | None) -> int:
    """Run what is missing of a study, and report; return the exit code."""
    given = sys.argv[1:] if args is None else args
    program = f"python -m recipes.{study.name}"
    own, flags = split(given)

    def body(display: Display, signals: Signals) -> int:
        settings = cli.parsed(study.settings, prog=program, args=own, description=about)
        require(settings.ranges(), vars(settings))
        say = cache(display.say)  # Once, not for each arm.
        arms = study.arms(settings, lambda *f: common([*flags, *f], study.varied, say))
        cells = plan(arms, settings.seeds, settings.output)
        written: dict[str, str] = {}

        def report(groups: Sequence[Group]) -> None:
            command, device = called(program, given), cells[0].config.device
            page, output = study.page(settings, groups), settings.output
            make_way(output, files_of(study.name), program, display.warn)
            written.update(write(page, command, device, output, study.name))

        groups = run(cells, settings.output, display, signals, report)
        show(study.page(settings, groups), display)
        display.facts(study.name.replace("_", " "), written)
        return 0

    return cli.run(body, LEFT)


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of a command, and those of the recipe that follow a lone --."""
    if "--" not in args:
        return [*args], []
    cut = [*args].index("--")
    return [*args[:cut]], [*args[cut + 1 :]]


def common(
    flags: Sequence[str], varied: Collection[str] = (), say: Say = lambda line: None
) -> Config:
    """Return the settings that all runs of a study have.

    Args:
        flags: of the recipe.
        varied: settings that the study gives its arms.
        say: is told where the images come from.

    Raises:
        ConfigError: a flag is one that a study cannot have, or cannot be used.
        DataError: there are no images where they should be.
    """
    for flag in (flag.partition("=")[0] for flag in flags if flag.startswith("--")):
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if name in varied:
            raise ConfigError(f"{flag}: the runs differ in it, drop it after --")
        if name in SETTINGS and SETTINGS[name].role is Role.ONE_RUN:
            raise ConfigError(f"{flag}: it is for one run alone, drop it")
    config = configure(flags, say)
    if "trackio" in config.recording.log:
        raise ConfigError("--log: trackio logs one run of a process, the others any number")
    return config


def plan(arms: Sequence[Arm], seeds: int, output: Path) -> list[Cell]:
    """Return the runs of a study, seeds outermost.

    Args:
        arms: labels and settings.
        seeds: how many, from that of the settings on.
        output: directory of the study.

    Raises:
        ConfigError: there is nothing to run, the settings of an arm are out of range, or
            two labels are one to a file system.
    """
    if not arms:
        raise ConfigError("expected at least one arm, got none")
    known = dict[str, str]()
    for label, config in arms:
        try:
            validate(replace(config, seed=config.seed + seeds - 1))
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from error
        if (other := known.setdefault(slug(label), label)) != label:
            text = f"expected labels that differ by more than case: {[other, label]}"
            raise ConfigError(text)
    if len(known) < len(arms):
        labels = [label for label, _ in arms]
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(f"expected different arms, got {twice} twice")
    return [
        Cell(label, seeded, output / f"{slug(label)}-seed{seeded.seed}")
        for index in range(seeds)
        for label, config in arms
        for seeded in [replace(config, seed=config.seed + index)]
    ]


def slug(label: str) -> str:
    """Return a label as part of a file name, another for each but for case."""
    lower = label.lower()  # Some file systems do not tell "SAM" from "sam".
    if re.fullmatch(r"[a-z0-9_][a-z0-9_.]{,39}", lower):
        return lower
    digest = hashlib.sha256(label.encode(errors="surrogatepass")).hexdigest()[:8]
    words = "-".join(re.findall(r"[a-z0-9_.]+", lower))[:40].strip("-.")
    return f"{words or 'arm'}-{digest}"  # With a dash, unlike those that are names.


def run(
    cells: Sequence[Cell], output: Path, display: Display, signals: Signals, report: Report
) -> list[Group]:
    """Run what is missing, and return what came of all, by arms.

    Args:
        cells: as `plan` gives them.
        output: directory of the study.
        display: shows a line for each run.
        signals: end the study when the run under way has saved.
        report: is called after each seed.

    Raises:
        ConfigError: a directory holds a run of other settings; says which. Or `output` is
            that of a run.
        InUseError: another process runs this study.
        CheckpointWriteError: something cannot be written.
        Failed: a run ended with an exit code.
        Stopped: a signal ended the study.
    """
    make_directory(output)
    with samfn.held(output):
        files.sweep(output)
        results = ((cell.path, read(cell, display.warn)) for cell in cells)
        done = {path: found for path, found in results if found is not None}
        missing = [cell for cell in cells if cell.path not in done]
        display.say(f"{len(cells)} runs in {output}, {len(done)} of them finished")
        if not missing:
            _write(report, cells, done)
        for cell, ended, after in _run_each(missing, len(cells), display, signals):
            done[cell.path] = ended
            if not after or after[0].config.seed != cell.config.seed:
                _write(report, cells, done)
    return _groups(cells, done)


def _groups(cells: Sequence[Cell], done: Mapping[Path, Recorded]) -> list[Group]:
    """Return what has ended, by arms."""
    found: dict[str, list[Recorded]] = {}
    for cell in cells:
        if cell.path in done:
            found.setdefault(cell.label, []).append(done[cell.path])
    return [group_of(label, runs) for label, runs in found.items()]


def _run_each(
    missing: Sequence[Cell], total: int, display: Display, signals: Signals
) -> Iterator[tuple[Cell, Recorded, Sequence[Cell]]]:
    """Run cells, of a study with so many in all; yield each with those after it."""
    reader, took = _keeping_last(), dict[str, float]()
    for index, cell in enumerate(missing):
        fresh, started = not (cell.path / CONFIG_FILE).exists(), time.perf_counter()
        count, after = total - len(missing) + index + 1, missing[index + 1 :]
        about = f"{count}/{total} {cell.label}, seed {cell.config.seed}"
        ended = _finish(cell, display.brief(about), signals, reader)
        if fresh and ended.diverged is None:
            took[cell.label] = time.perf_counter() - started
        rest = remaining([other.label for other in after], took)
        display.say(f"{about}: {outcome(ended)}{rest}")
        yield cell, ended, after
        if signals.stop is not None:
            raise Stopped(signals.stop)


def read(cell: Cell, warn: Say) -> Recorded | None:
    """Return what came of a cell, or None if it has not ended; `warn` of what is odd.

    Raises:
        ConfigError: its directory holds a run of other settings, of another file of
            weights, or a damaged one.
    """
    directory = RunDirectory(cell.path)
    if not (cell.path / CONFIG_FILE).exists():
        return None
    _require_same_settings(cell)
    _require_same_weights(cell)
    _require_same_m(cell)
    # It is written at the end.
    has_model = recorded.holds_best_model(directory, cell.config)
    if not has_model and not os.path.lexists(cell.path / recorded.DIVERGED):
        return None
    run = recorded.read(cell.path, warn)
    if run.diverged is not None:
        return run
    if not has_model:
        return None
    if not run.rows or len(run.rows) < run.done:
        raise ConfigError(f"{directory.metrics} is damaged or gone: move {cell.path} away")
    return run if run.ended else None


def _require_same_settings(cell: Cell) -> None:
    before, now = plain_values(of_run(cell.path)), plain_values(cell.config)
    if changed := changes(before, now):
        found = f"a run of other settings: {'; '.join(changed.values())}"
    elif others := recorded.earlier(cell.path, cell.config, DECIDING):
        found = f"a run of which a part was trained with {listed(others)}"
    else:
        return
    raise ConfigError(
        f"{cell.path} holds {found}; move it away, or choose another --output"
    )


def _require_same_weights(cell: Cell) -> None:
    if (file := digest(cell.config)) is None:
        return
    checkpoints = recorded.checkpoints_of(RunDirectory(cell.path), lambda line: None)
    if {one.weights for one in checkpoints} - {file, None}:
        raise ConfigError(
            f"{cell.path} holds a run of other weights: {cell.config.network.weights} has"
            " changed since; move it away, or choose another --output"
        )


def _require_same_m(cell: Cell) -> None:
    batch, epochs = cell.config.batch_size, cell.config.epochs
    rows = [r for r in RunDirectory(cell.path).rows() if recorded.is_whole(r, epochs)]
    if others := {f"{m:g}" for row in rows if (m := row.get("m", batch)) != batch}:
        raise ConfigError(
            f"{cell.path} holds a run of several ranks, with perturbations of m ="
            f" {', '.join(sorted(others))} images, not {batch}; move it away, or choose"
            " another --output"
        )


def _finish(cell: Cell, display: Display, signals: Signals, reader: Read) -> Recorded:
    """Run a cell, or go on with it, to its end."""
    config = replace(cell.config, output=cell.path)
    if (cell.path / CONFIG_FILE).exists():
        compiles = of_run(cell.path).arithmetic.compile
        config = cell.config.replace(resume=cell.path, compile=compiles)
    if os.path.lexists(cell.path / recorded.DIVERGED):  # It did not count.
        with running.writing():
            files.put_aside(cell.path / recorded.DIVERGED, "superseded")
    try:
        code = running.run(config, display, signals, reader)
    except (DivergedError, samfn.NonFiniteError) as error:
        with running.writing():
            recorded.write_divergence(cell.path, " ".join(str(error).splitlines()))
        code = 0
    if code:
        raise errors.Failed(code) if signals.stop is None else Stopped(signals.stop)
    ended = read(cell, display.warn)
    if ended is None:  # Someone took its files away meanwhile.
        raise ConfigError(f"{cell.path} is not as its run left it: move it away")
    return ended


def _keeping_last() -> Read:
    """Return what reads images, and gives the same ones again if they are asked for."""
    kept: dict[Any, Dataset] = {}

    def reader(config: Config, track: Track, warn: Say) -> Dataset:
        images = config.images
        key = config.data, config.data_dir, images.image_size, images.allow_modified_data
        if key not in kept:
            kept.clear()  # One is large enough.
            kept[key] = read_data(config, track, warn)
        return kept[key]

    return reader


def _write(report: Report, cells: Sequence[Cell], done: Mapping[Path, Recorded]) -> None:
    with running.writing():
        report(_groups(cells, done))


def remaining(labels: Sequence[str], took: Mapping[str, float]) -> str:
    """Return how long runs will take, as the end of a line.

    Args:
        labels: of the arms of these runs.
        took: seconds by label; an arm that is not there takes the mean of those that are.
    """
    if not labels or not took:
        return ""
    mean = statistics.mean(took.values())
    return f", {duration(sum(took.get(label, mean) for label in labels))} left"


def outcome(run: Recorded) -> str:
    """Return what came of a run, in one line."""
    if run.diverged is not None:
        return f"diverged, {run.diverged}"
    took = duration(seconds(run))
    return f"last epoch {last(run):.2f} %, best {best(run):.2f} %, {took}"
