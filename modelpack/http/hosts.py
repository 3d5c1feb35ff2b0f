"""Checks of `Host` and `Origin`: which requests of browsers a server accepts.

With DNS rebinding, a page points its own host name at a server's address; its requests then have
that name in `Host`, whatever address the server listens on.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address


class AllowedHosts:
    """The hosts that requests may be for: loopback ones, `names`, and the socket's own address.

    A name may be an address; one that begins with a dot stands for all names below it. The
    unspecified address (`0.0.0.0`, `::`) allows every address, since containers map ports, and DNS
    rebinding needs a name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {host_of(name) for name in names}
        self._endings = tuple(name for name in self._names if name.startswith("."))
        self._any_address = any(_is_unspecified(name) for name in self._names)

    def allows(self, host: str, server: Sequence[object] | None = None) -> bool:
        """Return whether a request with this `Host` header is for this server.

        `server` is ASGI's: the address of the socket that the request arrived at, and its port.
        """
        name = host_of(host)
        if name == "localhost" or name in self._names:
            return True
        if self._endings and name.endswith(self._endings):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        if self._any_address or address.is_loopback:
            return True
        return server is not None and _is_address(server[0], address)


def host_of(text: str) -> str:
    """Return the host in `host[:port]`, lower case and without the brackets of IPv6."""
    text = text.strip().lower()
    if text.startswith("["):
        inside, _, rest = text[1:].partition("]")
        return inside if not rest or rest.startswith(":") else text
    host, colon, _ = text.rpartition(":")
    return host if colon and ":" not in host else text


def is_loopback(host: str) -> bool:
    """Return whether `host` (a name or an address, without a port) stays on this machine.

    Names below `localhost` do not count: a resolver may give a listener any address for them.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_cross_site(headers: Mapping[str, str]) -> bool:
    """Return whether a browser sent the request for a page of another origin.

    Source: Fetch Metadata Request Headers, section 2.3: `none` is a request that the user started.
    Old browsers and other clients do not send the header.
    """
    return headers.get("sec-fetch-site", "none").strip().lower() in ("cross-site", "same-site")


def _is_unspecified(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return False


def _is_address(text: object, address: IPv4Address | IPv6Address) -> bool:
    try:
        own = ipaddress.ip_address(str(text).partition("%")[0])
    except ValueError:
        return False
    # A dual-stack socket shows IPv4 addresses in the form of IPv6.
    return address in (own, own.ipv4_mapped if isinstance(own, IPv6Address) else None)
