import os
import stat
import threading
import time
from contextlib import contextmanager

import pytest

from samfn.storage import files
from samfn.storage.files import InUseError, held, replacing
from tests import commands
from tests.special import SPECIAL, make_special

HOLD = """
import sys
from samfn.storage.files import held
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(path):
    """Hold a directory in another process; yield that, and what makes it let go."""
    (stdin, ours), (theirs, stdout) = os.pipe(), os.pipe()
    process = commands.start("-c", HOLD, path, stdin=stdin, stdout=stdout)
    os.close(stdin)
    os.close(stdout)
    with open(theirs) as said, open(ours, "w") as given:
        assert said.readline() == "held\n"
        yield process, given.close
    process.join()


def write(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_a_file_is_replaced_by_what_was_written_and_nothing_is_left(tmp_path):
    path = tmp_path / "a b é.txt"
    for text in ("one", "two"):
        write(path, text)
        assert path.read_text() == text
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_synced_renamed_and_its_directory_synced(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "file"
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        kind = "directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        size = os.fstat(handle).st_size if kind == "file" else None
        calls.append((f"sync {kind}", size, path.exists()))
        real_sync(handle)

    def replace(source, target):
        calls.append(("replace", os.stat(source).st_size, path.exists()))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(path, "12345")
    assert calls == [
        ("sync file", 5, False),
        ("replace", 5, False),
        ("sync directory", None, True),
    ]


def test_what_is_raised_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write(path, "old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_space_is_known_before_anything_is_written(tmp_path):
    with (
        pytest.raises(
            OSError,
            match=r"1,000,\d+,\d+.* bytes are needed and \d.* are free, of which 1,048,576",
        ),
        replacing(tmp_path / "file", need=10**18 + 10**6),
    ):
        raise AssertionError("it began to write")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_have_the_permissions_that_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "file", "")
        now = os.umask(mask)
    finally:
        os.umask(before)
    assert now == mask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_sweeping_deletes_what_was_left_half_written_and_nothing_else(tmp_path):
    for name in (".samfn-abc", ".samfn-xyz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    (tmp_path / ".samfn-abc" / ".tmpUSpkep").write_text("less")  # as safetensors begins
    (tmp_path / ".hidden").write_text("mine")
    mine = tmp_path / ".samfn-images"
    (mine / "train").mkdir(parents=True)
    (tmp_path / ".samfn-link").symlink_to(mine)
    (tmp_path / ".samfn-notes").write_text("mine")
    kept = {".hidden", *(path.name for path in tmp_path.glob(".samfn-[iln]*"))}
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert len(kept) == 4
    assert (mine / "train").is_dir()


def test_a_directory_is_held_by_one_process_until_that_dies(tmp_path):
    with holding(tmp_path) as (holder, _):
        busy = f"in use by process {holder.pid}"
        with pytest.raises(InUseError, match=busy), held(tmp_path):
            pass
        holder.kill()
        holder.join()
        assert holder.exitcode == -9
    for _ in range(2):
        with held(tmp_path):
            assert (tmp_path / files.LOCK).read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("before", ["", "999999999\n"])
def test_a_holder_that_has_not_written_its_number_yet_is_named(tmp_path, before):
    with holding(tmp_path) as (holder, let_go):
        lock = tmp_path / files.LOCK
        lock.write_text(before)  # what a holder finds that was killed, or none was
        late = threading.Timer(0.3, lock.write_text, [f"{holder.pid}\n"])
        late.start()
        with (
            pytest.raises(InUseError, match=f"in use by process {holder.pid}"),
            held(tmp_path),
        ):
            pass
        let_go()
        late.join()


CHANGES = {
    "replacing": lambda path: write(path, "new"),
    "make_directory": lambda path: files.make_directory(path.with_name("made")),
    "put_aside": lambda path: files.put_aside(path, "superseded"),
    "discard": files.discard,
}


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_is_held_and_not_its_name(tmp_path, monkeypatch, change, replaced):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "file"
    with held("run"):
        write(path, "old")
        path.parent.rename("moved")
        if replaced:
            with holding(path.parent):
                path.write_text("of others")
        with pytest.raises(FileNotFoundError, match="No such file or directory"):
            CHANGES[change](path)
    assert path.parent.exists() == replaced
    if replaced:
        assert path.read_text() == "of others"
        assert {found.name for found in path.parent.iterdir()} == {"file", files.LOCK}
    write(tmp_path / "file", "new")  # Nothing else was held, and now nothing is.
    files.make_directory(path.parent)
    write(path, "new")


@pytest.mark.parametrize("moved", [True, False])
def test_a_held_directory_without_its_lock_file_is_known_by_itself(tmp_path, moved):
    path = tmp_path / "run" / "file"
    with held(path.parent):
        (path.parent / files.LOCK).unlink()
        if moved:
            path.parent.rename(tmp_path / "moved")
            path.parent.mkdir()
            with pytest.raises(FileNotFoundError, match="another of this name"):
                write(path, "new")
        else:
            write(path, "new")
    assert path.exists() != moved


def test_a_directory_where_no_file_can_be_made_cannot_be_held(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), held(tmp_path / "file" / "directory"):
        pass


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(tmp_path, kind, linked):
    path = tmp_path / "é"
    make_special(path, kind)
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    for read in (files.open_regular, files.read_bytes, files.read_text):
        with pytest.raises(OSError, match=path.name) as caught:
            read(path)
        assert caught.value.strerror == f"expected a regular file, got {kind}"
    assert isinstance(caught.value, IsADirectoryError) == (kind == "a directory")


def test_what_becomes_a_pipe_while_it_is_opened_is_refused_too(tmp_path, monkeypatch):
    path, real = tmp_path / "file", os.stat
    path.write_text("")

    def stat_and_replace(name, *args, **options):
        found = real(name, *args, **options)
        if name == str(path):
            path.unlink()
            os.mkfifo(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat_and_replace)
        with pytest.raises(OSError, match="got a named pipe"):
            files.open_regular(str(path))


def test_texts_are_read_as_they_are_and_of_no_absurd_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xc3\xa9\r\nb")
    assert files.read_text(path) == "é\nb"
    assert files.read_bytes(str(path)) == b"\xc3\xa9\r\nb"
    path.write_bytes(b"a\xff")
    assert files.read_text(path, errors="replace") == "a\ufffd"
    with pytest.raises(UnicodeDecodeError):
        files.read_text(path)
    with path.open("wb") as file:
        file.truncate(4 * 2**40)
    with pytest.raises(
        OSError, match=r"at most 1,073,741,824 bytes, got 4,398,046,511,104"
    ):
        files.read_text(path)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_what_is_written_anew_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "file"
    write(path, "old")
    path.chmod(mode)
    write(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_two_that_write_into_one_directory_are_told_so(tmp_path):
    path = tmp_path / "file"
    write(path, "old")

    def swept(when):
        with replacing(path) as temporary:
            if when == "before":
                files.sweep(tmp_path)
            temporary.write_text("new")
            files.sweep(tmp_path)

    for when in ("before", "after"):
        with pytest.raises(OSError, match=r"another process writes to .*samfn\.held"):
            swept(when)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_lock_file_that_is_a_link_is_not_written_through(tmp_path, link):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    link(mine, tmp_path / files.LOCK)
    with pytest.raises(OSError, match=r"samfn\.lock"), held(tmp_path):
        raise AssertionError("it was held")
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_lock_file_that_is_no_file_makes_nobody_wait(tmp_path, kind):
    make_special(tmp_path / files.LOCK, kind)
    with pytest.raises(OSError, match=r"samfn\.lock|regular"), held(tmp_path, wait=True):
        raise AssertionError("it was held")


@pytest.mark.parametrize("written", ["{pid}\n", "", "é\x1b[2J", "x" * 10_000])
def test_who_waits_is_told_for_whom(tmp_path, written):
    said = []
    with holding(tmp_path) as (holder, let_go):
        (tmp_path / files.LOCK).write_text(written.format(pid=holder.pid))

        def tell(text):
            said.append((text, time.monotonic() - begun))
            let_go()

        begun = time.monotonic()
        with held(tmp_path, wait=True, tell=tell):
            holder.join()
            assert holder.exitcode == 0
    ((text, seconds),) = said
    process = holder.pid if "pid" in written else "unknown"
    assert text == f"waiting for {tmp_path}, which process {process} holds"
    assert 2 <= seconds < 10
    with held(tmp_path, wait=True, tell=said.append):
        pass
    assert len(said) == 1
