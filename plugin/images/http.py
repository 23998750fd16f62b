"""Files from a URL: http and https by urllib3, file for a machine alone, handed out as pieces of bytes.

A connection that breaks is made again, after a wait, and goes on where the last one broke off, provided that the server
still has the same version of the file. A message tells a URL without its user, password and query: they may be secret.
"""

import logging
import os
import random
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from plugin.errors import EbiError, invalid, not_found, unavailable
from plugin.settings import Settings

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager
    from urllib3._collections import HTTPHeaderDict

log = logging.getLogger(__name__)

PIECE = 1 << 20
_REDIRECTS = 10
_CONNECT_SECONDS = 10.0
_LONGEST_WAIT = 30.0  # seconds
_STEP = 1 << 20  # bytes; who brings so much more before it breaks has not failed
_LATER = (408, 425, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


@dataclass
class Download:
    """A file under way: its `size` in bytes (None: not told), and its content in pieces of 1 MiB, the last shorter.

    An empty piece says that the file has changed, or can't be had in parts: all before is void, and the next piece is
    the first one. `allocated` is what the file takes of a disk where it lies, None where that can't be told.
    Another thread may take the pieces; `stop` ends its waiting.
    """

    size: int | None
    pieces: Iterator[bytes]
    allocated: int | None = None
    stop: Callable[[], None] = lambda: None


def check(url: str, owner: str, settings: Settings) -> None:
    """Raise INVALID where `settings` don't let `owner` be downloaded from `url`, as far as itself tells."""
    parts = _split(url)
    if parts.scheme == "file" and not settings.allow_files:
        raise invalid(
            f"the URL {shown(url)} of {owner} names a file of this machine", "only http and https are allowed here"
        )
    if parts.hostname and parts.scheme != "file" and not settings.allow_loopback:
        from plugin.images import guard  # noqa: PLC0415 - as below

        if guard.says_this_machine(parts.hostname):
            raise guard.refused(parts.hostname, owner)


@contextmanager
def download(url: str, settings: Settings) -> Iterator[Download]:
    """The file at `url`, which was checked; its size is known with the first piece.

    Taking the pieces raises INVALID for a URL that may not be read, NOT_FOUND, and UNAVAILABLE where the server or the
    way to it fails more than `download_retries` times in a row.
    """
    if urlsplit(url).scheme == "file":
        with _local(url) as found:
            yield found
        return
    from plugin.images import guard  # noqa: PLC0415 - slow to import, and most runs download nothing

    with guard.pool(_CONNECT_SECONDS, settings) as pool:
        transfer = _Transfer(pool, url, settings)
        try:
            yield transfer.download
        finally:
            transfer.stop()
            transfer.close()


def from_file(file: RawIOBase) -> Download:
    """What the open, unbuffered `file` holds, or brings where it is a pipe."""
    status = Path(f"/proc/self/fd/{file.fileno()}").stat()
    if not stat.S_ISREG(status.st_mode):
        os.set_blocking(file.fileno(), True)  # else nothing yet looks like the end
        return Download(None, _read_all(file))
    return Download(status.st_size, _read_all(file), status.st_blocks * 512)


def _read_all(file: RawIOBase) -> Iterator[bytes]:
    buffer = bytearray()
    while part := file.read(PIECE - len(buffer)):
        if len(part) == PIECE:  # as files give them: one copy less than what a pipe brings
            yield part
            continue
        buffer += part
        if len(buffer) == PIECE:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


class _Transfer:
    """One file, over as many connections as it takes; `_at` counts the bytes that have come, in order."""

    def __init__(self, pool: "PoolManager", url: str, settings: Settings) -> None:
        self._pool, self._url, self._settings = pool, url, settings
        self._at, self._validator = 0, ""
        self._size: int | None = None
        self._furthest = self._failures = 0
        self._response: BaseHTTPResponse | None = None
        self._stopped = threading.Event()
        self.download = Download(None, self._pieces(), stop=self.stop)

    def stop(self) -> None:
        """End it, whatever it waits for; from any thread."""
        self._stopped.set()
        if (response := self._response) is not None:
            with suppress(OSError, ValueError, RuntimeError):  # where it has no socket any more
                response.shutdown()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _pieces(self) -> Iterator[bytes]:
        buffer, came = bytearray(), 0
        self._connect()
        while True:
            try:
                while part := self._read(PIECE - len(buffer)):
                    buffer += part
                    came += len(part)
                    if len(buffer) == PIECE:
                        yield bytes(buffer)
                        buffer.clear()
                break
            except _Broken as broken:
                self._pause(broken.error)
                self._connect()
                if self._at != came:  # it begins again
                    buffer.clear()
                    came = 0
                    yield b""
        if buffer:
            yield bytes(buffer)

    def _read(self, most: int) -> bytes:
        """Some more bytes, none at the end. Raises _Broken."""
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        assert self._response is not None
        try:
            data = self._response.read1(most, decode_content=False)
        except (HTTPError, OSError) as error:
            raise _Broken(self._failed(error)) from error
        size, where = self._size, f"the download of {shown(self._url)}"
        if size is not None and not data and self._at < size:
            raise _Broken(unavailable(f"{where} broke off after {self._at} of {size} bytes", "try again later"))
        if size is not None and self._at + len(data) > size:
            self._at, self._validator = 0, ""  # of what came nothing can be trusted
            raise _Broken(unavailable(f"{where} brought more than its {size} bytes", "is the server in order?"))
        self._at += len(data)
        return data

    def _connect(self) -> None:
        """Have a response that goes on at `_at`, or that begins again, `_at` being 0 then."""
        while True:
            try:
                self._answered(self._requested())
                break
            except _Broken as broken:
                self._pause(broken.error, broken.wait)
        if self._stopped.is_set():
            self.close()
            raise unavailable(f"the download of {shown(self._url)} was stopped")

    def _requested(self) -> "BaseHTTPResponse":
        """The server's answer, all redirects followed."""
        from urllib3.exceptions import HTTPError, LocationValueError  # noqa: PLC0415

        self.close()
        headers = {"User-Agent": "ebi", "Accept-Encoding": "identity"}
        if self._at and self._validator:
            headers |= {"Range": f"bytes={self._at}-", "If-Range": self._validator}
        at = self._url
        for _ in range(_REDIRECTS):
            try:
                response = self._pool.request(
                    "GET", at, headers=headers, redirect=False, preload_content=False, decode_content=False
                )
            except LocationValueError as error:
                raise invalid(f"{shown(at)} is no URL", "is it spelled right?") from error
            except (HTTPError, OSError) as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise self._failed(error) from error
                raise _Broken(self._failed(error)) from error
            where = response.get_redirect_location()
            if not where:
                return response
            response.close()
            at = _joined(at, where)
            if _split(at).scheme not in ("http", "https"):
                raise invalid(f"{shown(self._url)} redirects to {shown(at)}", "only http and https are followed")
        raise unavailable(f"{shown(self._url)} redirects more than {_REDIRECTS} times", "is the URL right?")

    def _answered(self, response: "BaseHTTPResponse") -> None:
        """Take `response` up. Raises _Broken for one that may be another one later, what it means for any other."""
        headers = response.headers
        if response.status == 206 and self._goes_on(response):
            self._response = response
            return
        if response.status in (206, 416) and self._at:
            response.close()
            self._at, self._validator = 0, ""
            raise _Broken(unavailable(f"the server gave other parts of {shown(self._url)} than asked for"))
        if response.status != 200:
            response.close()
            raise self._refused(response.status, headers.get("Retry-After", ""))
        self._response, self._at = response, 0
        self._validator = _version(headers)
        length = "" if "Transfer-Encoding" in headers else headers.get("Content-Length", "")
        self._known(int(length) if length.isdecimal() and len(length) < 19 else None)

    def _goes_on(self, response: "BaseHTTPResponse") -> bool:
        """Whether the partial content `response` is what was asked for."""
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        version = response.headers.get("ETag" if self._validator.startswith('"') else "Last-Modified", "")
        if not found or int(found[1]) != self._at or version not in ("", self._validator):
            return False
        size = None if found[2] == "*" else int(found[2])
        if self._size is not None and size is not None and size != self._size:
            return False
        self._known(self._size if size is None else size)
        return True

    def _known(self, size: int | None) -> None:
        self._size = self.download.size = size

    def _refused(self, status: int, wait: str) -> Exception:
        text = f"the server answered {status} for {shown(self._url)}"
        if status in _LATER:
            seconds = float(wait) if wait.isdecimal() and len(wait) < 9 else 0.0
            return _Broken(unavailable(text, "try again later"), min(seconds, _LONGEST_WAIT))
        if status in (404, 410):
            return not_found(text, "is the URL right?")
        if status in (401, 403, 407):
            return invalid(text, "may it be read by anyone? is its signature still good?")
        return invalid(text, "is the URL right?") if 400 <= status < 500 else unavailable(text, "is the URL right?")

    def _pause(self, error: EbiError, least: float = 0.0) -> None:
        """Wait before the next attempt; raise `error` where there have been enough."""
        if self._at >= self._furthest + _STEP:
            self._failures = 0
        self._furthest = max(self._furthest, self._at)
        self._failures += 1
        if self._failures > self._settings.download_retries:
            raise error
        wait = min(self._settings.download_retry_seconds * 2 ** (self._failures - 1), _LONGEST_WAIT)
        wait = max(wait * random.uniform(0.5, 1), least)  # noqa: S311
        log.warning("%s; trying again in %.1f s", error.message, wait)
        if self._stopped.wait(wait):
            raise error

    def _failed(self, error: Exception) -> EbiError:
        return unavailable(f"the download of {shown(self._url)} failed: {_words(error)}", "try again later")


class _Broken(Exception):
    """An attempt that failed with `error`, and the `wait` in seconds that the server asks for."""

    def __init__(self, error: EbiError, wait: float = 0.0) -> None:
        self.error, self.wait = error, wait


def _version(headers: "HTTPHeaderDict") -> str:
    """What names this very version of the file; empty where nothing does (RFC 9110, 8.8.1 and 13.1.5).

    No weak tag, and no date so close to the answer's own that the file may have changed again within that second.
    """
    tag, modified, date = (headers.get(name, "") for name in ("ETag", "Last-Modified", "Date"))
    if tag.startswith('"'):
        return tag
    try:
        return modified if parsedate_to_datetime(date) > parsedate_to_datetime(modified) else ""
    except (ValueError, TypeError):
        return ""


def shown(url: str) -> str:
    """`url` for messages: scheme, host, port and path."""
    parts = _split(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise invalid("the download leads to something that is no URL", "is the URL right?") from error


def _joined(base: str, where: str) -> str:
    try:
        return urljoin(base, where)
    except ValueError as error:
        raise invalid(f"{shown(base)} redirects to something that is no URL", "is the URL right?") from error


@contextmanager
def _local(url: str) -> Iterator[Download]:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_file():
        raise not_found(f"there is no file {parts.netloc}{path}", "give it as file:///absolute/path")
    try:
        with path.open("rb", buffering=0) as file:
            yield from_file(file)
    except PermissionError as error:
        raise invalid(f"cannot read {path}: {error.strerror}", "who may read it?") from error


def _words(error: Exception) -> str:
    """What `error` says, without the objects of urllib3 in it."""
    text = str(error.args[0]) if error.args and isinstance(error.args[0], str) else str(error)
    return re.sub(r"^HTTPS?Connection(Pool)?\([^)]*\): ", "", text.rpartition("object at 0x")[2]).strip()
