"""The order in which credentials are looked for, where a caller gives none.

The environment first, then REGISTRY_AUTH_FILE, Docker's config.json, and podman's auth.json (OCI
image tools share these files). The first source that has something for the host decides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from modelpack.registry.credentials import Credential, CredentialSource, EnvironmentCredentials
from modelpack.registry.dockerconfig import DockerConfig


class CredentialChain:
    """Several sources as one; the first that knows a host answers for it."""

    def __init__(self, sources: Sequence[CredentialSource]) -> None:
        self._sources = tuple(sources)

    def __repr__(self) -> str:
        return f"CredentialChain({', '.join(map(repr, self._sources))})"

    def credential(self, host: str) -> Credential | None:
        """Return the first credential for `host`; raise `AuthError` where a source is broken."""
        for source in self._sources:
            if credential := source.credential(host):
                return credential
        return None


def default_credentials(repository: str = "") -> CredentialChain:
    """Return what is used where no credentials are given, for `repository` of whatever host."""
    files = [DockerConfig(path, repository=repository) for path in _auth_files()]
    return CredentialChain([EnvironmentCredentials(), *files])


def _auth_files() -> Iterator[Path | None]:
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen)
    yield None  # Docker's own
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    elif sys.platform == "linux":
        yield Path(f"/run/containers/{os.getuid()}/auth.json")
    config = os.environ.get("XDG_CONFIG_HOME")
    yield (Path(config) if config else Path.home() / ".config") / "containers" / "auth.json"
