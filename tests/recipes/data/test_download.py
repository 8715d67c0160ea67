"""Downloads, from a server on this machine that misbehaves."""

import hashlib
import http.server
import ssl
import subprocess
import threading
import time

import pytest

from recipes.data import download as module
from recipes.data.download import DownloadError, download

CONTENT = bytes(range(256)) * 9000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            "key.pem",
            "-out",
            "certificate.pem",
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "key.pem", folder / "certificate.pem"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.server.asked.append(self.path)
        answer(self)

    def log_message(self, *args):
        pass


def serve(handler, content, length=None):
    handler.send_response(200)
    handler.send_header("Content-Length", len(content) if length is None else length)
    handler.end_headers()
    handler.wfile.write(content)


def good(handler):
    serve(handler, CONTENT)


def cut(share):
    part = CONTENT[: int(share * len(CONTENT))]
    return lambda handler: serve(handler, part, len(CONTENT))


def too_long(handler):
    serve(handler, CONTENT * 3)


def shorter_length(handler):
    serve(handler, CONTENT[:1000])


def wrong_bytes(handler):
    serve(handler, CONTENT[::-1])


def fails(status):
    return lambda handler: handler.send_error(status)


def silent(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", len(CONTENT))
    handler.end_headers()
    handler.wfile.write(CONTENT[:1000])
    time.sleep(1)


def redirect(target):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


@pytest.fixture
def server(certificate, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    key, public = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        running.daemon_threads, running.asked = True, []
        running.handle_error = lambda *args: None
        running.trusted = ssl.create_default_context(cafile=public)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def fetch(server, path, *answers, trusted=True):
    server.answers = list(answers)
    download(
        f"https://localhost:{server.server_port}/file",
        path,
        sha256=SHA256,
        size=len(CONTENT),
        context=server.trusted if trusted else None,
        pause=0.01,
        timeout=0.5,
    )


@pytest.mark.parametrize(
    "answers",
    [
        [good],
        [fails(500), good],
        [fails(503), cut(0.5), good],
        [silent, good],
        [wrong_bytes, too_long, good],
        [redirect("/elsewhere"), good],
    ],
)
def test_the_file_arrives_even_if_the_server_stumbles(tmp_path, server, answers):
    fetch(server, tmp_path / "file", *answers)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.asked) == len(answers)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("answers", "said", "asked"),
    [
        ([cut(0.0)], "expected 2,304,000 bytes, got 0", 3),
        ([cut(0.3)], "expected 2,304,000 bytes, got 691,200", 3),
        ([cut(0.99)], "expected 2,304,000 bytes, got", 3),
        ([shorter_length], "expected 2,304,000 bytes, got 1,000", 3),
        ([too_long], "expected 2,304,000 bytes, got more than", 3),
        ([wrong_bytes], f"expected SHA-256 {SHA256}, got", 3),
        ([silent], "timed out", 3),
        ([fails(500)], "500", 3),
        ([fails(404)], "404", 1),
        ([redirect("http://localhost:1/file")], "expected an https address, got http:", 1),
        ([redirect("file:///etc/passwd")], "is not allowed", 1),
        ([redirect("/file")], "302", 5),
    ],
)
def test_no_other_file_ever_arrives(tmp_path, server, answers, said, asked):
    with pytest.raises(DownloadError, match=said):
        fetch(server, tmp_path / "file", *answers)
    assert len(server.asked) == asked
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("off", [-7, 7])
def test_size_and_sha256_may_be_known_in_part(tmp_path, server, off):
    server.answers = [good]
    url, path = f"https://localhost:{server.server_port}/file", tmp_path / "file"
    known = {"size": len(CONTENT) + off, "context": server.trusted, "pause": 0.01}
    download(url, path, sha256=SHA256[:8], slack=7, **known)
    assert path.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"expected 2,30\d,\d+ bytes, got"):
        download(url, path, sha256=SHA256[:8], slack=6, **known)
    wrong = SHA256[1:9]
    with pytest.raises(DownloadError, match=f"expected SHA-256 {wrong}, got {SHA256}"):
        download(url, path, sha256=wrong, slack=7, **known)


def test_the_file_of_before_stays(tmp_path, server):
    (tmp_path / "file").write_text("old")
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "file", cut(0.5))
    assert (tmp_path / "file").read_text() == "old"


def test_a_server_that_cannot_be_trusted_is_refused(tmp_path, server):
    with pytest.raises(DownloadError, match="certificate verify failed"):
        fetch(server, tmp_path / "file", good, trusted=False)
    assert not server.asked


def test_only_https_is_spoken(tmp_path):
    with pytest.raises(DownloadError, match="expected an https address, got http://x"):
        download("http://x", tmp_path / "file", sha256=SHA256, size=1)


def test_attempts_are_further_and_further_apart(tmp_path, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "file", fails(500))
    assert pauses == [0.01, 0.02]
