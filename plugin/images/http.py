"""Files from a URL: http and https by urllib3, file for a machine alone, handed out as pieces of bytes.

A connection that breaks is made again, after a wait, and goes on where the last one broke off, provided that the server
still has the same version of the file. A message tells a URL without its user, password and query: they may be secret.
"""

import logging
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from plugin.errors import EbiError, invalid, not_found, unavailable
from plugin.settings import Settings

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

log = logging.getLogger(__name__)

PIECE = 1 << 20
_REDIRECTS = 10
_CONNECT_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_STEP = 1 << 20  # bytes; who brings so much more before it breaks has not failed
_LATER = (408, 425, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


@dataclass(frozen=True)
class Part:
    """What there is of a file: `length` bytes of the version that `validator`, an ETag or a date, names."""

    length: int
    validator: str


@dataclass
class Download:
    """A file under way: its `size` in bytes (None: not told), and its content in pieces of 1 MiB, the last shorter.

    The first piece is byte `start` of it. An empty piece says that the file has changed, or can't be had in parts: all
    before is void, and the next piece is the first one. `validator` is empty where the server names no version.
    """

    size: int | None
    pieces: Iterator[bytes]
    start: int = 0
    validator: str = ""


@contextmanager
def download(url: str, settings: Settings, part: Part | None = None) -> Iterator[Download]:
    """Open `url`, following redirects; where `part` is still the start of the file, what follows it.

    Raises INVALID for a URL that may not be read, NOT_FOUND, and UNAVAILABLE where the server or the way to it fails
    more than `download_retries` times in a row.
    """
    if urlsplit(url).scheme == "file":
        with _local(url, settings) as found:
            yield found
        return
    from plugin.images import guard  # noqa: PLC0415 - slow to import, and most runs download nothing

    with guard.pool(_CONNECT_SECONDS, settings) as pool:
        transfer = _Transfer(pool, url, settings, part)
        try:
            yield transfer.begun()
        finally:
            transfer.close()


class _Transfer:
    """One file, over as many connections as it takes; `_at` counts the bytes that have come, in order."""

    def __init__(self, pool: "PoolManager", url: str, settings: Settings, part: Part | None) -> None:
        self._pool, self._url, self._settings = pool, url, settings
        self._at, self._validator = (part.length, part.validator) if part else (0, "")
        self._size: int | None = None
        self._furthest, self._failures = self._at, 0
        self._response: BaseHTTPResponse | None = None
        self._download = Download(None, self._pieces())

    def begun(self) -> Download:
        self._connect()
        self._download.start = self._at
        return self._download

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _pieces(self) -> Iterator[bytes]:
        buffer = bytearray()
        while True:
            try:
                while part := self._read(PIECE - len(buffer)):
                    buffer += part
                    if len(buffer) == PIECE:
                        yield bytes(buffer)
                        buffer.clear()
                break
            except _Broken as broken:
                before = self._at
                self._pause(broken.error)
                self._connect()
                if self._at < before:
                    buffer.clear()
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
        self._at += len(data)
        if self._size is None or (data and self._at <= self._size) or self._at == self._size:
            return data
        where = f"broke off after {self._at} of" if self._at < self._size else f"brought {self._at} bytes instead of"
        raise _Broken(unavailable(f"the download of {shown(self._url)} {where} {self._size} bytes", "try again later"))

    def _connect(self) -> None:
        """Have a response that goes on at `_at`, or that begins again, `_at` being 0 then."""
        while True:
            try:
                self._answered(self._requested())
                return
            except _Broken as broken:
                self._pause(broken.error, broken.wait)

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
        tag, date = headers.get("ETag", ""), headers.get("Last-Modified", "")
        self._validator = tag if tag.startswith('"') else date  # RFC 9110, 13.1.5: no weak tag in If-Range
        length = "" if "Transfer-Encoding" in headers else headers.get("Content-Length", "")
        self._known(int(length) if length.isdecimal() and len(length) < 19 else None)

    def _goes_on(self, response: "BaseHTTPResponse") -> bool:
        """Whether the partial content `response` is what was asked for."""
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        tag = response.headers.get("ETag", "")
        if (
            not found
            or int(found[1]) != self._at
            or (self._validator.startswith('"') and tag not in ("", self._validator))
        ):
            return False
        size = None if found[2] == "*" else int(found[2])
        if self._size is not None and size is not None and size != self._size:
            return False
        self._known(self._size if size is None else size)
        return True

    def _known(self, size: int | None) -> None:
        self._size = self._download.size = size
        self._download.validator = self._validator

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
        wait = min(_FIRST_WAIT * 2 ** (self._failures - 1), _LONGEST_WAIT) * random.uniform(0.5, 1)  # noqa: S311
        log.warning("%s; trying again in %.1f s", error.message, max(wait, least))
        time.sleep(max(wait, least))

    def _failed(self, error: Exception) -> EbiError:
        return unavailable(f"the download of {shown(self._url)} failed: {_words(error)}", "try again later")


class _Broken(Exception):
    """An attempt that failed with `error`, and the `wait` in seconds that the server asks for."""

    def __init__(self, error: EbiError, wait: float = 0.0) -> None:
        self.error, self.wait = error, wait


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
def _local(url: str, settings: Settings) -> Iterator[Download]:
    parts = urlsplit(url)
    if not settings.allow_files:
        raise invalid(f"the URL {shown(url)} names a file of this machine", "only http and https are allowed here")
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_file():
        raise not_found(f"there is no file {parts.netloc}{path}", "give it as file:///absolute/path")
    try:
        with path.open("rb", buffering=0) as file:
            yield Download(path.stat().st_size, iter(lambda: file.read(PIECE), b""))
    except PermissionError as error:
        raise invalid(f"cannot read {path}: {error.strerror}", "who may read it?") from error


def _words(error: Exception) -> str:
    """What `error` says, without the objects of urllib3 in it."""
    text = str(error.args[0]) if error.args and isinstance(error.args[0], str) else str(error)
    return re.sub(r"^HTTPS?Connection(Pool)?\([^)]*\): ", "", text.rpartition("object at 0x")[2]).strip()
