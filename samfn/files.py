"""Files that appear whole or not at all, in directories that one process holds."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

TEMPORARY = ".samfn-"  # what the directory of an unfinished file is called
MARGIN = 2**20  # bytes that stay free beside a new file
LOCK = ".samfn.lock"


class InUseError(OSError):
    """Another process holds the directory."""


@contextmanager
def replacing(path: Path, need: int = 0) -> Iterator[Path]:
    """Yield where to write what becomes `path` at the end, if nothing is raised.

    Written in a directory beside `path`, synced, given the user's permissions, renamed;
    then the directory is synced. Whenever the process is killed or the power fails,
    `path` is what it was or what it is to be.

    Args:
        path: of a file that is there or not; its directory exists.
        need: bytes that are to be written.

    Raises:
        OSError: less than `need` is free, or a call of the system failed. `path` is what
            it was, or, if only its directory could not be synced, what it is to be; and
            nothing is left beside it.
    """
    free = shutil.disk_usage(path.parent).free
    if free < need + MARGIN:
        raise OSError(f"{need:,} bytes are needed and {free:,} are free")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
        temporary = Path(folder, "file")
        yield temporary
        sync(temporary)
        # A new file shows the umask, which cannot be asked for without changing it.
        probe = Path(folder, "mode")
        probe.touch()
        temporary.chmod(stat.S_IMODE(probe.stat().st_mode))
        os.replace(temporary, path)
        sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, to stay even if the power fails."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)


def sweep(directory: Path) -> None:
    """Delete what processes that were killed left of `replacing`.

    Only for who holds the directory: a file that is being written would go as well.
    """
    for folder in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(directory: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from holding a directory; the kernel frees what a dead one held.

    Args:
        directory: made if it is not there; a file named ".samfn.lock" stays in it.
        wait: until nobody else holds it.

    Raises:
        InUseError: another process holds it, and `wait` is False; says which.
        OSError: no file can be made there.
    """
    path = Path(directory, LOCK)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout as error:
        holder = path.read_text().strip() or "unknown"
        raise InUseError(f"{directory} is in use by process {holder}") from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Wait until the disk has what a file, or the entries of a directory, hold."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories, and writes their entries through.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
