"""What is compiled is kept where only the user can have put anything."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.data.sources import user_cache
from recipes.train.compiling import HEADERS, exposed, keep_compiled
from tests import ROOT

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SOMEBODY = 65534  # who is not the user
COMPILES = """
import torch
from recipes.train.compiling import keep_compiled
keep_compiled(lambda text: print("warning", text))
print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(9)).sum().item())
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    # Four programs, by which PyTorch finds out what an empty cache's compiler knows, take
    # as long as all else; without them it compiles for any processor.
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "above"))
    monkeypatch.setenv(VARIABLE, "")  # to be as it was at the end
    monkeypatch.delenv(VARIABLE)
    return tmp_path / "above" / "samfn" / "compiled"


def kept():
    """Return where compiled code is kept now, and what was said about it."""
    said = []
    keep_compiled(said.append)
    return Path(os.environ[VARIABLE]), said


def python(*arguments, check=True):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)
    return done.stdout + done.stderr


def test_importing_samfn_leaves_where_compiled_code_is_kept_to_the_caller(cache):
    modules = "samfn, recipes.cifar_wrn, recipes.study.grid, recipes.study.runs"
    seen = "[m for m in sys.modules if m in ('torch._dynamo', 'torch._inductor')]"
    found = python(
        "-c", f"import os, sys, {modules}; print({seen}, os.environ.get('{VARIABLE}'))"
    )
    assert found == "[] None\n"


IMPORTS = """
import sys
from recipes.cifar_wrn import main
main(["--data", "digits", "--epochs", "1", "--output", sys.argv[1]])
print(sorted({"torch._dynamo", "sklearn", "scipy"} & {*sys.modules}))
"""


def test_a_short_run_imports_nothing_that_takes_longer_than_its_epochs(cache, tmp_path):
    assert python("-c", IMPORTS, str(tmp_path / "run")).endswith("\n[]\n")


@pytest.mark.slow
def test_a_run_keeps_its_kernels_in_the_users_cache(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv(HEADERS, raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_VEC_ISA_OK")
    flags = "--data digits --model wrn-10-1 --rho 0 --batch-size 16 --compile yes --dry-run"
    said = python("-m", "recipes.cifar_wrn", *flags.split())
    assert "one step taken" in said
    assert "warning" not in said
    assert list(cache.rglob("*.so"))
    # The long ones of the programs that ask what instructions there are.
    assert not [path for path in cache.rglob("*.cpp") if "__avx_chk" in path.read_text()]
    if shutil.which("openssl"):
        assert list((cache / "headers").glob("*.[gp]ch"))
    assert cache.stat().st_mode & 0o777 == 0o700
    left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    assert not left


KEEPS_HEADERS = """
from pathlib import Path
from torch._inductor import codecache, config
from samfn.compiled.plan import keep_headers
keep_headers(Path("/there"))
print(codecache._HEADER_DIR, config.cpp_cache_precompile_headers)
del codecache._HEADER_DIR
keep_headers(Path("/there"))
print(config.cpp_cache_precompile_headers)
"""


def test_where_headers_cannot_be_kept_there_are_none(monkeypatch):
    monkeypatch.setenv(HEADERS, "1")
    assert python("-c", KEEPS_HEADERS).endswith("/there True\nFalse\n")


def test_headers_are_precompiled_where_pytorch_can_tell_them_apart(monkeypatch, tmp_path):
    name = "cpp_cache_precompile_headers"
    told = f"from samfn.compiled.plan import LEAN; print('{name}' in LEAN)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python("-c", told) == "True\n"  # It is switched off.
    (tmp_path / "openssl").touch(mode=0o755)
    assert python("-c", told) == "False\n"  # As PyTorch has it, which is on.


def test_compiled_kernels_are_the_users_alone(cache):
    cache.mkdir(mode=0o755, parents=True)  # As an older version may have left it.
    (cache / "kernel").write_text("")
    assert kept() == (cache, [])
    assert cache.stat().st_mode & 0o777 == 0o700
    assert cache.parent == user_cache()


def test_what_pytorch_chose_by_itself_is_not_the_users_choice(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "torchinductor_me"))
    assert kept() == (cache, [])


def test_a_directory_of_the_users_own_choice_stays(cache, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert kept() == (tmp_path / "elsewhere", [])
    assert not cache.exists()


def widened(path):
    path.mkdir(parents=True)
    path.chmod(0o777)


def given_away(path):
    path.mkdir(parents=True)
    os.chown(path, SOMEBODY, SOMEBODY)


def linked(path):
    target = path.with_name("target")
    target.mkdir(parents=True)
    path.symlink_to(target)


def linked_where_all_may_write(path):
    linked(path)
    path.parent.chmod(0o1777)


def linked_to_what_all_may_write(path):
    linked(path)
    path.with_name("target").chmod(0o777)


def linked_to_somebody(path):
    linked(path)
    os.chown(path.with_name("target"), SOMEBODY, SOMEBODY)


def a_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def holding(change):
    def made(path):
        (path / "in").mkdir(parents=True)
        (path / "in" / "it").write_text("")
        change(path / "in" / "it")

    return made


# What is done to a directory -> what is said of it.
ITSELF = {
    widened: "others can write to",
    linked: "is a link",
    a_file: "File exists",
    holding(lambda path: path.chmod(0o666)): "others can write to .*it",
    holding(lambda path: path.parent.chmod(0o777)): "others can write to .*in",
    holding(lambda path: path.with_name("l").symlink_to(path)): "l is a link",
}
ABOVE = {
    widened: "others can write to",
    linked_where_all_may_write: "is a link",
    linked_to_what_all_may_write: "others can write to .*target",
    a_file: "Not a directory",
}
TO_SOMEBODY = {
    given_away: "is of another user, 65534",
    holding(lambda path: os.chown(path, SOMEBODY, 0)): "it is of another user",
    holding(lambda path: os.chown(path.parent, SOMEBODY, 0)): "in is of another user",
}
CASES = [
    *[(0, change, said) for change, said in ITSELF.items()],
    *[(level, change, said) for level in (1, 2) for change, said in ABOVE.items()],
    *[pytest.param(0, *case, marks=as_root) for case in TO_SOMEBODY.items()],
    *[
        pytest.param(level, change, "is of another user", marks=as_root)
        for level in (1, 2)
        for change in (given_away, linked_to_somebody)
    ],
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("level", "change", "expected"), CASES)
def test_what_others_may_have_changed_is_refused_in_one_line(
    cache, monkeypatch, level, change, expected, named
):
    if named:
        monkeypatch.setenv(VARIABLE, str(cache))
    change([cache, *cache.parents][level])
    path, (said,) = kept()
    assert path.name.startswith("samfn-compiled-")
    assert exposed(path) is None
    assert re.search(expected, said)
    assert "\n" not in said
    assert kept() == (path, [])  # Said once in a process.


LEAVES_ITS_CACHE = """
import os, signal
from recipes.train.compiling import keep_compiled
keep_compiled(lambda text: None)
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next_one(cache, monkeypatch, tmp_path):
    widened(cache)  # So that it is refused.
    shared = tmp_path / "temporary"
    shared.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    left = Path(python("-c", LEAVES_ITS_CACHE, check=False).strip())
    assert left.parent == shared
    assert left.is_dir()
    mine, _ = kept()
    assert not left.exists()
    (others := shared / "samfn-compiled-others").mkdir()
    others.chmod(0o777)
    (target := tmp_path / "target").mkdir()
    (target / "file").touch()
    (shared / "samfn-compiled-link").symlink_to(target)
    (shared / "samfn-compiled-file").touch()
    monkeypatch.delenv(VARIABLE)
    kept()
    assert mine.is_dir()  # It is in use.
    assert others.is_dir()
    assert [*target.iterdir()] == [target / "file"]
    assert (shared / "samfn-compiled-file").exists()


def in_a_directory_for_all(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o1777)


def linked_to_ones_own(path):
    linked(path.parent)


def writable_in_a_closed_one(path):
    path.mkdir(parents=True, mode=0o700)
    (path / "file").write_text("")
    (path / "file").chmod(0o666)


def writable_by_a_group_of_ones_own(path):
    path.mkdir(parents=True)
    os.chown(path, os.geteuid(), os.getegid())
    path.chmod(0o775)


OWN = [
    in_a_directory_for_all,
    linked_to_ones_own,
    writable_in_a_closed_one,
    pytest.param(writable_by_a_group_of_ones_own, marks=as_root),
]


@pytest.mark.parametrize("change", OWN)
def test_what_nobody_else_can_have_changed_is_used(cache, change):
    change(cache)
    assert kept() == (cache, [])


def test_without_a_home_there_is_a_directory_all_the_same(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    path, (said,) = kept()
    assert "no home directory: expected HOME or XDG_CACHE_HOME" in said
    assert exposed(path) is None


class Planted:
    """What leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@as_root
@pytest.mark.slow
def test_code_that_somebody_planted_never_runs(cache, tmp_path):
    assert "9.0\n" in python("-c", COMPILES)
    pickles = [path for path in (cache / "fxgraph").rglob("*") if path.is_file()]
    assert pickles
    for path in pickles:
        path.write_bytes(pickle.dumps(Planted(tmp_path / "mark")))
        os.chown(path, SOMEBODY, SOMEBODY)
    said = python("-c", COMPILES)
    assert "warning" in said
    assert "9.0\n" in said
    assert not (tmp_path / "mark").exists()
    for path in pickles:  # The twin: a planted file that is the user's own.
        os.chown(path, 0, 0)
    python("-c", COMPILES, check=False)
    assert (tmp_path / "mark").exists()
