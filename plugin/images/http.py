"""Files from a URL: http and https by urllib3, file for a machine alone, handed out as pieces of bytes."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from plugin.errors import invalid, not_found, unavailable
from plugin.settings import Settings

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

PIECE = 1 << 20
_REDIRECTS = 10
_CONNECT_SECONDS, _IDLE_SECONDS = 10.0, 60.0


@dataclass(frozen=True)
class Download:
    """A file under way: its `size` in bytes (None: not told), and its content in pieces of 1 MiB, the last shorter."""

    size: int | None
    pieces: Iterator[bytes]


@contextmanager
def download(url: str, settings: Settings) -> Iterator[Download]:
    """Open `url`, following redirects.

    Raises INVALID for a URL that may not be read, NOT_FOUND, and UNAVAILABLE where the server or the way to it fails.
    """
    if urlsplit(url).scheme == "file":
        with _local(url, settings) as found:
            yield found
        return
    import urllib3  # noqa: PLC0415 - slow to import, and most runs download nothing

    timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_IDLE_SECONDS)
    with urllib3.PoolManager(retries=False, timeout=timeout) as pool:
        try:
            response = _opened(pool, url, settings)
            try:
                length = response.headers.get("Content-Length", "")
                size = int(length) if length.isdigit() else None
                yield Download(size, _pieces(response, size, url))
            finally:
                response.release_conn()
                response.close()
        except urllib3.exceptions.HTTPError as error:
            raise unavailable(f"the download of {url} failed: {_words(error)}", "try again later") from error


def _opened(pool: "PoolManager", url: str, settings: Settings) -> "BaseHTTPResponse":
    at = url
    for _ in range(_REDIRECTS):
        _check_host(at, settings)
        response = pool.request(
            "GET",
            at,
            headers={"User-Agent": "ebi", "Accept-Encoding": "identity"},
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        where = response.get_redirect_location()
        if not where:
            if response.status != 200:
                response.close()
                make = not_found if response.status in (404, 410) else unavailable
                raise make(f"the server answered {response.status} for {at}", "is the URL right?")
            return response
        response.close()
        at = urljoin(at, where)
        if urlsplit(at).scheme not in ("http", "https"):
            raise invalid(f"{url} redirects to {at}", "only http and https are followed")
    raise unavailable(f"{url} redirects more than {_REDIRECTS} times", "is the URL right?")


def _pieces(response: "BaseHTTPResponse", size: int | None, url: str) -> Iterator[bytes]:
    got = 0
    while True:
        parts, length = [], 0
        while length < PIECE and (part := response.read(PIECE - length)):
            parts.append(part)
            length += len(part)
        if not length:
            break
        got += length
        yield b"".join(parts)
    if size is not None and got != size:
        raise unavailable(f"the download of {url} broke off after {got} of {size} bytes", "try again")


def _check_host(url: str, settings: Settings) -> None:
    """Keep a manifest from reading this host's own services through us."""
    if settings.allow_loopback:
        return
    host = urlsplit(url).hostname or ""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise unavailable(f"cannot resolve the host {host}: {error.strerror}", "is the URL right?") from error
    for address in addresses:
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        if found.is_loopback or found.is_unspecified or found.is_link_local:
            raise invalid(f"the host {host} of the download URL is this machine", "give the URL of another host")


@contextmanager
def _local(url: str, settings: Settings) -> Iterator[Download]:
    parts = urlsplit(url)
    if not settings.allow_files:
        raise invalid(f"the URL {url} names a file of this machine", "only http and https are allowed here")
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_file():
        raise not_found(f"there is no file {parts.netloc}{path}", "give it as file:///absolute/path")
    try:
        with path.open("rb", buffering=0) as file:
            yield Download(path.stat().st_size, iter(lambda: file.read(PIECE), b""))
    except PermissionError as error:
        raise invalid(f"cannot read {path}: {error.strerror}", "who may read it?") from error


def _words(error: Exception) -> str:
    text = str(error)
    return text.rpartition(": ")[2] if "object at 0x" in text else text
