"""HubSettings: where the hub is, who asks it, and whether it may be asked at all.

All of it is what huggingface_hub finds in the usual places: HF_ENDPOINT, HF_TOKEN, the file that
`hf auth login` writes, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from modelpack.errors import RegistryError, RemoteUnavailableError, UsageError
from modelpack.registry.urls import checked_url

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})  # as huggingface_hub reads them


@dataclass(frozen=True, slots=True)
class HubSettings:
    """`endpoint` is the address of the hub or a mirror; `token` None asks without one."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)
    offline: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> HubSettings:
        """Return what the environment says; raise `UsageError` for an endpoint that is no URL."""
        given = environ.get("HF_ENDPOINT", "").strip().rstrip("/")
        try:
            endpoint = checked_url(given, "HF_ENDPOINT") if given else DEFAULT_ENDPOINT
        except RegistryError as error:
            raise UsageError(
                str(error), hint="expected the address of a hub, like https://hf-mirror.example"
            ) from None
        offline = any(
            environ.get(name, "").upper() in _TRUE
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )
        return cls(endpoint.rstrip("/"), None if offline else _token(environ), offline)

    def check_online(self, what: str) -> None:
        """Raise `RemoteUnavailableError` if nothing may be fetched."""
        if self.offline:
            raise RemoteUnavailableError(
                f"{what}: is not in the store, and HF_HUB_OFFLINE forbids asking the hub",
                hint="unset HF_HUB_OFFLINE, or name a model that is stored",
            )


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return None
    from huggingface_hub import get_token

    return get_token()
