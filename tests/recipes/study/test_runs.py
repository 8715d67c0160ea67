"""Which of many directories are runs."""

import contextlib
import os
import tempfile
from pathlib import Path

from recipes.settings.saved import CONFIG_FILE
from recipes.study import runs
from recipes.terminal.console import Display


@contextlib.contextmanager
def somebody():
    """Be a user who is not the administrator, if this is the administrator."""
    own, nobody = os.geteuid(), 65534
    if own == 0:
        os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(own)


def test_a_run_that_may_not_be_looked_into_is_not_left_out(capsys):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Others may enter it.
        own = Path(folder)
        own.chmod(0o755)
        (own / "report").mkdir()
        (own / "closed").mkdir()
        (own / "closed" / CONFIG_FILE).touch()
        (own / "closed").chmod(0)
        paths = [own / "report", own / "closed", own / "closed" / "within", own / "none"]
        with somebody():
            found = runs.among(paths, Display())
        assert found == tuple(paths[1:])
    assert "report is no run: it holds no config.toml" in capsys.readouterr().err
