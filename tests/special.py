"""What stands in a file's place and is none."""

import os
import socket
from pathlib import Path

SPECIAL = ("a named pipe", "a device", "a socket", "a directory")


def make_special(path: Path, kind: str) -> None:
    """Put something in a path's place that is no regular file."""
    path.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    else:
        where = os.open(path.parent, os.O_RDONLY)  # A socket's whole path is short.
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"/proc/self/fd/{where}/{path.name}")
        os.close(where)
