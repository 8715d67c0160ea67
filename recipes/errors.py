"""Errors that end a command in one line, and the exit codes of commands."""

# Exit codes beside 0, finished, and 128 + N, ended by signal N: 129, 130, 143.
WRONG_INPUT, DIVERGED, OUT_OF_MEMORY, NOT_WRITTEN, RANK_LOST = 2, 3, 4, 5, 6


class ConfigError(Exception):
    """Settings that cannot be used; says what was expected and what came."""


class DataError(Exception):
    """The data cannot be had, or is not what was asked for."""


class DivergedError(Exception):
    """Too many steps had a loss or gradient that was not finite."""


class Failed(Exception):
    """Exit with `code`; the error has been printed already."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code
