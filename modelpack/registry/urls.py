"""URLs, hosts and addresses: which ones a client of a registry may contact.

A registry on the Internet that sends clients to an address of their own network, by a redirect, an
upload location or a token realm, could read that network through them (server-side request
forgery). `Reach` checks addresses when a connection is made, after the name was resolved, so a name
that resolves to another address the next time is checked again.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
from collections.abc import Collection
from enum import IntEnum
from typing import Final, NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from modelpack.errors import RegistryError
from modelpack.http.hosts import host_of, is_loopback

#: Names of Docker Hub in references, in Docker's config.json and on the wire.
HUB_NAMES: Final = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_API_HOST: Final = "registry-1.docker.io"


def api_host(registry: str) -> str:
    """Return the `host[:port]` of the API of `registry`; Docker Hub's API has its own host."""
    return _HUB_API_HOST if registry in HUB_NAMES else registry


def is_local(host: str) -> bool:
    """Return whether `host[:port]` can only be this machine (RFC 6761 for `localhost`)."""
    name = host_of(host).rstrip(".")
    return is_loopback(name) or name.endswith(".localhost")


def uses_plain_http(host: str, plain_http: bool | None = None) -> bool:
    """Return whether requests to `host[:port]` use http instead of https.

    `plain_http` decides if it is given. Otherwise loopback hosts use http, and so do all hosts with
    INSECURE_REGISTRY=true in the environment, as in Docker Model Runner.
    """
    if plain_http is not None:
        return plain_http
    return is_local(host) or os.environ.get("INSECURE_REGISTRY", "").lower() in ("true", "1")


_DEFAULT_PORTS = {"http": 80, "https": 443}
_REFUSED = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[A-Za-z0-9._-]+\Z|[0-9A-Fa-f:.]+\Z")
# RFC 3986: unreserved, reserved and the percent sign.
_LEGAL = "-._~:/?#[]@!$&'()*+,;=%"
_MAX_LENGTH = 16 * 1024


class Origin(NamedTuple):
    """Scheme, host and port: credentials for one origin go to no other."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """`host[:port]`, without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def origin_of(url: str) -> Origin:
    """Return the origin of a URL that `checked_url` returned."""
    parts = urlsplit(url)
    return Origin(parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])


def checked_url(url: str, what: str) -> str:
    """Return `url` without its fragment if it is an absolute http(s) URL that is safe to request.

    Raises `RegistryError`, which names `what` and never shows the query: it may be a signature.
    """
    if len(url) > _MAX_LENGTH:
        raise RegistryError(
            f"{what}: the URL has {len(url)} characters, more than the limit of {_MAX_LENGTH}"
        )
    _check_characters(url, what)
    try:
        parts = urlsplit(quote(url, safe=_LEGAL))
        port = parts.port
    except ValueError:
        raise RegistryError(f"{what}: the URL does not parse") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise RegistryError(f"{what}: expected an http or https URL, got {parts.scheme[:20]!r}")
    if "@" in parts.netloc:
        raise RegistryError(f"{what}: the URL contains a user name")
    if not parts.hostname or not _HOST.match(parts.hostname) or port == 0:
        raise RegistryError(f"{what}: the URL has no valid host")
    return urlunsplit(parts._replace(fragment=""))


def _check_characters(url: str, what: str) -> None:
    if _REFUSED.search(url):
        raise RegistryError(f"{what}: the URL contains a space, a control character or a backslash")


def joined_url(base: str, location: str, what: str) -> str:
    """Return the absolute URL of `location`, which may be relative to `base`.

    Raises `RegistryError` if it is not safe to request, or plain http although `base` is https.
    """
    _check_characters(location, what)
    try:
        joined = urljoin(base, location)
    except ValueError:
        raise RegistryError(f"{what}: the URL does not parse") from None
    url = checked_url(joined, what)
    if base.startswith("https:") and not url.startswith("https:"):
        raise RegistryError(
            f"{what}: refused to go from https to plain http, {without_query(url)}",
            hint="check whether a proxy before the registry passes on that clients use https",
        )
    return url


def with_query(url: str, **parameters: str) -> str:
    """Return `url` with these parameters after its own, which stay unchanged."""
    added = "&".join(f"{name}={quote(value, safe=':/,')}" for name, value in parameters.items())
    if not added:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=f"{parts.query}&{added}" if parts.query else added))


def without_query(url: str) -> str:
    """Return `url` without its query for errors: it may hold a signature or a session's state."""
    return url.partition("?")[0][:300]


#: An environment variable: private hosts that any registry may send clients to, separated by
#: commas, such as `storage.lan,10.0.0.7:9000`.
ALLOW_PRIVATE: Final = "MODELPACK_ALLOW_PRIVATE"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# RFC 6052, RFC 8215: IPv4 addresses behind a translator.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # deprecated by RFC 4291, still routed by some
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")  # RFC 6598: carriers, and clouds' own services
# RFC 6890. Older versions of Python call most of it global; a cloud's metadata service is in it.
_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")
# RFC 4291: all global unicast addresses. Site-local, IPv4-translated and unassigned addresses are
# outside.
_UNICAST = ipaddress.IPv6Network("2000::/3")


class Scope(IntEnum):
    """The network that an address belongs to.

    A registry may send clients to its own scope and to those before it.
    """

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    SPECIAL = 3  # link-local, where clouds serve secrets; multicast; reserved

    @property
    def words(self) -> str:
        """Return the adjective for error messages."""
        return ("public", "private", "of this machine", "link-local or reserved")[self]


def scope_of(address: str) -> Scope:
    """Return the scope of an IP address, as `getaddrinfo` writes it."""
    try:
        ip: _Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return Scope.SPECIAL
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _embedded(ip)
        if inner is not None:
            return scope_of(str(inner))
        if ip in _LOCAL_NAT64:
            return Scope.PRIVATE
    # The unspecified address connects to this machine.
    if ip.is_loopback or ip.is_unspecified:
        return Scope.LOOPBACK
    if ip.is_link_local or ip.is_multicast or ip in _PROTOCOLS:
        return Scope.SPECIAL
    if ip.is_global and (ip.version == 4 or ip in _UNICAST):
        return Scope.PUBLIC
    return Scope.PRIVATE if ip.is_private or ip in _SHARED else Scope.SPECIAL


def literal_scope(host: str) -> Scope | None:
    """Return the scope of a host that is an address in any notation, or `localhost`; else None."""
    bare = host.strip("[]")
    if is_local(bare):
        return Scope.LOOPBACK
    try:
        return scope_of(str(ipaddress.ip_address(bare.partition("%")[0])))
    except ValueError:
        pass
    try:  # 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to every resolver
        return scope_of(socket.inet_ntoa(socket.inet_aton(bare.rstrip("."))))
    except OSError:
        return None


class Reach:
    """Decides where the client of one registry may connect to; several threads may use it.

    The user named the registry itself, so the address of its first connection is not checked. Its
    scope limits all other hosts, and all later addresses of the registry.
    """

    def __init__(self, own: str, allowed: Collection[str] = ()) -> None:
        """`own` is the registry's host without a port, `allowed` are hosts or `host:port`."""
        self._own = own.strip("[]").lower()
        named = os.environ.get(ALLOW_PRIVATE, "").split(",")
        self._allowed = frozenset(host.strip().lower() for host in (*allowed, *named)) - {""}
        self._lock = threading.Lock()
        self._scope: Scope | None = literal_scope(own)

    def check(self, host: str, port: int, address: str) -> None:
        """Raise `RegistryError` unless `host` may be connected to at `address`."""
        self._check(host, port, scope_of(address), address)

    def check_name(self, host: str, port: int) -> None:
        """Check a host that a proxy will resolve, by its name only; raise as `check`."""
        scope = literal_scope(host)
        if scope is not None:
            self._check(host, port, scope, host)

    def connected(self, host: str, address: str) -> None:
        """Record that `host` was connected to at `address`."""
        if host.strip("[]").lower() == self._own:
            scope = scope_of(address)
            with self._lock:
                self._scope = scope if self._scope is None else min(self._scope, scope)

    def _check(self, host: str, port: int, scope: Scope, address: str) -> None:
        bare = host.strip("[]").lower()
        shown = f"[{bare}]" if ":" in bare else bare
        with self._lock:
            own = self._scope
        if own is None and bare == self._own:
            return
        limit = Scope.PUBLIC if own is None else own
        if scope <= limit or {bare, shown, f"{shown}:{port}"} & self._allowed:
            return
        where = "" if address.strip("[]") == bare else f" ({address})"
        raise RegistryError(
            f"refused to connect to {shown}:{port}{where}: the address is {scope.words}, "
            f"and {self._own} is {limit.words}",
            host=shown,
            hint=f"if you trust this host, use --allow-private {shown}",
        )


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address stands for, if any."""
    if found := ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]):
        return found
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None
