"""Connections for downloads; where the settings say so, none to this machine itself.

Else a manifest could read what only this host may read (its own services, a cloud's metadata) through us. Names are
resolved and looked at before a connection is made, so that an open port can't be told from a closed one; and the
connection's own peer is looked at before a byte is sent, since a name may be another address a moment later.
"""

import ipaddress
import socket

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from plugin.errors import EbiError, invalid
from plugin.settings import Settings


def pool(connect_seconds: float, settings: Settings) -> urllib3.PoolManager:
    """What makes connections: no retries of its own, an end to waiting, and the guard where it is wanted."""
    timeout = urllib3.Timeout(connect=connect_seconds, read=settings.download_idle_seconds)
    manager = urllib3.PoolManager(retries=False, timeout=timeout)
    if not settings.allow_loopback:
        manager.pool_classes_by_scheme = {"http": _GuardedHTTPPool, "https": _GuardedHTTPSPool}
    return manager


def says_this_machine(host: str) -> bool:
    """Whether `host`, of a URL, leads to this host by what it says alone: nobody is asked."""
    try:  # every way to write an address that a connection would take
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        found = []
    name = "." + host.lower().rstrip(".")
    return name.endswith(".localhost") or any(is_this_machine(str(entry[4][0])) for entry in found)


def is_this_machine(address: str, own: str = "") -> bool:
    """Whether `address`, of IPv4 or IPv6, leads to this host: loopback, unspecified, link-local, or its `own`."""
    if address == own:
        return True
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified or found.is_link_local


class _GuardedHTTP(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        _check_name(self.host)
        return _checked(super()._new_conn(), self.host)


class _GuardedHTTPS(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        _check_name(self.host)
        return _checked(super()._new_conn(), self.host)


class _GuardedHTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _GuardedHTTP


class _GuardedHTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _GuardedHTTPS


def _check_name(host: str) -> None:
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except (OSError, UnicodeError):
        return  # connecting will fail in the same way, and tell it
    if any(is_this_machine(address) for address in addresses):
        raise refused(host)


def _checked(connection: socket.socket, host: str) -> socket.socket:
    # The kernel talks to an address of this machine's own from that same address.
    if is_this_machine(str(connection.getpeername()[0]), str(connection.getsockname()[0])):
        connection.close()
        raise refused(host)
    return connection


def refused(host: str, owner: str = "") -> EbiError:
    """What to raise about the `host` of a URL that `owner` shall be downloaded from."""
    return invalid(
        f"the host {host} of the download URL{owner and f' of {owner}'} is this machine", "give the URL of another host"
    )
