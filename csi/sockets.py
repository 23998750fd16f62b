"""Unix sockets that only their owner can reach."""

import os
import socket
import stat
from pathlib import Path

import grpc

from plugin.errors import EbiError, invalid, precondition

_MODE = 0o600
_LONGEST_PATH = 107  # sun_path of unix(7), without the byte that ends it


def path(endpoint: str) -> Path:
    """The path of a unix endpoint: `unix:///path`, `unix:/path` or a plain path. Raises INVALID."""
    found = Path(endpoint.removeprefix("unix://").removeprefix("unix:"))
    if not found.is_absolute():
        raise invalid(f"the endpoint {endpoint!r} is no unix socket", "give one such as unix:///run/ebi/csi.sock")
    if len(os.fsencode(found)) > _LONGEST_PATH:
        raise invalid(f"the path {found} is too long for a socket", f"use one of at most {_LONGEST_PATH} bytes")
    return found


def bind(server: grpc.Server, where: Path) -> None:
    """Have `server` listen at `where`. Raises PRECONDITION where another server does; a dead one's socket goes."""
    where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if where.exists() and stat.S_ISSOCK(where.stat().st_mode):
        with socket.socket(socket.AF_UNIX) as other:
            if other.connect_ex(str(where)) == 0:
                raise precondition(f"another server is listening at {where}", "stop it first, or use another endpoint")
        where.unlink()
    # No moment in which others could connect: the socket is made with its final mode.
    mask = os.umask(0o777 & ~_MODE)
    try:
        server.add_insecure_port(f"unix:{where}")
    except RuntimeError as error:
        raise EbiError(f"cannot listen at {where}: {error}", hint="is there another file at that path?") from error
    finally:
        os.umask(mask)
