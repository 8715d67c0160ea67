"""Settings for all tests: stricter than production, and repeatable."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is imported: processes that share the processors share its threads.
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

if not workers:  # Who starts workers makes one for all.
    os.environ["SAMFN_TEMPORARY"] = made = tempfile.mkdtemp(prefix="samfn-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)

if shutil.which("openssl"):  # with which PyTorch compares headers
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1")

import pytest
import torch
from hypothesis import settings

from tests import ROOT

# The first call of an operation takes longer than Hypothesis's deadline.
settings.register_profile("samfn", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("samfn")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test downloads anything, nor reads what a user has: every machine is alike."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("https_proxy", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")  # the port where nobody listens
        patch.delenv("no_proxy", raising=False)
        patch.delenv("NO_PROXY", raising=False)
        # Commands of the recipes run from a clone, wherever a test is.
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # One for all workers: what a compiler is asked at first takes it ten seconds.
        root = tmp_path_factory.getbasetemp()
        compiled = (root.parent if workers else root) / "compiled"
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        # PyTorch's headers, which take the compiler four times as long as a kernel, are
        # compiled once. They lie where temporary files do.
        patch.setenv("TMPDIR", os.environ["SAMFN_TEMPORARY"])
        patch.setattr("tempfile.tempdir", os.environ["SAMFN_TEMPORARY"])
        yield


@pytest.fixture
def no_hang() -> Iterator[None]:
    """End whatever waits, and let its test fail."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
