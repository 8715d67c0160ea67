"""Compilation of a run's step: whether it pays, and the cache of compiled code."""

import atexit
import contextlib
import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import samfn
from recipes.data.sources import user_cache
from recipes.errors import DataError
from recipes.settings.config import Config
from samfn.compiled.plan import ARITHMETIC, keep_headers, missing_compiler
from samfn.storage import files

# On a CPU, the saving must be more than compiling takes: half a minute for WRN-10-1 on two
# cores, without a cache. Where a compiled step is faster at all, it saves about 5 ms of
# Python's time, and a sixth of the arithmetic's.
SECONDS_TO_COMPILE = 45.0
SECONDS_OF_PYTHON = 5e-3
OPERATIONS_PER_SECOND = 1.3e11
SHARE_OF_ARITHMETIC = 1 / 6

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
HEADERS = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"  # whoever sets it has them in /tmp
USUAL = "torchinductor_"  # and the user's name: what PyTorch sets it to, below /tmp
TEMPORARY = "samfn-compiled-"  # and what nobody can guess: the cache of one process


def decide(
    config: Config, steps: int, device: torch.device, operations: Callable[[], int]
) -> tuple[bool, str]:
    """Return whether to compile the step, and why in a few words.

    Args:
        config: of the run.
        steps: in the whole run.
        device: that they are taken on.
        operations: counts the floating-point operations of one gradient.
    """
    if config.arithmetic.compile == "no":
        return False, "no"
    if missing := missing_compiler(device):
        return False, f"no: {missing}"
    if config.arithmetic.compile == "yes":
        return True, "yes"
    if device.type != "cpu":
        return True, "yes, on a GPU"
    late = config.perturbation.sam_last
    passes, kinds = (1, 1) if config.rho == 0 else (1 + late, 1 + (late < 1))

    def pays(count: float) -> bool:
        arithmetic = passes * count / OPERATIONS_PER_SECOND
        saving = SECONDS_OF_PYTHON + SHARE_OF_ARITHMETIC * arithmetic
        return steps * saving > kinds * SECONDS_TO_COMPILE

    few = f"{steps:,} steps on a CPU"
    if not pays(ARITHMETIC):  # Counting imports PyTorch's compiler, in two seconds.
        return False, f"no: {few} would not pay for it (--compile yes)"
    if (count := operations()) > ARITHMETIC:
        return False, "no: a CPU spends its time in the convolutions either way"
    if pays(count):
        return True, f"yes: {few} pay for it"
    return False, f"no: {few} would not pay for it (--compile yes)"


def keep_compiled(warn: Callable[[str], None]) -> None:
    """Let PyTorch keep what it compiles in the user's cache, closed to everyone else.

    The cache holds code, and pickles, which are run. So a directory that others could have
    put something into is refused, and everything compiled anew, in one that goes with this
    process, or, where that is killed, with the next. Left alone, PyTorch takes one below
    /tmp under a name that everyone can guess, and for precompiled headers always does.

    Args:
        warn: is told in one line what was refused, and why.
    """
    _sweep()
    try:
        named = _named()
        path = named or (user_cache() / "compiled").absolute()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = exposed(path)
        if not reason and not named:
            path.chmod(0o700)
    except (OSError, DataError) as error:
        reason = str(error)
    if reason:
        warn(f"{reason}: what was compiled before is not used, nor this kept")
        path = _temporary()
    os.environ[VARIABLE] = str(path)
    if HEADERS not in os.environ:
        keep_headers(path / "headers")


def _temporary() -> Path:
    """Return a new directory, which this process holds, and deletes when it ends."""
    holding = contextlib.ExitStack()
    while True:
        path = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        try:
            holding.enter_context(files.held(path))
        except (FileNotFoundError, samfn.InUseError):
            continue  # Another process swept it before it was held.
        except OSError:
            pass  # Where nothing can be held, nothing is swept.
        atexit.register(holding.close)
        atexit.register(shutil.rmtree, path, ignore_errors=True)  # This comes first.
        return path


def _sweep() -> None:
    """Delete what processes of this user that were killed left of `_temporary`."""
    for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # One that is held, is gone, or is no directory.
            is_own = path.lstat().st_uid == os.geteuid() and (path / files.LOCK).exists()
            if is_own and not _exposed_by_place(path):
                with files.held(path):
                    shutil.rmtree(path, ignore_errors=True)


def exposed(path: Path) -> str | None:
    """Return what lets others change what a directory holds, in a few words, or None.

    As ssh asks of its keys: the directory is the user's, all above it the user's or the
    administrator's, and nobody else can write there. So is all that is in it already;
    where nobody else can enter, its permissions are no matter.

    Args:
        path: absolute, of a directory that is there.
    """
    if reason := _exposed_by_place(path):
        return reason
    closed = not path.stat().st_mode & 0o077
    for folder, folders, others in os.walk(path):
        for name in folders + others:
            place = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # Another run just moved it.
                found = place.lstat()
                if not _is_own(found) or stat.S_ISLNK(found.st_mode):
                    return f"{place} is {_kind(found)}"
                if _written_by_others(found) and not closed:
                    return f"others can write to {place}"
    return None


def _exposed_by_place(path: Path) -> str | None:
    shared = False  # whether others can write where a place lies, if not rename it
    for place in (*reversed(path.parents), path):
        found = place.lstat()
        linked = stat.S_ISLNK(found.st_mode)
        if not _is_own(found) or (linked and (shared or place == path)):
            return f"{place} is {_kind(found)}"
        if linked:
            if reason := _exposed_by_place(place.parent / place.readlink()):
                return reason
            continue
        shared = _written_by_others(found)
        sticky = bool(found.st_mode & stat.S_ISVTX) and place != path
        if shared and not sticky:
            return f"others can write to {place} (chmod go-w)"
    return None


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)


def _kind(found: os.stat_result) -> str:
    return "a link" if _is_own(found) else f"of another user, {found.st_uid}"


def _written_by_others(found: os.stat_result) -> bool:
    group = bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)
    return group or bool(found.st_mode & stat.S_IWOTH)


def _is_own_group(number: int) -> bool:
    """Return whether a group is the user alone, as many systems make one for everybody."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return False
    names = {group.gr_name, *group.gr_mem}
    return user.pw_gid == number and names == {user.pw_name}


def _named() -> Path | None:
    """Return the directory that the user named; PyTorch's own choice is none."""
    path = Path(os.environ.get(VARIABLE, "")).absolute()
    usual = path.parent == Path(tempfile.gettempdir()) and path.name.startswith(USUAL)
    return path if os.environ.get(VARIABLE) and not usual else None
