"""Files that appear whole or not at all, in directories that one process holds."""

import errno
import io
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, BinaryIO

TEMPORARY = ".samfn-"  # what the directory of an unfinished file is called
SHARDED = ".sharded"  # what checkpoints end in that are directories
PARTS = ("file", "mode")  # the unfinished file in it, and one that shows the umask
MARGIN = 2**20  # bytes that stay free beside a new file
LOCK = ".samfn.lock"
PATIENCE = 2.0  # seconds of waiting before it is said for whom
MAX_TEXT = 2**30  # bytes of a file that is read at once; a sparse one may claim any size
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


Identity = tuple[int, int]
"""Device and inode, by which the kernel knows a file."""
_HELD: dict[str, tuple[Identity, Identity]] = {}
"""Directories that this process holds: their lock files, and they themselves."""


class InUseError(OSError):
    """Another process holds the directory."""


@contextmanager
def replacing(path: Path, need: int = 0) -> Iterator[Path]:
    """Yield where to write what becomes `path` at the end, if nothing is raised.

    Written in a directory beside `path`, synced, given the permissions of what it replaces
    or those that the user wants of new files, renamed; then the directory is synced.
    Whenever the process is killed or the power fails, `path` is what it was or what it is
    to be.

    Args:
        path: of a file that is there or not; its directory exists.
        need: bytes that are to be written.

    Raises:
        FileNotFoundError: as `require_held`.
        OSError: less than `need` is free, a call of the system failed, or another process
            swept the directory. `path` is what it was, or, if only its directory could not
            be synced, what it is to be; and nothing is left beside it.
    """
    require_held(path)
    free = shutil.disk_usage(path.parent).free
    if free < need + MARGIN:
        raise OSError(
            f"{need:,} bytes are needed and {free:,} are free, of which {MARGIN:,} stay so"
        )
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
        temporary, probe = (Path(folder, part) for part in PARTS)
        with _undisturbed(probe, path):
            # A new file shows the umask, which cannot be asked for without changing it.
            probe.touch()
            yield temporary
            sync(temporary)
            like = path if path.is_file() else probe
            temporary.chmod(like.stat().st_mode & 0o777)
            os.replace(temporary, path)
            sync(path.parent)


@contextmanager
def _undisturbed(probe: Path, path: Path) -> Iterator[None]:
    """Say so where an error comes of another process that swept the directory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) or "os error 2" in str(error):
            time.sleep(0.1)  # It may still be deleting.
        if probe.exists():
            raise
        raise OSError(
            f"another process writes to {path.parent} too, and deleted what was half"
            " written; `samfn.held` keeps others out"
        ) from error


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Opening a named pipe would wait for whoever writes into it, and reading a device may
    never end, or change what it does.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is no regular file;
            `strerror` says what it is.
    """

    def opener(name: str, flags: int) -> int:
        # What is no file is not even touched; what became one since does not wait.
        _require_regular(name, os.stat(name).st_mode)
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)  # noqa: SIM115 - for the caller to close
    try:
        require_regular(file)
    except OSError:
        file.close()
        raise
    return file


def require_regular(file: IO[Any]) -> None:
    """Raise an OSError unless an open file is a regular one."""
    _require_regular(file.name, os.fstat(file.fileno()).st_mode)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return what a regular file of at most `MAX_TEXT` bytes holds.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_TEXT:
            reason = f"expected at most {MAX_TEXT:,} bytes, got {size:,}"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read()


def read_text(path: str | os.PathLike[str], errors: str = "strict") -> str:
    """Return the UTF-8 text of a regular file of at most `MAX_TEXT` bytes.

    Args:
        path: of the file.
        errors: what is done about other bytes, as for `open`.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is no UTF-8, and `errors` is "strict".
    """
    content = io.BytesIO(read_bytes(path))
    return io.TextIOWrapper(content, encoding="utf-8", errors=errors).read()


def _require_regular(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(number, f"expected a regular file, got {kind}", os.fspath(path))


def make_directory(path: Path) -> None:
    """Make a directory and those above it, to stay even if the power fails.

    Raises:
        FileNotFoundError: as `require_held`.
        OSError: it cannot be made.
    """
    require_held(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)


def put_aside(path: Path, ending: str) -> Path:
    """Rename a file to its name with an ending, and return that: "a" to "a.corrupt".

    What has that name already keeps it, and the new name ends in a number.

    Raises:
        OSError: it cannot be renamed, or is not there any more; and as `require_held`.
    """
    require_held(path)
    named = path.with_name(f"{path.name}.{ending}")
    aside = free_name(named, named)
    path.rename(aside)
    return aside


def free_name(path: Path, *first: Path) -> Path:
    """Return the first of these names, and of `path` with .1, .2, ..., that nothing has."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(place for place in chain(first, numbered) if not os.path.lexists(place))


def sweep(directory: Path) -> None:
    """Delete what killed processes left of `replacing` and `discard`, and nothing else.

    Only for who holds the directory: a file that is being written would go as well.
    """
    for folder in directory.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # It is no directory, say.
            names = [path.name for path in folder.iterdir()]
            if not folder.is_symlink() and all(_is_part(name, folder) for name in names):
                shutil.rmtree(folder, ignore_errors=True)


def _is_part(name: str, folder: Path) -> bool:
    """Return whether samfn leaves this name in a temporary folder; safetensors: .tmp."""
    of_ranks = folder.name.removeprefix(TEMPORARY)  # what all ranks write together
    return name in (*PARTS, of_ranks) or name.startswith(".tmp") or name.endswith(SHARDED)


def discard(path: Path) -> None:
    """Delete a file, or a directory, which is gone at once; `sweep` takes what is left.

    Raises:
        OSError: it cannot be deleted; and as `require_held`.
    """
    require_held(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    path.rename(folder / path.name)
    shutil.rmtree(folder)


@contextmanager
def held(
    directory: str | os.PathLike[str],
    *,
    wait: bool = False,
    tell: Callable[[str], None] = warnings.warn,
) -> Iterator[None]:
    """Keep other processes from holding a directory; the kernel frees what a dead one held.

    It is the directory that is held, and not its name: where another one has taken this,
    samfn writes nothing there, and raises a FileNotFoundError.

    Args:
        directory: made if it is not there; a file named ".samfn.lock" stays in it.
        wait: until nobody else holds it.
        tell: is told after two seconds of waiting in one line which process holds it.

    Raises:
        InUseError: another process holds it, and `wait` is False; says which.
        OSError: no file can be made there, or that file is none of samfn's own.
    """
    name = os.path.abspath(directory)
    with locked(Path(directory, LOCK), str(directory), wait=wait, tell=tell) as identity:
        _HELD[name] = identity, _identity(os.stat(name))
        try:
            yield
        finally:
            _HELD.pop(name, None)


def require_held(path: str | os.PathLike[str]) -> None:
    """Raise unless the directories of a path that this process holds have their names yet.

    Raises:
        FileNotFoundError: one was deleted or moved, whatever has its name now.
    """
    whole = Path(os.path.abspath(path))
    for folder in (whole, *whole.parents):
        if (known := _HELD.get(str(folder))) is None:
            continue
        try:  # It is open, so that no other file has its inode, as another folder may.
            same = _identity((folder / LOCK).stat()) == known[0]
        except FileNotFoundError:  # Somebody tidied up.
            same = _identity(folder.stat()) == known[1]
        if not same:
            reason = f"{os.strerror(errno.ENOENT)} any more, but another of this name"
            raise FileNotFoundError(errno.ENOENT, reason, str(folder))


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino


@contextmanager
def locked(
    path: Path, what: str, *, wait: bool, tell: Callable[[str], None]
) -> Iterator[Identity]:
    """Hold a lock file, which stays; as `held`, for what is called `what` in messages.

    Yields its device and inode.
    """
    import filelock  # Only who locks needs it, and it takes a while.

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE if wait else 0)
    except filelock.Timeout as error:
        if not wait:
            raise InUseError(f"{what} is in use by process {_holder(path)}") from error
        tell(f"waiting for {what}, which process {_holder(path)} holds")
        lock.acquire()
    try:
        yield _write_holder(path)
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Return the number of the process that holds a lock.

    It may have taken the lock a moment ago, and not have written its number yet.
    """
    deadline = time.monotonic() + PATIENCE
    while not _runs(number := _written(path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return number or "unknown"


def _written(path: Path) -> str:
    try:
        found = read_bytes(path).strip()
    except OSError:
        return ""
    return found.decode() if found.isdigit() else ""


def _runs(number: str) -> bool:
    """Return whether there is a process of this number, as far as can be seen."""
    if not number or os.name == "nt":
        return bool(number)
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False  # One that was killed, unless it is on another machine.
    except PermissionError:
        pass
    return True


def _write_holder(path: Path) -> Identity:
    """Say in a lock file which process holds it, unless it is another file's name too.

    Returns:
        Its device and inode.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, os.O_WRONLY | flags)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            reason = "expected a file of samfn's own, got a link to another"
            raise OSError(errno.EMLINK, reason, os.fspath(path))
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        return _identity(found)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until the disk has what a file, or the entries of a directory, hold."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories, and writes their entries through.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
