"""The record of a run, its files held against each other.

Anybody may have edited, cut or swapped the texts in a run's directory. A checkpoint is
verified by the SHA-256 in it, and says which settings, images and epoch it is of: so it is
believed, and what stands beside it is compared with it.
"""

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recipes.errors import ConfigError
from recipes.roles import EXACT, Role
from recipes.settings.config import Config, differing, of_roles, plain_values
from recipes.settings.saved import CONFIG_FILE, of_run, read_toml, run_of
from recipes.train.directory import Row, RunDirectory, parsed
from recipes.train.layers import WHAT
from recipes.train.step import counts_epochs
from samfn.schedules import tail_start
from samfn.storage import files, tensorfile
from samfn.training.callbacks import MEMORY

Warn = Callable[[str], None]
WEIGHTS = "weights"  # in `Training.memory`: of which file a run had its first
_FIRST = f"{MEMORY}{WEIGHTS}"
BEFORE = "versions"  # there, too: those that earlier parts of a run had, and their m
_BEFORE = f"{MEMORY}{BEFORE}"
DIVERGED = "diverged.txt"  # in the directory of a run of a study that did: why


class Said(NamedTuple):
    """Texts of a checkpoint about its run."""

    path: Path
    settings: dict[str, Any]
    """As `plain_values` gives them."""
    epoch: int
    """Epochs that were finished."""
    row: Row
    """Metrics of the last of them; empty before the first."""
    data: str
    """Fingerprint of the images and labels."""
    versions: dict[str, str]
    """Versions of torch and hardware."""
    weights: str | None
    """SHA-256 of the file of the first weights, if there was one."""
    before: list[dict[str, str]]
    """Versions that earlier parts of the run had, with their m."""


class Recorded(NamedTuple):
    """The record of a run, as far as its files agree."""

    path: Path
    config: Config
    rows: list[Row]
    """Epochs, ascending."""
    ended: bool
    """Whether it came to its end: all epochs, or no patience left."""
    data: str | None
    """Fingerprint of the images and labels, if a checkpoint says it."""
    versions: Mapping[str, str]
    """Versions of torch and hardware, if a checkpoint says them."""
    diverged: str | None = None
    """Why the run diverged, if it did in a study."""
    weights: str | None = None
    """SHA-256 of the file of the first weights, if a checkpoint says it."""
    earlier: Sequence[Mapping[str, Any]] = ()
    """As `earlier` returns."""
    before: Sequence[Mapping[str, str]] = ()
    """Versions that earlier parts of the run had, with their m."""

    @property
    def machines(self) -> list[Mapping[str, str]]:
        """Versions and hardware of all parts of the run, as far as checkpoints say them."""
        earlier = [{n: v for n, v in one.items() if n != "m"} for one in self.before]
        return [*earlier, self.versions]

    @property
    def m(self) -> list[str]:
        """How many images a perturbation was found on, each number once, in order."""
        batch = self.config.batch_size
        known = [one["m"] for one in self.before if "m" in one]
        known += [f"{row.get('m', batch):g}" for row in self.rows]
        return [*dict.fromkeys(known)] or [f"{batch:g}"]

    @property
    def mixed(self) -> bool:
        """Whether its parts had other settings or another m: it repeats no other run."""
        return bool(self.earlier) or len(self.m) > 1

    @property
    def done(self) -> int:
        """Epochs that were recorded."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def best(self) -> Row | None:
        """The best epoch, by what the run chose it by."""
        by = column(self.config, chosen_by(self.config))
        return max(self.rows, key=lambda row: float(row[by])) if self.rows else None

    @property
    def test(self) -> str:
        """The column with the accuracy that counts."""
        return column(self.config, "test")

    @property
    def perturbed(self) -> list[float]:
        """Shares of the steps of each epoch that perturbed the weights.

        The settings say them. Of a run that had others, each epoch says its own radius.
        """
        config = self.config
        if self.earlier or not config.rho:
            return [float(row.get("rho", config.rho) > 0) for row in self.rows]
        whole, late = self.steps_per_epoch, config.perturbation.sam_last
        planned, counts = config.epochs * whole, self._counts_steps
        start = tail_start(planned, late) if counts else planned * (1 - late)
        found = []
        for row, epochs, steps in zip(self.rows, self._lengths, self.steps, strict=True):
            # Schedules count whole epochs, also where some have fewer steps.
            places, begins = epochs * whole, (row["epoch"] - epochs) * whole
            plain = min(max(0, start - begins), places) * steps / places
            found.append(1 - (math.ceil(plain) if counts else plain) / steps)
        return found

    @property
    def steps(self) -> list[int]:
        """Steps of each epoch, or as many for each where not all rows say them."""
        return self._between("step") if self._counts_steps else self._lengths

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch of all images; one that skips some has fewer."""
        each = zip(self.steps, self._lengths, strict=True)
        return max((math.ceil(steps / epochs) for steps, epochs in each), default=1)

    @property
    def _counts_steps(self) -> bool:
        whole = all(type(row.get("step")) is int for row in self.rows)
        return whole and all(steps > 0 for steps in self._between("step"))

    @property
    def _lengths(self) -> list[int]:
        """Epochs of each row: one, or more where rows before it lack."""
        return self._between("epoch")

    def _between(self, name: str) -> list[int]:
        marks = [0, *(row[name] for row in self.rows)]
        return [after - before for before, after in pairwise(marks)]

    @property
    def share_perturbed(self) -> float | None:
        """Share of all steps that perturbed the weights, if there is any epoch."""
        return statistics.fmean(self.perturbed, self.steps) if self.rows else None


def read(path: Path, warn: Warn) -> Recorded:
    """Return what a run recorded, and tell what of it is damaged or does not fit.

    Raises:
        ConfigError: there is no run, its settings are damaged, or a checkpoint in its
            directory is of another one.
    """
    config, directory = of_run(path), RunDirectory(path)
    # In this order: a run that goes on writes an epoch before its checkpoint.
    checkpoints = checkpoints_of(directory, warn)
    found = epochs_of(directory, config, checkpoints, warn)
    # A run may go on with an average, which its first epochs did not have.
    needed = {column(config, split) for split in ("test", chosen_by(config))}
    rows = [row for row in found if needed <= row.keys()]
    if len(rows) < len(found):
        lacking = f"{len(found) - len(rows)} epochs lack {', '.join(sorted(needed))}"
        warn(f"{directory.metrics}: {lacking}; left out")
    newest = checkpoints[-1] if checkpoints else None
    return Recorded(
        path,
        config,
        rows,
        _has_ended(config, rows, newest),
        newest and newest.data,
        newest.versions if newest else {},
        _diverged(path, config, newest, warn),
        newest and newest.weights,
        earlier(path, config),
        newest.before if newest else (),
    )


def write_divergence(path: Path, why: str) -> None:
    """Keep why a run diverged, and after which of its checkpoints.

    Raises:
        ConfigError: as `read`.
        OSError: it cannot be written.
    """
    found = checkpoints_of(RunDirectory(path), lambda line: None)
    about = _about_divergence(why, of_run(path), found[-1] if found else None)
    with files.replacing(path / DIVERGED) as temporary:
        text = f"{why}\n{json.dumps(about)}\n"
        temporary.write_text(text, encoding="utf-8")


def _diverged(path: Path, config: Config, newest: Said | None, warn: Warn) -> str | None:
    """Return why a run diverged, if that was written of the run as it is now."""
    file = path / DIVERGED
    try:
        why, _, rest = files.read_text(file, errors="replace").partition("\n")
        about = parsed(rest) if rest else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{file} cannot be read, and does not count: {error}")
        return None
    expected = _about_divergence(why, config, newest)
    if about == expected:
        return why
    found = about if isinstance(about, dict) else {}
    if found.get("settings", expected["settings"]) != expected["settings"]:
        reason = "is of a run of other settings"
    elif (after := found.get("after", expected["after"])) != expected["after"]:
        reason = f"says what came after {after}, and the run is at {expected['after']}"
    else:
        reason = "is not as it was written"
    warn(f"{file} {reason}: it does not count")
    return None


def _about_divergence(why: str, config: Config, newest: Said | None) -> dict[str, str]:
    """Return what a record of a divergence is held against."""
    settings = of_roles(plain_values(config), EXACT)
    row = [newest.epoch, newest.row] if newest else []
    found = {
        "settings": _sha256(settings),
        "after": f"{newest.path.name} {_sha256(row)[:8]}" if newest else "no checkpoint",
    }
    return found | {"sha256": _sha256([why, found])}


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_one_run(path: Path) -> None:
    """Raise unless the run that `path` is, or the checkpoint, is one with its settings.

    Raises:
        ConfigError: a checkpoint is of another run; says which, and what differs. Or the
            one that `path` is cannot be read.
    """
    if not path.is_file():
        checkpoints_of(RunDirectory(path), warn=lambda line: None)
        return
    try:
        one = said(path)
    except tensorfile.CorruptError as error:
        raise ConfigError(str(error)) from error
    _require_own(one, _settings_of(run_of(path)))


def checkpoints_of(directory: RunDirectory, warn: Warn) -> list[Said]:
    """Return what the checkpoints of a run say, by step; what is damaged is told.

    Raises:
        ConfigError: one is of another run; says which, and what differs.
    """
    found: list[Said] = []
    settings = _settings_of(directory.path)
    for path in directory.checkpoints().paths():
        try:
            one = said(path)
        except FileNotFoundError:
            continue  # The run goes on, and has a newer one.
        except tensorfile.CorruptError as error:
            warn(f"{error}; left out")
            continue
        _require_own(one, settings)
        if found and (odd := _other_origin(one, found[0])):
            raise ConfigError(
                f"{one.path} is not of this run: it was trained {odd}"
                f" than {found[0].path.name}; move away the one that does not belong here"
            )
        found.append(one)
    return found


def _other_origin(one: Said, other: Said) -> str:
    """Return what two checkpoints do not have in common, if they are of two runs."""
    if one.data != other.data:
        return "on other images or labels"
    return "" if one.weights == other.weights else "from other weights"


def holds_best_model(directory: RunDirectory, config: Config) -> bool:
    """Return whether the model that a run leaves is there, and is its best checkpoint's.

    Where no such checkpoint is left, it is enough that it is whole.
    """
    try:
        model, _ = tensorfile.read(directory.weights)
    except (FileNotFoundError, tensorfile.CorruptError):
        return False
    average = "" if config.average.ema_decay is None else "metadata/memory.ema/"
    for path in directory.checkpoints().best(best_by(config)):
        with contextlib.suppress(FileNotFoundError, tensorfile.CorruptError):
            tensors, _ = tensorfile.read(path)
            weights = {
                name.removeprefix(f"{average}{kind}/"): tensor
                for kind in ("params", "buffers")
                for name, tensor in tensors.items()
                if name.startswith(f"{average}{kind}/")
            }
            return all(
                name in model and torch.equal(model[name], tensor)
                for name, tensor in weights.items()
            )
    return True


def said(path: Path) -> Said:
    """Return what a checkpoint says of its run; verified.

    Raises:
        ConfigError: it is none of a run of the recipes.
        CorruptError: it is damaged, or no checkpoint.
        OSError: it cannot be read.
    """
    _, texts = tensorfile.read(path)
    try:
        found = {name: parsed(texts[name]) for name in FACTS if name in texts}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is none of this recipe's") from error
    return facts(path, found)


def facts(path: Path, found: Mapping[str, Any]) -> Said:
    """Return what the metadata of a checkpoint say of its run.

    Raises:
        ConfigError: something is lacking, or is none of what a run writes; says what.
    """
    given = {"row": {}, "versions": {}, "ranks": {}, _FIRST: None, _BEFORE: [], **found}
    for name, is_one in FACTS.items():
        if name not in given or not is_one(given[name]):
            got = f"{given[name]!r:.60}" if name in given else "none"
            raise ConfigError(f"{path} is none of this recipe's: its {name} is {got}")
    names = ("row", "data", "versions", _FIRST, _BEFORE)
    epoch, about = given["progress"]["epoch"], (given[name] for name in names)
    return Said(path, given["config"], epoch, *about)


def _is_place(value: Any) -> bool:
    """Return whether these are steps, epochs and batches of a run.

    An epoch has a step at least, and each batch of the next one is another.
    """
    place = value if isinstance(value, dict) else {}
    counts = [place.get(name) for name in ("step", "epoch", "batch")]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        return False
    return bool(place["epoch"] + place["batch"] <= place["step"])


def _is_row(value: Any) -> bool:
    """Return whether this is an epoch as the metrics have it, or none yet."""
    return value == {} or (
        isinstance(value, dict)
        and type(value.get("epoch")) is int
        and value["epoch"] > 0
        and is_whole(value, value["epoch"])
    )


def _is_sharing(value: Any) -> bool:
    """Return whether this says on how many images a perturbation was found, if at all."""
    return isinstance(value, dict) and 0 < _number(value.get("m", 1)) < math.inf


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


FACTS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "progress": _is_place,
    "row": _is_row,
    "data": lambda value: isinstance(value, str),
    "versions": _are_texts,
    "ranks": _is_sharing,
    _FIRST: lambda value: value is None or isinstance(value, str),
    _BEFORE: lambda value: isinstance(value, list) and all(map(_are_texts, value)),
}
"""What a checkpoint says of its run, and how one knows that it is that."""


def _settings_of(run: Path) -> list[dict[str, Any]]:
    """Return the settings that a run has, and those that it had before, if any."""
    paths = [run / CONFIG_FILE, *RunDirectory(run).older_settings()]
    found = []
    for path in paths:
        try:
            found.append(plain_values(Config.of(read_toml(path))))
        except ConfigError:
            if path == paths[0]:
                raise
    return found


def earlier(
    run: Path, config: Config, roles: frozenset[Role] = EXACT
) -> list[dict[str, Any]]:
    """Return what a part of a run was trained with, where that changes the result.

    More epochs alone are none of it, where no step depends on their number.

    Args:
        run: its directory.
        config: its settings now.
        roles: `EXACT`, or those that matter.

    Returns:
        The settings that were others, by name, for each time that they were.
    """
    now, (_, *older) = plain_values(config), _settings_of(run)
    found = [
        {name: was for name, (was, _) in differing(before, now, roles).items()}
        for before in older
    ]
    free = () if counts_epochs(config) else ("epochs",)
    return [one for one in found if {*one} - {*free}]


def is_own(settings: Mapping[str, Any], run: Path) -> bool:
    """Return whether these are the settings of a run, or some that it had before."""
    return not all(differing(settings, values) for values in _settings_of(run))


def _require_own(one: Said, settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless a checkpoint was trained with one of these settings."""
    differ = [differing(one.settings, values) for values in settings]
    if all(differ):
        listed = "; ".join(
            f"{name} is {theirs!r} in it and {ours!r} there"
            for name, (theirs, ours) in differ[0].items()
        )
        raise ConfigError(
            f"{one.path} is not of the run that {CONFIG_FILE} beside it describes: {listed}"
        )


def epochs_of(
    directory: RunDirectory, config: Config, checkpoints: Sequence[Said], warn: Warn
) -> list[Row]:
    """Return the epochs that a run recorded, ascending; tell what did not fit.

    Where checkpoints say what an epoch was, they are believed.
    """
    file, by = directory.metrics, column(config, chosen_by(config))
    last = max([config.epochs, *(one.epoch for one in checkpoints)])
    known = {
        one.epoch: one.row
        for one in checkpoints
        if one.row.get("epoch") == one.epoch and is_whole(one.row, last)
    }
    found = held_against(directory, known, lambda row: is_whole(row, last), warn)
    if len(checkpoints) == len(directory.checkpoints().paths()):  # So the best is there.
        best = max((row[by] for row in known.values() if by in row), default=math.inf)
        others = [row for row in found if row["epoch"] not in known]
        if better := [row["epoch"] for row in others if _number(row.get(by)) > best]:
            warn(f"{file}: epochs {_listed(better)} are better there than the best one")
    return found


def held_against(
    directory: RunDirectory,
    known: Mapping[int, Row],
    is_one: Callable[[Row], bool],
    warn: Warn,
) -> list[Row]:
    """Return the epochs that a run recorded, ascending; tell what did not fit.

    Args:
        directory: of the run.
        known: epochs that checkpoints say, which are believed.
        is_one: whether a line of the metrics is an epoch.
        warn: is told.
    """
    file, lines = directory.metrics, directory.lines()
    rows = {row["epoch"]: row for row in lines if row and is_one(row)}
    if damaged := len(lines) - len(rows):
        warn(f"{file}: {damaged} damaged or repeated lines left out")
    if differ := [n for n, row in known.items() if _text(rows.get(n)) != _text(row)]:
        warn(f"{file} is not what checkpoints say of epochs {_listed(differ)}; they count")
    rows |= known
    epochs = sorted(rows)
    gaps = [(a + 1, b - 1) for a, b in pairwise([0, *epochs]) if b - a > 1]
    if gaps:
        parts = [f"{a} to {b}" if a < b else f"{a}" for a, b in gaps]
        warn(f"{file} lacks epochs {', '.join(parts)}")
    return [rows[epoch] for epoch in epochs]


def is_whole(
    row: Row, last: int, others: Sequence[str] = ("train_loss", "images_per_second")
) -> bool:
    """Return whether a line of the metrics has numbers that an epoch up to `last` has.

    Those are accuracies, seconds and `others`.
    """
    accuracies = {"test_accuracy", *(name for name in row if name.endswith("_accuracy"))}
    return (
        row["epoch"] <= last
        and all(0 <= _number(row.get(name)) <= 100 for name in accuracies)
        and all(0 <= _number(row.get(name)) < math.inf for name in ("seconds", *others))
        and 0 <= _number(row.get("scan_seconds", 0)) < math.inf
        and all(isinstance(v, int | float) for n, v in row.items() if n != "layers")
        and ("layers" not in row or _are_layers(row["layers"]))
    )


def chosen_by(config: Config) -> str:
    """Return the split that the best epoch is chosen by."""
    return "validation" if config.images.validation else "test"


def column(config: Config, split: str) -> str:
    """Return the column of the accuracy that counts, the average's if there is one."""
    average = "" if config.average.ema_decay is None else "ema_"
    return f"{average}{split}_accuracy"


def best_by(config: Config) -> str:
    """Return the name of the score that the best checkpoint is chosen by."""
    return "score" if config.average.ema_decay is None else "ema"


def _has_ended(config: Config, rows: Sequence[Row], newest: Said | None) -> bool:
    """Return whether no epoch is left to train, or no patience; the newest says how far."""
    if not rows or (newest is not None and newest.epoch < rows[-1]["epoch"]):
        return False
    by, done = column(config, chosen_by(config)), int(rows[-1]["epoch"])
    best = int(max(rows, key=lambda row: float(row[by]))["epoch"])
    patience = config.stopping.patience
    waited = patience is not None and done - best >= patience
    return waited or done >= config.epochs


def _number(value: Any) -> float:
    """Return a number, or NaN for all else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if number else math.nan
    except OverflowError:  # No float holds every integer.
        return math.nan


def _are_layers(value: Any) -> bool:
    """Return whether these are numbers of the same layers for all that is watched."""
    found: list[Any] = [value.get(n) if isinstance(value, dict) else None for n in WHAT]
    return all(
        isinstance(one, dict)
        and one.keys() == found[0].keys()
        and all(isinstance(number, int | float) for number in one.values())
        for one in found
    )


def _text(row: Row | None) -> str:
    return json.dumps(row, sort_keys=True)  # Unlike the numbers, one NaN is another.


def _listed(epochs: Iterable[int]) -> str:
    first, *more = sorted(epochs)
    shown = ", ".join(map(str, [first, *more[:4]]))
    return f"{shown} and {len(more) - 4} more" if len(more) > 4 else shown
