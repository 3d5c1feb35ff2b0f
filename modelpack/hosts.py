"""Which `Host` headers mean this server.

A page whose host name is made to point at a loopback address (DNS rebinding) speaks to a server
there with its own name in `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable


class AllowedHosts:
    """The hosts that requests may be for: loopback ones, and `names`.

    A name may be an address; one that begins with a dot stands for all names below it.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {host_of(name) for name in names}
        self._endings = tuple(name for name in self._names if name.startswith("."))
        # Bound to all addresses, each of them is ours; rebinding needs a name, not an address.
        self._any_address = any(_is_unspecified(name) for name in self._names)

    def __contains__(self, host: object) -> bool:
        """Return whether a request with this `Host` header is for us."""
        if not isinstance(host, str):
            return False
        name = host_of(host)
        if name == "localhost" or name in self._names:
            return True
        if self._endings and name.endswith(self._endings):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address or address.is_loopback


def host_of(text: str) -> str:
    """Return the host in `host[:port]`, lower case and without the brackets of IPv6."""
    text = text.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    host, colon, _ = text.rpartition(":")
    return host if colon and ":" not in host else text


def is_loopback(host: str) -> bool:
    """Return whether `host` (a name or an address, without a port) stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_unspecified(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return False
