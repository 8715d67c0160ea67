"""What is compiled is kept where only the user can read and write it."""

import os

import pytest

from recipes.compiling import keep_compiled
from recipes.data import user_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path / "samfn" / "compiled"


def test_compiled_kernels_are_the_users_alone(cache):
    cache.mkdir(mode=0o755, parents=True)  # As an older version may have left it.
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert cache.parent == user_cache()


def test_a_directory_of_the_users_own_choice_stays(cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    assert not cache.exists()


def test_where_nothing_can_be_written_nothing_changes(cache):
    cache.parent.write_text("a file, where a directory should be")
    keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
