"""Which host a registry's name stands for, and how it is spoken to."""

from __future__ import annotations

import ipaddress
import os
from typing import Final

#: Names of Docker Hub in references, in Docker's config.json and on the wire.
HUB_NAMES: Final = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_API_HOST: Final = "registry-1.docker.io"


def api_host(registry: str) -> str:
    """Return the `host[:port]` that answers for `registry`; Docker Hub's API has its own."""
    return _HUB_API_HOST if registry in HUB_NAMES else registry


def is_loopback(host: str) -> bool:
    """Return whether `host[:port]` can only be this machine (RFC 6761 for `localhost`)."""
    name = _without_port(host).lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def uses_plain_http(host: str, plain_http: bool | None = None) -> bool:
    """Return whether `host[:port]` is spoken to by http rather than https.

    `plain_http` decides where it is given. Otherwise loopback hosts use http, and all hosts do
    where the environment has INSECURE_REGISTRY=true, as with Docker Model Runner.
    """
    if plain_http is not None:
        return plain_http
    return is_loopback(host) or os.environ.get("INSECURE_REGISTRY", "").lower() in ("true", "1")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
