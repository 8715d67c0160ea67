"""Text where characters of it are lacking: others stand for them, and nothing fails."""

import codecs
import io
import os
import re
import shlex
import sys

ERRORS = "samfn.legible"  # the name of the codecs' error handler
ASCII = str.maketrans(
    {
        "‖": "|",
        "±": "+-",
        "ρ": "rho",
        "λ": "lambda",
        "°": " deg",
        "–": "-",
        "…": "...",
        **dict.fromkeys("─━═╌╸╺", "-"),
        **dict.fromkeys("│┃║", "|"),
        **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    }
)
"""What stands for symbols of these programs, and for the boxes of their tables."""

SURROGATES = re.compile("[\udc80-\udcff]")  # what Python makes of bytes that are no text


def replace_what_streams_lack() -> None:
    """Let standard output and error never fail at a character, in whatever encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def legible(text: str, encoding: str) -> str:
    """Return text as a stream of an encoding shows it, to find out how wide that is."""
    return text.encode(encoding, ERRORS).decode(encoding)


def quoted(path: str | os.PathLike[str]) -> str:
    """Return the name of a file as a shell takes it, by numbers where it is no text."""
    text = os.fspath(path)
    if not SURROGATES.search(text):
        return shlex.quote(text)
    escaped = re.sub(r"([\\'])", r"\\\1", text)
    return f"$'{re.sub('[^ -~]', _by_number, escaped)}'"


def _by_number(found: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0]))


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Return what is written for characters that an encoding lacks, and where they end."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(ASCII)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(ERRORS, _replaced)
