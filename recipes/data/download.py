"""Downloads: over https alone, verified, and whole or not at all."""

import hashlib
import http.client
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from samfn.storage import files

ATTEMPTS = 3
CHUNK = 2**20  # bytes


class DownloadError(Exception):
    """A file could not be had, or is not the one that was expected."""


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://"):
            fp.close()
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    path: Path,
    *,
    sha256: str,
    size: int,
    slack: int = 0,
    context: ssl.SSLContext | None = None,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> None:
    """Fetch a file; up to three attempts, each from the start.

    Args:
        url: https.
        path: where to; whatever happens, there is either all of the file or none.
        sha256: of the file, or how it begins.
        size: of the file, in bytes.
        slack: bytes that the size may be off by, where it is known so well only.
        context: whose certificates count; None takes the system's.
        pause: seconds before the second attempt; twice that before the third.
        timeout: seconds that the server may be silent.

    Raises:
        DownloadError: says what was wrong with the last attempt.
    """
    _require_https(url)
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context), _HttpsOnly
    )
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            with (
                files.replacing(path, size + slack) as temporary,
                opener.open(url, timeout=timeout) as answer,
            ):
                _copy(answer, temporary, sha256, size, slack)
            return
        except urllib.error.HTTPError as error:
            error.close()
            reason: Exception = error
            if error.code < 500:
                break  # It will say the same again.
        except (OSError, http.client.HTTPException, _WrongError) as error:
            reason = error
    raise DownloadError(f"cannot download {url}: {reason}") from reason


class _WrongError(Exception):
    """The bytes that came are not the file."""


def _copy(answer: Any, path: Path, sha256: str, size: int, slack: int) -> None:
    digest, received = hashlib.sha256(), 0
    with path.open("wb") as file:
        while chunk := answer.read(CHUNK):
            received += len(chunk)
            if received > size + slack:
                break  # However much more may come.
            digest.update(chunk)
            file.write(chunk)
    if abs(received - size) > slack:
        came = f"more than {size:,}" if received > size else f"{received:,}"
        raise _WrongError(f"expected {size:,} bytes, got {came}")
    if not digest.hexdigest().startswith(sha256):
        raise _WrongError(f"expected SHA-256 {sha256}, got {digest.hexdigest()}")


def _require_https(url: str) -> None:
    if not url.startswith("https://"):
        raise DownloadError(f"expected an https address, got {url}")
