"""Volumes whose image is made on demand: by a server on loopback that hands out no more than it is allowed to."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from csi.stubs import csi_pb2
from plugin.volumes import ondemand
from tests.unit.conftest import make_raw, sha512
from tests.unit.csi_node import MIB, Node, code, refused, running

STEP = 64 << 10


class Server(ThreadingHTTPServer):
    """Hands out one file bit by bit, all of it once `open` is set, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.asked = 0
        self.open = threading.Event()

    def source(self, path: str = "/image", **more: str) -> dict[str, str]:
        """The parameters of a StorageClass with an image of it."""
        url = f"http://127.0.0.1:{self.server_address[1]}{path}"
        return {
            "backingImage": "golden",
            "backingImageDataSourceType": "download",
            "backingImageDataSourceParameters": json.dumps({"url": url}),
            **more,
        }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200 if self.path == "/image" else 404)
        self.send_header("Content-Length", str(len(self.server.content) if self.path == "/image" else 0))
        self.end_headers()
        content = self.server.content if self.path == "/image" else b""
        try:
            while content:
                self.wfile.write(content[:STEP])
                content = content[STEP:]
                if not self.server.open.is_set():
                    self.server.open.wait(0.05)
        except OSError:  # the other side has gone
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server() as server:
        server.content = make_raw(tmp_path / "raw", 16 * MIB, [(0, 16 * MIB)]).read_bytes()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.open.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondemand, "_PATIENCE", 0.2)


@pytest.fixture
def node() -> Iterator[Node]:
    with running() as found:
        yield found


def created(node: Node, parameters: dict[str, str]) -> csi_pb2.Volume:
    """The volume, asked for until it is there."""
    for _ in range(300):
        try:
            return node.create("pvc-1", 16 * MIB, parameters=parameters)
        except Exception as error:
            if "is being downloaded" not in str(error):
                raise
    raise AssertionError("the image was never ready")


def test_an_absent_image_is_downloaded_once_for_all_that_ask(node: Node, server: Server) -> None:
    parameters = server.source()

    def ask(number: int) -> Any:
        return refused(lambda: node.create(f"pvc-{number}", 16 * MIB, parameters=parameters))

    with ThreadPoolExecutor(6) as pool:
        errors = list(pool.map(ask, range(6)))
    assert {error.code().name for error in errors} == {"UNAVAILABLE"}
    assert all("backing image golden is being downloaded, " in error.details() for error in errors)
    server.open.set()
    assert created(node, parameters).volume_id == "pvc-1"
    assert server.asked == 1
    assert node.create("pvc-2", 16 * MIB, parameters=parameters).volume_id == "pvc-2"


def test_a_small_image_is_there_at_once(node: Node, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondemand, "_PATIENCE", 60.0)
    server.open.set()
    assert node.create("pvc-1", 16 * MIB, parameters=server.source()).capacity_bytes == 16 * MIB


def test_what_failed_is_told_and_then_started_again(
    node: Node, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ondemand, "_PATIENCE", 60.0)
    for asked in (1, 2):
        error = refused(lambda: node.create("pvc-1", 16 * MIB, parameters=server.source("/absent")))
        assert "404" in error.details()
        assert error.code().name != "UNAVAILABLE"
        assert server.asked == asked
    assert not (node.settings.data_dir / "volumes" / "pvc-1").exists()


def test_a_wrong_checksum_is_told(node: Node, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondemand, "_PATIENCE", 60.0)
    server.open.set()
    parameters = server.source(backingImageChecksum="0" * 128)
    assert "checksum" in refused(lambda: node.create("pvc-1", 16 * MIB, parameters=parameters)).details()


def test_an_image_from_elsewhere_is_not_taken_for_it(node: Node, server: Server, tmp_path: Path) -> None:
    server.open.set()
    created(node, server.source(backingImageChecksum=sha512(tmp_path / "raw")))
    for other in (server.source("/other"), server.source(backingImageChecksum="0" * 128)):
        error = refused(lambda other=other: node.create("pvc-2", 16 * MIB, parameters=other))
        assert error.code().name == "INVALID_ARGUMENT"
        assert "existing backing image golden data source is different" in error.details()


def test_the_same_source_in_other_words_is_the_same(node: Node, server: Server) -> None:
    server.open.set()
    created(node, server.source())
    parameters = server.source()
    url = json.loads(parameters["backingImageDataSourceParameters"])["url"]
    parameters["backingImageDataSourceParameters"] = json.dumps({"url": f" {url}\n"})
    assert node.create("pvc-2", 16 * MIB, parameters=parameters).volume_id == "pvc-2"


def test_a_plain_image_is_no_image_for_an_encrypted_class(node: Node, server: Server) -> None:
    server.open.set()
    with pytest.raises(Exception, match="the backing image golden is not encrypted"):
        created(node, server.source(encrypted="true"))


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({"backingImageDataSourceType": "clone"}, "NOT_FOUND", "only download and export-from-volume make one"),
        ({"backingImageDataSourceType": "upload"}, "NOT_FOUND", "only download and export-from-volume make one"),
        ({"backingImageDataSourceType": ""}, "NOT_FOUND", "backing image golden not found"),
        ({"backingImageDataSourceParameters": "{}"}, "INVALID_ARGUMENT", "download URL is not provided"),
        ({"backingImageDataSourceParameters": '{"url": "ftp://a/b"}'}, "INVALID_ARGUMENT", "http or https"),
        ({"backingImage": "No Name"}, "INVALID_ARGUMENT", "invalid name"),
    ],
)
def test_what_can_not_be_made_is_refused(
    node: Node, server: Server, change: dict[str, str], expected: str, words: str
) -> None:
    error = refused(lambda: node.create("pvc-1", 16 * MIB, parameters=server.source(**change)))
    assert error.code().name == expected
    assert words in error.details()
    assert server.asked == 0


def test_a_stop_ends_the_download_and_the_next_server_starts_it_again(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running(data_dir=data) as node:
        assert code(lambda: node.create("pvc-1", 16 * MIB, parameters=server.source())) == "UNAVAILABLE"
    assert not [thread for thread in threading.enumerate() if thread.name == "image"]
    record = json.loads((data / "images" / "golden" / "record.json").read_text())
    assert record["status"]["state"] == "failed"
    assert "the driver is stopping" in record["status"]["message"]
    server.open.set()
    with running(data_dir=data) as node:
        assert created(node, server.source()).volume_id == "pvc-1"
