"""An HTTP server on loopback that hands out one file, and can be told to do so badly."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """How one request is answered; as it stands here, well: in parts where asked, with a strong ETag."""

    status: int = 0  # 0: 200 or 206
    headers: dict[str, str] = field(default_factory=dict)  # an empty one is left out
    cut: int = -1  # the connection breaks after so many bytes of this answer
    more: bytes = b""  # stands behind the content
    ranges: bool = True
    chunked: bool = False
    until_closed: bool = False  # neither a length nor chunks
    stall: bool = False  # where it would break, it falls silent instead, until the client goes


class Server(ThreadingHTTPServer):
    """`content` for each request as the next of `answers` says, or well when there are no more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.tag = b"", '"1"'
        self.modified = "Sat, 01 Jan 2022 00:00:00 GMT"
        self.answers: list[Answer] = []
        self.rest = Answer()  # how all further requests are answered
        self.asked: list[tuple[str, dict[str, str]]] = []  # path and headers of each request
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, object]:
        self.connections += 1
        return super().get_request()

    def handle_error(self, *_: object) -> None:
        pass  # a client that went


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked.append((self.path, dict(self.headers)))
        answer = server.answers.pop(0) if server.answers else server.rest
        content, start = server.content, 0
        status, headers = answer.status or 200, {"ETag": server.tag, "Last-Modified": server.modified}
        wanted = self.headers.get("Range")
        if wanted and answer.ranges and not answer.status and self.headers["If-Range"] in (server.tag, server.modified):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] + answer.more if status in (200, 206) else b""
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif not answer.until_closed:
            headers["Content-Length"] = str(len(body))
        self.protocol_version = "HTTP/1.1"
        self.send_response(status)
        for key, value in (headers | answer.headers).items():
            if value:
                self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._send(body, answer)

    def _send(self, body: bytes, answer: Answer) -> None:
        part = body if answer.cut < 0 else body[: answer.cut]
        if answer.chunked:
            for at in range(0, len(part), 100_000):
                piece = part[at : at + 100_000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if len(part) == len(body):
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(part)
        self.wfile.flush()
        if answer.stall:
            with suppress(OSError):
                self.connection.recv(1)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server for the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
