"""Recipes: models, data, settings and displays chosen for one task."""

import signal
import sys


def _is_command() -> bool:
    """Return whether Python is about to run a module of this package, as by `-m`."""
    args = sys.orig_argv[:-1]
    following = sys.orig_argv[args.index("-m") + 1] if "-m" in args else ""
    return sys.argv[:1] == ["-m"] and following.startswith(f"{__name__}.")


# Imports take seconds: Ctrl-C then ends a command as it ends others, without a traceback.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
