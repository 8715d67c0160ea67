"""Commands of Python in processes that are forked from one that has all modules.

A process that imports torch and the recipes anew takes seconds, and most tests ask for
nothing that such a process has and a forked one has not: arguments, environment, streams,
signals and exit codes are real. Tests of encodings, of imports and of the command line
itself start Python as a user does.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from multiprocessing.reduction import DupFd

from tests import ROOT

PRELOADED = ["bench.faults.trial", "tests.ranks", "recipes.compare", "recipes.landscape"]


def context():
    """Return what makes processes that need not import torch again."""
    found = get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start(*arguments, stdin=None, stdout=None, stderr=None, cwd=ROOT):
    """Start `python *arguments`: "-c" and code, or "-m" and a module, and what it is given.

    Streams are file descriptors; None is /dev/null. The process has `pid`, `join()` and
    `exitcode`, which is -N if signal N ended it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    streams = [null if each is None else each for each in (stdin, stdout, stderr)]
    given = [*map(str, arguments)], streams, str(cwd), dict(os.environ)
    process = context().Process(target=_Python(*given))
    process.start()
    os.close(null)
    return process


def run(*arguments, cwd=ROOT, timeout=600):
    """Run `python *arguments` to its end; return what `subprocess.run` would, of text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        streams = {"stdout": out.fileno(), "stderr": error.fileno()}
        process = start(*arguments, **streams, cwd=cwd)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} did not end within {timeout} s")
        for file in (out, error):
            file.seek(0)
        said = out.read(), error.read()
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


class _Python:
    """Python with its arguments, streams, directory and environment."""

    def __init__(self, arguments, streams, cwd, environment):
        self.arguments, self.streams = arguments, streams
        self.cwd, self.environment = cwd, environment

    def __getstate__(self):
        streams = [DupFd(each) for each in self.streams]
        return self.__dict__ | {"streams": streams}

    def __call__(self):
        for standard, given in enumerate(self.streams):
            os.dup2(given.detach(), standard)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            self.run()
        finally:
            atexit._run_exitfuncs()

    def run(self):
        option, what, *given = self.arguments
        sys.path.insert(0, self.cwd)
        sys.argv = [what if option == "-m" else option, *given]
        if option == "-m":
            sys.modules.pop(what, None)  # It is loaded as __main__ instead.
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
