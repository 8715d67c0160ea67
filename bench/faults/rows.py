"""The rows of the fault matrix: what happens, and which trials make it happen."""

import subprocess
import sys
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.faults import disk, kills, processes, shards, signals
from bench.faults.trial import Outcome

ROOT = Path(__file__).parent.parent.parent


class Row(NamedTuple):
    """One kind of fault."""

    name: str
    fault: str
    run: Callable[[int, Path], Outcome]
    """(trials, an empty directory) -> what came of them."""
    trials: int
    """Number of trials; tests have their own."""


def by_tests(*selected: str) -> Callable[[int, Path], Outcome]:
    """Return trials that are tests: files of tests/, or `file::part of names`.

    A test counts as many trials as it records under that name, or as one.
    """
    return partial(_run_tests, selected)


def _run_tests(selected: tuple[str, ...], trials: int, root: Path) -> Outcome:
    total, failures = 0, []
    for number, one in enumerate(selected):
        file, _, names = one.partition("::")
        report = root / f"{number}.xml"
        command = [sys.executable, "-m", "pytest", "-n0", "-q", f"tests/{file}"]
        command += ["-k", names] if names else []
        command += ["-o", "junit_family=xunit1"]  # the one with properties
        done = subprocess.run(
            [*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True
        )
        cases = Xml.parse(report).findall(".//testcase") if report.exists() else []
        for case in cases:
            if case.find("skipped") is None:
                recorded = case.find(".//property[@name='trials']")
                total += 1 if recorded is None else int(recorded.get("value", "1"))
            if case.find("failure") is not None or case.find("error") is not None:
                failures.append(f"{case.get('name')}")
        if done.returncode and not failures:
            failures.append(f"{one}: {done.stdout[-300:]}")
    return Outcome(total, total, tuple(failures), ", ".join(selected))


ROWS = (
    Row("F1", "SIGKILL at any moment", kills.at_any_moment, 50),
    Row("F2", "SIGKILL at each call and byte of a save", kills.in_a_save, 200),
    Row(
        "F3",
        "power fails: order of syncs",
        by_tests("samfn/storage/test_files.py::synced"),
        0,
    ),
    Row("F4", "disk full from a random byte on", disk.full_at, 50),
    Row(
        "F5",
        "read-only, EIO, EACCES, quota; the recipe's disk full",
        by_tests(
            "samfn/storage/test_checkpoint.py::cannot_be_written",
            "recipes/test_crashes.py::full_disk",
        ),
        0,
    ),
    Row("F6", "files damaged in twenty ways", disk.rotten, 10_000),
    Row(
        "F7",
        "newest checkpoint damaged",
        by_tests(
            "samfn/storage/test_checkpoint.py::newest", "recipes/test_crashes.py::damaged"
        ),
        0,
    ),
    Row(
        "F8",
        "file cut off after loading",
        by_tests("samfn/storage/test_checkpoint.py::cut_off"),
        0,
    ),
    Row("F9", "SIGTERM, SIGINT, SIGUSR1 in every phase", signals.in_every_phase, 60),
    Row(
        "F10",
        "stopped anywhere and resumed",
        by_tests(
            "recipes/test_recipe.py::stopped",
            "samfn/storage/test_checkpoint.py::goes_on",
            "recipes/test_resume.py",
        ),
        0,
    ),
    Row("F11", "the same run again", by_tests("recipes/test_crashes.py::every_loss"), 0),
    Row(
        "F12",
        "NaN and infinity in either pass",
        by_tests(
            "samfn/test_realities.py::bad_numbers or not_finite",
            "recipes/test_crashes.py::finite",
        ),
        0,
    ),
    Row(
        "F13",
        "gradients of zero, tiny, huge",
        by_tests("samfn/test_perturb.py", "samfn/test_invariants.py::500_perturbations"),
        0,
    ),
    Row(
        "F14",
        "perturb and restore",
        by_tests("samfn/test_invariants.py::leave or come_back"),
        0,
    ),
    Row(
        "F15", "user code raises in pass 2", by_tests("samfn/test_invariants.py::raises"), 0
    ),
    Row("F16", "wrong input", by_tests("samfn/test_bad_input.py"), 0),
    Row(
        "F17",
        "damaged data",
        by_tests(
            "recipes/data/test_cifar.py::damaged or flipped or missing or flag",
            "recipes/data/test_sources.py",
        ),
        0,
    ),
    Row("F18", "hostile download", by_tests("recipes/data/test_download.py"), 0),
    Row(
        "F19",
        "hostile archive",
        by_tests("recipes/data/test_cifar.py::hostile or never or run"),
        0,
    ),
    Row("F20", "8 processes, one run directory", processes.one_directory, 20),
    Row("F21", "8 processes, one data set", processes.one_data_set, 10),
    Row("F22", "out of memory", by_tests("recipes/test_crashes.py::memory"), 0),
    Row(
        "F23",
        "of several ranks, one killed, stopped, signalled, or not finite",
        by_tests(
            "recipes/test_torchrun.py::killed or hangs or signal",
            "samfn/distributed/test_distributed.py::stopped or asks or skip",
        ),
        0,
    ),
    Row(
        "F24",
        "other settings or versions on resuming",
        by_tests(
            "recipes/settings/test_config.py::resumed or overridden",
            "recipes/test_crashes.py::since",
        ),
        0,
    ),
    Row(
        "F25",
        "umask, long and strange paths",
        by_tests(
            "samfn/storage/test_files.py::permissions",
            "recipes/test_crashes.py::paths or terminal",
        ),
        0,
    ),
    Row("F26", "log or terminal gone", by_tests("recipes/test_crashes.py::log"), 0),
    Row(
        "F27", "checkpoints of older versions", by_tests("samfn/storage/test_corpus.py"), 0
    ),
    Row(
        "F28",
        "compiled code that somebody else could have put there",
        by_tests("recipes/train/test_compiling.py"),
        0,
    ),
    Row(
        "F29",
        "metadata, tensors, names and steps that are large or odd",
        by_tests(
            "samfn/storage/test_checkpoint.py::json or any_size or not_be_read or not_hold"
            " or views or ordered"
        ),
        0,
    ),
    Row(
        "F30",
        "forged or odd scores and steps",
        by_tests(
            "samfn/storage/test_checkpoint.py::forged or changed_bytes or scores"
            " or just_written"
        ),
        0,
    ),
    Row(
        "F31",
        "no regular file, a held lock, a file of 4 TB",
        by_tests(
            "samfn/storage/test_files.py::regular or pipe or absurd or wait or waits",
            "samfn/storage/test_checkpoint.py::no_file or 4_tb",
            "recipes/data/test_sources.py::waits",
        ),
        0,
    ),
    Row(
        "F32",
        "lock files that are links; two writers; files closed to others",
        by_tests(
            "samfn/storage/test_files.py::link or two_that or permissions",
            "samfn/storage/test_checkpoint.py::two_that or users_alone or somebody_else",
        ),
        0,
    ),
    Row(
        "F33",
        "settings edited, checkpoints or models of another run in its place",
        by_tests(
            "recipes/train/test_recorded.py::believed or another or decides or images"
            " or header or damaged or overridden or model_file or swapped"
        ),
        0,
    ),
    Row(
        "F34",
        "metrics cut, edited, reordered, repeated",
        by_tests("recipes/train/test_recorded.py::line or epoch or numbers"),
        0,
    ),
    Row(
        "F35",
        "sharpness forged",
        by_tests("recipes/train/test_recorded.py::record or measured"),
        0,
    ),
    Row(
        "F36",
        "pipes, devices, loops of links, numbers without end in a run's files",
        by_tests("recipes/train/test_run_files.py"),
        0,
    ),
    Row(
        "F37",
        "output and names in any encoding",
        by_tests("recipes/terminal/test_legible.py"),
        0,
    ),
    Row(
        "F38",
        "pipes, devices and locks where data are read",
        by_tests("recipes/test_misleading.py::pipe or locks"),
        0,
    ),
    Row(
        "F39",
        "pictures, weights and caches that mislead",
        by_tests("recipes/test_misleading.py::not pipe and not locks"),
        0,
    ),
    Row(
        "F40",
        "links and hidden folders among images",
        by_tests("recipes/data/test_folders.py"),
        0,
    ),
    Row(
        "F41",
        "weights caught between two steps",
        by_tests("samfn/imperative/test_guard.py"),
        0,
    ),
    Row("F42", "sharded: SIGKILL of one or all ranks", shards.at_any_moment, 50),
    Row(
        "F43",
        "sharded: SIGKILL at each call and byte of a save, also in the background",
        shards.in_a_save,
        400,
    ),
    Row("F44", "sharded: one rank's disk full from a random byte on", shards.full_at, 50),
    Row("F45", "sharded: a file damaged in twenty ways", shards.rotten, 10_000),
    Row(
        "F46",
        "sharded: one rank killed, stopped, signalled, or not finite",
        shards.of_ranks,
        16,
    ),
)
