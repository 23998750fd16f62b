"""Downloads from a server on loopback that is honest, slow of words, or lies."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.images import BackingImage, Images
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, Store, make_raw, manifest, sha512


class Server(ThreadingHTTPServer):
    """Hands out one file, in the manner that the path says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, headers, status = self.server.content, {}, 200
        if self.path == "/redirected":
            status, headers = 302, {"Location": "/file"}
        elif self.path == "/circle":
            status, headers = 301, {"Location": "/circle"}
        elif self.path == "/elsewhere":
            status, headers = 302, {"Location": "file:///etc/hostname"}
        elif self.path == "/absent":
            status = 404
        elif self.path == "/broken":
            status = 500
        self.send_response(status)
        if self.path == "/zipped":
            headers["Content-Encoding"] = "gzip"
        if self.path != "/sizeless":
            headers.setdefault("Content-Length", str(len(content) if status == 200 else 0))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if status == 200:
            self.wfile.write(content[: len(content) // 2] if self.path == "/short" else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def raw(tmp_path: Path, server: Server) -> Path:
    path = make_raw(tmp_path / "raw", 8 * MIB + 512, [(0, 100 * KIB), (3 * MIB, MIB), (8 * MIB, 512)])
    server.content = path.read_bytes()
    return path


def download(store: Store, server: Server, path: str, checksum: str = "") -> BackingImage:
    return store.apply(manifest("golden", "download", checksum, url=server.url + path))


@pytest.mark.parametrize("path", ["/file", "/redirected", "/sizeless"])
def test_the_file_arrives_byte_for_byte_and_sparse(store: Store, server: Server, raw: Path, path: str) -> None:
    image = download(store, server, path, sha512(raw))
    assert image.path.read_bytes() == raw.read_bytes()
    assert image.path.stat().st_blocks * 512 < 2 * MIB
    assert image.status.checksum == sha512(raw)


def test_a_checksum_is_case_sensitive_hex_and_must_fit(store: Store, server: Server, raw: Path) -> None:
    wrong = sha512(raw)[:-1] + ("0" if sha512(raw)[-1] != "0" else "1")
    with pytest.raises(EbiError, match=f"the checksum of backing image golden is {sha512(raw)}, and {wrong}") as caught:
        download(store, server, "/file", wrong)
    assert caught.value.kind is Kind.INVALID
    failed = store.images.get("golden")
    assert failed.status.state == "failed" and not failed.partial.exists()
    assert download(store, server, "/file", sha512(raw)).ready  # the manifest of a failed one may be corrected


@pytest.mark.parametrize(
    ("path", "words", "kind"),
    [
        ("/absent", "the server answered 404", Kind.NOT_FOUND),
        ("/broken", "the server answered 500", Kind.UNAVAILABLE),
        ("/circle", "redirects more than", Kind.UNAVAILABLE),
        ("/elsewhere", "redirects to file:", Kind.INVALID),
        ("/short", "the download of .* (failed|broke off)", Kind.UNAVAILABLE),
    ],
)
def test_what_goes_wrong_is_said(store: Store, server: Server, raw: Path, path: str, words: str, kind: Kind) -> None:
    with pytest.raises(EbiError, match=words) as caught:
        download(store, server, path)
    assert caught.value.kind is kind
    failed = store.images.get("golden")
    assert failed.status.state == "failed" and caught.value.message in failed.status.message


def test_a_content_encoding_is_not_undone(store: Store, server: Server) -> None:
    server.content = gzip.compress(bytes(MIB)).ljust(2048, b"\0")
    assert download(store, server, "/zipped").path.read_bytes() == server.content


def test_nobody_listening_is_said(store: Store, server: Server) -> None:
    with pytest.raises(EbiError, match=r"the download of http://127\.0\.0\.1:1/x failed: .*refused") as caught:
        store.apply(manifest("golden", "download", url="http://127.0.0.1:1/x"))
    assert caught.value.kind is Kind.UNAVAILABLE


@pytest.mark.parametrize("size", [0, 100, 513])
def test_a_disk_is_whole_sectors(store: Store, server: Server, size: int) -> None:
    server.content = bytes(size)
    with pytest.raises(EbiError, match=f"has {size} bytes"):
        download(store, server, "/file")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]"])
def test_this_host_is_off_limits_where_the_settings_say_so(tmp_path: Path, server: Server, host: str) -> None:
    server.content = bytes(MIB)
    store = Store(tmp_path, Images(tmp_path / "images", Settings(allow_loopback=False)))
    with pytest.raises(EbiError, match="is this machine"):
        store.apply(manifest("golden", "download", url=f"http://{host}:{server.server_address[1]}/file"))


def test_files_are_off_limits_where_the_settings_say_so(tmp_path: Path, raw: Path) -> None:
    store = Store(tmp_path, Images(tmp_path / "images", Settings(allow_files=False)))
    with pytest.raises(EbiError, match="names a file of this machine"):
        store.download(raw)
