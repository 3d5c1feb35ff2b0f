"""URLs and hosts: which host answers for a registry's name, and which URLs are safe to request."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from modelpack.errors import RegistryError
from modelpack.http.hosts import host_of, is_loopback

#: Names of Docker Hub in references, in Docker's config.json and on the wire.
HUB_NAMES: Final = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_API_HOST: Final = "registry-1.docker.io"


def api_host(registry: str) -> str:
    """Return the `host[:port]` that answers for `registry`; Docker Hub's API has its own."""
    return _HUB_API_HOST if registry in HUB_NAMES else registry


def is_local(host: str) -> bool:
    """Return whether `host[:port]` can only be this machine (RFC 6761 for `localhost`)."""
    name = host_of(host).rstrip(".")
    return is_loopback(name) or name.endswith(".localhost")


def uses_plain_http(host: str, plain_http: bool | None = None) -> bool:
    """Return whether `host[:port]` is spoken to by http rather than https.

    `plain_http` decides where it is given. Otherwise loopback hosts use http, and all hosts do
    where the environment has INSECURE_REGISTRY=true, as with Docker Model Runner.
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
        raise RegistryError(f"{what}: the URL has {len(url)} characters, at most {_MAX_LENGTH} fit")
    if _REFUSED.search(url):
        raise RegistryError(f"{what}: the URL holds a space, a control character or a backslash")
    try:
        parts = urlsplit(quote(url, safe=_LEGAL))
        port = parts.port
    except ValueError:
        raise RegistryError(f"{what}: the URL does not parse") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise RegistryError(f"{what}: expected an http or https URL, got {parts.scheme[:20]!r}")
    if "@" in parts.netloc:
        raise RegistryError(f"{what}: the URL carries a user name")
    if not parts.hostname or not _HOST.match(parts.hostname) or port == 0:
        raise RegistryError(f"{what}: the URL has no usable host")
    return urlunsplit(parts._replace(fragment=""))


def joined_url(base: str, location: str, what: str) -> str:
    """Return where `location`, absolute or relative to `base`, leads.

    Raises `RegistryError` if that is no safe URL, or plain http when `base` is https.
    """
    if _REFUSED.search(location):
        raise RegistryError(f"{what}: the URL holds a space, a control character or a backslash")
    try:
        joined = urljoin(base, location)
    except ValueError:
        raise RegistryError(f"{what}: the URL does not parse") from None
    url = checked_url(joined, what)
    if base.startswith("https:") and not url.startswith("https:"):
        raise RegistryError(
            f"{what}: refused to go from https to plain http, {without_query(url)}",
            hint="a proxy in front of the registry may not tell it that clients use https",
        )
    return url


def with_query(url: str, **parameters: str) -> str:
    """Return `url` with parameters added after those that it has, which stay as they are."""
    added = "&".join(f"{name}={quote(value, safe=':/,')}" for name, value in parameters.items())
    if not added:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=f"{parts.query}&{added}" if parts.query else added))


def without_query(url: str) -> str:
    """Return `url` as errors show it: a query may hold a signature or a session's state."""
    return url.partition("?")[0][:300]
